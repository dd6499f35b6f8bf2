/* From scores to weights, block by block: the running maximum and sum of Milakov and Gimelshein (2018), or ReLU or
 * sigmoid in place of the exponential. */

/* The maximum of the vectors [first, last) of a row's scores, in every lane. */
static ALWAYS_INLINE vec row_maximum(const real *s, int first, int last)
{
    const vec none = v_fill(-(real)INFINITY);
    vec x[4] = {none, none, none, none}; /* NaN scores are ignored */
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

/* Updates a row's running maximum *m with new scores of maximum *most. Sets *most to what its weights are relative to
 * from now on; returns the factor for its earlier weights. */
static ALWAYS_INLINE vec raise_maximum(real *m, vec *most, const int natural_log)
{
    const vec log2e = v_fill((real)1.44269504088896340736);
    const vec none = v_fill(-(real)INFINITY);
    const vec before = v_fill(*m), now = v_max(*most, before);
    *m = now[0];
    /* If the row has seen nothing yet, -inf - -inf would be NaN. */
    *most = v_pick(now == none, (vec){0}, now);
    const vec x = before - *most;
    return v_exp2(natural_log ? x * log2e : x);
}

/* Turns the vectors [first, last) of a row's scores into weights; returns their lane-wise sum. */
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

/* Softmax: turns the scores of `rows` rows over the vectors [first, last) into weights relative to the new maximum;
 * shrink[r] is the factor for the row's earlier output. m, l: the group's running maximum and sum. The maximum stays in
 * every lane of a vector: a round trip through memory would cost more than the exponentials of a vector. */
static void exponentials(real *s, int rows, int first, int last, const int natural_log, real *m, real *l, real *shrink)
{
    vec most[ROWS], keep[ROWS];
    /* Row by row each step would wait for the one before; in loops over all rows the latencies overlap. */
    for (int r = 0; r < rows; r++)
        most[r] = row_maximum(s + r * SCORE_ROW, first, last);
    for (int r = 0; r < rows; r++) {
        keep[r] = raise_maximum(m + r, most + r, natural_log);
        shrink[r] = keep[r][0];
    }
    for (int r = 0; r < rows; r++) {
        const vec sum = row_weights(s + r * SCORE_ROW, first, last, most[r], natural_log);
        real *l_r = l + r * LANES;
        v_store(l_r, v_fma(v_load(l_r), keep[r], sum));
    }
}

/* ReLU and sigmoid: weights computed one by one. For ReLU, l counts the visible keys. */
static void pointwise(const fa_problem *problem, real *s, int rows, int first, int last, const key_bits *seen, real *l)
{
    const vec infinite = v_fill((real)INFINITY), zero = {0};
    for (int r = 0; r < rows; r++) {
        for (int v = first; v < last; v++) {
            real *s_v = s + r * SCORE_ROW + v * LANES;
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

/* Turns scores into weights for activations other than softmax. */
static ALWAYS_INLINE void weigh_pointwise(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                          int64_t block, struct visible *visible, real *s, real *l)
{
    make_bits(visible, group);
    pointwise(problem, s, group, visible->lo / LANES, (visible->hi + LANES - 1) / LANES, visible->bits, l);
    if (head->view[FA_WEIGHTS].data)
        keep_weights(problem, head, i, group, block, s);
}
