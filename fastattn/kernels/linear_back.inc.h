/* The gradients of linear attention, apart from what linear.inc.h does: they are recurrences, too
 * (_linear_gradients.pyx).
 *
 * Here is what surrounds them: features and their slopes, the denominators, and the gradients of decays. All of it
 * passes once over rows of numbers; nothing here is as large as a state times a key.
 */

/* n numbers of a row, or LANES of them; then zeros. */
static ALWAYS_INLINE vec some_of(const real *from, int64_t n)
{
    if (n >= LANES)
        return v_load(from);
    return v_load_some(from, (int)n);
}

static ALWAYS_INLINE void put_some(real *to, int64_t n, vec x)
{
    if (n >= LANES)
        v_store(to, x);
    else
        memcpy(to, &x, (size_t)n * sizeof(real));
}

/* The same from and to a row of a matrix, from column c on. */
static ALWAYS_INLINE vec some_of_row(const fa_view *matrix, const char *row, int64_t c, int64_t n, int direct)
{
    vec x = {0};
    if (direct)
        return some_of((const real *)row + c, n);
    gather(&x, row + c * matrix->col, matrix->col, n < LANES ? n : LANES, matrix->dtype);
    return x;
}

static ALWAYS_INLINE void put_some_of_row(const fa_view *matrix, char *row, int64_t c, int64_t n, int direct, vec x)
{
    if (direct)
        put_some((real *)row + c, n, x);
    else
        scatter(row + c * matrix->col, matrix->col, &x, n < LANES ? n : LANES, matrix->dtype);
}

static ALWAYS_INLINE vec slopes_of(vec x, const fa_feature_map map)
{
    const vec zero = {0};
    if (map == FA_ELU_PLUS_1)
        return v_exp_below(v_min(zero, x), 1); /* 1 above 0, and NaN for NaN */
    if (map == FA_RELU_MAP)
        return v_pick(x > zero, v_fill(1), v_pick(x <= zero, zero, x));
    return v_fill(1);
}

static ALWAYS_INLINE void map_rows_to(const fa_view *from, const fa_view *each, double factor, int64_t head,
                                      int64_t begin, int64_t rows, int64_t n, char *to, ptrdiff_t to_row,
                                      const fa_feature_map map)
{
    const int direct = readable(from);
    for (int64_t j = begin; j < begin + rows; j++, to += to_row) {
        const char *row = row_of(from, head, j);
        const real by = (real)factor * (each ? read_number(each->data + j * each->row, each->dtype) : 1);
        int64_t c = 0;
        prefetch_row(from, row + LINEAR_BLOCK * from->row, n);
        for (; direct && c + LANES <= n; c += LANES)
            v_store((real *)to + c, features_of(v_load((const real *)row + c), map) * by);
        for (; c < n; c += LANES)
            put_some((real *)to + c, n - c, features_of(some_of_row(from, row, c, n - c, direct), map) * by);
    }
}

/* Contract: contract.h. */
static void linear_map(fa_feature_map map, const fa_view *from, const fa_view *each, double factor, int64_t head,
                       int64_t begin, int64_t rows, int64_t n, void *to, ptrdiff_t to_row)
{
    if (map == FA_ELU_PLUS_1)
        map_rows_to(from, each, factor, head, begin, rows, n, to, to_row, FA_ELU_PLUS_1);
    else if (map == FA_RELU_MAP)
        map_rows_to(from, each, factor, head, begin, rows, n, to, to_row, FA_RELU_MAP);
    else
        map_rows_to(from, each, factor, head, begin, rows, n, to, to_row, FA_NO_MAP);
}

static ALWAYS_INLINE void unmap_rows(const fa_view *x, const real *from, int64_t head, int64_t begin, int64_t end,
                                     int64_t n, const fa_view *to, const fa_feature_map map)
{
    const int direct = readable(x), direct_to = readable(to);
    for (int64_t i = begin; i < end; i++) {
        const char *row = row_of(x, head, i);
        char *to_i = row_of(to, head, i);
        const real *from_i = from + i * n;
        int64_t c = 0;
        if (map != FA_NO_MAP)
            prefetch_row(x, row + LINEAR_BLOCK * x->row, n);
        prefetch_row(to, to_i + LINEAR_BLOCK * to->row, n);
        for (; direct && direct_to && c + LANES <= n; c += LANES) {
            const vec d = v_load(from_i + c);
            v_store((real *)to_i + c, map == FA_NO_MAP ? d : d * slopes_of(v_load((const real *)row + c), map));
        }
        for (; c < n; c += LANES) {
            vec d = some_of(from_i + c, n - c);
            if (map != FA_NO_MAP)
                d *= slopes_of(some_of_row(x, row, c, n - c, direct), map);
            put_some_of_row(to, to_i, c, n - c, direct_to, d);
        }
    }
}

/* Contract: contract.h. */
static void linear_unmap(fa_feature_map map, const fa_view *x, const void *from, int64_t head, int64_t begin,
                         int64_t end, int64_t n, const fa_view *to)
{
    if (map == FA_ELU_PLUS_1)
        unmap_rows(x, from, head, begin, end, n, to, FA_ELU_PLUS_1);
    else if (map == FA_RELU_MAP)
        unmap_rows(x, from, head, begin, end, n, to, FA_RELU_MAP);
    else
        unmap_rows(x, from, head, begin, end, n, to, FA_NO_MAP);
}

/* Contract: contract.h. */
static void linear_add(void *to_, ptrdiff_t to_row, const void *from_, ptrdiff_t from_row, double factor,
                       const void *each_, int64_t rows, int64_t n)
{
    char *to = to_;
    const char *from = from_;
    const real *each = each_;
    for (int64_t j = 0; j < rows; j++, to += to_row, from += from_row) {
        const vec by = v_fill((real)factor * (each ? each[j] : 1));
        real *to_j = (real *)to;
        for (int64_t c = 0; c < n; c += LANES)
            put_some(to_j + c, n - c, v_fma(by, some_of((const real *)from + c, n - c), some_of(to_j + c, n - c)));
    }
}

static ALWAYS_INLINE real dot_of(const real *a, const real *b, int64_t n)
{
    vec sum = {0};
    for (int64_t c = 0; c < n; c += LANES)
        sum = v_fma(some_of(a + c, n - c), some_of(b + c, n - c), sum);
    return v_total(sum);
}

/* Contract: contract.h. */
static void linear_dots(void *to, const void *a, const void *b, int64_t rows, int64_t n)
{
    for (int64_t j = 0; j < rows; j++)
        ((real *)to)[j] = dot_of((const real *)a + j * n, (const real *)b + j * n, n);
}

/* Contract: contract.h. */
static void linear_products(void *to_, const void *a_, const void *b_, ptrdiff_t row, int64_t rows, int64_t n)
{
    real *to = to_;
    for (int64_t c = 0; c < n; c += LANES) {
        const char *a = (const char *)a_ + c * (ptrdiff_t)sizeof(real),
                   *b = (const char *)b_ + c * (ptrdiff_t)sizeof(real);
        vec sum = {0};
        for (int64_t i = 0; i < rows; i++, a += row, b += row)
            sum = v_fma(some_of((const real *)a, n - c), some_of((const real *)b, n - c), sum);
        put_some(to + c, n - c, some_of(to + c, n - c) + sum);
    }
}

/* What decays by key j, with a factor and 0 where it is forgotten; x: (features). */
static void fade(const fa_linear_back *b, int64_t j, real *x)
{
    const fa_view *logs = &b->log_decay;
    const char *row = logs->data + j * logs->row;
    const vec none = v_fill(-(real)INFINITY);
    const int direct = readable(logs);
    vec y = {0};
    if (!logs->data)
        return;
    if (logs->col == 0)
        y = v_fill(read_number(row, logs->dtype));
    for (int64_t c = 0; c < b->features; c += LANES) {
        const int64_t left = b->features - c;
        if (logs->col)
            y = some_of_row(logs, row, c, left, direct);
        const vec faded = some_of(x + c, left) * exp_of_any(y);
        put_some(x + c, left, v_pick(y == none, (vec){0}, faded));
    }
}

static ALWAYS_INLINE void add_row(real *to, const real *from, real factor, int64_t n)
{
    for (int64_t c = 0; c < n; c += LANES)
        put_some(to + c, n - c, v_fma(v_fill(factor), some_of(from + c, n - c), some_of(to + c, n - c)));
}

/* Rows [*begin, *end) of a head of queries that stand before all keys (where < 0) or after them (> 0). */
static ALWAYS_INLINE void rows_beside(const fa_linear_back *b, int64_t head, int where, int64_t *begin, int64_t *end)
{
    const int64_t rows = b->rows[head], before = -b->offset[head], after = b->keys - b->offset[head];
    *begin = where < 0 ? 0 : after < 0 ? 0 : after < rows ? after : rows;
    *end = where > 0 ? rows : before < 0 ? 0 : before < rows ? before : rows;
}

/* Row i: n = M q and m = M g become the gradients of q and n; with z the denominator is q z + eps. */
static void divide_query(const fa_linear_back *b, int64_t head, int64_t i)
{
    const int64_t n = b->features;
    const int64_t r = head * b->head_rows + i;
    const real *q = (const real *)b->query + (head * b->query_rows + i) * n, *z = b->z;
    real *grad = (real *)b->grad_out + r * b->value_dim, *w = b->d_query ? (real *)b->d_query + r * n : NULL;
    const real below = dot_of(q, z, n) + (real)b->eps;
    const real share = w ? -dot_of(q, w, n) / below / below : 0;
    if (below == 0) {
        memset(grad, 0, (size_t)b->value_dim * sizeof(real));
        if (w)
            memset(w, 0, (size_t)n * sizeof(real));
        ((real *)b->d_normaliser)[r] = 0;
        return;
    }
    ((real *)b->d_normaliser)[r] = share;
    for (int64_t c = 0; c < b->value_dim; c += LANES)
        put_some(grad + c, b->value_dim - c, some_of(grad + c, b->value_dim - c) / below);
    for (int64_t c = 0; w && c < n; c += LANES)
        put_some(w + c, n - c, v_fma(v_fill(share), some_of(z + c, n - c), some_of(w + c, n - c) / below));
}

static void divide_beside(const fa_linear_back *b, int where)
{
    int64_t i, end;
    for (int64_t head = 0; head < b->heads; head++)
        for (rows_beside(b, head, where, &i, &end); i < end; i++)
            divide_query(b, head, i);
}

/* Contract: contract.h. */
static void linear_divide(const fa_linear_back *b)
{
    const int64_t n = b->features;
    const size_t size = (size_t)n * sizeof(real);
    real *z = b->z, *kept = b->kept;
    divide_beside(b, -1);
    for (int64_t j = 0; j < b->keys; j++) {
        if (kept && j % b->chunk == 0)
            memcpy(kept + j / b->chunk * n, z, size);
        fade(b, j, z);
        add_row(z, (const real *)b->key + j * n, 1, n);
        for (int64_t head = 0; head < b->heads; head++) {
            const int64_t i = j - b->offset[head];
            if (i >= 0 && i < b->rows[head])
                divide_query(b, head, i);
        }
    }
    if (kept)
        memcpy(kept + (b->keys + b->chunk - 1) / b->chunk * n, z, size);
    divide_beside(b, 1);
}

/* What a row of a query gives to the normaliser. */
static ALWAYS_INLINE void give_row(const fa_linear_back *b, int64_t head, int64_t i)
{
    const real share = ((const real *)b->d_normaliser)[head * b->head_rows + i];
    add_row(b->d_z, (const real *)b->query + (head * b->query_rows + i) * b->features, share, b->features);
}

static void give_beside(const fa_linear_back *b, int where)
{
    int64_t i, end;
    for (int64_t head = 0; head < b->heads; head++)
        for (rows_beside(b, head, where, &i, &end); i < end; i++)
            give_row(b, head, i);
}

/* The normaliser's part of what states and their gradients are together, before key j, or after all. */
static void compare_normalisers(const fa_linear_back *b, int64_t chunk)
{
    const real *z = (const real *)b->kept + chunk * b->features, *d_z = b->d_z;
    real *to = (real *)b->anchor + chunk * b->features;
    for (int64_t c = 0; c < b->features; c++)
        to[c] += z[c] * d_z[c];
}

/* Contract: contract.h. */
static void linear_divide_back(const fa_linear_back *b)
{
    const int64_t n = b->features;
    give_beside(b, 1);
    if (b->kept)
        compare_normalisers(b, (b->keys + b->chunk - 1) / b->chunk);
    for (int64_t j = b->keys - 1; j >= 0; j--) {
        for (int64_t head = 0; head < b->heads; head++) {
            const int64_t i = j - b->offset[head];
            if (i >= 0 && i < b->rows[head])
                give_row(b, head, i);
        }
        if (b->d_key)
            add_row((real *)b->d_key + j * n, b->d_z, 1, n);
        if (b->kept && j % b->chunk == 0)
            compare_normalisers(b, j / b->chunk);
        fade(b, j, b->d_z);
    }
    give_beside(b, -1);
}

/* The gradient of what decays by key j is the sum down a column of the state times its gradient, both before the key is
 * added; from key j + 1 to key j it changes by query times d_query less key times d_key. A difference of sums over all
 * keys would lose what is small, so it begins anew at every chunk, from a sum over states.
 *
 * Contract: contract.h. */
static void linear_fade(const fa_linear_back *b)
{
    const int64_t n = b->features;
    const fa_view *logs = &b->log_decay;
    const int total = logs->col == 0;
    for (int64_t j = b->keys - 1; j >= 0; j--) {
        const char *row = logs->data + j * logs->row;
        const int anew = j % b->chunk == 0;
        real *x = (real *)b->anchor + (j / b->chunk + 1) * n; /* changes from key to key, down to the chunk's second */
        if (anew) {
            x = (real *)b->anchor + j / b->chunk * n;
            fade(b, j, x);
        }
        for (int64_t head = 0; head < b->heads && !anew; head++) {
            const int64_t i = j - b->offset[head];
            if (i < 0 || i >= b->rows[head])
                continue;
            const real *q = (const real *)b->query + (head * b->query_rows + i) * n;
            const real *d_q = (const real *)b->d_query + (head * b->head_rows + i) * n;
            for (int64_t c = 0; c < n; c += LANES)
                put_some(x + c, n - c, v_fma(some_of(q + c, n - c), some_of(d_q + c, n - c), some_of(x + c, n - c)));
        }
        for (int64_t c = 0; c < n && !anew; c += LANES) {
            const int64_t left = n - c;
            vec d_k = some_of((const real *)b->d_key + j * n + c, left);
            if (b->said)
                d_k += 2 * some_of((const real *)b->said + j * n + c, left);
            const vec y = some_of(x + c, left) - some_of((const real *)b->key + j * n + c, left) * d_k;
            put_some(x + c, left, y);
        }
        if (!anew)
            for (int64_t c = 0; c < n; c++)
                if (read_number(row + c * logs->col, logs->dtype) == -(real)INFINITY)
                    x[c] = 0;
        if (total) {
            vec sum = {0};
            for (int64_t c = 0; c < n; c += LANES)
                sum += some_of(x + c, n - c);
            ((real *)b->d_log_decay)[j] = v_total(sum);
        } else {
            memcpy((real *)b->d_log_decay + j * n, x, (size_t)n * sizeof(real));
        }
    }
}
