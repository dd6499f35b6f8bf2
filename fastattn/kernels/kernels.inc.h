/* All kernels for one instruction set and one dtype, and their table: fa_<isa>_f32 or fa_<isa>_f64.
 *
 * Expects BITS (32 or 64) and, from the header of the instruction set: ISA, VECTOR_BYTES, ROWS x VECS (sums in
 * registers), STEPS and CHUNK (product.inc.h), DECODE_QUERIES,
 * MANY_QUERIES, LEAST_ROWS, MOST_ROWS, WINDOW_ROWS and KEYS_A_ROW (fa_tuning), DECODE_ROWS and PLACE_ROWS (rows that
 * share each load where keys come from memory, and at most: decode.inc.h, decode_scores.inc.h), and the words that it
 * does better (vector.inc.h).
 */
#include "contract.h"
#include <float.h>
#include <math.h>
#include <string.h>

#if BITS == 32
#define REAL float
#define REAL_DTYPE FA_F32
#define REAL_NAME f32
#else
#define REAL double
#define REAL_DTYPE FA_F64
#define REAL_NAME f64
#endif

_Static_assert(ROWS == 4 || ROWS == 6 || ROWS == 8, "rows of a product for which there are functions");
_Static_assert(DECODE_ROWS == 2 || DECODE_ROWS == 4, "rows that share a load for which there are functions");
_Static_assert(PLACE_ROWS == 2 || PLACE_ROWS == 6, "the same, of scores");
_Static_assert(VECS >= 1 && VECS <= 4, "vectors of a product for which there are functions");

enum {
    PREFETCH_BYTES = 10240, /* prefetch distance in decode, in bytes */
    DECODE_VECS =
        4, /* decode_scores.inc.h: two keys of up to so many vectors are read at a time, longer ones by themselves */
    MOST_VECS = 16, /* vectors of all rows, where that is known to the compiler (FOR_USUAL) */
    LONG_VECS = 8,  /* keys or values of so many are read one a turn of a loop: prefetchers follow few instructions */
    LINKS = 4,      /* decode_sums.inc.h: values added to a sum between its load and its store; a multiple of STEPS */
    CHAIN = 64,     /* decode_scores.inc.h: vectors of a key that are multiplied and added one after the other */
    WORTH_COPYING = 256, /* from so many rows that share a value on, it is copied to where its vectors are aligned */
    STRIP = 64,          /* channels of a query that lie together (product.inc.h) */
    PREFETCH_AT_ONCE = 3072, /* of the next block that a group asks memory for before it multiplies */
    PASS_BYTES = 8192,       /* of keys that several groups of few rows pass over together, or PASS_KEYS */
    PASS_KEYS = 64,
    VALUES_AHEAD = 3, /* times PREFETCH_BYTES: so far ahead those groups ask for values */
    SHARE = 4         /* channels that share a division (additive.inc.h) */
};

enum { NO_SPAN = -1, JOINED_SPAN = -2 }; /* instead of the number of the span that a state belongs to */

/* The numbers of vectors in a key or value for which one or two queries have code of their own, as long as those of all
 * rows are at most MOST_VECS. */
#define FOR_USUAL(f) f(2) f(4) f(5) f(6) f(8) f(10) f(12) f(16)

/* In this order: a file may use what stands above it, and nothing else. */
#include "vector.inc.h"

#include "storage.inc.h"

#include "visible.inc.h"

#include "tile.inc.h"

#include "prefetch.inc.h"

#include "product.inc.h"

#include "dot.inc.h"

#include "decode_scores.inc.h"

#include "additive.inc.h"

#include "weights.inc.h"

#include "rules.inc.h"

#include "softmax.inc.h"

#include "state.inc.h"

#include "values.inc.h"

#include "decode_sums.inc.h"

#include "prefill.inc.h"

#include "decode.inc.h"

#include "attend.inc.h"

#include "rows.inc.h"

#include "columns.inc.h"

#include "rotary.inc.h"

#define FA_TABLE CONCAT(CONCAT(CONCAT(fa_, ISA), _), REAL_NAME)
extern const fa_kernels FA_TABLE;
const fa_kernels FA_TABLE = {
    .name = "kernels_" STRING(REAL_NAME) "_" STRING(ISA),
    .tuning = {.group_rows = ROWS,
               .decode_queries = DECODE_QUERIES,
               .many_queries = MANY_QUERIES,
               .least_rows = LEAST_ROWS,
               .most_rows = MOST_ROWS,
               .window_rows = WINDOW_ROWS,
               .keys_a_row = KEYS_A_ROW},
    .tile_workspace = tile_workspace,
    .open_tile = open_tile,
    .visit_keys = visit_keys,
    .span_size = span_size,
    .save_span = save_span,
    .join_span = join_span,
    .close_tile = close_tile,
    .rows = rows,
    .columns_at_once = COLUMN_ROWS,
    .columns_workspace = columns_workspace,
    .columns = columns,
    .gather = gather,
    .scatter = scatter,
    .merge = merge,
    .turns = turns,
    .rotate = rotate,
};
