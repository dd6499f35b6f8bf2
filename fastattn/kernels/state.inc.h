/* The running state of a group of rows, maximum m, sum l and output o: for one span of keys, and the exact total of the
 * spans before it. */

/* total = total * keep + x for a total kept as a sum and its accumulated rounding error (Knuth's TwoSum). */
static ALWAYS_INLINE void add_exactly(real *sum, real *lost, vec keep, vec x)
{
    const vec before = v_load(sum) * keep, now = before + x, part = now - before;
    const vec error = (before - (now - part)) + (x - part);
    /* If the sum is infinite or NaN, the error would be NaN. */
    v_store(lost, v_load(lost) * keep + v_pick(now - now == (vec){0}, error, (vec){0}));
    v_store(sum, now);
}

/* Adds the state (m, l, o) of a span to the total of those before it, with an error that does not grow with their
 * number. Adding it to an empty total changes no bit. */
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

static void reset_state(const fa_problem *problem, int64_t rows, real *m, real *l)
{
    const real least = problem->activation == FA_SOFTMAX ? -(real)INFINITY : 0; /* others need no maximum */
    for (int64_t r = 0; r < rows; r++)
        m[r] = least;
    memset(l, 0, (size_t)(rows * LANES) * sizeof(real));
}

/* Rows of the group that begins at row `first` of a tile. */
static ALWAYS_INLINE int rows_from(const struct tile *tile, int64_t first, int64_t rows)
{
    return rows - first < tile->group ? (int)(rows - first) : tile->group;
}

/* Clears the outputs of groups that have seen nothing. */
static void clear_unseen(int64_t rows, struct tile *tile)
{
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->span[g] == NO_SPAN)
            memset(tile->o + first * tile->value_row, 0,
                   (size_t)(rows_from(tile, first, rows) * tile->value_row) * sizeof(real));
}

/* Adds the state of group g, which starts at row `first`, to the total of the spans before it. */
static NEVER_INLINE void end_span(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                                  struct tile *tile)
{
    const int64_t value_row = tile->value_row, l = first * LANES, o = first * value_row;
    if (!tile->many_spans[g]) {
        reset_state(problem, group, tile->m_all + first, tile->l_all + l);
        memset(tile->o_all + o, 0, (size_t)(group * value_row) * sizeof(real));
        memset(tile->l_error + l, 0, (size_t)(group * LANES) * sizeof(real));
        memset(tile->o_error + o, 0, (size_t)(group * value_row) * sizeof(real));
        tile->many_spans[g] = 1;
    }
    fold(tile->m_all + first, tile->l_all + l, tile->l_error + l, tile->o_all + o, tile->o_error + o, tile->m + first,
         tile->l + l, tile->o + o, group, value_row, scores_in_nats(problem, head));
}

/* Sets the state of a group that has seen several spans to their total. */
static void take_totals(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                        struct tile *tile)
{
    end_span(problem, head, g, first, group, tile);
    for (int64_t r = first; r < first + group; r++)
        tile->m[r] = tile->m_all[r];
    for (int64_t c = first * LANES; c < (first + group) * LANES; c += LANES)
        v_store(tile->l + c, v_load(tile->l_all + c) + v_load(tile->l_error + c));
    for (int64_t c = first * tile->value_row; c < (first + group) * tile->value_row; c += LANES)
        v_store(tile->o + c, v_load(tile->o_all + c) + v_load(tile->o_error + c));
}

/* Starts span `span` for a group, unless its state already belongs to it; returns whether it did. */
static ALWAYS_INLINE int begin_span(const fa_problem *problem, const fa_head *head, int64_t g, int64_t first, int group,
                                    int64_t span, struct tile *tile)
{
    int64_t *own = tile->span + g;
    if (*own == span)
        return 0;
    if (*own != NO_SPAN) {
        end_span(problem, head, g, first, group, tile);
        reset_state(problem, group, tile->m + first, tile->l + first * LANES);
    }
    *own = span;
    return 1;
}

/* Sets the state of a tile to the total of all keys. */
static void gather_spans(const fa_problem *problem, const fa_head *head, int64_t rows, struct tile *tile)
{
    clear_unseen(rows, tile);
    for (int64_t g = 0, first = 0; first < rows; g++, first += tile->group)
        if (tile->many_spans[g])
            take_totals(problem, head, g, first, rows_from(tile, first, rows), tile);
}

/* The factor for the weighted sum of row r of the tile, 0 if it has seen nothing; and the row's log-sum-exp. */
static ALWAYS_INLINE real row_factor(const fa_problem *problem, const fa_head *head, int64_t r, const struct tile *tile,
                                     const int natural_log, double *lse, int *seen)
{
    real sum = v_total(v_load(tile->l + r * LANES));
    if (problem->activation == FA_SIGMOID)
        sum = sum > 0; /* its weights are not normalised */
    double share = 1;  /* of the keys in the sum of exponentials, sink included */
    *seen = sum != 0;
    *lse = sum == 0 ? -INFINITY : 0;
    if (head->view[FA_LSE].data || problem->has_sink) {
        if (sum != 0)
            *lse = (double)tile->m[r] * (natural_log ? 1 : 0.69314718055994530942) + log((double)sum) +
                   (problem->has_center && !adds_center(problem) ? tile->center[r] : 0);
        const double sink = problem->has_sink ? per_row(head, &head->view[FA_SINKS], tile->row + r) : -INFINITY;
        if (sink != -INFINITY) {
            const double keys_lse = *lse;
            const double most = keys_lse < sink ? sink : keys_lse; /* NaN scores propagate */
            const double least = keys_lse < sink ? keys_lse : sink;
            *lse = least == -INFINITY ? most : most + log1p(exp(least - most));
            share = exp(keys_lse - *lse);
        }
    }
    return sum == 0 ? 0 : (real)(share / (double)sum);
}
