// Rotary position embeddings in the rotate-half form (Su et al., arXiv:2104.09864): of a head [a | b] of k elements,
// y = [a cos - b sin | b cos + a sin]. A rotation by the negative angle, `sign` -1, is its backward. A block has a token: its
// heads lie side by side in rows of x that are `stride` elements apart, and in rows of y without gaps.

template <typename T>
__device__ inline void rotate(T* y, const T* x, const T* cosines, const T* sines, int heads, int half, Index stride, float sign) {
    Index token = blockIdx.x;
    const T* from = x + token * stride;
    T* to = y + token * heads * half * 2;
    for (int pair = threadIdx.x; pair < heads * half; pair += blockDim.x) {
        int i = pair % half;
        int at = pair / half * half * 2 + i;
        float a = wide(from[at]);
        float b = wide(from[at + half]);
        float cosine = wide(cosines[token * half + i]);
        float sine = wide(sines[token * half + i]) * sign;
        to[at] = Narrow<T>::of(a * cosine - b * sine);
        to[at + half] = Narrow<T>::of(b * cosine + a * sine);
    }
}

KERNEL rope_f32(
    float* y, const float* x, const float* cosines, const float* sines, int heads, int half, Index stride, float sign) {
    rotate(y, x, cosines, sines, heads, half, stride, sign);
}

KERNEL rope_bf16(bf16* y, const bf16* x, const bf16* cosines, const bf16* sines, int heads, int half, Index stride, float sign) {
    rotate(y, x, cosines, sines, heads, half, stride, sign);
}
