/* The weighted sum of values: from memory where the rows allow it, else from a copy of the block. */

typedef struct {
    const char *data; /* of the block's key 0; only rows that are seen may be touched */
    ptrdiff_t row;
} NAME(value_rows);

static ALWAYS_INLINE int NAME(values_in_place)(const fa_problem *problem, const fa_view *value)
{
    return NAME(readable)(problem->dtype, value) && problem->value_dim % LANES == 0 &&
           (problem->few ||
            value->row % 1024 != 0); /* a group of rows would find such rows in a few sets of the cache */
}

/* Rows [begin, end) of a block of values, copied and padded with zeros to whole vectors and whole terms. */
static void NAME(copy_values)(const fa_problem *problem, const char *values, const fa_view *value, int begin, int end,
                              real *to, int64_t to_row, int64_t value_row)
{
    for (int j = begin / STEPS * STEPS; j < (end + STEPS - 1) / STEPS * STEPS; j++) {
        int64_t c = 0;
        if (j >= begin && j < end) {
            NAME(gather)(to + j * to_row, values + j * value->row, value->col, problem->value_dim, problem->dtype);
            c = problem->value_dim;
        }
        for (; c < value_row; c++)
            to[j * to_row + c] = 0;
    }
}

/* part[row][:] = sum over keys [begin, end) of the block of p[row][key] * value[key][:]; whole terms. */
static void NAME(weighted_sum)(const real *p, int rows, NAME(value_rows) value, int begin, int end, int64_t value_row,
                               real *part)
{
    const NAME(product_function) *products = NAME(weight_products)[rows - 1];
    const int panels = (int)(value_row / NAME(PANEL)), left = (int)(value_row % NAME(PANEL)) / LANES;
    const int64_t done = panels * NAME(PANEL);
    if (panels)
        products[VECS - 1](p, value.data, value.row, VECS * VECTOR_BYTES, panels, begin, end, part, value_row, 0);
    if (left)
        products[left - 1](p, value.data + done * (int64_t)sizeof(real), value.row, 0, 1, begin, end, part + done,
                           value_row, 0);
}

/* The same where few rows wait for the values to come from memory: row after row of them, whole, so that memory sees
 * one stream (in panels, wide rows came at half its speed). chunk: [rows][value_row] numbers. */
static NEVER_INLINE void NAME(streamed_sum)(const real *p, int rows, NAME(value_rows) value, int begin, int end,
                                            int64_t value_row, real *part, real *chunk)
{
    enum { KEYS = STEPS > 1 ? STEPS : 4 }; /* as many chain links as fit one load and store of a sum */
    for (int t = begin; t < end;) {
        const int stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        const int first = t == begin;
        for (int64_t c = 0; c < rows * value_row; c += LANES)
            NAME(store)(chunk + c, (vec){0});
        while (t < stop) {
            const char *v_t = value.data + t * value.row;
            const int keys = stop - t < KEYS ? stop - t : KEYS;
            for (int k = 0; k < keys; k++)
                for (int64_t at = 0; at < value_row * (int64_t)sizeof(real); at += 64)
                    __builtin_prefetch(v_t + (FETCH_ROWS + k) * value.row + at, 0, 2);
            for (int64_t c = 0; c < value_row && keys == KEYS; c += LANES) {
                vec v[KEYS];
                UNROLL(8)
                for (int k = 0; k < KEYS; k++)
                    v[k] = NAME(load)(v_t + k * value.row + c * (int64_t)sizeof(real));
                for (int r = 0; r < rows; r++) {
                    const real *p_r = p + r * FA_BLOCK + t;
                    real *sum = chunk + r * value_row + c;
#if STEPS > 1
                    vec term = NAME(fill)(p_r[0]) * v[0];
#else
                    vec term = NAME(fma)(NAME(fill)(p_r[0]), v[0], NAME(load)(sum));
#endif
                    UNROLL(8)
                    for (int k = 1; k < KEYS; k++)
                        term = NAME(fma)(NAME(fill)(p_r[k]), v[k], term);
#if STEPS > 1
                    term += NAME(load)(sum);
#endif
                    NAME(store)(sum, term);
                }
            }
            for (int k = 0; k < keys && keys < KEYS; k++) /* STEPS is 1 then */
                for (int64_t c = 0; c < rows * value_row; c += LANES) {
                    const vec v_k = NAME(load)(v_t + k * value.row + c % value_row * (int64_t)sizeof(real));
                    NAME(store)
                    (chunk + c, NAME(fma)(NAME(fill)(p[c / value_row * FA_BLOCK + t + k]), v_k, NAME(load)(chunk + c)));
                }
            t += keys;
        }
        for (int64_t c = 0; c < rows * value_row; c += LANES)
            NAME(store)(part + c, first ? NAME(load)(chunk + c) : NAME(load)(part + c) + NAME(load)(chunk + c));
    }
}

/* The same, in the same order, for values that are not all finite: 0 * inf and 0 * NaN are NaN, so a key that a row
 * does not see must be left out of its sum rather than added with weight zero. */
static NEVER_INLINE void NAME(weighted_sum_of_seen)(const real *p, int rows, const key_bits *seen,
                                                    NAME(value_rows) value, int begin, int end, int64_t value_row,
                                                    real *part)
{
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < value_row; c += LANES) {
            vec all = {0}, sum = {0}, term = {0};
            for (int j = begin; j < end; j++) {
                if (seen[r].word[j / 64] >> j % 64 & 1) {
                    const vec p_rj = NAME(fill)(p[r * FA_BLOCK + j]);
                    const vec v_j = NAME(load)(value.data + j * value.row + c * (int64_t)sizeof(real));
                    if (STEPS > 1)
                        term = NAME(fma)(p_rj, v_j, term);
                    else
                        sum = NAME(fma)(p_rj, v_j, sum);
                }
                if (STEPS > 1 && ((j + 1) % STEPS == 0 || j + 1 == end))
                    sum += term, term = (vec){0};
                if ((j + 1) % CHUNK == 0 || j + 1 == end)
                    all += sum, sum = (vec){0};
            }
            NAME(store)(part + r * value_row + c, all);
        }
}

static int NAME(all_finite)(NAME(value_rows) value, int begin, int end, int64_t value_row)
{
    vec sum = {0};
    for (int j = begin; j < end; j++)
        for (int64_t c = 0; c < value_row; c += LANES)
            sum = NAME(fma)(NAME(load)(value.data + j * value.row + c * (int64_t)sizeof(real)), (vec){0}, sum);
    for (int i = 0; i < LANES; i++)
        if (sum[i] != 0)
            return 0;
    return 1;
}
