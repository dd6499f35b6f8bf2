/* Dot-product scores against keys in place, up to PLACE_ROWS rows at a time: with few rows the time goes into reading
 * the keys, and packing them would double it. Keys of smaller dtypes are widened in registers. */

enum { MOST_PLACE_ROWS = PLACE_ROWS > 4 ? PLACE_ROWS : 4 };

/* Address of channel c of the first row's query; those of the next rows follow STRIP numbers apart. */
static ALWAYS_INLINE const real *query_at(const real *q, int64_t c)
{
    return q + c / STRIP * (ROWS * STRIP) + c % STRIP;
}

/* Adds the products of one vector of `rows` queries and of `count` keys, lane by lane; at the end of a key it has fewer
 * than LANES numbers. */
static ALWAYS_INLINE void add_products(const real *q_c, const char *k, ptrdiff_t key_row, int numbers, vec (*sum)[4],
                                       const fa_dtype dtype, const int rows, const int count)
{
    vec k_c[4];
    UNROLL(4)
    for (int i = 0; i < count; i++) {
        if (numbers == LANES)
            k_c[i] = v_load_as(k + i * key_row, dtype);
        else
            k_c[i] = v_load_some(k + i * key_row, numbers);
        if (rows > 2)
            HOLD(k_c[i]);
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(4)
        for (int i = 0; i < count; i++) {
            sum[r][i] = v_fma(v_load(q_c + r * STRIP), k_c[i], sum[r][i]);
            if (rows > 4)
                LOAD_AFTER(sum[r][i], q_c);
        }
    }
}

/* Products of the channels [begin, end) of `rows` rows with `count` keys, summed by lanes. Rows are padded with zeros
 * to whole vectors; keys are not. ahead: prefetch distance in bytes (0: no prefetch). whole: keys are contiguous. */
static ALWAYS_INLINE void chain_of_products(const real *q, const char *keys, ptrdiff_t key_row, int64_t begin,
                                            int64_t end, ptrdiff_t ahead, vec (*sum)[4], const int whole,
                                            const fa_dtype dtype, const int rows, const int count)
{
    const int size = size_of(dtype), step = LANES * size;
    const ptrdiff_t apart = whole ? step : key_row;
    const char *k = keys + begin * size;
    const char *next = keys + ahead + begin * size * (whole ? count : 1);
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(4)
        for (int i = 0; i < count; i++)
            sum[r][i] = (vec){0};
    }
    for (int64_t c = begin, stop; c < end; c = stop) {
        const real *q_c = query_at(q, c);
        stop = end - c < STRIP ? end : c + STRIP;
        for (; c < stop; c += LANES, q_c += LANES, k += step) {
            if (stop - c < LANES) {
                add_products(q_c, k, key_row, (int)(stop - c), sum, dtype, rows, count);
                break;
            }
            add_products(q_c, k, key_row, LANES, sum, dtype, rows, count);
            if (ahead) { /* after what is needed now */
                prefetch_vectors(next, apart, count, step);
                next += whole ? count * step : step;
            }
        }
    }
}

/* The same over all channels: the sum of chains of CHAIN vectors. */
static ALWAYS_INLINE void key_products(const real *q, const char *keys, ptrdiff_t key_row, int64_t channels,
                                       ptrdiff_t ahead, vec (*sum)[4], const int whole, const fa_dtype dtype,
                                       const int rows, const int count)
{
    const int64_t chain = CHAIN * LANES;
    chain_of_products(q, keys, key_row, 0, channels < chain ? channels : chain, ahead, sum, whole, dtype, rows, count);
    for (int64_t c = chain; c < channels; c += chain) {
        vec part[MOST_PLACE_ROWS][4];
        const int64_t end = channels - c < chain ? channels : c + chain;
        chain_of_products(q, keys, key_row, c, end, ahead, part, whole, dtype, rows, count);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(4)
            for (int i = 0; i < count; i++)
                sum[r][i] += part[r][i];
        }
    }
}

/* Scores of `rows` rows against n keys, a multiple of four, lanes along the channel. ahead: prefetch distance in bytes
 * (0: no prefetch). `count` keys are read at a time, in a loop that is not unrolled: memory then sees one stream, and
 * the hardware prefetchers few instructions with short strides. */
static ALWAYS_INLINE void run_of_scores(const real *q, const char *keys, ptrdiff_t key_row, int64_t channels, int n,
                                        ptrdiff_t ahead, real *s, const int whole, const fa_dtype dtype, const int rows,
                                        const int count)
{
    for (int j = 0; j < n; j += 4) {
        vec sum[MOST_PLACE_ROWS][4], some[MOST_PLACE_ROWS][4];
        NOT_UNROLLED
        for (int i = 0; i < 4; i += count, keys += count * key_row) {
            key_products(q, keys, key_row, channels, ahead, some, whole, dtype, rows, count);
            UNROLL(8)
            for (int r = 0; r < rows; r++) {
                UNROLL(4)
                for (int k = 0; k < count; k++)
                    sum[r][i + k] = some[r][k];
            }
        }
        UNROLL(8)
        for (int r = 0; r < rows; r++)
            v_four_totals(s + r * SCORE_ROW + j, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

/* Products with one key, the i-th of four, summed by lanes. */
static ALWAYS_INLINE void products_in_registers(vec (*q_c)[MOST_VECS], const char *key, ptrdiff_t ahead, vec (*sum)[4],
                                                int i, const fa_dtype dtype, const int rows, const int vecs)
{
    const int step = LANES * size_of(dtype);
    IN_ORDER(key);
    UNROLL(16)
    for (int c = 0; c < vecs; c++) {
        const char *k = key + c * step;
        if (ahead && c * step % 64 == 0)
            prefetch_line(k + ahead, dtype == REAL_DTYPE);
        const vec k_c = v_load_as(k, dtype);
        UNROLL(2)
        for (int r = 0; r < rows; r++) {
            if (c == 0)
                sum[r][i] = q_c[r][c] * k_c;
            else
                sum[r][i] = v_fma(q_c[r][c], k_c, sum[r][i]);
        }
    }
}

/* Scores of up to two rows of `vecs` whole vectors against n keys, a multiple of four, with the queries in registers.
 * Keys are read in order, and few instructions wait for each: how many a CPU can hold waiting seems to limit how far
 * ahead it loads (docs/notebook, page 10). */
static ALWAYS_INLINE void scores_in_registers(const real *q, const char *keys, ptrdiff_t key_row, int n,
                                              ptrdiff_t ahead, real *s, const fa_dtype dtype, const int rows,
                                              const int vecs)
{
    vec q_c[2][MOST_VECS];
    UNROLL(16)
    for (int r = 0; r < rows; r++) {
        UNROLL(16)
        for (int c = 0; c < vecs; c++)
            q_c[r][c] = v_load(query_at(q, c * LANES) + r * STRIP);
    }
    for (int j = 0; j < n; j += 4) {
        vec sum[2][4];
        if (vecs < LONG_VECS) {
            UNROLL(4)
            for (int i = 0; i < 4; i++, keys += key_row)
                products_in_registers(q_c, keys, ahead, sum, i, dtype, rows, vecs);
        } else {
            NOT_UNROLLED
            for (int i = 0; i < 4; i++, keys += key_row)
                products_in_registers(q_c, keys, ahead, sum, i, dtype, rows, vecs);
        }
        UNROLL(2)
        for (int r = 0; r < rows; r++)
            v_four_totals(s + r * SCORE_ROW + j, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

/* The same for an even number of vectors, up to CHAIN, and contiguous keys: each iteration reads two vectors of each of
 * four keys. */
static ALWAYS_INLINE void run_of_pairs(const real *q, const char *keys, ptrdiff_t key_row, int n, ptrdiff_t ahead,
                                       real *s, const fa_dtype dtype, const int rows)
{
    const int size = size_of(dtype), step = LANES * size;
    for (int j = 0; j < n; j += 4) {
        vec sum[MOST_PLACE_ROWS][4];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                sum[r][i] = (vec){0};
        }
        const char *next = keys + ahead;
        for (int64_t c = 0; c < key_row; c += 2 * step, keys += 2 * step) {
            const real *q_c = query_at(q, c / size);
            vec k_c[2][4];
            UNROLL(2)
            for (int v = 0; v < 2; v++) {
                UNROLL(4)
                for (int i = 0; i < 4; i++) {
                    k_c[v][i] = v_load_as(keys + i * key_row + v * step, dtype);
                    HOLD(k_c[v][i]);
                }
            }
            if (ahead)
                prefetch_vectors(next, step, 8, step);
            next += 8 * step;
            UNROLL(2)
            for (int v = 0; v < 2; v++) {
                UNROLL(8)
                for (int r = 0; r < rows; r++) {
                    const vec q_r = v_load(q_c + r * STRIP + v * LANES);
                    UNROLL(4)
                    for (int i = 0; i < 4; i++)
                        sum[r][i] = v_fma(q_r, k_c[v][i], sum[r][i]);
                }
            }
        }
        keys += 3 * key_row;
        UNROLL(8)
        for (int r = 0; r < rows; r++)
            v_four_totals(s + r * SCORE_ROW + j, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

/* Scores of `rows` rows against n keys. With more than two rows, arithmetic takes longer than reading, so they share
 * loads. For one and two rows the usual numbers of channels have code of their own, up to three times as fast. */
static ALWAYS_INLINE void scores_of_rows(const real *q, const char *keys, ptrdiff_t key_row, int64_t channels, int n,
                                         ptrdiff_t ahead, real *s, const fa_dtype dtype, const int rows)
{
    const int whole = key_row == channels * size_of(dtype);
    /* Two vectors of four keys and the sums of more than four rows do not fit in the registers. */
    const int in_pairs = rows <= 4 && whole && channels % (2 * LANES) == 0 && channels <= CHAIN * LANES;
    if (rows <= 2 && channels % LANES == 0)
        switch (channels / LANES) {
#define IN_REGISTERS(vecs)                                                     \
    case vecs:                                                                 \
        if (rows > MOST_VECS / vecs)                                           \
            break;                                                             \
        scores_in_registers(q, keys, key_row, n, ahead, s, dtype, rows, vecs); \
        return;
            FOR_USUAL(IN_REGISTERS)
#undef IN_REGISTERS
        }
    if (rows <= 2 && channels <= DECODE_VECS * LANES)
        run_of_scores(q, keys, key_row, channels, n, ahead, s, 0, dtype, rows, 2);
    else if (rows <= 2)
        run_of_scores(q, keys, key_row, channels, n, ahead, s, 0, dtype, rows, 1);
    else if (PLACE_ROWS <= 2)
        run_of_scores(q, keys, key_row, channels, n, ahead, s, 0, dtype, rows, 2);
    else if (in_pairs && ahead) /* the compiler knows whether to prefetch: one test less */
        run_of_pairs(q, keys, key_row, n, ahead, s, dtype, rows);
    else if (in_pairs)
        run_of_pairs(q, keys, key_row, n, 0, s, dtype, rows);
    else if (whole)
        run_of_scores(q, keys, key_row, channels, n, ahead, s, 1, dtype, rows, 4);
    else
        run_of_scores(q, keys, key_row, channels, n, ahead, s, 0, dtype, rows, 4);
}

/* Not inlined: in one large function compilers run out of registers, and clang does not unroll all loops. */
typedef void (*scores_function)(const real *q, const char *keys, ptrdiff_t key_row, int64_t channels, int n,
                                ptrdiff_t ahead, real *s);
#define SCORES_OF(name, dtype, rows)                                                                             \
    static NEVER_INLINE void name##_##rows(const real *q, const char *keys, ptrdiff_t key_row, int64_t channels, \
                                           int n, ptrdiff_t ahead, real *s)                                      \
    {                                                                                                            \
        scores_of_rows(q, keys, key_row, channels, n, ahead, s, dtype, rows);                                    \
    }
#define SCORES_OF_TWO(name, dtype) \
    SCORES_OF(name, dtype, 1)      \
    SCORES_OF(name, dtype, 2)
#define SCORES_OF_FOUR(name, dtype) \
    SCORES_OF_TWO(name, dtype)      \
    SCORES_OF(name, dtype, 3)       \
    SCORES_OF(name, dtype, 4)
#define SCORES_OF_SIX(name, dtype) \
    SCORES_OF_FOUR(name, dtype)    \
    SCORES_OF(name, dtype, 5)      \
    SCORES_OF(name, dtype, 6)
#if PLACE_ROWS > 2
#define SCORES(name, dtype)    \
    SCORES_OF_SIX(name, dtype) \
    static const scores_function name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};
#define WIDENED_SCORES SCORES
#else
#define SCORES(name, dtype)    \
    SCORES_OF_TWO(name, dtype) \
    static const scores_function name[] = {name##_1, name##_2};
#define WIDENED_SCORES(name, dtype) \
    SCORES_OF_FOUR(name, dtype)     \
    static const scores_function name[] = {name##_1, name##_2, name##_3, name##_4};
#endif
SCORES(scores_of_real, REAL_DTYPE)
#if BITS == 32
WIDENED_SCORES(scores_of_f16, FA_F16)
WIDENED_SCORES(scores_of_bf16, FA_BF16)
WIDENED_SCORES(scores_of_i8, FA_I8)
#endif
#undef SCORES
#undef WIDENED_SCORES
#undef SCORES_OF_TWO
#undef SCORES_OF_FOUR
#undef SCORES_OF_SIX
#undef SCORES_OF

/* Rows that share a load; of keys that are widened more, so that fewer rows widen them again. */
static ALWAYS_INLINE int rows_at_once(fa_dtype dtype) { return dtype == REAL_DTYPE ? PLACE_ROWS : MOST_PLACE_ROWS; }

/* Scores of a group of rows against the keys [begin, end) of a block, or of a single row against several blocks. Keys
 * up to the next whole vector also get scores, which mean nothing. The order of additions depends on row and key alone.
 * ahead: prefetch distance in bytes (0: no prefetch). scratch: room for KEYS_AT_ONCE keys; keys that cannot be read in
 * place are copied there, times `scales`, which are those of the first of `keys`. */
enum { KEYS_AT_ONCE = 16 };

static void row_scores(const fa_problem *problem, const real *q, int rows, const char *keys, const fa_view *key,
                       const struct scales *scales, int begin, int end, ptrdiff_t ahead, real *scratch, real *s)
{
    const int64_t channels = problem->head_dim;
    const int in_place = readable(key) || (widenable(key, channels) && !scales->data);
    for (int j = begin / 4 * 4, n; j < (end + LANES - 1) / LANES * LANES; j += n) {
        const char *k = keys + j * key->row;
        ptrdiff_t k_row = key->row, distance = ahead;
        fa_dtype dtype = key->dtype;
        n = in_place && j >= begin ? (end - j) / 4 * 4 : 0;
        if (rows > rows_at_once(dtype) && n > 16) /* they stay in L1 for all rows */
            n = 16;
        if (n <= 0) {
            const int left = (end - j) / 4 * 4;
            n = in_place || j < begin || left <= 0 ? 4 : left < KEYS_AT_ONCE ? left : KEYS_AT_ONCE;
            for (int i = 0; i < n && ahead; i++)
                prefetch_bytes(k + i * key->row + ahead, bytes_of(key, channels));
            if (j >= begin && j + n <= end)
                copy_scaled(k, key, channels, scales, j, n, scratch, channels);
            else
                for (int i = 0; i < n; i++) {
                    const int seen = j + i < begin ? begin : j + i < end ? j + i : end - 1;
                    copy_scaled(keys + seen * key->row, key, channels, scales, seen, 1, scratch + i * channels,
                                channels);
                }
            k = (const char *)scratch;
            k_row = channels * (ptrdiff_t)sizeof(real);
            distance = 0;
            dtype = REAL_DTYPE;
        }
        const scores_function *score = BY_DTYPE(scores_of, dtype);
        const int most = rows_at_once(dtype);
        for (int r = 0, together; r < rows; r += together, distance = 0) {
            together = rows - r < most ? rows - r : most;
            score[together - 1](q + r * STRIP, k, k_row, channels, n, distance, s + r * SCORE_ROW + j);
        }
    }
}
