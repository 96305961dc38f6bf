// SwiGLU (Shazeer, arXiv:2002.05202): y = silu(gate) * up of rows [gate | up] of 2f elements, in fp32 and rounded once. A block has
// up to four elements a thread of one row.

static const int ELEMENTS = 4;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
__device__ inline void swiglu(T* y, const T* gate_up, int f, int blocks_of_a_row) {
    Index row = blockIdx.x / blocks_of_a_row;
    int first = blockIdx.x % blocks_of_a_row * blockDim.x * ELEMENTS + threadIdx.x;
    const T* gate = gate_up + row * 2 * f;
    const T* up = gate + f;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        int i = first + e * blockDim.x;
        if (i < f) {
            float x = wide(gate[i]);
            y[row * f + i] = Narrow<T>::of(x * sigmoid(x) * wide(up[i]));
        }
    }
}

KERNEL swiglu_forward_f32(float* y, const float* gate_up, int f, int blocks_of_a_row) {
    swiglu(y, gate_up, f, blocks_of_a_row);
}

KERNEL swiglu_forward_bf16(bf16* y, const bf16* gate_up, int f, int blocks_of_a_row) {
    swiglu(y, gate_up, f, blocks_of_a_row);
}

// With s = sigmoid(gate): the gradient of gate is g * up * s * (1 + gate * (1 - s)), that of up is g * gate * s.
template <typename T>
__device__ inline void swiglu_back(T* of_gate_up, const T* g, const T* gate_up, int f, int blocks_of_a_row) {
    Index row = blockIdx.x / blocks_of_a_row;
    int first = blockIdx.x % blocks_of_a_row * blockDim.x * ELEMENTS + threadIdx.x;
    const T* gate = gate_up + row * 2 * f;
    const T* up = gate + f;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        int i = first + e * blockDim.x;
        if (i < f) {
            float x = wide(gate[i]);
            float s = sigmoid(x);
            float upstream = wide(g[row * f + i]);
            of_gate_up[row * 2 * f + i] = Narrow<T>::of(upstream * wide(up[i]) * (s * (1.0f + x * (1.0f - s))));
            of_gate_up[row * 2 * f + f + i] = Narrow<T>::of(upstream * (x * s));
        }
    }
}

KERNEL swiglu_backward_f32(float* of_gate_up, const float* g, const float* gate_up, int f, int blocks_of_a_row) {
    swiglu_back(of_gate_up, g, gate_up, f, blocks_of_a_row);
}

KERNEL swiglu_backward_bf16(bf16* of_gate_up, const bf16* g, const bf16* gate_up, int f, int blocks_of_a_row) {
    swiglu_back(of_gate_up, g, gate_up, f, blocks_of_a_row);
}
