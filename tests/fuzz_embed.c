/* Hostile structs for the C interface, built with the address and undefined-behaviour sanitizers by test_fuzz_embed.py.
 *
 *     fuzz_embed COUNT SEED [ONLY]    COUNT calls of each kind, or call number ONLY alone
 *
 * Each call begins with good arguments, of which some fields are replaced. Arrays are as large as sizes and strides
 * say, to the byte, so that any access outside is seen. A call that is refused must be refused by check and by the
 * function alike, with a message, and must leave outputs as they are; one that is allowed must run, and write to no
 * byte between the elements of its outputs. */
#include "fastattn.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint64_t next(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int below(int n) { return (int)(next() % (uint64_t)n); }
static int chance(int percent) { return below(100) < percent; }

static void fail(const char *what, const char *kind, int number, int status)
{
    fprintf(stderr, "%s: %s call %d: status %d\n", what, kind, number, status);
    exit(1);
}

/* Sizes, strides and enums that nobody means. */
static int64_t hostile_number(void)
{
    static const int64_t some[] = {0,         1,
                                   -1,        2,
                                   3,         4,
                                   7,         8,
                                   63,        64,
                                   65,        -2,
                                   -64,       INT32_MAX,
                                   INT32_MIN, INT64_MAX,
                                   INT64_MIN, 1LL << 32,
                                   1LL << 40, 1LL << 61,
                                   1LL << 62, -(1LL << 40),
                                   1LL << 60, 4294967297,
                                   12,        16};
    return chance(15) ? (int64_t)next() : some[below((int)(sizeof some / sizeof *some))];
}

static double hostile_double(void)
{
    static const double some[] = {0, -0.0, 1, -1, 0.5, 1e308, -1e308, 1e-320, NAN, INFINITY, -INFINITY, 30};
    return some[below((int)(sizeof some / sizeof *some))];
}

/* Memory */

enum { MOST_BLOCKS = 32, MOST_BYTES = 1 << 20 };
static void *blocks[MOST_BLOCKS];
static int block_count;

static void *block(size_t size)
{
    void *p = malloc(size);
    if (p == NULL || block_count == MOST_BLOCKS)
        abort();
    return blocks[block_count++] = p;
}

static void free_blocks(void)
{
    while (block_count)
        free(blocks[--block_count]);
}

static void fill_numbers(void *to, int64_t count, int item, fastattn_dtype dtype)
{
    for (int64_t i = 0; i < count; i++) {
        double x = (double)below(2001) / 500 - 2;
        if (chance(2))
            x = hostile_double();
        if (item == 8) {
            memcpy((char *)to + 8 * i, &x, 8);
        } else if (item == 4) {
            float y = (float)x;
            memcpy((char *)to + 4 * i, &y, 4);
        } else {
            uint16_t bits = (uint16_t)next();
            memcpy((char *)to + (size_t)item * (size_t)i, &bits, item == 1 ? 1 : 2);
        }
    }
    (void)dtype;
}

/* An array of up to four axes, in memory that ends where it ends. */
typedef struct {
    fastattn_view *view;
    int64_t shape[4];
    int item;
    int is_output;
    char *memory;
    size_t size;
    char *copy; /* of an output: what it was */
} array;

static array arrays[8];
static int array_count;

static void note(fastattn_view *view, int64_t batch, int64_t head, int64_t row, int64_t col, int item, int is_output)
{
    array *a = &arrays[array_count++];
    *a = (array){.view = view, .shape = {batch, head, row, col}, .item = item, .is_output = is_output};
}

/* Memory for an array that is wanted (data not NULL); 0 if it would be too large, or its extent is no number. */
static int place(array *a, fastattn_dtype dtype)
{
    const ptrdiff_t *stride[] = {&a->view->batch, &a->view->head, &a->view->row, &a->view->col};
    __int128 before = 0, after = a->item;
    if (a->view->data == NULL)
        return 1;
    for (int i = 0; i < 4; i++) {
        if (a->shape[i] <= 0) {
            a->view->data = chance(50) ? NULL : block(1);
            return 1;
        }
        __int128 way = (__int128)(a->shape[i] == 1 ? 0 : *stride[i]) * (a->shape[i] - 1);
        *(way < 0 ? &before : &after) += way;
    }
    if (after - before > MOST_BYTES)
        return 0;
    a->size = (size_t)(after - before);
    a->memory = block(a->size);
    if (a->is_output) {
        memset(a->memory, 0xa5, a->size);
        a->copy = memcpy(block(a->size), a->memory, a->size);
    } else {
        fill_numbers(a->memory, (int64_t)a->size / a->item, a->item, dtype);
        for (size_t i = a->size / (size_t)a->item * (size_t)a->item; i < a->size; i++)
            a->memory[i] = 1;
    }
    a->view->data = a->memory - (ptrdiff_t)before;
    return 1;
}

static int is_untouched(void)
{
    for (int i = 0; i < array_count; i++)
        if (arrays[i].copy && memcmp(arrays[i].copy, arrays[i].memory, arrays[i].size) != 0)
            return 0;
    return 1;
}

/* Whether the bytes of an output that belong to no element are as they were. */
static int is_untouched_between(const array *a)
{
    if (a->copy == NULL)
        return 1;
    for (int64_t b = 0; b < a->shape[0]; b++)
        for (int64_t h = 0; h < a->shape[1]; h++)
            for (int64_t i = 0; i < a->shape[2]; i++)
                for (int64_t c = 0; c < a->shape[3]; c++) {
                    const char *element = (char *)a->view->data + (a->shape[0] > 1 ? b * a->view->batch : 0) +
                                          (a->shape[1] > 1 ? h * a->view->head : 0) +
                                          (a->shape[2] > 1 ? i * a->view->row : 0) +
                                          (a->shape[3] > 1 ? c * a->view->col : 0);
                    memcpy(a->memory + (element - a->memory), a->copy + (element - a->memory), (size_t)a->item);
                }
    return memcmp(a->memory, a->copy, a->size) == 0;
}

static void lay_out(fastattn_view *v, int64_t heads, int64_t rows, int64_t cols, int item)
{
    ptrdiff_t gap = chance(30) ? below(9) : 0, turn = chance(15) ? -1 : 1;
    static char wanted;
    v->data = &wanted;
    v->col = item;
    v->row = turn * (cols * item + gap);
    v->head = rows * (cols * item + gap);
    v->batch = heads * v->head;
    if (chance(20)) { /* heads behind the tokens */
        v->head = cols * item;
        v->row = turn * heads * v->head;
        v->batch = heads * rows * cols * item;
    }
    if (chance(5))
        v->col = -item;
}

static void disturb(fastattn_view *v)
{
    ptrdiff_t *stride[] = {&v->batch, &v->head, &v->row, &v->col};
    *stride[below(4)] = chance(50) ? hostile_number() : below(200) - 100;
    if (chance(20))
        v->data = NULL;
}

static int item_of(int dtype)
{
    return dtype == FASTATTN_FLOAT64 ? 8 : dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_BFLOAT16 ? 2 : 4;
}

static int exact(double x) { return x >= 0 && x <= 4096; }

/* The struct in a block of its own that is as long as it says, so that fields that are not there are not read. */
static void *alone(const void *args, size_t size, size_t said)
{
    size_t room = said < size ? said : size;
    return memcpy(block(room < sizeof(size_t) ? sizeof(size_t) : room), args,
                  room < sizeof(size_t) ? sizeof(size_t) : room);
}

/* A status and message of check, in a buffer of a random length. */
static int checked(int (*check)(const void *, char *, size_t), const void *args, const char *kind, int number)
{
    size_t room = chance(20) ? (size_t)below(20) : 300;
    char *message = room ? block(room) : NULL;
    int status;
    if (room)
        memset(message, 'x', room);
    status = check(args, message, room);
    if (status != FASTATTN_OK && room) {
        if (memchr(message, 0, room) == NULL)
            fail("a message without an end", kind, number, status);
        if (room > 1 && message[0] == 0)
            fail("no message", kind, number, status);
    }
    if (check(args, NULL, 0) != status)
        fail("another status without a message", kind, number, status);
    if (status > 0 || strlen(fastattn_status_text(status)) == 0)
        fail("no such status", kind, number, status);
    return status;
}

static int check_attention(const void *args, char *message, size_t room)
{
    return fastattn_attention_check(args, message, room);
}

static int check_softmax(const void *args, char *message, size_t room)
{
    return fastattn_softmax_check(args, message, room);
}

static long allowed, refused, skipped;

/* Whether the outcome of a call fits that of check; what is more: a reason of the call's own to refuse. */
static void judge(int status, int said, int more, const char *kind, int number)
{
    if (said != FASTATTN_OK ? status != said
        : more              ? status != more
                            : status != FASTATTN_OK && status != FASTATTN_NO_MEMORY)
        fail("the call and check differ", kind, number, status);
    if (status != FASTATTN_OK && !is_untouched())
        fail("outputs were touched", kind, number, status);
    for (int i = 0; status == FASTATTN_OK && i < array_count; i++)
        if (!is_untouched_between(&arrays[i]))
            fail("bytes between elements were touched", kind, number, status);
    ++*(status == FASTATTN_OK ? &allowed : &refused);
}

/* Attention */

static void attention(int number)
{
    fastattn_attention_args a, *args;
    int64_t *integers[] = {&a.batch, &a.num_heads, &a.num_kv_heads, &a.queries, &a.keys, &a.head_dim, &a.value_dim};
    fastattn_view *views[] = {&a.query, &a.key, &a.value, &a.out, &a.lse, &a.weights, &a.mask, &a.bias};
    static const int fields[] = {0, 1, 2, 3, 4, 5, 6};
    int group = chance(70) ? 1 : 2, item, score_item, fits = 1, said, status, threads, more = 0;
    void *workspace = NULL;
    size_t room = 0;
    double work;
    fastattn_attention_init(&a);
    a.dtype = (fastattn_dtype)below(4);
    a.bias_dtype = (fastattn_dtype)below(4);
    a.score = chance(80) ? FASTATTN_DOT_PRODUCT : FASTATTN_ADDITIVE;
    a.activation = chance(70) ? FASTATTN_SOFTMAX : (fastattn_activation)below(3);
    a.batch = below(3);
    a.num_kv_heads = below(3);
    a.num_heads = a.num_kv_heads * group;
    a.queries = chance(70) ? below(8) : below(70);
    a.keys = chance(70) ? below(40) : below(300);
    a.head_dim = below(40);
    a.value_dim = below(40);
    if (chance(20))
        a.num_kv_heads = 0;
    if (chance(40))
        a.right = below(9) - 1;
    if (chance(30))
        a.left = below(9) - 1;
    if (chance(20))
        a.softcap = 20;
    if (chance(20))
        a.scale = 0.3;
    /* Numbers that are wrong, or only odd. */
    for (int i = chance(50) ? below(3) : 0; i > 0; i--) {
        switch (below(9)) {
        case 0:
            a.dtype = (fastattn_dtype)hostile_number();
            break;
        case 1:
            a.bias_dtype = (fastattn_dtype)hostile_number();
            break;
        case 2:
            a.score = (fastattn_score)hostile_number();
            break;
        case 3:
            a.activation = (fastattn_activation)hostile_number();
            break;
        case 4:
            a.left = hostile_number();
            break;
        case 5:
            a.right = hostile_number();
            break;
        case 6:
            a.scale = hostile_double();
            break;
        case 7:
            a.softcap = hostile_double();
            break;
        default:
            *integers[fields[below(7)]] = hostile_number();
        }
    }
    item = item_of(a.dtype);
    score_item = a.dtype == FASTATTN_FLOAT64 ? 8 : 4;
    work = (double)a.batch * (double)a.num_heads * ((double)a.queries + 1) * ((double)a.keys + 1) *
           ((double)a.head_dim + (double)a.value_dim + 1);
    for (int i = 0; i < 7; i++)
        fits = fits && exact((double)*integers[i]);
    fits = fits && work < 3e6;
    int64_t kv_heads = a.num_kv_heads > 0 ? a.num_kv_heads : a.num_heads;
    array_count = 0;
    if (fits) {
        lay_out(&a.query, a.num_heads, a.queries, a.head_dim, item);
        lay_out(&a.key, kv_heads, a.keys, a.head_dim, item);
        lay_out(&a.value, kv_heads, a.keys, a.value_dim, item);
        lay_out(&a.out, a.num_heads, a.queries, a.value_dim, item);
        if (chance(30))
            lay_out(&a.lse, a.num_heads, 1, a.queries, score_item);
        if (a.lse.data)
            a.lse.row = score_item, a.lse.col = chance(50) ? 0 : 77;
        if (chance(30))
            lay_out(&a.weights, a.num_heads, a.queries, a.keys, score_item);
        if (chance(30))
            lay_out(&a.mask, a.num_heads, a.queries, a.keys, 1);
        if (chance(30))
            lay_out(&a.bias, a.num_heads, a.queries, a.keys, item_of(a.bias_dtype));
        for (int i = chance(40) ? below(3) : 0; i > 0; i--)
            disturb(views[below(8)]);
        note(&a.query, a.batch, a.num_heads, a.queries, a.head_dim, item, 0);
        note(&a.key, a.batch, kv_heads, a.keys, a.head_dim, item, 0);
        note(&a.value, a.batch, kv_heads, a.keys, a.value_dim, item, 0);
        note(&a.out, a.batch, a.num_heads, a.queries, a.value_dim, item, 1);
        note(&a.lse, a.batch, a.num_heads, a.queries, 1, score_item, 1);
        note(&a.weights, a.batch, a.num_heads, a.queries, a.keys, score_item, 1);
        note(&a.mask, a.batch, a.num_heads, a.queries, a.keys, 1, 0);
        note(&a.bias, a.batch, a.num_heads, a.queries, a.keys, item_of(a.bias_dtype), 0);
        for (int i = 0; i < array_count; i++)
            fits = place(&arrays[i], a.dtype) && fits;
        if (chance(10) && fits) { /* overlaps; memory of its own stays as it is */
            array *one = &arrays[3 + below(3)], *other = &arrays[below(3)];
            if (one->copy && other->memory && one->size <= other->size) {
                one->view->data = (char *)one->view->data + (other->memory - one->memory);
                one->memory = other->memory;
                memcpy(one->copy, one->memory, one->size);
            }
        }
        int64_t **lengths[] = {(int64_t **)&a.key_lengths, (int64_t **)&a.query_lengths, (int64_t **)&a.query_offsets};
        for (int i = 0; i < 3; i++)
            if (chance(20)) {
                *lengths[i] = block((size_t)a.batch * sizeof(int64_t) + (a.batch == 0));
                for (int64_t b = 0; b < a.batch; b++)
                    (*lengths[i])[b] =
                        chance(10) || i == 2 ? hostile_number() : below((int)(i ? a.queries : a.keys) + 1);
            }
        double **numbers[] = {(double **)&a.alibi_slopes, (double **)&a.sinks, (double **)&a.score_weights};
        for (int i = 0; i < 3; i++)
            if (chance(i == 2 && a.score == FASTATTN_ADDITIVE ? 95 : 15)) {
                int64_t n = i == 2 ? a.head_dim : a.num_heads;
                *numbers[i] = block((size_t)n * sizeof(double) + (n == 0));
                for (int64_t j = 0; j < n; j++)
                    (*numbers[i])[j] = chance(3) ? hostile_double() : 0.1 * below(20);
            }
    } else if (chance(50)) {
        for (int i = 0; i < 4; i++)
            lay_out(views[i], 1, 1, 1, item); /* never followed: what is this large is refused, or not run here */
    }
    if (chance(5))
        a.size = chance(50) ? sizeof a - 8 * (size_t)below(12) : (size_t)hostile_number();
    args = alone(&a, sizeof a, a.size);
    said = checked(check_attention, args, "attention", number);
    room = fastattn_attention_workspace(args, 1);
    if ((said != FASTATTN_OK) != (room == 0) && fits)
        fail("workspace and check differ", "attention", number, said);
    if (said == FASTATTN_OK && !fits) {
        ++skipped;
        return;
    }
    threads = chance(80) ? 1 : below(4);
    if (chance(4))
        threads = -1 - below(3);
    if (said == FASTATTN_OK && threads >= 0 && chance(50)) {
        room = fastattn_attention_workspace(args, threads);
        if (room > 64u << 20)
            fail("a workspace that large", "attention", number, said);
        char *raw = block(room + 128), *at = raw + 64 - (uintptr_t)raw % 64;
        /* Its end is the end of a block, but for what 64 bytes round it to. */
        blocks[block_count - 1] = NULL;
        free(raw);
        if (posix_memalign((void **)&at, 64, room))
            abort();
        blocks[block_count - 1] = at;
        workspace = at;
        if (chance(10)) {
            more = FASTATTN_BAD_WORKSPACE;
            if (chance(50))
                workspace = at + 8;
            else
                room -= 1;
        }
    }
    if (threads < 0)
        more = FASTATTN_BAD_VALUE;
    status = fastattn_attention(args, threads, workspace, room);
    judge(status, said, more, "attention", number);
}

/* Rows */

static void softmax(int number)
{
    fastattn_softmax_args a, *args;
    int item, out_item, fits, said, status, threads = chance(80) ? 1 : below(4), more = 0, in_place = chance(20);
    fastattn_softmax_init(&a);
    a.dtype = (fastattn_dtype)below(4);
    a.function = (fastattn_row_function)below(3);
    a.batch = below(3);
    a.rows = below(20);
    a.n = chance(80) ? below(40) : below(700);
    if (chance(20)) {
        switch (below(5)) {
        case 0:
            a.dtype = (fastattn_dtype)hostile_number();
            break;
        case 1:
            a.function = (fastattn_row_function)hostile_number();
            break;
        case 2:
            a.batch = hostile_number();
            break;
        case 3:
            a.rows = hostile_number();
            break;
        default:
            a.n = hostile_number();
        }
    }
    item = out_item = item_of(a.dtype);
    fits = exact((double)a.batch) && exact((double)a.rows) && exact((double)a.n) && a.batch * a.rows * a.n < 100000;
    array_count = 0;
    if (fits) {
        int64_t columns = a.function == FASTATTN_ROWS_LOGSUMEXP ? 1 : a.n;
        lay_out(&a.x, 1, a.rows, a.n, item);
        lay_out(&a.out, 1, a.rows, columns, out_item);
        if (chance(30))
            lay_out(&a.mask, 1, a.rows, a.n, 1);
        for (int i = chance(40) ? below(3) : 0; i > 0; i--)
            disturb(below(3) == 0 ? &a.x : below(2) ? &a.out : &a.mask);
        if (in_place && a.function != FASTATTN_ROWS_LOGSUMEXP)
            a.out = a.x;
        note(&a.x, a.batch, 1, a.rows, a.n, item, 0);
        note(&a.out, a.batch, 1, a.rows, columns, out_item, 1);
        note(&a.mask, a.batch, 1, a.rows, a.n, 1, 0);
        for (int i = 0; i < array_count; i++)
            fits = place(&arrays[i], a.dtype) && fits;
        if (fits && in_place && a.function != FASTATTN_ROWS_LOGSUMEXP && arrays[0].memory && arrays[1].copy) {
            a.out = a.x;
            arrays[1].memory = arrays[0].memory;
            memcpy(arrays[1].copy, arrays[1].memory, arrays[1].size);
        }
    }
    if (chance(5))
        a.size = chance(50) ? sizeof a - 8 * (size_t)below(8) : (size_t)hostile_number();
    args = alone(&a, sizeof a, a.size);
    said = checked(check_softmax, args, "softmax", number);
    if (said == FASTATTN_OK && !fits) {
        ++skipped;
        return;
    }
    if (chance(4))
        threads = -1 - below(3), more = FASTATTN_BAD_VALUE;
    status = fastattn_softmax(args, threads);
    judge(status, said, more, "softmax", number);
}

/* Random bytes, and pointers that are NULL: what remains of structs that were never initialised. */
static void noise(int number)
{
    fastattn_attention_args a;
    fastattn_softmax_args s;
    fastattn_view *views[] = {&a.query, &a.key,  &a.value, &a.out, &a.lse, &a.weights,
                              &a.mask,  &a.bias, &s.x,     &s.out, &s.mask};
    for (size_t i = 0; i < sizeof a; i++)
        ((unsigned char *)&a)[i] = (unsigned char)next();
    for (size_t i = 0; i < sizeof s; i++)
        ((unsigned char *)&s)[i] = (unsigned char)next();
    for (size_t i = 0; i < sizeof views / sizeof *views; i++)
        views[i]->data = NULL;
    a.key_lengths = a.query_lengths = a.query_offsets = NULL;
    a.alibi_slopes = a.sinks = a.score_weights = NULL;
    if (chance(70))
        a.size = sizeof a, s.size = sizeof s;
    array_count = 0;
    if (chance(50)) {
        int64_t *sizes[] = {&a.batch, &a.num_heads, &a.num_kv_heads, &a.queries, &a.keys, &a.head_dim, &a.value_dim};
        for (int i = 0; i < 7; i++)
            *sizes[i] = chance(50) ? below(9) : hostile_number();
        a.dtype = (fastattn_dtype)below(4), a.score = FASTATTN_DOT_PRODUCT,
        a.activation = (fastattn_activation)below(3);
        a.bias_dtype = (fastattn_dtype)below(4);
        s.dtype = (fastattn_dtype)below(4), s.function = (fastattn_row_function)below(3);
        s.batch = below(3), s.rows = hostile_number(), s.n = hostile_number();
    }
    int said = checked(check_attention, &a, "noise", number);
    if (said != FASTATTN_OK) /* what is allowed without a pointer is empty, but may be empty 2^60 times */
        judge(fastattn_attention(&a, 1, NULL, 0), said, 0, "noise", number);
    said = checked(check_softmax, &s, "noise", number);
    if (said != FASTATTN_OK)
        judge(fastattn_softmax(&s, 1), said, 0, "noise", number);
}

/* The flat functions, on arrays without gaps. */
static void flat(int number)
{
    int64_t b = below(3), kv = below(3), h = kv * (1 + below(2)), l = below(9), s = below(70), d = below(20),
            e = below(20);
    int is_double = chance(50), threads = chance(90) ? below(3) : -1, status;
    size_t item = is_double ? 8 : 4;
    int64_t sizes[] = {b * h * l * e, b * h * l * d, b * kv * s * d, b * kv * s * e};
    char *p[4];
    for (int i = 0; i < 4; i++) {
        p[i] = block((size_t)sizes[i] * item + (sizes[i] == 0));
        fill_numbers(p[i], sizes[i], (int)item, FASTATTN_FLOAT32);
    }
    int64_t left = below(5) - 1 - chance(5), right = below(5) - 1;
    int wrong = left < -1 || threads < 0;
    if (chance(10))
        *(chance(50) ? &l : &s) = -1, wrong = 1;
    if (is_double)
        status = fastattn_dot_product_attention_f64((double *)p[0], (double *)p[1], (double *)p[2], (double *)p[3], b,
                                                    h, kv, l, s, d, e, left, right, NAN, threads);
    else
        status = fastattn_dot_product_attention_f32((float *)p[0], (float *)p[1], (float *)p[2], (float *)p[3], b, h,
                                                    kv, l, s, d, e, left, right, NAN, threads);
    if ((status != FASTATTN_OK) != wrong)
        fail("flat attention", "flat", number, status);
    int64_t rows = below(9), n = below(70);
    float *x = block((size_t)(rows * n) * 4 + (rows * n == 0)), *y = block((size_t)(rows * n) * 4 + (rows * n == 0));
    fill_numbers(x, rows * n, 4, FASTATTN_FLOAT32);
    status = fastattn_softmax_f32(y, x, rows, n, 1);
    if (status == FASTATTN_OK)
        status = fastattn_softmax_f32(x, x, rows, n, 1);
    if (status != FASTATTN_OK || (rows * n > 0 && memcmp(x, y, (size_t)(rows * n) * 4) != 0))
        fail("flat softmax", "flat", number, status);
    ++*(wrong ? &refused : &allowed);
}

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 1000, only = argc > 3 ? atoi(argv[3]) : -1;
    uint64_t seed = argc > 2 ? (uint64_t)atoll(argv[2]) : 0;
    void (*const kinds[])(int) = {attention, softmax, noise, flat};
    for (int i = only < 0 ? 0 : only; i < (only < 0 ? count : only + 1); i++) {
        for (int kind = 0; kind < 4; kind++) {
            state = seed * 0x100000001b3u + (uint64_t)i * 4 + (uint64_t)kind;
            kinds[kind](i);
            free_blocks();
        }
    }
    printf("%ld allowed, %ld refused, %ld too large to run\n", allowed, refused, skipped);
    return 0;
}
