/* The driver. See stand_in.h. */
#define _GNU_SOURCE
#include "stand_in.h"
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream default_stream;
static struct stream *streams = &default_stream;

struct counts counts;

struct piece { void *start; size_t bytes; struct piece *next; };
static struct piece *pieces;

void hold(void) { pthread_mutex_lock(&lock); }
void release(void) { pthread_mutex_unlock(&lock); }

int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static void report(void) {
    char path[4096];
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *pattern = getenv("STAND_IN_REPORT");
    snprintf(path, sizeof path, pattern, rank ? atoi(rank) : 0);
    FILE *file = fopen(path, "w");
    if (!file) return;
#define TELL(name) fprintf(file, #name " %llu\n", (unsigned long long)counts.name)
    TELL(allocated); TELL(peak); TELL(kernels); TELL(tensor_kernels); TELL(launches); TELL(collectives); TELL(reduced); TELL(gathered);
    TELL(uploaded); TELL(downloaded);
    fclose(file);
}

static void *obtain(size_t bytes) {
    const char *most = getenv("STAND_IN_MEMORY");
    if (most && counts.allocated + bytes > strtoull(most, NULL, 10)) return NULL;
    struct piece *piece = malloc(sizeof *piece);
    int fresh = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *piece = (struct piece){.start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, fresh, -1, 0), .bytes = bytes};
    if (piece->start == MAP_FAILED) { free(piece); return NULL; }
    /* Junk, where real memory would hold any, too. */
    if (!number("STAND_IN_EMPTY", 0)) memset(piece->start, 0x5a, bytes);
    hold();
    piece->next = pieces;
    pieces = piece;
    counts.allocated += bytes;
    if (counts.peak < counts.allocated) counts.peak = counts.allocated;
    release();
    return piece->start;
}

static int give_back(void *start) {
    for (struct piece **at = &pieces; *at; at = &(*at)->next) {
        struct piece *piece = *at;
        if (piece->start != start) continue;
        *at = piece->next;
        counts.allocated -= piece->bytes;
        munmap(piece->start, piece->bytes);
        free(piece);
        return 0;
    }
    return INVALID;
}

int allocated(const void *start, size_t bytes) {
    for (struct piece *piece = pieces; piece; piece = piece->next) {
        size_t offset = (const char *)start - (const char *)piece->start;
        if (start >= piece->start && offset <= piece->bytes && bytes <= piece->bytes - offset) return 1;
    }
    return bytes == 0;
}

static void pass(struct event *event, uint64_t mark) {
    clock_gettime(CLOCK_MONOTONIC, &event->when);
    if (event->passed < mark) event->passed = mark;
}

static int run(struct task *t) {
    switch (t->what) {
    case COPY: memcpy(t->to, t->from, t->count); return 1;
    case COPY_ROWS:
        for (size_t row = 0; row < t->rows; row++)
            memcpy((char *)t->to + row * t->to_pitch, (const char *)t->from + row * t->from_pitch, t->count);
        return 1;
    case FREE: give_back(t->to); return 1;
    case RECORD: pass(t->event, t->mark); return 1;
    case RECORD_ALL:
        if (--*t->left) return 1;
        free(t->left);
        pass(t->event, t->mark);
        return 1;
    case LAUNCH: run_kernel(t->launch); return 1;
    case WAIT: return t->event->passed >= t->mark;
    default: return collective(t);
    }
}

/* Which streams go on is drawn, so that what nothing orders comes in any order. */
void pump(void) {
    static uint32_t drawn = 1;
    for (struct stream *s = streams; s; s = s->next) {
        struct task *t = s->first;
        drawn = drawn * 1664525 + 1013904223;
        if (t && drawn >> 31 && run(t)) { s->first = t->next; free(t); }
    }
}

void append(struct task **first, struct task *task) {
    while (*first) first = &(*first)->next;
    task->next = NULL;
    *first = task;
}

int put(struct stream *stream, struct task task) {
    struct task *t = malloc(sizeof task);
    *t = task;
    append(&(stream ? stream : &default_stream)->first, t);
    return 0;
}

/* Lets streams go on until something holds, and others in between. */
#define UNTIL(condition) LOCKED(while (!(condition)) { pump(); release(); sched_yield(); hold(); })

int cuInit(unsigned flags) {
    static int told;
    if (getenv("STAND_IN_REPORT") && !told) { told = 1; atexit(report); }
    return flags;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = number("STAND_IN_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
/* By GTX CubeCL tells those of capability 7.5 that have no tensor cores, which the host has not either. */
int cuDeviceGetName(char *name, int len, int device) { (void)device; snprintf(name, len, "stand-in GTX"); return 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = device; return 0; }
int cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDeviceGetPCIBusId(char *id, int len, int device) { snprintf(id, len, "0000:%02x:00.0", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 150000000000; return 0; }
/* An H200's, by the numbers of CUdevice_attribute. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;   /* threads in a block, its x and y */
    case 4: *value = 64; break;                     /* its z */
    case 5: *value = 2147483647; break;             /* a grid's x */
    case 6: case 7: *value = 65535; break;          /* its y and z */
    case 10: *value = 32; break;                    /* threads in a warp */
    case 16: *value = 132; break;                   /* multiprocessors */
    case 75: *value = number("STAND_IN_CAPABILITY", 90) / 10; break;
    case 76: *value = number("STAND_IN_CAPABILITY", 90) % 10; break;
    case 97: *value = 232448; break;                /* bytes of shared memory that a block may ask for */
    default: *value = 1;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &lock; return 0; }
int cuCtxSetCurrent(void *context) { return context == &lock ? 0 : INVALID; }
int cuCtxPushCurrent_v2(void *context) { return cuCtxSetCurrent(context); }
int cuCtxPopCurrent_v2(void **context) { *context = &lock; return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cuGetErrorName(int code, const char **text) { (void)code; *text = "STAND_IN"; return 0; }
int cuGetErrorString(int code, const char **text) { (void)code; *text = "an error of the stand-in"; return 0; }

int cuStreamCreateWithPriority(struct stream **out, unsigned flags, int priority) {
    if (flags != 1 || priority > 0) return INVALID;
    struct stream *s = calloc(1, sizeof *s);
    LOCKED(s->next = streams; streams = s; *out = s);
}
int cuStreamCreate(struct stream **out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
int cuStreamDestroy_v2(struct stream *s) { return s ? 0 : INVALID; }
int cuStreamSynchronize(struct stream *s) { UNTIL(!(s ? s : &default_stream)->first); }

int cuEventCreate(struct event **out, unsigned flags) {
    *out = calloc(1, sizeof **out);
    return flags == 0 || flags == 2 ? 0 : INVALID;
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
int cuEventSynchronize(struct event *event) { UNTIL(event->passed >= event->recorded); }
int cuEventElapsedTime(float *milliseconds, struct event *from, struct event *to) {
    *milliseconds = (to->when.tv_sec - from->when.tv_sec) * 1e3 + (to->when.tv_nsec - from->when.tv_nsec) * 1e-6;
    return 0;
}
int cuEventElapsedTime_v2(float *milliseconds, struct event *from, struct event *to) {
    return cuEventElapsedTime(milliseconds, from, to);
}

int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    *out = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return flags;
}
int cuMemAllocHost_v2(void **out, size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }
int cuMemFreeHost(void *memory) { free(memory); return 0; }
int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
    *out = (uint64_t)obtain(bytes);
    return *out ? 0 : OUT_OF_MEMORY;
}
int cuMemAllocAsync(uint64_t *out, size_t bytes, struct stream *s) { (void)s; return cuMemAlloc_v2(out, bytes); }
int cuMemFree_v2(uint64_t memory) { LOCKED(code = give_back((void *)memory)); }
int cuMemFreeAsync(uint64_t memory, struct stream *s) {
    LOCKED(code = allocated((void *)memory, 1) ? put(s, (struct task){.what = FREE, .to = (void *)memory}) : INVALID);
}

static int copy(const void *from, int from_device, void *to, int to_device, size_t bytes, struct stream *s) {
    LOCKED(
        if (from_device && !allocated(from, bytes)) code = ILLEGAL_ADDRESS;
        if (to_device && !allocated(to, bytes)) code = ILLEGAL_ADDRESS;
        if (to_device && !from_device) counts.uploaded += bytes;
        if (from_device && !to_device) counts.downloaded += bytes;
        if (!code) put(s, (struct task){.what = COPY, .from = from, .to = to, .count = bytes});
    );
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, struct stream *s) {
    return copy(from, 0, (void *)to, 1, bytes, s);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, struct stream *s) {
    return copy((void *)from, 1, to, 0, bytes, s);
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, struct stream *s) {
    return copy((void *)from, 1, (void *)to, 1, bytes, s);
}

/* CUDA_MEMCPY2D. */
struct end { size_t x, y; int kind; void *host; uint64_t device; void *array; size_t pitch; };
struct rows { struct end from, to; size_t width, height; };

int cuMemcpy2DAsync_v2(const struct rows *r, struct stream *s) {
    enum { HOST = 1, DEVICE = 2 };
    const struct end *ends[] = {&r->from, &r->to};
    void *at[2];
    size_t bytes[2];
    for (int i = 0; i < 2; i++) {
        if ((ends[i]->kind != HOST && ends[i]->kind != DEVICE) || ends[i]->pitch < r->width) return INVALID;
        void *start = ends[i]->kind == DEVICE ? (void *)ends[i]->device : ends[i]->host;
        at[i] = (char *)start + ends[i]->y * ends[i]->pitch + ends[i]->x;
        bytes[i] = r->height ? (r->height - 1) * ends[i]->pitch + r->width : 0;
    }
    LOCKED(
        for (int i = 0; i < 2; i++) if (ends[i]->kind == DEVICE && !allocated(at[i], bytes[i])) code = ILLEGAL_ADDRESS;
        if (r->from.kind == HOST) counts.uploaded += r->width * r->height;
        if (r->to.kind == HOST) counts.downloaded += r->width * r->height;
        struct task task = {.what = COPY_ROWS, .from = at[0], .to = at[1], .count = r->width, .rows = r->height};
        task.from_pitch = r->from.pitch;
        task.to_pitch = r->to.pitch;
        if (!code) put(s, task);
    );
}
