/* The dot-product score: queries and keys into the layouts that product.inc.h wants, and scores of a group of rows. */

/* Queries, multiplied by `factor`, row by row; zeros up to `channels`. */
static void NAME(pack_queries)(const fa_problem *problem, const fa_view *query, int64_t row, int64_t rows, real factor,
                               int64_t channels, real *restrict to)
{
    for (int64_t i = 0; i < rows; i++, to += channels) {
        NAME(gather)(to, query->data + (row + i) * query->row, query->col, problem->head_dim, problem->dtype);
        for (int64_t c = 0; c < problem->head_dim; c++)
            to[c] *= factor;
        for (int64_t c = problem->head_dim; c < channels; c++)
            to[c] = 0;
    }
}

/* Keys [begin, end) of the block, whose first key lies at `keys`, into panels: [panel][channel][key of the panel].
 * Whole vectors of LANES keys are written; other lanes, and channels past head_dim, are zero. */
static void NAME(pack_keys)(const fa_problem *problem, const char *keys, const fa_view *key, int begin, int end,
                            int64_t padded, real *restrict to)
{
    const int64_t channels = problem->head_dim;
    const int in_place = problem->dtype == (BITS == 32 ? FA_F32 : FA_F64) && key->col == (ptrdiff_t)sizeof(real);
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
            memset(square, 0, sizeof square);
            for (int i = begin > j ? begin - j : 0; i < live; i++)
                NAME(gather)(square + i * LANES, k_j + i * key->row + c * key->col, key->col, n, problem->dtype);
            if (n == LANES)
                NAME(transpose)(panel + c * NAME(PANEL), NAME(PANEL), (const char *)square, sizeof(real) * LANES);
            else
                for (int t = 0; t < LANES && c + t < padded; t++)
                    for (int i = 0; i < LANES; i++)
                        panel[(c + t) * NAME(PANEL) + i] = square[i * LANES + t];
        }
    }
}

/* Scores of a group of rows against the vectors [first, last) of a packed block, into s[row][key]. scratch: ROWS rows
 * of FA_BLOCK numbers. */
static void NAME(dot_scores)(const real *q, int64_t channels, int rows, const real *k, int first, int last, real *s,
                             real *scratch)
{
    int64_t c = 0;
    do {
        const int n = channels - c < FA_BLOCK ? (int)(channels - c) : FA_BLOCK;
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < n; i += STEPS)
                for (int k = 0; k < STEPS; k++)
                    scratch[r * FA_BLOCK + i + k] = q[r * channels + c + i + k];
        for (int v = first; v < last;) {
            const int in_panel = v % VECS;
            const int vecs = last - v < VECS - in_panel ? last - v : VECS - in_panel;
            const real *panel = k + v / VECS * NAME(PANEL) * channels + c * NAME(PANEL) + in_panel * LANES;
            NAME(products)
            [rows - 1][vecs - 1](scratch, (const char *)panel, NAME(PANEL) * sizeof(real), 0, n, s + v * LANES,
                                 FA_BLOCK, c > 0);
            v += vecs;
        }
        c += FA_BLOCK;
    } while (c < channels);
}
