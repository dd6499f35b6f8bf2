/* NEON, part of every AArch64 CPU: 32 registers of 16 bytes. 6 x 4 sums, 4 vectors and a number fill 29 of them. */
#include <arm_neon.h>

#define ISA neon
#define VECTOR_BYTES 16
#define ROWS 6
#define VECS 4
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
#define PLACE_ROWS 6
#define STEPS 1
#define CHUNK 32
#define TOKENS 3

#define HAS_LOAD_SOME
#define HAS_FMA
#define HAS_MULTIPLIER /* multiplies by one lane: broadcasting would take a place among the multiplications */
#define HAS_WIDEN_F16
#define HAS_WIDEN_BF16
#define HAS_WIDEN_I8
#define HAS_TRUE_BITS
#define HAS_TAKE_LANES
#define HAS_FLOOR
#define HAS_TOTAL
#define HAS_FOUR_TOTALS
/* Totals add in the order of vector.inc.h, which softmax of other axes follows: halves first, then neighbours. */
/* The maximum and the minimum of vector.inc.h compare and select: FMAX and FMAXNM treat NaN and -0 otherwise. */

#if BITS == 32
typedef float multiplier;
static ALWAYS_INLINE float32x4_t v_load_some(const void *p, int n)
{
    const float *x = p;
    float32x4_t v = vdupq_n_f32(0);
    if (n >= 2)
        v = vcombine_f32(vld1_f32(x), vdup_n_f32(0));
    if (n == 1)
        v = vld1q_lane_f32(x, v, 0);
    else if (n == 3)
        v = vld1q_lane_f32(x + 2, v, 2);
    return v;
}
static ALWAYS_INLINE float32x4_t v_fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
static ALWAYS_INLINE float32x4_t v_fma_multiplier(float a, float32x4_t b, float32x4_t c)
{
    return vfmaq_n_f32(c, b, a);
}
static ALWAYS_INLINE float32x4_t v_widen_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static ALWAYS_INLINE float32x4_t v_widen_bf16(const void *p) { return (float32x4_t)vshll_n_u16(vld1_u16(p), 16); }
static ALWAYS_INLINE float32x4_t v_widen_i8(const void *p)
{
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const int16x8_t x = vmovl_s8(vcreate_s8((uint64_t)(uint32_t)four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
}
static ALWAYS_INLINE unsigned v_true_bits(int32x4_t where)
{
    static const uint32_t lane_bit[] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32((uint32x4_t)where, vld1q_u32(lane_bit)));
}
static ALWAYS_INLINE float32x4_t v_take_lanes(float32x4_t v, float32x4_t from)
{
    /* The four bytes of a lane follow each other. */
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), (uint32x4_t)from, 0x04040404);
    return (float32x4_t)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)bytes);
}
static ALWAYS_INLINE float32x4_t v_floor(float32x4_t x) { return vrndmq_f32(x); }
static ALWAYS_INLINE float v_total(float32x4_t v) { return vaddv_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v))); }
static ALWAYS_INLINE void v_four_totals(float *to, float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d)
{
    const float32x4_t ab =
        vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    const float32x4_t cd =
        vaddq_f32(vcombine_f32(vget_low_f32(c), vget_low_f32(d)), vcombine_f32(vget_high_f32(c), vget_high_f32(d)));
    vst1q_f32(to, vpaddq_f32(ab, cd));
}
#else
typedef double multiplier;
static ALWAYS_INLINE float64x2_t v_load_some(const void *p, int n)
{
    return n ? vcombine_f64(vld1_f64(p), vdup_n_f64(0)) : vdupq_n_f64(0);
}
static ALWAYS_INLINE float64x2_t v_fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
static ALWAYS_INLINE float64x2_t v_fma_multiplier(double a, float64x2_t b, float64x2_t c)
{
    return vfmaq_n_f64(c, b, a);
}
static ALWAYS_INLINE unsigned v_true_bits(int64x2_t where)
{
    const uint64x2_t bits = vandq_u64((uint64x2_t)where, (uint64x2_t){1, 2});
    return (unsigned)vaddvq_u64(bits);
}
static ALWAYS_INLINE float64x2_t v_take_lanes(float64x2_t v, float64x2_t from)
{
    const uint64x2_t odd = vtstq_u64((uint64x2_t)from, vdupq_n_u64(1));
    return vbslq_f64(odd, vdupq_laneq_f64(v, 1), vdupq_laneq_f64(v, 0));
}
static ALWAYS_INLINE float64x2_t v_floor(float64x2_t x) { return vrndmq_f64(x); }
static ALWAYS_INLINE double v_total(float64x2_t v) { return vaddvq_f64(v); }
static ALWAYS_INLINE void v_four_totals(double *to, float64x2_t a, float64x2_t b, float64x2_t c, float64x2_t d)
{
    vst1q_f64(to, vpaddq_f64(a, b));
    vst1q_f64(to + 2, vpaddq_f64(c, d));
}
#endif

/* A number in a register of its own, which the compiler may not load into all lanes instead. */
static ALWAYS_INLINE multiplier v_multiplier(const multiplier *p)
{
    multiplier x = *p;
    HOLD(x);
    return x;
}
/* The compiler may not load what follows at this pointer before it has this vector: all multipliers of a step at once
 * would not fit in the registers. */
#define LOAD_AFTER(vector, pointer) __asm__("" : "+r"(pointer) : "w"(vector))
