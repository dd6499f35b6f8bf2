/* Many queries: a block of keys is packed once, and the groups of the tile pass over it one after the other. Keys are
 * in the lanes. With steps of 256 keys, rather than of one panel, the horizontal maximum and the loading, rescaling and
 * storing of the output are paid for once per 256 keys; the packed block and the values stay in L2 while the groups
 * pass over them, the scores of a group in L1. */

/* A group of rows on its way through a block. */
struct pass {
    int64_t g, first; /* which group of the tile, and its first row */
    int group;        /* rows */
    int v_first, v_last, span_begins, partial;
    struct visible visible;
    real shrink[ROWS];
};

/* Whether two whole groups see the same vectors of a block, so that they may share its panels. */
static ALWAYS_INLINE int go_together(const struct pass *a, const struct pass *b)
{
    return a->group == ROWS && b->group == ROWS && a->visible.lo == b->visible.lo && a->visible.hi == b->visible.hi &&
           a->span_begins == b->span_begins;
}

/* Finds up to `most` groups, from row *first of the tile on, that see some of the block; returns how many. */
static ALWAYS_INLINE int next_passes(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                     int64_t block, const int most, int64_t *first, struct pass *passes)
{
    int count = 0;
    for (; *first < rows && count < most; *first += ROWS) {
        struct pass *pass = passes + count;
        pass->first = *first, pass->g = *first / ROWS;
        pass->group = rows - *first < ROWS ? (int)(rows - *first) : ROWS;
        find_visible(problem, head, row + *first, pass->group, block, &pass->visible);
        if (pass->visible.lo >= pass->visible.hi)
            continue;
        if (pass->visible.masked) {
            if (head->view[FA_WEIGHTS].data)
                hide_weights(problem, head, row + *first, pass->group, block);
            continue;
        }
        pass->v_first = pass->visible.lo / LANES, pass->v_last = (pass->visible.hi + LANES - 1) / LANES;
        count++;
    }
    return count;
}

/* One block, of which the tile may see the keys [begin, end). */
static void visit_block(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t block,
                        int begin, int end, int64_t tile_end, struct tile *tile)
{
    const int natural_log = scores_in_nats(problem, head);
    const char *keys = head->view[FA_KEY].data + block * head->view[FA_KEY].row;
    struct value_rows value = rows_at(NULL, 0);
    /* While groups pass over this block, the next one is prefetched, a few rows per group; with a window it may already
     * belong to the next tile. */
    const int64_t next = block + FA_BLOCK, groups = (rows_seeing(problem, head, FA_BLOCK, rows) + ROWS - 1) / ROWS;
    const int64_t most_end = problem->left < INT64_MAX ? tile_end + rows / head->heads : tile_end;
    const int64_t fetch_end = most_end < head->key_length ? most_end : head->key_length;
    const int64_t times_k = problem->score == FA_ADDITIVE ? 0 : prefetches_of_product(FA_BLOCK / LANES, tile->channels);
    const int64_t times_v = prefetches_of_product(tile->value_row / LANES, FA_BLOCK);
    struct next_rows next_keys =
        find_next_rows(&head->view[FA_KEY], next, fetch_end, problem->head_dim, groups, times_k);
    struct next_rows next_values =
        find_next_rows(&head->view[FA_VALUE], next, fetch_end, problem->value_dim, groups, times_v);
    const int64_t sharing = rows_seeing(problem, head, 1, rows);
    int64_t turn = 0;
    int packed = 0, finite = -1;
    struct pass passes[GROUPS];
    int64_t first = 0;
    for (int count; (count = next_passes(problem, head, row, rows, block, GROUPS, &first, passes));) {
        if (!packed) {
            if (problem->score == FA_ADDITIVE && head->view[FA_PREPARED].data)
                additive_prepared(problem, head, rows, block, begin, end, tile);
            else if (problem->score == FA_ADDITIVE)
                additive_keys(problem, keys, &head->view[FA_KEY], begin, end, tile);
            else {
                const struct scales scales = scales_of_copies(problem, head, FA_KEY, block);
                pack_keys(problem->head_dim, keys, &head->view[FA_KEY], &scales, begin, end, tile->channels, tile->k);
            }
            if (!is_sparse(problem))
                value = values_of(problem, head, block, begin, end, sharing, 1, tile);
            packed = 1;
        }
        struct prefetch *prefetch = NULL;
        for (int i = 0; i < count; i++) {
            struct pass *pass = passes + i;
            if (tile->span[pass->g] == NO_SPAN) { /* prefetch the output and the next tile's queries too */
                const int64_t next_row = row + rows + pass->first;
                prefetch_queries(head, &head->view[FA_QUERY], next_row,
                                 next_row + ROWS < head->queries ? next_row + ROWS : head->queries,
                                 problem->head_dim * (int64_t)sizeof(real));
                prefetch_queries(head, &head->view[FA_OUT], row + pass->first, row + pass->first + pass->group,
                                 problem->value_dim * (int64_t)sizeof(real));
            }
            pass->span_begins = !is_sparse(problem) &&
                                begin_span(problem, head, pass->g, pass->first, pass->group, block / FA_SPAN, tile);
            prefetch = prefetch_step(&next_keys, turn + i);
        }
        const int together = count == GROUPS && GROUPS > 1 && go_together(passes, passes + GROUPS - 1);
        for (int i = 0; i < count; i += together ? GROUPS : 1) {
            const struct pass *pass = passes + i;
            real *s = tile->s + i * ROWS * SCORE_ROW;
            if (problem->score == FA_ADDITIVE)
                for (int n = i; n < (together ? count : i + 1); n++)
                    additive_scores(tile, passes[n].first, passes[n].group, passes[n].v_first, passes[n].v_last,
                                    tile->s + n * ROWS * SCORE_ROW);
            else
                dot_scores(tile->q + pass->g * group_size(tile->channels), tile->channels, pass->group,
                           together ? GROUPS : 1, (passes[count - 1].g - pass->g) * group_size(tile->channels), tile->k,
                           pass->v_first, pass->v_last, prefetch, s);
        }
        for (int i = 0; i < count; i++) {
            struct pass *pass = passes + i;
            real *s = tile->s + i * ROWS * SCORE_ROW, *m = tile->m + pass->first, *l = tile->l + pass->first * LANES;
            const int v_first = pass->v_first, v_last = pass->v_last, group = pass->group;
            pass->partial = rule_tile(problem, head, row + pass->first, group, block, &pass->visible, tile, s);
            if (is_sparse(problem)) {
                keep_scores(problem, pass->first, group, block, v_first, v_last, s, &tile->sparse);
            } else if (problem->activation != FA_SOFTMAX) {
                weigh_pointwise(problem, head, row + pass->first, group, block, &pass->visible, s, l);
                for (int r = 0; r < group; r++)
                    pass->shrink[r] = 1;
            } else if (natural_log) {
                exponentials(s, group, v_first, v_last, 1, m, l, pass->shrink);
            } else {
                exponentials(s, group, v_first, v_last, 0, m, l, pass->shrink);
            }
            if (pass->partial && finite < 0 && !is_sparse(problem))
                finite = all_finite(value, begin, end, tile->value_row); /* the padding of the terms is finite */
        }
        for (int i = 0; i < count && !is_sparse(problem); i++)
            prefetch = prefetch_step(&next_values, turn + i);
        turn += count;
        const int whole = together && (finite || !(passes[0].partial || passes[GROUPS - 1].partial));
        for (int i = 0; i < count && !is_sparse(problem); i += whole ? GROUPS : 1) {
            struct pass *pass = passes + i;
            const int lo = pass->visible.lo, hi = pass->visible.hi;
            const int64_t value_row = tile->value_row;
            real *s = tile->s + i * ROWS * SCORE_ROW;
            real *sum = pass->span_begins ? tile->o + pass->first * value_row : tile->part + i * ROWS * value_row;
            if (pass->partial && !finite) {
                make_bits(&pass->visible, pass->group);
                weighted_sum_of_seen(s, pass->group, pass->visible.bits, value, lo, hi, value_row, sum);
            } else {
                const int64_t apart = pass->span_begins ? passes[count - 1].first - pass->first : ROWS;
                weighted_columns(s, pass->group, value, term_begin(lo), term_end(hi), 0, value_row, value_row, sum, 0,
                                 prefetch, whole ? GROUPS : 1, apart * value_row);
            }
        }
        for (int i = 0; i < count && !is_sparse(problem); i++)
            if (!passes[i].span_begins)
                join_sum(tile->o + passes[i].first * tile->value_row, tile->part + i * ROWS * tile->value_row,
                         passes[i].group, tile->value_row, passes[i].shrink);
    }
}
