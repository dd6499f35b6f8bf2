/* Which keys of a block a row sees: by position and length, a range; with a dense mask, a bias of -inf or several
 * blocks, bits: bit j of a row is key `block + j`. */

enum { WORDS = FA_BLOCK / 64 };

typedef struct {
    uint64_t word[WORDS];
} key_bits;

static ALWAYS_INLINE uint64_t bits_below(int64_t n) /* bits 0 .. n - 1 of a word */
{
    return n <= 0 ? 0 : n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
}

/* Bits [begin, end) of a block. */
static ALWAYS_INLINE key_bits bits_of_range(int64_t begin, int64_t end)
{
    key_bits bits;
    for (int w = 0; w < WORDS; w++)
        bits.word[w] = bits_below(end - 64 * w) & ~bits_below(begin - 64 * w);
    return bits;
}

static ALWAYS_INLINE int bits_equal(const key_bits *a, const key_bits *b)
{
    uint64_t differ = 0;
    for (int w = 0; w < WORDS; w++)
        differ |= a->word[w] ^ b->word[w];
    return differ == 0;
}

static ALWAYS_INLINE int bits_any(const key_bits *a)
{
    uint64_t any = 0;
    for (int w = 0; w < WORDS; w++)
        any |= a->word[w];
    return any != 0;
}

static ALWAYS_INLINE int bits_count(const key_bits *a)
{
    int count = 0;
    for (int w = 0; w < WORDS; w++)
        count += __builtin_popcountll(a->word[w]);
    return count;
}

/* `lanes` bits from bit `at` on; at is a multiple of lanes, lanes divides 64. */
static ALWAYS_INLINE unsigned bits_at(const key_bits *a, int at, int lanes)
{
    return (unsigned)(a->word[at / 64] >> at % 64) & ((1u << lanes) - 1u);
}

/* Bits of n mask bytes, n <= 64. Eight at a time: each nonzero byte becomes 1, and a multiplication gathers these. */
static ALWAYS_INLINE uint64_t bits_of_mask(const char *mask, int n)
{
    uint64_t bits = 0;
    int j = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; j + 8 <= n; j += 8) {
        uint64_t eight;
        memcpy(&eight, mask + j, 8);
        eight = (((eight & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu) | eight) >> 7 & 0x0101010101010101u;
        bits |= (eight * 0x0102040810204080u >> 56) << j;
    }
#endif
    for (; j < n; j++)
        bits |= (uint64_t)(mask[j] != 0) << j;
    return bits;
}

/* Clears the bits of [begin, end) whose mask byte is zero. mask: the byte of the block's first key. */
static inline void bits_and_mask(key_bits *bits, const char *mask, ptrdiff_t stride, int begin, int end)
{
    for (int w = begin / 64; w * 64 < end; w++) {
        const int from = begin > w * 64 ? begin - w * 64 : 0, to = end < w * 64 + 64 ? end - w * 64 : 64;
        const char *m = mask + (ptrdiff_t)(w * 64 + from) * stride;
        uint64_t set = 0;
        if (stride == 1)
            set = bits_of_mask(m, to - from);
        else
            for (int j = 0; j < to - from; j++)
                set |= (uint64_t)(m[j * stride] != 0) << j;
        bits->word[w] &= set << from;
    }
}

/* The keys of the block [block, block + FA_BLOCK) visible to any of the query rows [i, i + rows) by position and
 * length, relative to the block; 0, 0 if there are none. */
static ALWAYS_INLINE void rows_range(const fa_problem *problem, const fa_head *head, int64_t i, int64_t rows,
                                     int64_t block, int *begin, int *end)
{
    int64_t lo, hi;
    fa_visible_keys(problem, head, i, rows, &lo, &hi);
    lo = lo > block ? lo - block : 0;
    hi = hi < block + FA_BLOCK ? hi - block : FA_BLOCK;
    *begin = lo < hi ? (int)lo : 0;
    *end = lo < hi ? (int)hi : 0;
}

/* The query rows [*first, *last) that may see the block [block, block + FA_BLOCK) by position and length. Rows are
 * queries here (fa_head.heads is 1). */
static void rows_of_block(const fa_problem *problem, const fa_head *head, int64_t block, int64_t *first, int64_t *last)
{
    const int64_t end = head->key_length - block < FA_BLOCK ? head->key_length : block + FA_BLOCK;
    const int64_t before = head->keys_before, offset = head->offset;
    *first = 0, *last = block < end ? head->query_length : 0;
    if (problem->right < INT64_MAX && block - problem->right - offset > *first)
        *first = block - problem->right - offset;
    if (problem->left < INT64_MAX && end + problem->left - offset < *last)
        *last = end + problem->left - offset;
    if (problem->chunk) {
        const int64_t begins = (before + block) / problem->chunk * problem->chunk - before - offset;
        const int64_t most = INT64_MAX / 4 / problem->chunk, chunks = (before + end - 1) / problem->chunk + 1;
        *first = begins > *first ? begins : *first;
        if (block < end && problem->left_chunks < most - chunks &&
            (chunks + problem->left_chunks) * problem->chunk - before - offset < *last)
            *last = (chunks + problem->left_chunks) * problem->chunk - before - offset;
    }
}

/* What the rows of a group see of a block. */
struct visible {
    int lo, hi;               /* all keys that any row sees are in [lo, hi); lo >= hi: none */
    int same_for_all;         /* all rows see exactly [lo, hi) */
    int masked;               /* a mask hides everything */
    int use_bits;             /* whether `bits` are valid; they may be fewer than the ranges allow */
    int from[ROWS], to[ROWS]; /* each row sees no keys outside of these: by position, length and blocks */
    key_bits bits[ROWS];
};

/* Fills in the bits, unless they are valid already: most groups need none. */
static ALWAYS_INLINE void make_bits(struct visible *visible, int rows)
{
    for (int r = 0; r < rows && !visible->use_bits; r++)
        visible->bits[r] = bits_of_range(visible->from[r], visible->to[r]);
    visible->use_bits = 1;
}

/* Bits of the keys of a block that a row of FA_BLOCK_MASK shows. */
static ALWAYS_INLINE key_bits bits_of_blocks(const fa_problem *problem, const fa_head *head, const char *row,
                                             int64_t block)
{
    const int64_t columns = problem->block_columns, left = head->keys - block;
    const int64_t end = left < FA_BLOCK ? left : FA_BLOCK;
    int64_t column = block / columns, at = column * columns - block;
    key_bits bits = {{0}};
    for (row += column * head->view[FA_BLOCK_MASK].col; at < end; at += columns, row += head->view[FA_BLOCK_MASK].col)
        if (*row) {
            const key_bits some = bits_of_range(at, at + columns < end ? at + columns : end);
            for (int w = 0; w < WORDS; w++)
                bits.word[w] |= some.word[w];
        }
    return bits;
}

/* Takes the keys away that a row of FA_BLOCK_MASK hides, from row r and those after it that see the same. What is a
 * range remains one, for bits cost more. */
static ALWAYS_INLINE void see_blocks(const key_bits *shown, int r, int rows, struct visible *visible)
{
    key_bits bits = bits_of_range(visible->from[r], visible->to[r]);
    int from = FA_BLOCK, to = 0;
    for (int w = 0; w < WORDS; w++) {
        const uint64_t word = bits.word[w] &= shown->word[w];
        if (word) {
            from = from < FA_BLOCK ? from : w * 64 + __builtin_ctzll(word);
            to = w * 64 + 64 - __builtin_clzll(word);
        }
    }
    if (from < to) {
        visible->lo = from < visible->lo ? from : visible->lo;
        visible->hi = to > visible->hi ? to : visible->hi;
        visible->use_bits |= bits_count(&bits) != to - from;
    }
    for (; rows > 0; rows--, r++) {
        visible->bits[r] = bits;
        visible->from[r] = from < to ? from : 0;
        visible->to[r] = to;
    }
}

/* The same for the whole group. */
static NEVER_INLINE void find_blocks(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block,
                                     struct visible *visible)
{
    int64_t first, last;
    fa_rows_of_blocks(problem, head, i, rows, &first, &last);
    const int same_blocks = first == last && (head->heads == 1 || !head->view[FA_BLOCK_MASK].head);
    visible->lo = FA_BLOCK, visible->hi = 0;
    key_bits shown = bits_of_blocks(problem, head, fa_row_of_blocks(problem, head, i), block);
    if (same_blocks && visible->same_for_all) {
        see_blocks(&shown, 0, rows, visible);
        visible->same_for_all = !visible->use_bits;
        return;
    }
    for (int r = 0; r < rows; r++) {
        if (!same_blocks && r > 0)
            shown = bits_of_blocks(problem, head, fa_row_of_blocks(problem, head, i + r), block);
        see_blocks(&shown, r, 1, visible);
    }
    visible->same_for_all = 0;
}

/* What the rows [i, i + rows) see of a block. */
static inline void find_visible(const fa_problem *problem, const fa_head *head, int64_t i, int rows, int64_t block,
                                struct visible *visible)
{
    visible->same_for_all = visible->masked = visible->use_bits = 0;
    rows_range(problem, head, i, rows, block, &visible->lo, &visible->hi);
    if (visible->lo >= visible->hi)
        return;
    rows_range(problem, head, i, 1, block, &visible->from[0], &visible->to[0]);
    rows_range(problem, head, i + rows - 1, 1, block, &visible->from[rows - 1], &visible->to[rows - 1]);
    const int from = visible->from[0], to = visible->to[0];
    /* Ranges never move back, so if the first and last are equal, all are; but rows at either end may see nothing. */
    visible->same_for_all = from < to && from == visible->from[rows - 1] && to == visible->to[rows - 1];
    visible->lo = FA_BLOCK, visible->hi = 0;
    for (int r = 0; r < rows; r++) {
        if (visible->same_for_all)
            visible->from[r] = from, visible->to[r] = to;
        else if (r > 0 && r < rows - 1)
            rows_range(problem, head, i + r, 1, block, &visible->from[r], &visible->to[r]);
        if (visible->from[r] < visible->to[r]) {
            visible->lo = visible->from[r] < visible->lo ? visible->from[r] : visible->lo;
            visible->hi = visible->to[r] > visible->hi ? visible->to[r] : visible->hi;
        }
    }
    if (head->view[FA_BLOCK_MASK].data && visible->lo < visible->hi)
        find_blocks(problem, head, i, rows, block, visible);
    if (head->view[FA_MASK].data && visible->lo < visible->hi) {
        int any = 0;
        make_bits(visible, rows);
        for (int r = 0; r < rows; r++) {
            if (bits_any(&visible->bits[r]))
                bits_and_mask(&visible->bits[r],
                              fa_row(head, &head->view[FA_MASK], i + r) + block * head->view[FA_MASK].col,
                              head->view[FA_MASK].col, visible->lo, visible->hi);
            any |= bits_any(&visible->bits[r]);
        }
        visible->same_for_all = 0;
        visible->masked = !any;
    }
}
