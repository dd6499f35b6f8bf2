/* The scales of int8 keys and values, and the centre of keys (contract.h). Who multiplies depends on their form:
 *
 *   a channel  the query (keys) or the finished row (values): nothing is done for a key
 *   a token    in decode the finished scores (keys) and the finished weights (values); in prefill the copies that it
 *              makes anyway
 *   a block    the copies
 *
 * int8 numbers are finite, so that of values only their scales may be NaN or infinite. */

/* Those of the rows of a matrix from some row on; data NULL: nothing to multiply. */
struct scales {
    const char *data;
    ptrdiff_t row, col;
    fa_dtype dtype;
    int64_t each; /* channels that share one */
};

static const struct scales no_scales = {NULL, 0, 0, FA_F32, 1};

/* Whether copies of the matrix are multiplied. */
static ALWAYS_INLINE int scaled_in_copies(const fa_problem *problem, const int matrix)
{
    const fa_scales form = matrix == FA_KEY ? problem->key_scales : problem->value_scales;
    /* The sparse activations know the weights of a block only when all keys are visited. */
    return form == FA_SCALE_BLOCKS ||
           (form == FA_SCALE_TOKENS && (!problem->decode || (matrix == FA_VALUE && is_sparse(problem))));
}

/* What copies of the rows from `first` on of FA_KEY or FA_VALUE are multiplied by. */
static ALWAYS_INLINE struct scales scales_of_copies(const fa_problem *problem, const fa_head *head, const int matrix,
                                                    int64_t first)
{
    const fa_view *scale = &head->view[matrix == FA_KEY ? FA_KEY_SCALE : FA_VALUE_SCALE];
    if (!scaled_in_copies(problem, matrix))
        return no_scales;
    return (struct scales){scale->data + first * scale->row, scale->row, scale->col, scale->dtype,
                           matrix == FA_KEY ? problem->key_each : problem->value_each};
}

/* Multiplies the channels [from, from + n) of row j. */
static void scale_numbers(real *x, int64_t from, int64_t n, const struct scales *scales, int64_t j)
{
    const char *row = scales->data + j * scales->row;
    for (int64_t c = 0, stop; c < n; c = stop) {
        const int64_t block = (from + c) / scales->each;
        const real factor = read_number(row + block * scales->col, scales->dtype);
        stop = (block + 1) * scales->each - from < n ? (block + 1) * scales->each - from : n;
        int64_t k = c;
        for (; k + LANES <= stop; k += LANES)
            v_store(x + k, v_load(x + k) * factor);
        for (; k < stop; k++)
            x[k] *= factor;
    }
}

/* Copies `rows` rows of n numbers, times the scales of row j and those after it, if there are any. to_row: numbers from
 * one copy to the next. */
static void copy_scaled(const char *from, const fa_view *matrix, int64_t n, const struct scales *scales, int64_t j,
                        int rows, real *to, int64_t to_row)
{
    enum { FACTORS = 256 };
    real factors[FACTORS];
    const int64_t blocks = n / scales->each;
    const int whole = widenable(matrix, n) && matrix->dtype == FA_I8 && n % scales->each == 0 &&
                      scales->each % LANES == 0 && blocks <= FACTORS;
    if (!scales->data && matrix->row == matrix->col * n && to_row == n) { /* no gaps between rows */
        gather(to, from, matrix->col, rows * n, matrix->dtype);
        return;
    }
    if (!scales->data) {
        for (int i = 0; i < rows; i++)
            gather(to + i * to_row, from + i * matrix->row, matrix->col, n, matrix->dtype);
        return;
    }
    const int at_once = whole && blocks > 0 ? (int)(FACTORS / blocks) : rows;
    for (int first = 0, some; first < rows; first += some) {
        some = rows - first < at_once ? rows - first : at_once;
        const char *scale = scales->data + (j + first) * scales->row;
        if (whole && scales->row == scales->col * blocks) /* one after the other */
            gather(factors, scale, scales->col, some * blocks, scales->dtype);
        else if (whole)
            for (int i = 0; i < some; i++)
                gather(factors + i * blocks, scale + i * scales->row, scales->col, blocks, scales->dtype);
        for (int i = 0; i < some; i++) {
            const char *x = from + (first + i) * matrix->row;
            real *row = to + (first + i) * to_row;
            if (!whole) {
                gather(row, x, matrix->col, n, matrix->dtype);
                scale_numbers(row, 0, n, scales, j + first + i);
                continue;
            }
            for (int64_t b = 0; b < blocks; b++) {
                const vec factor = v_fill(factors[i * blocks + b]);
                for (int64_t c = b * scales->each; c < (b + 1) * scales->each; c += LANES)
                    v_store(row + c, v_load_as(x + c, FA_I8) * factor);
            }
        }
    }
}

/* Multiplies the channels [from, from + n) of a row by the scales of channels. */
static void scale_channels(const fa_view *scale, int64_t from, int64_t n, real *x)
{
    real factors[STRIP];
    for (int64_t c = 0; c < n; c += STRIP) {
        const int64_t some = n - c < STRIP ? n - c : STRIP;
        gather(factors, scale->data + (from + c) * scale->col, scale->col, some, scale->dtype);
        for (int64_t k = 0; k < some; k++)
            x[c + k] *= factors[k];
    }
}

/* The scales of the tokens [begin, end) of a block, in `to`, with zeros up to whole vectors; returns whether all are
 * finite. first: the one of key 0 of the block. */
static int gather_scales(const fa_view *scale, const char *first, int begin, int end, real *to)
{
    vec sum = {0};
    for (int j = begin / LANES * LANES; j < end; j += LANES)
        v_store(to + j, (vec){0});
    gather(to + begin, first + begin * scale->row, scale->row, end - begin, scale->dtype);
    for (int j = begin / LANES * LANES; j < end; j += LANES)
        sum = v_fma(v_load(to + j), (vec){0}, sum);
    return !v_true_bits(sum != (vec){0});
}

/* Multiplies the scores of the keys [begin, end) of a block by the scales of their tokens, in rows of SCORE_ROW. */
static NEVER_INLINE void scale_scores(const fa_head *head, int64_t block, int begin, int end, int rows, real *factors,
                                      real *s)
{
    const fa_view *scale = &head->view[FA_KEY_SCALE];
    gather_scales(scale, scale->data + block * scale->row, begin, end, factors);
    for (int r = 0; r < rows; r++)
        for (int j = begin / LANES * LANES; j < end; j += LANES)
            v_store(s + r * SCORE_ROW + j, v_load(s + r * SCORE_ROW + j) * v_load(factors + j));
}

/* The same for the weights of the keys that a group sees of a block. A key that a row does not see keeps the weight 0,
 * whatever its scale. */
static NEVER_INLINE void scale_weights(const fa_head *head, int64_t block, struct visible *visible, int group,
                                       real *factors, real *p)
{
    const fa_view *scale = &head->view[FA_VALUE_SCALE];
    const int finite = gather_scales(scale, scale->data + block * scale->row, visible->lo, visible->hi, factors);
    if (!finite)
        make_bits(visible, group);
    for (int r = 0; r < group; r++, p += SCORE_ROW)
        for (int j = visible->lo / LANES * LANES; j < visible->hi; j += LANES) {
            vec x = v_load(p + j) * v_load(factors + j);
            if (!finite)
                x = v_pick_bits(bits_at(&visible->bits[r], j, LANES), x, (vec){0});
            v_store(p + j, x);
        }
}

/* Whether the centre is added to scores: where it is not the same for all keys of a row, or is not divided out again.
 * Else only the log-sum-exp contains it. */
static ALWAYS_INLINE int adds_center(const fa_problem *problem)
{
    return problem->has_center &&
           (problem->softcap != 0 || problem->activation == FA_RELU || problem->activation == FA_SIGMOID);
}

/* What the centre adds to the scores of each row: scale * query . centre. */
static void find_centers(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, double *to)
{
    const fa_view *query = &head->view[FA_QUERY], *center = &head->view[FA_KEY_CENTER];
    real q[STRIP], k[STRIP];
    for (int64_t i = 0; i < rows; i++) {
        const char *q_i = fa_row(head, query, row + i);
        double sum = 0;
        for (int64_t c = 0; c < problem->head_dim; c += STRIP) {
            const int64_t n = problem->head_dim - c < STRIP ? problem->head_dim - c : STRIP;
            gather(q, q_i + c * query->col, query->col, n, query->dtype);
            gather(k, center->data + c * center->col, center->col, n, center->dtype);
            for (int64_t h = 0; h < n; h++)
                sum += (double)q[h] * (double)k[h];
        }
        to[i] = problem->scale * sum;
    }
}
