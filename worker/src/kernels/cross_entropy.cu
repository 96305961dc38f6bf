// Cross-entropy of rows of logits over `vocab` entries with one target each, and its gradient: with p = softmax(logits),
//
//     loss = -ln p[target]        gradient = weight * (p - onehot(target))
//
// in fp32, the gradient rounded once, in place of the logits. A block has a row. A target below 0 does not count: its loss is 0, and
// its weight should be. The sum of exponents is kept against the largest logit so far (Milakov and Gimelshein, arXiv:1805.02867): a
// row is read twice.

static const unsigned MINUS_INFINITY = 0xff800000u;

template <typename T, int N>
__device__ inline void cross_entropy(float* losses, T* logits, const Index* targets, const float* weights, int vocab) {
    T* row = logits + static_cast<Index>(blockIdx.x) * vocab;
    Index target = targets[blockIdx.x];
    float of_target = target >= 0 ? wide(row[target]) : 0.0f;
    float most = __uint_as_float(MINUS_INFINITY);
    float sum = 0.0f;
    for (int at = threadIdx.x * N; at < vocab; at += blockDim.x * N) {
        Pack<T, N> pack = load<N>(row + at);
        float before = most;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            most = fmaxf(most, wide(pack.of[i]));
        }
        if (most > before) {
            sum = sum * expf(before - most);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sum = sum + expf(wide(pack.of[i]) - most);
        }
    }
    float largest = block_max(most);
    // A thread that had none has a sum of 0.
    float total = block_sum(most > __uint_as_float(MINUS_INFINITY) ? sum * expf(most - largest) : sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = target >= 0 ? logf(total) + largest - of_target : 0.0f;
    }
    float weight = weights[blockIdx.x];
    float scale = 1.0f / total;
    for (int at = threadIdx.x * N; at < vocab; at += blockDim.x * N) {
        Pack<T, N> pack = load<N>(row + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float p = expf(wide(pack.of[i]) - largest) * scale;
            float hot = at + i == target ? 1.0f : 0.0f;
            pack.of[i] = Narrow<T>::of(weight * (p - hot));
        }
        store<N>(row + at, pack);
    }
}

KERNEL cross_entropy_f32(float* losses, float* logits, const Index* targets, const float* weights, int vocab) {
    BY_WIDTH(vocab, cross_entropy, float, losses, logits, targets, weights, vocab)
}

KERNEL cross_entropy_bf16(float* losses, bf16* logits, const Index* targets, const float* weights, int vocab) {
    BY_WIDTH(vocab, cross_entropy, bf16, losses, logits, targets, weights, vocab)
}
