/* As much of CUDA C++ as the kernels of CubeCL use, for g++. */
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

/* The kernels define these themselves, as CUDA has them. */
#define uint8_t kernel_uint8_t
#define uint16_t kernel_uint16_t
#define uint32_t kernel_uint32_t
#define uint64_t kernel_uint64_t
#define int8_t kernel_int8_t
#define int16_t kernel_int16_t
#define int32_t kernel_int32_t
#define int64_t kernel_int64_t

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

extern "C" {
extern struct here {
    struct { unsigned x, y, z; } thread, block, block_size, grid;
    unsigned lane;
    char *shared;
} stand_in_here;
void stand_in_barrier();
void stand_in_exchange(const void *value, size_t bytes);
const void *stand_in_seen(unsigned lane);
}

#define threadIdx (stand_in_here.thread)
#define blockIdx (stand_in_here.block)
#define blockDim (stand_in_here.block_size)
#define gridDim (stand_in_here.grid)
constexpr int warpSize = 32;

inline void __syncthreads() { stand_in_barrier(); }
inline void __syncwarp(unsigned = 0) { stand_in_exchange("", 1); }
inline void __threadfence() {}
inline unsigned __activemask() { return 0xffffffffu; }

template <typename T> T of_lane(T value, unsigned lane) {
    static_assert(sizeof(T) <= 16, "a value is too large");
    stand_in_exchange(&value, sizeof value);
    const void *seen = stand_in_seen(lane);
    if (seen) std::memcpy(&value, seen, sizeof value);
    return value;
}
template <typename T> T __shfl_sync(unsigned, T value, unsigned lane) { return of_lane(value, lane % 32); }
template <typename T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return of_lane(value, stand_in_here.lane ^ mask);
}
template <typename T> T __shfl_up_sync(unsigned, T value, unsigned delta) {
    return of_lane(value, stand_in_here.lane - delta);
}
template <typename T> T __shfl_down_sync(unsigned, T value, unsigned delta) {
    return of_lane(value, stand_in_here.lane + delta);
}

template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(unsigned long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
using std::isinf;
using std::isnan;

/* A kernel's parameters, in the order in which a launch gives their addresses. Unnamed, since kernels' types have the same
 * names in all libraries. */
namespace {
template <typename... A> struct Kernel {
    template <size_t... I> static void call(void (*kernel)(A...), void **p, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<A> *>(p[I])...);
    }
};
template <typename... A> void call(void (*kernel)(A...), void **p) {
    Kernel<A...>::call(kernel, p, std::index_sequence_for<A...>{});
}
template <typename F> struct Sizes;
template <typename... A> struct Sizes<void (*)(A...)> { static constexpr size_t all[] = {sizeof(A)..., 0}; };
}

#define STAND_IN_ENTRY(kernel, waiting)                                                   \
    extern "C" {                                                                          \
    void stand_in_entry(void **parameters) { call(&kernel, parameters); }                 \
    extern const int stand_in_waits = waiting;                                            \
    const size_t *stand_in_sizes() { return Sizes<decltype(&kernel)>::all; }              \
    }
