/* From raw to final scores: the remaining scale, softcap, ALiBi, biases, and hidden keys.
 *
 * Scores are in units of log 2 (the query is multiplied by scale * log2 e) if nothing is added to them, else in nats: a
 * bias such as -FLT_MAX would overflow when multiplied by log2 e. */

/* A slope or a sink. */
static ALWAYS_INLINE double per_row(const fa_head *head, const fa_view *numbers, int64_t i)
{
    double x;
    memcpy(&x, fa_row(head, numbers, i), sizeof x);
    return x;
}

/* Whether scores change between the product and the activation. */
static ALWAYS_INLINE int scores_change(const fa_problem *problem, const fa_head *head)
{
    return problem->softcap != 0 || problem->has_slope || head->view[FA_BIAS].data ||
           head->view[FA_RELATIVE_BIAS].data || scale_after_product(problem) || adds_center(problem);
}

static ALWAYS_INLINE int scores_in_nats(const fa_problem *problem, const fa_head *head)
{
    return problem->activation != FA_SOFTMAX || scores_change(problem, head);
}

/* Sets the scores of keys that are computed but hidden to -inf, even if they are NaN. */
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

/* The same over the vectors [first, last) of a row that sees the keys [from, to). */
static ALWAYS_INLINE void hide_outside(int first, int last, int from, int to, real *s)
{
    const vec hidden = v_fill(-(real)INFINITY);
    const int before = from < last * LANES ? (from + LANES - 1) / LANES : last, behind = to / LANES;
    for (int v = first; v < last; v++) {
        if (v >= before && v < behind)
            v = behind; /* those are all visible */
        if (v < last) {
            const uint64_t seen = bits_below(to - v * LANES) & ~bits_below(from - v * LANES);
            real *s_v = s + v * LANES;
            v_store(s_v, v_pick_bits((unsigned)(seen & bits_below(LANES)), v_load(s_v), hidden));
        }
    }
}

/* Everything between raw score and activation for row i, over the vectors [first, last) of the block at key `block`, if
 * more than hiding is needed. after: factor of the raw score; center: is then added to it. Hidden keys become -inf,
 * even if score or bias is NaN. steep: receives the derivative of the softcap, if that is wanted; else NULL. */
static void apply_rules(const fa_problem *problem, const fa_head *head, int64_t i, int64_t block, int first, int last,
                        double after, real center, key_bits *seen, real *s, real *extra, real *steep)
{
    const vec hidden = v_fill(-(real)INFINITY);
    real *other = extra + FA_BLOCK;
    const int late = after != 1, capped = problem->softcap != 0;
    real cap = 0, per_cap = 0, root = 0, scale = 0; /* computed only if needed: */
    if (capped) {                                   /* this dominates small calls */
        /* A cap beyond these limits changes nothing, or leaves nothing, and its reciprocal would not be a normal
         * number. */
        const double most = BITS == 32 ? 1e30 : 1e290, within = problem->softcap < most ? problem->softcap : most;
        cap = (real)(within > 1 / most ? within : 1 / most);
        per_cap = 1 / cap;
    }
    if (late) {
        root = (real)sqrt(fabs(after)); /* applied in two steps: `after` may be out of range of real */
        scale = (real)(after / (double)root);
    }
    const real slope = problem->has_slope ? (real)per_row(head, &head->view[FA_SLOPES], i) : 0;
    const real distance = (real)(block - (head->offset + fa_query_of(head, i)));
    const int biased = head->view[FA_BIAS].data || head->view[FA_RELATIVE_BIAS].data;
    if (biased) {
        int from, to; /* nothing outside the matrix is read, and of a band only what the row sees */
        rows_range(problem, head, i, 1, block, &from, &to);
        for (int j = first * LANES; j < last * LANES; j++)
            extra[j] = 0;
        if (head->view[FA_BIAS].data && from < to)
            gather(extra + from, fa_row(head, &head->view[FA_BIAS], i) + (block + from) * head->view[FA_BIAS].col,
                   head->view[FA_BIAS].col, to - from, head->view[FA_BIAS].dtype);
        if (head->view[FA_RELATIVE_BIAS].data && from < to) {
            const int64_t in_band = block + from - (head->offset + fa_query_of(head, i)) + problem->left;
            gather(other, fa_row(head, &head->view[FA_RELATIVE_BIAS], i) + in_band * head->view[FA_RELATIVE_BIAS].col,
                   head->view[FA_RELATIVE_BIAS].col, to - from, head->view[FA_RELATIVE_BIAS].dtype);
            for (int j = from; j < to; j++) { /* -inf hides, whatever is added to it; a sum of finite biases does not */
                const real most = BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX, sum = extra[j] + other[j - from];
                const int hides = extra[j] == -(real)INFINITY || other[j - from] == -(real)INFINITY;
                extra[j] = hides ? -(real)INFINITY : sum < -most ? -most : sum;
            }
        }
    }
    for (int v = first; v < last; v++) {
        real *s_v = s + v * LANES;
        unsigned bits = bits_at(seen, v * LANES, LANES);
        vec x = v_load(s_v);
        if (late)
            x = x * root * scale;
        if (center != 0)
            x += center;
        if (capped) {
            const vec part = v_tanh(x * per_cap);
            x = cap * part;
            if (steep)
                v_store(steep + v * LANES, 1 - part * part);
        }
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

/* Applies softcap, biases and masks to the scores of a group, in rows of s_row numbers. after: factors of raw
 * scores, if any; center: what is added to them, or NULL; extra: room for two rows; steep: as in apply_rules. Returns
 * whether terms of the weighted sum include hidden keys. */
static ALWAYS_INLINE int rule_scores(const fa_problem *problem, const fa_head *head, int64_t i, int group,
                                     int64_t block, struct visible *visible, const double *after, const double *center,
                                     real *extra, real *s, const int s_row, real *steep)
{
    const int rules = scores_change(problem, head);
    const int v_first = visible->lo / LANES, v_last = (visible->hi + LANES - 1) / LANES;
    const int term_lo = term_begin(visible->lo), term_hi = term_end(visible->hi);
    int partial = 0;
    if (rules || visible->use_bits) {
        const key_bits whole = bits_of_range(v_first * LANES, v_last * LANES), terms = bits_of_range(term_lo, term_hi);
        make_bits(visible, group);
        for (int r = 0; r < group; r++) {
            if (rules)
                apply_rules(problem, head, i + r, block, v_first, v_last, scale_after_product(problem) ? after[r] : 1,
                            center ? (real)center[r] : 0, &visible->bits[r], s + r * s_row, extra,
                            steep ? steep + r * s_row : NULL);
            else
                hide(&whole, &visible->bits[r], s + r * s_row);
            partial |= !bits_equal(&visible->bits[r], &terms);
        }
    } else if (!visible->same_for_all || v_first * LANES != visible->lo || v_last * LANES != visible->hi) {
        for (int r = 0; r < group; r++) {
            hide_outside(v_first, v_last, visible->from[r], visible->to[r], s + r * s_row);
            partial |= visible->from[r] != term_lo || visible->to[r] != term_hi;
        }
    } /* otherwise whole vectors, all visible: nothing to hide */
    return partial;
}

/* The same in a tile, whose weights, if they are asked for and need the whole row, get the scores until close_tile. */
static ALWAYS_INLINE int rule_tile(const fa_problem *problem, const fa_head *head, int64_t i, int group, int64_t block,
                                   struct visible *visible, struct tile *tile, real *s)
{
    const double *center = adds_center(problem) ? tile->center + (i - tile->row) : NULL;
    const int partial = rule_scores(problem, head, i, group, block, visible, tile->after + (i - tile->row), center,
                                    tile->extra, s, SCORE_ROW, NULL);
    if (head->view[FA_WEIGHTS].data && (problem->activation == FA_SOFTMAX || is_sparse(problem)))
        keep_weights(problem, head, i, group, block, s);
    return partial;
}
