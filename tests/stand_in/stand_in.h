/* A CUDA driver, NVRTC and NCCL for hosts without GPUs, as far as the communicator and CubeCL use them. "Device" memory is
 * host memory, streams are queues that may go on by a task whenever somebody looks, collectives go over MPI, and kernels
 * run on the host if this NVRTC has compiled them (after the real one, which comes to libcuda by itself, they only count).
 * It checks what the real ones demand: a call of NCCL comes only after the last has settled, and work is on the stream
 * only then; copies and collectives stay within memory that is allocated; launches keep to the limits of a Hopper GPU.
 *
 * STAND_IN_GPUS, STAND_IN_VERSION: GPUs and NCCL's version. STAND_IN_CAPABILITY: the GPU's compute capability, 90 for 9.0;
 * kernels for the host need 75. STAND_IN_KERNELS: a folder for compiled kernels. STAND_IN_FAILURE: the number of the
 * collective that fails. STAND_IN_REPORT: a file that gets what there was when the process ends, a line "name number"
 * each; %d in its name is the process's rank. STAND_IN_EMPTY: new memory is zero and takes none of the host's until it is
 * written. STAND_IN_MEMORY: bytes that there are of it. STAND_IN_PTX: a folder that gets what NVIDIA's compiler has made.
 * STAND_IN_COMPILED: a file that gets the name of each program that is compiled, on a line.
 * STAND_IN_TRACE: kernels are named as they are loaded, and their sources for the host kept. */
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

enum { NOT_READY = 600, INVALID = 1, OUT_OF_MEMORY = 2, ILLEGAL_ADDRESS = 700 };
enum { COPY, COPY_ROWS, FREE, LAUNCH, RECORD, RECORD_ALL, WAIT, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, REDUCE, BROADCAST };

struct comm;
struct event { uint64_t recorded, passed; struct timespec when; };

struct task {
    int what, kind, root, started;
    const void *from;
    void *to, *gathered;
    size_t count, rows, from_pitch, to_pitch;
    struct event *event;
    uint64_t mark;
    size_t *left;
    struct comm *comm;
    void *request;
    struct stream *stream;
    struct launch *launch;
    struct task *next;
};

struct stream { struct task *first; struct stream *next; };

struct kernel;
struct launch {
    struct kernel *kernel;
    unsigned grid[3], block[3], shared;
    void **parameters, *memory;
};

/* What the report tells; tensor_kernels are those of NVIDIA's compiler that use tensor cores. */
struct counts { uint64_t allocated, peak, kernels, tensor_kernels, launches, collectives, reduced, gathered, uploaded, downloaded; };
extern struct counts counts;

/* Everything is done under the lock. */
void hold(void);
void release(void);
#define LOCKED(...) hold(); int code = 0; __VA_ARGS__; release(); return code

int number(const char *name, int otherwise);
/* Lets streams go on. Under the lock. */
void pump(void);
void append(struct task **first, struct task *task);
int put(struct stream *stream, struct task task);
/* Whether all these bytes are in one piece of device memory. Under the lock. */
int allocated(const void *start, size_t bytes);
/* Goes on with a collective: 1 when it is over. */
int collective(struct task *task);
void run_kernel(struct launch *launch);
