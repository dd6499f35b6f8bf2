# cython: wraparound=True
"""The driver of linear_attention_vjp: recurrences again, and what surrounds them.

With features q_i and k_j of queries and keys, values v_j, gradients g_i for what query i reads and a state M, the way
back of M += k_j v_j^T, out_i = M^T q_i is

    d_query_i = M g_i           the recurrence of M^T: keys v_j, values k_j, queries g_i                    ANSWER
    d_value_j = G^T k_j         that of G, from the last token to the first: keys q_i, values g_i           VALUES
    d_key_j = G v_j             that of G^T: keys g_i, values q_i, queries v_j                              KEYS

each of which is linear attention, on the kernels of linear_attention: no state is kept for the way back, and no bit
depends on how columns are shared. A normaliser is a vector beside M (linear_divide, linear_divide_back).

By the delta rule the state takes up u_j = beta_j r_j, r_j = v_j - M^T k_j, which a walk forward finds (PREDICT). On the
way back G first loses k_j d_value_j^T, d_value_j = beta_j G^T k_j, before it decays (fa_linear.back): so KEYS takes two
steps a token. d_key_j is G u_j - M d_value_j, whose second part the walk of M^T answers beside g_i, one key late.

log_decay needs both states at once: M is kept at every chunk of keys, and compared with G on the way back; from there
linear_fade goes on in small steps. All query heads that share a key head go back one after the other, and add up.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastattn._call cimport Problem, batch_shape, lay_out
from fastattn._checks cimport accumulation, empty
from fastattn._linear cimport BLOCK, Recurrence, find_head, locate, placed, read_call, walk
from fastattn._runtime cimport (FA_F32, FA_F64, FA_LINEAR_BETA, FA_LINEAR_KEY, FA_LINEAR_LOG_DECAY, FA_LINEAR_MISSED,
                                FA_LINEAR_NEW_STATE, FA_LINEAR_OUT, FA_LINEAR_QUERY, FA_LINEAR_STATE, FA_LINEAR_VALUE,
                                FA_NO_MAP, FA_ROW_AXES, Team, Watch, allowed_threads, fa_dtype, fa_kernels, fa_layout,
                                fa_linear, fa_linear_back, fa_linear_head, fa_view, gathered, give_workspace,
                                interrupted, join_team, kernels_for, raise_pending, take_workspace)
from fastattn._vjp cimport Wanted, read_gradient, read_wanted, store

cnp.import_array()

NAMES = ("query", "key", "value", "log_decay", "beta", "state")

cdef enum:
    QUERY, KEY, VALUE, LOG_DECAY, BETA, STATE, INPUTS                       # in the order of NAMES
    READ = 0, PREDICT, ANSWER, DIVIDE, VALUES, CORRECT, KEYS, ANSWER_LATE, FINISH, STEPS
    SMALL = 1 << 16        # numbers of states read or written below which threads cost more than they bring
    LEAST_CHUNK = 48       # keys; a multiple of BLOCK


# Where the gradient of an argument goes, or its sum over heads that share it.
cdef struct Target:
    bint wanted
    bint is_sum                # of float64, from head to head
    fa_layout layout


# One call, checked.
cdef class Gradients:
    cdef Recurrence r
    cdef Wanted wanted
    cdef Target targets[<int> INPUTS]
    cdef fa_layout grad_out, grad_state
    cdef list sums                                  # pairs of a target and its sum
    cdef list kept
    cdef fa_dtype dtype                             # of all numbers here
    cdef Py_ssize_t real                            # its size
    cdef Py_ssize_t head_rows                       # of gradients of queries: from a head to the next
    cdef int64_t chunk, chunks
    cdef bint needed[<int> STEPS]
    cdef bint delta, decays, weighs, late, says     # weighs: d_query is needed; late: M d_value
    cdef size_t head_size, task_size, kernel_size


# A head of keys on its way, at the beginning of its memory: what it was given, and its gradients, in the accumulation
# dtype.
cdef struct Head:
    fa_linear_head given
    fa_view grad_out, grad_state
    int64_t keys
    int64_t *offset            # beyond all keys where not causal
    int64_t *rows
    char *query                # features (heads, queries, F)
    char *key                  # (keys, F)
    char *grad                 # (heads, head_rows, E), and with the delta rule d_value as one more
    char *d_query              # (the same, F)
    char *d_value
    char *d_key
    char *missed               # (keys, E): r, then u
    char *share                # (heads, head_rows)
    char *d_log_decay
    char *d_beta               # (keys), and the factor of M d_value's last key behind it
    char *end                  # (F, E): the gradient of the state after all keys
    char *d_state              # (F, E): before all keys
    char *z                    # (F)
    char *d_z
    char *states               # (chunks + 1, E, F): M^T
    char *normalisers          # (chunks + 1, F)
    char *anchor
    char *other                # (keys, E or F): a further head's part
    char *other_state          # (F, E)
    char *zeros                # max(E, F)


# Scratch of a task.
cdef struct Scratch:
    char *kernel
    char *logs                 # (2 chunk, F)
    char *keys                 # (2 chunk, E or F)
    char *values
    char *queries              # (2 chunk, E)
    char *out                  # (2 chunk, F)
    char *state                # (E, F)
    char *places               # (2, heads + 1) of 64 bits


# Arguments

cdef Gradients read(object grad_out, object query, object key, object value, object wrt, object grad_state,
                    object feature_map, object is_causal, object query_offset, object key_lengths,
                    object query_lengths, object log_decay, object beta, object normalize, object scale, object eps,
                    object state, object enable_gqa, object out, object num_threads):
    cdef Gradients b = Gradients.__new__(Gradients)
    cdef Recurrence r = read_call(query, key, value, feature_map, is_causal, query_offset, key_lengths, query_lengths,
                                  log_decay, beta, normalize, scale, eps, state, False, None, enable_gqa, None,
                                  num_threads, True)
    cdef Problem p = r.call
    cdef dict given = {"query": query, "key": key, "value": value, "log_decay": log_decay, "beta": beta,
                       "state": state}
    cdef dict others = {"key_lengths": key_lengths, "query_lengths": query_lengths, "query_offset": query_offset,
                        "grad_out": grad_out, "grad_state": grad_state}
    cdef int i
    cdef bint normalised = r.shared.is_normalised
    cdef cnp.ndarray a
    cdef int64_t features = r.shared.features, width = r.shared.value_dim
    b.r = r
    real = accumulation(p.call.problem.dtype)
    b.real = real.itemsize
    b.dtype = FA_F64 if b.real == 8 else FA_F32
    batch = batch_shape(p.call)
    key_batch = batch[:-1] + (batch[-1] // p.call.group,) if batch else ()
    rows, keys = p.call.sizes.queries, p.call.sizes.keys
    a = read_gradient(grad_out, (*batch, rows, width))
    lay_out(&b.grad_out, p.call.axes, a, 2)
    b.kept = [a]
    b.grad_state.data = NULL
    whole = (*key_batch, features, width + normalised)
    if grad_state is not None:
        a = read_gradient(grad_state, whole, "grad_state")
        lay_out(&b.grad_state, p.call.axes, a, 2)
        b.kept.append(a)
    b.wanted = read_wanted(wrt, given, out, real, others)
    b.sums = []
    shapes = ((*batch, rows, p.call.problem.head_dim), (*key_batch, keys, p.call.problem.head_dim),
              (*key_batch, keys, width), (*key_batch, keys, features), (*key_batch, keys), whole)
    for i in range(<int> INPUTS):
        b.targets[i].wanted = NAMES[i] in b.wanted.names
        if b.targets[i].wanted:
            place(b, i, b.wanted.target(NAMES[i]), shapes[i], 1 if i == BETA else 2)
    choose_steps(b)
    b.head_rows = max(rows, keys)
    b.chunk = max(LEAST_CHUNK, (features * width // max(1, 2 * features + width) + BLOCK - 1) // BLOCK * BLOCK)
    b.chunks = (keys + b.chunk - 1) // b.chunk
    return b


cdef int place(Gradients b, int i, cnp.ndarray target, tuple shape, int trailing) except -1:
    """Notes where a gradient goes. If heads, keys or channels share a number of it, they are summed up in float64."""
    cdef Target *to = &b.targets[i]
    cdef cnp.ndarray a = target
    have = (<object> target).shape
    # log_decay with one column is a case of its own to the kernels.
    full = shape if i != LOG_DECAY or len(have) == 0 or have[-1] != 1 else (*shape[:-1], 1)
    to.is_sum = have != full
    if to.is_sum:
        a = empty(have, np.dtype(np.float64), f"the gradient of {NAMES[i]}", True)
        b.sums.append((target, a))
        if len(have) < trailing:
            a = (<object> a)[(None,) * (trailing - len(have))]
    lay_out(&to.layout, b.r.call.call.axes, a, trailing)
    if i == LOG_DECAY and cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
        to.layout.col = 0
    if i == BETA:
        to.layout.col = 0
        if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
            to.layout.row = 0
    b.kept.append(a)
    return 0


cdef int choose_steps(Gradients b) except -1:
    cdef bint query = b.targets[<int> QUERY].wanted, key = b.targets[<int> KEY].wanted
    cdef bint value = b.targets[<int> VALUE].wanted, decay = b.targets[<int> LOG_DECAY].wanted
    cdef bint beta = b.targets[<int> BETA].wanted, state = b.targets[<int> STATE].wanted
    cdef bint normalised = b.r.shared.is_normalised
    b.delta = b.r.layouts[<int> FA_LINEAR_BETA].data != NULL
    b.decays = b.r.layouts[<int> FA_LINEAR_LOG_DECAY].data != NULL
    b.weighs = query or decay or normalised and (key or state)
    b.says = b.delta and (key or decay)
    b.needed[<int> READ] = b.needed[<int> FINISH] = True
    b.needed[<int> PREDICT] = b.delta and (query or key or decay or beta)
    b.needed[<int> ANSWER] = b.weighs and not b.delta
    b.needed[<int> ANSWER_LATE] = b.delta and (b.weighs or b.says)
    b.needed[<int> KEYS] = key or decay
    b.needed[<int> VALUES] = value or state or b.needed[<int> KEYS] or b.delta and beta
    b.needed[<int> CORRECT] = b.delta
    b.needed[<int> DIVIDE] = normalised
    return 0


# Memory

cdef size_t part(char **to, char *base, size_t used, double numbers, Py_ssize_t size) noexcept nogil:
    """Hands out memory; base NULL: only counts it."""
    to[0] = base + used if base != NULL else NULL
    return used + (<size_t> numbers * size + 63) // 64 * 64


cdef size_t lay_out_head(Gradients b, Head *h, char *base) noexcept nogil:
    """base: where the head itself is."""
    cdef fa_linear *s = &b.r.shared
    cdef Py_ssize_t real = b.real
    cdef double f = s.features, e = s.value_dim, heads = s.heads, keys = b.r.call.call.sizes.keys
    cdef double rows = b.r.call.call.sizes.queries, apart = b.head_rows, members = heads + b.delta
    cdef bint normalised = s.is_normalised, decay = b.targets[<int> LOG_DECAY].wanted
    cdef size_t used = (sizeof(Head) + 63) // 64 * 64
    used = part(<char **> &h.offset, base, used, heads, 8)
    used = part(<char **> &h.rows, base, used, heads, 8)
    used = part(&h.query, base, used, heads * rows * f, real)
    used = part(&h.key, base, used, keys * f, real)
    used = part(&h.grad, base, used, members * apart * e, real)
    used = part(&h.d_query, base, used, members * apart * f if b.weighs or b.says else 0, real)
    h.d_value = h.grad + b.r.shared.heads * b.head_rows * b.r.shared.value_dim * real if base != NULL else NULL
    if not b.delta:
        used = part(&h.d_value, base, used, keys * e, real)
    used = part(&h.d_key, base, used, keys * f, real)
    used = part(&h.missed, base, used, keys * e if b.delta else 0, real)
    used = part(&h.share, base, used, heads * apart if normalised else 0, real)
    used = part(&h.d_log_decay, base, used, keys * f if decay else 0, real)
    used = part(&h.d_beta, base, used, 2 * keys, real)
    used = part(&h.end, base, used, f * e, real)
    used = part(&h.d_state, base, used, f * e, real)
    used = part(&h.z, base, used, f, real)
    used = part(&h.d_z, base, used, f, real)
    used = part(&h.states, base, used, (b.chunks + 1.0) * e * f if decay else 0, real)
    used = part(&h.normalisers, base, used, (b.chunks + 1.0) * f if decay else 0, real)
    used = part(&h.anchor, base, used, (b.chunks + 1.0) * f if decay else 0, real)
    used = part(&h.other, base, used, keys * max(e, f) if heads > 1 else 0, real)
    used = part(&h.other_state, base, used, f * e if heads > 1 else 0, real)
    return part(&h.zeros, base, used, max(e, f), real)


cdef size_t lay_out_scratch(Gradients b, Scratch *s, char *base) noexcept nogil:
    cdef double f = b.r.shared.features, e = b.r.shared.value_dim, keys = 2 * b.chunk
    cdef size_t used = part(&s.kernel, base, 0, b.kernel_size, 1)
    used = part(&s.logs, base, used, keys * f, b.real)
    used = part(&s.keys, base, used, keys * max(e, f), b.real)
    used = part(&s.values, base, used, keys * max(e, f), b.real)
    used = part(&s.queries, base, used, keys * e, b.real)
    used = part(&s.out, base, used, keys * f, b.real)
    used = part(&s.state, base, used, e * f, b.real)
    return part(&s.places, base, used, 2.0 * (b.r.shared.heads + 1), 8)


cdef fa_view rows_of(Gradients b, char *data, Py_ssize_t row, Py_ssize_t col=1, Py_ssize_t head=0) noexcept nogil:
    """A matrix of our own; steps in numbers."""
    cdef fa_view view
    view.data, view.dtype = data, b.dtype
    view.row, view.col, view.head = row * b.real, col * b.real, head * b.real
    return view


cdef fa_view backwards(fa_view view, int64_t rows) noexcept nogil:
    """From the last of so many rows to the first."""
    view.data += max(0, rows - 1) * view.row
    view.row = -view.row
    return view


cdef fa_view transposed(fa_view view) noexcept nogil:
    view.row, view.col = view.col, view.row
    return view


cdef fa_view nowhere() noexcept nogil:
    cdef fa_view view
    memset(&view, 0, sizeof(view))
    return view


# Recurrences

# One walk over the state: columns of its head, and what it walks on.
cdef struct Walk:
    fa_linear shared
    fa_linear_head head
    int64_t offset, rows
    int64_t keys


cdef void begin_walk(Walk *w, int64_t features, int64_t width, int64_t column, int64_t columns) noexcept nogil:
    """One head of queries that stand on the keys from the first on, none of them yet."""
    memset(w, 0, sizeof(w[0]))
    w.shared.features, w.shared.value_dim, w.shared.heads = features, width, 1
    w.shared.map = FA_NO_MAP
    w.shared.is_causal, w.shared.scale = True, 1
    w.head.column, w.head.columns = column, columns
    w.head.offset, w.head.rows = &w.offset, &w.rows


cdef int go(const fa_kernels *kernels, Walk *w, Scratch *s, Watch *watch, bint caller) noexcept nogil:
    """All of it, and the state where it is wanted."""
    kernels.linear_open(&w.shared, &w.head, s.kernel)
    if walk(kernels, &w.shared, &w.head, w.keys, s.kernel, watch, caller):
        return 1
    kernels.linear_close(&w.shared, &w.head, s.kernel)
    return 0


cdef int predict(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, int64_t column, int64_t columns,
                 Watch *watch, bint caller) noexcept nogil:
    """What the delta rule missed at each key."""
    cdef fa_linear *shared = &b.r.shared
    cdef int64_t f = shared.features, e = shared.value_dim
    cdef Walk w
    begin_walk(&w, f, e, column, columns)
    w.head.view[<int> FA_LINEAR_KEY] = w.head.view[<int> FA_LINEAR_QUERY] = rows_of(b, h.key, f)
    w.head.view[<int> FA_LINEAR_VALUE] = h.given.view[<int> FA_LINEAR_VALUE]
    w.head.view[<int> FA_LINEAR_LOG_DECAY] = h.given.view[<int> FA_LINEAR_LOG_DECAY]
    w.head.view[<int> FA_LINEAR_BETA] = h.given.view[<int> FA_LINEAR_BETA]
    w.head.view[<int> FA_LINEAR_STATE] = h.given.view[<int> FA_LINEAR_STATE]
    w.head.view[<int> FA_LINEAR_MISSED] = rows_of(b, h.missed, e)
    w.head.view[<int> FA_LINEAR_OUT] = rows_of(b, h.missed, e)
    if b.targets[<int> LOG_DECAY].wanted:
        w.head.view[<int> FA_LINEAR_NEW_STATE] = rows_of(b, h.states, 1, f)
    kernels.linear_open(&w.shared, &w.head, s.kernel)
    return walk(kernels, &w.shared, &w.head, h.keys, s.kernel, watch, caller,
                b.chunk if b.targets[<int> LOG_DECAY].wanted else 0, e * f * b.real)


cdef int answer(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, int64_t column, int64_t columns,
                Watch *watch, bint caller) noexcept nogil:
    """M times the gradients of queries, and with the delta rule M times those of values."""
    cdef fa_linear *shared = &b.r.shared
    cdef int64_t f = shared.features, e = shared.value_dim, member
    cdef bint keeps = b.targets[<int> LOG_DECAY].wanted and not b.delta
    cdef int64_t *offset = <int64_t *> s.places
    cdef int64_t *rows = offset + shared.heads + 1
    cdef Walk w
    begin_walk(&w, e, f, column, columns)
    w.shared.heads = shared.heads + b.says
    w.shared.is_causal, w.shared.fades = shared.is_causal, b.decays
    for member in range(shared.heads):
        offset[member], rows[member] = h.offset[member], h.rows[member] if b.weighs else 0
    offset[shared.heads], rows[shared.heads] = 0, h.keys
    w.head.offset, w.head.rows = offset, rows
    if b.delta:
        w.head.view[<int> FA_LINEAR_KEY] = rows_of(b, h.missed, e)
    else:
        w.head.view[<int> FA_LINEAR_KEY] = h.given.view[<int> FA_LINEAR_VALUE]
    w.head.view[<int> FA_LINEAR_QUERY] = rows_of(b, h.grad, e, 1, b.head_rows * e)
    w.head.view[<int> FA_LINEAR_VALUE] = rows_of(b, h.key, f)
    w.head.view[<int> FA_LINEAR_LOG_DECAY] = h.given.view[<int> FA_LINEAR_LOG_DECAY]
    w.head.view[<int> FA_LINEAR_OUT] = rows_of(b, h.d_query, f, 1, b.head_rows * f)
    w.head.view[<int> FA_LINEAR_STATE] = transposed(h.given.view[<int> FA_LINEAR_STATE])
    if keeps:
        w.head.view[<int> FA_LINEAR_NEW_STATE] = rows_of(b, h.states, f)
    kernels.linear_open(&w.shared, &w.head, s.kernel)
    return walk(kernels, &w.shared, &w.head, h.keys, s.kernel, watch, caller, b.chunk if keeps else 0, e * f * b.real)


cdef void rows_on_keys(Gradients b, Head *h, int64_t member, int64_t *first, int64_t *end) noexcept nogil:
    """The keys [first, end) that queries of a head stand on."""
    first[0] = max(0, min(h.keys, h.offset[member]))
    end[0] = max(first[0], min(h.keys, h.offset[member] + h.rows[member]))


cdef int gather_beside(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, int64_t column, int64_t columns,
                       bint after, char *state, Watch *watch, bint caller) noexcept nogil:
    """Adds what rows before all keys, or after them, give to the gradient of the state."""
    cdef int64_t f = b.r.shared.features, e = b.r.shared.value_dim, member, begin, end
    cdef Walk w
    for member in range(b.r.shared.heads):
        begin, end = 0, h.rows[member]
        if after:
            begin = max(0, h.keys - h.offset[member])
        else:
            end = min(end, -h.offset[member])
        if begin >= end:
            continue
        begin_walk(&w, f, e, column, columns)
        w.shared.is_causal = False
        w.keys = end - begin
        w.head.view[<int> FA_LINEAR_KEY] = rows_of(b, query_row(b, h, member, begin), f)
        w.head.view[<int> FA_LINEAR_QUERY] = w.head.view[<int> FA_LINEAR_KEY]
        w.head.view[<int> FA_LINEAR_VALUE] = rows_of(b, grad_row(b, h, member, begin), e)
        w.head.view[<int> FA_LINEAR_STATE] = w.head.view[<int> FA_LINEAR_NEW_STATE] = rows_of(b, state, e)
        if go(kernels, &w, s, watch, caller):
            return 1
    return 0


cdef char *query_row(Gradients b, Head *h, int64_t member, int64_t i) noexcept nogil:
    return h.query + (member * b.r.call.call.sizes.queries + i) * b.r.shared.features * b.real


cdef char *grad_row(Gradients b, Head *h, int64_t member, int64_t i) noexcept nogil:
    return h.grad + (member * b.head_rows + i) * b.r.shared.value_dim * b.real


# Of the way back, token t of n is key n - 1 - t. Before it what is there decays as key n - t says, so there is a last
# token that only decays.

cdef void put_rows(Gradients b, const fa_kernels *kernels, Head *h, int64_t member, bint of_query, int64_t begin,
                   int64_t end, char *to, int64_t step) noexcept nogil:
    """Rows of the queries that stand on the tokens [begin, end), zeros where none does; step: of `to`, in rows."""
    cdef int64_t n = b.r.shared.features if of_query else b.r.shared.value_dim, t, first, last, i, stop
    cdef fa_view rows, zeros = rows_of(b, h.zeros, 0)
    rows_on_keys(b, h, member, &first, &last)
    t = begin
    while t < end:
        i = h.keys - 1 - t - h.offset[member]
        if first <= h.keys - 1 - t < last:
            stop = min(end, h.keys - first)
            rows = rows_of(b, query_row(b, h, member, i) if of_query else grad_row(b, h, member, i), -n)
            kernels.linear_map(FA_NO_MAP, &rows, NULL, 1, 0, 0, stop - t, n, to, step * n * b.real)
        else:
            stop = min(end, h.keys - last) if h.keys - 1 - t >= last else end
            kernels.linear_map(FA_NO_MAP, &zeros, NULL, 1, 0, 0, stop - t, n, to, step * n * b.real)
        to += (stop - t) * step * n * b.real
        t = stop


cdef fa_view put_logs(Gradients b, const fa_kernels *kernels, Head *h, int64_t begin, int64_t end, char *to,
                      int64_t step) noexcept nogil:
    """log_decay of the tokens [begin, end), and 0 between them; token 0 has none."""
    cdef fa_view *logs = &h.given.view[<int> FA_LINEAR_LOG_DECAY]
    cdef int64_t n = b.r.shared.features if logs.col else 1, skipped = 1 if begin == 0 else 0
    cdef fa_view back
    if not b.decays:
        return nowhere()
    if step > 1 or skipped:
        memset(to, 0, (end - begin) * step * n * b.real)
    back = logs[0]
    back.data += (h.keys - begin - skipped) * logs.row
    back.row = -logs.row
    if back.col == 0:
        back.col = b.real
    kernels.linear_map(FA_NO_MAP, &back, NULL, 1, 0, 0, end - begin - skipped, n, to + skipped * step * n * b.real,
                       step * n * b.real)
    return rows_of(b, to - begin * step * n * b.real, n, 1 if logs.col else 0)


cdef int values_back(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, int64_t column, int64_t columns,
                     Watch *watch, bint caller) noexcept nogil:
    """d_value, or with the delta rule that of u; and the gradient of the first state."""
    cdef int64_t f = b.r.shared.features, e = b.r.shared.value_dim, n = h.keys, member, first, last, t, end
    cdef bint reads = b.delta or b.targets[<int> VALUE].wanted
    cdef char *to
    cdef char *state
    cdef Walk w
    for member in range(b.r.shared.heads):
        to, state = h.d_value, h.d_state
        if member > 0:
            to, state = h.other, h.other_state
        rows_on_keys(b, h, member, &first, &last)
        begin_walk(&w, f, e, column, columns)
        w.rows = n if reads else 0
        w.head.view[<int> FA_LINEAR_QUERY] = backwards(rows_of(b, h.key, f), n)
        w.head.view[<int> FA_LINEAR_OUT] = backwards(rows_of(b, to, e), n)
        if member == 0:
            w.head.view[<int> FA_LINEAR_STATE] = rows_of(b, h.end, e)
        w.head.view[<int> FA_LINEAR_NEW_STATE] = rows_of(b, state, e)
        if not b.decays and not b.delta:
            w.keys, w.offset = last - first, last - n
            if w.keys > 0:
                w.head.view[<int> FA_LINEAR_KEY] = backwards(
                    rows_of(b, query_row(b, h, member, first - h.offset[member]), f), w.keys)
                w.head.view[<int> FA_LINEAR_VALUE] = backwards(
                    rows_of(b, grad_row(b, h, member, first - h.offset[member]), e), w.keys)
            if go(kernels, &w, s, watch, caller):
                return 1
        else:
            if b.delta:
                w.shared.back = True
                w.head.view[<int> FA_LINEAR_BETA] = backwards(h.given.view[<int> FA_LINEAR_BETA], n)
            kernels.linear_open(&w.shared, &w.head, s.kernel)
            t = 0
            while t < n + b.decays:
                end = min(t + b.chunk, n) if t < n else n + 1
                put_rows(b, kernels, h, member, True, t, end, s.keys, 1)
                put_rows(b, kernels, h, member, False, t, end, s.values, 1)
                w.head.view[<int> FA_LINEAR_KEY] = rows_of(b, s.keys - t * f * b.real, f)
                w.head.view[<int> FA_LINEAR_VALUE] = rows_of(b, s.values - t * e * b.real, e)
                w.head.view[<int> FA_LINEAR_LOG_DECAY] = put_logs(b, kernels, h, t, end, s.logs, 1)
                if t == n:
                    w.head.view[<int> FA_LINEAR_BETA] = nowhere()
                kernels.linear_keys(&w.shared, &w.head, t, end, s.kernel)
                t = end
                if watch != NULL and interrupted(watch, caller):
                    return 1
            kernels.linear_close(&w.shared, &w.head, s.kernel)
        if member > 0:
            if reads:
                kernels.linear_add(h.d_value + column * b.real, e * b.real, to + column * b.real, e * b.real, 1, NULL,
                                   n, columns)
            kernels.linear_add(h.d_state + column * b.real, e * b.real, state + column * b.real, e * b.real, 1, NULL,
                               f, columns)
    return 0


cdef int keys_back(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, int64_t column, int64_t columns,
                   Watch *watch, bint caller) noexcept nogil:
    """d_key, with the delta rule its first part; and M compared with its gradient."""
    cdef int64_t f = b.r.shared.features, e = b.r.shared.value_dim, n = h.keys, member, first, last
    cdef fa_view value = h.given.view[<int> FA_LINEAR_VALUE]
    cdef char *to
    cdef Walk w
    if b.delta:
        value = rows_of(b, h.missed, e)
    for member in range(b.r.shared.heads):
        to = h.d_key if member == 0 else h.other
        rows_on_keys(b, h, member, &first, &last)
        begin_walk(&w, e, f, column, columns)
        w.rows = n
        w.head.view[<int> FA_LINEAR_QUERY] = backwards(value, n)
        w.head.view[<int> FA_LINEAR_OUT] = backwards(rows_of(b, to, f), n)
        if member == 0:
            w.head.view[<int> FA_LINEAR_STATE] = rows_of(b, h.end, 1, e)
        if not b.decays and not b.delta:
            w.keys, w.offset = last - first, last - n
            if w.keys > 0:
                w.head.view[<int> FA_LINEAR_KEY] = backwards(
                    rows_of(b, grad_row(b, h, member, first - h.offset[member]), e), w.keys)
                w.head.view[<int> FA_LINEAR_VALUE] = backwards(
                    rows_of(b, query_row(b, h, member, first - h.offset[member]), f), w.keys)
            if go(kernels, &w, s, watch, caller):
                return 1
        elif keys_in_chunks(b, h, kernels, s, &w, member, b.delta and member == 0, watch, caller):
            return 1
        if member > 0:
            kernels.linear_add(h.d_key + column * b.real, f * b.real, to + column * b.real, f * b.real, 1, NULL, n,
                               columns)
    return 0


cdef int keys_in_chunks(Gradients b, Head *h, const fa_kernels *kernels, Scratch *s, Walk *w, int64_t member,
                        bint twice, Watch *watch, bint caller) noexcept nogil:
    """The same with decays or the delta rule. twice: each token is followed by what it takes back."""
    cdef int64_t f = b.r.shared.features, e = b.r.shared.value_dim, n = h.keys, t = 0, end, count
    cdef int64_t step = 2 if twice else 1
    cdef size_t f_row = f * b.real, e_row = e * b.real
    cdef int64_t at = (n + b.chunk - 1) // b.chunk
    cdef fa_view rows
    cdef char *to = h.d_key + w.head.column * b.real
    w.shared.fades = b.decays
    if twice:
        w.rows = 2 * n
        memset(s.queries, 0, 2 * b.chunk * e_row)
    kernels.linear_open(&w.shared, &w.head, s.kernel)
    while True:
        if b.targets[<int> LOG_DECAY].wanted:
            w.head.view[<int> FA_LINEAR_NEW_STATE] = rows_of(b, s.state, f)
            kernels.linear_close(&w.shared, &w.head, s.kernel)
            kernels.linear_products(h.anchor + at * f_row + w.head.column * b.real,
                                    h.states + at * e * f_row + w.head.column * b.real,
                                    s.state + w.head.column * b.real, f_row, e, w.head.columns)
        at -= 1
        if at < 0:
            return 0
        end = n - at * b.chunk
        count = end - t
        put_rows(b, kernels, h, member, False, t, end, s.keys, step)
        put_rows(b, kernels, h, member, True, t, end, s.values, step)
        w.head.view[<int> FA_LINEAR_LOG_DECAY] = put_logs(b, kernels, h, t, end, s.logs, step)
        if twice:
            rows = backwards(rows_of(b, h.d_value, e), n)
            kernels.linear_map(FA_NO_MAP, &rows, NULL, -1, 0, t, count, e, s.keys + e_row, 2 * e_row)
            rows = backwards(rows_of(b, h.key, f), n)
            kernels.linear_map(FA_NO_MAP, &rows, NULL, 1, 0, t, count, f, s.values + f_row, 2 * f_row)
            rows = backwards(rows_of(b, h.missed, e), n)
            kernels.linear_map(FA_NO_MAP, &rows, NULL, 1, 0, t, count, e, s.queries, 2 * e_row)
            w.head.view[<int> FA_LINEAR_QUERY] = rows_of(b, s.queries - 2 * t * e_row, e)
            w.head.view[<int> FA_LINEAR_OUT] = rows_of(b, s.out - 2 * t * f_row, f)
        w.head.view[<int> FA_LINEAR_KEY] = rows_of(b, s.keys - step * t * e_row, e)
        w.head.view[<int> FA_LINEAR_VALUE] = rows_of(b, s.values - step * t * f_row, f)
        kernels.linear_keys(&w.shared, &w.head, step * t, step * end, s.kernel)
        if twice:
            rows = rows_of(b, s.out + w.head.column * b.real, 2 * f)
            kernels.linear_map(FA_NO_MAP, &rows, NULL, 1, 0, 0, count, w.head.columns, to + (n - 1 - t) * f_row,
                               -<Py_ssize_t> f_row)
        t = end
        if watch != NULL and interrupted(watch, caller):
            return 1


# What surrounds them

cdef void read_head(Gradients b, Head *h, const fa_kernels *kernels, int64_t number, int64_t parts) noexcept nogil:
    """Part `number` of the features and gradients of a head; the first one also makes room."""
    cdef fa_linear *shared = &b.r.shared
    cdef int64_t f = shared.features, e = shared.value_dim, member, begin, end
    cdef double factor = 1 if shared.is_normalised else shared.scale
    cdef fa_view *state = &h.given.view[<int> FA_LINEAR_STATE]
    for member in range(shared.heads):
        begin, end = h.rows[member] * number // parts, h.rows[member] * (number + 1) // parts
        kernels.linear_map(shared.map, &h.given.view[<int> FA_LINEAR_QUERY], NULL, 1, member, begin, end - begin, f,
                           query_row(b, h, member, begin), f * b.real)
        kernels.linear_map(FA_NO_MAP, &h.grad_out, NULL, factor, member, begin, end - begin, e,
                           grad_row(b, h, member, begin), e * b.real)
    begin, end = h.keys * number // parts, h.keys * (number + 1) // parts
    kernels.linear_map(shared.map, &h.given.view[<int> FA_LINEAR_KEY], NULL, 1, 0, begin, end - begin, f,
                       h.key + begin * f * b.real, f * b.real)
    if number > 0:
        return
    memset(h.zeros, 0, max(e, f) * b.real)
    memset(h.z, 0, f * b.real)
    memset(h.d_z, 0, f * b.real)
    memset(h.end, 0, f * e * b.real)
    if b.targets[<int> LOG_DECAY].wanted:
        memset(h.anchor, 0, (b.chunks + 1) * f * b.real)
    if state.data != NULL and shared.is_normalised:
        kernels.gather(h.z, state.data + e * state.col, state.row, f, state.dtype)
    if h.grad_state.data != NULL:
        kernels.linear_map(FA_NO_MAP, &h.grad_state, NULL, 1, 0, 0, f, e, h.end, e * b.real)
        if shared.is_normalised:
            kernels.gather(h.d_z, h.grad_state.data + e * h.grad_state.col, h.grad_state.row, f, h.grad_state.dtype)


cdef fa_linear_back beside(Gradients b, Head *h) noexcept nogil:
    cdef fa_linear_back back
    cdef bint decay = b.targets[<int> LOG_DECAY].wanted
    memset(&back, 0, sizeof(back))
    back.features, back.value_dim, back.keys = b.r.shared.features, b.r.shared.value_dim, h.keys
    back.heads, back.head_rows, back.query_rows = b.r.shared.heads, b.head_rows, b.r.call.call.sizes.queries
    back.offset, back.rows, back.eps = h.offset, h.rows, b.r.shared.eps
    back.log_decay = h.given.view[<int> FA_LINEAR_LOG_DECAY]
    back.chunk = b.chunk
    back.query, back.key, back.grad_out = h.query, h.key, h.grad
    back.d_query = h.d_query if b.weighs else NULL
    back.d_normaliser = h.share
    back.d_key = h.d_key if b.needed[<int> KEYS] else NULL
    back.said = h.d_query + b.r.shared.heads * b.head_rows * back.features * b.real if b.says else NULL
    back.z, back.d_z = h.z, h.d_z
    back.kept, back.anchor = h.normalisers if decay else NULL, h.anchor
    back.d_log_decay = h.d_log_decay
    return back


cdef void correct(Gradients b, Head *h, const fa_kernels *kernels) noexcept nogil:
    """From what was missed, and the gradient of what was added: d_beta, d_value and what was added."""
    cdef int64_t e = b.r.shared.value_dim
    cdef fa_view *beta = &h.given.view[<int> FA_LINEAR_BETA]
    cdef fa_view rows
    cdef char *factor = h.d_beta + h.keys * b.real
    if b.needed[<int> PREDICT] and b.needed[<int> VALUES]:
        kernels.linear_dots(h.d_beta, h.d_value, h.missed, h.keys, e)
        rows = rows_of(b, h.d_beta, 1)
        kernels.linear_map(FA_NO_MAP, &rows, beta, 1, 0, 0, h.keys, 1, factor, b.real)
        rows = rows_of(b, factor, 1)
        kernels.linear_map(FA_NO_MAP, &rows, beta, 1, 0, 0, h.keys, 1, factor, b.real)
    if b.needed[<int> PREDICT]:
        rows = rows_of(b, h.missed, e)
        kernels.linear_map(FA_NO_MAP, &rows, beta, 1, 0, 0, h.keys, e, h.missed, e * b.real)
    if b.needed[<int> VALUES]:
        rows = rows_of(b, h.d_value, e)
        kernels.linear_map(FA_NO_MAP, &rows, beta, 1, 0, 0, h.keys, e, h.d_value, e * b.real)


cdef int64_t first_seeing(Head *h, int64_t member) noexcept nogil:
    """Rows of a head before this one see no key, and no state: their gradient is 0, whatever comes in for them."""
    if h.given.view[<int> FA_LINEAR_STATE].data != NULL:
        return 0
    return h.rows[member] if h.keys == 0 else max(0, min(h.rows[member], -h.offset[member]))


cdef void finish(Gradients b, Head *h, const fa_kernels *kernels, Py_ssize_t head) noexcept nogil:
    """What is left to do, and all gradients to where they go, except those that are summed over heads."""
    cdef fa_linear *shared = &b.r.shared
    cdef int64_t f = shared.features, e = shared.value_dim, member, first
    cdef size_t f_row = f * b.real
    cdef char *own
    cdef fa_linear_back back = beside(b, h)
    cdef fa_view to
    cdef Py_ssize_t index[FA_ROW_AXES]
    if b.says:
        # M d_value was read when the key was there already.
        kernels.linear_add(<char *> back.said, f_row, h.key, f_row, -1, h.d_beta + h.keys * b.real, h.keys, f)
        kernels.linear_add(h.d_key, f_row, back.said, f_row, -1, NULL, h.keys, f)
    if shared.is_normalised and (b.needed[<int> KEYS] or b.targets[<int> STATE].wanted):
        kernels.linear_divide_back(&back)
    if b.targets[<int> LOG_DECAY].wanted:
        kernels.linear_fade(&back)
    find_head(b.r, head, index)
    if b.targets[<int> QUERY].wanted:
        for member in range(shared.heads):
            own = h.d_query + member * b.head_rows * f_row
            first = first_seeing(h, member)
            memset(own, 0, first * f_row)
            to = goal(b, QUERY, index, own, f)
            kernels.linear_unmap(shared.map, &h.given.view[<int> FA_LINEAR_QUERY], own, member, first, h.rows[member],
                                 f, &to)
            if not b.targets[<int> QUERY].is_sum:
                to.data += member * to.head
                clear(b, kernels, h, &to, 0, first, f)
                clear(b, kernels, h, &to, h.rows[member], b.r.call.call.sizes.queries, f)
    if b.targets[<int> KEY].wanted:
        to = goal(b, KEY, index, h.d_key, f)
        kernels.linear_unmap(shared.map, &h.given.view[<int> FA_LINEAR_KEY], h.d_key, 0, 0, h.keys, f, &to)
        if not b.targets[<int> KEY].is_sum:
            clear(b, kernels, h, &to, h.keys, b.r.call.call.sizes.keys, f)
    give(b, kernels, h, VALUE, index, h.d_value, h.keys, b.r.call.call.sizes.keys, e)
    give(b, kernels, h, LOG_DECAY, index, h.d_log_decay, h.keys, b.r.call.call.sizes.keys, width_of(b, LOG_DECAY))
    give(b, kernels, h, BETA, index, h.d_beta, h.keys, b.r.call.call.sizes.keys, 1)
    if b.targets[<int> STATE].wanted:
        give(b, kernels, h, STATE, index, h.d_state, f, f, e)
        to = placed(&b.targets[<int> STATE].layout, b.r.call.call.axes, index, 1)
        if shared.is_normalised:
            kernels.scatter(to.data + e * to.col, to.row, h.d_z, f, to.dtype)


cdef int64_t width_of(Gradients b, int i) noexcept nogil:
    """Columns of a gradient as it is before it is summed over heads."""
    if i == BETA or i == LOG_DECAY and b.r.layouts[<int> FA_LINEAR_LOG_DECAY].col == 0:
        return 1
    return b.r.shared.value_dim if i == VALUE else b.r.shared.features


cdef fa_view goal(Gradients b, int i, const Py_ssize_t *index, char *own, int64_t n) noexcept nogil:
    """Where a gradient goes: for sums, to where it is."""
    cdef fa_view to
    if b.targets[i].is_sum:
        return rows_of(b, own, n)
    to = placed(&b.targets[i].layout, b.r.call.call.axes, index, b.r.shared.heads if i == QUERY else 1)
    return to


cdef void clear(Gradients b, const fa_kernels *kernels, Head *h, const fa_view *to, int64_t begin, int64_t end,
                int64_t n) noexcept nogil:
    cdef int64_t row
    for row in range(begin, end):
        kernels.scatter(to.data + row * to.row, to.col, h.zeros, n, to.dtype)


cdef void give(Gradients b, const fa_kernels *kernels, Head *h, int i, const Py_ssize_t *index, char *own,
               int64_t rows, int64_t all_rows, int64_t n) noexcept nogil:
    cdef fa_view to
    cdef int64_t row
    if not b.targets[i].wanted or b.targets[i].is_sum:
        return
    to = goal(b, i, index, own, n)
    for row in range(rows):
        kernels.scatter(to.data + row * to.row, to.col, own + row * n * b.real, n, to.dtype)
    clear(b, kernels, h, &to, rows, all_rows, n)


cdef void add_up(Gradients b, Head *h, Py_ssize_t head) noexcept nogil:
    """Adds the gradients of a head to sums; heads come in ascending order."""
    cdef Py_ssize_t index[FA_ROW_AXES]
    cdef char *rows[<int> INPUTS]
    cdef int64_t i, member, n, count
    cdef fa_view to
    find_head(b.r, head, index)
    rows[<int> QUERY], rows[<int> KEY], rows[<int> VALUE] = h.d_query, h.d_key, h.d_value
    rows[<int> LOG_DECAY], rows[<int> BETA], rows[<int> STATE] = h.d_log_decay, h.d_beta, NULL
    for i in range(<int> STATE):
        if not b.targets[i].wanted or not b.targets[i].is_sum:
            continue
        n = width_of(b, i)
        to = placed(&b.targets[i].layout, b.r.call.call.axes, index, b.r.shared.heads if i == QUERY else 1)
        for member in range(b.r.shared.heads if i == QUERY else 1):
            count = h.rows[member] if i == QUERY else h.keys
            add_rows(to.data + member * to.head, to.row, to.col, rows[i] + member * b.head_rows * n * b.real, b.real,
                     count, n)


cdef void add_rows(char *to, Py_ssize_t row, Py_ssize_t col, const char *from_, Py_ssize_t real, int64_t rows,
                   int64_t n) noexcept nogil:
    cdef int64_t j, c
    for j in range(rows):
        for c in range(n):
            (<double *> (to + j * row + c * col))[0] += ((<const double *> from_)[c] if real == 8
                                                         else (<const float *> from_)[c])
        from_ += n * real


# Tasks

cdef int take_step(Gradients b, int step, Head *h, const fa_kernels *kernels, Scratch *s, Py_ssize_t head,
                   int64_t number, int64_t parts, Watch *watch, bint caller) noexcept nogil:
    """Part `number` of a step; 1 if the call is interrupted."""
    cdef bint of_values = step == PREDICT or step == VALUES
    cdef int64_t width = b.r.shared.value_dim if of_values else b.r.shared.features
    cdef int64_t unit = kernels.linear_columns * (2 if of_values and b.delta else 1)  # as its passes are wide
    cdef int64_t columns = ((width + parts - 1) // parts + unit - 1) // unit * unit if parts > 1 else width
    cdef int64_t column = min(width, columns * number)
    cdef fa_linear_back back
    columns = min(columns, width - column)
    if step == READ:
        read_head(b, h, kernels, number, parts)
    elif columns == 0 and number > 0:
        return 0
    elif step == PREDICT:
        return predict(b, h, kernels, s, column, columns, watch, caller)
    elif step == ANSWER or step == ANSWER_LATE:
        return answer(b, h, kernels, s, column, columns, watch, caller)
    elif step == VALUES:
        if gather_beside(b, h, kernels, s, column, columns, True, h.end, watch, caller):
            return 1
        if b.delta or b.targets[<int> VALUE].wanted or b.targets[<int> STATE].wanted:
            if values_back(b, h, kernels, s, column, columns, watch, caller):
                return 1
        if b.targets[<int> STATE].wanted:
            return gather_beside(b, h, kernels, s, column, columns, False, h.d_state, watch, caller)
    elif step == KEYS:
        return keys_back(b, h, kernels, s, column, columns, watch, caller)
    elif number == 0:
        if step == DIVIDE:
            back = beside(b, h)
            kernels.linear_divide(&back)
        elif step == CORRECT:
            correct(b, h, kernels)
        else:
            finish(b, h, kernels, head)
    return 0


cdef Head *open_head(Gradients b, Py_ssize_t head, char *memory) noexcept nogil:
    cdef Head *h = <Head *> memory
    cdef Py_ssize_t index[FA_ROW_AXES]
    cdef int64_t member
    lay_out_head(b, h, memory)
    locate(b.r, head, &h.given, h.offset, h.rows, &h.keys)
    for member in range(0 if b.r.shared.is_causal else b.r.shared.heads):
        h.offset[member] = h.keys
    find_head(b.r, head, index)
    h.grad_out = placed(&b.grad_out, b.r.call.call.axes, index, b.r.shared.heads)
    h.grad_state = nowhere()
    if b.grad_state.data != NULL:
        h.grad_state = placed(&b.grad_state, b.r.call.call.axes, index, 1)
    return h


cdef int run_head(Gradients b, const fa_kernels *kernels, Py_ssize_t head, char *memory, char *scratch, Watch *watch,
                  bint caller) noexcept nogil:
    """A head, from beginning to end."""
    cdef Head *h = open_head(b, head, memory)
    cdef Scratch s
    cdef int step
    lay_out_scratch(b, &s, scratch)
    for step in range(<int> STEPS):
        if b.needed[step] and take_step(b, step, h, kernels, &s, head, 0, 1, watch, caller):
            return 1
    return 0


cdef int run_part(Gradients b, int step, const fa_kernels *kernels, Py_ssize_t head, int64_t number, int64_t parts,
                  char *memory, char *scratch, Watch *watch, bint caller) noexcept nogil:
    """The part of a head that is a task."""
    cdef Scratch s
    lay_out_scratch(b, &s, scratch)
    return take_step(b, step, <Head *> memory, kernels, &s, head, number, parts, watch, caller)


cdef void run_whole(Gradients b, const fa_kernels *kernels, Py_ssize_t first, Py_ssize_t count, int threads,
                    bint apart, char *memory, char *scratch, Watch *watch) noexcept nogil:
    """Whole heads as tasks. apart: each in memory of its own."""
    cdef Py_ssize_t i
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for i in prange(count, schedule="dynamic", chunksize=1):
            if watch == NULL or not interrupted(watch, threadid() == 0):
                run_head(b, kernels, first + i, memory + (i if apart else threadid()) * b.head_size,
                         scratch + threadid() * b.task_size, watch, threadid() == 0)


cdef void run_parts(Gradients b, int step, const fa_kernels *kernels, Py_ssize_t first, Py_ssize_t count,
                    int threads, char *memory, char *scratch, Watch *watch) noexcept nogil:
    """Parts of heads as tasks, which are fewer than threads."""
    cdef Py_ssize_t i, parts = (threads + count - 1) // count
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for i in prange(count * parts, schedule="dynamic", chunksize=1):
            if watch == NULL or not interrupted(watch, threadid() == 0):
                run_part(b, step, kernels, first + i // parts, i % parts, parts, memory + i // parts * b.head_size,
                         scratch + threadid() * b.task_size, watch, threadid() == 0)


cdef void run_all(Gradients b, const fa_kernels *kernels, int threads, char *memory, Watch *watch) noexcept nogil:
    """Heads in ascending order, as many at once as there are threads."""
    cdef char *scratch = memory + threads * b.head_size
    cdef bint sums = False
    cdef Py_ssize_t first = 0, i, count
    cdef int step
    for step in range(<int> INPUTS):
        sums = sums or b.targets[step].wanted and b.targets[step].is_sum
    while first < b.r.heads and (watch == NULL or not watch.stop):
        count = min(b.r.heads - first, threads)
        if threads == 1:
            if run_head(b, kernels, first, memory, scratch, watch, True):
                return
        elif count < threads:
            for i in range(count):
                open_head(b, first + i, memory + i * b.head_size)
            for step in range(<int> STEPS):
                if b.needed[step]:
                    run_parts(b, step, kernels, first, count, threads, memory, scratch, watch)
                if watch.stop:
                    return
        else:
            if not sums:
                count = (b.r.heads - first) // threads * threads
            run_whole(b, kernels, first, count, threads, sums, memory, scratch, watch)
            if watch.stop:
                return
        for i in range(count if sums else 0):
            add_up(b, <Head *> (memory + i * b.head_size), first + i)
        first += count


cdef size_t kernel_room(Gradients b, const fa_kernels *kernels) noexcept:
    """The largest workspace of any step."""
    cdef int64_t f = b.r.shared.features, e = b.r.shared.value_dim
    cdef Walk w
    cdef size_t size
    begin_walk(&w, f, e, 0, e)
    size = kernels.linear_workspace(&w.shared, e)
    begin_walk(&w, e, f, 0, f)
    w.shared.fades = True
    size = max(size, kernels.linear_workspace(&w.shared, f))
    w.shared.heads = b.r.shared.heads + 1
    return max(size, kernels.linear_workspace(&w.shared, f))


cdef int run(Gradients b) except -1:
    cdef Problem p = b.r.call
    cdef const fa_kernels *kernels = kernels_for(p.call.problem.dtype)
    cdef double f = b.r.shared.features, e = b.r.shared.value_dim
    cdef double rows = 1.0 * b.r.shared.heads * b.head_rows
    cdef bint small = 4.0 * b.r.heads * (f + 1) * (e + 1) * (p.call.sizes.keys + rows) < SMALL
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef Watch watch = Watch(0, 0)
    cdef Head h
    cdef Scratch s
    cdef double estimate = 16.0 * (f + e + 64) * (rows + p.call.sizes.keys) + 16.0 * (f + 16) * (e + 16)
    cdef char *memory
    if b.r.heads == 0:
        return 0
    if estimate * threads > 1e14:
        raise MemoryError(f"no memory for the gradients of {b.r.shared.heads} x {b.head_rows} rows")
    b.kernel_size = kernel_room(b, kernels)
    b.head_size = lay_out_head(b, &h, NULL)
    b.task_size = lay_out_scratch(b, &s, NULL)
    memory = <char *> take_workspace((b.head_size + b.task_size) * threads,
                                     (<double> b.head_size + b.task_size) * threads)
    try:
        with nogil:
            run_all(b, kernels, threads, memory, NULL if small else &watch)
    finally:
        give_workspace(memory)
    if watch.stop:
        raise_pending()
    return 0


def linear_attention_vjp(grad_out, query, key, value, wrt, grad_state, feature_map, is_causal, query_offset,
                         key_lengths, query_lengths, log_decay, beta, normalize, scale, eps, state, enable_gqa, out,
                         num_threads):
    cdef Gradients b = read(grad_out, query, key, value, wrt, grad_state, feature_map, is_causal, query_offset,
                            key_lengths, query_lengths, log_decay, beta, normalize, scale, eps, state, enable_gqa,
                            out, num_threads)
    run(b)
    for target, total in b.sums:
        store(target, total)
    return b.wanted.result()
