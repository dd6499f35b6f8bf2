# cython: wraparound=True
"""The driver of the gradients of attention: which are wanted, where they go, and how the work is shared out.

Gradients come from *sweeps*. A sweep takes the heads that share a gradient, those along axes on which its array is
broadcast, one after the other in ascending order, and adds them up. A task of it is all that such heads have, or only
one block of keys (for gradients of keys), or only some rows (for gradients of queries); so every sum belongs to one
task, and neither the order nor the number of threads can change a bit. With few threads one sweep gives all gradients
of a call; with many that share few heads, keys and queries have one each, and both compute the scores.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastattn._attention cimport attend
from fastattn._call cimport Problem, checked_sides, lay_out, read_dot_product, read_varlen
from fastattn._checks cimport accumulation, converted, empty, floating, shape_of
from fastattn._rules cimport rules_of
from fastattn._runtime cimport (FA_BACK_OPERANDS, FA_BACK_ROWS, FA_BACK_SPAN, FA_BLOCK, FA_D_BIAS, FA_D_BIAS_LOST,
                                FA_D_COLUMNS, FA_D_DIAGONALS, FA_D_KEY, FA_D_QUERY, FA_D_QUERY_LOST, FA_D_RELATIVE_BIAS,
                                FA_D_RELATIVE_BIAS_LOST, FA_D_ROWS, FA_D_SCORE_WEIGHTS, FA_D_SINKS, FA_D_SLOPES,
                                FA_D_VALUE, FA_GRAD_LSE, FA_GRAD_OUT, FA_LSE, FA_OUT, FA_ROW_AXES, FA_ROW_STATE,
                                FA_SOFTMAX, FA_SPAN, FA_STATE, Team, Watch, allowed_threads, fa_call, fa_gradients,
                                fa_head, fa_kernels, fa_layout, fa_locate, fa_locate_gradients, fa_queries_of,
                                fa_visible_keys, gathered, give_workspace, interrupted, join_team, kernels_for,
                                raise_pending, take_workspace)
from fastattn._scores cimport PreparedKeys, projected_back, read_additive, read_bilinear
from fastattn._vjp cimport Wanted, read_gradient, read_wanted, store

cnp.import_array()

cdef enum:
    WHOLE                       # what a task of a sweep is: everything that its heads have,
    OF_KEYS                     # a block of their keys, or
    OF_ROWS                     # some of their rows
    ROWS_A_TASK = 4 * FA_BACK_ROWS
    FEW_HEADS = 16              # whose biases add up without a second level
    OWNERS = 2                  # of gradients, for each thread, with which one sweep suffices
    ROWS_AT_ONCE = 4 * FA_BACK_SPAN  # between two looks for Ctrl-C

# Multiplications below which threads cost more than they bring.
cdef double SMALL_WORK = 1e6


# The heads of a call in groups that share gradients, by the axes along which they do.
cdef struct Sweep:
    int kind
    bint shared[FA_ROW_AXES]
    bint wanted[<int> FA_BACK_OPERANDS]
    int64_t owners, sharers     # groups, and heads in each
    int64_t rows                # of a task
    int64_t parts               # tasks of the heads of a group in a sequence
    int64_t tasks


cdef enum:
    MOST_SWEEPS = 8


# A call on its way back.
cdef class Back:
    cdef Problem p
    cdef fa_call *call
    cdef fa_layout layouts[<int> FA_BACK_OPERANDS]
    cdef Sweep sweeps[<int> MOST_SWEEPS]
    cdef int sweep_count
    cdef list kept              # arrays that the layouts point to
    cdef list cleared           # targets that begin at zero: when nothing can fail any more for want of memory
    cdef list after             # (target, array, how) of gradients that are not yet where they go


cdef int place(Back b, int operand, cnp.ndarray a, int trailing, bint of_keys=False) except -1:
    """Notes where a gradient lies. of_keys: its heads are those of key and value."""
    cdef fa_call *call = b.call
    cdef fa_layout *layout = &b.layouts[operand]
    cdef bint grouped = call.group > 1
    cdef int axes = call.axes - grouped
    lay_out(layout, axes, a, trailing)
    if grouped:
        if of_keys:
            layout.batch[axes] = 0
        else:
            layout.batch[axes] = layout.batch[axes - 1]
            layout.batch[axes - 1] *= call.group
    b.kept.append(a)
    return 0


cdef bint adds_in_place(cnp.ndarray a, dtype, int lanes) except -1:
    """Whether kernels can add to the rows of an array: whole vectors of the accumulation dtype."""
    cdef int last = cnp.PyArray_NDIM(a) - 1, i
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(a)
    if (<object> a).dtype != dtype or cnp.PyArray_DIM(a, last) == 0 or cnp.PyArray_DIM(a, last) % lanes:
        return False
    if cnp.PyArray_STRIDE(a, last) != size or not (<object> a).flags.aligned:
        return False
    for i in range(last):
        if cnp.PyArray_STRIDE(a, i) % size:
            return False
    return True


cdef cnp.ndarray at_least(cnp.ndarray a, int ndim):
    return a if cnp.PyArray_NDIM(a) >= ndim else (<object> a)[(None,) * (ndim - cnp.PyArray_NDIM(a))]


# Where each gradient is added up. Sums over a whole axis are kept for each head, in float64, and added up in the end.

cdef cnp.ndarray sums(Back b, int operand, tuple trailing):
    """Zeros for a head's sums; or, where another name has asked for them, these."""
    cdef int i
    for i in range(len(b.after)):
        if b.after[i][2] == operand:
            return b.after[i][1]
    # Grouped heads are one axis here.
    batch = [b.call.shape[i] for i in range(b.call.axes)]
    if b.call.group > 1:
        batch[-2:] = [batch[-2] * batch[-1]]
    a = empty((*batch, *trailing), np.float64, "sums of gradients", True)
    place(b, operand, a, len(trailing))
    return a


cdef int place_query(Back b, object target, object real, int lanes) except -1:
    cdef Py_ssize_t channels = b.call.problem.head_dim
    cdef cnp.ndarray a = target
    if adds_in_place(a, real, lanes):
        b.cleared.append(a)
    else:
        a = empty((*target.shape[:-1], max((channels + lanes - 1) // lanes, 1) * lanes), real, "a gradient", True)
    place(b, FA_D_QUERY, a, 2)
    lost = None
    if b.call.longest_key > FA_SPAN or sharers_of(b.call, &b.layouts[<int> FA_D_QUERY]) > 1:
        lost = empty(shape_of(a), real, "the rounding errors of a gradient", True)
        place(b, FA_D_QUERY_LOST, lost, 2)
    b.after.append((target, a, FA_D_QUERY, lost))
    return 0


cdef int place_matrix(Back b, int operand, object target, object real, Py_ssize_t rows, Py_ssize_t cols) except -1:
    """A bias, of rows x cols numbers, or of fewer where it is broadcast."""
    cdef cnp.ndarray a
    shape = (1, 1, *target.shape)[-2:]
    if shape[1] == 1 and cols != 1:
        b.after.append((target, sums(b, FA_D_ROWS, (b.call.sizes.queries, 1)), FA_D_ROWS, None))
    elif shape[0] == 1 and rows != 1:
        if operand == FA_D_BIAS:
            b.after.append((target, sums(b, FA_D_COLUMNS, (cols, 1)), FA_D_COLUMNS, None))
        else:
            b.after.append((target, sums(b, FA_D_DIAGONALS, (1, cols)), FA_D_DIAGONALS, None))
    else:
        if target.dtype == real and target.flags.aligned:
            a = target
            b.cleared.append(a)
        else:
            a = empty(target.shape, real, "a gradient", True)
        place(b, operand, at_least(a, 2), 2)
        lost = None
        if sharers_of(b.call, &b.layouts[operand]) > FEW_HEADS:
            lost = empty(shape_of(a), real, "the rounding errors of a gradient", True)
            place(b, FA_D_BIAS_LOST if operand == FA_D_BIAS else FA_D_RELATIVE_BIAS_LOST, at_least(lost, 2), 2)
        b.after.append((target, a, operand, lost))
    return 0


cdef object reduced(object a, tuple shape):
    """Adds up leading axes that `shape` lacks, and those in which its size is 1."""
    a = np.add.reduce(a, axis=tuple(range(a.ndim - len(shape)))) if a.ndim > len(shape) else a
    axes = tuple([i for i in range(len(shape)) if shape[i] == 1 and a.shape[i] != 1])
    return np.add.reduce(a, axis=axes, keepdims=True) if axes else a


cdef int finish(object target, object a, int operand, object lost) except -1:
    """From what the sweeps have added up to the gradient."""
    if lost is not None:
        with np.errstate(all="ignore"):
            np.add(a, lost, out=a)
    if operand == FA_D_QUERY:
        if a is not target:
            store(target, a[..., :target.shape[target.ndim - 1]])
    elif operand == FA_D_COLUMNS:
        store(target, reduced(a.swapaxes(-1, -2), target.shape))
    elif operand == FA_D_SLOPES or operand == FA_D_SINKS:
        store(target, reduced(np.add.reduce(a, axis=-1), target.shape))
    elif operand == FA_D_SCORE_WEIGHTS:
        store(target, reduced(a, target.shape))
    elif a is not target:
        store(target, reduced(a, target.shape))
    return 0


# Sweeps

cdef bint is_shared(const fa_call *call, const fa_layout *layout, int axis) noexcept nogil:
    return call.shape[axis] > 1 and layout.batch[axis] == 0


cdef int64_t sharers_of(const fa_call *call, const fa_layout *layout) noexcept nogil:
    """Heads whose gradients add up."""
    cdef int64_t n = 1
    cdef int i
    for i in range(call.axes):
        if is_shared(call, layout, i):
            n *= call.shape[i]
    return n


cdef Sweep *sweep_for(Back b, int kind, int operand) except NULL:
    """The sweep of that kind along the axes that the operand is broadcast along; a new one if there is none."""
    cdef fa_layout *layout = &b.layouts[operand]
    cdef Sweep *sweep
    cdef int i, n
    # Sums that each head has for itself do not care; nor do gradients of queries whether keys share theirs.
    for n in range(b.sweep_count):
        sweep = &b.sweeps[n]
        if sweep.kind != kind:
            continue
        for i in range(b.call.axes):
            if sweep.shared[i] != is_shared(b.call, layout, i) and not (kind != OF_ROWS and operand >= FA_D_ROWS):
                break
        else:
            return sweep
    if b.sweep_count == MOST_SWEEPS:
        raise AssertionError("more sweeps than there are kinds of gradients")
    sweep = &b.sweeps[b.sweep_count]
    b.sweep_count += 1
    memset(sweep, 0, sizeof(Sweep))
    sweep.kind = kind
    for i in range(b.call.axes):
        sweep.shared[i] = is_shared(b.call, layout, i)
    return sweep


cdef bint shares(const fa_call *call, const Sweep *sweep) noexcept:
    cdef int i
    for i in range(call.axes):
        if sweep.shared[i]:
            return True
    return False


cdef int plan_sweeps(Back b, int threads) except -1:
    cdef int operand, n, i
    cdef Sweep *sweep
    cdef Sweep *first
    cdef int64_t owners = 1
    cdef int *order = [FA_D_KEY, FA_D_VALUE, FA_D_COLUMNS, FA_D_SCORE_WEIGHTS, FA_D_QUERY, FA_D_BIAS,
                       FA_D_RELATIVE_BIAS, FA_D_ROWS, FA_D_SLOPES, FA_D_DIAGONALS]
    b.sweep_count = 0
    for n in range(10):
        operand = order[n]
        if b.layouts[operand].data == NULL:
            continue
        sweep = sweep_for(b, OF_KEYS if n < 4 else WHOLE if operand == FA_D_DIAGONALS else OF_ROWS, operand)
        sweep.wanted[operand] = True
        lost = {FA_D_QUERY: FA_D_QUERY_LOST, FA_D_BIAS: FA_D_BIAS_LOST,
                FA_D_RELATIVE_BIAS: FA_D_RELATIVE_BIAS_LOST}.get(operand)
        if lost is not None:
            sweep.wanted[<int> lost] = True
    if b.sweep_count == 0:
        return 0
    # One sweep for all, where its tasks are enough.
    first = &b.sweeps[0]
    for i in range(b.call.axes):
        if not first.shared[i]:
            owners *= b.call.shape[i]
    if threads == 1 or owners * b.call.sequences >= OWNERS * threads:
        if first.kind != OF_ROWS or not shares(b.call, first):
            first.kind = WHOLE
            n = 1
            while n < b.sweep_count:
                sweep = &b.sweeps[n]
                if sweep.kind == OF_KEYS or shares(b.call, sweep):
                    n += 1
                    continue
                for operand in range(<int> FA_BACK_OPERANDS):
                    first.wanted[operand] |= sweep.wanted[operand]
                b.sweep_count -= 1
                b.sweeps[n] = b.sweeps[b.sweep_count]
    for n in range(b.sweep_count):
        sweep = &b.sweeps[n]
        sweep.owners = sweep.sharers = 1
        for i in range(b.call.axes):
            if sweep.shared[i]:
                sweep.sharers *= b.call.shape[i]
            else:
                sweep.owners *= b.call.shape[i]
        sweep.rows, sweep.parts = ROWS_A_TASK, 1
        if sweep.kind == OF_KEYS:
            sweep.parts = (b.call.longest_key + FA_BLOCK - 1) // FA_BLOCK
        elif sweep.kind == OF_ROWS:
            if threads == 1:
                sweep.rows = b.call.longest_query
            sweep.parts = (b.call.longest_query + sweep.rows - 1) // sweep.rows
        sweep.tasks = sweep.owners * b.call.sequences * sweep.parts
    return 0


cdef int64_t head_of(const fa_call *call, const Sweep *sweep, int64_t owner, int64_t sharer) noexcept nogil:
    """The number of a head: its place along the axes that are not shared, and along those that are."""
    cdef int64_t head = 0, step = 1
    cdef int i = call.axes - 1
    while i >= 0:
        if sweep.shared[i]:
            head += sharer % call.shape[i] * step
            sharer //= call.shape[i]
        else:
            head += owner % call.shape[i] * step
            owner //= call.shape[i]
        step *= call.shape[i]
        i -= 1
    return head


cdef void locate(const fa_call *call, const fa_layout *layouts, const Sweep *sweep, int64_t head, int64_t sequence,
                 fa_head *h, fa_gradients *to) noexcept nogil:
    cdef int operand
    fa_locate(call, head, sequence, h)
    fa_locate_gradients(call, layouts, head, sequence, to)
    for operand in range(<int> FA_D_QUERY, <int> FA_BACK_OPERANDS):
        if not sweep.wanted[operand]:
            to.view[operand].data = NULL


cdef int run_keys(const fa_call *call, const fa_layout *layouts, const Sweep *sweep, const fa_kernels *kernels,
                  int64_t owner, int64_t sequence, int64_t block, void *workspace, Watch *watch,
                  bint caller) noexcept nogil:
    """A block of keys, with all rows of the heads of an owner; returns whether the call is to stop."""
    cdef fa_head head
    cdef fa_gradients to
    cdef int64_t sharer, row
    kernels.back_open(&call.problem, call.longest_key, block, workspace)
    for sharer in range(sweep.sharers):
        locate(call, layouts, sweep, head_of(call, sweep, owner, sharer), sequence, &head, &to)
        row = 0
        while row < head.queries:
            if watch != NULL and interrupted(watch, caller):
                return 1
            kernels.back_visit(&call.problem, &head, &to, row, min(row + ROWS_AT_ONCE, head.queries), workspace)
            row += ROWS_AT_ONCE
    kernels.back_close(&call.problem, &head, &to, workspace)
    return 0


cdef int run_rows(const fa_call *call, const fa_layout *layouts, const Sweep *sweep, const fa_kernels *kernels,
                  int64_t owner, int64_t sequence, int64_t row, void *workspace, Watch *watch,
                  bint caller) noexcept nogil:
    """Some rows of the heads of an owner, with all keys."""
    cdef fa_head head
    cdef fa_gradients to
    cdef int64_t sharer, row_end, block, end
    for sharer in range(sweep.sharers):
        locate(call, layouts, sweep, head_of(call, sweep, owner, sharer), sequence, &head, &to)
        row_end = min(row + sweep.rows, head.queries)
        fa_visible_keys(&call.problem, &head, row, row_end - row, &block, &end)
        block = block // FA_BLOCK * FA_BLOCK
        while block < end:
            if watch != NULL and interrupted(watch, caller):
                return 1
            kernels.back_open(&call.problem, call.longest_key, block, workspace)
            kernels.back_visit(&call.problem, &head, &to, row, row_end, workspace)
            block += FA_BLOCK
    return 0


cdef int64_t keys_of(const fa_call *call, int64_t sequence) noexcept nogil:
    return call.key_starts[sequence + 1] - call.key_starts[sequence] if call.key_starts != NULL else call.sizes.keys


cdef int run_task(const fa_call *call, const fa_layout *layouts, const Sweep *sweep, const fa_kernels *kernels,
                  int64_t task, void *workspace, Watch *watch, bint caller) noexcept nogil:
    cdef int64_t part = task % sweep.parts, owner = task // sweep.parts
    cdef int64_t sequence = owner % call.sequences, block = 0, keys
    owner //= call.sequences
    keys = keys_of(call, sequence)
    if sweep.kind == OF_ROWS:
        # Later rows see more keys, if there is a difference: they come first.
        part = sweep.parts - 1 - part
        if part * sweep.rows >= fa_queries_of(call, sequence):
            return 0
        return run_rows(call, layouts, sweep, kernels, owner, sequence, part * sweep.rows, workspace, watch, caller)
    if sweep.kind == OF_KEYS:
        if part * FA_BLOCK >= keys:
            return 0
        return run_keys(call, layouts, sweep, kernels, owner, sequence, part * FA_BLOCK, workspace, watch, caller)
    while block < keys:
        if run_keys(call, layouts, sweep, kernels, owner, sequence, block, workspace, watch, caller):
            return 1
        block += FA_BLOCK
    return 0


cdef int run_states(const fa_call *call, const fa_layout *layouts, const fa_kernels *kernels, int64_t task,
                    int64_t parts, void *workspace, Watch *watch, bint caller) noexcept nogil:
    """What there is to know of some rows of a head."""
    cdef fa_head head
    cdef fa_gradients to
    cdef int64_t row = task % parts * ROWS_A_TASK, n = task // parts
    if watch != NULL and interrupted(watch, caller):
        return 1
    fa_locate(call, n // call.sequences, n % call.sequences, &head)
    fa_locate_gradients(call, layouts, n // call.sequences, n % call.sequences, &to)
    if row < head.queries:
        kernels.back_prepare(&call.problem, &head, &to, row, min(<int64_t> ROWS_A_TASK, head.queries - row), workspace)
    return 0


cdef void run_serial(const fa_call *call, const fa_layout *layouts, const Sweep *sweeps, int count,
                     const fa_kernels *kernels, void *workspace, Watch *watch) noexcept nogil:
    cdef int64_t task, parts = (call.longest_query + ROWS_A_TASK - 1) // ROWS_A_TASK
    cdef int n
    for task in range(call.heads * call.sequences * parts):
        if run_states(call, layouts, kernels, task, parts, workspace, watch, True):
            return
    for n in range(count):
        for task in range(sweeps[n].tasks):
            if run_task(call, layouts, &sweeps[n], kernels, task, workspace, watch, True):
                return


cdef void run_parallel(const fa_call *call, const fa_layout *layouts, const Sweep *sweeps, int count,
                       const fa_kernels *kernels, char *workspaces, size_t size, int threads,
                       Watch *watch) noexcept nogil:
    cdef const Sweep *sweep
    cdef int64_t task, parts = (call.longest_query + ROWS_A_TASK - 1) // ROWS_A_TASK
    cdef int64_t states = call.heads * call.sequences * parts
    cdef int n
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(states, schedule="dynamic", chunksize=1):
            if not interrupted(watch, False):
                run_states(call, layouts, kernels, task, parts, workspaces + threadid() * size, watch,
                           threadid() == 0)
    for n in range(count):
        sweep = &sweeps[n]
        team = gathered(threads)
        with nogil, parallel(num_threads=team.threads):
            join_team(&team)
            for task in prange(sweep.tasks, schedule="dynamic", chunksize=1):
                if not interrupted(watch, False):
                    run_task(call, layouts, sweep, kernels, task, workspaces + threadid() * size, watch,
                             threadid() == 0)


# A call

cdef double work_of(const fa_call *call) noexcept:
    return (<double> call.heads * call.sizes.queries * call.longest_key *
            (call.problem.head_dim + call.problem.value_dim + 1.0))


cdef int run(Back b) except -1:
    cdef fa_call *call = b.call
    cdef const fa_kernels *kernels = kernels_for(call.problem.dtype)
    cdef bint small = work_of(call) < SMALL_WORK
    cdef int threads = 1 if small else allowed_threads(b.p.num_threads)
    cdef size_t size = kernels.back_workspace(&call.problem, call.longest_key)
    cdef Watch watch = Watch(0, 0)
    cdef const fa_layout *layouts = b.layouts
    cdef const Sweep *sweeps = b.sweeps
    cdef void *scratch
    cdef int count
    plan_sweeps(b, threads)
    count = b.sweep_count
    scratch = take_workspace(size * threads, <double> size * threads)
    try:
        for a in b.cleared:
            a[...] = 0
        if small:
            run_serial(call, layouts, sweeps, count, kernels, scratch, NULL)
        elif threads == 1:
            with nogil:
                run_serial(call, layouts, sweeps, count, kernels, scratch, &watch)
        else:
            with nogil:
                run_parallel(call, layouts, sweeps, count, kernels, <char *> scratch, size, threads, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return 0


cdef int replace(Problem p, int operand, cnp.ndarray a, int trailing) except -1:
    """Where the forward call's own result is, in place of room for one."""
    cdef fa_call *call = p.call
    cdef bint grouped = call.group > 1
    cdef int axes = call.axes - grouped
    cdef fa_layout *layout = &call.layouts[operand]
    lay_out(layout, axes, a, trailing)
    if grouped:
        layout.batch[axes] = layout.batch[axes - 1]
        layout.batch[axes - 1] *= call.group
    call.sizes.view[operand].row, call.sizes.view[operand].col = layout.row, layout.col
    call.sizes.view[operand].dtype = layout.dtype
    p.kept.append(a)
    return 0


cdef cnp.ndarray same_shape(object x, str name, tuple shape):
    cdef cnp.ndarray a = floating(x, name)
    if shape_of(a) != shape:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must be what the forward call returned, {shape}")
    return a


# Gradients of one call: what came besides the arguments of the forward call.
cdef class Given:
    cdef object grad_out, output, lse, grad_lse, wrt, out


cdef Given given_of(object grad_out, object output, object lse, object grad_lse, object wrt, object out):
    cdef Given g = Given()
    g.grad_out, g.output, g.lse, g.grad_lse, g.wrt, g.out = grad_out, output, lse, grad_lse, wrt, out
    return g


cdef int read_given(Problem p, Given g) except -1:
    """Checks what came besides the arguments of the forward call, and makes arrays of it."""
    cdef tuple shape = p.out.shape, rows = shape[:-1]
    g.grad_out = read_gradient(g.grad_out, shape)
    if p.call.problem.activation != FA_SOFTMAX:
        for x, name in ((g.output, "output"), (g.lse, "lse"), (g.grad_lse, "grad_lse")):
            if x is not None:
                raise ValueError(f"{name} needs activation='softmax'")
        return 0
    if (g.output is None) != (g.lse is None):
        raise ValueError("output and lse must both be given, or neither: they are what the forward call returned with "
                         "return_lse=True")
    if g.output is not None:
        g.output = same_shape(g.output, "output", shape)
        g.lse = converted(same_shape(g.lse, "lse", rows), accumulation(p.call.problem.dtype))
    if g.grad_lse is not None:
        g.grad_lse = read_gradient(g.grad_lse, rows, "grad_lse")
    return 0


cdef int forward(Problem p, Given g) except -1:
    """The output and its log-sum-exp, which the way back starts from."""
    cdef fa_call saved
    if p.call.problem.activation != FA_SOFTMAX:
        return 0
    if g.output is None:
        saved = p.call[0]
        attend(p)
        p.call[0] = saved
    else:
        replace(p, FA_OUT, g.output, 2)
        replace(p, FA_LSE, g.lse, 1)
    return 0


cdef int back(Problem p, Given g, dict targets) except -1:
    """Fills in gradients. targets: arrays by name, of the shapes of the problem's operands and of any dtypes; besides
    names of arguments, 'w_score' of additive scores."""
    cdef Back b = Back()
    cdef fa_call *call = p.call
    cdef object real = accumulation(call.problem.dtype)
    cdef int lanes = kernels_for(call.problem.dtype).tuning.lanes
    cdef int64_t columns
    b.p, b.call, b.kept, b.cleared, b.after = p, call, [], [], []
    memset(b.layouts, 0, sizeof(b.layouts))
    if call.heads == 0 or call.longest_query == 0 or call.longest_key == 0 or not targets:
        for target in targets.values():
            target[...] = 0
        if not ("sinks" in targets and call.heads and call.longest_query):
            return 0
    forward(p, g)
    call.problem.decode = 0
    place(b, FA_GRAD_OUT, g.grad_out, 2)
    if g.grad_lse is not None:
        place(b, FA_GRAD_LSE, g.grad_lse, 1)
    states = empty((*np.shape(p.out)[:-1], FA_STATE), real, "the state of rows")
    place(b, FA_ROW_STATE, states, 2)
    for name, target in targets.items():
        if name == "query":
            place_query(b, target, real, lanes)
        elif name == "key":
            place(b, FA_D_KEY, target, 2, True)
        elif name == "value":
            place(b, FA_D_VALUE, target, 2, True)
        elif name == "bias":
            place_matrix(b, FA_D_BIAS, target, real, call.sizes.queries, call.sizes.keys)
        elif name == "relative_bias":
            columns = call.problem.left + call.problem.right + 1
            place_matrix(b, FA_D_RELATIVE_BIAS, target, real, call.sizes.queries, columns)
        elif name == "w_score":
            columns = (call.longest_key + FA_BLOCK - 1) // FA_BLOCK
            a = sums(b, FA_D_SCORE_WEIGHTS, (columns, call.problem.head_dim))
            b.after.append((target, a, FA_D_SCORE_WEIGHTS, None))
        else:
            operand = FA_D_SLOPES if name == "alibi_slopes" else FA_D_SINKS
            b.after.append((target, sums(b, operand, (call.sizes.queries,)), operand, None))
    run(b)
    for target, a, operand, lost in b.after:
        finish(target, a, operand, lost)
    return 0


cdef object vjp(Problem p, Given g, dict differentiable, dict others):
    """The gradients named in wrt. differentiable: arguments that can be named, as they came; others: more arguments,
    which `out` must not overlap."""
    read_given(p, g)
    others = {"grad_out": g.grad_out, "output": g.output, "lse": g.lse, "grad_lse": g.grad_lse, **others}
    cdef Wanted w = read_wanted(g.wrt, differentiable, g.out, accumulation(p.call.problem.dtype), others)
    back(p, g, dict(zip(w.names, w.targets, strict=True)))
    return w.result()


cdef object projected_vjp(Problem p, Given g, dict differentiable, dict others, tuple sides, Py_ssize_t hidden,
                          object scale):
    """The same for scores with weights of their own. sides: of query and key, the names of the array, its matrix and
    its bias (None: it has none); a name that both have gets the sum. scale: of scores, as given."""
    read_given(p, g)
    others = {"grad_out": g.grad_out, "output": g.output, "lse": g.lse, "grad_lse": g.grad_lse, **others}
    cdef object real = accumulation(p.call.problem.dtype)
    cdef Wanted w = read_wanted(g.wrt, differentiable, g.out, real, others)
    cdef dict own = {}, found = {}, targets = {
        name: w.target(name) for name in w.names if name == "value" or name in RULES}
    for side in sides:
        name, matrix, bias = side
        if name in w.names and matrix is None and bias not in w.names:
            targets[name] = w.target(name)
        elif name in w.names or matrix in w.names or bias in w.names:
            own[side] = targets[name] = empty((*np.shape(differentiable[name])[:-1], hidden), real, "a gradient")
    if "w_score" in w.names:
        targets["w_score"] = empty((hidden,), np.float64, "a gradient")
    back(p, g, targets)
    with np.errstate(all="ignore"):
        for (name, matrix, bias), d in own.items():
            x, weights = floating(differentiable[name], name), differentiable.get(matrix)
            d_w, d_b = projected_back(d, x, None if weights is None else floating(weights, matrix),
                                      p.call.problem.dtype, w.target(name), matrix in w.names, bias in w.names)
            for n, gradient in ((matrix, d_w), (bias, d_b)):
                if gradient is not None:
                    found[n] = found[n] + gradient if n in found else gradient
        if "w_score" in w.names:
            found["w_score"] = targets["w_score"] * (1.0 if scale is None else float(scale))
    for n, gradient in found.items():
        store(w.target(n), gradient)
    return w.result()


# What `out` must not overlap besides what has a gradient.
cdef tuple CONSTANTS = ("key_lengths", "query_lengths", "query_offset", "mask", "block_mask")


cdef dict with_lse(dict some):
    """The rules, so that the forward call gives what the way back needs."""
    return {**some, "return_lse": some.get("activation", "softmax") == "softmax"}


cdef tuple RULES = ("bias", "relative_bias", "alibi_slopes", "sinks")


cdef dict chosen(dict some, tuple names):
    return {name: some.get(name) for name in names}


def dot_product_attention_vjp(grad_out, query, key, value, output, lse, grad_lse, wrt, out, dict some):
    """some: a dict of rules."""
    cdef dict rules = with_lse(some)
    cdef Problem p = read_dot_product(query, key, value, rules_of(rules))
    return vjp(p, given_of(grad_out, output, lse, grad_lse, wrt, out),
               {"query": query, "key": key, "value": value, **chosen(some, RULES)}, chosen(some, CONSTANTS))


def truncated_attention_vjp(grad_out, query, key, value, left, right, output, lse, grad_lse, wrt, out, dict some):
    return dot_product_attention_vjp(grad_out, query, key, value, output, lse, grad_lse, wrt, out,
                                     {**some, "window_size": checked_sides(left, right)})


def additive_attention_vjp(grad_out, query, key, value, w_score, w_query, w_key, b_hidden, output, lse, grad_lse, wrt,
                           out, dict some):
    if isinstance(key, PreparedKeys):
        raise TypeError("key must be the array whose gradient is taken, not what prepare_additive_keys made of it")
    cdef dict rules = with_lse(some)
    cdef Problem p = read_additive(query, key, value, w_score, w_query, w_key, b_hidden, rules_of(rules))
    cdef tuple sides = (("query", None if w_query is None else "w_query", None if b_hidden is None else "b_hidden"),
                        ("key", None if w_key is None else "w_key", None))
    return projected_vjp(p, given_of(grad_out, output, lse, grad_lse, wrt, out),
                         {"query": query, "key": key, "value": value, **chosen(some, RULES), "w_score": w_score,
                          "w_query": w_query, "w_key": w_key, "b_hidden": b_hidden},
                         chosen(some, CONSTANTS), sides, np.shape(w_score)[0], some.get("scale"))


def bilinear_attention_vjp(grad_out, query, key, value, w_query, w_key, b_query, b_key, output, lse, grad_lse, wrt, out,
                           dict some):
    cdef dict rules = with_lse(some)
    cdef Problem p = read_bilinear(query, key, value, w_query, w_key, b_query, b_key, rules_of(rules))
    cdef str of_query = None if b_query is None else "b_query"
    cdef str of_key = "b_key" if b_key is not None else of_query if w_key is None else None
    cdef tuple sides = (("query", "w_query", of_query), ("key", "w_query" if w_key is None else "w_key", of_key))
    return projected_vjp(p, given_of(grad_out, output, lse, grad_lse, wrt, out),
                         {"query": query, "key": key, "value": value, **chosen(some, RULES), "w_query": w_query,
                          "w_key": w_key, "b_query": b_query, "b_key": b_key},
                         chosen(some, CONSTANTS), sides, np.shape(w_query)[1], None)


def varlen_attention_vjp(grad_out, query, key, value, cu_seqlens_q, cu_seqlens_k, output, lse, grad_lse, wrt, out,
                         dict some):
    cdef dict rules = with_lse(some)
    cdef Problem p = read_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, rules_of(rules))
    return vjp(p, given_of(grad_out, output, lse, grad_lse, wrt, out),
               {"query": query, "key": key, "value": value, **chosen(some, ("alibi_slopes", "sinks"))},
               {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
