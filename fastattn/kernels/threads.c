/* Threads: how many a call may use, and OpenMP's, kept from aborting the process and from hanging a forked child. Knows
 * nothing of what they compute. Without OpenMP everything is on the caller's thread.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "threads.h"
#include "gomp.h"
#include "allocate.h"
#include <ctype.h>
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

int fa_openmp_version(void)
{
#if defined(_OPENMP)
    return _OPENMP;
#else
    return 0;
#endif
}

double fa_seconds(void)
{
    struct timespec t;
#if defined(_WIN32)
    timespec_get(&t, TIME_UTC);
#else
    clock_gettime(CLOCK_MONOTONIC, &t);
#endif
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int fa_openmp_threads(void)
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
    int members;    /* those of these threads that are alive: the destructor of fa_pool_key removes them */
    int last;       /* threads of the last region */
    double refused; /* when the system last gave fewer threads than wanted */
} fa_pool;

static pthread_key_t fa_pool_key;
static __thread fa_pool *fa_own_pool;
static pthread_once_t fa_once = PTHREAD_ONCE_INIT;
static int fa_ready;         /* whether the system had room for the records of threads */
static size_t fa_stack_size; /* of OpenMP's threads; 0: the system's default */

/* Both locks are held from the trial until OpenMP has its threads, so that no two callers count on the same ones:
 * the mutex among the threads of this process and, where one is named, a lock on a file among processes. */
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
        fa_release(pool);
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
    fa_trial *trial = (fa_trial *)fa_allocate((size_t)wanted * sizeof *trial);
    pthread_mutex_t gate;
    pthread_attr_t attributes;
    int made = 0, gone = 0;
    double begin;
    if (trial == NULL || pthread_attr_init(&attributes) != 0) {
        fa_release(trial);
        return 0;
    }
    if (fa_stack_size != 0)
        pthread_attr_setstacksize(&attributes, fa_stack_size); /* a size refused here is refused by OpenMP too */
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
    fa_release(trial);
    return gone;
}

int fa_gather(int threads, void **team, int *growing)
{
    fa_pool *pool = fa_own_pool;
    int have, missing, more;
    *team = NULL;
    *growing = 0;
    if (threads <= 1 || fa_prepare_threads(NULL) != 0)
        return 1;
    if (fa_own_threads())
        return threads;
    if (pool == NULL) {
        pool = (fa_pool *)fa_allocate(sizeof *pool);
        if (pool == NULL)
            return 1;
        memset(pool, 0, sizeof *pool);
        fa_enter_pool(pool);
        if (fa_own_pool != pool) {
            fa_release(pool);
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

void fa_join_team(void *team, int growing)
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

/* As OpenMP's library parses OMP_STACKSIZE; 0: the system's default. */
static size_t stack_size_of(const char *name)
{
    const char *text = getenv(name);
    char *unit;
    unsigned long long size;
    if (text == NULL)
        return 0;
    while (isspace((unsigned char)*text))
        text++;
    if (!isdigit((unsigned char)*text) || strspn(text, "0123456789") > 12)
        return 0;
    size = strtoull(text, &unit, 10);
    while (isspace((unsigned char)*unit))
        unit++;
    switch (tolower((unsigned char)*unit)) {
    case 'b':
        break;
    case 'm':
        size <<= 20;
        break;
    case 'g':
        size <<= 30;
        break;
    case 'k':
    case '\0':
        size <<= 10;
        break;
    default:
        return 0;
    }
    unit += *unit != '\0';
    while (isspace((unsigned char)*unit))
        unit++;
    return *unit == '\0' ? (size_t)size : 0;
}

static void prepare(void)
{
    fa_stack_size = stack_size_of("OMP_STACKSIZE");
    if (fa_stack_size == 0)
        fa_stack_size = stack_size_of("GOMP_STACKSIZE");
    fa_ready = pthread_key_create(&fa_pool_key, fa_leave_pool) == 0 &&
               pthread_atfork(fa_before_fork, fa_after_fork, fa_in_child) == 0;
}

/* A library that is unloaded, as plug-ins are, takes fa_leave_pool along; threads that end later must not call it. */
static __attribute__((destructor)) void forget_pools(void)
{
    if (fa_ready)
        pthread_key_delete(fa_pool_key);
}

int fa_prepare_threads(const char *lock_path)
{
    pthread_once(&fa_once, prepare);
    if (lock_path != NULL)
        fa_lock_path = strdup(lock_path);
    return fa_ready ? 0 : -1;
}
#else
int fa_gather(int threads, void **team, int *growing)
{
    (void)threads;
    *team = NULL;
    *growing = 0;
    return 1;
}

void fa_join_team(void *team, int growing)
{
    (void)team;
    (void)growing;
}

int fa_prepare_threads(const char *lock_path)
{
    (void)lock_path;
    return 0;
}
#endif

int fa_affinity(void)
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

/* More threads than this, or than there are CPUs, never help. */
enum { MOST_THREADS = 16 };

fa_thread_settings fa_threads = {.quota = 1 << 30};

int fa_default_threads(void)
{
    const int chosen = __atomic_load_n(&fa_threads.chosen, __ATOMIC_RELAXED);
    if (chosen)
        return chosen;
    if (fa_threads.environment)
        return fa_threads.environment;
    const int openmp = fa_openmp_threads();
    if (openmp != fa_threads.openmp_untouched)
        return openmp > 0 ? openmp : 1;
    if (fa_threads.openmp_environment)
        return fa_threads.openmp_environment;
    int cpus = fa_affinity();
    cpus = cpus < fa_threads.quota ? cpus : fa_threads.quota;
    return cpus > 1 ? cpus : 1;
}

int fa_allowed_threads(int wanted)
{
    if (!fa_openmp_version())
        return 1;
    if (wanted <= 0)
        wanted = fa_default_threads();
    const int cpus = fa_affinity(), most = cpus > MOST_THREADS ? cpus : MOST_THREADS;
    return wanted < most ? wanted : most;
}
