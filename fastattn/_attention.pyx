"""The driver: cuts a problem into tiles of query rows, gives them to threads, and walks each over the keys it may see.

It knows tiles, threads and scratch memory; what a tile computes is the kernels' affair (kernels/contract.h). Outputs of
tiles are disjoint and the bits of a row do not depend on its tile, so the order and the number of threads cannot change
a result.
"""
import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport INT64_MAX, int64_t

from fastattn._call cimport (KEY, KEY_LENGTHS, KEYS_BEFORE, MASK, OFFSETS, QUERY_LENGTHS, VALUE, Problem,
                             read_dot_product)
from fastattn._rules cimport rules_of
from fastattn._runtime cimport (FA_ADDITIVE, FA_BLOCK, FA_DOT, FA_DECODE_TILE, FA_OPERANDS, FA_SPAN, Team, Watch,
                                allowed_threads, fa_head, fa_kernels, fa_next_range, fa_tuning, gathered,
                                give_workspace, interrupted, join_team, kernels_for, prefetching_helps, raise_pending,
                                take_workspace)

cdef enum:
    # Rows of a tile. Packing a block of keys costs a tile as much as 3 rows of work, so few rows are dear; many leave
    # too few tiles to share out evenly. In a window what a tile reads and writes should stay in the second cache:
    # WINDOW_ROWS, and one more for each KEYS_A_ROW keys that a row sees.
    LEAST_ROWS = 128
    MOST_ROWS = 768
    WINDOW_ROWS = 384
    KEYS_A_ROW = 4
    TILES = 8           # wanted for each thread, where that leaves tiles of LEAST_ROWS

# Multiplications below which threads, and letting others have the GIL, cost more than they bring.
cdef double SMALL_WORK = 1e6
# What a channel of an additive score costs.
cdef double ADDITIVE_WORK = 4
# What a tile and a row cost besides.
cdef double TILE_WORK = 1e4
cdef double ROW_WORK = 1e3
# With fewer tiles than this for a thread, threads share the keys of a tile where queries are few.
cdef enum:
    SPLIT_TILES = 8

# ... and those of the largest tile, so that a thread is not long alone with the last one.
cdef double MOST_WORK = 8e9


cdef inline Py_ssize_t last_stride(Problem p, int operand) noexcept:
    """Along the last batch axis."""
    return p.layouts[operand].batch[p.axes - 1] if p.layouts[operand].data != NULL else 0


cdef void choose_loops(Problem p, bint decode, const fa_tuning *tuning) noexcept:
    """Whether keys are read in place, as in decoding; and, unless queries are many, the heads of a group become rows of
    one head, so that keys and values are read, or packed, once for all of them: where neither lengths nor offsets
    differ within the group."""
    cdef Py_ssize_t group = p.group
    cdef int operand
    p.shared.decode = decode and p.shared.score == FA_DOT and p.longest_query <= tuning.decode_queries
    if (group == 1 or p.longest_query >= tuning.many_queries or p.packed or last_stride(p, KEY_LENGTHS) or
            last_stride(p, QUERY_LENGTHS) or last_stride(p, OFFSETS) or last_stride(p, KEYS_BEFORE)):
        return
    for operand in range(<int> FA_OPERANDS):
        if operand != KEY and operand != VALUE:
            p.sizes.view[operand].head = last_stride(p, operand)
    p.sizes.heads = group
    p.sizes.queries *= group
    p.longest_query *= group
    p.heads //= group
    p.axes -= 1


cdef bint tiles_differ(Problem p) noexcept:
    """Whether tiles may differ in cost."""
    cdef int n, operand
    for n in range(p.operand_count):
        operand = p.operands[n]
        if operand in (MASK, KEY_LENGTHS, QUERY_LENGTHS, OFFSETS, KEYS_BEFORE):
            return True
    return p.packed or p.shared.left < INT64_MAX or p.shared.right < INT64_MAX or p.shared.chunk != 0


cdef double keys_of_row(Problem p) noexcept:
    """The most that a query may see."""
    cdef double keys = p.longest_key
    if p.shared.left < INT64_MAX and p.shared.right < INT64_MAX:
        keys = min(keys, <double> p.shared.left + p.shared.right + 1)
    if p.shared.chunk and p.shared.left_chunks < INT64_MAX:
        keys = min(keys, (<double> p.shared.left_chunks + 1) * p.shared.chunk)
    return keys


cdef double work_of_pair(Problem p) noexcept:
    """Multiplications for one query and one key."""
    return p.shared.head_dim * (ADDITIVE_WORK if p.shared.score == FA_ADDITIVE else 1.0) + p.shared.value_dim


cdef Py_ssize_t rows_of_tiles(Problem p, int threads, int group_rows) noexcept:
    cdef Py_ssize_t longest = p.longest_query, rows, tiles
    cdef double work_of_row = keys_of_row(p) * work_of_pair(p) + 1
    rows = <Py_ssize_t> (<double> p.sizes.queries * p.heads / (<double> TILES * threads))
    rows = min(max(rows, LEAST_ROWS), MOST_ROWS)
    rows = <Py_ssize_t> min(<double> rows, WINDOW_ROWS + keys_of_row(p) / KEYS_A_ROW)
    rows = <Py_ssize_t> max(group_rows, min(<double> rows, MOST_WORK / work_of_row))
    if p.shared.decode:
        rows = min(rows, FA_DECODE_TILE)
    if longest <= rows:
        return max(longest, 1)
    tiles = (longest + rows - 1) // rows
    rows = (longest + tiles - 1) // tiles
    return (rows + group_rows - 1) // group_rows * group_rows


cdef int run_tile(Problem p, const fa_kernels *kernels, Py_ssize_t head_index, Py_ssize_t sequence, int64_t row,
                  int64_t most_rows, void *workspace, Watch *watch, bint caller) noexcept nogil:
    """One tile, from the first key to the last; returns whether the call is to stop. caller: this is its thread."""
    cdef fa_head head
    cdef int64_t rows, begin, end, stop, cursor = 0
    p.locate(head_index, sequence, &head)
    if row >= head.queries:
        return 0
    if watch != NULL and interrupted(watch, caller):
        return 1
    rows = min(most_rows, head.queries - row)
    kernels.open_tile(&p.shared, &head, row, rows, workspace)
    while fa_next_range(&p.shared, &head, row, rows, &cursor, &begin, &end):
        while begin < end:
            stop = min(end, (begin // FA_SPAN + 1) * FA_SPAN)
            kernels.visit_keys(&p.shared, &head, row, rows, begin, stop, workspace)
            begin = stop
            if watch != NULL and interrupted(watch, caller):
                return 1
    kernels.close_tile(&p.shared, &head, row, rows, workspace)
    return 0


cdef inline int64_t queries_of(Problem p, Py_ssize_t sequence) noexcept nogil:
    return p.query_starts[sequence + 1] - p.query_starts[sequence] if p.packed else p.sizes.queries


cdef int run_serial(Problem p, const fa_kernels *kernels, int64_t rows, void *workspace, Watch *watch) noexcept nogil:
    cdef Py_ssize_t head, sequence
    cdef int64_t row
    for head in range(p.heads):
        for sequence in range(p.sequences):
            row = 0
            while row < queries_of(p, sequence):
                if run_tile(p, kernels, head, sequence, row, rows, workspace, watch, True):
                    return 1
                row += rows
    return 0


cdef Py_ssize_t tiles_of(Problem p, int64_t rows) noexcept nogil:
    cdef Py_ssize_t sequence, tiles = 0
    for sequence in range(p.sequences):
        tiles += (queries_of(p, sequence) + rows - 1) // rows
    return tiles * p.heads


cdef object tiles_in_order(Problem p, int64_t rows):
    """(tiles, 3) array of head, sequence, first row; where they differ in cost the heaviest first."""
    cdef Py_ssize_t count = tiles_of(p, rows), n = 0, head, sequence
    table = np.empty((count, 3), np.int64)
    cost = np.empty(count, np.float64)
    cdef int64_t[:, ::1] tile = table
    cdef double[::1] cost_of = cost
    cdef fa_head h
    cdef int64_t begin, end, row, cursor, keys
    for head in range(p.heads):
        for sequence in range(p.sequences):
            p.locate(head, sequence, &h)
            row = 0
            while row < h.queries:
                cursor = keys = 0
                while fa_next_range(&p.shared, &h, row, min(rows, h.queries - row), &cursor, &begin, &end):
                    keys += end - begin
                tile[n, 0], tile[n, 1], tile[n, 2] = head, sequence, row
                cost_of[n] = -<double> (keys + 1) * min(rows, h.queries - row)
                n += 1
                row += rows
    return table[np.argsort(cost, kind="stable")] if tiles_differ(p) else table


cdef void run_parallel(Problem p, const fa_kernels *kernels, int64_t rows, int threads, const int64_t[:, ::1] tile,
                       char *workspaces, size_t workspace_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t t, count = tile.shape[0]
    cdef Py_ssize_t chunk = max(1, count // (threads * 64))
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for t in prange(count, schedule="dynamic", chunksize=chunk):
            if not interrupted(watch, False):
                # The caller's thread is number 0.
                run_tile(p, kernels, tile[t, 0], tile[t, 1], tile[t, 2], rows,
                         workspaces + threadid() * workspace_size, watch, threadid() == 0)


cdef object spans_in_order(Problem p, const int64_t[:, ::1] tile, int64_t rows):
    """(spans, 3) array of tile, first key, end; and where each tile's spans begin, one number more than there are."""
    cdef Py_ssize_t t, n = 0, count = tile.shape[0]
    cdef int64_t begin, end, step, cursor
    cdef fa_head h
    cdef int64_t[:, ::1] span
    firsts = np.empty(count + 1, np.int64)
    cdef int64_t[::1] first = firsts
    for step in range(2):  # count them, then note them
        if step == 1:
            table = np.empty((n, 3), np.int64)
            span = table
            n = 0
        for t in range(count):
            first[t] = n
            p.locate(tile[t, 0], tile[t, 1], &h)
            cursor = 0
            while fa_next_range(&p.shared, &h, tile[t, 2], min(rows, h.queries - tile[t, 2]), &cursor, &begin, &end):
                while begin < end:
                    if step == 1:
                        span[n, 0], span[n, 1], span[n, 2] = t, begin, min(end, (begin // FA_SPAN + 1) * FA_SPAN)
                    n += 1
                    begin = (begin // FA_SPAN + 1) * FA_SPAN
        first[count] = n
    return table, firsts


cdef int find_span(Problem p, const fa_kernels *kernels, const int64_t[:, ::1] tile, int64_t most_rows, Py_ssize_t t,
                   int64_t begin, int64_t stop, void *workspace, void *span) noexcept nogil:
    """One span of a tile, into `span`."""
    cdef fa_head head
    p.locate(tile[t, 0], tile[t, 1], &head)
    cdef int64_t row = tile[t, 2], rows = min(most_rows, head.queries - tile[t, 2])
    kernels.open_tile(&p.shared, &head, row, rows, workspace)
    kernels.visit_keys(&p.shared, &head, row, rows, begin, stop, workspace)
    kernels.save_span(&p.shared, rows, workspace, span)
    return 0


cdef int join_spans(Problem p, const fa_kernels *kernels, const int64_t[:, ::1] tile, int64_t most_rows, Py_ssize_t t,
                    Py_ssize_t count, void *workspace, const char *span, size_t span_size) noexcept nogil:
    """A tile from its spans."""
    cdef fa_head head
    cdef Py_ssize_t n
    p.locate(tile[t, 0], tile[t, 1], &head)
    cdef int64_t row = tile[t, 2], rows = min(most_rows, head.queries - tile[t, 2])
    kernels.open_tile(&p.shared, &head, row, rows, workspace)
    for n in range(count):
        kernels.join_span(&p.shared, &head, rows, workspace, span + n * span_size)
    kernels.close_tile(&p.shared, &head, row, rows, workspace)
    return 0


cdef void run_spans(Problem p, const fa_kernels *kernels, int64_t rows, int threads, const int64_t[:, ::1] tile,
                    const int64_t[:, ::1] span, const int64_t[::1] first, char *workspaces, size_t workspace_size,
                    char *found, size_t span_size, Watch *watch) noexcept nogil:
    """Few queries against many keys: threads share the keys of a tile, and its spans are joined in their order."""
    cdef Py_ssize_t t
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for t in prange(span.shape[0], schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                find_span(p, kernels, tile, rows, span[t, 0], span[t, 1], span[t, 2],
                          workspaces + threadid() * workspace_size, found + t * span_size)
        for t in prange(tile.shape[0], schedule="dynamic", chunksize=1):
            if not watch.stop:
                join_spans(p, kernels, tile, rows, t, first[t + 1] - first[t],
                           workspaces + threadid() * workspace_size, found + first[t] * span_size, span_size)


cdef object attend(Problem p, bint decode=True):
    """Carries the problem out. decode=False: a few queries take the same loops as many, so that their bits are the
    same."""
    cdef const fa_kernels *kernels = kernels_for(p.shared.dtype)
    choose_loops(p, decode, &kernels.tuning)
    cdef int64_t rows = rows_of_tiles(p, 1, kernels.tuning.group_rows)
    cdef size_t size, span_size = 0
    cdef double channels = <double> p.shared.head_dim + p.shared.value_dim
    cdef double work = <double> p.heads * p.sizes.queries * (keys_of_row(p) * work_of_pair(p) + ROW_WORK) + \
        TILE_WORK * tiles_of(p, rows)
    cdef bint small = work < SMALL_WORK
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef char *workspaces
    cdef const int64_t[:, ::1] tiles, spans
    cdef const int64_t[::1] firsts
    cdef Py_ssize_t n = 0
    cdef Watch watch = Watch(0, 0)
    if p.heads == 0 or p.longest_query == 0:
        return p.result()
    p.shared.prefetch = prefetching_helps
    if threads > 1:
        rows = rows_of_tiles(p, threads, kernels.tuning.group_rows)
        tiles = tiles_in_order(p, rows)
        if p.shared.decode and tiles.shape[0] < SPLIT_TILES * threads and p.longest_key > FA_SPAN:
            spans, firsts = spans_in_order(p, tiles, rows)
            if spans.shape[0] > tiles.shape[0]:
                n = spans.shape[0]
                span_size = kernels.span_size(&p.shared, rows)
        threads = min(threads, max(n, tiles.shape[0]))
    size = kernels.tile_workspace(&p.shared, rows, p.longest_key)
    # At most four numbers of 8 bytes for each channel of a row, and for each of a block of keys.
    workspaces = <char *> take_workspace(
        size * threads + span_size * n,
        32.0 * threads * (rows + 2 * FA_BLOCK) * (channels + 256) + <double> span_size * n)
    try:
        if small:
            run_serial(p, kernels, rows, workspaces, NULL)
        elif threads <= 1:
            with nogil:
                run_serial(p, kernels, rows, workspaces, &watch)
        elif n > 0:
            with nogil:
                run_spans(p, kernels, rows, threads, tiles, spans, firsts, workspaces, size,
                          workspaces + size * threads, span_size, &watch)
        else:
            with nogil:
                run_parallel(p, kernels, rows, threads, tiles, workspaces, size, &watch)
    finally:
        give_workspace(workspaces)
    if watch.stop:
        raise_pending()
    return p.result()


def dot_product_attention(query, key, value, dict some, bint decode=True, keys_before=None):
    """For layers: some, a dict of rules. decode: as `attend` has it. keys_before: how many keys were before the first
    one and are gone, an integer of at least 0 or an array as for lengths: chunks count from the first that ever was."""
    return attend(read_dot_product(query, key, value, rules_of(some), keys_before), decode)
