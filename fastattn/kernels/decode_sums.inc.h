/* The weighted sum of values for few rows, where reading the values takes the time: value by value, in memory order.
 * The same bits as the products of values.inc.h. */

/* Adds one weighted value to a term, or starts the term with it (first). ahead: prefetch distance in bytes (0: no
 * prefetch). */
static ALWAYS_INLINE void add_value(const real *p, const char *v, ptrdiff_t ahead, int first, vec (*term)[MOST_VECS],
                                    const int rows, const int vecs)
{
    UNROLL(16)
    for (int c = 0; c < vecs; c++) {
        if (ahead && c * VECTOR_BYTES % 64 == 0)
            __builtin_prefetch(v + c * VECTOR_BYTES + ahead, 0, 3);
        const vec v_c = v_load(v + c * VECTOR_BYTES);
        UNROLL(2)
        for (int r = 0; r < rows; r++) {
            const vec p_r = v_fill(p[r * SCORE_ROW]);
            if (first)
                term[r][c] = p_r * v_c;
            else
                term[r][c] = v_fma(p_r, v_c, term[r][c]);
        }
    }
}

/* Some columns of the weighted sum over the values [begin, end), whole terms, for up to two rows: added to `part`, or
 * stored there (first). */
static ALWAYS_INLINE void sum_columns(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, int first,
                                      ptrdiff_t ahead, real *part, int64_t value_row, const int rows, const int vecs)
{
    const int in_memory = STEPS > 1 && rows * vecs > 8; /* the sum of a chunk: terms need the registers */
    vec sum[2][MOST_VECS], term[2][MOST_VECS];
    real chunk[MOST_VECS * LANES];
    for (int t = begin, stop; t < end;) {
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        UNROLL(16)
        for (int i = 0; i < rows * vecs; i++) {
            sum[i / vecs][i % vecs] = (vec){0};
            if (in_memory)
                v_store(chunk + i * LANES, (vec){0});
        }
        for (; t < stop; t += STEPS) {
            if (STEPS == 1) {
                add_value(p + t, v, ahead, 0, sum, rows, vecs);
                v += v_row;
            } else if (vecs < LONG_VECS && !in_memory) {
                UNROLL(4)
                for (int k = 0; k < STEPS; k++, v += v_row) {
                    IN_ORDER(v);
                    add_value(p + t + k, v, ahead, k == 0, term, rows, vecs);
                }
                UNROLL(16)
                for (int i = 0; i < rows * vecs; i++)
                    sum[i / vecs][i % vecs] += term[i / vecs][i % vecs];
            } else {
                UNROLL(16)
                for (int i = 0; i < rows * vecs; i++)
                    term[i / vecs][i % vecs] = (vec){0};
                NOT_UNROLLED
                for (int k = 0; k < STEPS; k++, v += v_row)
                    add_value(p + t + k, v, ahead, 0, term, rows, vecs);
                UNROLL(16)
                for (int i = 0; i < rows * vecs; i++) {
                    real *at = chunk + i * LANES;
                    if (in_memory)
                        v_store(at, v_load(at) + term[i / vecs][i % vecs]);
                    else
                        sum[i / vecs][i % vecs] += term[i / vecs][i % vecs];
                }
            }
        }
        UNROLL(16)
        for (int i = 0; i < rows * vecs; i++) {
            real *at = part + i / vecs * value_row + i % vecs * LANES;
            const vec s = in_memory ? v_load(chunk + i * LANES) : sum[i / vecs][i % vecs];
            v_store(at, first ? s : v_load(at) + s);
        }
        first = 0;
    }
}

/* The same for whole values: usual lengths in one pass, others chunk by chunk, while a chunk is in L1. */
static ALWAYS_INLINE void sum_values(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, int first,
                                     ptrdiff_t ahead, real *part, int64_t value_row, const int rows)
{
    switch (value_row / LANES) {
#define AT_ONCE(vecs)                                                                      \
    case vecs:                                                                             \
        if (rows > MOST_VECS / vecs)                                                       \
            break;                                                                         \
        sum_columns(p, v, v_row, begin, end, first, ahead, part, vecs *LANES, rows, vecs); \
        return;
        FOR_USUAL(AT_ONCE)
#undef AT_ONCE
    }
    for (int t = begin, stop; t < end; v += (stop - t) * v_row, t = stop, first = 0) {
        const char *v_c = v;
        int64_t c = 0;
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        for (; c + 8 * LANES <= value_row; c += 8 * LANES, v_c += 8 * VECTOR_BYTES)
            sum_columns(p, v_c, v_row, t, stop, first, ahead, part + c, value_row, rows, 8);
        for (; c < value_row; c += LANES, v_c += VECTOR_BYTES)
            sum_columns(p, v_c, v_row, t, stop, first, ahead, part + c, value_row, rows, 1);
    }
}

/* Versions for one and for two rows, with and without prefetch; not inlined, so that each exists once. */
static NEVER_INLINE void sum_of_one(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, int first,
                                    ptrdiff_t ahead, real *part, int64_t value_row)
{
    if (ahead)
        sum_values(p, v, v_row, begin, end, first, ahead, part, value_row, 1);
    else
        sum_values(p, v, v_row, begin, end, first, 0, part, value_row, 1);
}

static NEVER_INLINE void sum_of_two(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, int first,
                                    ptrdiff_t ahead, real *part, int64_t value_row)
{
    if (ahead)
        sum_values(p, v, v_row, begin, end, first, ahead, part, value_row, 2);
    else
        sum_values(p, v, v_row, begin, end, first, 0, part, value_row, 2);
}

#if DECODE_ROWS > 2
/* The same for more rows: each iteration reads `count` vectors of each of LINKS values; weights stay in registers.
 * whole: values are contiguous. */
_Static_assert(STEPS % LINKS == 0, "chunks are whole terms, so there are no fewer values");
static ALWAYS_INLINE void sum_values_at_once(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead,
                                             real *to, int64_t value_row, const int rows, const int whole,
                                             const int count)
{
    for (int64_t c = 0; c < rows * value_row; c += LANES)
        v_store(to + c, (vec){0});
    const ptrdiff_t apart = whole ? VECTOR_BYTES : v_row, step = (whole ? LINKS : 1) * count * VECTOR_BYTES;
    for (int t = 0; t < n; t += LINKS, v += LINKS * v_row) {
        const char *v_c = v, *next = v + ahead;
        vec w[DECODE_ROWS][LINKS];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int k = 0; k < LINKS; k++)
                w[r][k] = v_fill(p[r * SCORE_ROW + t + k]);
        }
        for (int64_t c = 0; c < value_row; c += count * LANES, v_c += count * VECTOR_BYTES, next += step) {
            vec v_k[2][LINKS];
            UNROLL(2)
            for (int i = 0; i < count; i++) {
                UNROLL(8)
                for (int k = 0; k < LINKS; k++) {
                    v_k[i][k] = v_load(v_c + k * v_row + i * VECTOR_BYTES);
                    HOLD(v_k[i][k]);
                }
            }
            if (ahead)
                prefetch_vectors(next, apart, LINKS * count);
            UNROLL(2)
            for (int i = 0; i < count; i++) {
                UNROLL(8)
                for (int r = 0; r < rows; r++) {
                    real *at = to + r * value_row + c + i * LANES;
                    vec term = w[r][0] * v_k[i][0];
                    UNROLL(8)
                    for (int k = 1; k < LINKS; k++)
                        term = v_fma(w[r][k], v_k[i][k], term);
                    v_store(at, v_load(at) + term);
                }
            }
        }
    }
}

/* In the usual case the compiler knows whether to prefetch: a test in the loop would cost 4 %. */
#define SUM_OF(name, rows)                                                                                         \
    static NEVER_INLINE void name(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead, real *to, \
                                  int64_t value_row)                                                               \
    {                                                                                                              \
        const int whole = v_row == value_row * (ptrdiff_t)sizeof(real);                                            \
        if (whole && ahead && value_row % (2 * LANES) == 0)                                                        \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, rows, 1, 2);                                  \
        else if (whole && value_row % (2 * LANES) == 0)                                                            \
            sum_values_at_once(p, v, v_row, n, 0, to, value_row, rows, 1, 2);                                      \
        else if (whole)                                                                                            \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, rows, 1, 1);                                  \
        else                                                                                                       \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, rows, 0, 1);                                  \
    }
SUM_OF(sum_of_three, 3)
SUM_OF(sum_of_four, 4)
#undef SUM_OF
#endif

/* The same for up to DECODE_ROWS rows. first: `part` holds nothing yet. chunk: scratch, [rows][value_row] numbers. */
static NEVER_INLINE void streamed_sum(const real *p, int rows, struct value_rows value, int begin, int end, int first,
                                      ptrdiff_t ahead, int64_t value_row, real *part, real *chunk)
{
    if (rows == 1) {
        sum_of_one(p, value.data + begin * value.row, value.row, begin, end, first, ahead, part, value_row);
        return;
    }
    if (rows == 2) {
        sum_of_two(p, value.data + begin * value.row, value.row, begin, end, first, ahead, part, value_row);
        return;
    }
    (void)chunk; /* only more rows need it */
#if DECODE_ROWS > 2
    for (int t = begin, stop; t < end; t = stop, first = 0) {
        const char *v = value.data + t * value.row;
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        if (rows == 3)
            sum_of_three(p + t, v, value.row, stop - t, ahead, chunk, value_row);
        else
            sum_of_four(p + t, v, value.row, stop - t, ahead, chunk, value_row);
        for (int64_t c = 0; c < rows * value_row; c += LANES)
            v_store(part + c, first ? v_load(chunk + c) : v_load(part + c) + v_load(chunk + c));
    }
#endif
}

/* The same for the values [from, to) of a block, whole terms, that cannot be read in place: each chunk is copied, stays
 * in L1, and is summed there. Only the values [begin, end) may be read; the others count as zeros. */
static NEVER_INLINE void copied_sum(const fa_problem *problem, const fa_view *value, const char *values, const real *p,
                                    int rows, int begin, int end, int from, int to, const struct tile *tile, real *part)
{
    const struct value_rows copy = rows_at(tile->v, tile->v_row * (ptrdiff_t)sizeof(real));
    const ptrdiff_t ahead =
        needs_prefetch(problem, rows, problem->value_dim, value) ? rows_ahead(problem->value_dim) * value->row : 0;
    for (int t = from, stop; t < to; t = stop) {
        stop = (t | (CHUNK - 1)) + 1 < to ? (t | (CHUNK - 1)) + 1 : to;
        const int lo = t < begin ? begin : t, hi = stop < end ? stop : end;
        const char *v = values + t * value->row;
        for (int j = lo - t; ahead && j < hi - t; j++)
            prefetch_bytes(v + j * value->row + ahead, bytes_of(value, problem->value_dim));
        copy_values(problem, v, value, lo - t, hi - t, tile->v, tile->v_row, tile->value_row);
        streamed_sum(p + t, rows, copy, 0, stop - t, t == from, 0, tile->value_row, part, tile->chunk);
    }
}
