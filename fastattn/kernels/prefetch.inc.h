/* What is prefetched, and when: the next keys and values while others are processed. (Two loops specialised for the
 * length of a key or value prefetch on their own: products_in_registers, add_value.)
 *
 * Decode of up to DECODE_ROWS rows prefetches at a fixed distance ahead of each load (prefetch_vectors, rows_ahead);
 * prefill, and the values of more rows, spread the prefetches of the next block over the products of this one (struct
 * next_rows, struct prefetch), because a CPU stalls on many prefetches at once. Addresses may be past the end of an
 * array: a prefetch never faults. */

/* Bytes of n numbers of a row; for larger strides, as if they were contiguous. */
static ALWAYS_INLINE int64_t bytes_of(const fa_view *matrix, int64_t n)
{
    return n * (matrix->col > 0 && matrix->col < (ptrdiff_t)sizeof(real) ? matrix->col : (ptrdiff_t)sizeof(real));
}

/* Whether decode has to prefetch keys or values of n numbers. Some CPUs prefetch a single contiguous stream in hardware
 * well enough; where numbers are widened, more instructions wait for each line, and they do not. */
static ALWAYS_INLINE int needs_prefetch(const fa_problem *problem, int rows, int64_t n, const fa_view *matrix)
{
    return problem->prefetch || rows > 2 || matrix->row != bytes_of(matrix, n) || matrix->dtype != REAL_DTYPE;
}

/* How many rows of n numbers make PREFETCH_BYTES, rounded up. */
static ALWAYS_INLINE ptrdiff_t rows_ahead(const fa_view *matrix, int64_t n)
{
    const ptrdiff_t bytes = n > 0 ? n * size_of(matrix->dtype) : 1;
    return (PREFETCH_BYTES + bytes - 1) / bytes;
}

/* Prefetches a line of numbers of type real into L1. Those of smaller dtypes stay in L2: they keep more instructions
 * busy, and a CPU waits for more lines there than in L1. */
static ALWAYS_INLINE void prefetch_line(const char *at, const int is_real)
{
    if (is_real)
        __builtin_prefetch(at, 0, 3);
    else
        __builtin_prefetch(at, 0, 2);
}

/* Prefetches `bytes` bytes of a row into L1. */
static ALWAYS_INLINE void prefetch_bytes(const char *row, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(row + at, 0, 3);
}

/* Prefetches the cache lines in which `count` vectors of some bytes, `apart` bytes from each other, begin, unless the
 * vector before begins in the same line. For contiguous rows that are read together, prefetching in memory order is
 * fastest: the next `count` vectors, rather than one per row. */
static ALWAYS_INLINE void prefetch_vectors(const char *at, ptrdiff_t apart, const int count, const int bytes)
{
    UNROLL(8)
    for (int i = 0; i < count; i++, at += apart)
        if (bytes == 64 || (uintptr_t)at % 64 < (unsigned)bytes)
            prefetch_line(at, bytes == VECTOR_BYTES);
}

/* Cache lines of a matrix to prefetch in order, a few at a time, while other rows are processed: a CPU stalls on many
 * prefetches at once, and ascending addresses are fastest. */
struct prefetch {
    const char *at;        /* the next line; `in_row` bytes of its row are left */
    int64_t in_row, bytes; /* of each row */
    ptrdiff_t row;
    int left, pace; /* lines left, and lines per step */
};

static ALWAYS_INLINE void prefetch_lines(struct prefetch *prefetch, int lines)
{
    lines = lines < prefetch->left ? lines : prefetch->left;
    prefetch->left -= lines;
    for (; lines > 0; lines--) {
        __builtin_prefetch(prefetch->at, 0, 3);
        prefetch->at += 64;
        prefetch->in_row -= 64;
        if (prefetch->in_row <= 0) {
            prefetch->at += prefetch->row + prefetch->in_row - prefetch->bytes;
            prefetch->in_row = prefetch->bytes;
        }
    }
}

/* How many prefetch steps a product over this many vectors of b and values of t makes, at least. */
static ALWAYS_INLINE int64_t prefetches_of_product(int64_t vectors, int64_t numbers)
{
    if (STEPS > 1)
        return (vectors + 1) / 2 * (numbers / STEPS);
    return (vectors + VECS - 1) / VECS * ((numbers + CHUNK - 1) / CHUNK);
}

/* The prefetches of `rows` rows from `data` on, in `times` equal steps. */
static ALWAYS_INLINE struct prefetch prefetch_of_rows(const char *data, ptrdiff_t row, int64_t bytes, int64_t rows,
                                                      int64_t times)
{
    const int64_t lines = rows * ((bytes + 63) / 64);
    return (struct prefetch){data, bytes, bytes, row, (int)lines, times ? (int)((lines + times - 1) / times) : 0};
}

/* Prefetches rows [begin, end) of a matrix with one row per query into L2. */
static ALWAYS_INLINE void prefetch_queries(const fa_head *head, const fa_view *matrix, int64_t begin, int64_t end,
                                           int64_t bytes)
{
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(fa_row(head, matrix, i) + b, 0, 2);
}

/* The most rows of a tile that see any of `keys` adjacent keys. */
static ALWAYS_INLINE int64_t rows_seeing(const fa_problem *problem, const fa_head *head, int64_t keys, int64_t rows)
{
    if (problem->left >= rows || problem->right >= rows - problem->left)
        return rows;
    const int64_t most = (keys + problem->left + problem->right) * head->heads;
    return most < rows ? most : rows;
}

/* The next rows of a matrix, to prefetch while the groups pass over a block. */
struct next_rows {
    const char *data;
    ptrdiff_t row;
    int64_t bytes, rows, rows_per_step;
    struct prefetch prefetch; /* used if they are many */
};

/* times: prefetch steps in the product of a group; 0: none. */
static ALWAYS_INLINE struct next_rows find_next_rows(const fa_view *matrix, int64_t from, int64_t end, int64_t numbers,
                                                     int64_t turns, int64_t times)
{
    const int64_t rows = end - from < FA_BLOCK ? end - from : FA_BLOCK, rows_per_step = (FA_BLOCK + turns - 1) / turns;
    struct next_rows next = {
        matrix->data + from * matrix->row, matrix->row, bytes_of(matrix, numbers), rows, rows_per_step, {0}};
    if (rows > 0 && rows_per_step * next.bytes > PREFETCH_AT_ONCE)
        next.prefetch = prefetch_of_rows(next.data, next.row, next.bytes, rows, turns * times);
    return next;
}

/* Prefetches the rows of iteration `turn`, or returns what the product is to prefetch. */
static ALWAYS_INLINE struct prefetch *prefetch_step(struct next_rows *next, int64_t turn)
{
    if (next->prefetch.pace)
        return &next->prefetch;
    const int64_t from = turn * next->rows_per_step, to = from + next->rows_per_step;
    for (int64_t j = from; j < to && j < next->rows; j++)
        for (int64_t b = 0; b < next->bytes; b += 64)
            __builtin_prefetch(next->data + j * next->row + b, 0, 2);
    return NULL;
}
