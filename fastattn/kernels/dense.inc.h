/* A layer's product: rows of x times a matrix that was packed once, and what happens to each number of the result.
 *
 * The matrix lies in panels of PANEL columns, each [d_in][PANEL], zero-padded at the right. Many rows: x is packed too
 * (dense_pack), and a block of it, DENSE_DEPTH channels deep, stays in the second cache while panels pass; the part of
 * a panel that meets it stays in the first, where it is large enough. ROWS rows and a panel are multiplied in
 * registers. Few rows: the matrix is read once, at the speed of memory.
 *
 * A sum over channels is split at multiples of DENSE_LINK (many rows) or FEW_LINK (few), so the bits of a row depend on
 * nothing but the row, the matrix, and which of the two it is.
 */
enum {
    DENSE_DEPTH = 1024 / (int)sizeof(real), /* channels of a block */
    DENSE_LINK = 128,                       /* channels in one chain of additions */
    FEW_LINK = 64,                          /* the same for few rows, in two chains */
    FEW_AT_ONCE = 4,                        /* of few rows, how many share a load */
    FEW_CHAINED = 2,                        /* and how many of them have both chains at once */
    FEW_AHEAD = 16384                       /* bytes that the matrix is asked for ahead */
};
_Static_assert(DENSE_DEPTH % DENSE_LINK == 0 && FEW_LINK % 4 == 0, "whole links");

static int64_t dense_blocks(int64_t d_in) { return (d_in + DENSE_DEPTH - 1) / DENSE_DEPTH; }

/* Contract: contract.h. */
static size_t dense_packed(int64_t d_in, int64_t rows)
{
    return (size_t)((rows + ROWS - 1) / ROWS * ROWS) * (size_t)dense_blocks(d_in) * DENSE_DEPTH * sizeof(real);
}

/* Contract: contract.h. [block][row][DENSE_DEPTH]. */
static void dense_pack(const fa_dense *d, int64_t row, int64_t rows, int64_t from, int64_t to, void *packed)
{
    const int64_t block_size = (rows + ROWS - 1) / ROWS * ROWS * DENSE_DEPTH;
    for (int64_t r = from; r < to; r++) {
        const char *x_r = d->x.data + (row + r) * d->x.row;
        for (int64_t c = 0; c < d->d_in; c += DENSE_DEPTH) {
            const int64_t n = d->d_in - c < DENSE_DEPTH ? d->d_in - c : DENSE_DEPTH;
            gather((real *)packed + c / DENSE_DEPTH * block_size + r * DENSE_DEPTH, x_r + c * d->x.col, d->x.col, n,
                   d->x.dtype);
        }
    }
}

/* One row of an optional matrix, columns [column, column + n): in place if kernels can read whole vectors there, else
 * in `buffer`, PANEL numbers of which those from n on may be anything. */
static ALWAYS_INLINE const real *part_of_row(const fa_view *matrix, int64_t row, int64_t column, int64_t n,
                                             real *buffer)
{
    const char *at = matrix->data + row * matrix->row + column * matrix->col;
    if (n == PANEL && readable(matrix))
        return (const real *)at;
    gather(buffer, at, matrix->col, n, matrix->dtype);
    return buffer;
}

static ALWAYS_INLINE void finish_rows(const fa_dense *d, const real *sums, int64_t row, int64_t rows, int64_t panel,
                                      const fa_dense_activation activation)
{
    const int64_t column = panel * PANEL, n = d->d_out - column < PANEL ? d->d_out - column : PANEL;
    const real *scale = d->scale ? (const real *)d->scale + column : NULL;
    const real *bias = d->bias ? (const real *)d->bias + column : NULL;
    const int in_place = n == PANEL && readable(&d->out);
    real factor[PANEL] = {0}, addend[PANEL] = {0}, line[PANEL];
    for (int64_t r = 0; r < rows; r++, sums += PANEL) {
        char *out = d->out.data + (row + r) * d->out.row + column * d->out.col;
        const real *m = d->multiply.data ? part_of_row(&d->multiply, row + r, column, n, factor) : NULL;
        const real *a = d->residual.data ? part_of_row(&d->residual, row + r, column, n, addend) : NULL;
        real *to = in_place ? (real *)out : line;
        UNROLL(4)
        for (int v = 0; v < VECS; v++) {
            vec y = v_load(sums + v * LANES);
            if (scale)
                y *= v_load(scale + v * LANES);
            if (bias)
                y += v_load(bias + v * LANES);
            switch (activation) {
            case FA_DENSE_RELU:
                y = v_max((vec){0}, y);
                break;
            case FA_DENSE_GELU:
                y = v_gelu(y);
                break;
            case FA_DENSE_GELU_TANH:
                y = v_gelu_tanh(y);
                break;
            case FA_DENSE_SILU:
                y = v_silu(y);
                break;
            case FA_DENSE_NOTHING:
                break;
            }
            if (m)
                y *= v_load(m + v * LANES);
            if (a)
                y += v_load(a + v * LANES);
            v_store(to + v * LANES, y);
        }
        if (!in_place)
            scatter(out, d->out.col, line, n, d->out.dtype);
    }
}

/* Sums in rows of PANEL numbers become rows of the result. */
#define FINISH(name, activation)                                                                                 \
    static NEVER_INLINE void name(const fa_dense *d, const real *sums, int64_t row, int64_t rows, int64_t panel) \
    {                                                                                                            \
        finish_rows(d, sums, row, rows, panel, activation);                                                      \
    }
FINISH(finish_nothing, FA_DENSE_NOTHING)
FINISH(finish_relu, FA_DENSE_RELU)
FINISH(finish_gelu, FA_DENSE_GELU)
FINISH(finish_gelu_tanh, FA_DENSE_GELU_TANH)
FINISH(finish_silu, FA_DENSE_SILU)
#undef FINISH
static void (*const finish[])(const fa_dense *d, const real *sums, int64_t row, int64_t rows,
                              int64_t panel) = {[FA_DENSE_NOTHING] = finish_nothing,
                                                [FA_DENSE_RELU] = finish_relu,
                                                [FA_DENSE_GELU] = finish_gelu,
                                                [FA_DENSE_GELU_TANH] = finish_gelu_tanh,
                                                [FA_DENSE_SILU] = finish_silu};

/* out (+)= a times b, `rows` rows DENSE_DEPTH numbers apart against a panel; lines at `ahead` are fetched meanwhile,
 * one at each fourth channel or, if there are as `many`, several. */
static ALWAYS_INLINE void dense_tile(const real *restrict a, const real *restrict b, int64_t depth, real *restrict out,
                                     int add, const char *ahead, int64_t lines, const int rows, const int many)
{
    const int64_t pace = many ? lines / (depth / 4) + 1 : 1; /* lines at each fourth channel */
    int64_t t = 0;
    do {
        const int64_t stop = depth - t < DENSE_LINK ? depth : t + DENSE_LINK;
        vec sum[ROWS][VECS];
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < VECS; v++)
                sum[r][v] = (vec){0};
        }
#define DENSE_STEP(k)                                                            \
    do {                                                                         \
        vec b_v[VECS];                                                           \
        UNROLL(8)                                                                \
        for (int v = 0; v < VECS; v++)                                           \
            b_v[v] = v_load(b + (t + (k)) * PANEL + v * LANES);                  \
        UNROLL(8)                                                                \
        for (int r = 0; r < rows; r++) {                                         \
            const multiplier a_rt = v_multiplier(a + r * DENSE_DEPTH + t + (k)); \
            UNROLL(8)                                                            \
            for (int v = 0; v < VECS; v++)                                       \
                sum[r][v] = v_fma_multiplier(a_rt, b_v[v], sum[r][v]);           \
        }                                                                        \
    } while (0)
        for (; t + 4 <= stop; t += 4) {
            if (lines > 0) {
                if (many) {
                    NOT_UNROLLED
                    for (int64_t line = 0; line < pace; line++)
                        __builtin_prefetch(ahead + line * 64, 0, 2);
                    ahead += pace * 64, lines -= pace;
                } else {
                    __builtin_prefetch(ahead, 0, 2);
                    ahead += 64, lines--;
                }
            }
            DENSE_STEP(0);
            DENSE_STEP(1);
            DENSE_STEP(2);
            DENSE_STEP(3);
        }
        for (; t < stop; t++)
            DENSE_STEP(0);
#undef DENSE_STEP
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            UNROLL(8)
            for (int v = 0; v < VECS; v++) {
                real *o = out + r * PANEL + v * LANES;
                v_store(o, add ? v_load(o) + sum[r][v] : sum[r][v]);
            }
        }
        add = 1;
    } while (t < depth);
}
typedef void (*dense_function)(const real *a, const real *b, int64_t depth, real *out, int add, const char *ahead,
                               int64_t lines);
#define DENSE_TILE(rows, name, many)                                                                        \
    static NEVER_INLINE void name##_##rows(const real *a, const real *b, int64_t depth, real *out, int add, \
                                           const char *ahead, int64_t lines)                                \
    {                                                                                                       \
        dense_tile(a, b, depth, out, add, ahead, lines, rows, many);                                        \
    }
#define DENSE_NAME(rows, name) name##_##rows,
FOR_ROWS(DENSE_TILE, dense_tile, 0)
FOR_ROWS(DENSE_TILE, hasty_tile, 1)
static const dense_function dense_tiles[2][ROWS] = {{FOR_ROWS(DENSE_NAME, dense_tile)},
                                                    {FOR_ROWS(DENSE_NAME, hasty_tile)}};

/* Contract: contract.h. Sums, [panel][row][PANEL], and a part of a panel whose numbers have to be widened. */
static size_t dense_workspace(int64_t rows, int64_t panels)
{
    return (size_t)((rows + ROWS - 1) / ROWS * ROWS * panels + DENSE_DEPTH) * PANEL * sizeof(real);
}

/* Contract: contract.h. */
static void dense_block(const fa_dense *d, int64_t row, int64_t rows, const void *packed, int64_t panel_begin,
                        int64_t panel_end, void *workspace)
{
    const int64_t d_in = d->d_in, groups = (rows + ROWS - 1) / ROWS, size = size_of(d->dtype);
    real *const widened = workspace, *const sums = widened + DENSE_DEPTH * PANEL;
    int64_t c = 0;
    do {
        const int64_t depth = d_in - c < DENSE_DEPTH ? d_in - c : DENSE_DEPTH, next = c + depth;
        for (int64_t p = panel_begin; p < panel_end; p++) {
            const char *const panel = (const char *)d->panels + (p * d_in + c) * PANEL * size;
            const real *b = (const real *)panel;
            const char *ahead = panel;
            int64_t lines = 0;
            if (p + 1 < panel_end || next < d_in) {
                ahead = p + 1 < panel_end ? panel + d_in * PANEL * size
                                          : (const char *)d->panels + (panel_begin * d_in + next) * PANEL * size;
                const int64_t left = p + 1 < panel_end || d_in - next >= depth ? depth : d_in - next;
                lines = (left * PANEL * size / 64 + groups - 1) / groups;
            }
            const int hasty = depth >= 4 && lines > depth / 4; /* few groups have all of the next panel to fetch */
            if (d->dtype != REAL_DTYPE) {
                gather(widened, panel, size, depth * PANEL, d->dtype);
                b = widened;
            }
            for (int64_t g = 0; g < groups; g++, ahead += lines * 64) {
                const int64_t here = rows - g * ROWS < ROWS ? rows - g * ROWS : ROWS;
                real *const to = sums + ((p - panel_begin) * groups + g) * ROWS * PANEL;
                dense_tiles[hasty][here - 1]((const real *)packed + (c / DENSE_DEPTH * groups + g) * ROWS * DENSE_DEPTH,
                                             b, depth, to, c > 0, ahead, lines);
                if (next >= d_in)
                    finish[d->activation](d, to, row + g * ROWS, here, p);
            }
        }
        c = next;
    } while (c < d_in);
}

/* out (+)= x times FEW_LINK channels (or `depth`) of a panel, for a few rows d_in numbers apart. Even channels are one
 * chain of additions, odd ones another: up to FEW_CHAINED rows in one pass, more in two, for their sums alone fill the
 * registers. Meanwhile `lines` lines are fetched for each four channels of the first `asking` passes, from `ahead` on.
 */
static ALWAYS_INLINE void few_tile(const real *restrict x, int64_t d_in, const char *restrict b, int64_t depth,
                                   real *restrict out, int add, const char *ahead, int lines, int asking,
                                   const int rows, const fa_dtype dtype)
{
    const int size = size_of(dtype), row = PANEL * size;
    const int passes = rows > FEW_CHAINED ? 2 : 1, steps = 4 / passes; /* steps: of each four channels */
    real even[FEW_AT_ONCE][PANEL];
    UNROLL(2)
    for (int pass = 0; pass < passes; pass++) {
        /* Evenly, where there is one for each step: memory is slower if it is asked for many at once. */
        const int wanted = pass < asking ? lines : 0;
        const int each = row >= 64 ? wanted / steps : 0, rest = wanted - each * steps;
        vec sum[2][FEW_AT_ONCE][VECS];
        UNROLL(2)
        for (int k = 0; k < 2; k++) {
            UNROLL(4)
            for (int r = 0; r < rows; r++) {
                UNROLL(4)
                for (int v = 0; v < VECS; v++)
                    sum[k][r][v] = (vec){0};
            }
        }
#define FEW_ASK(count)                                          \
    do {                                                        \
        NOT_UNROLLED                                            \
        for (int line = 0; line < (count); line++, ahead += 64) \
            __builtin_prefetch(ahead, 0, 2);                    \
    } while (0)
#define FEW_STEP(k)                                                          \
    do {                                                                     \
        vec b_v[VECS];                                                       \
        UNROLL(4)                                                            \
        for (int v = 0; v < VECS; v++)                                       \
            b_v[v] = v_load_as(b_t + (k) * row + v * LANES * size, dtype);   \
        UNROLL(4)                                                            \
        for (int r = 0; r < rows; r++) {                                     \
            const vec x_r = v_fill(x[r * d_in + t + (k)]);                   \
            UNROLL(4)                                                        \
            for (int v = 0; v < VECS; v++)                                   \
                sum[(k) % 2][r][v] = v_fma(x_r, b_v[v], sum[(k) % 2][r][v]); \
        }                                                                    \
        FEW_ASK(each);                                                       \
    } while (0)
        const char *b_t = b + pass * row;
        int64_t t = pass;
        for (; t + 4 - pass <= depth; t += 4, b_t += 4 * row) {
            FEW_STEP(0);
            if (passes == 1)
                FEW_STEP(1);
            FEW_STEP(2);
            if (passes == 1)
                FEW_STEP(3);
            FEW_ASK(rest);
        }
        for (; t < depth; t += 2, b_t += 2 * row) {
            FEW_STEP(0);
            if (passes == 1 && t + 1 < depth)
                FEW_STEP(1);
        }
#undef FEW_STEP
#undef FEW_ASK
        UNROLL(4)
        for (int r = 0; r < rows; r++) {
            UNROLL(4)
            for (int v = 0; v < VECS; v++) {
                real *const o = out + r * PANEL + v * LANES, *const e = even[r] + v * LANES;
                if (passes == 2 && pass == 0) {
                    v_store(e, sum[0][r][v]);
                    continue;
                }
                const vec s = passes == 1 ? sum[0][r][v] + sum[1][r][v] : v_load(e) + sum[0][r][v];
                v_store(o, add ? v_load(o) + s : s);
            }
        }
    }
}
typedef void (*few_function)(const real *x, int64_t d_in, const char *b, int64_t depth, real *out, int add,
                             const char *ahead, int lines, int asking);
#define FEW_TILE(rows, name, dtype)                                                                              \
    static NEVER_INLINE void name##_##rows(const real *x, int64_t d_in, const char *b, int64_t depth, real *out, \
                                           int add, const char *ahead, int lines, int asking)                    \
    {                                                                                                            \
        few_tile(x, d_in, b, depth, out, add, ahead, lines, asking, rows, dtype);                                \
    }
#define FEW_TILES(name, dtype) \
    FEW_TILE(1, name, dtype) FEW_TILE(2, name, dtype) FEW_TILE(3, name, dtype) FEW_TILE(4, name, dtype)
#define FEW_NAMES(name) {name##_1, name##_2, name##_3, name##_4}
FEW_TILES(few_real, REAL_DTYPE)
#if BITS == 32
FEW_TILES(few_f16, FA_F16)
FEW_TILES(few_bf16, FA_BF16)
FEW_TILES(few_i8, FA_I8)
#endif
_Static_assert(FEW_AT_ONCE == 4, "the rows for which there are functions");

static const few_function *few_functions(fa_dtype dtype)
{
    static const few_function of_real[] = FEW_NAMES(few_real);
#if BITS == 32
    static const few_function of_f16[] = FEW_NAMES(few_f16), of_bf16[] = FEW_NAMES(few_bf16),
                              of_i8[] = FEW_NAMES(few_i8);
    if (dtype == FA_F16)
        return of_f16;
    if (dtype == FA_BF16)
        return of_bf16;
    if (dtype == FA_I8)
        return of_i8;
#endif
    (void)dtype;
    return of_real;
}

/* Contract: contract.h. */
static void dense_few(const fa_dense *d, const void *x, int64_t panel_begin, int64_t panel_end)
{
    const few_function *const tiles = few_functions(d->dtype);
    const int64_t d_in = d->d_in, row = (int64_t)PANEL * size_of(d->dtype);
    /* Each pass over a part of a panel fetches its share of the lines FEW_AHEAD bytes further on. */
    const int passes = (int)((d->rows + FEW_CHAINED - 1) / FEW_CHAINED);
    const int of_four = row > 16 ? (int)(4 * row / 64) : 1, sharing = passes < of_four ? passes : of_four;
    const int lines = d->prefetch ? (of_four + sharing - 1) / sharing : 0;
    for (int64_t p = panel_begin; p < panel_end; p++) {
        const char *const panel = (const char *)d->panels + p * d_in * row;
        real sums[FA_DENSE_FEW][PANEL];
        int64_t c = 0;
        do {
            const int64_t depth = d_in - c < FEW_LINK ? d_in - c : FEW_LINK, lines_of_pass = depth / 4 * lines;
            for (int64_t r = 0; r < d->rows; r += FEW_AT_ONCE) {
                const int64_t rows = d->rows - r < FEW_AT_ONCE ? d->rows - r : FEW_AT_ONCE, pass = r / FEW_CHAINED;
                tiles[rows - 1]((const real *)x + r * d_in + c, d_in, panel + c * row, depth, sums[r], c > 0,
                                panel + c * row + FEW_AHEAD + pass * lines_of_pass * 64, lines, sharing - (int)pass);
            }
            c += depth;
        } while (c < d_in);
        finish[d->activation](d, sums[0], 0, d->rows, p);
    }
}
