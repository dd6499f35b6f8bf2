/* softmax, log_softmax and logsumexp of one row, and the exact merge of partial attention.
 *
 * Three passes: maximum, exponentials and their sum, scaling. Sums are cut into runs of ROW_RUN numbers that are added
 * up in double, so that the error does not grow with the length. */
enum { NAME(ROW_RUN) = 2048 };

/* Numbers j .. j + LANES - 1 of a row; -inf past its end and where the mask hides. */
static ALWAYS_INLINE vec NAME(row_vector)(const real *x, const char *mask, int64_t j, int64_t n)
{
    const vec hidden = NAME(fill)(-(real)INFINITY);
    const int live = n - j < LANES ? (int)(n - j) : LANES;
    if (live == LANES && !mask)
        return NAME(load)(x + j);
    real some[LANES];
    NAME(store)(some, hidden);
    memcpy(some, x + j, (size_t)live * sizeof(real));
    unsigned bits = (unsigned)bits_below(live);
    if (mask)
        for (int i = 0; i < live; i++)
            bits &= ~((unsigned)(mask[j + i] == 0) << i);
    return NAME(pick_bits)(bits, NAME(load)(some), hidden);
}

static ALWAYS_INLINE void NAME(store_row)(real *out, int64_t j, int64_t n, vec v)
{
    if (n - j >= LANES) {
        NAME(store)(out + j, v);
    } else {
        real some[LANES];
        NAME(store)(some, v);
        memcpy(out + j, some, (size_t)(n - j) * sizeof(real));
    }
}

static ALWAYS_INLINE void NAME(row_of)(const fa_row_function function, const real *x, const char *mask, real *out,
                                       int64_t n)
{
    const vec none = NAME(fill)(-(real)INFINITY);
    const real log2e = (real)1.44269504088896340736;
    vec most = none;
    for (int64_t j = 0; j < n; j += LANES)
        most = NAME(max)(NAME(row_vector)(x, mask, j, n), most);
    const real greatest = NAME(spread_max)(most)[0];
    const real base = greatest == -(real)INFINITY ? 0 : greatest;
    double total = 0;
    for (int64_t run = 0; run < n; run += NAME(ROW_RUN)) {
        const int64_t stop = n - run < NAME(ROW_RUN) ? n : run + NAME(ROW_RUN);
        vec sum = {0};
        for (int64_t j = run; j < stop; j += LANES) {
            vec e = NAME(exp2)((NAME(row_vector)(x, mask, j, n) - base) * log2e);
            sum += e;
            if (function == FA_ROW_SOFTMAX)
                NAME(store_row)(out, j, n, e);
        }
        total += (double)NAME(total)(sum);
    }
    if (function == FA_ROW_LOGSUMEXP) {
        *out = (real)(total == 0 ? -INFINITY : (double)base + log(total));
    } else if (function == FA_ROW_SOFTMAX) {
        const real scale = (real)(total == 0 ? 0 : 1 / total);
        if (mask && scale != scale) { /* a hidden entry stays 0 in a row of NaN */
            for (int64_t j = 0; j < n; j++)
                out[j] = mask[j] ? scale : 0;
            return;
        }
        for (int64_t j = 0; j < n; j += LANES)
            NAME(store_row)(out, j, n, NAME(row_vector)(out, NULL, j, n) * scale);
    } else {
        const real log_total = (real)log(total);
        for (int64_t j = 0; j < n; j += LANES) {
            vec y = NAME(row_vector)(x, mask, j, n);
            ivec gone = y == none;
            y = (y - base) - log_total;
            NAME(store_row)(out, j, n, NAME(pick)(gone, none, y));
        }
    }
}

/* Contract: fastattn.h. */
static void NAME(row)(fa_row_function function, const void *x, const char *mask, void *out, int64_t n)
{
    if (function == FA_ROW_SOFTMAX && !mask)
        NAME(row_of)(FA_ROW_SOFTMAX, x, NULL, out, n);
    else if (function == FA_ROW_SOFTMAX)
        NAME(row_of)(FA_ROW_SOFTMAX, x, mask, out, n);
    else if (function == FA_ROW_LOG_SOFTMAX)
        NAME(row_of)(FA_ROW_LOG_SOFTMAX, x, mask, out, n);
    else
        NAME(row_of)(FA_ROW_LOGSUMEXP, x, mask, out, n);
}

/* Contract: fastattn.h. A part with lse -inf saw no key and is left out. */
static void NAME(merge)(void *out_, void *lse_, const void *const *outs, const void *lses_, int64_t parts, int64_t n)
{
    real *out = out_, *lse = lse_;
    const real *lses = lses_;
    double most = -INFINITY, total = 0;
    for (int64_t p = 0; p < parts; p++)
        most = (double)lses[p] > most ? (double)lses[p] : most;
    const double base = most == -INFINITY ? 0 : most;
    for (int64_t p = 0; p < parts; p++)
        total += exp((double)lses[p] - base);
    *lse = (real)(total == 0 ? -INFINITY : base + log(total));
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
}
