/* The one matrix product: out[r][:] (+)= sum over t of a[r][t] * b[t][:], for a tile of up to ROWS x VECS vectors that
 * stays in registers during the loop over t. Dot scores (a: queries, t: channels, b: keys in lanes) and weighted sums
 * (a: weights, t: keys, b: values) are both built on it.
 *
 * The rounding errors of a chain of n equal additions add up to n / 8 eps, so sums are nested: STEPS products make a
 * term, terms are summed over CHUNK steps, and that sum is added to `out`. STEPS > 1 is for instruction sets with
 * enough registers for terms as well as sums: the additions overlap the multiplications. Two vectors of b share each
 * broadcast of a; more would take too many registers, and one would need a load per multiplication. Shorter chunks
 * instead would cost stores (docs/notebook, page 3).
 *
 * Strides are constants where they can be: of a, FA_BLOCK numbers (weights) or STRIP (queries), since there would not
 * be enough registers for the addresses; of b, where it is packed in panels; of scores. Where a step is one product,
 * lines are prefetched between chunks: to count them at each step, in memory, would take longer than its
 * multiplications.
 *
 * Terms and chunks end at fixed positions, wherever the product begins: whether a hidden key is added, with weight zero
 * and a finite value, or skipped changes no bit except the sign of a zero, which finish_row removes.
 */
_Static_assert(CHUNK % STEPS == 0 && STRIP % CHUNK == 0, "whole terms make a chunk, whole chunks a strip");
_Static_assert((CHUNK & (CHUNK - 1)) == 0, "t | (CHUNK - 1) is the last t of a chunk");

/* `panels` adjacent tiles, whose columns of b are b_panel bytes apart. Rows of b are b_row bytes apart, rows of out
 * out_row numbers; t runs from `from` to `to`, both multiples of STEPS. add: accumulate into out. prefetch: lines to
 * prefetch, some at each term or chunk; may be NULL. groups: of rows, which pass over a panel one after the other while
 * it is in L1; their a and out are a_group and out_group numbers apart. */
typedef void (*product_function)(const real *a, const char *b, ptrdiff_t b_row, ptrdiff_t b_panel, int panels, int from,
                                 int to, real *out, ptrdiff_t out_row, int add, struct prefetch *prefetch, int groups,
                                 ptrdiff_t a_group, ptrdiff_t out_group);

/* sum[r][:] += a[r] * b[:] for the next a and b, where a term is one product. */
static ALWAYS_INLINE void product_step(const real **a_t, const int a_row, const char **b_t, ptrdiff_t b_row,
                                       vec sum[ROWS][VECS], const int rows, const int vecs)
{
    const real *a = *a_t;
    vec b_v[VECS];
    UNROLL(8)
    for (int v = 0; v < vecs; v++)
        b_v[v] = v_load(*b_t + v * VECTOR_BYTES);
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        const multiplier a_r = v_multiplier(a + r * a_row);
        UNROLL(8)
        for (int v = 0; v < vecs; v++) {
            sum[r][v] = v_fma_multiplier(a_r, b_v[v], sum[r][v]);
            LOAD_AFTER(sum[r][v], a);
        }
    }
    *a_t = a + 1;
    *b_t += b_row;
}

static ALWAYS_INLINE void product_tile(const real *restrict a, const int a_row, const char *restrict b, ptrdiff_t b_row,
                                       int from, int to, real *restrict out, ptrdiff_t out_row, int add,
                                       struct prefetch *prefetch, const int rows, const int vecs)
{
    int t = from;
    do {
        const int end = (t | (CHUNK - 1)) + 1, stop = to < end ? to : end;
        const char *b_t = b + t * b_row;
        const real *a_t = a + t;
        if (prefetch && STEPS == 1)
            prefetch_lines(prefetch, prefetch->pace);
        vec sum[ROWS][VECS];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = (vec){0};
        }
#if STEPS > 1
        for (; t < stop; t += STEPS, a_t += STEPS, b_t += STEPS * b_row) {
            UNROLL(8)
            for (int v = 0; v < vecs; v += 2) {
                const int n = vecs - v < 2 ? vecs - v : 2;
                if (prefetch)
                    prefetch_lines(prefetch, prefetch->pace);
                vec b_v[STEPS][2];
                UNROLL(8)
                for (int k = 0; k < STEPS; k++) {
                    UNROLL(2)
                    for (int i = 0; i < n; i++)
                        b_v[k][i] = v_load(b_t + k * b_row + (v + i) * VECTOR_BYTES);
                }
                FORGET(a_t); /* or the broadcasts would be kept for the next v, and registers would spill */
                UNROLL(8)
                for (int r = 0; r < rows; r++) {
                    vec term[2];
                    UNROLL(8)
                    for (int k = 0; k < STEPS; k++) {
                        const vec a_rk = v_fill(a_t[r * a_row + k]);
                        UNROLL(2)
                        for (int i = 0; i < n; i++) {
                            if (k == 0)
                                term[i] = a_rk * b_v[0][i];
                            else
                                term[i] = v_fma(a_rk, b_v[k][i], term[i]);
                        }
                    }
                    UNROLL(2)
                    for (int i = 0; i < n; i++)
                        sum[r][v + i] += term[i];
                }
            }
        }
#else
        for (; t + 2 <= stop; t += 2) {
            product_step(&a_t, a_row, &b_t, b_row, sum, rows, vecs);
            product_step(&a_t, a_row, &b_t, b_row, sum, rows, vecs);
        }
        if (t < stop) {
            product_step(&a_t, a_row, &b_t, b_row, sum, rows, vecs);
            t++;
        }
#endif
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < vecs; v++) {
                real *o = out + r * out_row + v * LANES;
                v_store(o, add ? v_load(o) + sum[r][v] : sum[r][v]);
            }
        }
        add = 1;
    } while (t < to);
}

/* For every number of rows and vectors. */
#if ROWS == 4
#define FOR_ROWS(f, ...) f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__)
#elif ROWS == 6
#define FOR_ROWS(f, ...) \
    f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__) f(5, __VA_ARGS__) f(6, __VA_ARGS__)
#else
#define FOR_ROWS(f, ...)                                                                                        \
    f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__) f(5, __VA_ARGS__) f(6, __VA_ARGS__) \
        f(7, __VA_ARGS__) f(8, __VA_ARGS__)
#endif
#if VECS == 1
#define FOR_VECS(f, ...) f(1, __VA_ARGS__)
#elif VECS == 2
#define FOR_VECS(f, ...) f(1, __VA_ARGS__) f(2, __VA_ARGS__)
#elif VECS == 3
#define FOR_VECS(f, ...) f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__)
#else
#define FOR_VECS(f, ...) f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__)
#endif
/* Those whose b is packed, or whose out are scores, know its distance; the caller's is that. */
#define PRODUCT(vecs, rows, kind, a_row, b_step, out_step)                                                         \
    static NEVER_INLINE void kind##_##rows##_##vecs(                                                               \
        const real *a, const char *b, ptrdiff_t b_row, ptrdiff_t b_panel, int panels, int from, int to, real *out, \
        ptrdiff_t out_row, int add, struct prefetch *prefetch, int groups, ptrdiff_t a_group, ptrdiff_t out_group) \
    {                                                                                                              \
        (void)b_row, (void)out_row;                                                                                \
        for (; panels > 0; panels--, b += b_panel, out += vecs * LANES)                                            \
            for (int g = 0; g < groups; g++)                                                                       \
                product_tile(a + g * a_group, a_row, b, b_step, from, to, out + g * out_group, out_step, add,      \
                             prefetch, rows, vecs);                                                                \
    }
#define PRODUCTS_OF_ROWS(rows, kind, a_row, b_step, out_step) FOR_VECS(PRODUCT, rows, kind, a_row, b_step, out_step)
#define PRODUCT_NAME(vecs, rows, kind) kind##_##rows##_##vecs,
#define PRODUCT_NAMES(rows, kind) {FOR_VECS(PRODUCT_NAME, rows, kind)},
enum { PACKED_ROW = PANEL * sizeof(real) };
FOR_ROWS(PRODUCTS_OF_ROWS, query_products, STRIP, PACKED_ROW, SCORE_ROW)
FOR_ROWS(PRODUCTS_OF_ROWS, packed_products, SCORE_ROW, PACKED_ROW, out_row)
FOR_ROWS(PRODUCTS_OF_ROWS, weight_products, SCORE_ROW, b_row, out_row)
static const product_function query_products[ROWS][VECS] = {FOR_ROWS(PRODUCT_NAMES, query_products)};
static const product_function packed_products[ROWS][VECS] = {FOR_ROWS(PRODUCT_NAMES, packed_products)};
static const product_function weight_products[ROWS][VECS] = {FOR_ROWS(PRODUCT_NAMES, weight_products)};
