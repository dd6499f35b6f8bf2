/* Neighbourhood attention: pixels against the pixels around them.
 *
 * LANES queries side by side along y are a *strip*, one in each lane. Keys and values are packed channels first, so
 * that the keys that lie o pixels further, for all queries of the strip, are one load at an offset: a *slot*. All that
 * follows is vertical: the scores of a slot are a vector, and so are maximum, sum and output. Two strips, of the rows x
 * and x + 1 (a *pair*), share the loads, because nearly all of their rows of keys are the same.
 *
 *     pack keys and values of the tile  ->  for each pair of strips: list the slots -> scores -> weights -> sums -> out
 *
 * Where the lanes of a strip do not all see a slot (at the edges, and with a stride), it is one more slot, hidden from
 * some. Strips, pairs and slots follow from the image's size alone, so bits do not depend on the tile. */

enum {
    SLOTS = VECS >= 4 ? 8 : 6,        /* whose scores for two strips stay in registers */
    SUM_CHANNELS = VECS >= 4 ? 8 : 4, /* whose sums for two strips do */
    LONE_CHANNELS = 8,                /* and for one strip */
    SCORE_CHANNELS = 32,              /* products that are added one after the other */
    SUM_SLOTS = 128,                  /* the same of weighted values; longer sums are added exactly */
    PANEL_STEP = 8                    /* columns of a panel are a multiple of this */
};
_Static_assert(SLOTS % 2 == 0 && LONE_CHANNELS % 4 == 0 && SUM_CHANNELS % 4 == 0, "halves and quarters");

/* One strip: what its lanes see along y. */
struct strip {
    int lanes;                        /* in use */
    int64_t low, offsets;             /* offsets of its slots: low, low + 1, ... */
    int64_t own[LANES];               /* the offset of the first key of the kernel of each lane */
    int64_t begin[LANES], end[LANES]; /* offsets that it sees */
};

/* One tile: sizes, what lies where in its workspace, and what all of its strips share. */
struct scene {
    int64_t key_rows, value_rows; /* channels of a panel in memory: whole vectors, of which v_transpose writes all */
    int64_t value_channels;       /* channels that are summed */
    int64_t width;                /* columns of a panel */
    int64_t from;                 /* the pixel in column 0 */
    int64_t planes, rows;         /* of panels: a ring of those that are still seen along each axis */
    int64_t *plane, *packed;      /* [planes] whose panels stand there, and up to which row of keys they are packed */
    int values_finite;            /* of all that is packed */
    real *k, *v;                  /* [z][x][channel][width] */
    int64_t queries, query_row;   /* queries of a row of the tile; columns of their panel */
    real *q;                      /* [2][key_rows][query_row] two rows of them, scaled */
    real *after;                  /* [2][queries] their scores are multiplied by it, twice */
    struct strip *strips;         /* [queries / LANES] */
    real *s;                      /* [2][slots][LANES] their scores, then weights */
    real *o, *lost;               /* [2][value_rows][LANES] outputs, and what rounding has taken from them */
    real *part;                   /* the same of some slots, and the scratch in which pixels are turned round */
    const real **keys, **values;  /* [slots] */
    uint32_t
        *seen[2]; /* [slots] the lanes that see it (idle lanes: all); where values are not finite, or for weights */
    uint32_t *dead[2]; /* [slots] those whose score is -inf; only for weights */
    uint32_t *sight;   /* [queries / LANES][offsets] the lanes that see an offset */
    int64_t offsets;   /* room for them */
    real *kept;        /* [2][value_rows][LANES] outputs, where not all are finite */
    int64_t slots;     /* room for them, for each strip */
};

/* One or two strips that are taken together, of the rows x and x + 1. */
struct pair {
    int64_t z, x, y;
    int strips;
    int64_t z_begin, z_end;   /* planes of keys that they see */
    int64_t x_begin, x_end;   /* rows of keys that any of them sees */
    int64_t begin[2], end[2]; /* and each */
    int64_t slots;            /* [z][x][offset] */
    const uint32_t *sight;    /* [offset] the lanes that see it */
    vec after[2];             /* scores are multiplied by it, twice */
    vec maximum[2], sum[2];   /* of scores; of weights, or how many keys are seen (ReLU) */
    vec factor[2];            /* what sums are multiplied by in the end */
};

static ALWAYS_INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
static ALWAYS_INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static ALWAYS_INLINE int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* The pixels [*begin, *end) that see pixel i along an axis of n, perhaps none. Where pixels begin and end to see does
 * not fall from one to the next, and none sees another that is a whole kernel away. */
static void seen_by(const fa_reach *reach, int64_t n, int64_t i, int64_t *begin, int64_t *end)
{
    const int64_t far = least_of(reach->kernel, n);
    int64_t from, to, low = most_of(0, i - far), high = least_of(n, i + far);
    while (low < high) { /* the first that sees a pixel behind i, or i */
        const int64_t middle = low + (high - low) / 2;
        fa_neighbors(reach, n, middle, &from, &to);
        if (to > i)
            high = middle;
        else
            low = middle + 1;
    }
    *begin = low;
    high = least_of(n, i + far);
    while (low < high) { /* the first that sees only what is behind i */
        const int64_t middle = low + (high - low) / 2;
        fa_neighbors(reach, n, middle, &from, &to);
        if (from > i)
            high = middle;
        else
            low = middle + 1;
    }
    *end = low;
}

/* The pixels that a query sees, or, of_keys, that see a key; returns where its kernel begins. */
static int64_t look(const fa_reach *reach, int64_t n, int64_t i, int of_keys, int64_t *begin, int64_t *end)
{
    if (!of_keys)
        return fa_neighbors(reach, n, i, begin, end);
    seen_by(reach, n, i, begin, end);
    return *begin;
}

static void look_along_strip(const fa_reach *reach, int64_t pixels, int64_t y, int lanes, int of_keys,
                             struct strip *strip)
{
    const int64_t step = reach->dilation;
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int i = 0; i < lanes; i++) {
        const int64_t at = step == 1 ? y + i : (y + i) / step, rest = y + i - at * step;
        const int64_t n = step == 1 ? pixels : (pixels - rest + step - 1) / step;
        int64_t begin, end;
        strip->own[i] = look(reach, n, at, of_keys, &begin, &end) - at;
        strip->begin[i] = begin - at;
        strip->end[i] = end - at;
        if (begin < end) {
            low = least_of(low, begin - at);
            high = most_of(high, end - at);
        }
    }
    strip->lanes = lanes;
    strip->low = low < high ? low : 0;
    strip->offsets = low < high ? high - low : 0;
}

/* The lanes that see an offset. */
static ALWAYS_INLINE uint32_t lanes_that_see(const struct strip *strip, int64_t offset)
{
    uint32_t bits = ~(uint32_t)0 << strip->lanes;
    for (int i = 0; i < strip->lanes; i++)
        bits |= (uint32_t)(offset >= strip->begin[i] && offset < strip->end[i]) << i;
    return bits & (uint32_t)(((uint64_t)1 << LANES) - 1);
}

/* Rows of keys that `rows` rows of queries may see along an axis of n, or, of_keys, of queries that may see those of
 * keys: half a kernel more where kernels do not leave an edge, and all where both edges are near. */
static int64_t rows_seen(const fa_reach *reach, int64_t n, int64_t rows, int of_keys)
{
    const int64_t kernel = reach->kernel, most = rows - 1 + 2 * (reach->stride - 1) + kernel;
    if (kernel >= n || reach->stride >= n || (of_keys && most + kernel + 2 >= n))
        return n;
    return least_of(n, of_keys ? most + kernel / 2 + 1 : most);
}

/* Lays a tile out from `base` on; returns its size. offsets: the most of all its strips together. */
static size_t lay_scene(struct scene *scene, const fa_neighborhood *problem, const int64_t *pixels, const int64_t *tile,
                        int64_t offsets, int of_keys, char *base)
{
    const fa_reach *z = &problem->reach[FA_ALONG_Z], *x = &problem->reach[FA_ALONG_X];
    const int64_t y_step = problem->reach[FA_ALONG_Y].dilation;
    char *at = base + (sizeof(struct scene) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    const int flat = tile[FA_ALONG_Z] == 1;
    scene->planes = rows_seen(z, pixels[FA_ALONG_Z], 1, of_keys);
    scene->rows = rows_seen(x, pixels[FA_ALONG_X], flat ? 2 : tile[FA_ALONG_X], of_keys);
    scene->queries = whole(tile[FA_ALONG_Y], LANES);
    scene->offsets = offsets;
    const int64_t panels = scene->planes * scene->rows, strips = scene->queries / LANES;
    scene->slots = scene->planes * rows_seen(x, pixels[FA_ALONG_X], 2, of_keys) * offsets + SLOTS;
    scene->key_rows = whole(most_of(problem->head_dim, 1), LANES);
    scene->value_rows = whole(most_of(problem->value_dim, 1), LANES);
    scene->value_channels = whole(problem->value_dim, 4);
    if (scene->value_rows < scene->value_channels)
        scene->value_rows = scene->value_channels;
    if (scene->key_rows < whole(problem->head_dim, 4)) /* on the way back keys are summed, too */
        scene->key_rows = whole(problem->head_dim, 4);
    scene->width = whole(scene->queries + (offsets - 1) * y_step, PANEL_STEP);
    scene->query_row = scene->queries;
    /* Channels would crowd into a few sets of the first cache. */
    if (scene->width * (int64_t)sizeof(real) % 256 == 0)
        scene->width += PANEL_STEP;
    if (scene->query_row * (int64_t)sizeof(real) % 256 == 0)
        scene->query_row += LANES;
    scene->k = (real *)take(&at, panels * scene->key_rows * scene->width);
    scene->v = (real *)take(&at, panels * scene->value_rows * scene->width);
    scene->q = (real *)take(&at, 2 * scene->key_rows * scene->query_row);
    scene->after = (real *)take(&at, 2 * scene->queries);
    scene->strips = (struct strip *)take(&at, strips * (int64_t)(sizeof(struct strip) / sizeof(float)));
    scene->plane = (int64_t *)take(&at, scene->planes * (int64_t)(sizeof(int64_t) / sizeof(float)));
    scene->packed = (int64_t *)take(&at, scene->planes * (int64_t)(sizeof(int64_t) / sizeof(float)));
    scene->s = (real *)take(&at, 2 * scene->slots * LANES);
    scene->o = (real *)take(&at, 2 * scene->value_rows * LANES);
    scene->lost = (real *)take(&at, 2 * scene->value_rows * LANES);
    scene->part = (real *)take(&at, most_of(2 * scene->value_rows, scene->key_rows) * LANES);
    scene->keys = (const real **)take(&at, scene->slots * (int64_t)(sizeof(void *) / sizeof(float)));
    scene->values = (const real **)take(&at, scene->slots * (int64_t)(sizeof(void *) / sizeof(float)));
    scene->sight = (uint32_t *)take(&at, strips * offsets);
    scene->kept = (real *)take(&at, 2 * scene->value_rows * LANES);
    for (int r = 0; r < 2; r++) {
        scene->seen[r] = (uint32_t *)take(&at, scene->slots);
        scene->dead[r] = (uint32_t *)take(&at, scene->slots);
    }
    return (size_t)(at - base);
}

/* The most offsets of all strips together. */
static int64_t most_offsets(const fa_neighborhood *problem, const int64_t *pixels)
{
    const fa_reach *y = &problem->reach[FA_ALONG_Y];
    const int64_t n = (pixels[FA_ALONG_Y] + y->dilation - 1) / y->dilation;
    return 2 * least_of(y->kernel, n) - 1;
}

/* Contract: contract.h. */
static size_t neighborhood_workspace(const fa_neighborhood *problem, const int64_t *pixels, const int64_t *tile)
{
    struct scene scene; /* for its size only */
    return lay_scene(&scene, problem, pixels, tile, most_offsets(problem, pixels), 0, (char *)(uintptr_t)FA_ALIGN);
}

/* The pixels of a row, of n, from pixel `from` on become the columns of a panel; columns where there is no pixel are
 * left as they are. */
static void pack_pixels(const fa_pixels *image, const char *row, int64_t channels, int64_t n, int64_t from,
                        int64_t width, real *turn, real *to)
{
    const int64_t all = whole(most_of(channels, 1), LANES);
    const int64_t begin = most_of(0, from), end = least_of(n, from + width);
    const ptrdiff_t step = image->space[FA_ALONG_Y];
    const int direct =
        image->dtype == REAL_DTYPE && image->col == (ptrdiff_t)sizeof(real) && channels == all && end - begin >= LANES;
    for (int64_t y = begin; y < end; y += LANES) {
        const int64_t first = direct ? least_of(y, end - LANES) : y, live = least_of(LANES, end - first);
        real *column = to + first - from;
        if (direct) {
            for (int64_t c = 0; c < all; c += LANES)
                v_transpose(column + c * width, width, row + first * step + c * (int64_t)sizeof(real), step);
            continue;
        }
        memset(turn, 0, (size_t)(LANES * all) * sizeof(real));
        for (int64_t i = 0; i < live; i++)
            gather(turn + i * all, row + (first + i) * step, image->col, channels, image->dtype);
        for (int64_t c = 0; c < all; c += LANES) {
            if (first - from + LANES <= width) { /* zeros behind the last pixel */
                v_transpose(column + c * width, width, (const char *)(turn + c), all * (ptrdiff_t)sizeof(real));
                continue;
            }
            for (int64_t i = 0; i < live; i++)
                for (int64_t d = c; d < c + LANES; d++)
                    column[d * width + i] = turn[i * all + d];
        }
    }
}

/* Whether n numbers, a multiple of four vectors, are all finite. */
static int panel_is_finite(const real *x, int64_t n)
{
    vec check[4] = {{0}}; /* one would be a chain of latencies */
    for (int64_t i = 0; i < n; i += 4 * LANES) {
        UNROLL(4)
        for (int j = 0; j < 4; j++)
            check[j] = v_fma(v_load(x + i + j * LANES), (vec){0}, check[j]);
    }
    return !v_true_bits(check[0] + check[1] + check[2] + check[3] != (vec){0});
}

/* The row x of plane z of the keys and values. */
static void pack_row(const fa_neighborhood *problem, const fa_image *image, int64_t z, int64_t x, struct scene *scene)
{
    const fa_pixels *key = &image->key, *value = &image->value;
    const int64_t panel = z % scene->planes * scene->rows + x % scene->rows, n = image->pixels[FA_ALONG_Y];
    real *k = scene->k + panel * scene->key_rows * scene->width;
    real *v = scene->v + panel * scene->value_rows * scene->width;
    pack_pixels(key, key->data + z * key->space[FA_ALONG_Z] + x * key->space[FA_ALONG_X], problem->head_dim, n,
                scene->from, scene->width, scene->part, k);
    pack_pixels(value, value->data + z * value->space[FA_ALONG_Z] + x * value->space[FA_ALONG_X], problem->value_dim, n,
                scene->from, scene->width, scene->part, v);
    scene->values_finite &= panel_is_finite(v, scene->value_rows * scene->width);
}

/* All keys and values that a pair sees and that are not packed yet, from row `first` of the tile on. */
static void pack_for_pair(const fa_neighborhood *problem, const fa_image *image, int64_t first, const struct pair *pair,
                          struct scene *scene)
{
    for (int64_t z = pair->z_begin; z < pair->z_end; z++) {
        const int64_t place = z % scene->planes;
        if (scene->plane[place] != z) {
            scene->plane[place] = z;
            scene->packed[place] = first;
        }
        for (int64_t *x = scene->packed + place; *x < pair->x_end; ++*x)
            pack_row(problem, image, z, *x, scene);
    }
}

/* Queries of a row, [channel][n], times the scale. Where that might leave the range of real, each of `columns` keeps a
 * power of two for after the product, as pack_wide_queries has it; `after` is its root. */
static void scale_queries(const fa_neighborhood *problem, int64_t n, int64_t columns, real *q, real *after)
{
    const int64_t channels = problem->head_dim;
    for (int64_t i = 0; i < columns; i++)
        after[i] = 1;
    if (!scale_is_wide(problem->scale)) {
        const vec scale = v_fill((real)problem->scale);
        for (int64_t i = 0; i < channels * n; i += LANES)
            v_store(q + i, v_load(q + i) * scale);
        return;
    }
    const int most = BITS == 32 ? 100 : 900; /* exponent of a query's largest number */
    for (int64_t i = 0; i < columns; i++) {
        double largest = 0;
        int of_query = 0, of_scale = 0, half = 0;
        for (int64_t c = 0; c < channels; c++) {
            const double size = fabs((double)q[c * n + i]);
            if (size > largest && size < INFINITY)
                largest = size;
        }
        frexp(largest, &of_query);
        frexp(problem->scale, &of_scale);
        const int exponent = of_query + of_scale;
        if (largest > 0 && exponent > most)
            half = (exponent - most + 1) / 2;
        else if (largest > 0 && exponent < -most)
            half = -((-most - exponent + 1) / 2);
        const double factor = ldexp(problem->scale, -2 * half);
        after[i] = (real)ldexp(1, half);
        for (int64_t c = 0; c < channels; c++)
            q[c * n + i] = (real)((double)q[c * n + i] * factor);
    }
}

/* The products of one or two strips of queries with n slots of keys, group after group, over the channels [begin,
 * end). */
static ALWAYS_INLINE void slot_products(const struct scene *scene, const real *q, int64_t first, int64_t groups,
                                        int64_t begin, int64_t end, const int n, const int strips)
{
    const int64_t q_row = scene->query_row, q_next = scene->key_rows * q_row, s_next = scene->slots * LANES;
    const int64_t width = scene->width;
    for (int64_t g = 0; g < groups; g++) {
        const real *const *keys = scene->keys + first + g * n;
        real *s = scene->s + (first + g * n) * LANES;
        vec sum[2 * SLOTS];
        const real *k[SLOTS];
        UNROLL(8)
        for (int i = 0; i < n; i++)
            k[i] = keys[i] + begin * width;
        UNROLL(16)
        for (int i = 0; i < strips * n; i++)
            sum[i] = (vec){0};
        for (int64_t c = 0; c < end - begin; c++) {
            const real *q_c = q + (begin + c) * q_row;
            const vec a = v_load(q_c), b = strips == 2 ? v_load(q_c + q_next) : a;
            UNROLL(8)
            for (int i = 0; i < n; i++) {
                vec k_i = v_load(k[i] + c * width);
                HOLD(k_i);
                sum[i] = v_fma(a, k_i, sum[i]);
                if (strips == 2)
                    sum[n + i] = v_fma(b, k_i, sum[n + i]);
            }
        }
        UNROLL(2)
        for (int r = 0; r < strips; r++) {
            UNROLL(8)
            for (int i = 0; i < n; i++) {
                real *to = s + r * s_next + i * LANES;
                v_store(to, begin ? v_load(to) + sum[r * n + i] : sum[r * n + i]);
            }
        }
    }
}

/* Each alone in its function: registers suffice for one such loop. */
#define SLOT_PRODUCTS(name, n, strips)                                                                     \
    static NEVER_INLINE void name(const struct scene *scene, const real *q, int64_t first, int64_t groups, \
                                  int64_t begin, int64_t end)                                              \
    {                                                                                                      \
        slot_products(scene, q, first, groups, begin, end, n, strips);                                     \
    }
SLOT_PRODUCTS(slot_products_of_pair, SLOTS, 2)
SLOT_PRODUCTS(half_slot_products_of_pair, SLOTS / 2, 2)
SLOT_PRODUCTS(slot_products_of_strip, SLOTS, 1)
#undef SLOT_PRODUCTS

/* All scores of the strips whose first query lies at q; there is room, and an address that can be read, for SLOTS more.
 */
static void score_slots(const struct scene *scene, const real *q, int64_t channels, int64_t slots, int strips)
{
    const int64_t rest = slots % SLOTS, half = strips == 2 && rest && rest <= SLOTS / 2;
    const int64_t groups = slots / SLOTS + (rest && !half);
    int64_t c = 0;
    do {
        const int64_t end = least_of(channels, c + SCORE_CHANNELS);
        if (strips == 1)
            slot_products_of_strip(scene, q, 0, groups, c, end);
        else
            slot_products_of_pair(scene, q, 0, groups, c, end);
        if (half)
            half_slot_products_of_pair(scene, q, groups * SLOTS, 1, c, end);
        c = end;
    } while (c < channels);
}

/* The weighted sums over the slots [begin, end) of n channels for one or two strips. */
static ALWAYS_INLINE void slot_sums(const real *p, int64_t p_next, const real *const *values, int64_t at, int64_t width,
                                    int64_t begin, int64_t end, const int n, const int strips, real *o, int64_t o_next)
{
    vec sum[2 * LONE_CHANNELS];
    UNROLL(16)
    for (int c = 0; c < strips * n; c++)
        sum[c] = (vec){0};
    for (int64_t i = begin; i < end; i++) {
        const real *v = values[i] + at;
        const vec a = v_load(p + i * LANES), b = strips == 2 ? v_load(p + p_next + i * LANES) : a;
        UNROLL(8)
        for (int c = 0; c < n; c++) {
            vec v_c = v_load(v + c * width);
            HOLD(v_c);
            sum[c] = v_fma(a, v_c, sum[c]);
            if (strips == 2)
                sum[n + c] = v_fma(b, v_c, sum[n + c]);
        }
    }
    UNROLL(2)
    for (int r = 0; r < strips; r++) {
        UNROLL(8)
        for (int c = 0; c < n; c++)
            v_store(o + r * o_next + c * LANES, sum[r * n + c]);
    }
}

#define SLOT_SUMS(name, n, strips)                                                                                     \
    static NEVER_INLINE void name(const real *p, int64_t p_next, const real *const *values, int64_t at, int64_t width, \
                                  int64_t begin, int64_t end, real *o, int64_t o_next)                                 \
    {                                                                                                                  \
        slot_sums(p, p_next, values, at, width, begin, end, n, strips, o, o_next);                                     \
    }
SLOT_SUMS(slot_sums_of_pair, SUM_CHANNELS, 2)
SLOT_SUMS(quarter_slot_sums_of_pair, 4, 2)
SLOT_SUMS(slot_sums_of_strip, LONE_CHANNELS, 1)
SLOT_SUMS(quarter_slot_sums_of_strip, 4, 1)
#undef SLOT_SUMS

/* The same for all channels, in the same order, of values times `factor` that are not all finite, or would overflow:
 * of those that are not finite what a lane does not see is left out, because 0 * inf and 0 * NaN are NaN. */
static NEVER_INLINE void slot_sums_of_seen(const struct scene *scene, int64_t begin, int64_t end, int strips,
                                           real factor, real *o)
{
    for (int r = 0; r < strips; r++)
        for (int64_t c = 0; c < scene->value_channels; c++) {
            vec sum = {0};
            for (int64_t i = begin; i < end; i++) {
                vec v = v_load(scene->values[i] + c * scene->width) * factor;
                if (!scene->values_finite)
                    v = v_pick_bits(scene->seen[r][i], v, (vec){0});
                sum = v_fma(v_load(scene->s + (r * scene->slots + i) * LANES), v, sum);
            }
            v_store(o + (r * scene->value_rows + c) * LANES, sum);
        }
}

/* Weights times values, into o; sums of many slots are added exactly, so that the error does not grow with them. */
static void sum_slots(const struct scene *scene, int64_t slots, int strips, int careful, real factor)
{
    const int64_t channels = scene->value_channels, p_next = scene->slots * LANES, o_next = scene->value_rows * LANES;
    for (int64_t begin = 0; begin == 0 || begin < slots; begin += SUM_SLOTS) {
        const int64_t end = least_of(slots, begin + SUM_SLOTS);
        real *to = begin ? scene->part : scene->o;
        if (careful)
            slot_sums_of_seen(scene, begin, end, strips, factor, to);
        for (int64_t c = 0; c < channels && !careful;) {
            const int64_t left = channels - c, at = c * scene->width;
            real *o = to + c * LANES;
            if (strips == 2 && left >= SUM_CHANNELS) {
                slot_sums_of_pair(scene->s, p_next, scene->values, at, scene->width, begin, end, o, o_next);
                c += SUM_CHANNELS;
            } else if (strips == 2) {
                quarter_slot_sums_of_pair(scene->s, p_next, scene->values, at, scene->width, begin, end, o, o_next);
                c += 4;
            } else if (left >= LONE_CHANNELS) {
                slot_sums_of_strip(scene->s, p_next, scene->values, at, scene->width, begin, end, o, o_next);
                c += LONE_CHANNELS;
            } else {
                quarter_slot_sums_of_strip(scene->s, p_next, scene->values, at, scene->width, begin, end, o, o_next);
                c += 4;
            }
        }
        if (begin == 0 && slots > SUM_SLOTS)
            memset(scene->lost, 0, (size_t)(2 * o_next) * sizeof(real));
        for (int r = 0; r < strips && begin; r++)
            for (int64_t i = r * o_next; i < r * o_next + channels * LANES; i += LANES)
                add_exactly(scene->o + i, scene->lost + i, v_fill(1), v_load(scene->part + i));
    }
    for (int r = 0; r < strips && slots > SUM_SLOTS; r++)
        for (int64_t i = r * o_next; i < r * o_next + channels * LANES; i += LANES)
            v_store(scene->o + i, v_load(scene->o + i) + v_load(scene->lost + i));
}

/* What changes a score between product and activation. */
struct score_rules {
    int late, capped;
    real cap, per_cap;
    vec after;
};

static ALWAYS_INLINE struct score_rules rules_of_strip(const fa_neighborhood *problem, vec after)
{
    struct score_rules rules = {0};
    rules.after = after;
    rules.late = v_true_bits(after != v_fill(1)) != 0;
    if (problem->softcap != 0) { /* limits as in apply_rules */
        const double most = BITS == 32 ? 1e30 : 1e290, within = problem->softcap < most ? problem->softcap : most;
        rules.capped = 1;
        rules.cap = (real)(within > 1 / most ? within : 1 / most);
        rules.per_cap = 1 / rules.cap;
    }
    return rules;
}

/* The scores of n slots after all rules, hidden ones -inf; most: the maxima of those before, in two chains. bias: of
 * these slots, or NULL. seen: receives the lanes that see a slot, or NULL; *count, where it is wanted: of such slots.
 */
static ALWAYS_INLINE void rule_slots(const struct score_rules *rules, const real *bias, int64_t n,
                                     const uint32_t *sight, uint32_t *seen, const int plain, vec *most, vec *count,
                                     real *s)
{
    const uint32_t all = (uint32_t)(((uint64_t)1 << LANES) - 1);
    for (int64_t i = 0; i < n; i++) {
        vec x = v_load(s + i * LANES);
        uint32_t bits = sight[i];
        if (!plain) {
            if (rules->late)
                x = x * rules->after * rules->after;
            if (rules->capped)
                x = rules->cap * v_tanh(x * rules->per_cap);
            if (bias) {
                x += bias[i];
                if (bias[i] == -(real)INFINITY)
                    bits = 0;
            }
        }
        if (!plain || bits != all) {
            x = v_pick_bits(bits, x, v_fill(-(real)INFINITY));
            v_store(s + i * LANES, x);
        }
        if (seen)
            seen[i] = bits;
        if (count)
            *count += v_pick_bits(bits, v_fill(1), (vec){0});
        if (i & 1)
            most[1] = v_max(x, most[1]); /* NaN does not become the maximum */
        else
            most[0] = v_max(x, most[0]);
    }
}

/* Scores of n slots become weights; returns their sum. dead: receives the lanes of which the score is -inf, or NULL. */
static ALWAYS_INLINE vec weigh_slots(const fa_activation activation, int64_t n, vec base, uint32_t *dead, real *s)
{
    const real log2e = (real)1.44269504088896340736;
    vec sum = {0};
    for (int64_t i = 0; i < n; i++) {
        const vec x = v_load(s + i * LANES);
        vec p;
        if (dead)
            dead[i] = v_true_bits(x == v_fill(-(real)INFINITY));
        if (activation == FA_SOFTMAX) {
            p = v_exp2((x - base) * log2e);
            sum += p;
        } else {
            if (activation == FA_RELU) {
                p = v_max((vec){0}, x);
            } else {
                const vec e = v_exp2(v_abs(x) * -log2e);
                p = v_pick(x < (vec){0}, e, v_fill(1)) / (1 + e);
            }
            p = v_pick(x == v_fill((real)INFINITY), x - x, p); /* a visible +inf gives NaN */
        }
        v_store(s + i * LANES, p);
    }
    return sum;
}

/* The threshold of sparsemax or (square) entmax15 of each lane: by Newton's method from below (threshold.inc.h), for
 * all lanes at once. The slots are `runs` runs of n, `apart` slots from one to the next. */
static NEVER_INLINE vec threshold_of_slots(const int square, int64_t runs, int64_t n, int64_t apart, vec base,
                                           const real *s)
{
    vec t = v_fill(-1), sum, other;
    unsigned rises;
    do {
        sum = other = (vec){0};
        for (int64_t run = 0; run < runs; run++)
            for (int64_t i = run * apart; i < run * apart + n; i++) {
                const vec d = v_max((vec){0}, below_largest(square, v_load(s + i * LANES), base) - t); /* NaN stays */
                sum += square ? d * d : d;
                other += square ? d : v_pick(d > (vec){0}, v_fill(1), (vec){0});
            }
        const vec next = t + (square ? sum - v_sqrt(sum) : sum - 1) / other;
        rises = v_true_bits(next > t); /* not where t is the root, or there is no number */
        t = v_pick(next > t, next, t);
    } while (rises);
    return t;
}

/* Scores become weights above that threshold; returns their sum. A slot whose weight is 0 is no longer seen. */
static NEVER_INLINE vec weigh_slots_sparsely(const int square, int64_t runs, int64_t n, int64_t apart, vec base,
                                             uint32_t *dead, uint32_t *seen, real *s)
{
    const vec t = threshold_of_slots(square, runs, n, apart, base, s);
    vec sum = {0};
    for (int64_t run = 0; run < runs; run++)
        for (int64_t i = run * apart; i < run * apart + n; i++) {
            const vec x = v_load(s + i * LANES), p = weight_above(square, below_largest(square, x, base), t, (vec){0});
            if (dead)
                dead[i] = v_true_bits(x == v_fill(-(real)INFINITY));
            if (seen)
                seen[i] &= v_true_bits(p != (vec){0});
            sum += p;
            v_store(s + i * LANES, p);
        }
    return sum;
}

/* The biases of n slots of strip r, from offset number `first` of row (z, x) of the keys on. */
static void gather_bias(const fa_neighborhood *problem, const fa_image *image, int64_t head, const struct pair *pair,
                        int r, int64_t z, int64_t x, int64_t offset, int64_t n, real *to)
{
    const fa_pixels *bias = &image->bias;
    const int64_t entry[FA_SPACE] = {z - pair->z, x - pair->x - r, offset};
    const char *from = bias->data + head * bias->head;
    for (int axis = 0; axis < FA_SPACE; axis++)
        from += (entry[axis] + problem->reach[axis].kernel - 1) * bias->space[axis];
    gather(to, from, bias->space[FA_ALONG_Y], n, bias->dtype);
}

/* n slots of which strip r sees nothing. */
static ALWAYS_INLINE void see_nothing(struct scene *scene, int r, int64_t first, int64_t n)
{
    for (int64_t i = first; i < first + n; i++) {
        v_store(scene->s + (r * scene->slots + i) * LANES, (vec){0});
        scene->seen[r][i] = 0;
    }
}

/* Scores of strip r become weights; what it does not see at all, but the other strip of the pair does, gets 0. */
static void weigh_strip(const fa_neighborhood *problem, const fa_image *image, int64_t head, int r,
                        const struct strip *strip, struct pair *pair, struct scene *scene)
{
    const struct score_rules rules = rules_of_strip(problem, pair->after[r]);
    const int plain = !rules.late && !rules.capped && !image->bias.data;
    const int64_t n = strip->offsets, skipped = pair->begin[r] - pair->x_begin, over = pair->x_end - pair->end[r];
    real *s = scene->s + r * scene->slots * LANES, bias[SUM_SLOTS];
    uint32_t *dead = image->weights.data ? scene->dead[r] : NULL;
    uint32_t *seen = image->weights.data || !scene->values_finite ? scene->seen[r] : NULL;
    vec maxima[2] = {v_fill(-(real)INFINITY), v_fill(-(real)INFINITY)}, count = {0};
    vec *counted = problem->activation == FA_RELU ? &count : NULL;
    int64_t i = 0;
    for (int64_t z = pair->z_begin; z < pair->z_end; z++) {
        see_nothing(scene, r, i, skipped * n);
        i += skipped * n;
        for (int64_t x = pair->begin[r]; x < pair->end[r]; x++)
            for (int64_t j = 0; j < n; j += SUM_SLOTS) {
                const int64_t some = least_of(n - j, SUM_SLOTS);
                uint32_t *to = seen ? seen + i : NULL;
                if (image->bias.data)
                    gather_bias(problem, image, head, pair, r, z, x, strip->low + j, some, bias);
                if (plain)
                    rule_slots(&rules, NULL, some, pair->sight + j, to, 1, maxima, counted, s + i * LANES);
                else
                    rule_slots(&rules, image->bias.data ? bias : NULL, some, pair->sight + j, to, 0, maxima, counted,
                               s + i * LANES);
                i += some;
            }
        see_nothing(scene, r, i, over * n);
        i += over * n;
    }
    const vec most = v_max(maxima[0], maxima[1]);
    const vec base = v_pick(most == v_fill(-(real)INFINITY), (vec){0}, most);
    real total[LANES], lost[LANES];
    v_store(total, (vec){0});
    v_store(lost, (vec){0});
    i = 0;
    if (problem->activation == FA_SPARSEMAX || problem->activation == FA_ENTMAX15) {
        const int64_t first = skipped * n, slots = (pair->end[r] - pair->begin[r]) * n;
        pair->maximum[r] = most;
        pair->sum[r] = weigh_slots_sparsely(problem->activation == FA_ENTMAX15, pair->z_end - pair->z_begin, slots,
                                            (pair->x_end - pair->x_begin) * n, base, dead ? dead + first : NULL,
                                            seen ? seen + first : NULL, s + first * LANES);
        return;
    }
    for (int64_t z = pair->z_begin; z < pair->z_end; z++) {
        i += skipped * n;
        for (int64_t j = 0; j < (pair->end[r] - pair->begin[r]) * n; j += SUM_SLOTS) {
            const int64_t some = least_of((pair->end[r] - pair->begin[r]) * n - j, SUM_SLOTS);
            vec sum;
            if (problem->activation == FA_SOFTMAX)
                sum = weigh_slots(FA_SOFTMAX, some, base, dead ? dead + i : NULL, s + i * LANES);
            else
                sum = weigh_slots(problem->activation, some, base, dead ? dead + i : NULL, s + i * LANES);
            add_exactly(total, lost, v_fill(1), sum);
            i += some;
        }
        i += over * n;
    }
    pair->maximum[r] = most;
    pair->sum[r] = problem->activation == FA_SOFTMAX ? v_load(total) + v_load(lost) : counted ? count : v_fill(1);
}

/* What the sums of strip r are to be multiplied by; writes the log-sum-exps. */
static void finish_strip(const fa_image *image, int64_t head, int r, const struct strip *strip, struct pair *pair)
{
    const fa_pixels *lse = &image->lse;
    const vec sum = pair->sum[r];
    pair->factor[r] = v_pick(sum == (vec){0}, (vec){0}, 1 / sum);
    if (!lse->data && !image->sink.data)
        return;
    double sink = -INFINITY;
    if (image->sink.data)
        memcpy(&sink, image->sink.data + head * image->sink.head, sizeof sink);
    for (int i = 0; i < strip->lanes; i++) {
        double all = sum[i] == 0 ? -INFINITY : (double)pair->maximum[r][i] + log((double)sum[i]);
        if (sink != -INFINITY) {
            const double keys = all, most = keys < sink ? sink : keys; /* NaN in the scores stays */
            const double least = keys < sink ? keys : sink;
            all = least == -INFINITY ? most : most + log1p(exp(least - most));
            pair->factor[r][i] = (real)(sum[i] == 0 ? 0 : exp(keys - all) / (double)sum[i]);
        }
        if (lse->data) {
            const real rounded = (real)all;
            memcpy(lse->data + head * lse->head + pair->z * lse->space[FA_ALONG_Z] +
                       (pair->x + r) * lse->space[FA_ALONG_X] + (pair->y + i) * lse->space[FA_ALONG_Y],
                   &rounded, sizeof rounded);
        }
    }
}

/* The weights of strip r that are wanted; the others are 0 already. */
static void write_weights(const fa_neighborhood *problem, const fa_image *image, int64_t head, int r,
                          const struct strip *strip, const struct pair *pair, const struct scene *scene)
{
    const fa_pixels *weights = &image->weights;
    int64_t begin, end;
    const int64_t z_own = fa_neighbors(&problem->reach[FA_ALONG_Z], image->pixels[FA_ALONG_Z], pair->z, &begin, &end);
    const int64_t x_own =
        fa_neighbors(&problem->reach[FA_ALONG_X], image->pixels[FA_ALONG_X], pair->x + r, &begin, &end);
    char *row = weights->data + head * weights->head + pair->z * weights->space[FA_ALONG_Z] +
                (pair->x + r) * weights->space[FA_ALONG_X] + pair->y * weights->space[FA_ALONG_Y];
    int64_t slot = 0;
    for (int64_t z = pair->z_begin; z < pair->z_end; z++)
        for (int64_t x = pair->x_begin; x < pair->x_end; x++)
            for (int64_t j = 0; j < strip->offsets; j++, slot++) {
                const uint32_t seen = scene->seen[r][slot];
                real p[LANES];
                v_store(p, v_load(scene->s + (r * scene->slots + slot) * LANES) * pair->factor[r]);
                for (int i = 0; i < strip->lanes && seen; i++)
                    if (seen >> i & 1 && !(scene->dead[r][slot] >> i & 1))
                        memcpy(row + i * weights->space[FA_ALONG_Y] + (z - z_own) * problem->weights_step[FA_ALONG_Z] +
                                   (x - x_own) * problem->weights_step[FA_ALONG_X] +
                                   (strip->low + j - strip->own[i]) * problem->weights_step[FA_ALONG_Y],
                               p + i, sizeof(real));
            }
}

/* The output of strip r from its sums, or, after sums of smaller values, what of it was not finite before (kept).
 * Whether all is finite. + 0 makes -0 a 0, so that it does not matter which zeros were added. */
static int scale_sums(const fa_neighborhood *problem, int r, const struct strip *strip, const struct pair *pair,
                      real shrunk, const struct scene *scene)
{
    const vec factor = pair->factor[r];
    const ivec unseen = pair->sum[r] == (vec){0};
    const real most = (BITS == 32 ? (real)FLT_MAX : (real)DBL_MAX) * shrunk;
    vec check = {0};
    for (int64_t c = 0; c < problem->value_dim; c++) {
        real *o = scene->o + (r * scene->value_rows + c) * LANES;
        vec x = v_load(o) * factor + (vec){0};
        if (shrunk != 1) {
            const vec before = v_load(scene->kept + (r * scene->value_rows + c) * LANES);
            /* Rounding must not carry a mean beyond the largest of its numbers. */
            if (problem->activation != FA_RELU && problem->activation != FA_SIGMOID)
                x = v_pick(x - x == (vec){0}, v_min(v_max(x, v_fill(-most)), v_fill(most)), x);
            x = v_pick(before - before == (vec){0}, before, x / shrunk);
        }
        x = v_pick(unseen, (vec){0}, x);
        check = v_fma(x, (vec){0}, check);
        v_store(o, x);
    }
    return !(v_true_bits(check != (vec){0}) & (((uint64_t)1 << strip->lanes) - 1));
}

/* The numbers of a strip, [channel][lane] at o, to its pixels from (z, x, y) on, or added to what is there (of type
 * real then). all: whole vectors of channels; scratch: LANES times as many, and `all` more to add. */
static void write_strip(const fa_pixels *out, int64_t head, int64_t z, int64_t x, int64_t y, int lanes,
                        int64_t channels, int64_t all, int add, const real *o, real *scratch)
{
    const ptrdiff_t step = out->space[FA_ALONG_Y], size = sizeof(real);
    char *to = out->data + head * out->head + z * out->space[FA_ALONG_Z] + x * out->space[FA_ALONG_X] + y * step;
    if (!add && out->dtype == REAL_DTYPE && out->col == size && channels % LANES == 0 && lanes == LANES &&
        ((uintptr_t)to | (uintptr_t)step) % sizeof(real) == 0) {
        for (int64_t c = 0; c < channels; c += LANES)
            v_transpose((real *)to + c, step / size, (const char *)(o + c * LANES), LANES * size);
        return;
    }
    for (int64_t c = 0; c < channels; c += LANES)
        v_transpose(scratch + c, all, (const char *)(o + c * LANES), LANES * size);
    for (int i = 0; i < lanes; i++) {
        real *pixel = scratch + i * all, *before = scratch + LANES * all;
        if (add) {
            gather(before, to + i * step, out->col, channels, out->dtype);
            for (int64_t c = 0; c < channels; c++)
                pixel[c] += before[c];
        }
        scatter(to + i * step, out->col, pixel, channels, out->dtype);
    }
}

/* Where the keys and values of each slot lie; behind the last, room for those that are computed with it. */
static void list_slots(const fa_neighborhood *problem, const struct strip *strip, const struct pair *pair,
                       struct scene *scene)
{
    const int64_t step = problem->reach[FA_ALONG_Y].dilation;
    const int64_t column = pair->y - scene->from + strip->low * step;
    int64_t slot = 0;
    for (int64_t z = pair->z_begin; z < pair->z_end; z++)
        for (int64_t x = pair->x_begin; x < pair->x_end; x++) {
            const int64_t panel = z % scene->planes * scene->rows + x % scene->rows;
            const real *k = scene->k + panel * scene->key_rows * scene->width + column;
            const real *v = scene->v + panel * scene->value_rows * scene->width + column;
            for (int64_t j = 0; j < strip->offsets; j++, slot++) {
                scene->keys[slot] = k + j * step;
                scene->values[slot] = v + j * step;
            }
        }
    for (int i = 0; i < SLOTS && slot; i++) {
        scene->keys[slot + i] = scene->keys[slot - 1];
        scene->values[slot + i] = scene->values[slot - 1];
    }
}

/* The rows of keys that a pair of rows of queries, z and x and perhaps x + 1, sees; or, of_keys, of queries that see
 * them. */
static void look_at_pair(const fa_neighborhood *problem, const fa_image *image, int64_t z, int64_t x, int strips,
                         int of_keys, struct pair *pair)
{
    const fa_reach *reach = problem->reach;
    pair->z = z, pair->x = x;
    pair->strips = strips;
    look(&reach[FA_ALONG_Z], image->pixels[FA_ALONG_Z], z, of_keys, &pair->z_begin, &pair->z_end);
    for (int r = 0; r < strips; r++)
        look(&reach[FA_ALONG_X], image->pixels[FA_ALONG_X], x + r, of_keys, &pair->begin[r], &pair->end[r]);
    pair->x_begin = least_of(pair->begin[0], pair->begin[strips - 1]);
    pair->x_end = most_of(pair->end[0], pair->end[strips - 1]);
}

/* One head of a pair of strips, number `strip` of their rows, from packed queries to outputs. */
static void attend_pair(const fa_neighborhood *problem, const fa_image *image, int64_t head, int64_t number,
                        struct pair *pair, struct scene *scene)
{
    const struct strip *strip = scene->strips + number;
    const real shrunk = (real)0x1p-64;
    int finite = 1;
    pair->slots = (pair->z_end - pair->z_begin) * (pair->x_end - pair->x_begin) * strip->offsets;
    pair->sight = scene->sight + number * scene->offsets;
    list_slots(problem, strip, pair, scene);
    score_slots(scene, scene->q + number * LANES, problem->head_dim, pair->slots, pair->strips);
    for (int r = 0; r < pair->strips; r++) {
        pair->after[r] = v_load(scene->after + r * scene->queries + number * LANES);
        weigh_strip(problem, image, head, r, strip, pair, scene);
        finish_strip(image, head, r, strip, pair);
        if (image->weights.data)
            write_weights(problem, image, head, r, strip, pair, scene);
    }
    sum_slots(scene, pair->slots, pair->strips, !scene->values_finite, 1);
    for (int r = 0; r < pair->strips; r++)
        finite &= scale_sums(problem, r, strip, pair, 1, scene);
    if (!finite) { /* once more with smaller values: a sum may have overflowed before it was divided */
        memcpy(scene->kept, scene->o, (size_t)(2 * scene->value_rows * LANES) * sizeof(real));
        sum_slots(scene, pair->slots, pair->strips, 1, shrunk);
        for (int r = 0; r < pair->strips; r++)
            scale_sums(problem, r, strip, pair, shrunk, scene);
    }
    for (int r = 0; r < pair->strips; r++)
        write_strip(&image->out, head, pair->z, pair->x + r, pair->y, strip->lanes, problem->value_dim,
                    scene->value_rows, 0, scene->o + r * scene->value_rows * LANES, scene->part);
}

/* The strips of a tile, and its workspace, of which it returns the size. */
static size_t open_scene(const fa_neighborhood *problem, const fa_image *image, const int64_t *begin,
                         const int64_t *end, int of_keys, struct scene *scene)
{
    const int64_t tile[FA_SPACE] = {end[0] - begin[0], end[1] - begin[1], end[2] - begin[2]};
    const int64_t n = image->pixels[FA_ALONG_Y];
    const fa_reach *reach = &problem->reach[FA_ALONG_Y];
    int64_t low = INT64_MAX, high = INT64_MIN;
    size_t size;
    struct strip strip;
    for (int64_t y = begin[FA_ALONG_Y]; y < end[FA_ALONG_Y]; y += LANES) {
        look_along_strip(reach, n, y, (int)least_of(LANES, end[FA_ALONG_Y] - y), of_keys, &strip);
        low = least_of(low, strip.low);
        high = most_of(high, strip.low + strip.offsets);
    }
    size = lay_scene(scene, problem, image->pixels, tile, most_of(high - low, 1), of_keys, (char *)scene);
    scene->from = begin[FA_ALONG_Y] + low * reach->dilation;
    scene->values_finite = 1;
    for (int64_t i = 0; i < scene->queries / LANES; i++) {
        const int64_t y = begin[FA_ALONG_Y] + i * LANES;
        struct strip *here = scene->strips + i;
        look_along_strip(reach, n, y, (int)least_of(LANES, end[FA_ALONG_Y] - y), of_keys, here);
        for (int64_t j = 0; j < here->offsets; j++)
            scene->sight[i * scene->offsets + j] = lanes_that_see(here, here->low + j);
    }
    for (int64_t z = 0; z < scene->planes; z++)
        scene->plane[z] = -1;
    /* Columns where there is no pixel stay zero, and so does what no channel fills. */
    const int64_t panels = scene->planes * scene->rows;
    if (scene->from < 0 || scene->from + scene->width > n) {
        memset(scene->k, 0, (size_t)(panels * scene->key_rows * scene->width) * sizeof(real));
        memset(scene->v, 0, (size_t)(panels * scene->value_rows * scene->width) * sizeof(real));
    }
    memset(scene->q, 0, (size_t)(2 * scene->key_rows * scene->query_row) * sizeof(real));
    return size;
}

/* Contract: contract.h. */
static void neighborhood(const fa_neighborhood *problem, const fa_image *image, const int64_t *begin,
                         const int64_t *end, void *workspace)
{
    struct scene *scene = workspace;
    const fa_pixels *query = &image->query;
    const fa_reach *along_x = &problem->reach[FA_ALONG_X];
    int64_t first, unused;
    struct pair pair;
    open_scene(problem, image, begin, end, 0, scene);
    fa_neighbors(along_x, image->pixels[FA_ALONG_X], begin[FA_ALONG_X], &first, &unused);
    for (int64_t z = begin[FA_ALONG_Z]; z < end[FA_ALONG_Z]; z++)
        for (int64_t x = begin[FA_ALONG_X]; x < end[FA_ALONG_X]; x += 2) {
            look_at_pair(problem, image, z, x, x + 1 < end[FA_ALONG_X] ? 2 : 1, 0, &pair);
            pack_for_pair(problem, image, first, &pair, scene);
            for (int64_t head = 0; head < image->heads; head++) {
                for (int r = 0; r < pair.strips; r++) {
                    real *q = scene->q + r * scene->key_rows * scene->query_row;
                    pack_pixels(query,
                                query->data + head * query->head + z * query->space[FA_ALONG_Z] +
                                    (x + r) * query->space[FA_ALONG_X],
                                problem->head_dim, image->pixels[FA_ALONG_Y], begin[FA_ALONG_Y], scene->query_row,
                                scene->part, q);
                    scale_queries(problem, scene->query_row, scene->queries, q, scene->after + r * scene->queries);
                }
                for (int64_t i = 0; i < scene->queries / LANES; i++) {
                    pair.y = begin[FA_ALONG_Y] + i * LANES;
                    attend_pair(problem, image, head, i, &pair, scene);
                }
            }
        }
}
