// SwiGLU (Shazeer, arXiv:2002.05202): y = silu(gate) * up of rows [gate | up] of 2f elements, in fp32 and rounded once. A thread has
// N elements of a row, side by side.

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Where a thread's elements begin in y, and in the gates.
struct Gated {
    bool any;
    Index y;
    Index gate;
};

template <int N>
__device__ inline Gated gated(int rows, int f) {
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned of_a_row = f / N;
    Index row = thread / of_a_row;
    int column = static_cast<int>(thread % of_a_row) * N;
    return {row < rows, row * f + column, row * 2 * f + column};
}

template <typename T, int N>
__device__ inline void swiglu(T* y, const T* gate_up, int rows, int f) {
    Gated here = gated<N>(rows, f);
    if (here.any) {
        Pack<T, N> gate = load<N>(gate_up + here.gate);
        Pack<T, N> up = load<N>(gate_up + here.gate + f);
        Pack<T, N> product;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float x = wide(gate.of[i]);
            product.of[i] = Narrow<T>::of(x * sigmoid(x) * wide(up.of[i]));
        }
        store<N>(y + here.y, product);
    }
}

// With s = sigmoid(gate): the gradient of gate is g * up * s * (1 + gate * (1 - s)), that of up is g * gate * s.
template <typename T, int N>
__device__ inline void swiglu_back(T* of_gate_up, const T* g, const T* gate_up, int rows, int f) {
    Gated here = gated<N>(rows, f);
    if (here.any) {
        Pack<T, N> gate = load<N>(gate_up + here.gate);
        Pack<T, N> up = load<N>(gate_up + here.gate + f);
        Pack<T, N> upstream = load<N>(g + here.y);
        Pack<T, N> of_gate, of_up;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float x = wide(gate.of[i]);
            float s = sigmoid(x);
            of_gate.of[i] = Narrow<T>::of(wide(upstream.of[i]) * wide(up.of[i]) * (s * (1.0f + x * (1.0f - s))));
            of_up.of[i] = Narrow<T>::of(wide(upstream.of[i]) * (x * s));
        }
        store<N>(of_gate_up + here.gate, of_gate);
        store<N>(of_gate_up + here.gate + f, of_up);
    }
}

KERNEL swiglu_forward_f32(float* y, const float* gate_up, int rows, int f) {
    BY_WIDTH(f, swiglu, float, y, gate_up, rows, f)
}

KERNEL swiglu_forward_bf16(bf16* y, const bf16* gate_up, int rows, int f) {
    BY_WIDTH(f, swiglu, bf16, y, gate_up, rows, f)
}

KERNEL swiglu_backward_f32(float* of_gate_up, const float* g, const float* gate_up, int rows, int f) {
    BY_WIDTH(f, swiglu_back, float, of_gate_up, g, gate_up, rows, f)
}

KERNEL swiglu_backward_bf16(bf16* of_gate_up, const bf16* g, const bf16* gate_up, int rows, int f) {
    BY_WIDTH(f, swiglu_back, bf16, of_gate_up, g, gate_up, rows, f)
}
