/* What one core can do at most: multiply-adds and sums of tanh in registers, reads and copies of a buffer.
 *
 * hardware.py compiles this file once for each instruction set and dtype, and defines
 *     REAL           float or double
 *     VECTOR_BYTES   16, 32 or 64
 *     CHAINS         independent accumulators: latency x FMA units of any core, within its registers
 *     RUNNABLE       an expression, true if this CPU has the instructions
 * What needs instructions that have no word in C stands where there are such, for float32.
 * There are no threads here: ctypes releases the GIL, so Python's threads do.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef REAL real_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t word_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t word_vector_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

enum { LANES = VECTOR_BYTES / sizeof(REAL), STEPS = 4096, READERS = 8 };

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process the use of tiles when asked (ARCH_REQ_XCOMP_PERM, of their data). */
static int gets_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif

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

/* The same with the instruction that multiplies two pairs of bfloat16 and adds both products to a float: every step
 * adds 2 * 0.5 to what starts at small integers, so that the sum is exact. */
#ifdef __AVX512BF16__
double multiply_pairs(int64_t blocks)
{
    const __m512bh halves = (__m512bh)_mm512_set1_epi32(0x3f003f00), ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) {
        __m512 acc[CHAINS];
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; c++)
            acc[c] = _mm512_set1_ps((float)(1 + c + block % 8));
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 32
            for (int c = 0; c < CHAINS; c++)
                acc[c] = _mm512_dpbf16_ps(acc[c], halves, ones);
        }
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; c++)
            total += _mm512_reduce_add_ps(acc[c]);
    }
    return total;
}
#endif

/* And with AMX, whose instruction does that for 16 rows of 32 numbers and 16 columns; each adds 16 to every sum. */
#ifdef __AMX_BF16__
double multiply_tiles(int64_t blocks)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    static _Alignas(64) uint32_t numbers[2][256];
    float sums[4][256];
    double total = 0;
    for (int i = 0; i < 8; i++)
        tiles.bytes[i] = 64, tiles.rows[i] = 16;
    for (int i = 0; i < 256; i++)
        numbers[0][i] = 0x3f003f00, numbers[1][i] = 0x3f803f80;
    __asm__ volatile("" : : "r"(&tiles) : "memory");
    _tile_loadconfig(&tiles);
    _tile_loadd(4, numbers[0], 64);
    _tile_loadd(5, numbers[1], 64);
    for (int64_t block = 0; block < blocks; block++) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < STEPS / 16; step++) {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        __asm__ volatile("" : : : "memory");
        for (int i = 0; i < 4; i++)
            total += sums[i][block % 256];
    }
    _tile_release();
    return total;
}
#endif

/* Additive scores add up w * tanh(a + b) over channels, which is sum(w) - 2 * sum(w / (1 + A * B)) with exponentials A
 * and B that are taken beforehand. Five instructions do a vector of those fractions: 1 + A * B, an estimate of its
 * reciprocal, Newton's step in two, and a multiply-add with the weight. Every accumulator adds STEPS of them up.
 * The caller checks the sum: all terms are weight / (1 + a * b), but the compiler must not know. */
#if defined(__AVX512F__)
#define RECIPROCAL_ESTIMATE _mm512_rcp14_ps
#elif defined(__AVX2__) && defined(__FMA__)
#define RECIPROCAL_ESTIMATE _mm256_rcp_ps
#endif

#ifdef RECIPROCAL_ESTIMATE
typedef float float_vector __attribute__((vector_size(VECTOR_BYTES)));

/* Steps do not wait for each other, so few accumulators suffice, and everything fits in 16 registers. */
enum { FLOATS = VECTOR_BYTES / sizeof(float), SUMS = 4 };

int fractions_per_block(void) { return STEPS * SUMS * FLOATS; }

double add_fractions(int64_t blocks, double a, double b, double weight)
{
    const float_vector one = 1 - (float_vector){0}, two = 2 - (float_vector){0};
    const float_vector weights = (float)weight - (float_vector){0};
    float_vector as = (float)a - (float_vector){0}, bs = (float)b - (float_vector){0};
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) {
        float_vector sums[SUMS] = {{0}};
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 32
            for (int s = 0; s < SUMS; s++) {
                __asm__ volatile("" : "+v"(bs)); /* for all the compiler knows, another key each time */
                const float_vector denominator = as * bs + one;
                const float_vector estimate = (float_vector)RECIPROCAL_ESTIMATE(denominator);
                const float_vector reciprocal = estimate * (two - denominator * estimate);
                sums[s] += reciprocal * weights;
            }
        }
        for (int s = 0; s < SUMS; s++)
            for (int lane = 0; lane < FLOATS; lane++)
                total += sums[s][lane];
    }
    return total;
}
#else
int fractions_per_block(void) { return 0; }
double add_fractions(int64_t blocks, double a, double b, double weight) { return blocks * weight / (1 + a * b); }
#endif

/* Sum of all 32-bit words, modulo 2^32, so that the order is free and the answer exact. The buffer need not be
 * aligned: NumPy's begin 16 bytes behind a line of the cache. `vectors` is a multiple of READERS. There are several
 * ways because none is the fastest on every machine and for every size:
 *     0   from the first to the last
 *     1   the same, and the lines AHEAD bytes further on are fetched
 *     2   READERS parts of the buffer side by side */
enum { WAYS_TO_READ = 3, AHEAD = 4096 };

int ways_to_read(void) { return WAYS_TO_READ; }

uint32_t read_words(const void *buffer, int64_t vectors, int64_t repeats, int way)
{
    const word_vector_anywhere *words = buffer;
    const int64_t part = vectors / READERS;
    word_vector sums[READERS] = {{0}};
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
        if (way == 0) {
            for (int64_t i = 0; i < vectors; i += READERS) {
#pragma GCC unroll 8
                for (int r = 0; r < READERS; r++)
                    sums[r] += words[i + r];
            }
        } else if (way == 1) {
            for (int64_t i = 0; i < vectors; i += READERS) {
#pragma GCC unroll 8
                for (int r = 0; r < READERS; r++) {
                    if (r * VECTOR_BYTES % 64 == 0)
                        __builtin_prefetch((const char *)(words + i + r) + AHEAD);
                    sums[r] += words[i + r];
                }
            }
        } else {
            for (int64_t i = 0; i < part; i++) {
#pragma GCC unroll 8
                for (int r = 0; r < READERS; r++)
                    sums[r] += words[r * part + i];
            }
        }
        __asm__ volatile("" ::: "memory"); /* the next pass reads again */
    }
    uint32_t total = 0;
    for (int r = 0; r < READERS; r++)
        for (size_t lane = 0; lane < VECTOR_BYTES / sizeof(uint32_t); lane++)
            total += sums[r][lane];
    return total;
}

/* The rows that the edges of a graph name, of two matrices whose rows have so many bytes (multiples of 4): what
 * attention along edges has to read. Those `ahead` edges further on are fetched. */
uint32_t read_edges(const char *a, int64_t a_row, const char *b, int64_t b_row, const int32_t *indices, int64_t edges,
                    int64_t repeats, int64_t ahead)
{
    const char *matrices[2] = {a, b};
    const int64_t rows[2] = {a_row, b_row};
    word_vector sums[4] = {{0}};
    uint32_t rest = 0;
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
        for (int64_t e = 0; e < edges; e++) {
            for (int m = 0; m < 2; m++) {
                const char *row = matrices[m] + indices[e] * rows[m];
                if (e + ahead < edges) {
                    const char *next = matrices[m] + indices[e + ahead] * rows[m];
                    for (int64_t i = 0; i < rows[m]; i += 64)
                        __builtin_prefetch(next + i);
                }
                int64_t i = 0;
                for (; i + 4 * VECTOR_BYTES <= rows[m]; i += 4 * VECTOR_BYTES) {
#pragma GCC unroll 4
                    for (int s = 0; s < 4; s++)
                        sums[s] += *(const word_vector_anywhere *)(row + i + s * VECTOR_BYTES);
                }
                for (; i + VECTOR_BYTES <= rows[m]; i += VECTOR_BYTES)
                    sums[0] += *(const word_vector_anywhere *)(row + i);
                for (; i < rows[m]; i += 4)
                    rest += *(const uint32_t *)(row + i);
            }
        }
        __asm__ volatile("" ::: "memory");
    }
    for (int s = 0; s < 4; s++)
        for (size_t lane = 0; lane < VECTOR_BYTES / sizeof(uint32_t); lane++)
            rest += sums[s][lane];
    return rest;
}

void copy_bytes(void *target, const void *source, int64_t bytes, int64_t repeats)
{
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
        memcpy(target, source, (size_t)bytes);
        __asm__ volatile("" ::: "memory");
    }
}
