/* All memory that compiled code asks for passes here: fa_allocate in C, take_memory of _runtime.pyx in the drivers; but
 * for what gomp.c needs, which is in other modules too.
 * Kernels ask for none. In a debug build (FASTATTN_DEBUG) a test can let the n-th request from now fail and ask how
 * many blocks are alive; elsewhere this is malloc and free. */
#ifndef FASTATTN_ALLOCATE_H
#define FASTATTN_ALLOCATE_H

#include <stddef.h>
#include <stdlib.h>

#if defined(FASTATTN_DEBUG)
int fa_request_fails(void); /* called once for each request */
void *fa_note_taken(void *block);
void fa_note_given(const void *block);
long fa_fail_request(long n); /* 1: the next one; 0: none. Returns what was left of the last n: 0 if that one failed */
long fa_live_blocks(void);
#else
static inline int fa_request_fails(void) { return 0; }
static inline void *fa_note_taken(void *block) { return block; }
static inline void fa_note_given(const void *block) { (void)block; }
#endif

/* NULL where there is none. */
static inline void *fa_allocate(size_t size) { return fa_request_fails() ? NULL : fa_note_taken(malloc(size)); }

static inline void fa_release(void *block)
{
    fa_note_given(block);
    free(block);
}

#endif
