/* The weighted sum of values, read in place if their layout allows it, else from a copy of the block. */
struct value_rows {
    const char *data; /* the value of the block's key 0; only visible rows may be read */
    ptrdiff_t row;
};

/* The factor that keeps a sum of values from overflowing; usually 1. */
static ALWAYS_INLINE real value_factor(const fa_problem *problem) { return (real)ldexp(1, -problem->value_shift); }

/* rows: how many share a value. */
static ALWAYS_INLINE int values_in_place(const fa_problem *problem, const fa_view *value, int64_t rows)
{
    if (!readable(value) || problem->value_dim % LANES != 0 || problem->value_shift)
        return 0;
    if (problem->decode)
        return 1;
    /* Such rows would map to a few sets of the cache. */
    if (value->row % 1024 == 0)
        return 0;
    /* Vectors that straddle cache lines take two loads. */
    return rows < WORTH_COPYING || ((uintptr_t)value->data | (uintptr_t)value->row) % VECTOR_BYTES == 0;
}

/* Copies rows [begin, end) of a block of values, times 2**-value_shift, padded with zeros to whole vectors and whole
 * terms. */
static void copy_values(const fa_problem *problem, const char *values, const fa_view *value, int begin, int end,
                        real *to, int64_t to_row, int64_t value_row)
{
    const int shrunk = problem->value_shift != 0;
    const real factor = shrunk ? value_factor(problem) : 1;
    const int whole = value->row == value->col * problem->value_dim && to_row == problem->value_dim;
    if (whole) /* no gaps between rows */
        gather(to + begin * to_row, values + begin * value->row, value->col, (end - begin) * to_row, value->dtype);
    for (int j = begin / STEPS * STEPS; j < (end + STEPS - 1) / STEPS * STEPS; j++) {
        int64_t c = 0;
        if (j >= begin && j < end) {
            if (!whole)
                gather(to + j * to_row, values + j * value->row, value->col, problem->value_dim, value->dtype);
            for (; shrunk && c < problem->value_dim; c++)
                to[j * to_row + c] *= factor;
            c = problem->value_dim;
        }
        for (; c < value_row; c++)
            to[j * to_row + c] = 0;
    }
}

/* part[row][:] (+)= sum over keys [begin, end) of the block of p[row][key] * value[key][:], in whole terms, for
 * `columns` columns from `from` on. */
static void weighted_columns(const real *p, int rows, struct value_rows value, int begin, int end, int64_t from,
                             int64_t columns, int64_t value_row, real *part, int add, struct prefetch *prefetch)
{
    const product_function *products = weight_products[rows - 1];
    const int panels = (int)(columns / PANEL), left = (int)(columns % PANEL) / LANES;
    const char *v = value.data + from * (int64_t)sizeof(real);
    const int64_t done = panels * PANEL;
    part += from;
    if (panels)
        products[VECS - 1](p, v, value.row, VECS * VECTOR_BYTES, panels, begin, end, part, value_row, add, prefetch);
    if (left)
        products[left - 1](p, v + done * (int64_t)sizeof(real), value.row, 0, 1, begin, end, part + done, value_row,
                           add, panels ? NULL : prefetch);
}

/* The same, in the same order, for values that are not all finite: 0 * inf and 0 * NaN are NaN, so a hidden key must be
 * skipped rather than added with weight zero. */
static NEVER_INLINE void weighted_sum_of_seen(const real *p, int rows, const key_bits *seen, struct value_rows value,
                                              int begin, int end, int64_t value_row, real *part)
{
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < value_row; c += LANES) {
            vec all = {0}, sum = {0}, term = {0};
            for (int j = begin; j < end; j++) {
                if (seen[r].word[j / 64] >> j % 64 & 1) {
                    const vec p_rj = v_fill(p[r * FA_BLOCK + j]);
                    const vec v_j = v_load(value.data + j * value.row + c * (int64_t)sizeof(real));
                    if (STEPS > 1)
                        term = v_fma(p_rj, v_j, term);
                    else
                        sum = v_fma(p_rj, v_j, sum);
                }
                if (STEPS > 1 && ((j + 1) % STEPS == 0 || j + 1 == end))
                    sum += term, term = (vec){0};
                if ((j + 1) % CHUNK == 0 || j + 1 == end)
                    all += sum, sum = (vec){0};
            }
            v_store(part + r * value_row + c, all);
        }
}

static int all_finite(struct value_rows value, int begin, int end, int64_t value_row)
{
    vec sum[4] = {{0}}; /* several, since one would be limited by latency */
    for (int j = begin; j < end; j++) {
        const real *v = (const real *)(value.data + j * value.row);
        int64_t c = 0;
        for (; c + 4 * LANES <= value_row; c += 4 * LANES) {
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                sum[i] = v_fma(v_load(v + c + i * LANES), (vec){0}, sum[i]);
        }
        for (; c < value_row; c += LANES)
            sum[0] = v_fma(v_load(v + c), (vec){0}, sum[0]);
    }
    sum[0] += sum[1] + sum[2] + sum[3];
    for (int i = 0; i < LANES; i++)
        if (sum[0][i] != 0)
            return 0;
    return 1;
}

/* Whether the sum of the values [begin, end) of a block can read them in place: they are whole terms. */
static ALWAYS_INLINE int sum_in_place(const fa_problem *problem, const fa_view *value, int begin, int end, int64_t rows)
{
    return begin % STEPS == 0 && end % STEPS == 0 && values_in_place(problem, value, rows);
}

/* The values of the keys [begin, end) of a block, in place or copied. rows: how many share a value. */
static ALWAYS_INLINE struct value_rows values_of(const fa_problem *problem, const fa_head *head, int64_t block,
                                                 int begin, int end, int64_t rows, const struct tile *tile)
{
    const char *values = head->view[FA_VALUE].data + block * head->view[FA_VALUE].row;
    if (sum_in_place(problem, &head->view[FA_VALUE], begin, end, rows))
        return (struct value_rows){values, head->view[FA_VALUE].row};
    copy_values(problem, values, &head->view[FA_VALUE], begin, end, tile->v, tile->v_row, tile->value_row);
    return (struct value_rows){(const char *)tile->v, tile->v_row * (ptrdiff_t)sizeof(real)};
}

/* Adds the weighted sum of a block to the output of `rows` rows, after rescaling their earlier output. */
static ALWAYS_INLINE void join_sum(real *o, const real *sum, int rows, int64_t value_row, const real *shrink)
{
    for (int r = 0; r < rows; r++) {
        const vec keep = v_fill(shrink[r]);
        for (int64_t c = r * value_row; c < (r + 1) * value_row; c += LANES)
            v_store(o + c, v_fma(v_load(o + c), keep, v_load(sum + c)));
    }
}
