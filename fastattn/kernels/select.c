/* What this CPU, and this operating system, can run, and what suits it. Compiled for the plain target. */
#include "fastattn.h"

extern const fa_instruction_set fa_baseline;
#if defined(__x86_64__)
extern const fa_instruction_set fa_avx2, fa_avx512;
#endif

int fa_runnable(const fa_instruction_set *sets[], int room)
{
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init(); /* asks CPUID, and XGETBV for the registers that the system saves */
    if (n < room && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        sets[n++] = &fa_avx512;
    if (n < room && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        sets[n++] = &fa_avx2;
#endif
    if (n < room)
        sets[n++] = &fa_baseline;
    return n;
}

/* Zen 3 and 4 are better left to their own prefetchers (docs/performance.md). */
int fa_fetching_helps(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("amdfam19h");
#else
    return 1;
#endif
}
