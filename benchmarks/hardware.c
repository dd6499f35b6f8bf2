/* What one core can do at most: fused multiply-adds in registers, reads and copies of a buffer.
 *
 * hardware.py compiles this file once for each instruction set and dtype, and defines
 *     REAL           float or double
 *     VECTOR_BYTES   16, 32 or 64
 *     CHAINS         independent accumulators: latency x FMA units of any core, within its registers
 *     RUNNABLE       an expression, true if this CPU has the instructions
 * There are no threads here: ctypes releases the GIL, so Python's threads do.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef REAL real_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t word_vector __attribute__((vector_size(VECTOR_BYTES)));

enum { LANES = VECTOR_BYTES / sizeof(REAL), STEPS = 4096, READERS = 8 };

int runnable(void) { return RUNNABLE; }
int lanes(void) { return LANES; }
int chains(void) { return CHAINS; }
int steps(void) { return STEPS; }

/* Every accumulator does STEPS times acc = acc * factor + addend, from a start that depends on the block, and
 * the sum of all of them is returned. Starts differ between chains and blocks, or the compiler would compute equal
 * ones once; the caller checks the sum.
 * The vectors never become denormal, infinite or constant, which would flatter or spoil the speed. */
double multiply_add(int64_t blocks, double factor, double addend)
{
    const real_vector factors = (REAL)factor - (real_vector){0};
    const real_vector addends = (REAL)addend - (real_vector){0};
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) {
        real_vector acc[CHAINS];
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; c++)
            acc[c] = (REAL)(1 + c + block % 8) - (real_vector){0};
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 32
            for (int c = 0; c < CHAINS; c++)
                acc[c] = acc[c] * factors + addends;
        }
        real_vector sum = {0};
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; c++)
            sum += acc[c];
        for (int lane = 0; lane < LANES; lane++)
            total += sum[lane];
    }
    return total;
}

/* Sum of all 32-bit words, modulo 2^32, so that the order is free and the answer exact. `vectors` is a multiple
 * of READERS. */
uint32_t read_words(const void *buffer, int64_t vectors, int64_t repeats)
{
    const word_vector *words = buffer;
    word_vector sums[READERS] = {{0}};
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
        for (int64_t i = 0; i < vectors; i += READERS) {
#pragma GCC unroll 8
            for (int r = 0; r < READERS; r++)
                sums[r] += words[i + r];
        }
        __asm__ volatile("" ::: "memory"); /* the next pass reads again */
    }
    uint32_t total = 0;
    for (int r = 0; r < READERS; r++)
        for (size_t lane = 0; lane < VECTOR_BYTES / sizeof(uint32_t); lane++)
            total += sums[r][lane];
    return total;
}

void copy_bytes(void *target, const void *source, int64_t bytes, int64_t repeats)
{
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
        memcpy(target, source, (size_t)bytes);
        __asm__ volatile("" ::: "memory");
    }
}
