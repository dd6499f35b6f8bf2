/* The switch of allocate.h; empty but in a debug build. May be called by any thread. */
#include "allocate.h"

#if defined(FASTATTN_DEBUG)
static long fails_in, live;

int fa_request_fails(void)
{
    /* Below 0 once it has failed, and in a thread that read it just before. */
    return __atomic_load_n(&fails_in, __ATOMIC_RELAXED) > 0 && __atomic_sub_fetch(&fails_in, 1, __ATOMIC_RELAXED) == 0;
}

void *fa_note_taken(void *block)
{
    if (block != NULL)
        __atomic_add_fetch(&live, 1, __ATOMIC_RELAXED);
    return block;
}

void fa_note_given(const void *block)
{
    if (block != NULL)
        __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);
}

long fa_fail_request(long n)
{
    long left = __atomic_exchange_n(&fails_in, n, __ATOMIC_RELAXED);
    return left > 0 ? left : 0;
}

long fa_live_blocks(void) { return __atomic_load_n(&live, __ATOMIC_RELAXED); }
#else
typedef int fa_nothing_here; /* ISO C wants a declaration in each file */
#endif
