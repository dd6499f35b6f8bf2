/* The vector operations of all kernels, on LANES numbers of type real.
 *
 * Expects REAL, BITS (of REAL) and VECTOR_BYTES. Everything uses the vector extensions that GCC and clang share, so it
 * compiles for any target. An instruction set with a faster v_<word> defines it, and HAS_<WORD>, before this file is
 * included.
 */
#if VECTOR_BYTES * 8 / BITS == 16 /* a literal, because it is pasted into names */
#define LANES 16
#elif VECTOR_BYTES * 8 / BITS == 8
#define LANES 8
#elif VECTOR_BYTES * 8 / BITS == 4
#define LANES 4
#else
#define LANES 2
#endif

typedef REAL real;
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL uvec __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
#if BITS == 32
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t wrapping_ivec __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t wrapping_ivec __attribute__((vector_size(VECTOR_BYTES)));
#endif

static ALWAYS_INLINE vec v_load(const void *p) { return *(const uvec *)p; }
static ALWAYS_INLINE void v_store(void *p, vec v) { *(uvec *)p = v; }
static ALWAYS_INLINE vec v_fill(real x) { return x - (vec){0}; }
/* A vector that was just stored four numbers at a time: a load of all of them would wait until they reach the cache. */
#ifndef HAS_LOAD_FOURS
static ALWAYS_INLINE vec v_load_fours(const real *p) { return v_load(p); }
#endif
/* n < LANES numbers, then zeros; bytes after them are not read. */
#ifndef HAS_LOAD_SOME
static ALWAYS_INLINE vec v_load_some(const void *p, int n)
{
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}
#endif
/* Contracted to one instruction if the target has it (-ffp-contract=fast). */
#ifndef HAS_FMA
static ALWAYS_INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }
#endif
/* A number that multiplies several vectors. */
#ifndef HAS_MULTIPLIER
typedef vec multiplier;
static ALWAYS_INLINE multiplier v_multiplier(const real *p) { return v_fill(*p); }
static ALWAYS_INLINE vec v_fma_multiplier(multiplier a, vec b, vec c) { return v_fma(a, b, c); }
#define LOAD_AFTER(vector, pointer) (void)0 /* whether the compiler may load them all at once */
#endif
static ALWAYS_INLINE vec v_pick(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

static ALWAYS_INLINE vec v_lane_numbers(void)
{
    vec v;
    for (int i = 0; i < LANES; i++)
        v[i] = (real)i;
    return v;
}

#if BITS == 32
/* LANES numbers of a smaller dtype. */
typedef uint16_t hvec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t uhvec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(1), may_alias));
static ALWAYS_INLINE ivec v_halves(const void *p) { return __builtin_convertvector((hvec) * (const uhvec *)p, ivec); }

#ifndef HAS_WIDEN_I8
typedef int8_t bvec __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef int8_t ubvec __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
static ALWAYS_INLINE vec v_widen_i8(const void *p)
{
    return __builtin_convertvector(__builtin_convertvector((bvec) * (const ubvec *)p, ivec), vec);
}
#endif

#ifndef HAS_WIDEN_BF16
static ALWAYS_INLINE vec v_widen_bf16(const void *p) { return (vec)(v_halves(p) << 16); }
#endif

/* Shifts exponent and mantissa into place; multiplying by 2**112 corrects the bias and normalises denormals. */
#ifndef HAS_WIDEN_F16
static ALWAYS_INLINE vec v_widen_f16(const void *p)
{
    const ivec h = v_halves(p), rest = (h & 0x7fff) << 13, large = (h & 0x7c00) == 0x7c00;
    const ivec finite = (ivec)((vec)rest * 0x1p112f);
    return (vec)((large & (rest | 0x7f800000)) | (~large & finite) | (h & 0x8000) << 16);
}
#endif
#endif

#ifndef HAS_SQRT
static ALWAYS_INLINE vec v_sqrt(vec x)
{
    for (int i = 0; i < LANES; i++)
        x[i] = BITS == 32 ? (real)__builtin_sqrtf((float)x[i]) : (real)__builtin_sqrt((double)x[i]);
    return x;
}
#endif

/* 1 / x for x from 1 to 2**126 (2**1022 in double), to within 2 eps; NaN stays NaN. */
#if !HAS_RECIPROCAL
static ALWAYS_INLINE vec v_reciprocal(vec x) { return 1 / x; }
#endif

/* The larger number; if either is NaN, the second. */
#ifndef HAS_MAX
static ALWAYS_INLINE vec v_max(vec a, vec b) { return v_pick(a > b, a, b); }
#endif

/* The smaller number; if either is NaN, the second. */
#ifndef HAS_MIN
static ALWAYS_INLINE vec v_min(vec a, vec b) { return v_pick(a < b, a, b); }
#endif

/* Lane i of a if bit i is set, else of b. */
#ifndef HAS_PICK_BITS
static ALWAYS_INLINE vec v_pick_bits(unsigned bits, vec a, vec b)
{
    ivec lane_bit;
    for (int i = 0; i < LANES; i++)
        lane_bit[i] = 1 << i;
    return v_pick(((((ivec){0} + (int)bits) & lane_bit) != 0), a, b);
}
#endif

/* Bit i is set if lane i is true (all ones). */
#ifndef HAS_TRUE_BITS
static ALWAYS_INLINE unsigned v_true_bits(ivec where)
{
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (unsigned)(where[i] & 1) << i;
    return bits;
}
#endif

/* Bit i set where lane i of a is greater than that of b, or either is NaN. */
#ifndef HAS_ABOVE_BITS
static ALWAYS_INLINE unsigned v_above_bits(vec a, vec b) { return v_true_bits(~(a <= b)); }
#endif

/* Lane i is that lane of v whose number is in the bits of lane i of `from`. */
#ifndef HAS_TAKE_LANES
static ALWAYS_INLINE vec v_take_lanes(vec v, vec from)
{
    const ivec number = (ivec)from;
    vec taken;
    for (int i = 0; i < LANES; i++)
        taken[i] = v[number[i]];
    return taken;
}
#endif

static ALWAYS_INLINE vec v_abs(vec x) { return (vec)((ivec)x & ~((ivec)(-(vec){0}))); }

#ifndef HAS_FLOOR
/* For |x| < 2**(mantissa bits - 1), which suffices for exp2: adding 1.5 * 2**(mantissa bits) rounds to nearest. */
static ALWAYS_INLINE vec v_floor(vec x)
{
    const vec magic = v_fill(BITS == 32 ? (real)12582912.0 : (real)6755399441055744.0);
    vec nearest = (x + magic) - magic;
    return nearest - v_pick(nearest > x, v_fill(1), (vec){0});
}
#endif

/* 2**n for integral n in the normal range; arbitrary otherwise. */
static ALWAYS_INLINE vec v_power_of_two(vec n)
{
    const int mantissa_bits = BITS == 32 ? 23 : 52;
    const vec magic = v_fill(BITS == 32 ? (real)12582912.0 : (real)6755399441055744.0);
    return (vec)((wrapping_ivec)v_fill(1) + ((wrapping_ivec)(n + magic) << mantissa_bits));
}

/* x - floor(x); arbitrary for infinities. */
#ifndef HAS_FRACTION
static ALWAYS_INLINE vec v_fraction(vec x) { return x - v_floor(x); }
#endif

/* p * 2**floor(x) for x <= 0; 0 if 2**floor(x) is below the normal range, whatever p is. NaN stays NaN. */
#ifndef HAS_SCALE_DOWN
static ALWAYS_INLINE vec v_scale_down(vec p, vec x)
{
    const ivec tiny = x < (BITS == 32 ? (real)-126 : (real)-1022);
    return (vec)(~tiny & (ivec)(p * v_power_of_two(v_floor(x))));
}
#endif

/* 2**x for x <= 0 (x may be -inf: 0). Splits x into floor and fraction; 2**fraction is a minimax polynomial with
 * constant term exactly 1, so that 2**0 == 1. Relative error: 8.2e-8 in float, 3.2e-18 in double, plus rounding. */
static ALWAYS_INLINE vec v_exp2(vec x)
{
#if BITS == 32
    static const real c[] = {0.693151311875379983f, 0.24016444957351056f, 0.0557999146725179008f,
                             0.00901702859762101824f, 0.00186713073845431258f};
#else
    static const real c[] = {0.693147180559945928,   0.240226506959063302,   0.0555041086656022575,
                             0.00961812909955074985, 0.00133335586295693633, 0.000154035123095414898,
                             1.52531750573639695e-5, 1.3208367265634951e-6,  1.02532126199156024e-7,
                             6.55952851070143074e-9, 6.26346767397140156e-10};
#endif
    const int n = sizeof(c) / sizeof(c[0]);
    vec f = v_fraction(x);
    vec p = v_fill(c[n - 1]);
    for (int i = n - 2; i >= 0; i--)
        p = v_fma(p, f, v_fill(c[i]));
    p = v_fma(p, f, v_fill(1));
    return v_scale_down(p, x);
}

/* 2**f - 1 for |f| <= 1/2, with a relative error of 1 eps, also near 0. */
static ALWAYS_INLINE vec v_exp2_less_1(vec f)
{
#if BITS == 32
    static const real c[] = {0.693147188026228781f,   0.240226507605681269f,   0.0555035711421907782f,
                             0.00961808255727785149f, 0.00133908633646712344f, 0.000154531629451206902f};
#else
    static const real c[] = {0.693147180559945309,   0.240226506959100982,   0.0555041086648215943,
                             0.00961812910760688853, 0.00133335581464169353, 0.000154035304417360502,
                             1.52527338298361184e-5, 1.32154425879216897e-6, 1.01780624458457735e-7,
                             7.0725859492692237e-9,  4.45496059818651839e-10};
#endif
    const int n = sizeof(c) / sizeof(c[0]);
    vec p = v_fill(c[n - 1]);
    for (int i = n - 2; i >= 0; i--)
        p = v_fma(p, f, v_fill(c[i]));
    return p * f;
}

/* exp(x) if that is a normal number; arbitrary otherwise. log 2 is split in two parts: the product of the first with an
 * integer is exact, so the error does not grow with x. */
static ALWAYS_INLINE vec v_exp(vec x)
{
    const real log2e = (real)1.44269504088896340736;
    const real upper = BITS == 32 ? (real)0.693359375 : (real)6.93147180369123816490e-01;
    const real lower = BITS == 32 ? (real)-2.12194440e-4 : (real)1.90821492927058770002e-10;
    const vec whole = v_floor(x * log2e + (real)0.5);
    const vec rest = (x - whole * upper) - whole * lower;
    const vec power = v_power_of_two(whole);
    return v_fma(power, v_exp2_less_1(rest * log2e), power);
}

/* exp(x) for x <= 0 to within 1 eps; NaN stays NaN. The nearest multiple of log 2 is subtracted in two parts, so the
 * error does not grow with x as that of exp2(x * log2 e) does; e^rest is 1 + rest + rest**2 * a minimax polynomial,
 * whose relative error is 3.1e-9 in float, 3.6e-18 in double. far: results may be denormal, or 0 (x = -inf); it does
 * not change the bits of the others. */
static const real LOG_OF_NORMAL = BITS == 32 ? -87 : -708; /* e to this power is a normal number */
#ifndef EXP_REACHES_FAR
#define EXP_REACHES_FAR 0 /* whether `far` makes no difference */
#endif
#if !HAS_EXP_BELOW
static ALWAYS_INLINE vec v_exp_below(vec x, const int far)
{
#if BITS == 32
    static const real c[] = {0.4999999343212929024f, 0.1666652039904253007f, 0.04166839078354791314f,
                             0.008368745108942590651f, 0.001381454017680130635f};
    const real upper = 0.693359375f, lower = -2.12194440e-4f, magic = 12582912.0f, least = -104, step = 64;
#else
    static const real c[] = {0.5000000000000010669,   0.1666666666666641151,   0.04166666666652972822,
                             0.008333333333494977261, 0.001388888894375996539, 0.000198412695057737751,
                             2.480149294963386917e-5, 2.755758680389532448e-6, 2.763030625029360005e-7,
                             2.500001883318737318e-8};
    const real upper = 6.93147180369123816490e-01, lower = 1.90821492927058770002e-10, magic = 6755399441055744.0,
               least = -746, step = 128;
#endif
    const int n = sizeof(c) / sizeof(c[0]), mantissa_bits = BITS == 32 ? 23 : 52;
    const real log2e = (real)1.44269504088896340736;
    const vec y = v_pick((ivec){0} - far, v_max(v_fill(least), x), x);
    const vec nearest = v_fma(y, v_fill(log2e), v_fill(magic)), whole = nearest - magic;
    const vec rest = v_fma(whole, v_fill(-lower), v_fma(whole, v_fill(-upper), y));
    vec p = v_fill(c[n - 1]);
    for (int i = n - 2; i >= 0; i--)
        p = v_fma(p, rest, v_fill(c[i]));
    p = v_fma(v_fma(p, rest, v_fill(1)), rest, v_fill(1));
#ifdef HAS_SCALE
    (void)mantissa_bits, (void)step;
    return v_scale(p, whole);
#else
    if (far) { /* in two steps, of which only the last rounds; zeros are fast, underflow might not be */
        p = (vec)((ivec)p & ~(x < least));
        return p * v_power_of_two(whole + step) * v_power_of_two(v_fill(-step));
    }
    return p * (vec)((ivec)v_fill(1) + ((ivec)nearest << mantissa_bits));
#endif
}
#endif

/* tanh(x) with a relative error of a few eps, also near 0: with e = 2**(-2|x| log2 e) - 1, tanh|x| = -e / (2 + e). Here
 * e = 2**n * (2**f - 1) + (2**n - 1) with n the nearest integer, so a small x has n = 0 and loses no digits. */
static ALWAYS_INLINE vec v_tanh(vec x)
{
    const real least = BITS == 32 ? -40 : -100;
    vec size = v_abs(x);
    vec y = v_max(v_fill(least), size * (real)-2.88539008177792681472);
    vec whole = v_floor(y + (real)0.5);
    vec power = v_power_of_two(whole);
    vec e = v_fma(power, v_exp2_less_1(y - whole), power - 1);
    vec t = -e / (2 + e);
    return (vec)((ivec)t | ((ivec)x & (ivec)(-(vec){0})));
}

/* The maximum of the lanes, in every lane. */
static ALWAYS_INLINE vec v_spread_max(vec v)
{
#if LANES > 8
    v = v_max(v, SWAP_LANES(LANES, 8, v));
#endif
#if LANES > 4
    v = v_max(v, SWAP_LANES(LANES, 4, v));
#endif
#if LANES > 2
    v = v_max(v, SWAP_LANES(LANES, 2, v));
#endif
    v = v_max(v, SWAP_LANES(LANES, 1, v));
    return v;
}

/* The sum of the lanes, always in the same order. */
#ifndef HAS_TOTAL
static ALWAYS_INLINE real v_total(vec v)
{
    real a[LANES];
    v_store(a, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            a[i] += a[i + half];
    return a[0];
}
#endif

/* The totals of four vectors, always in the same order. */
#ifndef HAS_FOUR_TOTALS
static ALWAYS_INLINE void v_four_totals(real *to, vec a, vec b, vec c, vec d)
{
#if LANES >= 4
    const vec ac = INTERLEAVE_LOW(LANES, a, c) + INTERLEAVE_HIGH(LANES, a, c);
    const vec bd = INTERLEAVE_LOW(LANES, b, d) + INTERLEAVE_HIGH(LANES, b, d);
    vec x = INTERLEAVE_LOW(LANES, ac, bd) + INTERLEAVE_HIGH(LANES, ac, bd); /* a, b, c, d, a, b, c, d ... */
#if LANES > 8
    x += SWAP_LANES(LANES, 8, x);
#endif
#if LANES > 4
    x += SWAP_LANES(LANES, 4, x);
#endif
    memcpy(to, &x, 4 * sizeof(real));
#else
    const vec ab = INTERLEAVE_LOW(LANES, a, b) + INTERLEAVE_HIGH(LANES, a, b);
    const vec cd = INTERLEAVE_LOW(LANES, c, d) + INTERLEAVE_HIGH(LANES, c, d);
    memcpy(to, &ab, sizeof ab);
    memcpy(to + 2, &cd, sizeof cd);
#endif
}
#endif

/* LANES rows of LANES numbers at `from` (stride in bytes) become columns of `to` (stride in numbers): log2(LANES)
 * rounds that interleave vector i with vector i + LANES / 2. */
#ifndef HAS_TRANSPOSE
static ALWAYS_INLINE void v_transpose(real *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride)
{
    vec a[LANES], b[LANES];
    UNROLL(16)
    for (int i = 0; i < LANES; i++)
        a[i] = v_load(from + i * from_stride);
    UNROLL(16)
    for (int width = 1; width < LANES; width *= 2) {
        UNROLL(16)
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = INTERLEAVE_LOW(LANES, a[i], a[i + LANES / 2]);
            b[2 * i + 1] = INTERLEAVE_HIGH(LANES, a[i], a[i + LANES / 2]);
        }
        UNROLL(16)
        for (int i = 0; i < LANES; i++)
            a[i] = b[i];
    }
    UNROLL(16)
    for (int i = 0; i < LANES; i++)
        v_store(to + i * to_stride, a[i]);
}
#endif
