/* A tile from the first key to the last: the loop that all kinds of attention share.
 *
 * For each block of FA_BLOCK keys: pack the keys once, then for each group of ROWS query rows
 *
 *     visible keys -> scores -> rules -> weights -> weighted sum -> state
 *
 * Keys lie in the lanes. A step of 256 keys, rather than of one panel, pays for the horizontal maximum and for loading,
 * rescaling and storing the output once in 256 keys; the packed block and the values stay in the second cache while the
 * groups of the tile pass over them, the scores of a group in the first.
 */
#include "tile.inc.h"

#include "dot.inc.h"

#include "additive.inc.h"

#include "values.inc.h"

#include "online_softmax.inc.h"

static void reset_state(const fa_problem *problem, int64_t rows, real *m, real *l)
{
    const real least = problem->activation == FA_SOFTMAX ? -(real)INFINITY : 0; /* the others are relative to nothing */
    for (int64_t r = 0; r < rows; r++)
        m[r] = least;
    memset(l, 0, (size_t)(rows * LANES) * sizeof(real));
}

/* Rows of the group that begins at row `first` of a tile. */
static ALWAYS_INLINE int rows_from(const struct tile *tile, int64_t first, int64_t rows)
{
    return rows - first < tile->group ? (int)(rows - first) : tile->group;
}

/* Clears the outputs of groups that have seen nothing. */
static void clear_unseen(int64_t rows, struct tile *tile)
{
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->span[g] == NO_SPAN)
            memset(tile->o + first * tile->value_row, 0,
                   (size_t)(rows_from(tile, first, rows) * tile->value_row) * sizeof(real));
}

/* The state of group g, rows `first` and on, joins that of the spans before it. */
static NEVER_INLINE void end_span(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                                  struct tile *tile)
{
    const int64_t value_row = tile->value_row, l = first * LANES, o = first * value_row;
    if (!tile->many_spans[g]) {
        reset_state(problem, group, tile->m_all + first, tile->l_all + l);
        memset(tile->o_all + o, 0, (size_t)(group * value_row) * sizeof(real));
        memset(tile->l_error + l, 0, (size_t)(group * LANES) * sizeof(real));
        memset(tile->o_error + o, 0, (size_t)(group * value_row) * sizeof(real));
        tile->many_spans[g] = 1;
    }
    fold(tile->m_all + first, tile->l_all + l, tile->l_error + l, tile->o_all + o, tile->o_error + o, tile->m + first,
         tile->l + l, tile->o + o, group, value_row, scores_are_natural(problem, head));
}

/* The state of a group that has seen several spans becomes that of all of them. */
static void take_totals(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                        struct tile *tile)
{
    end_span(problem, head, g, first, group, tile);
    for (int64_t r = first; r < first + group; r++)
        tile->m[r] = tile->m_all[r];
    for (int64_t c = first * LANES; c < (first + group) * LANES; c += LANES)
        v_store(tile->l + c, v_load(tile->l_all + c) + v_load(tile->l_error + c));
    for (int64_t c = first * tile->value_row; c < (first + group) * tile->value_row; c += LANES)
        v_store(tile->o + c, v_load(tile->o_all + c) + v_load(tile->o_error + c));
}

/* Makes the state of a group that of a span, if it is another's; whether it has seen nothing of it yet. */
static ALWAYS_INLINE int begin_span(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                                    int64_t span, struct tile *tile)
{
    int64_t *own = tile->span + g;
    if (*own == span)
        return 0;
    if (*own != NO_SPAN) {
        end_span(problem, head, g, first, group, tile);
        reset_state(problem, group, tile->m + first, tile->l + first * LANES);
    }
    *own = span;
    return 1;
}

/* Contract: contract.h. */
static void open_tile(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    struct tile *tile = workspace;
    lay_out(tile, problem, rows, head->keys, workspace);
    tile->row = row;
    const double unit = scores_are_natural(problem, head) ? 1 : 1.44269504088896340736;
    const double factor = scale_after_product(problem) ? 1 : problem->scale * unit;
    if (problem->score == FA_ADDITIVE) {
        for (int64_t r = 0; scale_after_product(problem) && r < rows; r++)
            tile->after[r] = problem->scale;
        additive_queries(problem, head, row, rows, factor, tile);
    } else if (scale_after_product(problem)) {
        pack_wide_queries(problem, head, row, rows, tile->group, tile->channels, tile->q, tile->after);
    } else
        pack_queries(problem, head, row, rows, tile->group, (real)factor, tile->channels, tile->q);
    reset_state(problem, rows, tile->m, tile->l);
    for (int64_t g = 0; g < (rows + ROWS - 1) / ROWS; g++) {
        tile->span[g] = NO_SPAN;
        tile->many_spans[g] = 0;
    }
}

/* Where the weight of key j lies, which has a place. */
static ALWAYS_INLINE real *weight(const fa_problem *problem, const fa_head *head, int64_t i, int64_t j)
{
    int64_t first, last;
    weights_range(problem, head, i, &first, &last);
    return (real *)(fa_row(head, &head->weights, i) + (j - first) * (int64_t)sizeof(real));
}

/* The keys [*begin, *end) of a block that a row sees by position and length; where the weight of the first lies. */
static ALWAYS_INLINE real *weights_block(const fa_problem *problem, const fa_head *head, int64_t i, int64_t block,
                                         int *begin, int *end)
{
    rows_range(problem, head, i, 1, block, begin, end);
    if (*begin >= *end)
        return NULL;
    return weight(problem, head, i, block + *begin);
}

/* Hidden keys of a row of the requested weights: -inf, which close_tile turns into 0. */
static void hide_weights(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        real *w = weights_block(problem, head, i + r, block, &begin, &end);
        for (int j = begin; j < end; j++)
            w[j - begin] = -(real)INFINITY;
    }
}

/* Scores, or weights that are not divided yet, of a group into the requested weights, for close_tile to finish. */
static void keep_weights(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block,
                         const real *s)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        real *w = weights_block(problem, head, i + r, block, &begin, &end);
        for (int j = begin; j < end; j++)
            w[j - begin] = s[r * FA_BLOCK + j];
    }
}

/* Asks for rows [begin, end) of a matrix with a row for each query to come into the second cache. */
static ALWAYS_INLINE void prefetch_queries(const fa_head *head, const fa_view *matrix, int64_t begin, int64_t end,
                                           int64_t bytes)
{
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(fa_row(head, matrix, i) + b, 0, 2);
}

/* The scores of a group after softcap, biases and what hides keys; also into the requested weights, which softmax
 * finishes in close_tile. Whether terms of the sum have keys that are not seen. */
static ALWAYS_INLINE int rule_scores(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                     int64_t block, struct visible *visible, struct tile *tile, real *s)
{
    const int rules = scores_change(problem, head);
    const int v_first = visible->lo / LANES, v_last = (visible->hi + LANES - 1) / LANES;
    const int term_lo = term_begin(visible->lo), term_hi = term_end(visible->hi);
    int partial = 0;
    if (rules || visible->use_bits) {
        const key_bits whole = bits_of_range(v_first * LANES, v_last * LANES), terms = bits_of_range(term_lo, term_hi);
        make_bits(visible, group);
        for (int r = 0; r < group; r++) {
            if (rules) {
                const double after = scale_after_product(problem) ? tile->after[i + r - tile->row] : 1;
                apply_rules(problem, head, i + r, r, block, v_first, v_last, after, &visible->bits[r], s, tile->extra,
                            tile->extra + FA_BLOCK);
            } else {
                hide(&whole, &visible->bits[r], s + r * FA_BLOCK);
            }
            partial |= !bits_equal(&visible->bits[r], &terms);
        }
    } else if (!visible->same_for_all || v_first * LANES != visible->lo || v_last * LANES != visible->hi) {
        for (int r = 0; r < group; r++) {
            hide_outside(v_first, v_last, visible->from[r], visible->to[r], s + r * FA_BLOCK);
            partial |= visible->from[r] != term_lo || visible->to[r] != term_hi;
        }
    } /* otherwise whole vectors, all seen: nothing to hide */
    if (head->weights.data && problem->activation == FA_SOFTMAX)
        keep_weights(problem, head, i, group, block, s);
    return partial;
}

/* Scores become weights where they are not softmax's. */
static ALWAYS_INLINE void weigh_pointwise(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                          int64_t block, struct visible *visible, real *s, real *l)
{
    make_bits(visible, group);
    pointwise(problem, s, group, visible->lo / LANES, (visible->hi + LANES - 1) / LANES, visible->bits, l);
    if (head->weights.data)
        keep_weights(problem, head, i, group, block, s);
}

/* The values of the keys [begin, end) of a block, where a sum can read them; rows: that share one. */
static ALWAYS_INLINE struct value_rows values_of(const fa_problem *problem, const fa_head *head, int64_t block,
                                                 int begin, int end, int64_t rows, const struct tile *tile)
{
    const char *values = head->value.data + block * head->value.row;
    if (begin % STEPS == 0 && end % STEPS == 0 && values_in_place(problem, &head->value, rows))
        return (struct value_rows){values, head->value.row};
    copy_values(problem, values, &head->value, begin, end, tile->v, tile->v_row, tile->value_row);
    return (struct value_rows){(const char *)tile->v, tile->v_row * (ptrdiff_t)sizeof(real)};
}

/* The weighted sum of a block joins the output of `rows` rows, whose earlier output shrinks. */
static ALWAYS_INLINE void join_sum(real *o, const real *sum, int rows, int64_t value_row, const real *shrink)
{
    for (int r = 0; r < rows; r++) {
        const vec keep = v_fill(shrink[r]);
        for (int64_t c = r * value_row; c < (r + 1) * value_row; c += LANES)
            v_store(o + c, v_fma(v_load(o + c), keep, v_load(sum + c)));
    }
}

/* The most rows of a tile that see any of so many keys that lie together. */
static ALWAYS_INLINE int64_t rows_seeing(const fa_problem *problem, const fa_head *head, int64_t keys, int64_t rows)
{
    if (problem->left >= rows || problem->right >= rows - problem->left)
        return rows;
    const int64_t most = (keys + problem->left + problem->right) * head->heads;
    return most < rows ? most : rows;
}

/* The next rows of a matrix, to ask memory for while groups take turns with a block. */
struct next_rows {
    const char *data;
    ptrdiff_t row;
    int64_t bytes, rows, rows_per_step; /* of_turn: rows */
    struct prefetch prefetch;           /* used if those are many: a CPU that is asked for much at once waits */
};

/* times: how often a group's product asks; 0: never. */
static ALWAYS_INLINE struct next_rows find_next_rows(const fa_view *matrix, int64_t from, int64_t end, int64_t numbers,
                                                     int64_t turns, int64_t times)
{
    const int64_t rows = end - from < FA_BLOCK ? end - from : FA_BLOCK, rows_per_step = (FA_BLOCK + turns - 1) / turns;
    struct next_rows next = {
        matrix->data + from * matrix->row, matrix->row, bytes_of(matrix, numbers), rows, rows_per_step, {0}};
    if (rows > 0 && rows_per_step * next.bytes > PREFETCH_AT_ONCE)
        next.prefetch = prefetch_of_rows(next.data, next.row, next.bytes, rows, turns * times);
    return next;
}

/* Asks for the rows of a turn, or returns what its product asks for. */
static ALWAYS_INLINE struct prefetch *prefetch_step(struct next_rows *next, int64_t turn)
{
    if (next->prefetch.pace)
        return &next->prefetch;
    const int64_t from = turn * next->rows_per_step, to = from + next->rows_per_step;
    for (int64_t j = from; j < to && j < next->rows; j++)
        for (int64_t b = 0; b < next->bytes; b += 64)
            __builtin_prefetch(next->data + j * next->row + b, 0, 2);
    return NULL;
}

/* One block, of which the tile sees the keys [begin, end). */
static void visit_block(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t block,
                        int begin, int end, int64_t tile_end, struct tile *tile)
{
    const int natural_log = scores_are_natural(problem, head);
    const char *keys = head->key.data + block * head->key.row;
    struct value_rows value = {NULL, 0};
    /* While groups pass over this block, the next one comes from memory, a few rows with each group; in a window that
     * may be the next tile's. */
    const int64_t next = block + FA_BLOCK, groups = (rows_seeing(problem, head, FA_BLOCK, rows) + ROWS - 1) / ROWS;
    const int64_t most_end = problem->left < INT64_MAX ? tile_end + rows / head->heads : tile_end;
    const int64_t fetch_end = most_end < head->key_length ? most_end : head->key_length;
    const int64_t times_k = problem->score == FA_ADDITIVE ? 0 : prefetches_of_product(FA_BLOCK / LANES, tile->channels);
    const int64_t times_v = prefetches_of_product(tile->value_row / LANES, FA_BLOCK);
    struct next_rows next_keys = find_next_rows(&head->key, next, fetch_end, problem->head_dim, groups, times_k);
    struct next_rows next_values = find_next_rows(&head->value, next, fetch_end, problem->value_dim, groups, times_v);
    const int64_t sharing = rows_seeing(problem, head, 1, rows);
    int64_t turn = 0;
    int packed = 0, finite = -1;
    for (int64_t g = 0, first = 0; first < rows; g++, first += ROWS) {
        const int group = rows - first < ROWS ? (int)(rows - first) : ROWS;
        struct visible visible;
        find_visible(problem, head, row + first, group, block, &visible);
        const int lo = visible.lo, hi = visible.hi;
        if (lo >= hi)
            continue;
        if (visible.masked) {
            if (head->weights.data)
                hide_weights(problem, head, row + first, group, block);
            continue;
        }
        if (!packed) {
            if (problem->score == FA_ADDITIVE)
                additive_keys(problem, keys, &head->key, begin, end, tile);
            else
                pack_keys(problem, keys, &head->key, begin, end, tile->channels, tile->k);
            value = values_of(problem, head, block, begin, end, sharing, tile);
            packed = 1;
        }
        const int first_block = tile->span[g] == NO_SPAN;
        const int span_begins = begin_span(problem, head, g, first, group, block / FA_SPAN, tile);
        const int v_first = lo / LANES, v_last = (hi + LANES - 1) / LANES;
        real *s = tile->s, *m = tile->m + first, *l = tile->l + first * LANES;
        const real *q = tile->q + g * group_size(tile->channels);
        struct prefetch *prefetch = prefetch_step(&next_keys, turn);
        if (problem->score == FA_ADDITIVE)
            additive_scores(tile, first, group, v_first, v_last, s);
        else
            dot_scores(q, tile->channels, group, tile->k, v_first, v_last, prefetch, s);

        if (first_block) { /* the output comes too, and the next tile's queries */
            const int64_t next_row = row + rows + first;
            prefetch_queries(head, &head->query, next_row,
                             next_row + ROWS < head->queries ? next_row + ROWS : head->queries,
                             problem->head_dim * (int64_t)sizeof(real));
            prefetch_queries(head, &head->out, row + first, row + first + group,
                             problem->value_dim * (int64_t)sizeof(real));
        }
        const int partial = rule_scores(problem, head, row + first, group, block, &visible, tile, s);
        real shrink[ROWS];
        if (problem->activation != FA_SOFTMAX) {
            weigh_pointwise(problem, head, row + first, group, block, &visible, s, l);
            for (int r = 0; r < group; r++)
                shrink[r] = 1;
        } else if (natural_log) {
            exponentials(s, group, v_first, v_last, 1, m, l, shrink);
        } else {
            exponentials(s, group, v_first, v_last, 0, m, l, shrink);
        }

        if (partial && finite < 0)
            finite = all_finite(value, begin, end, tile->value_row); /* what pads the terms is */
        real *o = tile->o + first * tile->value_row, *sum = span_begins ? o : tile->part;
        prefetch = prefetch_step(&next_values, turn);
        if (partial && !finite) {
            make_bits(&visible, group);
            weighted_sum_of_seen(s, group, visible.bits, value, lo, hi, tile->value_row, sum);
        } else {
            weighted_columns(s, group, value, term_begin(lo), term_end(hi), 0, tile->value_row, tile->value_row, sum, 0,
                             prefetch);
        }
        turn++;
        if (!span_begins)
            join_sum(o, sum, group, tile->value_row, shrink);
    }
}

#include "few.inc.h"

/* Contract: contract.h. */
static void visit_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t key_begin,
                       int64_t key_end, void *workspace)
{
    struct tile *tile = workspace;
    const int64_t step = problem->few ? keys_of_run(rows) : FA_BLOCK;
    for (int64_t from = key_begin, to; from < key_end; from = to) {
        to = from / FA_BLOCK * FA_BLOCK + step < key_end ? from / FA_BLOCK * FA_BLOCK + step : key_end;
        if (!problem->few) {
            const int64_t block = from / FA_BLOCK * FA_BLOCK;
            visit_block(problem, head, row, rows, block, (int)(from - block), (int)(to - block), key_end, tile);
        } else if (rows <= tile->group && scores_are_natural(problem, head)) {
            visit_run(problem, head, row, (int)rows, from, to, tile, 1, 0);
        } else if (rows <= tile->group) {
            visit_run(problem, head, row, (int)rows, from, to, tile, 0, 0);
        } else {
            visit_run(problem, head, row, (int)rows, from, to, tile, scores_are_natural(problem, head), 1);
        }
    }
}

/* n numbers of an output row, divided by the sum of its weights; a multiple of LANES. + 0 makes -0 a 0, so that it does
 * not matter which zeros were added. Whether all are finite. */
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
    const int64_t value_row = (problem->value_dim + LANES - 1) / LANES * LANES;
    const int64_t numbers = (rows + LANES - 1) / LANES * LANES + rows * (LANES + value_row);
    return ((size_t)numbers * sizeof(real) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

/* Contract: contract.h. */
static void save_span(const fa_problem *problem, int64_t rows, void *workspace, void *span)
{
    struct tile *tile = workspace;
    real *m = span, *l = m + (rows + LANES - 1) / LANES * LANES, *o = l + rows * LANES;
    (void)problem;
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
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group) {
        if (tile->span[g] != NO_SPAN)
            end_span(problem, head, g, first, rows_from(tile, first, rows), tile);
        tile->span[g] = JOINED_SPAN;
    }
    memcpy(tile->m, m, (size_t)rows * sizeof(real));
    memcpy(tile->l, l, (size_t)(rows * LANES) * sizeof(real));
    memcpy(tile->o, o, (size_t)(rows * tile->value_row) * sizeof(real));
}

/* What the sum of a row's weighted values, row r of the tile, is to be multiplied by; and the row's log-sum-exp. 0: it
 * has seen nothing. */
static ALWAYS_INLINE real row_factor(const fa_problem *problem, const fa_head *head, int64_t r, const struct tile *tile,
                                     const int natural_log, double *lse, int *seen)
{
    real sum = v_total(v_load(tile->l + r * LANES));
    if (problem->activation == FA_SIGMOID)
        sum = sum > 0; /* its weights are not divided by anything */
    double share = 1;  /* of all exponentials, sink included, in those of the keys */
    *seen = sum != 0;
    *lse = sum == 0 ? -INFINITY : 0;
    if (head->lse.data || problem->has_sink) {
        if (sum != 0)
            *lse = (double)tile->m[r] * (natural_log ? 1 : 0.69314718055994530942) + log((double)sum);
        const double sink = problem->has_sink ? per_row(head, &head->sink, tile->row + r) : -INFINITY;
        if (sink != -INFINITY) {
            const double keys_lse = *lse;
            const double most = keys_lse < sink ? sink : keys_lse; /* NaN in the scores stays */
            const double least = keys_lse < sink ? keys_lse : sink;
            *lse = least == -INFINITY ? most : most + log1p(exp(least - most));
            share = exp(keys_lse - *lse);
        }
    }
    return sum == 0 ? 0 : (real)(share / (double)sum);
}

/* The requested weights of row i: visit_block left its scores there; now the row's maximum and sum are known. */
static void finish_weights(const fa_problem *problem, const fa_head *head, int64_t i, real maximum, vec scale,
                           const int natural_log)
{
    int64_t first, last, begin, end;
    weights_range(problem, head, i, &first, &last);
    real *w = weight(problem, head, i, first); /* keys count from `first` on here */
    fa_visible_keys(problem, head, i, 1, &begin, &end);
    if (begin >= end)
        begin = end = first;
    begin -= first, end -= first, last -= first;
    const real most = maximum == -(real)INFINITY ? 0 : maximum;
    memset(w, 0, (size_t)begin * sizeof(real));
    memset(w + end, 0, (size_t)(last - end) * sizeof(real));
    for (int64_t j = begin; j < end; j += LANES) {
        real some[LANES];
        const int n = end - j < LANES ? (int)(end - j) : LANES;
        memset(some, 0, sizeof some);
        memcpy(some, w + j, (size_t)n * sizeof(real));
        vec x = v_load(some);
        ivec gone = x == v_fill(-(real)INFINITY);
        if (problem->activation == FA_SOFTMAX) {
            x -= most;
            x = v_exp2(natural_log ? x * (real)1.44269504088896340736 : x);
        }
        v_store(some, v_pick(gone, (vec){0}, x * scale));
        memcpy(w + j, some, (size_t)n * sizeof(real));
    }
}

/* The state of a tile becomes that of all keys. */
static void gather_spans(const fa_problem *problem, const fa_head *head, int64_t rows, struct tile *tile)
{
    clear_unseen(rows, tile);
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->many_spans[g])
            take_totals(problem, head, g, first, rows_from(tile, first, rows), tile);
}

/* Outputs that are not finite, once more from the first key on, with values that are 2**64 times smaller: where a sum
 * overflowed before it was divided, they are finite now. The others keep their bits, and so do those that are infinite
 * or NaN by right. */
static NEVER_INLINE void sum_again(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                   struct tile *tile)
{
    fa_problem smaller = *problem;
    fa_head bare = *head;
    int64_t begin, end, stop;
    double lse;
    int seen;
    smaller.value_shift = 64;
    bare.weights.data = bare.lse.data = NULL; /* they are finished */
    open_tile(&smaller, &bare, row, rows, tile);
    fa_visible_keys(&smaller, &bare, row, rows, &begin, &end);
    for (; begin < end; begin = stop) {
        stop = (begin / FA_SPAN + 1) * FA_SPAN < end ? (begin / FA_SPAN + 1) * FA_SPAN : end;
        visit_keys(&smaller, &bare, row, rows, begin, stop, tile);
    }
    gather_spans(&smaller, &bare, rows, tile);
    const real shrunk = value_factor(&smaller), most = (BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX) * shrunk;
    for (int64_t r = 0; r < rows; r++) {
        const real factor = row_factor(&smaller, &bare, r, tile, scores_are_natural(problem, head), &lse, &seen);
        const real *o = tile->o + r * tile->value_row;
        char *to = fa_row(head, &head->out, row + r);
        gather(tile->part, to, head->out.col, problem->value_dim, problem->dtype);
        for (int64_t c = 0; c < problem->value_dim; c++) {
            real x = o[c] * factor;
            /* Rounding must not carry a mean beyond the largest of its numbers. */
            if (problem->activation == FA_SOFTMAX && isfinite(x))
                x = x > most ? most : x < -most ? -most : x;
            if (!isfinite(tile->part[c]))
                tile->part[c] = x / shrunk;
        }
        scatter(to, head->out.col, tile->part, problem->value_dim, problem->dtype);
    }
}

/* Contract: contract.h. */
static void close_tile(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    struct tile *tile = workspace;
    const int natural_log = scores_are_natural(problem, head);
    const int direct =
        problem->dtype == (REAL_DTYPE) && head->out.col == (ptrdiff_t)sizeof(real) && problem->value_dim % LANES == 0;
    int finite = 1;
    gather_spans(problem, head, rows, tile);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t i = row + r;
        double lse;
        int seen;
        real *o = tile->o + r * tile->value_row;
        const real factor = row_factor(problem, head, r, tile, natural_log, &lse, &seen);
        const vec scale = v_fill(factor);
        char *to = fa_row(head, &head->out, i);
        if (direct) {
            finite &= finish_row((real *)to, o, problem->value_dim, scale, seen);
        } else {
            finite &= finish_row(o, o, tile->value_row, scale, seen);
            scatter(to, head->out.col, o, problem->value_dim, problem->dtype);
        }
        if (head->lse.data) {
            const real rounded = (real)lse;
            memcpy(fa_row(head, &head->lse, i), &rounded, sizeof rounded);
        }
        if (head->weights.data)
            finish_weights(problem, head, i, tile->m[r], scale, natural_log);
    }
    if (!finite)
        sum_again(problem, head, row, rows, tile);
}
