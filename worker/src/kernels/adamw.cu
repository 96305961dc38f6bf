// AdamW over flat fp32 buffers, by the formula of the optimizer and in its order of operations, and the squares of its norm.
// A thread has four elements a block's width apart, so that reads of a warp lie side by side wherever a range begins.

static const int OF_A_THREAD = 4;

__device__ inline void step_moments(float& m, float& v, float g, float beta1, float rest1, float beta2, float rest2) {
    m = m * beta1;
    m = m + g * rest1;
    v = v * beta2;
    v = v + g * g * rest2;
}

__device__ inline float stepped(
    float w, float m, float v, float correction2, float eps, float decay, float rate, bool decayed) {
    float root = sqrtf(v / correction2) + eps;
    if (decayed) {
        w = w * decay;
    }
    return w - m / root * rate;
}

// Weights and moments of `len` elements, of which the first `decayed` decay, by the sum `g` of the gradient.
KERNEL adamw_update(
    float* w, float* m, float* v, const float* g, Index len, Index decayed, float scale, float beta1, float rest1, float beta2,
    float rest2, float correction2, float eps, float decay, float rate) {
    Index first = static_cast<Index>(blockIdx.x) * blockDim.x * OF_A_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < OF_A_THREAD; ++i) {
        Index at = first + static_cast<Index>(i) * blockDim.x;
        if (at < len) {
            float moment1 = m[at];
            float moment2 = v[at];
            step_moments(moment1, moment2, g[at] * scale, beta1, rest1, beta2, rest2);
            m[at] = moment1;
            v[at] = moment2;
            w[at] = stepped(w[at], moment1, moment2, correction2, eps, decay, rate, at < decayed);
        }
    }
}

// The moments alone, by a gradient that is scaled already.
KERNEL adamw_moments(
    float* m, float* v, const float* g, Index len, float beta1, float rest1, float beta2, float rest2) {
    Index first = static_cast<Index>(blockIdx.x) * blockDim.x * OF_A_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < OF_A_THREAD; ++i) {
        Index at = first + static_cast<Index>(i) * blockDim.x;
        if (at < len) {
            float moment1 = m[at];
            float moment2 = v[at];
            step_moments(moment1, moment2, g[at], beta1, rest1, beta2, rest2);
            m[at] = moment1;
            v[at] = moment2;
        }
    }
}

// The weights alone, by moments that are those of the step already.
KERNEL adamw_weights(
    float* w, const float* m, const float* v, Index len, Index decayed, float correction2, float eps, float decay, float rate) {
    Index first = static_cast<Index>(blockIdx.x) * blockDim.x * OF_A_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < OF_A_THREAD; ++i) {
        Index at = first + static_cast<Index>(i) * blockDim.x;
        if (at < len) {
            w[at] = stepped(w[at], m[at], v[at], correction2, eps, decay, rate, at < decayed);
        }
    }
}

// Halves 2 * HALF elements until one is left, all of them in registers.
template <int HALF>
__device__ inline void halve(float (&parts)[32]) {
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        parts[i] = parts[i] + parts[i + HALF];
    }
    if constexpr (HALF > 1) {
        halve<HALF / 2>(parts);
    }
}

// The sum of squares of each row of 1024: a row is halved ten times, its second half added to the first. A warp has a row,
// and a lane every 32nd element of it.
KERNEL square_rows(float* sums, const float* g, Index rows) {
    Index row = static_cast<Index>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    float parts[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        float x = row < rows ? g[row * 1024 + i * 32 + lane] : 0.0f;
        parts[i] = x * x;
    }
    halve<16>(parts);
    float sum = parts[0];
    for (int bit = 16; bit > 0; bit /= 2) {
        sum = with_lane(sum, bit);
    }
    if (lane == 0 && row < rows) {
        sums[row] = sum;
    }
}
