/* Rows of numbers as int8, with a scale for each group of a row: x is center + number * scale to within half a scale.
 *
 * A scale is the largest magnitude of its group over 127, rounded to its own dtype before it divides, so that the pair
 * which is stored is the nearest one. Where that rounding is coarse (float16 below its normal range) it is rounded up:
 * no number is then further than half a scale from 127 of them. Scales stay in the normal range of float, whose ends
 * some threads treat as zero. A group of zeros has the scale 0.
 */
#if BITS == 32
typedef int8_t int8_vec __attribute__((vector_size(VECTOR_BYTES / 4)));

static float scale_for(float top, fa_dtype dtype)
{
    const float smallest = dtype == FA_F16 ? 0x1p-24f : 0x1p-126f;
    float scale = top / 127;
    if (top == 0)
        return 0;
    scale = scale < smallest ? smallest : scale;
    if (dtype == FA_BF16)
        scale = from_bf16(to_bf16(scale));
    if (dtype == FA_F16) {
        const uint16_t half = to_f16(scale);
        scale = from_f16(half);
        if (127.5f * scale < top)
            scale = from_f16(half + 1);
    }
    return scale;
}

/* The nearest integers to numbers of at most 127, half to even: adding 1.5 * 2**23 puts them into the lowest bits. */
static ALWAYS_INLINE int8_vec v_to_int8(vec x) { return __builtin_convertvector((ivec)(x + 12582912.0f), int8_vec); }

static size_t quantize_workspace(int64_t n) { return (size_t)(n + LANES) * sizeof(real); }

/* Contract: contract.h. */
static int64_t quantize(const fa_quantize *rows, int64_t begin, int64_t end, void *workspace)
{
    const int64_t n = rows->n, group = rows->group;
    real *const x = workspace;
    memset(x + n, 0, LANES * sizeof(real));
    for (int64_t r = begin; r < end; r++) {
        int8_t *const to = (int8_t *)rows->to.data + r * rows->to.row;
        gather(x, rows->x.data + r * rows->x.row, rows->x.col, n, rows->x.dtype);
        if (rows->center)
            for (int64_t c = 0; c < n; c++)
                x[c] -= rows->center[c];
        for (int64_t begin_c = 0, g = 0; begin_c < n || g == 0; begin_c += group, g++) {
            const int64_t end_c = begin_c + group, whole = end_c - group % LANES;
            vec most = {0}, check = {0};
            int64_t c = begin_c;
            for (; c < whole; c += LANES) {
                const vec size = v_abs(v_load(x + c));
                most = v_max(size, most);
                check += size - size; /* NaN, of infinities too */
            }
            if (c < end_c) {
                const vec size = v_abs(v_load_some(x + c, (int)(end_c - c)));
                most = v_max(size, most);
                check += size - size;
            }
            const float scale = scale_for(v_spread_max(most)[0], rows->scales.dtype);
            if (v_true_bits(check != check) || !(scale <= FLT_MAX))
                return r;
            write_number(rows->scales.data + r * rows->scales.row + g * rows->scales.col, scale, rows->scales.dtype);
            if (scale == 0) {
                memset(to + begin_c, 0, (size_t)group);
                continue;
            }
            for (c = begin_c; c < end_c; c += LANES) {
                const vec share = v_load(x + c) / v_fill(scale); /* behind the group: any number, which is not stored */
                const int8_vec numbers = v_to_int8(v_min(v_max(share, v_fill(-127)), v_fill(127)));
                memcpy(to + c, &numbers, c < whole ? sizeof numbers : (size_t)(end_c - c));
            }
        }
    }
    return end;
}
#endif
