/* The driver of attention: cuts a checked call (call.h) into tiles of query rows, shares them out to threads, and walks
 * each tile over the keys that it may see. It knows tiles, threads and where things lie in scratch memory; what a tile
 * computes is the kernels' affair (contract.h), and it allocates nothing. Outputs of tiles are disjoint and the bits of
 * a row do not depend on its tile, so neither the order nor the number of threads can change a result.
 *
 * A caller: fa_choose_loops; if fa_has_work: fa_make_plan, fa_lay_out in memory of plan.size bytes, fa_attend.
 */
#ifndef FASTATTN_DRIVE_H
#define FASTATTN_DRIVE_H

#include "call.h"

typedef struct {
    int64_t head, sequence, row; /* its first one */
    int64_t order;               /* by which it comes where others cost the same */
    double cost;
} fa_tile;

/* Those of the keys [begin, end) of a tile that it may see; all in one span. */
typedef struct {
    int64_t tile, begin, end;
} fa_tile_span;

/* How a call is cut, and what lies where in its scratch memory. */
typedef struct {
    int64_t rows; /* of a tile, at most */
    int threads;
    int64_t tiles;
    int64_t spans;         /* that threads share; 0: they share tiles */
    size_t workspace_size; /* of a thread */
    size_t span_size;
    size_t size;     /* of the scratch memory */
    double estimate; /* about size, as a double that cannot overflow; beyond FA_MOST_MEMORY size is not computed */
    fa_tile *tile;
    fa_tile_span *span;
    int64_t *first_span; /* of each tile, and of one more */
    char *workspaces;    /* [threads] */
    char *found;         /* [spans] what each has given */
} fa_plan;

#define FA_MOST_MEMORY 1e15

/* Whether a call is to stop; threads ask now and then. is_caller: this is the thread that fa_attend was called in. */
typedef struct {
    int (*interrupted)(void *of, int is_caller);
    void *of;
} fa_watch;

static inline int fa_interrupted(const fa_watch *watch, int is_caller)
{
    return watch && watch->interrupted(watch->of, is_caller);
}

/* Decides whether keys are read in place (decode; 0: few queries take the same loops as many, so that their bits are
 * the same). Unless queries are many, also makes the heads of a group rows of one head, so that keys and values are
 * read, or packed, once for all of them; this needs lengths and offsets that do not differ within the group. */
void fa_choose_loops(fa_call *call, const fa_kernels *kernels, int decode);

/* Whether there is anything to compute. */
static inline int fa_has_work(const fa_call *call) { return call->heads != 0 && call->longest_query != 0; }

/* Whether the scores of a row are more than a tile can keep (sparsemax, entmax15). */
int fa_keeps_too_many(const fa_call *call);

/* Whether threads, or letting others have Python's lock, would cost more than they bring. */
int fa_is_small(const fa_call *call, const fa_kernels *kernels);

/* threads: at most. The plan's pointers are set by fa_lay_out; memory is aligned to FA_ALIGN. */
void fa_make_plan(const fa_call *call, const fa_kernels *kernels, int threads, fa_plan *plan);
void fa_lay_out(const fa_call *call, fa_plan *plan, void *memory);

/* Carries the call out; watch may be NULL. Returns whether it was stopped, in which case outputs are half written. */
int fa_attend(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch);

static inline int64_t fa_least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fa_most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline double fa_least_of(double a, double b) { return a < b ? a : b; }
static inline double fa_most_of(double a, double b) { return a > b ? a : b; }

#endif
