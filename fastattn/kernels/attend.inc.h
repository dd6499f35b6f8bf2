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

static void NAME(reset_state)(const fa_problem *problem, int64_t rows, real *m, real *l)
{
    const real least = problem->activation == FA_SOFTMAX ? -(real)INFINITY : 0; /* the others are relative to nothing */
    for (int64_t r = 0; r < rows; r++)
        m[r] = least;
    memset(l, 0, (size_t)(rows * LANES) * sizeof(real));
}

/* Rows of the group that begins at row `first` of a tile. */
static ALWAYS_INLINE int NAME(rows_from)(const NAME(tile) * tile, int64_t first, int64_t rows)
{
    return rows - first < tile->group ? (int)(rows - first) : tile->group;
}

/* Clears the outputs of groups that have seen nothing. */
static void NAME(clear_unseen)(int64_t rows, NAME(tile) * tile)
{
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->span[g] == NO_SPAN)
            memset(tile->o + first * tile->value_row, 0,
                   (size_t)(NAME(rows_from)(tile, first, rows) * tile->value_row) * sizeof(real));
}

/* The state of group g, rows `first` and on, joins that of the spans before it. */
static NEVER_INLINE void NAME(end_span)(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first,
                                        int group, NAME(tile) * tile)
{
    const int64_t value_row = tile->value_row, l = first * LANES, o = first * value_row;
    if (!tile->several[g]) {
        NAME(reset_state)(problem, group, tile->m_all + first, tile->l_all + l);
        memset(tile->o_all + o, 0, (size_t)(group * value_row) * sizeof(real));
        memset(tile->l_lost + l, 0, (size_t)(group * LANES) * sizeof(real));
        memset(tile->o_lost + o, 0, (size_t)(group * value_row) * sizeof(real));
        tile->several[g] = 1;
    }
    NAME(fold)
    (tile->m_all + first, tile->l_all + l, tile->l_lost + l, tile->o_all + o, tile->o_lost + o, tile->m + first,
     tile->l + l, tile->o + o, group, value_row, NAME(natural)(problem, head));
}

/* The state of a group that has seen several spans becomes that of all of them. */
static void NAME(take_totals)(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                              NAME(tile) * tile)
{
    NAME(end_span)(problem, head, g, first, group, tile);
    for (int64_t r = first; r < first + group; r++)
        tile->m[r] = tile->m_all[r];
    for (int64_t c = first * LANES; c < (first + group) * LANES; c += LANES)
        NAME(store)(tile->l + c, NAME(load)(tile->l_all + c) + NAME(load)(tile->l_lost + c));
    for (int64_t c = first * tile->value_row; c < (first + group) * tile->value_row; c += LANES)
        NAME(store)(tile->o + c, NAME(load)(tile->o_all + c) + NAME(load)(tile->o_lost + c));
}

/* Makes the state of a group that of a span, if it is another's; whether it has seen nothing of it yet. */
static ALWAYS_INLINE int NAME(begin_span)(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first,
                                          int group, int64_t span, NAME(tile) * tile)
{
    int64_t *own = tile->span + g;
    if (*own == span)
        return 0;
    if (*own != NO_SPAN) {
        NAME(end_span)(problem, head, g, first, group, tile);
        NAME(reset_state)(problem, group, tile->m + first, tile->l + first * LANES);
    }
    *own = span;
    return 1;
}

/* Contract: fastattn.h. */
static void NAME(open_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    NAME(tile) *tile = workspace;
    NAME(lay_out)(tile, problem, rows, head->keys, workspace);
    tile->row = row;
    const double unit = NAME(natural)(problem, head) ? 1 : 1.44269504088896340736;
    const double factor = NAME(late_scale)(problem) ? 1 : problem->scale * unit;
    if (problem->score == FA_ADDITIVE) {
        for (int64_t r = 0; NAME(late_scale)(problem) && r < rows; r++)
            tile->after[r] = problem->scale;
        NAME(additive_queries)(problem, head, row, rows, factor, tile);
    } else if (NAME(late_scale)(problem)) {
        NAME(pack_wide_queries)(problem, head, row, rows, tile->group, tile->channels, tile->q, tile->after);
    } else
        NAME(pack_queries)(problem, head, row, rows, tile->group, (real)factor, tile->channels, tile->q);
    NAME(reset_state)(problem, rows, tile->m, tile->l);
    for (int64_t g = 0; g < (rows + ROWS - 1) / ROWS; g++) {
        tile->span[g] = NO_SPAN;
        tile->several[g] = 0;
    }
}

/* Where the weight of key j lies, which has a place. */
static ALWAYS_INLINE real *NAME(weight)(const fa_problem *problem, const fa_head *head, int64_t i, int64_t j)
{
    int64_t first, last;
    weights_range(problem, head, i, &first, &last);
    return (real *)(fa_row(head, &head->weights, i) + (j - first) * (int64_t)sizeof(real));
}

/* The keys [*begin, *end) of a block that a row sees by position and length; where the weight of the first lies. */
static ALWAYS_INLINE real *NAME(weights_block)(const fa_problem *problem, const fa_head *head, int64_t i, int64_t block,
                                               int *begin, int *end)
{
    rows_range(problem, head, i, 1, block, begin, end);
    if (*begin >= *end)
        return NULL;
    return NAME(weight)(problem, head, i, block + *begin);
}

/* Hidden keys of a row of the requested weights: -inf, which close_tile turns into 0. */
static void NAME(hide_weights)(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        real *w = NAME(weights_block)(problem, head, i + r, block, &begin, &end);
        for (int j = begin; j < end; j++)
            w[j - begin] = -(real)INFINITY;
    }
}

/* Scores, or weights that are not divided yet, of a group into the requested weights, for close_tile to finish. */
static void NAME(keep_weights)(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block,
                               const real *s)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        real *w = NAME(weights_block)(problem, head, i + r, block, &begin, &end);
        for (int j = begin; j < end; j++)
            w[j - begin] = s[r * FA_BLOCK + j];
    }
}

/* Asks for rows [begin, end) of a matrix with a row for each query to come into the second cache. */
static ALWAYS_INLINE void NAME(prefetch_queries)(const fa_head *head, const fa_view *matrix, int64_t begin, int64_t end,
                                                 int64_t bytes)
{
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(fa_row(head, matrix, i) + b, 0, 2);
}

/* The scores of a group after softcap, biases and what hides keys; also into the requested weights, which softmax
 * finishes in close_tile. Whether terms of the sum have keys that are not seen. */
static ALWAYS_INLINE int NAME(rule_scores)(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                           int64_t block, group_sight *sight, NAME(tile) * tile, real *s)
{
    const int rules = NAME(ruled)(problem, head);
    const int v_first = sight->lo / LANES, v_last = (sight->hi + LANES - 1) / LANES;
    const int term_lo = NAME(term_begin)(sight->lo), term_hi = NAME(term_end)(sight->hi);
    int partial = 0;
    if (rules || sight->has_bits) {
        const key_bits whole = bits_of_range(v_first * LANES, v_last * LANES), terms = bits_of_range(term_lo, term_hi);
        take_bits(sight, group);
        for (int r = 0; r < group; r++) {
            if (rules) {
                const double after = NAME(late_scale)(problem) ? tile->after[i + r - tile->row] : 1;
                NAME(apply_rules)
                (problem, head, i + r, r, block, v_first, v_last, after, &sight->bits[r], s, tile->extra,
                 tile->extra + FA_BLOCK);
            } else {
                NAME(hide)(&whole, &sight->bits[r], s + r * FA_BLOCK);
            }
            partial |= !bits_equal(&sight->bits[r], &terms);
        }
    } else if (!sight->alike || v_first * LANES != sight->lo || v_last * LANES != sight->hi) {
        for (int r = 0; r < group; r++) {
            NAME(hide_outside)(v_first, v_last, sight->from[r], sight->to[r], s + r * FA_BLOCK);
            partial |= sight->from[r] != term_lo || sight->to[r] != term_hi;
        }
    } /* otherwise whole vectors, all seen: nothing to hide */
    if (head->weights.data && problem->activation == FA_SOFTMAX)
        NAME(keep_weights)(problem, head, i, group, block, s);
    return partial;
}

/* Scores become weights where they are not softmax's. */
static ALWAYS_INLINE void NAME(weigh_pointwise)(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                                int64_t block, group_sight *sight, real *s, real *l)
{
    take_bits(sight, group);
    NAME(pointwise)(problem, s, group, sight->lo / LANES, (sight->hi + LANES - 1) / LANES, sight->bits, l);
    if (head->weights.data)
        NAME(keep_weights)(problem, head, i, group, block, s);
}

/* The values of the keys [begin, end) of a block, where a sum can read them; rows: that share one. */
static ALWAYS_INLINE NAME(value_rows) NAME(values_of)(const fa_problem *problem, const fa_head *head, int64_t block,
                                                      int begin, int end, int64_t rows, const NAME(tile) * tile)
{
    const char *values = head->value.data + block * head->value.row;
    if (begin % STEPS == 0 && end % STEPS == 0 && NAME(values_in_place)(problem, &head->value, rows))
        return (NAME(value_rows)){values, head->value.row};
    NAME(copy_values)(problem, values, &head->value, begin, end, tile->v, tile->v_row, tile->value_row);
    return (NAME(value_rows)){(const char *)tile->v, tile->v_row * (ptrdiff_t)sizeof(real)};
}

/* The weighted sum of a block joins the output of `rows` rows, whose earlier output shrinks. */
static ALWAYS_INLINE void NAME(join_sum)(real *o, const real *sum, int rows, int64_t value_row, const real *shrink)
{
    for (int r = 0; r < rows; r++) {
        const vec keep = NAME(fill)(shrink[r]);
        for (int64_t c = r * value_row; c < (r + 1) * value_row; c += LANES)
            NAME(store)(o + c, NAME(fma)(NAME(load)(o + c), keep, NAME(load)(sum + c)));
    }
}

/* The most rows of a tile that see any of so many keys that lie together. */
static ALWAYS_INLINE int64_t NAME(rows_seeing)(const fa_problem *problem, const fa_head *head, int64_t keys,
                                               int64_t rows)
{
    if (problem->left >= rows || problem->right >= rows - problem->left)
        return rows;
    const int64_t most = (keys + problem->left + problem->right) * head->heads;
    return most < rows ? most : rows;
}

/* The next rows of a matrix, to ask memory for while groups take turns with a block. */
typedef struct {
    const char *data;
    ptrdiff_t row;
    int64_t bytes, rows, of_turn; /* of_turn: rows */
    NAME(asks) asks;              /* used if those are many: a CPU that is asked for much at once waits */
} NAME(coming);

/* times: how often a group's product asks; 0: never. */
static ALWAYS_INLINE NAME(coming)
    NAME(coming_rows)(const fa_view *matrix, int64_t from, int64_t end, int64_t numbers, int64_t turns, int64_t times)
{
    const int64_t rows = end - from < FA_BLOCK ? end - from : FA_BLOCK, of_turn = (FA_BLOCK + turns - 1) / turns;
    NAME(coming)
    coming = {matrix->data + from * matrix->row, matrix->row, NAME(bytes_of)(matrix, numbers), rows, of_turn, {0}};
    if (rows > 0 && of_turn * coming.bytes > BYTES_AT_ONCE)
        coming.asks = NAME(lines_to_ask)(coming.data, coming.row, coming.bytes, rows, turns * times);
    return coming;
}

/* Asks for the rows of a turn, or returns what its product asks for. */
static ALWAYS_INLINE NAME(asks) * NAME(take_turn)(NAME(coming) * coming, int64_t turn)
{
    if (coming->asks.pace)
        return &coming->asks;
    const int64_t from = turn * coming->of_turn, to = from + coming->of_turn;
    for (int64_t j = from; j < to && j < coming->rows; j++)
        for (int64_t b = 0; b < coming->bytes; b += 64)
            __builtin_prefetch(coming->data + j * coming->row + b, 0, 2);
    return NULL;
}

/* One block, of which the tile sees the keys [begin, end). */
static void NAME(visit_block)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t block,
                              int begin, int end, int64_t tile_end, NAME(tile) * tile)
{
    const int natural = NAME(natural)(problem, head);
    const char *keys = head->key.data + block * head->key.row;
    NAME(value_rows) value = {NULL, 0};
    /* While groups pass over this block, the next one comes from memory, a few rows with each group; in a window that
     * may be the next tile's. */
    const int64_t next = block + FA_BLOCK,
                  groups = (NAME(rows_seeing)(problem, head, FA_BLOCK, rows) + ROWS - 1) / ROWS;
    const int64_t most_end = problem->left < INT64_MAX ? tile_end + rows / head->heads : tile_end;
    const int64_t fetch_end = most_end < head->key_length ? most_end : head->key_length;
    const int64_t times_k = problem->score == FA_ADDITIVE ? 0 : NAME(times_to_ask)(FA_BLOCK / LANES, tile->channels);
    const int64_t times_v = NAME(times_to_ask)(tile->value_row / LANES, FA_BLOCK);
    NAME(coming) next_keys = NAME(coming_rows)(&head->key, next, fetch_end, problem->head_dim, groups, times_k);
    NAME(coming) next_values = NAME(coming_rows)(&head->value, next, fetch_end, problem->value_dim, groups, times_v);
    const int64_t sharing = NAME(rows_seeing)(problem, head, 1, rows);
    int64_t turn = 0;
    int packed = 0, finite = -1;
    for (int64_t g = 0, first = 0; first < rows; g++, first += ROWS) {
        const int group = rows - first < ROWS ? (int)(rows - first) : ROWS;
        group_sight sight;
        see_block(problem, head, row + first, group, block, &sight);
        const int lo = sight.lo, hi = sight.hi;
        if (lo >= hi)
            continue;
        if (sight.masked) {
            if (head->weights.data)
                NAME(hide_weights)(problem, head, row + first, group, block);
            continue;
        }
        if (!packed) {
            if (problem->score == FA_ADDITIVE)
                NAME(additive_keys)(problem, keys, &head->key, begin, end, tile);
            else
                NAME(pack_keys)(problem, keys, &head->key, begin, end, tile->channels, tile->k);
            value = NAME(values_of)(problem, head, block, begin, end, sharing, tile);
            packed = 1;
        }
        const int unseen = tile->span[g] == NO_SPAN;
        const int fresh = NAME(begin_span)(problem, head, g, first, group, block / FA_SPAN, tile);
        const int v_first = lo / LANES, v_last = (hi + LANES - 1) / LANES;
        real *s = tile->s, *m = tile->m + first, *l = tile->l + first * LANES;
        const real *q = tile->q + g * NAME(group_size)(tile->channels);
        NAME(asks) *asks = NAME(take_turn)(&next_keys, turn);
        if (problem->score == FA_ADDITIVE)
            NAME(additive_scores)(tile, first, group, v_first, v_last, s);
        else
            NAME(dot_scores)(q, tile->channels, group, tile->k, v_first, v_last, asks, s);

        if (unseen) { /* the output comes too, and the next tile's queries */
            const int64_t next_row = row + rows + first;
            NAME(prefetch_queries)
            (head, &head->query, next_row, next_row + ROWS < head->queries ? next_row + ROWS : head->queries,
             problem->head_dim * (int64_t)sizeof(real));
            NAME(prefetch_queries)
            (head, &head->out, row + first, row + first + group, problem->value_dim * (int64_t)sizeof(real));
        }
        const int partial = NAME(rule_scores)(problem, head, row + first, group, block, &sight, tile, s);
        real shrink[ROWS];
        if (problem->activation != FA_SOFTMAX) {
            NAME(weigh_pointwise)(problem, head, row + first, group, block, &sight, s, l);
            for (int r = 0; r < group; r++)
                shrink[r] = 1;
        } else if (natural) {
            NAME(exponentials)(s, group, v_first, v_last, 1, m, l, shrink);
        } else {
            NAME(exponentials)(s, group, v_first, v_last, 0, m, l, shrink);
        }

        if (partial && finite < 0)
            finite = NAME(all_finite)(value, begin, end, tile->value_row); /* what pads the terms is */
        real *o = tile->o + first * tile->value_row, *sum = fresh ? o : tile->part;
        asks = NAME(take_turn)(&next_values, turn);
        if (partial && !finite) {
            take_bits(&sight, group);
            NAME(weighted_sum_of_seen)(s, group, sight.bits, value, lo, hi, tile->value_row, sum);
        } else {
            NAME(weighted_columns)
            (s, group, value, NAME(term_begin)(lo), NAME(term_end)(hi), 0, tile->value_row, tile->value_row, sum, 0,
             asks);
        }
        turn++;
        if (!fresh)
            NAME(join_sum)(o, sum, group, tile->value_row, shrink);
    }
}

#include "few.inc.h"

/* Contract: fastattn.h. */
static void NAME(visit_keys)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                             int64_t key_begin, int64_t key_end, void *workspace)
{
    NAME(tile) *tile = workspace;
    const int64_t step = problem->few ? NAME(keys_of_run)(rows) : FA_BLOCK;
    for (int64_t from = key_begin, to; from < key_end; from = to) {
        to = from / FA_BLOCK * FA_BLOCK + step < key_end ? from / FA_BLOCK * FA_BLOCK + step : key_end;
        if (!problem->few) {
            const int64_t block = from / FA_BLOCK * FA_BLOCK;
            NAME(visit_block)(problem, head, row, rows, block, (int)(from - block), (int)(to - block), key_end, tile);
        } else if (rows <= tile->group && NAME(natural)(problem, head)) {
            NAME(visit_run)(problem, head, row, (int)rows, from, to, tile, 1, 0);
        } else if (rows <= tile->group) {
            NAME(visit_run)(problem, head, row, (int)rows, from, to, tile, 0, 0);
        } else {
            NAME(visit_run)(problem, head, row, (int)rows, from, to, tile, NAME(natural)(problem, head), 1);
        }
    }
}

/* n numbers of an output row, divided by the sum of its weights; a multiple of LANES. + 0 makes -0 a 0, so that it does
 * not matter which zeros were added. Whether all are finite. */
static ALWAYS_INLINE int NAME(finish_row)(real *to, const real *o, int64_t n, vec scale, int seen)
{
    vec sum = {0};
    for (int64_t c = 0; c < n; c += LANES) {
        const vec x = seen ? NAME(load)(o + c) * scale + (vec){0} : (vec){0};
        sum = NAME(fma)(x, (vec){0}, sum);
        NAME(store)(to + c, x);
    }
    return !NAME(true_bits)(sum != (vec){0});
}

/* Contract: fastattn.h. */
static size_t NAME(span_size)(const fa_problem *problem, int64_t rows)
{
    const int64_t value_row = (problem->value_dim + LANES - 1) / LANES * LANES;
    const int64_t numbers = (rows + LANES - 1) / LANES * LANES + rows * (LANES + value_row);
    return ((size_t)numbers * sizeof(real) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

/* Contract: fastattn.h. */
static void NAME(save_span)(const fa_problem *problem, int64_t rows, void *workspace, void *span)
{
    NAME(tile) *tile = workspace;
    real *m = span, *l = m + (rows + LANES - 1) / LANES * LANES, *o = l + rows * LANES;
    (void)problem;
    NAME(clear_unseen)(rows, tile);
    memcpy(m, tile->m, (size_t)rows * sizeof(real));
    memcpy(l, tile->l, (size_t)(rows * LANES) * sizeof(real));
    memcpy(o, tile->o, (size_t)(rows * tile->value_row) * sizeof(real));
}

/* Contract: fastattn.h. */
static void NAME(join_span)(const fa_problem *problem, const fa_head *head, int64_t rows, void *workspace,
                            const void *span)
{
    NAME(tile) *tile = workspace;
    const real *m = span, *l = m + (rows + LANES - 1) / LANES * LANES, *o = l + rows * LANES;
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group) {
        if (tile->span[g] != NO_SPAN)
            NAME(end_span)(problem, head, g, first, NAME(rows_from)(tile, first, rows), tile);
        tile->span[g] = JOINED_SPAN;
    }
    memcpy(tile->m, m, (size_t)rows * sizeof(real));
    memcpy(tile->l, l, (size_t)(rows * LANES) * sizeof(real));
    memcpy(tile->o, o, (size_t)(rows * tile->value_row) * sizeof(real));
}

/* What the sum of a row's weighted values, row r of the tile, is to be multiplied by; and the row's log-sum-exp. 0: it
 * has seen nothing. */
static ALWAYS_INLINE real NAME(row_factor)(const fa_problem *problem, const fa_head *head, int64_t r,
                                           const NAME(tile) * tile, const int natural, double *lse, int *seen)
{
    real sum = NAME(total)(NAME(load)(tile->l + r * LANES));
    if (problem->activation == FA_SIGMOID)
        sum = sum > 0; /* its weights are not divided by anything */
    double share = 1;  /* of all exponentials, sink included, in those of the keys */
    *seen = sum != 0;
    *lse = sum == 0 ? -INFINITY : 0;
    if (head->lse.data || problem->has_sink) {
        if (sum != 0)
            *lse = (double)tile->m[r] * (natural ? 1 : 0.69314718055994530942) + log((double)sum);
        const double sink = problem->has_sink ? NAME(per_row)(head, &head->sink, tile->row + r) : -INFINITY;
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
static void NAME(finish_weights)(const fa_problem *problem, const fa_head *head, int64_t i, real maximum, vec scale,
                                 const int natural)
{
    int64_t first, last, begin, end;
    weights_range(problem, head, i, &first, &last);
    real *w = NAME(weight)(problem, head, i, first); /* keys count from `first` on here */
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
        vec x = NAME(load)(some);
        ivec gone = x == NAME(fill)(-(real)INFINITY);
        if (problem->activation == FA_SOFTMAX) {
            x -= most;
            x = NAME(exp2)(natural ? x * (real)1.44269504088896340736 : x);
        }
        NAME(store)(some, NAME(pick)(gone, (vec){0}, x * scale));
        memcpy(w + j, some, (size_t)n * sizeof(real));
    }
}

/* The state of a tile becomes that of all keys. */
static void NAME(gather_spans)(const fa_problem *problem, const fa_head *head, int64_t rows, NAME(tile) * tile)
{
    NAME(clear_unseen)(rows, tile);
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->several[g])
            NAME(take_totals)(problem, head, g, first, NAME(rows_from)(tile, first, rows), tile);
}

/* Outputs that are not finite, once more from the first key on, with values that are 2**64 times smaller: where a sum
 * overflowed before it was divided, they are finite now. The others keep their bits, and so do those that are infinite
 * or NaN by right. */
static NEVER_INLINE void NAME(sum_again)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                         NAME(tile) * tile)
{
    fa_problem smaller = *problem;
    fa_head bare = *head;
    int64_t begin, end, stop;
    double lse;
    int seen;
    smaller.value_shift = 64;
    bare.weights.data = bare.lse.data = NULL; /* they are finished */
    NAME(open_tile)(&smaller, &bare, row, rows, tile);
    fa_visible_keys(&smaller, &bare, row, rows, &begin, &end);
    for (; begin < end; begin = stop) {
        stop = (begin / FA_SPAN + 1) * FA_SPAN < end ? (begin / FA_SPAN + 1) * FA_SPAN : end;
        NAME(visit_keys)(&smaller, &bare, row, rows, begin, stop, tile);
    }
    NAME(gather_spans)(&smaller, &bare, rows, tile);
    const real shrunk = NAME(value_factor)(&smaller), most = (BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX) * shrunk;
    for (int64_t r = 0; r < rows; r++) {
        const real factor = NAME(row_factor)(&smaller, &bare, r, tile, NAME(natural)(problem, head), &lse, &seen);
        const real *o = tile->o + r * tile->value_row;
        char *to = fa_row(head, &head->out, row + r);
        NAME(gather)(tile->part, to, head->out.col, problem->value_dim, problem->dtype);
        for (int64_t c = 0; c < problem->value_dim; c++) {
            real x = o[c] * factor;
            /* Rounding must not carry a mean beyond the largest of its numbers. */
            if (problem->activation == FA_SOFTMAX && isfinite(x))
                x = x > most ? most : x < -most ? -most : x;
            if (!isfinite(tile->part[c]))
                tile->part[c] = x / shrunk;
        }
        NAME(scatter)(to, head->out.col, tile->part, problem->value_dim, problem->dtype);
    }
}

/* Contract: fastattn.h. */
static void NAME(close_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    NAME(tile) *tile = workspace;
    const int natural = NAME(natural)(problem, head);
    const int direct =
        problem->dtype == (REAL_DTYPE) && head->out.col == (ptrdiff_t)sizeof(real) && problem->value_dim % LANES == 0;
    int finite = 1;
    NAME(gather_spans)(problem, head, rows, tile);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t i = row + r;
        double lse;
        int seen;
        real *o = tile->o + r * tile->value_row;
        const real factor = NAME(row_factor)(problem, head, r, tile, natural, &lse, &seen);
        const vec scale = NAME(fill)(factor);
        char *to = fa_row(head, &head->out, i);
        if (direct) {
            finite &= NAME(finish_row)((real *)to, o, problem->value_dim, scale, seen);
        } else {
            finite &= NAME(finish_row)(o, o, tile->value_row, scale, seen);
            NAME(scatter)(to, head->out.col, o, problem->value_dim, problem->dtype);
        }
        if (head->lse.data) {
            const real rounded = (real)lse;
            memcpy(fa_row(head, &head->lse, i), &rounded, sizeof rounded);
        }
        if (head->weights.data)
            NAME(finish_weights)(problem, head, i, tile->m[r], scale, natural);
    }
    if (!finite)
        NAME(sum_again)(problem, head, row, rows, tile);
}
