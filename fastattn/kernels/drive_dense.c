/* The drivers of layers; drive_dense.h says what they do and may assume. */
#include "drive_dense.h"
#include "threads.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

/* What a thread must have to do, in numbers multiplied or, divided by READ, bytes read from memory: about 0.1 ms. A
 * region costs a few microseconds if one has just ended, but 0.1 ms if threads sleep, as they do between the layers of
 * a model. */
enum { LEAST_WORK = 1 << 23, SMALL_WORK = 1 << 17, READ = 4, NORM_TASK = 1 << 14 };

/* Numbers of x that one thread packs sooner than several, which would have to wait for each other then. */
enum { PACKED_ALONE = 1 << 15 };

static size_t aligned(size_t n) { return (n + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN; }
static int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int bytes_of(fa_dtype dtype) { return dtype == FA_F64 ? 8 : dtype == FA_F32 ? 4 : dtype == FA_I8 ? 1 : 2; }

static double work(const fa_dense *d)
{
    return (double)d->d_in * (double)d->d_out * ((double)d->rows + READ * bytes_of(d->dtype));
}

int fa_dense_is_small(const fa_dense *d) { return work(d) < SMALL_WORK; }

void fa_plan_dense(const fa_dense *d, const fa_kernels *kernels, int threads, fa_dense_plan *plan)
{
    const fa_tuning *tuning = &kernels->tuning;
    const double share = work(d) / LEAST_WORK;
    *plan = (fa_dense_plan){.threads = 1, .panels = ceiling(d->d_out, tuning->panel)};
    if (d->rows == 0 || d->d_out == 0)
        return;
    if (share < threads)
        threads = share < 1 ? 1 : (int)share;
    if (d->rows <= FA_DENSE_FEW) {
        /* Some parts for each thread, so that none waits long for another, of at least 64 KiB. */
        const int64_t least = ceiling(1 << 16, fa_most(d->d_in, 1) * tuning->panel * bytes_of(d->dtype));
        plan->columns = fa_most(least, ceiling(plan->panels, 8 * (int64_t)threads));
        plan->ranges = ceiling(plan->panels, plan->columns);
        plan->threads = (int)fa_least(threads, plan->ranges);
        plan->size = aligned((size_t)(d->rows * d->d_in) * 8 + FA_ALIGN);
        return;
    }
    /* Blocks of the same size, in whole groups of rows. */
    int64_t blocks = ceiling(d->rows, tuning->dense_rows);
    plan->columns = fa_most(1, tuning->dense_columns / tuning->panel);
    plan->ranges = ceiling(plan->panels, plan->columns);
    if (blocks * plan->ranges < 8 * (int64_t)threads && threads > 1) {
        plan->ranges = fa_least(plan->panels, ceiling(8 * (int64_t)threads, blocks));
        if (blocks * plan->ranges < 4 * (int64_t)threads)
            blocks = fa_least(ceiling(d->rows, tuning->group_rows), ceiling(4 * (int64_t)threads, plan->ranges));
    }
    plan->columns = ceiling(plan->panels, plan->ranges);
    plan->ranges = ceiling(plan->panels, plan->columns);
    plan->rows = ceiling(ceiling(d->rows, blocks), tuning->group_rows) * tuning->group_rows;
    blocks = ceiling(d->rows, plan->rows);
    plan->threads = (int)fa_least(threads, blocks * plan->ranges);
    /* A barrier stands before and after each round of blocks: enough tasks that threads end together. */
    plan->blocks = plan->threads == 1 ? 1 : fa_least(blocks, ceiling(16 * (int64_t)plan->threads, plan->ranges));
    plan->packed = aligned(kernels->dense_packed(d->d_in, plan->rows));
    plan->workspace = aligned(kernels->dense_workspace(plan->rows, plan->columns));
    plan->size = plan->packed * (size_t)plan->blocks + plan->workspace * (size_t)plan->threads;
}

/* Rows [begin, end) of a round of blocks that begins at row `first`, packed. */
static void pack_rows(const fa_dense *d, const fa_kernels *kernels, const fa_dense_plan *plan, int64_t first,
                      int64_t begin, int64_t end, char *memory)
{
    while (begin < end) {
        const int64_t block = begin / plan->rows, row = first + block * plan->rows;
        const int64_t rows = fa_least(plan->rows, d->rows - row), stop = fa_least(end, (block + 1) * plan->rows);
        kernels->dense_pack(d, row, rows, begin - block * plan->rows, stop - block * plan->rows,
                            memory + (size_t)block * plan->packed);
        begin = stop;
    }
}

/* A task: a block against a range of columns. */
static void run_task(const fa_dense *d, const fa_kernels *kernels, const fa_dense_plan *plan, int64_t first,
                     int64_t task, char *memory, int thread)
{
    const int64_t block = task / plan->ranges, row = first + block * plan->rows;
    const int64_t begin = task % plan->ranges * plan->columns;
    kernels->dense_block(d, row, fa_least(plan->rows, d->rows - row), memory + (size_t)block * plan->packed, begin,
                         fa_least(plan->panels, begin + plan->columns),
                         memory + (size_t)plan->blocks * plan->packed + (size_t)thread * plan->workspace);
}

static int run_blocks(const fa_dense *d, const fa_kernels *kernels, const fa_dense_plan *plan, char *memory,
                      const fa_watch *watch)
{
    const int64_t round = plan->rows * plan->blocks;
#if defined(_OPENMP)
    if (plan->threads > 1) {
        void *team;
        int growing, stopped = 0;
        const int is_packed = d->rows <= round && d->rows * d->d_in <= PACKED_ALONE;
        if (is_packed)
            pack_rows(d, kernels, plan, 0, 0, d->rows, memory);
        const int threads = fa_gather(plan->threads, &team, &growing);
#pragma omp parallel num_threads(threads) reduction(| : stopped)
        {
            const int thread = omp_get_thread_num(); /* 0 is the caller's */
            fa_join_team(team, growing);
            for (int64_t first = 0; first < d->rows; first += round) {
                const int64_t rows = fa_least(round, d->rows - first), tasks = ceiling(rows, plan->rows) * plan->ranges;
                const int64_t part = ceiling(rows, 4 * (int64_t)plan->threads), parts = ceiling(rows, part);
                if (!is_packed) {
#pragma omp for schedule(dynamic, 1)
                    for (int64_t p = 0; p < parts; p++)
                        if (!fa_interrupted(watch, 0))
                            pack_rows(d, kernels, plan, first, p * part, fa_least(rows, (p + 1) * part), memory);
                }
                /* Whoever has stopped: not all is packed. The watch says so to each thread from then on. */
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < tasks; task++) {
                    if (fa_interrupted(watch, thread == 0))
                        stopped = 1;
                    else
                        run_task(d, kernels, plan, first, task, memory, thread);
                }
            }
        }
        return stopped;
    }
#endif
    for (int64_t first = 0; first < d->rows; first += round) {
        const int64_t rows = fa_least(round, d->rows - first);
        pack_rows(d, kernels, plan, first, 0, rows, memory);
        for (int64_t task = 0; task < ceiling(rows, plan->rows) * plan->ranges; task++) {
            if (fa_interrupted(watch, 1))
                return 1;
            run_task(d, kernels, plan, first, task, memory, 0);
        }
    }
    return 0;
}

static int run_few(const fa_dense *given, const fa_kernels *kernels, const fa_dense_plan *plan, char *memory,
                   const fa_watch *watch)
{
    fa_dense own = *given;
    const fa_dense *const d = &own;
    own.prefetch = fa_prefetching_helps();
    const size_t size = d->dtype == FA_F64 ? 8 : 4; /* of the kernels' numbers, whatever x has */
    for (int64_t r = 0; r < d->rows; r++)
        kernels->gather(memory + (size_t)(r * d->d_in) * size, d->x.data + r * d->x.row, d->x.col, d->d_in, d->x.dtype);
#if defined(_OPENMP)
    if (plan->threads > 1) {
        void *team;
        int growing, stopped = 0;
        const int threads = fa_gather(plan->threads, &team, &growing);
#pragma omp parallel num_threads(threads) reduction(| : stopped)
        {
            const int thread = omp_get_thread_num();
            fa_join_team(team, growing);
#pragma omp for schedule(dynamic, 1)
            for (int64_t range = 0; range < plan->ranges; range++) {
                if (fa_interrupted(watch, thread == 0))
                    stopped = 1;
                else
                    kernels->dense_few(d, memory, range * plan->columns,
                                       fa_least(plan->panels, (range + 1) * plan->columns));
            }
        }
        return stopped;
    }
#endif
    for (int64_t range = 0; range < plan->ranges; range++) {
        if (fa_interrupted(watch, 1))
            return 1;
        kernels->dense_few(d, memory, range * plan->columns, fa_least(plan->panels, (range + 1) * plan->columns));
    }
    return 0;
}

int fa_run_dense(const fa_dense *d, const fa_kernels *kernels, const fa_dense_plan *plan, void *memory,
                 const fa_watch *watch)
{
    if (plan->size == 0)
        return 0;
    return d->rows <= FA_DENSE_FEW ? run_few(d, kernels, plan, memory, watch)
                                   : run_blocks(d, kernels, plan, memory, watch);
}

int fa_norm_is_small(const fa_norm *norm) { return (double)norm->rows * ((double)norm->n + 64) < NORM_TASK; }

void fa_plan_norm(const fa_norm *norm, const fa_kernels *kernels, int threads, fa_norm_plan *plan)
{
    *plan = (fa_norm_plan){.threads = 1};
    if (norm->rows == 0 || norm->n == 0)
        return;
    plan->rows = fa_most(1, NORM_TASK / norm->n);
    plan->tasks = ceiling(norm->rows, plan->rows);
    plan->threads = (int)fa_least(threads, plan->tasks);
    plan->workspace = aligned(kernels->norm_workspace(norm->n));
    plan->size = plan->workspace * (size_t)plan->threads;
}

int fa_run_norm(const fa_norm *norm, const fa_kernels *kernels, const fa_norm_plan *plan, void *memory,
                const fa_watch *watch)
{
#if defined(_OPENMP)
    if (plan->threads > 1) {
        void *team;
        int growing, stopped = 0;
        const int threads = fa_gather(plan->threads, &team, &growing);
#pragma omp parallel num_threads(threads) reduction(| : stopped)
        {
            const int thread = omp_get_thread_num();
            fa_join_team(team, growing);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < plan->tasks; task++) {
                if (fa_interrupted(watch, thread == 0))
                    stopped = 1;
                else
                    kernels->norm_rows(norm, task * plan->rows, fa_least(norm->rows, (task + 1) * plan->rows),
                                       (char *)memory + (size_t)thread * plan->workspace);
            }
        }
        return stopped;
    }
#endif
    for (int64_t task = 0; task < plan->tasks; task++) {
        if (fa_interrupted(watch, 1))
            return 1;
        kernels->norm_rows(norm, task * plan->rows, fa_least(norm->rows, (task + 1) * plan->rows), memory);
    }
    return 0;
}
