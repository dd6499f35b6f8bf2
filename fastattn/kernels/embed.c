/* Attention and softmax for C, C++ and Cython: ../include/fastattn.h says what each function promises. Fields of the
 * caller's structs are checked and become what the drivers take (call.h, drive.h, drive_rows.h). It needs no Python,
 * and keeps no state.
 */
#include "../include/fastattn.h"
#include "drive_rows.h"
#include "allocate.h"
#include "threads.h"
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Positions and windows are clipped to this: larger ones mean the same, and sums of three stay within 64 bits. */
static const int64_t FAR = (int64_t)1 << 60;

/* The choices of the interface are those of the drivers. */
#define SAME(theirs, ours) _Static_assert((int)(theirs) == (int)(ours), "fastattn.h and contract.h count differently")
SAME(FASTATTN_FLOAT32, FA_F32);
SAME(FASTATTN_FLOAT64, FA_F64);
SAME(FASTATTN_FLOAT16, FA_F16);
SAME(FASTATTN_BFLOAT16, FA_BF16);
SAME(FASTATTN_DOT_PRODUCT, FA_DOT);
SAME(FASTATTN_ADDITIVE, FA_ADDITIVE);
SAME(FASTATTN_SOFTMAX, FA_SOFTMAX);
SAME(FASTATTN_RELU, FA_RELU);
SAME(FASTATTN_SIGMOID, FA_SIGMOID);
SAME(FASTATTN_ROWS_SOFTMAX, FA_ROW_SOFTMAX);
SAME(FASTATTN_ROWS_LOG_SOFTMAX, FA_ROW_LOG_SOFTMAX);
SAME(FASTATTN_ROWS_LOGSUMEXP, FA_ROW_LOGSUMEXP);

/* Whom to tell what is wrong. */
typedef struct {
    char *message; /* may be NULL */
    size_t room;
} report;

__attribute__((format(printf, 3, 4))) static int refuse(const report *to, int status, const char *format, ...)
{
    if (to->message && to->room) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(to->message, to->room, format, arguments);
        va_end(arguments);
    }
    return status;
}

/* Arrays */

enum { MOST_AXES = 4 };

/* An array as the caller describes it. */
typedef struct {
    const char *name;
    fastattn_view *view;
    int axes;
    int64_t shape[MOST_AXES];
    ptrdiff_t strides[MOST_AXES];
    int64_t item; /* bytes of a number */
    int is_output;
    /* The bytes that it touches, `low` to `low + reach`; -1: none. */
    uintptr_t low;
    int64_t reach;
} array;

static array array_of(const char *name, fastattn_view *view, int64_t item, int is_output)
{
    return (array){.name = name, .view = view, .item = item, .is_output = is_output, .reach = -1};
}

static void add_axis(array *a, int64_t size, ptrdiff_t *stride)
{
    if (size <= 1)
        *stride = 0; /* means nothing there */
    a->shape[a->axes] = size;
    a->strides[a->axes++] = *stride;
}

static int is_empty(const array *a)
{
    for (int i = 0; i < a->axes; i++)
        if (a->shape[i] == 0)
            return 1;
    return 0;
}

/* A place for arrays without elements, which may be NULL. */
static char nothing[FA_ALIGN];

/* Finds the bytes of an array that must be there or, if optional, may be. */
static int find_bytes(const report *to, array *a, int is_optional)
{
    int64_t before = 0, after = a->item, way, extent;
    if ((is_optional && !a->view->data) || is_empty(a)) {
        /* Its strides mean nothing, may be anything, and are not to be multiplied. */
        *a->view = (fastattn_view){.data = a->view->data ? nothing : NULL};
        if (!is_optional)
            a->view->data = nothing;
        return FASTATTN_OK;
    }
    if (!a->view->data)
        return refuse(to, FASTATTN_BAD_POINTER, "%s.data is NULL; it must point to the first number", a->name);
    for (int i = 0; i < a->axes; i++) {
        if (__builtin_mul_overflow((int64_t)a->strides[i], a->shape[i] - 1, &way) ||
            __builtin_add_overflow(way < 0 ? before : after, way, &extent) || extent > FAR || extent < -FAR)
            return refuse(to, FASTATTN_BAD_SIZE, "%s: a stride of %td bytes for %lld elements leads out of memory",
                          a->name, a->strides[i], (long long)a->shape[i]);
        *(way < 0 ? &before : &after) = extent;
    }
    a->low = (uintptr_t)a->view->data + (uintptr_t)before;
    a->reach = after - before;
    return FASTATTN_OK;
}

/* Whether two index tuples may refer to the same byte: not if each stride steps past all that smaller ones reach. */
static int overlaps_itself(const array *a)
{
    int64_t reach = a->item, done = -1;
    for (;;) {
        int64_t step = INT64_MAX, extent = 0, repeats = 0;
        for (int i = 0; i < a->axes; i++) {
            const int64_t stride = a->strides[i] < 0 ? -a->strides[i] : a->strides[i];
            if (a->shape[i] <= 1 || stride <= done)
                continue;
            repeats = stride == step ? repeats + 1 : stride < step ? 0 : repeats;
            if (stride < step)
                step = stride, extent = stride * (a->shape[i] - 1);
        }
        if (step == INT64_MAX)
            return 0;
        if (step < reach || repeats)
            return 1;
        reach += extent;
        done = step;
    }
}

/* One unknown of an equation: a number from 0 to most, times step. */
typedef struct {
    int64_t step, most;
} term;

static int64_t common_divisor(int64_t a, int64_t b)
{
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* Whether the terms, largest step first, can add up to a sum; beyond some effort: yes. most, divisor: of the terms from
 * each on. */
static int can_be(const term *terms, const int64_t *most, const int64_t *divisor, int count, int64_t sum, int *effort)
{
    if (sum == 0)
        return 1;
    if (count == 0 || sum < 0 || sum > *most || sum % *divisor)
        return 0;
    if (--*effort < 0)
        return 1;
    int64_t n = sum / terms->step;
    n = n < terms->most ? n : terms->most;
    for (; n >= 0 && sum - n * terms->step <= most[1]; n--) {
        if (can_be(terms + 1, most + 1, divisor + 1, count - 1, sum - n * terms->step, effort))
            return 1;
        if (*effort < 0)
            return 1;
    }
    return 0;
}

/* Whether two arrays have a byte in common. */
static int overlap(const array *a, const array *b)
{
    enum { MOST_TERMS = 2 * MOST_AXES + 2 };
    term terms[MOST_TERMS];
    int64_t most[MOST_TERMS + 1] = {0}, divisor[MOST_TERMS + 1] = {0};
    int count = 0, effort = 100000;
    if (a->reach < 0 || b->reach < 0 || a->low >= b->low + (uintptr_t)b->reach ||
        b->low >= a->low + (uintptr_t)a->reach)
        return 0;
    /* A byte of a, counted from its lowest, and one of b, counted back from its highest, that meet. */
    const int64_t sum = (int64_t)(b->low - a->low) + b->reach - 1;
    for (int which = 0; which < 2; which++) {
        const array *one = which ? b : a;
        for (int i = 0; i <= one->axes; i++) {
            const int64_t stride = i == one->axes ? 1 : one->strides[i] < 0 ? -one->strides[i] : one->strides[i];
            const term next = {stride, (i == one->axes ? one->item : one->shape[i]) - 1};
            if (stride == 0 || next.most == 0)
                continue;
            int at = count++;
            for (; at > 0 && terms[at - 1].step < stride; at--)
                terms[at] = terms[at - 1];
            terms[at] = next;
        }
    }
    for (int i = count - 1; i >= 0; i--) {
        most[i] = most[i + 1] + terms[i].step * terms[i].most;
        divisor[i] = common_divisor(terms[i].step, divisor[i + 1]);
    }
    return can_be(terms, most, divisor, count, sum, &effort);
}

static int same_place(const array *a, const array *b)
{
    return a->view->data == b->view->data && memcmp(a->strides, b->strides, sizeof a->strides) == 0;
}

static int refuse_overlaps(const report *to, const array *arrays, int count, const array *in_place)
{
    for (int i = 0; i < count; i++) {
        const array *out = &arrays[i];
        if (!out->is_output || out->reach < 0)
            continue;
        if (overlaps_itself(out))
            return refuse(to, FASTATTN_BAD_OVERLAP, "%s overlaps itself; each of its numbers needs its place",
                          out->name);
        for (int k = 0; k < count; k++) {
            const array *other = &arrays[k];
            if (k == i || (other->is_output && k < i) || (other == in_place && same_place(out, other)))
                continue;
            if (overlap(out, other))
                return refuse(to, FASTATTN_BAD_OVERLAP, "%s overlaps %s; it needs memory of its own", out->name,
                              other->name);
        }
    }
    return FASTATTN_OK;
}

/* Structs and numbers */

/* Copies a struct of a version that is known; what that version did not have keeps its default. */
static int read_struct(const report *to, const void *args, void *copy, const size_t *sizes, int versions,
                       const char *init)
{
    size_t size;
    if (!args)
        return refuse(to, FASTATTN_BAD_POINTER, "args is NULL; it must point to a struct that %s has filled", init);
    memcpy(&size, args, sizeof size);
    for (int i = 0; i < versions; i++) {
        if (size == sizes[i]) {
            memcpy(copy, args, size);
            return FASTATTN_OK;
        }
    }
    return refuse(to, FASTATTN_BAD_STRUCT, "size is %zu; this library knows structs of %zu bytes (%s sets it)", size,
                  sizes[versions - 1], init);
}

/* For a client whose struct has this size, which may be of another version. */
static void init_struct(void *args, size_t size, const void *defaults, size_t known)
{
    if (!args || size < sizeof size)
        return;
    memset(args, 0, size);
    memcpy(args, defaults, size < known ? size : known);
    memcpy(args, &size, sizeof size);
}

static int check_choice(const report *to, const char *name, int choice, int choices)
{
    if (choice < 0 || choice >= choices)
        return refuse(to, FASTATTN_BAD_DTYPE, "%s is %d; it must be one of those that fastattn.h names, 0 to %d", name,
                      choice, choices - 1);
    return FASTATTN_OK;
}

typedef struct {
    const char *name;
    int64_t size;
} named_size;

static int check_sizes(const report *to, const named_size *sizes, int count)
{
    for (int i = 0; i < count; i++)
        if (sizes[i].size < 0 || sizes[i].size > (int64_t)1 << 48)
            return refuse(to, FASTATTN_BAD_SIZE, "%s is %lld; it must be between 0 and 2**48", sizes[i].name,
                          (long long)sizes[i].size);
    return FASTATTN_OK;
}

static int check_product(const report *to, const char *what, const int64_t *sizes, int count)
{
    int64_t product = 1;
    for (int i = 0; i < count; i++)
        if (__builtin_mul_overflow(product, sizes[i] ? sizes[i] : 1, &product))
            return refuse(to, FASTATTN_BAD_SIZE, "%s is more than 2**63", what);
    return FASTATTN_OK;
}

/* Numbers of a plain array, which may lie at any address. */
static double number_at(const double *numbers, int64_t i)
{
    double number;
    memcpy(&number, (const char *)numbers + i * (int64_t)sizeof number, sizeof number);
    return number;
}

static int check_lengths(const report *to, const char *name, const int64_t *lengths, int64_t batch, int64_t from,
                         int64_t last, const char *allowed)
{
    for (int64_t b = 0; lengths && b < batch; b++) {
        int64_t length;
        memcpy(&length, (const char *)lengths + b * (int64_t)sizeof length, sizeof length);
        if (length < from || length > last)
            return refuse(to, FASTATTN_BAD_SIZE, "%s[%lld] is %lld; it must be between %s", name, (long long)b,
                          (long long)length, allowed);
    }
    return FASTATTN_OK;
}

static int64_t item_of(int dtype) { return (int64_t)fa_size_of((fa_dtype)dtype); }

#define TRY(call)                 \
    do {                          \
        const int tried = (call); \
        if (tried)                \
            return tried;         \
    } while (0)

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* Memory of a call that the caller has given none for. */
static void *aligned_memory(void *raw) { return (void *)(((uintptr_t)raw + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN); }

/* Attention */

static const size_t attention_sizes[] = {sizeof(fastattn_attention_args)};

static const fastattn_attention_args attention_defaults = {
    .size = sizeof(fastattn_attention_args),
    .batch = 1,
    .num_heads = 1,
    .left = -1,
    .right = -1,
    .scale = NAN,
};

/* Bytes that there cannot be; nor does it overflow where a caller rounds it up. */
static const size_t TOO_MANY = SIZE_MAX / FA_ALIGN * FA_ALIGN;

/* A call of the caller's, checked. */
typedef struct {
    fastattn_attention_args args;
    fa_call call;
    const fa_kernels *kernels;
    fa_plan plan;
    int exponent;   /* of the weights of scores */
    size_t numbers; /* doubles that the call needs before the memory of the plan: slopes, sinks, weights of scores */
    size_t size;    /* of all its memory; may be TOO_MANY */
} attention_call;

static size_t size_of_numbers(const attention_call *c)
{
    return (c->numbers * sizeof(double) + FA_ALIGN - 1) / FA_ALIGN * FA_ALIGN;
}

static void place(fa_call *call, int operand, const fastattn_view *view, int dtype)
{
    fa_layout *layout = &call->layouts[operand];
    if (!view->data)
        return;
    layout->data = view->data;
    layout->dtype = (fa_dtype)dtype;
    layout->row = view->row;
    layout->col = view->col;
    layout->batch[0] = view->batch;
    if (call->group > 1) {
        const int of_keys = operand == FA_KEY || operand == FA_VALUE;
        layout->batch[1] = of_keys ? view->head : view->head * call->group;
        layout->batch[2] = of_keys ? 0 : view->head;
    } else {
        layout->batch[1] = view->head;
    }
    call->operands[call->operand_count++] = operand;
}

static void place_numbers(fa_call *call, int operand, const void *numbers, ptrdiff_t batch, ptrdiff_t head)
{
    /* Only read; a view has no const. */
    place(call, operand, &(fastattn_view){.data = (void *)(uintptr_t)numbers, .batch = batch, .head = head}, FA_F64);
}

/* Rounded to the accumulation dtype, as Python's are. */
static double rounded(const attention_call *c, double x)
{
    return c->args.dtype == FASTATTN_FLOAT64 ? x : (double)(float)x;
}

/* Finds the power of two by which the weights of additive scores are scaled, so that the largest is between 1/2 and 1.
 * As part of the scale, which may be applied after the sum, it keeps products from over- or underflowing. The scale
 * decides how large the workspace is. */
static void weigh_scores(attention_call *c)
{
    fa_problem *problem = &c->call.problem;
    double largest = 0;
    for (int64_t i = 0; c->args.score_weights && i < problem->head_dim; i++) {
        const double weight = fabs(rounded(c, number_at(c->args.score_weights, i)));
        if (isfinite(weight) && weight > largest)
            largest = weight;
    }
    frexp(largest, &c->exponent);
    problem->scale = fmax(-DBL_MAX, fmin(DBL_MAX, ldexp(1, c->exponent) * problem->scale));
}

static int read_attention(const fastattn_attention_args *given, attention_call *c, const report *to)
{
    fastattn_attention_args *a = &c->args;
    *a = attention_defaults;
    TRY(read_struct(to, given, a, attention_sizes, COUNT(attention_sizes), "fastattn_attention_init"));
    TRY(check_choice(to, "dtype", (int)a->dtype, FASTATTN_BFLOAT16 + 1));
    TRY(check_choice(to, "bias_dtype", (int)a->bias_dtype, FASTATTN_BFLOAT16 + 1));
    TRY(check_choice(to, "score", (int)a->score, FASTATTN_ADDITIVE + 1));
    TRY(check_choice(to, "activation", (int)a->activation, FASTATTN_SIGMOID + 1));

    const named_size sizes[] = {
        {"batch", a->batch}, {"num_heads", a->num_heads}, {"num_kv_heads", a->num_kv_heads}, {"queries", a->queries},
        {"keys", a->keys},   {"head_dim", a->head_dim},   {"value_dim", a->value_dim}};
    TRY(check_sizes(to, sizes, COUNT(sizes)));
    if (a->num_kv_heads == 0)
        a->num_kv_heads = a->num_heads;
    if (a->num_kv_heads && a->num_heads % a->num_kv_heads)
        return refuse(to, FASTATTN_BAD_SIZE, "num_heads is %lld; it must be a whole multiple of num_kv_heads, %lld",
                      (long long)a->num_heads, (long long)a->num_kv_heads);
    TRY(check_product(to, "batch * num_heads * queries * keys",
                      (int64_t[]){a->batch, a->num_heads, a->queries, a->keys}, 4));
    char allowed[64];
    snprintf(allowed, sizeof allowed, "0 and keys, %lld", (long long)a->keys);
    TRY(check_lengths(to, "key_lengths", a->key_lengths, a->batch, 0, a->keys, allowed));
    snprintf(allowed, sizeof allowed, "0 and queries, %lld", (long long)a->queries);
    TRY(check_lengths(to, "query_lengths", a->query_lengths, a->batch, 0, a->queries, allowed));
    TRY(check_lengths(to, "query_offsets", a->query_offsets, a->batch, -FAR, FAR, "-2**60 and 2**60"));

    if (a->left < -1 || a->right < -1)
        return refuse(to, FASTATTN_BAD_VALUE, "%s is %lld; it must be at least 0, or -1 for all keys on that side",
                      a->left < -1 ? "left" : "right", (long long)(a->left < -1 ? a->left : a->right));
    if (isinf(a->scale))
        return refuse(to, FASTATTN_BAD_VALUE, "scale is %g; it must be finite, or NaN for the default", a->scale);
    if (!(a->softcap >= 0 && a->softcap <= DBL_MAX))
        return refuse(to, FASTATTN_BAD_VALUE, "softcap is %g; it must be positive and finite, or 0 for none",
                      a->softcap);
    if (a->activation != FASTATTN_SOFTMAX && (a->lse.data || a->sinks))
        return refuse(to, FASTATTN_BAD_VALUE, "%s needs FASTATTN_SOFTMAX; other activations have no %s",
                      a->lse.data ? "lse" : "sinks", a->lse.data ? "log-sum-exp" : "denominator");
    if (a->score == FASTATTN_ADDITIVE && !a->score_weights && a->head_dim)
        return refuse(to, FASTATTN_BAD_POINTER, "score_weights is NULL; FASTATTN_ADDITIVE needs head_dim of them");
    if (a->score != FASTATTN_ADDITIVE && a->score_weights)
        return refuse(to, FASTATTN_BAD_VALUE, "score_weights is given; only FASTATTN_ADDITIVE has them");

    const int64_t item = item_of((int)a->dtype), wide = a->dtype == FASTATTN_FLOAT64 ? 8 : 4;
    /* Where the arrays are. */
    array arrays[] = {array_of("query", &a->query, item, 0), array_of("key", &a->key, item, 0),
                      array_of("value", &a->value, item, 0), array_of("out", &a->out, item, 1),
                      array_of("lse", &a->lse, wide, 1),     array_of("weights", &a->weights, wide, 1),
                      array_of("mask", &a->mask, 1, 0),      array_of("bias", &a->bias, item_of((int)a->bias_dtype), 0),
                      array_of("key_lengths", NULL, 8, 0),   array_of("query_lengths", NULL, 8, 0),
                      array_of("query_offsets", NULL, 8, 0), array_of("alibi_slopes", NULL, 8, 0),
                      array_of("sinks", NULL, 8, 0),         array_of("score_weights", NULL, 8, 0)};
    enum { KEY = 1, VALUE = 2, LSE = 4, MASK = 6, MATRICES = 8 };
    for (int i = 0; i < MATRICES; i++) {
        const int of_keys = i == KEY || i == VALUE;
        const int64_t columns[MATRICES] = {a->head_dim, a->head_dim, a->value_dim, a->value_dim,
                                           1,           a->keys,     a->keys,      a->keys};
        fastattn_view *view = arrays[i].view;
        if (i == LSE)
            view->col = 0;
        add_axis(&arrays[i], a->batch, &view->batch);
        add_axis(&arrays[i], of_keys ? a->num_kv_heads : a->num_heads, &view->head);
        add_axis(&arrays[i], of_keys ? a->keys : a->queries, &view->row);
        add_axis(&arrays[i], columns[i], &view->col);
        TRY(find_bytes(to, &arrays[i], i >= LSE));
        /* As kernels expect it of an array of one column that has numbers of its own, which is then contiguous. */
        if (columns[i] <= 1 && i < MASK)
            view->col = arrays[i].item;
    }
    const void *plain[] = {a->key_lengths,  a->query_lengths, a->query_offsets,
                           a->alibi_slopes, a->sinks,         a->score_weights};
    for (int i = 0; i < COUNT(plain); i++) {
        array *one = &arrays[MATRICES + i];
        const int64_t count = i < 3 ? a->batch : i < 5 ? a->num_heads : a->head_dim;
        if (plain[i] && count)
            one->low = (uintptr_t)plain[i], one->reach = 8 * count;
        ptrdiff_t step = 8;
        add_axis(one, count, &step);
    }
    TRY(refuse_overlaps(to, arrays, COUNT(arrays), NULL));

    /* The call. */
    fa_call *call = &c->call;
    memset(call, 0, sizeof *call);
    fa_problem *problem = &call->problem;
    problem->head_dim = a->head_dim, problem->value_dim = a->value_dim;
    problem->left = a->left < 0 || a->left >= FAR ? INT64_MAX : a->left;
    problem->right = a->right < 0 || a->right >= FAR ? INT64_MAX : a->right;
    problem->score = (fa_score)a->score;
    problem->softcap = a->softcap;
    problem->dtype = (fa_dtype)a->dtype;
    problem->activation = (fa_activation)a->activation;
    problem->has_slope = a->alibi_slopes != NULL, problem->has_sink = a->sinks != NULL;
    problem->left_chunks = INT64_MAX;
    problem->block_rows = problem->block_columns = 1;
    problem->scale = a->scale;
    if (isnan(a->scale))
        problem->scale = a->score == FASTATTN_ADDITIVE || a->head_dim == 0 ? 1 : 1 / sqrt((double)a->head_dim);
    weigh_scores(c);
    call->sizes.queries = call->sizes.query_length = call->longest_query = a->queries;
    call->sizes.keys = call->sizes.key_length = call->longest_key = a->keys;
    call->sizes.heads = 1;
    call->sequences = 1;
    call->offset_is_default = !a->query_offsets;
    call->group = a->num_heads ? a->num_heads / a->num_kv_heads : 1;
    call->heads = a->batch * a->num_heads;
    call->axes = call->group > 1 ? 3 : 2;
    call->shape[0] = a->batch, call->shape[1] = a->num_kv_heads, call->shape[2] = call->group;
    place(call, FA_QUERY, &a->query, (int)a->dtype);
    place(call, FA_KEY, &a->key, (int)a->dtype);
    place(call, FA_VALUE, &a->value, (int)a->dtype);
    place_numbers(call, FA_KEY_LENGTHS, a->key_lengths, sizeof(int64_t), 0);
    place_numbers(call, FA_QUERY_LENGTHS, a->query_lengths, sizeof(int64_t), 0);
    place_numbers(call, FA_OFFSETS, a->query_offsets, sizeof(int64_t), 0);
    place(call, FA_MASK, &a->mask, FA_F32);
    place(call, FA_BIAS, &a->bias, (int)a->bias_dtype);
    place_numbers(call, FA_SLOPES, a->alibi_slopes, 0, sizeof(double));
    place_numbers(call, FA_SINKS, a->sinks, 0, sizeof(double));
    place(call, FA_OUT, &a->out, (int)a->dtype);
    place(call, FA_WEIGHTS, &a->weights, wide == 8 ? FA_F64 : FA_F32);
    place(call, FA_LSE, &a->lse, wide == 8 ? FA_F64 : FA_F32);
    for (int operand = 0; operand < FA_OPERANDS; operand++) {
        const fa_layout *layout = &call->layouts[operand];
        call->sizes.view[operand] = (fa_view){.row = layout->row, .col = layout->col, .dtype = layout->dtype};
    }
    c->kernels = fa_kernels_for(problem->dtype);
    return FASTATTN_OK;
}

/* Threads of the call, and its memory. */
static int plan_attention(attention_call *c, int num_threads)
{
    if (num_threads < 0)
        return FASTATTN_BAD_VALUE;
    fa_choose_loops(&c->call, c->kernels, 1);
    c->size = FA_ALIGN;
    if (!fa_has_work(&c->call))
        return FASTATTN_OK;
    const fastattn_attention_args *a = &c->args;
    c->numbers = (a->alibi_slopes ? (size_t)a->num_heads : 0) + (a->sinks ? (size_t)a->num_heads : 0) +
                 (a->score_weights ? (size_t)a->head_dim : 0);
    fa_make_plan(&c->call, c->kernels, fa_is_small(&c->call, c->kernels) ? 1 : fa_allowed_threads(num_threads),
                 &c->plan);
    c->size = c->plan.estimate > FA_MOST_MEMORY ? TOO_MANY : size_of_numbers(c) + c->plan.size;
    return FASTATTN_OK;
}

/* Numbers of each head; they take the place of the caller's. */
static double *take_numbers(attention_call *c, int operand, const double *from, double *to)
{
    if (!from)
        return to;
    for (int64_t head = 0; head < c->args.num_heads; head++)
        to[head] = rounded(c, number_at(from, head));
    c->call.layouts[operand].data = (char *)to;
    return to + c->args.num_heads;
}

/* The weights of additive scores, scaled by the power of two that weigh_scores has found. */
static void take_weights(attention_call *c, double *to)
{
    for (int64_t i = 0; i < c->args.head_dim; i++)
        to[i] = ldexp(rounded(c, number_at(c->args.score_weights, i)), -c->exponent);
    c->call.problem.score_weights = to;
}

static void carry_out(attention_call *c, char *memory)
{
    double *numbers = (double *)memory;
    numbers = take_numbers(c, FA_SLOPES, c->args.alibi_slopes, numbers);
    numbers = take_numbers(c, FA_SINKS, c->args.sinks, numbers);
    if (c->args.score_weights)
        take_weights(c, numbers);
    fa_lay_out(&c->call, &c->plan, memory + size_of_numbers(c));
    fa_attend(&c->call, c->kernels, &c->plan, NULL);
}

void fastattn_attention_init_sized(fastattn_attention_args *args, size_t size)
{
    init_struct(args, size, &attention_defaults, sizeof attention_defaults);
}

int fastattn_attention_check(const fastattn_attention_args *args, char *message, size_t room)
{
    attention_call c;
    const report to = {message, room};
    const int status = read_attention(args, &c, &to);
    return status ? status : refuse(&to, FASTATTN_OK, "%s", "");
}

size_t fastattn_attention_workspace(const fastattn_attention_args *args, int num_threads)
{
    attention_call c = {.size = 0};
    if (read_attention(args, &c, &(report){NULL, 0}) || plan_attention(&c, num_threads))
        return 0;
    return c.size;
}

int fastattn_attention(const fastattn_attention_args *args, int num_threads, void *workspace, size_t workspace_size)
{
    attention_call c = {.size = 0};
    TRY(read_attention(args, &c, &(report){NULL, 0}));
    TRY(plan_attention(&c, num_threads));
    if (workspace) {
        if ((uintptr_t)workspace % FA_ALIGN || workspace_size < c.size || c.size == TOO_MANY)
            return FASTATTN_BAD_WORKSPACE;
        if (fa_has_work(&c.call))
            carry_out(&c, workspace);
        return FASTATTN_OK;
    }
    if (!fa_has_work(&c.call))
        return FASTATTN_OK;
    void *raw = c.size == TOO_MANY ? NULL : fa_allocate(c.size + FA_ALIGN);
    if (!raw)
        return FASTATTN_NO_MEMORY;
    carry_out(&c, aligned_memory(raw));
    fa_release(raw);
    return FASTATTN_OK;
}

/* Softmax */

static const size_t softmax_sizes[] = {sizeof(fastattn_softmax_args)};

static const fastattn_softmax_args softmax_defaults = {.size = sizeof(fastattn_softmax_args), .batch = 1};

static int is_aligned(const fastattn_view *view, int64_t item)
{
    return (uintptr_t)view->data % (uintptr_t)item == 0 && view->batch % item == 0 && view->row % item == 0 &&
           view->col % item == 0;
}

static int read_softmax(const fastattn_softmax_args *given, fa_rows *rows, const report *to)
{
    fastattn_softmax_args a = softmax_defaults;
    TRY(read_struct(to, given, &a, softmax_sizes, COUNT(softmax_sizes), "fastattn_softmax_init"));
    TRY(check_choice(to, "dtype", (int)a.dtype, FASTATTN_BFLOAT16 + 1));
    TRY(check_choice(to, "function", (int)a.function, FASTATTN_ROWS_LOGSUMEXP + 1));
    const named_size sizes[] = {{"batch", a.batch}, {"rows", a.rows}, {"n", a.n}};
    TRY(check_sizes(to, sizes, COUNT(sizes)));
    TRY(check_product(to, "batch * rows * n", (int64_t[]){a.batch, a.rows, a.n}, 3));
    const int64_t item = item_of((int)a.dtype);
    const int is_sum = a.function == FASTATTN_ROWS_LOGSUMEXP;
    array arrays[] = {array_of("x", &a.x, item, 0), array_of("mask", &a.mask, 1, 0), array_of("out", &a.out, item, 1)};
    for (int i = 0; i < COUNT(arrays); i++) {
        fastattn_view *view = arrays[i].view;
        if (is_sum && i == 2)
            view->col = 0;
        add_axis(&arrays[i], a.batch, &view->batch);
        add_axis(&arrays[i], a.rows, &view->row);
        add_axis(&arrays[i], is_sum && i == 2 ? 1 : a.n, &view->col);
        TRY(find_bytes(to, &arrays[i], i == 1));
    }
    TRY(refuse_overlaps(to, arrays, COUNT(arrays), is_sum ? NULL : &arrays[0]));

    *rows = (fa_rows){.function = (fa_row_function)a.function,
                      .length = a.n,
                      .rows = a.batch * a.rows,
                      .real = a.dtype == FASTATTN_FLOAT64 ? FA_F64 : FA_F32,
                      .single = is_sum ? FA_ROW_OUT : -1,
                      .aligned = is_aligned(&a.x, item) && is_aligned(&a.out, item)};
    const struct {
        int operand;
        const fastattn_view *view;
    } operands[] = {{FA_ROW_X, &a.x}, {FA_ROW_MASK, &a.mask}, {FA_ROW_OUT, &a.out}};
    rows->row.count = 1, rows->row.shape[0] = a.n;
    rows->batch.count = 2, rows->batch.shape[0] = a.batch, rows->batch.shape[1] = a.rows;
    for (int i = 0; i < COUNT(operands); i++) {
        const fastattn_view *view = operands[i].view;
        const int operand = operands[i].operand;
        rows->data[operand] = view->data;
        rows->dtypes[operand] = (fa_dtype)a.dtype;
        rows->row.strides[operand][0] = view->col;
        rows->batch.strides[operand][0] = view->batch;
        rows->batch.strides[operand][1] = view->row;
    }
    fa_join_axes(&rows->row);
    fa_join_axes(&rows->batch);
    return FASTATTN_OK;
}

void fastattn_softmax_init_sized(fastattn_softmax_args *args, size_t size)
{
    init_struct(args, size, &softmax_defaults, sizeof softmax_defaults);
}

int fastattn_softmax_check(const fastattn_softmax_args *args, char *message, size_t room)
{
    fa_rows rows;
    const report to = {message, room};
    const int status = read_softmax(args, &rows, &to);
    return status ? status : refuse(&to, FASTATTN_OK, "%s", "");
}

int fastattn_softmax(const fastattn_softmax_args *args, int num_threads)
{
    _Alignas(FA_ALIGN) char near[4096]; /* enough for rows that are read and written in place */
    fa_rows rows;
    fa_rows_plan plan;
    void *raw = NULL;
    TRY(read_softmax(args, &rows, &(report){NULL, 0}));
    if (num_threads < 0)
        return FASTATTN_BAD_VALUE;
    const fa_kernels *kernels = fa_kernels_for(rows.dtypes[FA_ROW_X]);
    fa_plan_rows(&rows, kernels, fa_rows_are_few(&rows) ? 1 : fa_allowed_threads(num_threads), &plan);
    if (plan.size > sizeof near) {
        raw = fa_allocate(plan.size + FA_ALIGN);
        if (!raw)
            return FASTATTN_NO_MEMORY;
    }
    fa_run_rows(&rows, kernels, &plan, raw ? aligned_memory(raw) : near, NULL);
    fa_release(raw);
    return FASTATTN_OK;
}

/* Flat functions */

/* Strides of a contiguous array (batch, heads, rows, columns); 0: more bytes than there are addresses. */
static int contiguous(fastattn_view *view, const void *data, int64_t heads, int64_t rows, int64_t columns, int64_t item)
{
    int64_t row, head, batch;
    if (__builtin_mul_overflow(columns, item, &row) || __builtin_mul_overflow(row, rows, &head) ||
        __builtin_mul_overflow(head, heads, &batch))
        return 0;
    *view = (fastattn_view){(void *)(uintptr_t)data, batch, head, row, item};
    return 1;
}

static int attend_flat(fastattn_dtype dtype, void *out, const void *query, const void *key, const void *value,
                       int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries, int64_t keys,
                       int64_t head_dim, int64_t value_dim, int64_t left, int64_t right, double scale, int num_threads)
{
    fastattn_attention_args args = attention_defaults;
    const int64_t item = item_of((int)dtype), kv_heads = num_kv_heads ? num_kv_heads : num_heads;
    args.dtype = dtype;
    args.batch = batch, args.num_heads = num_heads, args.num_kv_heads = num_kv_heads;
    args.queries = queries, args.keys = keys, args.head_dim = head_dim, args.value_dim = value_dim;
    args.left = left, args.right = right, args.scale = scale;
    if (!contiguous(&args.query, query, num_heads, queries, head_dim, item) ||
        !contiguous(&args.key, key, kv_heads, keys, head_dim, item) ||
        !contiguous(&args.value, value, kv_heads, keys, value_dim, item) ||
        !contiguous(&args.out, out, num_heads, queries, value_dim, item))
        return FASTATTN_BAD_SIZE;
    return fastattn_attention(&args, num_threads, NULL, 0);
}

static int softmax_flat(fastattn_dtype dtype, void *out, const void *x, int64_t rows, int64_t n, int num_threads)
{
    fastattn_softmax_args args = softmax_defaults;
    args.dtype = dtype;
    args.rows = rows, args.n = n;
    if (!contiguous(&args.x, x, 1, rows, n, item_of((int)dtype)) ||
        !contiguous(&args.out, out, 1, rows, n, item_of((int)dtype)))
        return FASTATTN_BAD_SIZE;
    return fastattn_softmax(&args, num_threads);
}

int fastattn_dot_product_attention_f32(float *out, const float *query, const float *key, const float *value,
                                       int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                       int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                       double scale, int num_threads)
{
    return attend_flat(FASTATTN_FLOAT32, out, query, key, value, batch, num_heads, num_kv_heads, queries, keys,
                       head_dim, value_dim, left, right, scale, num_threads);
}

int fastattn_dot_product_attention_f64(double *out, const double *query, const double *key, const double *value,
                                       int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                       int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                       double scale, int num_threads)
{
    return attend_flat(FASTATTN_FLOAT64, out, query, key, value, batch, num_heads, num_kv_heads, queries, keys,
                       head_dim, value_dim, left, right, scale, num_threads);
}

int fastattn_softmax_f32(float *out, const float *x, int64_t rows, int64_t n, int num_threads)
{
    return softmax_flat(FASTATTN_FLOAT32, out, x, rows, n, num_threads);
}

int fastattn_softmax_f64(double *out, const double *x, int64_t rows, int64_t n, int num_threads)
{
    return softmax_flat(FASTATTN_FLOAT64, out, x, rows, n, num_threads);
}

/* The library */

const char *fastattn_version(void) { return FASTATTN_VERSION; }

const char *fastattn_instruction_set(void) { return fa_chosen(); }

const char *fastattn_status_text(int status)
{
    switch (status) {
    case FASTATTN_OK:
        return "The call was carried out.";
    case FASTATTN_BAD_STRUCT:
        return "The struct's size is not that of a version that this library knows.";
    case FASTATTN_BAD_DTYPE:
        return "dtype, bias_dtype, score, activation or function is none of the values that fastattn.h names.";
    case FASTATTN_BAD_SIZE:
        return "A size is below 0, num_heads is no multiple of num_kv_heads, or a length lies outside its axis.";
    case FASTATTN_BAD_POINTER:
        return "A pointer is NULL where numbers must be.";
    case FASTATTN_BAD_VALUE:
        return "A window is below -1, a scale infinite, a softcap or num_threads below 0, or two rules exclude each "
               "other.";
    case FASTATTN_BAD_WORKSPACE:
        return "The workspace is too small, or not at a multiple of 64 bytes.";
    case FASTATTN_BAD_OVERLAP:
        return "An output overlaps an input, another output or itself.";
    case FASTATTN_NO_MEMORY:
        return "There is no memory for the workspace.";
    default:
        return "No such status.";
    }
}

const fastattn_api *fastattn_get_api(void)
{
    static const fastattn_api api = {
        FASTATTN_API_VERSION,
        sizeof(fastattn_api),
        fastattn_version,
        fastattn_instruction_set,
        fastattn_status_text,
        fastattn_attention_init_sized,
        fastattn_attention_check,
        fastattn_attention_workspace,
        fastattn_attention,
        fastattn_softmax_init_sized,
        fastattn_softmax_check,
        fastattn_softmax,
        fastattn_dot_product_attention_f32,
        fastattn_dot_product_attention_f64,
        fastattn_softmax_f32,
        fastattn_softmax_f64,
    };
    return &api;
}
