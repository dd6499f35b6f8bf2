/* The driver of rows; drive_rows.h says what it does and may assume. */
#include "drive_rows.h"
#include "threads.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

enum {
    SMALL = 1 << 14, /* elements below which threads cost more than they gain */
    CHUNK = 1 << 15, /* elements that a thread processes at a time, at least one row */
    LINE = 64        /* bytes of a cache line */
};

/* Copies a row with any strides to contiguous scratch or, for FA_ROW_OUT, from it; innermost axis first. */
static void copy_row(const fa_rows *p, const fa_kernels *kernels, int which, char *memory, char *scratch)
{
    int64_t index[FA_ROW_AXES];
    int last = p->row.count - 1;
    int64_t inner = last >= 0 ? p->row.shape[last] : 1, done = 0;
    const ptrdiff_t stride = last >= 0 ? p->row.strides[which][last] : 0;
    const ptrdiff_t size = which == FA_ROW_MASK ? 1 : fa_real_size(p->real);
    const int64_t length = which == p->single ? 1 : p->length;
    if (which == p->single)
        inner = 1, last = -1;
    for (int axis = 0; axis < last; axis++)
        index[axis] = 0;
    while (done < length) {
        if (which == FA_ROW_OUT)
            kernels->scatter(memory, stride, scratch + done * size, inner, p->dtypes[which]);
        else if (which == FA_ROW_MASK)
            for (int64_t i = 0; i < inner; i++)
                scratch[done + i] = memory[i * stride];
        else
            kernels->gather(scratch + done * size, memory, stride, inner, p->dtypes[which]);
        done += inner;
        for (int axis = last - 1; axis >= 0; axis--) {
            index[axis]++;
            memory += p->row.strides[which][axis];
            if (index[axis] < p->row.shape[axis])
                break;
            memory -= index[axis] * p->row.strides[which][axis];
            index[axis] = 0;
        }
    }
}

/* Whether the kernels can read or write the rows of an operand in place, or have nothing to read. */
static int in_place(const fa_rows *p, int which)
{
    const int last = p->row.count - 1;
    if (!p->data[which])
        return 1;
    if (which == FA_ROW_MASK)
        return last < 0 || (last == 0 && p->row.strides[which][0] == 1);
    if (!p->aligned || p->dtypes[which] != p->real)
        return 0;
    return which == p->single || last < 0 || (last == 0 && p->row.strides[which][0] == fa_real_size(p->real));
}

static int all_in_place(const fa_rows *p)
{
    for (int k = 0; k < FA_ROW_OPERANDS; k++)
        if (!in_place(p, k))
            return 0;
    return 1;
}

/* Where the row of an operand is in scratch; after the last one: the size of scratch. */
static size_t scratch_at(const fa_rows *p, int which)
{
    size_t at = 0;
    for (int k = 0; k < which; k++)
        if (!in_place(p, k))
            at += ((size_t)fa_most(p->length, 1) * (k == FA_ROW_MASK ? 1 : (size_t)fa_real_size(p->real)) + FA_ALIGN -
                   1) /
                  FA_ALIGN * FA_ALIGN;
    return at;
}

/* Rows [begin, end); scratch: a row of each operand that is not read or written in place. */
static int run_rows(const fa_rows *p, const fa_kernels *kernels, int64_t begin, int64_t end, char *scratch,
                    const fa_watch *watch, int is_caller)
{
    const int inner = p->batch.count - 1, together = all_in_place(p) && inner >= 0;
    int64_t rest = begin, looked = begin, index[FA_ROW_AXES];
    char *at[FA_ROW_OPERANDS], *row[FA_ROW_OPERANDS]; /* row: here or in scratch */
    ptrdiff_t step[FA_ROW_OPERANDS];
    int here[FA_ROW_OPERANDS];
    for (int k = 0; k < FA_ROW_OPERANDS; k++) {
        at[k] = p->data[k];
        here[k] = in_place(p, k);
        row[k] = scratch + scratch_at(p, k);
        step[k] = together ? p->batch.strides[k][inner] : 0;
    }
    for (int axis = inner; axis >= 0; axis--) {
        index[axis] = rest % p->batch.shape[axis];
        rest /= p->batch.shape[axis];
        for (int k = 0; k < FA_ROW_OPERANDS; k++)
            if (at[k])
                at[k] += index[axis] * p->batch.strides[k][axis];
    }
    for (int64_t r = begin; r < end;) {
        int64_t run = 1;
        if (together) {
            /* All rows up to the end of the innermost batch axis at once. */
            run = fa_least(end - r, p->batch.shape[inner] - index[inner]);
            run = fa_most(1, fa_least(run, CHUNK / fa_most(p->length, 1)));
        }
        for (int k = 0; k < FA_ROW_OPERANDS; k++) {
            if (here[k])
                row[k] = at[k];
            else if (k != FA_ROW_OUT)
                copy_row(p, kernels, k, at[k], row[k]);
        }
        kernels->rows(p->function, row[FA_ROW_X], step[FA_ROW_X], row[FA_ROW_GRAD], step[FA_ROW_GRAD], row[FA_ROW_MASK],
                      step[FA_ROW_MASK], row[FA_ROW_OUT], step[FA_ROW_OUT], p->length, run);
        if (!here[FA_ROW_OUT])
            copy_row(p, kernels, FA_ROW_OUT, at[FA_ROW_OUT], row[FA_ROW_OUT]);
        r += run;
        for (int axis = inner; axis >= 0; axis--) {
            index[axis] += run;
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                if (at[k])
                    at[k] += run * p->batch.strides[k][axis];
            if (index[axis] < p->batch.shape[axis])
                break;
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                if (at[k])
                    at[k] -= index[axis] * p->batch.strides[k][axis];
            index[axis] = 0;
            run = 1;
        }
        if (watch && (r - looked) * (p->length + 64) > CHUNK) {
            looked = r;
            if (fa_interrupted(watch, is_caller))
                return 1;
        }
    }
    return 0;
}

/* Rows side by side */

/* Memory traffic in bytes per element of an operand along an axis with this stride and `run` elements. */
static double bytes_touched(const fa_rows *p, ptrdiff_t stride, int which, int64_t run)
{
    const double size = which == FA_ROW_MASK ? 1 : (double)fa_size_of(p->dtypes[which]);
    const double step = stride < 0 ? -(double)stride : (double)stride;
    return fa_least_of(LINE, fa_most_of(step, fa_least_of(size, (double)LINE / (double)fa_most(run, 1))));
}

/* The batch axis along which to process rows side by side, or -1 to process them one by one. least_rows: fewer leave
 * most lanes empty. */
static int axis_of_columns(const fa_rows *p, int64_t least_rows)
{
    const int last = p->row.count - 1;
    int best = -1;
    double along_row = 0, along_axis = 0;
    if (last < 0 || p->rows == 0 || p->length == 0 || all_in_place(p))
        return -1;
    for (int axis = 0; axis < p->batch.count; axis++) {
        double cost = 0;
        if (p->batch.shape[axis] < least_rows)
            continue;
        for (int k = 0; k < FA_ROW_OPERANDS; k++)
            if (p->data[k])
                cost += bytes_touched(p, p->batch.strides[k][axis], k, p->batch.shape[axis]);
        if (best < 0 || cost < along_axis)
            best = axis, along_axis = cost;
    }
    for (int k = 0; k < FA_ROW_OPERANDS; k++) {
        if (p->data[k] && k != p->single) {
            const double cost = bytes_touched(p, p->row.strides[k][last], k, p->row.shape[last]);
            /* Short runs cost a call each. */
            along_row += fa_most_of(cost, fa_least_of(LINE, (double)LINE / (double)p->row.shape[last]));
        }
    }
    return best >= 0 && along_axis <= along_row ? best : -1;
}

/* One task: up to columns_at_once rows side by side. */
static void run_columns(const fa_rows *p, const fa_kernels *kernels, const fa_rows_plan *plan, int64_t task,
                        void *scratch)
{
    const int64_t count = p->batch.shape[plan->axis], at_once = kernels->columns_at_once;
    const int64_t groups = (count + at_once - 1) / at_once, first = task % groups * at_once;
    int64_t rest = task / groups;
    char *at[FA_ROW_OPERANDS];
    fa_columns c = {.row = &p->row, .length = p->length, .rows = fa_least(at_once, count - first)};
    for (int k = 0; k < FA_ROW_OPERANDS; k++) {
        c.next[k] = p->batch.strides[k][plan->axis];
        at[k] = p->data[k] ? p->data[k] + first * c.next[k] : NULL;
    }
    for (int axis = p->batch.count - 1; axis >= 0; axis--) {
        if (axis == plan->axis)
            continue;
        const int64_t index = rest % p->batch.shape[axis];
        rest /= p->batch.shape[axis];
        for (int k = 0; k < FA_ROW_OPERANDS; k++)
            if (at[k])
                at[k] += index * p->batch.strides[k][axis];
    }
    c.x = at[FA_ROW_X], c.grad = at[FA_ROW_GRAD], c.mask = at[FA_ROW_MASK], c.out = at[FA_ROW_OUT];
    c.dtype = p->dtypes[FA_ROW_X], c.grad_dtype = p->dtypes[FA_ROW_GRAD], c.out_dtype = p->dtypes[FA_ROW_OUT];
    kernels->columns(p->function, &c, scratch);
}

/* A task of either kind; returns whether the call is to stop. */
static int run_task(const fa_rows *p, const fa_kernels *kernels, const fa_rows_plan *plan, int64_t task, char *scratch,
                    const fa_watch *watch, int is_caller)
{
    if (plan->axis < 0)
        return run_rows(p, kernels, task * plan->chunk, fa_least(p->rows, (task + 1) * plan->chunk), scratch, watch,
                        is_caller);
    run_columns(p, kernels, plan, task, scratch);
    return 0;
}

int fa_rows_are_few(const fa_rows *p) { return (double)p->rows * ((double)p->length + 64) < SMALL; }

void fa_plan_rows(const fa_rows *p, const fa_kernels *kernels, int threads, fa_rows_plan *plan)
{
    *plan = (fa_rows_plan){.axis = axis_of_columns(p, kernels->columns_at_once / 2), .chunk = 1, .threads = 1};
    int64_t regions; /* that threads may take at a time */
    if (plan->axis >= 0) {
        const int64_t at_once = kernels->columns_at_once;
        const int64_t together = fa_most(1, CHUNK / (p->length < CHUNK ? p->length * at_once : CHUNK));
        plan->tasks = (p->batch.shape[plan->axis] + at_once - 1) / at_once;
        for (int axis = 0; axis < p->batch.count; axis++)
            if (axis != plan->axis)
                plan->tasks *= p->batch.shape[axis];
        regions = (plan->tasks + together - 1) / together;
        plan->together = together;
        plan->scratch_size = kernels->columns_workspace(p->length);
    } else if (p->rows && (p->length || p->function == FA_ROW_LOGSUMEXP)) {
        plan->chunk = fa_most(1, CHUNK / fa_most(p->length, 1));
        plan->tasks = regions = (p->rows + plan->chunk - 1) / plan->chunk;
        plan->together = 1;
        plan->scratch_size = scratch_at(p, FA_ROW_OPERANDS);
    } else {
        return;
    }
    plan->threads = (int)fa_least(threads, regions);
    plan->scratch_size =
        (size_t)fa_most(FA_ALIGN, (int64_t)((plan->scratch_size + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN));
    plan->size = plan->scratch_size * (size_t)plan->threads;
}

int fa_run_rows(const fa_rows *p, const fa_kernels *kernels, const fa_rows_plan *plan, void *memory,
                const fa_watch *watch)
{
#if defined(_OPENMP)
    if (plan->threads > 1) {
        void *team;
        int growing, stopped = 0;
        const int threads = fa_gather(plan->threads, &team, &growing), together = (int)plan->together;
#pragma omp parallel num_threads(threads) reduction(| : stopped)
        {
            const int thread = omp_get_thread_num(); /* 0 is the caller's */
            char *scratch = (char *)memory + (size_t)thread * plan->scratch_size;
            fa_join_team(team, growing);
#pragma omp for schedule(dynamic, together)
            for (int64_t task = 0; task < plan->tasks; task++)
                stopped |=
                    fa_interrupted(watch, thread == 0) || run_task(p, kernels, plan, task, scratch, watch, thread == 0);
        }
        return stopped;
    }
#endif
    for (int64_t task = 0; task < plan->tasks; task++)
        if ((task && fa_interrupted(watch, 1)) || run_task(p, kernels, plan, task, memory, watch, 1))
            return 1;
    return 0;
}
