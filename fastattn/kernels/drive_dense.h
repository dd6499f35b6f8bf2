/* The drivers of layers: a product of rows with a packed matrix (fa_dense), and norms of rows (fa_norm). They share
 * blocks of rows and columns out to threads. Nothing is checked or allocated here.
 *
 * A caller: fa_plan_dense, then fa_run_dense with memory of plan.size bytes, aligned to FA_ALIGN; norms the same.
 */
#ifndef FASTATTN_DRIVE_DENSE_H
#define FASTATTN_DRIVE_DENSE_H

#include "drive.h"

typedef struct {
    int threads;
    int64_t panels;           /* of the matrix */
    int64_t rows, blocks;     /* of a block; blocks that are packed together */
    int64_t columns, ranges;  /* panels of a task; tasks of a block */
    size_t packed, workspace; /* bytes of a packed block, and of a thread's workspace */
    size_t size;              /* of all memory; 0: there is nothing to do */
} fa_dense_plan;

/* threads: at most. */
void fa_plan_dense(const fa_dense *dense, const fa_kernels *kernels, int threads, fa_dense_plan *plan);

/* Whether threads, or letting others have Python's lock, would cost more than they bring. */
int fa_dense_is_small(const fa_dense *dense);

/* watch may be NULL. Returns whether the call was stopped. */
int fa_run_dense(const fa_dense *dense, const fa_kernels *kernels, const fa_dense_plan *plan, void *memory,
                 const fa_watch *watch);

typedef struct {
    int threads;
    int64_t rows, tasks; /* of a task; in all */
    size_t workspace, size;
} fa_norm_plan;

int fa_norm_is_small(const fa_norm *norm);
void fa_plan_norm(const fa_norm *norm, const fa_kernels *kernels, int threads, fa_norm_plan *plan);
int fa_run_norm(const fa_norm *norm, const fa_kernels *kernels, const fa_norm_plan *plan, void *memory,
                const fa_watch *watch);

#endif
