/* A CUDA driver and an NCCL for hosts without GPUs, as far as the communicator uses them: "device" memory is host
 * memory, streams are queues that may go on by a task whenever somebody looks, and collectives go over MPI. It checks what
 * the real ones demand: a call of NCCL comes only after the last has settled, and work is on the stream only then.
 * Sums are taken from the last rank to the first, so that nobody relies on the order of ranks.
 *
 * STAND_IN_GPUS, STAND_IN_VERSION: what to pretend. STAND_IN_FAILURE: the number of the collective that fails. */
#include <mpi.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_READY = 600, INVALID = 1 };
enum { SUCCESS = 0, ARGUMENT = 4, USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
enum { FLOAT32 = 7, BFLOAT16 = 9 };
enum { COPY, RECORD, RECORD_ALL, WAIT, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, REDUCE, BROADCAST };

struct event { uint64_t recorded, passed; };

struct comm {
    MPI_Comm mpi;
    int rank, size, state, failing, aborted;
    MPI_Request request;
    struct task *launching;
};

struct task {
    int what, kind, root, started;
    const void *from;
    void *to, *gathered;
    size_t count;
    struct event *event;
    uint64_t mark;
    size_t *left;
    struct comm *comm;
    MPI_Request request;
    struct stream *stream;
    struct task *next;
};

struct stream { struct task *first; struct stream *next; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream default_stream;
static struct stream *streams = &default_stream;
static int grouped, collectives;
static struct comm *in_group;

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static float value(const void *from, size_t at, int kind) {
    if (kind == FLOAT32) return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static void store(void *to, size_t at, int kind, float x) {
    uint32_t bits;
    if (kind == FLOAT32) { ((float *)to)[at] = x; return; }
    memcpy(&bits, &x, 4);
    ((uint16_t *)to)[at] = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Sums up the gathered vectors of `each` elements, from element `first` on. */
static void sum(struct task *t, size_t each, size_t first) {
    for (size_t i = 0; i < t->count; i++) {
        int last = t->comm->size - 1;
        store(t->to, i, t->kind, value(t->gathered, last * each + first + i, t->kind));
        for (int rank = last - 1; rank >= 0; rank--)
            store(t->to, i, t->kind,
                  value(t->to, i, t->kind) + value(t->gathered, rank * each + first + i, t->kind));
    }
}

/* Goes on with a collective: 1 when it is over. */
static int collective(struct task *t) {
    struct comm *comm = t->comm;
    size_t width = t->kind == FLOAT32 ? 4 : 2;
    size_t each = t->what == REDUCE_SCATTER ? t->count * comm->size : t->count, bytes = each * width;
    if (comm->aborted) return 1;
    if (!t->started) {
        t->started = 1;
        t->gathered = malloc(bytes * comm->size + 1);
        if (comm->size == 1) memcpy(t->gathered, t->from, bytes);
        else MPI_Iallgather(t->from, (int)bytes, MPI_BYTE, t->gathered, (int)bytes, MPI_BYTE, comm->mpi, &t->request);
    }
    int done = 1;
    if (comm->size > 1) MPI_Test(&t->request, &done, MPI_STATUS_IGNORE);
    if (!done) return 0;
    switch (t->what) {
    case ALL_REDUCE: sum(t, each, 0); break;
    case REDUCE: if (comm->rank == t->root) sum(t, each, 0); break;
    case REDUCE_SCATTER: sum(t, each, comm->rank * t->count); break;
    case ALL_GATHER: memcpy(t->to, t->gathered, bytes * comm->size); break;
    case BROADCAST: memcpy(t->to, (char *)t->gathered + t->root * bytes, bytes); break;
    }
    free(t->gathered);
    return 1;
}

static int run(struct task *t) {
    switch (t->what) {
    case COPY: memcpy(t->to, t->from, t->count); return 1;
    case RECORD: if (t->event->passed < t->mark) t->event->passed = t->mark; return 1;
    case RECORD_ALL:
        if (--*t->left) return 1;
        free(t->left);
        if (t->event->passed < t->mark) t->event->passed = t->mark;
        return 1;
    case WAIT: return t->event->passed >= t->mark;
    default: return collective(t);
    }
}

/* Which streams go on is drawn, so that what nothing orders comes in any order. */
static void pump(void) {
    static uint32_t drawn = 1;
    for (struct stream *s = streams; s; s = s->next) {
        struct task *t = s->first;
        drawn = drawn * 1664525 + 1013904223;
        if (t && drawn >> 31 && run(t)) { s->first = t->next; free(t); }
    }
}

static void append(struct task **first, struct task *t) {
    while (*first) first = &(*first)->next;
    t->next = NULL;
    *first = t;
}

static int put(struct stream *s, struct task task) {
    struct task *t = malloc(sizeof task);
    *t = task;
    append(&(s ? s : &default_stream)->first, t);
    return 0;
}

#define LOCKED(body) pthread_mutex_lock(&lock); int code = 0; body; pthread_mutex_unlock(&lock); return code

int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = number("STAND_IN_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int len, int device) { (void)device; snprintf(name, len, "stand-in"); return 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = device; return 0; }
int cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &lock; return 0; }
int cuCtxSetCurrent(void *context) { return context == &lock ? 0 : INVALID; }
int cuCtxPushCurrent_v2(void *context) { return cuCtxSetCurrent(context); }
int cuCtxPopCurrent_v2(void **context) { *context = &lock; return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cuGetErrorString(int code, const char **text) { (void)code; *text = "an error of the stand-in"; return 0; }
int cuStreamCreateWithPriority(struct stream **out, unsigned flags, int priority) {
    if (flags != 1 || priority > 0) return INVALID;
    struct stream *s = calloc(1, sizeof *s);
    LOCKED(s->next = streams; streams = s; *out = s);
}
int cuStreamCreate(struct stream **out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
int cuStreamDestroy_v2(struct stream *s) { return s ? 0 : INVALID; }
int cuStreamSynchronize(struct stream *s) { LOCKED(while ((s ? s : &default_stream)->first) pump()); }
int cuEventCreate(struct event **out, unsigned flags) {
    *out = calloc(1, sizeof **out);
    return flags == 2 ? 0 : INVALID;
}
/* Never freed: waits may still look at it. */
int cuEventDestroy_v2(struct event *event) { return event ? 0 : INVALID; }
int cuEventRecord(struct event *event, struct stream *s) {
    LOCKED(put(s, (struct task){.what = RECORD, .event = event, .mark = ++event->recorded}));
}
/* Passed when every stream has come to where it is now. */
int cuCtxRecordEvent(void *context, struct event *event) {
    if (context != &lock) return INVALID;
    LOCKED(
        size_t *left = calloc(1, sizeof *left); event->recorded++;
        for (struct stream *s = streams; s; s = s->next) {
            ++*left;
            put(s, (struct task){.what = RECORD_ALL, .event = event, .mark = event->recorded, .left = left});
        }
    );
}
int cuStreamWaitEvent(struct stream *s, struct event *event, unsigned flags) {
    (void)flags;
    LOCKED(put(s, (struct task){.what = WAIT, .event = event, .mark = event->recorded}));
}
int cuEventQuery(struct event *event) {
    LOCKED(pump(); code = event->passed >= event->recorded ? 0 : NOT_READY);
}
int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) { *out = aligned_alloc(4096, bytes); return flags; }
int cuMemFreeHost(void *memory) { free(memory); return 0; }
/* Junk, where real memory would hold any, too. */
int cuMemAlloc_v2(uint64_t *out, size_t bytes) { *out = (uint64_t)memset(malloc(bytes), 0x5a, bytes); return 0; }
int cuMemFree_v2(uint64_t memory) { free((void *)memory); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, struct stream *s) {
    LOCKED(put(s, (struct task){.what = COPY, .to = (void *)to, .from = from, .count = bytes}));
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, struct stream *s) {
    LOCKED(put(s, (struct task){.what = COPY, .to = to, .from = (void *)from, .count = bytes}));
}

struct id { char internal[128]; };
struct config { size_t size; unsigned magic, version; int blocking, cga, least, most; const char *net; int split; };

int ncclGetVersion(int *version) { *version = number("STAND_IN_VERSION", 23003); return SUCCESS; }
int ncclGetUniqueId(struct id *id) { memset(id, 'i', sizeof *id); return SUCCESS; }
const char *ncclGetErrorString(int code) { return code == REMOTE ? "remote error" : "other error"; }
const char *ncclGetLastError(struct comm *comm) { (void)comm; return "said by the stand-in"; }
int ncclCommInitRankConfig(struct comm **out, int size, struct id id, int rank, struct config *config) {
    if (config->size != sizeof *config || config->magic != 0xcafebeef || config->blocking != 0) return ARGUMENT;
    for (int i = 0; i < 128; i++) if (id.internal[i] != 'i') return ARGUMENT;
    struct comm *comm = calloc(1, sizeof *comm);
    *comm = (struct comm){.rank = rank, .size = size, .request = MPI_REQUEST_NULL};
    *out = comm;
    if (size == 1) return SUCCESS;
    comm->state = IN_PROGRESS;
    MPI_Comm_idup(MPI_COMM_WORLD, &comm->mpi, &comm->request);
    return IN_PROGRESS;
}
int ncclCommGetAsyncError(struct comm *comm, int *state) {
    LOCKED({
        int done = 1;
        pump();
        if (comm->request != MPI_REQUEST_NULL) MPI_Test(&comm->request, &done, MPI_STATUS_IGNORE);
        *state = comm->state;
        if (done && comm->state == IN_PROGRESS) {
            /* Settled, but only the next look says so. */
            comm->state = comm->failing ? REMOTE : SUCCESS;
            for (struct task *t; (t = comm->launching);) {
                comm->launching = t->next;
                append(&t->stream->first, t);
            }
        }
    });
}
int ncclGroupStart(void) { grouped = 1; return SUCCESS; }
int ncclGroupEnd(void) {
    struct comm *comm = in_group;
    grouped = 0;
    in_group = NULL;
    if (comm) comm->state = IN_PROGRESS;
    return comm ? IN_PROGRESS : SUCCESS;
}
static int launch(struct task task) {
    struct comm *comm = task.comm;
    if (comm->state != SUCCESS) return USAGE;
    LOCKED({
        struct task *t = malloc(sizeof task);
        *t = task;
        append(&comm->launching, t);
        if (++collectives == number("STAND_IN_FAILURE", 0)) comm->failing = 1;
        if (grouped) in_group = comm;
        else comm->state = code = IN_PROGRESS;
    });
}
int ncclAllReduce(const void *from, void *to, size_t n, int kind, int op, struct comm *comm, struct stream *s) {
    if (op != 0) return ARGUMENT;
    return launch((struct task){.what = ALL_REDUCE, .from = from, .to = to, .count = n, .kind = kind, .comm = comm, .stream = s});
}
int ncclReduceScatter(const void *from, void *to, size_t n, int kind, int op, struct comm *comm, struct stream *s) {
    if (op != 0) return ARGUMENT;
    return launch((struct task){.what = REDUCE_SCATTER, .from = from, .to = to, .count = n, .kind = kind, .comm = comm, .stream = s});
}
int ncclAllGather(const void *from, void *to, size_t n, int kind, struct comm *comm, struct stream *s) {
    return launch((struct task){.what = ALL_GATHER, .from = from, .to = to, .count = n, .kind = kind, .comm = comm, .stream = s});
}
int ncclReduce(const void *from, void *to, size_t n, int kind, int op, int root, struct comm *comm, struct stream *s) {
    if (op != 0) return ARGUMENT;
    return launch((struct task){.what = REDUCE, .from = from, .to = to, .count = n, .kind = kind, .root = root, .comm = comm, .stream = s});
}
int ncclBroadcast(const void *from, void *to, size_t n, int kind, int root, struct comm *comm, struct stream *s) {
    return launch((struct task){.what = BROADCAST, .from = from, .to = to, .count = n, .kind = kind, .root = root, .comm = comm, .stream = s});
}
int ncclCommFinalize(struct comm *comm) {
    if (comm->state != SUCCESS) return USAGE;
    comm->state = IN_PROGRESS;
    if (comm->size > 1) MPI_Ibarrier(comm->mpi, &comm->request);
    return IN_PROGRESS;
}
int ncclCommDestroy(struct comm *comm) {
    if (comm->size > 1) MPI_Comm_free(&comm->mpi);
    return SUCCESS;
}
int ncclCommAbort(struct comm *comm) { LOCKED(comm->aborted = 1; pump()); }
