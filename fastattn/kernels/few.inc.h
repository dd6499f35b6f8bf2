/* Few queries, of which there may be several heads: keys and values are read where they lie, a long run of keys and
 * then a long run of values, for memory is what takes the time.
 *
 * Up to FEW_ROWS rows read each vector once, from memory. More rows are groups of up to ROWS, as equal as they can be,
 * which pass one after the other over what is in the first cache by then.
 */

/* A run of keys, and what is found in it from one phase to the next. */
typedef struct {
    int64_t begin, end, from; /* keys [begin, end); the first block begins at `from` */
    int blocks;
    /* [block][group]: with several groups, blocks are fewer (keys_of_run) */
    group_sight sights[FA_SPAN / FA_BLOCK];
    int partial[FA_SPAN / FA_BLOCK]; /* whether terms of the sum have keys that are not seen */
    /* [block][row]: what weights are relative to, and what earlier sums must be multiplied by */
    vec most[NAME(ROWS_OF_RUN)];
    real shrink[NAME(ROWS_OF_RUN)];
    int fresh[(FA_FEW + ROWS - 1) / ROWS]; /* groups that have seen nothing of this span before */
} NAME(run);

/* Rows of group g of a tile; several: it has more than one. */
static ALWAYS_INLINE int NAME(rows_of_group)(const NAME(tile) * tile, int rows, int g, const int several)
{
    return several ? NAME(rows_from)(tile, g * tile->group, rows) : rows;
}

static ALWAYS_INLINE int NAME(groups_of)(const NAME(tile) * tile, int rows, const int several)
{
    return several ? (rows + tile->group - 1) / tile->group : 1;
}

/* Scores of several groups, at s, against the keys [lo, hi) of a block, of which a group may see less. */
static NEVER_INLINE void NAME(pass_keys)(const fa_problem *problem, const fa_head *head, int rows, int64_t block,
                                         const group_sight *sight, int lo, int hi, NAME(tile) * tile, real *s)
{
    const fa_view *key = &head->key;
    const int64_t channels = problem->head_dim, bytes = channels * (int64_t)sizeof(real);
    const int64_t fitting = bytes ? PASS_BYTES / bytes / LANES * LANES : PASS_KEYS;
    const int pass = fitting < LANES ? LANES : fitting < PASS_KEYS ? (int)fitting : PASS_KEYS;
    const int in_place = NAME(readable)(problem->score_dtype, key);
    const ptrdiff_t ahead = NAME(rows_ahead)(channels) * key->row;
    const fa_view gathered = {(char *)(tile->k + 4 * channels), bytes, sizeof(real), 0};
    for (int c = lo / LANES * LANES; c < hi; c += pass) {
        const char *keys = key->data + (block + c) * key->row;
        const int last = hi - c < pass ? hi - c : pass;
        for (int j = lo > c ? lo - c : 0; j < last && !in_place; j++) {
            NAME(fetch)(keys + j * key->row + ahead, channels);
            NAME(gather)
            ((real *)(gathered.data + j * bytes), keys + j * key->row, key->col, channels, problem->score_dtype);
        }
        for (int g = 0; g < NAME(groups_of)(tile, rows, 1); g++) {
            const int group = NAME(rows_of_group)(tile, rows, g, 1);
            const int begin = sight[g].lo > c ? sight[g].lo - c : 0,
                      end = sight[g].hi - c < last ? sight[g].hi - c : last;
            const real *q = tile->q + g * NAME(group_size)(tile->channels);
            real *s_g = s + g * tile->group * FA_BLOCK + c;
            if (begin >= end)
                continue;
            if (in_place)
                NAME(row_scores)(problem, q, group, keys, key, problem->score_dtype, begin, end, ahead, tile->k, s_g);
            else
                NAME(row_scores)(problem, q, group, gathered.data, &gathered, REAL_DTYPE, begin, end, 0, tile->k, s_g);
        }
    }
}

/* All scores of a run, and what its weights will be relative to. */
static ALWAYS_INLINE void NAME(scores_of_run)(const fa_problem *problem, const fa_head *head, int64_t row,
                                              const int rows, NAME(run) * run, NAME(tile) * tile, const int natural,
                                              const int several)
{
    const int groups = NAME(groups_of)(tile, rows, several);
    const ptrdiff_t ahead = NAME(needs_fetching)(problem, rows, problem->head_dim, head->key.row)
                                ? NAME(rows_ahead)(problem->head_dim) * head->key.row
                                : 0;
    const int at_once = rows == 1 && !head->mask.data; /* scores of one row lie together, and no block is left out */
    if (at_once) {
        int64_t lo, hi;
        fa_visible_keys(problem, head, row, rows, &lo, &hi);
        lo = (lo > run->begin ? lo : run->begin) - run->from, hi = (hi < run->end ? hi : run->end) - run->from;
        if (lo < hi) {
            NAME(row_scores)
            (problem, tile->q, 1, head->key.data + run->from * head->key.row, &head->key, problem->score_dtype, (int)lo,
             (int)hi, ahead, tile->k, tile->s);
        }
    }
    for (int b = 0; b < run->blocks; b++) {
        const int64_t block = run->from + b * FA_BLOCK;
        group_sight *sights = run->sights + b * groups;
        real *s = tile->s + b * rows * FA_BLOCK;
        int lo = FA_BLOCK, hi = 0;
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = NAME(rows_of_group)(tile, rows, g, several);
            see_block(problem, head, row + first, group, block, sights + g);
            if (sights[g].masked) {
                if (head->weights.data)
                    NAME(hide_weights)(problem, head, row + first, group, block);
                sights[g].hi = sights[g].lo;
            }
            if (sights[g].lo < sights[g].hi) {
                lo = sights[g].lo < lo ? sights[g].lo : lo;
                hi = sights[g].hi > hi ? sights[g].hi : hi;
                run->fresh[g] |= NAME(begin_span)(problem, head, g, first, group, run->begin / FA_SPAN, tile);
            }
        }
        if (several) {
            NAME(pass_keys)(problem, head, rows, block, sights, lo, hi, tile, s);
        } else if (lo < hi && !at_once) {
            NAME(row_scores)
            (problem, tile->q, rows, head->key.data + block * head->key.row, &head->key, problem->score_dtype, lo, hi,
             ahead, tile->k, s);
        }
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = NAME(rows_of_group)(tile, rows, g, several);
            const int v_first = sights[g].lo / LANES, v_last = (sights[g].hi + LANES - 1) / LANES;
            if (sights[g].lo >= sights[g].hi)
                continue;
            run->partial[b * groups + g] =
                NAME(rule_scores)(problem, head, row + first, group, block, sights + g, tile, s + first * FA_BLOCK);
            for (int r = first; r < first + group; r++) {
                vec *most = run->most + b * rows + r;
                run->shrink[b * rows + r] = 1;
                if (problem->activation == FA_SOFTMAX) {
                    *most = NAME(row_maximum)(s + r * FA_BLOCK, v_first, v_last);
                    run->shrink[b * rows + r] = NAME(raise_maximum)(tile->m + r, most, natural)[0];
                }
            }
        }
    }
}

/* Its scores become weights. */
static ALWAYS_INLINE void NAME(weights_of_run)(const fa_problem *problem, const fa_head *head, int64_t row,
                                               const int rows, NAME(run) * run, NAME(tile) * tile, const int natural,
                                               const int several)
{
    const int groups = NAME(groups_of)(tile, rows, several);
    for (int b = 0; b < run->blocks; b++)
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = NAME(rows_of_group)(tile, rows, g, several);
            group_sight *sight = run->sights + b * groups + g;
            const int v_first = sight->lo / LANES, v_last = (sight->hi + LANES - 1) / LANES;
            real *s = tile->s + (b * rows + first) * FA_BLOCK, *l = tile->l + first * LANES;
            if (sight->lo >= sight->hi)
                continue;
            if (problem->activation != FA_SOFTMAX)
                NAME(weigh_pointwise)(problem, head, row + first, group, run->from + b * FA_BLOCK, sight, s, l);
            for (int r = 0; r < group && problem->activation == FA_SOFTMAX; r++, s += FA_BLOCK, l += LANES) {
                const vec sum = NAME(row_weights)(s, v_first, v_last, run->most[b * rows + first + r], natural);
                const vec keep = NAME(fill)(run->shrink[b * rows + first + r]);
                NAME(store)(l, NAME(fma)(NAME(load)(l), keep, sum));
            }
        }
}

/* Weighted sums of groups of rows: of their weights p and the values [begin[g], end[g]) of a block, whole terms, into
 * sum[g]. Values stay in the first cache until all groups have passed. Meanwhile what has the same place from `next` on
 * is asked for: rows of so many bytes, next_row apart. */
static NEVER_INLINE void NAME(pass_values)(const NAME(tile) * tile, int rows, const real *p, NAME(value_rows) value,
                                           const int *begin, const int *end, real *const *sum, const char *next,
                                           ptrdiff_t next_row, int64_t bytes)
{
    const int64_t value_row = tile->value_row;
    const int groups = NAME(groups_of)(tile, rows, 1);
    int lo = FA_BLOCK, hi = 0;
    for (int g = 0; g < groups; g++) {
        lo = begin[g] < end[g] && begin[g] < lo ? begin[g] : lo;
        hi = begin[g] < end[g] && end[g] > hi ? end[g] : hi;
    }
    if (lo >= hi)
        return;
    NAME(asks)
    asks = NAME(lines_to_ask)(next + lo * next_row, next_row, bytes, hi - lo,
                              groups * NAME(times_to_ask)(value_row / LANES, hi - lo));
    for (int t = lo, stop; t < hi; t = stop) {
        stop = (t | (CHUNK - 1)) + 1 < hi ? (t | (CHUNK - 1)) + 1 : hi;
        for (int64_t c = 0; c < value_row; c += NAME(PANEL)) {
            const int64_t columns = value_row - c < NAME(PANEL) ? value_row - c : NAME(PANEL);
            for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
                const int from = begin[g] > t ? begin[g] : t, to = end[g] < stop ? end[g] : stop;
                if (from < to) {
                    NAME(weighted_columns)
                    (p + first * FA_BLOCK, NAME(rows_from)(tile, first, rows), value, from, to, c, columns, value_row,
                     sum[g], from > begin[g], &asks);
                }
            }
        }
    }
}

/* The weighted sums of its values join the output. */
static ALWAYS_INLINE void NAME(sums_of_run)(const fa_problem *problem, const fa_head *head, const int rows,
                                            NAME(run) * run, NAME(tile) * tile, const int several)
{
    enum { MOST_GROUPS = (FA_FEW + ROWS - 1) / ROWS };
    const int groups = NAME(groups_of)(tile, rows, several);
    const int64_t value_row = tile->value_row;
    for (int b = 0; b < run->blocks; b++) {
        const int64_t block = run->from + b * FA_BLOCK;
        const int begin = b ? 0 : (int)(run->begin - run->from);
        const int end = b + 1 < run->blocks ? FA_BLOCK : (int)(run->end - block);
        group_sight *sights = run->sights + b * groups;
        real *s = tile->s + b * rows * FA_BLOCK, *sum[MOST_GROUPS];
        int some = 0, finite = -1, from[MOST_GROUPS], to[MOST_GROUPS];
        for (int g = 0; g < groups; g++)
            some |= sights[g].lo < sights[g].hi;
        if (!some)
            continue;
        const NAME(value_rows) value = NAME(values_of)(problem, head, block, begin, end, rows, tile);
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            sum[g] = (run->fresh[g] ? tile->o : tile->part) + first * value_row;
            from[g] = to[g] = 0;
            if (sights[g].lo >= sights[g].hi)
                continue;
            if (run->partial[b * groups + g] && finite < 0)
                finite = NAME(all_finite)(value, begin, end, value_row);
            if (run->partial[b * groups + g] && !finite) {
                const int group = NAME(rows_of_group)(tile, rows, g, several);
                take_bits(sights + g, group);
                NAME(weighted_sum_of_seen)
                (s + first * FA_BLOCK, group, sights[g].bits, value, sights[g].lo, sights[g].hi, value_row, sum[g]);
            } else {
                from[g] = NAME(term_begin)(sights[g].lo), to[g] = NAME(term_end)(sights[g].hi);
            }
        }
        if (rows > FEW_ROWS) {
            /* What is copied has been read for this block: the next one is asked for. */
            const int copied = value.data == (const char *)tile->v;
            const ptrdiff_t ahead = copied ? FA_BLOCK : VALUES_AHEAD * NAME(rows_ahead)(problem->value_dim);
            NAME(pass_values)
            (tile, rows, s, value, from, to, sum, head->value.data + (block + ahead) * head->value.row, head->value.row,
             NAME(bytes_of)(&head->value, problem->value_dim));
        } else if (from[0] < to[0]) {
            NAME(streamed_sum)(problem, s, rows, value, from[0], to[0], value_row, sum[0], tile->chunk);
        }
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            if (sights[g].lo >= sights[g].hi)
                continue;
            if (!run->fresh[g]) {
                NAME(join_sum)
                (tile->o + first * value_row, sum[g], NAME(rows_of_group)(tile, rows, g, several), value_row,
                 run->shrink + b * rows + first);
            }
            run->fresh[g] = 0;
        }
    }
}

/* A run of keys: what little there is to do between keys and values holds memory up, so it is done once in a run, and
 * not once in a block. */
static ALWAYS_INLINE void NAME(visit_run)(const fa_problem *problem, const fa_head *head, int64_t row, const int rows,
                                          int64_t key_begin, int64_t key_end, NAME(tile) * tile, const int natural,
                                          const int several)
{
    NAME(run) run;
    run.begin = key_begin, run.end = key_end, run.from = key_begin / FA_BLOCK * FA_BLOCK;
    run.blocks = (int)((key_end - run.from + FA_BLOCK - 1) / FA_BLOCK);
    for (int g = 0; g < NAME(groups_of)(tile, rows, several); g++)
        run.fresh[g] = 0;
    NAME(scores_of_run)(problem, head, row, rows, &run, tile, natural, several);
    NAME(weights_of_run)(problem, head, row, rows, &run, tile, natural, several);
    NAME(sums_of_run)(problem, head, rows, &run, tile, several);
}
