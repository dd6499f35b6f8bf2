/* Rotary encoding: pairs of channels are rotated by angles proportional to the position.
 *
 * The table of a position holds its cosines, one per pair, and then its sines. Angles are computed in double, so that
 * large ones keep their fraction of a revolution. For very large ones the C library computes cosine and sine. */

/* Vectors of double, in which angles are computed whatever the dtype, and of as many numbers of type real. */
#define WIDE_LANES (VECTOR_BYTES / 8)
typedef double wide __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t wide_bits __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t wide_truth __attribute__((vector_size(VECTOR_BYTES)));
typedef real narrow __attribute__((vector_size(WIDE_LANES * sizeof(real))));

/* Angles below this are at most 2**20 quarter turns. */
#define NEAR_ANGLE 1647099.0

static ALWAYS_INLINE wide horner(wide x, const double *c, int n)
{
    wide p = c[n - 1] - (wide){0};
    for (int i = n - 2; i >= 0; i--)
        p = p * x + c[i];
    return p;
}

/* Cosine and sine of angles smaller than NEAR_ANGLE. The nearest multiple of a quarter turn is subtracted, the quarter
 * turn being the sum of three numbers of which two have 33 bits: their products with the multiplier are exact, whether
 * contracted or not. The rest, up to an eighth of a turn, goes into minimax polynomials; error: below 2**-52. */
static ALWAYS_INLINE void cosine_and_sine(wide angle, wide *cosine, wide *sine)
{
    static const double s[] = {-0.16666666666666666,   0.0083333333333309462,   -0.00019841269836754971,
                               2.7557316100683029e-06, -2.5051131455427946e-08, 1.591810123027412e-10};
    static const double c[] = {0.041666666666666664,    -0.0013888888888887395, 2.4801587298763433e-05,
                               -2.7557317270560326e-07, 2.0876146024689747e-09, -1.1382614868556325e-11};
    const double magic = 6755399441055744.0; /* 1.5 * 2**52: adding it rounds to a whole number, in the lowest bits */
    const wide shifted = angle * 0.63661977236758138 + magic;
    const wide quarters = shifted - magic;
    const wide rest =
        ((angle - quarters * 0x1.921fb544p+0) - quarters * 0x1.0b4611a6p-34) - quarters * 0x1.3198a2e037073p-69;
    const wide square = rest * rest;
    const wide sine_of_rest = rest + rest * square * horner(square, s, 6);
    const wide cosine_of_rest = (1 - 0.5 * square) + square * square * horner(square, c, 6);
    const wide_bits count = (wide_bits)shifted, swapped = -(count & 1);
    const wide_bits a = (wide_bits)cosine_of_rest, b = (wide_bits)sine_of_rest;
    *cosine = (wide)(((swapped & b) | (~swapped & a)) ^ (((count + 1) & 2) << 62));
    *sine = (wide)(((swapped & a) | (~swapped & b)) ^ ((count & 2) << 62));
}

/* Contract: contract.h. */
static void turns(void *table, const double *frequency, int64_t pairs, int64_t position, double factor)
{
    real *cosine = table, *sine = cosine + pairs;
    wide_truth far = {0};
    for (int64_t c = 0; c < pairs; c += WIDE_LANES) {
        const int64_t n = pairs - c < WIDE_LANES ? pairs - c : WIDE_LANES;
        wide angle = {0}, cosines, sines;
        if (n == WIDE_LANES)
            memcpy(&angle, frequency + c, sizeof angle);
        else
            memcpy(&angle, frequency + c, (size_t)n * sizeof(double));
        angle *= (double)position;
        far |= (angle >= NEAR_ANGLE) | (angle <= -NEAR_ANGLE);
        cosine_and_sine(angle, &cosines, &sines);
        const narrow a = __builtin_convertvector(factor * cosines, narrow);
        const narrow b = __builtin_convertvector(factor * sines, narrow);
        if (n == WIDE_LANES) {
            memcpy(cosine + c, &a, sizeof a);
            memcpy(sine + c, &b, sizeof b);
        } else {
            memcpy(cosine + c, &a, (size_t)n * sizeof(real));
            memcpy(sine + c, &b, (size_t)n * sizeof(real));
        }
    }
    int64_t any = 0;
    for (int i = 0; i < WIDE_LANES; i++)
        any |= far[i];
    for (int64_t c = 0; any && c < pairs; c++) {
        const double angle = (double)position * frequency[c];
        if (fabs(angle) >= NEAR_ANGLE) {
            cosine[c] = (real)(factor * cos(angle));
            sine[c] = (real)(factor * sin(angle));
        }
    }
}

/* Rotates pairs (a, b) to (a cos - b sin, b cos + a sin): lane i of the two vectors or, interleaved, adjacent lanes.
 * The other way round it is the sine that changes its sign. */
static ALWAYS_INLINE void rotate_pair(vec *a, vec *b, vec cosine, vec sine, const int interleaved)
{
    const vec u = *a, v = *b;
    if (interleaved) {
        *a = v_fma(u, INTERLEAVE_LOW(LANES, cosine, cosine),
                   SWAP_LANES(LANES, 1, u) * INTERLEAVE_LOW(LANES, -sine, sine));
        *b = v_fma(v, INTERLEAVE_HIGH(LANES, cosine, cosine),
                   SWAP_LANES(LANES, 1, v) * INTERLEAVE_HIGH(LANES, -sine, sine));
    } else {
        *a = v_fma(u, cosine, v * -sine);
        *b = v_fma(v, cosine, u * sine);
    }
}

static ALWAYS_INLINE void rotate_row(real *out, const real *x, const real *cosine, int64_t pairs, const int interleaved,
                                     ivec turned)
{
    const real *sine = cosine + pairs;
    const int64_t whole = pairs / LANES * LANES, step = interleaved ? 2 : 1, other = interleaved ? LANES : pairs;
    for (int64_t c = 0; c < whole; c += LANES) {
        vec a = v_load(x + step * c), b = v_load(x + step * c + other);
        rotate_pair(&a, &b, v_load(cosine + c), (vec)(turned ^ (ivec)v_load(sine + c)), interleaved);
        v_store(out + step * c, a);
        v_store(out + step * c + other, b);
    }
    const int rest = (int)(pairs - whole);
    if (rest) {
        const int in_a = !interleaved ? rest : 2 * rest < LANES ? 2 * rest : LANES;
        const int in_b = interleaved ? 2 * rest - in_a : rest;
        const real *x_b = in_b ? x + step * whole + other : x; /* no address past the row */
        vec a = v_load_some(x + step * whole, in_a), b = v_load_some(x_b, in_b);
        const vec s = (vec)(turned ^ (ivec)v_load_some(sine + whole, rest));
        rotate_pair(&a, &b, v_load_some(cosine + whole, rest), s, interleaved);
        store_row(out + step * whole, 0, in_a, a);
        if (in_b)
            store_row(out + step * whole + other, 0, in_b, b);
    }
}

/* Contract: contract.h. */
static void rotate(char *out, ptrdiff_t out_row, const char *x, ptrdiff_t x_row, const char *table, int64_t channels,
                   int64_t pairs, int64_t rows, int interleaved, int inverse)
{
    const ivec turned = inverse ? (ivec)(-(vec){0}) : (ivec){0}; /* the sine's sign */
    const size_t copied = (size_t)(channels - 2 * pairs) * sizeof(real);
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = (const real *)(x + i * x_row);
        const real *table_i = (const real *)table + i * 2 * pairs;
        real *out_i = (real *)(out + i * out_row);
        if (interleaved)
            rotate_row(out_i, x_i, table_i, pairs, 1, turned);
        else
            rotate_row(out_i, x_i, table_i, pairs, 0, turned);
        if (copied && out_i != x_i)
            memcpy(out_i + 2 * pairs, x_i + 2 * pairs, copied);
    }
}

#undef WIDE_LANES
#undef NEAR_ANGLE
