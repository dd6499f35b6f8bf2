/* Attention whose weights are sparsemax's or 1.5-entmax's (threshold.inc.h). They need a row's largest score and its
 * threshold before there is any weight, so a tile keeps what may come to have one: those vectors of its scores that
 * reach up to the largest score so far. The rest is done when all keys have been visited. Values are then added up as
 * everywhere, in terms, chunks, blocks and spans; a key whose weight is 0 is left out, whatever its value. */

static ALWAYS_INLINE int is_square(const fa_problem *problem) { return problem->activation == FA_ENTMAX15; }

/* A row's list. */
static ALWAYS_INLINE real *scores_of(const struct sparse *sparse, int64_t r)
{
    return sparse->scores + r * (sparse->room + 1) * LANES;
}

static ALWAYS_INLINE uint32_t *places_of(const struct sparse *sparse, int64_t r)
{
    return sparse->place + r * (sparse->room + 1);
}

/* A tile that has seen nothing. */
static void open_sparse(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                        struct sparse *sparse)
{
    int64_t begin, end;
    fa_visible_keys(problem, head, row, rows, &begin, &end);
    sparse->first = begin / FA_BLOCK * FA_BLOCK;
    for (int64_t r = 0; r < rows; r++) {
        sparse->most[r] = -(real)INFINITY;
        sparse->count[r] = sparse->next[r] = 0;
    }
}

/* Scores of rows r to r + group, the vectors [first, last) of a block. */
static void keep_scores(const fa_problem *problem, int64_t r, int group, int64_t block, int first, int last,
                        const real *s, struct sparse *sparse)
{
    const uint32_t place = (uint32_t)((block - sparse->first) / LANES);
    const vec least = v_fill(is_square(problem) ? -2 : -1), none = v_fill(-(real)INFINITY);
    for (const int64_t end = r + group; r < end; r++, s += SCORE_ROW) {
        const vec most = v_max(row_maximum(s, first, last), v_fill(sparse->most[r]));
        const vec base = v_pick(most == none, (vec){0}, most);
        real *scores = scores_of(sparse, r);
        uint32_t *places = places_of(sparse, r);
        int64_t count = sparse->count[r];
        for (int v = first; v < last; v++) {
            const vec x = v_load(s + v * LANES);
            v_store(scores + count * LANES, x);
            places[count] = place + (uint32_t)v;
            count += v_above_bits(x - base, least) != 0;
        }
        sparse->count[r] = count;
        sparse->most[r] = most[0];
    }
}

/* Scores of the rows [r, r + count) become weights. */
static ALWAYS_INLINE void weigh_rows(const int square, int64_t r, int count, struct sparse *sparse)
{
    struct list lists[LISTS_AT_ONCE];
    for (int i = 0; i < count; i++) {
        const vec base = v_fill(sparse->most[r + i] == -(real)INFINITY ? 0 : sparse->most[r + i]);
        real *z = scores_of(sparse, r + i);
        lists[i] = (struct list){z, places_of(sparse, r + i), sparse->count[r + i], 0, {0, 0, 0}, 0};
        sparse->threshold[r + i].base = base[0];
        for (int64_t j = 0; j < lists[i].n * LANES; j += LANES)
            v_store(z + j, below_largest(square, v_load(z + j), base));
    }
    weigh_lists(square, lists, count);
    for (int i = 0; i < count; i++) {
        const double total = lists[i].total;
        sparse->count[r + i] = total != total ? 0 : lists[i].n;
        sparse->total[r + i] = (real)(total != total ? total : total > 0);
        sparse->threshold[r + i].t = lists[i].search.t;
        sparse->threshold[r + i].rest = lists[i].search.rest;
    }
}

/* Weights of row r for the keys of the block at number `at` into p, without the zeros between them; which keys have
 * one. */
static ALWAYS_INLINE key_bits take_weights(struct sparse *sparse, int64_t r, int64_t at, real *p)
{
    const real *weights = scores_of(sparse, r);
    const uint32_t *places = places_of(sparse, r);
    key_bits keys = {{0}};
    int64_t i = sparse->next[r];
    for (; i < sparse->count[r] && (int64_t)places[i] * LANES < at + FA_BLOCK; i++) {
        const int j = (int)((int64_t)places[i] * LANES - at);
        const vec w = v_load(weights + i * LANES);
        v_store(p + j, w);
        keys.word[j / 64] |= (uint64_t)v_above_bits(w, (vec){0}) << j % 64;
    }
    sparse->next[r] = i;
    return keys;
}

/* A weight for more than one in DENSE pairs of row and key makes the usual product of all worth while. */
enum { DENSE = 4 };

/* What is there of a block's values. */
struct sparse_values {
    struct value_rows rows;
    int in_place, finite; /* finite: -1 where that is not known */
    key_bits copied;
};

/* Values that cannot be read in place are copied where a row has a weight for them. */
static NEVER_INLINE void copy_weighed(const fa_problem *problem, const fa_head *head, int64_t block,
                                      const key_bits *keys, struct sparse_values *values, struct tile *tile)
{
    const fa_view *value = &head->view[FA_VALUE];
    const struct scales scales = scales_of_copies(problem, head, FA_VALUE, block);
    const real factor = value_factor(problem);
    for (int w = 0; w < WORDS; w++) {
        for (uint64_t left = keys->word[w] & ~values->copied.word[w]; left; left &= left - 1) {
            const int j = w * 64 + __builtin_ctzll(left);
            real *to = tile->v + j * tile->v_row;
            copy_scaled(value->data + (block + j) * value->row, value, problem->value_dim, &scales, j, 1, to,
                        problem->value_dim);
            for (int64_t c = 0; problem->value_shift && c < problem->value_dim; c++)
                to[c] *= factor;
            for (int64_t c = problem->value_dim; c < tile->value_row; c++)
                to[c] = 0;
        }
        values->copied.word[w] |= keys->word[w];
    }
}

/* The weighted sum of a chunk's values, `vecs` vectors of columns, joins `to`; bits: its keys that have a weight. The
 * sum is that of product_tile without the zeros. */
static ALWAYS_INLINE void add_chunk(const real *p, uint64_t bits, const char *v, ptrdiff_t v_row, real *to,
                                    const int vecs)
{
    vec sum[4], term[4];
    UNROLL(4)
    for (int i = 0; i < vecs; i++)
        sum[i] = term[i] = (vec){0};
    while (bits) {
        const int j = __builtin_ctzll(bits);
        const char *v_j = v + j * v_row;
        const vec p_j = v_fill(p[j]);
        bits &= bits - 1;
        if (STEPS == 1) {
            UNROLL(4)
            for (int i = 0; i < vecs; i++)
                sum[i] = v_fma(p_j, v_load(v_j + i * VECTOR_BYTES), sum[i]);
            continue;
        }
        UNROLL(4)
        for (int i = 0; i < vecs; i++)
            term[i] = v_fma(p_j, v_load(v_j + i * VECTOR_BYTES), term[i]);
        if (!bits || __builtin_ctzll(bits) / STEPS != j / STEPS) {
            UNROLL(4)
            for (int i = 0; i < vecs; i++)
                sum[i] += term[i], term[i] = (vec){0};
        }
    }
    UNROLL(4)
    for (int i = 0; i < vecs; i++)
        v_store(to + i * LANES, v_load(to + i * LANES) + sum[i]);
}

/* The weighted sum of a block's values for one row: only of those that have a weight. */
static NEVER_INLINE void sum_of_weighed(const real *p, const key_bits *keys, struct value_rows value, int64_t value_row,
                                        real *sum)
{
    memset(sum, 0, (size_t)value_row * sizeof(real));
    for (int t = 0; t < FA_BLOCK; t += CHUNK) {
        const uint64_t bits = keys->word[t / 64] >> t % 64 & bits_below(CHUNK);
        const char *v = value.data + t * value.row;
        int64_t c = 0;
        if (!bits)
            continue;
        for (; c + 4 * LANES <= value_row; c += 4 * LANES, v += 4 * VECTOR_BYTES)
            add_chunk(p + t, bits, v, value.row, sum + c, 4);
        for (; c < value_row; c += LANES, v += VECTOR_BYTES)
            add_chunk(p + t, bits, v, value.row, sum + c, 1);
    }
}

/* The same for a group of rows, with all values of the keys that any of them has a weight for, which must be finite:
 * zeros cost less than finding many weights. */
static void sum_of_group(const key_bits *keys, int group, int lo, int hi, struct value_rows value, real *p, real *sum,
                         int64_t value_row)
{
    for (int r = 0; r < group; r++)
        for (int j = 0; j < FA_BLOCK; j += LANES)
            if (!bits_at(&keys[r], j, LANES))
                v_store(p + r * SCORE_ROW + j, (vec){0});
    weighted_columns(p, group, value, term_begin(lo), term_end(hi), 0, value_row, value_row, sum, 0, NULL, 1, 0);
}

/* Weights of the rows [first, first + group), group g, times the values of a block, into its state. [begin, end): what
 * the tile sees of the block. */
static void add_block(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                      int64_t block, int begin, int end, struct sparse_values *values, struct tile *tile)
{
    const int64_t value_row = tile->value_row;
    key_bits keys[ROWS], all = {{0}};
    real ones[ROWS], *o = tile->o + first * value_row, *p = tile->s;
    int count = 0, lo = FA_BLOCK, hi = 0;
    for (int r = 0; r < group; r++) {
        keys[r] = take_weights(&tile->sparse, first + r, block - tile->sparse.first, p + r * SCORE_ROW);
        count += bits_count(&keys[r]);
        ones[r] = 1;
        for (int w = 0; w < WORDS; w++)
            all.word[w] |= keys[r].word[w];
    }
    if (!count)
        return;
    for (int w = 0; w < WORDS; w++)
        if (all.word[w]) {
            lo = lo < FA_BLOCK ? lo : w * 64 + __builtin_ctzll(all.word[w]);
            hi = w * 64 + 64 - __builtin_clzll(all.word[w]);
        }
    const int span_begins = begin_span(problem, head, g, first, group, block / FA_SPAN, tile);
    const int many = DENSE * count > group * (hi - lo);
    real *sum = span_begins ? o : tile->part;
    if (many && values->finite < 0) {
        values->rows = values_of(problem, head, block, begin, end, 1, 0, tile);
        values->finite = all_finite(values->rows, begin, end, value_row);
        values->in_place = 1; /* or copied as a whole */
    }
    if (many && values->finite) {
        sum_of_group(keys, group, lo, hi, values->rows, p, sum, value_row);
    } else {
        if (!values->in_place)
            copy_weighed(problem, head, block, &all, values, tile);
        for (int r = 0; r < group; r++)
            sum_of_weighed(p + r * SCORE_ROW, &keys[r], values->rows, value_row, sum + r * value_row);
    }
    if (!span_begins)
        join_sum(o, sum, group, value_row, ones);
}

/* All keys are visited: from the scores that are kept to the state of the tile. */
static NEVER_INLINE void weigh_sparse(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                      struct tile *tile)
{
    struct sparse *sparse = &tile->sparse;
    const fa_view *value = &head->view[FA_VALUE];
    const int in_place = readable(value) && problem->value_dim % LANES == 0 && !problem->value_shift;
    int64_t begin, end;
    fa_visible_keys(problem, head, row, rows, &begin, &end);
    for (int64_t r = 0; r < rows; r += LISTS_AT_ONCE) {
        const int count = rows - r < LISTS_AT_ONCE ? (int)(rows - r) : LISTS_AT_ONCE;
        if (is_square(problem))
            weigh_rows(1, r, count, sparse);
        else
            weigh_rows(0, r, count, sparse);
    }
    for (int64_t block = begin / FA_BLOCK * FA_BLOCK; block < end; block += FA_BLOCK) {
        struct sparse_values values = {rows_at(tile->v, tile->v_row * (ptrdiff_t)sizeof(real)), 0, -1, {{0}}};
        const int from = begin > block ? (int)(begin - block) : 0;
        const int to = end - block < FA_BLOCK ? (int)(end - block) : FA_BLOCK;
        if (in_place) {
            values.rows = rows_at(value->data + block * value->row, value->row);
            values.in_place = 1;
        }
        for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
            add_block(problem, head, g, first, rows_from(tile, first, rows), block, from, to, &values, tile);
    }
}

/* A span of keys in a form that can be moved to another workspace: of each row the largest score, the length of its
 * list, and the list. */
enum { SPAN_VECTORS = FA_SPAN / LANES };

static size_t scores_size(int64_t rows)
{
    const size_t row = sizeof(int64_t) + sizeof(double) + SPAN_VECTORS * (sizeof(uint32_t) + VECTOR_BYTES);
    return ((size_t)rows * row + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

static void save_scores(int64_t rows, const struct sparse *sparse, char *to)
{
    for (int64_t r = 0; r < rows; r++) {
        const size_t count = (size_t)sparse->count[r];
        memcpy(to, &sparse->most[r], sizeof(real));
        memcpy(to + sizeof(double), &sparse->count[r], sizeof(int64_t));
        to += sizeof(double) + sizeof(int64_t);
        memcpy(to, places_of(sparse, r), count * sizeof(uint32_t));
        memcpy(to + SPAN_VECTORS * sizeof(uint32_t), scores_of(sparse, r), count * VECTOR_BYTES);
        to += SPAN_VECTORS * (sizeof(uint32_t) + VECTOR_BYTES);
    }
}

static void join_scores(int64_t rows, struct sparse *sparse, const char *from)
{
    for (int64_t r = 0; r < rows; r++) {
        const int64_t before = sparse->count[r];
        int64_t count;
        real most;
        memcpy(&most, from, sizeof(real));
        memcpy(&count, from + sizeof(double), sizeof(int64_t));
        from += sizeof(double) + sizeof(int64_t);
        memcpy(places_of(sparse, r) + before, from, (size_t)count * sizeof(uint32_t));
        memcpy(scores_of(sparse, r) + before * LANES, from + SPAN_VECTORS * sizeof(uint32_t),
               (size_t)count * VECTOR_BYTES);
        from += SPAN_VECTORS * (sizeof(uint32_t) + VECTOR_BYTES);
        sparse->most[r] = most > sparse->most[r] ? most : sparse->most[r];
        sparse->count[r] = before + count;
    }
}
