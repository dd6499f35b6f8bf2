/* From raw scores to weights, block by block: softcap, ALiBi, bias, visibility, then the running maximum and sum of
 * Milakov and Gimelshein (2018), or ReLU or the sigmoid in place of the exponential.
 *
 * Scores are in units of log 2 (the query carries scale * log2 e) when nothing is added to them; otherwise in their own
 * unit, because a bias such as the least float would overflow when multiplied by log2 e.
 */

/* A slope or a sink. */
static ALWAYS_INLINE double NAME(per_row)(const fa_head *head, const fa_view *numbers, int64_t i)
{
    double x;
    memcpy(&x, fa_row(head, numbers, i), sizeof x);
    return x;
}

/* Whether scores change between product and activation. */
static ALWAYS_INLINE int NAME(ruled)(const fa_problem *problem, const fa_head *head)
{
    return problem->softcap != 0 || problem->has_slope || head->bias.data || head->relative_bias.data ||
           NAME(late_scale)(problem);
}

static ALWAYS_INLINE int NAME(natural)(const fa_problem *problem, const fa_head *head)
{
    return problem->activation != FA_SOFTMAX || NAME(ruled)(problem, head);
}

/* Scores of the keys that are computed but not seen become -inf, also where they are NaN. */
static ALWAYS_INLINE void NAME(hide)(const key_bits *computed, const key_bits *seen, real *s)
{
    for (int w = 0; w < WORDS; w++) {
        uint64_t gone = computed->word[w] & ~seen->word[w];
        while (gone) {
            const int j = __builtin_ctzll(gone) / LANES * LANES;
            real *s_v = s + w * 64 + j;
            const unsigned bits = bits_at(seen, w * 64 + j, LANES);
            NAME(store)(s_v, NAME(pick_bits)(bits, NAME(load)(s_v), NAME(fill)(-(real)INFINITY)));
            gone &= ~(bits_below(LANES) << j);
        }
    }
}

/* The same for a row that sees the keys [from, to), over the vectors [first, last). */
static ALWAYS_INLINE void NAME(hide_outside)(int first, int last, int from, int to, real *s)
{
    const vec hidden = NAME(fill)(-(real)INFINITY);
    const int before = from < last * LANES ? (from + LANES - 1) / LANES : last, behind = to / LANES;
    for (int v = first; v < last; v++) {
        if (v >= before && v < behind)
            v = behind; /* all of those is seen */
        if (v < last) {
            const uint64_t seen = bits_below(to - v * LANES) & ~bits_below(from - v * LANES);
            real *s_v = s + v * LANES;
            NAME(store)(s_v, NAME(pick_bits)((unsigned)(seen & bits_below(LANES)), NAME(load)(s_v), hidden));
        }
    }
}

/* Row i, r of its group, over the vectors [first, last) of the block at key `block`: everything between the raw score
 * and the activation, where that is more than to hide; after: what the raw score is multiplied by. Hidden keys become
 * -inf, also where score or bias are NaN. */
static void NAME(apply_rules)(const fa_problem *problem, const fa_head *head, int64_t i, int r, int64_t block,
                              int first, int last, double after, key_bits *seen, real *s, real *extra, real *other)
{
    const vec hidden = NAME(fill)(-(real)INFINITY);
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
    const real slope = problem->has_slope ? (real)NAME(per_row)(head, &head->slope, i) : 0;
    const real distance = (real)(block - (head->offset + fa_query_of(head, i)));
    const int biased = head->bias.data || head->relative_bias.data;
    if (biased) {
        int from, to; /* what lies outside of the matrix is not read, and of a band only what the row sees */
        rows_range(problem, head, i, 1, block, &from, &to);
        for (int j = first * LANES; j < last * LANES; j++)
            extra[j] = 0;
        if (head->bias.data && from < to)
            NAME(gather)
        (extra + from, fa_row(head, &head->bias, i) + (block + from) * head->bias.col, head->bias.col, to - from,
         problem->bias_dtype);
        if (head->relative_bias.data && from < to) {
            const int64_t in_band = block + from - (head->offset + fa_query_of(head, i)) + problem->left;
            NAME(gather)
            (other, fa_row(head, &head->relative_bias, i) + in_band * head->relative_bias.col, head->relative_bias.col,
             to - from, problem->relative_bias_dtype);
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
        vec x = NAME(load)(s_v);
        if (late)
            x = x * root * scale;
        if (capped)
            x = cap * NAME(tanh)(x * per_cap);
        if (problem->has_slope)
            x -= slope * NAME(abs)(NAME(lane_numbers)() + (distance + (real)(v * LANES)));
        if (biased) {
            vec bias = NAME(load)(extra + v * LANES);
            x += bias;
            const unsigned gone = bits & NAME(true_bits)(bias == hidden);
            bits ^= gone;
            seen->word[v * LANES / 64] ^= (uint64_t)gone << v * LANES % 64;
        }
        NAME(store)(s_v, NAME(pick_bits)(bits, x, hidden));
    }
}

/* The greatest of the vectors [first, last) of a row's scores, in all lanes. */
static ALWAYS_INLINE vec NAME(row_maximum)(const real *s, int first, int last)
{
    const vec none = NAME(fill)(-(real)INFINITY);
    vec x[4] = {none, none, none, none}; /* a NaN score does not become the maximum */
    int v = first;
    for (; v + 4 <= last; v += 4) {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            x[i] = NAME(max)(NAME(load)(s + (v + i) * LANES), x[i]);
    }
    for (; v < last; v++)
        x[0] = NAME(max)(NAME(load)(s + v * LANES), x[0]);
    return NAME(spread_max)(NAME(max)(NAME(max)(x[0], x[1]), NAME(max)(x[2], x[3])));
}

/* Scores with the maximum *most join a row whose running maximum is *m. What the row's weights are relative to from now
 * on, in *most; returns what its earlier weights must be multiplied by. */
static ALWAYS_INLINE vec NAME(raise_maximum)(real *m, vec *most, const int natural)
{
    const vec log2e = NAME(fill)((real)1.44269504088896340736);
    const vec none = NAME(fill)(-(real)INFINITY);
    const vec before = NAME(fill)(*m), now = NAME(max)(*most, before);
    *m = now[0];
    /* A row that has seen nothing yet: -inf - -inf would be NaN. */
    *most = NAME(pick)(now == none, (vec){0}, now);
    const vec x = before - *most;
    return NAME(exp2)(natural ? x * log2e : x);
}

/* The vectors [first, last) of a row's scores become weights; returns their sum by lanes. */
static ALWAYS_INLINE vec NAME(row_weights)(real *s, int first, int last, vec most, const int natural)
{
    const vec log2e = NAME(fill)((real)1.44269504088896340736);
    vec sum = {0};
    for (int v = first; v < last; v++) {
        const vec x = NAME(load)(s + v * LANES) - most;
        const vec p = NAME(exp2)(natural ? x * log2e : x);
        NAME(store)(s + v * LANES, p);
        sum += p;
    }
    return sum;
}

/* Softmax: scores of `rows` rows over the vectors [first, last) become weights relative to the new maximum; shrink[r]
 * is what the row's earlier output must be multiplied by. m, l: the group's running maximum and sum. The maximum stays
 * in all lanes of a vector: a detour through memory would cost more than the exponentials of a vector. */
static void NAME(exponentials)(real *s, int rows, int first, int last, const int natural, real *m, real *l,
                               real *shrink)
{
    vec most[ROWS], keep[ROWS];
    /* Row by row, each of these three loops is a chain of latencies; over all rows they overlap. */
    for (int r = 0; r < rows; r++)
        most[r] = NAME(row_maximum)(s + r * FA_BLOCK, first, last);
    for (int r = 0; r < rows; r++) {
        keep[r] = NAME(raise_maximum)(m + r, most + r, natural);
        shrink[r] = keep[r][0];
    }
    for (int r = 0; r < rows; r++) {
        const vec sum = NAME(row_weights)(s + r * FA_BLOCK, first, last, most[r], natural);
        real *l_r = l + r * LANES;
        NAME(store)(l_r, NAME(fma)(NAME(load)(l_r), keep[r], sum));
    }
}

/* ReLU and the sigmoid: weights need no neighbours. l counts the visible keys for ReLU. */
static void NAME(pointwise)(const fa_problem *problem, real *s, int rows, int first, int last, const key_bits *seen,
                            real *l)
{
    const vec infinite = NAME(fill)((real)INFINITY), zero = {0};
    for (int r = 0; r < rows; r++) {
        for (int v = first; v < last; v++) {
            real *s_v = s + r * FA_BLOCK + v * LANES;
            vec x = NAME(load)(s_v), p;
            if (problem->activation == FA_RELU) {
                p = NAME(max)(zero, x);
            } else {
                vec e = NAME(exp2)(NAME(abs)(x) * (real)-1.44269504088896340736);
                p = NAME(pick)(x < zero, e, zero + 1) / (1 + e);
            }
            p = NAME(pick)(x == infinite, x - x, p); /* a visible +inf gives NaN */
            NAME(store)(s_v, p);
        }
        if (problem->activation == FA_RELU)
            l[r * LANES] += (real)bits_count(&seen[r]);
        else
            l[r * LANES] = 1;
    }
}

/* total += x for a total in two parts, the sum and what rounding has taken from it so far (Knuth's TwoSum). */
static ALWAYS_INLINE void NAME(add_exactly)(real *sum, real *lost, vec keep, vec x)
{
    const vec before = NAME(load)(sum) * keep, now = before + x, part = now - before;
    const vec error = (before - (now - part)) + (x - part);
    /* An infinite sum loses nothing; a NaN is in the sum already. */
    NAME(store)(lost, NAME(load)(lost) * keep + NAME(pick)(now - now == (vec){0}, error, (vec){0}));
    NAME(store)(sum, now);
}

/* The state (m, l, o) of a span joins the total of those before it, without an error that would grow with their number.
 * Joining to an empty total changes no bit. */
static void NAME(fold)(real *m_all, real *l_all, real *l_lost, real *o_all, real *o_lost, const real *m, const real *l,
                       const real *o, int64_t rows, int64_t value_row, int natural)
{
    const real unit = natural ? (real)1.44269504088896340736 : 1;
    for (int64_t r = 0; r < rows; r++) {
        const real now = m[r] > m_all[r] ? m[r] : m_all[r];
        const real safe = now == -(real)INFINITY ? 0 : now;
        const vec keep = NAME(exp2)(NAME(fill)((m_all[r] - safe) * unit));
        const vec join = NAME(exp2)(NAME(fill)((m[r] - safe) * unit));
        m_all[r] = now;
        NAME(add_exactly)(l_all + r * LANES, l_lost + r * LANES, keep, NAME(load)(l + r * LANES) * join);
        for (int64_t c = r * value_row; c < (r + 1) * value_row; c += LANES)
            NAME(add_exactly)(o_all + c, o_lost + c, keep, NAME(load)(o + c) * join);
    }
}
