/* The one matrix product: out[r][:] (+)= sum over t of a(t, r) * b(t)[:], a tile of up to ROWS x VECS vectors that lives
 * in registers while t runs. Dot scores and weighted sums are both made of it.
 *
 * Each product is cut into runs of CHUNK steps, each summed from zero and then added, because the rounding errors of one
 * long chain of equal signs add up to n / 8 eps.
 *
 * a: number t of row r at a[t * step + r * row]; step and row are constants in each of the two layouts below.
 * b: row t at b + t * b_step bytes, vecs * LANES numbers of it are read.
 */
enum { NAME(CHUNK) = 64 };

typedef void (*NAME(product_function))(const real *a, const char *b, ptrdiff_t b_step, int64_t n, real *out,
                                       ptrdiff_t out_row, int add);

static ALWAYS_INLINE void NAME(product)(const real *restrict a, const int step, const int row, const char *restrict b,
                                        ptrdiff_t b_step, int64_t n, real *restrict out, ptrdiff_t out_row, int add,
                                        const int rows, const int vecs)
{
    vec sum[ROWS][VECS];
    UNROLL(8)
    for (int r = 0; r < rows; r++)
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            sum[r][v] = (vec){0};
    for (int64_t t = 0; t < n; t++) {
        vec b_t[VECS];
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            b_t[v] = NAME(load)(b + v * VECTOR_BYTES);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            vec a_r = NAME(fill)(a[r * row]);
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = NAME(fma)(a_r, b_t[v], sum[r][v]);
        }
        a += step;
        b += b_step;
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++)
        UNROLL(8)
        for (int v = 0; v < vecs; v++) {
            real *to = out + r * out_row + v * LANES;
            NAME(store)(to, add ? NAME(load)(to) + sum[r][v] : sum[r][v]);
        }
}

/* Both layouts for every number of rows and vectors. `interleaved`: the rows of a group side by side, a[t][r];
 * `separate`: rows of FA_BLOCK numbers, a[r][t]. */
#define PRODUCT(rows, vecs)                                                                                              \
    static NEVER_INLINE void NAME(interleaved_##rows##_##vecs)(const real *a, const char *b, ptrdiff_t b_step, int64_t n, \
                                                               real *out, ptrdiff_t out_row, int add)                   \
    {                                                                                                                    \
        NAME(product)(a, rows, 1, b, b_step, n, out, out_row, add, rows, vecs);                                          \
    }                                                                                                                    \
    static NEVER_INLINE void NAME(separate_##rows##_##vecs)(const real *a, const char *b, ptrdiff_t b_step, int64_t n,    \
                                                            real *out, ptrdiff_t out_row, int add)                      \
    {                                                                                                                    \
        NAME(product)(a, 1, FA_BLOCK, b, b_step, n, out, out_row, add, rows, vecs);                                      \
    }
#if VECS == 4
#define FOR_VECS(macro, rows) macro(rows, 1) macro(rows, 2) macro(rows, 3) macro(rows, 4)
#define LIST_VECS(kind, rows) {NAME(kind##_##rows##_1), NAME(kind##_##rows##_2), NAME(kind##_##rows##_3), \
                               NAME(kind##_##rows##_4)}
#else
#define FOR_VECS(macro, rows) macro(rows, 1) macro(rows, 2)
#define LIST_VECS(kind, rows) {NAME(kind##_##rows##_1), NAME(kind##_##rows##_2)}
#endif
FOR_VECS(PRODUCT, 1)
FOR_VECS(PRODUCT, 2)
FOR_VECS(PRODUCT, 3)
FOR_VECS(PRODUCT, 4)
FOR_VECS(PRODUCT, 5)
FOR_VECS(PRODUCT, 6)
static const NAME(product_function) NAME(interleaved)[ROWS][VECS] = {
    LIST_VECS(interleaved, 1), LIST_VECS(interleaved, 2), LIST_VECS(interleaved, 3),
    LIST_VECS(interleaved, 4), LIST_VECS(interleaved, 5), LIST_VECS(interleaved, 6)};
static const NAME(product_function) NAME(separate)[ROWS][VECS] = {
    LIST_VECS(separate, 1), LIST_VECS(separate, 2), LIST_VECS(separate, 3),
    LIST_VECS(separate, 4), LIST_VECS(separate, 5), LIST_VECS(separate, 6)};
