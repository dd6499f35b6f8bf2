/* All kernels for one instruction set and one dtype, and their table: fa_<isa>_f32 or fa_<isa>_f64.
 *
 * Expects BITS (32 or 64) and, from the header of the instruction set: ISA, VECTOR_BYTES, ROWS x VECS (sums in
 * registers), STEPS and CHUNK (product.inc.h), GROUPS (of rows that share a panel while it is in L1: prefill.inc.h),
 * WORTH_PACKING (rows from which on values are packed, if misaligned or PACK_ALIGNED), TOKENS (linear.inc.h),
 * DECODE_QUERIES, MANY_QUERIES, LEAST_ROWS, MOST_ROWS, WINDOW_ROWS, KEYS_A_ROW, DENSE_ROWS and DENSE_COLUMNS
 * (fa_tuning), DECODE_ROWS and PLACE_ROWS (most rows that share a load of keys from memory: decode.inc.h,
 * decode_scores.inc.h), and the operations that it implements itself (vector.inc.h).
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
_Static_assert(GROUPS == 1 || GROUPS == 2, "groups that may go together");
_Static_assert(VECS >= 1 && VECS <= 4, "vectors of a product for which there are functions");

enum {
    PREFETCH_BYTES = 10240, /* prefetch distance in decode, in bytes */
    DECODE_VECS =
        4, /* decode_scores.inc.h: keys of up to this many vectors are read two at a time, longer ones singly */
    MOST_VECS = 16, /* most vectors of all rows together, for lengths known to the compiler (FOR_USUAL) */
    LONG_VECS = 8,  /* from this many vectors on, one key or value per iteration: prefetchers track few loads */
    LINKS = 4,      /* decode_sums.inc.h: values added to a sum per load and store of it; a multiple of STEPS */
    CHAIN = 64,     /* decode_scores.inc.h: vectors of a key accumulated in one chain */
    STRIP = 64,     /* channels of a query stored together (product.inc.h) */
    PREFETCH_AT_ONCE = 3072, /* bytes of the next block that a group prefetches at once, before it multiplies */
    PASS_BYTES = 8192,       /* decode.inc.h: bytes of keys that several groups pass over in turn, or PASS_KEYS keys */
    PASS_KEYS = 64,
    VALUES_AHEAD = 3, /* their prefetch distance for values, in PREFETCH_BYTES */
    SHARE = 4         /* channels per division (additive.inc.h) */
};

enum { NO_SPAN = -1, JOINED_SPAN = -2 }; /* in place of a state's span number */

/* The numbers of vectors per key or value with specialised code for one or two queries, if all rows together have at
 * most MOST_VECS. */
#define FOR_USUAL(f) f(2) f(4) f(5) f(6) f(8) f(10) f(12) f(16)

/* In this order: a file may only use those above it. */

#include "vector.inc.h"

#include "storage.inc.h"

#include "visible.inc.h"

#include "tile.inc.h"

#include "scales.inc.h"

#include "prefetch.inc.h"

#include "product.inc.h"

#include "dot.inc.h"

#include "decode_scores.inc.h"

#include "additive.inc.h"

LESS_BEGIN("Os")
#include "additive_back.inc.h"
LESS_END

#include "threshold.inc.h"

#include "weights.inc.h"

#include "rules.inc.h"

#include "softmax.inc.h"

#include "state.inc.h"

#include "values.inc.h"

#include "decode_sums.inc.h"

#include "sparse.inc.h"

#include "prefill.inc.h"

#include "decode.inc.h"

#include "attend.inc.h"

LESS_BEGIN("Os")
#include "gradient.inc.h"
LESS_END

#include "rows.inc.h"

#include "columns.inc.h"

LESS_BEGIN("O2")
#include "sparse_rows.inc.h"
LESS_END

#include "rows_back.inc.h"

#include "rotary.inc.h"

#include "linear.inc.h"

LESS_BEGIN("O2")
#include "linear_back.inc.h"
LESS_END

#include "edges.inc.h"

LESS_BEGIN("O2")
#include "edges_back.inc.h"
LESS_END

#include "neighborhood.inc.h"

#include "neighborhood_back.inc.h"

#include "activation.inc.h"

#include "dense.inc.h"

#include "norm.inc.h"

#include "quantize.inc.h"

#define FA_TABLE CONCAT(CONCAT(CONCAT(fa_, ISA), _), REAL_NAME)
extern const fa_kernels FA_TABLE;
const fa_kernels FA_TABLE = {
    .name = "kernels_" STRING(REAL_NAME) "_" STRING(ISA),
    .tile_workspace = tile_workspace,
    .open_tile = open_tile,
    .visit_keys = visit_keys,
    .close_tile = close_tile,
#include "entries.inc.h"
};
