/* The way back through neighbourhood attention: gradients of queries, keys, values, the table of biases, and sinks.
 *
 * Both ways round it is the loop of neighborhood.inc.h, with the same panels, strips, pairs and slots. A pass over
 * *queries* has all scores of a strip at hand, and with them its weights:
 *
 *     slots of keys     query . key, grad_out . value  ->  weights, their mean gradient, gradients of scores
 *                       ->  d_query = sum of (gradient of score) * key, notes of each query, sums for the bias
 *
 * A pass over *keys* has the keys in its lanes, and its slots are the queries that see them: a range along each axis,
 * because kernels move one way. It computes the products again, which has the same bits, and with the notes the
 * weights:
 *
 *     slots of queries  the same products  ->  weights and gradients of scores, one by one
 *                       ->  d_key = sum of (gradient of score) * scaled query, d_value = sum of weight * grad_out
 *
 * So each gradient is a sum in registers by whom it belongs to, in an order that neither tiles nor threads know of, and
 * nothing of pixels x kernel is kept. That costs seven products where keeping would cost five. A pair of query and key
 * that does not take part (hidden, or of a score of -inf, or of weight 0 where most have it) is left out of all sums:
 * `seen` has a bit for each. */

struct image_back {
    struct scene scores, others; /* the scene, for the products query . key and grad_out . value, and sums with them */
    real *notes;                 /* pass over keys: [z][x][FA_NOTES + 1][width], the last as `after` of the scene */
    real *slope;                 /* [2][slots][LANES] derivatives of the softcap; NULL: there is none */
    real *bias;                  /* of the offsets of a strip; then their gradients */
};

/* Lays out what comes behind the scene's own workspace; returns the size of that. */
static size_t lay_back(struct image_back *back, const fa_neighborhood *problem, int of_keys, const struct scene *scene,
                       char *base)
{
    char *at = base + (sizeof(struct image_back) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    const int64_t rows = most_of(scene->key_rows, scene->value_rows) * LANES, panels = scene->planes * scene->rows;
    struct scene *scores = &back->scores, *others = &back->others;
    *scores = *others = *scene;
    scores->values = scene->keys;
    scores->value_rows = scene->key_rows;
    scores->value_channels = whole(problem->head_dim, 4);
    others->keys = scene->values;
    others->key_rows = scene->value_rows;
    others->q = (real *)take(&at, 2 * scene->value_rows * scene->query_row);
    others->s = (real *)take(&at, 2 * scene->slots * LANES);
    scores->o = others->o = (real *)take(&at, 2 * rows);
    scores->lost = others->lost = (real *)take(&at, 2 * rows);
    scores->part = others->part = (real *)take(&at, 2 * rows);
    back->notes = (real *)take(&at, of_keys ? panels * (FA_NOTES + 1) * scene->width : 0);
    back->slope = problem->softcap != 0 ? (real *)take(&at, 2 * scene->slots * LANES) : NULL;
    back->bias = (real *)take(&at, scene->offsets + LANES);
    return (size_t)(at - base);
}

/* Contract: contract.h. */
static size_t neighborhood_back_workspace(const fa_neighborhood *problem, int of_keys, const int64_t *pixels,
                                          const int64_t *tile)
{
    struct scene scene; /* for its size only, as this: */
    struct image_back back;
    char *base = (char *)(uintptr_t)FA_ALIGN;
    const size_t size = lay_scene(&scene, problem, pixels, tile, most_offsets(problem, pixels), of_keys, base);
    return size + lay_back(&back, problem, of_keys, &scene, base);
}

static const char *pixels_of_row(const fa_pixels *array, int64_t head, int64_t z, int64_t x)
{
    return array->data + head * array->head + z * array->space[FA_ALONG_Z] + x * array->space[FA_ALONG_X];
}

/* The row x of plane z of keys and values, or of queries, their gradients and notes, becomes panels. */
static void pack_row_back(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int64_t z,
                          int64_t x, struct image_back *back)
{
    struct scene *scene = &back->scores;
    const int of_keys = image->of_keys;
    const fa_pixels *first = of_keys ? &image->image.query : &image->image.key;
    const fa_pixels *second = of_keys ? &image->grad_out : &image->image.value;
    const int64_t panel = z % scene->planes * scene->rows + x % scene->rows, width = scene->width;
    const int64_t n = image->image.pixels[FA_ALONG_Y], of = of_keys ? head : 0;
    real *k = scene->k + panel * scene->key_rows * width, *v = scene->v + panel * back->others.key_rows * width;
    pack_pixels(first, pixels_of_row(first, of, z, x), problem->head_dim, n, scene->from, width, scene->part, k);
    if (of_keys) {
        real *notes = back->notes + panel * (FA_NOTES + 1) * width;
        const int64_t begin = most_of(0, scene->from), end = least_of(n, scene->from + width);
        const ptrdiff_t step = image->notes.space[FA_ALONG_Y];
        scale_queries(problem, width, width, k, notes + FA_NOTES * width);
        for (int i = 0; i < FA_NOTES; i++)
            gather(notes + i * width + begin - scene->from,
                   pixels_of_row(&image->notes, head, z, x) + begin * step + i * image->notes.col, step, end - begin,
                   REAL_DTYPE);
    }
    scene->values_finite &= panel_is_finite(k, scene->key_rows * width);
    if (of_keys || image->of_scores) {
        pack_pixels(second, pixels_of_row(second, of, z, x), problem->value_dim, n, scene->from, width, scene->part, v);
        back->others.values_finite &= panel_is_finite(v, back->others.key_rows * width);
    }
}

static void pack_for_pair_back(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int64_t first,
                               const struct pair *pair, struct image_back *back)
{
    struct scene *scene = &back->scores;
    for (int64_t z = pair->z_begin; z < pair->z_end; z++) {
        const int64_t place = z % scene->planes;
        if (scene->plane[place] != z) {
            scene->plane[place] = z;
            scene->packed[place] = first;
        }
        for (int64_t *x = scene->packed + place; *x < pair->x_end; ++*x)
            pack_row_back(problem, image, head, z, *x, back);
    }
}

/* The rows of a pair whose pixels lie in the lanes: queries and their gradients, or keys and values. */
static void pack_strips(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int64_t y,
                        const struct pair *pair, struct image_back *back)
{
    const int of_keys = image->of_keys;
    const fa_pixels *first = of_keys ? &image->image.key : &image->image.query;
    const fa_pixels *second = of_keys ? &image->image.value : &image->grad_out;
    const int64_t n = image->image.pixels[FA_ALONG_Y], width = back->scores.query_row, of = of_keys ? 0 : head;
    for (int r = 0; r < pair->strips; r++) {
        real *q = back->scores.q + r * back->scores.key_rows * width;
        real *other = back->others.q + r * back->others.key_rows * width;
        pack_pixels(first, pixels_of_row(first, of, pair->z, pair->x + r), problem->head_dim, n, y, width,
                    back->scores.part, q);
        if (!of_keys)
            scale_queries(problem, width, back->scores.queries, q, back->scores.after + r * back->scores.queries);
        if (image->of_scores)
            pack_pixels(second, pixels_of_row(second, of, pair->z, pair->x + r), problem->value_dim, n, y, width,
                        back->scores.part, other);
    }
}

/* The slots of a strip that it may see: for each plane a run of n, `apart` from one to the next. */
struct runs {
    int64_t runs, first, n, apart;
};

static struct runs runs_of_strip(const struct strip *strip, const struct pair *pair, int r)
{
    const int64_t offsets = strip->offsets;
    return (struct runs){pair->z_end - pair->z_begin, (pair->begin[r] - pair->x_begin) * offsets,
                         (pair->end[r] - pair->begin[r]) * offsets, (pair->x_end - pair->x_begin) * offsets};
}

/* Raw scores of strip r become scores after all rules, and `seen` has the pairs that take part. most: the largest of
 * each lane; count: how many it sees, a score of -inf too. */
static void rule_strip(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int r,
                       const struct strip *strip, const struct pair *pair, struct image_back *back, vec *most,
                       vec *count)
{
    const uint32_t all = (uint32_t)(((uint64_t)1 << LANES) - 1), live = all >> (LANES - strip->lanes);
    const vec none = v_fill(-(real)INFINITY);
    const struct scene *scene = &back->scores;
    const fa_pixels *bias = &image->image.bias;
    const struct score_rules rules = rules_of_strip(problem, pair->after[r]);
    const int late = scale_is_wide(problem->scale), sign = image->of_keys ? -1 : 1;
    const int64_t step = problem->reach[FA_ALONG_Y].dilation, width = scene->width;
    int64_t i = 0;
    vec maximum = none, seen = {0};
    for (int64_t z = pair->z_begin; z < pair->z_end; z++)
        for (int64_t x = pair->x_begin; x < pair->x_end; x++) {
            const int64_t panel = z % scene->planes * scene->rows + x % scene->rows;
            const real *after =
                back->notes + (panel * (FA_NOTES + 1) + FA_NOTES) * width + pair->y - scene->from + strip->low * step;
            const int out = x < pair->begin[r] || x >= pair->end[r];
            if (bias->data && !out) { /* (key - query) along each axis, whichever of them is the strip's */
                const int64_t entry[FA_SPACE] = {z - pair->z, x - pair->x - r, strip->low};
                const char *from = bias->data + head * bias->head;
                for (int axis = 0; axis < FA_SPACE; axis++)
                    from += (sign * entry[axis] + problem->reach[axis].kernel - 1) * bias->space[axis];
                gather(back->bias, from, sign * bias->space[FA_ALONG_Y], strip->offsets, bias->dtype);
            }
            for (int64_t j = 0; j < strip->offsets; j++, i++) {
                real *s = scene->s + (r * scene->slots + i) * LANES;
                vec v = v_load(s);
                uint32_t bits = out ? 0 : pair->sight[j] & live;
                if (late) {
                    const vec root = image->of_keys ? v_load(after + j * step) : rules.after;
                    v = v * root * root;
                }
                if (rules.capped) {
                    const vec t = v_tanh(v * rules.per_cap);
                    v_store(back->slope + (r * scene->slots + i) * LANES, 1 - t * t);
                    v = rules.cap * t;
                }
                if (bias->data && !out) {
                    v += back->bias[j];
                    if (back->bias[j] == -(real)INFINITY)
                        bits = 0;
                }
                if (count)
                    seen += v_pick_bits(bits, v_fill(1), (vec){0});
                bits &= ~v_true_bits(v == none);
                if (bits != all)
                    v = v_pick_bits(bits, v, none);
                scene->seen[r][i] = bits;
                v_store(s, v);
                maximum = v_max(v, maximum); /* NaN does not become the maximum */
            }
        }
    *most = maximum;
    if (count)
        *count = seen;
}

/* From a score, or, of softmax, e^(score - base), to its weight p, and its gradient from that of the weight, dp. */
static ALWAYS_INLINE vec score_gradient(const fa_activation activation, vec x, vec base, vec threshold, vec factor,
                                        vec dp, vec mean, vec *p)
{
    if (activation == FA_SOFTMAX) {
        *p = x * factor;
        return *p * (dp - mean);
    }
    if (activation == FA_RELU) { /* x - x: a visible +inf gives NaN */
        *p = v_max((vec){0}, x) * factor + (x - x);
        return (v_pick(x > (vec){0}, factor, (vec){0}) + (x - x)) * dp;
    }
    if (activation == FA_SIGMOID) {
        const vec e = v_exp2(v_abs(x) * (real)-1.44269504088896340736), share = 1 / (1 + e);
        *p = v_pick(x < (vec){0}, e, v_fill(1)) * share + (x - x);
        return (e * share * share + (x - x)) * dp;
    }
    const int square = activation == FA_ENTMAX15;
    const vec d = v_max((vec){0}, below_largest(square, x, base) - threshold); /* NaN stays */
    *p = (square ? d * d : d) * factor;
    return (square ? d : v_pick(d > (vec){0}, v_fill(1), d)) * (dp - mean);
}

/* The sums over what a lane sees of its weights and of weight * dp; of sparsemax and entmax15 with what their gradients
 * have in place of the weights. Sums of many slots are added exactly. */
static ALWAYS_INLINE void mean_of_slots(const fa_activation activation, const struct runs *runs, vec base,
                                        vec threshold, const uint32_t *seen, const real *s, const real *d, vec *sum,
                                        vec *weighted)
{
    real total[2][LANES], lost[2][LANES];
    memset(total, 0, sizeof total);
    memset(lost, 0, sizeof lost);
    for (int64_t run = 0; run < runs->runs; run++)
        for (int64_t j = 0; j < runs->n; j += SUM_SLOTS) {
            const int64_t first = runs->first + run * runs->apart + j, some = least_of(runs->n - j, SUM_SLOTS);
            vec weights = {0}, products = {0};
            for (int64_t i = first; i < first + some; i++) {
                const vec none = {0}, dp = d ? v_load(d + i * LANES) : none;
                vec p, g = v_load(s + i * LANES);
                if (activation != FA_SOFTMAX)
                    g = score_gradient(activation, g, base, threshold, v_fill(1), v_fill(1), none, &p);
                g = v_pick_bits(seen[i], g, none);
                weights += g;
                products = v_fma(g, v_pick_bits(seen[i], dp, none), products);
            }
            add_exactly(total[0], lost[0], v_fill(1), weights);
            add_exactly(total[1], lost[1], v_fill(1), products);
        }
    *sum = v_load(total[0]) + v_load(lost[0]);
    *weighted = v_load(total[1]) + v_load(lost[1]);
}

/* The gradients of the scores of n slots, of which those of the weights are in d, and the scores (of softmax: what
 * e^(score - base) is) in s; both are replaced, d by the weights. notes: of slot 0 of a pass over keys, each slot's
 * `step` further; else `own` of the strip. */
static ALWAYS_INLINE void differentiate(const fa_activation activation, int64_t n, const vec *own, const real *notes,
                                        int64_t step, int64_t width, int late, const real *slope, uint32_t *seen,
                                        real *s, real *d)
{
    const uint32_t all = (uint32_t)(((uint64_t)1 << LANES) - 1);
    for (int64_t i = 0; i < n; i++) {
        vec x = v_load(s + i * LANES), p, note[FA_NOTES];
        uint32_t bits = seen[i];
        UNROLL(4)
        for (int k = 0; k < FA_NOTES; k++)
            note[k] = notes ? v_load(notes + i * step + k * width) : own[k];
        if (notes && activation == FA_SOFTMAX)
            x = v_exp2((x - note[FA_NOTE_BASE]) * (real)1.44269504088896340736);
        vec g = score_gradient(activation, x, note[FA_NOTE_BASE], note[FA_NOTE_THRESHOLD], note[FA_NOTE_FACTOR],
                               v_load(d + i * LANES), note[FA_NOTE_MEAN], &p);
        if (activation == FA_SPARSEMAX || activation == FA_ENTMAX15)
            seen[i] = bits &= v_true_bits(p != (vec){0});
        if (bits != all) {
            p = v_pick_bits(bits, p, (vec){0});
            g = v_pick_bits(bits, g, (vec){0});
        }
        if (notes) { /* else the bias needs them as they are */
            if (slope)
                g *= v_load(slope + i * LANES);
            if (late) {
                const vec root = v_load(notes + i * step + FA_NOTES * width);
                g = g * root * root;
            }
        }
        v_store(s + i * LANES, g);
        v_store(d + i * LANES, p);
    }
}

/* Each alone in its function, so that the usual one is short. */
#define DIFFERENTIATE(name, activation)                                                                          \
    static NEVER_INLINE void name(fa_activation any, int64_t n, const vec *own, const real *notes, int64_t step, \
                                  int64_t width, int late, const real *slope, uint32_t *seen, real *s, real *d)  \
    {                                                                                                            \
        (void)any;                                                                                               \
        differentiate(activation, n, own, notes, step, width, late, slope, seen, s, d);                          \
    }
DIFFERENTIATE(differentiate_softmax, FA_SOFTMAX)
DIFFERENTIATE(differentiate_others, any)
#undef DIFFERENTIATE

/* Adds the gradients of a strip's scores to the table of biases. */
static void add_to_table(const fa_image_back *image, int64_t head, int r, const struct strip *strip,
                         const struct pair *pair, struct image_back *back)
{
    const int64_t *half = image->half, rows = 2 * half[FA_ALONG_X] + 1;
    const int64_t size = (2 * half[FA_ALONG_Z] + 1) * rows * image->table_row;
    real *table = (real *)image->tables + head * fa_table_size(half, image->table_row, LANES);
    const real *s = back->scores.s + r * back->scores.slots * LANES;
    for (int64_t z = pair->z_begin; z < pair->z_end; z++)
        for (int64_t x = pair->x_begin; x < pair->x_end; x++, s += strip->offsets * LANES) {
            if (x < pair->begin[r] || x >= pair->end[r])
                continue;
            real *to =
                table +
                ((z - pair->z + half[FA_ALONG_Z]) * rows + x - pair->x - r + half[FA_ALONG_X]) * image->table_row +
                strip->low + half[FA_ALONG_Y];
            v_store(back->bias + strip->offsets, (vec){0});
            for (int64_t j = 0; j < strip->offsets; j++)
                back->bias[j] = v_total(v_load(s + j * LANES));
            for (int64_t j = 0; j < strip->offsets; j += LANES)
                add_exactly(to + j, to + size + j, v_fill(1), v_load(back->bias + j));
        }
}

/* A strip of queries, all of whose products are there: its notes, the gradients of its scores (in place of scores), and
 * what it adds to bias and sink. */
static void differentiate_queries(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int r,
                                  const struct strip *strip, const struct pair *pair, struct image_back *back)
{
    const fa_activation activation = problem->activation;
    const int sparse = activation == FA_SPARSEMAX || activation == FA_ENTMAX15, square = activation == FA_ENTMAX15;
    const struct scene *scene = &back->scores;
    const struct runs runs = runs_of_strip(strip, pair, r);
    const int64_t y = pair->y, lanes = strip->lanes;
    const fa_pixels *sinks = &image->image.sink;
    real *s = scene->s + r * scene->slots * LANES, *d = back->others.s + r * scene->slots * LANES;
    uint32_t *seen = scene->seen[r];
    vec note[FA_NOTES] = {{0}, {0}, {0}, {0}}, most, count, sum = v_fill(1), weighted = {0};
    double sink = -INFINITY;
    rule_strip(problem, image, head, r, strip, pair, back, &most, activation == FA_RELU ? &count : NULL);
    const vec base = v_pick(most == v_fill(-(real)INFINITY), (vec){0}, most);
    note[FA_NOTE_BASE] = base;
    if (activation == FA_SOFTMAX) {
        for (int64_t run = 0; run < runs.runs; run++)
            for (int64_t i = runs.first + run * runs.apart; i < runs.first + run * runs.apart + runs.n; i++)
                v_store(s + i * LANES, v_exp2((v_load(s + i * LANES) - base) * (real)1.44269504088896340736));
        mean_of_slots(FA_SOFTMAX, &runs, base, base, seen, s, image->of_scores ? d : NULL, &sum, &weighted);
    } else if (activation == FA_RELU) {
        sum = count;
    } else if (sparse) {
        real total[LANES], lost[LANES];
        v_store(total, (vec){0});
        v_store(lost, (vec){0});
        const vec t = threshold_of_slots(square, runs.runs, runs.n, runs.apart, base, s + runs.first * LANES);
        note[FA_NOTE_THRESHOLD] = t;
        for (int64_t run = 0; run < runs.runs; run++)
            for (int64_t i = runs.first + run * runs.apart; i < runs.first + run * runs.apart + runs.n; i++) {
                const vec p = weight_above(square, below_largest(square, v_load(s + i * LANES), base), t, (vec){0});
                seen[i] &= v_true_bits(p != (vec){0});
                add_exactly(total, lost, v_fill(1), v_pick_bits(seen[i], p, (vec){0}));
            }
        sum = v_load(total) + v_load(lost);
    }
    vec factor = v_pick(sum == (vec){0}, (vec){0}, 1 / sum);
    real share[LANES];
    v_store(share, (vec){0});
    if (sinks->data)
        memcpy(&sink, sinks->data + head * sinks->head, sizeof sink);
    if (sink != -INFINITY)
        for (int i = 0; i < lanes; i++) { /* of what the weights add up to, sink included */
            const double keys = sum[i] == 0 ? -INFINITY : (double)base[i] + log((double)sum[i]);
            const double largest = keys < sink ? sink : keys, least = keys < sink ? keys : sink;
            const double lse = least == -INFINITY ? largest : largest + log1p(exp(least - largest));
            factor[i] = (real)(sum[i] == 0 ? 0 : exp(keys - lse) / (double)sum[i]);
            share[i] = (real)exp(sink - lse);
        }
    note[FA_NOTE_FACTOR] = factor;
    if (image->of_scores && activation == FA_SOFTMAX) {
        note[FA_NOTE_MEAN] = weighted * factor;
    } else if (image->of_scores && sparse) {
        vec weights;
        mean_of_slots(activation, &runs, base, note[FA_NOTE_THRESHOLD], seen, s, d, &weights, &weighted);
        note[FA_NOTE_MEAN] = v_pick(weights == (vec){0}, (vec){0}, weighted / weights);
    }
    if (image->grad_lse.data) {
        real gradients[LANES];
        v_store(gradients, (vec){0});
        gather(gradients,
               pixels_of_row(&image->grad_lse, head, pair->z, pair->x + r) + y * image->grad_lse.space[FA_ALONG_Y],
               image->grad_lse.space[FA_ALONG_Y], lanes, image->grad_lse.dtype);
        note[FA_NOTE_MEAN] -= v_load(gradients);
    }
    if (image->notes.data)
        for (int k = 0; k < FA_NOTES; k++) {
            real numbers[LANES];
            v_store(numbers, note[k]);
            scatter((char *)(uintptr_t)pixels_of_row(&image->notes, head, pair->z, pair->x + r) +
                        y * image->notes.space[FA_ALONG_Y] + k * image->notes.col,
                    image->notes.space[FA_ALONG_Y], numbers, lanes, REAL_DTYPE);
        }
    if (image->of_sinks && sink != -INFINITY) {
        const uint32_t live = (uint32_t)((uint64_t)1 << lanes) - 1;
        real *to = (real *)image->tables + (head + 1) * fa_table_size(image->half, image->table_row, LANES) - 2 * LANES;
        add_exactly(to, to + LANES, v_fill(1), v_pick_bits(live, -v_load(share) * note[FA_NOTE_MEAN], (vec){0}));
    }
    if (!image->of_scores)
        return;
    for (int64_t run = 0; run < runs.runs; run++) {
        const int64_t i = runs.first + run * runs.apart;
        if (activation == FA_SOFTMAX)
            differentiate_softmax(activation, runs.n, note, NULL, 0, 0, 0, NULL, seen + i, s + i * LANES,
                                  d + i * LANES);
        else
            differentiate_others(activation, runs.n, note, NULL, 0, 0, 0, NULL, seen + i, s + i * LANES, d + i * LANES);
    }
    if (image->of_bias)
        add_to_table(image, head, r, strip, pair, back);
    for (int64_t i = 0; i < runs.runs * runs.apart && back->slope; i++)
        v_store(s + i * LANES, v_load(s + i * LANES) * v_load(back->slope + (r * scene->slots + i) * LANES));
}

/* The same for a strip of keys, from the notes of the queries that see it; the weights are there then, too. */
static void differentiate_keys(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int r,
                               const struct strip *strip, const struct pair *pair, struct image_back *back)
{
    const fa_activation activation = problem->activation;
    const struct scene *scene = &back->scores;
    const vec none[FA_NOTES] = {{0}}; /* each slot has its own */
    const int64_t step = problem->reach[FA_ALONG_Y].dilation, n = strip->offsets;
    const int late = scale_is_wide(problem->scale);
    int64_t i = r * scene->slots, first = 0;
    vec most;
    rule_strip(problem, image, head, r, strip, pair, back, &most, NULL);
    for (int64_t z = pair->z_begin; z < pair->z_end; z++)
        for (int64_t x = pair->x_begin; x < pair->x_end; x++, i += n, first += n) {
            const int64_t panel = z % scene->planes * scene->rows + x % scene->rows;
            const real *notes =
                back->notes + panel * (FA_NOTES + 1) * scene->width + pair->y - scene->from + strip->low * step;
            const real *slope = back->slope ? back->slope + i * LANES : NULL;
            real *s = scene->s + i * LANES, *d = back->others.s + i * LANES;
            if (activation == FA_SOFTMAX)
                differentiate_softmax(activation, n, none, notes, step, scene->width, late, slope,
                                      scene->seen[r] + first, s, d);
            else
                differentiate_others(activation, n, none, notes, step, scene->width, late, slope,
                                     scene->seen[r] + first, s, d);
        }
}

/* The slots of the rows that strip r does not see, but the other one of the pair does: zeros, where sums read them. */
static void clear_others(const struct strip *strip, const struct pair *pair, int r, struct image_back *back)
{
    const struct runs runs = runs_of_strip(strip, pair, r);
    real *s = back->scores.s + r * back->scores.slots * LANES;
    for (int64_t run = 0; run < runs.runs; run++)
        for (int64_t i = 0; i < runs.apart; i++)
            if (i < runs.first || i >= runs.first + runs.n)
                v_store(s + (run * runs.apart + i) * LANES, (vec){0});
}

/* The sums of a pair, times `scale`, to where they belong. */
static void write_sums(const fa_pixels *to, int64_t head, const struct strip *strip, const struct pair *pair,
                       int64_t channels, double scale, int add, const struct scene *scene)
{
    const int in_double = scale_is_wide(scale);
    for (int r = 0; r < pair->strips; r++) {
        real *o = scene->o + r * scene->value_rows * LANES;
        for (int64_t i = 0; i < channels * LANES; i += LANES) {
            vec x = v_load(o + i);
            if (in_double)
                for (int j = 0; j < LANES; j++)
                    x[j] = (real)((double)x[j] * scale);
            else
                x *= (real)scale;
            v_store(o + i, x + (vec){0}); /* no -0 */
        }
        write_strip(to, head, pair->z, pair->x + r, pair->y, strip->lanes, channels, scene->value_rows, add, o,
                    scene->part);
    }
}

/* One head of a pair of strips, number `number` of their rows, from packed pixels to gradients. */
static void differentiate_pair(const fa_neighborhood *problem, const fa_image_back *image, int64_t head, int64_t number,
                               struct pair *pair, struct scene *scene, struct image_back *back)
{
    const struct strip *strip = scene->strips + number;
    struct scene *scores = &back->scores, *others = &back->others;
    const int of_keys = image->of_keys, strips = pair->strips;
    pair->slots = (pair->z_end - pair->z_begin) * (pair->x_end - pair->x_begin) * strip->offsets;
    pair->sight = scene->sight + number * scene->offsets;
    list_slots(problem, strip, pair, scene);
    score_slots(scores, scores->q + number * LANES, problem->head_dim, pair->slots, strips);
    if (image->of_scores)
        score_slots(others, others->q + number * LANES, problem->value_dim, pair->slots, strips);
    for (int r = 0; r < strips; r++) {
        pair->after[r] = of_keys ? v_fill(1) : v_load(scores->after + r * scores->queries + number * LANES);
        if (of_keys)
            differentiate_keys(problem, image, head, r, strip, pair, back);
        else
            differentiate_queries(problem, image, head, r, strip, pair, back);
    }
    if (!of_keys && image->d_query.data) {
        for (int r = 0; r < strips; r++)
            clear_others(strip, pair, r, back);
        sum_slots(scores, pair->slots, strips, !scores->values_finite, 1);
        write_sums(&image->d_query, head, strip, pair, problem->head_dim, problem->scale,
                   image->add_query || (head && !image->d_query.head), scores);
    }
    if (of_keys && image->d_key.data) {
        sum_slots(scores, pair->slots, strips, !scores->values_finite, 1);
        write_sums(&image->d_key, head, strip, pair, problem->head_dim, 1,
                   image->add_key || (head && !image->d_key.head), scores);
    }
    if (of_keys && image->d_value.data) {
        sum_slots(others, pair->slots, strips, !others->values_finite, 1);
        write_sums(&image->d_value, head, strip, pair, problem->value_dim, 1,
                   image->add_value || (head && !image->d_value.head), others);
    }
}

/* Contract: contract.h. */
static void neighborhood_back(const fa_neighborhood *problem, const fa_image_back *image, const int64_t *begin,
                              const int64_t *end, void *workspace)
{
    struct scene *scene = workspace;
    const int of_keys = image->of_keys;
    const int64_t heads = image->image.heads, at_once = of_keys ? 1 : heads;
    const size_t size = open_scene(problem, &image->image, begin, end, of_keys, scene);
    struct image_back *back = (struct image_back *)((char *)workspace + size);
    int64_t first, unused;
    struct pair pair;
    lay_back(back, problem, of_keys, scene, (char *)back);
    memset(back->others.q, 0, (size_t)(2 * scene->value_rows * scene->query_row) * sizeof(real));
    if (of_keys)
        memset(back->notes, 0, (size_t)(scene->planes * scene->rows * (FA_NOTES + 1) * scene->width) * sizeof(real));
    look(&problem->reach[FA_ALONG_X], image->image.pixels[FA_ALONG_X], begin[FA_ALONG_X], of_keys, &first, &unused);
    for (int64_t head = 0; head < heads; head += at_once) {
        for (int64_t z = 0; z < scene->planes; z++)
            scene->plane[z] = -1;
        for (int64_t z = begin[FA_ALONG_Z]; z < end[FA_ALONG_Z]; z++)
            for (int64_t x = begin[FA_ALONG_X]; x < end[FA_ALONG_X]; x += 2) {
                look_at_pair(problem, &image->image, z, x, x + 1 < end[FA_ALONG_X] ? 2 : 1, of_keys, &pair);
                pack_for_pair_back(problem, image, head, first, &pair, back);
                for (int64_t h = head; h < head + at_once; h++) {
                    pack_strips(problem, image, h, begin[FA_ALONG_Y], &pair, back);
                    for (int64_t i = 0; i < scene->queries / LANES; i++) {
                        pair.y = begin[FA_ALONG_Y] + i * LANES;
                        differentiate_pair(problem, image, h, i, &pair, scene, back);
                    }
                }
            }
    }
}
