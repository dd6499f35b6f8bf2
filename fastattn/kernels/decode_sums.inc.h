/* The weighted sum of values for few rows, where reading the values takes the time: value by value, in memory order.
 * Values of smaller dtypes are widened in registers. The same bits as the products of values.inc.h. */

/* Adds one weighted value to a term, or starts the term with it (first). ahead: prefetch distance in bytes (0: no
 * prefetch). */
static ALWAYS_INLINE void add_value(const real *p, const char *v, ptrdiff_t ahead, int first, vec (*term)[MOST_VECS],
                                    const fa_dtype dtype, const int rows, const int vecs)
{
    const int step = LANES * size_of(dtype);
    UNROLL(16)
    for (int c = 0; c < vecs; c++) {
        if (ahead && c * step % 64 == 0)
            prefetch_line(v + c * step + ahead, dtype == REAL_DTYPE);
        const vec v_c = v_load_as(v + c * step, dtype);
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
                                      ptrdiff_t ahead, real *part, int64_t value_row, const fa_dtype dtype,
                                      const int rows, const int vecs)
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
                add_value(p + t, v, ahead, 0, sum, dtype, rows, vecs);
                v += v_row;
            } else if (vecs < LONG_VECS && !in_memory) {
                UNROLL(4)
                for (int k = 0; k < STEPS; k++, v += v_row) {
                    IN_ORDER(v);
                    add_value(p + t + k, v, ahead, k == 0, term, dtype, rows, vecs);
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
                    add_value(p + t + k, v, ahead, 0, term, dtype, rows, vecs);
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
                                     ptrdiff_t ahead, real *part, int64_t value_row, const fa_dtype dtype,
                                     const int rows)
{
    const int step = LANES * size_of(dtype);
    switch (value_row / LANES) {
#define AT_ONCE(vecs)                                                                             \
    case vecs:                                                                                    \
        if (rows > MOST_VECS / vecs)                                                              \
            break;                                                                                \
        sum_columns(p, v, v_row, begin, end, first, ahead, part, vecs *LANES, dtype, rows, vecs); \
        return;
        FOR_USUAL(AT_ONCE)
#undef AT_ONCE
    }
    for (int t = begin, stop; t < end; v += (stop - t) * v_row, t = stop, first = 0) {
        const char *v_c = v;
        int64_t c = 0;
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        for (; c + 8 * LANES <= value_row; c += 8 * LANES, v_c += 8 * step)
            sum_columns(p, v_c, v_row, t, stop, first, ahead, part + c, value_row, dtype, rows, 8);
        for (; c < value_row; c += LANES, v_c += step)
            sum_columns(p, v_c, v_row, t, stop, first, ahead, part + c, value_row, dtype, rows, 1);
    }
}

#if DECODE_ROWS > 2
/* The same for more rows: each iteration reads `count` vectors of each of LINKS values; weights stay in registers.
 * whole: values are contiguous. */
_Static_assert(STEPS % LINKS == 0, "chunks are whole terms, so there are no fewer values");
static ALWAYS_INLINE void sum_values_at_once(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead,
                                             real *to, int64_t value_row, const fa_dtype dtype, const int rows,
                                             const int whole, const int count)
{
    const int size = LANES * size_of(dtype);
    for (int64_t c = 0; c < rows * value_row; c += LANES)
        v_store(to + c, (vec){0});
    const ptrdiff_t apart = whole ? size : v_row, step = (whole ? LINKS : 1) * count * size;
    for (int t = 0; t < n; t += LINKS, v += LINKS * v_row) {
        const char *v_c = v, *next = v + ahead;
        vec w[DECODE_ROWS][LINKS];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int k = 0; k < LINKS; k++)
                w[r][k] = v_fill(p[r * SCORE_ROW + t + k]);
        }
        for (int64_t c = 0; c < value_row; c += count * LANES, v_c += count * size, next += step) {
            vec v_k[2][LINKS];
            UNROLL(2)
            for (int i = 0; i < count; i++) {
                UNROLL(8)
                for (int k = 0; k < LINKS; k++) {
                    v_k[i][k] = v_load_as(v_c + k * v_row + i * size, dtype);
                    HOLD(v_k[i][k]);
                }
            }
            if (ahead)
                prefetch_vectors(next, apart, LINKS * count, size);
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

#endif

/* In the usual case the compiler knows whether to prefetch: a test in the loop would cost 4 %. Not inlined, so that
 * each exists once. */
typedef void (*sum_function)(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, int first,
                             ptrdiff_t ahead, real *part, int64_t value_row);
#define SUM_OF_FEW(name, dtype, rows)                                                                         \
    static NEVER_INLINE void name##_##rows(const real *p, const char *v, ptrdiff_t v_row, int begin, int end, \
                                           int first, ptrdiff_t ahead, real *part, int64_t value_row)         \
    {                                                                                                         \
        if (ahead)                                                                                            \
            sum_values(p, v, v_row, begin, end, first, ahead, part, value_row, dtype, rows);                  \
        else                                                                                                  \
            sum_values(p, v, v_row, begin, end, first, 0, part, value_row, dtype, rows);                      \
    }
#if DECODE_ROWS > 2
typedef void (*chunk_function)(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead, real *to,
                               int64_t value_row);
#define SUM_OF_CHUNK(name, dtype, rows)                                                                           \
    static NEVER_INLINE void name##_##rows(const real *p, const char *v, ptrdiff_t v_row, int n, ptrdiff_t ahead, \
                                           real *to, int64_t value_row)                                           \
    {                                                                                                             \
        const int whole = v_row == value_row * size_of(dtype);                                                    \
        if (whole && ahead && value_row % (2 * LANES) == 0)                                                       \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, dtype, rows, 1, 2);                          \
        else if (whole && value_row % (2 * LANES) == 0)                                                           \
            sum_values_at_once(p, v, v_row, n, 0, to, value_row, dtype, rows, 1, 2);                              \
        else if (whole)                                                                                           \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, dtype, rows, 1, 1);                          \
        else                                                                                                      \
            sum_values_at_once(p, v, v_row, n, ahead, to, value_row, dtype, rows, 0, 1);                          \
    }
#define SUMS(kind, dtype)                                                                  \
    SUM_OF_FEW(sums_of_##kind, dtype, 1)                                                   \
    SUM_OF_FEW(sums_of_##kind, dtype, 2)                                                   \
    SUM_OF_CHUNK(sums_of_##kind, dtype, 3)                                                 \
    SUM_OF_CHUNK(sums_of_##kind, dtype, 4)                                                 \
    static const sum_function sums_of_##kind[] = {sums_of_##kind##_1, sums_of_##kind##_2}; \
    static const chunk_function chunk_sums_of_##kind[] = {sums_of_##kind##_3, sums_of_##kind##_4};
#else
#define SUMS(kind, dtype)                \
    SUM_OF_FEW(sums_of_##kind, dtype, 1) \
    SUM_OF_FEW(sums_of_##kind, dtype, 2) \
    static const sum_function sums_of_##kind[] = {sums_of_##kind##_1, sums_of_##kind##_2};
#endif
SUMS(real, REAL_DTYPE)
#if BITS == 32
SUMS(f16, FA_F16)
SUMS(bf16, FA_BF16)
SUMS(i8, FA_I8)
#endif
#undef SUMS
#undef SUM_OF_CHUNK
#undef SUM_OF_FEW

/* The weighted sum for up to DECODE_ROWS rows, of values of type real or of a smaller dtype. first: `part` holds
 * nothing yet. chunk: scratch, [rows][value_row] numbers. */
static NEVER_INLINE void streamed_sum(const real *p, int rows, struct value_rows value, fa_dtype dtype, int begin,
                                      int end, int first, ptrdiff_t ahead, int64_t value_row, real *part, real *chunk)
{
    (void)chunk; /* only more rows need it */
    if (rows <= 2) {
        const sum_function sum = BY_DTYPE(sums_of, dtype)[rows == 2];
        sum(p, value.data + begin * value.row, value.row, begin, end, first, ahead, part, value_row);
        return;
    }
#if DECODE_ROWS > 2
    const chunk_function sum = BY_DTYPE(chunk_sums_of, dtype)[rows == 4];
    for (int t = begin, stop; t < end; t = stop, first = 0) {
        stop = (t | (CHUNK - 1)) + 1 < end ? (t | (CHUNK - 1)) + 1 : end;
        sum(p + t, value.data + t * value.row, value.row, stop - t, ahead, chunk, value_row);
        for (int64_t c = 0; c < rows * value_row; c += LANES)
            v_store(part + c, first ? v_load(chunk + c) : v_load(part + c) + v_load(chunk + c));
    }
#endif
}

/* A block of values that cannot be read in place, and what of it may be read. */
struct copied {
    const fa_problem *problem;
    const char *values;
    const fa_view *view;
    struct scales scales;
    int begin, end;
};

/* The values [from, to) of the block, in tile->v; those that may not be read count as zeros. */
static void copy_chunk(const struct copied *copied, int from, int to, const struct tile *tile)
{
    const int lo = from < copied->begin ? copied->begin : from, hi = to < copied->end ? to : copied->end;
    struct scales scales = copied->scales;
    if (scales.data)
        scales.data += from * scales.row;
    copy_values(copied->problem, copied->values + from * copied->view->row, copied->view, &scales, lo - from, hi - from,
                tile->v, tile->v_row, tile->value_row);
}

/* Prefetches the values `ahead` behind those of a chunk. */
static ALWAYS_INLINE void prefetch_copied(const struct copied *copied, int from, int to, ptrdiff_t ahead)
{
    const fa_view *value = copied->view;
    const int64_t bytes = bytes_of(value, copied->problem->value_dim);
    for (int j = from; j < to; j++)
        for (int64_t at = 0; at < bytes; at += 64)
            prefetch_line(copied->values + (j + ahead) * value->row + at, value->dtype == REAL_DTYPE);
}

/* The same for the values [from, to) of a block, whole terms, that cannot be read in place: each chunk is copied, stays
 * in L1, and is summed there. */
static NEVER_INLINE void copied_sum(const struct copied *copied, const real *p, int rows, int from, int to,
                                    const struct tile *tile, real *part)
{
    const fa_problem *problem = copied->problem;
    const fa_view *value = copied->view;
    const struct value_rows copy = rows_at(tile->v, tile->v_row * (ptrdiff_t)sizeof(real));
    const ptrdiff_t ahead =
        needs_prefetch(problem, rows, problem->value_dim, value) ? rows_ahead(value, problem->value_dim) : 0;
    for (int t = from, stop; t < to; t = stop) {
        stop = (t | (CHUNK - 1)) + 1 < to ? (t | (CHUNK - 1)) + 1 : to;
        if (ahead)
            prefetch_copied(copied, t, stop, ahead);
        copy_chunk(copied, t, stop, tile);
        streamed_sum(p + t, rows, copy, REAL_DTYPE, 0, stop - t, t == from, 0, tile->value_row, part, tile->chunk);
    }
}
