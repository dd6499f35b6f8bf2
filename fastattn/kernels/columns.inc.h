/* The functions of rows.inc.h for rows that are side by side in memory, as columns of a C-ordered matrix: each row has
 * a lane, COLUMN_VECS vectors of rows at a time, so that whole cache lines are read and written.
 *
 * The bits are those of rows_of: lane l of its vectors, which sums elements l, l + LANES, ... of a row, is vector
 * sum[l] here. Rows that fit are kept in scratch between passes, so each element is read from memory once; others are
 * read again and their exponentials recomputed. Exponentials are computed in memory order and summed block by block:
 * computed in the order of a sum they would miss L1 at every step (512 rows: 0.92 -> 0.70 ns per element).
 */
enum { COLUMN_VECS = 4, COLUMN_ROWS = COLUMN_VECS * LANES, KEPT_BYTES = 1 << 20 };

struct columns_state {
    struct row_sum sum[LANES][COLUMN_VECS];
    vec base[COLUMN_VECS], scale[COLUMN_VECS];
    double total[COLUMN_ROWS];
    real terms[ROW_BLOCK * COLUMN_ROWS + TREE * 64 / sizeof(real)]; /* the exponentials of a block */
    /* Byte offsets of the elements of a block from the first element of the row. */
    ptrdiff_t at[FA_ROW_OPERANDS][ROW_BLOCK];
    int64_t index[FA_ROW_AXES], next[FA_ROW_OPERANDS]; /* where the next block starts */
};

/* Whether rows of this length are kept in scratch. */
static ALWAYS_INLINE int columns_fit(int64_t length)
{
    return length <= KEPT_BYTES / (COLUMN_ROWS * (int64_t)sizeof(real));
}

/* Offset in scratch of element t of the rows. A cache line is skipped after every LANES elements: a sum reads every
 * LANES-th one, and these would map to a few sets of L1. */
static ALWAYS_INLINE int64_t kept_at(int64_t t) { return t * COLUMN_ROWS + t / LANES * (64 / (int64_t)sizeof(real)); }

/* Contract: contract.h. */
static size_t columns_workspace(int64_t length)
{
    return sizeof(struct columns_state) + (columns_fit(length) ? (size_t)kept_at(length) * sizeof(real) : 0);
}

/* Where rows are kept, behind the state; NULL if they do not fit. */
static ALWAYS_INLINE real *kept_rows(int64_t length, struct columns_state *state)
{
    return columns_fit(length) ? (real *)(state + 1) : NULL;
}

/* Rewinds to the first element of the rows. */
static void first_block(const fa_columns *c, struct columns_state *state)
{
    for (int axis = 0; axis < c->row->count; axis++)
        state->index[axis] = 0;
    for (int k = 0; k < FA_ROW_OPERANDS; k++)
        state->next[k] = 0;
}

/* Finds the next n elements of the rows. */
static void next_block(const fa_columns *c, int n, struct columns_state *state)
{
    const fa_axes *row = c->row;
    const int last = row->count - 1;
    if (last == 0) {
        for (int k = 0; k < FA_ROW_OPERANDS; k++) {
            for (int t = 0; t < n; t++)
                state->at[k][t] = state->next[k] + t * row->strides[k][0];
            state->next[k] += n * row->strides[k][0];
        }
        return;
    }
    for (int t = 0; t < n; t++) {
        for (int k = 0; k < FA_ROW_OPERANDS; k++)
            state->at[k][t] = state->next[k];
        for (int axis = last; axis >= 0; axis--) {
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                state->next[k] += row->strides[k][axis];
            if (++state->index[axis] < row->shape[axis])
                break;
            for (int k = 0; k < FA_ROW_OPERANDS; k++)
                state->next[k] -= row->shape[axis] * row->strides[k][axis];
            state->index[axis] = 0;
        }
    }
}

/* The number of rows in vector v: LANES, or what is left. */
static ALWAYS_INLINE int rows_in_lanes(const fa_columns *c, int v)
{
    return c->rows - v * LANES < LANES ? (int)(c->rows - v * LANES) : LANES;
}

/* Bit i is set if the mask, at this offset, is nonzero for lane i of vector v. */
static ALWAYS_INLINE unsigned column_bits(const fa_columns *c, ptrdiff_t at, int v, int live)
{
    const char *mask = c->mask + at + v * LANES * c->next[FA_ROW_MASK];
    unsigned bits = 0;
    if (c->next[FA_ROW_MASK] == 1)
        return (unsigned)bits_of_mask(mask, live);
    for (int i = 0; i < live; i++)
        bits |= (unsigned)(mask[i * c->next[FA_ROW_MASK]] != 0) << i;
    return bits;
}

/* Numbers at this address of the rows of vector v, `next` apart. whole: they are a vector in memory. */
static ALWAYS_INLINE vec load_column(const fa_columns *c, const char *from, ptrdiff_t next, fa_dtype dtype, int v,
                                     const int whole)
{
    if (whole)
        return v_load(from + v * VECTOR_BYTES);
    real some[LANES] = {0};
    gather(some, from + v * LANES * next, next, rows_in_lanes(c, v), dtype);
    return v_load(some);
}

/* Element t of the rows of vector v; `hidden` if masked. */
static ALWAYS_INLINE vec shown_column(const fa_columns *c, const struct columns_state *state, int t, int v,
                                      const int whole, vec hidden)
{
    const vec numbers = load_column(c, c->x + state->at[FA_ROW_X][t], c->next[FA_ROW_X], c->dtype, v, whole);
    if (!c->mask)
        return numbers;
    return v_pick_bits(column_bits(c, state->at[FA_ROW_MASK][t], v, rows_in_lanes(c, v)), numbers, hidden);
}

/* The same; -inf if masked. */
static ALWAYS_INLINE vec column_vector(const fa_columns *c, const struct columns_state *state, int t, int v,
                                       const int whole)
{
    return shown_column(c, state, t, v, whole, v_fill(-(real)INFINITY));
}

static ALWAYS_INLINE void store_column(const fa_columns *c, const struct columns_state *state, int t, int v,
                                       vec numbers, const int whole)
{
    char *out = c->out + state->at[FA_ROW_OUT][t];
    if (whole) {
        v_store(out + v * VECTOR_BYTES, numbers);
    } else {
        real some[LANES];
        v_store(some, numbers);
        scatter(out + v * LANES * c->next[FA_ROW_OUT], c->next[FA_ROW_OUT], some, rows_in_lanes(c, v), c->out_dtype);
    }
}

/* For a row whose maximum is infinite: 0, or NaN if the row holds one; what to add to the maximum for the
 * log-sum-exp. */
static NEVER_INLINE double rest_of_infinity(const fa_columns *c, struct columns_state *state, int r)
{
    double rest = 0;
    first_block(c, state);
    for (int64_t j = 0; j < c->length; j += ROW_BLOCK) {
        const int n = c->length - j < ROW_BLOCK ? (int)(c->length - j) : ROW_BLOCK;
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            const vec x = column_vector(c, state, t, r / LANES, 0);
            if (x[r % LANES] != x[r % LANES])
                rest = (double)x[r % LANES];
        }
    }
    return rest;
}

/* The sums of the rows' exponentials into state->total, in the order of rows_of; `keep`: the exponentials overwrite the
 * rows in scratch. */
static ALWAYS_INLINE void sums_of_columns(const fa_columns *c, struct columns_state *state, real *kept, const int keep,
                                          const int which, const int vecs, const int x_whole)
{
    for (int v = 0; v < vecs; v++)
        for (int l = 0; l < LANES; l++)
            state->sum[l][v] = (struct row_sum){{0}, {0}};
    first_block(c, state);
    for (int64_t j = 0; j < c->length; j += ROW_BLOCK) {
        const int n = c->length - j < ROW_BLOCK ? (int)(c->length - j) : ROW_BLOCK;
        real *terms = kept && keep ? kept + kept_at(j) : state->terms;
        if (!kept)
            next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                const vec x = kept ? v_load(kept + kept_at(j + t) + v * LANES) : column_vector(c, state, t, v, x_whole);
                v_store(terms + kept_at(t) + v * LANES, row_term(x, state->base[v], which, 1));
            }
        }
        for (int l = 0; l < LANES && l < n; l++)
            for (int v = 0; v < vecs; v++) {
                vec term[TREE];
                UNROLL(8)
                for (int i = 0; i < TREE; i++) {
                    const int t = l + i * LANES;
                    term[i] = t < n ? v_load(terms + kept_at(t) + v * LANES) : (vec){0};
                }
                add_tree(&state->sum[l][v], term);
            }
    }
    for (int v = 0; v < vecs; v++) {
        vec part[LANES] = {{0}}; /* added in the order of v_total */
        for (int l = 0; l < LANES; l++)
            part[l] = state->sum[l][v].sum - state->sum[l][v].lost;
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++)
                part[l] += part[l + half];
        for (int i = 0; i < LANES; i++)
            state->total[v * LANES + i] = (double)part[0][i];
    }
}

/* The rows' largest numbers into state->base, 0 where there are none but -inf; all numbers into kept, if it is there.
 */
static ALWAYS_INLINE void largest_of_columns(const fa_columns *c, struct columns_state *state, real *kept,
                                             const int vecs, const int x_whole)
{
    const vec none = v_fill(-(real)INFINITY);
    const int64_t length = c->length;
    vec most[COLUMN_VECS];
    for (int v = 0; v < vecs; v++)
        most[v] = none;
    first_block(c, state);
    for (int64_t j = 0; j < length; j += ROW_BLOCK) {
        const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                const vec x = column_vector(c, state, t, v, x_whole);
                most[v] = v_max(x, most[v]);
                if (kept)
                    v_store(kept + kept_at(j + t) + v * LANES, x);
            }
        }
    }
    for (int v = 0; v < vecs; v++)
        state->base[v] = v_pick(most[v] == none, (vec){0}, most[v]);
}

/* softmax: whether that is the function; the logarithms share one copy. vecs: vectors of rows; x_whole, out_whole: all
 * of them are whole, and contiguous in memory. */
static ALWAYS_INLINE void columns_of(const int softmax, fa_row_function function, const fa_columns *c,
                                     struct columns_state *state, real *kept, const int vecs, const int x_whole,
                                     const int out_whole)
{
    const vec none = v_fill(-(real)INFINITY);
    const int64_t length = c->length;
    int dominated = 0, odd = 0; /* odd: whether a scale is infinite or NaN */
    largest_of_columns(c, state, kept, vecs, x_whole);
    sums_of_columns(c, state, kept, softmax, ALL, vecs, x_whole);
    for (int r = 0; r < c->rows; r++)
        dominated |= maximum_dominates(state->total[r]);
    if (!softmax) {
        double all[COLUMN_ROWS];
        memcpy(all, state->total, sizeof all);
        if (dominated)
            sums_of_columns(c, state, kept, 0, OTHERS, vecs, x_whole);
        for (int r = 0; r < c->rows; r++)
            state->total[r] = maximum_dominates(all[r]) ? log1p(state->total[r]) : log(all[r]);
    }
    for (int r = 0; r < c->rows; r++) {
        const real base = state->base[r / LANES][r % LANES];
        double total = state->total[r];
        if (softmax) {
            real factor = 1;
            if (c->grad)
                gather(&factor, c->grad + r * c->next[FA_ROW_GRAD], (ptrdiff_t)sizeof(real), 1, c->grad_dtype);
            const real scale = (real)(total == 0 ? 0 : (double)factor / total);
            state->scale[r / LANES][r % LANES] = scale;
            odd |= !isfinite(scale);
            continue;
        }
        if (base == (real)INFINITY)
            total = rest_of_infinity(c, state, r);
        state->scale[r / LANES][r % LANES] = (real)total;
        if (!softmax && function == FA_ROW_LOGSUMEXP) {
            const real answer = (real)((double)base + total);
            scatter(c->out + r * c->next[FA_ROW_OUT], (ptrdiff_t)sizeof(real), &answer, 1, c->out_dtype);
        }
    }
    if (!softmax && function == FA_ROW_LOGSUMEXP)
        return;
    first_block(c, state);
    for (int64_t j = 0; j < length; j += ROW_BLOCK) {
        const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                vec x = kept ? v_load(kept + kept_at(j + t) + v * LANES) : column_vector(c, state, t, v, x_whole);
                if (softmax) {
                    if (!kept)
                        x = v_exp_below(x - state->base[v], 1);
                    x *= state->scale[v];
                    if (odd && c->grad) { /* what does not count stays 0, also beside NaN */
                        const ivec no_number = state->scale[v] - state->scale[v] != (vec){0};
                        x = v_pick((column_vector(c, state, t, v, x_whole) == none) & no_number, (vec){0}, x);
                    } else if (c->mask && !c->grad) { /* a masked entry stays 0 even in a row of NaN */
                        const int live = rows_in_lanes(c, v);
                        x = v_pick_bits(column_bits(c, state->at[FA_ROW_MASK][t], v, live), x, (vec){0});
                    }
                } else {
                    x = v_pick(x == none, none, (x - state->base[v]) - state->scale[v]);
                }
                store_column(c, state, t, v, x, out_whole);
            }
        }
    }
}

/* Specialises the usual case, whole vectors of x and out. */
static ALWAYS_INLINE void columns_by(const int softmax, fa_row_function function, const fa_columns *c,
                                     struct columns_state *state, real *kept)
{
    const ptrdiff_t size = sizeof(real);
    const int vecs = (int)((c->rows + LANES - 1) / LANES), full = c->rows == COLUMN_ROWS;
    const int x_whole = full && c->dtype == REAL_DTYPE && c->next[FA_ROW_X] == size;
    const int out_whole = full && c->out_dtype == REAL_DTYPE && c->next[FA_ROW_OUT] == size;
    if (x_whole && out_whole && kept)
        columns_of(softmax, function, c, state, kept, COLUMN_VECS, 1, 1);
    else if (x_whole && out_whole)
        columns_of(softmax, function, c, state, NULL, COLUMN_VECS, 1, 1);
    else
        columns_of(softmax, function, c, state, kept, vecs, x_whole, out_whole);
}

/* Softmax, the logarithms and logsumexp's gradient; kept: room for the rows, or NULL. */
static void columns(fa_row_function function, const fa_columns *c, struct columns_state *state, real *kept)
{
    if (function == FA_ROW_SOFTMAX || function == FA_ROW_LOGSUMEXP_BACK)
        columns_by(1, function, c, state, kept);
    else
        columns_by(0, function, c, state, kept);
}
