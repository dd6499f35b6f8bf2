"""The driver of attention: cuts a call into tiles of query rows, shares them out to threads, and walks each tile over
the keys that it may see.

It knows tiles, threads and scratch memory; what a tile computes is the kernels' affair (kernels/contract.h). All but
`attend` is plain C on a plain fa_call. Outputs of tiles are disjoint and the bits of a row do not depend on its tile,
so neither the order nor the number of threads can change a result.
"""
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport qsort

from fastattn._call cimport (FA_KEY_LENGTHS, FA_KEYS_BEFORE, FA_OFFSETS, FA_QUERY_LENGTHS, Problem, fa_call, fa_locate,
                             fa_queries_of, read_dot_product)
from fastattn._rules cimport rules_of
from fastattn._runtime cimport (FA_ADDITIVE, FA_ALIGN, FA_BLOCK, FA_BLOCK_MASK, FA_DECODE_TILE, FA_DOT, FA_ENTMAX15,
                                FA_KEY, FA_MASK, FA_OPERANDS, FA_SPAN, FA_SPARSEMAX, FA_VALUE, Team, Watch,
                                allowed_threads, fa_head, fa_kernels, fa_next_range, fa_tuning, gathered,
                                give_workspace, interrupted, join_team, kernels_for, prefetching_helps, raise_pending,
                                take_workspace)

cdef enum:
    TILES = 8           # wanted for each thread, where that leaves tiles of fa_tuning.least_rows
    # With fewer tiles than this for a thread, threads share the keys of a tile where queries are few.
    SPLIT_TILES = 8
    # Of a tile in a call with a block mask, about: fewer would spend their time packing keys.
    ROWS_OF_BLOCKS = 192
    # Where a tile keeps scores (sparsemax, entmax15) these should stay in a cache; but small tiles are expensive.
    SCORES = 1 << 22

# Multiplications below which threads, and letting others have the GIL, cost more than they bring.
cdef double SMALL_WORK = 1e6
# The cost of one channel of an additive score.
cdef double ADDITIVE_WORK = 4
# The fixed costs of a tile and of a row.
cdef double TILE_WORK = 1e4
cdef double ROW_WORK = 1e3
# Scores of a row that a tile may keep: their places are numbers of 32 bits.
cdef double MOST_SCORES = 4e9
# Multiplications of the largest tile: other threads should not wait long for the last one.
cdef double MOST_WORK = 8e9


cdef struct Tile:
    int64_t head, sequence, row     # its first one
    int64_t order                   # by which it comes where others cost the same
    double cost


# Those of the keys [begin, end) of a tile that it may see; all in one span.
cdef struct Span:
    int64_t tile, begin, end


# How a call is cut, and what lies where in its scratch memory.
cdef struct Plan:
    int64_t rows                    # of a tile, at most
    int threads
    int64_t tiles
    int64_t spans                   # that threads share; 0: they share tiles
    size_t workspace_size           # of a thread
    size_t span_size
    Tile *tile
    Span *span
    int64_t *first_span             # of each tile, and of one more
    char *workspaces                # [threads]
    char *found                     # [spans] what each has given


cdef inline Py_ssize_t last_stride(const fa_call *call, int operand) noexcept nogil:
    """Along the last batch axis."""
    return call.layouts[operand].batch[call.axes - 1] if call.layouts[operand].data != NULL else 0


cdef void choose_loops(fa_call *call, bint decode, const fa_tuning *tuning) noexcept nogil:
    """Decides whether keys are read in place (decode). Unless queries are many, also makes the heads of a group rows of
    one head, so that keys and values are read, or packed, once for all of them; this needs lengths and offsets that
    do not differ within the group."""
    cdef int64_t group = call.group
    cdef int operand
    call.problem.decode = decode and call.problem.score == FA_DOT and call.longest_query <= tuning.decode_queries
    if (group == 1 or call.longest_query >= tuning.many_queries or call.query_starts != NULL or
            last_stride(call, FA_KEY_LENGTHS) or last_stride(call, FA_QUERY_LENGTHS) or
            last_stride(call, FA_OFFSETS) or last_stride(call, FA_KEYS_BEFORE)):
        return
    for operand in range(<int> FA_OPERANDS):
        if operand != FA_KEY and operand != FA_VALUE:
            call.sizes.view[operand].head = last_stride(call, operand)
    call.sizes.heads = group
    call.sizes.queries *= group
    call.longest_query *= group
    call.heads //= group
    call.axes -= 1


cdef bint tiles_differ(const fa_call *call) noexcept nogil:
    """Whether tiles may differ in cost."""
    cdef int n, operand
    for n in range(call.operand_count):
        operand = call.operands[n]
        if operand in (FA_MASK, FA_BLOCK_MASK) or operand >= FA_OPERANDS:
            return True
    return (call.query_starts != NULL or call.problem.left < INT64_MAX or call.problem.right < INT64_MAX or
            call.problem.chunk != 0)


cdef double keys_of_row(const fa_call *call) noexcept nogil:
    """The most keys that a query may see."""
    cdef double keys = call.longest_key
    if call.problem.left < INT64_MAX and call.problem.right < INT64_MAX:
        keys = min(keys, <double> call.problem.left + call.problem.right + 1)
    if call.problem.chunk and call.problem.left_chunks < INT64_MAX:
        keys = min(keys, (<double> call.problem.left_chunks + 1) * call.problem.chunk)
    return keys


cdef double work_of_pair(const fa_call *call) noexcept nogil:
    """Multiplications for one query and one key."""
    return (call.problem.head_dim * (ADDITIVE_WORK if call.problem.score == FA_ADDITIVE else 1.0) +
            call.problem.value_dim)


cdef bint keeps_scores(const fa_call *call) noexcept nogil:
    """Whether a tile keeps a score for each row and key."""
    return call.problem.activation == FA_SPARSEMAX or call.problem.activation == FA_ENTMAX15


cdef int64_t rows_of_blocks(int64_t block_rows, int64_t most) noexcept nogil:
    """Rows of a tile in a call with a block mask, at most `most`: whole blocks, or an equal part of one."""
    cdef int64_t parts = (block_rows + most - 1) // most
    if parts > 1:
        return (block_rows + parts - 1) // parts
    return max(1, min(ROWS_OF_BLOCKS, most) // block_rows) * block_rows


cdef int64_t rows_of_tiles(const fa_call *call, int threads, const fa_tuning *tuning) noexcept nogil:
    cdef int64_t longest = call.longest_query, rows, tiles
    cdef double work_of_row = keys_of_row(call) * work_of_pair(call) + 1
    rows = <int64_t> (<double> call.sizes.queries * call.heads / (<double> TILES * threads))
    rows = min(max(rows, tuning.least_rows), tuning.most_rows)
    rows = <int64_t> min(<double> rows, tuning.window_rows + keys_of_row(call) / tuning.keys_a_row)
    rows = <int64_t> max(tuning.group_rows, min(<double> rows, MOST_WORK / work_of_row))
    if keeps_scores(call):
        rows = <int64_t> max(2 * tuning.group_rows, min(<double> rows, SCORES / (keys_of_row(call) + 1)))
    if call.problem.decode:
        rows = min(rows, FA_DECODE_TILE)
    if longest <= rows:
        return max(longest, 1)
    if call.layouts[<int> FA_BLOCK_MASK].data != NULL and not call.problem.decode and call.sizes.heads == 1:
        # Tiles that end where blocks do see the same keys in all of their rows, and skip all others.
        return rows_of_blocks(call.problem.block_rows, rows)
    tiles = (longest + rows - 1) // rows
    rows = (longest + tiles - 1) // tiles
    return (rows + tuning.group_rows - 1) // tuning.group_rows * tuning.group_rows


cdef int64_t tiles_of(const fa_call *call, int64_t rows) noexcept nogil:
    cdef int64_t sequence, tiles = 0
    for sequence in range(call.sequences):
        tiles += (fa_queries_of(call, sequence) + rows - 1) // rows
    return tiles * call.heads


cdef int by_cost(const void *a, const void *b) noexcept nogil:
    """The heaviest first, for qsort."""
    cdef const Tile *x = <const Tile *> a
    cdef const Tile *y = <const Tile *> b
    if x.cost != y.cost:
        return 1 if x.cost < y.cost else -1
    return 1 if x.order > y.order else -1


cdef inline int64_t end_of_span(int64_t begin, int64_t end) noexcept nogil:
    return min(end, (begin // FA_SPAN + 1) * FA_SPAN)


cdef void find_tiles(const fa_call *call, Plan *plan) noexcept nogil:
    """Notes the tiles, where they differ in cost the heaviest first; without room for them counts them and their spans.
    """
    cdef int64_t tiles = 0, spans = 0, head, sequence, begin, end, row, rows, cursor, keys, last_span
    cdef Tile *tile
    cdef fa_head h
    for head in range(call.heads):
        for sequence in range(call.sequences):
            fa_locate(call, head, sequence, &h)
            row = 0
            while row < h.queries:
                rows = min(plan.rows, h.queries - row)
                cursor = keys = 0
                last_span = -1
                while fa_next_range(&call.problem, &h, row, rows, &cursor, &begin, &end):
                    keys += end - begin
                    spans += (end - 1) // FA_SPAN - max(begin // FA_SPAN - 1, last_span)
                    last_span = (end - 1) // FA_SPAN
                if plan.tile != NULL:
                    tile = &plan.tile[tiles]
                    tile.head, tile.sequence, tile.row, tile.order = head, sequence, row, tiles
                    tile.cost = <double> (keys + 1) * rows
                tiles += 1
                row += plan.rows
    if plan.tile == NULL:
        plan.tiles, plan.spans = tiles, spans
    elif tiles_differ(call):
        qsort(plan.tile, tiles, sizeof(Tile), by_cost)


cdef void find_spans(const fa_call *call, Plan *plan) noexcept nogil:
    cdef int64_t t, n = 0, begin, end, cursor, last_span
    cdef const Tile *tile
    cdef fa_head h
    for t in range(plan.tiles):
        plan.first_span[t] = n
        tile = &plan.tile[t]
        fa_locate(call, tile.head, tile.sequence, &h)
        cursor = 0
        last_span = -1
        while fa_next_range(&call.problem, &h, tile.row, min(plan.rows, h.queries - tile.row), &cursor, &begin, &end):
            while begin < end:
                if begin // FA_SPAN != last_span:
                    plan.span[n].tile, plan.span[n].begin = t, begin
                    n += 1
                last_span = begin // FA_SPAN
                begin = plan.span[n - 1].end = end_of_span(begin, end)
    plan.first_span[plan.tiles] = n


cdef int run_tile(const fa_call *call, const fa_kernels *kernels, int64_t head_index, int64_t sequence, int64_t row,
                  int64_t most_rows, void *workspace, Watch *watch, bint caller) noexcept nogil:
    """One tile, from the first key to the last; returns whether the call is to stop. caller: this is its thread."""
    cdef fa_head head
    cdef int64_t rows, begin, end, stop, cursor = 0
    fa_locate(call, head_index, sequence, &head)
    if row >= head.queries:
        return 0
    if watch != NULL and interrupted(watch, caller):
        return 1
    rows = min(most_rows, head.queries - row)
    kernels.open_tile(&call.problem, &head, row, rows, workspace)
    while fa_next_range(&call.problem, &head, row, rows, &cursor, &begin, &end):
        while begin < end:
            stop = end_of_span(begin, end)
            kernels.visit_keys(&call.problem, &head, row, rows, begin, stop, workspace)
            begin = stop
            if watch != NULL and interrupted(watch, caller):
                return 1
    kernels.close_tile(&call.problem, &head, row, rows, workspace)
    return 0


cdef int run_serial(const fa_call *call, const fa_kernels *kernels, const Plan *plan, Watch *watch) noexcept nogil:
    cdef int64_t head, sequence, row
    for head in range(call.heads):
        for sequence in range(call.sequences):
            row = 0
            while row < fa_queries_of(call, sequence):
                if run_tile(call, kernels, head, sequence, row, plan.rows, plan.workspaces, watch, True):
                    return 1
                row += plan.rows
    return 0


cdef void run_parallel(const fa_call *call, const fa_kernels *kernels, const Plan *plan, Watch *watch) noexcept nogil:
    cdef int64_t t, chunk = max(1, plan.tiles // (plan.threads * 64))
    cdef Team team = gathered(plan.threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for t in prange(plan.tiles, schedule="dynamic", chunksize=chunk):
            if not interrupted(watch, False):
                # Thread 0 is the caller's.
                run_tile(call, kernels, plan.tile[t].head, plan.tile[t].sequence, plan.tile[t].row, plan.rows,
                         plan.workspaces + threadid() * plan.workspace_size, watch, threadid() == 0)


cdef int run_span(const fa_call *call, const fa_kernels *kernels, const Plan *plan, int64_t n,
                  void *workspace) noexcept nogil:
    """One span of a tile, kept for when the tile's spans are joined."""
    cdef fa_head head
    cdef const Span *span = &plan.span[n]
    cdef const Tile *tile = &plan.tile[span.tile]
    cdef int64_t rows, begin, end, cursor = span.begin
    fa_locate(call, tile.head, tile.sequence, &head)
    rows = min(plan.rows, head.queries - tile.row)
    kernels.open_tile(&call.problem, &head, tile.row, rows, workspace)
    while fa_next_range(&call.problem, &head, tile.row, rows, &cursor, &begin, &end) and begin < span.end:
        kernels.visit_keys(&call.problem, &head, tile.row, rows, begin, min(end, span.end), workspace)
    kernels.save_span(&call.problem, rows, workspace, plan.found + n * plan.span_size)
    return 0


cdef int join_spans(const fa_call *call, const fa_kernels *kernels, const Plan *plan, int64_t t,
                    void *workspace) noexcept nogil:
    """A tile from its spans."""
    cdef fa_head head
    cdef const Tile *tile = &plan.tile[t]
    cdef int64_t n, rows
    fa_locate(call, tile.head, tile.sequence, &head)
    rows = min(plan.rows, head.queries - tile.row)
    kernels.open_tile(&call.problem, &head, tile.row, rows, workspace)
    for n in range(plan.first_span[t], plan.first_span[t + 1]):
        kernels.join_span(&call.problem, &head, rows, workspace, plan.found + n * plan.span_size)
    kernels.close_tile(&call.problem, &head, tile.row, rows, workspace)
    return 0


cdef void run_spans(const fa_call *call, const fa_kernels *kernels, const Plan *plan, Watch *watch) noexcept nogil:
    """Few queries against many keys: threads share the keys of a tile, and its spans are merged in order."""
    cdef int64_t t
    cdef Team team = gathered(plan.threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for t in prange(plan.spans, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_span(call, kernels, plan, t, plan.workspaces + threadid() * plan.workspace_size)
        for t in prange(plan.tiles, schedule="dynamic", chunksize=1):
            if not watch.stop:
                join_spans(call, kernels, plan, t, plan.workspaces + threadid() * plan.workspace_size)


cdef inline size_t aligned(size_t size) noexcept nogil:
    return (size + FA_ALIGN - 1) // FA_ALIGN * FA_ALIGN


cdef void *make_plan(const fa_call *call, const fa_kernels *kernels, int threads, int64_t rows_of_one,
                     Plan *plan) except NULL:
    """Returns the scratch memory. rows_of_one: of a tile, where there is one thread."""
    cdef double channels = <double> call.problem.head_dim + call.problem.value_dim, estimate
    cdef size_t tile_at, span_at, first_at
    cdef char *scratch
    plan.threads, plan.rows = threads, rows_of_one
    plan.tiles = plan.spans = 0
    plan.span_size = 0
    plan.tile = NULL
    if threads > 1:
        plan.rows = rows_of_tiles(call, threads, &kernels.tuning)
        find_tiles(call, plan)
        if (call.problem.decode and plan.tiles < SPLIT_TILES * threads and call.longest_key > FA_SPAN and
                plan.spans > plan.tiles):
            plan.span_size = kernels.span_size(&call.problem, plan.rows)
        else:
            plan.spans = 0
        plan.threads = <int> min(<int64_t> threads, max(plan.spans, plan.tiles))
    plan.workspace_size = kernels.tile_workspace(&call.problem, plan.rows, call.longest_key)
    tile_at = aligned(plan.workspace_size * plan.threads + plan.span_size * plan.spans)
    span_at = tile_at + plan.tiles * sizeof(Tile)
    first_at = span_at + plan.spans * sizeof(Span)
    # At most four numbers of 8 bytes for each channel of a row, and for each of a block of keys.
    estimate = 32.0 * plan.threads * (plan.rows + 2 * FA_BLOCK) * (channels + 256) + \
        <double> plan.tiles * (sizeof(Tile) + sizeof(int64_t)) + plan.spans * (sizeof(Span) + <double> plan.span_size)
    if keeps_scores(call):
        estimate += 16.0 * plan.threads * plan.rows * keys_of_row(call)
    scratch = <char *> take_workspace(first_at + (plan.tiles + 1) * sizeof(int64_t), estimate)
    plan.workspaces = scratch
    plan.found = scratch + plan.workspace_size * plan.threads
    plan.tile = <Tile *> (scratch + tile_at)
    plan.span = <Span *> (scratch + span_at)
    plan.first_span = <int64_t *> (scratch + first_at)
    if plan.tiles:
        find_tiles(call, plan)
    if plan.spans:
        find_spans(call, plan)
    return scratch


cdef object attend(Problem p, bint decode=True):
    """Carries the call out. decode=False: few queries take the same loops as many, so that their bits are the same."""
    cdef fa_call *call = p.call
    cdef const fa_kernels *kernels = kernels_for(call.problem.dtype)
    choose_loops(call, decode, &kernels.tuning)
    cdef Plan plan
    cdef Watch watch = Watch(0, 0)
    cdef void *scratch
    cdef int64_t rows
    cdef double work
    cdef bint small
    if call.heads == 0 or call.longest_query == 0:
        return p.result()
    call.problem.prefetch = prefetching_helps
    if keeps_scores(call) and keys_of_row(call) > MOST_SCORES:
        raise MemoryError(f"no memory for the scores of {call.longest_key} keys that activation='sparsemax' and "
                          f"'entmax15' keep for each row of a tile")
    rows = rows_of_tiles(call, 1, &kernels.tuning)
    work = <double> call.heads * call.sizes.queries * (keys_of_row(call) * work_of_pair(call) + ROW_WORK) + \
        TILE_WORK * tiles_of(call, rows)
    small = work < SMALL_WORK
    scratch = make_plan(call, kernels, 1 if small else allowed_threads(p.num_threads), rows, &plan)
    try:
        if small:
            run_serial(call, kernels, &plan, NULL)
        else:
            with nogil:
                if plan.threads <= 1:
                    run_serial(call, kernels, &plan, &watch)
                elif plan.spans:
                    run_spans(call, kernels, &plan, &watch)
                else:
                    run_parallel(call, kernels, &plan, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.result()


def dot_product_attention(query, key, value, dict some, bint decode=True, keys_before=None):
    """For layers: some, a dict of rules. decode: as `attend` has it. keys_before: how many keys were before the first
    one and are gone, an integer of at least 0 or an array as for lengths: chunks count from the first that ever was."""
    return attend(read_dot_product(query, key, value, rules_of(some), keys_before), decode)
