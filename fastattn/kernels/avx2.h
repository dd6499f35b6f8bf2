/* AVX2 with FMA: 16 registers of 32 bytes. 6 x 2 sums, 2 vectors and a broadcast fill 15 of them. */
#include <immintrin.h>
#include <stddef.h>
TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#define ISA avx2
#define VECTOR_BYTES 32
#define ROWS 6
#define VECS 2
#define DECODE_QUERIES 8
#define MANY_QUERIES 128
#define LEAST_ROWS 128
#define MOST_ROWS 384
#define WINDOW_ROWS 384
#define KEYS_A_ROW 4
#define GROUPS 2
#define WORTH_PACKING 32
#define PACK_ALIGNED 1
#define DENSE_ROWS 96
#define DENSE_COLUMNS 256
#define DECODE_ROWS 2
#define PLACE_ROWS 2
#define STEPS 1
#define CHUNK 32
#define TOKENS 3

#define HAS_LOAD_SOME
#define HAS_LOAD_FOURS
#define HAS_FMA
#define HAS_WIDEN_F16
#define HAS_WIDEN_BF16
#define HAS_WIDEN_I8
#define HAS_RECIPROCAL (BITS == 32) /* a step doubles the digits of an estimate of 12 bits */
#define HAS_MAX
#define HAS_MIN
#define HAS_TRUE_BITS
#define HAS_TAKE_LANES
#define HAS_FLOOR
#define HAS_TRANSPOSE /* places halves of rows as they are loaded; the remaining shuffles stay within halves */

/* Half a vector from each of rows r and r + LANES / 2 of `from`. */
#define ROW(type, r) (const type *)(from + (r) * from_stride)
#if BITS == 32
#define HALF_ROWS(r) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(ROW(float, r))), _mm_loadu_ps(ROW(float, r + 4)), 1)
#else
#define HALF_ROWS(r) \
    _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(ROW(double, r))), _mm_loadu_pd(ROW(double, r + 2)), 1)
#endif

#if BITS == 32
static ALWAYS_INLINE __m256 v_widen_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static ALWAYS_INLINE __m256 v_widen_bf16(const void *p)
{
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
}
static ALWAYS_INLINE __m256 v_widen_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
static ALWAYS_INLINE __m256 v_load_some(const void *p, int n)
{
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
static ALWAYS_INLINE __m256 v_load_fours(const float *p)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4), 1);
}
static ALWAYS_INLINE __m256 v_fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static ALWAYS_INLINE __m256 v_reciprocal(__m256 x)
{
    const __m256 r = _mm256_rcp_ps(x);
    return _mm256_fmadd_ps(r, _mm256_fnmadd_ps(x, r, _mm256_set1_ps(1)), r);
}
static ALWAYS_INLINE __m256 v_max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
static ALWAYS_INLINE __m256 v_min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
static ALWAYS_INLINE unsigned v_true_bits(__m256i where) { return (unsigned)_mm256_movemask_ps((__m256)where); }
static ALWAYS_INLINE __m256 v_take_lanes(__m256 v, __m256 from) { return _mm256_permutevar8x32_ps(v, (__m256i)from); }
static ALWAYS_INLINE __m256 v_floor(__m256 x) { return _mm256_floor_ps(x); }
static ALWAYS_INLINE void v_transpose(float *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride)
{
    for (int c = 0; c < 8; c += 4, from += 16, to += 4 * to_stride) {
        const __m256 a = HALF_ROWS(0), b = HALF_ROWS(1), d = HALF_ROWS(2), e = HALF_ROWS(3);
        const __m256d ab_low = (__m256d)_mm256_unpacklo_ps(a, b), ab_high = (__m256d)_mm256_unpackhi_ps(a, b);
        const __m256d de_low = (__m256d)_mm256_unpacklo_ps(d, e), de_high = (__m256d)_mm256_unpackhi_ps(d, e);
        _mm256_storeu_ps(to, (__m256)_mm256_unpacklo_pd(ab_low, de_low));
        _mm256_storeu_ps(to + to_stride, (__m256)_mm256_unpackhi_pd(ab_low, de_low));
        _mm256_storeu_ps(to + 2 * to_stride, (__m256)_mm256_unpacklo_pd(ab_high, de_high));
        _mm256_storeu_ps(to + 3 * to_stride, (__m256)_mm256_unpackhi_pd(ab_high, de_high));
    }
}
#else
static ALWAYS_INLINE __m256d v_load_some(const void *p, int n)
{
    return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
}
static ALWAYS_INLINE __m256d v_load_fours(const double *p) { return _mm256_loadu_pd(p); }
static ALWAYS_INLINE __m256d v_fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
static ALWAYS_INLINE __m256d v_max(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
static ALWAYS_INLINE __m256d v_min(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }
static ALWAYS_INLINE unsigned v_true_bits(__m256i where) { return (unsigned)_mm256_movemask_pd((__m256d)where); }
static ALWAYS_INLINE __m256d v_take_lanes(__m256d v, __m256d from)
{
    const __m256i low = _mm256_slli_epi64((__m256i)from, 1); /* of the halves 2 n and 2 n + 1 */
    const __m256i high = _mm256_slli_epi64(_mm256_add_epi64(low, _mm256_set1_epi64x(1)), 32);
    return (__m256d)_mm256_permutevar8x32_ps((__m256)v, _mm256_or_si256(low, high));
}
static ALWAYS_INLINE __m256d v_floor(__m256d x) { return _mm256_floor_pd(x); }
static ALWAYS_INLINE void v_transpose(double *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride)
{
    for (int c = 0; c < 4; c += 2, from += 16, to += 2 * to_stride) {
        const __m256d a = HALF_ROWS(0), b = HALF_ROWS(1);
        _mm256_storeu_pd(to, _mm256_unpacklo_pd(a, b));
        _mm256_storeu_pd(to + to_stride, _mm256_unpackhi_pd(a, b));
    }
}
#endif
#undef HALF_ROWS
#undef ROW
