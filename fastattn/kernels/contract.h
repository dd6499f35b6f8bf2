/* The contract between the drivers (Cython) and the kernels (C); with call.h the only headers that a driver sees.
 *
 * A driver cuts the work into *tiles*: a run of query rows of one head. For each tile it calls open_tile, then
 * visit_keys for the spans of keys that the tile may see, in ascending order, then close_tile. All three get the same
 * workspace, of the size that tile_workspace returns. Kernels know nothing of Python or threads, allocate nothing, keep
 * no state outside the workspace, and touch no byte outside the views they are given.
 *
 * The bits of a row depend only on its query and the keys it sees, never on its tile: all sums over keys are split at
 * fixed key positions (FA_BLOCK, FA_SPAN), and a hidden key adds an exact zero.
 */
#ifndef FASTATTN_CONTRACT_H
#define FASTATTN_CONTRACT_H

#include <stddef.h>
#include <stdint.h>

enum {
    FA_BLOCK = 256,      /* keys in one step of the online softmax */
    FA_SPAN = 2048,      /* keys summed into one partial state before it is merged into the row's total */
    FA_DECODE_TILE = 24, /* most rows of a decode tile */
    FA_ALIGN = 64,       /* alignment of a workspace, in bytes */
    FA_ROW_AXES = 66     /* NumPy's 64, plus one when the head axis is split into groups */
};

/* FA_I8 is one of stored numbers only, which scales multiply: no result has it. */
typedef enum { FA_F32, FA_F64, FA_F16, FA_BF16, FA_I8 } fa_dtype;
enum { FA_DTYPES = FA_BF16 + 1 };
typedef enum { FA_DOT, FA_ADDITIVE } fa_score;
typedef enum { FA_SOFTMAX, FA_RELU, FA_SIGMOID, FA_SPARSEMAX, FA_ENTMAX15 } fa_activation;
typedef enum {
    FA_ROW_SOFTMAX,
    FA_ROW_LOG_SOFTMAX,
    FA_ROW_LOGSUMEXP,
    FA_ROW_SPARSEMAX,
    FA_ROW_ENTMAX15,
    /* Their gradients, from a gradient and what they returned (logsumexp: what it was given). */
    FA_ROW_SOFTMAX_BACK,
    FA_ROW_LOG_SOFTMAX_BACK,
    FA_ROW_LOGSUMEXP_BACK,
    FA_ROW_SPARSEMAX_BACK,
    FA_ROW_ENTMAX15_BACK
} fa_row_function;

/* What makes features of a number x of a query or key: nothing, x + 1 or exp(x) below 0, max(x, 0). */
typedef enum { FA_NO_MAP, FA_ELU_PLUS_1, FA_RELU_MAP } fa_feature_map;

/* The operands of softmax and its relatives, and some axes of an array of rows, with the byte strides of each
 * operand. */
enum { FA_ROW_X, FA_ROW_GRAD, FA_ROW_MASK, FA_ROW_OUT, FA_ROW_OPERANDS };
typedef struct {
    int count;
    int64_t shape[FA_ROW_AXES];
    ptrdiff_t strides[FA_ROW_OPERANDS][FA_ROW_AXES];
} fa_axes;

/* Rows side by side in memory, as the columns of a C-ordered matrix. */
typedef struct {
    const char *x, *mask;            /* element 0 of row 0; the mask may be NULL */
    const char *grad;                /* for gradients only; one element per row for FA_ROW_LOGSUMEXP_BACK */
    char *out;                       /* may be x or grad, except then; one element per row for FA_ROW_LOGSUMEXP */
    ptrdiff_t next[FA_ROW_OPERANDS]; /* byte strides between rows */
    const fa_axes *row;              /* the axes of a row */
    int64_t length, rows;            /* elements per row; number of rows, at most fa_kernels.columns_at_once */
    fa_dtype dtype, grad_dtype, out_dtype;
} fa_columns;

/* A strided matrix; strides in bytes, of either sign. data == NULL: not given. */
typedef struct {
    char *data;
    ptrdiff_t row, col;
    ptrdiff_t head; /* from one head's row to the next head's, if heads are interleaved as rows (fa_head) */
    fa_dtype dtype;
} fa_view;

/* The matrices of a head. To add one, name it here and place it in _call.pyx (and name it in its OPERAND_NAMES). */
enum {
    FA_QUERY,         /* (queries, head_dim) */
    FA_KEY,           /* (keys, head_dim) */
    FA_VALUE,         /* (keys, value_dim) */
    FA_MASK,          /* (queries, keys), optional: one byte per key, nonzero means visible */
    FA_BIAS,          /* (queries, keys), optional */
    FA_BLOCK_MASK,    /* (ceil(queries / block_rows), ceil(keys / block_columns)), optional: bytes as of FA_MASK */
    FA_RELATIVE_BIAS, /* (queries, left + right + 1), optional: for the keys from position - left on */
    FA_PREPARED,      /* what prepare_keys found in FA_KEY, optional: for FA_ADDITIVE */
    FA_KEY_SCALE,     /* (keys, scales of a row), by fa_problem.key_scales */
    FA_VALUE_SCALE,   /* the same of values */
    FA_KEY_CENTER,    /* (1, head_dim), finite: what was subtracted from the keys; if has_center */
    FA_OUT,           /* (queries, value_dim) */
    FA_WEIGHTS,       /* optional, accumulation dtype: (queries, keys), or shaped like FA_RELATIVE_BIAS if band */
    FA_LSE,           /* (queries, 1), optional, accumulation dtype */
    FA_SLOPES,        /* one double per row; optional */
    FA_SINKS,         /* one double per row; optional */
    FA_OPERANDS
};

/* What the numbers of int8 keys or values are multiplied by: one number for each row, for each channel or, in each row,
 * for each so many channels. */
typedef enum { FA_NO_SCALES, FA_SCALE_TOKENS, FA_SCALE_CHANNELS, FA_SCALE_BLOCKS } fa_scales;

/* What all heads of a call share. Sums are accumulated in double for FA_F64, otherwise in float. */
typedef struct {
    int64_t head_dim, value_dim;
    int64_t left, right; /* window around the query's position, inclusive; INT64_MAX: unbounded (causal: right 0) */
    fa_score score;
    const double
        *score_weights; /* FA_ADDITIVE: [head_dim], finite ones at most 1 in magnitude; head_dim is then `hidden` */
    double scale;
    double softcap; /* 0: none */
    fa_dtype dtype; /* of the result: drivers select the kernels by it; the kernels only look at the dtypes of views */
    fa_activation activation;
    int has_slope, has_sink, has_center;
    fa_scales key_scales, value_scales;
    int64_t key_each, value_each; /* channels that share a scale: all of a row, or those of a block */
    int64_t chunk, left_chunks;   /* a query sees its own chunk of keys and left_chunks before it; chunk 0: no chunks */
    int64_t block_rows, block_columns; /* of FA_BLOCK_MASK */
    int band;                          /* only the window of the weights is wanted */
    int decode;                        /* few queries: keys are read in place instead of packed */
    int prefetch;                      /* decode: whether to prefetch (fa_prefetching_helps) */
    int value_shift; /* 0; set by kernels if a sum of values overflows: values are then multiplied by 2**-shift */
} fa_problem;

/* One head of one sequence: where its matrices are and how much of them is valid. */
typedef struct {
    fa_view view[FA_OPERANDS];
    int64_t queries, keys;            /* rows */
    int64_t query_length, key_length; /* <= queries, keys */
    int64_t offset;                   /* position of query 0 on the key axis; |offset| < 2**62 */
    int64_t keys_before;              /* keys dropped before key 0; chunks are counted from the first of them */
    int64_t heads; /* query heads interleaved as rows, sharing these keys: row i is query i / heads of head i % heads */
} fa_head;

/* The way back, from the gradient of the output to those of the inputs. Besides the operands of the forward call, of
 * which FA_OUT and FA_LSE are then read: */
enum {
    FA_GRAD_OUT,        /* (queries, value_dim) */
    FA_GRAD_LSE,        /* (queries, 1), optional */
    FA_ROW_STATE,       /* (queries, FA_STATE), accumulation dtype: what back_prepare finds and back_visit needs */
    FA_D_QUERY,         /* (queries, head_dim in whole vectors), accumulation dtype, contiguous rows: added to */
    FA_D_QUERY_LOST,    /* the same: what rounding has taken from it; needed with many keys (FA_SPAN) or heads */
    FA_D_KEY,           /* (keys, head_dim): overwritten, as are values */
    FA_D_VALUE,         /* (keys, value_dim) */
    FA_D_BIAS,          /* (queries, keys), accumulation dtype: added to, as are all that follow */
    FA_D_RELATIVE_BIAS, /* (queries, left + right + 1), accumulation dtype */
    FA_D_BIAS_LOST,     /* the same: what rounding has taken from them; optional, for sums over many heads */
    FA_D_RELATIVE_BIAS_LOST,
    FA_D_ROWS,          /* (queries, 1) doubles, as in all that follow: sums of the scores' gradients over keys */
    FA_D_COLUMNS,       /* (keys, 1): their sums over queries */
    FA_D_DIAGONALS,     /* (1, left + right + 1): over queries, by place in the window */
    FA_D_SLOPES,        /* (queries, 1) */
    FA_D_SINKS,         /* (queries, 1), by back_prepare */
    FA_D_SCORE_WEIGHTS, /* (blocks of keys, head_dim), of FA_ADDITIVE */
    FA_BACK_OPERANDS
};
enum {
    FA_STATE = 7,
    FA_BACK_ROWS = 48,                /* rows of a tile; tiles begin at multiples of it */
    FA_BACK_SPAN = 42 * FA_BACK_ROWS, /* rows summed into one partial gradient of a key */
};

/* Neighbourhood attention: axes of space, the one whose pixels lie in the lanes of a vector last. Calls with fewer have
 * axes of one pixel in front. Where an axis is dilated, the residue classes of its pixels are images of their own, by
 * their strides: for the kernels the dilation is 1 then. Only the last axis may keep one. */
enum { FA_SPACE = 3 };
enum { FA_ALONG_Z, FA_ALONG_X, FA_ALONG_Y };

/* What a query sees along an axis. */
typedef struct {
    int64_t kernel, dilation, stride; /* at least 1; stride <= kernel */
    int causal;
    int clamp; /* at an edge the kernel moves inwards, and its pixels are all there; else those outside are left out */
} fa_reach;

/* What all images of a call have in common. */
typedef struct {
    int64_t head_dim, value_dim;
    double scale, softcap; /* softcap 0: none */
    fa_activation activation;
    fa_reach reach[FA_SPACE];
    ptrdiff_t weights_step[FA_SPACE]; /* bytes from a pixel's weight to that of the next key along an axis */
} fa_neighborhood;

/* An array over the pixels of an image: strides in bytes, of any sign. data == NULL: there is none. */
typedef struct {
    char *data;
    ptrdiff_t space[FA_SPACE], col;
    ptrdiff_t head; /* from a query head to the next one over the same keys */
    fa_dtype dtype;
} fa_pixels;

typedef struct {
    fa_pixels query, key, value, out;
    fa_pixels weights, lse; /* optional, accumulation dtype; weights are zeros where a query does not see a key */
    fa_pixels bias;         /* optional: (2 kernel - 1) numbers along each axis, entry (key - query) + kernel - 1 */
    fa_pixels sink;         /* optional, a double for each head */
    int64_t pixels[FA_SPACE];
    int64_t heads; /* query heads over these keys */
} fa_image;

/* What the way back through neighbourhood attention notes of each query, so that the weights of any key can be computed
 * again: weight = e^(score - base) * factor, and so on for the other activations (neighborhood_back.inc.h); mean: of
 * the gradients of its weights, by weight, less that of its log-sum-exp. */
enum { FA_NOTE_BASE, FA_NOTE_THRESHOLD, FA_NOTE_FACTOR, FA_NOTE_MEAN, FA_NOTES };

/* The way back through an image. Tiles of queries (of_keys 0) give d_query, notes and the sums for bias and sinks; with
 * the notes of all queries, tiles of keys give d_key and d_value. */
typedef struct {
    fa_image image;                    /* its out, weights and lse are not looked at */
    fa_pixels grad_out, grad_lse;      /* grad_lse: optional */
    fa_pixels notes;                   /* accumulation dtype; col: from one note to the next */
    fa_pixels d_query, d_key, d_value; /* optional; those that are added to are of the accumulation dtype */
    int add_query, add_key, add_value; /* whether these are added to what is there */
    int of_keys;
    int of_scores; /* whether gradients of scores are wanted at all, be it for the keys */
    int of_bias, of_sinks;
    /* Sums over the queries of a tile, zeros at first, for each head: two tables whose sum is the gradient of the bias,
     * then LANES numbers, twice, whose sum is that of the sink; accumulation dtype. Entry 0 of a table is for a key
     * `half` before the query along each axis; it has 2 half + 1 rows of rows of table_row numbers, LANES of them
     * behind the last entry. */
    char *tables;
    int64_t half[FA_SPACE], table_row;
} fa_image_back;

/* Numbers in `tables` for each head. */
static inline int64_t fa_table_size(const int64_t *half, int64_t table_row, int lanes)
{
    return 2 * ((2 * half[FA_ALONG_Z] + 1) * (2 * half[FA_ALONG_X] + 1) * table_row + lanes);
}

/* The pixels [*begin, *end) that pixel i sees along an axis of n, of dilation 1; returns where its kernel begins, which
 * may lie outside. */
static inline int64_t fa_neighbors(const fa_reach *reach, int64_t n, int64_t i, int64_t *begin, int64_t *end)
{
    const int64_t group = reach->stride == 1 ? i : i - i % reach->stride;
    const int64_t inside = reach->causal ? reach->stride - 1 : reach->stride / 2;
    const int64_t leader = inside > n - 1 - group ? n - 1 : group + inside;
    int64_t first = leader - (reach->causal ? reach->kernel - 1 : reach->kernel / 2);
    if (reach->clamp && !reach->causal) {
        first = first > n - reach->kernel ? n - reach->kernel : first;
        first = first < 0 ? 0 : first;
    }
    *begin = first < 0 ? 0 : first;
    *end = first + reach->kernel;
    if (reach->causal && *end > i + 1)
        *end = i + 1;
    if (*end > n)
        *end = n;
    return first;
}

/* Gradients of one head of one sequence. Those without data are not wanted. */
typedef struct {
    fa_view view[FA_BACK_OPERANDS];
    int query_is_shared; /* FA_D_QUERY is a sum over heads */
} fa_gradients;

/* Attention along the edges of a graph. Its matrices besides FA_QUERY, FA_KEY, FA_VALUE and FA_OUT, which have a row a
 * node; FA_LSE the same. Those of edges have a row an edge: FA_BIAS and FA_WEIGHTS (edges, 1), and these: */
enum {
    FA_EDGE_KEY = FA_OPERANDS, /* (edges, head_dim), optional */
    FA_EDGE_VALUE,             /* (edges, value_dim), optional */
    FA_UNIT_WEIGHTS,           /* (1, head_dim) of the hidden units, for FA_ADDITIVE; accumulation dtype */
    /* For gradients: those that come in, shaped like FA_OUT and FA_LSE (optional), and those that are wanted, each
     * shaped like its matrix; accumulation dtype. Where heads or channels share a number (a stride of 0), it is a sum.
     */
    FA_GRAPH_GRAD_OUT,
    FA_GRAPH_GRAD_LSE,
    FA_GRAPH_D_QUERY,
    FA_GRAPH_D_KEY,
    FA_GRAPH_D_VALUE,
    FA_GRAPH_D_BIAS,
    FA_GRAPH_D_EDGE_KEY,
    FA_GRAPH_D_EDGE_VALUE,
    FA_GRAPH_D_UNIT_WEIGHTS,
    FA_GRAPH_OPERANDS,
    FA_GRAPH_GRADIENTS = FA_GRAPH_OPERANDS - FA_GRAPH_D_QUERY
};

/* A sparse matrix in rows (CSR) and what lies at its nodes and edges. Row i is a query; it sees the keys indices[t], t
 * from indptr[i] to indptr[i + 1]. All indices are in range: that is the driver's affair. */
typedef struct {
    fa_view view[FA_GRAPH_OPERANDS]; /* of head 0; `head` leads to the next */
    const char *indptr, *indices;    /* 4 or 8 bytes each, so many from one to the next: */
    ptrdiff_t indptr_step, index_step;
    int indptr_size, index_size;
    int64_t edges;
    int64_t heads; /* that are taken together */
    int64_t head_dim, value_dim;
    fa_score score;      /* FA_ADDITIVE: of leaky_relu(query + key + edge key), with this slope below 0 */
    double slope, scale; /* scale: of FA_DOT; that of FA_ADDITIVE is in its weights */
    double softcap;      /* 0: none */
} fa_graph;

/* What the two passes of the gradients have in common. */
typedef struct {
    void *numbers; /* a weight and the gradient of a score for each edge and head: edges_back_numbers says how large */
    char *hidden;  /* becomes 1 where rows find a score of -inf; for the columns: whether any of them did */
    int adds[FA_GRAPH_GRADIENTS];       /* a gradient is added to what is there, from an earlier one of the batch */
    double *totals[FA_GRAPH_GRADIENTS]; /* [heads][channels] instead of the matrix, if all edges share a row: their sum
                                           over the edges of these rows */
} fa_graph_gradients;

/* The matrices of linear attention. */
enum {
    FA_LINEAR_QUERY,     /* (queries, features) before the map; a fa_view's `head` leads to the next head */
    FA_LINEAR_KEY,       /* (keys, features), the same */
    FA_LINEAR_VALUE,     /* (keys, value_dim) */
    FA_LINEAR_LOG_DECAY, /* (keys, features), optional; col is 0 where a key has one number */
    FA_LINEAR_BETA,      /* (keys, 1), optional */
    FA_LINEAR_OUT,       /* (queries, value_dim), as the queries */
    FA_LINEAR_STATE,     /* (features, value_dim), and a column more where it is normalised; optional: zeros */
    FA_LINEAR_NEW_STATE, /* the same, optional; may be the state itself */
    FA_LINEAR_MISSED, /* (keys, value_dim), optional: what is left of a value where the delta rule has predicted it */
    FA_LINEAR_OPERANDS
};

/* A recurrence over keys, and what all heads of a call have in common (fastattn/linear.py has the formulas). */
typedef struct {
    int64_t features, value_dim;
    int64_t heads; /* of queries, over the same keys */
    fa_feature_map map;
    int is_causal, is_normalised;
    int fades; /* log_decay is (keys, value_dim): of the columns of the state, not of its rows */
    int back;  /* with beta: the delta rule's way back. A token adds key and value, reads, and takes back what its own
                * query times -beta times the result says, before the next one's decay */
    double scale, eps;
} fa_linear;

/* The keys of a head, some columns of their values, and all queries over them. */
typedef struct {
    fa_view view[FA_LINEAR_OPERANDS];
    int64_t column, columns; /* of the values; whoever has column 0 takes care of the normaliser */
    int few;                 /* keys are so few that the state is better updated where it lies */
    const int64_t *offset;   /* position of query 0 on the key axis, for each head of queries */
    const int64_t *rows;     /* valid queries, the same */
} fa_linear_head;

/* The gradients of a head of keys, apart from its recurrences. Matrices are contiguous, in the accumulation dtype, and
 * queries, keys and their gradients those of features; d_query and grad_out: a head's rows begin head_rows after those
 * of the one before, those of query query_rows. */
typedef struct {
    int64_t features, value_dim, keys, heads;
    int64_t head_rows, query_rows;
    const int64_t *offset, *rows; /* as in fa_linear_head */
    double eps;
    fa_view log_decay; /* of the call, data NULL without one */
    int64_t chunk;     /* keys between two places where states are compared */
    const void *query, *key;
    void *d_query;      /* linear_divide: NULL, or at first M grad_out */
    void *grad_out;     /* linear_divide: becomes the gradient of the numerator */
    void *d_normaliser; /* a number a row of a query: the gradient of its denominator */
    void *d_key;
    const void *said;  /* (keys, features), NULL without a delta rule: what its prediction takes off d_key */
    void *z, *d_z;     /* (features): at the beginning, and at the end the other end's */
    void *kept;        /* (chunks + 1, features): z at every chunk and the end; NULL: not wanted */
    void *anchor;      /* the same: sums over the columns of the state times its gradient before a decay */
    void *d_log_decay; /* (keys, features), or (keys, 1) where log_decay has one column */
} fa_linear_back;

/* A layer: rows of d_in numbers times a matrix, and what happens to each number of the result. */
enum { FA_DENSE_FEW = 8 }; /* rows up to which the matrix is read where it lies: another order of sums */
typedef enum { FA_DENSE_NOTHING, FA_DENSE_RELU, FA_DENSE_GELU, FA_DENSE_GELU_TANH, FA_DENSE_SILU } fa_dense_activation;
typedef struct {
    int64_t d_in, d_out, rows;
    const void *panels; /* [panel][d_in][fa_tuning.panel], aligned, zeros in columns past d_out */
    fa_dtype dtype;     /* of the panels: the accumulation dtype or, where that is float, any of 16 or 8 bits */
    /* Optional; a number for each column of the panels, in the accumulation dtype. The scale multiplies sums first. */
    const void *scale, *bias;
    fa_dense_activation activation;
    fa_view x, out;             /* (rows, d_in), (rows, d_out) */
    fa_view multiply, residual; /* optional, (rows, d_out); may be `out` */
    int prefetch;               /* few rows: whether to prefetch (fa_prefetching_helps); by the driver */
} fa_dense;

/* Rows of n numbers, normalised. */
typedef struct {
    int64_t n, rows;
    int centred; /* layer norm; else RMS norm */
    double eps, offset;
    const void *weight, *bias; /* optional: n numbers in the accumulation dtype; offset + weight multiplies */
    fa_view x, out;            /* may be the same */
    fa_view residual, sum;     /* optional: what is added first, and where the sum is written */
} fa_norm;

/* Rows of numbers that become int8. */
typedef struct {
    int64_t n, group;    /* numbers of a row, and of a group that has a scale: n is a multiple of it */
    fa_view x;           /* (rows, n) */
    const float *center; /* optional: n numbers, which are subtracted first */
    fa_view to, scales;  /* (rows, n), contiguous rows of int8; (rows, n / group), or (rows, 1) if n is 0 */
} fa_quantize;

/* Parameters of an instruction set that the driver needs to choose its loops; the rest are in the set's own header. */
typedef struct {
    int group_rows;     /* rows that share the loads of a product: tiles are whole groups if possible */
    int decode_queries; /* up to this many queries per head read keys in place: packing would cost more */
    int many_queries;   /* from this many on, each head of a group packs keys for itself: the cost is then small */
    /* Rows of a tile. Packing a block of keys costs as much as 3 rows of work, so small tiles are expensive; large ones
     * leave too few to balance over threads. With a window, what a tile reads and writes should stay in L2:
     * window_rows, and one more for each keys_a_row keys that a row sees. */
    int least_rows, most_rows, window_rows, keys_a_row;
    int lanes; /* numbers in a vector: pixels of neighbourhood attention that are processed together */
    int panel; /* columns of a panel of a layer's matrix */
    /* Rows of a block of a layer's product, and the columns that it passes: rows, and sums, should stay in L2. */
    int dense_rows, dense_columns;
} fa_tuning;

typedef struct {
    const char *name; /* operation, dtype, instruction set */
    fa_tuning tuning;
    /* What is computed of keys alone, for FA_ADDITIVE, kept from one call to the next: FA_PREPARED of a head, aligned
     * to FA_ALIGN. From keys [begin, end), begin a multiple of FA_BLOCK, and end too or the number of keys; in a
     * workspace of a tile of one row. */
    size_t (*prepared_size)(const fa_problem *problem, int64_t keys);
    void (*prepare_keys)(const fa_problem *problem, const fa_head *head, int64_t begin, int64_t end, void *prepared,
                         void *workspace);
    size_t (*tile_workspace)(const fa_problem *problem, int64_t rows, int64_t keys);
    void (*open_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace);
    void (*visit_keys)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t key_begin,
                       int64_t key_end, void *workspace);
    /* Instead of visiting a span: join the result of another workspace that opened the same tile and visited it. Spans
     * must be joined in ascending order; the bits are the same as if they had been visited. */
    size_t (*span_size)(const fa_problem *problem, int64_t rows);
    void (*save_span)(const fa_problem *problem, int64_t rows, void *workspace, void *span);
    void (*join_span)(const fa_problem *problem, const fa_head *head, int64_t rows, void *workspace, const void *span);
    void (*close_tile)(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, void *workspace);
    /* The way back. back_prepare prepares any rows of a head. A block of keys is then opened, visited with the rows
     * [row, row_end) of any number of heads that share its gradients, in ascending order, and closed, which writes the
     * gradients of its keys. Those of queries are added up over blocks, which must come in ascending order. `row` is a
     * multiple of FA_BACK_SPAN if gradients of keys are wanted, else of FA_BACK_ROWS. Which gradients are wanted, and
     * how rows and blocks are shared out, changes no bit. */
    size_t (*back_workspace)(const fa_problem *problem, int64_t keys);
    void (*back_prepare)(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                         int64_t rows, void *workspace);
    void (*back_open)(const fa_problem *problem, int64_t keys, int64_t block, void *workspace);
    void (*back_visit)(const fa_problem *problem, const fa_head *head, const fa_gradients *to, int64_t row,
                       int64_t row_end, void *workspace);
    void (*back_close)(const fa_problem *problem, const fa_head *head, const fa_gradients *to, void *workspace);
    /* Rows of n elements, each contiguous, aligned and in the accumulation dtype; strides in bytes. mask: rows of n
     * bytes, or NULL; grad, out: rows of n elements, or of one, as in fa_columns. */
    void (*rows)(fa_row_function function, const char *x, ptrdiff_t x_row, const char *grad, ptrdiff_t grad_row,
                 const char *mask, ptrdiff_t mask_row, char *out, ptrdiff_t out_row, int64_t n, int64_t rows);
    /* The same, bit for bit, for rows that are side by side in memory, as columns of a C-ordered matrix. */
    int columns_at_once;
    size_t (*columns_workspace)(int64_t length);
    void (*columns)(fa_row_function function, const fa_columns *columns, void *workspace);
    /* n elements with a byte stride, from or to a storage dtype. */
    void (*gather)(void *to, const char *from, ptrdiff_t stride, int64_t n, fa_dtype from_dtype);
    void (*scatter)(char *to, ptrdiff_t stride, const void *from, int64_t n, fa_dtype to_dtype);
    /* out[c] = sum over parts of out_part[c] * exp(lse_part - lse); contiguous, accumulation dtype. */
    void (*merge)(void *out, void *lse, const void *const *outs, const void *lses, int64_t parts, int64_t n);
    /* The gradients of that for outs and lses, from those for out and lse. Overwrites lses. */
    void (*merge_back)(void *const *grad_outs, void *grad_lses, const void *grad_out, const void *grad_lse,
                       const void *const *outs, void *lses, int64_t parts, int64_t n);
    /* The cosines, then the sines, of position * speed, times factor, in the accumulation dtype; angles in double. */
    void (*turns)(void *table, const double *speed, int64_t pairs, int64_t position, double factor);
    /* Rotates rows of channels, each contiguous in the accumulation dtype but possibly misaligned, by its row of the
     * table that turns() makes; strides in bytes. A pair is channels c and c + pairs or, interleaved, 2 c and 2 c + 1;
     * channels from 2 * pairs on are copied. out: may be x. inverse: the other way round. */
    void (*rotate)(char *out, ptrdiff_t out_row, const char *x, ptrdiff_t x_row, const char *table, int64_t channels,
                   int64_t pairs, int64_t rows, int interleaved, int inverse);
    /* Linear attention of a head, all with the same workspace: linear_open takes the state over; linear_keys adds keys,
     * in ascending order and without gaps, and (causal) writes the rows of the queries that stand on them; linear_rows
     * writes rows of queries that see the state as it is then; linear_close leaves the state where it is wanted. Bits
     * depend neither on where keys are cut nor on the columns that a call has. */
    int linear_columns; /* that a call should have a multiple of */
    size_t (*linear_workspace)(const fa_linear *problem, int64_t columns);
    void (*linear_open)(const fa_linear *problem, const fa_linear_head *head, void *workspace);
    void (*linear_keys)(const fa_linear *problem, const fa_linear_head *head, int64_t begin, int64_t end,
                        void *workspace);
    void (*linear_rows)(const fa_linear *problem, const fa_linear_head *head, int64_t query_head, int64_t begin,
                        int64_t end, void *workspace);
    void (*linear_close)(const fa_linear *problem, const fa_linear_head *head, void *workspace);
    /* Gradients of linear attention. to_j = factor * each_j * map(from_j) for `rows` rows of n from `begin` on; each:
     * NULL, or a column. to: contiguous numbers to_row bytes apart; may be where they come from. */
    void (*linear_map)(fa_feature_map map, const fa_view *from, const fa_view *each, double factor, int64_t head,
                       int64_t begin, int64_t rows, int64_t n, void *to, ptrdiff_t to_row);
    /* Rows [begin, end) of gradients of features, which are contiguous, times the slope of the map at x; to: may be
     * where they come from. */
    void (*linear_unmap)(fa_feature_map map, const fa_view *x, const void *from, int64_t head, int64_t begin,
                         int64_t end, int64_t n, const fa_view *to);
    /* to_j += factor * each_j * from_j, rows of n, strides in bytes; each: NULL, or contiguous. */
    void (*linear_add)(void *to, ptrdiff_t to_row, const void *from, ptrdiff_t from_row, double factor,
                       const void *each, int64_t rows, int64_t n);
    /* to_j = a_j . b_j for contiguous rows. */
    void (*linear_dots)(void *to, const void *a, const void *b, int64_t rows, int64_t n);
    /* to[c] += the sum of a * b down a column. */
    void (*linear_products)(void *to, const void *a, const void *b, ptrdiff_t row, int64_t rows, int64_t n);
    /* Denominators: d_query and grad_out divided by them, d_normaliser, kept. Then what they give to the keys, to d_z
     * and to anchor. Last d_log_decay, from all others. */
    void (*linear_divide)(const fa_linear_back *back);
    void (*linear_divide_back)(const fa_linear_back *back);
    void (*linear_fade)(const fa_linear_back *back);
    /* The rows [begin, end) of a graph. */
    size_t (*edges_workspace)(const fa_graph *graph);
    void (*edges)(const fa_graph *graph, int64_t begin, int64_t end, void *workspace);
    /* The gradients. By rows, as above: those of queries, edges and unit weights, and `numbers`. After all rows, by
     * columns: those of keys and values. `graph` is transposed then: its row j is a key, and its indices lead to
     * queries; behind each index lies the number of its edge, of the same size. */
    size_t (*edges_back_numbers)(const fa_graph *graph);
    size_t (*edges_back_workspace)(const fa_graph *graph);
    void (*edges_back_rows)(const fa_graph *graph, const fa_graph_gradients *gradients, int64_t begin, int64_t end,
                            void *workspace);
    void (*edges_back_columns)(const fa_graph *graph, const fa_graph_gradients *gradients, int64_t begin, int64_t end,
                               void *workspace);
    /* The pixels from `begin` to before `end` of an image as queries, against their neighbourhoods. `begin` is a
     * multiple of 2 along FA_ALONG_X and of `lanes` along FA_ALONG_Y, and so is `end`, or it is the image's. tile: the
     * most pixels of a call along each axis. */
    size_t (*neighborhood_workspace)(const fa_neighborhood *problem, const int64_t *pixels, const int64_t *tile);
    void (*neighborhood)(const fa_neighborhood *problem, const fa_image *image, const int64_t *begin,
                         const int64_t *end, void *workspace);
    /* The same box on the way back: of queries, or of keys. */
    size_t (*neighborhood_back_workspace)(const fa_neighborhood *problem, int of_keys, const int64_t *pixels,
                                          const int64_t *tile);
    void (*neighborhood_back)(const fa_neighborhood *problem, const fa_image_back *image, const int64_t *begin,
                              const int64_t *end, void *workspace);
    /* A layer. More than FA_DENSE_FEW rows: dense_pack packs those of a block that begins at `row`, [from, to) of its
     * `rows`, into memory of dense_packed bytes; then dense_block multiplies the block by some panels. The bits of a
     * row do not depend on the block. Few rows: dense_few, x contiguous in the accumulation dtype. */
    size_t (*dense_packed)(int64_t d_in, int64_t rows);
    void (*dense_pack)(const fa_dense *dense, int64_t row, int64_t rows, int64_t from, int64_t to, void *packed);
    size_t (*dense_workspace)(int64_t rows, int64_t panels);
    void (*dense_block)(const fa_dense *dense, int64_t row, int64_t rows, const void *packed, int64_t panel_begin,
                        int64_t panel_end, void *workspace);
    void (*dense_few)(const fa_dense *dense, const void *x, int64_t panel_begin, int64_t panel_end);
    size_t (*norm_workspace)(int64_t n);
    void (*norm_rows)(const fa_norm *norm, int64_t begin, int64_t end, void *workspace);
    /* The rows [begin, end) as int8 (quantize.inc.h). Returns `end`, or the first row that holds a number which is not
     * finite, or too large for its scale's dtype. In the table of float only. */
    size_t (*quantize_workspace)(int64_t n);
    int64_t (*quantize)(const fa_quantize *rows, int64_t begin, int64_t end, void *workspace);
} fa_kernels;

typedef struct {
    const char *name;                     /* as in FASTATTN_ISA */
    const fa_kernels *kernels[FA_DTYPES]; /* by storage dtype */
} fa_instruction_set;

/* The instruction sets of this build that this CPU can run, best first; returns their number. */
int fa_runnable(fa_instruction_set *sets, int room);

/* Makes this the instruction set in use; 0: this build or CPU does not have it. */
int fa_choose(const char *name);

/* Its name. */
const char *fa_chosen(void);

/* The kernels in use for a storage dtype: those of its accumulation dtype. Nobody has chosen: what FASTATTN_ISA names,
 * or the best. */
const fa_kernels *fa_kernels_for(fa_dtype dtype);

/* The names of this CPU's instructions for 16-bit numbers; returns how many. */
int fa_cpu_features(const char **names, int room);

/* Whether this CPU reads contiguous keys faster with software prefetches. */
int fa_prefetching_helps(void);

static inline int64_t fa_query_of(const fa_head *head, int64_t i) { return head->heads == 1 ? i : i / head->heads; }

/* Row i of a matrix with one row per query. */
static inline char *fa_row(const fa_head *head, const fa_view *matrix, int64_t i)
{
    if (head->heads == 1)
        return matrix->data + i * matrix->row;
    return matrix->data + i / head->heads * matrix->row + i % head->heads * matrix->head;
}

static inline int64_t fa_chunk_of(int64_t position, int64_t size)
{
    return position >= 0 ? position / size : -((-position - 1) / size) - 1;
}

/* The keys [*begin, *end) visible to any of the query rows [row, row + rows) by position and length. */
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

/* The row of FA_BLOCK_MASK that row i is in. */
static inline const char *fa_row_of_blocks(const fa_problem *problem, const fa_head *head, int64_t i)
{
    const fa_view *blocks = &head->view[FA_BLOCK_MASK];
    const char *row = blocks->data + fa_query_of(head, i) / problem->block_rows * blocks->row;
    return head->heads == 1 ? row : row + i % head->heads * blocks->head;
}

/* The rows [*first, *last] of FA_BLOCK_MASK that the query rows [row, row + rows) are in. */
static inline void fa_rows_of_blocks(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                     int64_t *first, int64_t *last)
{
    *first = fa_query_of(head, row) / problem->block_rows;
    *last = fa_query_of(head, row + rows - 1) / problem->block_rows;
}

/* Whether a column of FA_BLOCK_MASK is true in any of its rows [first, last], for any head that shares the keys. */
static inline int fa_any_block(const fa_head *head, int64_t first, int64_t last, int64_t column)
{
    const fa_view *blocks = &head->view[FA_BLOCK_MASK];
    const char *at = blocks->data + first * blocks->row + column * blocks->col;
    for (int64_t b = first; b <= last; b++, at += blocks->row)
        for (int64_t h = 0; h < (blocks->head ? head->heads : 1); h++)
            if (at[h * blocks->head])
                return 1;
    return 0;
}

/* Yields the ranges of keys that any of the query rows [row, row + rows) may see, in ascending order; returns 0 when
 * there are no more. *cursor is initially 0. By position and length there is one range; FA_BLOCK_MASK cuts it. No two
 * ranges share a block of FA_BLOCK keys: it is visited once, so that bits do not depend on what other rows see. */
static inline int fa_next_range(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows,
                                int64_t *cursor, int64_t *begin, int64_t *end)
{
    fa_visible_keys(problem, head, row, rows, begin, end);
    if (*begin < *cursor)
        *begin = *cursor;
    if (head->view[FA_BLOCK_MASK].data && *begin < *end) {
        const int64_t columns = problem->block_columns, last = *end;
        int64_t at = *begin, column = at / columns, top, bottom;
        fa_rows_of_blocks(problem, head, row, rows, &top, &bottom);
        while (at < last && !fa_any_block(head, top, bottom, column))
            at = ++column * columns;
        *begin = *end = at < last ? at : last;
        while (at < last && (at == *end || at < (*end + FA_BLOCK - 1) / FA_BLOCK * FA_BLOCK)) {
            const int any = fa_any_block(head, top, bottom, column);
            at = ++column * columns;
            if (any)
                *end = at < last ? at : last;
        }
    }
    *cursor = *end;
    return *begin < *end;
}

#endif
