# cython: wraparound=True
"""Tokens of caches: as int8, which walks the rows of strided arrays for the kernels (kernels/quantize.inc.h) and says
which number cannot be quantized; the means that are taken off keys; and moved to the front.

Shapes and dtypes are the caller's affair. One thread: this is a pass over memory, small beside the products that made
the keys.
"""
import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t
from libc.string cimport memmove, memset

from fastattn._checks cimport shape_of, storage_of
from fastattn._runtime cimport (FA_F32, FA_F64, FA_I8, fa_dtype, fa_kernels, fa_quantize, give_workspace, kernels_for,
                                take_workspace)

cnp.import_array()

cdef enum:
    FEW = 1 << 14   # numbers of a head up to which others wait for Python's lock
    MANY = 1 << 20  # numbers between two looks for Ctrl-C


cdef char *lead(cnp.ndarray a, int64_t number) noexcept:
    """Where the matrix with this number begins, counted over all axes but the last two."""
    cdef char *data = <char *> cnp.PyArray_DATA(a)
    cdef int i
    for i in range(cnp.PyArray_NDIM(a) - 3, -1, -1):
        data += number % cnp.PyArray_DIM(a, i) * cnp.PyArray_STRIDE(a, i)
        number //= cnp.PyArray_DIM(a, i)
    return data


cdef int64_t leads(cnp.ndarray a) noexcept:
    cdef int64_t count = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(a) - 2):
        count *= cnp.PyArray_DIM(a, i)
    return count


cdef object refusal(str name, cnp.ndarray x, int64_t number, int64_t token, cnp.ndarray center, cnp.ndarray scales):
    """Why this row of x cannot be quantized."""
    head = tuple([int(i) for i in np.unravel_index(number, shape_of(x)[:-2])]) if cnp.PyArray_NDIM(x) > 2 else ()
    tokens, less = (<object> x)[head], 0.0
    if center is not None:
        less = (<object> center)[head]
        if not np.isfinite(less).all():  # a mean, so that other rows are to blame
            token = int(np.argmin(np.isfinite(tokens.astype(np.float32)).all(axis=-1)))
    row = tokens[token].astype(np.float64)
    rounded = row.astype(np.float32)
    for numbers, why in (
        (row, "only finite numbers can be quantized"),
        (rounded, "it is larger than float32 allows"),
        ((rounded - less).ravel(), "less its center it is larger than float32 allows"),
    ):
        if not np.isfinite(numbers).all():
            break
    else:
        why = f"its scale is larger than scale_dtype={scales.dtype} allows; float32 and bfloat16 allow more"
        numbers = -abs((rounded - less).ravel())
    wrong = int(np.argmin(np.isfinite(numbers) if not np.isfinite(numbers).all() else numbers))
    return ValueError(f"{name}[{', '.join(map(str, (*head, token, wrong)))}] is {row[wrong]}: {why}")


cdef int place_int8(str name, cnp.ndarray x, cnp.ndarray center, cnp.ndarray to, cnp.ndarray scales,
                    const int64_t *first, const int64_t *count, const int64_t *at) except -1:
    cdef const fa_kernels *kernels = kernels_for(FA_F32)
    cdef int axes = cnp.PyArray_NDIM(x)
    cdef int64_t heads = cnp.PyArray_DIM(x, axes - 3) if axes > 2 else 1, number, b, begin, end, stop, done
    cdef fa_quantize rows
    cdef void *workspace
    rows.n = cnp.PyArray_DIM(x, axes - 1)
    rows.group = rows.n // max(cnp.PyArray_DIM(scales, axes - 1), 1)
    rows.x.dtype, rows.x.row, rows.x.col = storage_of(x, name), cnp.PyArray_STRIDE(x, axes - 2), cnp.PyArray_STRIDE(
        x, axes - 1)
    rows.to.dtype, rows.to.row, rows.to.col = FA_I8, cnp.PyArray_STRIDE(to, axes - 2), 1
    rows.scales.dtype, rows.scales.row = storage_of(scales, "scales"), cnp.PyArray_STRIDE(scales, axes - 2)
    rows.scales.col = cnp.PyArray_STRIDE(scales, axes - 1)
    rows.center = NULL
    workspace = take_workspace(kernels.quantize_workspace(rows.n), <double> rows.n * 4)
    try:
        for number in range(leads(x)):
            b = number // heads
            begin, end = 0, cnp.PyArray_DIM(x, axes - 2) if count == NULL else count[b]
            rows.x.data = lead(x, number)
            rows.to.data, rows.scales.data = lead(to, number), lead(scales, number)
            if first != NULL:
                rows.x.data += first[b] * rows.x.row
            if at != NULL:
                rows.to.data += at[b] * rows.to.row
                rows.scales.data += at[b] * rows.scales.row
            if center is not None:
                rows.center = <const float *> lead(center, number)
            while begin < end:
                if (end - begin) * rows.n <= FEW:
                    stop = end
                    done = kernels.quantize(&rows, begin, stop, workspace)
                else:
                    stop = min(end, begin + MANY // rows.n + 1)
                    with nogil:
                        done = kernels.quantize(&rows, begin, stop, workspace)
                    PyErr_CheckSignals()
                if done < stop:
                    with np.errstate(all="ignore"):
                        raise refusal(name, x, number, done + (0 if first == NULL else first[b]), center, scales)
                begin = stop
    finally:
        give_workspace(workspace)
    return 0


cdef int64_t *numbers_of(cnp.ndarray a) noexcept:
    return NULL if a is None else <int64_t *> cnp.PyArray_DATA(a)


def place(str name, cnp.ndarray x, cnp.ndarray center, cnp.ndarray to, cnp.ndarray scales, cnp.ndarray first=None,
          cnp.ndarray count=None, cnp.ndarray at=None):
    """place_int8 for Python; the last three: contiguous, int64."""
    place_int8(name, x, center, to, scales, numbers_of(first), numbers_of(count), numbers_of(at))


def mean_of_tokens(cnp.ndarray x, cnp.ndarray to, cnp.ndarray count=None, cnp.ndarray chosen=None):
    """
    The means over the tokens of x, (..., tokens, channels), into `to`, (..., 1, channels), float32 and contiguous.

    count: how many of the tokens of each sequence count, contiguous, int64, as for place_int8; chosen: bool, the
    sequences whose means are wanted. Means of no tokens are left as they are. The sum is in double and in order, so
    that its bits do not depend on the layout.
    """
    cdef const fa_kernels *kernels = kernels_for(FA_F64)
    cdef int axes = cnp.PyArray_NDIM(x)
    cdef int64_t n = cnp.PyArray_DIM(x, axes - 1), heads = cnp.PyArray_DIM(x, axes - 3) if axes > 2 else 1
    cdef int64_t number, b, begin, end, stop, token, c
    cdef Py_ssize_t row = cnp.PyArray_STRIDE(x, axes - 2), col = cnp.PyArray_STRIDE(x, axes - 1)
    cdef fa_dtype dtype = storage_of(x, "x")
    cdef const char *data
    cdef double *sums
    cdef double *numbers
    cdef float *mean
    cdef void *workspace = take_workspace(2 * <size_t> n * sizeof(double), <double> n * 16)
    sums = <double *> workspace
    numbers = sums + n
    try:
        for number in range(leads(x)):
            b = number // heads
            begin, end = 0, cnp.PyArray_DIM(x, axes - 2) if count is None else numbers_of(count)[b]
            if end == 0 or chosen is not None and not (<const char *> cnp.PyArray_DATA(chosen))[b]:
                continue
            data = lead(x, number)
            memset(sums, 0, <size_t> n * sizeof(double))
            while begin < end:
                stop = min(end, begin + MANY // (n + 1) + 1)
                with nogil:
                    for token in range(begin, stop):
                        kernels.gather(numbers, data + token * row, col, n, dtype)
                        kernels.linear_add(sums, 0, numbers, 0, 1.0, NULL, 1, n)
                PyErr_CheckSignals()
                begin = stop
            mean = <float *> lead(to, number)
            for c in range(n):
                mean[c] = <float> (sums[c] / <double> end)
    finally:
        give_workspace(workspace)


def move_tokens(list arrays, cnp.ndarray there, cnp.ndarray kept):
    """In arrays (..., heads, places, channels), contiguous, the last `kept` of the first `there` tokens of each
    sequence become its first ones; both int64. Needs no memory once it has begun."""
    cdef int64_t heads, places, row, b, h
    cdef char *data
    cdef cnp.ndarray a
    cdef int axes
    for a in arrays:
        axes = cnp.PyArray_NDIM(a)
        heads, places = cnp.PyArray_DIM(a, axes - 3), cnp.PyArray_DIM(a, axes - 2)
        row = cnp.PyArray_DIM(a, axes - 1) * cnp.PyArray_ITEMSIZE(a)
        data = <char *> cnp.PyArray_DATA(a)
        for b in range(cnp.PyArray_SIZE(there)):
            for h in range(heads if numbers_of(kept)[b] < numbers_of(there)[b] else 0):
                memmove(data + (b * heads + h) * places * row,
                        data + ((b * heads + h) * places + numbers_of(there)[b] - numbers_of(kept)[b]) * row,
                        numbers_of(kept)[b] * row)
