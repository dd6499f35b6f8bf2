/* Threads: how many a call may use, and the care that OpenMP's need. Drivers only; kernels know no threads. */
#ifndef FASTATTN_THREADS_H
#define FASTATTN_THREADS_H

#include <stddef.h>

/* _OPENMP; 0 in a build without it. */
int fa_openmp_version(void);

/* What OpenMP would use in this thread: OMP_NUM_THREADS, or what was set since, for this thread alone. 0 without it. */
int fa_openmp_threads(void);

/* CPUs that this process may be scheduled on. */
int fa_affinity(void);

/* Of a clock that never goes back. */
double fa_seconds(void);

/* What decides how many threads a call gets that says nothing; 0: not set. Zeros, and no quota, until somebody sets
 * them: then it is what OpenMP would use. */
typedef struct {
    int chosen;             /* by set_num_threads */
    int environment;        /* FASTATTN_NUM_THREADS */
    int openmp_environment; /* OMP_NUM_THREADS */
    int openmp_untouched;   /* what OpenMP would use if nobody has set it otherwise since the import */
    int quota;              /* CPUs that the control groups of this process allow */
} fa_thread_settings;
extern fa_thread_settings fa_threads;

int fa_default_threads(void);

/* How many threads a call that wants so many may use, whatever the size of its work; 0 wants the default. */
int fa_allowed_threads(int wanted);

/* Needed once per process; later calls, from whomever, do nothing but name the lock. lock_path: a file, on which
 * processes that start threads at the same time wait for each other; NULL: none. -1: the system has no room. */
int fa_prepare_threads(const char *lock_path);

/* Right before a region: how many threads it may have, at most `threads`; fewer if the system allows no more, which
 * would otherwise abort the process. growing: it is this thread's turn until they exist. Every thread of the region
 * calls fa_join_team first. */
int fa_gather(int threads, void **team, int *growing);
void fa_join_team(void *team, int growing);

#endif
