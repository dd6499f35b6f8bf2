/* The additive score of Bahdanau, Cho and Bengio (2015): sum over channels h of w[h] * tanh(a[h] + b[h]), a from the
 * query and b from the key.
 *
 *     tanh(a + b) = 1 - 2 / (1 + e^2a e^2b)
 *
 * The exponentials are computed once per query and once per key, so a triple (query, key, channel) costs no tanh. SHARE
 * channels share one division, w0 / d0 + w1 / d1 = (w0 d1 + w1 d0) / (d0 d1), which is then free: it overlaps the
 * multiplications. A sum starts at sum(w), so no partial sum exceeds sum |w|; its error is at most (hidden / 8 + 8) eps
 * sum |w|: hidden / SHARE additions of half an eps each, plus the error of the terms.
 *
 * e^2a e^2b may overflow or underflow (tanh is then 1 or -1, and denominators are clamped to MOST_DENOMINATOR so that a
 * product of SHARE of them is finite), but its factors may not: tanh(a + b) would be lost for a = -b. A row or key with
 * an argument beyond ADDITIVE_LIMIT is *wide*, and its scores take the slower additive_direct. Which way a score is
 * computed depends only on its own row and key, so its bits do not depend on its neighbours.
 */
static const real ADDITIVE_LIMIT = BITS == 32 ? 43 : 350;
static const real MOST_DENOMINATOR = BITS == 32 ? (real)0x1p31 : (real)0x1p100;

/* The weights and queries of a tile. factor: multiplies the scores. */
static void additive_queries(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, double factor,
                             struct tile *tile)
{
    struct additive *additive = &tile->additive;
    const int64_t channels = tile->channels;
    double sum = 0;
    additive->all_wide = 0;
    for (int64_t h = 0; h < channels; h++) {
        const double w = h < problem->head_dim ? problem->score_weights[h] * factor : 0;
        additive->w[h] = (real)(-2 * w);
        sum += w;
        additive->all_wide |= !isfinite(w); /* in the fast formula an infinite weight would lose the sign of tanh */
    }
    additive->w_sum = (real)sum;
    pack_queries(problem, head, row, rows, ROWS, 1, channels, additive->q_raw);
    const vec limit = v_fill(ADDITIVE_LIMIT);
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = i / ROWS * group_size(channels) + i % ROWS * STRIP;
        ivec wide = {0};
        for (int64_t c = 0; c < channels; c += STRIP, at += ROWS * STRIP) {
            const int64_t all = channels - c < STRIP ? channels - c : STRIP;
            for (int64_t h = all; h % LANES; h++)
                additive->q_raw[at + h] = 0;
            for (int64_t h = 0; h < all; h += LANES) {
                const vec a = v_load(additive->q_raw + at + h);
                wide |= ~(v_abs(a) <= limit); /* a NaN is wide too */
                v_store(tile->q + at + h, v_exp(a + a));
            }
        }
        additive->row_is_wide[i] = (char)(additive->all_wide || v_true_bits(wide != 0));
    }
}

/* Keys [begin, end) of a block. The exponentials are stored as [vector][channel][LANES]: in wider panels the cache
 * lines of one vector would map to a few sets of L1. */
static void additive_keys(const fa_problem *problem, const char *keys, const fa_view *key, int begin, int end,
                          struct tile *tile)
{
    struct additive *additive = &tile->additive;
    const int64_t channels = tile->channels;
    const vec limit = v_fill(ADDITIVE_LIMIT);
    pack_keys(problem->head_dim, keys, key, &no_scales, begin, end, channels, additive->k_raw);
    memset(&additive->wide_keys, 0, sizeof additive->wide_keys);
    for (int j = begin / LANES * LANES; j < end; j += LANES) {
        const int64_t at = j / PANEL * PANEL * channels + j % PANEL;
        ivec wide = {0};
        for (int64_t h = 0; h < channels; h++) {
            const vec b = v_load(additive->k_raw + at + h * PANEL);
            wide |= ~(v_abs(b) <= limit);
            v_store(tile->k + j * channels + h * LANES, v_exp(b + b));
        }
        additive->wide_keys.word[j / 64] |= (uint64_t)v_true_bits(wide != 0) << j % 64;
    }
}

/* What additive_keys finds, kept for calls to come: of each block, the wide keys in PREPARED_HEAD bytes, and then the
 * exponentials. All blocks but the last are whole; the last one ends with the vector of the last key. */
enum { PREPARED_HEAD = FA_ALIGN };

static size_t prepared_block(int64_t channels, int64_t keys)
{
    return PREPARED_HEAD + (size_t)((keys + LANES - 1) / LANES * LANES * channels) * sizeof(real);
}

static int64_t additive_channels(const fa_problem *problem)
{
    const int whole = STEPS < SHARE ? SHARE : STEPS;
    return (problem->head_dim + whole - 1) / whole * whole;
}

/* Contract: contract.h. */
static size_t prepared_size(const fa_problem *problem, int64_t keys)
{
    const int64_t channels = additive_channels(problem), whole = keys / FA_BLOCK;
    const size_t size = (size_t)whole * prepared_block(channels, FA_BLOCK);
    return size +
           (keys % FA_BLOCK ? (prepared_block(channels, keys % FA_BLOCK) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN : 0);
}

/* Contract: contract.h. */
static void prepare_keys(const fa_problem *problem, const fa_head *head, int64_t begin, int64_t end, void *prepared,
                         void *workspace)
{
    struct tile *tile = workspace;
    lay_out(tile, problem, 1, head->keys, GROUPS * ROWS, 0, workspace);
    for (int64_t block = begin; block < end; block += FA_BLOCK) {
        char *to = (char *)prepared + (size_t)(block / FA_BLOCK) * prepared_block(tile->channels, FA_BLOCK);
        tile->k = (real *)(to + PREPARED_HEAD);
        additive_keys(problem, head->view[FA_KEY].data + block * head->view[FA_KEY].row, &head->view[FA_KEY], 0,
                      end - block < FA_BLOCK ? (int)(end - block) : FA_BLOCK, tile);
        memcpy(to, &tile->additive.wide_keys, sizeof tile->additive.wide_keys);
    }
}

/* As additive_keys, from what has been prepared; the keys themselves are only needed where something is wide. */
static void additive_prepared(const fa_problem *problem, const fa_head *head, int64_t rows, int64_t block, int begin,
                              int end, struct tile *tile)
{
    struct additive *additive = &tile->additive;
    const fa_view *key = &head->view[FA_KEY];
    char *from = head->view[FA_PREPARED].data + (size_t)(block / FA_BLOCK) * prepared_block(tile->channels, FA_BLOCK);
    memcpy(&additive->wide_keys, from, sizeof additive->wide_keys);
    tile->k = (real *)(from + PREPARED_HEAD); /* which nothing writes to */
    if (bits_any(&additive->wide_keys) || memchr(additive->row_is_wide, 1, (size_t)rows))
        pack_keys(problem->head_dim, key->data + block * key->row, key, &no_scales, begin, end, tile->channels,
                  additive->k_raw);
}

/* s[row][key] += the terms of n channels, for one vector of keys. */
static ALWAYS_INLINE void additive_sums(const real *restrict q, const real *restrict k, const real *restrict w, int n,
                                        real *restrict s, const int rows)
{
    const vec one = v_fill(1), most = v_fill(MOST_DENOMINATOR);
    vec sum[ROWS];
    UNROLL(8)
    for (int r = 0; r < rows; r++)
        sum[r] = v_load(s + r * SCORE_ROW);
    for (int h = 0; h < n; h += SHARE) {
        const real *k_h = k + h * LANES;
        vec w_h[SHARE];
        UNROLL(8)
        for (int i = 0; i < SHARE; i++)
            w_h[i] = v_fill(w[h + i]);
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            vec d[SHARE];
#if STEPS == 1
            FORGET(k_h); /* too few registers to keep the keys: reload them */
#endif
            UNROLL(8)
            for (int i = 0; i < SHARE; i++)
                d[i] = v_min(v_fma(v_fill(q[r * STRIP + h + i]), v_load(k_h + i * LANES), one), most);
            const vec left = d[0] * d[1], right = d[2] * d[3];
            const vec left_sum = v_fma(w_h[1], d[0], w_h[0] * d[1]);
            const vec right_sum = v_fma(w_h[3], d[2], w_h[2] * d[3]);
            sum[r] += v_fma(right_sum, left, left_sum * right) / (left * right);
        }
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++)
        v_store(s + r * SCORE_ROW, sum[r]);
}

typedef void (*additive_function)(const real *q, const real *k, const real *w, int n, real *s);
#define ADDITIVE_SUMS(rows, name)                                                                       \
    static NEVER_INLINE void name##_##rows(const real *q, const real *k, const real *w, int n, real *s) \
    {                                                                                                   \
        name(q, k, w, n, s, rows);                                                                      \
    }
#define ADDITIVE_NAME(rows, name) name##_##rows,
FOR_ROWS(ADDITIVE_SUMS, additive_sums)
static const additive_function additive_rows[ROWS] = {FOR_ROWS(ADDITIVE_NAME, additive_sums)};
#undef ADDITIVE_SUMS

/* The same for one row and arguments of any size: tanh |x| = (1 - e) / (1 + e) with e = e^-2|x|. For small x this loses
 * the last bits of tanh x, which are negligible beside sum |w|. */
static NEVER_INLINE vec additive_direct(const real *q_raw, const real *k_raw, const real *w, int64_t channels)
{
    vec sum = {0};
    for (int64_t c = 0; c < channels; c += STRIP, q_raw += ROWS * STRIP)
        for (int64_t h = c; h < channels && h < c + STRIP; h += SHARE) {
            vec d[SHARE], n[SHARE];
            UNROLL(8)
            for (int i = 0; i < SHARE; i++) {
                const vec x = v_fill(q_raw[h + i - c]) + v_load(k_raw + (h + i) * PANEL);
                const vec e = v_exp2(v_abs(x) * (real)-2.88539008177792681472);
                const vec t = (vec)((ivec)(1 - e) | ((ivec)x & (ivec)(-(vec){0})));
                n[i] = v_fill(w[h + i] * (real)-0.5) * t;
                d[i] = 1 + e;
            }
            const vec left = d[0] * d[1], right = d[2] * d[3];
            const vec left_sum = v_fma(n[1], d[0], n[0] * d[1]);
            const vec right_sum = v_fma(n[3], d[2], n[2] * d[3]);
            sum += v_fma(right_sum, left, left_sum * right) / (left * right);
        }
    return sum;
}

/* Scores of the group that starts at row `first` of the tile, against the vectors [from, to) of a block. */
static void additive_scores(const struct tile *tile, int64_t first, int rows, int from, int to, real *s)
{
    const struct additive *additive = &tile->additive;
    const int64_t channels = tile->channels, group = first / ROWS * group_size(channels);
    for (int v = from; v < to; v++) {
        const int64_t key = v * LANES * channels, raw_key = v / VECS * PANEL * channels + v % VECS * LANES;
        const unsigned wide = bits_at(&additive->wide_keys, v * LANES, LANES);
        for (int r = 0; r < rows; r++)
            v_store(s + r * SCORE_ROW + v * LANES, v_fill(additive->w_sum));
        for (int64_t c = 0; c < channels; c += STRIP) {
            const int n = channels - c < STRIP ? (int)(channels - c) : STRIP;
            additive_rows[rows - 1](tile->q + group + c * ROWS, tile->k + key + c * LANES, additive->w + c, n,
                                    s + v * LANES);
        }
        for (int r = 0; r < rows; r++) {
            const unsigned direct = additive->row_is_wide[first + r] ? (1u << LANES) - 1u : wide;
            if (direct) {
                real *s_v = s + r * SCORE_ROW + v * LANES;
                const vec x = additive_direct(additive->q_raw + group + r * STRIP, additive->k_raw + raw_key,
                                              additive->w, channels);
                v_store(s_v, v_pick_bits(direct, x, v_load(s_v)));
            }
        }
    }
}
