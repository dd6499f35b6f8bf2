/* The workspace of a tile: what lies where. Sizes depend on shapes only. */

/* What additive scores need besides (additive.inc.h). */
struct additive {
    real *w;             /* [channels] their weights, times -2 and the scale; zeros */
    real w_sum;          /* the same without -2, summed */
    real *q_raw, *k_raw; /* what q and k are the exponentials of */
    char *row_is_wide;   /* [rows] whether a row has an argument beyond ADDITIVE_LIMIT */
    key_bits wide_keys;  /* the same of the block's keys */
    int all_wide;
};

struct tile {
    int group;         /* rows of a group: ROWS; in decode, the rows divided evenly over the groups */
    int64_t channels;  /* head_dim rounded up to whole terms of a score, or whole vectors (decode); zeros */
    int64_t value_row; /* numbers in a row of o: value_dim rounded up to whole vectors */
    real *q;           /* queries as the score wants them: [group][strip of channels][row][STRIP] */
    real *k;           /* a block of keys, the same: by panels of VECS vectors, [channel][key]; some keys (decode) */
    real *v;           /* a block of values where they cannot be read in place, rows of v_row numbers */
    int64_t v_row;
    real *s;       /* [ROWS][FA_BLOCK] scores, then weights, of a group and block; [block][rows][FA_BLOCK] in decode */
    real *part;    /* [ROWS][value_row] their weighted sum; [rows][value_row] in decode */
    real *chunk;   /* [DECODE_ROWS][value_row] a part of that, in decode */
    real *extra;   /* [2][FA_BLOCK] the bias of one row, and a part of it */
    double *after; /* [rows] what scores are still multiplied by after the product, if anything (scale_after_product) */
    int64_t row;   /* the first row of the tile */
    int64_t *span; /* [groups] which span of keys a group's state is of; with none, its part of o is not set */
    real *m, *l, *o; /* the running state: [rows] maximum, [rows][LANES] sum, [rows][value_row] output */
    /* The same of the spans before it, and what rounding has taken from it, of groups that have seen several. */
    char *many_spans; /* [groups] */
    real *m_all, *l_all, *l_error, *o_all, *o_error;
    struct additive additive;
};

enum { PANEL = VECS * LANES }; /* keys in a panel */

/* Rows of a run's blocks, at most (keys_of_run). */
enum {
    ROWS_OF_RUN = DECODE_ROWS * FA_SPAN / FA_BLOCK > FA_DECODE_TILE ? DECODE_ROWS *FA_SPAN / FA_BLOCK : FA_DECODE_TILE
};

/* How many keys of a span a tile of few queries passes over at a time: memory likes long runs of keys, and then long
 * runs of values, but the scores of a run should stay in the first cache. */
static ALWAYS_INLINE int64_t keys_of_run(int64_t rows)
{
    const int64_t keys = rows <= DECODE_ROWS ? FA_SPAN : FA_SPAN * DECODE_ROWS / rows / FA_BLOCK * FA_BLOCK;
    return keys > FA_BLOCK ? keys : FA_BLOCK;
}

/* The terms of a weighted sum, STEPS keys each, that cover a block's keys from `lo` on, or up to `hi`. */
static ALWAYS_INLINE int term_begin(int lo) { return lo / STEPS * STEPS; }
static ALWAYS_INLINE int term_end(int hi) { return (hi + STEPS - 1) / STEPS * STEPS; }

/* A scale that might carry a query, or itself, out of the range of its dtype is given to each row in two parts, before
 * and after the product (pack_wide_queries). */
static ALWAYS_INLINE int scale_after_product(const fa_problem *problem)
{
    return problem->scale != 0 && (fabs(problem->scale) > 1e3 || fabs(problem->scale) < 1e-6);
}

static ALWAYS_INLINE char *take(char **at, int64_t numbers)
{
    char *here = *at;
    *at += (numbers * (int64_t)sizeof(real) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    return here;
}

/* Numbers of a group's queries. */
static ALWAYS_INLINE int64_t group_size(int64_t channels) { return (channels + STRIP - 1) / STRIP * STRIP * ROWS; }

/* Lays a tile out from `base` on; returns its size. */
static size_t lay_out(struct tile *tile, const fa_problem *problem, int64_t rows, int64_t keys, char *base)
{
    char *at = base + (sizeof(struct tile) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
    int64_t value_row = (problem->value_dim + LANES - 1) / LANES * LANES;
    const int additive = problem->score == FA_ADDITIVE;
    const int whole = problem->decode ? LANES : additive && STEPS < SHARE ? SHARE : STEPS;
    int64_t channels = (problem->head_dim + whole - 1) / whole * whole;
    int64_t block = keys < FA_BLOCK ? (keys + STEPS - 1) / STEPS * STEPS : FA_BLOCK;
    int64_t blocks = ((keys < FA_SPAN ? keys : FA_SPAN) + FA_BLOCK - 1) / FA_BLOCK;
    int64_t scores = !problem->decode ? ROWS : rows * blocks < ROWS_OF_RUN ? rows * blocks : ROWS_OF_RUN;
    int64_t groups = (rows + ROWS - 1) / ROWS;
    tile->group = problem->decode && groups ? (int)((rows + groups - 1) / groups) : ROWS;
    int64_t panels = (block + PANEL - 1) / PANEL;
    tile->channels = channels;
    tile->value_row = value_row;
    /* A stride of a multiple of 1 KiB would crowd a block's rows into a few sets of the first cache. */
    tile->v_row = value_row * (int64_t)sizeof(real) % 1024 ? value_row : value_row + LANES;
    tile->q = (real *)take(&at, groups * group_size(channels));
    tile->k = (real *)take(&at, problem->decode ? (4 + PASS_KEYS) * channels : panels * PANEL * channels);
    tile->v = (real *)take(&at, block * tile->v_row);
    tile->s = (real *)take(&at, scores * FA_BLOCK);
    tile->part = (real *)take(&at, (problem->decode ? rows : ROWS) * value_row);
    tile->chunk = (real *)take(&at, problem->decode ? DECODE_ROWS * value_row : 0);
    tile->extra = (real *)take(&at, 2 * FA_BLOCK);
    tile->after =
        (double *)take(&at, scale_after_product(problem) ? rows * (int64_t)(sizeof(double) / sizeof(real)) : 0);
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
    struct tile tile; /* only its size is asked for: the addresses are not used */
    return lay_out(&tile, problem, rows, keys, (char *)(uintptr_t)FA_ALIGN);
}
