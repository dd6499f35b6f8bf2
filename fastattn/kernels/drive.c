/* The driver of attention; drive.h says what it does and may assume. */
#include "drive.h"
#include "threads.h"
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

enum {
    TILES = 8, /* wanted for each thread, where that leaves tiles of fa_tuning.least_rows */
    /* With fewer tiles than this for a thread, threads share the keys of a tile where queries are few. */
    SPLIT_TILES = 8,
    /* Of a tile in a call with a block mask, about: fewer would spend their time packing keys. */
    ROWS_OF_BLOCKS = 192,
    /* Where a tile keeps scores (sparsemax, entmax15) these should stay in a cache; but small tiles are expensive. */
    SCORES = 1 << 22
};

/* Multiplications below which threads, and letting others have Python's lock, cost more than they bring. */
static const double SMALL_WORK = 1e6;
/* The cost of one channel of an additive score. */
static const double ADDITIVE_WORK = 4;
/* The fixed costs of a tile and of a row. */
static const double TILE_WORK = 1e4, ROW_WORK = 1e3;
/* Scores of a row that a tile may keep: their places are numbers of 32 bits. */
static const double MOST_SCORES = 4e9;
/* Multiplications of the largest tile: other threads should not wait long for the last one. */
static const double MOST_WORK = 8e9;

static inline size_t aligned(size_t size) { return (size + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN; }

/* Along the last batch axis. */
static ptrdiff_t last_stride(const fa_call *call, int operand)
{
    return call->layouts[operand].data ? call->layouts[operand].batch[call->axes - 1] : 0;
}

void fa_choose_loops(fa_call *call, const fa_kernels *kernels, int decode)
{
    const fa_tuning *tuning = &kernels->tuning;
    call->problem.decode = decode && call->problem.score == FA_DOT && call->longest_query <= tuning->decode_queries;
    call->problem.prefetch = fa_prefetching_helps();
    if (call->group == 1 || call->longest_query >= tuning->many_queries || call->query_starts ||
        last_stride(call, FA_KEY_LENGTHS) || last_stride(call, FA_QUERY_LENGTHS) || last_stride(call, FA_OFFSETS) ||
        last_stride(call, FA_KEYS_BEFORE))
        return;
    for (int operand = 0; operand < FA_OPERANDS; operand++)
        if (operand != FA_KEY && operand != FA_VALUE)
            call->sizes.view[operand].head = last_stride(call, operand);
    call->sizes.heads = call->group;
    call->sizes.queries *= call->group;
    call->longest_query *= call->group;
    call->heads /= call->group;
    call->axes--;
}

/* Whether tiles may differ in cost. */
static int tiles_differ(const fa_call *call)
{
    for (int n = 0; n < call->operand_count; n++) {
        const int operand = call->operands[n];
        if (operand == FA_MASK || operand == FA_BLOCK_MASK || operand >= FA_OPERANDS)
            return 1;
    }
    return call->query_starts || call->problem.left < INT64_MAX || call->problem.right < INT64_MAX ||
           call->problem.chunk != 0;
}

/* The most keys that a query may see. */
static double keys_of_row(const fa_call *call)
{
    const fa_problem *problem = &call->problem;
    double keys = (double)call->longest_key;
    if (problem->left < INT64_MAX && problem->right < INT64_MAX)
        keys = fa_least_of(keys, (double)problem->left + (double)problem->right + 1);
    if (problem->chunk && problem->left_chunks < INT64_MAX)
        keys = fa_least_of(keys, ((double)problem->left_chunks + 1) * (double)problem->chunk);
    return keys;
}

/* Multiplications for one query and one key. */
static double work_of_pair(const fa_call *call)
{
    return (double)call->problem.head_dim * (call->problem.score == FA_ADDITIVE ? ADDITIVE_WORK : 1) +
           (double)call->problem.value_dim;
}

/* Whether a tile keeps a score for each row and key. */
static int keeps_scores(const fa_call *call)
{
    return call->problem.activation == FA_SPARSEMAX || call->problem.activation == FA_ENTMAX15;
}

int fa_keeps_too_many(const fa_call *call) { return keeps_scores(call) && keys_of_row(call) > MOST_SCORES; }

/* Rows of a tile in a call with a block mask, at most `limit`: whole blocks, or an equal part of one. */
static int64_t rows_of_blocks(int64_t block_rows, int64_t limit)
{
    const int64_t parts = (block_rows + limit - 1) / limit;
    if (parts > 1)
        return (block_rows + parts - 1) / parts;
    return fa_most(1, fa_least(ROWS_OF_BLOCKS, limit) / block_rows) * block_rows;
}

static int64_t rows_of_tiles(const fa_call *call, int threads, const fa_tuning *tuning)
{
    const int64_t longest = call->longest_query;
    const double work_of_row = keys_of_row(call) * work_of_pair(call) + 1;
    int64_t rows = (int64_t)((double)call->sizes.queries * (double)call->heads / ((double)TILES * threads));
    rows = fa_least(fa_most(rows, tuning->least_rows), tuning->most_rows);
    rows = (int64_t)fa_least_of((double)rows, tuning->window_rows + keys_of_row(call) / tuning->keys_a_row);
    rows = fa_most(tuning->group_rows, (int64_t)fa_least_of((double)rows, MOST_WORK / work_of_row));
    if (keeps_scores(call))
        rows = fa_most(2 * tuning->group_rows, (int64_t)fa_least_of((double)rows, SCORES / (keys_of_row(call) + 1)));
    if (call->problem.decode)
        rows = fa_least(rows, FA_DECODE_TILE);
    if (longest <= rows)
        return fa_most(longest, 1);
    /* Tiles that end where blocks do see the same keys in all of their rows, and skip all others. */
    if (call->layouts[FA_BLOCK_MASK].data && !call->problem.decode && call->sizes.heads == 1)
        return rows_of_blocks(call->problem.block_rows, rows);
    const int64_t tiles = (longest + rows - 1) / rows;
    rows = (longest + tiles - 1) / tiles;
    return (rows + tuning->group_rows - 1) / tuning->group_rows * tuning->group_rows;
}

static int64_t tiles_of(const fa_call *call, int64_t rows)
{
    int64_t tiles = 0;
    for (int64_t sequence = 0; sequence < call->sequences; sequence++)
        tiles += (fa_queries_of(call, sequence) + rows - 1) / rows;
    return tiles * call->heads;
}

int fa_is_small(const fa_call *call, const fa_kernels *kernels)
{
    const int64_t rows = rows_of_tiles(call, 1, &kernels->tuning);
    return (double)call->heads * (double)call->sizes.queries * (keys_of_row(call) * work_of_pair(call) + ROW_WORK) +
               TILE_WORK * (double)tiles_of(call, rows) <
           SMALL_WORK;
}

/* The heaviest first, for qsort. */
static int by_cost(const void *a, const void *b)
{
    const fa_tile *x = a, *y = b;
    if (x->cost != y->cost)
        return x->cost < y->cost ? 1 : -1;
    return x->order > y->order ? 1 : -1;
}

static inline int64_t end_of_span(int64_t begin, int64_t end) { return fa_least(end, (begin / FA_SPAN + 1) * FA_SPAN); }

/* Notes the tiles, where they differ in cost the heaviest first; without room for them counts them and their spans. */
static void find_tiles(const fa_call *call, fa_plan *plan)
{
    int64_t tiles = 0, spans = 0;
    fa_head h;
    for (int64_t head = 0; head < call->heads; head++) {
        for (int64_t sequence = 0; sequence < call->sequences; sequence++) {
            fa_locate(call, head, sequence, &h);
            for (int64_t row = 0; row < h.queries; row += plan->rows) {
                const int64_t rows = fa_least(plan->rows, h.queries - row);
                int64_t cursor = 0, keys = 0, last_span = -1, begin, end;
                while (fa_next_range(&call->problem, &h, row, rows, &cursor, &begin, &end)) {
                    keys += end - begin;
                    spans += (end - 1) / FA_SPAN - fa_most(begin / FA_SPAN - 1, last_span);
                    last_span = (end - 1) / FA_SPAN;
                }
                if (plan->tile)
                    plan->tile[tiles] = (fa_tile){head, sequence, row, tiles, (double)(keys + 1) * (double)rows};
                tiles++;
            }
        }
    }
    if (!plan->tile)
        plan->tiles = tiles, plan->spans = spans;
    else if (tiles_differ(call))
        qsort(plan->tile, (size_t)tiles, sizeof(fa_tile), by_cost);
}

static void find_spans(const fa_call *call, fa_plan *plan)
{
    int64_t n = 0;
    fa_head h;
    for (int64_t t = 0; t < plan->tiles; t++) {
        const fa_tile *tile = &plan->tile[t];
        int64_t cursor = 0, last_span = -1, begin, end;
        plan->first_span[t] = n;
        fa_locate(call, tile->head, tile->sequence, &h);
        const int64_t rows = fa_least(plan->rows, h.queries - tile->row);
        while (fa_next_range(&call->problem, &h, tile->row, rows, &cursor, &begin, &end)) {
            while (begin < end) {
                if (begin / FA_SPAN != last_span) {
                    plan->span[n].tile = t;
                    plan->span[n].begin = begin;
                    n++;
                }
                last_span = begin / FA_SPAN;
                begin = plan->span[n - 1].end = end_of_span(begin, end);
            }
        }
    }
    plan->first_span[plan->tiles] = n;
}

/* One tile, from the first key to the last; returns whether the call is to stop. */
static int run_tile(const fa_call *call, const fa_kernels *kernels, int64_t head_index, int64_t sequence, int64_t row,
                    int64_t most_rows, void *workspace, const fa_watch *watch, int is_caller)
{
    fa_head head;
    int64_t begin, end, cursor = 0;
    fa_locate(call, head_index, sequence, &head);
    if (row >= head.queries)
        return 0;
    if (fa_interrupted(watch, is_caller))
        return 1;
    const int64_t rows = fa_least(most_rows, head.queries - row);
    kernels->open_tile(&call->problem, &head, row, rows, workspace);
    while (fa_next_range(&call->problem, &head, row, rows, &cursor, &begin, &end)) {
        while (begin < end) {
            const int64_t stop = end_of_span(begin, end);
            kernels->visit_keys(&call->problem, &head, row, rows, begin, stop, workspace);
            begin = stop;
            if (fa_interrupted(watch, is_caller))
                return 1;
        }
    }
    kernels->close_tile(&call->problem, &head, row, rows, workspace);
    return 0;
}

static int run_serial(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch)
{
    for (int64_t head = 0; head < call->heads; head++)
        for (int64_t sequence = 0; sequence < call->sequences; sequence++)
            for (int64_t row = 0; row < fa_queries_of(call, sequence); row += plan->rows)
                if (run_tile(call, kernels, head, sequence, row, plan->rows, plan->workspaces, watch, 1))
                    return 1;
    return 0;
}

#if defined(_OPENMP)
/* One span of a tile, kept for when the tile's spans are joined. */
static void run_span(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, int64_t n, void *workspace)
{
    fa_head head;
    const fa_tile_span *span = &plan->span[n];
    const fa_tile *tile = &plan->tile[span->tile];
    int64_t begin, end, cursor = span->begin;
    fa_locate(call, tile->head, tile->sequence, &head);
    const int64_t rows = fa_least(plan->rows, head.queries - tile->row);
    kernels->open_tile(&call->problem, &head, tile->row, rows, workspace);
    while (fa_next_range(&call->problem, &head, tile->row, rows, &cursor, &begin, &end) && begin < span->end)
        kernels->visit_keys(&call->problem, &head, tile->row, rows, begin, fa_least(end, span->end), workspace);
    kernels->save_span(&call->problem, rows, workspace, plan->found + (size_t)n * plan->span_size);
}

/* A tile from its spans. */
static void join_spans(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, int64_t t, void *workspace)
{
    fa_head head;
    const fa_tile *tile = &plan->tile[t];
    fa_locate(call, tile->head, tile->sequence, &head);
    const int64_t rows = fa_least(plan->rows, head.queries - tile->row);
    kernels->open_tile(&call->problem, &head, tile->row, rows, workspace);
    for (int64_t n = plan->first_span[t]; n < plan->first_span[t + 1]; n++)
        kernels->join_span(&call->problem, &head, rows, workspace, plan->found + (size_t)n * plan->span_size);
    kernels->close_tile(&call->problem, &head, tile->row, rows, workspace);
}

static int run_parallel(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch)
{
    const int chunk = (int)fa_least(fa_most(1, plan->tiles / ((int64_t)plan->threads * 64)), 1 << 20);
    void *team;
    int growing, stopped = 0;
    const int threads = fa_gather(plan->threads, &team, &growing);
#pragma omp parallel num_threads(threads) reduction(| : stopped)
    {
        const int thread = omp_get_thread_num(); /* 0 is the caller's */
        fa_join_team(team, growing);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t t = 0; t < plan->tiles; t++) {
            const fa_tile *tile = &plan->tile[t];
            stopped |= fa_interrupted(watch, 0) ||
                       run_tile(call, kernels, tile->head, tile->sequence, tile->row, plan->rows,
                                plan->workspaces + (size_t)thread * plan->workspace_size, watch, thread == 0);
        }
    }
    return stopped;
}

/* Few queries against many keys: threads share the keys of a tile, and its spans are merged in order. */
static int run_spans(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch)
{
    void *team;
    int growing, stopped = 0;
    const int threads = fa_gather(plan->threads, &team, &growing);
#pragma omp parallel num_threads(threads) reduction(| : stopped)
    {
        const int thread = omp_get_thread_num();
        char *workspace = plan->workspaces + (size_t)thread * plan->workspace_size;
        fa_join_team(team, growing);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < plan->spans; n++) {
            if (fa_interrupted(watch, thread == 0))
                stopped = 1;
            else
                run_span(call, kernels, plan, n, workspace);
        }
        /* Whoever has stopped: the spans are not all there. The watch says so to each thread from then on. */
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < plan->tiles; t++)
            if (!fa_interrupted(watch, 0))
                join_spans(call, kernels, plan, t, workspace);
            else
                stopped = 1;
    }
    return stopped;
}
#endif

void fa_make_plan(const fa_call *call, const fa_kernels *kernels, int threads, fa_plan *plan)
{
    const double channels = (double)call->problem.head_dim + (double)call->problem.value_dim;
    *plan = (fa_plan){.threads = threads, .rows = rows_of_tiles(call, threads, &kernels->tuning)};
    if (threads > 1) {
        find_tiles(call, plan);
        if (!(call->problem.decode && plan->tiles < (int64_t)SPLIT_TILES * threads && call->longest_key > FA_SPAN &&
              plan->spans > plan->tiles))
            plan->spans = 0;
        plan->threads = (int)fa_least(threads, fa_most(plan->spans, plan->tiles));
    }
    /* At most four numbers of 8 bytes for each channel of a row, and for each of a block of keys. */
    plan->estimate =
        32.0 *
            ((double)plan->threads * (double)(plan->rows + 2 * FA_BLOCK) + (double)plan->spans * (double)plan->rows) *
            (channels + 256) +
        (double)plan->tiles * (double)(sizeof(fa_tile) + sizeof(int64_t)) +
        (double)plan->spans * (double)sizeof(fa_tile_span);
    if (keeps_scores(call))
        plan->estimate += 16.0 * plan->threads * (double)plan->rows * keys_of_row(call);
    if (plan->estimate > FA_MOST_MEMORY)
        return;
    if (plan->spans)
        plan->span_size = kernels->span_size(&call->problem, plan->rows);
    plan->workspace_size = kernels->tile_workspace(&call->problem, plan->rows, call->longest_key);
    plan->size = aligned(plan->workspace_size * (size_t)plan->threads + plan->span_size * (size_t)plan->spans) +
                 (size_t)plan->tiles * sizeof(fa_tile) + (size_t)plan->spans * sizeof(fa_tile_span) +
                 ((size_t)plan->tiles + 1) * sizeof(int64_t);
}

void fa_lay_out(const fa_call *call, fa_plan *plan, void *memory)
{
    plan->workspaces = memory;
    plan->found = plan->workspaces + plan->workspace_size * (size_t)plan->threads;
    plan->tile = (fa_tile *)(plan->workspaces + aligned(plan->workspace_size * (size_t)plan->threads +
                                                        plan->span_size * (size_t)plan->spans));
    plan->span = (fa_tile_span *)(plan->tile + plan->tiles);
    plan->first_span = (int64_t *)(plan->span + plan->spans);
    if (plan->tiles)
        find_tiles(call, plan);
    if (plan->spans)
        find_spans(call, plan);
}

int fa_attend(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch)
{
#if defined(_OPENMP)
    if (plan->threads > 1)
        return plan->spans ? run_spans(call, kernels, plan, watch) : run_parallel(call, kernels, plan, watch);
#endif
    return run_serial(call, kernels, plan, watch);
}
