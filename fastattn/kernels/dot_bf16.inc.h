/* Prefill of dot products where query, key and value are bfloat16, by an instruction that multiplies them in pairs:
 * vdpbf16ps of AVX512-BF16. Expects kernels.inc.h with BITS 32, in a target that has the instruction.
 *
 * Two sums of products in one: of pairs of channels for scores, of pairs of keys for weighted sums. A pair is 32 bits,
 * the number of the lower index below. Queries, keys and values enter as they are, and the scale is applied to the
 * finished score. Scores, softmax and log-sum-exp are float's; only the weights of the sum are rounded to bfloat16, and
 * for its mean to be no larger than its numbers it is divided by the sum of these, which lies behind each row of o.
 *
 * The instruction takes and makes zeros for denormals, and products of large numbers may overflow before the scale is
 * applied. So that neither shows, some rows are computed again by the kernels that widen, `exact` in struct tile: those
 * that see a key with a number that is not `plain`, or have one themselves, and those whose output is not finite. That
 * is a property of a row and what it sees, so its bits depend on nothing else. Hidden keys that are not plain have
 * values of zero here, and weights of zero.
 */

/* Plain numbers of queries and keys are below 2**59 in magnitude: the products of MOST_CHANNELS of them sum up to less
 * than 2**127, and what a denormal adds to a score is below 2**-66. Those of values are zero, or from 2**-90 to below
 * 2**100: what is lost where a product is below 2**-126 is for a sum of up to 2**28 keys no more than the rounding of
 * weights allows, and their sums are finite. */
enum {
    MOST_CHANNELS = 512,
    SIZE_OF_BF16 = 0x7fff,
    PLAIN_BELOW = (127 + 59) << 7,
    VALUES_FROM = (127 - 90) << 7,
    VALUES_BELOW = (127 + 100) << 7
};
_Static_assert(LANES == 16 && FA_BLOCK / LANES % 2 == 0, "the lanes of the instruction; pairs of vectors");

enum { STRIP_PAIRS = STRIP / 2, LEAST_CHANNELS = 16 };

typedef uint32_t pair_bits __attribute__((may_alias));

/* sum + a_low * b_low + a_high * b_high */
static ALWAYS_INLINE vec v_dot_pairs(vec sum, ivec a, ivec b)
{
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* Rounds two vectors to pairs of neighbours: lane i has the numbers 2i and 2i + 1 of both together. */
static ALWAYS_INLINE ivec v_round_pairs(vec low, vec high)
{
    return (ivec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

static ALWAYS_INLINE ivec v_fill_pair(const pair_bits *p) { return (ivec)_mm512_set1_epi32((int)*p); }

/* n <= 2 * LANES numbers, then zeros. */
static ALWAYS_INLINE __m512i v_load_halves(const void *p, int n)
{
    return _mm512_maskz_loadu_epi16((__mmask32)bits_below(n), p);
}

/* Whether problems of this kind take this way, if their arrays are bfloat16; and whether this head does. */
static ALWAYS_INLINE int may_take_pairs(const fa_problem *problem)
{
    return problem->score == FA_DOT && problem->activation == FA_SOFTMAX && !problem->decode && !problem->value_shift &&
           problem->head_dim >= LEAST_CHANNELS && problem->head_dim <= MOST_CHANNELS &&
           problem->value_dim >= LEAST_CHANNELS && !scale_is_wide(problem->scale);
}

static ALWAYS_INLINE int takes_pairs(const fa_problem *problem, const fa_head *head)
{
    return may_take_pairs(problem) && head->view[FA_QUERY].dtype == FA_BF16 && head->view[FA_KEY].dtype == FA_BF16 &&
           head->view[FA_VALUE].dtype == FA_BF16;
}

/* n numbers of a row, at any address and stride. */
static ALWAYS_INLINE void copy_halves(uint16_t *to, const char *from, ptrdiff_t col, int64_t n)
{
    if (col == 2) {
        memcpy(to, from, (size_t)n * 2);
        return;
    }
    for (int64_t c = 0; c < n; c++)
        memcpy(to + c, from + c * col, 2);
}

/* Queries as [group][strip of channels][row][STRIP], padded with zeros to whole strips. */
static void pair_queries(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, struct tile *tile)
{
    const fa_view *view = &head->view[FA_QUERY];
    for (int64_t i = 0; i < rows; i++) {
        uint16_t *q = (uint16_t *)(tile->q + i / ROWS * group_size(tile->channels)) + i % ROWS * STRIP;
        const char *q_i = fa_row(head, view, row + i);
        unsigned largest = 0;
        for (int64_t c = 0; c < problem->head_dim; c += STRIP, q += ROWS * STRIP) {
            const int n = problem->head_dim - c < STRIP ? (int)(problem->head_dim - c) : STRIP;
            copy_halves(q, q_i + c * view->col, view->col, n);
            memset(q + n, 0, (size_t)(STRIP - n) * 2);
            for (int k = 0; k < STRIP; k++) {
                const unsigned size = q[k] & SIZE_OF_BF16;
                largest = size > largest ? size : largest;
            }
        }
        tile->exact[i] = largest >= PLAIN_BELOW;
    }
}

/* Packs keys [begin, end) of a block into panels, [panel][pair of channels][key of the panel]. Whole vectors of keys
 * are written; other lanes, and channels past head_dim, are zero. Adds those that are not plain to `strange`. */
static void pair_keys(int64_t channels, const char *keys, const fa_view *key, int begin, int end, int64_t pairs,
                      key_bits *strange, real *restrict to)
{
    const __m512i size = _mm512_set1_epi16(SIZE_OF_BF16), most = _mm512_set1_epi16(PLAIN_BELOW);
    _Alignas(64) uint16_t square[LANES][2 * LANES];
    real turned[LANES * LANES];
    for (int j = begin / LANES * LANES; j < end; j += LANES) {
        real *panel = to + j / PANEL * PANEL * pairs + j % PANEL;
        const char *k_j = keys + j * key->row;
        const int live = end - j < LANES ? end - j : LANES, skip = begin > j ? begin - j : 0;
        for (int64_t c = 0; c < channels; c += 2 * LANES) {
            const int n = channels - c < 2 * LANES ? (int)(channels - c) : 2 * LANES;
            const int direct = key->col == 2 && n == 2 * LANES && live == LANES && !skip;
            const char *from = direct ? k_j + c * 2 : (const char *)square;
            const ptrdiff_t row = direct ? key->row : (ptrdiff_t)sizeof square[0];
            if (!direct) {
                memset(square, 0, sizeof square);
                for (int i = skip; i < live; i++)
                    copy_halves(square[i], k_j + i * key->row + c * key->col, key->col, n);
            }
            __m512i largest = _mm512_setzero_si512();
            for (int i = 0; i < LANES; i++)
                largest = _mm512_max_epu16(largest, _mm512_and_si512(size, _mm512_loadu_si512(from + i * row)));
            if (_mm512_cmpge_epu16_mask(largest, most))
                for (int i = 0; i < LANES; i++)
                    if (_mm512_cmpge_epu16_mask(_mm512_and_si512(size, _mm512_loadu_si512(from + i * row)), most))
                        strange->word[(j + i) / 64] |= (uint64_t)1 << (j + i) % 64;
            if (c / 2 + LANES <= pairs) {
                v_transpose(panel + c / 2 * PANEL, PANEL, from, row);
            } else {
                v_transpose(turned, LANES, from, row);
                for (int64_t t = c / 2; t < pairs; t++)
                    v_store(panel + t * PANEL, v_load(turned + (t - c / 2) * LANES));
            }
        }
    }
}

/* Whether all numbers of a value are plain. */
static ALWAYS_INLINE int is_plain(const uint16_t *v, int64_t columns)
{
    const __m512i size = _mm512_set1_epi16(SIZE_OF_BF16), least = _mm512_set1_epi16(VALUES_FROM);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        const int n = columns - c < 2 * LANES ? (int)(columns - c) : 2 * LANES;
        const __m512i x = _mm512_and_si512(size, v_load_halves(v + c, n));
        const __m512i above = _mm512_maskz_sub_epi16(_mm512_test_epi16_mask(x, x), x, least); /* wraps if below */
        largest = _mm512_max_epu16(largest, above);
    }
    return !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(VALUES_BELOW - VALUES_FROM));
}

/* Packs rows [begin, end) of a block of values as [panel of columns][pair of keys][PANEL], panels v_panel numbers
 * apart, padded with zeros to whole vectors and pairs. Those of keys that are not plain, which are added to `strange`,
 * are zeros. scratch: room for two values. */
static void pair_values(int64_t columns, const char *values, const fa_view *value, int begin, int end, int64_t v_panel,
                        uint16_t *scratch, key_bits *strange, real *restrict to)
{
    for (int j = begin / 2 * 2; j < end; j += 2) {
        const uint16_t *v[2];
        int some[2]; /* numbers of the two values that are there: all or none */
        for (int i = 0; i < 2; i++) {
            const char *from = values + (j + i) * value->row;
            some[i] = j + i >= begin && j + i < end;
            v[i] = (const uint16_t *)(const void *)from; /* at any address */
            if (some[i] && value->col != 2) {
                copy_halves(scratch + i * columns, from, value->col, columns);
                v[i] = scratch + i * columns;
            }
            if (some[i] && !is_plain(v[i], columns)) {
                strange->word[(j + i) / 64] |= (uint64_t)1 << (j + i) % 64;
                some[i] = 0;
            }
        }
        for (int64_t c = 0; c < columns; c += LANES) {
            const int n = columns - c < LANES ? (int)(columns - c) : LANES;
            const __mmask16 live = (__mmask16)bits_below(n);
            const __m256i low = _mm256_maskz_loadu_epi16(some[0] ? live : 0, v[0] + c);
            const __m256i high = _mm256_maskz_loadu_epi16(some[1] ? live : 0, v[1] + c);
            v_store(
                to + c / PANEL * v_panel + j / 2 * PANEL + c % PANEL,
                (vec)_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
        }
    }
}

/* out[r][:] = (out[r][:] if add + sum over pairs t of a[r][t] . b[t][:]) * factor, for `panels` tiles side by side: the
 * product of product.inc.h. A chain of sums is a strip or a block: products of two bfloat16 have 16 bits, so that many
 * of a size add up without rounding. */
typedef void (*pair_function)(const pair_bits *a, ptrdiff_t a_row, const real *b, ptrdiff_t b_panel, int panels,
                              int from, int to, real *out, ptrdiff_t out_row, int add, const real *factor,
                              struct prefetch *prefetch);

static ALWAYS_INLINE void pair_tile(const pair_bits *a, ptrdiff_t a_row, const real *b, int from, int to, real *out,
                                    ptrdiff_t out_row, int add, const real *factor, const int rows, const int vecs)
{
    vec sum[ROWS][VECS];
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            sum[r][v] = (vec){0};
    }
    for (int t = from; t < to; t++) {
        ivec b_v[VECS];
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            b_v[v] = (ivec)v_load(b + t * PANEL + v * LANES);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const ivec a_r = v_fill_pair(a + r * a_row + t);
            UNROLL(8)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = v_dot_pairs(sum[r][v], a_r, b_v[v]);
        }
    }
    FORGET(factor); /* not in a register during the loop, which needs them all */
    const vec times = v_fill(*factor);
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++) {
            real *o = out + r * out_row + v * LANES;
            v_store(o, (add ? v_load(o) + sum[r][v] : sum[r][v]) * times);
        }
    }
}

#define PAIR_PRODUCT(vecs, rows, kind)                                                                       \
    static NEVER_INLINE void kind##_##rows##_##vecs(                                                         \
        const pair_bits *a, ptrdiff_t a_row, const real *b, ptrdiff_t b_panel, int panels, int from, int to, \
        real *out, ptrdiff_t out_row, int add, const real *factor, struct prefetch *prefetch)                \
    {                                                                                                        \
        for (; panels > 0; panels--, b += b_panel, out += vecs * LANES) {                                    \
            if (prefetch)                                                                                    \
                prefetch_lines(prefetch, prefetch->pace);                                                    \
            pair_tile(a, a_row, b, from, to, out, out_row, add, factor, rows, vecs);                         \
        }                                                                                                    \
    }
#define PAIR_PRODUCTS(rows, kind) FOR_VECS(PAIR_PRODUCT, rows, kind)
FOR_ROWS(PAIR_PRODUCTS, pair_products)
static const pair_function pair_products[ROWS][VECS] = {FOR_ROWS(PRODUCT_NAMES, pair_products)};

static const real unit = 1;

/* Scores of a group of rows against the vectors [first, last) of a packed block, times factor. */
static void pair_scores(const real *q, int64_t pairs, int rows, const real *k, int first, int last, real factor,
                        struct prefetch *prefetch, real *s)
{
    for (int64_t t = 0; t < pairs; t += STRIP_PAIRS, q += ROWS * STRIP_PAIRS) {
        const int n = pairs - t < STRIP_PAIRS ? (int)(pairs - t) : STRIP_PAIRS;
        for (int v = first; v < last;) {
            const int in_panel = v % VECS, left = last - v;
            const int panels = in_panel || left < VECS ? 1 : left / VECS;
            const int vecs = left < VECS - in_panel ? left : VECS - in_panel;
            const real *panel = k + v / VECS * PANEL * pairs + t * PANEL + in_panel * LANES;
            pair_products[rows - 1][vecs - 1]((const pair_bits *)q, STRIP_PAIRS, panel, PANEL * pairs, panels, 0, n,
                                              s + v * LANES, SCORE_ROW, t > 0, t + n < pairs ? &unit : &factor,
                                              prefetch);
            v += panels * vecs;
        }
    }
}

/* The weighted sum of the values [begin, end) of a block, by weights in pairs; of whole vectors of columns. */
static void pair_sums(const real *p, int rows, const real *v, int64_t v_panel, int begin, int end, int64_t columns,
                      real *sum, int64_t sum_row, struct prefetch *prefetch)
{
    const int panels = (int)(columns / PANEL), left = (int)(columns % PANEL) / LANES;
    const int from = begin / 2, to = (end + 1) / 2;
    if (panels)
        pair_products[rows - 1][VECS - 1]((const pair_bits *)p, SCORE_ROW, v, v_panel, panels, from, to, sum, sum_row,
                                          0, &unit, prefetch);
    if (left)
        pair_products[rows - 1][left - 1]((const pair_bits *)p, SCORE_ROW, v + panels * v_panel, 0, 1, from, to,
                                          sum + panels * PANEL, sum_row, 0, &unit, prefetch);
}

/* As `exponentials`, with weights rounded to pairs, in place. The lane-wise sums of the rounded weights go to
 * rounded[r]. */
static ALWAYS_INLINE void pair_exponentials(real *s, int rows, int first, int last, const int natural_log, real *m,
                                            real *l, real *shrink, real *rounded, int64_t rounded_row)
{
    const vec log2e = v_fill((real)1.44269504088896340736);
    const pair_bits ones = 0x3f803f80;
    vec most[ROWS], keep[ROWS];
    for (int r = 0; r < rows; r++) { /* vectors in whole pairs */
        real *s_r = s + r * SCORE_ROW;
        if (first % 2)
            v_store(s_r + (first - 1) * LANES, v_fill(-(real)INFINITY));
        if (last % 2)
            v_store(s_r + last * LANES, v_fill(-(real)INFINITY));
        most[r] = row_maximum(s_r, first, last);
    }
    for (int r = 0; r < rows; r++) {
        keep[r] = raise_maximum(m + r, most + r, natural_log);
        shrink[r] = keep[r][0];
    }
    for (int r = 0; r < rows; r++) {
        real *s_r = s + r * SCORE_ROW, *l_r = l + r * LANES;
        vec sum = {0}, of_rounded = {0};
        for (int v = first / 2; v < (last + 1) / 2; v++) {
            vec p[2];
            UNROLL(2)
            for (int i = 0; i < 2; i++) {
                const vec x = v_load(s_r + (2 * v + i) * LANES) - most[r];
                p[i] = v_exp2(natural_log ? x * log2e : x);
                sum += p[i];
            }
            const ivec pair = v_round_pairs(p[0], p[1]);
            of_rounded = v_dot_pairs(of_rounded, pair, v_fill_pair(&ones));
            v_store(s_r + v * LANES, (vec)pair);
        }
        v_store(l_r, v_fma(v_load(l_r), keep[r], sum));
        v_store(rounded + r * rounded_row, of_rounded);
    }
}

/* One block, of which the tile may see the keys [begin, end): as visit_block. */
static void visit_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t block,
                        int begin, int end, int64_t tile_end, struct tile *tile)
{
    const int natural_log = scores_in_nats(problem, head);
    const real factor = (real)(problem->scale * (natural_log ? 1 : 1.44269504088896340736));
    const fa_view *key = &head->view[FA_KEY], *value = &head->view[FA_VALUE];
    const int64_t pairs = tile->channels / 2, value_row = tile->value_row, columns = value_row - LANES;
    const int64_t next = block + FA_BLOCK, groups = (rows_seeing(problem, head, FA_BLOCK, rows) + ROWS - 1) / ROWS;
    const int64_t most_end = problem->left < INT64_MAX ? tile_end + rows / head->heads : tile_end;
    const int64_t fetch_end = most_end < head->key_length ? most_end : head->key_length;
    const int64_t times_k = FA_BLOCK / PANEL * ((pairs + STRIP_PAIRS - 1) / STRIP_PAIRS);
    struct next_rows next_keys = find_next_rows(key, next, fetch_end, problem->head_dim, groups, times_k);
    struct next_rows next_values =
        find_next_rows(value, next, fetch_end, problem->value_dim, groups, (columns + PANEL - 1) / PANEL);
    key_bits strange = {{0}};
    int packed = 0;
    int64_t first = 0, turn = 0;
    struct pass pass;
    for (; next_passes(problem, head, row, rows, block, &first, &pass); turn++) {
        if (!packed) {
            pair_keys(problem->head_dim, key->data + block * key->row, key, begin, end, pairs, &strange, tile->k);
            pair_values(problem->value_dim, value->data + block * value->row, value, begin, end, tile->v_panel / 2,
                        (uint16_t *)tile->part, &strange, tile->v);
            packed = 1;
        }
        if (tile->span[pass.g] == NO_SPAN) {
            const int64_t next_row = row + rows + pass.first;
            prefetch_queries(head, &head->view[FA_QUERY], next_row,
                             next_row + ROWS < head->queries ? next_row + ROWS : head->queries, problem->head_dim * 2);
            prefetch_queries(head, &head->view[FA_OUT], row + pass.first, row + pass.first + pass.group,
                             problem->value_dim * 2);
        }
        pass.span_begins = begin_span(problem, head, pass.g, pass.first, pass.group, block / FA_SPAN, tile);
        real *s = tile->s, *m = tile->m + pass.first, *l = tile->l + pass.first * LANES;
        real *o = tile->o + pass.first * value_row, *sum = pass.span_begins ? o : tile->part;
        pair_scores(tile->q + pass.g * group_size(tile->channels), pairs, pass.group, tile->k, pass.v_first,
                    pass.v_last, factor, prefetch_step(&next_keys, turn), s);
        rule_tile(problem, head, row + pass.first, pass.group, block, &pass.visible, tile, s);
        if (bits_any(&strange)) {
            make_bits(&pass.visible, pass.group);
            for (int r = 0; r < pass.group; r++)
                for (int w = 0; w < WORDS; w++)
                    tile->exact[pass.first + r] |= (pass.visible.bits[r].word[w] & strange.word[w]) != 0;
        }
        if (natural_log)
            pair_exponentials(s, pass.group, pass.v_first, pass.v_last, 1, m, l, pass.shrink, sum + columns, value_row);
        else
            pair_exponentials(s, pass.group, pass.v_first, pass.v_last, 0, m, l, pass.shrink, sum + columns, value_row);
        pair_sums(s, pass.group, tile->v, tile->v_panel / 2, pass.visible.lo, pass.visible.hi, columns, sum, value_row,
                  prefetch_step(&next_values, turn));
        if (!pass.span_begins)
            join_sum(o, sum, pass.group, value_row, pass.shrink);
    }
}
_Static_assert(GROUPS == 1, "one group at a time");

/* The functions of attend.inc.h for this way. */

static size_t pairs_workspace(const fa_problem *problem, int64_t rows, int64_t keys)
{
    const size_t plain = tile_workspace(problem, rows, keys);
    struct tile tile;
    if (!may_take_pairs(problem))
        return plain;
    const size_t size = lay_out(&tile, problem, rows, keys, LANES, (char *)(uintptr_t)FA_ALIGN);
    return (size > plain ? size : plain) + ((size_t)rows + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

static void open_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    struct tile *tile = workspace;
    if (!takes_pairs(problem, head)) {
        open_tile(problem, head, row, rows, workspace);
        return;
    }
    const size_t plain = tile_workspace(problem, rows, head->keys);
    const size_t size = lay_out(tile, problem, rows, head->keys, LANES, workspace);
    tile->exact = (char *)workspace + (size > plain ? size : plain); /* out of the way of the second pass */
    tile->row = row;
    pair_queries(problem, head, row, rows, tile);
    begin_tile(problem, rows, tile);
}

static void visit_keys_in_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                int64_t key_begin, int64_t key_end, void *workspace)
{
    struct tile *tile = workspace;
    if (!tile->exact) {
        visit_keys(problem, head, row, rows, key_begin, key_end, workspace);
        return;
    }
    for (int64_t from = key_begin, to; from < key_end; from = to) {
        const int64_t block = from / FA_BLOCK * FA_BLOCK;
        to = block + FA_BLOCK < key_end ? block + FA_BLOCK : key_end;
        visit_pairs(problem, head, row, rows, block, (int)(from - block), (int)(to - block), key_end, tile);
    }
}

static void close_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    char *exact = ((struct tile *)workspace)->exact;
    close_tile(problem, head, row, rows, workspace);
    for (int64_t r = 0, next; exact && r < rows; r = next) {
        int64_t cursor = 0, begin, end, stop;
        next = r + 1;
        if (!exact[r])
            continue;
        while (next < rows && exact[next])
            next++;
        open_tile(problem, head, row + r, next - r, workspace);
        while (fa_next_range(problem, head, row + r, next - r, &cursor, &begin, &end))
            for (; begin < end; begin = stop) {
                stop = (begin / FA_SPAN + 1) * FA_SPAN < end ? (begin / FA_SPAN + 1) * FA_SPAN : end;
                visit_keys(problem, head, row + r, next - r, begin, stop, workspace);
            }
        close_tile(problem, head, row + r, next - r, workspace);
    }
}

#define FA_TABLE_OF_PAIRS CONCAT(CONCAT(CONCAT(fa_, ISA), _bf16_), REAL_NAME)
extern const fa_kernels FA_TABLE_OF_PAIRS;
const fa_kernels FA_TABLE_OF_PAIRS = {
    .name = "kernels_bf16_" STRING(ISA) "_bf16",
    .tile_workspace = pairs_workspace,
    .open_tile = open_pairs,
    .visit_keys = visit_keys_in_pairs,
    .close_tile = close_pairs,
#include "entries.inc.h"
};
