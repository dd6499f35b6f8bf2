/* Prefill of dot products where query, key and value are bfloat16, by instructions that multiply them in pairs: a group
 * of rows at a time by vdpbf16ps of AVX512-BF16, or, `by_tiles`, a band of groups by tdpbf16ps of AMX; two tables.
 * Expects kernels.inc.h with BITS 32, in a target that has both (AMX where COMPILES_AMX), and for the second table a
 * process that may use tiles (select.c).
 *
 * Two sums of products in one: of pairs of channels for scores, of pairs of keys for weighted sums. A pair is 32 bits,
 * the number of the lower index below. Queries, keys and values enter as they are, and the scale is applied to the
 * finished score. Scores, softmax and log-sum-exp are float's; only the weights of the sum are rounded to bfloat16, and
 * for its mean to be no larger than its numbers it is divided by the sum of these, which lies behind each row of o.
 *
 * The instructions take and make zeros for denormals, and products of large numbers may overflow before the scale is
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

/* STEP: channels or keys that AMX multiplies at once, and the other instruction in steps of two. */
enum { STRIP_PAIRS = STRIP / 2, LEAST_CHANNELS = 16, STEP = 32 };

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

/* Numbers of a row of queries by tiles. */
static ALWAYS_INLINE int64_t query_row(int64_t channels) { return (channels + STRIP - 1) / STRIP * STRIP; }

/* Queries as [group][strip of channels][row][STRIP], or by tiles as [row][strip of channels][STRIP]; padded with zeros
 * to whole strips. */
static ALWAYS_INLINE void pair_queries(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                       struct tile *tile, const int by_tiles)
{
    const fa_view *view = &head->view[FA_QUERY];
    const int64_t apart = by_tiles ? STRIP : ROWS * STRIP;
    for (int64_t i = 0; i < rows; i++) {
        uint16_t *q = by_tiles ? (uint16_t *)tile->q + i * query_row(problem->head_dim)
                               : (uint16_t *)(tile->q + i / ROWS * group_size(tile->channels)) + i % ROWS * STRIP;
        const char *q_i = fa_row(head, view, row + i);
        unsigned largest = 0;
        for (int64_t c = 0; c < problem->head_dim; c += STRIP, q += apart) {
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
 * apart, padded with zeros to whole vectors and `unit` keys. Those of keys that are not plain, which are added to
 * `strange`, are zeros. scratch: room for two values. */
static void pair_values(int64_t columns, const char *values, const fa_view *value, int begin, int end, int unit,
                        int64_t v_panel, uint16_t *scratch, key_bits *strange, real *restrict to)
{
    for (int j = begin / unit * unit; j < (end + unit - 1) / unit * unit; j += 2) {
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

#if COMPILES_AMX
/* The same two products by AMX, whose instruction multiplies up to 16 rows of 32 bfloat16 with 16 pairs of rows of 16
 * and adds the products to as many rows of 16 floats: first those of even numbers and those of odd ones by themselves,
 * from zero, then both. So a chain of sums is no longer than 16, and the 32 channels or keys of a step begin at fixed
 * positions; others than those that count are zeros.
 *
 * Loading a tile takes longer than multiplying by it where it comes from L2, so a band of several groups, in two tiles
 * of rows, shares those of keys and values. Tiles 0 to 3 are sums, those of the first rows before those of the others,
 * 4 and 5 rows, 6 and 7 keys or values. */
enum { TILE_PAIRS = 16, TILE_BYTES = 64, TILE_ROWS = 16 };

/* What the instruction that configures tiles reads. */
struct tiles {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
};

/* For bands of so many rows, which are divided evenly. */
static NEVER_INLINE void set_tiles(int rows)
{
    struct tiles tiles = {.palette = 1};
    const int two = rows > TILE_ROWS, upper = two ? (rows + 1) / 2 : rows, lower = two ? rows / 2 : 1;
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = TILE_BYTES;
        tiles.rows[i] = (uint8_t)(i > 5 ? TILE_PAIRS : i == 4 || i < 2 ? upper : lower);
    }
    __asm__ volatile("" : : "r"(&tiles) : "memory"); /* the compiler takes it for 8 bytes */
    _tile_loadconfig(&tiles);
}

/* The compiler does not know that tiles read and write memory. */
#define TILES_IN_ORDER __asm__ volatile("" : : : "memory")

/* out[r][:] = sum over `steps` steps of a[r][:] . b, for one tile of rows or two and two vectors or one. Strides are in
 * bytes. a_step, b_step: numbers from a step to the next. */
static ALWAYS_INLINE void multiply_tiles(const real *a, ptrdiff_t a_row, ptrdiff_t a_step, const real *b,
                                         ptrdiff_t b_step, int64_t steps, real *out, ptrdiff_t out_row, int upper,
                                         const int two, const int both)
{
    const real *a_lower = a + upper * (a_row / (ptrdiff_t)sizeof(real));
    real *out_lower = out + upper * (out_row / (ptrdiff_t)sizeof(real));
    _tile_zero(0);
    if (both)
        _tile_zero(1);
    if (two)
        _tile_zero(2);
    if (two && both)
        _tile_zero(3);
    for (; steps > 0; steps--, a += a_step, a_lower += a_step, b += b_step) {
        _tile_loadd(6, b, PANEL * sizeof(real));
        _tile_loadd(4, a, a_row);
        _tile_dpbf16ps(0, 4, 6);
        if (both) {
            _tile_loadd(7, b + LANES, PANEL * sizeof(real));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two) {
            _tile_loadd(5, a_lower, a_row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (two && both)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_row);
    if (both)
        _tile_stored(1, out + LANES, out_row);
    if (two)
        _tile_stored(2, out_lower, out_row);
    if (two && both)
        _tile_stored(3, out_lower + LANES, out_row);
}

/* Scores of a band of rows against the vectors [first, last) of a packed block and at most one on either side, times
 * factor; pairs in whole steps. */
static ALWAYS_INLINE void amx_scores(const real *q, int64_t q_row, int64_t pairs, int rows, const real *k, int first,
                                     int last, real factor, struct prefetch *prefetch, real *s, const int two)
{
    const int upper = two ? (rows + 1) / 2 : rows;
    TILES_IN_ORDER;
    for (int v = first / 2 * 2; v < last; v += 2) {
        if (prefetch && v % VECS == 0)
            prefetch_lines(prefetch, prefetch->pace);
        multiply_tiles(q, q_row * 2, TILE_PAIRS, k + v / VECS * PANEL * pairs + v % VECS * LANES, TILE_PAIRS * PANEL,
                       pairs / TILE_PAIRS, s + v * LANES, SCORE_ROW * sizeof(real), upper, two, 1);
    }
    TILES_IN_ORDER;
    for (int r = 0; r < rows; r++)
        for (int v = first; v < last; v++)
            v_store(s + r * SCORE_ROW + v * LANES, v_load(s + r * SCORE_ROW + v * LANES) * factor);
}
_Static_assert(VECS % 2 == 0 && LANES == TILE_PAIRS, "two vectors of a panel are two tiles");

/* The weighted sums of a band, over the steps [from, to) of 32 keys. */
static ALWAYS_INLINE void amx_sums(const real *p, int rows, const real *v, int64_t v_panel, int from, int to,
                                   int64_t columns, real *sum, int64_t sum_row, struct prefetch *prefetch,
                                   const int two)
{
    const int upper = two ? (rows + 1) / 2 : rows;
    p += from * TILE_PAIRS, v += from * TILE_PAIRS * PANEL;
    TILES_IN_ORDER;
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        const real *some = v + c / PANEL * v_panel + c % PANEL;
        if (prefetch && c % PANEL == 0)
            prefetch_lines(prefetch, prefetch->pace);
        if (c + LANES < columns)
            multiply_tiles(p, SCORE_ROW * sizeof(real), TILE_PAIRS, some, TILE_PAIRS * PANEL, to - from, sum + c,
                           sum_row * (ptrdiff_t)sizeof(real), upper, two, 1);
        else
            multiply_tiles(p, SCORE_ROW * sizeof(real), TILE_PAIRS, some, TILE_PAIRS * PANEL, to - from, sum + c,
                           sum_row * (ptrdiff_t)sizeof(real), upper, two, 0);
    }
    TILES_IN_ORDER;
}
#endif

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

/* Most groups of a band: by AMX two tiles of 15 rows, whose scores stay in L1. */
enum { BAND = 5, BAND_ROWS = BAND * ROWS };

/* The groups of a band as one: they see the same vectors of a block, of which each row hides those that it does not
 * see. */
static ALWAYS_INLINE void see_together(struct pass *band, int groups)
{
    int lo = band->visible.lo, hi = band->visible.hi;
    for (int i = 1; i < groups; i++) {
        lo = band[i].visible.lo < lo ? band[i].visible.lo : lo;
        hi = band[i].visible.hi > hi ? band[i].visible.hi : hi;
    }
    for (int i = 0; i < groups; i++) {
        struct visible *visible = &band[i].visible;
        visible->same_for_all &= visible->lo == lo && visible->hi == hi;
        visible->lo = lo, visible->hi = hi;
        band[i].v_first = lo / LANES, band[i].v_last = (hi + LANES - 1) / LANES;
    }
}

/* One block, of which the tile may see the keys [begin, end): as visit_block. `by_tiles`: by AMX, in bands of up to
 * BAND groups. */
static ALWAYS_INLINE void visit_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                      int64_t block, int begin, int end, int64_t tile_end, struct tile *tile,
                                      const int by_tiles)
{
    const int natural_log = scores_in_nats(problem, head), most = by_tiles ? BAND : 1;
    const real factor = (real)(problem->scale * (natural_log ? 1 : 1.44269504088896340736));
    const fa_view *key = &head->view[FA_KEY], *value = &head->view[FA_VALUE];
    const int64_t pairs = by_tiles ? (problem->head_dim + STEP - 1) / STEP * (STEP / 2) : tile->channels / 2;
    const int64_t value_row = tile->value_row, columns = value_row - LANES;
    const int64_t next = block + FA_BLOCK, at_once = most * ROWS;
    const int64_t turns = (rows_seeing(problem, head, FA_BLOCK, rows) + at_once - 1) / at_once;
    const int64_t most_end = problem->left < INT64_MAX ? tile_end + rows / head->heads : tile_end;
    const int64_t fetch_end = most_end < head->key_length ? most_end : head->key_length;
    const int64_t times_k = FA_BLOCK / PANEL * (by_tiles ? 1 : (pairs + STRIP_PAIRS - 1) / STRIP_PAIRS);
    struct next_rows next_keys = find_next_rows(key, next, fetch_end, problem->head_dim, turns, times_k);
    struct next_rows next_values =
        find_next_rows(value, next, fetch_end, problem->value_dim, turns, (columns + PANEL - 1) / PANEL);
    key_bits strange = {{0}};
    int packed = 0, count = 0, groups = 0, set = 0;
    int64_t first = 0, turn = 0;
    struct pass passes[BAND], *band = passes;
    for (;; turn++) {
        band += groups, count -= groups;
        if (!count)
            band = passes, count = next_passes(problem, head, row, rows, block, most, &first, passes);
        if (!count)
            break;
        for (groups = 1; groups < count && band[groups].g == band->g + groups;)
            groups++;
        if (!packed) {
            pair_keys(problem->head_dim, key->data + block * key->row, key, begin, end, pairs, &strange, tile->k);
            pair_values(problem->value_dim, value->data + block * value->row, value, begin, end, by_tiles ? STEP : 2,
                        tile->v_panel / 2, (uint16_t *)tile->part, &strange, tile->v);
            packed = 1;
        }
        if (by_tiles)
            see_together(band, groups);
        int whole = 1, live = 0; /* whether all groups begin a span; rows */
        for (struct pass *pass = band; pass < band + groups; pass++) {
            if (tile->span[pass->g] == NO_SPAN) {
                const int64_t next_row = row + rows + pass->first;
                prefetch_queries(head, &head->view[FA_QUERY], next_row,
                                 next_row + ROWS < head->queries ? next_row + ROWS : head->queries,
                                 problem->head_dim * 2);
                prefetch_queries(head, &head->view[FA_OUT], row + pass->first, row + pass->first + pass->group,
                                 problem->value_dim * 2);
            }
            pass->span_begins = begin_span(problem, head, pass->g, pass->first, pass->group, block / FA_SPAN, tile);
            whole &= pass->span_begins, live += pass->group;
        }
        const int v_first = band->v_first, v_last = band->v_last, two = live > TILE_ROWS;
        real *s = tile->s, *sum = whole ? tile->o + band->first * value_row : tile->part;
        struct prefetch *prefetch = prefetch_step(&next_keys, turn);
        if (!by_tiles)
            pair_scores(tile->q + band->g * group_size(tile->channels), pairs, live, tile->k, v_first, v_last, factor,
                        prefetch, s);
#if COMPILES_AMX
        const int64_t q_row = query_row(problem->head_dim);
        const real *q = tile->q + band->first * q_row / 2;
        if (by_tiles && set != live)
            set_tiles(set = live);
        if (by_tiles && two)
            amx_scores(q, q_row, pairs, live, tile->k, v_first, v_last, factor, prefetch, s, 1);
        else if (by_tiles)
            amx_scores(q, q_row, pairs, live, tile->k, v_first, v_last, factor, prefetch, s, 0);
#endif
        for (struct pass *pass = band; pass < band + groups; pass++) {
            const int64_t at = pass->first - band->first;
            real *m = tile->m + pass->first, *l = tile->l + pass->first * LANES, *s_g = s + at * SCORE_ROW;
            real *rounded = sum + at * value_row + columns;
            rule_tile(problem, head, row + pass->first, pass->group, block, &pass->visible, tile, s_g);
            if (bits_any(&strange)) {
                make_bits(&pass->visible, pass->group);
                for (int r = 0; r < pass->group; r++)
                    for (int w = 0; w < WORDS; w++)
                        tile->exact[pass->first + r] |= (pass->visible.bits[r].word[w] & strange.word[w]) != 0;
            }
            if (natural_log)
                pair_exponentials(s_g, pass->group, v_first, v_last, 1, m, l, pass->shrink, rounded, value_row);
            else
                pair_exponentials(s_g, pass->group, v_first, v_last, 0, m, l, pass->shrink, rounded, value_row);
        }
        prefetch = prefetch_step(&next_values, turn);
        if (!by_tiles)
            pair_sums(s, live, tile->v, tile->v_panel / 2, band->visible.lo, band->visible.hi, columns, sum, value_row,
                      prefetch);
#if COMPILES_AMX
        const int from = v_first / 2, to = (v_last + 1) / 2;
        if (by_tiles && two)
            amx_sums(s, live, tile->v, tile->v_panel / 2, from, to, columns, sum, value_row, prefetch, 1);
        else if (by_tiles)
            amx_sums(s, live, tile->v, tile->v_panel / 2, from, to, columns, sum, value_row, prefetch, 0);
#endif
        for (struct pass *pass = band; pass < band + groups && !whole; pass++) {
            real *o = tile->o + pass->first * value_row, *part = sum + (pass->first - band->first) * value_row;
            if (pass->span_begins)
                memcpy(o, part, (size_t)(pass->group * value_row) * sizeof(real));
            else
                join_sum(o, part, pass->group, value_row, pass->shrink);
        }
    }
}
_Static_assert(GROUPS == 1, "one group at a time");

/* The functions of attend.inc.h for this way. */

/* A block has room for whole steps of keys. */
static ALWAYS_INLINE int64_t whole_steps(int64_t keys)
{
    return keys < FA_BLOCK ? (keys + STEP - 1) / STEP * STEP : keys;
}

static size_t pairs_workspace(const fa_problem *problem, int64_t rows, int64_t keys)
{
    const size_t plain = tile_workspace(problem, rows, keys);
    struct tile tile;
    if (!may_take_pairs(problem))
        return plain;
    const size_t size = lay_out(&tile, problem, rows, whole_steps(keys), BAND_ROWS, LANES, (char *)(uintptr_t)FA_ALIGN);
    return (size > plain ? size : plain) + ((size_t)rows + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

static ALWAYS_INLINE void open_either(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                      struct tile *tile, const int by_tiles)
{
    if (!takes_pairs(problem, head)) {
        open_tile(problem, head, row, rows, tile);
        return;
    }
    const size_t plain = tile_workspace(problem, rows, head->keys);
    const size_t size = lay_out(tile, problem, rows, whole_steps(head->keys), BAND_ROWS, LANES, (char *)tile);
    tile->exact = (char *)tile + (size > plain ? size : plain); /* out of the way of the second pass */
    tile->row = row;
    pair_queries(problem, head, row, rows, tile, by_tiles);
    begin_tile(problem, rows, tile);
}

static void open_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    open_either(problem, head, row, rows, workspace, 0);
}

static ALWAYS_INLINE void visit_blocks_of_pairs(const fa_problem *problem, const fa_head *head, int64_t row,
                                                int64_t rows, int64_t key_begin, int64_t key_end, struct tile *tile,
                                                const int by_tiles)
{
    for (int64_t from = key_begin, to; from < key_end; from = to) {
        const int64_t block = from / FA_BLOCK * FA_BLOCK;
        to = block + FA_BLOCK < key_end ? block + FA_BLOCK : key_end;
        visit_pairs(problem, head, row, rows, block, (int)(from - block), (int)(to - block), key_end, tile, by_tiles);
    }
}

static void visit_keys_in_pairs(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                int64_t key_begin, int64_t key_end, void *workspace)
{
    if (((struct tile *)workspace)->exact)
        visit_blocks_of_pairs(problem, head, row, rows, key_begin, key_end, workspace, 0);
    else
        visit_keys(problem, head, row, rows, key_begin, key_end, workspace);
}

#if COMPILES_AMX
static void open_in_tiles(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace)
{
    open_either(problem, head, row, rows, workspace, 1);
}

static void visit_keys_in_tiles(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                int64_t key_begin, int64_t key_end, void *workspace)
{
    if (((struct tile *)workspace)->exact) {
        visit_blocks_of_pairs(problem, head, row, rows, key_begin, key_end, workspace, 1);
        _tile_release();
    } else
        visit_keys(problem, head, row, rows, key_begin, key_end, workspace);
}
#endif

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

#if COMPILES_AMX
#define FA_TABLE_OF_TILES CONCAT(CONCAT(CONCAT(fa_, ISA), _amx_), REAL_NAME)
extern const fa_kernels FA_TABLE_OF_TILES;
const fa_kernels FA_TABLE_OF_TILES = {
    .name = "kernels_bf16_" STRING(ISA) "_amx",
    .tile_workspace = pairs_workspace,
    .open_tile = open_in_tiles,
    .visit_keys = visit_keys_in_tiles,
    .close_tile = close_pairs,
#include "entries.inc.h"
};
#endif
