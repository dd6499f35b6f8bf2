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

/* Columns of the sum over a chunk of n values, whole terms. One value after the other, in a loop that is not unrolled
 * (dot.inc.h, four_scores); those `ahead` bytes further on are asked for (0: none). */
static ALWAYS_INLINE void NAME(sum_columns)(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead,
                                            real *to, int64_t to_row, const int rows, const int vecs)
{
    enum { TERMS = STEPS > 1 };
    const int in_memory = TERMS && rows * vecs > 8; /* the sums, for terms need the registers */
    vec sum[2][8], term[2][8];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int c = 0; c < vecs; c++) {
            sum[r][c] = term[r][c] = (vec){0};
            if (in_memory)
                NAME(store)(to + r * to_row + c * LANES, (vec){0});
        }
    }
    for (int t = 0; t < n; t += STEPS) {
        NOT_UNROLLED
        for (int k = 0; k < STEPS; k++, v += v_row) {
            if (ahead)
                NAME(fetch)(v + ahead, vecs * LANES);
            UNROLL(8)
            for (int c = 0; c < vecs; c++) {
                const vec v_k = NAME(load)(v + c * VECTOR_BYTES);
                UNROLL(8)
                for (int r = 0; r < rows; r++)
                    term[r][c] = NAME(fma)(NAME(fill)(p[r * FA_BLOCK + t + k]), v_k, term[r][c]);
            }
        }
        UNROLL(8)
        for (int r = 0; r < rows && TERMS; r++) {
            UNROLL(8)
            for (int c = 0; c < vecs; c++) {
                real *at = to + r * to_row + c * LANES;
                if (in_memory)
                    NAME(store)(at, NAME(load)(at) + term[r][c]);
                else
                    sum[r][c] += term[r][c];
                term[r][c] = (vec){0};
            }
        }
    }
    UNROLL(8)
    for (int r = 0; r < rows && !in_memory; r++) {
        UNROLL(8)
        for (int c = 0; c < vecs; c++)
            NAME(store)(to + r * to_row + c * LANES, TERMS ? sum[r][c] : term[r][c]);
    }
}

/* The same over whole values. */
static ALWAYS_INLINE void NAME(sum_values)(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead,
                                           real *to, int64_t value_row, const int rows)
{
    int64_t c = 0;
    for (; (rows == 1 || FEW_ROWS > 2) && c + 8 * LANES <= value_row; c += 8 * LANES, v += 8 * VECTOR_BYTES)
        NAME(sum_columns)(p, v, v_row, n, ahead, to + c, value_row, rows, 8); /* with 16 registers, of one row only */
    for (; c + 4 * LANES <= value_row; c += 4 * LANES, v += 4 * VECTOR_BYTES)
        NAME(sum_columns)(p, v, v_row, n, ahead, to + c, value_row, rows, 4);
    for (; c < value_row; c += LANES, v += VECTOR_BYTES)
        NAME(sum_columns)(p, v, v_row, n, ahead, to + c, value_row, rows, 1);
}

#if FEW_ROWS > 2
/* The same for more rows: LINKS values are read together, and their weights stay in registers. */
_Static_assert(STEPS % LINKS == 0, "chunks are whole terms, so there are no fewer values");
static ALWAYS_INLINE void NAME(sum_values_at_once)(const real *p, const char *v, ptrdiff_t v_row, int n,
                                                   ptrdiff_t ahead, real *to, int64_t value_row, const int rows)
{
    for (int64_t c = 0; c < rows * value_row; c += LANES)
        NAME(store)(to + c, (vec){0});
    const int spread = ahead && value_row > FEW_VECS * LANES; /* asking, over the arithmetic */
    for (int t = 0; t < n; t += LINKS, v += LINKS * v_row) {
        vec w[FEW_ROWS][LINKS];
        if (ahead && !spread)
            for (int k = 0; k < LINKS; k++)
                NAME(fetch)(v + k * v_row + ahead, value_row);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int k = 0; k < LINKS; k++)
                w[r][k] = NAME(fill)(p[r * FA_BLOCK + t + k]);
        }
        for (int64_t c = 0; c < value_row; c += LANES) {
            const char *v_c = v + c * (int64_t)sizeof(real);
            vec v_k[LINKS];
            UNROLL(8)
            for (int k = 0; k < LINKS; k++) {
                if (spread)
                    __builtin_prefetch(v_c + k * v_row + ahead, 0, 3);
                v_k[k] = NAME(load)(v_c + k * v_row);
            }
            UNROLL(8)
            for (int r = 0; r < rows; r++) {
                real *at = to + r * value_row + c;
                vec term = {0};
                UNROLL(8)
                for (int k = 0; k < LINKS; k++)
                    term = NAME(fma)(w[r][k], v_k[k], term);
                NAME(store)(at, NAME(load)(at) + term);
            }
        }
    }
}
#endif

/* The weighted sum where few rows wait for the values to come from memory: whole values, one after the other. The same
 * bits. chunk: [rows][value_row] numbers. */
static NEVER_INLINE void NAME(streamed_sum)(const fa_problem *problem, const real *p, int rows, NAME(value_rows) value,
                                            int begin, int end, int64_t value_row, real *part, real *chunk)
{
    const ptrdiff_t ahead =
        NAME(needs_fetching)(problem, rows, value_row, value.row) ? NAME(rows_ahead)(value_row) * value.row : 0;
    for (int t = begin, stop; t < end; t = stop) {
        const char *v = value.data + t * value.row;
        const int first = t == begin;
        ptrdiff_t ask = ahead;
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        for (int r = 0, together; r < rows; r += together, ask = 0) {
            const real *p_r = p + r * FA_BLOCK + t;
            real *to = chunk + r * value_row;
            together = NAME(rows_together)(rows - r);
            if (together == 1)
                NAME(sum_values)(p_r, v, value.row, stop - t, ask, to, value_row, 1);
            else if (together == 2)
                NAME(sum_values)(p_r, v, value.row, stop - t, ask, to, value_row, 2);
#if FEW_ROWS > 2
            else if (together == 3)
                NAME(sum_values_at_once)(p_r, v, value.row, stop - t, ask, to, value_row, 3);
            else
                NAME(sum_values_at_once)(p_r, v, value.row, stop - t, ask, to, value_row, 4);
#endif
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
    vec sum[4] = {{0}}; /* one would be a chain of latencies */
    for (int j = begin; j < end; j++) {
        const real *v = (const real *)(value.data + j * value.row);
        int64_t c = 0;
        for (; c + 4 * LANES <= value_row; c += 4 * LANES) {
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                sum[i] = NAME(fma)(NAME(load)(v + c + i * LANES), (vec){0}, sum[i]);
        }
        for (; c < value_row; c += LANES)
            sum[0] = NAME(fma)(NAME(load)(v + c), (vec){0}, sum[0]);
    }
    sum[0] += sum[1] + sum[2] + sum[3];
    for (int i = 0; i < LANES; i++)
        if (sum[0][i] != 0)
            return 0;
    return 1;
}
