// RMSNorm of rows of `d`, y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv:1910.07467), with statistics in fp32, and
// the residual stream that it is added to. x, y and the residual are T, the weight is fp32.

// A block has a row. `inverse` gets 1 / sqrt(mean + eps) of each, for the backward; a residual of null is none.
template <typename T>
__device__ inline void norm_forward(T* y, float* inverse, const T* x, const float* w, const T* residual, int d, float eps) {
    const T* row = x + static_cast<Index>(blockIdx.x) * d;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        float value = wide(row[i]);
        squares = squares + value * value;
    }
    float mean = block_sum(squares) / static_cast<float>(d);
    float scale = 1.0f / sqrtf(mean + eps);
    if (threadIdx.x == 0) {
        inverse[blockIdx.x] = scale;
    }
    Index start = static_cast<Index>(blockIdx.x) * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        T normed = Narrow<T>::of(wide(row[i]) * scale * w[i]);
        y[start + i] = residual ? Narrow<T>::of(wide(residual[start + i]) + wide(normed)) : normed;
    }
}

KERNEL rms_norm_forward_f32(
    float* y, float* inverse, const float* x, const float* w, const float* residual, int d, float eps) {
    norm_forward(y, inverse, x, w, residual, d, eps);
}

KERNEL rms_norm_forward_bf16(
    bf16* y, float* inverse, const bf16* x, const float* w, const bf16* residual, int d, float eps) {
    norm_forward(y, inverse, x, w, residual, d, eps);
}

// With n = x * inverse and a = g * w: the gradient of x is inverse * (a - n * mean(a * n)), that of w the sum of g * n over
// rows. A block has `of_a_block` rows, one after the other, and writes the sums over these to its row of `partials`;
// norm_weight adds up those. Each thread has its own channels of them, in shared memory of d floats.
template <typename T>
__device__ inline void norm_backward(
    T* of_x, float* partials, const T* g, const T* x, const float* w, const float* inverse, int rows, int d, int of_a_block) {
    DYNAMIC_SHARED(sums);
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        sums[i] = 0.0f;
    }
    int first = blockIdx.x * of_a_block;
    int end = first + of_a_block < rows ? first + of_a_block : rows;
    for (int row = first; row < end; ++row) {
        Index start = static_cast<Index>(row) * d;
        float scale = inverse[row];
        float products = 0.0f;
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            float n = wide(x[start + i]) * scale;
            float upstream = wide(g[start + i]);
            products = products + upstream * w[i] * n;
            sums[i] = sums[i] + upstream * n;
        }
        float mean = block_sum(products) / static_cast<float>(d);
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            float n = wide(x[start + i]) * scale;
            of_x[start + i] = Narrow<T>::of(scale * (wide(g[start + i]) * w[i] - n * mean));
        }
    }
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        partials[static_cast<Index>(blockIdx.x) * d + i] = sums[i];
    }
}

KERNEL rms_norm_backward_f32(
    float* of_x, float* partials, const float* g, const float* x, const float* w, const float* inverse, int rows, int d,
    int of_a_block) {
    norm_backward(of_x, partials, g, x, w, inverse, rows, d, of_a_block);
}

KERNEL rms_norm_backward_bf16(
    bf16* of_x, float* partials, const bf16* g, const bf16* x, const float* w, const float* inverse, int rows, int d,
    int of_a_block) {
    norm_backward(of_x, partials, g, x, w, inverse, rows, d, of_a_block);
}

// The gradient of the weight: the rows of `partials` in order, of which each warp of a block has every `warps`-th, and then
// the warps in order. A block of 1024 threads has 32 channels.
KERNEL rms_norm_weight(float* of_w, const float* partials, int rows, int d) {
    __shared__ float of_warp[32][32];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    int warps = blockDim.x / 32;
    int channel = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (channel < d) {
        for (int row = warp; row < rows; row += warps) {
            sum = sum + partials[static_cast<Index>(row) * d + channel];
        }
    }
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && channel < d) {
        float total = of_warp[0][lane];
        for (int i = 1; i < warps; ++i) {
            total = total + of_warp[i][lane];
        }
        of_w[channel] = total;
    }
}
