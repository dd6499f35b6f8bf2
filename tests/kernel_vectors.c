/* The kernels without Python, against what kernel_vectors.py wrote: of every instruction set that this CPU, or an
 * emulator of one, can run. Reads cases from standard input, prints the largest error of each instruction set as a
 * share of the bound, and returns 1 if one is above it or there was no case. Links with the object files of
 * fastattn/kernels.
 */
#include "contract.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ATTENTION = 1, SOFTMAX = 2 };

/* In this order before each case; all int64. Then its arrays, contiguous: query, key, value, or x; expected and bound,
 * in double. */
typedef struct {
    int64_t operation, dtype, queries, keys, head_dim, value_dim, is_causal, is_decode;
} vector_case;

static void *room(size_t size)
{
    size = (size + FA_ALIGN) / FA_ALIGN * FA_ALIGN;
    void *p = aligned_alloc(FA_ALIGN, size);
    if (!p)
        exit(2);
    return p;
}

static void *read_array(int64_t numbers, size_t size)
{
    void *p = room((size_t)numbers * size);
    if (fread(p, size, (size_t)numbers, stdin) != (size_t)numbers)
        exit(2);
    return p;
}

static fa_view matrix(void *data, int64_t columns, size_t size, fa_dtype dtype)
{
    return (fa_view){.data = data, .row = (ptrdiff_t)columns * (ptrdiff_t)size, .col = (ptrdiff_t)size, .dtype = dtype};
}

/* As the driver of attention does it, tile by tile and span by span. */
static void attend(const fa_kernels *kernels, const vector_case *c, const fa_problem *problem, const fa_head *head)
{
    const int64_t rows = c->is_decode ? FA_DECODE_TILE : kernels->tuning.least_rows;
    void *workspace = room(kernels->tile_workspace(problem, rows, c->keys));
    for (int64_t row = 0; row < c->queries; row += rows) {
        const int64_t n = c->queries - row < rows ? c->queries - row : rows;
        int64_t cursor = 0, begin, end;
        kernels->open_tile(problem, head, row, n, workspace);
        while (fa_next_range(problem, head, row, n, &cursor, &begin, &end))
            for (int64_t stop; begin < end; begin = stop) {
                stop = (begin / FA_SPAN + 1) * FA_SPAN;
                stop = stop < end ? stop : end;
                kernels->visit_keys(problem, head, row, n, begin, stop, workspace);
            }
        kernels->close_tile(problem, head, row, n, workspace);
    }
    free(workspace);
}

static double number(const void *of, int64_t i, int is_double)
{
    return is_double ? ((const double *)of)[i] : (double)((const float *)of)[i];
}

int main(void)
{
    fa_instruction_set sets[8];
    const int n_sets = fa_runnable(sets, 8);
    double worst[8] = {0};
    int cases = 0;
    vector_case c;
    for (; fread(&c, sizeof c, 1, stdin) == 1; cases++) {
        const fa_dtype dtype = (fa_dtype)c.dtype;
        const size_t size = dtype == FA_F64 ? 8 : dtype == FA_F32 ? 4 : 2, real = dtype == FA_F64 ? 8 : 4;
        const int is_attention = c.operation == ATTENTION;
        const int64_t columns = is_attention ? c.value_dim : c.keys, results = c.queries * columns;
        void *x = read_array(c.queries * (is_attention ? c.head_dim : c.keys), size);
        void *key = read_array(is_attention ? c.keys * c.head_dim : 0, size);
        void *value = read_array(is_attention ? c.keys * c.value_dim : 0, size);
        double *expected = read_array(results, sizeof(double)), *bound = read_array(results, sizeof(double));
        void *out = room((size_t)results * size), *wide = room((size_t)results * real);
        for (int i = 0; i < n_sets; i++) {
            const fa_kernels *kernels = sets[i].kernels[dtype];
            if (is_attention) {
                const fa_problem problem = {.head_dim = c.head_dim,
                                            .value_dim = c.value_dim,
                                            .left = INT64_MAX,
                                            .right = c.is_causal ? 0 : INT64_MAX,
                                            .scale = 1 / sqrt((double)c.head_dim),
                                            .dtype = dtype,
                                            .decode = (int)c.is_decode,
                                            .prefetch = 1};
                const fa_head head = {.view[FA_QUERY] = matrix(x, c.head_dim, size, dtype),
                                      .view[FA_KEY] = matrix(key, c.head_dim, size, dtype),
                                      .view[FA_VALUE] = matrix(value, c.value_dim, size, dtype),
                                      .view[FA_OUT] = matrix(out, c.value_dim, size, dtype),
                                      .queries = c.queries,
                                      .keys = c.keys,
                                      .query_length = c.queries,
                                      .key_length = c.keys,
                                      .offset = c.keys - c.queries,
                                      .heads = 1};
                attend(kernels, &c, &problem, &head);
            } else {
                const ptrdiff_t row = (ptrdiff_t)columns * (ptrdiff_t)size;
                kernels->rows(FA_ROW_SOFTMAX, x, row, NULL, 0, NULL, 0, out, row, columns, c.queries);
            }
            kernels->gather(wide, out, (ptrdiff_t)size, results, dtype);
            for (int64_t j = 0; j < results; j++) {
                const double share = fabs(number(wide, j, real == 8) - expected[j]) / bound[j];
                worst[i] = share <= worst[i] ? worst[i] : isnan(share) ? INFINITY : share;
            }
        }
        void *arrays[] = {x, key, value, expected, bound, out, wide};
        for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
            free(arrays[i]);
    }
    int bad = cases == 0;
    for (int i = 0; i < n_sets; i++) {
        printf("%s: %d cases, largest error %.2f of the bound\n", sets[i].name, cases, worst[i]);
        bad |= !(worst[i] <= 1);
    }
    return bad;
}
