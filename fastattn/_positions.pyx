"""The driver of apply_rotary: checks arguments, distributes rows over threads, and keeps tables of cosines and sines.

The same table is soon needed again: for the key after the query, and for the next layer. So the last few are cached
(KEPT_TABLES, and KEPT_BYTES in all; the oldest is dropped first). A row of a table depends only on its position, the
frequencies and the factor, so caching changes no bit. The GIL guards the list; a table is complete before it is added,
never changes, and lives as long as a call uses it.

If positions are close together (a run of tokens, packed sequences that restart, a tree) the table holds each position
from the least to the greatest once, and a later call with any positions in between finds its rows there; if they are
scattered it holds one row per row of x, shared by all heads. A table larger than KEPT_BYTES is not built: each run of
rows computes its own part, again once for all heads.
"""
import numpy as np

cimport cython
cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport fabs, pow
from libc.stdint cimport INT64_MAX, int64_t, uintptr_t
from libc.string cimport memcmp, memcpy

from fastattn._checks cimport (as_array, checked_out, checked_threads, flag, floating, integer, integer_array,
                               integers, real, refuse_overlap, shape_of, storage_of, too_few_axes)
from fastattn._rows cimport MOST_AXES, ROW_GRAD, ROW_MASK, ROW_OPERANDS, ROW_OUT, ROW_X
from fastattn._runtime cimport (FA_BF16, FA_F32, FA_F64, Team, Watch, allowed_threads, fa_axes, fa_dtype, fa_join_axes,
                                fa_kernels, fa_real_size, gathered, give_memory, give_workspace, interrupted, join_team,
                                kernels_for, raise_pending, take_memory, take_workspace)

cnp.import_array()

# Positions are multiplied in float64, which represents all integers up to here.
cdef int64_t FARTHEST = <int64_t> 1 << 53

cdef double GREATEST_FREQUENCY = 1e290  # finite when multiplied by the farthest position

cdef enum:
    SMALL = 1 << 16        # elements below which threads cost more than they gain
    SMALL_TABLE = 1 << 15  # the same, for pairs of a table
    CHUNK = 1 << 15        # elements that a thread processes at a time, at least one row
    TABLE_CHUNK = 1 << 12  # pairs of a table per run of rows, so that they stay in cache; at least one row
    GATHERED = 4           # factor on CHUNK if rows of a table have to be gathered
    MANY_RUNS = 8          # of rows: enough tasks
    KEPT_TABLES = 4
    KEPT_BYTES = 16 << 20


# Rows of pairs to rotate by position. The batch axes are split into those along which positions differ and the others,
# adjacent ones merged; the strides of the unused mask and gradient are 0.
cdef class Rotation:
    cdef fa_axes cells, members                        # positions differ along `cells`, not along `members`
    cdef Py_ssize_t cell_count, member_count
    cdef Py_ssize_t length, channels, pairs
    cdef Py_ssize_t row[<int> ROW_OPERANDS]         # byte strides of the last two axes
    cdef Py_ssize_t col[<int> ROW_OPERANDS]
    cdef char *data[<int> ROW_OPERANDS]
    cdef int64_t least, greatest                    # of all positions
    cdef int64_t *positions                         # of all rows of all cells; NULL: least, least + 1, ... of one cell
    cdef double base                                # 0 with frequencies
    cdef const double *frequencies                  # one per pair, or NULL
    cdef double factor                              # of the rotated channels
    cdef bint interleaved, inverse
    cdef fa_dtype dtype
    cdef object num_threads
    cdef list kept
    cdef readonly object answer


cdef void add_axis(fa_axes *axes, Py_ssize_t size, Py_ssize_t x_stride, Py_ssize_t out_stride) noexcept:
    axes.shape[axes.count] = size
    axes.strides[<int> ROW_X][axes.count] = x_stride
    axes.strides[<int> ROW_OUT][axes.count] = out_stride
    axes.strides[<int> ROW_MASK][axes.count] = axes.strides[<int> ROW_GRAD][axes.count] = 0
    axes.count += 1


cdef void note_position(Rotation p, Py_ssize_t number, int64_t position) noexcept:
    p.positions[number] = position
    p.least, p.greatest = min(p.least, position), max(p.greatest, position)


cdef cnp.ndarray new_positions(Rotation p):
    """Allocates the positions of all rows of all cells."""
    cdef cnp.npy_intp count = p.cell_count * p.length
    cdef cnp.ndarray a = cnp.PyArray_EMPTY(1, &count, cnp.NPY_INT64, 0)
    p.positions = <int64_t *> cnp.PyArray_DATA(a)
    p.least, p.greatest = INT64_MAX, -INT64_MAX
    return a


cdef cnp.ndarray checked_positions(object x, cnp.ndarray of):
    """An int64 array that broadcasts to the rows of an array."""
    cdef cnp.ndarray a = as_array(x, "positions")
    cdef int axes = cnp.PyArray_NDIM(a), skipped = cnp.PyArray_NDIM(of) - 1 - axes, i
    cdef bint fits = skipped >= 0
    for i in range(axes):
        if fits and cnp.PyArray_DIM(a, i) not in (1, cnp.PyArray_DIM(of, i + skipped)):
            fits = False
    if fits and cnp.PyArray_TYPE(a) == cnp.NPY_INT64 and cnp.PyArray_ISNOTSWAPPED(a):
        return a
    rows = shape_of(of)[:cnp.PyArray_NDIM(of) - 1]
    shape = shape_of(a)
    allowed = f"integers that broadcast to {rows}, the shape of x without its last axis"
    a = integer_array(x, "positions", allowed)
    if not fits:
        text = f"positions has shape {shape}; it must be {allowed}"
        if len(rows) == 3 and shape == (rows[0], rows[2]):
            text += "; those of each sequence, for all its heads, are positions[:, None]"
        raise ValueError(text)
    if a.dtype.kind == "u" and cnp.PyArray_ITEMSIZE(a) == 8 and cnp.PyArray_SIZE(a) and a.max() > FARTHEST:
        raise far_position(a.max())
    return a.astype(np.int64)


cdef object far_position(object position):
    return ValueError(f"positions must lie between {-FARTHEST} and {FARTHEST}, not {position}")


cdef list read_positions(Rotation p, cnp.ndarray a, int ndim):
    """Copies the position of each row, in the order of the cells; a: positions, of an x with ndim axes. Returns the
    array that holds them."""
    cdef Py_ssize_t shape[MOST_AXES]
    cdef Py_ssize_t strides[MOST_AXES]
    cdef Py_ssize_t index[MOST_AXES]
    cdef int axes = 0, axis, skipped = ndim - 1 - cnp.PyArray_NDIM(a), i
    cdef Py_ssize_t cell, row, step
    cdef const char *at = <const char *> cnp.PyArray_DATA(a)
    cdef int64_t position
    cdef cnp.ndarray memory = new_positions(p)
    cdef bint in_order = p.cell_count == 1
    for i in range(cnp.PyArray_NDIM(a) - 1):
        if varies(a, i):
            shape[axes], strides[axes], index[axes] = cnp.PyArray_DIM(a, i), cnp.PyArray_STRIDE(a, i), 0
            axes += 1
    step = 0
    if skipped < ndim - 1 and varies(a, cnp.PyArray_NDIM(a) - 1):
        step = cnp.PyArray_STRIDE(a, cnp.PyArray_NDIM(a) - 1)
    for cell in range(p.cell_count if p.length else 0):
        for row in range(p.length):
            memcpy(&position, at + row * step, 8)
            if not -FARTHEST <= position <= FARTHEST:
                raise far_position(position)
            note_position(p, cell * p.length + row, position)
            if position != p.positions[0] + row:
                in_order = False
        for axis in range(axes - 1, -1, -1):
            index[axis] += 1
            at += strides[axis]
            if index[axis] < shape[axis]:
                break
            at -= index[axis] * strides[axis]
            index[axis] = 0
    if in_order:
        p.positions = NULL
    return [memory]


cdef bint varies(cnp.ndarray a, int axis):
    """Whether the elements may differ along an axis."""
    return cnp.PyArray_DIM(a, axis) > 1 and cnp.PyArray_STRIDE(a, axis) != 0


cpdef cnp.ndarray checked_frequencies(object x, str name, Py_ssize_t pairs):
    """The angles per position, one per pair of channels, as a float64 array; possibly x itself."""
    cdef cnp.ndarray a = floating(x, name)
    cdef Py_ssize_t i
    cdef double angle
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != pairs:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must be ({pairs},), one angle for each pair of the "
                         f"{2 * pairs} channels that turn (rotary_dim, by default all)")
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT64 or not cnp.PyArray_ISCARRAY_RO(a):
        with np.errstate(all="ignore"):
            a = a.astype(np.float64, order="C")
    for i in range(pairs):
        angle = (<double *> cnp.PyArray_DATA(a))[i]
        if not fabs(angle) <= GREATEST_FREQUENCY:
            raise ValueError(f"{name} must hold finite numbers, at most {GREATEST_FREQUENCY:g} in size; number {i} is "
                             f"{angle}")
    return a


cdef Rotation read_rotation(object x, object offset, object positions, object base, object frequencies,
                            object attention_factor, object interleaved, object rotary_dim, object inverse, object out,
                            object num_threads):
    cdef Rotation p = Rotation.__new__(Rotation)
    cdef cnp.ndarray a = floating(x, "x"), o, offsets = None, places = None, own = None
    cdef int ndim = cnp.PyArray_NDIM(a), i, axis
    cdef Py_ssize_t n, row
    cdef bint cell
    if ndim < 2:
        raise too_few_axes("x", shape_of(a), "(..., L, D)")
    p.dtype = storage_of(a, "x")
    p.length = cnp.PyArray_DIM(a, ndim - 2)
    p.channels = cnp.PyArray_DIM(a, ndim - 1)
    if rotary_dim is None:
        if p.channels % 2:
            raise ValueError(f"x has an odd number of channels (its last axis), {p.channels}: rotary_dim, even, says "
                             f"how many of them turn")
        p.pairs = p.channels // 2
    else:
        dim = integer(rotary_dim, "rotary_dim", "an even integer or None")
        if not 0 <= dim <= p.channels or dim % 2:
            raise ValueError(f"rotary_dim must be even and lie between 0 and {p.channels}, the number of x's channels "
                             f"(its last axis), not {dim}")
        p.pairs = dim // 2
    p.base = 10000.0
    if not (type(base) is float and <double> base == 10000.0):
        p.base = real(base, "base", "a positive finite number", True)
    p.frequencies = NULL
    if frequencies is not None:
        if p.base != 10000.0:
            raise ValueError(f"base={base} and frequencies do not go together: frequencies are instead of those that "
                             f"follow from a base")
        own = checked_frequencies(frequencies, "frequencies", p.pairs)
        p.frequencies = <const double *> cnp.PyArray_DATA(own)
        p.base = 0
    p.factor = 1
    if not (type(attention_factor) is float and <double> attention_factor == 1):
        p.factor = real(attention_factor, "attention_factor", "a positive finite number", True)
    p.interleaved = flag(interleaved, "interleaved")
    p.inverse = flag(inverse, "inverse")
    p.num_threads = checked_threads(num_threads)
    p.positions = NULL
    if type(offset) is int and -FARTHEST <= offset <= FARTHEST:
        p.least = offset
    else:
        offsets = integers(offset, "offset", shape_of(a)[:ndim - 2], -FARTHEST, FARTHEST, &p.least)
    if positions is not None:
        if offsets is not None or p.least != 0:
            raise ValueError("offset and positions do not go together: positions say where each row is, offset where "
                             "the first of rows is that follow each other")
        places = checked_positions(positions, a)

    if out is None and p.dtype != FA_BF16 and <double> cnp.PyArray_SIZE(a) < 1e15:
        o = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(a), cnp.PyArray_TYPE(a), 0)
    else:
        o = checked_out(out, shape_of(a), a.dtype, [a], ("x",), True)
        refuse_overlap(out, (x if a.dtype != getattr(x, "dtype", None) else None, offset, positions, frequencies),
                       ("x", "offset", "positions", "frequencies"))
    p.answer = o
    p.data[<int> ROW_X] = <char *> cnp.PyArray_DATA(a)
    p.data[<int> ROW_OUT] = <char *> cnp.PyArray_DATA(o)
    # The stride of an axis of length 1 is arbitrary.
    p.row[<int> ROW_X] = cnp.PyArray_STRIDE(a, ndim - 2) if p.length > 1 else 0
    p.row[<int> ROW_OUT] = cnp.PyArray_STRIDE(o, ndim - 2) if p.length > 1 else 0
    p.col[<int> ROW_X] = cnp.PyArray_STRIDE(a, ndim - 1) if p.channels > 1 else cnp.PyArray_ITEMSIZE(a)
    p.col[<int> ROW_OUT] = cnp.PyArray_STRIDE(o, ndim - 1) if p.channels > 1 else cnp.PyArray_ITEMSIZE(o)
    p.cells.count = p.members.count = 0
    p.cell_count = p.member_count = 1
    for i in range(ndim - 2):
        n = cnp.PyArray_DIM(a, i)
        cell = offsets is not None and cnp.PyArray_DIM(offsets, i) > 1
        if places is not None:
            axis = i - (ndim - 1 - cnp.PyArray_NDIM(places))
            cell = axis >= 0 and varies(places, axis)
        if cell:
            add_axis(&p.cells, n, cnp.PyArray_STRIDE(a, i), cnp.PyArray_STRIDE(o, i))
            p.cell_count *= n
        else:
            add_axis(&p.members, n, cnp.PyArray_STRIDE(a, i), cnp.PyArray_STRIDE(o, i))
            p.member_count *= n
    fa_join_axes(&p.cells)
    fa_join_axes(&p.members)
    p.kept = [a, o, own]
    if places is not None:
        p.kept += read_positions(p, places, ndim)
    elif offsets is not None and p.cell_count > 1:
        p.kept.append(new_positions(p))
        for n in range(p.cell_count):
            for row in range(p.length):
                note_position(p, n * p.length + row, (<int64_t *> cnp.PyArray_DATA(offsets))[n] + row)
    else:
        if offsets is not None and cnp.PyArray_SIZE(offsets):
            p.least = (<int64_t *> cnp.PyArray_DATA(offsets))[0]
        p.greatest = p.least + max(p.length, 1) - 1
    return p


cdef class Table:
    """For some positions, one per row, the cosines and then the sines, times the factor."""
    cdef double base                                # 0 if the caller gave frequencies
    cdef double factor
    cdef Py_ssize_t pairs, rows, size               # size: in bytes
    cdef fa_dtype real
    cdef int64_t first                              # position of row 0
    cdef int64_t *positions                         # of all rows; NULL: first, first + 1, ...
    cdef double *speed                              # radians per position, one per pair
    cdef char *turns
    cdef void *memory

    def __dealloc__(self):
        give_memory(self.memory)


cdef list kept = []  # tables, most recently used first; they are complete and never change
# Held, where there is no GIL, by whoever reads the list or changes it; not the list itself, which has a lock of its own
# that its methods take.
cdef object keeping = object()


cdef bint same_speeds(Table table, Rotation p) noexcept:
    if table.pairs != p.pairs or table.base != p.base:
        return False
    return p.frequencies == NULL or memcmp(table.speed, p.frequencies, p.pairs * 8) == 0


cdef Table new_table(Rotation p, fa_dtype accumulated, Py_ssize_t rows, bint dense):
    """A table for a call, with its frequencies filled in and its rows still to be computed. dense: positions are
    consecutive."""
    cdef Table table = Table.__new__(Table), other
    cdef Py_ssize_t i
    # Each part starts at a cache line.
    cdef Py_ssize_t positions_size = 0 if dense else (rows * 8 + 63) // 64 * 64
    cdef Py_ssize_t speed_size = (p.pairs * 8 + 63) // 64 * 64
    cdef Py_ssize_t turns_size = rows * p.pairs * (2 * fa_real_size(accumulated))
    table.size = positions_size + speed_size + turns_size
    table.memory = take_memory(table.size + 64)
    if table.memory == NULL:
        raise MemoryError(f"no memory for a table of {table.size} bytes")
    table.speed = <double *> (<char *> table.memory + 64 - <uintptr_t> table.memory % 64)
    table.turns = <char *> table.speed + speed_size
    table.positions = NULL
    if not dense:
        table.positions = <int64_t *> (table.turns + turns_size)
        memcpy(table.positions, p.positions, rows * 8)
    table.base, table.factor, table.pairs, table.rows, table.first = p.base, p.factor, p.pairs, rows, p.least
    table.real = accumulated
    if p.frequencies != NULL:
        memcpy(table.speed, p.frequencies, p.pairs * 8)
        return table
    with cython.critical_section(keeping):
        for i in range(len(kept)):
            other = kept[i]
            if same_speeds(other, p):
                memcpy(table.speed, other.speed, p.pairs * 8)
                return table
    for i in range(p.pairs):
        table.speed[i] = pow(p.base, -<double> i / <double> p.pairs)
    return table


cdef void make_row(Table table, const fa_kernels *kernels, Py_ssize_t row) noexcept nogil:
    kernels.turns(table.turns + row * 2 * table.pairs * (fa_real_size(table.real)), table.speed, table.pairs,
                  table.first + row if table.positions == NULL else table.positions[row], table.factor)


cdef void make_turns(Table table, const fa_kernels *kernels, int threads) noexcept nogil:
    cdef Py_ssize_t row
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for row in prange(table.rows, schedule="static"):
            make_row(table, kernels, row)


cdef bint has_rows(Table table, Rotation p) noexcept:
    """Whether a table with the frequencies of a call has all its rows."""
    if table.positions == NULL:
        return table.first <= p.least and p.greatest - table.first < table.rows
    return (p.positions != NULL and table.rows == p.cell_count * p.length
            and memcmp(table.positions, p.positions, table.rows * 8) == 0)


cdef Table find_table(Rotation p, const fa_kernels *kernels, fa_dtype accumulated):
    """A table for a call, cached or new; without rows if there would be too many."""
    cdef Table table
    cdef Py_ssize_t total, i, rows = p.cell_count * p.length
    cdef int threads
    cdef bint dense
    with cython.critical_section(keeping):
        for i in range(len(kept)):
            table = kept[i]
            if same_speeds(table, p) and table.factor == p.factor and table.real == accumulated and has_rows(table, p):
                if i:
                    kept.insert(0, kept.pop(i))
                return table
    dense = p.greatest - p.least < rows
    if dense:
        rows = p.greatest - p.least + 1
    if 16.0 * rows * p.pairs + 8.0 * (rows + p.pairs) > KEPT_BYTES:
        return new_table(p, accumulated, 0, True)
    table = new_table(p, accumulated, rows, dense)
    if rows * p.pairs < SMALL_TABLE:
        for i in range(rows):
            make_row(table, kernels, i)
    else:
        threads = <int> min(<Py_ssize_t> allowed_threads(p.num_threads), rows)
        with nogil:
            make_turns(table, kernels, threads)
    with cython.critical_section(keeping):
        # From here on nothing releases the GIL.
        kept.insert(0, table)
        total = 0
        for i in range(len(kept)):
            total += (<Table> kept[i]).size
            if total > KEPT_BYTES or i == KEPT_TABLES:
                del kept[i:]
                break
    return table


# How a call is split into tasks: a run of rows, for some members of a cell.
cdef struct Cut:
    Py_ssize_t rows, members            # in a task
    Py_ssize_t row_runs, member_runs    # in a cell
    Py_ssize_t tasks
    Py_ssize_t real                     # bytes of an element in the kernels
    bint in_place                       # kernels can read and write the rows in place


cdef Cut cut_of(Rotation p, Table table) noexcept:
    cdef Cut cut
    cdef Py_ssize_t size = fa_real_size(p.dtype)
    cut.real = size
    cut.in_place = (p.dtype == FA_F64 or p.dtype == FA_F32) and p.col[<int> ROW_X] == size == p.col[<int> ROW_OUT]
    cut.rows = min(p.length, max(1, TABLE_CHUNK // max(p.pairs, 1)))
    cut.row_runs = (p.length + cut.rows - 1) // cut.rows
    # Without a table, turns are computed once for all members. Turns that have to be gathered are shared by more
    # members than those read in place, as long as there are enough tasks for all threads.
    cut.members = p.member_count
    if table.rows:
        cut.members = min(p.member_count, max(1, CHUNK // (cut.rows * max(p.channels, 1))))
        if p.positions != NULL and table.positions == NULL and p.cell_count * cut.row_runs >= MANY_RUNS:
            cut.members = min(p.member_count, GATHERED * cut.members)
    cut.member_runs = (p.member_count + cut.members - 1) // cut.members
    cut.tasks = p.cell_count * cut.row_runs * cut.member_runs
    return cut


cdef void locate(const fa_axes *axes, Py_ssize_t number, Py_ssize_t *x, Py_ssize_t *out) noexcept nogil:
    """Adds the byte offsets of element `number` of some axes to x and out."""
    cdef int axis
    cdef Py_ssize_t index
    for axis in range(axes.count - 1, -1, -1):
        index = number % axes.shape[axis]
        number //= axes.shape[axis]
        x[0] += index * axes.strides[<int> ROW_X][axis]
        out[0] += index * axes.strides[<int> ROW_OUT][axis]


cdef void rotate_rows(Rotation p, const Cut *cut, const fa_kernels *kernels, char *x, char *out, const char *turns,
                      Py_ssize_t rows, char *scratch) noexcept nogil:
    """Rotates rows of one member. scratch: a row in the accumulation dtype."""
    cdef Py_ssize_t i
    if cut.in_place:
        kernels.rotate(out, p.row[<int> ROW_OUT], x, p.row[<int> ROW_X], turns, p.channels, p.pairs, rows,
                       p.interleaved, p.inverse)
        return
    for i in range(rows):
        kernels.gather(scratch, x + i * p.row[<int> ROW_X], p.col[<int> ROW_X], p.channels, p.dtype)
        kernels.rotate(scratch, 0, scratch, 0, turns + i * 2 * p.pairs * cut.real, p.channels, p.pairs, 1,
                       p.interleaved, p.inverse)
        kernels.scatter(out + i * p.row[<int> ROW_OUT], p.col[<int> ROW_OUT], scratch, p.channels, p.dtype)


cdef int64_t position_of(Rotation p, Py_ssize_t number) noexcept nogil:
    """The position of a row, numbered through all cells."""
    return p.least + number if p.positions == NULL else p.positions[number]


cdef const char *turns_of(Rotation p, const Cut *cut, Table table, const fa_kernels *kernels, Py_ssize_t number,
                          Py_ssize_t rows, char *own) noexcept nogil:
    """The contiguous turns of some rows: in place in the table, or computed or gathered in `own`."""
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
    """scratch: a row, followed by the turns of a run of rows."""
    cdef Py_ssize_t member = task % cut.member_runs * cut.members, rest = task // cut.member_runs
    cdef Py_ssize_t row = rest % cut.row_runs * cut.rows, cell = rest // cut.row_runs
    cdef Py_ssize_t rows = min(cut.rows, p.length - row), end = min(p.member_count, member + cut.members), i
    cdef Py_ssize_t number = cell * p.length + row  # of the first row, numbered through all cells
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


def apply_rotary(x, offset, positions, base, frequencies, attention_factor, interleaved, rotary_dim, inverse, out,
                 num_threads):
    cdef Rotation p = read_rotation(x, offset, positions, base, frequencies, attention_factor, interleaved, rotary_dim,
                                    inverse, out, num_threads)
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
