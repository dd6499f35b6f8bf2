/* softmax, log_softmax and logsumexp of rows, and the exact merge of partial attention.
 *
 * Three passes: maximum, exponentials and their sum, result. Short rows go through each pass a few at a time, because a
 * single one is limited by latency.
 *
 * A sum adds eight vectors as a tree, and the trees with compensation (Kahan), so that its error does not grow with the
 * length.
 */
enum { ROWS_AT_ONCE = 4, TREE = 8, ROW_BLOCK = TREE * LANES };

/* Elements j .. j + LANES - 1 of a row; -inf past its end and where masked. */
static ALWAYS_INLINE vec row_vector(const real *x, const char *mask, int64_t j, int64_t n)
{
    const vec hidden = v_fill(-(real)INFINITY);
    const int live = n - j < LANES ? (int)(n - j) : LANES;
    if (live == LANES) {
        vec v = v_load(x + j);
        if (mask)
            v = v_pick_bits((unsigned)bits_of_mask(mask + j, LANES), v, hidden);
        return v;
    }
    real some[LANES];
    v_store(some, hidden);
    for (int i = 0; i < live; i++)
        if (!mask || mask[j + i])
            some[i] = x[j + i];
    return v_load(some);
}

static ALWAYS_INLINE void store_row(real *out, int64_t j, int64_t n, vec v)
{
    if (n - j >= LANES) {
        v_store(out + j, v);
    } else {
        real some[LANES];
        v_store(some, v);
        for (int i = 0; i < n - j; i++)
            out[j + i] = some[i];
    }
}

/* A sum and its rounding error. */
struct row_sum {
    vec sum, lost;
};

static ALWAYS_INLINE vec tree_of(const vec *e)
{
    return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

static ALWAYS_INLINE void add_tree(struct row_sum *to, const vec *e)
{
    const vec part = tree_of(e) - to->lost, now = to->sum + part;
    to->lost = (now - to->sum) - part;
    to->sum = now;
}

/* What pass 2 sums: all exponentials, or only those below the maximum. */
enum { ALL, OTHERS };

static ALWAYS_INLINE vec row_term(vec x, vec base, const int which, const int far)
{
    const vec d = x - base, e = v_exp_below(d, far);
    return which == ALL ? e : (vec)((ivec)e & ~(d == (vec){0}));
}

/* Whether the maximum contributes most of the sum of exponentials relative to it: the logarithm is then log1p(others),
 * so that the contribution of the others is not rounded away. */
static ALWAYS_INLINE int maximum_dominates(double total) { return total < 2 && total > 0; }

/* The exponentials of a row from element j on, a block or what is left of the row, and their sum. */
static ALWAYS_INLINE void row_block(const real *x, const char *mask, int64_t j, int64_t n, vec base, real *out,
                                    struct row_sum *sum, const int which, const int far, const int whole)
{
    vec term[TREE];
    UNROLL(8)
    for (int i = 0; i < TREE; i++) {
        const int64_t at = j + i * LANES;
        if (!whole && at >= n) {
            term[i] = (vec){0};
            continue;
        }
        term[i] = row_term(row_vector(x, mask, at, whole ? INT64_MAX : n), base, which, far);
    }
    UNROLL(8)
    for (int i = 0; out && i < TREE; i++) {
        const int64_t at = j + i * LANES;
        if (whole || at < n)
            store_row(out, at, whole ? INT64_MAX : n, term[i]);
    }
    add_tree(sum, term);
}

static ALWAYS_INLINE double sum_of_row(const real *x, const char *mask, int64_t n, real base, real *out,
                                       const int which, const int far)
{
    struct row_sum sum = {{0}, {0}};
    int64_t j = 0;
    for (; j + ROW_BLOCK <= n; j += ROW_BLOCK)
        row_block(x, mask, j, n, v_fill(base), out, &sum, which, far, 1);
    if (j < n)
        row_block(x, mask, j, n, v_fill(base), out, &sum, which, 1, 0);
    return (double)v_total(sum.sum - sum.lost);
}

static NEVER_INLINE double sum_of_others(const real *x, const char *mask, int64_t n, real base)
{
    return sum_of_row(x, mask, n, base, NULL, OTHERS, 1);
}

/* softmax: whether that is the function, or it times a number for each row of grad, which is logsumexp's gradient; the
 * logarithms have one copy. */
static ALWAYS_INLINE void rows_of(const int softmax, fa_row_function function, const char *x, ptrdiff_t x_row,
                                  const char *grad, ptrdiff_t grad_row, const char *mask, ptrdiff_t mask_row, char *out,
                                  ptrdiff_t out_row, int64_t n, const int count)
{
    const vec none = v_fill(-(real)INFINITY);
    const int64_t whole = n / LANES * LANES;
    real base[ROWS_AT_ONCE];
    double total[ROWS_AT_ONCE]; /* or its logarithm, except for softmax */
    int far[ROWS_AT_ONCE];      /* whether exponentials may be denormal or 0 */
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        vec most[4] = {none, none, none, none}, least[4] = {-none, -none, -none, -none};
        int64_t j = 0;
        for (; j + 4 * LANES <= n; j += 4 * LANES) {
            UNROLL(4)
            for (int i = 0; i < 4; i++) {
                const vec numbers = row_vector(x_r, mask_r, j + i * LANES, INT64_MAX);
                most[i] = v_max(numbers, most[i]);
                if (!EXP_REACHES_FAR)
                    least[i] = v_min(numbers, least[i]);
            }
        }
        for (; j < n; j += LANES) {
            const vec numbers = row_vector(x_r, mask_r, j, n);
            most[0] = v_max(numbers, most[0]);
            if (!EXP_REACHES_FAR && j + LANES <= n)
                least[0] = v_min(numbers, least[0]);
        }
        base[r] = v_spread_max(v_max(v_max(most[0], most[1]), v_max(most[2], most[3])))[0];
        if (base[r] == -(real)INFINITY)
            base[r] = 0;
        least[0] = v_min(v_min(least[0], least[1]), v_min(least[2], least[3]));
        far[r] = !(-v_spread_max(-least[0])[0] - base[r] >= LOG_OF_NORMAL);
    }
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        real *out_r = softmax ? (real *)(out + r * out_row) : NULL;
        if (EXP_REACHES_FAR || !far[r])
            total[r] = sum_of_row(x_r, mask_r, n, base[r], out_r, ALL, 0);
        else
            total[r] = sum_of_row(x_r, mask_r, n, base[r], out_r, ALL, 1);
    }
    for (int r = 0; r < count && !softmax; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        total[r] = maximum_dominates(total[r]) ? log1p(sum_of_others(x_r, mask_r, n, base[r])) : log(total[r]);
        /* inf - inf made the sum NaN; it should be infinite, unless the row holds a NaN. */
        if (base[r] == (real)INFINITY) {
            total[r] = 0;
            for (int64_t j = 0; j < n; j++)
                if ((!mask_r || mask_r[j]) && x_r[j] != x_r[j])
                    total[r] = (double)x_r[j];
        }
    }
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        real *out_r = (real *)(out + r * out_row);
        if (!softmax && function == FA_ROW_LOGSUMEXP) {
            *out_r = (real)((double)base[r] + total[r]);
        } else if (softmax) {
            const double factor = grad ? (double)*(const real *)(grad + r * grad_row) : 1;
            const real scale = (real)(total[r] == 0 ? 0 : factor / total[r]);
            if (grad && !isfinite(scale)) { /* what does not count stays 0, also beside NaN */
                for (int64_t j = 0; j < n; j++)
                    out_r[j] = (!mask || mask_r[j]) && x_r[j] != -(real)INFINITY ? out_r[j] * scale : 0;
                continue;
            }
            if (mask && scale != scale) { /* a masked entry stays 0 even in a row of NaN */
                for (int64_t j = 0; j < n; j++)
                    out_r[j] = mask_r[j] ? scale : 0;
                continue;
            }
            for (int64_t j = 0; j < whole; j += LANES)
                v_store(out_r + j, v_load(out_r + j) * scale);
            for (int64_t j = whole; j < n; j++)
                out_r[j] *= scale;
        } else {
            const real log_total = (real)total[r];
            for (int64_t j = 0; j < n; j += LANES) {
                const vec y = row_vector(x_r, mask_r, j, n);
                store_row(out_r, j, n, v_pick(y == none, none, (y - base[r]) - log_total));
            }
        }
    }
}

/* Softmax, the logarithms and logsumexp's gradient. */
static void rows(fa_row_function function, const char *x, ptrdiff_t x_row, const char *grad, ptrdiff_t grad_row,
                 const char *mask, ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int64_t rows)
{
    const int softmax = function == FA_ROW_SOFTMAX || function == FA_ROW_LOGSUMEXP_BACK;
    const int at_once = n * (int64_t)sizeof(real) <= 4096 ? ROWS_AT_ONCE : 1; /* so that they stay in L1 */
    while (rows > 0) {
        const int count = rows < at_once ? (int)rows : at_once;
        if (softmax && !mask)
            rows_of(1, function, x, x_row, grad, grad_row, NULL, 0, out, out_row, n, count);
        else if (softmax)
            rows_of(1, function, x, x_row, grad, grad_row, mask, mask_row, out, out_row, n, count);
        else
            rows_of(0, function, x, x_row, NULL, 0, mask, mask_row, out, out_row, n, count);
        rows -= count;
        x += count * x_row;
        out += count * out_row;
        if (grad)
            grad += count * grad_row;
        if (mask)
            mask += count * mask_row;
    }
}

/* Contract: contract.h. A part whose lse is -inf saw no key and is skipped. */
static void merge(void *out_, void *lse_, const void *const *outs, const void *lses_, int64_t parts, int64_t n)
{
    real *out = out_, *lse = lse_;
    const real *lses = lses_;
    double most = -INFINITY, total = 0;
    for (int64_t p = 0; p < parts; p++)
        most = (double)lses[p] > most ? (double)lses[p] : most;
    const double base = most == -INFINITY ? 0 : most;
    for (int64_t p = 0; p < parts; p++)
        total += exp((double)lses[p] - base);
    *lse = (real)(total == 0 ? -INFINITY : base == INFINITY ? base : base + log(total));
    for (int64_t c = 0; c < n; c++)
        out[c] = 0;
    for (int64_t p = 0; p < parts; p++) {
        if (lses[p] == -(real)INFINITY)
            continue;
        const real share = (real)(exp((double)lses[p] - base) / total);
        const real *part = outs[p];
        for (int64_t c = 0; c < n; c++)
            out[c] += share * part[c];
    }
    /* Rounding must not carry a mean beyond its largest term, and so beyond the largest finite number. */
    for (int64_t c = 0; c < n; c++) {
        real largest = 0, half = 0;
        for (int64_t p = 0; p < parts && !isfinite(out[c]); p++) {
            const real x = ((const real *)outs[p])[c];
            if (lses[p] == -(real)INFINITY)
                continue;
            largest = isfinite(x) && fabs((double)x) <= (double)largest ? largest : (real)fabs((double)x);
            half += (real)(exp((double)lses[p] - base) / total) * (x / 2);
        }
        if (!isfinite(out[c]) && isfinite(half))
            out[c] = half >= largest / 2 ? largest : half <= -largest / 2 ? -largest : 2 * half;
    }
}
