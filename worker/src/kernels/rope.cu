// Rotary position embeddings in the rotate-half form (Su et al., arXiv:2104.09864): of a head [a | b] of k elements,
// y = [a cos - b sin | b cos + a sin]. A rotation by the negative angle, `sign` -1, is its backward. A block has a token: its
// heads lie side by side in rows of y and x that are `stride_y` and `stride_x` elements apart, and y may be x. A thread has N pairs at
// a time.

template <typename T, int N>
__device__ inline void rotate(
    T* y, const T* x, const T* cosines, const T* sines, int heads, int half, Index stride_y, Index stride_x, float sign) {
    Index token = blockIdx.x;
    const T* from = x + token * stride_x;
    T* to = y + token * stride_y;
    for (int pair = threadIdx.x * N; pair < heads * half; pair += blockDim.x * N) {
        int i = pair % half;
        int at = pair / half * half * 2 + i;
        Pack<T, N> as = load<N>(from + at);
        Pack<T, N> bs = load<N>(from + at + half);
        Pack<T, N> cos = load<N>(cosines + token * half + i);
        Pack<T, N> sin = load<N>(sines + token * half + i);
        Pack<T, N> left, right;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float a = wide(as.of[j]);
            float b = wide(bs.of[j]);
            float cosine = wide(cos.of[j]);
            float sine = wide(sin.of[j]) * sign;
            left.of[j] = Narrow<T>::of(a * cosine - b * sine);
            right.of[j] = Narrow<T>::of(b * cosine + a * sine);
        }
        store<N>(to + at, left);
        store<N>(to + at + half, right);
    }
}

KERNEL rope_f32(
    float* y, const float* x, const float* cosines, const float* sines, int heads, int half, Index stride_y, Index stride_x,
    float sign) {
    BY_WIDTH(half | stride_y | stride_x, rotate, float, y, x, cosines, sines, heads, half, stride_y, stride_x, sign)
}

KERNEL rope_bf16(
    bf16* y, const bf16* x, const bf16* cosines, const bf16* sines, int heads, int half, Index stride_y, Index stride_x,
    float sign) {
    BY_WIDTH(half | stride_y | stride_x, rotate, bf16, y, x, cosines, sines, heads, half, stride_y, stride_x, sign)
}
