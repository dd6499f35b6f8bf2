/* softmax, log_softmax and logsumexp of rows, and the exact merge of partial attention.
 *
 * Three passes: maximum, exponentials and their sum, scaling. Short rows go through each pass a few at a time, because
 * a single one is a chain of latencies. Sums are cut into runs of ROW_RUN numbers that are added up in double, so that
 * the error does not grow with the length. */
enum { NAME(ROW_RUN) = 2048, NAME(ROWS_AT_ONCE) = 4 };

/* Numbers j .. j + LANES - 1 of a row; -inf past its end and where the mask hides. */
static ALWAYS_INLINE vec NAME(row_vector)(const real *x, const char *mask, int64_t j, int64_t n)
{
    const vec hidden = NAME(fill)(-(real)INFINITY);
    const int live = n - j < LANES ? (int)(n - j) : LANES;
    if (live == LANES) {
        vec v = NAME(load)(x + j);
        if (mask)
            v = NAME(pick_bits)((unsigned)bits_of_mask(mask + j, LANES), v, hidden);
        return v;
    }
    real some[LANES];
    NAME(store)(some, hidden);
    for (int i = 0; i < live; i++)
        if (!mask || mask[j + i])
            some[i] = x[j + i];
    return NAME(load)(some);
}

static ALWAYS_INLINE void NAME(store_row)(real *out, int64_t j, int64_t n, vec v)
{
    if (n - j >= LANES) {
        NAME(store)(out + j, v);
    } else {
        real some[LANES];
        NAME(store)(some, v);
        for (int i = 0; i < n - j; i++)
            out[j + i] = some[i];
    }
}

static ALWAYS_INLINE void NAME(rows_of)(const fa_row_function function, const char *x, ptrdiff_t x_row,
                                        const char *mask, ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n,
                                        const int count)
{
    const vec none = NAME(fill)(-(real)INFINITY);
    const real log2e = (real)1.44269504088896340736;
    const int64_t whole = n / LANES * LANES;
    real base[NAME(ROWS_AT_ONCE)];
    double total[NAME(ROWS_AT_ONCE)];
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        vec most = none, other = none;
        int64_t j = 0;
        for (; j + LANES < whole; j += 2 * LANES) {
            most = NAME(max)(NAME(row_vector)(x_r, mask_r, j, whole), most);
            other = NAME(max)(NAME(row_vector)(x_r, mask_r, j + LANES, whole), other);
        }
        for (; j < n; j += LANES)
            most = NAME(max)(NAME(row_vector)(x_r, mask_r, j, n), most);
        base[r] = NAME(spread_max)(NAME(max)(most, other))[0];
        if (base[r] == -(real)INFINITY)
            base[r] = 0;
    }
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        real *out_r = (real *)(out + r * out_row);
        total[r] = 0;
        for (int64_t run = 0; run < whole; run += NAME(ROW_RUN)) {
            const int64_t stop = whole - run < NAME(ROW_RUN) ? whole : run + NAME(ROW_RUN);
            vec sum = {0};
            for (int64_t j = run; j < stop; j += LANES) {
                const vec e = NAME(exp2)((NAME(row_vector)(x_r, mask_r, j, whole) - base[r]) * log2e);
                sum += e;
                if (function == FA_ROW_SOFTMAX)
                    NAME(store)(out_r + j, e);
            }
            total[r] += (double)NAME(total)(sum);
        }
        if (whole < n) {
            const vec e = NAME(exp2)((NAME(row_vector)(x_r, mask_r, whole, n) - base[r]) * log2e);
            total[r] += (double)NAME(total)(e);
            if (function == FA_ROW_SOFTMAX)
                NAME(store_row)(out_r, whole, n, e);
        }
        /* inf - inf has made a NaN of the sum; the sum itself is infinite, unless there is a true NaN. */
        if (function != FA_ROW_SOFTMAX && base[r] == (real)INFINITY) {
            total[r] = 1;
            for (int64_t j = 0; j < n; j++)
                if ((!mask_r || mask_r[j]) && x_r[j] != x_r[j])
                    total[r] = (double)x_r[j];
        }
    }
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        real *out_r = (real *)(out + r * out_row);
        if (function == FA_ROW_LOGSUMEXP) {
            *out_r = (real)(total[r] == 0 ? -INFINITY : (double)base[r] + log(total[r]));
        } else if (function == FA_ROW_SOFTMAX) {
            const real scale = (real)(total[r] == 0 ? 0 : 1 / total[r]);
            if (mask && scale != scale) { /* a hidden entry stays 0 in a row of NaN */
                for (int64_t j = 0; j < n; j++)
                    out_r[j] = mask_r[j] ? scale : 0;
                continue;
            }
            for (int64_t j = 0; j < whole; j += LANES)
                NAME(store)(out_r + j, NAME(load)(out_r + j) * scale);
            for (int64_t j = whole; j < n; j++)
                out_r[j] *= scale;
        } else {
            const real log_total = (real)log(total[r]);
            for (int64_t j = 0; j < n; j += LANES) {
                const vec y = NAME(row_vector)(x_r, mask_r, j, n);
                NAME(store_row)(out_r, j, n, NAME(pick)(y == none, none, (y - base[r]) - log_total));
            }
        }
    }
}

/* Contract: fastattn.h. */
static void NAME(rows)(fa_row_function function, const char *x, ptrdiff_t x_row, const char *mask, ptrdiff_t mask_row,
                       char *out, ptrdiff_t out_row, int64_t n, int64_t rows)
{
    const int at_once =
        n * (int64_t)sizeof(real) <= 4096 ? NAME(ROWS_AT_ONCE) : 1; /* they are to stay in the first cache */
    while (rows > 0) {
        const int count = rows < at_once ? (int)rows : at_once;
        if (function == FA_ROW_SOFTMAX && !mask)
            NAME(rows_of)(FA_ROW_SOFTMAX, x, x_row, NULL, 0, out, out_row, n, count);
        else if (function == FA_ROW_SOFTMAX)
            NAME(rows_of)(FA_ROW_SOFTMAX, x, x_row, mask, mask_row, out, out_row, n, count);
        else if (function == FA_ROW_LOG_SOFTMAX)
            NAME(rows_of)(FA_ROW_LOG_SOFTMAX, x, x_row, mask, mask_row, out, out_row, n, count);
        else
            NAME(rows_of)(FA_ROW_LOGSUMEXP, x, x_row, mask, mask_row, out, out_row, n, count);
        rows -= count;
        x += count * x_row;
        out += count * out_row;
        if (mask)
            mask += count * mask_row;
    }
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
}
