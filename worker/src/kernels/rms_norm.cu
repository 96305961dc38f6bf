// RMSNorm of rows of `d`, y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv:1910.07467), with statistics in fp32, and
// the residual stream that it is added to. x, y and the residual are T, the weight is fp32.
//
// A block has a row at a time, and each of its threads up to ELEMENTS of it, N side by side: the first `N * blockDim` of the row
// are one N a thread, and so on. N is 1 where rows are no multiple of what is read at once, so the order of sums follows from d.

static const int ELEMENTS = 16;
#define ROW_THREADS 768

// `body` of each pack that this thread has of a row: its number among those of the thread, and where in the row it begins.
template <int N, typename Body>
__device__ inline void each_pack(int d, Body body) {
#pragma unroll
    for (int p = 0; p < ELEMENTS / N; ++p) {
        int at = (p * blockDim.x + threadIdx.x) * N;
        if (at < d) {
            body(p, at);
        }
    }
}

// `inverse` gets 1 / sqrt(mean + eps) of each row, for the backward; a residual of null is none.
template <typename T, int N>
__device__ inline void norm_forward(T* y, float* inverse, const T* x, const float* w, const T* residual, int d, float eps) {
    const int PACKS = ELEMENTS / N;
    Index start = static_cast<Index>(blockIdx.x) * d;
    Pack<T, N> xs[PACKS] = {};
    float squares = 0.0f;
    each_pack<N>(d, [&](int p, int at) {
        xs[p] = load<N>(x + start + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float value = wide(xs[p].of[i]);
            squares = squares + value * value;
        }
    });
    float mean = block_sum(squares) / static_cast<float>(d);
    float scale = 1.0f / sqrtf(mean + eps);
    if (threadIdx.x == 0) {
        inverse[blockIdx.x] = scale;
    }
    each_pack<N>(d, [&](int p, int at) {
        float weights[N];
        load_wide(weights, w + at);
        Pack<T, N> before = {};
        if (residual) {
            before = load<N>(residual + start + at);
        }
        Pack<T, N> after;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            T normed = Narrow<T>::of(wide(xs[p].of[i]) * scale * weights[i]);
            after.of[i] = residual ? Narrow<T>::of(wide(before.of[i]) + wide(normed)) : normed;
        }
        store<N>(y + start + at, after);
    });
}

// With n = x * inverse and a = g * w: the gradient of x is inverse * (a - n * mean(a * n)), that of w the sum of g * n over
// rows. A block has `of_a_block` rows, one after the other, and writes the sums over these to its row of `partials`;
// norm_weight adds up those.
template <typename T, int N>
__device__ inline void norm_backward(
    T* of_x, float* partials, const T* g, const T* x, const float* w, const float* inverse, int rows, int d, int of_a_block) {
    const int PACKS = ELEMENTS / N;
    float sums[PACKS][N] = {};
    int first = blockIdx.x * of_a_block;
    int end = first + of_a_block < rows ? first + of_a_block : rows;
    for (int row = first; row < end; ++row) {
        Index start = static_cast<Index>(row) * d;
        float scale = inverse[row];
        Pack<T, N> xs[PACKS] = {};
        Pack<T, N> gs[PACKS] = {};
        float products = 0.0f;
        each_pack<N>(d, [&](int p, int at) {
            xs[p] = load<N>(x + start + at);
            gs[p] = load<N>(g + start + at);
            float weights[N];
            load_wide(weights, w + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float n = wide(xs[p].of[i]) * scale;
                float upstream = wide(gs[p].of[i]);
                products = products + upstream * weights[i] * n;
                sums[p][i] = sums[p][i] + upstream * n;
            }
        });
        float mean = block_sum(products) / static_cast<float>(d);
        each_pack<N>(d, [&](int p, int at) {
            float weights[N];
            load_wide(weights, w + at);
            Pack<T, N> of;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float n = wide(xs[p].of[i]) * scale;
                of.of[i] = Narrow<T>::of(scale * (wide(gs[p].of[i]) * weights[i] - n * mean));
            }
            store<N>(of_x + start + at, of);
        });
    }
    each_pack<N>(d, [&](int p, int at) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            partials[static_cast<Index>(blockIdx.x) * d + at + i] = sums[p][i];
        }
    });
}

ROW_KERNEL rms_norm_forward_f32(
    float* y, float* inverse, const float* x, const float* w, const float* residual, int d, float eps) {
    BY_WIDTH(d, norm_forward, float, y, inverse, x, w, residual, d, eps)
}

ROW_KERNEL rms_norm_forward_bf16(
    bf16* y, float* inverse, const bf16* x, const float* w, const bf16* residual, int d, float eps) {
    BY_WIDTH(d, norm_forward, bf16, y, inverse, x, w, residual, d, eps)
}

ROW_KERNEL rms_norm_backward_f32(
    float* of_x, float* partials, const float* g, const float* x, const float* w, const float* inverse, int rows, int d,
    int of_a_block) {
    BY_WIDTH(d, norm_backward, float, of_x, partials, g, x, w, inverse, rows, d, of_a_block)
}

ROW_KERNEL rms_norm_backward_bf16(
    bf16* of_x, float* partials, const bf16* g, const bf16* x, const float* w, const float* inverse, int rows, int d,
    int of_a_block) {
    BY_WIDTH(d, norm_backward, bf16, of_x, partials, g, x, w, inverse, rows, d, of_a_block)
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
