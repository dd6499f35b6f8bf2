/* The gradients of softmax and its relatives for rows, contiguous or side by side with the same bits, and of the merge.
 *
 * A row is read twice, with y, what the function returned, and g, the gradient of that:
 *
 *     softmax, sparsemax, entmax15   w (g - mean), w being y, 1 or sqrt(y) and mean = sum(w g) / sum(w); of softmax,
 *                                    sum(w) is 1
 *     log_softmax                    g - exp(y) sum(g)
 *
 * Only entries of a weight count: no masked ones, none with y = 0, or -inf for log_softmax. The others get an exact 0,
 * whatever g is there. The gradient of logsumexp is softmax times a number (rows.inc.h).
 */

/* A sum of terms of either sign and its accumulated rounding error (TwoSum). */
struct exact_sum {
    vec sum, rest;
};

static ALWAYS_INLINE void add_to_exact(struct exact_sum *to, vec x)
{
    const vec now = to->sum + x, part = now - to->sum;
    to->rest += (to->sum - (now - part)) + (x - part);
    to->sum = now;
}

/* The sums in the lanes; where one is infinite or NaN its error is NaN. */
static ALWAYS_INLINE vec lanes_of_exact(struct exact_sum s)
{
    return s.sum + v_pick(s.rest == s.rest, s.rest, (vec){0});
}

static ALWAYS_INLINE int of_sparse(fa_row_function function)
{
    return function == FA_ROW_SPARSEMAX_BACK || function == FA_ROW_ENTMAX15_BACK;
}

/* In place of a masked y: it has no weight. */
static ALWAYS_INLINE vec without_weight(const int logarithm) { return logarithm ? v_fill(-(real)INFINITY) : (vec){0}; }

/* NaN if y is. */
static ALWAYS_INLINE vec weight_of(fa_row_function function, vec y)
{
    if (function == FA_ROW_SPARSEMAX_BACK)
        return v_fill(1) + (y - y);
    return function == FA_ROW_ENTMAX15_BACK ? v_sqrt(y) : y;
}

/* What an entry adds to the sum of w g (of g for log_softmax) or, `plain`, of w. The integers between product and sum
 * keep them from being contracted here, and not there. */
static ALWAYS_INLINE vec back_term(const int logarithm, fa_row_function function, int plain, vec y, vec g)
{
    const ivec counts = y != without_weight(logarithm);
    if (logarithm)
        return (vec)(counts & (ivec)g);
    const vec w = weight_of(function, y);
    return (vec)(counts & (ivec)(plain ? w : w * g));
}

/* mean: for log_softmax the sum of g. */
static ALWAYS_INLINE vec back_result(const int logarithm, fa_row_function function, vec y, vec g, vec mean)
{
    const ivec counts = y != without_weight(logarithm);
    if (logarithm)
        return (vec)(counts & (ivec)v_fma(-v_exp_below(y, 1), mean, g));
    return (vec)(counts & (ivec)(weight_of(function, y) * (g - mean)));
}

static ALWAYS_INLINE real mean_of(fa_row_function function, double sum, double weights)
{
    return (real)(!of_sparse(function) ? sum : weights == 0 ? 0 : sum / weights);
}

/* Elements j .. j + LANES - 1 of y; `hidden` past its end and where masked. */
static ALWAYS_INLINE vec shown_vector(const real *y, const char *mask, int64_t j, int64_t n, vec hidden)
{
    if (n - j >= LANES) {
        vec v = v_load(y + j);
        if (mask)
            v = v_pick_bits((unsigned)bits_of_mask(mask + j, LANES), v, hidden);
        return v;
    }
    const int live = (int)(n - j);
    const unsigned bits = mask ? (unsigned)bits_of_mask(mask + j, live) : (1u << live) - 1;
    return v_pick_bits(bits, v_load_some(y + j, live), hidden);
}

static ALWAYS_INLINE vec grad_vector(const real *grad, int64_t j, int64_t n)
{
    if (n - j >= LANES)
        return v_load(grad + j);
    return v_load_some(grad + j, (int)(n - j));
}

static ALWAYS_INLINE void back_rows_of(const int logarithm, fa_row_function function, const char *y, ptrdiff_t y_row,
                                       const char *grad, ptrdiff_t grad_row, const char *mask, ptrdiff_t mask_row,
                                       char *out, ptrdiff_t out_row, int64_t n, int count)
{
    const vec hidden = without_weight(logarithm);
    const int sparse = !logarithm && of_sparse(function);
    real mean[ROWS_AT_ONCE];
    for (int r = 0; r < count; r++) {
        const real *y_r = (const real *)(y + r * y_row), *grad_r = (const real *)(grad + r * grad_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        struct exact_sum sum = {{0}, {0}}, weights = {{0}, {0}};
        for (int64_t j = 0; j < n; j += ROW_BLOCK) {
            vec part = {0}, weight = {0};
            UNROLL(8)
            for (int i = 0; i < TREE; i++) {
                const int64_t at = j + i * LANES;
                if (at >= n)
                    break;
                const vec y_j = shown_vector(y_r, mask_r, at, n, hidden), g_j = grad_vector(grad_r, at, n);
                part += back_term(logarithm, function, 0, y_j, g_j);
                if (sparse)
                    weight += back_term(0, function, 1, y_j, g_j);
            }
            add_to_exact(&sum, part);
            if (sparse)
                add_to_exact(&weights, weight);
        }
        mean[r] = mean_of(function, (double)v_total(lanes_of_exact(sum)), (double)v_total(lanes_of_exact(weights)));
    }
    for (int r = 0; r < count; r++) {
        const real *y_r = (const real *)(y + r * y_row), *grad_r = (const real *)(grad + r * grad_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        real *out_r = (real *)(out + r * out_row);
        for (int64_t j = 0; j < n; j += LANES) {
            const vec y_j = shown_vector(y_r, mask_r, j, n, hidden), g_j = grad_vector(grad_r, j, n);
            store_row(out_r, j, n, back_result(logarithm, function, y_j, g_j, v_fill(mean[r])));
        }
    }
}

static void back_rows(fa_row_function function, const char *y, ptrdiff_t y_row, const char *grad, ptrdiff_t grad_row,
                      const char *mask, ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int64_t rows)
{
    const int at_once = n * (int64_t)sizeof(real) <= 4096 ? ROWS_AT_ONCE : 1;
    while (rows > 0) {
        const int count = rows < at_once ? (int)rows : at_once;
        if (function == FA_ROW_LOG_SOFTMAX_BACK)
            back_rows_of(1, function, y, y_row, grad, grad_row, mask, mask_row, out, out_row, n, count);
        else
            back_rows_of(0, function, y, y_row, grad, grad_row, mask, mask_row, out, out_row, n, count);
        rows -= count;
        y += count * y_row;
        grad += count * grad_row;
        out += count * out_row;
        if (mask)
            mask += count * mask_row;
    }
}

/* Element t of the rows of vector v, of y (masked) and of the gradient. */
static ALWAYS_INLINE void back_column(const fa_columns *c, const struct columns_state *state, int t, int v,
                                      const int whole, vec hidden, vec *y, vec *g)
{
    *y = shown_column(c, state, t, v, whole, hidden);
    *g = load_column(c, c->grad + state->at[FA_ROW_GRAD][t], c->next[FA_ROW_GRAD], c->grad_dtype, v, whole);
}

/* Rows in the lanes, read twice where they are: copies in scratch would cost more than they spare. */
static ALWAYS_INLINE void back_columns_of(const int logarithm, fa_row_function function, const fa_columns *c,
                                          struct columns_state *state, const int vecs, const int whole)
{
    const vec hidden = without_weight(logarithm);
    const int64_t length = c->length;
    const int sparse = !logarithm && of_sparse(function);
    struct exact_sum sum[2][LANES][COLUMN_VECS] = {0}; /* lane l of a row's sums is [l] here */
    first_block(c, state);
    for (int64_t j = 0; j < length; j += ROW_BLOCK) {
        const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
        vec part[2][LANES][COLUMN_VECS] = {0};
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                vec y, g;
                back_column(c, state, t, v, whole, hidden, &y, &g);
                part[0][t % LANES][v] += back_term(logarithm, function, 0, y, g);
                if (sparse)
                    part[1][t % LANES][v] += back_term(0, function, 1, y, g);
            }
        }
        for (int k = 0; k <= sparse; k++)
            for (int l = 0; l < LANES && l < n; l++)
                for (int v = 0; v < vecs; v++)
                    add_to_exact(&sum[k][l][v], part[k][l][v]);
    }
    double total[2][COLUMN_ROWS] = {{0}};
    for (int k = 0; k <= sparse; k++)
        for (int v = 0; v < vecs; v++) {
            vec lanes[LANES];
            for (int l = 0; l < LANES; l++)
                lanes[l] = lanes_of_exact(sum[k][l][v]);
            const vec all = total_of_lanes(lanes);
            for (int i = 0; i < LANES; i++)
                total[k][v * LANES + i] = (double)all[i];
        }
    for (int r = 0; r < vecs * LANES; r++)
        state->base[r / LANES][r % LANES] = mean_of(function, total[0][r], total[1][r]);
    first_block(c, state);
    for (int64_t j = 0; j < length; j += ROW_BLOCK) {
        const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                vec y, g;
                back_column(c, state, t, v, whole, hidden, &y, &g);
                store_column(c, state, t, v, back_result(logarithm, function, y, g, state->base[v]), whole);
            }
        }
    }
}

static void back_columns(const int logarithm, fa_row_function function, const fa_columns *c,
                         struct columns_state *state)
{
    const ptrdiff_t size = sizeof(real);
    const int vecs = (int)((c->rows + LANES - 1) / LANES);
    const int whole = c->rows == COLUMN_ROWS && c->dtype == REAL_DTYPE && c->next[FA_ROW_X] == size &&
                      c->grad_dtype == REAL_DTYPE && c->next[FA_ROW_GRAD] == size && c->out_dtype == REAL_DTYPE &&
                      c->next[FA_ROW_OUT] == size;
    if (whole)
        back_columns_of(logarithm, function, c, state, COLUMN_VECS, 1);
    else
        back_columns_of(logarithm, function, c, state, vecs, 0);
}

/* All functions of rows */

static ALWAYS_INLINE int is_back(fa_row_function function)
{
    return of_sparse(function) || function == FA_ROW_SOFTMAX_BACK || function == FA_ROW_LOG_SOFTMAX_BACK;
}

/* Contract: contract.h. */
static void all_rows(fa_row_function function, const char *x, ptrdiff_t x_row, const char *grad, ptrdiff_t grad_row,
                     const char *mask, ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int64_t count)
{
    if (function == FA_ROW_SPARSEMAX || function == FA_ROW_ENTMAX15)
        all_sparse_rows(function, x, x_row, mask, mask_row, out, out_row, n, count);
    else if (is_back(function))
        back_rows(function, x, x_row, grad, grad_row, mask, mask_row, out, out_row, n, count);
    else
        rows(function, x, x_row, grad, grad_row, mask, mask_row, out, out_row, n, count);
}

/* Contract: contract.h. */
static void all_columns(fa_row_function function, const fa_columns *c, void *workspace)
{
    struct columns_state *state = workspace;
    if (function == FA_ROW_SPARSEMAX || function == FA_ROW_ENTMAX15)
        sparse_columns(function == FA_ROW_ENTMAX15, c, state, kept_rows(c->length, state));
    else if (function == FA_ROW_LOG_SOFTMAX_BACK)
        back_columns(1, function, c, state);
    else if (is_back(function))
        back_columns(0, function, c, state);
    else
        columns(function, c, state, kept_rows(c->length, state));
}

/* The sum of the products of two rows. */
static ALWAYS_INLINE double product_of_rows(const real *a, const real *b, int64_t n)
{
    struct exact_sum sum = {{0}, {0}};
    for (int64_t j = 0; j < n; j += ROW_BLOCK) {
        vec term[TREE] = {{0}};
        UNROLL(8)
        for (int i = 0; i < TREE; i++)
            if (j + i * LANES < n)
                term[i] = grad_vector(a, j + i * LANES, n) * grad_vector(b, j + i * LANES, n);
        add_to_exact(&sum, tree_of(term));
    }
    return (double)v_total(lanes_of_exact(sum));
}

/* Contract: contract.h. Of a part with the share s and a = grad_out . out: s grad_out and s (a - sum of all s a +
 * grad_lse). A part whose lse is -inf saw no key and gets zeros. */
static void merge_back(void *const *grad_outs, void *grad_lses_, const void *grad_out_, const void *grad_lse,
                       const void *const *outs, void *lses_, int64_t parts, int64_t n)
{
    enum { NO_SHARE = -1 };
    const real *grad_out = grad_out_, of_lse = *(const real *)grad_lse;
    real *grad_lses = grad_lses_, *share = lses_; /* shares take the place of lses */
    double most = -INFINITY, total = 0, mean = 0;
    for (int64_t p = 0; p < parts; p++)
        most = (double)share[p] > most ? (double)share[p] : most;
    const double base = most == -INFINITY ? 0 : most;
    for (int64_t p = 0; p < parts; p++) {
        const double e = exp((double)share[p] - base);
        share[p] = share[p] == -(real)INFINITY ? NO_SHARE : (real)e;
        total += e;
    }
    for (int64_t p = 0; p < parts; p++) {
        real *grad_part = grad_outs[p];
        if (share[p] == NO_SHARE) {
            memset(grad_part, 0, (size_t)n * sizeof(real));
            continue;
        }
        share[p] = (real)((double)share[p] / total);
        grad_lses[p] = (real)product_of_rows(grad_out, outs[p], n);
        mean += (double)share[p] * (double)grad_lses[p];
        for (int64_t c = 0; c < n; c++)
            grad_part[c] = share[p] * grad_out[c];
    }
    for (int64_t p = 0; p < parts; p++)
        grad_lses[p] = share[p] == NO_SHARE ? 0 : share[p] * ((real)((double)grad_lses[p] - mean) + of_lse);
}
