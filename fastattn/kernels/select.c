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

/* Measured (docs/performance.md): Zen 4 lost by it, Zen 5 gains. Zen 3 is of Zen 4's family; no other was measured. */
int fa_fetching_helps(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("amdfam19h");
#else
    return 1;
#endif
}
