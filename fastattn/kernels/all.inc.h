/* Every idea, for one dtype; then the names are free for the next. */
#include "vector.inc.h"

#include "storage.inc.h"

#include "product.inc.h"

#include "attend.inc.h"

#include "rows.inc.h"

#include "rotary.inc.h"

static const fa_kernels NAME(table) = {
    KERNELS,         NAME(tile_workspace), NAME(open_tile),  NAME(visit_keys), NAME(span_size),
    NAME(save_span), NAME(join_span),      NAME(close_tile), NAME(rows),       NAME(gather),
    NAME(scatter),   NAME(merge),          NAME(turns),      NAME(rotate),
};

#undef BITS
#undef REAL
#undef REAL_DTYPE
#undef NAME
#undef KERNELS
#undef LANES
#undef real
#undef vec
#undef ivec
#undef PRODUCT
#undef PRODUCTS
#undef FOR_VECS
#undef LIST_VECS
