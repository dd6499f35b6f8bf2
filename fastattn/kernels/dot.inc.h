/* The dot-product score: queries and keys into the layouts that product.inc.h wants, and scores of a group of rows; for
 * a few queries, scores against keys where they lie, FEW_ROWS rows at a time. */

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

/* Scores of `rows` rows against four keys, lanes along the channel. Sums are nested like those of the product: a strip
 * of channels, then the strips. last: the channels that do not fill a vector. */
static ALWAYS_INLINE void NAME(four_scores)(const real *q, const vec *q_last, const real *const *k, const vec *k_last,
                                            int64_t whole, real *s, const int rows)
{
    vec sum[FEW_ROWS][4];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            sum[r][i] = q_last[r] * k_last[i];
    }
    for (int64_t c = 0; c < whole; q += STRIP * ROWS) {
        const int64_t stop = whole - c < STRIP ? whole : c + STRIP;
        vec part[FEW_ROWS][4];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                part[r][i] = (vec){0};
        }
        for (const real *q_c = q; c < stop; c += LANES, q_c += LANES) {
            UNROLL(4)
            for (int i = 0; i < 4; i++) {
                const vec k_i = NAME(load)(k[i] + c);
                UNROLL(8)
                for (int r = 0; r < rows; r++)
                    part[r][i] = NAME(fma)(NAME(load)(q_c + r * STRIP), k_i, part[r][i]);
            }
        }
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                sum[r][i] += part[r][i];
        }
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++)
        NAME(four_totals)(s + r * FA_BLOCK, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

/* Scores of a few rows against the keys [begin, end) of a block, which are read where they lie: with few rows the time
 * goes into reading the keys, and packing them would double it. Keys up to the next whole vector get scores too, which
 * mean nothing. Row and key alone decide the order of the additions. */
static void NAME(row_scores)(const fa_problem *problem, const real *q, int rows, const char *keys, const fa_view *key,
                             int begin, int end, real *scratch, real *s)
{
    const int64_t all = problem->head_dim, whole = all / LANES * LANES;
    const int64_t q_whole = whole / STRIP * STRIP * ROWS + whole % STRIP;
    const int in_place = NAME(readable)(problem->score_dtype, key);
    vec q_last[ROWS] = {{0}};
    if (whole < all)
        for (int r = 0; r < rows; r++)
            memcpy(&q_last[r], q + r * STRIP + q_whole, (size_t)(all - whole) * sizeof(real));
    for (int j = begin / 4 * 4; j < (end + LANES - 1) / LANES * LANES; j += 4) {
        const real *k[4];
        vec k_last[4] = {{0}};
        for (int i = 0; i < 4; i++) {
            const int seen = j + i < begin ? begin : j + i < end ? j + i : end - 1;
            k[i] = (const real *)(keys + seen * key->row);
            for (int64_t at = 0; at < all * (int64_t)sizeof(real); at += 64)
                __builtin_prefetch((const char *)k[i] + FETCH_ROWS * key->row + at, 0, 2);
            if (!in_place) {
                NAME(gather)(scratch + i * all, keys + seen * key->row, key->col, all, problem->score_dtype);
                k[i] = scratch + i * all;
            }
            if (whole < all)
                memcpy(&k_last[i], k[i] + whole, (size_t)(all - whole) * sizeof(real));
        }
        int r = 0;
        for (; r + FEW_ROWS <= rows; r += FEW_ROWS)
            NAME(four_scores)(q + r * STRIP, q_last + r, k, k_last, whole, s + r * FA_BLOCK + j, FEW_ROWS);
        for (; r < rows; r++)
            NAME(four_scores)(q + r * STRIP, q_last + r, k, k_last, whole, s + r * FA_BLOCK + j, 1);
    }
}
