/* The dot-product score: packs queries and keys into the layouts of product.inc.h, and scores a group of rows against a
 * packed block. */

/* Queries times `factor`, as [group][strip of channels][row][STRIP], padded with zeros to `channels`. */
static void pack_queries(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int group,
                         real factor, int64_t channels, real *restrict to)
{
    const int in_place = readable(&head->view[FA_QUERY]);
    for (int64_t i = 0; i < rows; i++) {
        real *q = to + i / group * group_size(channels) + i % group * STRIP;
        const char *q_i = fa_row(head, &head->view[FA_QUERY], row + i);
        for (int64_t c = 0; c < channels; c += STRIP, q += ROWS * STRIP) {
            const int64_t live = problem->head_dim - c < STRIP ? problem->head_dim - c : STRIP;
            const int64_t all = channels - c < STRIP ? channels - c : STRIP;
            const real *from = (const real *)(q_i + c * head->view[FA_QUERY].col);
            if (!in_place) {
                gather(q, q_i + c * head->view[FA_QUERY].col, head->view[FA_QUERY].col, live,
                       head->view[FA_QUERY].dtype);
                from = q;
            }
            int64_t k = 0;
            for (; k + LANES <= live; k += LANES)
                v_store(q + k, v_load(from + k) * factor);
            for (; k < all; k++) {
                real x = 0;
                if (k < live)
                    memcpy(&x, from + k, sizeof x); /* may lie at any address */
                q[k] = k < live ? x * factor : 0;
            }
            if (problem->key_scales == FA_SCALE_CHANNELS)
                scale_channels(&head->view[FA_KEY_SCALE], c, live, q);
        }
    }
}

/* Queries for a scale far from 1 (scale_after_product). The scale is multiplied into the query, so that the product is
 * the score and has its range. If the query would then over- or underflow, a power of two, after[row], is left out and
 * applied after the product. A query of 1e20 and keys of 1e20 with a scale of 1e-40 have scores of 1.
 */
static NEVER_INLINE void pack_wide_queries(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                           int group, int64_t channels, real *to, double *after)
{
    const int most = BITS == 32 ? 100 : 900; /* largest exponent of a row's numbers */
    pack_queries(problem, head, row, rows, group, 1, channels, to);
    for (int64_t i = 0; i < rows; i++) {
        real *q = to + i / group * group_size(channels) + i % group * STRIP;
        double largest = 0;
        int of_query = 0, of_scale = 0, shift = 0;
        for (int64_t c = 0; c < problem->head_dim; c++) {
            const double size = fabs((double)q[c / STRIP * (ROWS * STRIP) + c % STRIP]);
            if (size > largest && size < INFINITY)
                largest = size;
        }
        frexp(largest, &of_query);
        frexp(problem->scale, &of_scale);
        const int exponent = of_query + of_scale;
        if (largest > 0 && exponent > most)
            shift = (exponent - most + 1) / 2 * 2; /* even, so that its square root is a power of two too */
        else if (largest > 0 && exponent < -most)
            shift = -((-most - exponent + 1) / 2 * 2);
        const double factor = ldexp(problem->scale, -shift);
        after[i] = ldexp(1, shift);
        for (int64_t c = 0; c < problem->head_dim; c++) {
            real *q_c = q + c / STRIP * (ROWS * STRIP) + c % STRIP;
            *q_c = (real)((double)*q_c * factor);
        }
    }
}

/* Packs keys [begin, end) of the block that starts at `keys`, times their scales, into panels, [panel][channel][key of
 * the panel]. Whole vectors of LANES keys are written; other lanes, and channels past head_dim, are zero. */
static void pack_keys(int64_t channels, const char *keys, const fa_view *key, const struct scales *scales, int begin,
                      int end, int64_t padded, real *restrict to)
{
    const int in_place = readable(key);
    real square[LANES * LANES];
    for (int j = begin / LANES * LANES; j < end; j += LANES) {
        real *panel = to + j / PANEL * PANEL * padded + j % PANEL;
        const char *k_j = keys + j * key->row;
        const int live = end - j < LANES ? end - j : LANES;
        for (int64_t c = 0; c < channels; c += LANES) {
            const int n = channels - c < LANES ? (int)(channels - c) : LANES;
            if (in_place && n == LANES && live == LANES && j >= begin) {
                v_transpose(panel + c * PANEL, PANEL, k_j + c * key->col, key->row);
                continue;
            }
            for (int i = 0; i < LANES; i++)
                v_store(square + i * LANES, (vec){0});
            for (int i = begin > j ? begin - j : 0; i < live; i++) {
                gather(square + i * LANES, k_j + i * key->row + c * key->col, key->col, n, key->dtype);
                if (scales->data)
                    scale_numbers(square + i * LANES, c, n, scales, j + i);
            }
            if (n == LANES)
                v_transpose(panel + c * PANEL, PANEL, (const char *)square, sizeof(real) * LANES);
            else
                for (int t = 0; t < LANES && c + t < padded; t++)
                    for (int i = 0; i < LANES; i++)
                        panel[(c + t) * PANEL + i] = square[i * LANES + t];
        }
        for (int64_t c = (channels + LANES - 1) / LANES * LANES; c < padded; c++)
            v_store(panel + c * PANEL, (vec){0});
    }
}

/* Scores of a group of rows against the vectors [first, last) of a packed block, into s[row][key]; or of several
 * groups, whose queries are q_group numbers apart. */
static void dot_scores(const real *q, int64_t channels, int rows, int groups, int64_t q_group, const real *k, int first,
                       int last, struct prefetch *prefetch, real *s)
{
    int64_t c = 0;
    do {
        const int n = channels - c < STRIP ? (int)(channels - c) : STRIP;
        for (int v = first; v < last;) {
            const int in_panel = v % VECS, left = last - v;
            const int panels = in_panel || left < VECS ? 1 : left / VECS;
            const int vecs = left < VECS - in_panel ? left : VECS - in_panel;
            const product_function product = query_products[rows - 1][vecs - 1];
            const real *panel = k + v / VECS * PANEL * channels + c * PANEL + in_panel * LANES;
            product(q, (const char *)panel, PACKED_ROW, channels * PACKED_ROW, panels, 0, n, s + v * LANES, SCORE_ROW,
                    c > 0, prefetch, groups, q_group, ROWS * SCORE_ROW);
            v += panels * vecs;
        }
        c += STRIP;
        q += ROWS * STRIP;
    } while (c < channels);
}
