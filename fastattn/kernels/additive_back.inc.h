/* The way back of additive scores: from the gradients ds of scores to those of the arguments a of queries, b of keys,
 * and of the weights w. With p = e^2a e^2b and r = 1 / (1 + p), of one channel,
 *
 *     tanh(a + b) = 1 - 2 r             d_w = -2 sum of ds (r - 1/2)
 *     1 - tanh^2 = 4 r (p r)            d_a = 4 w sum over keys of ds r (p r), d_b the same over rows
 *
 * so a triple (query, key, channel) costs no exponential here either. p r is 1 - r with all digits, where tanh is flat
 * too; it costs two more instructions, 7 % of the time. A key's sum stays in a register over the rows of a group; those
 * of a query are vectors, whose lanes are added once a block.
 *
 * Here p must be finite too, not only its factors. A row or key with an argument beyond BACK_LIMIT is *far*: in the
 * sums it takes part as one whose ds are 0, and additive_back_direct adds what is its own. So no sum depends on which
 * way its neighbours take, and rows whose ds are 0 change no bits: a group may be filled up with them.
 */
static const real BACK_LIMIT = BITS == 32 ? (real)21.75 : 175;

/* What a group of rows and a block of keys have in common. */
struct additive_back {
    int64_t channels;      /* a multiple of 4 (SHARE) */
    const real *q, *q_raw; /* e^2a and a of the group: [strip of channels][row][STRIP] */
    const real *k;         /* e^2b of the block: [vector][channel][LANES] */
    const real *k_raw;     /* b: [panel][channel][PANEL] */
    const real *w;         /* [channels] 4 w, zero-padded */
    key_bits far_keys;
    char row_is_far[ROWS];
    real *scratch; /* BACK_SCRATCH numbers */
};

enum {
    BACK_VECTORS = STRIP * (ROWS + 1), /* sums of queries, [channel][row], then those of weights */
    BACK_SCRATCH =
        BACK_VECTORS * LANES + STRIP * LANES + ROWS * STRIP /* then a vector of keys and queries, both clean */
};

/* Whether one of a row's arguments is beyond the limit, or NaN. q_raw: of the row, ROWS * STRIP from strip to strip,
 * and zeros behind, up to whole vectors. */
static int row_is_far(const real *q_raw, int64_t channels)
{
    ivec far = {0};
    for (int64_t c = 0; c < channels; c += STRIP, q_raw += ROWS * STRIP)
        for (int64_t h = 0; h < STRIP && c + h < channels; h += LANES)
            far |= ~(v_abs(v_load(q_raw + h)) <= BACK_LIMIT);
    return v_true_bits(far != 0) != 0;
}

/* The same for the keys of the vectors [v_first, v_last) of a block. */
static key_bits find_far_keys(const real *k_raw, int64_t channels, int v_first, int v_last)
{
    key_bits bits = {{0}};
    for (int v = v_first; v < v_last; v++) {
        const real *b = k_raw + v / VECS * PANEL * channels + v % VECS * LANES;
        ivec far = {0};
        for (int64_t h = 0; h < channels; h++)
            far |= ~(v_abs(v_load(b + h * PANEL)) <= BACK_LIMIT);
        bits.word[v * LANES / 64] |= (uint64_t)v_true_bits(far != 0) << v * LANES % 64;
    }
    return bits;
}

/* Adds what one vector of keys gives in n channels. k, d_k: of the vector; sums: [channel][ROWS] of queries; sums_w:
 * [channel]. d_k and sums lack 4 w, sums_w -2. */
static ALWAYS_INLINE void back_sums(const real *restrict q, const real *restrict k, int n, const real *restrict ds,
                                    int64_t ds_row, real *restrict d_k, real *restrict sums, real *restrict sums_w,
                                    const int rows)
{
    vec ds_r[ROWS], half = {0};
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        ds_r[r] = v_load(ds + r * ds_row);
        half += ds_r[r];
    }
    half *= (real)-0.5;
    for (int h = 0; h < n; h++, k += LANES, d_k += LANES, sums += ROWS * LANES, sums_w += LANES) {
        const vec k_h = v_load(k);
        vec of_key = {0}, of_w = half;
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const vec p = v_fill(q[r * STRIP + h]) * k_h, i = v_reciprocal(p + 1);
            const vec x = ds_r[r] * i, y = x * (p * i);
            of_w += x;
            of_key += y;
            v_store(sums + r * LANES, v_load(sums + r * LANES) + y);
        }
        v_store(d_k, v_load(d_k) + of_key);
        v_store(sums_w, v_load(sums_w) + of_w);
    }
}

#define BACK_SUMS(rows)                                                                                            \
    static NEVER_INLINE void back_sums_##rows(const real *q, const real *k, int n, const real *ds, int64_t ds_row, \
                                              real *d_k, real *sums, real *sums_w)                                 \
    {                                                                                                              \
        back_sums(q, k, n, ds, ds_row, d_k, sums, sums_w, rows);                                                   \
    }
BACK_SUMS(1)
BACK_SUMS(3)
static NEVER_INLINE void back_sums_all(const real *q, const real *k, int n, const real *ds, int64_t ds_row, real *d_k,
                                       real *sums, real *sums_w)
{
    back_sums(q, k, n, ds, ds_row, d_k, sums, sums_w, ROWS);
}
#undef BACK_SUMS

/* Adds what row r of the group and the keys of some lanes of the vectors [v_first, v_last) give, for arguments of any
 * size. e = e^-2|x|: 1 / (1 + e) and e / (1 + e) are r and 1 - r, or the other way round. */
static NEVER_INLINE void additive_back_direct(const struct additive_back *back, int r, int v_first, int v_last,
                                              const unsigned *lanes, const real *ds, real *d_q, int64_t d_q_row,
                                              real *d_k, double *d_w)
{
    const int64_t channels = back->channels;
    for (int64_t h = 0; h < channels; h++) {
        const vec a = v_fill(back->q_raw[h / STRIP * (ROWS * STRIP) + r * STRIP + h % STRIP]);
        vec of_query = {0}, of_w = {0};
        for (int v = v_first; v < v_last; v++) {
            if (!lanes[v])
                continue;
            const real *k_raw = back->k_raw + v / VECS * PANEL * channels + v % VECS * LANES + h * PANEL;
            real *d_k_h = d_k + (v * channels + h) * LANES;
            const vec x = a + v_load(k_raw), ds_v = v_load(ds + v * LANES);
            const vec e = v_exp2(v_abs(x) * (real)-2.88539008177792681472);
            const vec large = 1 / (1 + e), small = e * large;
            const vec less_half = (vec)((ivec)(small - (real)0.5) ^ ((ivec)x & (ivec)(-(vec){0}))); /* r - 1/2 */
            const vec y = v_pick_bits(lanes[v], ds_v * large * small, (vec){0});
            of_query += y;
            of_w += v_pick_bits(lanes[v], ds_v * less_half, (vec){0});
            v_store(d_k_h, v_load(d_k_h) + y);
        }
        const real total = v_total(of_query);
        if (h < d_q_row)
            d_q[h] += total == 0 ? 0 : total * back->w[h];
        d_w[h] -= 2 * (double)v_total(of_w);
    }
}

/* The totals of n vectors, `step` numbers from one to the next. */
static ALWAYS_INLINE void channel_totals(const real *sums, int step, int n, real *total)
{
    for (int h = 0; h < n; h += 4, sums += 4 * step)
        v_four_totals(total + h, v_load(sums), v_load(sums + step), v_load(sums + 2 * step), v_load(sums + 3 * step));
}

/* Adds to the gradients what a group of rows gives that sees keys [lo, hi) of a block.
 *
 * ds: row r at ds + r * ds_row, finite and 0 for hidden keys in all vectors that overlap [lo, hi); or not finite, where
 * something that takes part is not. seen: a row's keys; NULL: all of [lo, hi).
 * d_q: row r at d_q + r * d_q_row, whole vectors, of which four channels may be more than one.
 * d_k: [vector][channel][LANES], a sum that lacks 4 w; back_keys multiplies by it. One chain over groups: start anew
 * after a tile.
 * d_w: [channels]. */
static void additive_back(const struct additive_back *back, int rows, int lo, int hi, const key_bits *seen,
                          const real *ds, int64_t ds_row, real *d_q, int64_t d_q_row, real *d_k, double *d_w)
{
    const int64_t channels = back->channels;
    const int v_first = lo / LANES, v_last = (hi + LANES - 1) / LANES;
    const int all = rows == 1 ? 1 : rows <= 3 ? 3 : ROWS; /* with rows whose ds are 0 */
    real *sums = back->scratch, *sums_w = sums + STRIP * ROWS * LANES;
    real *k_clean = sums + BACK_VECTORS * LANES, *q_clean = k_clean + STRIP * LANES;
    int some_far = 0;
    for (int r = 0; r < rows; r++)
        some_far |= back->row_is_far[r];
    const int rows_are_clean = rows == all && !some_far;
    for (int64_t c = 0; c < channels; c += STRIP) {
        const int n = channels - c < STRIP ? (int)(channels - c) : STRIP;
        const real *q = back->q + c * ROWS;
        for (int i = 0; i < n * ROWS; i++)
            v_store(sums + i * LANES, (vec){0});
        for (int h = 0; h < n; h++)
            v_store(sums_w + h * LANES, (vec){0});
        if (!rows_are_clean) {
            for (int r = 0; r < all; r++)
                for (int h = 0; h < n; h++)
                    q_clean[r * STRIP + h] = r < rows && !back->row_is_far[r] ? q[r * STRIP + h] : 1;
            q = q_clean;
        }
        for (int v = v_first; v < v_last; v++) {
            const real *k = back->k + (v * channels + c) * LANES, *ds_v = ds + v * LANES;
            const unsigned far = bits_at(&back->far_keys, v * LANES, LANES);
            real ds_clean[ROWS * LANES];
            int64_t distance = ds_row;
            if (far) {
                for (int h = 0; h < n; h++)
                    v_store(k_clean + h * LANES, v_pick_bits(far, v_fill(1), v_load(k + h * LANES)));
                k = k_clean;
            }
            if (far || !rows_are_clean) {
                for (int r = 0; r < all; r++) {
                    vec some = {0};
                    if (r < rows && !back->row_is_far[r])
                        some = v_pick_bits(far, some, v_load(ds_v + r * ds_row));
                    v_store(ds_clean + r * LANES, some);
                }
                ds_v = ds_clean;
                distance = LANES;
            }
            real *d_k_v = d_k + (v * channels + c) * LANES;
            if (all == 1)
                back_sums_1(q, k, n, ds_v, distance, d_k_v, sums, sums_w);
            else if (all == 3)
                back_sums_3(q, k, n, ds_v, distance, d_k_v, sums, sums_w);
            else
                back_sums_all(q, k, n, ds_v, distance, d_k_v, sums, sums_w);
        }
        real total[STRIP];
        for (int r = 0; r < rows; r++) {
            channel_totals(sums + r * LANES, ROWS * LANES, n, total);
            for (int h = 0; h < n && c + h < d_q_row; h++) /* a weight may be infinite */
                d_q[r * d_q_row + c + h] += total[h] == 0 ? 0 : total[h] * back->w[c + h];
        }
        channel_totals(sums_w, LANES, n, total);
        for (int h = 0; h < n; h++)
            d_w[c + h] -= 2 * (double)total[h];
    }
    for (int v = v_first; v < v_last; v++)
        some_far |= bits_at(&back->far_keys, v * LANES, LANES) != 0;
    for (int r = 0; some_far && r < rows; r++) {
        const key_bits bits = seen ? seen[r] : bits_of_range(lo, hi);
        unsigned lanes[FA_BLOCK / LANES], any = 0;
        for (int v = v_first; v < v_last; v++) {
            lanes[v] = bits_at(&bits, v * LANES, LANES);
            if (!back->row_is_far[r])
                lanes[v] &= bits_at(&back->far_keys, v * LANES, LANES);
            any |= lanes[v];
        }
        if (any)
            additive_back_direct(back, r, v_first, v_last, lanes, ds + r * ds_row, d_q + r * d_q_row, d_q_row, d_k,
                                 d_w);
    }
}

/* Adds 4 w d_k to the gradients of the keys in the vectors [v_first, v_last), in rows of whole vectors: key j at
 * to + j * to_row. */
static void back_keys(const real *d_k, const real *w, int64_t channels, int v_first, int v_last, real *to,
                      int64_t to_row)
{
    for (int v = v_first; v < v_last; v++)
        for (int64_t h = 0; h < channels && h < to_row; h += LANES) {
            real square[LANES * LANES];
            for (int i = 0; i < LANES; i++) {
                vec x = {0};
                if (h + i < channels) {
                    x = v_load(d_k + (v * channels + h + i) * LANES);
                    x = v_pick(x == 0, x, x * v_fill(w[h + i])); /* a weight may be infinite */
                }
                v_store(square + i * LANES, x);
            }
            real turned[LANES * LANES];
            v_transpose(turned, LANES, (const char *)square, sizeof(real) * LANES);
            for (int i = 0; i < LANES; i++) {
                real *to_j = to + (v * LANES + i) * to_row + h;
                v_store(to_j, v_load(to_j) + v_load(turned + i * LANES));
            }
        }
}
