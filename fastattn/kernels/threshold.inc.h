/* sparsemax (Martins and Astudillo 2016) and 1.5-entmax (Peters, Niculae and Martins 2019) of a row of numbers x:
 * weights max(z - t, 0) with z = x - max x, or, `square`, max(z - t, 0)**2 with z = (x - max x) / 2, and the one t for
 * which they sum to 1.
 *
 * The sum falls with t and is convex, so Newton's method needs no sorting: from t = -1, where the largest number alone
 * has weight 1, it rises to the root from below. Of squares it takes the root of the sum, which is convex too and
 * nearer to a line. What is not above t has weight 0 from then on and need not be looked at again.
 *
 * Sums are by lanes, number j of a row in lane j % LANES, and in the row's order; so leaving a number out, or adding
 * its 0, is the same to the bit: a row's bits do not depend on what is hidden in it, nor on who looks at it in which
 * loop.
 */

/* What a pass over a row finds out about the numbers above t, by lanes. */
struct distances {
    vec sum;   /* of their weights */
    vec lost;  /* what rounding has taken from it, in the last pass */
    vec other; /* square: the sum of their distances; else the least of them, at most 1 */
};

static ALWAYS_INLINE struct distances no_distances(const int square)
{
    return (struct distances){{0}, {0}, square ? (vec){0} : v_fill(1)};
}

static ALWAYS_INLINE vec below_largest(const int square, vec x, vec base)
{
    const vec z = x - base;
    return square ? z * (real)0.5 : z;
}

/* above: v_above_bits(z, t). */
static ALWAYS_INLINE void add_distances(const int square, vec z, vec t, unsigned above, const int last,
                                        struct distances *to)
{
    const vec d = v_max((vec){0}, z - t); /* NaN stays */
    vec weight = square ? d * d : d;
    HOLD(weight); /* rounded, whatever is done with it */
    const vec before = to->sum, now = before + weight;
    if (last) {
        const vec part = now - before;
        to->lost += (before - (now - part)) + (weight - part);
    }
    to->sum = now;
    if (square)
        to->other += d;
    else if (!last)
        to->other = v_min(v_pick_bits(above, d, v_fill(1)), to->other);
}

/* A row on its way to its threshold. */
struct search {
    real t, rest;
    int last; /* whether the next pass is the last one, at the end of which t stays, and rest is what it lacks */
};

/* From what a pass has found to the next t; other: the sum, or the least, of `other`; count: how many are above t.
 * Whether another pass is needed. */
static ALWAYS_INLINE int next_threshold(const int square, double sum, double other, double count, struct search *search)
{
    const double eps = BITS == 32 ? (double)FLT_EPSILON : DBL_EPSILON;
    double step = 0; /* there may be nothing to add up */
    if (sum != 0)
        step = square ? (sum - sqrt(sum)) / other : (sum - 1) / count;
    if (search->last) {
        search->rest = (real)step;
        return 0;
    }
    const real next = (real)((double)search->t + step);
    if (next > search->t) {
        /* After this step t lacks at most count * step**2, and a square of that after the next one; or nothing, if what
         * is above t stays there. */
        const double lacks = count * step * step;
        search->last = square ? lacks * lacks * count <= eps / 8 : step <= other;
        search->t = next;
    } else {
        search->last = 1; /* NaN ends it, too */
    }
    return 1;
}

static ALWAYS_INLINE vec weight_above(const int square, vec z, vec t, vec rest)
{
    const vec d = v_max((vec){0}, (z - t) - rest);
    return square ? d * d : d;
}

/* One pass over a list of vectors of z; those that are not above t leave it. Returns how many stay. place: goes with
 * the list, or NULL. */
static ALWAYS_INLINE int64_t pass_over(const int square, real *z, uint32_t *place, int64_t n, real t, const int last,
                                       struct distances *sums, double *count)
{
    struct distances found = no_distances(square);
    int64_t stay = 0, above = 0;
    for (int64_t i = 0; i < n; i++) {
        const vec z_i = v_load(z + i * LANES);
        const unsigned bits = v_above_bits(z_i, v_fill(t));
        add_distances(square, z_i, v_fill(t), bits, last, &found);
        v_store(z + stay * LANES, z_i);
        place[stay] = place[i];
        stay += bits != 0;
        above += __builtin_popcount(bits);
    }
    *sums = found;
    *count = (double)above;
    return stay;
}

/* Totals of the lanes, and the next t. */
static ALWAYS_INLINE int next_by_lanes(const int square, const struct distances *sums, double count, double *total,
                                       struct search *search)
{
    double other = 0;
    if (square)
        other = (double)v_total(sums->other);
    else if (!search->last)
        other = -(double)v_spread_max(-sums->other)[0];
    *total = (double)v_total(sums->sum);
    if (search->last)
        *total += (double)v_total(sums->lost);
    return next_threshold(square, *total, other, count, search);
}

/* A row's vectors of z, all that hold a number above -1, and what comes of them. */
struct list {
    real *z;         /* weights in the end */
    uint32_t *place; /* goes with them */
    int64_t n;
    double total; /* of the weights */
    struct search search;
    int done;
};

enum { LISTS_AT_ONCE = 4 };

/* Finds the t of each list, and makes weights of it; what has no weight leaves the list. Rows take turns: a single one
 * is a chain of latencies. */
static ALWAYS_INLINE void weigh_lists(const int square, struct list *lists, int rows)
{
    int more;
    for (int r = 0; r < rows; r++) {
        lists[r].search = (struct search){-1, 0, 0};
        lists[r].done = 0;
    }
    do {
        more = 0;
        for (struct list *list = lists; list < lists + rows; list++) {
            struct distances sums;
            double count;
            if (list->done)
                continue;
            if (list->search.last)
                list->n = pass_over(square, list->z, list->place, list->n, list->search.t, 1, &sums, &count);
            else
                list->n = pass_over(square, list->z, list->place, list->n, list->search.t, 0, &sums, &count);
            list->done = !next_by_lanes(square, &sums, count, &list->total, &list->search);
            more |= !list->done;
        }
    } while (more);
    for (struct list *list = lists; list < lists + rows; list++) {
        const vec t = v_fill(list->search.t), rest = v_fill(list->search.rest);
        int64_t stay = 0;
        for (int64_t i = 0; i < list->n; i++) {
            const vec weights = weight_above(square, v_load(list->z + i * LANES), t, rest);
            v_store(list->z + stay * LANES, weights);
            list->place[stay] = list->place[i];
            stay += v_above_bits(weights, (vec){0}) != 0;
        }
        list->n = stay;
    }
}
