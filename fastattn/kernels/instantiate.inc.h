/* All kernels once per dtype, and then the table of one instruction set.
 * Expects ISA, VECTOR_BYTES, ROWS x VECS (sums in registers), STEPS and CHUNK (product.inc.h), FEW_ROWS and PLACE_ROWS
 * (rows that share each load where keys come from memory, and at most: few.inc.h, dot.inc.h), and the words that the
 * instruction set overrides (vector.inc.h). */
#include "fastattn.h"
#include <float.h>
#include <math.h>
#include <string.h>

#include "visible.inc.h"

enum {
    FETCH_BYTES = 10240, /* so far ahead keys and values are asked for where few rows share them */
    FEW_VECS = 4,        /* two rows of so many vectors are read at a time there, longer ones by themselves */
    MOST_VECS = 16,      /* vectors of all rows, where that is known to the compiler (FOR_USUAL) */
    LONG_VECS = 8, /* keys or values of so many are read one a turn of a loop: prefetchers follow few instructions */
    LINKS = 4,     /* values for one load and store of a sum there; a multiple of STEPS */
    CHAIN = 64,    /* vectors of a key that are multiplied and added one after the other there */
    WORTH_COPYING = 256,  /* rows that share a value; for so many it is copied to where its vectors are aligned */
    STRIP = 64,           /* channels of a query that lie together (product.inc.h) */
    BYTES_AT_ONCE = 3072, /* of the next block that a group asks memory for before it multiplies */
    PASS_BYTES = 8192,    /* of keys that several groups of few rows pass over together, or PASS_KEYS */
    PASS_KEYS = 64,
    VALUES_AHEAD = 3, /* times FETCH_BYTES: so far ahead those groups ask for values */
    SHARE = 4         /* channels that share a division (additive.inc.h) */
};

enum { NO_SPAN = -1, JOINED_SPAN = -2 }; /* instead of the number of the span that a state belongs to */

/* The numbers of vectors in a key or value for which one or two queries have code of their own, as long as those of all
 * rows are at most MOST_VECS. */
#define FOR_USUAL(f) f(2) f(4) f(5) f(6) f(8) f(10) f(12) f(16)

#define BITS 32
#define REAL float
#define REAL_DTYPE FA_F32
#define NAME(word) CONCAT(word, _f32)
#define KERNELS "kernels_f32_" STRING(ISA)
#include "all.inc.h"

#define BITS 64
#define REAL double
#define REAL_DTYPE FA_F64
#define NAME(word) CONCAT(word, _f64)
#define KERNELS "kernels_f64_" STRING(ISA)
#include "all.inc.h"

const fa_instruction_set CONCAT(fa_, ISA) = {STRING(ISA), &table_f32, &table_f64};
