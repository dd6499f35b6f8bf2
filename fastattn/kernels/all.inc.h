/* Every idea, for one dtype; then the names are free for the next. */
#include "vector.inc.h"

#include "storage.inc.h"

#include "product.inc.h"

#include "attend.inc.h"

#include "rows.inc.h"

#include "columns.inc.h"

#include "rotary.inc.h"

static const fa_kernels NAME(table) = {
    .name = KERNELS,
    .tile_workspace = NAME(tile_workspace),
    .open_tile = NAME(open_tile),
    .visit_keys = NAME(visit_keys),
    .span_size = NAME(span_size),
    .save_span = NAME(save_span),
    .join_span = NAME(join_span),
    .close_tile = NAME(close_tile),
    .rows = NAME(rows),
    .columns_at_once = NAME(COLUMN_ROWS),
    .columns_workspace = NAME(columns_workspace),
    .columns = NAME(columns),
    .gather = NAME(gather),
    .scatter = NAME(scatter),
    .merge = NAME(merge),
    .turns = NAME(turns),
    .rotate = NAME(rotate),
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
