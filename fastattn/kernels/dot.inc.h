/* The dot-product score: queries and keys into the layouts that product.inc.h wants, and scores of a group of rows. */

/* Queries, multiplied by `factor`: [group][strip of channels][row][STRIP]; zeros up to `channels`. */
static void NAME(pack_queries)(const fa_problem *problem, const fa_view *query, int64_t row, int64_t rows, real factor,
                               int64_t channels, real *restrict to)
{
    const int in_place = NAME(readable)(problem->score_dtype, query);
    for (int64_t i = 0; i < rows; i++) {
        real *group = to + i / ROWS * NAME(group_size)(channels) + i % ROWS * STRIP;
        const char *q_i = query->data + (row + i) * query->row;
        for (int64_t c = 0; c < channels; c += STRIP, group += ROWS * STRIP) {
            const int64_t live = problem->head_dim - c < STRIP ? problem->head_dim - c : STRIP;
            const int64_t all = channels - c < STRIP ? channels - c : STRIP;
            const real *from = (const real *)(q_i + c * query->col);
            if (!in_place) {
                NAME(gather)(group, q_i + c * query->col, query->col, live, problem->score_dtype);
                from = group;
            }
            for (int64_t k = 0; k < live; k++)
                group[k] = from[k] * factor;
            for (int64_t k = live; k < all; k++)
                group[k] = 0;
        }
    }
}

/* Keys [begin, end) of the block, whose first key lies at `keys`, into panels: [panel][channel][key of the panel].
 * Whole vectors of LANES keys are written; other lanes, and channels past head_dim, are zero. */
static void NAME(pack_keys)(const fa_problem *problem, const char *keys, const fa_view *key, int begin, int end,
                            int64_t padded, real *restrict to)
{
    const int64_t channels = problem->head_dim;
    const int in_place = NAME(readable)(problem->score_dtype, key);
    real square[LANES * LANES];
    for (int j = begin / LANES * LANES; j < end; j += LANES) {
        real *panel = to + j / NAME(PANEL) * NAME(PANEL) * padded + j % NAME(PANEL);
        const char *k_j = keys + j * key->row;
        const int live = end - j < LANES ? end - j : LANES;
        for (int64_t c = 0; c < channels; c += LANES) {
            const int n = channels - c < LANES ? (int)(channels - c) : LANES;
            if (in_place && n == LANES && live == LANES && j >= begin) {
                NAME(transpose)(panel + c * NAME(PANEL), NAME(PANEL), k_j + c * key->col, key->row);
                continue;
            }
            for (int i = 0; i < LANES; i++)
                NAME(store)(square + i * LANES, (vec){0});
            for (int i = begin > j ? begin - j : 0; i < live; i++)
                NAME(gather)(square + i * LANES, k_j + i * key->row + c * key->col, key->col, n, problem->score_dtype);
            if (n == LANES)
                NAME(transpose)(panel + c * NAME(PANEL), NAME(PANEL), (const char *)square, sizeof(real) * LANES);
            else
                for (int t = 0; t < LANES && c + t < padded; t++)
                    for (int i = 0; i < LANES; i++)
                        panel[(c + t) * NAME(PANEL) + i] = square[i * LANES + t];
        }
        for (int64_t c = (channels + LANES - 1) / LANES * LANES; c < padded; c++)
            NAME(store)(panel + c * NAME(PANEL), (vec){0});
    }
}

/* Scores of a group of rows against the vectors [first, last) of a packed block, into s[row][key]. */
static void NAME(dot_scores)(const real *q, int64_t channels, int rows, const real *k, int first, int last, real *s)
{
    int64_t c = 0;
    do {
        const int n = channels - c < STRIP ? (int)(channels - c) : STRIP;
        for (int v = first; v < last;) {
            const int in_panel = v % VECS, left = last - v;
            const int panels = in_panel || left < VECS ? 1 : left / VECS;
            const int vecs = left < VECS - in_panel ? left : VECS - in_panel;
            const NAME(product_function) product = NAME(query_products)[rows - 1][vecs - 1];
            const real *panel = k + v / VECS * NAME(PANEL) * channels + c * NAME(PANEL) + in_panel * LANES;
            product(q, (const char *)panel, NAME(PANEL) * sizeof(real),
                    NAME(PANEL) * channels * (ptrdiff_t)sizeof(real), panels, 0, n, s + v * LANES, FA_BLOCK, c > 0);
            v += panels * vecs;
        }
        c += STRIP;
        q += ROWS * STRIP;
    } while (c < channels);
}
