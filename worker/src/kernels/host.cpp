// The kernels as C++ on a CPU, for tests: the very text that NVRTC compiles, with what CUDA has built in.
//
// The threads of a block are run one after the other in fibers. One that comes to a barrier is left there until all others
// came to it; who ends instead of coming is an error, since on a GPU the others would wait for ever. A shuffle is a barrier between
// writing and reading, by two places in turn: nobody comes to the shuffle after the next before all have read.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <ucontext.h>

namespace {

struct Dim {
    unsigned x;
};
Dim blockIdx, blockDim, threadIdx;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    unsigned thread;
    unsigned shuffles;
    bool over;
};

const std::size_t STACK = 64 << 10;
ucontext_t scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running;
unsigned next_thread;
float shuffled[2][1024];
void (*invoke)(void**);
void** arguments;

// Runs threads of the block until one waits at a barrier; the next fiber begins with the one after it.
void body() {
    Fiber* self = running;
    while (next_thread < blockDim.x) {
        threadIdx.x = self->thread = next_thread++;
        self->shuffles = 0;
        invoke(arguments);
    }
    self->over = true;
}

void barrier() {
    Fiber* self = running;
    swapcontext(&self->context, &scheduler);
    threadIdx.x = self->thread;
}

void prepare(Fiber& fiber) {
    fiber.over = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, body, 0);
}

void resume(Fiber& fiber) {
    running = &fiber;
    swapcontext(&scheduler, &fiber.context);
}

// One block; false where its threads part at a barrier.
bool run_block() {
    next_thread = 0;
    std::size_t waiting = 0;
    while (next_thread < blockDim.x) {
        if (waiting == fibers.size()) {
            fibers.push_back(std::make_unique<Fiber>());
            fibers.back()->stack = std::make_unique<char[]>(STACK);
        }
        Fiber& fiber = *fibers[waiting];
        unsigned first = next_thread;
        prepare(fiber);
        resume(fiber);
        // Threads before the one that waits have ended: they never come to its barrier.
        if (!fiber.over && fiber.thread != first) {
            return false;
        }
        if (fiber.over) {
            return waiting == 0;
        }
        ++waiting;
    }
    while (waiting > 0) {
        std::size_t over = 0;
        for (std::size_t i = 0; i < waiting; ++i) {
            resume(*fibers[i]);
            over += fibers[i]->over;
        }
        if (over != 0 && over != waiting) {
            return false;
        }
        waiting -= over;
    }
    return true;
}

inline void __syncthreads() { barrier(); }

inline float __shfl_xor_sync(unsigned, float x, int bit) {
    float* place = shuffled[running->shuffles++ % 2];
    place[threadIdx.x] = x;
    barrier();
    return place[threadIdx.x ^ static_cast<unsigned>(bit)];
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

}  // namespace

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

#include KERNELS

namespace {

template <auto Kernel, typename... Arguments, std::size_t... At>
void unpacked(void (*)(Arguments...), void** values, std::index_sequence<At...>) {
    Kernel(*static_cast<Arguments*>(values[At])...);
}

template <typename... Arguments>
std::make_index_sequence<sizeof...(Arguments)> places(void (*)(Arguments...)) {
    return {};
}

template <auto Kernel>
void call(void** values) {
    unpacked<Kernel>(Kernel, values, places(Kernel));
}

struct Entry {
    const char* name;
    void (*call)(void**);
};

#define ENTRY(name) {#name, call<name>}

const Entry ENTRIES[] = {
    ENTRY(adamw_update), ENTRY(adamw_moments), ENTRY(adamw_weights), ENTRY(square_rows),
    ENTRY(rms_norm_forward_f32), ENTRY(rms_norm_forward_bf16), ENTRY(rms_norm_backward_f32),
    ENTRY(rms_norm_backward_bf16), ENTRY(rms_norm_weight), ENTRY(swiglu_forward_f32), ENTRY(swiglu_forward_bf16),
    ENTRY(swiglu_backward_f32), ENTRY(swiglu_backward_bf16), ENTRY(rope_f32), ENTRY(rope_bf16),
    ENTRY(cross_entropy_f32), ENTRY(cross_entropy_bf16), ENTRY(blake3_blocks),
};

}  // namespace

// 0; 1: there is no such kernel; 2: threads part at a barrier. Not for several threads at once.
extern "C" int anello_host_launch(const char* name, unsigned grid, unsigned block, void** values) {
    for (const Entry& entry : ENTRIES) {
        if (std::strcmp(entry.name, name) == 0) {
            invoke = entry.call;
            arguments = values;
            blockDim.x = block;
            for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
                if (!run_block()) {
                    return 2;
                }
            }
            return 0;
        }
    }
    return 1;
}
