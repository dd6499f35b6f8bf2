/* The way back: gradients of attention, from that of its output.
 *
 *     weights       P = exp(S - lse)                  dV = P^T dO
 *     of weights    dP = dO V^T                       delta = sum over channels of dO * O
 *     of scores     dS = P * (dP - delta)             dQ = scale dS K,  dK = scale dS^T Q
 *
 * A block of FA_BLOCK keys is packed once, and tiles of FA_BACK_ROWS rows pass over it. Each of the five products runs
 * strip by strip of one operand that stays in the first cache; with rows of P and dS a multiple of 1 KiB apart they
 * would share a few sets of it. Sums of a product are single chains of at most 64 steps: shorter ones would store and
 * load them more often.
 *
 * The bits of a gradient depend on what takes part in it alone: chains begin and end at fixed rows and keys, what is
 * hidden adds an exact zero, and long sums are of two levels, with the rounding errors of the second kept (FA_SPAN
 * keys, FA_BACK_SPAN rows). Where something is not finite, 0 * inf would be NaN: what is hidden is left out then.
 */

enum {
    GRADIENT_ROW = FA_BLOCK + 16, /* numbers from a row of P or dS to the next */
    BACK_GROUPS = FA_BACK_ROWS / ROWS,
    BACK_CHUNK = 64 /* keys in a chain */
};
_Static_assert(FA_BACK_ROWS % ROWS == 0 && STRIP % PANEL == 0 && FA_BLOCK % BACK_CHUNK == 0, "whole groups and panels");
_Static_assert((int)BACK_CHUNK <= (int)STRIP && ROWS <= 16, "chains, and the room behind a row");

/* Of a row, in FA_ROW_STATE. */
enum {
    STATE_SHIFT,  /* what is subtracted from scores; of sparse weights: their threshold.base */
    STATE_FACTOR, /* what the weights are multiplied by; of sparse weights: threshold.t */
    STATE_DELTA,
    STATE_REST,   /* threshold.rest */
    STATE_ACTIVE, /* 0: the row sees nothing, and nothing of it is looked at */
    STATE_QUERY,  /* 1: its query, or gradient of the output, is finite and can be read where it is */
    STATE_GRADIENT
};

/* Rows of a tile: number c of row i is at[i * row + c / STRIP * strip + c % STRIP]. */
struct rows {
    const real *at;
    ptrdiff_t row, strip;
    int finite;
};

/* A sum over rows for each key of a block, in two levels: [key][row]. */
struct key_sums {
    int64_t row, keys; /* numbers of a key; keys of the block, in whole groups */
    real *part, *total, *lost;
    int has_part, has_total, has_lost;
};

/* The workspace. */
struct back {
    struct tile tile;                             /* of FA_ADDITIVE: packed queries and keys; extra, after */
    int64_t channels, columns;                    /* head_dim and value_dim in whole vectors */
    struct rows q, q_raw, d_out;                  /* a tile's rows; q is for scores, and q_raw but for wide scales */
    real *q_packed, *q_raw_packed, *d_out_packed; /* [strip][FA_BACK_ROWS][STRIP]: those that cannot be read in place */
    real *k, *v, *k_rows;                         /* a block: packed, packed, and in rows of k_row numbers */
    int64_t k_row;
    real *s, *dp;            /* [FA_BACK_ROWS][GRADIENT_ROW] scores, then P; dP, then dS */
    real *steep;             /* [ROWS][GRADIENT_ROW] derivatives of the softcap */
    real *part;              /* [FA_BACK_ROWS][channels] a block's share of dQ */
    real *diagonal;          /* [FA_BLOCK + FA_BACK_ROWS] */
    real *column;            /* [GRADIENT_ROW] */
    key_bits *seen;          /* [FA_BACK_ROWS] what has a part in sums, where something is not finite */
    struct visible *visible; /* [BACK_GROUPS] */
    struct key_sums d_key, d_value;
    struct additive_back additive; /* of FA_ADDITIVE: what its groups have in common */
    char row_is_far[FA_BACK_ROWS];
    int some_far;            /* of rows or keys */
    real *w;                 /* [tile.channels] what additive.w points to */
    real *d_k;               /* [vector][channel][LANES] what a tile gives the keys of the block */
    double *d_w;             /* [tile.channels] what it gives the score's weights */
    const char *key, *value; /* what is packed: keys [begin, end) of the block */
    int begin, end, k_finite;
    int64_t block, keys; /* keys: of the block in whole vectors, and a group behind them */
    int first, last;     /* vectors of the block that a tile sees */
    int rows_at_once;    /* of back_prepare */
    int64_t room;        /* of sparse weights: vectors in a row of `scores` */
    real *scores;        /* [rows_at_once][room][LANES] */
    uint32_t *places;    /* [room], which nobody reads */
};

/* Channels or columns in whole vectors, one at least. */
static ALWAYS_INLINE int64_t in_vectors(int64_t n) { return n > 0 ? (n + LANES - 1) / LANES * LANES : LANES; }

static void lay_out_sums(struct key_sums *sums, int64_t row, char **at)
{
    sums->row = row;
    sums->part = (real *)take(at, (FA_BLOCK + ROWS) * row);
    sums->total = (real *)take(at, (FA_BLOCK + ROWS) * row);
    sums->lost = (real *)take(at, (FA_BLOCK + ROWS) * row);
}

static size_t lay_out_back(struct back *back, const fa_problem *problem, int64_t keys, char *base)
{
    const int64_t channels = in_vectors(problem->head_dim), columns = in_vectors(problem->value_dim);
    const int64_t strip = FA_BACK_ROWS * STRIP;
    const int64_t words = (int64_t)(sizeof(struct visible) * BACK_GROUPS / sizeof(real) + 1);
    char *at = base + (sizeof(struct back) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    back->channels = channels, back->columns = columns;
    back->k_row = channels * (int64_t)sizeof(real) % 1024 ? channels : channels + LANES;
    back->q_packed = (real *)take(&at, (channels + STRIP - 1) / STRIP * strip);
    back->q_raw_packed = (real *)take(&at, scale_after_product(problem) ? (channels + STRIP - 1) / STRIP * strip : 0);
    back->d_out_packed = (real *)take(&at, (columns + STRIP - 1) / STRIP * strip);
    back->k = (real *)take(&at, FA_BLOCK * channels);
    back->v = (real *)take(&at, FA_BLOCK * columns);
    back->k_rows = (real *)take(&at, FA_BLOCK * back->k_row);
    back->s = (real *)take(&at, FA_BACK_ROWS * GRADIENT_ROW);
    back->dp = (real *)take(&at, FA_BACK_ROWS * GRADIENT_ROW);
    back->steep = (real *)take(&at, problem->softcap != 0 ? ROWS * GRADIENT_ROW : 0);
    back->part = (real *)take(&at, FA_BACK_ROWS * channels);
    back->diagonal = (real *)take(&at, FA_BLOCK + FA_BACK_ROWS + LANES);
    back->column = (real *)take(&at, GRADIENT_ROW);
    back->seen = (key_bits *)take(&at, FA_BACK_ROWS * (int64_t)(sizeof(key_bits) / sizeof(real)));
    back->visible = (struct visible *)take(&at, words);
    back->rows_at_once = FA_BACK_ROWS;
    if (is_sparse(problem)) {
        back->room = reach_of_tile(problem, FA_BACK_ROWS, keys) + 1;
        while (back->rows_at_once > ROWS && back->rows_at_once * back->room * LANES > (int64_t)1 << 20)
            back->rows_at_once -= ROWS;
        back->scores = (real *)take(&at, back->rows_at_once * back->room * LANES);
        back->places = (uint32_t *)take(&at, back->room);
    }
    lay_out_sums(&back->d_key, channels, &at);
    lay_out_sums(&back->d_value, columns, &at);
    fa_problem plain = *problem;
    plain.activation = FA_SOFTMAX; /* scores are not kept */
    plain.decode = 0;
    at += lay_out(&back->tile, &plain, FA_BACK_ROWS, keys < FA_BLOCK ? keys : FA_BLOCK, GROUPS * ROWS, 0, at);
    if (problem->score == FA_ADDITIVE) {
        struct additive_back *additive = &back->additive;
        const int64_t units = back->tile.channels;
        additive->channels = units;
        additive->w = back->w = (real *)take(&at, units);
        additive->scratch = (real *)take(&at, BACK_SCRATCH);
        back->d_k = (real *)take(&at, FA_BLOCK * units);
        back->d_w = (double *)take(&at, units * (int64_t)(sizeof(double) / sizeof(real)));
    }
    return (size_t)(at - base);
}

/* Products: out[r][:] (+)= sum over t < n of a(r, t) * b[t][:] for ROWS rows r. */

typedef void (*chain_function)(const real *a, ptrdiff_t a_row, const char *b, ptrdiff_t b_row, int n, real *out,
                               ptrdiff_t out_row, int add);

static ALWAYS_INLINE void chain(const real *restrict a, ptrdiff_t a_row, const int a_step, const char *restrict b,
                                ptrdiff_t b_row, int n, real *restrict out, ptrdiff_t out_row, int add, const int vecs)
{
    vec sum[ROWS][VECS];
    UNROLL(8)
    for (int r = 0; r < ROWS; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            sum[r][v] = (vec){0};
    }
    for (; n > 0; n--, a += a_step, b += b_row) {
        vec b_v[VECS];
        UNROLL(8)
        for (int v = 0; v < vecs; v++)
            b_v[v] = v_load(b + v * VECTOR_BYTES);
        UNROLL(8)
        for (int r = 0; r < ROWS; r++) {
            const multiplier a_r = v_multiplier(a + r * a_row);
            UNROLL(8)
            for (int v = 0; v < vecs; v++) {
                sum[r][v] = v_fma_multiplier(a_r, b_v[v], sum[r][v]);
                LOAD_AFTER(sum[r][v], a);
            }
        }
    }
    UNROLL(8)
    for (int r = 0; r < ROWS; r++) {
        UNROLL(8)
        for (int v = 0; v < vecs; v++) {
            real *o = out + r * out_row + v * LANES;
            v_store(o, add ? v_load(o) + sum[r][v] : sum[r][v]);
        }
    }
}

#define CHAIN(vecs, kind, row, a_step)                                                                            \
    static NEVER_INLINE void kind##_##vecs(const real *a, ptrdiff_t a_row, const char *b, ptrdiff_t b_row, int n, \
                                           real *out, ptrdiff_t out_row, int add)                                 \
    {                                                                                                             \
        (void)a_row;                                                                                              \
        chain(a, row, a_step, b, b_row, n, out, out_row, add, vecs);                                              \
    }
#define CHAIN_NAME(vecs, kind) kind##_##vecs,
FOR_VECS(CHAIN, score_chain, a_row, 1)        /* a: rows of a tile */
FOR_VECS(CHAIN, query_chain, GRADIENT_ROW, 1) /* a: dS */
FOR_VECS(CHAIN, key_chain, 1, GRADIENT_ROW)   /* a: columns of P or dS */
static const chain_function score_chains[VECS] = {FOR_VECS(CHAIN_NAME, score_chain)};
static const chain_function query_chains[VECS] = {FOR_VECS(CHAIN_NAME, query_chain)};
static const chain_function key_chains[VECS] = {FOR_VECS(CHAIN_NAME, key_chain)};
#undef CHAIN
#undef CHAIN_NAME

/* Rows of a tile against a packed block, [panel][channel][key]: into s what each group sees. */
static void tile_scores(const struct back *back, int groups, const struct rows *rows, const real *packed, int64_t dims,
                        int64_t padded, real *s)
{
    int64_t c = 0;
    do {
        const int n = dims - c < STRIP ? (int)(dims - c) : STRIP;
        for (int p = back->first / VECS; p * VECS < back->last; p++) {
            const real *panel = packed + p * PANEL * padded + c * PANEL;
            for (int g = 0; g < groups; g++) {
                const struct visible *visible = back->visible + g;
                int from = visible->lo / LANES, to = (visible->hi + LANES - 1) / LANES;
                from = from > p * VECS ? from : p * VECS;
                to = to < (p + 1) * VECS ? to : (p + 1) * VECS;
                if (visible->lo >= visible->hi || from >= to)
                    continue;
                score_chains[to - from - 1](rows->at + c / STRIP * rows->strip + g * ROWS * rows->row, rows->row,
                                            (const char *)(panel + (from - p * VECS) * LANES), PANEL * sizeof(real), n,
                                            s + g * ROWS * GRADIENT_ROW + from * LANES, GRADIENT_ROW, c > 0);
            }
        }
        c += STRIP;
    } while (c < dims);
}

/* `some` numbers of a matrix, and zeros up to `all`, whole vectors; adds 0 to *sum if they are finite, else NaN. */
static ALWAYS_INLINE void copy_row(const char *at, const fa_view *matrix, int in_place, int64_t some, int64_t all,
                                   real *to, vec *sum)
{
    const real *from = in_place ? (const real *)at : to;
    int64_t k = 0;
    if (!in_place)
        gather(to, at, matrix->col, some, matrix->dtype);
    for (; k + LANES <= some; k += LANES) {
        const vec x = v_load(from + k);
        *sum = v_fma(x, (vec){0}, *sum);
        v_store(to + k, x);
    }
    for (; k < all; k += LANES) {
        vec x = {0};
        if (k < some)
            x = v_load_some(from + k, (int)(some - k));
        *sum = v_fma(x, (vec){0}, *sum);
        v_store(to + k, x);
    }
}

static ALWAYS_INLINE real *state_of(const fa_gradients *to, int64_t i)
{
    return (real *)(to->view[FA_ROW_STATE].data + i * to->view[FA_ROW_STATE].row);
}

/* Whether rows of a matrix can be read where they are: whole vectors, and not all in a few sets of the cache. */
static ALWAYS_INLINE int rows_in_place(const fa_view *matrix, int64_t dims)
{
    return readable(matrix) && dims > 0 && dims % LANES == 0 && matrix->row % 1024 != 0;
}

/* Whether a row of such a matrix is finite. */
static ALWAYS_INLINE int row_is_finite(const fa_view *matrix, int64_t i, int64_t dims)
{
    const real *x = (const real *)(matrix->data + i * matrix->row);
    vec sum = {0};
    for (int64_t c = 0; c < dims; c += LANES)
        sum = v_fma(v_load(x + c), (vec){0}, sum);
    return !v_true_bits(sum != (vec){0});
}

/* Rows [row, row + rows) of a matrix: in place, or packed in whole groups and vectors, with zeros for padding and rows
 * that are not active. which: STATE_QUERY or STATE_GRADIENT. */
static struct rows take_rows(const fa_head *head, const fa_gradients *to, const fa_view *matrix, int which, int64_t row,
                             int rows, int64_t dims, int64_t padded, real *packed)
{
    const int readable_rows = readable(matrix);
    int plain = rows % ROWS == 0 && row + rows <= head->query_length && rows_in_place(matrix, dims);
    vec sum = {0};
    for (int i = 0; plain && i < rows; i++)
        plain = state_of(to, row + i)[which] != 0;
    if (plain)
        return (struct rows){(const real *)(matrix->data + row * matrix->row), matrix->row / (ptrdiff_t)sizeof(real),
                             STRIP, 1};
    for (int i = 0; i < (rows + ROWS - 1) / ROWS * ROWS; i++) {
        const int live = i < rows && row + i < head->query_length && state_of(to, row + i)[STATE_ACTIVE] != 0;
        for (int64_t c = 0; c < padded; c += STRIP) {
            real *x = packed + c * FA_BACK_ROWS + i * STRIP;
            const int64_t all = padded - c < STRIP ? padded - c : STRIP, some = dims - c < all ? dims - c : all;
            if (live)
                copy_row(matrix->data + (row + i) * matrix->row + c * matrix->col, matrix, readable_rows, some, all, x,
                         &sum);
            else
                memset(x, 0, (size_t)all * sizeof(real));
        }
    }
    return (struct rows){packed, STRIP, STRIP * FA_BACK_ROWS, !v_true_bits(sum != (vec){0})};
}

/* From a tile's packed queries of the forward pass, [group][strip][row][STRIP], to those of this one. */
static void pack_as_strips(const real *from, int groups, int64_t channels, real *to)
{
    for (int g = 0; g < groups; g++)
        for (int64_t c = 0; c < channels; c += STRIP)
            memcpy(to + c * FA_BACK_ROWS + g * ROWS * STRIP, from + g * group_size(channels) + c * ROWS,
                   ROWS * STRIP * sizeof(real));
}

/* The factor of packed keys. */
static ALWAYS_INLINE double key_factor(const fa_problem *problem, const fa_head *head)
{
    return scale_after_product(problem) ? 1
                                        : problem->scale * (scores_in_nats(problem, head) ? 1 : 1.44269504088896340736);
}

static ALWAYS_INLINE vec scaled(vec x, double scale)
{
    if (!scale_is_wide(scale))
        return x * (real)scale;
    const real root = (real)sqrt(fabs(scale)); /* in two steps: the scale may be out of range of real */
    return x * root * (real)(scale / (double)root);
}

static void open_queries(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row, int rows,
                         struct back *back)
{
    struct tile *tile = &back->tile;
    tile->row = row;
    if (problem->score == FA_ADDITIVE) {
        for (int64_t r = 0; scale_after_product(problem) && r < rows; r++)
            tile->after[r] = problem->scale;
        additive_queries(problem, head, row, rows, key_factor(problem, head), tile);
        for (int r = 0; r < rows; r++)
            back->row_is_far[r] = (char)row_is_far(
                tile->additive.q_raw + r / ROWS * group_size(tile->channels) + r % ROWS * STRIP, tile->channels);
        back->q.finite = back->q_raw.finite = 1; /* additive_back looks after what is not */
        return;
    }
    back->q = take_rows(head, to, &head->view[FA_QUERY], STATE_QUERY, row, rows, problem->head_dim, back->channels,
                        back->q_packed);
    back->q_raw = back->q;
    if (scale_after_product(problem)) {
        const int groups = (rows + ROWS - 1) / ROWS;
        if (back->q.at == back->q_packed) {
            memcpy(back->q_raw_packed, back->q_packed,
                   (size_t)((back->channels + STRIP - 1) / STRIP * STRIP * FA_BACK_ROWS) * sizeof(real));
            back->q_raw.at = back->q_raw_packed;
        }
        memset(tile->q, 0, (size_t)(BACK_GROUPS * group_size(tile->channels)) * sizeof(real));
        pack_wide_queries(problem, head, row, rows, ROWS, tile->channels, tile->q, tile->after);
        pack_as_strips(tile->q, groups, tile->channels, back->q_packed);
        back->q = (struct rows){back->q_packed, STRIP, STRIP * FA_BACK_ROWS, back->q_raw.finite};
    }
}

/* A matrix's rows [begin, end) of a block as rows of `to`; returns whether all are finite. */
static int copy_rows(const fa_view *matrix, int64_t block, int begin, int end, int64_t dims, int64_t padded, real *to,
                     int64_t to_row)
{
    const int in_place = readable(matrix);
    vec sum = {0};
    for (int j = begin; j < end; j++)
        copy_row(matrix->data + (block + j) * matrix->row, matrix, in_place, dims, padded, to + j * to_row, &sum);
    return !v_true_bits(sum != (vec){0});
}

/* Multiplies packed keys by the scale: queries can then be read in place. */
static void scale_keys(const struct back *back, int first, int last, real factor)
{
    for (int v = first; factor != 1 && v < last; v++) {
        real *k = back->k + v / VECS * PANEL * back->channels + v % VECS * LANES;
        for (int64_t c = 0; c < back->channels; c++)
            v_store(k + c * PANEL, v_load(k + c * PANEL) * factor);
    }
}

/* Packs the keys and values of the block that the rows [row, row_end) may see, unless they are there. */
static void open_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t row_end, int with_values,
                      struct back *back)
{
    const fa_view *key = &head->view[FA_KEY], *value = &head->view[FA_VALUE];
    int begin, end;
    rows_range(problem, head, row, row_end - row, back->block, &begin, &end);
    if (begin >= end)
        return;
    begin = begin / LANES * LANES;
    if (back->key != key->data || begin < back->begin || end > back->end) {
        const char *keys = key->data + back->block * key->row;
        if (problem->score == FA_ADDITIVE) {
            additive_keys(problem, keys, key, begin, end, &back->tile);
            back->additive.far_keys =
                find_far_keys(back->tile.additive.k_raw, back->tile.channels, begin / LANES, (end + LANES - 1) / LANES);
            back->k_finite = 1; /* additive_back looks after what is not */
        } else {
            pack_keys(problem->head_dim, keys, key, &no_scales, begin, end, back->channels, back->k);
            scale_keys(back, begin / LANES, (end + LANES - 1) / LANES, (real)key_factor(problem, head));
            back->k_finite =
                copy_rows(key, back->block, begin, end, problem->head_dim, back->channels, back->k_rows, back->k_row);
        }
        back->value = NULL;
        back->key = key->data, back->begin = begin, back->end = end;
    }
    if (with_values && back->value != value->data) {
        pack_keys(problem->value_dim, value->data + back->block * value->row, value, &no_scales, back->begin, back->end,
                  back->columns, back->v);
        back->value = value->data;
    }
}

/* What the rows of a tile see of the block; returns the number of groups, 0 if there is nothing. */
static int find_tile(const fa_problem *problem, const fa_head *head, int64_t row, int rows, struct back *back)
{
    const int groups = (rows + ROWS - 1) / ROWS;
    int lo = FA_BLOCK, hi = 0;
    for (int g = 0; g < groups; g++) {
        struct visible *visible = back->visible + g;
        const int group = rows - g * ROWS < ROWS ? rows - g * ROWS : ROWS;
        find_visible(problem, head, row + g * ROWS, group, back->block, visible);
        if (visible->masked)
            visible->lo = visible->hi = 0;
        if (visible->lo < visible->hi) {
            lo = visible->lo < lo ? visible->lo : lo;
            hi = visible->hi > hi ? visible->hi : hi;
        }
    }
    back->first = lo / LANES, back->last = (hi + LANES - 1) / LANES;
    return lo < hi ? groups : 0;
}

/* Raw scores of a tile. */
static void score_tile(const fa_problem *problem, int rows, struct back *back)
{
    const int groups = (rows + ROWS - 1) / ROWS;
    if (problem->score == FA_DOT) {
        tile_scores(back, groups, &back->q, back->k, problem->head_dim, back->channels, back->s);
        return;
    }
    for (int g = 0; g < groups; g++) {
        const struct visible *visible = back->visible + g;
        const int from = visible->lo / LANES, to = (visible->hi + LANES - 1) / LANES;
        const int group = rows - g * ROWS < ROWS ? rows - g * ROWS : ROWS;
        if (visible->lo >= visible->hi)
            continue;
        additive_scores(&back->tile, g * ROWS, group, from, to, back->tile.s);
        for (int r = 0; r < group; r++)
            memcpy(back->s + (g * ROWS + r) * GRADIENT_ROW + from * LANES, back->tile.s + r * SCORE_ROW + from * LANES,
                   (size_t)((to - from) * LANES) * sizeof(real));
    }
}

/* Final scores of a group, hidden ones -inf, and what of the softcap its gradients need. */
static ALWAYS_INLINE void rule_group(const fa_problem *problem, const fa_head *head, int64_t row, int rows, int g,
                                     struct back *back)
{
    const int group = rows - g * ROWS < ROWS ? rows - g * ROWS : ROWS;
    rule_scores(problem, head, row + g * ROWS, group, back->block, back->visible + g, back->tile.after + g * ROWS, NULL,
                back->tile.extra, back->s + g * ROWS * GRADIENT_ROW, GRADIENT_ROW,
                problem->softcap != 0 ? back->steep : NULL);
}

/* What is lost by the weights of a row when a score changes, less what the others win (dS), and the weights (P). */

static ALWAYS_INLINE void softmax_back(int first, int last, const real *state, const int natural_log, real *s, real *dp)
{
    const vec log2e = v_fill((real)1.44269504088896340736), none = v_fill(-(real)INFINITY);
    const vec shift = v_fill(state[STATE_SHIFT]), factor = v_fill(state[STATE_FACTOR]);
    const vec delta = v_fill(state[STATE_DELTA]);
    for (int v = first; v < last; v++) {
        const vec x = v_load(s + v * LANES), y = x - shift;
        const vec p = v_exp2(natural_log ? y * log2e : y) * factor;
        v_store(s + v * LANES, p);
        v_store(dp + v * LANES, v_pick(x == none, (vec){0}, p * (v_load(dp + v * LANES) - delta)));
    }
}

/* Of sparse weights: how fast they rise with a score, but for the threshold. */
static ALWAYS_INLINE vec sparse_slope(const int square, vec x, const real *state, vec *weights)
{
    const vec z = below_largest(square, x, v_fill(state[STATE_SHIFT]));
    const vec d = v_max((vec){0}, (z - v_fill(state[STATE_FACTOR])) - v_fill(state[STATE_REST]));
    *weights = square ? d * d : d;
    return square ? d : v_pick(d > (vec){0}, v_fill(1), d);
}

static void other_back(const fa_problem *problem, int first, int last, const real *state, real *s, real *dp)
{
    const vec none = v_fill(-(real)INFINITY), infinite = -none, zero = {0};
    const vec factor = v_fill(state[STATE_FACTOR]), delta = v_fill(state[STATE_DELTA]);
    for (int v = first; v < last; v++) {
        vec x = v_load(s + v * LANES), p, slope, d = v_load(dp + v * LANES);
        ivec out = x == none;
        x = v_pick(x == infinite, x - x, x); /* a visible +inf gives NaN */
        if (problem->activation == FA_RELU) {
            p = v_max(zero, x) * factor;
            slope = v_pick(x <= zero, zero, v_pick(x > zero, factor, x)); /* NaN stays */
        } else if (problem->activation == FA_SIGMOID) {
            const vec e = v_exp2(v_abs(x) * (real)-1.44269504088896340736), r = 1 / (1 + e);
            p = v_pick(x < zero, e, zero + 1) * r;
            slope = e * r * r;
        } else {
            slope = sparse_slope(is_square(problem), x, state, &p);
            d -= delta;
            out |= slope == zero;
        }
        v_store(s + v * LANES, v_pick(out, zero, p));
        v_store(dp + v * LANES, v_pick(out, zero, slope * d));
    }
}

/* Keys of a block with a part in sums: of a row's scores, those above -inf; of sparse weights, those that have one. */
static key_bits keys_with_part(const fa_problem *problem, int first, int last, const real *state, const real *s)
{
    key_bits bits = {{0}};
    for (int v = first; v < last; v++) {
        vec x = v_load(s + v * LANES), p, least = v_fill(-(real)INFINITY);
        if (is_sparse(problem)) {
            x = v_pick(x == least, (vec){0}, sparse_slope(is_square(problem), x, state, &p));
            least = (vec){0};
        }
        bits.word[v * LANES / 64] |= (uint64_t)v_above_bits(x, least) << v * LANES % 64;
    }
    return bits;
}

/* Adds numbers to some of a row, in order from `at` on. lost: what rounding has taken from them (add_exactly), or no
 * data: few numbers are added to each. */
static ALWAYS_INLINE void add_numbers(const fa_view *to, const fa_view *lost, int64_t row, int64_t at, const real *from,
                                      int count)
{
    char *d = to->data, *e = lost->data;
    if (count <= 0)
        return;
    d += row * to->row + at * to->col;
    if (!e) {
        for (int j = 0; j < count; j++, d += to->col)
            *(real *)d += from[j];
        return;
    }
    e += row * lost->row + at * lost->col;
    for (int j = 0; j < count; j++, d += to->col, e += lost->col) {
        const real before = *(real *)d, x = from[j], now = before + x, part = now - before;
        const real error = (before - (now - part)) + (x - part);
        *(real *)e += now - now == 0 ? error : 0;
        *(real *)d = now;
    }
}

/* The rules' shares of a group's score gradients. */
static NEVER_INLINE void add_rules(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                                   int group, const struct visible *visible, const real *ds, struct back *back)
{
    const fa_view *view = to->view;
    const int first = visible->lo / LANES, last = (visible->hi + LANES - 1) / LANES;
    for (int r = 0; r < group; r++, ds += GRADIENT_ROW) {
        const int64_t i = row + r, position = head->offset + fa_query_of(head, i);
        int from, end;
        rows_range(problem, head, i, 1, back->block, &from, &end);
        from = from > visible->lo ? from : visible->lo; /* blocks may hide more: there is nothing in ds */
        end = end < visible->hi ? end : visible->hi;
        if (view[FA_D_COLUMNS].data)
            for (int v = first * LANES; v < last * LANES; v += LANES)
                v_store(back->column + v, v_load(back->column + v) + v_load(ds + v));
        if (view[FA_D_ROWS].data) {
            vec sum = {0};
            for (int v = first; v < last; v++)
                sum += v_load(ds + v * LANES);
            *(double *)(view[FA_D_ROWS].data + i * view[FA_D_ROWS].row) += (double)v_total(sum);
        }
        if (view[FA_D_SLOPES].data) {
            const real distance = (real)(back->block - position);
            vec sum = {0};
            for (int v = first; v < last; v++)
                sum = v_fma(v_abs(v_lane_numbers() + (distance + (real)(v * LANES))), v_load(ds + v * LANES), sum);
            *(double *)(view[FA_D_SLOPES].data + i * view[FA_D_SLOPES].row) -= (double)v_total(sum);
        }
        if (view[FA_D_BIAS].data)
            add_numbers(view + FA_D_BIAS, view + FA_D_BIAS_LOST, i, back->block + from, ds + from, end - from);
        if (view[FA_D_RELATIVE_BIAS].data)
            add_numbers(view + FA_D_RELATIVE_BIAS, view + FA_D_RELATIVE_BIAS_LOST, i,
                        back->block + from - position + problem->left, ds + from, end - from);
        if (view[FA_D_DIAGONALS].data) {
            /* Key j of row t of the tile is FA_BACK_ROWS - 1 - t + j, so that a diagonal is a number. */
            real *d = back->diagonal + (FA_BACK_ROWS - 1 - (i - back->tile.row));
            for (int j = from; j < end; j++)
                d[j] += ds[j];
        }
    }
}

static ALWAYS_INLINE int has_rules(const fa_gradients *to)
{
    return to->view[FA_D_BIAS].data || to->view[FA_D_RELATIVE_BIAS].data || to->view[FA_D_ROWS].data ||
           to->view[FA_D_COLUMNS].data || to->view[FA_D_DIAGONALS].data || to->view[FA_D_SLOPES].data;
}

/* P and dS of a tile; zeros where a group sees less than the tile, and behind. */
static void weigh_tile(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row, int rows,
                       int keep_seen, struct back *back)
{
    const int natural_log = scores_in_nats(problem, head), rules = has_rules(to);
    const fa_view *states = &to->view[FA_ROW_STATE];
    for (int g = 0; g < (rows + ROWS - 1) / ROWS; g++) {
        struct visible *visible = back->visible + g;
        const int group = rows - g * ROWS < ROWS ? rows - g * ROWS : ROWS, seen = visible->lo < visible->hi;
        const int first = seen ? visible->lo / LANES : back->last;
        const int last = seen ? (visible->hi + LANES - 1) / LANES : back->last;
        real *s = back->s + g * ROWS * GRADIENT_ROW, *dp = back->dp + g * ROWS * GRADIENT_ROW;
        if (seen)
            rule_group(problem, head, row, rows, g, back);
        for (int r = 0; r < ROWS; r++, s += GRADIENT_ROW, dp += GRADIENT_ROW) {
            const real *state = (const real *)(states->data + (row + g * ROWS + r) * states->row);
            for (int v = back->first; v < first; v++) {
                v_store(s + v * LANES, (vec){0});
                v_store(dp + v * LANES, (vec){0});
            }
            for (int j = last * LANES; j < back->last * LANES + 16; j++)
                s[j] = dp[j] = 0;
            if (r >= group || state[STATE_ACTIVE] == 0) {
                back->seen[g * ROWS + r] = (key_bits){{0}};
                for (int v = first; v < last; v++) {
                    v_store(s + v * LANES, (vec){0});
                    v_store(dp + v * LANES, (vec){0});
                }
                continue;
            }
            if (keep_seen)
                back->seen[g * ROWS + r] = keys_with_part(problem, first, last, state, s);
            if (problem->activation != FA_SOFTMAX)
                other_back(problem, first, last, state, s, dp);
            else if (natural_log)
                softmax_back(first, last, state, 1, s, dp);
            else
                softmax_back(first, last, state, 0, s, dp);
        }
        dp = back->dp + g * ROWS * GRADIENT_ROW;
        if (rules && seen)
            add_rules(problem, head, to, row + g * ROWS, group, visible, dp, back);
        if (problem->softcap != 0)
            for (int r = 0; r < group; r++)
                for (int at = r * GRADIENT_ROW + first * LANES; at < r * GRADIENT_ROW + last * LANES; at += LANES) {
                    const vec d = v_load(dp + at);
                    v_store(dp + at, v_pick(d == (vec){0}, d, d * v_load(back->steep + at)));
                }
    }
}

/* Sums of keys. */

static void open_sums(struct key_sums *sums) { sums->has_part = sums->has_total = sums->has_lost = 0; }

static ALWAYS_INLINE void begin_part(const struct back *back, struct key_sums *sums)
{
    if (sums->has_part)
        return;
    sums->keys = back->keys;
    memset(sums->part, 0, (size_t)(sums->keys * sums->row) * sizeof(real));
    sums->has_part = 1;
}

/* part[key][:] += sum over the rows of a tile of a[row][key] * b[row][:]. */
static void add_columns(const struct back *back, int rows, const real *a, const struct rows *b, struct key_sums *sums)
{
    const int first = back->first * LANES, last = back->last * LANES;
    begin_part(back, sums);
    for (int j = first; j < last; j += ROWS)
        for (int64_t c = 0; c < sums->row; c += PANEL) {
            const int vecs = sums->row - c < PANEL ? (int)(sums->row - c) / LANES : VECS;
            key_chains[vecs - 1](a + j, 0, (const char *)(b->at + c / STRIP * b->strip + c % STRIP),
                                 b->row * (ptrdiff_t)sizeof(real), rows, sums->part + j * sums->row + c, sums->row, 1);
        }
}

/* The same, in the same order, without what has no part. */
static NEVER_INLINE void add_seen_columns(const struct back *back, int rows, const real *a, const struct rows *b,
                                          struct key_sums *sums)
{
    begin_part(back, sums);
    for (int j = back->first * LANES; j < back->last * LANES; j++)
        for (int64_t c = 0; c < sums->row; c += LANES) {
            const real *b_c = b->at + c / STRIP * b->strip + c % STRIP;
            real *to = sums->part + j * sums->row + c;
            vec sum = {0};
            for (int r = 0; r < rows; r++)
                if (back->seen[r].word[j / 64] >> j % 64 & 1)
                    sum = v_fma(v_fill(a[r * GRADIENT_ROW + j]), v_load(b_c + r * b->row), sum);
            v_store(to, v_load(to) + sum);
        }
}

/* Adds the part, of FA_BACK_SPAN rows or the last of a head, to the total. */
static void fold_sums(struct key_sums *sums)
{
    if (!sums->has_part) /* nor anything else, where these are not wanted */
        return;
    const int64_t numbers = sums->keys * sums->row;
    if (!sums->has_total) { /* as adding it to zeros */
        real *part = sums->part;
        sums->part = sums->total, sums->total = part;
    } else {
        if (!sums->has_lost)
            memset(sums->lost, 0, (size_t)numbers * sizeof(real));
        for (int64_t c = 0; c < numbers; c += LANES)
            add_exactly(sums->total + c, sums->lost + c, v_fill(1), v_load(sums->part + c));
        sums->has_lost = 1;
    }
    sums->has_total = 1, sums->has_part = 0;
}

/* Writes the sums of the block's first `keys` keys, times `scale`. row: room for one. */
static void close_sums(const struct key_sums *sums, const fa_view *to, int64_t block, int64_t keys, int64_t dims,
                       double scale, real *row)
{
    for (int64_t j = 0; j < keys; j++) {
        for (int64_t c = 0; c < sums->row; c += LANES) {
            vec x = {0};
            if (sums->has_total)
                x = v_load(sums->total + j * sums->row + c);
            if (sums->has_lost)
                x += v_load(sums->lost + j * sums->row + c);
            v_store(row + c, scaled(x, scale) + (vec){0}); /* -0 becomes 0 */
        }
        scatter(to->data + (block + j) * to->row, to->col, row, dims, to->dtype);
    }
}

/* Sums of queries. */

/* part[row][:] = sum over the keys of the block that a tile's groups see of dS[row][key] * K[key][:]. */
static void sum_queries(int groups, const struct back *back)
{
    const int end = back->last * LANES;
    char begun[BACK_GROUPS] = {0};
    for (int at = back->first * LANES / BACK_CHUNK * BACK_CHUNK; at < end; at += BACK_CHUNK)
        for (int g = 0; g < groups; g++) {
            const struct visible *visible = back->visible + g;
            const int from = visible->lo > at ? visible->lo : at;
            const int to = visible->hi < at + BACK_CHUNK ? visible->hi : at + BACK_CHUNK;
            if (from >= to)
                continue;
            for (int64_t c = 0; c < back->channels; c += PANEL) {
                const int vecs = back->channels - c < PANEL ? (int)(back->channels - c) / LANES : VECS;
                query_chains[vecs - 1](back->dp + g * ROWS * GRADIENT_ROW + from, 0,
                                       (const char *)(back->k_rows + from * back->k_row + c),
                                       back->k_row * (ptrdiff_t)sizeof(real), to - from,
                                       back->part + g * ROWS * back->channels + c, back->channels, begun[g]);
            }
            begun[g] = 1;
        }
}

/* The same, in the same order, without what has no part. */
static NEVER_INLINE void sum_seen_queries(int rows, const struct back *back)
{
    for (int r = 0; r < rows; r++) {
        const struct visible *visible = back->visible + r / ROWS;
        for (int64_t c = 0; c < back->channels; c += LANES) {
            vec all = {0}, sum = {0};
            for (int j = visible->lo; j < visible->hi; j++) {
                if (back->seen[r].word[j / 64] >> j % 64 & 1)
                    sum =
                        v_fma(v_fill(back->dp[r * GRADIENT_ROW + j]), v_load(back->k_rows + j * back->k_row + c), sum);
                if ((j + 1) % BACK_CHUNK == 0 || j + 1 == visible->hi)
                    all += sum, sum = (vec){0};
            }
            v_store(back->part + r * back->channels + c, all);
        }
    }
}

/* Whether additive_back needs to know what each row of a tile sees. */
static int some_far(int rows, const struct back *back)
{
    int far = bits_any(&back->additive.far_keys);
    for (int r = 0; r < rows; r++)
        far |= back->row_is_far[r];
    return far;
}

/* What a tile gives queries (part), keys and weights of additive scores. */
static NEVER_INLINE void sum_additive(const fa_problem *problem, const fa_gradients *to, int rows, struct back *back)
{
    const fa_view *weights = &to->view[FA_D_SCORE_WEIGHTS];
    struct additive_back additive = back->additive;
    const struct tile *tile = &back->tile;
    const int64_t units = tile->channels;
    additive.k = tile->k, additive.k_raw = tile->additive.k_raw;
    const int64_t keys = (back->last - back->first) * LANES;
    memset(back->d_k + back->first * LANES * units, 0, (size_t)(keys * units) * sizeof(real));
    memset(back->d_w, 0, (size_t)units * sizeof(double));
    memset(back->part, 0, (size_t)(rows * back->channels) * sizeof(real));
    for (int first = 0; first < rows; first += ROWS) {
        const struct visible *visible = back->visible + first / ROWS;
        const int64_t group = first / ROWS * group_size(units);
        if (visible->lo >= visible->hi)
            continue;
        additive.q = tile->q + group, additive.q_raw = tile->additive.q_raw + group;
        memcpy(additive.row_is_far, back->row_is_far + first, ROWS);
        additive_back(&additive, rows - first < ROWS ? rows - first : ROWS, visible->lo, visible->hi,
                      back->some_far ? back->seen + first : NULL, back->dp + first * GRADIENT_ROW, GRADIENT_ROW,
                      back->part + first * back->channels, back->channels, back->d_k, back->d_w);
    }
    if (to->view[FA_D_KEY].data) {
        begin_part(back, &back->d_key);
        back_keys(back->d_k, additive.w, units, back->first, back->last, back->d_key.part, back->d_key.row);
    }
    for (int64_t h = 0; weights->data && h < problem->head_dim; h++)
        *(double *)(weights->data + back->block / FA_BLOCK * weights->row + h * weights->col) += back->d_w[h];
}

/* Adds a block's share to the gradients of a tile's queries. */
static void add_queries(const struct back *back, const fa_gradients *to, int64_t row, int rows, double scale)
{
    const fa_view *total = &to->view[FA_D_QUERY], *lost = &to->view[FA_D_QUERY_LOST];
    for (int r = 0; r < rows; r++) {
        if (back->visible[r / ROWS].lo >= back->visible[r / ROWS].hi)
            continue;
        real *d = (real *)(total->data + (row + r) * total->row);
        const real *part = back->part + r * back->channels;
        if (back->block < FA_SPAN && !to->query_is_shared) {
            for (int64_t c = 0; c < back->channels; c += LANES)
                v_store(d + c, v_load(d + c) + scaled(v_load(part + c), scale));
        } else {
            real *error = (real *)(lost->data + (row + r) * lost->row);
            for (int64_t c = 0; c < back->channels; c += LANES)
                add_exactly(d + c, error + c, v_fill(1), scaled(v_load(part + c), scale));
        }
    }
}

/* Before there are gradients: what there is to know of rows. */

/* Puts a block's final scores of a tile into back->s; returns the number of groups, 0 if they see nothing. */
static int scores_of_block(const fa_problem *problem, const fa_head *head, int64_t row, int rows, int64_t block,
                           int with_weights, struct back *back)
{
    back->block = block;
    back->key = NULL;
    const int groups = find_tile(problem, head, row, rows, back);
    if (!groups)
        return 0;
    open_keys(problem, head, row, row + rows, with_weights, back);
    score_tile(problem, rows, back);
    if (with_weights)
        tile_scores(back, groups, &back->d_out, back->v, problem->value_dim, back->columns, back->dp);
    for (int g = 0; g < groups; g++)
        if (back->visible[g].lo < back->visible[g].hi)
            rule_group(problem, head, row, rows, g, back);
    return groups;
}

/* Vectors of the block that row r of the tile sees. */
static ALWAYS_INLINE void vectors_of(const struct back *back, int r, int *first, int *last)
{
    const struct visible *visible = back->visible + r / ROWS;
    *first = visible->lo < visible->hi ? visible->lo / LANES : 0;
    *last = visible->lo < visible->hi ? (visible->hi + LANES - 1) / LANES : 0;
}

/* The largest score and the sum of exponentials, apart: a log-sum-exp near -1e9 cannot hold both. Of ReLU, the number
 * of visible keys. The gradient of a sink gets its weight as a factor. Only rows in `which` are set. */
static NEVER_INLINE void normalise_again(const fa_problem *problem, const fa_head *head, const fa_gradients *to,
                                         int64_t row, int rows, const char *which, struct back *back)
{
    const int natural_log = scores_in_nats(problem, head);
    double total[FA_BACK_ROWS] = {0};
    real most[FA_BACK_ROWS];
    int64_t begin, end;
    for (int r = 0; r < rows; r++)
        most[r] = -(real)INFINITY;
    fa_visible_keys(problem, head, row, rows, &begin, &end);
    open_queries(problem, head, to, row, rows, back);
    for (int64_t block = begin / FA_BLOCK * FA_BLOCK; block < end; block += FA_BLOCK) {
        if (!scores_of_block(problem, head, row, rows, block, 0, back))
            continue;
        for (int r = 0; r < rows; r++) {
            int first, last;
            real *s = back->s + r * GRADIENT_ROW;
            vectors_of(back, r, &first, &last);
            if (first >= last || !which[r])
                continue;
            if (problem->activation == FA_RELU) {
                struct visible *visible = back->visible + r / ROWS;
                make_bits(visible, rows - r / ROWS * ROWS < ROWS ? rows - r / ROWS * ROWS : ROWS);
                total[r] += bits_count(&visible->bits[r % ROWS]);
                continue;
            }
            vec now = row_maximum(s, first, last);
            const vec shrink = raise_maximum(most + r, &now, natural_log);
            const vec sum = natural_log ? row_weights(s, first, last, now, 1) : row_weights(s, first, last, now, 0);
            total[r] = total[r] * (double)shrink[0] + (double)v_total(sum);
        }
    }
    for (int r = 0; r < rows; r++) {
        real *state = state_of(to, row + r);
        if (!which[r])
            continue;
        if (problem->has_sink && problem->activation == FA_SOFTMAX) {
            const double unit = natural_log ? 1 : 0.69314718055994530942;
            const double sink = per_row(head, &head->view[FA_SINKS], row + r), shift = (double)most[r] * unit;
            double weight = 1;
            if (sink > shift) { /* relative to the sink then, which may be far above all scores */
                total[r] = total[r] * exp(shift - sink) + 1;
                most[r] = (real)(sink / unit);
            } else if (sink != -INFINITY) {
                weight = exp(sink - shift);
                total[r] += weight;
            }
            if (to->view[FA_D_SINKS].data && sink != -INFINITY)
                *(double *)(to->view[FA_D_SINKS].data + (row + r) * to->view[FA_D_SINKS].row) *= weight / total[r];
        }
        state[STATE_SHIFT] = problem->activation == FA_RELU ? 0 : most[r];
        state[STATE_FACTOR] = total[r] == 0 ? 0 : (real)(1 / total[r]);
        if (problem->activation == FA_SOFTMAX && most[r] == -(real)INFINITY)
            memset(state, 0, FA_STATE * sizeof(real));
    }
}

/* Thresholds of sparse weights, and the mean of their gradients by their slopes. */
static NEVER_INLINE void find_thresholds(const fa_problem *problem, const fa_head *head, const fa_gradients *to,
                                         int64_t row, int rows, struct back *back)
{
    const int square = is_square(problem);
    const int64_t room = back->room;
    int64_t count[FA_BACK_ROWS] = {0}, begin, end;
    double total[FA_BACK_ROWS] = {0}, product[FA_BACK_ROWS] = {0};
    real most[FA_BACK_ROWS];
    for (int r = 0; r < rows; r++)
        most[r] = -(real)INFINITY;
    fa_visible_keys(problem, head, row, rows, &begin, &end);
    open_queries(problem, head, to, row, rows, back);
    back->d_out = take_rows(head, to, &to->view[FA_GRAD_OUT], STATE_GRADIENT, row, rows, problem->value_dim,
                            back->columns, back->d_out_packed);
    for (int64_t block = begin / FA_BLOCK * FA_BLOCK; block < end; block += FA_BLOCK) {
        if (!scores_of_block(problem, head, row, rows, block, 0, back))
            continue;
        for (int r = 0; r < rows; r++) {
            int first, last;
            const real *s = back->s + r * GRADIENT_ROW;
            vectors_of(back, r, &first, &last);
            if (first >= last)
                continue;
            most[r] = v_max(row_maximum(s, first, last), v_fill(most[r]))[0];
            memcpy(back->scores + (r * room + count[r]) * LANES, s + first * LANES,
                   (size_t)((last - first) * LANES) * sizeof(real));
            count[r] += last - first;
        }
    }
    for (int r = 0; r < rows; r++) {
        real *state = state_of(to, row + r), *z = back->scores + r * room * LANES;
        const vec base = v_fill(most[r] == -(real)INFINITY ? 0 : most[r]);
        struct list list = {z, back->places, count[r], 0, {0, 0, 0}, 0};
        for (int64_t j = 0; j < count[r] * LANES; j += LANES)
            v_store(z + j, below_largest(square, v_load(z + j), base));
        if (square)
            weigh_lists(1, &list, 1);
        else
            weigh_lists(0, &list, 1);
        state[STATE_SHIFT] = base[0];
        state[STATE_FACTOR] = list.total == list.total ? list.search.t : (real)list.total;
        state[STATE_REST] = list.search.rest;
    }
    for (int64_t block = begin / FA_BLOCK * FA_BLOCK; block < end; block += FA_BLOCK) {
        if (!scores_of_block(problem, head, row, rows, block, 1, back))
            continue;
        for (int r = 0; r < rows; r++) {
            int first, last;
            const real *s = back->s + r * GRADIENT_ROW, *dp = back->dp + r * GRADIENT_ROW;
            vec sum = {0}, sums = {0}, p;
            vectors_of(back, r, &first, &last);
            for (int v = first; v < last; v++) {
                const vec x = v_load(s + v * LANES), slope = sparse_slope(square, x, state_of(to, row + r), &p);
                const ivec out = (slope == (vec){0}) | (x == v_fill(-(real)INFINITY));
                sum += v_pick(out, (vec){0}, slope);
                sums += v_pick(out, (vec){0}, slope * v_load(dp + v * LANES));
            }
            total[r] += (double)v_total(sum);
            product[r] += (double)v_total(sums);
        }
    }
    for (int r = 0; r < rows; r++)
        state_of(to, row + r)[STATE_DELTA] = total[r] == 0 ? 0 : (real)(product[r] / total[r]);
}

/* sum over channels of dO * O; zero: whether all of O is. */
static real delta_of(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t i, int *zero,
                     struct back *back)
{
    const fa_view *out = &head->view[FA_OUT], *d_out = &to->view[FA_GRAD_OUT];
    const char *o = out->data + i * out->row, *d = d_out->data + i * d_out->row;
    const int out_in_place = readable(out), d_out_in_place = readable(d_out);
    vec all = {0}, unused = {0};
    ivec any = {0};
    for (int64_t c = 0; c < problem->value_dim; c += STRIP) {
        const int64_t n = problem->value_dim - c < STRIP ? problem->value_dim - c : STRIP;
        const real *x = (const real *)(o + c * out->col), *y = (const real *)(d + c * d_out->col);
        vec sum = {0};
        if (!out_in_place || n % LANES) {
            copy_row((const char *)x, out, out_in_place, n, in_vectors(n), back->d_out_packed, &unused);
            x = back->d_out_packed;
        }
        if (!d_out_in_place || n % LANES) {
            copy_row(d + c * d_out->col, d_out, d_out_in_place, n, in_vectors(n), back->d_out_packed + STRIP, &unused);
            y = back->d_out_packed + STRIP;
        }
        for (int64_t k = 0; k < n; k += LANES) {
            sum = v_fma(v_load(x + k), v_load(y + k), sum);
            any |= v_load(x + k) != (vec){0};
        }
        all += sum;
    }
    *zero = !v_true_bits(any != 0);
    return v_total(all);
}

/* Contract: contract.h. */
static void back_prepare(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                         int64_t rows, void *workspace)
{
    struct back *back = workspace;
    const fa_view *lses = &head->view[FA_LSE], *d_lse = &to->view[FA_GRAD_LSE];
    const double unit = scores_in_nats(problem, head) ? 1 : 1.44269504088896340736;
    const int query_in_place = problem->score == FA_DOT && rows_in_place(&head->view[FA_QUERY], problem->head_dim);
    const int d_out_in_place = rows_in_place(&to->view[FA_GRAD_OUT], problem->value_dim);
    lay_out_back(back, problem, head->keys, workspace);
    for (int64_t first = row; first < row + rows; first += back->rows_at_once) {
        const int n = row + rows - first < back->rows_at_once ? (int)(row + rows - first) : back->rows_at_once;
        char again[FA_BACK_ROWS] = {0};
        int some = 0;
        for (int r = 0; r < n; r++) {
            const int64_t i = first + r;
            real *state = state_of(to, i);
            memset(state, 0, FA_STATE * sizeof(real));
            const double grad_lse = d_lse->data ? (double)read_number(d_lse->data + i * d_lse->row, d_lse->dtype) : 0;
            const double sink = to->view[FA_D_SINKS].data ? per_row(head, &head->view[FA_SINKS], i) : -INFINITY;
            double *d_sink =
                sink == -INFINITY ? NULL : (double *)(to->view[FA_D_SINKS].data + i * to->view[FA_D_SINKS].row);
            if (i >= head->query_length) {
                if (d_sink) /* all the weight is its own */
                    *d_sink = grad_lse;
                continue;
            }
            state[STATE_ACTIVE] = state[STATE_FACTOR] = 1;
            state[STATE_QUERY] = (real)(query_in_place && row_is_finite(&head->view[FA_QUERY], i, problem->head_dim));
            state[STATE_GRADIENT] =
                (real)(d_out_in_place && row_is_finite(&to->view[FA_GRAD_OUT], i, problem->value_dim));
            again[r] = problem->activation != FA_SOFTMAX;
            if (problem->activation == FA_SOFTMAX) {
                real lse;
                int zero;
                const real delta = delta_of(problem, head, to, i, &zero, back);
                memcpy(&lse, lses->data + i * lses->row, sizeof lse);
                const int far = !(fabs((double)lse) <= 1e3) && lse == lse;
                if (d_sink) /* an output of zeros may be that of a row that sees nothing; if far, times 1 so far */
                    *d_sink = (far ? 1 : exp(sink - (double)lse)) * (grad_lse - (zero ? 0 : (double)delta));
                if (lse == -(real)INFINITY) {
                    memset(state, 0, FA_STATE * sizeof(real));
                    continue;
                }
                state[STATE_DELTA] = (real)((double)delta - grad_lse);
                state[STATE_SHIFT] = lse == (real)INFINITY ? lse - lse : (real)((double)lse * unit);
                again[r] = (char)far;
            }
            some |= again[r];
        }
        if (some && is_sparse(problem))
            find_thresholds(problem, head, to, first, n, back);
        else if (some && problem->activation != FA_SIGMOID)
            normalise_again(problem, head, to, first, n, again, back);
    }
}

/* Contract: contract.h. */
static size_t back_workspace(const fa_problem *problem, int64_t keys)
{
    struct back back; /* for its size only */
    return lay_out_back(&back, problem, keys, (char *)(uintptr_t)FA_ALIGN);
}

/* Contract: contract.h. */
static void back_open(const fa_problem *problem, int64_t keys, int64_t block, void *workspace)
{
    struct back *back = workspace;
    lay_out_back(back, problem, keys, workspace);
    for (int64_t h = 0; problem->score == FA_ADDITIVE && h < back->tile.channels; h++)
        back->w[h] = (real)(h < problem->head_dim ? 4 * problem->score_weights[h] : 0);
    back->block = block;
    back->keys = (keys - block < FA_BLOCK ? keys - block : FA_BLOCK) + LANES + ROWS;
    back->keys = back->keys < FA_BLOCK + ROWS ? back->keys : FA_BLOCK + ROWS;
    back->key = back->value = NULL;
    open_sums(&back->d_key);
    open_sums(&back->d_value);
}

/* Whether no row of a tile has a score, or a log-sum-exp, that is NaN: its P of hidden keys would be NaN too. */
static int rows_are_numbers(const fa_gradients *to, int64_t row, int rows)
{
    const fa_view *states = &to->view[FA_ROW_STATE];
    int numbers = 1;
    for (int64_t i = row; i < row + rows; i++) {
        real shift;
        memcpy(&shift, states->data + i * states->row + STATE_SHIFT * (ptrdiff_t)sizeof(real), sizeof shift);
        numbers &= shift == shift;
    }
    return numbers;
}

/* What a tile has collected for rules. */
static void close_rules(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                        const struct back *back)
{
    const fa_view *columns = &to->view[FA_D_COLUMNS], *diagonals = &to->view[FA_D_DIAGONALS];
    for (int j = back->first * LANES; columns->data && j < back->last * LANES && back->block + j < head->keys; j++)
        *(double *)(columns->data + (back->block + j) * columns->row) += (double)back->column[j];
    if (diagonals->data) {
        const int64_t last_row = row + FA_BACK_ROWS - 1;
        const int64_t place = back->block - (head->offset + last_row) + problem->left; /* of number 0 */
        const int64_t places = problem->left + problem->right + 1;
        for (int j = back->first * LANES; j < back->last * LANES + FA_BACK_ROWS; j++)
            if (place + j >= 0 && place + j < places)
                ((double *)diagonals->data)[place + j] += (double)back->diagonal[j];
    }
}

/* Contract: contract.h. */
static void back_visit(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                       int64_t row_end, void *workspace)
{
    struct back *back = workspace;
    const fa_view *view = to->view;
    const int of_keys = view[FA_D_KEY].data != NULL, of_values = view[FA_D_VALUE].data != NULL;
    const int of_queries = view[FA_D_QUERY].data != NULL;
    const int of_scores = of_keys || of_queries || has_rules(to) || view[FA_D_SCORE_WEIGHTS].data != NULL;
    int64_t first, last, span = -1;
    rows_of_block(problem, head, back->block, &first, &last);
    first = first > row ? first / FA_BACK_ROWS * FA_BACK_ROWS : row;
    last = last < row_end ? last : row_end;
    for (int64_t i = first; i < last; i += FA_BACK_ROWS) {
        const int rows = row_end - i < FA_BACK_ROWS ? (int)(row_end - i) : FA_BACK_ROWS;
        if (i / FA_BACK_SPAN != span && span >= 0) {
            fold_sums(&back->d_key);
            fold_sums(&back->d_value);
        }
        span = i / FA_BACK_SPAN;
        const int groups = find_tile(problem, head, i, rows, back);
        if (!groups)
            continue;
        open_keys(problem, head, i, last > i + FA_BACK_ROWS ? last : i + rows, of_scores, back);
        open_queries(problem, head, to, i, rows, back);
        back->d_out = take_rows(head, to, &view[FA_GRAD_OUT], STATE_GRADIENT, i, rows, problem->value_dim,
                                back->columns, back->d_out_packed);
        const int finite = back->q_raw.finite && back->d_out.finite && back->k_finite && rows_are_numbers(to, i, rows);
        score_tile(problem, rows, back);
        if (of_scores)
            tile_scores(back, groups, &back->d_out, back->v, problem->value_dim, back->columns, back->dp);
        if (view[FA_D_COLUMNS].data)
            memset(back->column, 0, GRADIENT_ROW * sizeof(real));
        if (view[FA_D_DIAGONALS].data)
            memset(back->diagonal, 0, (FA_BLOCK + FA_BACK_ROWS) * sizeof(real));
        back->some_far = problem->score == FA_ADDITIVE && some_far(rows, back);
        weigh_tile(problem, head, to, i, rows, !finite || back->some_far, back);
        if (has_rules(to))
            close_rules(problem, head, to, i, back);
        if (of_values) {
            if (finite)
                add_columns(back, rows, back->s, &back->d_out, &back->d_value);
            else
                add_seen_columns(back, rows, back->s, &back->d_out, &back->d_value);
        }
        if (problem->score == FA_ADDITIVE) {
            if (of_keys || of_queries || view[FA_D_SCORE_WEIGHTS].data)
                sum_additive(problem, to, rows, back);
        } else if (of_keys) {
            if (finite)
                add_columns(back, rows, back->dp, &back->q_raw, &back->d_key);
            else
                add_seen_columns(back, rows, back->dp, &back->q_raw, &back->d_key);
        }
        if (of_queries) {
            if (problem->score == FA_DOT && finite)
                sum_queries(groups, back);
            else if (problem->score == FA_DOT)
                sum_seen_queries(rows, back);
            add_queries(back, to, i, rows, problem->scale);
        }
    }
    fold_sums(&back->d_key);
    fold_sums(&back->d_value);
}

/* Contract: contract.h. */
static void back_close(const fa_problem *problem, const fa_head *head, const fa_gradients *to, void *workspace)
{
    struct back *back = workspace;
    const int64_t keys = head->keys - back->block < FA_BLOCK ? head->keys - back->block : FA_BLOCK;
    if (to->view[FA_D_KEY].data)
        close_sums(&back->d_key, &to->view[FA_D_KEY], back->block, keys, problem->head_dim, problem->scale,
                   back->d_key.part);
    if (to->view[FA_D_VALUE].data)
        close_sums(&back->d_value, &to->view[FA_D_VALUE], back->block, keys, problem->value_dim, 1, back->d_value.part);
}
