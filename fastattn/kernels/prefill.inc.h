/* Many queries: a block of keys is packed once, and the groups of the tile pass over it one after the other. Keys are
 * in the lanes. With steps of 256 keys, rather than of one panel, the horizontal maximum and the loading, rescaling and
 * storing of the output are paid for once per 256 keys; the packed block and the values stay in L2 while the groups
 * pass over them, the scores of a group in L1. */

/* One block, of which the tile may see the keys [begin, end). */
static void visit_block(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t block,
                        int begin, int end, int64_t tile_end, struct tile *tile)
{
    const int natural_log = scores_in_nats(problem, head);
    const char *keys = head->view[FA_KEY].data + block * head->view[FA_KEY].row;
    struct value_rows value = {NULL, 0};
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
    for (int64_t g = 0, first = 0; first < rows; g++, first += ROWS) {
        const int group = rows - first < ROWS ? (int)(rows - first) : ROWS;
        struct visible visible;
        find_visible(problem, head, row + first, group, block, &visible);
        const int lo = visible.lo, hi = visible.hi;
        if (lo >= hi)
            continue;
        if (visible.masked) {
            if (head->view[FA_WEIGHTS].data)
                hide_weights(problem, head, row + first, group, block);
            continue;
        }
        if (!packed) {
            if (problem->score == FA_ADDITIVE && head->view[FA_PREPARED].data)
                additive_prepared(problem, head, rows, block, begin, end, tile);
            else if (problem->score == FA_ADDITIVE)
                additive_keys(problem, keys, &head->view[FA_KEY], begin, end, tile);
            else
                pack_keys(problem->head_dim, keys, &head->view[FA_KEY], begin, end, tile->channels, tile->k);
            if (!is_sparse(problem))
                value = values_of(problem, head, block, begin, end, sharing, tile);
            packed = 1;
        }
        const int first_block = tile->span[g] == NO_SPAN;
        const int span_begins =
            !is_sparse(problem) && begin_span(problem, head, g, first, group, block / FA_SPAN, tile);
        const int v_first = lo / LANES, v_last = (hi + LANES - 1) / LANES;
        real *s = tile->s, *m = tile->m + first, *l = tile->l + first * LANES;
        const real *q = tile->q + g * group_size(tile->channels);
        struct prefetch *prefetch = prefetch_step(&next_keys, turn);
        if (problem->score == FA_ADDITIVE)
            additive_scores(tile, first, group, v_first, v_last, s);
        else
            dot_scores(q, tile->channels, group, tile->k, v_first, v_last, prefetch, s);

        if (first_block) { /* prefetch the output and the next tile's queries too */
            const int64_t next_row = row + rows + first;
            prefetch_queries(head, &head->view[FA_QUERY], next_row,
                             next_row + ROWS < head->queries ? next_row + ROWS : head->queries,
                             problem->head_dim * (int64_t)sizeof(real));
            prefetch_queries(head, &head->view[FA_OUT], row + first, row + first + group,
                             problem->value_dim * (int64_t)sizeof(real));
        }
        const int partial = rule_tile(problem, head, row + first, group, block, &visible, tile, s);
        if (is_sparse(problem)) {
            keep_scores(problem, first, group, block, v_first, v_last, s, &tile->sparse);
            turn++;
            continue;
        }
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
            finite = all_finite(value, begin, end, tile->value_row); /* the padding of the terms is finite */
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
