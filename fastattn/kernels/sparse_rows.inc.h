/* sparsemax and 1.5-entmax (threshold.inc.h) as functions of rows: contiguous ones, and rows side by side with the same
 * bits.
 *
 * A row is read twice, for its largest number and for the vectors that hold numbers above t = -1. These are mostly few:
 * they are kept, and all else passes over them alone. Where there is no room for them the row is read again and again.
 */
enum { ROOM = 16384 / VECTOR_BYTES };
_Static_assert(ROOM *VECTOR_BYTES >= LISTS_AT_ONCE * 4096, "room for short rows, several at once");

/* The largest number of a row, 0 if there is none but -inf. */
static ALWAYS_INLINE vec largest_of_row(const real *x, const char *mask, int64_t n)
{
    const vec none = v_fill(-(real)INFINITY);
    vec most[4] = {none, none, none, none};
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            most[i] = v_max(row_vector(x, mask, j + i * LANES, INT64_MAX), most[i]);
    }
    for (; j < n; j += LANES)
        most[0] = v_max(row_vector(x, mask, j, n), most[0]);
    const vec largest = v_spread_max(v_max(v_max(most[0], most[1]), v_max(most[2], most[3])));
    return v_pick(largest == none, (vec){0}, largest);
}

/* A row with more vectors above t = -1 than there is room for. */
static ALWAYS_INLINE double crowded_row(const int square, const real *x, const char *mask, real *out, int64_t n,
                                        vec base)
{
    struct search search = {-1, 0, 0};
    struct distances sums;
    int64_t count;
    double total;
    do {
        const vec t = v_fill(search.t);
        sums = no_distances(square);
        count = 0;
        for (int64_t j = 0; j < n; j += LANES) {
            const vec z = below_largest(square, row_vector(x, mask, j, n), base);
            const unsigned bits = v_above_bits(z, t);
            add_distances(square, z, t, bits, search.last, &sums);
            count += __builtin_popcount(bits);
        }
    } while (next_by_lanes(square, &sums, (double)count, &total, &search));
    for (int64_t j = 0; j < n; j += LANES) {
        const vec z = below_largest(square, row_vector(x, mask, j, n), base);
        store_row(out, j, n, weight_above(square, z, v_fill(search.t), v_fill(search.rest)));
    }
    return total;
}

/* `count` rows, for whose vectors there is room, or one. */
static ALWAYS_INLINE void sparse_rows(const int square, const char *x, ptrdiff_t x_row, const char *mask,
                                      ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int count)
{
    real z[(ROOM + LISTS_AT_ONCE) * LANES];
    uint32_t place[ROOM + LISTS_AT_ONCE];
    struct list lists[LISTS_AT_ONCE];
    const int64_t room = count > 1 ? (n + LANES - 1) / LANES : ROOM;
    for (int r = 0; r < count; r++) {
        const real *x_r = (const real *)(x + r * x_row);
        const char *mask_r = mask ? mask + r * mask_row : NULL;
        const vec base = largest_of_row(x_r, mask_r, n);
        struct list *list = lists + r;
        *list = (struct list){z + r * (room + 1) * LANES, place + r * (room + 1), 0, 0, {0, 0, 0}, 0};
        for (int64_t j = 0; j < n && list->n <= room; j += LANES) {
            const vec z_j = below_largest(square, row_vector(x_r, mask_r, j, n), base);
            v_store(list->z + list->n * LANES, z_j);
            list->place[list->n] = (uint32_t)(j / LANES);
            list->n += v_above_bits(z_j, v_fill(-1)) != 0;
        }
        if (list->n > room) {
            list->total = crowded_row(square, x_r, mask_r, (real *)out, n, base);
            count = 0; /* it was the only one */
        }
    }
    weigh_lists(square, lists, count);
    for (int r = 0; r < (count ? count : 1); r++) {
        real *out_r = (real *)(out + r * out_row);
        const double total = lists[r].total;
        if (count) {
            memset(out_r, 0, (size_t)n * sizeof(real));
            for (int64_t i = 0; i < lists[r].n; i++)
                store_row(out_r, (int64_t)lists[r].place[i] * LANES, n, v_load(lists[r].z + i * LANES));
        }
        for (int64_t j = 0; total != total && j < n; j++) /* a hidden entry stays 0 in a row of NaN */
            out_r[j] = !mask || mask[r * mask_row + j] ? (real)total : 0;
    }
}

/* Rows in the lanes. What stands for a row is at the row's place. */
struct sparse_columns {
    struct distances sums[LANES][COLUMN_VECS]; /* lane l of a row's sums is [l] here */
    ivec count[LANES][COLUMN_VECS];
    struct search search[COLUMN_ROWS];
    char done[COLUMN_ROWS];
    vec t[COLUMN_VECS], rest[COLUMN_VECS];
};

/* The total of lanes that are vectors, in the order of v_total. */
static ALWAYS_INLINE vec total_of_lanes(vec *part)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++)
            part[l] += part[l + half];
    return part[0];
}

static ALWAYS_INLINE void add_column(const int square, vec x, int64_t j, int v, const struct columns_state *state,
                                     struct sparse_columns *s)
{
    const vec z = below_largest(square, x, state->base[v]), t = s->t[v];
    const unsigned bits = v_above_bits(z, t);
    if (!bits)
        return;
    /* Each row may be at another pass; what the last one needs besides does no harm to the others. */
    add_distances(square, z, t, bits, 1, &s->sums[j % LANES][v]);
    if (!square)
        s->sums[j % LANES][v].other = v_min(v_pick_bits(bits, z - t, v_fill(1)), s->sums[j % LANES][v].other);
    s->count[j % LANES][v] -= z > t;
}

/* The next thresholds of the rows of vector v; whether another pass is needed. */
static ALWAYS_INLINE int raise_columns(const int square, int v, int rows, struct sparse_columns *s)
{
    vec part[3][LANES];
    int more = 0;
    for (int l = 0; l < LANES; l++) {
        part[0][l] = s->sums[l][v].sum;
        part[1][l] = s->sums[l][v].lost;
        part[2][l] = s->sums[l][v].other;
    }
    const vec sum = total_of_lanes(part[0]), lost = total_of_lanes(part[1]);
    if (square)
        total_of_lanes(part[2]);
    for (int l = 1; l < LANES && !square; l++)
        part[2][0] = v_min(part[2][l], part[2][0]);
    for (int i = 0; i < rows; i++) {
        struct search *search = s->search + v * LANES + i;
        const double total = (double)sum[i] + (search->last ? (double)lost[i] : 0);
        double count = 0;
        for (int l = 0; l < LANES; l++)
            count += (double)s->count[l][v][i];
        if (!s->done[v * LANES + i])
            s->done[v * LANES + i] = !next_threshold(square, total, (double)part[2][0][i], count, search);
        more |= !s->done[v * LANES + i];
        s->t[v][i] = search->t, s->rest[v][i] = search->rest;
    }
    return more;
}

static ALWAYS_INLINE void sparse_columns_of(const int square, const fa_columns *c, struct columns_state *state,
                                            real *kept, const int vecs, const int x_whole, const int out_whole)
{
    const int64_t length = c->length;
    struct sparse_columns s;
    int more;
    largest_of_columns(c, state, kept, vecs, x_whole);
    for (int v = 0; v < vecs; v++)
        s.t[v] = v_fill(-1), s.rest[v] = (vec){0};
    for (int r = 0; r < COLUMN_ROWS; r++)
        s.search[r] = (struct search){-1, 0, 0}, s.done[r] = 0;
    do {
        for (int l = 0; l < LANES; l++)
            for (int v = 0; v < vecs; v++)
                s.sums[l][v] = no_distances(square), s.count[l][v] = (ivec){0};
        first_block(c, state);
        for (int64_t j = 0; j < length; j += ROW_BLOCK) {
            const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
            if (!kept)
                next_block(c, n, state);
            for (int t = 0; t < n; t++)
                for (int v = 0; v < vecs; v++) {
                    if (kept)
                        add_column(square, v_load(kept + kept_at(j + t) + v * LANES), j + t, v, state, &s);
                    else
                        add_column(square, column_vector(c, state, t, v, x_whole), j + t, v, state, &s);
                }
        }
        more = 0;
        for (int v = 0; v < vecs; v++)
            more |= raise_columns(square, v, rows_in_lanes(c, v), &s);
    } while (more);
    first_block(c, state);
    for (int64_t j = 0; j < length; j += ROW_BLOCK) {
        const int n = length - j < ROW_BLOCK ? (int)(length - j) : ROW_BLOCK;
        next_block(c, n, state);
        for (int t = 0; t < n; t++) {
            for (int v = 0; v < vecs; v++) {
                const vec x = kept ? v_load(kept + kept_at(j + t) + v * LANES) : column_vector(c, state, t, v, x_whole);
                vec weights = weight_above(square, below_largest(square, x, state->base[v]), s.t[v], s.rest[v]);
                if (c->mask) /* a hidden entry stays 0 in a row of NaN */
                    weights = v_pick_bits(column_bits(c, state->at[FA_ROW_MASK][t], v, rows_in_lanes(c, v)), weights,
                                          (vec){0});
                store_column(c, state, t, v, weights, out_whole);
            }
        }
    }
}

static NEVER_INLINE void sparse_columns(const int square, const fa_columns *c, struct columns_state *state, real *kept)
{
    const ptrdiff_t size = sizeof(real);
    const int vecs = (int)((c->rows + LANES - 1) / LANES), full = c->rows == COLUMN_ROWS;
    const int x_whole = full && c->dtype == REAL_DTYPE && c->next[FA_ROW_X] == size;
    const int out_whole = full && c->out_dtype == REAL_DTYPE && c->next[FA_ROW_OUT] == size;
    if (square)
        sparse_columns_of(1, c, state, kept, vecs, x_whole, out_whole);
    else
        sparse_columns_of(0, c, state, kept, vecs, x_whole, out_whole);
}

/* Rows of sparsemax or entmax15, one after the other. */
static void all_sparse_rows(fa_row_function function, const char *x, ptrdiff_t x_row, const char *mask,
                            ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int64_t count)
{
    const int at_once = n * (int64_t)sizeof(real) <= 4096 ? LISTS_AT_ONCE : 1;
    while (count > 0) {
        const int some = count < at_once ? (int)count : at_once;
        if (function == FA_ROW_SPARSEMAX)
            sparse_rows(0, x, x_row, mask, mask_row, out, out_row, n, some);
        else
            sparse_rows(1, x, x_row, mask, mask_row, out, out_row, n, some);
        count -= some;
        x += some * x_row;
        out += some * out_row;
        if (mask)
            mask += some * mask_row;
    }
}
