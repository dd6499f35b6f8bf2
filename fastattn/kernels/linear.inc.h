/* Linear attention: the recurrence over keys itself, its state in registers row by row.
 *
 * The state is a matrix M (features, value_dim) and, where the result is normalised, a vector z of features. Its
 * columns do not know of each other, so they are cut into slabs. For each slab several tokens (keys with the query that
 * stands on them) pass over the rows of M together: a row is loaded, each token multiplies it with its decay, adds its
 * feature times its value, and adds the row times its query's feature to its own sum; then the row is stored. So 2 *
 * TOKENS multiply-adds share a load and a store, and every number goes through the same operations in the same order as
 * in the plain recurrence, whichever tokens pass together. That is why no bit depends on where keys are cut.
 *
 * The delta rule needs M' k of a token before it can add it, so tokens pass one by one; each sums the next one's M' k.
 *
 * Features of LINEAR_BLOCK tokens lie ready in blocks of LANES: a token's key, query and decay side by side, one token
 * after the other, so that one pointer reaches all of them by constant distances.
 */
enum {
    LINEAR_ROW = 4,                 /* vectors of a row of a slab, at most */
    LINEAR_PASS = VECS < 4 ? 2 : 4, /* those that TOKENS pass over: their sums and values stay in registers */
    LINEAR_HALF = 2,                /* vectors of the slabs of a call that has so few columns */
    LINEAR_BLOCK = 24,              /* keys whose features lie ready */
    LINEAR_PANEL = 64,        /* features that tokens pass over before the next ones do: rows stay in the first cache */
    LINEAR_OTHERS = 96,       /* rows of further queries that lie ready, or those of one key */
    KEY_AT = 0,               /* where a token's features lie, */
    QUERY_AT = LANES,         /* those of its query, */
    DECAY_AT = 2 * LANES,     /* and what M is multiplied with */
    TOKEN_STEP = 3 * LANES,   /* from a token to the next */
    SLAB = LINEAR_ROW * LANES /* columns of a slab, at most */
};
_Static_assert(LINEAR_BLOCK % TOKENS == 0 && LINEAR_PANEL % LANES == 0, "whole groups of tokens, whole blocks");

struct slab {
    const real *from; /* row 0 of M; after the first pass it is `to` */
    real *to;
    ptrdiff_t from_row, to_row; /* from a row to the next, in numbers */
    int64_t column;             /* of the values */
    int width;                  /* columns */
    int vecs;                   /* vectors of a row: LINEAR_HALF, or LINEAR_ROW; the last ones perhaps filled up */
};

/* The workspace. */
struct linear_space {
    int64_t blocks, slabs;
    int64_t others;     /* further queries on a key: those of all heads but the first */
    int64_t other_room; /* rows of features of further queries */
    real *x;            /* [blocks][LINEAR_BLOCK][key, query, decay][LANES] */
    real *other_x;      /* [blocks][other_room][LANES] */
    real *nothing;      /* a token that adds nothing and asks nothing: [key, query, decay][LANES] */
    real *value;        /* [LINEAR_BLOCK][SLAB]; with the delta rule what is added instead */
    real *sum;          /* [LINEAR_BLOCK][SLAB] */
    real *other_sum;    /* [other_room][SLAB] */
    real *predicted;    /* [SLAB], M' k; on the way back what a token takes back */
    real *fade;         /* [LINEAR_BLOCK][SLAB], decays of columns */
    real *part;         /* [LINEAR_BLOCK][LANES], products of z and a query by lanes */
    real *other_part;   /* [other_room][LANES] */
    real *total;        /* [LINEAR_BLOCK]: denominators */
    real *other_total;
    real *zeros; /* [SLAB] */
    real *row;   /* scratch for a row of anything */
    real *z;     /* [blocks][LANES] */
    real *m;     /* slabs that are not updated where they lie */
    struct slab *slab;
    unsigned *forgotten;                      /* [blocks][LINEAR_BLOCK]: lanes whose decay is 0 */
    unsigned char forgets[LINEAR_BLOCK];      /* whether a token has such lanes */
    unsigned faded[LINEAR_BLOCK][LINEAR_ROW]; /* the same as `forgotten`, of columns of a slab */
};

static ALWAYS_INLINE int64_t round_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Hands out parts of a workspace, or with NULL counts them. */
static ALWAYS_INLINE void *part_of(char *workspace, size_t *used, size_t size)
{
    void *part = workspace + *used;
    *used += (size + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    return workspace ? part : NULL;
}

static ALWAYS_INLINE real *reals_of(char *workspace, size_t *used, int64_t n)
{
    return part_of(workspace, used, (size_t)n * sizeof(real));
}

static size_t lay_out_linear(const fa_linear *p, int64_t columns, struct linear_space *s, char *workspace)
{
    size_t used = 0;
    const int64_t widest = p->features > p->value_dim ? p->features : p->value_dim;
    part_of(workspace, &used, sizeof *s);
    s->blocks = p->features ? round_to(p->features, LANES) / LANES : 1; /* without features, one of zeros */
    s->others = p->is_causal ? p->heads - 1 : 0;
    s->other_room = s->others > LINEAR_OTHERS ? round_to(s->others, 4) : LINEAR_OTHERS;
    s->x = reals_of(workspace, &used, s->blocks * LINEAR_BLOCK * TOKEN_STEP);
    s->other_x = reals_of(workspace, &used, (s->blocks * s->other_room + TOKENS) * LANES);
    s->nothing = reals_of(workspace, &used, TOKEN_STEP);
    s->value = reals_of(workspace, &used, LINEAR_BLOCK * SLAB);
    s->sum = reals_of(workspace, &used, LINEAR_BLOCK * SLAB);
    s->other_sum = reals_of(workspace, &used, s->other_room * SLAB);
    s->predicted = reals_of(workspace, &used, SLAB);
    s->fade = reals_of(workspace, &used, p->fades ? LINEAR_BLOCK * SLAB : 0);
    s->part = reals_of(workspace, &used, LINEAR_BLOCK * LANES);
    s->other_part = reals_of(workspace, &used, s->other_room * LANES);
    s->total = reals_of(workspace, &used, LINEAR_BLOCK);
    s->other_total = reals_of(workspace, &used, s->other_room);
    s->zeros = reals_of(workspace, &used, SLAB);
    s->row = reals_of(workspace, &used, round_to(widest + 1, SLAB));
    s->z = reals_of(workspace, &used, s->blocks * LANES);
    s->m = reals_of(workspace, &used, p->features * round_to(columns, SLAB));
    s->slab = part_of(workspace, &used, (size_t)(columns / LANES + 1) * sizeof *s->slab);
    s->forgotten = part_of(workspace, &used, (size_t)(s->blocks * LINEAR_BLOCK) * sizeof *s->forgotten);
    return used;
}

/* Contract: contract.h. */
static size_t linear_workspace(const fa_linear *problem, int64_t columns)
{
    struct linear_space counted;
    return lay_out_linear(problem, columns, &counted, NULL);
}

/* Features */

static ALWAYS_INLINE vec features_of(vec x, const fa_feature_map map)
{
    const vec zero = {0};
    if (map == FA_ELU_PLUS_1) /* NaN stays NaN in the first term */
        return v_max(zero, x) + v_exp_below(v_min(x, zero), 1);
    if (map == FA_RELU_MAP)
        return v_max(zero, x);
    return x;
}

/* Asks for a row that is wanted a block later, where it lies in one piece. */
static ALWAYS_INLINE void prefetch_row(const fa_view *matrix, const char *row, int64_t n)
{
    if (readable(matrix))
        prefetch_bytes(row, n * (int64_t)sizeof(real));
}

/* Features of rows, into blocks of LANES that lie a step apart, with 0 in the lanes past the end; token: from a row's
 * to the next one's. */
static ALWAYS_INLINE void map_rows(const fa_linear *p, struct linear_space *s, const fa_view *matrix, const char *row,
                                   int64_t rows, real *to, ptrdiff_t step, ptrdiff_t token, const fa_feature_map map)
{
    const int direct = readable(matrix), rest = (int)(p->features % LANES);
    for (; rows > 0; rows--, row += matrix->row, to += token) {
        const real *from = (const real *)row;
        real *block = to;
        prefetch_row(matrix, row + LINEAR_BLOCK * matrix->row, p->features);
        if (!direct) {
            gather(s->row, row, matrix->col, p->features, matrix->dtype);
            from = s->row;
        }
        for (int64_t left = p->features; left >= LANES; left -= LANES, from += LANES, block += step)
            v_store(block, features_of(v_load(from), map));
        if (rest)
            v_store(block, v_pick_bits((1u << rest) - 1, features_of(v_load_some(from, rest), map), (vec){0}));
    }
}

static void put_features(const fa_linear *p, struct linear_space *s, const fa_view *matrix, const char *row,
                         int64_t rows, real *to, ptrdiff_t step, ptrdiff_t token)
{
    switch (p->map) {
    case FA_NO_MAP:
        map_rows(p, s, matrix, row, rows, to, step, token, FA_NO_MAP);
        break;
    case FA_ELU_PLUS_1:
        map_rows(p, s, matrix, row, rows, to, step, token, FA_ELU_PLUS_1);
        break;
    case FA_RELU_MAP:
        map_rows(p, s, matrix, row, rows, to, step, token, FA_RELU_MAP);
        break;
    }
}

static ALWAYS_INLINE void fill_features(real *to, ptrdiff_t step, int64_t blocks, real x)
{
    for (; blocks > 0; blocks--, to += step)
        v_store(to, v_fill(x));
}

/* e**x for any x. */
static ALWAYS_INLINE vec exp_of_any(vec x)
{
    const vec e = v_exp_below(x, 1);
    if (!v_true_bits(x > 0))
        return e;
    const vec root = 1 / v_exp_below(x * (real)-0.5, 1); /* of e**x, which may be beyond what 1 / x reaches */
    return v_pick(x > 0, root * root, e);
}

/* What M is multiplied with before key j, which is token t of a block. Where that is 0 because the logarithm says so, M
 * is forgotten, NaN too: forgotten says in which lanes, and the factor is 1. */
static void put_decays(const fa_linear *p, const fa_linear_head *h, struct linear_space *s, int64_t j, int t)
{
    const fa_view *matrix = &h->view[FA_LINEAR_LOG_DECAY];
    const char *row = matrix->data + j * matrix->row;
    const vec none = v_fill(-(real)INFINITY);
    real *to = s->x + t * TOKEN_STEP + DECAY_AT;
    if (matrix->col == 0)
        s->row[0] = read_number(row, matrix->dtype);
    else
        gather(s->row, row, matrix->col, p->features, matrix->dtype);
    s->forgets[t] = 0;
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t left = p->features - b * LANES;
        vec x;
        if (matrix->col == 0)
            x = v_fill(s->row[0]);
        else if (left < LANES)
            x = v_load_some(s->row + b * LANES, (int)left);
        else
            x = v_load(s->row + b * LANES);
        const unsigned lost = v_true_bits(x == none);
        s->forgotten[b * LINEAR_BLOCK + t] = lost;
        s->forgets[t] |= lost != 0;
        v_store(to + b * LINEAR_BLOCK * TOKEN_STEP, v_pick(x == none, v_fill(1), exp_of_any(x)));
    }
}

/* Of n keys from j on those [*first, *end) that a query of a head stands on; returns the row of the first. */
static ALWAYS_INLINE int64_t rows_on(const fa_linear_head *h, int64_t head, int64_t j, int n, int *first, int *end)
{
    const int64_t begin = h->offset[head] - j, behind = begin + h->rows[head]; /* where row 0 stands */
    *first = begin < 0 ? 0 : begin < n ? (int)begin : n;
    *end = behind < *first ? *first : behind < n ? (int)behind : n;
    return *first - begin;
}

static ALWAYS_INLINE char *row_of(const fa_view *matrix, int64_t head, int64_t i)
{
    return matrix->data + head * matrix->head + i * matrix->row;
}

/* Features of the keys [j, j + n), of the queries that stand on them, and decays. */
static void put_tokens(const fa_linear *p, const fa_linear_head *h, struct linear_space *s, int64_t j, int n)
{
    const fa_view *query = &h->view[FA_LINEAR_QUERY], *key = &h->view[FA_LINEAR_KEY];
    const ptrdiff_t step = LINEAR_BLOCK * TOKEN_STEP;
    const int decays = h->view[FA_LINEAR_LOG_DECAY].data != NULL && !p->fades;
    /* Passes of one token always multiply. */
    const int ones = !decays && (h->view[FA_LINEAR_BETA].data || s->others || n % TOKENS);
    put_features(p, s, key, key->data + j * key->row, n, s->x + KEY_AT, step, TOKEN_STEP);
    for (int t = 0; t < n; t++) {
        s->forgets[t] = 0;
        if (decays)
            put_decays(p, h, s, j + t, t);
        if (ones)
            fill_features(s->x + t * TOKEN_STEP + DECAY_AT, step, s->blocks, 1);
    }
    for (int64_t head = 0; head <= s->others; head++) {
        real *to = head == 0 ? s->x + QUERY_AT : s->other_x + (head - 1) * LANES;
        const ptrdiff_t to_step = head == 0 ? step : s->other_room * LANES;
        const ptrdiff_t token = head == 0 ? TOKEN_STEP : s->others * LANES;
        int first = 0, end = 0;
        const int64_t row = p->is_causal ? rows_on(h, head, j, n, &first, &end) : 0;
        put_features(p, s, query, row_of(query, head, row), end - first, to + first * token, to_step, token);
        for (int t = 0; t < n; t++)
            if ((t < first || t >= end) && (p->is_causal || n % TOKENS))
                fill_features(to + t * token, to_step, s->blocks, 0);
    }
}

/* The normaliser */

static ALWAYS_INLINE void add_product(real *part, vec a, vec b, int begins)
{
    v_store(part, v_fma(a, b, begins ? (vec){0} : v_load(part)));
}

static void total_of_parts(const real *part, int64_t rows, double eps, real *total)
{
    for (int64_t r = 0; r < rows; r += 4, part += 4 * LANES) {
        v_four_totals(total + r, v_load(part), v_load(part + LANES), v_load(part + 2 * LANES),
                      v_load(part + 3 * LANES));
        for (int i = 0; i < 4; i++)
            total[r + i] += (real)eps;
    }
}

/* z takes in the keys of a block, and the queries that stand on them are multiplied with it. */
static ALWAYS_INLINE void pass_normaliser(struct linear_space *s, int n, const int decays, const int read,
                                          const int64_t others)
{
    for (int64_t b = 0; b < s->blocks; b++) {
        vec z = v_load(s->z + b * LANES);
        const real *x = s->x + b * LINEAR_BLOCK * TOKEN_STEP;
        for (int t = 0; t < n; t++, x += TOKEN_STEP) {
            if (decays) {
                if (s->forgets[t])
                    z = v_pick_bits(s->forgotten[b * LINEAR_BLOCK + t], (vec){0}, z);
                z = v_fma(z, v_load(x + DECAY_AT), v_load(x + KEY_AT));
            } else {
                z = z + v_load(x + KEY_AT);
            }
            if (read)
                add_product(s->part + t * LANES, z, v_load(x + QUERY_AT), b == 0);
            for (int64_t r = t * others; r < (t + 1) * others; r++)
                add_product(s->other_part + r * LANES, z, v_load(s->other_x + (b * s->other_room + r) * LANES), b == 0);
        }
        v_store(s->z + b * LANES, z);
    }
}

/* The same, and the denominators. */
static void put_denominators(const fa_linear *p, const fa_linear_head *h, struct linear_space *s, int n)
{
    const int decays = h->view[FA_LINEAR_LOG_DECAY].data != NULL;
    if (!p->is_causal)
        pass_normaliser(s, n, 0, 0, 0);
    else if (!decays && !s->others)
        pass_normaliser(s, n, 0, 1, 0);
    else
        pass_normaliser(s, n, decays, 1, s->others);
    if (p->is_causal) {
        total_of_parts(s->part, n, p->eps, s->total);
        total_of_parts(s->other_part, s->others * n, p->eps, s->other_total);
    }
}

/* Passes over rows of M */

/* Rows of M that tokens pass over. */
struct rows_of_m {
    const real *x;  /* features of the first token */
    ptrdiff_t step; /* from a block of features to the next */
    int64_t features;
    const real *from; /* may be `to` */
    ptrdiff_t from_row;
    real *to;
    ptrdiff_t to_row;
    const real *value; /* rows of SLAB numbers, one a token */
    real *sum;         /* the same; what is read is added to it */
    int vecs;
    int begins;       /* there is no sum yet */
    const real *fade; /* rows of SLAB numbers, one a token; optional */
};

enum { PLAIN, DECAYS, FADES, UPDATE = 1, READ = 1 };

/* `tokens` pass over `vecs` vectors. token: from the features of one to those of the next. */
static ALWAYS_INLINE void pass(const int tokens, const int vecs, const int update, const int decay, const int read,
                               const int token, const int query_at, const struct rows_of_m *rows)
{
    vec u[TOKENS][LINEAR_ROW], sum[TOKENS][LINEAR_ROW];
    const real *restrict x = rows->x;
    const real *from = rows->from;
    real *to = rows->to;
    const ptrdiff_t step = rows->step, from_row = rows->from_row, to_row = rows->to_row;
    UNROLL(8)
    for (int t = 0; t < tokens; t++) {
        UNROLL(4)
        for (int c = 0; c < vecs; c++) {
            if (update)
                u[t][c] = v_load(rows->value + t * SLAB + c * LANES);
            if (read)
                sum[t][c] = rows->begins ? (vec){0} : v_load(rows->sum + t * SLAB + c * LANES);
        }
    }
    for (int64_t left = rows->features; left > 0; left -= LANES, x += step) {
        const int n = left < LANES ? (int)left : LANES;
        for (int f = 0; f < n; f++, from += from_row, to += to_row) {
            vec m[LINEAR_ROW];
            UNROLL(4)
            for (int c = 0; c < vecs; c++)
                m[c] = v_load(from + c * LANES);
            UNROLL(8)
            for (int t = 0; t < tokens; t++) {
                const real *x_t = x + t * token + f;
                UNROLL(4)
                for (int c = 0; c < vecs; c++) {
                    if (decay) {
                        m[c] *= decay == FADES ? v_load(rows->fade + t * SLAB + c * LANES) : v_fill(x_t[DECAY_AT]);
                        HOLD(m[c]); /* always rounded, whatever a compiler could contract */
                    }
                    if (update)
                        m[c] = v_fma(v_fill(x_t[KEY_AT]), u[t][c], m[c]);
                    if (read)
                        sum[t][c] = v_fma(v_fill(x_t[query_at]), m[c], sum[t][c]);
                }
            }
            UNROLL(4)
            for (int c = 0; update && c < vecs; c++)
                v_store(to + c * LANES, m[c]);
        }
    }
    UNROLL(8)
    for (int t = 0; t < tokens; t++) {
        UNROLL(4)
        for (int c = 0; read && c < vecs; c++)
            v_store(rows->sum + t * SLAB + c * LANES, sum[t][c]);
    }
}

/* Each is a function of its own: inlined, their pointers would not stay in registers. */
static ALWAYS_INLINE void pass_half_or_whole(const int tokens, const int update, const int decay, const int read,
                                             const int token, const int query_at, const struct rows_of_m *rows)
{
    if (rows->vecs > LINEAR_HALF && (tokens == 1 || LINEAR_PASS > LINEAR_HALF))
        pass(tokens, LINEAR_ROW, update, decay, read, token, query_at, rows);
    else
        pass(tokens, LINEAR_HALF, update, decay, read, token, query_at, rows);
}
static NEVER_INLINE void pass_tokens(const struct rows_of_m *rows)
{
    pass_half_or_whole(TOKENS, UPDATE, PLAIN, READ, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_decaying_tokens(const struct rows_of_m *rows)
{
    pass_half_or_whole(TOKENS, UPDATE, DECAYS, READ, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_token(const struct rows_of_m *rows)
{
    pass_half_or_whole(1, UPDATE, DECAYS, READ, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_fading_tokens(const struct rows_of_m *rows)
{
    pass_half_or_whole(TOKENS, UPDATE, FADES, READ, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_fading_token(const struct rows_of_m *rows)
{
    pass_half_or_whole(1, UPDATE, FADES, READ, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_unread_tokens(const struct rows_of_m *rows)
{
    pass_half_or_whole(TOKENS, UPDATE, PLAIN, 0, TOKEN_STEP, QUERY_AT, rows);
}
static NEVER_INLINE void pass_queries(const struct rows_of_m *rows)
{
    pass_half_or_whole(TOKENS, 0, PLAIN, READ, LANES, 0, rows);
}
static NEVER_INLINE void pass_query(const struct rows_of_m *rows)
{
    pass_half_or_whole(1, 0, PLAIN, READ, LANES, 0, rows);
}

/* The delta rule. M decays by token x, and its product with the token's key is what the rule corrects. */
static NEVER_INLINE void predict(const real *x, int64_t features, const real *from, ptrdiff_t from_row, real *to,
                                 ptrdiff_t to_row, real *predicted)
{
    vec p[LINEAR_ROW] = {{0}};
    for (; features > 0; features -= LANES, x += LINEAR_BLOCK * TOKEN_STEP) {
        const int n = features < LANES ? (int)features : LANES;
        for (int f = 0; f < n; f++, from += from_row, to += to_row) {
            UNROLL(4)
            for (int c = 0; c < LINEAR_ROW; c++) {
                vec m = v_load(from + c * LANES) * x[f + DECAY_AT];
                HOLD(m);
                p[c] = v_fma(v_fill(x[f + KEY_AT]), m, p[c]);
                v_store(to + c * LANES, m);
            }
        }
    }
    UNROLL(4)
    for (int c = 0; c < LINEAR_ROW; c++)
        v_store(predicted + c * LANES, p[c]);
}

/* Token x adds u, after its decay, and reads; then the same as above for the token that follows. */
static NEVER_INLINE void pass_delta(const real *x, const real *next, ptrdiff_t next_step, int64_t features, real *m_,
                                    ptrdiff_t row, const real *u_, real *sum_, real *predicted)
{
    vec u[LINEAR_ROW], sum[LINEAR_ROW] = {{0}}, p[LINEAR_ROW] = {{0}};
    UNROLL(4)
    for (int c = 0; c < LINEAR_ROW; c++)
        u[c] = v_load(u_ + c * LANES);
    for (; features > 0; features -= LANES, x += LINEAR_BLOCK * TOKEN_STEP, next += next_step) {
        const int n = features < LANES ? (int)features : LANES;
        for (int f = 0; f < n; f++, m_ += row) {
            /* Read here once: what is stored below might lie there, for all that a compiler knows. */
            const vec key = v_fill(x[f + KEY_AT]), query = v_fill(x[f + QUERY_AT]);
            const vec decay = v_fill(next[f + DECAY_AT]), next_key = v_fill(next[f + KEY_AT]);
            UNROLL(4)
            for (int c = 0; c < LINEAR_ROW; c++) {
                vec m = v_fma(key, u[c], v_load(m_ + c * LANES));
                sum[c] = v_fma(query, m, sum[c]);
                m *= decay;
                HOLD(m);
                p[c] = v_fma(next_key, m, p[c]);
                v_store(m_ + c * LANES, m);
            }
        }
    }
    UNROLL(4)
    for (int c = 0; c < LINEAR_ROW; c++) {
        v_store(sum_ + c * LANES, sum[c]);
        v_store(predicted + c * LANES, p[c]);
    }
}

/* The delta rule's way back: what the token before takes back, the decay, token x, and what it reads. */
static NEVER_INLINE void pass_delta_back(const real *x, ptrdiff_t step, const real *before, ptrdiff_t before_step,
                                         int64_t features, real *m_, ptrdiff_t row, const real *u_, const real *taken_,
                                         real *sum_)
{
    vec u[LINEAR_ROW], taken[LINEAR_ROW], sum[LINEAR_ROW] = {{0}};
    UNROLL(4)
    for (int c = 0; c < LINEAR_ROW; c++) {
        u[c] = v_load(u_ + c * LANES);
        taken[c] = v_load(taken_ + c * LANES);
    }
    for (; features > 0; features -= LANES, x += step, before += before_step) {
        const int n = features < LANES ? (int)features : LANES;
        for (int f = 0; f < n; f++, m_ += row) {
            const vec key = v_fill(x[f + KEY_AT]), query = v_fill(x[f + QUERY_AT]), decay = v_fill(x[f + DECAY_AT]);
            const vec query_before = v_fill(before[f + QUERY_AT]);
            UNROLL(4)
            for (int c = 0; c < LINEAR_ROW; c++) {
                vec m = v_fma(query_before, taken[c], v_load(m_ + c * LANES)) * decay;
                HOLD(m);
                m = v_fma(key, u[c], m);
                sum[c] = v_fma(query, m, sum[c]);
                v_store(m_ + c * LANES, m);
            }
        }
    }
    UNROLL(4)
    for (int c = 0; c < LINEAR_ROW; c++)
        v_store(sum_ + c * LANES, sum[c]);
}

/* Slabs */

static ALWAYS_INLINE void own_rows(const fa_linear *p, struct slab *slab)
{
    for (int64_t f = 0; slab->from != slab->to && f < p->features; f++)
        memcpy(slab->to + f * slab->to_row, slab->from + f * slab->from_row, (size_t)slab->width * sizeof(real));
    slab->from = slab->to;
    slab->from_row = slab->to_row;
}

/* Clears the rows of M that token t forgets, for a number of features, a multiple of LANES, from `first` on. */
static void forget(const struct linear_space *s, int t, int64_t first, int64_t features, real *m, ptrdiff_t row,
                   int vecs)
{
    for (int64_t f = 0; f < features; f++)
        if (s->forgotten[(first + f) / LANES * LINEAR_BLOCK + t] >> f % LANES & 1)
            for (int c = 0; c < vecs; c++)
                v_store(m + f * row + c * LANES, (vec){0});
}

/* The same for columns of M, from vector `first` of a slab on. */
static void forget_columns(const struct linear_space *s, int t, int first, int64_t features, real *m, ptrdiff_t row,
                           int vecs)
{
    for (int64_t f = 0; f < features; f++, m += row)
        for (int c = 0; c < vecs; c++)
            v_store(m + c * LANES, v_pick_bits(s->faded[t][first + c], (vec){0}, v_load(m + c * LANES)));
}

/* Features of a panel, and vectors of a slab from a column on. */
static struct rows_of_m panel_of(const fa_linear *p, const struct slab *slab, int64_t first, int column)
{
    const int64_t left = p->features - first;
    return (struct rows_of_m){.features = left < LINEAR_PANEL ? left : LINEAR_PANEL,
                              .from = slab->from + first * slab->from_row + column,
                              .from_row = slab->from_row,
                              .to = slab->to + first * slab->to_row + column,
                              .to_row = slab->to_row,
                              .vecs = slab->vecs < LINEAR_PASS ? slab->vecs : LINEAR_PASS,
                              .begins = first == 0};
}

/* So many rows of further queries read a panel as it is; sum: that of row 0. */
static void read_panel(const struct linear_space *s, int64_t row, int64_t rows, int64_t first, struct rows_of_m r,
                       real *sum)
{
    r.step = s->other_room * LANES;
    for (int64_t end = row + rows; row < end;) {
        const int group = row + TOKENS <= end;
        r.x = s->other_x + first / LANES * r.step + row * LANES;
        r.sum = sum + row * SLAB;
        (group ? pass_queries : pass_query)(&r);
        row += group ? TOKENS : 1;
    }
}

/* The same over all panels of a slab. */
static void read_slab(const fa_linear *p, const struct linear_space *s, int64_t row, int64_t rows,
                      const struct slab *slab)
{
    for (int column = 0; column < slab->width; column += LINEAR_PASS * LANES)
        for (int64_t f = 0; f < p->features; f += LINEAR_PANEL)
            read_panel(s, row, rows, f, panel_of(p, slab, f, column), s->other_sum + column);
}

/* n tokens pass over a panel. */
static void pass_panel(const fa_linear *p, const fa_linear_head *h, const struct linear_space *s, int n, int64_t first,
                       struct rows_of_m r, int column)
{
    const int decays = h->view[FA_LINEAR_LOG_DECAY].data != NULL;
    for (int t = 0; t < n;) {
        int group = !s->others && t + TOKENS <= n;
        for (int i = 1; group && decays && i < TOKENS; i++)
            group = !s->forgets[t + i];
        if (s->forgets[t] && p->fades)
            forget_columns(s, t, column / LANES, r.features, r.to, r.to_row, r.vecs);
        else if (s->forgets[t])
            forget(s, t, first, r.features, r.to, r.to_row, r.vecs);
        r.step = LINEAR_BLOCK * TOKEN_STEP;
        r.x = s->x + first / LANES * r.step + t * TOKEN_STEP;
        r.value = s->value + t * SLAB + column;
        r.sum = s->sum + t * SLAB + column;
        r.fade = s->fade + t * SLAB + column;
        if (p->fades)
            (group ? pass_fading_tokens : pass_fading_token)(&r);
        else if (!group)
            pass_token(&r);
        else if (!p->is_causal)
            pass_unread_tokens(&r);
        else if (decays)
            pass_decaying_tokens(&r);
        else
            pass_tokens(&r);
        r.from = r.to;
        r.from_row = r.to_row;
        if (s->others)
            read_panel(s, t * s->others, s->others, first, r, s->other_sum + column);
        t += group ? TOKENS : 1;
    }
}

static void pass_slab(const fa_linear *p, const fa_linear_head *h, const struct linear_space *s, int n,
                      struct slab *slab)
{
    if (n == 1 && !s->others && slab->from != slab->to) {
        /* A single step reads and writes whole rows, in the order of memory. */
        pass_token(&(struct rows_of_m){s->x, LINEAR_BLOCK * TOKEN_STEP, p->features, slab->from, slab->from_row,
                                       slab->to, slab->to_row, s->value, s->sum, slab->vecs, 1, NULL});
    } else {
        for (int column = 0; column < slab->width; column += LINEAR_PASS * LANES)
            for (int64_t f = 0; f < p->features; f += LINEAR_PANEL)
                pass_panel(p, h, s, n, f, panel_of(p, slab, f, column), column);
    }
    slab->from = slab->to;
    slab->from_row = slab->to_row;
}

/* The same by the delta rule, for keys [j, j + n). */
static void pass_slab_delta(const fa_linear *p, const fa_linear_head *h, const struct linear_space *s, int64_t j, int n,
                            struct slab *slab)
{
    const ptrdiff_t step = LINEAR_BLOCK * TOKEN_STEP;
    const fa_view *betas = &h->view[FA_LINEAR_BETA], *missed = &h->view[FA_LINEAR_MISSED];
    int is_predicted = 0;
    for (int t = 0; t < n; t++) {
        const real *x = s->x + t * TOKEN_STEP;
        real *value = s->value + t * SLAB;
        if (s->forgets[t])
            forget(s, t, 0, p->features, slab->to, slab->to_row, LINEAR_ROW);
        if (!is_predicted)
            predict(x, p->features, slab->from, slab->from_row, slab->to, slab->to_row, s->predicted);
        slab->from = slab->to;
        slab->from_row = slab->to_row;
        const vec beta = v_fill(read_number(betas->data + (j + t) * betas->row, betas->dtype));
        for (int c = 0; c < SLAB; c += LANES) {
            const vec left = v_load(value + c) - v_load(s->predicted + c);
            v_store(s->predicted + c, left);
            v_store(value + c, beta * left);
        }
        if (missed->data)
            scatter(missed->data + (j + t) * missed->row + slab->column * missed->col, missed->col, s->predicted,
                    slab->width, missed->dtype);
        /* What follows must find M before its decay where others read it, and where it is forgotten. */
        is_predicted = t + 1 < n && !s->others && !s->forgets[t + 1];
        pass_delta(x, is_predicted ? x + TOKEN_STEP : s->nothing, is_predicted ? step : 0, p->features, slab->to,
                   slab->to_row, value, s->sum + t * SLAB, s->predicted);
        if (s->others)
            read_slab(p, s, t * s->others, s->others, slab);
    }
}

/* The same on its way back. What the last token takes back is done at the end, so that blocks can be cut anywhere. */
static void pass_slab_delta_back(const fa_linear *p, const fa_linear_head *h, const struct linear_space *s, int64_t j,
                                 int n, struct slab *slab)
{
    const ptrdiff_t step = LINEAR_BLOCK * TOKEN_STEP;
    const fa_view *betas = &h->view[FA_LINEAR_BETA];
    const real *before = s->nothing, *taken = s->zeros;
    for (int t = 0; t <= n; t++) {
        const int ends = t == n || s->forgets[t];
        if (ends && before != s->nothing) {
            pass_delta_back(s->nothing, 0, before, step, p->features, slab->to, slab->to_row, s->zeros, taken,
                            s->other_sum);
            before = s->nothing;
            taken = s->zeros;
        }
        if (t == n)
            break;
        if (ends)
            forget(s, t, 0, p->features, slab->to, slab->to_row, LINEAR_ROW);
        real *sum = s->sum + t * SLAB;
        pass_delta_back(s->x + t * TOKEN_STEP, step, before, before == s->nothing ? 0 : step, p->features, slab->to,
                        slab->to_row, s->value + t * SLAB, taken, sum);
        const vec beta = v_fill(read_number(betas->data + (j + t) * betas->row, betas->dtype));
        for (int c = 0; c < SLAB; c += LANES)
            v_store(s->predicted + c, -beta * v_load(sum + c));
        before = s->x + t * TOKEN_STEP;
        taken = s->predicted;
    }
}

/* Decays of the keys [j, j + n) in the columns of a slab: as put_decays. Returns whether any column is forgotten. */
static int put_fades(const fa_linear_head *h, struct linear_space *s, int64_t j, int n, const struct slab *slab)
{
    const fa_view *matrix = &h->view[FA_LINEAR_LOG_DECAY];
    const vec none = v_fill(-(real)INFINITY);
    int forgets = 0;
    for (int t = 0; t < n; t++) {
        const char *row = matrix->data + (j + t) * matrix->row;
        real *to = s->fade + t * SLAB;
        if (matrix->col) {
            memset(to, 0, SLAB * sizeof(real));
            gather(to, row + slab->column * matrix->col, matrix->col, slab->width, matrix->dtype);
        } else {
            const real x = read_number(row, matrix->dtype);
            for (int c = 0; c < SLAB; c += LANES)
                v_store(to + c, v_fill(x));
        }
        s->forgets[t] = 0;
        for (int c = 0; c < LINEAR_ROW; c++) {
            const vec x = v_load(to + c * LANES);
            const unsigned lost = v_true_bits(x == none);
            s->faded[t][c] = lost;
            s->forgets[t] |= lost != 0;
            v_store(to + c * LANES, v_pick(x == none, v_fill(1), exp_of_any(x)));
        }
        forgets |= s->forgets[t];
    }
    return forgets;
}

/* Values of the keys [j, j + n) in the columns of a slab, and zeros behind them. */
static void put_values(const fa_linear_head *h, const struct linear_space *s, int64_t j, int n, const struct slab *slab)
{
    const fa_view *value = &h->view[FA_LINEAR_VALUE];
    const int direct = readable(value);
    for (int t = 0; t < n; t++) {
        const char *row = value->data + (j + t) * value->row + slab->column * value->col;
        real *to = s->value + t * SLAB;
        int c = 0;
        prefetch_row(value, row + LINEAR_BLOCK * value->row, slab->width);
        for (; direct && c + LANES <= slab->width; c += LANES)
            v_store(to + c, v_load((const real *)row + c));
        if (direct && c < slab->width) {
            v_store(to + c, v_load_some((const real *)row + c, slab->width - c));
            c += LANES;
        }
        if (!direct) {
            gather(to, row, value->col, slab->width, value->dtype);
            for (c = slab->width; c % LANES; c++)
                to[c] = 0;
        }
        for (; c < SLAB; c += LANES)
            v_store(to + c, (vec){0});
    }
}

/* Row i of a head: sums become the output. total: the denominator, where the result is normalised. */
static void write_row(const fa_linear *p, const fa_linear_head *h, int64_t head, int64_t i, const struct slab *slab,
                      real *sum, real total)
{
    const fa_view *out = &h->view[FA_LINEAR_OUT];
    char *to = row_of(out, head, i) + slab->column * out->col;
    const real size = total < 0 ? -total : total, least = BITS == 32 ? (real)0x1p-126 : (real)0x1p-1022;
    real factor = (real)p->scale, below = 1;
    if (p->is_normalised) {
        const int invertible = size >= least && size <= 1 / least / 4; /* or the reciprocal is inexact, or no number */
        factor = invertible ? 1 / total : 1;
        below = invertible ? 1 : total;
    }
    int c = 0;
    const int direct = readable(out);
    prefetch_row(out, to + LINEAR_BLOCK * out->row, slab->width);
    for (; c < slab->width; c += LANES) {
        vec y = v_load(sum + c) * factor;
        if (below != 1)
            y /= below;
        if (p->is_normalised && total == 0)
            y = (vec){0};
        if (direct && c + LANES <= slab->width)
            v_store((real *)to + c, y);
        else
            v_store(sum + c, y);
    }
    if (!direct)
        scatter(to, out->col, sum, slab->width, out->dtype);
    else if (c > slab->width)
        memcpy((real *)to + c - LANES, sum + c - LANES, (size_t)(slab->width - (c - LANES)) * sizeof(real));
}

/* Contract: contract.h. */
static void linear_open(const fa_linear *p, const fa_linear_head *h, void *workspace)
{
    struct linear_space *s = workspace;
    const fa_view *state = &h->view[FA_LINEAR_STATE], *next = &h->view[FA_LINEAR_NEW_STATE];
    const int few = h->few && next->data && readable(next) && (!state->data || readable(state));
    const int delta = h->view[FA_LINEAR_BETA].data != NULL;
    lay_out_linear(p, h->columns, s, workspace);
    memset(s->zeros, 0, SLAB * sizeof(real));
    for (int i = 0; i < TOKEN_STEP; i++)
        s->nothing[i] = i >= DECAY_AT;
    s->slabs = 0;
    real *m = s->m;
    for (int64_t at = 0; at < h->columns;) {
        struct slab *slab = s->slab + s->slabs++;
        const int64_t left = h->columns - at;
        const int in_place = few && left >= SLAB;
        slab->column = h->column + at;
        slab->vecs = in_place || delta ? LINEAR_ROW : left > LINEAR_HALF * LANES ? LINEAR_PASS : LINEAR_HALF;
        slab->width = slab->vecs * LANES;
        if (left < slab->width)
            slab->width = (int)left;
        at += slab->width;
        if (in_place) {
            slab->from = state->data ? (const real *)state->data + slab->column : s->zeros;
            slab->from_row = state->data ? state->row / (ptrdiff_t)sizeof(real) : 0;
            slab->to = (real *)next->data + slab->column;
            slab->to_row = next->row / (ptrdiff_t)sizeof(real);
            continue;
        }
        slab->from = slab->to = m;
        slab->from_row = slab->to_row = slab->vecs * LANES;
        m += p->features * slab->to_row;
        if (!state->data || slab->width < slab->to_row)
            memset(slab->to, 0, (size_t)(p->features * slab->to_row) * sizeof(real));
        for (int64_t f = 0; state->data && f < p->features; f++)
            gather(slab->to + f * slab->to_row, state->data + f * state->row + slab->column * state->col, state->col,
                   slab->width, state->dtype);
    }
    memset(s->z, 0, (size_t)(s->blocks * LANES) * sizeof(real));
    if (p->is_normalised && state->data)
        gather(s->z, state->data + p->value_dim * state->col, state->row, p->features, state->dtype);
}

/* Contract: contract.h. */
static void linear_keys(const fa_linear *p, const fa_linear_head *h, int64_t begin, int64_t end, void *workspace)
{
    struct linear_space *s = workspace;
    const int delta = h->view[FA_LINEAR_BETA].data != NULL;
    const int64_t others = s->others, most = others ? s->other_room / others : LINEAR_BLOCK;
    for (int64_t j = begin; j < end;) {
        int n = (int)(most < LINEAR_BLOCK ? most : LINEAR_BLOCK), forgets = 0;
        if (end - j < n)
            n = (int)(end - j);
        put_tokens(p, h, s, j, n);
        if (p->is_normalised)
            put_denominators(p, h, s, n);
        for (int t = 0; t < n; t++)
            forgets |= s->forgets[t];
        for (int64_t i = 0; i < s->slabs; i++) {
            struct slab *slab = s->slab + i;
            put_values(h, s, j, n, slab);
            if (p->features == 0) { /* and no pass */
                memset(s->sum, 0, (size_t)(n * SLAB) * sizeof(real));
                memset(s->other_sum, 0, (size_t)(n * others * SLAB) * sizeof(real));
            }
            if (p->fades)
                forgets = put_fades(h, s, j, n, slab);
            if (forgets)
                own_rows(p, slab);
            if (delta && p->back)
                pass_slab_delta_back(p, h, s, j, n, slab);
            else if (delta)
                pass_slab_delta(p, h, s, j, n, slab);
            else
                pass_slab(p, h, s, n, slab);
            for (int64_t head = 0; p->is_causal && head < p->heads; head++) {
                int first, last;
                const int64_t row = rows_on(h, head, j, n, &first, &last);
                for (int t = first; t < last; t++) {
                    const int64_t r = t * others + head - 1;
                    write_row(p, h, head, row + t - first, slab, head ? s->other_sum + r * SLAB : s->sum + t * SLAB,
                              head ? s->other_total[r] : s->total[t]);
                }
            }
        }
        j += n;
    }
}

/* Contract: contract.h. */
static void linear_rows(const fa_linear *p, const fa_linear_head *h, int64_t query_head, int64_t begin, int64_t end,
                        void *workspace)
{
    struct linear_space *s = workspace;
    const fa_view *query = &h->view[FA_LINEAR_QUERY];
    for (int64_t row = begin; row < end;) {
        const int64_t n = end - row < LINEAR_BLOCK ? end - row : LINEAR_BLOCK;
        put_features(p, s, query, row_of(query, query_head, row), n, s->other_x, s->other_room * LANES, LANES);
        if (p->is_normalised) {
            for (int64_t b = 0; b < s->blocks; b++)
                for (int64_t r = 0; r < n; r++)
                    add_product(s->other_part + r * LANES, v_load(s->z + b * LANES),
                                v_load(s->other_x + (b * s->other_room + r) * LANES), b == 0);
            total_of_parts(s->other_part, n, p->eps, s->other_total);
        }
        for (int64_t i = 0; i < s->slabs; i++) {
            const struct slab *slab = s->slab + i;
            if (p->features == 0)
                memset(s->other_sum, 0, (size_t)(n * SLAB) * sizeof(real));
            read_slab(p, s, 0, n, slab);
            for (int64_t r = 0; r < n; r++)
                write_row(p, h, query_head, row + r, slab, s->other_sum + r * SLAB, s->other_total[r]);
        }
        row += n;
    }
}

/* Contract: contract.h. */
static void linear_close(const fa_linear *p, const fa_linear_head *h, void *workspace)
{
    struct linear_space *s = workspace;
    const fa_view *next = &h->view[FA_LINEAR_NEW_STATE];
    if (!next->data)
        return;
    for (int64_t i = 0; i < s->slabs; i++) {
        struct slab *slab = s->slab + i;
        char *to = next->data + slab->column * next->col;
        own_rows(p, slab);
        for (int64_t f = 0; (char *)slab->to != to && f < p->features; f++)
            scatter(to + f * next->row, next->col, slab->to + f * slab->to_row, slab->width, next->dtype);
    }
    if (p->is_normalised && h->column == 0)
        scatter(next->data + p->value_dim * next->col, next->row, s->z, p->features, next->dtype);
}
