/* The weighted sum of values, read in place if their layout allows it, else from a copy of the block. */
struct value_rows {
    const char *data;     /* the value of the block's key 0; only visible rows may be read */
    ptrdiff_t row, panel; /* from a value to the next, and from PANEL of its columns to the next */
};

static ALWAYS_INLINE struct value_rows rows_at(const void *data, ptrdiff_t row)
{
    return (struct value_rows){data, row, PACKED_ROW};
}

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
    /* In place, vectors may straddle cache lines: these take two loads, and columns of them twice the lines. */
    return rows < WORTH_PACKING ||
           (!PACK_ALIGNED && ((uintptr_t)value->data | (uintptr_t)value->row) % VECTOR_BYTES == 0);
}

/* Copies rows [begin, end) of a block of values, times their scales and 2**-value_shift, padded with zeros to whole
 * vectors and whole terms. */
static void copy_values(const fa_problem *problem, const char *values, const fa_view *value,
                        const struct scales *scales, int begin, int end, real *to, int64_t to_row, int64_t value_row)
{
    const int shrunk = problem->value_shift != 0;
    const real factor = shrunk ? value_factor(problem) : 1;
    copy_scaled(values + begin * value->row, value, problem->value_dim, scales, begin, end - begin, to + begin * to_row,
                to_row);
    for (int j = begin / STEPS * STEPS; j < (end + STEPS - 1) / STEPS * STEPS; j++) {
        int64_t c = 0;
        if (j >= begin && j < end) {
            for (; shrunk && c < problem->value_dim; c++)
                to[j * to_row + c] *= factor;
            c = problem->value_dim;
        }
        for (; c < value_row; c++)
            to[j * to_row + c] = 0;
    }
}

/* Packs rows [begin, end) of a block of values, times their scales and 2**-value_shift, as [panel of columns][key]
 * [PANEL], panels v_panel numbers apart; padded with zeros to whole vectors and whole terms. row: scratch for a value.
 */
static void pack_values(const fa_problem *problem, const char *values, const fa_view *value,
                        const struct scales *scales, int begin, int end, int64_t v_panel, int64_t value_row, real *row,
                        real *restrict to)
{
    const int shrunk = problem->value_shift != 0;
    const int direct = readable(value) && problem->value_dim % LANES == 0 && !shrunk;
    const real factor = shrunk ? value_factor(problem) : 1;
    memset(row, 0, (size_t)value_row * sizeof(real));
    for (int j = begin / STEPS * STEPS; j < (end + STEPS - 1) / STEPS * STEPS; j++) {
        const char *from = values + j * value->row;
        if (j < begin || j >= end) {
            for (int64_t c = 0; c < value_row; c += LANES)
                v_store(to + c / PANEL * v_panel + j * PANEL + c % PANEL, (vec){0});
            continue;
        }
        if (!direct) {
            gather(row, from, value->col, problem->value_dim, value->dtype);
            if (scales->data)
                scale_numbers(row, 0, problem->value_dim, scales, j);
            for (int64_t c = 0; shrunk && c < problem->value_dim; c++)
                row[c] *= factor;
            from = (const char *)row;
        }
        for (int64_t c = 0; c < value_row; c += LANES)
            v_store(to + c / PANEL * v_panel + j * PANEL + c % PANEL, v_load(from + c * (int64_t)sizeof(real)));
    }
}

/* part[row][:] (+)= sum over keys [begin, end) of the block of p[row][key] * value[key][:], in whole terms, for
 * `columns` columns from `from` on, a multiple of PANEL. groups: of rows, with sums part_group numbers apart. */
static void weighted_columns(const real *p, int rows, struct value_rows value, int begin, int end, int64_t from,
                             int64_t columns, int64_t value_row, real *part, int add, struct prefetch *prefetch,
                             int groups, int64_t part_group)
{
    const product_function *products = value.row == PACKED_ROW ? packed_products[rows - 1] : weight_products[rows - 1];
    const int panels = (int)(columns / PANEL), left = (int)(columns % PANEL) / LANES;
    const char *v = value.data + from / PANEL * value.panel;
    part += from;
    if (panels)
        products[VECS - 1](p, v, value.row, value.panel, panels, begin, end, part, value_row, add, prefetch, groups,
                           ROWS * SCORE_ROW, part_group);
    if (left)
        products[left - 1](p, v + panels * value.panel, value.row, 0, 1, begin, end, part + panels * PANEL, value_row,
                           add, panels ? NULL : prefetch, groups, ROWS * SCORE_ROW, part_group);
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
                    const vec p_rj = v_fill(p[r * SCORE_ROW + j]);
                    const vec v_j = v_load(value.data + j * value.row + c / PANEL * value.panel +
                                           c % PANEL * (int64_t)sizeof(real));
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
    for (int64_t c = 0; c < value_row; c += PANEL) {
        const char *v = value.data + c / PANEL * value.panel;
        const int vecs = value_row - c < PANEL ? (int)(value_row - c) / LANES : VECS;
        int j = begin;
        for (; j + 4 <= end; j += 4) {
            for (int i = 0; i < vecs; i++) {
                UNROLL(4)
                for (int k = 0; k < 4; k++)
                    sum[k] = v_fma(v_load(v + (j + k) * value.row + i * VECTOR_BYTES), (vec){0}, sum[k]);
            }
        }
        for (; j < end; j++)
            for (int i = 0; i < vecs; i++)
                sum[0] = v_fma(v_load(v + j * value.row + i * VECTOR_BYTES), (vec){0}, sum[0]);
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

/* Whether decode can widen them in registers instead. */
static ALWAYS_INLINE int sum_widens(const fa_problem *problem, const fa_view *value, int begin, int end)
{
    return begin % STEPS == 0 && end % STEPS == 0 && widenable(value, problem->value_dim) && !problem->value_shift &&
           !scaled_in_copies(problem, FA_VALUE);
}

/* The values of the keys [begin, end) of a block, in place or copied: for few rows as rows, for many packed. rows: how
 * many share a value. */
static ALWAYS_INLINE struct value_rows values_of(const fa_problem *problem, const fa_head *head, int64_t block,
                                                 int begin, int end, int64_t rows, const int packed,
                                                 const struct tile *tile)
{
    const fa_view *value = &head->view[FA_VALUE];
    const char *values = value->data + block * value->row;
    const struct scales scales = scales_of_copies(problem, head, FA_VALUE, block);
    if (sum_in_place(problem, value, begin, end, rows))
        return rows_at(values, value->row);
    if (packed) {
        pack_values(problem, values, value, &scales, begin, end, tile->v_panel, tile->value_row, tile->part, tile->v);
        return (struct value_rows){(const char *)tile->v, PACKED_ROW, tile->v_panel * (ptrdiff_t)sizeof(real)};
    }
    copy_values(problem, values, value, &scales, begin, end, tile->v, tile->v_row, tile->value_row);
    return rows_at(tile->v, tile->v_row * (ptrdiff_t)sizeof(real));
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
