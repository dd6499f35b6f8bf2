/* The one matrix product: out[r][:] (+)= sum over t of a[r][t] * b[t][:], a tile of up to ROWS x VECS vectors that
 * lives in registers while t runs. Dot scores (a: queries, t: channels, b: keys in lanes) and weighted sums (a:
 * weights, t: keys, b: values) are both made of it.
 *
 * The rounding errors of a chain of n equal additions add up to n / 8 eps, so sums are nested: STEPS products make a
 * term, terms are added up for CHUNK steps, and that is added to `out`. STEPS > 1 is for instruction sets with
 * registers enough for terms beside the sums: additions run beside the multiplications. Two vectors of b share each
 * number of a; more would take registers, and one would need a load for each multiplication. Ending chunks more often
 * instead costs stores (docs/performance.md).
 *
 * Rows of a are at constant distances, FA_BLOCK numbers (weights) or STRIP (queries): with distances that are not known
 * to the compiler there are not enough registers for the addresses.
 *
 * Terms and chunks end at fixed positions, wherever the product begins: adding a hidden key, with weight zero and a
 * finite value, or leaving it out is the same to the bit, but for the sign of a zero, which finish_row takes away.
 */
_Static_assert(CHUNK % STEPS == 0 && STRIP % CHUNK == 0, "whole terms make a chunk, whole chunks a strip");
_Static_assert((CHUNK & (CHUNK - 1)) == 0, "t | (CHUNK - 1) is the last t of a chunk");

/* Lines of a matrix to ask memory for, in their order and some at a time, while other rows are worked on: a CPU that is
 * asked for much at once waits, and follows best what goes one way. */
typedef struct {
    const char *at;        /* the next line; `in_row` bytes are left of its row */
    int64_t in_row, bytes; /* of each row */
    ptrdiff_t row;
    int left, pace; /* lines, and how many of them at a time */
} NAME(asks);

static ALWAYS_INLINE void NAME(ask_for_lines)(NAME(asks) * asks, int lines)
{
    lines = lines < asks->left ? lines : asks->left;
    asks->left -= lines;
    for (; lines > 0; lines--) {
        __builtin_prefetch(asks->at, 0, 3);
        asks->at += 64;
        asks->in_row -= 64;
        if (asks->in_row <= 0) {
            asks->at += asks->row + asks->in_row - asks->bytes;
            asks->in_row = asks->bytes;
        }
    }
}

/* How often a product of so many vectors and numbers t asks. */
static ALWAYS_INLINE int64_t NAME(times_to_ask)(int64_t vectors, int64_t numbers)
{
    const int of_turn = STEPS > 1 ? 2 : VECS;
    return (vectors + of_turn - 1) / of_turn * (numbers / STEPS);
}

/* The lines of `rows` rows, from `data` on, for who asks so many times. */
static ALWAYS_INLINE NAME(asks)
    NAME(lines_to_ask)(const char *data, ptrdiff_t row, int64_t bytes, int64_t rows, int64_t times)
{
    const int64_t lines = rows * ((bytes + 63) / 64);
    return (NAME(asks)){data, bytes, bytes, row, (int)lines, times ? (int)((lines + times - 1) / times) : 0};
}

/* `panels` tiles side by side, whose columns of b begin b_panel bytes apart. Rows of b are b_row bytes apart, rows of
 * out out_row numbers; t runs from `from` to `to`, both multiples of STEPS. add: to what out holds. asks: for
 * some of these lines in every step, once for each load of vectors of b; may be NULL. */
typedef void (*NAME(product_function))(const real *a, const char *b, ptrdiff_t b_row, ptrdiff_t b_panel, int panels,
                                       int from, int to, real *out, ptrdiff_t out_row, int add, NAME(asks) * asks);

static ALWAYS_INLINE void NAME(product_tile)(const real *restrict a, const int a_row, const char *restrict b,
                                             ptrdiff_t b_row, int from, int to, real *restrict out, ptrdiff_t out_row,
                                             int add, NAME(asks) * asks, const int rows, const int vecs)
{
    int t = from;
    do {
        const int end = (t | (CHUNK - 1)) + 1, stop = to < end ? to : end;
        const char *b_t = b + t * b_row;
        vec sum[ROWS][VECS];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = (vec){0};
        }
        for (const real *a_t = a + t; t < stop; t += STEPS, a_t += STEPS, b_t += STEPS * b_row) {
#if STEPS > 1
            UNROLL(8)
            for (int v = 0; v < vecs; v += 2) {
                const int n = vecs - v < 2 ? vecs - v : 2;
                if (asks)
                    NAME(ask_for_lines)(asks, asks->pace);
                vec b_v[STEPS][2];
                UNROLL(8)
                for (int k = 0; k < STEPS; k++) {
                    UNROLL(2)
                    for (int i = 0; i < n; i++)
                        b_v[k][i] = NAME(load)(b_t + k * b_row + (v + i) * VECTOR_BYTES);
                }
                FORGET(a_t); /* or the broadcasts would be kept for the next v, and not all fit */
                UNROLL(8)
                for (int r = 0; r < rows; r++) {
                    vec term[2];
                    UNROLL(8)
                    for (int k = 0; k < STEPS; k++) {
                        const vec a_rk = NAME(fill)(a_t[r * a_row + k]);
                        UNROLL(2)
                        for (int i = 0; i < n; i++) {
                            if (k == 0)
                                term[i] = a_rk * b_v[0][i];
                            else
                                term[i] = NAME(fma)(a_rk, b_v[k][i], term[i]);
                        }
                    }
                    UNROLL(2)
                    for (int i = 0; i < n; i++)
                        sum[r][v + i] += term[i];
                }
            }
#else
            vec b_v[VECS];
            if (asks)
                NAME(ask_for_lines)(asks, asks->pace);
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                b_v[v] = NAME(load)(b_t + v * VECTOR_BYTES);
            UNROLL(8)
            for (int r = 0; r < rows; r++) {
                const vec a_rt = NAME(fill)(a_t[r * a_row]);
                UNROLL(8)
                for (int v = 0; v < vecs; v++)
                    sum[r][v] = NAME(fma)(a_rt, b_v[v], sum[r][v]);
            }
#endif
        }
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < vecs; v++) {
                real *o = out + r * out_row + v * LANES;
                NAME(store)(o, add ? NAME(load)(o) + sum[r][v] : sum[r][v]);
            }
        }
        add = 1;
    } while (t < to);
}

/* For every number of rows and vectors. */
#define PRODUCT(kind, a_row, rows, vecs)                                                                              \
    static NEVER_INLINE void NAME(kind##_##rows##_##vecs)(const real *a, const char *b, ptrdiff_t b_row,              \
                                                          ptrdiff_t b_panel, int panels, int from, int to, real *out, \
                                                          ptrdiff_t out_row, int add, NAME(asks) * asks)              \
    {                                                                                                                 \
        for (; panels > 0; panels--, b += b_panel, out += vecs * LANES)                                               \
            NAME(product_tile)(a, a_row, b, b_row, from, to, out, out_row, add, asks, rows, vecs);                    \
    }
#if VECS == 4
#define FOR_VECS(kind, a_row, rows) \
    PRODUCT(kind, a_row, rows, 1)   \
    PRODUCT(kind, a_row, rows, 2) PRODUCT(kind, a_row, rows, 3) PRODUCT(kind, a_row, rows, 4)
#define LIST_VECS(kind, rows) \
    {NAME(kind##_##rows##_1), NAME(kind##_##rows##_2), NAME(kind##_##rows##_3), NAME(kind##_##rows##_4)}
#else
#define FOR_VECS(kind, a_row, rows) PRODUCT(kind, a_row, rows, 1) PRODUCT(kind, a_row, rows, 2)
#define LIST_VECS(kind, rows) {NAME(kind##_##rows##_1), NAME(kind##_##rows##_2)}
#endif
#define PRODUCTS(kind, a_row)                                                                 \
    FOR_VECS(kind, a_row, 1)                                                                  \
    FOR_VECS(kind, a_row, 2)                                                                  \
    FOR_VECS(kind, a_row, 3)                                                                  \
    FOR_VECS(kind, a_row, 4)                                                                  \
    FOR_VECS(kind, a_row, 5)                                                                  \
    FOR_VECS(kind, a_row, 6)                                                                  \
    static const NAME(product_function)                                                       \
        NAME(kind)[ROWS][VECS] = {LIST_VECS(kind, 1), LIST_VECS(kind, 2), LIST_VECS(kind, 3), \
                                  LIST_VECS(kind, 4), LIST_VECS(kind, 5), LIST_VECS(kind, 6)};
PRODUCTS(query_products, STRIP)
PRODUCTS(weight_products, FA_BLOCK)
