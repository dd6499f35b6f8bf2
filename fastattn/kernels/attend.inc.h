/* A tile from its first key to its last: the loop that all kinds of attention share.
 *
 *     open_tile -> for each block of keys:  visible keys -> scores -> rules -> weights -> weighted sum -> state
 *               -> close_tile
 *
 * The block is prefill's (prefill.inc.h) or, for few queries, decode's (decode.inc.h). */

/* The state of a tile that has seen nothing. */
static void begin_tile(const fa_problem *problem, int64_t rows, struct tile *tile)
{
    reset_state(problem, rows, tile->m, tile->l);
    for (int64_t g = 0; g < (rows + ROWS - 1) / ROWS; g++) {
        tile->span[g] = NO_SPAN;
        tile->many_spans[g] = 0;
    }
}

/* Contract: contract.h. */
static void open_tile(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    struct tile *tile = workspace;
    lay_out(tile, problem, rows, head->keys, GROUPS * ROWS, 0, workspace);
    tile->row = row;
    const double unit = scores_in_nats(problem, head) ? 1 : 1.44269504088896340736;
    const double factor = scale_after_product(problem) ? 1 : problem->scale * unit;
    if (problem->score == FA_ADDITIVE) {
        for (int64_t r = 0; scale_after_product(problem) && r < rows; r++)
            tile->after[r] = problem->scale;
        additive_queries(problem, head, row, rows, factor, tile);
    } else if (scale_after_product(problem)) {
        pack_wide_queries(problem, head, row, rows, tile->group, tile->channels, tile->q, tile->after);
    } else
        pack_queries(problem, head, row, rows, tile->group, (real)factor, tile->channels, tile->q);
    if (problem->has_center)
        find_centers(problem, head, row, rows, tile->center);
    if (is_sparse(problem))
        open_sparse(problem, head, row, rows, &tile->sparse);
    begin_tile(problem, rows, tile);
}

/* Contract: contract.h. */
static void visit_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t key_begin,
                       int64_t key_end, void *workspace)
{
    struct tile *tile = workspace;
    const int64_t step = problem->decode ? keys_of_run(rows) : FA_BLOCK;
    for (int64_t from = key_begin, to; from < key_end; from = to) {
        to = from / FA_BLOCK * FA_BLOCK + step < key_end ? from / FA_BLOCK * FA_BLOCK + step : key_end;
        if (!problem->decode) {
            const int64_t block = from / FA_BLOCK * FA_BLOCK;
            visit_block(problem, head, row, rows, block, (int)(from - block), (int)(to - block), key_end, tile);
        } else if (rows <= tile->group && scores_in_nats(problem, head)) {
            visit_run(problem, head, row, (int)rows, from, to, tile, 1, 0);
        } else if (rows <= tile->group) {
            visit_run(problem, head, row, (int)rows, from, to, tile, 0, 0);
        } else {
            visit_run(problem, head, row, (int)rows, from, to, tile, scores_in_nats(problem, head), 1);
        }
    }
}

/* Divides n numbers of an output row, a multiple of LANES, by the sum of its weights; returns whether all are finite.
 * Adding 0 turns -0 into 0, so that it does not matter which zeros were added. */
static ALWAYS_INLINE int finish_row(real *to, const real *o, int64_t n, vec scale, int seen)
{
    vec sum = {0};
    for (int64_t c = 0; c < n; c += LANES) {
        const vec x = seen ? v_load(o + c) * scale + (vec){0} : (vec){0};
        sum = v_fma(x, (vec){0}, sum);
        v_store(to + c, x);
    }
    return !v_true_bits(sum != (vec){0});
}

/* Contract: contract.h. */
static size_t span_size(const fa_problem *problem, int64_t rows)
{
    if (is_sparse(problem))
        return scores_size(rows);
    const int64_t value_row = (problem->value_dim + LANES - 1) / LANES * LANES;
    const int64_t numbers = (rows + LANES - 1) / LANES * LANES + rows * (LANES + value_row);
    return ((size_t)numbers * sizeof(real) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

/* Contract: contract.h. */
static void save_span(const fa_problem *problem, int64_t rows, void *workspace, void *span)
{
    struct tile *tile = workspace;
    real *m = span, *l = m + (rows + LANES - 1) / LANES * LANES, *o = l + rows * LANES;
    if (is_sparse(problem)) {
        save_scores(rows, &tile->sparse, span);
        return;
    }
    clear_unseen(rows, tile);
    memcpy(m, tile->m, (size_t)rows * sizeof(real));
    memcpy(l, tile->l, (size_t)(rows * LANES) * sizeof(real));
    memcpy(o, tile->o, (size_t)(rows * tile->value_row) * sizeof(real));
}

/* Contract: contract.h. */
static void join_span(const fa_problem *problem, const fa_head *head, int64_t rows, void *workspace, const void *span)
{
    struct tile *tile = workspace;
    const real *m = span, *l = m + (rows + LANES - 1) / LANES * LANES, *o = l + rows * LANES;
    if (is_sparse(problem)) {
        join_scores(rows, &tile->sparse, span);
        return;
    }
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group) {
        if (tile->span[g] != NO_SPAN)
            end_span(problem, head, g, first, rows_from(tile, first, rows), tile);
        tile->span[g] = JOINED_SPAN;
    }
    memcpy(tile->m, m, (size_t)rows * sizeof(real));
    memcpy(tile->l, l, (size_t)(rows * LANES) * sizeof(real));
    memcpy(tile->o, o, (size_t)(rows * tile->value_row) * sizeof(real));
}

/* After all keys are visited: the state of the tile becomes that of all keys. */
static void gather_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, struct tile *tile)
{
    if (is_sparse(problem))
        weigh_sparse(problem, head, row, rows, tile);
    gather_spans(problem, head, rows, tile);
    for (int64_t r = 0; is_sparse(problem) && r < rows; r++) { /* weights sum to 1 already */
        v_store(tile->l + r * LANES, (vec){0});
        tile->l[r * LANES] = tile->sparse.total[r];
    }
    for (int64_t r = 0; problem->value_scales == FA_SCALE_CHANNELS && r < rows; r++)
        scale_channels(&head->view[FA_VALUE_SCALE], 0, problem->value_dim, tile->o + r * tile->value_row);
}

/* Recomputes the rows with values scaled by 2**-64, and takes the outputs that were not finite from there: sums that
 * overflowed before the division are now finite. The others keep their bits, as do outputs that really are infinite or
 * NaN. */
static NEVER_INLINE void sum_again(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                   struct tile *tile)
{
    fa_problem smaller = *problem;
    fa_head bare = *head;
    int64_t cursor = 0, begin, end, stop;
    double lse;
    int seen;
    smaller.value_shift = 64;
    bare.view[FA_WEIGHTS].data = bare.view[FA_LSE].data = NULL; /* already finished */
    open_tile(&smaller, &bare, row, rows, tile);
    while (fa_next_range(&smaller, &bare, row, rows, &cursor, &begin, &end))
        for (; begin < end; begin = stop) {
            stop = (begin / FA_SPAN + 1) * FA_SPAN < end ? (begin / FA_SPAN + 1) * FA_SPAN : end;
            visit_keys(&smaller, &bare, row, rows, begin, stop, tile);
        }
    gather_keys(&smaller, &bare, row, rows, tile);
    const real shrunk = value_factor(&smaller), most = (BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX) * shrunk;
    for (int64_t r = 0; r < rows; r++) {
        const real factor = row_factor(&smaller, &bare, r, tile, scores_in_nats(problem, head), &lse, &seen);
        const real *o = tile->o + r * tile->value_row;
        char *to = fa_row(head, &head->view[FA_OUT], row + r);
        gather(tile->part, to, head->view[FA_OUT].col, problem->value_dim, head->view[FA_OUT].dtype);
        for (int64_t c = 0; c < problem->value_dim; c++) {
            real x = o[c] * factor;
            /* Rounding must not carry a mean beyond the largest value. */
            if ((problem->activation == FA_SOFTMAX || is_sparse(problem)) && isfinite(x))
                x = x > most ? most : x < -most ? -most : x;
            if (!isfinite(tile->part[c]))
                tile->part[c] = x / shrunk;
        }
        scatter(to, head->view[FA_OUT].col, tile->part, problem->value_dim, head->view[FA_OUT].dtype);
    }
}

/* Contract: contract.h. */
static void close_tile(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    struct tile *tile = workspace;
    const int natural_log = scores_in_nats(problem, head);
    const int direct = head->view[FA_OUT].dtype == REAL_DTYPE && head->view[FA_OUT].col == (ptrdiff_t)sizeof(real) &&
                       problem->value_dim % LANES == 0;
    int finite = 1;
    gather_keys(problem, head, row, rows, tile);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t i = row + r;
        double lse;
        int seen;
        real *o = tile->o + r * tile->value_row;
        const real factor = row_factor(problem, head, r, tile, natural_log, &lse, &seen);
        const vec scale = v_fill(factor);
        char *to = fa_row(head, &head->view[FA_OUT], i);
        if (tile->exact) {
            const real rounded = v_total(v_load(o + tile->value_row - LANES));
            const real of_sum = rounded > 0 ? factor * (v_total(v_load(tile->l + r * LANES)) / rounded) : factor;
            tile->exact[r] |= !finish_row(o, o, tile->value_row, v_fill(of_sum), seen);
            scatter(to, head->view[FA_OUT].col, o, problem->value_dim, head->view[FA_OUT].dtype);
        } else if (direct) {
            finite &= finish_row((real *)to, o, problem->value_dim, scale, seen);
        } else {
            finite &= finish_row(o, o, tile->value_row, scale, seen);
            scatter(to, head->view[FA_OUT].col, o, problem->value_dim, head->view[FA_OUT].dtype);
        }
        if (head->view[FA_LSE].data) {
            const real rounded = (real)lse;
            memcpy(fa_row(head, &head->view[FA_LSE], i), &rounded, sizeof rounded);
        }
        if (head->view[FA_WEIGHTS].data)
            finish_weights(problem, head, i, tile->m[r], scale, is_sparse(problem) ? tile->sparse.threshold + r : NULL,
                           natural_log);
    }
    if (!finite)
        sum_again(problem, head, row, rows, tile);
}
