/* OpenMP without a library that must be there: what GCC's -fopenmp calls, defined here and linked into each module that
 * has parallel regions. A wheel then needs no libgomp.so.1, which slim containers lack, and brings none along.
 *
 * The calls go to the libgomp that is loaded already, by whoever came first (PyTorch's wheel has one of its own); or
 * else to the system's: a process has one set of OpenMP threads. Where there is no libgomp, regions run on threads of
 * their own, created when a region begins and joined when it ends: some 20 microseconds a thread, and nothing stays.
 *
 * Empty unless FASTATTN_FINDS_OPENMP is defined, which setup.py does for GCC on Linux.
 */
#ifdef FASTATTN_FINDS_OPENMP
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "gomp.h"
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define OURS __attribute__((visibility("hidden")))

/* Of GCC's ABI, which has no header. A module may use fewer of these. */
OURS void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
OURS void GOMP_barrier(void);
OURS bool GOMP_loop_dynamic_start(long begin, long end, long step, long chunk, long *from, long *to);
OURS bool GOMP_loop_dynamic_next(long *from, long *to);
OURS bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long *from, long *to);
OURS bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to);
OURS void GOMP_loop_end(void);
OURS void GOMP_loop_end_nowait(void);
OURS int omp_get_thread_num(void);
OURS int omp_get_num_threads(void);
OURS int omp_get_max_threads(void);
OURS int omp_pause_resource_all(int kind);

static struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    void (*barrier)(void);
    bool (*start)(long, long, long, long, long *, long *);
    bool (*next)(long *, long *);
    void (*end)(void);
    void (*end_nowait)(void);
    int (*thread_num)(void);
    int (*num_threads)(void);
    int (*max_threads)(void);
} gomp;
static bool found;
static int cpus = 1;

static bool take_from(void *library)
{
#define TAKE(field, name) (*(void **)&gomp.field = dlsym(library, name)) != NULL
    if (library == NULL)
        return false;
    return TAKE(parallel, "GOMP_parallel") && TAKE(barrier, "GOMP_barrier") && TAKE(start, "GOMP_loop_dynamic_start") &&
           TAKE(next, "GOMP_loop_dynamic_next") && TAKE(end, "GOMP_loop_end") &&
           TAKE(end_nowait, "GOMP_loop_end_nowait") && TAKE(thread_num, "omp_get_thread_num") &&
           TAKE(num_threads, "omp_get_num_threads") && TAKE(max_threads, "omp_get_max_threads");
#undef TAKE
}

/* Loaded libraries of this name, in the order in which they came, so that all modules find the same first one. Wheels
 * that bring their own rename it: libgomp-a34b3233.so.1. */
enum { MOST_LOADED = 8 };
struct loaded {
    int count;
    char *path[MOST_LOADED];
};

static int is_gomp(struct dl_phdr_info *info, size_t size, void *unused)
{
    const char *slash = strrchr(info->dlpi_name, '/');
    (void)size;
    (void)unused;
    return strncmp(slash != NULL ? slash + 1 : info->dlpi_name, "libgomp", 7) == 0;
}

static int note_path(struct dl_phdr_info *info, size_t size, void *data)
{
    struct loaded *loaded = (struct loaded *)data;
    if (is_gomp(info, size, NULL) && loaded->count < MOST_LOADED) {
        loaded->path[loaded->count] = strdup(info->dlpi_name);
        loaded->count += loaded->path[loaded->count] != NULL;
    }
    return 0;
}

static void forget_paths(struct loaded *loaded)
{
    while (loaded->count > 0)
        free(loaded->path[--loaded->count]);
}

/* As the module is loaded. What is found is never closed: its threads may outlive the module. */
static __attribute__((constructor)) void find_gomp(void)
{
    struct loaded loaded = {0};
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        cpus = CPU_COUNT(&set);
    dl_iterate_phdr(note_path, &loaded);
    found = take_from(dlopen(loaded.count > 0 ? loaded.path[0] : "libgomp.so.1", RTLD_NOW | RTLD_LOCAL));
    forget_paths(&loaded);
}

/* No more once a libgomp is loaded: modules that come after it find it. */
int fa_own_threads(void) { return !found && !dl_iterate_phdr(is_gomp, NULL); }

/* Of all libraries, whoever uses them: with a second libgomp, or with none of its own, PyTorch hangs in a child of a
 * process that used it. */
static void pause_all(int kind)
{
    struct loaded loaded = {0};
    dl_iterate_phdr(note_path, &loaded);
    for (int i = 0; i < loaded.count; i++) {
        int (*pause_one)(int) = NULL;
        void *library = dlopen(loaded.path[i], RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
        if (library == NULL)
            continue;
        *(void **)&pause_one = dlsym(library, "omp_pause_resource_all"); /* since GCC 9 */
        if (pause_one != NULL)
            pause_one(kind);
        dlclose(library);
    }
    forget_paths(&loaded);
}

/* Threads of a region's own. */

enum { LOOPS = 4 }; /* that threads of one region may be in at the same time: after a nowait some are ahead */

struct loop {
    long number; /* counted from 1 in a region; 0: not used yet */
    int inside;  /* threads that have not left it yet */
    long next, end, step, chunk;
};

struct team {
    void (*body)(void *);
    void *data;
    int size;
    pthread_mutex_t lock; /* of all that follows; held by the creator until all threads exist */
    pthread_barrier_t barrier;
    struct loop loops[LOOPS];
};

struct member {
    struct team *team;
    int number;
    long loops; /* that it has begun */
    pthread_t thread;
};

static __thread struct member *self;

static void *run_member(void *member)
{
    self = (struct member *)member;
    pthread_mutex_lock(&self->team->lock);
    pthread_mutex_unlock(&self->team->lock);
    self->team->body(self->team->data);
    return NULL;
}

static void run_team(void (*body)(void *), void *data, int wanted)
{
    struct member alone, *outer = self, *members = NULL;
    struct team team = {.body = body, .data = data, .size = 1};
    if (wanted > 1)
        members = (struct member *)calloc((size_t)wanted, sizeof *members);
    if (members == NULL) {
        wanted = 1;
        memset(&alone, 0, sizeof alone);
        members = &alone;
    }
    pthread_mutex_init(&team.lock, NULL);
    pthread_mutex_lock(&team.lock);
    for (; team.size < wanted; team.size++) {
        members[team.size].team = &team;
        members[team.size].number = team.size;
        if (pthread_create(&members[team.size].thread, NULL, run_member, &members[team.size]) != 0)
            break; /* the system gives no more: a smaller team */
    }
    pthread_barrier_init(&team.barrier, NULL, (unsigned)team.size);
    pthread_mutex_unlock(&team.lock);
    members[0].team = &team;
    self = &members[0];
    body(data);
    self = outer;
    for (int i = 1; i < team.size; i++)
        pthread_join(members[i].thread, NULL);
    pthread_barrier_destroy(&team.barrier);
    pthread_mutex_destroy(&team.lock);
    if (members != &alone)
        free(members);
}

static bool take_chunk(struct loop *loop, long *from, long *to)
{
    const long left = loop->step > 0 ? loop->end - loop->next : loop->next - loop->end;
    const long step = loop->step > 0 ? loop->step : -loop->step;
    if (left <= 0)
        return false;
    *from = loop->next;
    *to = left / step < loop->chunk ? loop->end : loop->next + loop->chunk * loop->step;
    loop->next = *to;
    return true;
}

static bool next_chunk(long *from, long *to)
{
    struct team *team = self->team;
    pthread_mutex_lock(&team->lock);
    const bool any = take_chunk(&team->loops[self->loops % LOOPS], from, to);
    pthread_mutex_unlock(&team->lock);
    return any;
}

static bool begin_loop(long begin, long end, long step, long chunk, long *from, long *to)
{
    struct team *team = self->team;
    struct loop *loop = &team->loops[++self->loops % LOOPS];
    pthread_mutex_lock(&team->lock);
    while (loop->number != self->loops && loop->inside > 0) { /* some are still in the loop before, LOOPS ago */
        pthread_mutex_unlock(&team->lock);
        sched_yield();
        pthread_mutex_lock(&team->lock);
    }
    if (loop->number != self->loops)
        *loop = (struct loop){self->loops, team->size, begin, end, step, chunk};
    const bool any = take_chunk(loop, from, to);
    pthread_mutex_unlock(&team->lock);
    return any;
}

static void leave_loop(void)
{
    struct team *team = self->team;
    pthread_mutex_lock(&team->lock);
    team->loops[self->loops % LOOPS].inside--;
    pthread_mutex_unlock(&team->lock);
}

/* What the compiler's code calls. */

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags)
{
    if (found)
        gomp.parallel(body, data, threads, flags);
    else
        run_team(body, data, threads > 0 ? (int)threads : cpus);
}

void GOMP_barrier(void)
{
    if (found)
        gomp.barrier();
    else
        pthread_barrier_wait(&self->team->barrier);
}

bool GOMP_loop_dynamic_start(long begin, long end, long step, long chunk, long *from, long *to)
{
    return (found ? gomp.start : begin_loop)(begin, end, step, chunk, from, to);
}

bool GOMP_loop_dynamic_next(long *from, long *to) { return (found ? gomp.next : next_chunk)(from, to); }

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long *from, long *to)
{
    return GOMP_loop_dynamic_start(begin, end, step, chunk, from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to) { return GOMP_loop_dynamic_next(from, to); }

void GOMP_loop_end_nowait(void) { (found ? gomp.end_nowait : leave_loop)(); }

void GOMP_loop_end(void)
{
    if (found) {
        gomp.end();
    } else {
        leave_loop();
        GOMP_barrier();
    }
}

int omp_get_thread_num(void) { return found ? gomp.thread_num() : self != NULL ? self->number : 0; }
int omp_get_num_threads(void) { return found ? gomp.num_threads() : self != NULL ? self->team->size : 1; }
int omp_get_max_threads(void) { return found ? gomp.max_threads() : cpus; }
int omp_pause_resource_all(int kind)
{
    pause_all(kind);
    return 0;
}
#endif
