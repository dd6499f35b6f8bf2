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

/* `keys` more links of the chains of `rows` x `vecs` sums: a term, where STEPS > 1. One value after the other, in a
 * loop that is not unrolled (dot.inc.h, four_scores). */
static ALWAYS_INLINE void NAME(add_columns)(const real *p, const char *v, ptrdiff_t v_row, int keys, real *sum,
                                            int64_t sum_row, const int rows, const int vecs)
{
    vec link[2][8];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int c = 0; c < vecs; c++)
            link[r][c] = STEPS > 1 ? (vec){0} : NAME(load)(sum + r * sum_row + c * LANES);
    }
    NOT_UNROLLED
    for (int k = 0; k < keys; k++, v += v_row) {
        UNROLL(8)
        for (int c = 0; c < vecs; c++) {
            const vec v_k = NAME(load)(v + c * VECTOR_BYTES);
            UNROLL(8)
            for (int r = 0; r < rows; r++)
                link[r][c] = NAME(fma)(NAME(fill)(p[r * FA_BLOCK + k]), v_k, link[r][c]);
        }
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int c = 0; c < vecs; c++) {
            real *to = sum + r * sum_row + c * LANES;
            NAME(store)(to, STEPS > 1 ? NAME(load)(to) + link[r][c] : link[r][c]);
        }
    }
}

/* The same over whole values. */
static ALWAYS_INLINE void NAME(add_values)(const real *p, const char *v, ptrdiff_t v_row, int keys, real *sum,
                                           int64_t value_row, const int rows)
{
    int64_t c = 0;
    for (; (rows == 1 || FEW_ROWS > 2) && c + 8 * LANES <= value_row; c += 8 * LANES, v += 8 * VECTOR_BYTES)
        NAME(add_columns)(p, v, v_row, keys, sum + c, value_row, rows, 8); /* with 16 registers, of one row only */
    for (; c + 4 * LANES <= value_row; c += 4 * LANES, v += 4 * VECTOR_BYTES)
        NAME(add_columns)(p, v, v_row, keys, sum + c, value_row, rows, 4);
    for (; c < value_row; c += LANES, v += VECTOR_BYTES)
        NAME(add_columns)(p, v, v_row, keys, sum + c, value_row, rows, 1);
}

#if FEW_ROWS > 2
/* The same for more rows and LINKS keys: values are read together, and the weights stay in registers. */
_Static_assert(STEPS % LINKS == 0, "blocks are padded to whole terms, so there are no fewer keys");
static ALWAYS_INLINE void NAME(add_values_at_once)(const real *p, const char *v, ptrdiff_t v_row, real *sum,
                                                   int64_t value_row, const int rows)
{
    vec w[FEW_ROWS][LINKS];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int k = 0; k < LINKS; k++)
            w[r][k] = NAME(fill)(p[r * FA_BLOCK + k]);
    }
    for (int64_t c = 0; c < value_row; c += LANES) {
        vec v_k[LINKS];
        UNROLL(8)
        for (int k = 0; k < LINKS; k++)
            v_k[k] = NAME(load)(v + k * v_row + c * (int64_t)sizeof(real));
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            real *to = sum + r * value_row + c;
            vec link = STEPS > 1 ? (vec){0} : NAME(load)(to);
            UNROLL(8)
            for (int k = 0; k < LINKS; k++)
                link = NAME(fma)(w[r][k], v_k[k], link);
            NAME(store)(to, STEPS > 1 ? NAME(load)(to) + link : link);
        }
    }
}
#endif

/* The weighted sum where few rows wait for the values to come from memory: whole values, one after the other. The same
 * bits. chunk: [rows][value_row] numbers. */
static NEVER_INLINE void NAME(streamed_sum)(const real *p, int rows, NAME(value_rows) value, int begin, int end,
                                            int64_t value_row, real *part, real *chunk)
{
    const ptrdiff_t ahead = NAME(rows_ahead)(value_row) * value.row;
    const int fetched = NAME(needs_fetching)(rows, value_row, value.row);
    for (int t = begin; t < end;) {
        const int stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        const int first = t == begin;
        for (int64_t c = 0; c < rows * value_row; c += LANES)
            NAME(store)(chunk + c, (vec){0});
        for (int keys; t < stop; t += keys) {
            const char *v = value.data + t * value.row;
            keys = stop - t < LINKS ? stop - t : LINKS;
            if (fetched)
                for (int k = 0; k < keys; k++)
                    NAME(fetch)(v + k * value.row + ahead, value_row);
            for (int r = 0, n; r < rows; r += n) {
                const real *p_r = p + r * FA_BLOCK + t;
                real *to = chunk + r * value_row;
                n = NAME(rows_together)(rows - r);
#if FEW_ROWS > 2
                if (n == 4)
                    NAME(add_values_at_once)(p_r, v, value.row, to, value_row, 4);
                else if (n == 3)
                    NAME(add_values_at_once)(p_r, v, value.row, to, value_row, 3);
                else
#endif
                    if (n == 2)
                    NAME(add_values)(p_r, v, value.row, keys, to, value_row, 2);
                else
                    NAME(add_values)(p_r, v, value.row, keys, to, value_row, 1);
            }
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
