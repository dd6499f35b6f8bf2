"""What all drivers share: the selected kernels, the threads of a region, scratch memory, Ctrl-C; and what the drivers
that are written in C need of Python.

All of kernels/*.c is linked into this module; the choice of the instruction set is made once, at import.
"""
import os
import warnings

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #define FASTATTN_NO_CAPSULE /* this module is where the functions are */
    #include "include/fastattn.h"
    #include "kernels/gomp.h"
    #include "kernels/allocate.h"

    static int fa_check_signals(void)
    {
        PyGILState_STATE state = PyGILState_Ensure();
        int result = PyErr_CheckSignals();
        PyGILState_Release(state);
        return result;
    }

    #if defined(FASTATTN_DEBUG)
    enum { FA_DEBUG = 1 };
    #else
    enum { FA_DEBUG = 0 };
    static long fa_fail_request(long n) { return n; }
    static long fa_live_blocks(void) { return 0; }
    #endif

    /* The exception that PyErr_CheckSignals left behind. */
    static int fa_raise_pending(void) { return PyErr_Occurred() ? -1 : 0; }

    static int fa_load(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static void fa_store(int *p, int x) { __atomic_store_n(p, x, __ATOMIC_RELAXED); }

    /* Puts a pointer where there is one or none, and returns what was there. */
    static void *fa_exchange(void **p, void *x) { return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL); }
    """
    const void *fastattn_get_api() noexcept nogil
    int fa_own_threads() noexcept nogil
    int fa_check_signals() noexcept nogil
    int fa_raise_pending() except -1
    enum:
        FA_DEBUG
    int fa_request_fails() noexcept nogil
    void *fa_note_taken(void *block) noexcept nogil
    void fa_note_given(const void *block) noexcept nogil
    long fa_fail_request(long n) noexcept
    long fa_live_blocks() noexcept
    int fa_load(const int *) noexcept nogil
    void fa_store(int *, int) noexcept nogil
    void *fa_exchange(void **, void *) noexcept nogil


# Instruction sets

cdef fa_instruction_set sets[8]
cdef int set_count = fa_runnable(sets, 8)

runnable = [sets[i].name.decode() for i in range(set_count)]

cdef const char *_features[8]
cpu_features = [_features[i].decode() for i in range(fa_cpu_features(_features, 8))]

_forced = os.environ.get("FASTATTN_ISA", "")
if not fa_choose((_forced or runnable[0]).encode()):
    raise ImportError(f"FASTATTN_ISA={_forced!r}: this CPU and build can run {', '.join(runnable)}")

selected = fa_chosen().decode()
kernel_names = {
    "float32": fa_kernels_for(FA_F32).name.decode(),
    "float64": fa_kernels_for(FA_F64).name.decode(),
    "float16": fa_kernels_for(FA_F16).name.decode(),
    "bfloat16": fa_kernels_for(FA_BF16).name.decode(),
}
openmp_version = fa_openmp_version()
own_threads = bool(fa_own_threads())  # there is no libgomp: each region creates its threads
c_interface = fastattn_get_api()


cdef const fa_kernels *kernels_for(fa_dtype dtype) noexcept nogil:
    return fa_kernels_for(dtype)


# Threads

def _threads_from_environment(name):
    """The value of the variable (of OMP_NUM_THREADS, a list, the first); 0 if unset or unusable."""
    text = os.environ.get(name, "").strip()
    first = text.split(",")[0].strip() if name == "OMP_NUM_THREADS" else text
    if first.isascii() and first.isdigit() and len(first) < 10 and int(first) >= 1:
        return int(first)
    if text:
        warnings.warn(f"{name}={text[:40]!r} is ignored: it must be an integer of at least 1", RuntimeWarning,
                      stacklevel=2)
    return 0


def _threads_from_quota():
    """CPUs that the control groups of this process allow, rounded up; a large number if unlimited."""
    least = 1 << 30
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.strip().split(":", 2) for line in file]
    except OSError:
        return least
    for _, controllers, path in lines:
        if controllers == "":
            base, names = "/sys/fs/cgroup", ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, names = "/sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        while True:
            try:
                words = []
                for name in names:
                    with open(f"{base}{path.rstrip('/')}/{name}") as file:
                        words += file.read().split()
                quota, period = int(words[0]), int(words[1])
                if quota > 0 and period > 0:
                    least = min(least, max(1, (quota + period - 1) // period))
            except (OSError, ValueError, IndexError):
                pass  # no such file here, or "max": no limit
            if path in ("", "/"):
                break
            path = path.rsplit("/", 1)[0]
    return least


fa_threads.environment = _threads_from_environment("FASTATTN_NUM_THREADS")
if not fa_threads.environment:
    fa_threads.openmp_environment = _threads_from_environment("OMP_NUM_THREADS")
fa_threads.openmp_untouched = fa_openmp_threads()
if fa_threads.openmp_untouched < fa_affinity() and not fa_threads.openmp_environment:
    # It was set before this import, perhaps only for a while.
    fa_threads.openmp_untouched = fa_affinity()
fa_threads.quota = _threads_from_quota()


if fa_prepare_threads(os.fsencode(__file__)):  # a file that always exists
    raise ImportError("the system has no room for the records of threads (pthread_key_create, pthread_atfork)")


cdef Team gathered(int threads) noexcept nogil:
    cdef Team team
    team.threads = fa_gather(threads, &team.pool, &team.growing)
    return team


cdef void join_team(const Team *team) noexcept nogil:
    fa_join_team(team.pool, team.growing)


def get_threads():
    return fa_default_threads()


def set_threads(num_threads):
    fa_store(&fa_threads.chosen, min(num_threads, 1 << 30))


cdef int allowed_threads(object num_threads) except -1:
    return fa_allowed_threads(0 if num_threads is None else num_threads)


# Memory

cdef void *take_memory(size_t size) noexcept nogil:
    return NULL if fa_request_fails() else fa_note_taken(PyMem_RawMalloc(size))


cdef void give_memory(void *block) noexcept nogil:
    fa_note_given(block)
    PyMem_RawFree(block)


if FA_DEBUG:
    def fail_allocation(long n):
        """The n-th request for memory by compiled code from now on fails, in whatever thread; 0: none. Returns how many
        were left of the last n: 0 if that one has failed."""
        return fa_fail_request(n)

    def live_allocations():
        """Blocks of memory that compiled code holds."""
        return fa_live_blocks()


# The block of a call that is over, for the next one: nobody's until a call takes it out. What is known of it stands in
# the block itself, so that one exchange of a pointer hands over all, with or without the GIL.
cdef void *kept = NULL

cdef enum:
    MOST_KEPT = 16 << 20


# Stored just before the aligned block.
cdef struct Allocation:
    void *address
    size_t size


cdef inline Allocation *allocation_of(void *block) noexcept:
    return <Allocation *> (<char *> block - sizeof(Allocation))


cdef void *take_workspace(size_t size, double estimate) except NULL:
    cdef void *block
    cdef char *raw
    if estimate > 1e15:
        raise MemoryError(f"no memory for a workspace of {estimate:.3g} bytes")
    block = fa_exchange(&kept, NULL)
    if block != NULL:
        if size <= allocation_of(block).size:
            return block
        give_workspace(block)
    raw = <char *> take_memory(size + 2 * FA_ALIGN)
    if raw == NULL:
        raise MemoryError(f"no memory for a workspace of {size} bytes")
    block = <char *> ((<uintptr_t> raw + 2 * FA_ALIGN - 1) // FA_ALIGN * FA_ALIGN)
    allocation_of(block).address = raw
    allocation_of(block).size = size
    return block


cdef void give_workspace(void *workspace) noexcept:
    """Keeps the larger of this block and the one that is kept."""
    cdef size_t size = allocation_of(workspace).size  # once kept, the block is anybody's, who may free it
    cdef void *other
    # In a debug build each call makes a request of its own, which can fail, and whose end a sanitizer knows.
    if not FA_DEBUG and size <= MOST_KEPT:
        other = fa_exchange(&kept, workspace)
        if other == NULL:
            return
        if allocation_of(other).size <= size:
            workspace = other
        else:
            workspace = fa_exchange(&kept, other)
    if workspace != NULL:
        give_memory(allocation_of(workspace).address)


# Ctrl-C

cdef bint interrupted(Watch *watch, bint caller) noexcept nogil:
    cdef double now
    if fa_load(&watch.stop):
        return True
    if caller:
        now = fa_seconds()
        if now - watch.last_look >= 0.05:
            watch.last_look = now
            if fa_check_signals():
                fa_store(&watch.stop, 1)
                return True
    return False


cdef int raise_pending() except -1:
    return fa_raise_pending()


# Drivers in C

cdef int asks(void *watch, int is_caller) noexcept nogil:
    return interrupted(<Watch *> watch, is_caller)


cdef int carry_out(fa_call *call, bint decode, object num_threads) except -1:
    cdef const fa_kernels *kernels = fa_kernels_for(call.problem.dtype)
    cdef fa_plan plan
    cdef Watch watch = Watch(0, 0)
    cdef fa_watch asked
    cdef void *scratch
    cdef bint small
    fa_choose_loops(call, kernels, decode)
    if not fa_has_work(call):
        return 0
    if fa_keeps_too_many(call):
        raise MemoryError(f"no memory for the scores of {call.longest_key} keys that activation='sparsemax' and "
                          f"'entmax15' keep for each row of a tile")
    small = fa_is_small(call, kernels)
    fa_make_plan(call, kernels, 1 if small else allowed_threads(num_threads), &plan)
    scratch = take_workspace(plan.size, plan.estimate)
    try:
        fa_lay_out(call, &plan, scratch)
        if small:
            fa_attend(call, kernels, &plan, NULL)
        else:
            asked.interrupted, asked.of = &asks, &watch
            with nogil:
                fa_attend(call, kernels, &plan, &asked)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return 0


# A driver's run function, of whatever it runs.
ctypedef int (*Runner)(const void *of, const fa_kernels *kernels, const void *plan, void *scratch,
                       const fa_watch *watch) noexcept nogil


cdef int run_planned(Runner run, const void *of, const fa_kernels *kernels, const void *plan, size_t size,
                     bint small) except -1:
    """Runs a plan with `size` bytes of scratch; small: with the GIL, and without a look for Ctrl-C."""
    cdef Watch watch = Watch(0, 0)
    cdef fa_watch asked
    cdef void *scratch
    if size == 0:
        return 0
    scratch = take_workspace(size, <double> size)
    try:
        if small:
            run(of, kernels, plan, scratch, NULL)
        else:
            asked.interrupted, asked.of = &asks, &watch
            with nogil:
                run(of, kernels, plan, scratch, &asked)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return 0


cdef int rows_run(const void *of, const fa_kernels *kernels, const void *plan, void *scratch,
                  const fa_watch *watch) noexcept nogil:
    return fa_run_rows(<const fa_rows *> of, kernels, <const fa_rows_plan *> plan, scratch, watch)


cdef int dense_run(const void *of, const fa_kernels *kernels, const void *plan, void *scratch,
                   const fa_watch *watch) noexcept nogil:
    return fa_run_dense(<const fa_dense *> of, kernels, <const fa_dense_plan *> plan, scratch, watch)


cdef int norm_run(const void *of, const fa_kernels *kernels, const void *plan, void *scratch,
                  const fa_watch *watch) noexcept nogil:
    return fa_run_norm(<const fa_norm *> of, kernels, <const fa_norm_plan *> plan, scratch, watch)


cdef int run_rows(const fa_rows *rows, object num_threads) except -1:
    cdef const fa_kernels *kernels = fa_kernels_for(rows.dtypes[<int> FA_ROW_X])
    cdef fa_rows_plan plan
    cdef bint small = fa_rows_are_few(rows)
    fa_plan_rows(rows, kernels, 1 if small else allowed_threads(num_threads), &plan)
    return run_planned(rows_run, rows, kernels, &plan, plan.size, small)


cdef int run_dense(const fa_dense *dense, fa_dtype dtype, object num_threads) except -1:
    cdef const fa_kernels *kernels = fa_kernels_for(dtype)
    cdef fa_dense_plan plan
    cdef bint small = fa_dense_is_small(dense)
    fa_plan_dense(dense, kernels, 1 if small else allowed_threads(num_threads), &plan)
    return run_planned(dense_run, dense, kernels, &plan, plan.size, small)


cdef int run_norm(const fa_norm *norm, fa_dtype dtype, object num_threads) except -1:
    cdef const fa_kernels *kernels = fa_kernels_for(dtype)
    cdef fa_norm_plan plan
    cdef bint small = fa_norm_is_small(norm)
    fa_plan_norm(norm, kernels, 1 if small else allowed_threads(num_threads), &plan)
    return run_planned(norm_run, norm, kernels, &plan, plan.size, small)
