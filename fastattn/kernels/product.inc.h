/* The one matrix product: out[r][:] (+)= sum over t of a[r][t] * b[t][:], a tile of up to ROWS x VECS vectors that
 * lives in registers while t runs. Dot scores (a: queries, t: channels, b: keys in lanes) and weighted sums (a:
 * weights, t: keys, b: values) are both made of it.
 *
 * Each product is cut into runs of CHUNK steps, each summed from zero and then added, because the rounding errors of
 * one long chain of equal signs add up to n / 8 eps.
 */
enum { NAME(CHUNK) = 64 };

/* Rows of a are a_row numbers apart, rows of b b_row bytes, rows of out out_row numbers. */
typedef void (*NAME(product_function))(const real *a, ptrdiff_t a_row, const char *b, ptrdiff_t b_row, int64_t n,
                                       real *out, ptrdiff_t out_row, int add);

static ALWAYS_INLINE void NAME(product)(const real *restrict a, ptrdiff_t a_row, const char *restrict b,
                                        ptrdiff_t b_row, int64_t n, real *restrict out, ptrdiff_t out_row, int add,
                                        const int rows, const int vecs)
{
    vec sum[ROWS][VECS];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            sum[r][v] = (vec){0};
    }
    for (int64_t t = 0; t < n; t++) {
        vec b_t[VECS];
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            b_t[v] = NAME(load)(b + v * VECTOR_BYTES);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            vec a_rt = NAME(fill)(a[r * a_row + t]);
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = NAME(fma)(a_rt, b_t[v], sum[r][v]);
        }
        b += b_row;
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++) {
            real *to = out + r * out_row + v * LANES;
            NAME(store)(to, add ? NAME(load)(to) + sum[r][v] : sum[r][v]);
        }
    }
}

/* For every number of rows and vectors. */
#define PRODUCT(rows, vecs)                                                                                          \
    static NEVER_INLINE void NAME(product_##rows##_##vecs)(const real *a, ptrdiff_t a_row, const char *b,            \
                                                           ptrdiff_t b_row, int64_t n, real *out, ptrdiff_t out_row, \
                                                           int add)                                                  \
    {                                                                                                                \
        NAME(product)(a, a_row, b, b_row, n, out, out_row, add, rows, vecs);                                         \
    }
#if VECS == 4
#define FOR_VECS(rows) PRODUCT(rows, 1) PRODUCT(rows, 2) PRODUCT(rows, 3) PRODUCT(rows, 4)
#define LIST_VECS(rows) \
    {NAME(product_##rows##_1), NAME(product_##rows##_2), NAME(product_##rows##_3), NAME(product_##rows##_4)}
#else
#define FOR_VECS(rows) PRODUCT(rows, 1) PRODUCT(rows, 2)
#define LIST_VECS(rows) {NAME(product_##rows##_1), NAME(product_##rows##_2)}
#endif
FOR_VECS(1)
FOR_VECS(2)
FOR_VECS(3)
FOR_VECS(4)
FOR_VECS(5)
FOR_VECS(6)
static const NAME(product_function)
    NAME(products)[ROWS][VECS] = {LIST_VECS(1), LIST_VECS(2), LIST_VECS(3), LIST_VECS(4), LIST_VECS(5), LIST_VECS(6)};
