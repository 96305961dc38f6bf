// BLAKE3 (hash mode, github.com/BLAKE3-team/BLAKE3-specs) of each block of 2^16 numbers of a flat buffer: of their 256 KiB as they lie in
// memory, little-endian. A thread has a chunk of 1024 bytes; then the tree over 256 chaining values is halved eight times.

static const int CHUNKS = 256;
static const unsigned CHUNK_START = 1;
static const unsigned CHUNK_END = 2;
static const unsigned PARENT = 4;
static const unsigned ROOT = 8;

__device__ inline unsigned rotated(unsigned x, int by) { return (x >> by) | (x << (32 - by)); }

__device__ inline void mix(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned x, unsigned y) {
    a = a + b + x;
    d = rotated(d ^ a, 16);
    c = c + d;
    b = rotated(b ^ c, 12);
    a = a + b + y;
    d = rotated(d ^ a, 8);
    c = c + d;
    b = rotated(b ^ c, 7);
}

// The chaining value after these 64 bytes, in place of the one before; the words end up in another order.
__device__ inline void compress(unsigned (&cv)[8], unsigned (&m)[16], unsigned counter, unsigned flags) {
    unsigned v[16] = {
        cv[0], cv[1], cv[2], cv[3], cv[4], cv[5], cv[6], cv[7],
        0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au, counter, 0u, 64u, flags};
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        mix(v[0], v[4], v[8], v[12], m[0], m[1]);
        mix(v[1], v[5], v[9], v[13], m[2], m[3]);
        mix(v[2], v[6], v[10], v[14], m[4], m[5]);
        mix(v[3], v[7], v[11], v[15], m[6], m[7]);
        mix(v[0], v[5], v[10], v[15], m[8], m[9]);
        mix(v[1], v[6], v[11], v[12], m[10], m[11]);
        mix(v[2], v[7], v[8], v[13], m[12], m[13]);
        mix(v[3], v[4], v[9], v[14], m[14], m[15]);
        unsigned next[16] = {
            m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13], m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8]};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            m[i] = next[i];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        cv[i] = v[i] ^ v[i + 8];
    }
}

__device__ inline void initial(unsigned (&cv)[8]) {
    const unsigned of[8] = {
        0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au, 0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        cv[i] = of[i];
    }
}

// Eight words of digest for each block of `values`; of CHUNKS threads, and as many blocks as there are digests.
extern "C" __global__ void __launch_bounds__(CHUNKS) blake3_blocks(unsigned* digests, const unsigned* values) {
    // The chaining values of a level, by word: threads side by side have words side by side.
    __shared__ unsigned level[8][CHUNKS];
    unsigned chunk = threadIdx.x;
    const unsigned* of_chunk = values + (static_cast<Index>(blockIdx.x) * CHUNKS + chunk) * 256;
    unsigned cv[8];
    unsigned m[16];
    initial(cv);
    for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
            Pack<unsigned, 4> pack = load<4>(of_chunk + i * 16 + j);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                m[j + k] = pack.of[k];
            }
        }
        compress(cv, m, chunk, (i == 0 ? CHUNK_START : 0u) | (i == 15 ? CHUNK_END : 0u));
    }
    for (unsigned parents = CHUNKS / 2; parents > 0; parents /= 2) {
        // Of the level below, which has twice as many.
        if (chunk < parents * 2) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                level[i][chunk] = cv[i];
            }
        }
        __syncthreads();
        if (chunk < parents) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                m[i] = level[i][chunk * 2];
                m[i + 8] = level[i][chunk * 2 + 1];
            }
            initial(cv);
            compress(cv, m, 0u, PARENT | (parents == 1 ? ROOT : 0u));
        }
        // All have read before the next level is written.
        __syncthreads();
    }
    if (chunk == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            digests[static_cast<Index>(blockIdx.x) * 8 + i] = cv[i];
        }
    }
}
