// What all kernels have in common: the two formats, and sums whose order is written.
//
// There is no header of CUDA here, so that NVRTC needs none beside it, and the same text compiles as C++ with host.h for tests.
// Every operation is one IEEE operation in fp32: the compiler is told not to contract (--fmad=false), and divisions and roots
// are the correctly rounded ones. Nothing is added with atomics, and no order depends on which block comes first.

#define KERNEL extern "C" __global__ void

typedef long long Index;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

struct bf16 {
    unsigned short bits;
};

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <typename T>
struct Narrow;

template <>
struct Narrow<float> {
    __device__ static float of(float x) { return x; }
};

template <>
struct Narrow<bf16> {
    // To the nearest, ties to even; what is no number stays none.
    __device__ static bf16 of(float x) {
        unsigned bits = __float_as_uint(x);
        bf16 rounded;
        if ((bits & 0x7fffffffu) > 0x7f800000u) {
            rounded.bits = 0x7fc0;
        } else {
            rounded.bits = static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        }
        return rounded;
    }
};

// x of this lane and of the one whose number differs in `bit`, added: both get the same bits.
__device__ inline float with_lane(float x, int bit) { return x + __shfl_xor_sync(0xffffffffu, x, bit); }

// The sum of x over a block of whole warps, in all its threads: along a tree in each warp, then warp after warp.
__device__ inline float block_sum(float x) {
    __shared__ float warps[32];
    for (int bit = 16; bit > 0; bit /= 2) {
        x = with_lane(x, bit);
    }
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = warps[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
        sum = sum + warps[warp];
    }
    // Nobody begins the next sum before all have read this one.
    __syncthreads();
    return sum;
}
