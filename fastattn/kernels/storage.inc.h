/* Numbers in memory: strided, perhaps misaligned, of a storage dtype; in the kernels: contiguous and of type real.
 * The one place that knows the bits of the 16-bit dtypes. A new dtype is a pair of cases here. */

static ALWAYS_INLINE float NAME(from_f16)(uint16_t h)
{
    /* Shift exponent and mantissa into place; multiplying by 2**112 mends the bias and makes denormals normal. */
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = (uint32_t)(h & 0x7fffu) << 13;
    float x;
    memcpy(&x, &rest, 4);
    x *= 0x1p112f;
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((h & 0x7c00u) == 0x7c00u)
        u = rest | 0x7f800000u;
    u |= sign;
    memcpy(&x, &u, 4);
    return x;
}

static ALWAYS_INLINE uint16_t NAME(to_f16)(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000u);
    u &= 0x7fffffffu;
    if (u >= 0x47800000u) /* 65536 and more, infinity, NaN */
        return sign | (u > 0x7f800000u ? 0x7e00u : 0x7c00u);
    if (u < 0x38800000u) { /* below 2**-14: adding 0.5 rounds to multiples of 2**-24, to nearest even */
        float y;
        memcpy(&y, &u, 4);
        y += 0.5f;
        memcpy(&u, &y, 4);
        return sign | (uint16_t)(u - 0x3f000000u);
    }
    u += 0xc8000fffu + (u >> 13 & 1u); /* exponent bias from 127 to 15; round to nearest even */
    return sign | (uint16_t)(u >> 13);
}

static ALWAYS_INLINE float NAME(from_bf16)(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static ALWAYS_INLINE uint16_t NAME(to_bf16)(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Contract: fastattn.h. */
static void NAME(gather)(void *to_, const char *from, ptrdiff_t stride, int64_t n, fa_dtype dtype)
{
    real *restrict to = to_;
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_F32:
        if (sizeof(real) == 4 && stride == 4)
            memcpy(to, from, (size_t)n * 4);
        else
            for (int64_t i = 0; i < n; i++) {
                memcpy(&f, from + i * stride, 4);
                to[i] = (real)f;
            }
        break;
    case FA_F64:
        if (sizeof(real) == 8 && stride == 8)
            memcpy(to, from, (size_t)n * 8);
        else
            for (int64_t i = 0; i < n; i++) {
                memcpy(&d, from + i * stride, 8);
                to[i] = (real)d;
            }
        break;
    case FA_F16:
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, from + i * stride, 2);
            to[i] = (real)NAME(from_f16)(h);
        }
        break;
    case FA_BF16:
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, from + i * stride, 2);
            to[i] = (real)NAME(from_bf16)(h);
        }
        break;
    }
}

/* Contract: fastattn.h. */
static void NAME(scatter)(char *to, ptrdiff_t stride, const void *from_, int64_t n, fa_dtype dtype)
{
    const real *restrict from = from_;
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_F32:
        if (sizeof(real) == 4 && stride == 4)
            memcpy(to, from, (size_t)n * 4);
        else
            for (int64_t i = 0; i < n; i++) {
                f = (float)from[i];
                memcpy(to + i * stride, &f, 4);
            }
        break;
    case FA_F64:
        if (sizeof(real) == 8 && stride == 8)
            memcpy(to, from, (size_t)n * 8);
        else
            for (int64_t i = 0; i < n; i++) {
                d = (double)from[i];
                memcpy(to + i * stride, &d, 8);
            }
        break;
    case FA_F16:
        for (int64_t i = 0; i < n; i++) {
            h = NAME(to_f16)((float)from[i]);
            memcpy(to + i * stride, &h, 2);
        }
        break;
    case FA_BF16:
        for (int64_t i = 0; i < n; i++) {
            h = NAME(to_bf16)((float)from[i]);
            memcpy(to + i * stride, &h, 2);
        }
        break;
    }
}

/* Whether rows of a matrix are contiguous numbers of type real, each at a multiple of its size. */
static ALWAYS_INLINE int NAME(readable)(const fa_problem *problem, const fa_view *matrix)
{
    return problem->dtype == (BITS == 32 ? FA_F32 : FA_F64) && matrix->col == (ptrdiff_t)sizeof(real) &&
           ((uintptr_t)matrix->data | (uintptr_t)matrix->row) % sizeof(real) == 0;
}
