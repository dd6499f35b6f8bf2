"""What all drivers share: the selected kernels, the threads of a region, scratch memory, Ctrl-C and fork.

The C kernels of every instruction set are linked into this module; the choice is made once, at import.
"""
import os
import re
import warnings

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #include <errno.h>
    #include <stdlib.h>
    #include <time.h>
    #if defined(__linux__)
    #include <sched.h>
    #include <sys/syscall.h>
    #endif
    #if !defined(_WIN32)
    #include <fcntl.h>
    #include <pthread.h>
    #include <string.h>
    #include <sys/file.h>
    #include <unistd.h>
    #endif
    #if defined(_OPENMP)
    #include <omp.h>
    #endif

    static int fa_openmp_version(void)
    {
    #if defined(_OPENMP)
        return _OPENMP;
    #else
        return 0;
    #endif
    }

    static double fa_seconds(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }

    /* What OpenMP would use in this thread: OMP_NUM_THREADS, or what was set since, for this thread alone. */
    static int fa_openmp_threads(void)
    {
    #if defined(_OPENMP)
        return omp_get_max_threads();
    #else
        return 0;
    #endif
    }

    /* The threads of a region. OpenMP aborts the process if the system refuses it a thread (RLIMIT_NPROC, a container's
     * limit on pids, no memory for a stack). For each calling thread it keeps the workers of that thread's last region
     * and creates the missing ones when a region begins. So before a region that needs more, as many trial threads are
     * created, kept until all exist, and ended again, and the region gets no more than could be created. Other programs
     * may still take some in the microseconds until the region begins; so a few are left over for them, and processes
     * that use this library take turns.
     */
    enum { FA_LEFT_OVER = 2 };

    #if defined(_OPENMP) && !defined(_WIN32)
    /* One per calling thread; shared with its workers, and freed by the last of them. */
    typedef struct {
        int members;     /* those of these threads that are alive: the destructor of fa_pool_key removes them */
        int last;        /* threads of the last region */
        double refused;  /* when the system last gave fewer threads than wanted */
    } fa_pool;

    static pthread_key_t fa_pool_key;
    static __thread fa_pool *fa_own_pool;
    static size_t fa_stack_size;  /* of OpenMP's threads; 0: the system's default */

    /* Both locks are held from the trial until OpenMP has its threads, so that no two callers count on the same ones:
     * the mutex among the threads of this process, and a lock on this module's file, which always exists, among
     * processes. */
    static pthread_mutex_t fa_growing = PTHREAD_MUTEX_INITIALIZER;
    static char *fa_lock_path;
    static int fa_lock = -1;

    static void fa_end_growing(void)
    {
        if (fa_lock >= 0)
            close(fa_lock);
        fa_lock = -1;
        pthread_mutex_unlock(&fa_growing);
    }

    /* Waits for this thread's turn; false if that takes too long. */
    static int fa_begin_growing(void)
    {
        double begin;
        pthread_mutex_lock(&fa_growing);
        begin = fa_seconds();
        fa_lock = fa_lock_path != NULL ? open(fa_lock_path, O_RDONLY | O_CLOEXEC) : -1;
        while (fa_lock >= 0 && flock(fa_lock, LOCK_EX | LOCK_NB) != 0 && (errno == EWOULDBLOCK || errno == EINTR)) {
            if (fa_seconds() - begin > 0.05) {
                fa_end_growing();
                return 0;
            }
            usleep(50);
        }
        return 1;
    }

    static void fa_leave_pool(void *pool)
    {
        if (__atomic_sub_fetch(&((fa_pool *)pool)->members, 1, __ATOMIC_ACQ_REL) == 0)
            free(pool);
    }

    static void fa_enter_pool(fa_pool *pool)
    {
        fa_pool *left = fa_own_pool;
        if (pthread_setspecific(fa_pool_key, pool) != 0)
            return;
        __atomic_add_fetch(&pool->members, 1, __ATOMIC_ACQ_REL);
        fa_own_pool = pool;
        if (left != NULL)
            fa_leave_pool(left);
    }

    typedef struct {
        pthread_mutex_t *gate;
        pthread_t thread;
        long id;
    } fa_trial;

    static void *fa_wait_at_gate(void *data)
    {
        fa_trial *trial = (fa_trial *)data;
    #if defined(__linux__)
        trial->id = syscall(SYS_gettid);
    #endif
        pthread_mutex_lock(trial->gate);
        pthread_mutex_unlock(trial->gate);
        return NULL;
    }

    /* How many of the wanted threads the system allows at the same time. */
    static int fa_try_threads(int wanted)
    {
        fa_trial *trial = (fa_trial *)malloc((size_t)wanted * sizeof *trial);
        pthread_mutex_t gate;
        pthread_attr_t attributes;
        int made = 0, gone = 0;
        double begin;
        if (trial == NULL || pthread_attr_init(&attributes) != 0) {
            free(trial);
            return 0;
        }
        if (fa_stack_size != 0)
            pthread_attr_setstacksize(&attributes, fa_stack_size);  /* a size refused here is refused by OpenMP too */
        pthread_mutex_init(&gate, NULL);
        pthread_mutex_lock(&gate);
        while (made < wanted) {
            trial[made].gate = &gate;
            if (pthread_create(&trial[made].thread, &attributes, fa_wait_at_gate, &trial[made]) != 0)
                break;
            ++made;
        }
        pthread_mutex_unlock(&gate);
        for (int i = 0; i < made; ++i)
            pthread_join(trial[i].thread, NULL);
        /* The system still counts a thread for a moment after it has ended. */
        begin = fa_seconds();
        for (int i = 0; i < made; ++i) {
    #if defined(__linux__)
            while (syscall(SYS_tgkill, (long)getpid(), trial[i].id, 0L) == 0 && fa_seconds() - begin < 0.1)
                sched_yield();
            gone += syscall(SYS_tgkill, (long)getpid(), trial[i].id, 0L) != 0;
    #else
            ++gone;
    #endif
        }
        (void)begin;
        pthread_mutex_destroy(&gate);
        pthread_attr_destroy(&attributes);
        free(trial);
        return gone;
    }

    /* Right before a region: how many threads it may have, at most `threads`. growing: it is this thread's turn until
     * they exist. */
    static int fa_gather(int threads, void **team, int *growing)
    {
        fa_pool *pool = fa_own_pool;
        int have, missing, more;
        *team = NULL;
        *growing = 0;
        if (threads <= 1)
            return 1;
        if (pool == NULL) {
            pool = (fa_pool *)calloc(1, sizeof *pool);
            if (pool == NULL)
                return 1;
            fa_enter_pool(pool);
            if (fa_own_pool != pool) {
                free(pool);
                return 1;
            }
        }
        /* The caller and its workers; workers that the last region did not need are about to end. */
        have = __atomic_load_n(&pool->members, __ATOMIC_ACQUIRE);
        have = have > pool->last ? pool->last : have;
        have = have < 1 ? 1 : have;
        if (threads > have && pool->refused != 0 && fa_seconds() - pool->refused < 1.0) {
            threads = have;
        } else if (threads > have) {
            missing = threads - have;
            *growing = fa_begin_growing();
            more = *growing ? fa_try_threads(missing + FA_LEFT_OVER) - FA_LEFT_OVER : 0;
            more = more < 0 ? 0 : more;
            pool->refused = more < missing ? fa_seconds() : 0;
            threads = have + more;
            if (*growing && more == 0) {
                *growing = 0;
                fa_end_growing();
            }
        }
        if (threads > 1)
            pool->last = threads;
        *team = pool;
        return threads;
    }

    /* To be called first by every thread of a region. */
    static void fa_join_team(void *team, int growing)
    {
        if (growing && omp_get_thread_num() == 0)
            fa_end_growing();
        if (team != NULL && fa_own_pool != team)
            fa_enter_pool((fa_pool *)team);
    }

    /* A child of fork() inherits the record of its parent's OpenMP threads but not the threads, and would wait for them
     * forever. The parent must release them before the fork; in the child it is too late. */
    static void fa_before_fork(void)
    {
        pthread_mutex_lock(&fa_growing);
    #if _OPENMP >= 201811 || (__GNUC__ >= 9 && !defined(__clang__))
        omp_pause_resource_all(omp_pause_soft);
    #endif
    }

    static void fa_after_fork(void) { pthread_mutex_unlock(&fa_growing); }

    static void fa_in_child(void)
    {
        if (fa_own_pool != NULL)
            fa_own_pool->last = 0;
        pthread_mutex_unlock(&fa_growing);
    }

    static int fa_prepare_threads(size_t stack_size, const char *lock_path)
    {
        fa_stack_size = stack_size;
        fa_lock_path = strdup(lock_path);
        if (pthread_key_create(&fa_pool_key, fa_leave_pool) != 0)
            return -1;
        return pthread_atfork(fa_before_fork, fa_after_fork, fa_in_child);
    }
    #else
    static int fa_gather(int threads, void **team, int *growing) { return *team = NULL, *growing = 0, 1; }
    static void fa_join_team(void *team, int growing) {}
    static int fa_prepare_threads(size_t stack_size, const char *lock_path) { return 0; }
    #endif

    /* CPUs that this process may be scheduled on. */
    static int fa_affinity(void)
    {
    #if defined(__linux__)
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0)
            return CPU_COUNT(&set);
    #endif
    #if !defined(_WIN32)
        return (int)sysconf(_SC_NPROCESSORS_ONLN);
    #else
        return 1;
    #endif
    }

    static int fa_check_signals(void)
    {
        PyGILState_STATE state = PyGILState_Ensure();
        int result = PyErr_CheckSignals();
        PyGILState_Release(state);
        return result;
    }

    /* The exception that PyErr_CheckSignals left behind. */
    static int fa_raise_pending(void) { return PyErr_Occurred() ? -1 : 0; }

    static int fa_load(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static void fa_store(int *p, int x) { __atomic_store_n(p, x, __ATOMIC_RELAXED); }
    """
    int fa_openmp_version() noexcept nogil
    int fa_openmp_threads() noexcept nogil
    int fa_prepare_threads(size_t stack_size, const char *lock_path) noexcept
    int fa_gather(int threads, void **team, int *growing) noexcept nogil
    void fa_join_team(void *team, int growing) noexcept nogil
    double fa_seconds() noexcept nogil
    int fa_affinity() noexcept nogil
    int fa_check_signals() noexcept nogil
    int fa_raise_pending() except -1
    int fa_load(const int *) noexcept nogil
    void fa_store(int *, int) noexcept nogil


# Instruction sets

cdef fa_instruction_set sets[8]
cdef int set_count = fa_runnable(sets, 8)
cdef fa_instruction_set *selected_set = &sets[0]

runnable = [sets[i].name.decode() for i in range(set_count)]

_forced = os.environ.get("FASTATTN_ISA", "")
if _forced:
    if _forced not in runnable:
        raise ImportError(f"FASTATTN_ISA={_forced!r}: this CPU and build can run {', '.join(runnable)}")
    selected_set = &sets[<int> runnable.index(_forced)]

selected = selected_set.name.decode()
kernel_names = {
    "float32": selected_set.kernels[<int> FA_F32].name.decode(),
    "float64": selected_set.kernels[<int> FA_F64].name.decode(),
    "float16": selected_set.kernels[<int> FA_F16].name.decode(),
    "bfloat16": selected_set.kernels[<int> FA_BF16].name.decode(),
}
openmp_version = fa_openmp_version()
cdef int prefetching_helps = fa_prefetching_helps()


cdef const fa_kernels *kernels_for(fa_dtype dtype) noexcept nogil:
    return selected_set.kernels[<int> dtype]


# Threads

cdef int chosen_threads = 0       # by set_num_threads; 0: not set
cdef int environment_threads = 0  # FASTATTN_NUM_THREADS; 0: not set
cdef int openmp_environment = 0   # OMP_NUM_THREADS; 0: not set
cdef int openmp_untouched = 0     # what OpenMP would use if nobody has set it otherwise since the import
cdef int quota_threads = 0

# More threads than this, or than there are CPUs, never help.
cdef enum:
    MOST_THREADS = 16


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


environment_threads = _threads_from_environment("FASTATTN_NUM_THREADS")
if not environment_threads:
    openmp_environment = _threads_from_environment("OMP_NUM_THREADS")
openmp_untouched = fa_openmp_threads()
if openmp_untouched < fa_affinity() and not openmp_environment:
    # It was set before this import, perhaps only for a while.
    openmp_untouched = fa_affinity()


def _stack_size():
    """The stack size of OpenMP's threads in bytes, parsed as its library does; 0: the system's default."""
    for name in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        match = re.fullmatch(r"\s*(\d{1,12})\s*([bkmg]?)\s*", os.environ.get(name, "").lower())
        if match:
            return int(match[1]) << {"b": 0, "k": 10, "m": 20, "g": 30}[match[2] or "k"]
    return 0


if fa_prepare_threads(_stack_size(), os.fsencode(__file__)):
    raise ImportError("the system has no room for the records of threads (pthread_key_create, pthread_atfork)")


cdef Team gathered(int threads) noexcept nogil:
    cdef Team team
    team.threads = fa_gather(threads, &team.pool, &team.growing)
    return team


cdef void join_team(const Team *team) noexcept nogil:
    fa_join_team(team.pool, team.growing)


cdef int default_threads() except -1:
    global quota_threads
    cdef int openmp
    if chosen_threads:
        return chosen_threads
    if environment_threads:
        return environment_threads
    openmp = fa_openmp_threads()
    if openmp != openmp_untouched:
        return openmp
    if openmp_environment:
        return openmp_environment
    if not quota_threads:
        quota_threads = _threads_from_quota()
    return max(1, min(fa_affinity(), quota_threads))


def get_threads():
    return default_threads()


def set_threads(num_threads):
    global chosen_threads
    chosen_threads = min(num_threads, 1 << 30)


cdef int allowed_threads(object num_threads) except -1:
    cdef int count = default_threads() if num_threads is None else num_threads
    if not openmp_version:
        return 1
    return min(count, max(MOST_THREADS, fa_affinity()))


# Scratch memory

cdef void *kept = NULL
cdef size_t kept_size = 0

cdef enum:
    MOST_KEPT = 16 << 20


# Stored just before the aligned block.
cdef struct Allocation:
    void *address
    size_t size


cdef inline Allocation *allocation_of(void *block) noexcept:
    return <Allocation *> (<char *> block - sizeof(Allocation))


cdef void *take_workspace(size_t size, double estimate) except NULL:
    global kept, kept_size
    cdef char *raw
    cdef char *block
    if estimate > 1e15:
        raise MemoryError(f"no memory for a workspace of {estimate:.3g} bytes")
    if kept != NULL and size <= kept_size:
        block = <char *> kept
        kept = NULL
        return block
    raw = <char *> PyMem_RawMalloc(size + 2 * FA_ALIGN)
    if raw == NULL:
        raise MemoryError(f"no memory for a workspace of {size} bytes")
    block = <char *> ((<uintptr_t> raw + 2 * FA_ALIGN - 1) // FA_ALIGN * FA_ALIGN)
    allocation_of(block).address = raw
    allocation_of(block).size = size
    return block


cdef void give_workspace(void *workspace) noexcept:
    global kept, kept_size
    cdef Allocation *allocation = allocation_of(workspace)
    if allocation.size > MOST_KEPT or (kept != NULL and kept_size >= allocation.size):
        PyMem_RawFree(allocation.address)
        return
    if kept != NULL:
        PyMem_RawFree(allocation_of(kept).address)
    kept = workspace
    kept_size = allocation.size


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
