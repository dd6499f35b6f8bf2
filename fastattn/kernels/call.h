/* A call of attention as plain C: checked (_call.pyx, embed.c), and carried out by its driver (drive.c). It owns
 * nothing.
 */
#ifndef FASTATTN_CALL_H
#define FASTATTN_CALL_H

#include "contract.h"
#include <string.h>

/* The operands of a call: those of a head, and what kernels get as numbers of a head (int64_t each). */
enum { FA_KEY_LENGTHS = FA_OPERANDS, FA_QUERY_LENGTHS, FA_OFFSETS, FA_KEYS_BEFORE, FA_CALL_OPERANDS };

/* Where an operand lies; strides in bytes. data NULL: not given. */
typedef struct {
    char *data;
    fa_dtype dtype;
    ptrdiff_t row, col;           /* of its last two axes */
    ptrdiff_t batch[FA_ROW_AXES]; /* of the batch axes; 0 where it is broadcast */
} fa_layout;

typedef struct {
    fa_problem problem;         /* what all heads have in common */
    fa_head sizes;              /* what else does: of the views all but data */
    int axes;                   /* batch axes; with grouped heads the axis of heads counts as two */
    int64_t shape[FA_ROW_AXES]; /* their sizes */
    int64_t heads, group;       /* their product; query heads that share a key head */
    fa_layout layouts[FA_CALL_OPERANDS];
    int operands[FA_CALL_OPERANDS]; /* the numbers of those that are given */
    int operand_count;
    int64_t longest_query, longest_key;
    int offset_is_default; /* the last query lines up with the last valid key */
    /* Packed sequences: where each begins in queries and keys, one number more than there are. NULL: not packed. */
    const int64_t *query_starts, *key_starts;
    int64_t sequences; /* 1 where they are not packed */
} fa_call;

/* Queries of a sequence. */
static inline int64_t fa_queries_of(const fa_call *call, int64_t sequence)
{
    return call->query_starts ? call->query_starts[sequence + 1] - call->query_starts[sequence] : call->sizes.queries;
}

/* Addresses and numbers of one head of one sequence. */
static inline void fa_locate(const fa_call *call, int64_t head, int64_t sequence, fa_head *to)
{
    int64_t index[FA_ROW_AXES];
    char *at[FA_CALL_OPERANDS] = {NULL};
    for (int i = call->axes - 1; i >= 0; i--) {
        index[i] = head % call->shape[i];
        head /= call->shape[i];
    }
    for (int n = 0; n < call->operand_count; n++) {
        const fa_layout *layout = &call->layouts[call->operands[n]];
        char *data = layout->data;
        for (int i = 0; i < call->axes; i++)
            data += index[i] * layout->batch[i];
        at[call->operands[n]] = data;
    }
    *to = call->sizes;
    for (int operand = 0; operand < FA_OPERANDS; operand++)
        to->view[operand].data = at[operand];
    if (at[FA_KEY_LENGTHS])
        memcpy(&to->key_length, at[FA_KEY_LENGTHS], sizeof(int64_t));
    if (at[FA_QUERY_LENGTHS])
        memcpy(&to->query_length, at[FA_QUERY_LENGTHS], sizeof(int64_t));
    if (call->query_starts) {
        const int64_t query = call->query_starts[sequence], key = call->key_starts[sequence];
        to->queries = to->query_length = fa_queries_of(call, sequence);
        to->keys = to->key_length = call->key_starts[sequence + 1] - key;
        to->view[FA_KEY].data += key * to->view[FA_KEY].row;
        to->view[FA_VALUE].data += key * to->view[FA_VALUE].row;
        to->view[FA_QUERY].data += query * to->view[FA_QUERY].row;
        to->view[FA_OUT].data += query * to->view[FA_OUT].row;
        if (at[FA_LSE])
            to->view[FA_LSE].data += query * to->view[FA_LSE].row;
    }
    if (at[FA_OFFSETS])
        memcpy(&to->offset, at[FA_OFFSETS], sizeof(int64_t));
    else if (call->offset_is_default)
        to->offset = to->key_length - to->query_length;
    if (at[FA_KEYS_BEFORE])
        memcpy(&to->keys_before, at[FA_KEYS_BEFORE], sizeof(int64_t));
    to->query_length *= to->heads;
}

/* The same for gradients, whose layouts are numbered as in FA_BACK_OPERANDS. */
static inline void fa_locate_gradients(const fa_call *call, const fa_layout *layouts, int64_t head, int64_t sequence,
                                       fa_gradients *to)
{
    int64_t index[FA_ROW_AXES];
    for (int i = call->axes - 1; i >= 0; i--) {
        index[i] = head % call->shape[i];
        head /= call->shape[i];
    }
    to->query_is_shared = 0;
    for (int i = 0; i < call->axes; i++)
        to->query_is_shared |= call->shape[i] > 1 && layouts[FA_D_QUERY].batch[i] == 0;
    for (int operand = 0; operand < FA_BACK_OPERANDS; operand++) {
        const fa_layout *layout = &layouts[operand];
        fa_view *view = &to->view[operand];
        view->data = layout->data;
        view->row = layout->row, view->col = layout->col, view->dtype = layout->dtype;
        view->head = 0;
        if (!layout->data)
            continue;
        for (int i = 0; i < call->axes; i++)
            view->data += index[i] * layout->batch[i];
        if (call->query_starts && operand != FA_D_DIAGONALS) {
            const int of_keys = operand == FA_D_KEY || operand == FA_D_VALUE || operand == FA_D_COLUMNS;
            view->data += (of_keys ? call->key_starts : call->query_starts)[sequence] * view->row;
        }
    }
}

#endif
