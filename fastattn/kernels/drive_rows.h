/* The driver of softmax, its relatives and their gradients: shares rows out to threads. Contiguous rows are read and
 * written in place. If rows are strided but lie side by side, many are processed at once, so that whole cache lines are
 * used; other rows are copied through scratch. The bits of a row are the same each way. Nothing is checked or allocated
 * here.
 *
 * A caller: fa_plan_rows, then fa_run_rows with memory of plan.size bytes, aligned to FA_ALIGN.
 */
#ifndef FASTATTN_DRIVE_ROWS_H
#define FASTATTN_DRIVE_ROWS_H

#include "drive.h"

/* Rows of one or more axes: the axes of an array split into those of a row and the others (fa_join_axes merges them
 * where strides allow). */
typedef struct {
    fa_row_function function;
    fa_axes row, batch;
    int64_t length, rows;        /* elements per row; number of rows */
    char *data[FA_ROW_OPERANDS]; /* the mask and the gradient may be NULL */
    fa_dtype dtypes[FA_ROW_OPERANDS];
    fa_dtype real; /* the accumulation dtype */
    int single;    /* the operand with one element per row, or -1 */
    int aligned;   /* all but the mask: elements at multiples of their size */
} fa_rows;

typedef struct {
    int axis; /* of the batch, along which rows are processed side by side; -1: they are not */
    int threads;
    int64_t chunk;           /* rows of a task that are not side by side */
    int64_t tasks, together; /* how many a thread takes at a time */
    size_t scratch_size;     /* of a thread */
    size_t size;             /* of the scratch memory; 0: there is nothing to do */
} fa_rows_plan;

/* Whether threads, or letting others have Python's lock, would cost more than they bring. */
int fa_rows_are_few(const fa_rows *rows);

/* threads: at most. */
void fa_plan_rows(const fa_rows *rows, const fa_kernels *kernels, int threads, fa_rows_plan *plan);

/* watch may be NULL. Returns whether the call was stopped. */
int fa_run_rows(const fa_rows *rows, const fa_kernels *kernels, const fa_rows_plan *plan, void *memory,
                const fa_watch *watch);

/* Bytes of an element in storage, and in the accumulation dtype. */
static inline ptrdiff_t fa_size_of(fa_dtype dtype) { return dtype == FA_F64 ? 8 : dtype == FA_F32 ? 4 : 2; }
static inline ptrdiff_t fa_real_size(fa_dtype dtype) { return dtype == FA_F64 ? 8 : 4; }

/* Merges each axis with the next if the strides of all operands allow it; drops axes of length 1. */
static inline void fa_join_axes(fa_axes *axes)
{
    int n = 0;
    for (int i = 0; i < axes->count; i++) {
        if (axes->shape[i] == 1)
            continue;
        int joined = n > 0;
        for (int k = 0; k < FA_ROW_OPERANDS; k++)
            if (n > 0 && axes->strides[k][n - 1] != axes->strides[k][i] * axes->shape[i])
                joined = 0;
        if (joined) {
            axes->shape[n - 1] *= axes->shape[i];
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                axes->strides[k][n - 1] = axes->strides[k][i];
        } else {
            axes->shape[n] = axes->shape[i];
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                axes->strides[k][n] = axes->strides[k][i];
            n++;
        }
    }
    axes->count = n;
}

#endif
