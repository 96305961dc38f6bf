// What all kernels have in common: the two formats, and sums whose order is written.
//
// There is no header of CUDA here, so that NVRTC needs none beside it, and the same text compiles as C++ with host.h for tests.
// Every operation is one IEEE operation in fp32: the compiler is told not to contract (--fmad=false), and divisions and roots
// are the correctly rounded ones. Nothing is added with atomics, and no order depends on which block comes first.

// Of blocks of up to 1024 threads, or of ROW_THREADS, for whose registers there is room.
#define KERNEL extern "C" __global__ void __launch_bounds__(1024)
#define ROW_KERNEL extern "C" __global__ void __launch_bounds__(ROW_THREADS)

typedef long long Index;

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

// Elements of T that a thread reads or writes at once, where they lie at a multiple of 16 bytes.
template <typename T>
struct At {
    static const int ONCE = 16 / sizeof(T);
};

// `body<T, N>` of so many at once where rows of `width` are a multiple of them, else of one at a time.
#define BY_WIDTH(width, body, T, ...)           \
    if ((width) % At<T>::ONCE == 0) {           \
        body<T, At<T>::ONCE>(__VA_ARGS__);      \
    } else {                                    \
        body<T, 1>(__VA_ARGS__);                \
    }

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T of[N];
};

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
__device__ inline void store(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// N numbers, by four at a time where there are as many.
template <int N>
__device__ inline void load_wide(float (&x)[N], const float* from) {
    const int ONCE = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += ONCE) {
        Pack<float, ONCE> pack = load<ONCE>(from + i);
#pragma unroll
        for (int j = 0; j < ONCE; ++j) {
            x[i + j] = pack.of[j];
        }
    }
}

// x of this lane and of the one whose number differs in `bit`, added: both get the same bits.
__device__ inline float with_lane(float x, int bit) { return x + __shfl_xor_sync(0xffffffffu, x, bit); }

// The largest x of a block of whole warps, in all its threads; what is no number has no part in it.
__device__ inline float block_max(float x) {
    __shared__ float warps[32];
    for (int bit = 16; bit > 0; bit /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
    }
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float most = warps[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
        most = fmaxf(most, warps[warp]);
    }
    __syncthreads();
    return most;
}

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
