/* AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes. 6 x 4 sums, 4 vectors and a broadcast fill 29 of them. */
#include <immintrin.h>
#include <stddef.h>
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,popcnt"
TARGET_BEGIN(AVX512)

#define ISA avx512
#define VECTOR_BYTES 64
#define ROWS 6
#define VECS 4
#define DECODE_QUERIES 8
#define MANY_QUERIES 128
#define LEAST_ROWS 128
#define MOST_ROWS 768
#define WINDOW_ROWS 384
#define KEYS_A_ROW 4
#define GROUPS 1
#define WORTH_PACKING 256
#define PACK_ALIGNED 0
#define DENSE_ROWS 192
#define DENSE_COLUMNS 512
#define DECODE_ROWS 4
#define PLACE_ROWS 6
#define STEPS 4
#define CHUNK 64
#define TOKENS 3

#define HAS_LOAD_SOME
#define HAS_LOAD_FOURS
#define HAS_FMA
#define HAS_WIDEN_F16
#define HAS_WIDEN_BF16
#define HAS_WIDEN_I8
#define HAS_RECIPROCAL 1 /* each step doubles the digits of an estimate of 14 bits */
#define HAS_MAX
#define HAS_MIN
#define HAS_PICK_BITS
#define HAS_TRUE_BITS
#define HAS_ABOVE_BITS
#define HAS_TAKE_LANES
#define HAS_FLOOR
#define HAS_FRACTION   /* one instruction: x - floor(x); 0 for infinities */
#define HAS_SCALE_DOWN /* one instruction, which floors x itself */
#define EXP_REACHES_FAR 1
#define HAS_SCALE /* p * 2**floor(n), rounded once if the result is denormal */
#define HAS_EXP_BELOW (BITS == 32)
#define HAS_TOTAL
#define HAS_FOUR_TOTALS /* the same order of additions; shuffles without index vectors or overwritten operands */
#define HAS_TRANSPOSE   /* places quarters of rows as they are loaded; the remaining shuffles stay within quarters */

/* A quarter of a vector from each of rows r, r + step, r + 2 step and r + 3 step of `from`. */
#define row(r) (const float *)(from + (r) * from_stride)
#define QUARTERS(r, step)                                                                                  \
    _mm512_insertf32x4(_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(row(r))), \
                                                             _mm_loadu_ps(row(r + step)), 1),              \
                                          _mm_loadu_ps(row(r + 2 * step)), 2),                             \
                       _mm_loadu_ps(row(r + 3 * step)), 3)

#if BITS == 32
static ALWAYS_INLINE __m512 v_widen_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static ALWAYS_INLINE __m512 v_widen_bf16(const void *p)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
}
static ALWAYS_INLINE __m512 v_widen_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
static ALWAYS_INLINE __m512 v_load_some(const void *p, int n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
}
static ALWAYS_INLINE __m512 v_load_fours(const float *p)
{
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 8)), _mm_loadu_ps(p + 12), 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
static ALWAYS_INLINE __m512 v_fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static ALWAYS_INLINE __m512 v_reciprocal(__m512 x)
{
    const __m512 r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1)), r);
}
static ALWAYS_INLINE __m512 v_max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
static ALWAYS_INLINE __m512 v_min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
static ALWAYS_INLINE __m512 v_pick_bits(unsigned m, __m512 a, __m512 b)
{
    return _mm512_mask_blend_ps((__mmask16)m, b, a);
}
static ALWAYS_INLINE unsigned v_true_bits(__m512i where) { return _mm512_movepi32_mask(where); }
static ALWAYS_INLINE unsigned v_above_bits(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
static ALWAYS_INLINE __m512 v_take_lanes(__m512 v, __m512 from) { return _mm512_permutexvar_ps((__m512i)from, v); }
static ALWAYS_INLINE __m512 v_floor(__m512 x) { return _mm512_roundscale_ps(x, 9); }
static ALWAYS_INLINE __m512 v_fraction(__m512 x) { return _mm512_reduce_ps(x, 9); }
static ALWAYS_INLINE __m512 v_scale_down(__m512 p, __m512 x) { return _mm512_scalef_ps(p, x); }
/* e^x = 2**k * e^rest with k in sixteenths: the sixteen fractional powers fit in one register, and the rest is so small
 * that a short polynomial suffices.
 */
static ALWAYS_INLINE __m512 v_exp_below(__m512 x, const int far)
{
    (void)far;
    const __m512 powers = _mm512_setr_ps(
        1.0f, 1.0442737340927124f, 1.0905077457427979f, 1.1387885808944702f, 1.1892070770263672f, 1.2418577671051025f,
        1.2968395948410034f, 1.3542555570602417f, 1.4142135381698608f, 1.4768261909484863f, 1.5422108173370361f,
        1.610490322113037f, 1.6817928552627563f, 1.7562521696090698f, 1.8340080976486206f, 1.9152065515518188f);
    const __m512 magic = _mm512_set1_ps(0x1.8p19f); /* rounds to sixteenths: the low bits of the sum hold 16 k */
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-104), x);
    const __m512 sum = _mm512_fmadd_ps(y, _mm512_set1_ps(1.44269504f), magic), k = _mm512_sub_ps(sum, magic);
    const __m512 most = _mm512_fmadd_ps(k, _mm512_set1_ps(-0.693359375f), y);
    const __m512 rest = _mm512_fmadd_ps(k, _mm512_set1_ps(2.12194440e-4f), most);
    const __m512 q = _mm512_fmadd_ps(_mm512_set1_ps(0.16666719f), rest, _mm512_set1_ps(0.50001619f));
    const __m512 p = _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), q, rest); /* e^rest - 1, to 1.6e-9 */
    const __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(sum), powers);
    return _mm512_scalef_ps(_mm512_fmadd_ps(power, p, power), k); /* scalef floors k */
}
static ALWAYS_INLINE float v_total(__m512 v) { return _mm512_reduce_add_ps(v); }
#define HALVES(a, b) _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee))
static ALWAYS_INLINE void v_four_totals(float *to, __m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = HALVES(a, b), cd = HALVES(c, d);
    __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
    const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12)); /* of each quarter */
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}
#undef HALVES
static ALWAYS_INLINE void v_transpose(float *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride)
{
    for (int c = 0; c < 16; c += 4, from += 16, to += 4 * to_stride) {
        __m512 a = QUARTERS(0, 4), b = QUARTERS(1, 4), d = QUARTERS(2, 4), e = QUARTERS(3, 4);
        __m512d ab_low = (__m512d)_mm512_unpacklo_ps(a, b), ab_high = (__m512d)_mm512_unpackhi_ps(a, b);
        __m512d de_low = (__m512d)_mm512_unpacklo_ps(d, e), de_high = (__m512d)_mm512_unpackhi_ps(d, e);
        _mm512_storeu_pd(to, _mm512_unpacklo_pd(ab_low, de_low));
        _mm512_storeu_pd(to + to_stride, _mm512_unpackhi_pd(ab_low, de_low));
        _mm512_storeu_pd(to + 2 * to_stride, _mm512_unpacklo_pd(ab_high, de_high));
        _mm512_storeu_pd(to + 3 * to_stride, _mm512_unpackhi_pd(ab_high, de_high));
    }
}
#else
static ALWAYS_INLINE __m512d v_load_some(const void *p, int n)
{
    return _mm512_maskz_loadu_pd((__mmask8)((1 << n) - 1), p);
}
static ALWAYS_INLINE __m512d v_load_fours(const double *p)
{
    return _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p)), _mm256_loadu_pd(p + 4), 1);
}
static ALWAYS_INLINE __m512d v_fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
static ALWAYS_INLINE __m512d v_reciprocal(__m512d x)
{
    __m512d r = _mm512_rcp14_pd(x);
    r = _mm512_fmadd_pd(r, _mm512_fnmadd_pd(x, r, _mm512_set1_pd(1)), r);
    return _mm512_fmadd_pd(r, _mm512_fnmadd_pd(x, r, _mm512_set1_pd(1)), r);
}
static ALWAYS_INLINE __m512d v_max(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
static ALWAYS_INLINE __m512d v_min(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }
static ALWAYS_INLINE __m512d v_pick_bits(unsigned m, __m512d a, __m512d b)
{
    return _mm512_mask_blend_pd((__mmask8)m, b, a);
}
static ALWAYS_INLINE unsigned v_true_bits(__m512i where) { return _mm512_movepi64_mask(where); }
static ALWAYS_INLINE unsigned v_above_bits(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
static ALWAYS_INLINE __m512d v_take_lanes(__m512d v, __m512d from) { return _mm512_permutexvar_pd((__m512i)from, v); }
static ALWAYS_INLINE __m512d v_floor(__m512d x) { return _mm512_roundscale_pd(x, 9); }
static ALWAYS_INLINE __m512d v_fraction(__m512d x) { return _mm512_reduce_pd(x, 9); }
static ALWAYS_INLINE __m512d v_scale_down(__m512d p, __m512d x) { return _mm512_scalef_pd(p, x); }
static ALWAYS_INLINE __m512d v_scale(__m512d p, __m512d n) { return _mm512_scalef_pd(p, n); }
static ALWAYS_INLINE double v_total(__m512d v) { return _mm512_reduce_add_pd(v); }
#define HALVES(a, b) _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee))
static ALWAYS_INLINE void v_four_totals(double *to, __m512d a, __m512d b, __m512d c, __m512d d)
{
    const __m512d ab = HALVES(a, b), cd = HALVES(c, d);
    __m512d x = _mm512_add_pd(_mm512_shuffle_f64x2(ab, cd, 0x88), _mm512_shuffle_f64x2(ab, cd, 0xdd));
    x = _mm512_add_pd(x, _mm512_permute_pd(x, 0x55));
    const __m512i first = _mm512_castsi256_si512(_mm256_setr_epi64x(0, 2, 4, 6));
    _mm256_storeu_pd(to, _mm512_castpd512_pd256(_mm512_permutexvar_pd(first, x)));
}
#undef HALVES
static ALWAYS_INLINE void v_transpose(double *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride)
{
    for (int c = 0; c < 8; c += 2, from += 16, to += 2 * to_stride) {
        __m512d a = (__m512d)QUARTERS(0, 2), b = (__m512d)QUARTERS(1, 2);
        _mm512_storeu_pd(to, _mm512_unpacklo_pd(a, b));
        _mm512_storeu_pd(to + to_stride, _mm512_unpackhi_pd(a, b));
    }
}
#endif
#undef QUARTERS
#undef row
