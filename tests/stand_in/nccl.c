/* NCCL over MPI. Sums are taken from the last rank to the first, so that nobody relies on the order of ranks. See
 * stand_in.h. */
#include "stand_in.h"
#include <mpi.h>
#include <pthread.h>
#include <string.h>

enum { SUCCESS = 0, ARGUMENT = 4, USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
enum { FLOAT32 = 7, BFLOAT16 = 9 };

struct comm {
    MPI_Comm mpi;
    /* The one that MPI is called from. */
    pthread_t thread;
    int rank, size, state, failing, aborted;
    MPI_Request request;
    struct task *launching;
};

static int grouped, collectives;
static struct comm *in_group;

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

int collective(struct task *t) {
    struct comm *comm = t->comm;
    size_t width = t->kind == FLOAT32 ? 4 : 2;
    size_t each = t->what == REDUCE_SCATTER ? t->count * comm->size : t->count, bytes = each * width;
    if (comm->aborted) return 1;
    if (!pthread_equal(pthread_self(), comm->thread)) return 0;
    if (!t->started) {
        t->started = 1;
        t->gathered = malloc(bytes * comm->size + 1);
        if (comm->size == 1) memcpy(t->gathered, t->from, bytes);
        else MPI_Iallgather(t->from, (int)bytes, MPI_BYTE, t->gathered, (int)bytes, MPI_BYTE, comm->mpi, (MPI_Request *)&t->request);
    }
    int done = 1;
    if (comm->size > 1) MPI_Test((MPI_Request *)&t->request, &done, MPI_STATUS_IGNORE);
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
    *comm = (struct comm){.rank = rank, .size = size, .thread = pthread_self(), .request = MPI_REQUEST_NULL};
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
/* Whether what a collective reads and writes is on the device. Under the lock. */
static int in_memory(const struct task *t) {
    size_t bytes = t->count * (t->kind == FLOAT32 ? 4 : 2);
    int root = t->comm->rank == t->root;
    size_t from = t->what == REDUCE_SCATTER ? bytes * t->comm->size : bytes;
    size_t to = t->what == ALL_GATHER ? bytes * t->comm->size : bytes;
    if (t->what == BROADCAST && !root) from = 0;
    if (t->what == REDUCE && !root) to = 0;
    return allocated(t->from, from) && allocated(t->to, to);
}
static int launch(struct task task) {
    struct comm *comm = task.comm;
    if (comm->state != SUCCESS) return USAGE;
    LOCKED({
        if (!in_memory(&task)) { release(); return ARGUMENT; }
        struct task *t = malloc(sizeof task);
        *t = task;
        append(&comm->launching, t);
        counts.collectives++;
        if (task.what == ALL_REDUCE || task.what == REDUCE_SCATTER) counts.reduced += task.count;
        if (task.what == ALL_GATHER) counts.gathered += task.count;
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
