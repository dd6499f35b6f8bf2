/* The layout of a tile's workspace. Sizes depend on shapes only. */

/* Additional state of additive scores (additive.inc.h). */
struct additive {
    real *w;             /* [channels] score weights times -2 and the scale; zero-padded */
    real w_sum;          /* the sum of weights times the scale */
    real *q_raw, *k_raw; /* the arguments whose exponentials are q and k */
    char *row_is_wide;   /* [rows] whether a row has an argument beyond ADDITIVE_LIMIT */
    key_bits wide_keys;  /* the same for the keys of the block */
    int all_wide;
};

/* Where a row's weights begin (threshold.inc.h): they are of its numbers less `base`, less t and what t lacks. */
struct threshold {
    real base, t, rest;
};

/* What is kept of a tile's scores where the weights are sparsemax's or 1.5-entmax's (sparse.inc.h): of each row a list
 * of vectors, in the order of their keys. */
struct sparse {
    int64_t first;               /* keys and vectors count from here, a multiple of FA_BLOCK */
    int64_t room;                /* vectors for which a list has room; one more may be written and not count */
    real *scores;                /* [rows][room + 1][LANES] scores, then weights */
    uint32_t *place;             /* [rows][room + 1] which vector of its row it is */
    int64_t *count, *next;       /* [rows] of the list; the first that no block has taken yet */
    real *most;                  /* [rows] the largest score */
    real *total;                 /* [rows] of the weights: 1, 0 in a row that sees nothing, or NaN */
    struct threshold *threshold; /* [rows] */
};

struct tile {
    int group;         /* rows per group: ROWS; in decode, the rows divided evenly among the groups */
    int64_t channels;  /* head_dim rounded up to whole terms of a score, or whole vectors (decode); zero-padded */
    int64_t value_row; /* row length of o: value_dim rounded up to whole vectors */
    real *q;           /* packed queries: [group][strip of channels][row][STRIP] */
    real *k;           /* a packed block of keys, [panel][channel][key], VECS vectors per panel; a few keys in decode */
    real *v;           /* a block of values that are not read in place: packed as [panel of columns][key][PANEL], or in
                          rows of v_row numbers (decode, sparse weights) */
    int64_t v_row, v_panel;
    real *s; /* [ROWS][SCORE_ROW] scores, then weights, of a group (or several) and block; [block][rows][SCORE_ROW] in
                decode */
    real *part;      /* [ROWS][value_row] the weighted sum; [rows][value_row] in decode */
    real *chunk;     /* [DECODE_ROWS][value_row] a partial sum, in decode */
    real *extra;     /* [2][FA_BLOCK] the bias of one row, and one of its terms */
    double *after;   /* [rows] factor of the scores after the product, if any (scale_after_product) */
    double *center;  /* [rows] what the centre of the keys adds to a score, if there is one (scales.inc.h) */
    int64_t row;     /* the first row of the tile */
    int64_t *span;   /* [groups] the span of a group's state; with NO_SPAN its rows of o are not set */
    real *m, *l, *o; /* the running state: [rows] maximum, [rows][LANES] sum, [rows][value_row] output */
    /* The same for the spans before it, with rounding errors, for groups that have seen several. */
    char *many_spans; /* [groups] */
    real *m_all, *l_all, *l_error, *o_all, *o_error;
    /* [rows] which rows are computed again, by products of float; NULL: those are all that there is, as everywhere but
     * in dot_bf16.inc.h. Else the last LANES numbers of a row of o are the sum of its rounded weights. */
    char *exact;
    struct additive additive;
    struct sparse sparse;
};

enum {
    PANEL = VECS * LANES,      /* keys in a panel, or columns of values */
    SCORE_ROW = FA_BLOCK + 16, /* numbers from a row of scores to the next: with FA_BLOCK, rows 4 KiB apart would wait
                                  for each other where one is stored and the other loaded */
};

/* Most rows of scores in a run: rows times blocks (keys_of_run). */
enum {
    ROWS_OF_RUN = DECODE_ROWS * FA_SPAN / FA_BLOCK > FA_DECODE_TILE ? DECODE_ROWS *FA_SPAN / FA_BLOCK : FA_DECODE_TILE
};

/* How many keys of a span a decode tile processes at a time: long runs of keys, and then of values, are read fastest
 * from memory, but the scores of a run should stay in L1. */
static ALWAYS_INLINE int64_t keys_of_run(int64_t rows)
{
    const int64_t keys = rows <= DECODE_ROWS ? FA_SPAN : FA_SPAN * DECODE_ROWS / rows / FA_BLOCK * FA_BLOCK;
    return keys > FA_BLOCK ? keys : FA_BLOCK;
}

/* Numbers from a block of scores to the next in decode: those of a single row are contiguous. */
static ALWAYS_INLINE int64_t block_of_scores(int64_t rows) { return rows == 1 ? FA_BLOCK : rows * SCORE_ROW; }

/* Where the terms of a weighted sum, of STEPS keys each, that cover keys [lo, hi) of a block begin and end. */
static ALWAYS_INLINE int term_begin(int lo) { return lo / STEPS * STEPS; }
static ALWAYS_INLINE int term_end(int hi) { return (hi + STEPS - 1) / STEPS * STEPS; }

/* A scale that is out of range of the dtype, or might carry a query out of range, is split for each row into factors
 * before and after the product (pack_wide_queries). */
static ALWAYS_INLINE int scale_is_wide(double scale) { return scale != 0 && (fabs(scale) > 1e3 || fabs(scale) < 1e-6); }
static ALWAYS_INLINE int scale_after_product(const fa_problem *problem) { return scale_is_wide(problem->scale); }

/* Weights that are exactly 0 but for the largest scores. */
static ALWAYS_INLINE int is_sparse(const fa_problem *problem)
{
    return problem->activation == FA_SPARSEMAX || problem->activation == FA_ENTMAX15;
}

static ALWAYS_INLINE char *take(char **at, int64_t numbers)
{
    char *here = *at;
    *at += (numbers * (int64_t)sizeof(real) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    return here;
}

/* Size of a group's packed queries, in numbers. */
static ALWAYS_INLINE int64_t group_size(int64_t channels) { return (channels + STRIP - 1) / STRIP * STRIP * ROWS; }

/* The most vectors between the first and the last key that a tile may see. */
static int64_t reach_of_tile(const fa_problem *problem, int64_t rows, int64_t keys)
{
    int64_t most = keys < (int64_t)1 << 50 ? keys : (int64_t)1 << 50; /* no memory has so many */
    const int64_t all = most;
    if (problem->left < all && problem->right < all && problem->left + problem->right + rows < most)
        most = problem->left + problem->right + rows;
    if (problem->chunk && problem->chunk < all && problem->left_chunks < all / problem->chunk &&
        (problem->left_chunks + 2) * problem->chunk + rows < most)
        most = (problem->left_chunks + 2) * problem->chunk + rows;
    return (most + FA_BLOCK < all ? most + FA_BLOCK : all) / LANES + 1;
}

/* Lays a tile out from `base` on; returns its size. at_once: rows of scores, but in decode; behind: numbers behind the
 * columns of a row of o. */
static size_t lay_out(struct tile *tile, const fa_problem *problem, int64_t rows, int64_t keys, int at_once,
                      int64_t behind, char *base)
{
    char *at = base + (sizeof(struct tile) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    int64_t value_row = (problem->value_dim + LANES - 1) / LANES * LANES + behind;
    const int additive = problem->score == FA_ADDITIVE;
    const int whole = problem->decode ? LANES : additive && STEPS < SHARE ? SHARE : STEPS;
    int64_t channels = (problem->head_dim + whole - 1) / whole * whole;
    int64_t block = keys < FA_BLOCK ? (keys + STEPS - 1) / STEPS * STEPS : FA_BLOCK;
    int64_t blocks = ((keys < FA_SPAN ? keys : FA_SPAN) + FA_BLOCK - 1) / FA_BLOCK;
    int64_t scores = !problem->decode ? at_once : rows * blocks < ROWS_OF_RUN ? rows * blocks : ROWS_OF_RUN;
    int64_t groups = (rows + ROWS - 1) / ROWS;
    tile->group = problem->decode && groups ? (int)((rows + groups - 1) / groups) : ROWS;
    int64_t panels = (block + PANEL - 1) / PANEL;
    tile->exact = NULL;
    tile->channels = channels;
    tile->value_row = value_row;
    /* With a stride that is a multiple of 1 KiB the rows of a block would map to a few sets of L1. */
    tile->v_row = value_row * (int64_t)sizeof(real) % 1024 ? value_row : value_row + LANES;
    tile->q = (real *)take(&at, groups * group_size(channels));
    tile->k = (real *)take(&at, problem->decode ? (4 + PASS_KEYS) * channels : panels * PANEL * channels);
    const int64_t v_columns = (value_row + PANEL - 1) / PANEL * PANEL;
    tile->v_panel = block * PANEL;
    tile->v = (real *)take(&at, block * (tile->v_row > v_columns ? tile->v_row : v_columns));
    tile->s = (real *)take(&at, scores * SCORE_ROW);
    tile->part = (real *)take(&at, (problem->decode ? rows : at_once) * value_row);
    tile->chunk = (real *)take(&at, problem->decode ? DECODE_ROWS * value_row : 0);
    tile->extra = (real *)take(&at, 2 * FA_BLOCK);
    tile->after =
        (double *)take(&at, scale_after_product(problem) ? rows * (int64_t)(sizeof(double) / sizeof(real)) : 0);
    tile->center = (double *)take(&at, problem->has_center ? rows * (int64_t)(sizeof(double) / sizeof(real)) : 0);
    tile->span = (int64_t *)take(&at, groups * (int64_t)(sizeof(int64_t) / sizeof(real)));
    tile->many_spans = take(&at, groups);
    tile->m = (real *)take(&at, rows);
    tile->l = (real *)take(&at, rows * LANES);
    tile->o = (real *)take(&at, rows * value_row);
    if (additive) {
        tile->additive.w = (real *)take(&at, channels);
        tile->additive.q_raw = (real *)take(&at, groups * group_size(channels));
        tile->additive.k_raw = (real *)take(&at, panels * PANEL * channels);
        tile->additive.row_is_wide = take(&at, rows);
    }
    if (is_sparse(problem)) {
        const int64_t words = sizeof(int64_t) / sizeof(real);
        struct sparse *sparse = &tile->sparse;
        sparse->room = reach_of_tile(problem, rows, keys);
        sparse->scores = (real *)take(&at, rows * (sparse->room + 1) * LANES);
        sparse->place = (uint32_t *)take(&at, rows * (sparse->room + 1)); /* no larger than real */
        sparse->count = (int64_t *)take(&at, rows * words);
        sparse->next = (int64_t *)take(&at, rows * words);
        sparse->most = (real *)take(&at, rows);
        sparse->total = (real *)take(&at, rows);
        sparse->threshold = (struct threshold *)take(&at, rows * (int64_t)(sizeof(struct threshold) / sizeof(real)));
    }
    if (keys > FA_SPAN) {
        tile->m_all = (real *)take(&at, rows);
        tile->l_all = (real *)take(&at, rows * LANES);
        tile->l_error = (real *)take(&at, rows * LANES);
        tile->o_all = (real *)take(&at, rows * value_row);
        tile->o_error = (real *)take(&at, rows * value_row);
    }
    return (size_t)(at - base);
}

static size_t tile_workspace(const fa_problem *problem, int64_t rows, int64_t keys)
{
    struct tile tile; /* for its size only: the addresses are not used */
    return lay_out(&tile, problem, rows, keys, GROUPS * ROWS, 0, (char *)(uintptr_t)FA_ALIGN);
}
