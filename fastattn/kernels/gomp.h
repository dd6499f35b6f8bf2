/* Which OpenMP the regions run on (gomp.c). */
#ifndef FASTATTN_GOMP_H
#define FASTATTN_GOMP_H

/* Whether each region creates threads of its own: there is no libgomp, as yet. They are no more than the system gives,
 * so that no region needs a trial before it. */
#ifdef FASTATTN_FINDS_OPENMP
__attribute__((visibility("hidden"))) int fa_own_threads(void);
#else
static inline int fa_own_threads(void) { return 0; }
#endif

#endif
