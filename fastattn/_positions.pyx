"""The driver of apply_rotary: runs of rows over threads, and the tables of cosines and sines.

The same table is wanted again at once: for the key after the query, and for the next layer. So the last few are kept
(KEPT_TABLES, and KEPT_BYTES in all; the oldest goes first). What a row of a table holds depends on its position, the
speeds of the pairs and the factor alone, so no bit depends on whether it was kept. The GIL guards the list; a table is
complete before it gets there, never changes, and lives as long as a call uses it.

Where positions lie close together (a run of tokens, packed sequences that begin again and again, a tree) the table
holds each position from the least to the greatest once, and a later call with any positions in between finds its rows
there; where they are scattered it holds a row for each row of x, once for all heads that share it. A table that would
be longer than what is kept is not made: each run of rows makes its own part of it, again once for those heads.
"""
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport pow
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcmp, memcpy

from fastattn._arguments cimport ROW_OUT, ROW_X, Axes, Rotation, read_rotation
from fastattn._runtime cimport (FA_F32, FA_F64, Team, Watch, allowed_threads, fa_dtype, fa_kernels, gathered,
                                give_workspace, interrupted, join_team, kernels_for, raise_pending, take_workspace)

cdef enum:
    SMALL = 1 << 16        # numbers below which threads cost more than they bring
    SMALL_TABLE = 1 << 15  # the same for pairs of a table
    CHUNK = 1 << 15        # numbers that a thread takes at a time, at least one row
    TABLE_CHUNK = 1 << 12  # pairs of a table in a run of rows, so that they stay in a near cache; at least one row
    GATHERED = 4           # times the numbers of CHUNK, where rows of a table are brought together
    MANY_RUNS = 8          # of rows: tasks enough
    KEPT_TABLES = 4
    KEPT_BYTES = 16 << 20


cdef class Table:
    """Turns of rows at some positions; cosines, then sines of each row, times the factor."""
    cdef double base                                # 0 where the speeds are the caller's own
    cdef double factor
    cdef Py_ssize_t pairs, rows, size               # size: in bytes
    cdef fa_dtype real
    cdef int64_t first                              # position of row 0
    cdef int64_t *positions                         # of all rows; NULL: first, first + 1, ...
    cdef double *speed                              # radians a position, one a pair
    cdef char *turns
    cdef void *memory

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


cdef list kept = []  # tables, the last used one first


cdef bint same_speeds(Table table, Rotation p) noexcept:
    if table.pairs != p.pairs or table.base != p.base:
        return False
    return p.frequencies == NULL or memcmp(table.speed, p.frequencies, p.pairs * 8) == 0


cdef Table new_table(Rotation p, fa_dtype real, Py_ssize_t rows, bint dense):
    """For a call, with its speeds; the turns are still to be made. dense: of rows that follow each other."""
    cdef Table table = Table.__new__(Table), other
    cdef Py_ssize_t i
    # Cache lines apart from each other, and turns at the start of one.
    cdef Py_ssize_t positions_size = 0 if dense else (rows * 8 + 63) // 64 * 64
    cdef Py_ssize_t speed_size = (p.pairs * 8 + 63) // 64 * 64
    cdef Py_ssize_t turns_size = rows * p.pairs * (16 if real == FA_F64 else 8)
    table.size = positions_size + speed_size + turns_size
    table.memory = PyMem_RawMalloc(table.size + 64)
    if table.memory == NULL:
        raise MemoryError(f"no memory for a table of {table.size} bytes")
    table.speed = <double *> (<char *> table.memory + 64 - <uintptr_t> table.memory % 64)
    table.turns = <char *> table.speed + speed_size
    table.positions = NULL
    if not dense:
        table.positions = <int64_t *> (table.turns + turns_size)
        memcpy(table.positions, p.positions, rows * 8)
    table.base, table.factor, table.pairs, table.rows, table.first = p.base, p.factor, p.pairs, rows, p.least
    table.real = real
    if p.frequencies != NULL:
        memcpy(table.speed, p.frequencies, p.pairs * 8)
        return table
    for other in kept:
        if same_speeds(other, p):
            memcpy(table.speed, other.speed, p.pairs * 8)
            return table
    for i in range(p.pairs):
        table.speed[i] = pow(p.base, -<double> i / <double> p.pairs)
    return table


cdef void make_row(Table table, const fa_kernels *kernels, Py_ssize_t row) noexcept nogil:
    kernels.turns(table.turns + row * 2 * table.pairs * (8 if table.real == FA_F64 else 4), table.speed, table.pairs,
                  table.first + row if table.positions == NULL else table.positions[row], table.factor)


cdef void make_turns(Table table, const fa_kernels *kernels, int threads) noexcept nogil:
    cdef Py_ssize_t row
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for row in prange(table.rows, schedule="static"):
            make_row(table, kernels, row)


cdef bint has_rows(Table table, Rotation p) noexcept:
    """Whether a table with the speeds of a call has all rows for it."""
    if table.positions == NULL:
        return table.first <= p.least and p.greatest - table.first < table.rows
    return (p.positions != NULL and table.rows == p.cell_count * p.length
            and memcmp(table.positions, p.positions, table.rows * 8) == 0)


cdef Table find_table(Rotation p, const fa_kernels *kernels, fa_dtype real):
    """A table for a call; without rows where they are too many to be held."""
    cdef Table table
    cdef Py_ssize_t total, i, rows = p.cell_count * p.length
    cdef int threads
    cdef bint dense
    for i in range(len(kept)):
        table = kept[i]
        if same_speeds(table, p) and table.factor == p.factor and table.real == real and has_rows(table, p):
            if i:
                kept.insert(0, kept.pop(i))
            return table
    dense = p.greatest - p.least < rows
    if dense:
        rows = p.greatest - p.least + 1
    if 16.0 * rows * p.pairs + 8.0 * (rows + p.pairs) > KEPT_BYTES:
        return new_table(p, real, 0, True)
    table = new_table(p, real, rows, dense)
    if rows * p.pairs < SMALL_TABLE:
        for i in range(rows):
            make_row(table, kernels, i)
    else:
        threads = <int> min(<Py_ssize_t> allowed_threads(p.num_threads), rows)
        with nogil:
            make_turns(table, kernels, threads)
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


cdef Cut cut_of(Rotation p, Table table) noexcept:
    cdef Cut cut
    cdef Py_ssize_t size = 8 if p.dtype == FA_F64 else 4
    cut.real = size
    cut.in_place = (p.dtype == FA_F64 or p.dtype == FA_F32) and p.col[<int> ROW_X] == size == p.col[<int> ROW_OUT]
    cut.rows = min(p.length, max(1, TABLE_CHUNK // max(p.pairs, 1)))
    cut.row_runs = (p.length + cut.rows - 1) // cut.rows
    # A table that is not there is made once for all members. Rows of one that are brought together: for more members
    # than those that are read where they are, as long as there are tasks for all threads.
    cut.members = p.member_count
    if table.rows:
        cut.members = min(p.member_count, max(1, CHUNK // (cut.rows * max(p.channels, 1))))
        if p.positions != NULL and table.positions == NULL and p.cell_count * cut.row_runs >= MANY_RUNS:
            cut.members = min(p.member_count, GATHERED * cut.members)
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


cdef int64_t position_of(Rotation p, Py_ssize_t number) noexcept nogil:
    """Of a row, counted through all cells."""
    return p.least + number if p.positions == NULL else p.positions[number]


cdef const char *turns_of(Rotation p, const Cut *cut, Table table, const fa_kernels *kernels, Py_ssize_t number,
                          Py_ssize_t rows, char *own) noexcept nogil:
    """Turns of some rows, one behind the other: where they are in the table, or made or brought together in `own`."""
    cdef Py_ssize_t size = 2 * p.pairs * cut.real, i
    cdef const int64_t *positions
    if table.rows == 0:
        for i in range(rows):
            kernels.turns(own + i * size, table.speed, p.pairs, position_of(p, number + i), table.factor)
        return own
    if table.positions != NULL:
        return table.turns + number * size
    if p.positions == NULL:
        return table.turns + (p.least + number - table.first) * size
    positions = p.positions + number
    for i in range(1, rows):
        if positions[i] != positions[0] + i:
            break
    else:
        return table.turns + (positions[0] - table.first) * size
    for i in range(rows):
        memcpy(own + i * size, table.turns + (positions[i] - table.first) * size, size)
    return own


cdef void run_task(Rotation p, const Cut *cut, Table table, const fa_kernels *kernels, Py_ssize_t task,
                   char *scratch) noexcept nogil:
    """scratch: a row, and behind it a run of rows of turns."""
    cdef Py_ssize_t member = task % cut.member_runs * cut.members, rest = task // cut.member_runs
    cdef Py_ssize_t row = rest % cut.row_runs * cut.rows, cell = rest // cut.row_runs
    cdef Py_ssize_t rows = min(cut.rows, p.length - row), end = min(p.member_count, member + cut.members), i
    cdef Py_ssize_t number = cell * p.length + row  # of the first row, counted through all cells
    cdef Py_ssize_t cell_x = row * p.row[<int> ROW_X], cell_out = row * p.row[<int> ROW_OUT], x, out
    cdef char *own = scratch + (p.channels * cut.real + 63) // 64 * 64
    cdef const char *turns = turns_of(p, cut, table, kernels, number, rows, own)
    locate(&p.cells, cell, &cell_x, &cell_out)
    for i in range(member, end):
        x, out = cell_x, cell_out
        locate(&p.members, i, &x, &out)
        rotate_rows(p, cut, kernels, p.data[<int> ROW_X] + x, p.data[<int> ROW_OUT] + out, turns, rows, scratch)


cdef void run_parallel(Rotation p, const Cut *cut, Table table, const fa_kernels *kernels, int threads, char *scratch,
                       size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(cut.tasks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_task(p, cut, table, kernels, task, scratch + threadid() * scratch_size)


def apply_rotary(x, offset, positions, base, frequencies, attention_factor, interleaved, rotary_dim, out, num_threads):
    cdef Rotation p = read_rotation(x, offset, positions, base, frequencies, attention_factor, interleaved, rotary_dim,
                                    out, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef double numbers = <double> p.cell_count * p.member_count * p.length * p.channels
    cdef bint small = numbers < SMALL
    cdef Watch watch = Watch(0, 0)
    cdef Table table
    cdef char *scratch
    cdef Cut cut
    cdef Py_ssize_t task
    cdef size_t size
    cdef int threads
    if numbers == 0:
        return p.answer
    table = find_table(p, kernels, FA_F64 if p.dtype == FA_F64 else FA_F32)
    cut = cut_of(p, table)
    size = (p.channels * cut.real + 63) // 64 * 64
    if table.rows == 0 or p.positions != NULL and table.positions == NULL:
        size += (cut.rows * 2 * p.pairs * cut.real + 63) // 64 * 64
    threads = 1 if small else <int> min(<Py_ssize_t> allowed_threads(p.num_threads), cut.tasks)
    scratch = <char *> take_workspace(size * threads, 24.0 * threads * (p.channels + 64))
    try:
        if small:
            for task in range(cut.tasks):
                run_task(p, &cut, table, kernels, task, scratch)
        else:
            with nogil:
                run_parallel(p, &cut, table, kernels, threads, scratch, size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.answer
