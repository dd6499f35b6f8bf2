/* The weights that a call returns: while keys are visited they hold scores; close_tile turns these into weights. */

/* The keys [*first, *last) stored in row i of the requested weights. */
static ALWAYS_INLINE void weights_range(const fa_problem *problem, const fa_head *head, int64_t i, int64_t *first,
                                        int64_t *last)
{
    *first = 0, *last = head->keys;
    if (problem->band) {
        *first = head->offset + fa_query_of(head, i) - problem->left;
        *last = *first + problem->left + problem->right + 1;
    }
}

/* Where the weight of key j is, which must be one of these: at any address, and the next key's `col` bytes on. */
static ALWAYS_INLINE char *weight(const fa_problem *problem, const fa_head *head, int64_t i, int64_t j)
{
    int64_t first, last;
    weights_range(problem, head, i, &first, &last);
    return fa_row(head, &head->view[FA_WEIGHTS], i) + (j - first) * head->view[FA_WEIGHTS].col;
}

/* The keys [*begin, *end) of a block that a row sees by position and length; returns where the first one's weight is.
 */
static ALWAYS_INLINE char *weights_block(const fa_problem *problem, const fa_head *head, int64_t i, int64_t block,
                                         int *begin, int *end)
{
    rows_range(problem, head, i, 1, block, begin, end);
    if (*begin >= *end)
        return NULL;
    return weight(problem, head, i, block + *begin);
}

/* n weights, from or to contiguous numbers. */
static ALWAYS_INLINE void store_weights(char *w, ptrdiff_t col, const real *from, int64_t n)
{
    if (col == (ptrdiff_t)sizeof(real))
        memcpy(w, from, (size_t)n * sizeof(real));
    else
        for (int64_t j = 0; j < n; j++)
            memcpy(w + j * col, from + j, sizeof(real));
}

static ALWAYS_INLINE void load_weights(real *to, const char *w, ptrdiff_t col, int64_t n)
{
    if (col == (ptrdiff_t)sizeof(real))
        memcpy(to, w, (size_t)n * sizeof(real));
    else
        for (int64_t j = 0; j < n; j++)
            memcpy(to + j, w + j * col, sizeof(real));
}

static void fill_weights(char *w, ptrdiff_t col, real x, int64_t n)
{
    if (col == (ptrdiff_t)sizeof(real) && x == 0 && n > 0)
        memset(w, 0, (size_t)n * sizeof(real));
    else
        for (int64_t j = 0; j < n; j++)
            memcpy(w + j * col, &x, sizeof x);
}

/* Marks a fully masked block in the requested weights: -inf, which close_tile turns into 0. */
static void hide_weights(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        char *w = weights_block(problem, head, i + r, block, &begin, &end);
        fill_weights(w, head->view[FA_WEIGHTS].col, -(real)INFINITY, end - begin);
    }
}

/* Copies a group's scores, or unnormalised weights, to the requested weights, for close_tile to finish. */
static void keep_weights(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block,
                         const real *s)
{
    for (int r = 0; r < rows; r++) {
        int begin, end;
        char *w = weights_block(problem, head, i + r, block, &begin, &end);
        if (w)
            store_weights(w, head->view[FA_WEIGHTS].col, s + r * SCORE_ROW + begin, end - begin);
    }
}

/* Marks the keys [begin, end) that FA_BLOCK_MASK hides from row i, perhaps never visited, in its requested weights, of
 * which w belongs to key `first`. */
static void hide_blocks(const fa_problem *problem, const fa_head *head, int64_t i, int64_t first, int64_t begin,
                        int64_t end, char *w)
{
    const int64_t columns = problem->block_columns;
    const ptrdiff_t col = head->view[FA_WEIGHTS].col;
    const char *row = fa_row_of_blocks(problem, head, i);
    for (int64_t at = begin, stop; at < end; at = stop) {
        stop = (at / columns + 1) * columns < end ? (at / columns + 1) * columns : end;
        if (!row[at / columns * head->view[FA_BLOCK_MASK].col])
            fill_weights(w + (at - first) * col, col, -(real)INFINITY, stop - at);
    }
}

/* Finishes the requested weights of row i, which hold its scores, now that its maximum and sum, or its
 * threshold, are known. */
static void finish_weights(const fa_problem *problem, const fa_head *head, int64_t i, real maximum, vec scale,
                           const struct threshold *th, const int natural_log)
{
    int64_t first, last, begin, end;
    weights_range(problem, head, i, &first, &last);
    const ptrdiff_t col = head->view[FA_WEIGHTS].col;
    char *w = weight(problem, head, i, first); /* from here on keys are relative to `first` */
    fa_visible_keys(problem, head, i, 1, &begin, &end);
    if (begin >= end)
        begin = end = first;
    if (head->view[FA_BLOCK_MASK].data)
        hide_blocks(problem, head, i, first, begin, end, w);
    begin -= first, end -= first, last -= first;
    const real most = maximum == -(real)INFINITY ? 0 : maximum;
    fill_weights(w, col, 0, begin);
    fill_weights(w + end * col, col, 0, last - end);
    for (int64_t j = begin; j < end; j += LANES) {
        real some[LANES];
        const int n = end - j < LANES ? (int)(end - j) : LANES;
        memset(some, 0, sizeof some);
        load_weights(some, w + j * col, col, n);
        vec x = v_load(some);
        ivec gone = x == v_fill(-(real)INFINITY);
        if (problem->activation == FA_SOFTMAX) {
            x -= most;
            x = v_exp2(natural_log ? x * (real)1.44269504088896340736 : x);
        } else if (is_sparse(problem)) {
            const int square = problem->activation == FA_ENTMAX15;
            x = weight_above(square, below_largest(square, x, v_fill(th->base)), v_fill(th->t), v_fill(th->rest));
        }
        v_store(some, v_pick(gone, (vec){0}, x * scale));
        store_weights(w + j * col, col, some, n);
    }
}
