/* The contract between the drivers (Cython) and the kernels (C); the only header that a driver sees.
 *
 * A driver cuts the work into *tiles*: a run of query rows of one head. For each tile it calls open_tile, then
 * visit_keys for the spans of keys that the tile may see, in ascending order, then close_tile. All three get the same
 * workspace, whose size tile_workspace tells. Kernels know neither Python nor threads, allocate nothing, keep no state
 * outside the workspace, and touch no byte outside the views that they are given.
 *
 * The bits of a row depend on its own query and on the keys that it sees, never on the tile that it is in: all sums
 * over keys are cut at fixed key positions (FA_BLOCK, FA_SPAN), and a hidden key adds an exact zero.
 */
#ifndef FASTATTN_CONTRACT_H
#define FASTATTN_CONTRACT_H

#include <stddef.h>
#include <stdint.h>

enum {
    FA_BLOCK = 256,      /* keys in one step of the online softmax */
    FA_SPAN = 2048,      /* keys summed into one partial state before it is merged into the row's total */
    FA_DECODE_TILE = 24, /* rows of a tile of few queries, at most */
    FA_ALIGN = 64,       /* of a workspace, in bytes */
    FA_ROW_AXES = 66     /* NumPy's 64, and one more where the heads are split in groups */
};

typedef enum { FA_F32, FA_F64, FA_F16, FA_BF16 } fa_dtype;
enum { FA_DTYPES = FA_BF16 + 1 };
typedef enum { FA_DOT, FA_ADDITIVE } fa_score;
typedef enum { FA_SOFTMAX, FA_RELU, FA_SIGMOID } fa_activation;
typedef enum { FA_ROW_SOFTMAX, FA_ROW_LOG_SOFTMAX, FA_ROW_LOGSUMEXP } fa_row_function;

/* The operands of softmax and its relatives, and some of the axes of an array of rows: byte strides for each. */
enum { FA_ROW_X, FA_ROW_MASK, FA_ROW_OUT, FA_ROW_OPERANDS };
typedef struct {
    int count;
    int64_t shape[FA_ROW_AXES];
    ptrdiff_t strides[FA_ROW_OPERANDS][FA_ROW_AXES];
} fa_axes;

/* Neighbouring rows whose numbers do not lie side by side. */
typedef struct {
    const char *x, *mask;            /* number 0 of row 0; the mask may be NULL */
    char *out;                       /* may be x; one number a row for FA_ROW_LOGSUMEXP */
    ptrdiff_t next[FA_ROW_OPERANDS]; /* byte strides from a row to the next */
    const fa_axes *row;              /* those of a row */
    int64_t length, rows;            /* numbers in a row; rows, at most fa_kernels.columns_at_once */
    fa_dtype dtype, out_dtype;
} fa_columns;

/* A strided matrix of numbers of a dtype; strides in bytes, of any sign. data == NULL: there is none. */
typedef struct {
    char *data;
    ptrdiff_t row, col;
    ptrdiff_t head; /* from a row of one head to that of the next, where heads share rows (fa_head) */
    fa_dtype dtype;
} fa_view;

/* The matrices of a head. A new one is a name here, and in _call.pyx where it is read. */
enum {
    FA_QUERY,         /* (queries, head_dim) */
    FA_KEY,           /* (keys, head_dim) */
    FA_VALUE,         /* (keys, value_dim) */
    FA_MASK,          /* (queries, keys), optional: one byte a key, nonzero means visible */
    FA_BIAS,          /* (queries, keys), optional */
    FA_RELATIVE_BIAS, /* (queries, left + right + 1), optional: of the keys from position - left on */
    FA_OUT,           /* (queries, value_dim) */
    FA_WEIGHTS,       /* optional, accumulation dtype: (queries, keys), or as FA_RELATIVE_BIAS with band */
    FA_LSE,           /* (queries, 1), optional, accumulation dtype */
    FA_SLOPES,        /* doubles, by row; optional */
    FA_SINKS,         /* the same */
    FA_OPERANDS
};

/* What all heads of a call have in common. Accumulation is in double for FA_F64, else in float. */
typedef struct {
    int64_t head_dim, value_dim;
    int64_t left, right; /* window around the query's position, inclusive; INT64_MAX: unbounded (causal: right 0) */
    fa_score score;
    const double
        *score_weights; /* FA_ADDITIVE: [head_dim], at most 1 in size where finite; head_dim is `hidden` then */
    double scale;
    double softcap; /* 0: none */
    fa_dtype dtype; /* of the result: the drivers choose kernels by it, which look at views alone */
    fa_activation activation;
    int has_slope, has_sink;
    int64_t chunk, left_chunks; /* a query sees its own chunk of so many keys and some to the left; 0: no such rule */
    int band;                   /* of the weights only the window is wanted */
    int decode;                 /* queries are so few that keys are read where they lie, and not packed */
    int prefetch;               /* decode: whether to (fa_prefetching_helps) */
    int value_shift;            /* 0; kernels set it where a sum of values overflows: they are taken times 2**-shift */
} fa_problem;

/* One head of one sequence: where its matrices lie and how much of them counts. */
typedef struct {
    fa_view view[FA_OPERANDS];
    int64_t queries, keys;            /* rows */
    int64_t query_length, key_length; /* <= queries, keys */
    int64_t offset;                   /* position of query 0 on the key axis; |offset| < 2**62 */
    int64_t keys_before;              /* keys that came before key 0 and are gone; chunks count from the first */
    int64_t
        heads; /* query heads interleaved as rows, all over these keys: row i is query i / heads of head i % heads */
} fa_head;

/* Numbers of an instruction set by which the driver chooses its loops; the others stand in the set's own header. */
typedef struct {
    int group_rows;     /* rows that share the loads of a product: tiles are whole groups where they can be */
    int decode_queries; /* so many in a head, and no more, read keys where they lie: packing them would cost more */
    int many_queries;   /* so many, or more: each head of a group packs its keys for itself, which costs little then */
    /* Rows of a tile. Packing a block of keys costs a tile as much as 3 rows of work, so few rows are dear; many leave
     * too few tiles to share out evenly. In a window what a tile reads and writes should stay in the second cache:
     * window_rows, and one more for each keys_a_row keys that a row sees. */
    int least_rows, most_rows, window_rows, keys_a_row;
} fa_tuning;

typedef struct {
    const char *name; /* operation, dtype, instruction set */
    fa_tuning tuning;
    size_t (*tile_workspace)(const fa_problem *problem, int64_t rows, int64_t keys);
    void (*open_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace);
    void (*visit_keys)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t key_begin,
                       int64_t key_end, void *workspace);
    /* In place of visiting a span here: what another workspace, with the same tile opened, has found there. Spans must
     * be joined in ascending order; bits are the same as if they were visited. */
    size_t (*span_size)(const fa_problem *problem, int64_t rows);
    void (*save_span)(const fa_problem *problem, int64_t rows, void *workspace, void *span);
    void (*join_span)(const fa_problem *problem, const fa_head *head, int64_t rows, void *workspace, const void *span);
    void (*close_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace);
    /* Rows of n numbers, each contiguous, aligned and of the accumulation dtype, byte strides apart; mask: rows of n
     * bytes, or NULL; out: rows of n numbers (may be x), or of one for FA_ROW_LOGSUMEXP. */
    void (*rows)(fa_row_function function, const char *x, ptrdiff_t x_row, const char *mask, ptrdiff_t mask_row,
                 char *out, ptrdiff_t out_row, int64_t n, int64_t rows);
    /* The same, bit for bit, for rows side by side. */
    int columns_at_once;
    size_t (*columns_workspace)(int64_t length);
    void (*columns)(fa_row_function function, const fa_columns *columns, void *workspace);
    /* n numbers with a byte stride, from or to a storage dtype. */
    void (*gather)(void *to, const char *from, ptrdiff_t stride, int64_t n, fa_dtype from_dtype);
    void (*scatter)(char *to, ptrdiff_t stride, const void *from, int64_t n, fa_dtype to_dtype);
    /* out[c] = sum over parts of out_part[c] * exp(lse_part - lse); contiguous, accumulation dtype. */
    void (*merge)(void *out, void *lse, const void *const *outs, const void *lses, int64_t parts, int64_t n);
    /* Cosines, then sines, of position * speed, times factor, accumulation dtype; angles in double. */
    void (*turns)(void *table, const double *speed, int64_t pairs, int64_t position, double factor);
    /* Rows of channels, contiguous in the accumulation dtype and perhaps misaligned, byte strides apart, each with its
     * row of a table of turns. A pair is channels c and c + pairs or, interleaved, 2 c and 2 c + 1; those from 2 *
     * pairs on are copied. out: may be x. */
    void (*rotate)(char *out, ptrdiff_t out_row, const char *x, ptrdiff_t x_row, const char *table, int64_t channels,
                   int64_t pairs, int64_t rows, int interleaved);
} fa_kernels;

typedef struct {
    const char *name;                     /* as in FASTATTN_ISA */
    const fa_kernels *kernels[FA_DTYPES]; /* for calls of this storage dtype */
} fa_instruction_set;

/* The instruction sets in this build that this CPU can run, best first; returns how many. */
int fa_runnable(fa_instruction_set *sets, int room);

/* Whether keys that follow each other without gaps come faster from memory where instructions ask for them. */
int fa_prefetching_helps(void);

/* The query that row i is of. */
static inline int64_t fa_query_of(const fa_head *head, int64_t i) { return head->heads == 1 ? i : i / head->heads; }

/* Row i of a matrix with a row for each query. */
static inline char *fa_row(const fa_head *head, const fa_view *matrix, int64_t i)
{
    if (head->heads == 1)
        return matrix->data + i * matrix->row;
    return matrix->data + i / head->heads * matrix->row + i % head->heads * matrix->head;
}

/* The chunk in which a position lies. */
static inline int64_t fa_chunk_of(int64_t position, int64_t size)
{
    return position >= 0 ? position / size : -((-position - 1) / size) - 1;
}

/* The keys [*begin, *end) that any of the query rows [row, row + rows) may see by position and length. */
static inline void fa_visible_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                   int64_t *begin, int64_t *end)
{
    int64_t last = (row + rows < head->query_length ? row + rows : head->query_length) - 1;
    *begin = *end = 0;
    if (last < row)
        return;
    int64_t first_position = head->offset + fa_query_of(head, row);
    int64_t last_position = head->offset + fa_query_of(head, last);
    int64_t lo = 0, hi = head->key_length;
    if (problem->left < INT64_MAX && first_position - problem->left > lo)
        lo = first_position - problem->left;
    if (problem->right < INT64_MAX && last_position + problem->right + 1 < hi)
        hi = last_position + problem->right + 1;
    if (problem->chunk) {
        const int64_t before = head->keys_before;
        const int64_t first_chunk = fa_chunk_of(before + first_position, problem->chunk);
        const int64_t last_chunk = fa_chunk_of(before + last_position, problem->chunk);
        if (problem->left_chunks < INT64_MAX && first_chunk - problem->left_chunks > (before + lo) / problem->chunk)
            lo = (first_chunk - problem->left_chunks) * problem->chunk - before;
        if (last_chunk < (before + hi) / problem->chunk)
            hi = (last_chunk + 1) * problem->chunk - before;
    }
    if (lo < hi) {
        *begin = lo;
        *end = hi;
    }
}

/* Yields the ranges of keys that any of the query rows [row, row + rows) may see, in ascending order; 0 when there are
 * no more. *cursor is 0 at first. Rows see ranges that move one way only (visible.inc.h); today there is one range. */
static inline int fa_next_range(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                int64_t *cursor, int64_t *begin, int64_t *end)
{
    if (*cursor)
        return 0;
    *cursor = 1;
    fa_visible_keys(problem, head, row, rows, begin, end);
    return *begin < *end;
}

#endif
