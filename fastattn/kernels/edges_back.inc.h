/* Gradients of attention along the edges of a graph, in two passes over them.
 *
 * By rows, as in edges.inc.h: scores and weights are made again, and beside them the *terms* of each edge, the product
 * of the output's gradient and the edge's value. Their mean over a row is what softmax subtracts. So an edge has two
 * numbers for each head: its weight, and the gradient of its raw score. The sums over a row's edges are the query's
 * gradient; what belongs to an edge alone is written on the way. A row of up to EDGES edges is walked once; of a longer
 * one scores and terms are kept where the numbers go, until its maximum and sum are known.
 *
 * By columns, over the transposed graph: sums of the same numbers over the edges that lead to a key, in the order of
 * their rows.
 *
 * Sums are those of edges.inc.h: products of rows of nodes are scores of a graph whose keys are others, and sums of
 * rows are its values. They run in the order of the edges, EDGES at a time, and longer ones are joined exactly. Edges
 * with a score of -inf are hidden: they give nothing to any sum, whatever lies at their ends. */

/* Sums of rows of nodes over edges, each row times a number of the edge and head. */
struct edge_sums {
    fa_graph graph;
    struct edge_run run; /* whose values are the rows, and whose output is the gradient */
    int adds;            /* to what is there */
    int by_slope; /* numbers are summed times the derivative of leaky_relu(row + fixed), instead of times the row */
    real slope;
    double scale; /* of the gradient, if it is far from 1; else 1 */
    real *factor; /* [vecs] the same otherwise, or a weight for each channel */
    real *fixed;  /* [vecs] by_slope: of the node whose sum it is */
};

/* Where a sum over all edges is kept: [vecs] numbers, and what was rounded off. */
struct edge_total {
    real *sum, *lost;
};

/* One row, or EDGES of its edges. */
struct back_piece {
    struct edge_piece scores, terms;
    int some_hidden;
    uint64_t hidden[LANES]; /* if some_hidden: which edges of each head */
};

struct edges_back {
    const fa_graph *graph;
    const fa_graph_gradients *gradients;
    fa_graph scored, termed;
    struct edge_run scores; /* of queries and keys */
    struct edge_run terms;  /* of the output's gradient and values */
    struct edge_sums sums;  /* of keys, or by_slope */
    int in_place;           /* all keys and values are read where they lie */
    int want_terms, want_sums;
    int64_t width; /* numbers of an edge, in padded heads */
    real *numbers; /* those of the group's first edge */
    real *row;     /* [heads][] the gradient of an edge */
    struct edge_total totals[FA_GRAPH_GRADIENTS];
};

static int is_wanted(const fa_graph *graph, const fa_graph_gradients *gradients, int operand)
{
    return graph->view[operand].data != NULL || gradients->totals[operand - FA_GRAPH_D_QUERY] != NULL;
}

/* Of an edge: a weight and a gradient, and while the row is not finished a derivative of the softcap. */
static int numbers_width(const fa_graph *graph) { return graph->softcap != 0 ? 3 : 2; }

static int padded_heads(int64_t heads)
{
    int padded = heads == 1 ? 1 : 4;
    while (padded < heads)
        padded *= 2;
    return padded;
}

static size_t edges_back_numbers(const fa_graph *graph)
{
    const int64_t rest = graph->heads % MOST_HEADS, lanes = graph->heads - rest + (rest ? padded_heads(rest) : 0);
    return (size_t)(graph->edges * numbers_width(graph) * lanes) * sizeof(real);
}

/* The numbers of the group of heads from `first` on. */
static real *numbers_of_group(const fa_graph *graph, const fa_graph_gradients *gradients, int64_t first)
{
    return (real *)gradients->numbers + first * graph->edges * numbers_width(graph);
}

/* Numbers of an edge, or of all of them, and a head in a gradient that may be a total. */
static int64_t numbers_of_edge(const fa_graph *graph, int operand)
{
    return operand == FA_GRAPH_D_BIAS ? 1 : operand == FA_GRAPH_D_EDGE_VALUE ? graph->value_dim : graph->head_dim;
}

/* A graph with the same edges, of which nothing else is known. */
static fa_graph bare_graph(const fa_graph *graph)
{
    fa_graph bare = *graph;
    for (int k = 0; k < FA_GRAPH_OPERANDS; k++)
        bare.view[k] = (fa_view){.dtype = REAL_DTYPE};
    bare.head_dim = bare.value_dim = 0;
    bare.score = FA_DOT;
    bare.scale = 1;
    bare.softcap = 0;
    return bare;
}

/* Sums of `node`, plus `of_edge`, into `target`. */
static int64_t lay_out_edge_sums(struct edge_sums *sums, const fa_graph *graph, int node, int of_edge, int target,
                                 char *base)
{
    const int64_t heads = graph->heads < MOST_HEADS ? graph->heads : MOST_HEADS;
    const int64_t dim = target == FA_GRAPH_D_VALUE ? graph->value_dim : graph->head_dim;
    const int64_t vecs = (heads * dim + LANES - 1) / LANES;
    sums->graph = bare_graph(graph);
    sums->graph.value_dim = dim;
    sums->graph.view[FA_VALUE] = graph->view[node];
    if (of_edge)
        sums->graph.view[FA_EDGE_VALUE] = graph->view[of_edge];
    sums->graph.view[FA_OUT] = graph->view[target];
    char *at = base + lay_out_edges(&sums->run, &sums->graph, base);
    sums->by_slope = graph->score == FA_ADDITIVE && target != FA_GRAPH_D_VALUE;
    sums->slope = (real)graph->slope;
    sums->scale =
        graph->score == FA_DOT && target != FA_GRAPH_D_VALUE && scale_is_wide(graph->scale) ? graph->scale : 1;
    sums->factor = (real *)take(&at, vecs * LANES);
    sums->fixed = (real *)take(&at, vecs * LANES);
    return at - base;
}

static void open_edge_sums(struct edge_sums *sums, const fa_graph *graph, const fa_graph_gradients *gradients,
                           int target, int64_t first)
{
    struct edge_run *run = &sums->run;
    const fa_view *w = &graph->view[FA_UNIT_WEIGHTS];
    const int64_t dim = sums->graph.value_dim;
    open_heads(run, first);
    sums->adds = gradients->adds[target - FA_GRAPH_D_QUERY];
    const real all = target == FA_GRAPH_D_VALUE || sums->scale != 1 ? 1 : (real)graph->scale;
    for (int64_t i = 0; i < run->vecs * LANES; i++)
        sums->factor[i] = all;
    memset(sums->fixed, 0, (size_t)(run->vecs * LANES) * sizeof(real));
    for (int h = 0; sums->by_slope && h < run->heads; h++)
        gather(sums->factor + h * dim, w->data + (first + h) * w->head, w->col, dim, REAL_DTYPE);
}

/* Where the rows of a piece are read, if they are those of its edges. */
static NEVER_INLINE void place_rows(struct edge_run *run, const struct edge_piece *piece)
{
    const char *rows = of_group(run, FA_VALUE, 0);
    const ptrdiff_t step = run->graph->view[FA_VALUE].row;
    for (int e = 0; e < piece->n; e++) {
        const int64_t i = key_of_edge(run->graph, piece->t + e);
        FORGET(rows); /* as in place_edges */
        run->v_j[piece->at + e] = rows + i * step;
    }
    if (!run->values_in_place)
        copy_edge_values(run, piece);
}

/* One term of a sum by_slope; x is row + fixed. units: times leaky_relu(x) rather than its derivative. */
static ALWAYS_INLINE vec add_by_slope(vec x, vec number, vec slope, vec sum, const int units)
{
    const vec t = v_pick(x > (vec){0}, number, number * slope);
    if (units)
        return v_fma(t, x, sum);
    return sum + t;
}

/* sum_whole_vectors and sum_packed_vectors (edges.inc.h), by_slope. */
static ALWAYS_INLINE void sum_slopes(const struct edge_sums *sums, const struct edge_piece *piece, int64_t first,
                                     const int vecs, int some, const int whole, const int units)
{
    const struct edge_run *run = &sums->run;
    const char *const *v_j = run->v_j + piece->at;
    const real *lanes_of = run->lanes_of, *s = piece->s;
    const int n = piece->n, padded = run->padded;
    const vec slope = v_fill(sums->slope);
    vec sum[VALUE_VECS], fixed[VALUE_VECS], from[VALUE_VECS];
    ptrdiff_t at[VALUE_VECS];
    int64_t head[VALUE_VECS];
    UNROLL(8)
    for (int i = 0; i < vecs; i++) {
        sum[i] = (vec){0};
        fixed[i] = v_load(sums->fixed + (first + i) * LANES);
        at[i] = run->value_at[first + i];
        head[i] = run->head_of[first + i];
        from[i] = sum[i];
        if (!whole)
            from[i] = v_load(run->from + (first + i) * LANES);
    }
    for (int e = 0; e < n; s += LANES) {
        const vec all = v_load(s);
        for (int lane = 0; lane < LANES && e < n; lane += padded, e++) {
            const vec of_edge = v_take_lanes(all, v_load(lanes_of + lane * LANES));
            UNROLL(8)
            for (int i = 0; i < vecs; i++) {
                const vec x = fixed[i] + load_up_to(v_j[e] + at[i], some);
                vec number = v_fill(s[lane + head[i]]);
                if (!whole)
                    number = v_take_lanes(of_edge, from[i]);
                sum[i] = add_by_slope(x, number, slope, sum[i], units);
            }
        }
    }
    UNROLL(8)
    for (int i = 0; i < vecs; i++)
        v_store(run->o + (first + i) * LANES, sum[i]);
}

#define SUM_SLOPES(name, whole, units)                                                                             \
    static NEVER_INLINE void name(const struct edge_sums *sums, const struct edge_piece *piece)                    \
    {                                                                                                              \
        const struct edge_run *run = &sums->run;                                                                   \
        int64_t v = 0;                                                                                             \
        for (; v + VALUE_VECS < run->vecs || (v + VALUE_VECS == run->vecs && run->tail == LANES); v += VALUE_VECS) \
            sum_slopes(sums, piece, v, VALUE_VECS, LANES, whole, units);                                           \
        for (; v < run->vecs; v++)                                                                                 \
            sum_slopes(sums, piece, v, 1, v + 1 < run->vecs ? LANES : run->tail, whole, units);                    \
    }
SUM_SLOPES(sum_whole_slopes, 1, 0)
SUM_SLOPES(sum_packed_slopes, 0, 0)
SUM_SLOPES(sum_whole_units, 1, 1)
SUM_SLOPES(sum_packed_units, 0, 1)
#undef SUM_SLOPES

/* The same sums where some heads of some edges are hidden, and must not be read as 0 times NaN: in the same order, so
 * with the same bits for the others. */
static NEVER_INLINE void sum_visible(const struct edge_sums *sums, const struct edge_piece *piece,
                                     const uint64_t *hidden, int units)
{
    const struct edge_run *run = &sums->run;
    const int64_t dim = sums->graph.value_dim, size = sizeof(real);
    const ptrdiff_t to_head = run->values_in_place ? sums->graph.view[FA_VALUE].head : dim * size;
    const vec slope = v_fill(sums->slope);
    for (int h = 0; h < run->heads; h++) {
        for (int64_t c = 0; c < dim; c += LANES) {
            const int some = dim - c < LANES ? (int)(dim - c) : LANES;
            const vec fixed = load_up_to(sums->fixed + h * dim + c, some);
            vec sum = {0};
            for (int e = 0; e < piece->n; e++) {
                if (hidden[h] >> e & 1)
                    continue;
                const vec row = load_up_to(run->v_j[piece->at + e] + h * to_head + c * size, some);
                const vec number = v_fill(piece->s[e * run->padded + h]);
                if (sums->by_slope)
                    sum = add_by_slope(fixed + row, number, slope, sum, units);
                else
                    sum = v_fma(number, row, sum);
            }
            store_up_to(run->o + h * dim + c, sum, some);
        }
    }
}

/* The sums of a piece, whose numbers are piece->s, into run->o. hidden: NULL if there is none. */
static ALWAYS_INLINE void add_up_rows(const struct edge_sums *sums, const struct edge_piece *piece,
                                      const uint64_t *hidden, const int units)
{
    if (hidden)
        sum_visible(sums, piece, hidden, units);
    else if (!sums->by_slope)
        add_up_values(&sums->run, piece);
    else if (units)
        (sums->run.whole ? sum_whole_units : sum_packed_units)(sums, piece);
    else
        (sums->run.whole ? sum_whole_slopes : sum_packed_slopes)(sums, piece);
}

/* Longer sums: piece by piece, exactly. */
static void begin_joining(struct edge_run *run)
{
    memset(run->o_all, 0, (size_t)(run->vecs * LANES) * sizeof(real));
    memset(run->o_error, 0, (size_t)(run->vecs * LANES) * sizeof(real));
}

static void add_to_total(real *sum, real *lost, const real *x, int64_t vecs)
{
    for (int64_t i = 0; i < vecs * LANES; i += LANES)
        add_exactly(sum + i, lost + i, v_fill(1), v_load(x + i));
}

static void end_joining(struct edge_run *run)
{
    for (int64_t i = 0; i < run->vecs * LANES; i += LANES)
        v_store(run->o + i, v_load(run->o_all + i) + v_load(run->o_error + i));
}

/* Writes numbers [heads][n] where they go: row `row` of a gradient. x is overwritten. Sums over heads or channels that
 * share a number run in ascending order, and so do those over a batch. */
static NEVER_INLINE void give_numbers(const struct edge_run *run, const fa_view *to, int64_t row, real *x, int64_t n,
                                      int adds)
{
    const int one = to->col == 0 && n > 1;
    char *at = to->data + row * to->row + run->first_head * to->head;
    for (int h = 0; h < run->heads; h++, x += n, at += to->head) {
        const int more = adds || (to->head == 0 && run->first_head + h > 0);
        if (one) {
            double sum = 0;
            for (int64_t c = 0; c < n; c++)
                sum += (double)x[c];
            x[0] = (real)sum;
        }
        for (int64_t c = 0; more && c < (one ? 1 : n); c++)
            x[c] += read_number(at + c * to->col, REAL_DTYPE);
        scatter(at, to->col, x, one ? 1 : n, REAL_DTYPE);
    }
}

/* Writes the sums of node i, which are in run->o. */
static NEVER_INLINE void give_edge_row(struct edge_sums *sums, int64_t i)
{
    struct edge_run *run = &sums->run;
    const fa_view *to = &sums->graph.view[FA_OUT];
    const int direct =
        run->out_in_place && !sums->adds && sums->scale == 1 && (to->head != 0 || sums->graph.heads == 1);
    char *row = of_group(run, FA_OUT, i);
    for (int64_t v = 0; v < run->vecs; v++) {
        const vec x = v_load(run->o + v * LANES) * v_load(sums->factor + v * LANES);
        store_up_to(direct ? row + run->out_at[v] : (char *)(run->o + v * LANES), x,
                    v + 1 < run->vecs ? LANES : run->tail);
    }
    if (direct)
        return;
    const int64_t n = sums->graph.value_dim;
    for (int64_t k = 0; sums->scale != 1 && k < run->heads * n; k++)
        run->o[k] = (real)((double)run->o[k] * sums->scale);
    give_numbers(run, to, i, run->o, n, sums->adds);
}

/* Lays the workspace of the rows out at `base`; returns its size. */
static size_t lay_out_edges_back(struct edges_back *back, const fa_graph *graph, char *base)
{
    const int64_t heads = graph->heads < MOST_HEADS ? graph->heads : MOST_HEADS;
    const int64_t most = graph->head_dim > graph->value_dim ? graph->head_dim : graph->value_dim;
    char *at = base;
    back->graph = graph;
    back->scored = *graph;
    back->scored.value_dim = 0;
    back->scored.view[FA_VALUE] = back->scored.view[FA_EDGE_VALUE] = back->scored.view[FA_OUT] =
        back->scored.view[FA_WEIGHTS] = back->scored.view[FA_LSE] = (fa_view){.dtype = REAL_DTYPE};
    back->termed = bare_graph(graph);
    back->termed.head_dim = graph->value_dim;
    back->termed.view[FA_QUERY] = graph->view[FA_GRAPH_GRAD_OUT];
    back->termed.view[FA_KEY] = graph->view[FA_VALUE];
    back->termed.view[FA_EDGE_KEY] = graph->view[FA_EDGE_VALUE];
    at += lay_out_edges(&back->scores, &back->scored, at);
    at += lay_out_edges(&back->terms, &back->termed, at);
    at += lay_out_edge_sums(&back->sums, graph, FA_KEY, FA_EDGE_KEY, FA_GRAPH_D_QUERY, at);
    back->in_place = back->scores.keys_in_place && back->terms.keys_in_place && back->sums.run.values_in_place;
    if (graph->softcap != 0)
        back->scores.cap_slope = (real *)take(&at, (EDGES + SHORT_ROWS + 5) * LANES);
    back->row = (real *)take(&at, heads * most + LANES);
    for (int k = FA_GRAPH_D_BIAS - FA_GRAPH_D_QUERY; k < FA_GRAPH_GRADIENTS; k++) {
        back->totals[k].sum = (real *)take(&at, heads * numbers_of_edge(graph, FA_GRAPH_D_QUERY + k) + LANES);
        back->totals[k].lost = (real *)take(&at, heads * numbers_of_edge(graph, FA_GRAPH_D_QUERY + k) + LANES);
    }
    return (size_t)(at - base);
}

/* The same of the columns. */
struct edge_columns {
    struct edge_sums key, value;
    real *weights, *slopes; /* [edges][padded] of a piece: weights, and gradients of scores */
};

static size_t lay_out_columns(struct edge_columns *columns, const fa_graph *graph, char *base)
{
    char *at = base;
    /* Where keys belong to edges, too, what leaky ReLU is taken of is made for each edge. */
    const int made = graph->score == FA_ADDITIVE && graph->view[FA_EDGE_KEY].data != NULL;
    at += lay_out_edge_sums(&columns->value, graph, FA_GRAPH_GRAD_OUT, 0, FA_GRAPH_D_VALUE, at);
    at += lay_out_edge_sums(&columns->key, graph, made ? FA_KEY : FA_QUERY, made ? FA_EDGE_KEY : 0, FA_GRAPH_D_KEY, at);
    columns->weights = (real *)take(&at, (EDGES + 1) * LANES);
    columns->slopes = (real *)take(&at, (EDGES + 1) * LANES);
    return (size_t)(at - base);
}

static size_t edges_back_workspace(const fa_graph *graph)
{
    struct edges_back back; /* for their sizes only: the addresses are not used */
    struct edge_columns columns;
    const size_t rows = lay_out_edges_back(&back, graph, (char *)(uintptr_t)FA_ALIGN);
    const size_t more = lay_out_columns(&columns, graph, (char *)(uintptr_t)FA_ALIGN);
    return rows > more ? rows : more;
}

/* Begins with the heads from `first` on. */
static void open_back(struct edges_back *back, const fa_graph_gradients *gradients, int64_t first)
{
    const fa_graph *graph = back->graph;
    back->gradients = gradients;
    open_heads(&back->scores, first);
    open_heads(&back->terms, first);
    open_edge_sums(&back->sums, graph, gradients, FA_GRAPH_D_QUERY, first);
    const fa_view *values = &graph->view[FA_VALUE];
    struct edges_ahead *ahead = &back->scores.ahead;
    ahead->values = values->data + first * values->head, ahead->value_row = values->row;
    ahead->value_span = span_of(values, back->scores.heads, graph->value_dim);
    back->terms.ahead.edges = 0; /* asked for already */
    back->width = numbers_width(graph) * back->scores.padded;
    back->numbers = numbers_of_group(graph, gradients, first);
    back->want_sums = graph->view[FA_GRAPH_D_QUERY].data != NULL || is_wanted(graph, gradients, FA_GRAPH_D_EDGE_KEY) ||
                      is_wanted(graph, gradients, FA_GRAPH_D_UNIT_WEIGHTS);
    back->want_terms =
        back->want_sums || graph->view[FA_GRAPH_D_KEY].data != NULL || is_wanted(graph, gradients, FA_GRAPH_D_BIAS);
    const int64_t heads = back->scores.heads;
    memset(back->row, 0,
           (size_t)(heads * (graph->head_dim > graph->value_dim ? graph->head_dim : graph->value_dim) + LANES) *
               sizeof(real));
    for (int k = FA_GRAPH_D_BIAS - FA_GRAPH_D_QUERY; k < FA_GRAPH_GRADIENTS; k++) {
        const size_t bytes = (size_t)(heads * numbers_of_edge(graph, FA_GRAPH_D_QUERY + k) + LANES) * sizeof(real);
        memset(back->totals[k].sum, 0, bytes);
        memset(back->totals[k].lost, 0, bytes);
    }
}

/* Hands the sums over all edges over. */
static void close_back(const struct edges_back *back)
{
    for (int k = FA_GRAPH_D_BIAS - FA_GRAPH_D_QUERY; k < FA_GRAPH_GRADIENTS; k++) {
        const int64_t dim = numbers_of_edge(back->graph, FA_GRAPH_D_QUERY + k);
        double *to = back->gradients->totals[k];
        for (int64_t i = 0; to && i < back->scores.heads * dim; i++)
            to[back->scores.first_head * dim + i] = (double)back->totals[k].sum[i] + (double)back->totals[k].lost[i];
    }
}

/* The numbers of a head, or of four. */
static ALWAYS_INLINE void copy_lanes(real *to, const real *from, int padded)
{
    if (padded == 1)
        *to = *from;
    for (int k = 0; k + 4 <= padded; k += 4)
        memcpy(to + k, from + k, 4 * sizeof(real));
}

/* Scores and terms of a long row's piece, to where its numbers go, or from there. */
static NEVER_INLINE void keep_piece(struct edges_back *back, const struct back_piece *piece, int back_again)
{
    const int padded = back->scores.padded;
    real *to = back->numbers + piece->scores.t * back->width;
    real *each[] = {piece->scores.s, piece->terms.s, back->scores.cap_slope};
    for (int e = 0; e < piece->scores.n; e++, to += back->width)
        for (int k = 0; k * padded < back->width; k++) {
            real *number = (k < 2 || back->width > 2 * padded) ? each[k] + e * padded : NULL;
            if (back_again)
                copy_lanes(number, to + k * padded, padded);
            else
                copy_lanes(to + k * padded, number, padded);
        }
}

/* Which edges are hidden, by their scores. Their terms become 0, and what the softcap has for them, which may be NaN.
 */
static NEVER_INLINE void note_hidden(const struct edges_back *back, struct back_piece *piece)
{
    const int padded = back->scores.padded;
    for (int h = 0; h < back->scores.heads; h++) {
        piece->hidden[h] = 0;
        for (int e = 0; e < piece->scores.n; e++)
            if (piece->scores.s[e * padded + h] == -(real)INFINITY) {
                piece->hidden[h] |= 1ull << e;
                piece->terms.s[e * padded + h] = 0;
                if (back->scores.cap_slope)
                    back->scores.cap_slope[piece->scores.s - back->scores.s + e * padded + h] = 0;
            }
    }
}

/* Bits of the lanes of the vector at i that are in front of `end`. */
static ALWAYS_INLINE unsigned lanes_before(int i, int end)
{
    return end - i >= LANES ? (unsigned)((1ull << LANES) - 1) : (1u << (end - i)) - 1;
}

static ALWAYS_INLINE void find_hidden(const struct edges_back *back, struct back_piece *piece)
{
    const vec none = v_fill(-(real)INFINITY);
    const int end = piece->scores.n * back->scores.padded;
    unsigned some = 0;
    for (int i = 0; i < end; i += LANES)
        some |= v_true_bits(v_load_fours(piece->scores.s + i) == none) & lanes_before(i, end);
    piece->some_hidden = some != 0;
    if (some) {
        *back->gradients->hidden = 1;
        note_hidden(back, piece);
    }
}

/* Sums of weight times term, for each head: a tile. */
static ALWAYS_INLINE vec total_terms(const struct edges_back *back, const struct back_piece *piece)
{
    const real *lanes_of = back->scores.lanes_of;
    const int n = piece->scores.n, padded = back->scores.padded;
    vec sum = {0};
    for (int i = 0, e = 0; e < n; i += LANES) {
        const vec x = v_load(piece->scores.s + i) * v_load_fours(piece->terms.s + i);
        for (int at = 0; at < LANES && e < n; at += padded, e++)
            sum += v_take_lanes(x, v_load(lanes_of + at * LANES));
    }
    return sum;
}

/* The gradient of the row's log-sum-exp, a tile. */
static ALWAYS_INLINE vec gradient_of_lse(const struct edges_back *back, int64_t i)
{
    const fa_view *lse = &back->graph->view[FA_GRAPH_GRAD_LSE];
    vec tile = {0};
    for (int lane = 0; lse->data && lane < LANES; lane++)
        if (lane % back->scores.padded < back->scores.heads)
            tile[lane] = read_number(
                of_group(&back->scores, FA_GRAPH_GRAD_LSE, i) + lane % back->scores.padded * lse->head, lse->dtype);
    return tile;
}

/* Adds numbers [heads][n] of edge t to its gradient, or to that of all edges. */
static ALWAYS_INLINE void give_to_edge(struct edges_back *back, int operand, int64_t t, int64_t n)
{
    const int k = operand - FA_GRAPH_D_QUERY;
    if (back->gradients->totals[k])
        add_to_total(back->totals[k].sum, back->totals[k].lost, back->row,
                     (back->scores.heads * n + LANES - 1) / LANES);
    else
        give_numbers(&back->scores, &back->graph->view[operand], t, back->row, n, back->gradients->adds[k]);
}

/* Gradients of scores are those of the bias: before the softcap has its part. */
static NEVER_INLINE void give_bias(struct edges_back *back, const struct back_piece *piece)
{
    for (int e = 0; e < piece->scores.n; e++) {
        for (int h = 0; h < back->scores.heads; h++)
            back->row[h] = piece->terms.s[e * back->scores.padded + h];
        give_to_edge(back, FA_GRAPH_D_BIAS, piece->scores.t + e, 1);
    }
}

static NEVER_INLINE void give_edge_values(struct edges_back *back, const struct back_piece *piece)
{
    const int64_t n = back->graph->value_dim;
    for (int e = 0; e < piece->scores.n; e++) {
        for (int h = 0; h < back->scores.heads; h++) {
            const real weight = piece->scores.s[e * back->scores.padded + h];
            const real *g = piece->terms.q + h * back->terms.channels;
            const int gone = piece->some_hidden && piece->hidden[h] >> e & 1;
            for (int64_t c = 0; c < n; c++)
                back->row[h * n + c] = gone ? 0 : weight * g[c];
        }
        give_to_edge(back, FA_GRAPH_D_EDGE_VALUE, piece->scores.t + e, n);
    }
}

static NEVER_INLINE void give_edge_keys(struct edges_back *back, const struct back_piece *piece)
{
    const struct edge_sums *sums = &back->sums;
    const int64_t n = back->graph->head_dim, size = sizeof(real);
    const ptrdiff_t to_head = sums->run.values_in_place ? sums->graph.view[FA_VALUE].head : n * size;
    for (int e = 0; e < piece->scores.n; e++) {
        for (int h = 0; h < back->scores.heads; h++) {
            const real number = piece->terms.s[e * back->scores.padded + h];
            const real root = back->scores.late ? piece->scores.root[h] : 1;
            const real *q = piece->scores.q + h * back->scores.channels, *w = sums->factor + h * n;
            real *to = back->row + h * n;
            if (piece->some_hidden && piece->hidden[h] >> e & 1) {
                memset(to, 0, (size_t)n * sizeof(real));
            } else if (!sums->by_slope) {
                for (int64_t c = 0; c < n; c++)
                    to[c] = q[c] * root * number * root;
            } else {
                gather(to, sums->run.v_j[piece->scores.at + e] + h * to_head, size, n, REAL_DTYPE);
                for (int64_t c = 0; c < n; c++)
                    to[c] = (q[c] + to[c] > 0 ? number : number * sums->slope) * w[c];
            }
        }
        give_to_edge(back, FA_GRAPH_D_EDGE_KEY, piece->scores.t + e, n);
    }
}

/* Weights relative to the maximum become weights, and terms become gradients of the raw scores: l and mean are the
 * row's sums of both. Then all that comes of them; of the query's gradient, this piece's part. */
static NEVER_INLINE void finish_piece(struct edges_back *back, struct back_piece *piece, vec l, vec total, vec of_lse)
{
    const fa_graph *graph = back->graph;
    const int n = piece->scores.n, padded = back->scores.padded, end = n * padded;
    const vec per_sum = v_pick(l == (vec){0}, (vec){0}, 1 / l), mean = total * per_sum;
    real *const s = piece->scores.s, *const a = piece->terms.s;
    const uint64_t *const hidden = piece->some_hidden ? piece->hidden : NULL;
    for (int i = 0; i < end; i += LANES) {
        const vec weight = v_load(s + i) * per_sum;
        v_store(s + i, weight);
        if (back->want_terms)
            v_store(a + i, weight * (v_load_fours(a + i) - mean + of_lse));
    }
    for (int h = 0; hidden && h < back->scores.heads; h++)
        for (int e = 0; e < n; e++)
            if (hidden[h] >> e & 1)
                s[e * padded + h] = a[e * padded + h] = 0;
    if (is_wanted(graph, back->gradients, FA_GRAPH_D_BIAS))
        give_bias(back, piece);
    if (is_wanted(graph, back->gradients, FA_GRAPH_D_EDGE_VALUE))
        give_edge_values(back, piece);
    for (int i = 0; graph->softcap != 0 && i < end; i += LANES)
        v_store(a + i, v_load(a + i) * v_load(back->scores.cap_slope + (s - back->scores.s) + i));
    if (back->want_sums) {
        const struct edge_piece rows = {.t = piece->scores.t, .n = n, .at = piece->scores.at, .s = a};
        if (back->sums.by_slope)
            for (int h = 0; h < back->scores.heads; h++)
                memcpy(back->sums.fixed + h * graph->head_dim, piece->scores.q + h * back->scores.channels,
                       (size_t)graph->head_dim * sizeof(real));
        if (is_wanted(graph, back->gradients, FA_GRAPH_D_EDGE_KEY))
            give_edge_keys(back, piece);
        if (is_wanted(graph, back->gradients, FA_GRAPH_D_UNIT_WEIGHTS)) {
            const struct edge_total *units = &back->totals[FA_GRAPH_D_UNIT_WEIGHTS - FA_GRAPH_D_QUERY];
            add_up_rows(&back->sums, &rows, hidden, 1);
            add_to_total(units->sum, units->lost, back->sums.run.o, back->sums.run.vecs);
        }
        if (graph->view[FA_GRAPH_D_QUERY].data)
            add_up_rows(&back->sums, &rows, hidden, 0);
    }
    if (graph->view[FA_GRAPH_D_KEY].data || graph->view[FA_GRAPH_D_VALUE].data) {
        real *to = back->numbers + piece->scores.t * back->width;
        for (int e = 0; e < n; e++, to += back->width) {
            copy_lanes(to, s + e * padded, padded);
            copy_lanes(to + padded, a + e * padded, padded);
            for (int h = 0; hidden && h < back->scores.heads; h++)
                if (hidden[h] >> e & 1)
                    to[h] = -1; /* tells the columns */
        }
    }
}

/* Where keys and values of a piece are read, by all that do. */
static ALWAYS_INLINE void place_piece(struct edges_back *back, const struct back_piece *piece)
{
    const fa_graph *graph = back->graph;
    const int64_t t = piece->scores.t, n = piece->scores.n;
    const char *keys = of_group(&back->sums.run, FA_VALUE, 0), *values = of_group(&back->terms, FA_KEY, 0);
    const ptrdiff_t key_row = graph->view[FA_KEY].row, value_row = graph->view[FA_VALUE].row;
    const char **sum_rows = back->sums.run.v_j + piece->scores.at;
    if (!back->in_place) {
        place_edges(&back->scores, &piece->scores);
        place_edges(&back->terms, &piece->terms);
        place_rows(&back->sums.run, &piece->scores);
        return;
    }
    for (int e = 0; e < n + 3; e++) { /* what is missing to a multiple of four is the last once more */
        const int64_t j = key_of_edge(graph, t + (e < n ? e : n - 1));
        FORGET(keys); /* as in place_edges */
        back->scores.k_j[e] = keys + j * key_row;
        back->terms.k_j[e] = values + j * value_row;
        if (e < n)
            sum_rows[e] = keys + j * key_row;
    }
}

/* Scores and terms. */
static NEVER_INLINE void score_piece(struct edges_back *back, const struct back_piece *piece)
{
    place_piece(back, piece);
    score_edges(&back->scores, &piece->scores);
    if (back->scores.scores_change)
        finish_scores(&back->scores, &piece->scores);
    if (back->want_terms)
        score_edges(&back->terms, &piece->terms);
}

static NEVER_INLINE void pack_back_row(struct edges_back *back, const struct back_piece *piece)
{
    pack_edge_row(&back->scores, &piece->scores);
    pack_edge_row(&back->terms, &piece->terms);
}

/* A row of more than EDGES edges. */
static NEVER_INLINE void visit_long_back(struct edges_back *back, int64_t i, int64_t begin, int64_t end)
{
    struct edge_run *scores = &back->scores, *sums = &back->sums.run;
    struct back_piece piece = {
        .scores = {.row = i, .q = scores->q, .root = scores->root, .s = scores->s},
        .terms = {.row = i, .q = back->terms.q, .root = back->terms.root, .s = back->terms.s},
    };
    const vec none = v_fill(-(real)INFINITY);
    vec most = none;
    real l[LANES] = {0}, l_error[LANES] = {0}, total[LANES] = {0}, total_error[LANES] = {0};
    pack_back_row(back, &piece);
    for (int pass = 0; pass < 3; pass++) {
        if (pass == 2)
            begin_joining(sums);
        for (int64_t t = begin; t < end; t += EDGES) {
            piece.scores.t = piece.terms.t = t;
            piece.scores.n = piece.terms.n = end - t < EDGES ? (int)(end - t) : EDGES;
            const int all = piece.scores.n * scores->padded;
            if (pass == 0) {
                score_piece(back, &piece);
                keep_piece(back, &piece, 0);
                for (int s = 0; s < all; s += LANES)
                    most = v_max(v_pick_bits(lanes_before(s, all), v_load_fours(piece.scores.s + s), none), most);
                continue;
            }
            keep_piece(back, &piece, 1);
            find_hidden(back, &piece);
            const struct edge_sum sum = weigh_edges(scores, &piece.scores, most);
            if (pass == 1) {
                add_exactly(l, l_error, v_fill(1), sum.l);
                add_exactly(total, total_error, v_fill(1), total_terms(back, &piece));
            } else {
                place_rows(sums, &piece.scores);
                finish_piece(back, &piece, v_load(l) + v_load(l_error), v_load(total) + v_load(total_error),
                             gradient_of_lse(back, i));
                if (back->graph->view[FA_GRAPH_D_QUERY].data)
                    add_to_total(sums->o_all, sums->o_error, sums->o, sums->vecs);
            }
        }
        most = spread_head_max(most, scores->padded);
    }
    end_joining(sums);
    if (back->graph->view[FA_GRAPH_D_QUERY].data)
        give_edge_row(&back->sums, i);
}

/* Rows of a block, step by step for all of them, as visit_short_rows. */
static void visit_short_back(struct edges_back *back, struct back_piece *pieces, int rows)
{
    struct edge_sum sums[SHORT_ROWS];
    for (int r = 0; r < rows; r++) {
        struct back_piece *piece = &pieces[r];
        if (piece->scores.n == 0)
            continue;
        pack_back_row(back, piece);
        score_piece(back, piece);
    }
    for (int r = 0; r < rows; r++) {
        if (pieces[r].scores.n == 0)
            continue;
        find_hidden(back, &pieces[r]);
        sums[r] = weigh_edges(&back->scores, &pieces[r].scores, v_fill(-(real)INFINITY));
    }
    for (int r = 0; r < rows; r++) {
        struct back_piece *piece = &pieces[r];
        struct edge_run *run = &back->sums.run;
        if (piece->scores.n)
            finish_piece(back, piece, sums[r].l, total_terms(back, piece), gradient_of_lse(back, piece->scores.row));
        else
            memset(run->o, 0, (size_t)(run->vecs * LANES) * sizeof(real));
        if (back->graph->view[FA_GRAPH_D_QUERY].data)
            give_edge_row(&back->sums, piece->scores.row);
    }
}

/* Contract: contract.h. */
static void edges_back_rows(const fa_graph *graph, const fa_graph_gradients *gradients, int64_t begin, int64_t end,
                            void *workspace)
{
    struct edges_back back;
    struct back_piece pieces[SHORT_ROWS];
    lay_out_edges_back(&back, graph, workspace);
    for (int64_t first = 0; first < graph->heads; first += MOST_HEADS) {
        open_back(&back, gradients, first);
        for (int64_t i = begin; i < end;) {
            int rows = 0;
            for (int n = 0, s = 0; i + rows < end && rows < SHORT_ROWS; rows++) {
                const int64_t from = first_edge(graph, i + rows), more = first_edge(graph, i + rows + 1) - from;
                if (more > EDGES - n)
                    break;
                const struct edge_run *scores = &back.scores, *terms = &back.terms;
                pieces[rows].scores = (struct edge_piece){
                    i + rows,     from, (int)more, n, scores->q + rows * scores->q_row, scores->root + rows * LANES,
                    scores->s + s};
                pieces[rows].terms = pieces[rows].scores;
                pieces[rows].terms.q = terms->q + rows * terms->q_row;
                pieces[rows].terms.s = terms->s + s;
                n += (int)more;
                s += ((int)more * scores->padded + LANES - 1) / LANES * LANES;
            }
            if (rows)
                visit_short_back(&back, pieces, rows);
            else
                visit_long_back(&back, i, first_edge(graph, i), first_edge(graph, i + 1));
            i += rows ? rows : 1;
        }
        close_back(&back);
    }
}

/* The rows of the key's sums: those of queries; or, where keys belong to edges, all that leaky ReLU is taken of. */
static NEVER_INLINE void make_units(struct edge_sums *sums, const fa_graph *graph, int64_t j,
                                    const struct edge_piece *piece)
{
    struct edge_run *run = &sums->run;
    const fa_view *query = &graph->view[FA_QUERY];
    const int64_t n = graph->head_dim;
    for (int e = 0; e < piece->n; e++) {
        const char *at = graph->indices + (piece->t + e) * graph->index_step;
        const char *q_i = query->data + run->first_head * query->head + integer_at(at, graph->index_size) * query->row;
        real *to = run->v + e * run->vecs * LANES;
        widen_row(run, FA_VALUE, FA_EDGE_VALUE, j, integer_at(at + graph->index_size, graph->index_size), n, to);
        for (int h = 0; h < run->heads; h++) {
            gather(run->extra, q_i + h * query->head, query->col, n, query->dtype);
            for (int64_t c = 0; c < n; c++)
                to[h * n + c] += run->extra[c];
        }
        run->v_j[e] = (const char *)to;
    }
}

/* What a column's sums may still have to fetch. */
struct columns_ahead {
    const char *queries, *gradients, *numbers;
    ptrdiff_t query_row, gradient_row, number_row;
    int query_span, gradient_span, number_span;
    int64_t ahead;
};

static struct columns_ahead look_ahead(const struct edge_columns *columns, const fa_graph *graph, const real *numbers)
{
    const struct edge_run *run = &columns->value.run;
    const fa_view *query = &graph->view[FA_QUERY], *gradient = &graph->view[FA_GRAPH_GRAD_OUT];
    const ptrdiff_t row = numbers_width(graph) * run->padded * (ptrdiff_t)sizeof(real);
    struct columns_ahead ahead = {
        .queries = query->data + run->first_head * query->head,
        .gradients = gradient->data + run->first_head * gradient->head,
        .numbers = (const char *)numbers,
        .query_row = query->row,
        .gradient_row = gradient->row,
        .number_row = row,
        .query_span = graph->view[FA_GRAPH_D_KEY].data ? span_of(query, run->heads, graph->head_dim) : 0,
        .gradient_span = graph->view[FA_GRAPH_D_VALUE].data ? span_of(gradient, run->heads, graph->value_dim) : 0,
        .number_span = (int)(2 * run->padded * (ptrdiff_t)sizeof(real))};
    ahead.ahead = EDGE_BYTES_AHEAD / (ahead.query_span + ahead.gradient_span + ahead.number_span);
    ahead.ahead = ahead.ahead < FEWEST_AHEAD ? FEWEST_AHEAD : ahead.ahead > MOST_AHEAD ? MOST_AHEAD : ahead.ahead;
    return ahead;
}

/* The numbers of a piece of a column, and where the rows of its queries are; asks for what comes later. */
static ALWAYS_INLINE void read_numbers(struct edge_columns *columns, const fa_graph *graph, const real *numbers,
                                       const struct columns_ahead *ahead_, const struct edge_piece *piece)
{
    const struct columns_ahead ahead = *ahead_; /* of its own: nothing that is stored can change it */
    const int padded = columns->value.run.padded, width = numbers_width(graph) * padded, size = graph->index_size;
    const int64_t later = ahead.ahead * graph->index_step, last = graph->edges - ahead.ahead - piece->t;
    const char *at = graph->indices + piece->t * graph->index_step;
    real *weights = columns->weights, *slopes = columns->slopes;
    for (int e = 0; e < piece->n; e++, at += graph->index_step, weights += padded, slopes += padded) {
        if (e < last) {
            const int64_t i = integer_at(at + later, size), t = integer_at(at + later + size, size);
            ask_for_span(ahead.gradients + i * ahead.gradient_row, ahead.gradient_span);
            ask_for_span(ahead.queries + i * ahead.query_row, ahead.query_span);
            ask_for_span(ahead.numbers + t * ahead.number_row, ahead.number_span);
        }
        const int64_t i = integer_at(at, size);
        const real *from = numbers + integer_at(at + size, size) * width;
        columns->value.run.v_j[e] = ahead.gradients + i * ahead.gradient_row;
        columns->key.run.v_j[e] = ahead.queries + i * ahead.query_row;
        copy_lanes(weights, from, padded);
        copy_lanes(slopes, from + padded, padded);
    }
}

/* Which edges of each head are hidden; returns whether some are. */
static NEVER_INLINE int hidden_of_column(const struct edge_columns *columns, const struct edge_piece *piece,
                                         uint64_t *hidden)
{
    const struct edge_run *run = &columns->value.run;
    uint64_t some = 0;
    for (int h = 0; h < run->heads; h++) {
        hidden[h] = 0;
        for (int e = 0; e < piece->n; e++)
            hidden[h] |= (uint64_t)(columns->weights[e * run->padded + h] < 0) << e;
        some |= hidden[h];
    }
    return some != 0;
}

static void visit_column(struct edge_columns *columns, const fa_graph *graph, const real *numbers,
                         const struct columns_ahead *ahead, const int any_hidden, int64_t j)
{
    const int64_t begin = first_edge(graph, j), end = first_edge(graph, j + 1);
    const int made = columns->key.graph.view[FA_EDGE_VALUE].data != NULL, is_long = end - begin > EDGES;
    struct edge_sums *both[] = {graph->view[FA_GRAPH_D_VALUE].data ? &columns->value : NULL,
                                graph->view[FA_GRAPH_D_KEY].data ? &columns->key : NULL};
    uint64_t hidden[LANES];
    const fa_view *key = &graph->view[FA_KEY];
    if (both[1] && columns->key.by_slope && !made)
        for (int h = 0; h < columns->key.run.heads; h++)
            gather(columns->key.fixed + h * graph->head_dim,
                   key->data + (columns->key.run.first_head + h) * key->head + j * key->row, key->col, graph->head_dim,
                   key->dtype);
    for (int k = 0; k < 2; k++) {
        if (both[k] && is_long)
            begin_joining(&both[k]->run);
        else if (both[k] && begin == end)
            memset(both[k]->run.o, 0, (size_t)(both[k]->run.vecs * LANES) * sizeof(real));
    }
    for (int64_t t = begin; t < end; t += EDGES) {
        struct edge_piece piece = {.row = j, .t = t, .n = end - t < EDGES ? (int)(end - t) : EDGES};
        read_numbers(columns, graph, numbers, ahead, &piece);
        const int some = any_hidden && hidden_of_column(columns, &piece, hidden);
        for (int k = 0; k < 2; k++) {
            if (!both[k])
                continue;
            piece.s = k ? columns->slopes : columns->weights;
            if (k && made)
                make_units(both[k], graph, j, &piece);
            else if (!both[k]->run.values_in_place)
                copy_edge_values(&both[k]->run, &piece);
            add_up_rows(both[k], &piece, some ? hidden : NULL, 0);
            if (is_long)
                add_to_total(both[k]->run.o_all, both[k]->run.o_error, both[k]->run.o, both[k]->run.vecs);
        }
    }
    for (int k = 0; k < 2; k++) {
        if (both[k] && is_long)
            end_joining(&both[k]->run);
        if (both[k])
            give_edge_row(both[k], j);
    }
}

/* Contract: contract.h. */
static void edges_back_columns(const fa_graph *graph, const fa_graph_gradients *gradients, int64_t begin, int64_t end,
                               void *workspace)
{
    struct edge_columns columns;
    lay_out_columns(&columns, graph, workspace);
    for (int64_t first = 0; first < graph->heads; first += MOST_HEADS) {
        const real *numbers = numbers_of_group(graph, gradients, first);
        open_edge_sums(&columns.value, graph, gradients, FA_GRAPH_D_VALUE, first);
        open_edge_sums(&columns.key, graph, gradients, FA_GRAPH_D_KEY, first);
        const struct columns_ahead ahead = look_ahead(&columns, graph, numbers);
        for (int64_t j = begin; j < end; j++)
            visit_column(&columns, graph, numbers, &ahead, *gradients->hidden, j);
    }
}
