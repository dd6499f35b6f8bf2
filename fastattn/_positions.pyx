"""The driver of apply_rotary: runs of rows over threads, and the tables of cosines and sines.

A table costs more than the rotation that it is for, and the same one is wanted again at once: for the key after the
query, and for the next layer. So the last few are kept (KEPT_TABLES, and KEPT_BYTES in all; the oldest goes first).
What a table holds depends on base, number of pairs and position alone, so no bit depends on whether it was kept. The
GIL guards the list; a table is complete before it gets there, never changes, and lives as long as a call uses it. A
longer table is not made: each run of rows makes its own part of it, once for all heads that share it.
"""
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport pow
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcmp, memcpy

from fastattn._arguments cimport ROW_OUT, ROW_X, Axes, Rotation, read_rotation
from fastattn._runtime cimport (FA_F32, FA_F64, Watch, allowed_threads, fa_dtype, fa_kernels, give_workspace,
                                interrupted, kernels_for, raise_pending, take_workspace)

cdef enum:
    SMALL = 1 << 16        # numbers below which threads cost more than they bring
    SMALL_TABLE = 1 << 12  # the same for pairs of a table
    CHUNK = 1 << 15        # numbers that a thread takes at a time, at least one row
    TABLE_CHUNK = 1 << 12  # pairs of a table in a run of rows, so that they stay in a near cache; at least one row
    KEPT_TABLES = 4
    KEPT_BYTES = 16 << 20


cdef class Table:
    """Turns of rows at offset, offset + 1, ... for each of some offsets; cosines, then sines of each row."""
    cdef double base
    cdef Py_ssize_t pairs, count, length, size      # count: of offsets; size: in bytes
    cdef fa_dtype real
    cdef int64_t *offsets
    cdef double *speed                              # radians a position, one a pair
    cdef char *turns
    cdef void *memory

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


cdef list kept = []  # tables, the last used one first


cdef Table new_table(Rotation p, fa_dtype real, Py_ssize_t size):
    """For the offsets of a call, with its speeds; the turns are still to be made. size: bytes of them, 0 for none."""
    cdef Table table = Table.__new__(Table), other
    cdef Py_ssize_t i
    # Cache lines apart from each other, and turns at the start of one.
    cdef Py_ssize_t offset_size = (p.cell_count * 8 + 63) // 64 * 64, speed_size = (p.pairs * 8 + 63) // 64 * 64
    table.memory = PyMem_RawMalloc(offset_size + speed_size + size + 64)
    if table.memory == NULL:
        raise MemoryError(f"no memory for a table of {size} bytes")
    table.offsets = <int64_t *> (<char *> table.memory + 64 - <uintptr_t> table.memory % 64)
    table.speed = <double *> (<char *> table.offsets + offset_size)
    table.turns = <char *> table.speed + speed_size
    table.base, table.pairs, table.count, table.length = p.base, p.pairs, p.cell_count, p.length
    table.real = real
    table.size = offset_size + speed_size + size
    memcpy(table.offsets, p.offsets, p.cell_count * 8)
    for other in kept:
        if other.base == p.base and other.pairs == p.pairs:
            memcpy(table.speed, other.speed, p.pairs * 8)
            return table
    for i in range(p.pairs):
        table.speed[i] = pow(p.base, -<double> i / <double> p.pairs)
    return table


cdef void make_row(Table table, const fa_kernels *kernels, Py_ssize_t row) noexcept nogil:
    kernels.turns(table.turns + row * 2 * table.pairs * (8 if table.real == FA_F64 else 4), table.speed, table.pairs,
                  table.offsets[row // table.length] + row % table.length)


cdef void make_turns(Table table, const fa_kernels *kernels, int threads) noexcept nogil:
    cdef Py_ssize_t row, rows = table.count * table.length
    with nogil, parallel(num_threads=threads):
        for row in prange(rows, schedule="static"):
            make_row(table, kernels, row)


cdef const char *turns_of(Table table, Rotation p) noexcept:
    """Where the turns of a call begin in a table; NULL if they are not there."""
    cdef Py_ssize_t row = p.offsets[0] - table.offsets[0]
    if table.count != p.cell_count:
        return NULL
    if p.cell_count == 1:
        if row < 0 or row > table.length - p.length:
            return NULL
        return table.turns + row * 2 * p.pairs * (8 if table.real == FA_F64 else 4)
    if table.length != p.length or memcmp(table.offsets, p.offsets, p.cell_count * 8):
        return NULL
    return table.turns


cdef Table find_table(Rotation p, const fa_kernels *kernels, fa_dtype real, const char **turns):
    """A table for a call; turns: where its rows begin, NULL where they are too many to be held."""
    cdef Table table
    cdef Py_ssize_t size, total, i, rows = p.cell_count * p.length
    cdef int threads
    for i in range(len(kept)):
        table = kept[i]
        if table.base == p.base and table.pairs == p.pairs and table.real == real:
            turns[0] = turns_of(table, p)
            if turns[0] != NULL:
                if i:
                    kept.insert(0, kept.pop(i))
                return table
    turns[0] = NULL
    if 16.0 * rows * p.pairs + 8.0 * (p.cell_count + p.pairs) > KEPT_BYTES:
        return new_table(p, real, 0)
    size = rows * p.pairs * (16 if real == FA_F64 else 8)
    table = new_table(p, real, size)
    if rows * p.pairs < SMALL_TABLE:
        for i in range(rows):
            make_row(table, kernels, i)
    else:
        threads = <int> min(<Py_ssize_t> allowed_threads(p.num_threads), rows)
        with nogil:
            make_turns(table, kernels, threads)
    turns[0] = table.turns
    # From here to the end no other thread comes in between.
    kept.insert(0, table)
    total = 0
    for i in range(len(kept)):
        total += (<Table> kept[i]).size
        if total > KEPT_BYTES or i == KEPT_TABLES:
            del kept[i:]
            break
    return table


# How a call is cut into tasks: a run of rows, for some of the members of a cell.
cdef struct Cut:
    Py_ssize_t rows, members            # in a task
    Py_ssize_t row_runs, member_runs    # in a cell
    Py_ssize_t tasks
    Py_ssize_t real                     # bytes of a number in the kernels
    bint in_place                       # they can read and write the rows where they are


cdef Cut cut_of(Rotation p, const char *turns) noexcept:
    cdef Cut cut
    cdef Py_ssize_t size = 8 if p.dtype == FA_F64 else 4
    cut.real = size
    cut.in_place = (p.dtype == FA_F64 or p.dtype == FA_F32) and p.col[<int> ROW_X] == size == p.col[<int> ROW_OUT]
    cut.rows = min(p.length, max(1, TABLE_CHUNK // max(p.pairs, 1)))
    # A table that is not there is made once for all members.
    cut.members = p.member_count
    if turns != NULL:
        cut.members = min(p.member_count, max(1, CHUNK // (cut.rows * max(p.channels, 1))))
    cut.row_runs = (p.length + cut.rows - 1) // cut.rows
    cut.member_runs = (p.member_count + cut.members - 1) // cut.members
    cut.tasks = p.cell_count * cut.row_runs * cut.member_runs
    return cut


cdef void locate(const Axes *axes, Py_ssize_t number, Py_ssize_t *x, Py_ssize_t *out) noexcept nogil:
    """Adds the bytes to the so many-th element of some axes."""
    cdef int axis
    cdef Py_ssize_t index
    for axis in range(axes.count - 1, -1, -1):
        index = number % axes.shape[axis]
        number //= axes.shape[axis]
        x[0] += index * axes.strides[<int> ROW_X][axis]
        out[0] += index * axes.strides[<int> ROW_OUT][axis]


cdef void rotate_rows(Rotation p, const Cut *cut, const fa_kernels *kernels, char *x, char *out, const char *turns,
                      Py_ssize_t rows, char *scratch) noexcept nogil:
    """Rows of one member. scratch: a row in the accumulation dtype."""
    cdef Py_ssize_t i
    if cut.in_place:
        kernels.rotate(out, p.row[<int> ROW_OUT], x, p.row[<int> ROW_X], turns, p.channels, p.pairs, rows,
                       p.interleaved)
        return
    for i in range(rows):
        kernels.gather(scratch, x + i * p.row[<int> ROW_X], p.col[<int> ROW_X], p.channels, p.dtype)
        kernels.rotate(scratch, 0, scratch, 0, turns + i * 2 * p.pairs * cut.real, p.channels, p.pairs, 1,
                       p.interleaved)
        kernels.scatter(out + i * p.row[<int> ROW_OUT], p.col[<int> ROW_OUT], scratch, p.channels, p.dtype)


cdef void run_task(Rotation p, const Cut *cut, Table table, const char *turns, const fa_kernels *kernels,
                   Py_ssize_t task, char *scratch) noexcept nogil:
    """scratch: a row, and behind it a run of rows of the table, where that is not there as a whole."""
    cdef Py_ssize_t member = task % cut.member_runs * cut.members, rest = task // cut.member_runs
    cdef Py_ssize_t row = rest % cut.row_runs * cut.rows, cell = rest // cut.row_runs
    cdef Py_ssize_t rows = min(cut.rows, p.length - row), end = min(p.member_count, member + cut.members), i
    cdef Py_ssize_t cell_x = row * p.row[<int> ROW_X], cell_out = row * p.row[<int> ROW_OUT], x, out
    cdef char *own
    if turns != NULL:
        turns += (cell * p.length + row) * 2 * p.pairs * cut.real
    else:
        own = scratch + (p.channels * cut.real + 63) // 64 * 64
        for i in range(rows):
            kernels.turns(own + i * 2 * p.pairs * cut.real, table.speed, p.pairs, p.offsets[cell] + row + i)
        turns = own
    locate(&p.cells, cell, &cell_x, &cell_out)
    for i in range(member, end):
        x, out = cell_x, cell_out
        locate(&p.members, i, &x, &out)
        rotate_rows(p, cut, kernels, p.data[<int> ROW_X] + x, p.data[<int> ROW_OUT] + out, turns, rows, scratch)


cdef void run_parallel(Rotation p, const Cut *cut, Table table, const char *turns, const fa_kernels *kernels,
                       int threads, char *scratch, size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    with nogil, parallel(num_threads=threads):
        for task in prange(cut.tasks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_task(p, cut, table, turns, kernels, task, scratch + threadid() * scratch_size)


def apply_rotary(x, offset, base, interleaved, rotary_dim, out, num_threads):
    cdef Rotation p = read_rotation(x, offset, base, interleaved, rotary_dim, out, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef double numbers = <double> p.cell_count * p.member_count * p.length * p.channels
    cdef bint small = numbers < SMALL
    cdef Watch watch = Watch(0, 0)
    cdef Table table
    cdef const char *turns
    cdef char *scratch
    cdef Cut cut
    cdef Py_ssize_t task
    cdef size_t size
    cdef int threads
    if numbers == 0:
        return p.answer
    table = find_table(p, kernels, FA_F64 if p.dtype == FA_F64 else FA_F32, &turns)
    cut = cut_of(p, turns)
    size = (p.channels * cut.real + 63) // 64 * 64
    if turns == NULL:
        size += (cut.rows * 2 * p.pairs * cut.real + 63) // 64 * 64
    threads = 1 if small else <int> min(<Py_ssize_t> allowed_threads(num_threads), cut.tasks)
    scratch = <char *> take_workspace(size * threads, 24.0 * threads * (p.channels + 64))
    try:
        if small:
            for task in range(cut.tasks):
                run_task(p, &cut, table, turns, kernels, task, scratch)
        else:
            with nogil:
                run_parallel(p, &cut, table, turns, kernels, threads, scratch, size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.answer
