/* Attention along the edges of a graph: one pass over the rows of a sparse matrix, each with all heads of its node.
 *
 * The edges of a row are taken EDGES at a time: scores, the running maximum, weights, and the weighted sum of the
 * values, as in softmax.inc.h. Scores lie as [edge][head], heads padded to a power of two: those of a short row fill
 * few vectors, and the weights of an edge are one. Keys and values are prefetched some edges ahead, and, because the
 * edges of the next row follow in memory, beyond the end of a row, too.
 *
 * The bits of a head do not depend on how many are taken together: each product is a sum of its own, and sums over
 * edges run in the order of the edges. */

enum {
    EDGES = 64,                        /* in one step of the softmax; the bits of a word say which are hidden */
    SHORT_ROWS = 8,                    /* that are in one block, at most */
    EDGE_BYTES_AHEAD = 8192,           /* prefetch distance, in bytes of keys and values, */
    FEWEST_AHEAD = 4,                  /* and at least in edges, */
    MOST_AHEAD = 32,                   /* and at most */
    VALUE_VECS = 4,                    /* vectors of a value that are added up at a time */
    MOST_HEADS = LANES < 4 ? 1 : LANES /* that are taken together: their scores of an edge are in one vector */
};

/* Where the keys and values of edges to come lie. */
struct edges_ahead {
    const char *indices, *keys, *values;
    ptrdiff_t index_step, key_row, value_row;
    int64_t edges, ahead;
    int index_size, key_span, value_span; /* bytes of a node's row, all heads */
};

/* What the rows of a run have in common, for one group of heads. */
struct edge_run {
    const fa_graph *graph;
    struct edges_ahead ahead;
    int64_t first_head;
    int heads;  /* of the group, at most MOST_HEADS; padded: */
    int padded; /* 1, 4, 8 or 16 */
    int narrow; /* there is one channel: the lanes of a key are its heads */
    int keys_in_place, values_in_place, out_in_place;
    int scores_change;  /* between product and softmax */
    int want_extras;    /* weights or log-sum-exp */
    int whole;          /* values are whole vectors; else those of all heads lie without gaps */
    int late;           /* scores are still multiplied by `root`, twice (pack_wide_queries) */
    ptrdiff_t key_head; /* from head to head, where keys are read */
    int64_t channels;   /* head_dim in whole vectors */
    int64_t vecs;       /* of a row of values, heads one after the other */
    int tail;           /* numbers in the last of them; LANES if it is whole */
    int64_t q_row;      /* numbers in a row of q */
    real *q, *w;        /* [rows][heads][channels] queries; [heads][channels] weights of the hidden units */
    real *s;            /* [edges][padded] scores, then weights; rows begin with a vector */
    real *root;         /* [rows][LANES] */
    real *lanes_of; /* [LANES][LANES] the lanes, as integers, of the edge that begins at a lane of a vector of scores */
    real *o, *o_all, *o_error;    /* [vecs] sums of weighted values: of a block, and of all before it */
    real *extra;                  /* numbers of one head */
    real *cap_slope;              /* as s: derivatives of the softcap, if anybody wants them */
    real *k, *v;                  /* [EDGES][heads][] keys and values that cannot be read in place */
    ptrdiff_t *value_at, *out_at; /* [vecs] where a vector lies in a row of values, and of the output */
    int64_t *head_of;             /* [vecs] whole: its head */
    real *from;                   /* [vecs] else: the head of each number, as integers */
    const char *k_j[EDGES + 4];   /* of a piece; what is missing to a multiple of four is the last once more */
    const char *v_j[EDGES];       /* of a block */
    uint64_t hidden[LANES];       /* of each head, which edges of a block are hidden */
};

/* Up to LANES numbers, and zeros. */
static ALWAYS_INLINE vec load_up_to(const void *p, int n)
{
    if (n == LANES)
        return v_load(p);
    return v_load_some(p, n);
}

/* Edges of one row, all or EDGES of them. A block is one piece, or several, of short rows that follow each other. */
struct edge_piece {
    int64_t row, t;     /* the first edge */
    int n, at;          /* edges; those of the block that come before */
    real *q, *root, *s; /* the row's own */
};

static ALWAYS_INLINE int64_t integer_at(const char *at, int size)
{
    int32_t short_one;
    int64_t long_one;
    if (size == 4) {
        memcpy(&short_one, at, 4);
        return short_one;
    }
    memcpy(&long_one, at, 8);
    return long_one;
}

static ALWAYS_INLINE int64_t key_of_edge(const fa_graph *graph, int64_t t)
{
    return integer_at(graph->indices + t * graph->index_step, graph->index_size);
}

static ALWAYS_INLINE int64_t first_edge(const fa_graph *graph, int64_t i)
{
    return integer_at(graph->indptr + i * graph->indptr_step, graph->indptr_size);
}

/* A matrix of the group's heads: its first one's number for a node or an edge. */
static ALWAYS_INLINE char *of_group(const struct edge_run *run, int operand, int64_t row)
{
    const fa_view *matrix = &run->graph->view[operand];
    return matrix->data + run->first_head * matrix->head + row * matrix->row;
}

/* Whether kernels can read or write the rows of a node where they lie. packed: if there are no gaps between heads. */
static int heads_in_place(const fa_graph *graph, const fa_view *matrix, int64_t n, int packed)
{
    return matrix->dtype == REAL_DTYPE && (matrix->col == (ptrdiff_t)sizeof(real) || n <= 1) &&
           (!packed || graph->heads <= 1 || matrix->head == n * (ptrdiff_t)sizeof(real));
}

/* Bytes of the rows of `heads` heads of a node, as long as they lie together; else of none. */
static int span_of(const fa_view *matrix, int heads, int64_t n)
{
    if (n == 0 || matrix->head < 0 || matrix->col < 0 || matrix->head > 16384 || matrix->col > 16384)
        return 0;
    const int64_t bytes = matrix->head * (heads - 1) + (n - 1) * matrix->col + (int64_t)sizeof(real);
    return bytes <= 16384 ? (int)bytes : 0;
}

static ALWAYS_INLINE void *take_bytes(char **at, int64_t bytes)
{
    return take(at, (bytes + (int64_t)sizeof(real) - 1) / (int64_t)sizeof(real));
}

/* Lays the workspace out at `base`; returns its size. */
static size_t lay_out_edges(struct edge_run *run, const fa_graph *graph, char *base)
{
    const int64_t heads = graph->heads < MOST_HEADS ? graph->heads : MOST_HEADS, value_dim = graph->value_dim;
    char *at = base;
    run->graph = graph;
    run->cap_slope = NULL;
    run->narrow = graph->head_dim == 1;
    run->whole = value_dim % LANES == 0;
    run->keys_in_place =
        !graph->view[FA_EDGE_KEY].data && heads_in_place(graph, &graph->view[FA_KEY], graph->head_dim, run->narrow);
    /* Where a bias may hide some, copies take their place, and must be alike. */
    run->values_in_place = !graph->view[FA_EDGE_VALUE].data && heads_in_place(graph, &graph->view[FA_VALUE], value_dim,
                                                                              !run->whole || graph->view[FA_BIAS].data);
    run->out_in_place = heads_in_place(graph, &graph->view[FA_OUT], value_dim, !run->whole);
    run->late = graph->score == FA_DOT && scale_is_wide(graph->scale);
    run->scores_change = run->late || graph->softcap != 0 || graph->view[FA_BIAS].data;
    run->want_extras = graph->view[FA_WEIGHTS].data || graph->view[FA_LSE].data;
    run->channels = run->narrow ? 1 : (graph->head_dim + LANES - 1) / LANES * LANES;
    const int64_t vecs = (heads * value_dim + LANES - 1) / LANES;
    run->q_row = heads * run->channels + LANES;
    run->q = (real *)take(&at, SHORT_ROWS * run->q_row);
    run->w = (real *)take(&at, heads * run->channels + LANES);
    run->s = (real *)take(&at, (EDGES + SHORT_ROWS + 5) * LANES);
    run->root = (real *)take(&at, SHORT_ROWS * LANES);
    run->lanes_of = (real *)take(&at, LANES * LANES);
    run->o = (real *)take(&at, vecs * LANES);
    run->o_all = (real *)take(&at, vecs * LANES);
    run->o_error = (real *)take(&at, vecs * LANES);
    run->extra = (real *)take(&at, EDGES + (graph->head_dim > value_dim ? graph->head_dim : value_dim));
    run->value_at = take_bytes(&at, vecs * (int64_t)sizeof(ptrdiff_t));
    run->out_at = take_bytes(&at, vecs * (int64_t)sizeof(ptrdiff_t));
    run->head_of = take_bytes(&at, vecs * (int64_t)sizeof(int64_t));
    run->from = (real *)take(&at, run->whole ? 0 : vecs * LANES);
    run->k = (real *)take(&at, run->keys_in_place ? 0 : EDGES * heads * graph->head_dim + LANES);
    run->v = (real *)take(&at, run->values_in_place && !graph->view[FA_BIAS].data ? 0 : EDGES * vecs * LANES);
    return (size_t)(at - base);
}

static size_t edges_workspace(const fa_graph *graph)
{
    struct edge_run run; /* for its size only: the addresses are not used */
    return lay_out_edges(&run, graph, (char *)(uintptr_t)FA_ALIGN);
}

/* Begins with the heads from `first` on. */
static void open_heads(struct edge_run *run, int64_t first)
{
    const fa_graph *graph = run->graph;
    const fa_view *key = &graph->view[FA_KEY], *value = &graph->view[FA_VALUE];
    const int64_t value_dim = graph->value_dim, size = sizeof(real);
    run->first_head = first;
    run->heads = graph->heads - first < MOST_HEADS ? (int)(graph->heads - first) : MOST_HEADS;
    run->padded = run->heads == 1 ? 1 : 4;
    while (run->padded < run->heads)
        run->padded *= 2;
    run->key_head = run->keys_in_place ? key->head : graph->head_dim * size;
    run->vecs = (run->heads * value_dim + LANES - 1) / LANES;
    run->tail = (int)(run->heads * value_dim - (run->vecs - 1) * LANES);
    struct edges_ahead *ahead = &run->ahead;
    ahead->indices = graph->indices, ahead->index_step = graph->index_step, ahead->index_size = graph->index_size;
    ahead->keys = of_group(run, FA_KEY, 0), ahead->key_row = key->row;
    ahead->values = of_group(run, FA_VALUE, 0), ahead->value_row = value->row;
    ahead->key_span = span_of(key, run->heads, graph->head_dim);
    ahead->value_span = span_of(value, run->heads, value_dim);
    ahead->edges = graph->edges;
    const int64_t bytes = ahead->key_span + ahead->value_span;
    ahead->ahead = EDGE_BYTES_AHEAD / (bytes > 0 ? bytes : 1);
    if (ahead->ahead < FEWEST_AHEAD)
        ahead->ahead = FEWEST_AHEAD;
    if (ahead->ahead > MOST_AHEAD)
        ahead->ahead = MOST_AHEAD;
    const ptrdiff_t value_head = run->values_in_place ? value->head : value_dim * size;
    for (int64_t v = 0; v < run->vecs; v++) {
        const int64_t h = v * LANES / value_dim, c = v * LANES % value_dim;
        run->head_of[v] = h;
        run->value_at[v] = run->whole ? h * value_head + c * size : v * VECTOR_BYTES;
        run->out_at[v] = run->whole ? h * graph->view[FA_OUT].head + c * size : v * VECTOR_BYTES;
        if (!run->whole) {
            ivec from;
            for (int i = 0; i < LANES; i++) {
                const int64_t owner = (v * LANES + i) / value_dim;
                from[i] = owner < run->heads ? owner : 0;
            }
            memcpy(run->from + v * LANES, &from, sizeof from);
        }
    }
    for (int at = 0; at < LANES; at += run->padded) {
        ivec lanes;
        for (int i = 0; i < LANES; i++)
            lanes[i] = i % run->padded + at;
        memcpy(run->lanes_of + at * LANES, &lanes, sizeof lanes);
    }
    memset(run->hidden, 0, sizeof run->hidden);
    memset(run->q, 0, (size_t)(SHORT_ROWS * run->q_row) * sizeof(real));
    memset(run->w, 0, (size_t)(run->heads * run->channels + LANES) * sizeof(real));
    if (graph->score == FA_ADDITIVE)
        for (int h = 0; h < run->heads; h++)
            gather(run->w + h * run->channels,
                   of_group(run, FA_UNIT_WEIGHTS, 0) + h * graph->view[FA_UNIT_WEIGHTS].head,
                   graph->view[FA_UNIT_WEIGHTS].col, graph->head_dim, REAL_DTYPE);
}

/* What is left of a scale that is far from 1, for one query: pack_wide_queries tells why. */
static NEVER_INLINE real apply_wide_scale(real *q, int64_t n, double scale)
{
    const int most = BITS == 32 ? 100 : 900, far = BITS == 32 ? 252 : 2044;
    double largest = 0;
    int of_query = 0, of_scale = 0, shift = 0;
    for (int64_t c = 0; c < n; c++)
        if (fabs((double)q[c]) > largest && fabs((double)q[c]) < INFINITY)
            largest = fabs((double)q[c]);
    frexp(largest, &of_query);
    frexp(scale, &of_scale);
    const int exponent = of_query + of_scale;
    if (largest > 0 && exponent > most)
        shift = (exponent - most + 1) / 2 * 2;
    else if (largest > 0 && exponent < -most)
        shift = -((-most - exponent + 1) / 2 * 2);
    for (int64_t c = 0; c < n; c++)
        q[c] = (real)((double)q[c] * ldexp(scale, -shift));
    shift = shift > far ? far : shift < -far ? -far : shift;
    return (real)ldexp(1, shift / 2);
}

/* The queries of a row. */
static ALWAYS_INLINE void pack_edge_row(struct edge_run *run, const struct edge_piece *piece)
{
    const fa_graph *graph = run->graph;
    const fa_view *query = &graph->view[FA_QUERY];
    const int64_t n = graph->head_dim;
    const real factor = graph->score == FA_ADDITIVE || run->late ? 1 : (real)graph->scale;
    const char *q_i = of_group(run, FA_QUERY, piece->row);
    /* Whole vectors are stored, because such are read: a load of what was stored in parts waits for the cache. */
    if (run->narrow && heads_in_place(graph, query, n, 1)) {
        v_store(piece->q, load_up_to(q_i, run->heads) * factor);
    } else if (!run->narrow && heads_in_place(graph, query, n, 0)) {
        for (int h = 0; h < run->heads; h++, q_i += query->head)
            for (int64_t c = 0; c < n; c += LANES)
                v_store(piece->q + h * run->channels + c,
                        load_up_to(q_i + c * (int64_t)sizeof(real), (int)(n - c < LANES ? n - c : LANES)) * factor);
    } else {
        for (int h = 0; h < run->heads; h++, q_i += query->head) {
            real *q = piece->q + h * run->channels;
            gather(q, q_i, query->col, n, query->dtype);
            for (int64_t c = 0; c < n; c++)
                q[c] *= factor;
        }
    }
    if (run->late)
        for (int h = 0; h < run->heads; h++)
            piece->root[h] = apply_wide_scale(piece->q + h * run->channels, n, graph->scale);
}

/* The row of key j, or value j, of all heads, with what edge t adds to it: contiguous. */
static NEVER_INLINE void widen_row(struct edge_run *run, int operand, int of_edge, int64_t j, int64_t t, int64_t n,
                                   real *to)
{
    const fa_view *node = &run->graph->view[operand], *edge = &run->graph->view[of_edge];
    const char *x = of_group(run, operand, j), *e = edge->data ? of_group(run, of_edge, t) : NULL;
    for (int h = 0; h < run->heads; h++, x += node->head, to += n) {
        gather(to, x, node->col, n, node->dtype);
        if (e) {
            gather(run->extra, e + h * edge->head, edge->col, n, edge->dtype);
            for (int64_t c = 0; c < n; c++)
                to[c] += run->extra[c];
        }
    }
}

/* Where keys and values of a piece are read. */
static ALWAYS_INLINE void place_edges(struct edge_run *run, const struct edge_piece *piece)
{
    const fa_graph *graph = run->graph;
    const char *keys = of_group(run, FA_KEY, 0), *values = of_group(run, FA_VALUE, 0);
    const ptrdiff_t key_row = graph->view[FA_KEY].row, value_row = graph->view[FA_VALUE].row;
    const char **v_j = run->v_j + piece->at;
    for (int e = 0; e < piece->n; e++) {
        const int64_t j = key_of_edge(graph, piece->t + e);
        FORGET(keys); /* vectors of addresses would be too much of a good thing: most rows are short */
        run->k_j[e] = keys + j * key_row;
        v_j[e] = values + j * value_row;
    }
    for (int e = 0; e < piece->n && !run->keys_in_place; e++) {
        real *k = run->k + e * (run->heads * graph->head_dim);
        const int64_t t = piece->t + e;
        widen_row(run, FA_KEY, FA_EDGE_KEY, key_of_edge(graph, t), t, graph->head_dim, k);
        run->k_j[e] = (const char *)k;
    }
    for (int e = piece->n; e < piece->n + 3; e++)
        run->k_j[e] = run->k_j[piece->n - 1];
}

/* Values that cannot be read where they lie, or of which some heads are hidden: those become zeros. */
static NEVER_INLINE void copy_edge_values(struct edge_run *run, const struct edge_piece *piece)
{
    const fa_graph *graph = run->graph;
    const int64_t value_dim = graph->value_dim;
    uint64_t some = 0;
    for (int h = 0; h < run->heads; h++)
        some |= run->hidden[h];
    for (int e = 0; e < piece->n; e++) {
        const int64_t t = piece->t + e;
        if (run->values_in_place && !(some >> e & 1))
            continue;
        real *v = run->v + (piece->at + e) * run->vecs * LANES;
        widen_row(run, FA_VALUE, FA_EDGE_VALUE, key_of_edge(graph, t), t, value_dim, v);
        for (int h = 0; h < run->heads; h++)
            if (run->hidden[h] >> e & 1)
                memset(v + h * value_dim, 0, (size_t)value_dim * sizeof(real));
        run->v_j[piece->at + e] = (const char *)v;
    }
}

static ALWAYS_INLINE void ask_for_span(const char *at, int bytes)
{
    for (; bytes > 192; bytes -= 256, at += 256) {
        UNROLL(4)
        for (int b = 0; b < 256; b += 64)
            __builtin_prefetch(at + b, 0, 3);
    }
    for (int b = 0; b < bytes; b += 64)
        __builtin_prefetch(at + b, 0, 3);
}

/* Asks for the key and the value of the edge that comes so much later than edge t. */
static ALWAYS_INLINE void ask_ahead(const struct edges_ahead *ahead, int64_t t)
{
    t += ahead->ahead;
    if (t >= ahead->edges)
        return;
    const int64_t j = integer_at(ahead->indices + t * ahead->index_step, ahead->index_size);
    const char *k = ahead->keys + j * ahead->key_row, *v = ahead->values + j * ahead->value_row;
    ask_for_span(k, ahead->key_span);
    ask_for_span(v, ahead->value_span);
}

/* max(x, 0) + slope * min(x, 0) */
static ALWAYS_INLINE vec leaky(vec x, vec slope) { return v_fma(slope, v_min((vec){0}, x), v_max((vec){0}, x)); }

/* sum + one term of each lane's score. */
static ALWAYS_INLINE vec add_term(vec q, vec w, vec slope, vec k, vec sum, const int additive)
{
    return additive ? v_fma(w, leaky(q + k, slope), sum) : v_fma(q, k, sum);
}

/* Scores of a piece, one channel: those of several edges in a vector. */
static ALWAYS_INLINE void narrow_scores(const struct edge_run *run, const struct edge_piece *piece, const int additive)
{
    const int n = piece->n;
    const struct edges_ahead ahead = run->ahead; /* of its own: nothing that is stored can change it */
    real *const scores = piece->s;
    const vec slope = v_fill((real)run->graph->slope), tile = v_load(run->lanes_of);
    const vec q = v_take_lanes(v_load(piece->q), tile), w = v_take_lanes(v_load(run->w), tile);
    const int heads = run->heads, padded = run->padded;
    const unsigned lanes = (unsigned)((1ull << padded) - 1);
    for (int e = 0; e < n;) {
        vec k = {0};
        for (int at = 0; at < LANES && e < n; at += padded, e++) {
            const vec k_j = load_up_to(run->k_j[e], heads);
            k = v_pick_bits(lanes << at, v_take_lanes(k_j, tile), k);
            ask_ahead(&ahead, piece->t + e);
        }
        v_store(scores + (e - 1) * padded / LANES * LANES, add_term(q, w, slope, k, (vec){0}, additive));
    }
}

/* The same, several channels, of which these are [begin, end): four sums at a time, of four heads of an edge, or, where
 * there is one head, of `together` = 4 edges. Behind the last channel, queries and weights are 0. */
static ALWAYS_INLINE void channel_scores(const struct edge_run *run, const struct edge_piece *piece, int64_t begin,
                                         int64_t end, const int together, const int additive)
{
    const struct edges_ahead ahead = run->ahead; /* of its own: nothing that is stored can change it */
    const vec slope = v_fill((real)run->graph->slope);
    const int n = piece->n, padded = run->padded, last = run->heads - 1, rest = (int)((end - begin) % LANES);
    const int64_t whole = end - rest;
    for (int h = 0; h < padded; h += 4) {
        const real *q[4], *w[4];
        ptrdiff_t at[4];
        UNROLL(4)
        for (int i = 0; i < 4; i++) { /* those behind the last head are the last once more */
            const int head = together > 1 ? 0 : h + i < last ? h + i : last;
            q[i] = piece->q + head * run->channels;
            w[i] = run->w + head * run->channels;
            at[i] = head * run->key_head;
        }
        real *s = piece->s + h;
        for (int e = 0; e < n; e += together, s += together * padded) {
            const char *k[4];
            vec sum[4] = {{0}, {0}, {0}, {0}};
            UNROLL(4)
            for (int i = 0; i < 4; i++)
                k[i] = run->k_j[together > 1 ? e + i : e] + at[i];
            int64_t c = begin;
            for (; c < whole; c += LANES) {
                UNROLL(4)
                for (int i = 0; i < 4; i++)
                    sum[i] = add_term(v_load(q[i] + c), additive ? v_load(w[i] + c) : (vec){0}, slope,
                                      v_load(k[i] + c * (int64_t)sizeof(real)), sum[i], additive);
            }
            if (rest) {
                UNROLL(4)
                for (int i = 0; i < 4; i++)
                    sum[i] = add_term(v_load(q[i] + c), additive ? v_load(w[i] + c) : (vec){0}, slope,
                                      v_load_some(k[i] + c * (int64_t)sizeof(real), rest), sum[i], additive);
            }
            if (begin == 0) {
                v_four_totals(s, sum[0], sum[1], sum[2], sum[3]);
            } else {
                real more[4];
                v_four_totals(more, sum[0], sum[1], sum[2], sum[3]);
                for (int i = 0; i < 4; i++)
                    s[i] += more[i];
            }
            for (int i = 0; h == 0 && begin == 0 && i < together; i++)
                if (i == 0 || e + i < n)
                    ask_ahead(&ahead, piece->t + e + i);
        }
    }
}

static NEVER_INLINE void narrow_dots(const struct edge_run *run, const struct edge_piece *piece)
{
    narrow_scores(run, piece, 0);
}

static NEVER_INLINE void narrow_units(const struct edge_run *run, const struct edge_piece *piece)
{
    narrow_scores(run, piece, 1);
}

#define CHANNEL_SCORES(name, together, additive)                                                             \
    static NEVER_INLINE void name(const struct edge_run *run, const struct edge_piece *piece, int64_t begin, \
                                  int64_t end)                                                               \
    {                                                                                                        \
        channel_scores(run, piece, begin, end, together, additive);                                          \
    }
CHANNEL_SCORES(dots_of_heads, 1, 0)
CHANNEL_SCORES(dots_of_edges, 4, 0)
CHANNEL_SCORES(units_of_heads, 1, 1)
CHANNEL_SCORES(units_of_edges, 4, 1)
#undef CHANNEL_SCORES

/* Raw scores of a piece. */
static ALWAYS_INLINE void score_edges(const struct edge_run *run, const struct edge_piece *piece)
{
    const int additive = run->graph->score == FA_ADDITIVE;
    const int64_t channels = run->graph->head_dim, chain = CHAIN * LANES;
    if (run->narrow) {
        (additive ? narrow_units : narrow_dots)(run, piece);
        return;
    }
    if (channels == 0)
        memset(piece->s, 0, (size_t)(piece->n * run->padded) * sizeof(real));
    for (int64_t c = 0; c < channels; c += chain) {
        const int64_t end = c + chain < channels ? c + chain : channels;
        if (run->heads == 1)
            (additive ? units_of_edges : dots_of_edges)(run, piece, c, end);
        else
            (additive ? units_of_heads : dots_of_heads)(run, piece, c, end);
    }
}

/* What happens between a product and the softmax: the rest of the scale, the cap, the bias of each edge. */
static NEVER_INLINE void finish_scores(struct edge_run *run, const struct edge_piece *piece)
{
    const fa_graph *graph = run->graph;
    const fa_view *bias = &graph->view[FA_BIAS];
    const int padded = run->padded, n = piece->n;
    if (run->late)
        for (int e = 0; e < n; e++)
            for (int h = 0; h < run->heads; h++)
                piece->s[e * padded + h] = piece->s[e * padded + h] * piece->root[h] * piece->root[h];
    if (graph->softcap != 0) { /* the limits are those of apply_rules */
        const double most = BITS == 32 ? 1e30 : 1e290, within = graph->softcap < most ? graph->softcap : most;
        const real cap = (real)(within > 1 / most ? within : 1 / most), per_cap = 1 / cap;
        for (int i = 0; i < n * padded; i += LANES) {
            const vec t = v_tanh(v_load(piece->s + i) * per_cap);
            v_store(piece->s + i, t * cap);
            if (run->cap_slope)
                v_store(run->cap_slope + (piece->s - run->s) + i, 1 - t * t);
        }
    }
    for (int h = 0; bias->data && h < run->heads; h++) {
        run->hidden[h] = 0;
        gather(run->extra, of_group(run, FA_BIAS, piece->t) + h * bias->head, bias->row, n, bias->dtype);
        for (int e = 0; e < n; e++) {
            real *s = piece->s + e * padded + h;
            const int gone = run->extra[e] == -(real)INFINITY;
            *s = gone ? -(real)INFINITY : *s + run->extra[e];
            run->hidden[h] |= (uint64_t)gone << e;
        }
    }
}

/* The greatest of the lanes of each head, in all of them. */
static ALWAYS_INLINE vec spread_head_max(vec v, int padded)
{
    if (padded <= 1)
        v = v_max(v, SWAP_LANES(LANES, 1, v));
#if LANES > 2
    if (padded <= 1)
        v = v_max(v, SWAP_LANES(LANES, 2, v));
#endif
#if LANES > 4
    if (padded <= 4)
        v = v_max(v, SWAP_LANES(LANES, 4, v));
#endif
#if LANES > 8
    if (padded <= 8)
        v = v_max(v, SWAP_LANES(LANES, 8, v));
#endif
    return v;
}

/* The greatest score of each head, and the sum of the weights relative to it; tiles, of which a head's lane counts. */
struct edge_sum {
    vec m, l;
};

/* Instead of the greatest score, where there is none: -inf - -inf would be NaN. */
static ALWAYS_INLINE vec base_of(vec m) { return v_pick(m == -(real)INFINITY, (vec){0}, m); }

/* Scores of a piece become weights; `before` is the greatest score before it. */
static ALWAYS_INLINE struct edge_sum weigh_edges(const struct edge_run *run, const struct edge_piece *piece, vec before)
{
    const vec log2e = v_fill((real)1.44269504088896340736), none = v_fill(-(real)INFINITY);
    const int padded = run->padded, n = piece->n, end = n * padded;
    const real *lanes_of = run->lanes_of;
    real *s = piece->s;
    struct edge_sum sum = {.l = {0}};
    vec most = none, x = none;
    for (int i = 0; i < end; i += LANES) {
        most = v_max(x, most); /* a NaN does not become the maximum */
        x = v_load_fours(s + i);
    }
    /* What lies behind the last score has no weight. */
    x = v_pick_bits((unsigned)((2ull << (end - 1) % LANES) - 1), x, none);
    sum.m = v_max(spread_head_max(v_max(x, most), padded), before);
    most = base_of(sum.m);
    for (int i = 0; i + LANES < end; i += LANES)
        v_store(s + i, v_exp2((v_load_fours(s + i) - most) * log2e));
    v_store(s + (end - 1) / LANES * LANES, v_exp2((x - most) * log2e));
    for (int i = 0, e = 0; e < n; i += LANES) {
        const vec p = v_load(s + i);
        for (int at = 0; at < LANES && e < n; at += padded, e++)
            sum.l += v_take_lanes(p, v_load(lanes_of + at * LANES));
    }
    return sum;
}

/* VALUE_VECS vectors, or one, of the weighted sum of a piece's values: the vectors of a row from `first` on. Each
 * vector belongs to one head. */
static ALWAYS_INLINE void sum_whole_vectors(const struct edge_run *run, const struct edge_piece *piece, int64_t first,
                                            const int vecs)
{
    const char *const *v_j = run->v_j + piece->at;
    const int n = piece->n, padded = run->padded;
    vec sum[VALUE_VECS];
    ptrdiff_t at[VALUE_VECS];
    const real *p[VALUE_VECS];
    UNROLL(8)
    for (int i = 0; i < vecs; i++) {
        sum[i] = (vec){0};
        at[i] = run->value_at[first + i];
        p[i] = piece->s + run->head_of[first + i];
    }
    for (int e = 0, o = 0; e < n; e++, o += padded) {
        UNROLL(8)
        for (int i = 0; i < vecs; i++)
            sum[i] = v_fma(v_fill(p[i][o]), v_load(v_j[e] + at[i]), sum[i]);
    }
    UNROLL(8)
    for (int i = 0; i < vecs; i++)
        v_store(run->o + (first + i) * LANES, sum[i]);
}

/* The same where the numbers of a vector belong to several heads, whose rows have no gaps. some: numbers of the last
 * vector, if it is not whole. */
static ALWAYS_INLINE void sum_packed_vectors(const struct edge_run *run, const struct edge_piece *piece, int64_t first,
                                             const int vecs, int some)
{
    const char *const *v_j = run->v_j + piece->at;
    const real *const lanes_of = run->lanes_of;
    const int n = piece->n, padded = run->padded;
    vec sum[VALUE_VECS], from[VALUE_VECS];
    UNROLL(8)
    for (int i = 0; i < vecs; i++) {
        sum[i] = (vec){0};
        from[i] = v_load(run->from + (first + i) * LANES);
    }
    const real *s = piece->s;
    for (int e = 0; e < n; s += LANES) {
        const vec p = v_load(s); /* a load that straddles two stores would wait for both to reach the cache */
        for (int at = 0; at < LANES && e < n; at += padded, e++) {
            const vec p_e = v_take_lanes(p, v_load(lanes_of + at * LANES));
            UNROLL(8)
            for (int i = 0; i < vecs; i++)
                sum[i] =
                    v_fma(v_take_lanes(p_e, from[i]), load_up_to(v_j[e] + (first + i) * VECTOR_BYTES, some), sum[i]);
        }
    }
    UNROLL(8)
    for (int i = 0; i < vecs; i++)
        v_store(run->o + (first + i) * LANES, sum[i]);
}

static NEVER_INLINE void sum_whole_values(const struct edge_run *run, const struct edge_piece *piece)
{
    int64_t v = 0;
    for (; v + VALUE_VECS <= run->vecs; v += VALUE_VECS)
        sum_whole_vectors(run, piece, v, VALUE_VECS);
    for (; v < run->vecs; v++)
        sum_whole_vectors(run, piece, v, 1);
}

static NEVER_INLINE void sum_packed_values(const struct edge_run *run, const struct edge_piece *piece)
{
    int64_t v = 0;
    for (; v + VALUE_VECS < run->vecs || (v + VALUE_VECS == run->vecs && run->tail == LANES); v += VALUE_VECS)
        sum_packed_vectors(run, piece, v, VALUE_VECS, LANES);
    for (; v < run->vecs; v++)
        sum_packed_vectors(run, piece, v, 1, v + 1 < run->vecs ? LANES : run->tail);
}

static ALWAYS_INLINE void add_up_values(const struct edge_run *run, const struct edge_piece *piece)
{
    if (run->whole)
        sum_whole_values(run, piece);
    else
        sum_packed_values(run, piece);
}

/* Of a vector with a number for each head those that belong to vector v of a row of values. */
static ALWAYS_INLINE vec spread_over(const struct edge_run *run, const real *of_head, int64_t v)
{
    if (run->whole)
        return v_fill(of_head[run->head_of[v]]);
    return v_take_lanes(v_load(of_head), v_load(run->from + v * LANES));
}

/* The first n numbers of a vector. */
static ALWAYS_INLINE void store_up_to(void *to, vec v, int n)
{
    if (n == LANES)
        v_store(to, v);
    else
        memcpy(to, &v, (size_t)n * sizeof(real));
}

/* The caller wants the weights: until the row's maximum and sum are known, its scores stand where they go. */
static NEVER_INLINE void keep_edge_scores(const struct edge_run *run, const struct edge_piece *piece)
{
    for (int h = 0; h < run->heads; h++) {
        real *to = (real *)(of_group(run, FA_WEIGHTS, piece->t) + h * run->graph->view[FA_WEIGHTS].head);
        for (int e = 0; e < piece->n; e++)
            to[e] = piece->s[e * run->padded + h];
    }
}

/* What comes of a row besides its output: the log-sum-exp, and weights of the edges [t, end) in place of their scores.
 */
static NEVER_INLINE void write_extras(const struct edge_run *run, int64_t i, int64_t t, int64_t end,
                                      const struct edge_sum *sum, const real *per_sum)
{
    const vec log2e = v_fill((real)1.44269504088896340736), none = v_fill(-(real)INFINITY);
    const fa_view *weights = &run->graph->view[FA_WEIGHTS], *lse = &run->graph->view[FA_LSE];
    real m[LANES], l[LANES];
    v_store(m, sum->m);
    v_store(l, sum->l);
    for (int h = 0; h < run->heads; h++) {
        if (lse->data) {
            const real x = l[h] == 0 ? -(real)INFINITY : (real)((double)m[h] + log((double)l[h]));
            memcpy(of_group(run, FA_LSE, i) + h * lse->head, &x, sizeof x);
        }
        if (!weights->data)
            continue;
        char *row = of_group(run, FA_WEIGHTS, t) + h * weights->head;
        const vec base = base_of(v_fill(m[h])), factor = v_fill(per_sum[h]);
        for (int64_t n = end - t; n > 0; n -= LANES, row += VECTOR_BYTES) {
            const int some = n < LANES ? (int)n : LANES;
            const vec s = load_up_to(row, some), w = v_exp2((s - base) * log2e) * factor;
            store_up_to(row, v_pick(s == none, (vec){0}, w), some); /* 0 also in a row of NaN */
        }
    }
}

/* What a row's sums are multiplied by. Those of a head without weights become 0: values may be NaN. */
static ALWAYS_INLINE void divide_row(const struct edge_run *run, const struct edge_sum *sum, real *per_sum)
{
    const int64_t value_dim = run->graph->value_dim;
    v_store(per_sum, v_pick(sum->l == 0, (vec){0}, 1 / sum->l));
    if (v_true_bits(sum->l == 0)) {
        real l[LANES];
        v_store(l, sum->l);
        for (int h = 0; h < run->heads; h++)
            if (l[h] == 0)
                memset(run->o + h * value_dim, 0, (size_t)value_dim * sizeof(real));
    }
}

/* Writes the output of row i: sums of values, times a number for each head. Returns whether all of it is finite. */
static ALWAYS_INLINE int close_row(const struct edge_run *run, int64_t i, const real *per_sum)
{
    const fa_view *out = &run->graph->view[FA_OUT];
    const int64_t value_dim = run->graph->value_dim, vecs = run->vecs;
    const ptrdiff_t *const out_at = run->out_at;
    real *const o = run->o;
    char *out_i = of_group(run, FA_OUT, i);
    vec check = {0};
    for (int64_t v = 0; v < vecs; v++) {
        const vec x = v_load(o + v * LANES) * spread_over(run, per_sum, v);
        check += x - x; /* what lies behind the last number is 0 */
        store_up_to(run->out_in_place ? out_i + out_at[v] : (char *)(o + v * LANES), x,
                    v + 1 < vecs ? LANES : run->tail);
    }
    if (!run->out_in_place)
        for (int h = 0; h < run->heads; h++)
            scatter(out_i + h * out->head, out->col, o + h * value_dim, value_dim, out->dtype);
    return !v_true_bits(check != check);
}

/* A block's sums join those of the blocks before it, without an error that would grow with their number. */
static NEVER_INLINE void join_block(const struct edge_run *run, struct edge_sum *all, vec *l_error, struct edge_sum sum)
{
    const vec log2e = v_fill((real)1.44269504088896340736);
    real keep[LANES], l[LANES], error[LANES];
    v_store(keep, v_exp2((all->m - base_of(sum.m)) * log2e));
    v_store(l, all->l);
    v_store(error, *l_error);
    add_exactly(l, error, v_load(keep), sum.l);
    all->m = sum.m;
    all->l = v_load(l);
    *l_error = v_load(error);
    for (int64_t v = 0; v < run->vecs; v++)
        add_exactly(run->o_all + v * LANES, run->o_error + v * LANES, spread_over(run, keep, v),
                    v_load(run->o + v * LANES));
}

/* Scores of a piece, ready for the softmax. */
static ALWAYS_INLINE void prepare_piece(struct edge_run *run, const struct edge_piece *piece, const int want_weights)
{
    const fa_graph *graph = run->graph;
    if (run->scores_change)
        finish_scores(run, piece);
    if (graph->view[FA_BIAS].data || !run->values_in_place)
        copy_edge_values(run, piece);
    if (want_weights && graph->view[FA_WEIGHTS].data)
        keep_edge_scores(run, piece);
}

/* The sums of a row of any length, block by block, into run->o. shrink: a factor of the weights, for values whose sum
 * would overflow; the row has been visited before then. */
static NEVER_INLINE struct edge_sum visit_blocks(struct edge_run *run, int64_t i, int64_t t, int64_t end, real shrink)
{
    struct edge_piece piece = {.row = i, .q = run->q, .root = run->root, .s = run->s};
    struct edge_sum all = {.m = v_fill(-(real)INFINITY), .l = {0}};
    vec l_error = {0};
    pack_edge_row(run, &piece);
    memset(run->o_all, 0, (size_t)(run->vecs * LANES) * sizeof(real));
    memset(run->o_error, 0, (size_t)(run->vecs * LANES) * sizeof(real));
    for (; t < end; t += piece.n) {
        piece.t = t;
        piece.n = end - t < EDGES ? (int)(end - t) : EDGES;
        place_edges(run, &piece);
        score_edges(run, &piece);
        prepare_piece(run, &piece, shrink == 1);
        const struct edge_sum sum = weigh_edges(run, &piece, all.m);
        for (int e = 0; shrink != 1 && e < piece.n * run->padded; e++)
            piece.s[e] *= shrink;
        add_up_values(run, &piece);
        join_block(run, &all, &l_error, sum);
    }
    all.l += l_error;
    for (int64_t v = 0; v < run->vecs; v++)
        v_store(run->o + v * LANES, v_load(run->o_all + v * LANES) + v_load(run->o_error + v * LANES));
    return all;
}

/* A row that came out infinite or NaN: perhaps only the sum of its values overflowed. They are added up shrunk, and a
 * mean is no larger than its numbers. */
static NEVER_INLINE void visit_again(struct edge_run *run, int64_t i, int64_t t, int64_t end)
{
    const real shrink = (real)0x1p-64, largest = BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX;
    const struct edge_sum sum = visit_blocks(run, i, t, end, shrink);
    real per_sum[LANES];
    divide_row(run, &sum, per_sum);
    for (int64_t v = 0; v < run->vecs; v++) {
        const vec mean = v_load(run->o + v * LANES) * spread_over(run, per_sum, v);
        const vec within = v_max(v_fill(-largest), v_min(v_fill(largest), mean / shrink));
        v_store(run->o + v * LANES, v_pick(v_abs(mean) == (real)INFINITY, mean, within));
    }
    for (int h = 0; h < LANES; h++)
        per_sum[h] = 1;
    close_row(run, i, per_sum);
}

static NEVER_INLINE void visit_long_row(struct edge_run *run, int64_t i, int64_t t, int64_t end)
{
    const struct edge_sum sum = visit_blocks(run, i, t, end, 1);
    real per_sum[LANES];
    divide_row(run, &sum, per_sum);
    const int finite = close_row(run, i, per_sum);
    if (run->want_extras)
        write_extras(run, i, t, end, &sum, per_sum);
    if (!finite)
        visit_again(run, i, t, end);
}

/* Rows of a block, step by step for all of them: each step of a row waits for the one before, and over several rows
 * the waits overlap. */
static void visit_short_rows(struct edge_run *run, struct edge_piece *pieces, int rows)
{
    struct edge_sum sums[SHORT_ROWS];
    int finite[SHORT_ROWS];
    for (int r = 0; r < rows; r++) {
        if (pieces[r].n == 0)
            continue;
        pack_edge_row(run, &pieces[r]);
        place_edges(run, &pieces[r]);
        score_edges(run, &pieces[r]);
        prepare_piece(run, &pieces[r], 1);
    }
    for (int r = 0; r < rows; r++) {
        if (pieces[r].n)
            sums[r] = weigh_edges(run, &pieces[r], v_fill(-(real)INFINITY));
        else
            sums[r] = (struct edge_sum){.m = v_fill(-(real)INFINITY), .l = {0}};
    }
    for (int r = 0; r < rows; r++) {
        const struct edge_piece *piece = &pieces[r];
        real per_sum[LANES];
        add_up_values(run, piece);
        divide_row(run, &sums[r], per_sum);
        finite[r] = close_row(run, piece->row, per_sum);
        if (run->want_extras)
            write_extras(run, piece->row, piece->t, piece->t + piece->n, &sums[r], per_sum);
    }
    for (int r = 0; r < rows; r++)
        if (!finite[r])
            visit_again(run, pieces[r].row, pieces[r].t, pieces[r].t + pieces[r].n);
}

/* Contract: contract.h. */
static void edges(const fa_graph *graph, int64_t begin, int64_t end, void *workspace)
{
    struct edge_run run;
    struct edge_piece pieces[SHORT_ROWS];
    lay_out_edges(&run, graph, workspace);
    for (int64_t first = 0; first < graph->heads; first += MOST_HEADS) {
        open_heads(&run, first);
        for (int64_t i = begin; i < end;) {
            const int64_t t = first_edge(graph, i);
            int rows = 0;
            for (int n = 0, s = 0; i + rows < end && rows < SHORT_ROWS; rows++) {
                const int64_t from = first_edge(graph, i + rows), more = first_edge(graph, i + rows + 1) - from;
                if (more > EDGES - n)
                    break;
                pieces[rows] = (struct edge_piece){
                    i + rows, from, (int)more, n, run.q + rows * run.q_row, run.root + rows * LANES, run.s + s};
                n += (int)more;
                s += ((int)more * run.padded + LANES - 1) / LANES * LANES;
            }
            if (rows)
                visit_short_rows(&run, pieces, rows);
            else
                visit_long_row(&run, i, t, first_edge(graph, i + 1));
            i += rows ? rows : 1;
        }
    }
}
