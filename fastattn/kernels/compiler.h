/* What GCC and clang spell differently, and nothing else. */
#ifndef FASTATTN_COMPILER_H
#define FASTATTN_COMPILER_H

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

/* Functions between these two may use an instruction set that the compiler flags do not enable. */
#ifdef __clang__
#define TARGET_BEGIN(names) _Pragma(STRING(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(names) _Pragma("GCC push_options") _Pragma(STRING(GCC target(names)))
#define TARGET_END _Pragma("GCC pop_options")
#endif

/* Whether the compiler knows AVX512-BF16. */
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define COMPILES_AVX512_BF16 1
#else
#define COMPILES_AVX512_BF16 0
#endif

/* And AMX, with an operating system that gives leave to use its tiles (select.c). */
#if COMPILES_AVX512_BF16 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define COMPILES_AMX 1
#define AMX ",amx-tile,amx-bf16"
#else
#define COMPILES_AMX 0
#define AMX ""
#endif

/* What stands between these two is optimised less than the rest (setup.py: -O3), where that costs nothing: "O2", or
 * "Os" for size. clang cannot say so within a file. No result may depend on it. */
#if !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__) && !defined(__SANITIZE_ADDRESS__)
#define LESS_BEGIN(level) _Pragma("GCC push_options") _Pragma(STRING(GCC optimize(level)))
#define LESS_END _Pragma("GCC pop_options")
#else
#define LESS_BEGIN(level)
#define LESS_END
#endif

/* Makes the compiler reload what it has read through this pointer. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

/* The same, and the compiler may not move reads across it. */
#define IN_ORDER(pointer) __asm__ volatile("" : "+r"(pointer) : : "memory")

/* Makes the compiler keep a vector in a register rather than reload it for each use. */
#if defined(__x86_64__)
#define HOLD(vector) __asm__("" : "+v"(vector))
#elif defined(__aarch64__)
#define HOLD(vector) __asm__("" : "+w"(vector))
#else
#define HOLD(vector) (void)0
#endif

/* Unroll the next loop fully: its bounds are constants after inlining, and unrolled its arrays stay in registers. */
#ifdef __clang__
#define UNROLL(n) _Pragma("clang loop unroll(full)")
#define NOT_UNROLLED _Pragma("clang loop unroll(disable)")
#else
#define UNROLL(n) _Pragma(STRING(GCC unroll n))
#define NOT_UNROLLED _Pragma("GCC unroll 1")
#endif

/* SHUFFLE picks lanes of a and b by index. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Swaps lanes i and i ^ step. */
#define SWAP_LANES(n, step, v) CONCAT(CONCAT(SWAP_, n), CONCAT(_, step))(v)
#define SWAP_2_1(v) SHUFFLE(v, v, 1, 0)
#define SWAP_4_1(v) SHUFFLE(v, v, 1, 0, 3, 2)
#define SWAP_4_2(v) SHUFFLE(v, v, 2, 3, 0, 1)
#define SWAP_8_1(v) SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#define SWAP_8_2(v) SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_8_4(v) SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
#define SWAP_16_1(v) SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define SWAP_16_2(v) SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_16_4(v) SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_16_8(v) SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)

#define INTERLEAVE_LOW(n, a, b) CONCAT(INTERLEAVE_LOW_, n)(a, b)
#define INTERLEAVE_HIGH(n, a, b) CONCAT(INTERLEAVE_HIGH_, n)(a, b)
#define INTERLEAVE_LOW_2(a, b) SHUFFLE(a, b, 0, 2)
#define INTERLEAVE_HIGH_2(a, b) SHUFFLE(a, b, 1, 3)
#define INTERLEAVE_LOW_4(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define INTERLEAVE_HIGH_4(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define INTERLEAVE_LOW_8(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define INTERLEAVE_HIGH_8(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define INTERLEAVE_LOW_16(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH_16(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#endif
