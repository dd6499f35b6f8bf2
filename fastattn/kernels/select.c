/* Which kernels this CPU and operating system can run, and which suit it. Compiled for the plain target. */
#include "compiler.h"
#include "contract.h"
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern const fa_kernels fa_baseline_f32, fa_baseline_f64;
#if defined(__x86_64__)
extern const fa_kernels fa_avx2_f32, fa_avx2_f64, fa_avx512_f32, fa_avx512_f64;
#if COMPILES_AVX512_BF16
extern const fa_kernels fa_avx512_bf16_f32;
#endif
#if COMPILES_AMX
#include <sys/syscall.h>
#include <unistd.h>
extern const fa_kernels fa_avx512_amx_f32;
#endif

/* These check CPUID, and XGETBV for the registers that the operating system saves. */
static int runs_avx512(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

static int runs_avx2(void)
{
    unsigned a, b, c, d;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C); /* clang's builtin does not know f16c */
}

static int has_avx512_bf16(void)
{
    unsigned a, b, c, d;
    return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

static int has_amx_bf16(void)
{
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);
}

#if COMPILES_AMX
static int asks_for_other_than(const char *name);

/* Linux gives a process the use of tiles only when asked, and refuses where a signal's stack has no room for them. Once
 * it has, it refuses such stacks, so nobody asks who is not to use tiles. */
static int runs_amx(void)
{
    enum { ASK = 0x1023, TILE_DATA = 18, TILES_SAVED = 3 << 17 };
    static int known; /* 1: no, 2: yes; every thread finds the same */
    unsigned low, high;
    int runs = __atomic_load_n(&known, __ATOMIC_ACQUIRE) - 1;
    if (runs >= 0)
        return runs;
    runs = has_amx_bf16() && !asks_for_other_than("avx512_amx");
    if (runs) {
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        runs = (low & TILES_SAVED) == TILES_SAVED && syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    }
    __atomic_store_n(&known, runs + 1, __ATOMIC_RELEASE);
    return runs;
}
#endif

/* Whether an instruction that multiplies pairs of bfloat16 is worth its roundings: on Zen 4 and 5 it is issued as often
 * as a multiply-add of floats, on Intel's cores one fourth as often (docs/notebook, page 29). */
static int pairs_are_fast(void) { return has_avx512_bf16() && __builtin_cpu_is("amd"); }
static int pairs_are_slow(void) { return has_avx512_bf16() && !pairs_are_fast(); }

static int has_avx512_fp16(void)
{
    unsigned a, b, c, d;
    return runs_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
}
#elif defined(__aarch64__)
extern const fa_kernels fa_neon_f32, fa_neon_f64;

#if defined(__linux__)
/* Whether the kernel lists a feature: bits of AT_HWCAP and AT_HWCAP2, by number, because old headers do not name all.
 */
static int lists(unsigned long list, int bit) { return (int)(getauxval(list) >> bit & 1); }
static int runs_neon(void) { return lists(AT_HWCAP, 1); }
static int has_fp16(void) { return lists(AT_HWCAP, 10); }
static int has_fhm(void) { return lists(AT_HWCAP, 23); }
static int has_bf16(void) { return lists(AT_HWCAP2, 14); }
#else
static int runs_neon(void) { return 1; } /* the architecture has it */
#endif
#endif

static int runs_always(void) { return 1; }

/* Best first. An empty slot is filled from the next row that has it; 16-bit dtypes that no row has use the kernels of
 * their accumulation dtype. */
static const struct {
    const char *name;
    int (*runs)(void);
    const fa_kernels *kernels[FA_DTYPES];
} instruction_sets[] = {
#if defined(__x86_64__)
#if COMPILES_AMX
    {"avx512_amx", runs_amx, {[FA_BF16] = &fa_avx512_amx_f32}},
#endif
#if COMPILES_AVX512_BF16
    {"avx512_bf16", pairs_are_fast, {[FA_BF16] = &fa_avx512_bf16_f32}},
#endif
    {"avx512", runs_avx512, {[FA_F32] = &fa_avx512_f32, [FA_F64] = &fa_avx512_f64, [FA_BF16] = &fa_avx512_f32}},
#if COMPILES_AVX512_BF16
    /* Where it is slower, for those who ask for it. */
    {"avx512_bf16",
     pairs_are_slow,
     {[FA_F32] = &fa_avx512_f32, [FA_F64] = &fa_avx512_f64, [FA_BF16] = &fa_avx512_bf16_f32}},
#endif
    {"avx2", runs_avx2, {[FA_F32] = &fa_avx2_f32, [FA_F64] = &fa_avx2_f64}},
#elif defined(__aarch64__)
    {"neon", runs_neon, {[FA_F32] = &fa_neon_f32, [FA_F64] = &fa_neon_f64}},
#endif
    {"baseline", runs_always, {[FA_F32] = &fa_baseline_f32, [FA_F64] = &fa_baseline_f64}},
};
enum { ROWS_OF_TABLE = sizeof instruction_sets / sizeof instruction_sets[0] };

#if COMPILES_AMX
/* Whether FASTATTN_ISA names another row of the table. */
static int asks_for_other_than(const char *name)
{
    const char *asked = getenv("FASTATTN_ISA");
    int found = 0;
    for (int i = 0; asked && i < ROWS_OF_TABLE; i++)
        found |= strcmp(asked, instruction_sets[i].name) == 0;
    return found && strcmp(asked, name) != 0;
}
#endif

static const fa_kernels *find_kernels(int row, fa_dtype dtype)
{
    for (int i = row; i < ROWS_OF_TABLE; i++)
        if (instruction_sets[i].runs() && instruction_sets[i].kernels[dtype])
            return instruction_sets[i].kernels[dtype];
    return find_kernels(row, FA_F32);
}

/* The choice, by dtype; NULL until somebody asks or chooses. */
static const fa_kernels *chosen[FA_DTYPES];
static const char *chosen_name;

static void choose(int row)
{
    __atomic_store_n(&chosen_name, instruction_sets[row].name, __ATOMIC_RELEASE);
    for (int dtype = 0; dtype < FA_DTYPES; dtype++)
        __atomic_store_n(&chosen[dtype], find_kernels(row, (fa_dtype)dtype), __ATOMIC_RELEASE);
}

int fa_choose(const char *name)
{
    for (int i = 0; i < ROWS_OF_TABLE; i++) {
        if (strcmp(name, instruction_sets[i].name) == 0 && instruction_sets[i].runs()) {
            choose(i);
            return 1;
        }
    }
    return 0;
}

/* Any thread makes the same choice. */
static void choose_for_oneself(void)
{
    const char *name = getenv("FASTATTN_ISA");
    int row = 0;
    if (name && fa_choose(name))
        return;
    while (!instruction_sets[row].runs())
        row++;
    choose(row);
}

const fa_kernels *fa_kernels_for(fa_dtype dtype)
{
    const fa_kernels *kernels = __atomic_load_n(&chosen[dtype], __ATOMIC_ACQUIRE);
    if (!kernels) {
        choose_for_oneself();
        kernels = __atomic_load_n(&chosen[dtype], __ATOMIC_ACQUIRE);
    }
    return kernels;
}

const char *fa_chosen(void)
{
    if (!__atomic_load_n(&chosen_name, __ATOMIC_ACQUIRE))
        choose_for_oneself();
    return __atomic_load_n(&chosen_name, __ATOMIC_ACQUIRE);
}

int fa_runnable(fa_instruction_set *sets, int room)
{
    int n = 0;
    for (int i = 0; i < ROWS_OF_TABLE && n < room; i++) {
        if (!instruction_sets[i].runs())
            continue;
        sets[n].name = instruction_sets[i].name;
        for (int dtype = 0; dtype < FA_DTYPES; dtype++)
            sets[n].kernels[dtype] = find_kernels(i, (fa_dtype)dtype);
        n++;
    }
    return n;
}

/* Instructions that multiply 16-bit numbers. Kernels that use them are a row of the table, with the slot of their
 * dtype, that runs where these do; for avx512_fp16, fp16, fhm and bf16 there are none yet. */
static const struct {
    const char *name;
    int (*has)(void);
} features[] = {
#if defined(__x86_64__)
    {"amx_bf16", has_amx_bf16},
    {"avx512_bf16", has_avx512_bf16},
    {"avx512_fp16", has_avx512_fp16},
#elif defined(__aarch64__) && defined(__linux__)
    {"fp16", has_fp16},
    {"fhm", has_fhm},
    {"bf16", has_bf16},
#endif
    {NULL, NULL},
};

int fa_cpu_features(const char **names, int room)
{
    int n = 0;
    for (int i = 0; features[i].name && n < room; i++)
        if (features[i].has())
            names[n++] = features[i].name;
    return n;
}

/* Measured (docs/notebook, page 10): slower on Zen 4, faster on Zen 5. Zen 3 has Zen 4's family number; no other CPU
 * was measured.
 */
int fa_prefetching_helps(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("amdfam19h");
#else
    return 1;
#endif
}
