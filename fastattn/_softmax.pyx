"""The driver of softmax, log_softmax and logsumexp: rows over threads. And of merge_attention, a softmax over parts.

Rows that lie contiguously in memory are read and written in place; others pass through a row of scratch.
"""
cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport uintptr_t

from fastattn._arguments cimport (MOST_AXES, ROW_MASK, ROW_OPERANDS, ROW_OUT, ROW_X, Parts, Rows, read_parts,
                                  read_rows)
from fastattn._runtime cimport (FA_F32, FA_F64, FA_ROW_LOG_SOFTMAX, FA_ROW_LOGSUMEXP, FA_ROW_SOFTMAX, Watch,
                                allowed_threads, fa_dtype, fa_kernels, fa_row_function, give_workspace, interrupted,
                                kernels_for, raise_pending, take_workspace)

cdef enum:
    SMALL = 1 << 14        # numbers below which threads cost more than they bring
    CHUNK = 1 << 15        # numbers that a thread takes at a time, at least one row


cdef Py_ssize_t size_of(fa_dtype dtype) noexcept nogil:
    return 8 if dtype == FA_F64 else 4 if dtype == FA_F32 else 2


cdef void copy_row(Rows p, const fa_kernels *kernels, int which, char *memory, char *scratch, fa_dtype dtype,
                   Py_ssize_t scratch_size) noexcept nogil:
    """A row with any strides to contiguous scratch, or for ROW_OUT from it; innermost axis first."""
    cdef Py_ssize_t index[MOST_AXES]
    cdef int axis, last = p.row.count - 1
    cdef Py_ssize_t inner = p.row.shape[last] if last >= 0 else 1, done = 0, i
    cdef Py_ssize_t stride = p.row.strides[which][last] if last >= 0 else 0
    for axis in range(last):
        index[axis] = 0
    while done < p.length:
        if which == ROW_X:
            kernels.gather(scratch + done * scratch_size, memory, stride, inner, dtype)
        elif which == ROW_OUT:
            kernels.scatter(memory, stride, scratch + done * scratch_size, inner, dtype)
        else:
            for i in range(inner):
                scratch[done + i] = memory[i * stride]
        done += inner
        axis = last - 1
        while axis >= 0:
            index[axis] += 1
            memory += p.row.strides[which][axis]
            if index[axis] < p.row.shape[axis]:
                break
            memory -= index[axis] * p.row.strides[which][axis]
            index[axis] = 0
            axis -= 1


cdef bint in_place(Rows p, int which, fa_row_function function) noexcept nogil:
    """Whether the kernels can read or write the rows of an operand where they are."""
    cdef int last = p.row.count - 1
    cdef Py_ssize_t size = 8 if p.dtype == FA_F64 else 4
    if which == ROW_MASK:
        return p.data[which] == NULL or last < 0 or last == 0 and p.row.strides[which][0] == 1
    if last > 0 or not p.aligned or (p.dtype != FA_F64 and p.dtype != FA_F32):
        return False
    return last < 0 or p.row.strides[which][0] == size or which == ROW_OUT and function == FA_ROW_LOGSUMEXP


cdef int run_rows(Rows p, const fa_kernels *kernels, fa_row_function function, Py_ssize_t begin, Py_ssize_t end,
                  char *scratch, Watch *watch, bint caller) noexcept nogil:
    """Rows [begin, end); scratch: two rows in the accumulation dtype and one of bytes, where not all is in place."""
    cdef Py_ssize_t size = 8 if p.dtype == FA_F64 else 4, rest = begin, r = begin, looked = begin, run
    cdef fa_dtype real = FA_F64 if p.dtype == FA_F64 else FA_F32
    cdef Py_ssize_t index[MOST_AXES]
    cdef char *at[<int> ROW_OPERANDS]
    cdef char *x
    cdef char *y
    cdef char *mask
    cdef int axis, k, inner = p.batch.count - 1
    cdef bint x_in_place = in_place(p, ROW_X, function), y_in_place = in_place(p, ROW_OUT, function)
    cdef bint mask_in_place = in_place(p, ROW_MASK, function)
    for k in range(<int> ROW_OPERANDS):
        at[k] = p.data[k]
    for axis in range(inner, -1, -1):
        index[axis] = rest % p.batch.shape[axis]
        rest //= p.batch.shape[axis]
        for k in range(<int> ROW_OPERANDS):
            at[k] += index[axis] * p.batch.strides[k][axis]
    while r < end:
        run = 1
        if x_in_place and y_in_place and mask_in_place:
            # All rows to the end of the innermost batch axis at once.
            if inner >= 0:
                run = min(end - r, p.batch.shape[inner] - index[inner])
                run = max(1, min(run, CHUNK // max(p.length, 1)))
                kernels.rows(function, at[<int> ROW_X], p.batch.strides[<int> ROW_X][inner], at[<int> ROW_MASK],
                             p.batch.strides[<int> ROW_MASK][inner], at[<int> ROW_OUT],
                             p.batch.strides[<int> ROW_OUT][inner], p.length, run)
            else:
                kernels.rows(function, at[<int> ROW_X], 0, at[<int> ROW_MASK], 0, at[<int> ROW_OUT], 0, p.length, 1)
        else:
            x, y, mask = at[<int> ROW_X], at[<int> ROW_OUT], at[<int> ROW_MASK]
            if not x_in_place:
                x = scratch
                copy_row(p, kernels, ROW_X, at[<int> ROW_X], x, p.dtype, size)
            if not mask_in_place:
                mask = scratch + 2 * size * p.length
                copy_row(p, kernels, ROW_MASK, at[<int> ROW_MASK], mask, real, 1)
            if not y_in_place:
                y = scratch + size * p.length
            kernels.rows(function, x, 0, mask, 0, y, 0, p.length, 1)
            if not y_in_place:
                if function == FA_ROW_LOGSUMEXP:
                    kernels.scatter(at[<int> ROW_OUT], size, y, 1, p.out_dtype)
                else:
                    copy_row(p, kernels, ROW_OUT, at[<int> ROW_OUT], y, p.dtype, size)
        r += run
        axis = inner
        while axis >= 0:
            index[axis] += run
            for k in range(<int> ROW_OPERANDS):
                at[k] += run * p.batch.strides[k][axis]
            if index[axis] < p.batch.shape[axis]:
                break
            for k in range(<int> ROW_OPERANDS):
                at[k] -= index[axis] * p.batch.strides[k][axis]
            index[axis] = 0
            run = 1
            axis -= 1
        if watch != NULL and (r - looked) * (p.length + 64) > CHUNK:
            looked = r
            if interrupted(watch, caller):
                return 1
    return 0


cdef void run_parallel(Rows p, const fa_kernels *kernels, fa_row_function function, Py_ssize_t chunk, int threads,
                       char *scratch, size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t c, chunks = (p.rows + chunk - 1) // chunk
    with nogil, parallel(num_threads=threads):
        for c in prange(chunks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_rows(p, kernels, function, c * chunk, min(p.rows, (c + 1) * chunk),
                         scratch + threadid() * scratch_size, watch, threadid() == 0)


cdef object run(Rows p, fa_row_function function):
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef double numbers = <double> p.rows * (p.length + 64)
    cdef Watch watch = Watch(0, 0)
    cdef bint small = numbers < SMALL
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef Py_ssize_t chunk = max(1, CHUNK // max(p.length, 1))
    cdef size_t size = 64
    cdef char *scratch
    if not (in_place(p, ROW_X, function) and in_place(p, ROW_OUT, function) and in_place(p, ROW_MASK, function)):
        size = ((2 * p.length + 1) * (8 if p.dtype == FA_F64 else 4) + p.length + 63) // 64 * 64
    if p.rows and (p.length or function == FA_ROW_LOGSUMEXP):
        threads = <int> min(<Py_ssize_t> threads, (p.rows + chunk - 1) // chunk)
        scratch = <char *> take_workspace(size * threads, 24.0 * threads * (p.length + 64))
        try:
            if small:
                run_rows(p, kernels, function, 0, p.rows, scratch, NULL, True)
            elif threads <= 1:
                with nogil:
                    run_rows(p, kernels, function, 0, p.rows, scratch, &watch, True)
            else:
                with nogil:
                    run_parallel(p, kernels, function, chunk, threads, scratch, size, &watch)
        finally:
            give_workspace(scratch)
        if watch.stop:
            raise_pending()
    return p.answer


def softmax(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_SOFTMAX)


def log_softmax(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_LOG_SOFTMAX)


def logsumexp(x, axis, keepdims, mask, out, num_threads):
    answer = run(read_rows(x, axis, mask, out, num_threads, True, keepdims), FA_ROW_LOGSUMEXP)
    return answer[()] if out is None else answer


cdef void merge_row(Parts p, const fa_kernels *kernels, Py_ssize_t row, char *out, char *lse,
                    char *scratch) noexcept nogil:
    """scratch: parts pointers, then parts numbers, then parts rows, in the accumulation dtype."""
    cdef Py_ssize_t size = 8 if p.dtype == FA_F64 else 4, part, index, rest
    cdef const void **pointers = <const void **> scratch
    cdef char *lses = scratch + p.parts * sizeof(void *)
    cdef char *rows = lses + p.parts * size
    cdef const char *out_part
    cdef const char *lse_part
    cdef int axis
    for part in range(p.parts):
        out_part = <const char *> <uintptr_t> p.out_at[part]
        lse_part = <const char *> <uintptr_t> p.lse_at[part]
        rest = row
        for axis in range(p.shape.shape[0] - 1, -1, -1):
            index = rest % p.shape[axis]
            rest //= p.shape[axis]
            out_part += index * p.out_strides[part, axis]
            lse_part += index * p.lse_strides[part, axis]
        kernels.gather(lses + part * size, lse_part, size, 1, <fa_dtype> p.lse_dtype[part])
        kernels.gather(rows + part * p.value_dim * size, out_part, p.out_strides[part, p.shape.shape[0]], p.value_dim,
                       <fa_dtype> p.out_dtype[part])
        pointers[part] = rows + part * p.value_dim * size
    kernels.merge(out, lse, pointers, lses, p.parts, p.value_dim)


cdef void merge_rows(Parts p, const fa_kernels *kernels, char *out, char *lse, char *scratch, size_t scratch_size,
                     int threads, Watch *watch) noexcept nogil:
    cdef Py_ssize_t row, real = 8 if p.dtype == FA_F64 else 4
    cdef char *mine
    cdef char *merged
    with nogil, parallel(num_threads=threads):
        for row in prange(p.rows, schedule="static"):
            if interrupted(watch, threadid() == 0):
                continue
            mine = scratch + threadid() * scratch_size
            merged = mine + p.parts * (sizeof(void *) + real + p.value_dim * real)
            merge_row(p, kernels, row, merged, lse + row * real, mine)
            kernels.scatter(out + row * p.value_dim * size_of(p.dtype), size_of(p.dtype), merged, p.value_dim, p.dtype)


def merge_attention(outs, lses):
    cdef Parts p = read_parts(outs, lses)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef Py_ssize_t real = 8 if p.dtype == FA_F64 else 4
    cdef double numbers = <double> p.rows * p.parts * p.value_dim
    cdef int threads = 1 if numbers < SMALL else allowed_threads(None)
    cdef size_t size = (p.parts * (sizeof(void *) + real) + (p.parts + 1) * p.value_dim * real + 63) // 64 * 64
    cdef char *out = cnp.PyArray_BYTES(p.out)
    cdef char *lse = cnp.PyArray_BYTES(p.lse)
    cdef char *scratch
    cdef Watch watch = Watch(0, 0)
    if p.rows == 0:
        return p.out, p.lse
    scratch = <char *> take_workspace(size * threads, 8.0 * threads * (p.parts + 2) * (p.value_dim + 2))
    with nogil:
        merge_rows(p, kernels, out, lse, scratch, size, threads, &watch)
    give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.out, p.lse
