/* From numbers in memory (strided, perhaps misaligned, of a storage dtype) to numbers in kernels (contiguous, of type
 * real) and back. Only this file and the widening operations of vector.inc.h know the bits of smaller dtypes. A new
 * dtype is a pair of cases here. */

static ALWAYS_INLINE float from_f16(uint16_t h)
{
    /* Shift exponent and mantissa into place; multiplying by 2**112 corrects the exponent's bias and normalises
     * denormals. */
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

static ALWAYS_INLINE uint16_t to_f16(float x)
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

static ALWAYS_INLINE float from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static ALWAYS_INLINE uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static ALWAYS_INLINE real read_number(const char *from, const fa_dtype dtype)
{
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_F32:
        memcpy(&f, from, 4);
        return (real)f;
    case FA_F64:
        memcpy(&d, from, 8);
        return (real)d;
    case FA_F16:
        memcpy(&h, from, 2);
        return (real)from_f16(h);
    case FA_I8:
        return (real) * (const int8_t *)from;
    default:
        memcpy(&h, from, 2);
        return (real)from_bf16(h);
    }
}

static ALWAYS_INLINE void write_number(char *to, real x, const fa_dtype dtype)
{
    const float f = (float)x;
    const double d = (double)x;
    uint16_t h;
    switch (dtype) {
    case FA_F32:
        memcpy(to, &f, 4);
        break;
    case FA_F64:
        memcpy(to, &d, 8);
        break;
    case FA_F16:
        h = to_f16(f);
        memcpy(to, &h, 2);
        break;
    case FA_BF16:
        h = to_bf16(f);
        memcpy(to, &h, 2);
        break;
    case FA_I8: /* is only read */
        break;
    }
}

/* Bytes of a number. */
static ALWAYS_INLINE int size_of(const fa_dtype dtype)
{
    return dtype == FA_F64 ? 8 : dtype == FA_F32 ? 4 : dtype == FA_I8 ? 1 : 2;
}

/* Of what exists for each dtype that v_load_as reads, that of a dtype: name_real, name_f16, name_bf16 or name_i8. */
#if BITS == 32
#define BY_DTYPE(name, dtype) \
    ((dtype) == FA_F16 ? name##_f16 : (dtype) == FA_BF16 ? name##_bf16 : (dtype) == FA_I8 ? name##_i8 : name##_real)
#else
#define BY_DTYPE(name, dtype) ((void)(dtype), name##_real)
#endif

/* LANES contiguous numbers of type real or, if that is float, of a smaller dtype. */
static ALWAYS_INLINE vec v_load_as(const void *p, const fa_dtype dtype)
{
#if BITS == 32
    if (dtype == FA_F16)
        return v_widen_f16(p);
    if (dtype == FA_BF16)
        return v_widen_bf16(p);
    if (dtype == FA_I8)
        return v_widen_i8(p);
#else
    (void)dtype;
#endif
    return v_load(p);
}

/* One loop for each dtype, which is a constant in it. */
#define FOR_DTYPE(dtype, do_it) \
    switch (dtype) {            \
    case FA_F32:                \
        do_it(FA_F32);          \
        break;                  \
    case FA_F64:                \
        do_it(FA_F64);          \
        break;                  \
    case FA_F16:                \
        do_it(FA_F16);          \
        break;                  \
    case FA_BF16:               \
        do_it(FA_BF16);         \
        break;                  \
    case FA_I8:                 \
        do_it(FA_I8);           \
        break;                  \
    }
#define READ_ALL(dtype)             \
    for (int64_t i = 0; i < n; i++) \
    to[i] = read_number(from + i * stride, dtype)
#define WRITE_ALL(dtype)            \
    for (int64_t i = 0; i < n; i++) \
    write_number(to + i * stride, from[i], dtype)

/* Contract: contract.h. */
static void gather(void *to_, const char *from, ptrdiff_t stride, int64_t n, fa_dtype dtype)
{
    real *to = to_;
    if (dtype == REAL_DTYPE && stride == (ptrdiff_t)sizeof(real)) {
        memcpy(to, from, (size_t)n * sizeof(real));
        return;
    }
#if BITS == 32
    if (stride == size_of(dtype) && dtype != FA_F64) {
        int64_t i = 0;
        for (; dtype == FA_F16 && i + LANES <= n; i += LANES)
            v_store(to + i, v_widen_f16(from + 2 * i));
        for (; dtype == FA_BF16 && i + LANES <= n; i += LANES)
            v_store(to + i, v_widen_bf16(from + 2 * i));
        for (; dtype == FA_I8 && i + LANES <= n; i += LANES)
            v_store(to + i, v_widen_i8(from + i));
        to += i, from += stride * i, n -= i;
    }
#endif
    FOR_DTYPE(dtype, READ_ALL)
}

/* Contract: contract.h. */
static void scatter(char *to, ptrdiff_t stride, const void *from_, int64_t n, fa_dtype dtype)
{
    const real *restrict from = from_;
    if (dtype == REAL_DTYPE && stride == (ptrdiff_t)sizeof(real)) {
        memcpy(to, from, (size_t)n * sizeof(real));
        return;
    }
    FOR_DTYPE(dtype, WRITE_ALL)
}
#undef FOR_DTYPE
#undef READ_ALL
#undef WRITE_ALL

/* Whether rows of n numbers of a smaller dtype are whole vectors that v_load_as reads. */
static ALWAYS_INLINE int widenable(const fa_view *matrix, int64_t n)
{
    return BITS == 32 && (matrix->dtype == FA_F16 || matrix->dtype == FA_BF16 || matrix->dtype == FA_I8) &&
           matrix->col == size_of(matrix->dtype) && n % LANES == 0;
}

/* Whether rows of a matrix are contiguous numbers of type real, each at a multiple of its size. */
static ALWAYS_INLINE int readable(const fa_view *matrix)
{
    return matrix->dtype == REAL_DTYPE && matrix->col == (ptrdiff_t)sizeof(real) &&
           ((uintptr_t)matrix->data | (uintptr_t)matrix->row) % sizeof(real) == 0;
}
