/* Runs on every CPU of the target: vectors of 16 bytes (SSE2 on x86-64, NEON on AArch64, emulated elsewhere). */
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define ISA baseline
#define VECTOR_BYTES 16
#define ROWS 6
#if defined(__aarch64__) /* 32 registers */
#define VECS 4
#else
#define VECS 2
#endif
#define DECODE_QUERIES 8
#define MANY_QUERIES 128
#define LEAST_ROWS 128
#define MOST_ROWS 768
#define WINDOW_ROWS 384
#define KEYS_A_ROW 4
#define GROUPS 1
#define WORTH_PACKING 32
#define PACK_ALIGNED 1
#define DENSE_ROWS 96
#define DENSE_COLUMNS 256
#define DECODE_ROWS 2
#define PLACE_ROWS 2
#define STEPS 1
#define CHUNK 32
#define TOKENS 3

#if defined(__SSE2__)
#define HAS_MAX
#define HAS_MIN
#define HAS_WIDEN_BF16
#define HAS_WIDEN_I8
#if BITS == 32
static ALWAYS_INLINE __m128 v_widen_bf16(const void *p)
{
    return (__m128)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(p));
}
static ALWAYS_INLINE __m128 v_widen_i8(const void *p)
{
    int four;
    __builtin_memcpy(&four, p, 4);
    __m128i x = _mm_cvtsi32_si128(four);
    x = _mm_unpacklo_epi8(x, x);
    return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(x, x), 24)); /* the highest byte keeps its sign */
}
static ALWAYS_INLINE __m128 v_max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
static ALWAYS_INLINE __m128 v_min(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
#else
static ALWAYS_INLINE __m128d v_max(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
static ALWAYS_INLINE __m128d v_min(__m128d a, __m128d b) { return _mm_min_pd(a, b); }
#endif
#endif
