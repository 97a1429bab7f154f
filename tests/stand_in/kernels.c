/* Kernels on the host: nvrtc.c has compiled them to libraries, and here their threads take turns. A thread goes on until
 * it waits, for its warp or for its block, or ends. See stand_in.h. */
#define _GNU_SOURCE
#include "stand_in.h"
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WARP = 32, MOST = 1024, STACK = 256 << 10 };
enum state { GOES_ON, AT_EXCHANGE, AT_BARRIER, ENDED };

struct kernel {
    char *image;
    void (*entry)(void **parameters);
    const size_t *sizes;
    int waits;
};

/* What the thread that goes on sees: device.h has the same. */
struct { unsigned thread[3], block[3], block_size[3], grid[3], lane; char *shared; } stand_in_here;

static struct lane { void *stack, *top; enum state state; unsigned number; } lanes[MOST];
static struct { unsigned char deposited[16], seen[16]; } values[MOST];
static struct lane *running;
static void *scheduler;
static struct launch *current;

#ifdef __x86_64__
void stand_in_switch(void **from, void *to);
__asm__(".text\n.globl stand_in_switch\nstand_in_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#else
static void stand_in_switch(void **from, void *to) {
    (void)from; (void)to;
    fprintf(stderr, "stand-in: kernels that wait run on x86-64 only\n");
    abort();
}
#endif

static void stop(enum state state) {
    running->state = state;
    stand_in_switch(&running->top, scheduler);
}

void stand_in_barrier(void) { stop(AT_BARRIER); }

/* Gives a value to the warp. When this returns all its threads have given theirs. */
void stand_in_exchange(const void *value, size_t bytes) {
    memcpy(values[running->number].deposited, value, bytes);
    stop(AT_EXCHANGE);
}

/* What a thread of the warp has given, or nothing if there is none. */
const void *stand_in_seen(unsigned lane) {
    unsigned number = running->number / WARP * WARP + lane, *size = stand_in_here.block_size;
    return lane < WARP && number < size[0] * size[1] * size[2] ? values[number].seen : NULL;
}

static void place(unsigned number) {
    unsigned *size = stand_in_here.block_size, *thread = stand_in_here.thread;
    thread[0] = number % size[0];
    thread[1] = number / size[0] % size[1];
    thread[2] = number / size[0] / size[1];
    stand_in_here.lane = number % WARP;
}

static void begin(void) {
    current->kernel->entry(current->parameters);
    stop(ENDED);
}

static void prepare(struct lane *lane, unsigned number) {
    if (!lane->stack) {
        lane->stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (lane->stack == MAP_FAILED) abort();
    }
    void **top = (void **)((char *)lane->stack + STACK) - 8;
    memset(top, 0, 8 * sizeof *top);
    /* After six registers, where to begin; the stack then is as after a call. */
    top[6] = (void *)begin;
    *lane = (struct lane){.stack = lane->stack, .top = top, .state = GOES_ON, .number = number};
}

/* Lets a warp's threads go on until all are at a barrier or have ended. Gives whether one is at a barrier. */
static int run_warp(unsigned first, unsigned end) {
    for (;;) {
        int exchange = 0, barrier = 0;
        for (unsigned i = first; i < end; i++) {
            running = &lanes[i];
            if (running->state == GOES_ON) { place(i); stand_in_switch(&scheduler, running->top); }
            exchange |= lanes[i].state == AT_EXCHANGE;
            barrier |= lanes[i].state == AT_BARRIER;
        }
        if (!exchange) return barrier;
        for (unsigned i = first; i < end; i++) {
            if (lanes[i].state != AT_EXCHANGE) continue;
            memcpy(values[i].seen, values[i].deposited, sizeof values[i].seen);
            lanes[i].state = GOES_ON;
        }
    }
}

static void run_block(unsigned threads) {
    if (!current->kernel->waits) {
        for (unsigned i = 0; i < threads; i++) { place(i); current->kernel->entry(current->parameters); }
        return;
    }
    for (unsigned i = 0; i < threads; i++) prepare(&lanes[i], i);
    for (int barrier = 1; barrier;) {
        barrier = 0;
        for (unsigned first = 0; first < threads; first += WARP)
            barrier |= run_warp(first, first + WARP < threads ? first + WARP : threads);
        for (unsigned i = 0; i < threads; i++) if (lanes[i].state == AT_BARRIER) lanes[i].state = GOES_ON;
    }
}

/* By these CubeCL measures how fast the GPU is. Nobody reads what they write. */
static int measures(const struct kernel *kernel) {
    const char *image = kernel->image;
    return strstr(image, "_throughput_") || strstr(image, "launch_overhead") || strstr(image, "prime_buffer");
}

void run_kernel(struct launch *launch) {
    if (measures(launch->kernel)) {
        /* It asks for more and more of what takes no time. */
        usleep(25000);
    } else if (launch->kernel->entry) {
        unsigned *block = stand_in_here.block, *grid = launch->grid, *size = launch->block;
        current = launch;
        memcpy(stand_in_here.block_size, size, sizeof launch->block);
        memcpy(stand_in_here.grid, grid, sizeof launch->grid);
        stand_in_here.shared = aligned_alloc(128, (launch->shared + 255) / 128 * 128);
        for (block[2] = 0; block[2] < grid[2]; block[2]++)
            for (block[1] = 0; block[1] < grid[1]; block[1]++)
                for (block[0] = 0; block[0] < grid[0]; block[0]++) run_block(size[0] * size[1] * size[2]);
        free(stand_in_here.shared);
    }
    free(launch->memory);
    free(launch);
}

/* Leaves PTX in STAND_IN_PTX, in a file of its kernel's name. */
static void show(const char *image) {
    static const char mark[] = ".visible .entry ";
    const char *folder = getenv("STAND_IN_PTX"), *name = strstr(image, mark) + strlen(mark);
    if (!folder) return;
    char part[2048], whole[2048];
    int len = strcspn(name, "(\n ");
    snprintf(part, sizeof part, "%s/%.*s.%d", folder, len, name, getpid());
    snprintf(whole, sizeof whole, "%s/%.*s.ptx", folder, len, name);
    FILE *file = fopen(part, "w");
    if (!file || fputs(image, file) < 0 || fclose(file) || rename(part, whole)) {
        fprintf(stderr, "stand-in: no file %s\n", whole);
        abort();
    }
}

int cuModuleLoadData(struct kernel **out, const char *image) {
    static const char ours[] = "// stand-in: ";
    struct kernel *kernel = calloc(1, sizeof *kernel);
    /* PTX, which is what NVRTC gives to CubeCL. */
    if (!strstr(image, ".visible .entry")) return INVALID;
    kernel->image = strdup(image);
    if (!strncmp(image, ours, strlen(ours))) {
        char path[4096];
        sscanf(image + strlen(ours), "%4095[^\n]", path);
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library) { fprintf(stderr, "stand-in: %s\n", dlerror()); return INVALID; }
        kernel->entry = (void (*)(void **))dlsym(library, "stand_in_entry");
        kernel->sizes = ((const size_t *(*)(void))dlsym(library, "stand_in_sizes"))();
        kernel->waits = *(const int *)dlsym(library, "stand_in_waits");
    } else {
        show(image);
    }
    if (getenv("STAND_IN_TRACE")) fprintf(stderr, "kernel %.*s\n", 60, strstr(image, ".visible .entry") + 16);
    LOCKED(counts.kernels++; if (strstr(image, "mma.")) counts.tensor_kernels++; *out = kernel);
}
int cuModuleUnload(struct kernel *kernel) { return kernel ? 0 : INVALID; }
int cuModuleGetFunction(struct kernel **function, struct kernel *module, const char *name) {
    *function = module;
    return strstr(module->image, name) ? 0 : 500;
}
int cuFuncSetAttribute(struct kernel *function, int attribute, int value) {
    return function && attribute == 8 && value <= 232448 ? 0 : INVALID;
}
int cuLaunchKernel(struct kernel *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z,
                   unsigned shared, struct stream *s, void **parameters, void **extra) {
    (void)extra;
    if (!kernel || !gx || !gy || !gz || gx > 2147483647 || gy > 65535 || gz > 65535) return INVALID;
    if (!x || !y || !z || z > 64 || (size_t)x * y * z > MOST || shared > 232448) return INVALID;
    struct launch *launch = malloc(sizeof *launch);
    *launch = (struct launch){.kernel = kernel, .grid = {gx, gy, gz}, .block = {x, y, z}, .shared = shared};
    /* Parameters are copied when a kernel is launched. */
    size_t count = 0, bytes = 0;
    for (; kernel->sizes && kernel->sizes[count]; count++) bytes += (kernel->sizes[count] + 15) / 16 * 16;
    launch->memory = aligned_alloc(16, count * 16 + bytes + 16);
    launch->parameters = launch->memory;
    char *at = (char *)launch->memory + count * 16;
    for (size_t i = 0; i < count; i++) {
        launch->parameters[i] = memcpy(at, parameters[i], kernel->sizes[i]);
        at += (kernel->sizes[i] + 15) / 16 * 16;
    }
    LOCKED(counts.launches++; put(s, (struct task){.what = LAUNCH, .launch = launch}));
}
int cuTensorMapEncodeTiled(void *map) { return map ? 0 : INVALID; }
