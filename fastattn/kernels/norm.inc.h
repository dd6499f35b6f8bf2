/* Layer norm and RMS norm of rows.
 *
 * The mean is subtracted before squares are summed, and what rounding left in it afterwards, so no digits cancel: the
 * error is a few eps of the largest number over the deviation. Rows whose squares would leave the range of the dtype
 * are multiplied by a power of two first. Sums have as many parts as a vector has lanes, in chunks of NORM_CHUNK
 * vectors.
 */
enum { NORM_CHUNK = 16 };

/* The sum of n numbers, or of their squares; the row is zero-padded to whole vectors. */
static ALWAYS_INLINE vec sum_with(vec sum, vec x, const int squares)
{
    if (squares)
        return v_fma(x, x, sum);
    return sum + x;
}

static ALWAYS_INLINE double total_of_row(const real *x, int64_t n, const int squares)
{
    double total = 0;
    for (int64_t i = 0; i < n; i += NORM_CHUNK * LANES) {
        const int64_t end = n - i < NORM_CHUNK * LANES ? n : i + NORM_CHUNK * LANES;
        vec even = {0}, odd = {0};
        int64_t j = i;
        for (; j + LANES < end; j += 2 * LANES) {
            even = sum_with(even, v_load(x + j), squares);
            odd = sum_with(odd, v_load(x + j + LANES), squares);
        }
        if (j < end)
            even = sum_with(even, v_load(x + j), squares);
        total += (double)v_total(even + odd);
    }
    return total;
}

static void fill_zeros(real *x, int64_t n)
{
    for (int64_t i = n; i % LANES; i++)
        x[i] = 0;
}

static void multiply_row(real *x, int64_t n, real factor)
{
    for (int64_t i = 0; i < n; i += LANES)
        v_store(x + i, v_load(x + i) * factor);
}

static size_t norm_workspace(int64_t n) { return (size_t)((n + LANES - 1) / LANES * LANES) * 2 * sizeof(real); }

/* Contract: contract.h. */
static void norm_rows(const fa_norm *norm, int64_t begin, int64_t end, void *workspace)
{
    /* Between them, squares of numbers neither overflow nor lose digits that count beside 1. */
    const real large = BITS == 32 ? (real)0x1p50f : (real)0x1p450, small = BITS == 32 ? (real)0x1p-50f : (real)0x1p-450;
    const int64_t n = norm->n;
    real *const x = workspace, *const other = x + (n + LANES - 1) / LANES * LANES;
    const real *const weight = norm->weight, *const bias = norm->bias;
    const real offset = (real)norm->offset;
    for (int64_t r = begin; r < end; r++) {
        gather(x, norm->x.data + r * norm->x.row, norm->x.col, n, norm->x.dtype);
        fill_zeros(x, n);
        if (norm->residual.data) {
            gather(other, norm->residual.data + r * norm->residual.row, norm->residual.col, n, norm->residual.dtype);
            fill_zeros(other, n);
            for (int64_t i = 0; i < n; i += LANES)
                v_store(x + i, v_load(x + i) + v_load(other + i));
        }
        if (norm->sum.data)
            scatter(norm->sum.data + r * norm->sum.row, norm->sum.col, x, n, norm->sum.dtype);
        vec most = {0};
        for (int64_t i = 0; i < n; i += LANES)
            most = v_max(most, v_abs(v_load(x + i)));
        const real top = v_spread_max(most)[0];
        double scale = 1; /* of the numbers */
        if (top > large || (top < small && top > 0)) {
            int exponent;
            frexp((double)top, &exponent);
            if (top <= (BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX)) { /* not infinite */
                if (norm->eps > 0 && exponent < -500) /* beside eps their squares are nothing; its own is finite */
                    exponent = -500;
                scale = ldexp(1.0, -exponent);
                /* In two steps: the power may be beyond the dtype. */
                multiply_row(x, n, (real)ldexp(1.0, -exponent / 2));
                multiply_row(x, n, (real)ldexp(1.0, -exponent - -exponent / 2));
            }
        }
        double lost = 0, square;
        if (norm->centred) {
            const real mean = (real)(total_of_row(x, n, 0) / (double)n);
            for (int64_t i = 0; i < n; i += LANES)
                v_store(x + i, v_load(x + i) - mean);
            for (int64_t i = n; i % LANES; i++)
                x[i] = 0;
            lost = total_of_row(x, n, 0) / (double)n;
        }
        square = total_of_row(x, n, 1) / (double)n - lost * lost;
        /* This may be infinite or 0; then it is all that counts, or nothing. */
        const double least = norm->eps > 0 ? norm->eps * scale * scale : 0;
        const double deviation = sqrt((square > 0 || square != square ? square : 0) + least);
        const double factor = 1 / deviation;
        const vec less = v_fill((real)lost);
        vec times = v_fill((real)factor);
        /* A constant row, without eps or with next to none: 0, not NaN, times infinity. */
        if (deviation < 1 / (BITS == 32 ? (double)FLT_MAX : DBL_MAX))
            times = (vec){0};
        for (int64_t i = 0; i < n; i += LANES) {
            vec y = (v_load(x + i) - less) * times;
            const int rest = n - i < LANES ? (int)(n - i) : LANES;
            if (weight)
                y *= load_up_to(weight + i, rest) + offset;
            if (bias)
                y += load_up_to(bias + i, rest);
            v_store(x + i, y);
        }
        scatter(norm->out.data + r * norm->out.row, norm->out.col, x, n, norm->out.dtype);
    }
}
