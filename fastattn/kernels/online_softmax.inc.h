/* From raw scores to weights, block by block: softcap, ALiBi, bias, visibility, then the running maximum and sum of
 * Milakov and Gimelshein (2018), or ReLU or the sigmoid in place of the exponential.
 *
 * Scores are in units of log 2 (the query carries scale * log2 e) when nothing is added to them; otherwise in their own
 * unit, because a bias such as the least float would overflow when multiplied by log2 e.
 */

/* A slope or a sink. */
static ALWAYS_INLINE double per_row(const fa_head *head, const fa_view *numbers, int64_t i)
{
    double x;
    memcpy(&x, fa_row(head, numbers, i), sizeof x);
    return x;
}

/* Whether scores change between product and activation. */
static ALWAYS_INLINE int scores_change(const fa_problem *problem, const fa_head *head)
{
    return problem->softcap != 0 || problem->has_slope || head->bias.data || head->relative_bias.data ||
           scale_after_product(problem);
}

static ALWAYS_INLINE int scores_are_natural(const fa_problem *problem, const fa_head *head)
{
    return problem->activation != FA_SOFTMAX || scores_change(problem, head);
}

/* Scores of the keys that are computed but not seen become -inf, also where they are NaN. */
static ALWAYS_INLINE void hide(const key_bits *computed, const key_bits *seen, real *s)
{
    for (int w = 0; w < WORDS; w++) {
        uint64_t gone = computed->word[w] & ~seen->word[w];
        while (gone) {
            const int j = __builtin_ctzll(gone) / LANES * LANES;
            real *s_v = s + w * 64 + j;
            const unsigned bits = bits_at(seen, w * 64 + j, LANES);
            v_store(s_v, v_pick_bits(bits, v_load(s_v), v_fill(-(real)INFINITY)));
            gone &= ~(bits_below(LANES) << j);
        }
    }
}

/* The same for a row that sees the keys [from, to), over the vectors [first, last). */
static ALWAYS_INLINE void hide_outside(int first, int last, int from, int to, real *s)
{
    const vec hidden = v_fill(-(real)INFINITY);
    const int before = from < last * LANES ? (from + LANES - 1) / LANES : last, behind = to / LANES;
    for (int v = first; v < last; v++) {
        if (v >= before && v < behind)
            v = behind; /* all of those is seen */
        if (v < last) {
            const uint64_t seen = bits_below(to - v * LANES) & ~bits_below(from - v * LANES);
            real *s_v = s + v * LANES;
            v_store(s_v, v_pick_bits((unsigned)(seen & bits_below(LANES)), v_load(s_v), hidden));
        }
    }
}

/* Row i, r of its group, over the vectors [first, last) of the block at key `block`: everything between the raw score
 * and the activation, where that is more than to hide; after: what the raw score is multiplied by. Hidden keys become
 * -inf, also where score or bias are NaN. */
static void apply_rules(const fa_problem *problem, const fa_head *head, int64_t i, int r, int64_t block, int first,
                        int last, double after, key_bits *seen, real *s, real *extra, real *other)
{
    const vec hidden = v_fill(-(real)INFINITY);
    const int late = after != 1, capped = problem->softcap != 0;
    real cap = 0, per_cap = 0, root = 0, scale = 0; /* roots and quotients only where they are needed: a small call's */
    if (capped) {                                   /* time is made of such things */
        /* A cap beyond these limits changes nothing, or leaves nothing; its reciprocal would not be a normal number. */
        const double most = BITS == 32 ? 1e30 : 1e290, within = problem->softcap < most ? problem->softcap : most;
        cap = (real)(within > 1 / most ? within : 1 / most);
        per_cap = 1 / cap;
    }
    if (late) {
        root = (real)sqrt(fabs(after)); /* in two steps: it may be beyond the range of real */
        scale = (real)(after / (double)root);
    }
    const real slope = problem->has_slope ? (real)per_row(head, &head->slope, i) : 0;
    const real distance = (real)(block - (head->offset + fa_query_of(head, i)));
    const int biased = head->bias.data || head->relative_bias.data;
    if (biased) {
        int from, to; /* what lies outside of the matrix is not read, and of a band only what the row sees */
        rows_range(problem, head, i, 1, block, &from, &to);
        for (int j = first * LANES; j < last * LANES; j++)
            extra[j] = 0;
        if (head->bias.data && from < to)
            gather(extra + from, fa_row(head, &head->bias, i) + (block + from) * head->bias.col, head->bias.col,
                   to - from, problem->bias_dtype);
        if (head->relative_bias.data && from < to) {
            const int64_t in_band = block + from - (head->offset + fa_query_of(head, i)) + problem->left;
            gather(other, fa_row(head, &head->relative_bias, i) + in_band * head->relative_bias.col,
                   head->relative_bias.col, to - from, problem->relative_bias_dtype);
            for (int j = from; j < to; j++) { /* -inf hides, whatever is added to it; a sum of others does not */
                const real most = BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX, sum = extra[j] + other[j - from];
                const int hides = extra[j] == -(real)INFINITY || other[j - from] == -(real)INFINITY;
                extra[j] = hides ? -(real)INFINITY : sum < -most ? -most : sum;
            }
        }
    }
    for (int v = first; v < last; v++) {
        real *s_v = s + r * FA_BLOCK + v * LANES;
        unsigned bits = bits_at(seen, v * LANES, LANES);
        vec x = v_load(s_v);
        if (late)
            x = x * root * scale;
        if (capped)
            x = cap * v_tanh(x * per_cap);
        if (problem->has_slope)
            x -= slope * v_abs(v_lane_numbers() + (distance + (real)(v * LANES)));
        if (biased) {
            vec bias = v_load(extra + v * LANES);
            x += bias;
            const unsigned gone = bits & v_true_bits(bias == hidden);
            bits ^= gone;
            seen->word[v * LANES / 64] ^= (uint64_t)gone << v * LANES % 64;
        }
        v_store(s_v, v_pick_bits(bits, x, hidden));
    }
}

/* The greatest of the vectors [first, last) of a row's scores, in all lanes. */
static ALWAYS_INLINE vec row_maximum(const real *s, int first, int last)
{
    const vec none = v_fill(-(real)INFINITY);
    vec x[4] = {none, none, none, none}; /* a NaN score does not become the maximum */
    int v = first;
    for (; v + 4 <= last; v += 4) {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            x[i] = v_max(v_load(s + (v + i) * LANES), x[i]);
    }
    for (; v < last; v++)
        x[0] = v_max(v_load(s + v * LANES), x[0]);
    return v_spread_max(v_max(v_max(x[0], x[1]), v_max(x[2], x[3])));
}

/* Scores with the maximum *most join a row whose running maximum is *m. What the row's weights are relative to from now
 * on, in *most; returns what its earlier weights must be multiplied by. */
static ALWAYS_INLINE vec raise_maximum(real *m, vec *most, const int natural_log)
{
    const vec log2e = v_fill((real)1.44269504088896340736);
    const vec none = v_fill(-(real)INFINITY);
    const vec before = v_fill(*m), now = v_max(*most, before);
    *m = now[0];
    /* A row that has seen nothing yet: -inf - -inf would be NaN. */
    *most = v_pick(now == none, (vec){0}, now);
    const vec x = before - *most;
    return v_exp2(natural_log ? x * log2e : x);
}

/* The vectors [first, last) of a row's scores become weights; returns their sum by lanes. */
static ALWAYS_INLINE vec row_weights(real *s, int first, int last, vec most, const int natural_log)
{
    const vec log2e = v_fill((real)1.44269504088896340736);
    vec sum = {0};
    for (int v = first; v < last; v++) {
        const vec x = v_load(s + v * LANES) - most;
        const vec p = v_exp2(natural_log ? x * log2e : x);
        v_store(s + v * LANES, p);
        sum += p;
    }
    return sum;
}

/* Softmax: scores of `rows` rows over the vectors [first, last) become weights relative to the new maximum; shrink[r]
 * is what the row's earlier output must be multiplied by. m, l: the group's running maximum and sum. The maximum stays
 * in all lanes of a vector: a detour through memory would cost more than the exponentials of a vector. */
static void exponentials(real *s, int rows, int first, int last, const int natural_log, real *m, real *l, real *shrink)
{
    vec most[ROWS], keep[ROWS];
    /* Row by row, each of these three loops is a chain of latencies; over all rows they overlap. */
    for (int r = 0; r < rows; r++)
        most[r] = row_maximum(s + r * FA_BLOCK, first, last);
    for (int r = 0; r < rows; r++) {
        keep[r] = raise_maximum(m + r, most + r, natural_log);
        shrink[r] = keep[r][0];
    }
    for (int r = 0; r < rows; r++) {
        const vec sum = row_weights(s + r * FA_BLOCK, first, last, most[r], natural_log);
        real *l_r = l + r * LANES;
        v_store(l_r, v_fma(v_load(l_r), keep[r], sum));
    }
}

/* ReLU and the sigmoid: weights need no neighbours. l counts the visible keys for ReLU. */
static void pointwise(const fa_problem *problem, real *s, int rows, int first, int last, const key_bits *seen, real *l)
{
    const vec infinite = v_fill((real)INFINITY), zero = {0};
    for (int r = 0; r < rows; r++) {
        for (int v = first; v < last; v++) {
            real *s_v = s + r * FA_BLOCK + v * LANES;
            vec x = v_load(s_v), p;
            if (problem->activation == FA_RELU) {
                p = v_max(zero, x);
            } else {
                vec e = v_exp2(v_abs(x) * (real)-1.44269504088896340736);
                p = v_pick(x < zero, e, zero + 1) / (1 + e);
            }
            p = v_pick(x == infinite, x - x, p); /* a visible +inf gives NaN */
            v_store(s_v, p);
        }
        if (problem->activation == FA_RELU)
            l[r * LANES] += (real)bits_count(&seen[r]);
        else
            l[r * LANES] = 1;
    }
}

/* total += x for a total in two parts, the sum and what rounding has taken from it so far (Knuth's TwoSum). */
static ALWAYS_INLINE void add_exactly(real *sum, real *lost, vec keep, vec x)
{
    const vec before = v_load(sum) * keep, now = before + x, part = now - before;
    const vec error = (before - (now - part)) + (x - part);
    /* An infinite sum loses nothing; a NaN is in the sum already. */
    v_store(lost, v_load(lost) * keep + v_pick(now - now == (vec){0}, error, (vec){0}));
    v_store(sum, now);
}

/* The state (m, l, o) of a span joins the total of those before it, without an error that would grow with their number.
 * Joining to an empty total changes no bit. */
static void fold(real *m_all, real *l_all, real *l_error, real *o_all, real *o_error, const real *m, const real *l,
                 const real *o, int64_t rows, int64_t value_row, int natural_log)
{
    const real unit = natural_log ? (real)1.44269504088896340736 : 1;
    for (int64_t r = 0; r < rows; r++) {
        const real now = m[r] > m_all[r] ? m[r] : m_all[r];
        const real safe = now == -(real)INFINITY ? 0 : now;
        const vec keep = v_exp2(v_fill((m_all[r] - safe) * unit));
        const vec join = v_exp2(v_fill((m[r] - safe) * unit));
        m_all[r] = now;
        add_exactly(l_all + r * LANES, l_error + r * LANES, keep, v_load(l + r * LANES) * join);
        for (int64_t c = r * value_row; c < (r + 1) * value_row; c += LANES)
            add_exactly(o_all + c, o_error + c, keep, v_load(o + c) * join);
    }
}
