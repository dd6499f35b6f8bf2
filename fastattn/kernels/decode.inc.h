/* Decode: few queries, perhaps of several heads. Keys and values are read in place, a long run of keys and then a long
 * run of values, because reading memory takes the time.
 *
 * Up to DECODE_ROWS rows read each vector once, from memory. More rows form groups of up to ROWS, as equal as possible,
 * which process the same keys one after the other while these are in L1. */

/* A run of keys, and what one phase passes to the next. */
struct run {
    int64_t begin, end, from; /* keys [begin, end); the first block begins at `from` */
    int blocks;
    /* [block][group]; with several groups there are fewer blocks (keys_of_run) */
    struct visible visible[FA_SPAN / FA_BLOCK];
    int partial[FA_SPAN / FA_BLOCK]; /* whether some terms of the sum have hidden keys */
    /* [block][row]: the maximum that weights are relative to, and the factor for earlier sums */
    vec most[ROWS_OF_RUN];
    real shrink[ROWS_OF_RUN];
    int span_begins[(FA_DECODE_TILE + ROWS - 1) / ROWS]; /* groups that this run is the first of a span for */
};

/* Rows of group g of a tile. many_groups: the tile has several. */
static ALWAYS_INLINE int rows_of_group(const struct tile *tile, int rows, int g, const int many_groups)
{
    return many_groups ? rows_from(tile, g * tile->group, rows) : rows;
}

static ALWAYS_INLINE int groups_of(const struct tile *tile, int rows, const int many_groups)
{
    return many_groups ? (rows + tile->group - 1) / tile->group : 1;
}

/* Scores of several groups, at s, against the keys [lo, hi) of a block; a group may see fewer. */
static NEVER_INLINE void pass_keys(const fa_problem *problem, const fa_head *head, int rows, int64_t block,
                                   const struct visible *visible, int lo, int hi, struct tile *tile, real *s)
{
    const fa_view *key = &head->view[FA_KEY];
    const int64_t channels = problem->head_dim, bytes = channels * (int64_t)sizeof(real);
    const int64_t fitting = bytes ? PASS_BYTES / bytes / LANES * LANES : PASS_KEYS;
    const int pass = fitting < LANES ? LANES : fitting < PASS_KEYS ? (int)fitting : PASS_KEYS;
    const struct scales scales = scales_of_copies(problem, head, FA_KEY, block);
    const int in_place = readable(key);
    const ptrdiff_t ahead = rows_ahead(key, channels) * key->row;
    /* behind the four keys that row_scores copies at a time if the others are readable */
    const fa_view gathered = {(char *)(tile->k + 4 * channels), bytes, sizeof(real), 0, REAL_DTYPE};
    for (int c = lo / LANES * LANES; c < hi; c += pass) {
        const char *keys = key->data + (block + c) * key->row;
        const int last = hi - c < pass ? hi - c : pass;
        if (!in_place) {
            const int first = lo > c ? lo - c : 0;
            for (int j = first; j < last; j++)
                prefetch_bytes(keys + j * key->row + ahead, bytes_of(key, channels));
            copy_scaled(keys + first * key->row, key, channels, &scales, c + first, last - first,
                        (real *)gathered.data + first * channels, channels);
        }
        for (int g = 0; g < groups_of(tile, rows, 1); g++) {
            const int group = rows_of_group(tile, rows, g, 1);
            const int begin = visible[g].lo > c ? visible[g].lo - c : 0,
                      end = visible[g].hi - c < last ? visible[g].hi - c : last;
            const real *q = tile->q + g * group_size(tile->channels);
            real *s_g = s + g * tile->group * SCORE_ROW + c;
            if (begin >= end)
                continue;
            if (in_place)
                row_scores(problem, q, group, keys, key, &no_scales, begin, end, ahead, tile->k, s_g);
            else
                row_scores(problem, q, group, gathered.data, &gathered, &no_scales, begin, end, 0, tile->k, s_g);
        }
    }
}

/* Phase 1: all scores of a run, and the maxima that its weights will be relative to. */
static ALWAYS_INLINE void scores_of_run(const fa_problem *problem, const fa_head *head, int64_t row, const int rows,
                                        struct run *run, struct tile *tile, const int natural_log,
                                        const int many_groups)
{
    const int groups = groups_of(tile, rows, many_groups);
    const ptrdiff_t ahead = needs_prefetch(problem, rows, problem->head_dim, &head->view[FA_KEY])
                                ? rows_ahead(&head->view[FA_KEY], problem->head_dim) * head->view[FA_KEY].row
                                : 0;
    const int at_once = rows == 1 && !head->view[FA_MASK].data &&
                        !head->view[FA_BLOCK_MASK].data; /* scores of one row are contiguous, and no block is skipped */
    if (at_once) {
        int64_t lo, hi;
        fa_visible_keys(problem, head, row, rows, &lo, &hi);
        lo = (lo > run->begin ? lo : run->begin) - run->from, hi = (hi < run->end ? hi : run->end) - run->from;
        if (lo < hi) {
            const struct scales scales = scales_of_copies(problem, head, FA_KEY, run->from);
            row_scores(problem, tile->q, 1, head->view[FA_KEY].data + run->from * head->view[FA_KEY].row,
                       &head->view[FA_KEY], &scales, (int)lo, (int)hi, ahead, tile->k, tile->s);
        }
    }
    for (int b = 0; b < run->blocks; b++) {
        const int64_t block = run->from + b * FA_BLOCK;
        struct visible *visible = run->visible + b * groups;
        real *s = tile->s + b * block_of_scores(rows);
        int lo = FA_BLOCK, hi = 0;
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = rows_of_group(tile, rows, g, many_groups);
            find_visible(problem, head, row + first, group, block, visible + g);
            if (visible[g].masked) {
                if (head->view[FA_WEIGHTS].data)
                    hide_weights(problem, head, row + first, group, block);
                visible[g].hi = visible[g].lo;
            }
            if (visible[g].lo < visible[g].hi) {
                lo = visible[g].lo < lo ? visible[g].lo : lo;
                hi = visible[g].hi > hi ? visible[g].hi : hi;
                if (!is_sparse(problem))
                    run->span_begins[g] |= begin_span(problem, head, g, first, group, run->begin / FA_SPAN, tile);
            }
        }
        if (many_groups) {
            pass_keys(problem, head, rows, block, visible, lo, hi, tile, s);
        } else if (lo < hi && !at_once) {
            const struct scales scales = scales_of_copies(problem, head, FA_KEY, block);
            row_scores(problem, tile->q, rows, head->view[FA_KEY].data + block * head->view[FA_KEY].row,
                       &head->view[FA_KEY], &scales, lo, hi, ahead, tile->k, s);
        }
        if (lo < hi && problem->key_scales == FA_SCALE_TOKENS)
            scale_scores(head, block, lo, hi, rows, tile->extra, s);
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = rows_of_group(tile, rows, g, many_groups);
            const int v_first = visible[g].lo / LANES, v_last = (visible[g].hi + LANES - 1) / LANES;
            if (visible[g].lo >= visible[g].hi)
                continue;
            run->partial[b * groups + g] =
                rule_tile(problem, head, row + first, group, block, visible + g, tile, s + first * SCORE_ROW);
            for (int r = first; r < first + group; r++) {
                vec *most = run->most + b * rows + r;
                run->shrink[b * rows + r] = 1;
                if (problem->activation == FA_SOFTMAX) {
                    *most = row_maximum(s + r * SCORE_ROW, v_first, v_last);
                    run->shrink[b * rows + r] = raise_maximum(tile->m + r, most, natural_log)[0];
                }
            }
        }
    }
}

/* Phase 2: scores become weights. */
static ALWAYS_INLINE void weights_of_run(const fa_problem *problem, const fa_head *head, int64_t row, const int rows,
                                         struct run *run, struct tile *tile, const int natural_log,
                                         const int many_groups)
{
    const int groups = groups_of(tile, rows, many_groups);
    for (int b = 0; b < run->blocks; b++)
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const int group = rows_of_group(tile, rows, g, many_groups);
            struct visible *visible = run->visible + b * groups + g;
            const int v_first = visible->lo / LANES, v_last = (visible->hi + LANES - 1) / LANES;
            real *s = tile->s + b * block_of_scores(rows) + first * SCORE_ROW, *l = tile->l + first * LANES;
            if (visible->lo >= visible->hi)
                continue;
            if (problem->activation != FA_SOFTMAX)
                weigh_pointwise(problem, head, row + first, group, run->from + b * FA_BLOCK, visible, s, l);
            for (int r = 0; r < group && problem->activation == FA_SOFTMAX; r++, s += SCORE_ROW, l += LANES) {
                const vec sum = row_weights(s, v_first, v_last, run->most[b * rows + first + r], natural_log);
                const vec keep = v_fill(run->shrink[b * rows + first + r]);
                v_store(l, v_fma(v_load(l), keep, sum));
            }
        }
}

/* Weighted sums for groups of rows: of the weights p and the values [begin[g], end[g]) of a block, whole terms, into
 * sum[g]. Values stay in L1 until all groups have used them; if `copied`, they are copied there chunk by chunk, from a
 * block of which [copied->begin, copied->end) may be read. Meanwhile the corresponding rows from `next` on, of `bytes`
 * bytes and next_row apart, are prefetched. */
static NEVER_INLINE void pass_values(const struct tile *tile, int rows, const real *p, struct value_rows value,
                                     const struct copied *copied, const int *begin, const int *end, real *const *sum,
                                     const char *next, ptrdiff_t next_row, int64_t bytes)
{
    const int64_t value_row = tile->value_row;
    const int groups = groups_of(tile, rows, 1);
    int lo = FA_BLOCK, hi = 0;
    for (int g = 0; g < groups; g++) {
        lo = begin[g] < end[g] && begin[g] < lo ? begin[g] : lo;
        hi = begin[g] < end[g] && end[g] > hi ? end[g] : hi;
    }
    if (lo >= hi)
        return;
    const ptrdiff_t far = copied ? VALUES_AHEAD * rows_ahead(copied->view, copied->problem->value_dim) : 0;
    struct prefetch prefetch = prefetch_of_rows(next + lo * next_row, next_row, bytes, hi - lo,
                                                groups * prefetches_of_product(value_row / LANES, hi - lo));
    for (int t = lo, stop; t < hi; t = stop) {
        stop = (t | (CHUNK - 1)) + 1 < hi ? (t | (CHUNK - 1)) + 1 : hi;
        if (copied) {
            const struct value_rows copy = rows_at(tile->v, tile->v_row * (ptrdiff_t)sizeof(real));
            prefetch_copied(copied, t, stop, far);
            copy_chunk(copied, t, stop, tile);
            value = rows_at(copy.data - t * copy.row, copy.row);
        }
        for (int64_t c = 0; c < value_row; c += PANEL) {
            const int64_t columns = value_row - c < PANEL ? value_row - c : PANEL;
            for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
                const int from = begin[g] > t ? begin[g] : t, to = end[g] < stop ? end[g] : stop;
                if (from < to) {
                    weighted_columns(p + first * SCORE_ROW, rows_from(tile, first, rows), value, from, to, c, columns,
                                     value_row, sum[g], from > begin[g], copied ? NULL : &prefetch, 1, 0);
                }
            }
        }
    }
}

/* Phase 3: the weighted sums of its values are added to the output. */
static ALWAYS_INLINE void sums_of_run(const fa_problem *problem, const fa_head *head, const int rows, struct run *run,
                                      struct tile *tile, const int many_groups)
{
    enum { MOST_GROUPS = (FA_DECODE_TILE + ROWS - 1) / ROWS };
    const int groups = groups_of(tile, rows, many_groups);
    const int64_t value_row = tile->value_row;
    const fa_view *view = &head->view[FA_VALUE];
    const ptrdiff_t rows_of_prefetch = rows_ahead(view, problem->value_dim);
    for (int b = 0; b < run->blocks; b++) {
        const int64_t block = run->from + b * FA_BLOCK;
        const char *values = view->data + block * view->row;
        const int begin = b ? 0 : (int)(run->begin - run->from);
        const int end = b + 1 < run->blocks ? FA_BLOCK : (int)(run->end - block);
        struct visible *visible = run->visible + b * groups;
        real *s = tile->s + b * block_of_scores(rows), *sum[MOST_GROUPS];
        int some = 0, finite = -1, from[MOST_GROUPS], to[MOST_GROUPS];
        for (int g = 0; g < groups; g++)
            some |= visible[g].lo < visible[g].hi;
        if (!some)
            continue;
        /* int8 numbers are finite, but their products with scales need not be. */
        const int checked = view->dtype != FA_I8 || scaled_in_copies(problem, FA_VALUE);
        int partial = 0;
        for (int g = 0; g < groups && checked; g++)
            partial |= visible[g].lo < visible[g].hi && run->partial[b * groups + g];
        /* Few rows widen values in registers. What cannot be read in place is copied chunk by chunk, unless the whole
         * block must be checked for NaN. */
        const int few = !many_groups && rows <= DECODE_ROWS;
        const int widened = few && !partial && sum_widens(problem, view, begin, end);
        const int in_chunks = !partial && !widened && !sum_in_place(problem, view, begin, end, rows);
        const struct value_rows value = widened     ? rows_at(values, view->row)
                                        : in_chunks ? rows_at(NULL, 0)
                                                    : values_of(problem, head, block, begin, end, rows, 0, tile);
        const struct copied copied = {problem, values, view, scales_of_copies(problem, head, FA_VALUE, block),
                                      begin,   end};
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            sum[g] = (run->span_begins[g] ? tile->o : tile->part) + first * value_row;
            from[g] = to[g] = 0;
            if (visible[g].lo >= visible[g].hi)
                continue;
            const int group = rows_of_group(tile, rows, g, many_groups);
            if (problem->value_scales == FA_SCALE_TOKENS)
                scale_weights(head, block, visible + g, group, tile->extra, s + first * SCORE_ROW);
            if (partial && run->partial[b * groups + g] && finite < 0)
                finite = all_finite(value, begin, end, value_row);
            if (partial && run->partial[b * groups + g] && !finite) {
                make_bits(visible + g, group);
                weighted_sum_of_seen(s + first * SCORE_ROW, group, visible[g].bits, value, visible[g].lo, visible[g].hi,
                                     value_row, sum[g]);
            } else {
                from[g] = term_begin(visible[g].lo), to[g] = term_end(visible[g].hi);
            }
        }
        if (rows > DECODE_ROWS) {
            /* Values of a block that is copied have been read already: prefetch those of the next one. */
            const int whole = value.data == (const char *)tile->v;
            const ptrdiff_t ahead = whole ? FA_BLOCK : VALUES_AHEAD * rows_of_prefetch;
            pass_values(tile, rows, s, value, in_chunks ? &copied : NULL, from, to, sum, values + ahead * view->row,
                        view->row, bytes_of(view, problem->value_dim));
        } else if (in_chunks) {
            copied_sum(&copied, s, rows, from[0], to[0], tile, sum[0]);
        } else if (from[0] < to[0]) {
            const ptrdiff_t ahead =
                needs_prefetch(problem, rows, problem->value_dim, view) ? rows_of_prefetch * value.row : 0;
            streamed_sum(s, rows, value, widened ? view->dtype : REAL_DTYPE, from[0], to[0], 1, ahead, value_row,
                         sum[0], tile->chunk);
        }
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            if (visible[g].lo >= visible[g].hi)
                continue;
            if (!run->span_begins[g]) {
                join_sum(tile->o + first * value_row, sum[g], rows_of_group(tile, rows, g, many_groups), value_row,
                         run->shrink + b * rows + first);
            }
            run->span_begins[g] = 0;
        }
    }
}

/* Keeps the scores of a run that may still get a weight (sparse.inc.h). */
static NEVER_INLINE void keep_run(const fa_problem *problem, int rows, const struct run *run, struct tile *tile,
                                  const int many_groups)
{
    const int groups = groups_of(tile, rows, many_groups);
    for (int b = 0; b < run->blocks; b++)
        for (int g = 0, first = 0; g < groups; g++, first += tile->group) {
            const struct visible *visible = run->visible + b * groups + g;
            if (visible->lo < visible->hi)
                keep_scores(problem, first, rows_of_group(tile, rows, g, many_groups), run->from + b * FA_BLOCK,
                            visible->lo / LANES, (visible->hi + LANES - 1) / LANES,
                            tile->s + b * block_of_scores(rows) + first * SCORE_ROW, &tile->sparse);
        }
}

/* A run of keys. Memory idles during the little work between keys and values, so that is done once per run rather than
 * once per block. */
static ALWAYS_INLINE void visit_run(const fa_problem *problem, const fa_head *head, int64_t row, const int rows,
                                    int64_t key_begin, int64_t key_end, struct tile *tile, const int natural_log,
                                    const int many_groups)
{
    struct run run;
    run.begin = key_begin, run.end = key_end, run.from = key_begin / FA_BLOCK * FA_BLOCK;
    run.blocks = (int)((key_end - run.from + FA_BLOCK - 1) / FA_BLOCK);
    for (int g = 0; g < groups_of(tile, rows, many_groups); g++)
        run.span_begins[g] = 0;
    scores_of_run(problem, head, row, rows, &run, tile, natural_log, many_groups);
    if (is_sparse(problem)) {
        keep_run(problem, rows, &run, tile, many_groups);
        return;
    }
    weights_of_run(problem, head, row, rows, &run, tile, natural_log, many_groups);
    sums_of_run(problem, head, rows, &run, tile, many_groups);
}
