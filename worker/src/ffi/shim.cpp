// What LibTorch offers in C++ and tch does not wrap: the switches of its arithmetic, streams, events, pinned memory, graphs.
// It needs no header of CUDA: c10's guard finds the implementation that libtorch_cuda.so registers when it is loaded, and of
// what has no such place the symbols are looked up.
//
// Every function returns 0, or -1 with its reason in anello_error(). No exception passes.

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

thread_local std::string reason;

template <typename Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        reason = error.what();
    } catch (...) {
        reason = "an exception without words";
    }
    return -1;
}

c10::Device cuda(int32_t device) {
    return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
}

c10::Stream stream_of(int32_t device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, cuda(device), id);
}

c10::impl::VirtualGuardImpl guard() {
    return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA);
}

// A function of libtorch_cuda.so, by its mangled name.
template <typename Function>
Function* of_cuda(const char* name) {
    auto* found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        throw std::runtime_error(std::string("there is no ") + name + " of libtorch_cuda.so in this process");
    }
    return reinterpret_cast<Function*>(found);
}

// at::cuda::CUDAGraph of torch 2.11.0, whose header wants those of CUDA: its place, and its members by name.
struct Graph {
    using Pool = std::pair<unsigned long long, unsigned long long>;

    Graph() { of_cuda<void(void*, bool)>("_ZN2at4cuda9CUDAGraphC1Eb")(place, /*keep_graph=*/false); }
    ~Graph() { of_cuda<void(void*)>("_ZN2at4cuda9CUDAGraphD1Ev")(place); }

    static Pool new_pool() { return of_cuda<Pool()>("_ZN2at4cuda17graph_pool_handleEv")(); }

    void begin(Pool pool) {
        // Other threads copy and wait on streams of their own meanwhile, which only this mode lets them.
        const int thread_local_mode = 1;
        of_cuda<void(void*, Pool, int)>("_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode")(
            place, pool, thread_local_mode);
    }
    void end() { of_cuda<void(void*)>("_ZN2at4cuda9CUDAGraph11capture_endEv")(place); }
    void replay() { of_cuda<void(void*)>("_ZN2at4cuda9CUDAGraph6replayEv")(place); }

    // Some three hundred bytes of it are used.
    alignas(64) unsigned char place[4096] = {};
};

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A backward of Rust's. It takes over the tensors that it is given, and gives as many gradients as there are inputs, null where
// there is none; it returns 0, or -1 and nothing.
using Backward = int (*)(
    void* closure, at::Tensor* of_output, at::Tensor** saved, int64_t n_saved, at::Tensor** of_inputs, int64_t n_inputs);

struct Closure final : torch::CustomClassHolder {
    Closure(void* data, Backward backward, void (*release)(void*)) : data(data), backward(backward), release(release) {}
    ~Closure() override { release(data); }
    void* data;
    Backward backward;
    void (*release)(void*);
};

struct Computed {
    at::Tensor output;
    variable_list saved;
    c10::intrusive_ptr<Closure> closure;
};

// What was computed already, as a node of the graph.
struct WithBackward : torch::autograd::Function<WithBackward> {
    static at::Tensor forward(AutogradContext* ctx, at::TensorList inputs, const Computed* computed) {
        ctx->save_for_backward(computed->saved);
        ctx->saved_data["closure"] = c10::IValue::make_capsule(computed->closure);
        ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
        return computed->output;
    }

    static variable_list backward(AutogradContext* ctx, variable_list of_outputs) {
        auto holder = ctx->saved_data["closure"].toCapsule();
        const auto& closure = static_cast<const Closure&>(*holder);
        std::vector<at::Tensor*> saved;
        for (const auto& tensor : ctx->get_saved_variables()) {
            saved.push_back(new at::Tensor(tensor));
        }
        std::vector<at::Tensor*> found(ctx->saved_data["inputs"].toInt(), nullptr);
        auto* of_output = new at::Tensor(of_outputs[0]);
        if (closure.backward(closure.data, of_output, saved.data(), saved.size(), found.data(), found.size()) != 0) {
            throw std::runtime_error("the backward of a fused kernel failed");
        }
        variable_list of_inputs;
        for (auto* gradient : found) {
            of_inputs.push_back(gradient ? *std::unique_ptr<at::Tensor>(gradient) : at::Tensor());
        }
        // That of `computed`.
        of_inputs.emplace_back();
        return of_inputs;
    }
};

}  // namespace

extern "C" {

const char* anello_error() { return reason.c_str(); }

// The arithmetic of runs: no TF32, no reduced-precision sums in matrix products, no cuDNN that tries out algorithms,
// attention by flash or by plain products alone, and with `deterministic` no kernel whose bits change from call to call.
int anello_set_numerics(int deterministic) {
    return guarded([&] {
        auto& context = at::globalContext();
        context.setAllowTF32CuBLAS(false);
        context.setAllowTF32CuDNN(false);
        context.setAllowBF16ReductionCuBLAS(false);
        context.setAllowFP16ReductionCuBLAS(false);
        context.setBenchmarkCuDNN(false);
        context.setDeterministicCuDNN(deterministic != 0);
        context.setDeterministicAlgorithms(deterministic != 0, false);
        context.setDeterministicFillUninitializedMemory(false);
        context.setSDPUseFlash(true);
        context.setSDPUseMath(true);
        context.setSDPUseMemEfficient(false);
        context.setSDPUseCuDNN(false);
    });
}

// 1 where the switches stand as anello_set_numerics(1) puts them, else 0.
int anello_is_deterministic() {
    auto& context = at::globalContext();
    return context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly() &&
        context.userEnabledFlashSDP() && context.userEnabledMathSDP() && !context.userEnabledMemEfficientSDP() &&
        !context.userEnabledCuDNNSDP() && !context.allowTF32CuBLAS();
}

// A CPU tensor of fp32 zeros in memory that a GPU copies from and to without a detour. To be freed with tch.
int anello_pinned(int64_t elements, at::Tensor** out) {
    return guarded([&] {
        auto options = at::TensorOptions().dtype(at::kFloat).pinned_memory(true);
        *out = new at::Tensor(at::empty({elements}, options));
    });
}

// Copies `from` into `to` on the current stream; with pinned memory it returns before the copy is made.
int anello_copy_async(const at::Tensor* to, const at::Tensor* from) {
    return guarded([&] {
        c10::AutoGradMode off(false);
        to->copy_(*from, /*non_blocking=*/true);
    });
}

// Causal flash attention of many sequences laid end to end: queries [n, heads, k], keys and values [n, kv heads, k], bf16 on
// a GPU; `ends` is where each sequence begins and the last one ends, int32. With a graph, when one is being recorded.
int anello_flash_packed(
    const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* ends, int64_t longest, at::Tensor** out) {
    return guarded([&] {
        auto parts = at::_flash_attention_forward(
            *q, *k, *v, *ends, *ends, longest, longest, /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false);
        *out = new at::Tensor(std::get<0>(parts));
    });
}

// `output`, which was computed from `inputs` without a graph, with `backward` as its node where a graph is recorded. The closure
// is released once the graph is gone, or right away when this fails.
int anello_with_backward(
    const at::Tensor* output, at::Tensor* const* inputs, int64_t n_inputs, at::Tensor* const* saved, int64_t n_saved,
    void* closure, Backward backward, void (*release)(void*), at::Tensor** out) {
    auto held = c10::make_intrusive<Closure>(closure, backward, release);
    return guarded([&] {
        variable_list of, kept;
        for (int64_t i = 0; i < n_inputs; ++i) {
            of.push_back(*inputs[i]);
        }
        for (int64_t i = 0; i < n_saved; ++i) {
            kept.push_back(*saved[i]);
        }
        Computed computed{*output, std::move(kept), std::move(held)};
        const Computed* pointer = &computed;
        *out = new at::Tensor(WithBackward::apply(at::TensorList(of), pointer));
    });
}

// Adds the product a · b of two bf16 matrices to `place`, fp32, on a GPU: cuBLAS adds in fp32 from the first product on.
int anello_add_product(const at::Tensor* place, const at::Tensor* a, const at::Tensor* b) {
    return guarded([&] {
        c10::AutoGradMode off(false);
        auto out = *place;
        at::addmm_out(out, *place, *a, *b, at::kFloat);
    });
}

// The vector-Jacobian product: gradients of `output` for `inputs`, from `of_output`, the gradient for it. The graph is gone afterwards.
int anello_vjp(
    const at::Tensor* output, const at::Tensor* of_output, at::Tensor* const* inputs, int64_t n_inputs, at::Tensor** out) {
    return guarded([&] {
        variable_list of;
        for (int64_t i = 0; i < n_inputs; ++i) {
            of.push_back(*inputs[i]);
        }
        auto found = torch::autograd::grad({*output}, of, {*of_output});
        for (int64_t i = 0; i < n_inputs; ++i) {
            out[i] = new at::Tensor(std::move(found[i]));
        }
    });
}

int anello_stream_new(int32_t device, int64_t* id) {
    return guarded([&] { *id = guard().getStreamFromGlobalPool(cuda(device), /*isHighPriority=*/true).id(); });
}

int anello_stream_current(int32_t device, int64_t* id) {
    return guarded([&] { *id = guard().getStream(cuda(device)).id(); });
}

// Makes a stream the current one of this thread; `previous` is the one before.
int anello_stream_exchange(int32_t device, int64_t id, int64_t* previous) {
    return guarded([&] { *previous = guard().exchangeStream(stream_of(device, id)).id(); });
}

// The stream as CUDA has it: a cudaStream_t.
int anello_stream_native(int32_t device, int64_t id, void** out) {
    return guarded([&] { *out = stream_of(device, id).native_handle(); });
}

int anello_stream_synchronize(int32_t device, int64_t id) {
    return guarded([&] { stream_of(device, id).synchronize(); });
}

int anello_device_exchange(int32_t device) {
    return guarded([&] { guard().setDevice(cuda(device)); });
}

// Of a `timed` one the time is known: `c10::Event::elapsedTime` takes two of these.
int anello_event_new(int32_t device, int64_t stream, int timed, void** out) {
    return guarded([&] {
        const auto flag = timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
        auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA, flag);
        event->record(stream_of(device, stream));
        *out = event.release();
    });
}

int anello_mark_until(void* begin, void* end, double* milliseconds) {
    return guarded([&] {
        *milliseconds = static_cast<c10::Event*>(begin)->elapsedTime(*static_cast<c10::Event*>(end));
    });
}

int anello_event_wait(void* event, int32_t device, int64_t stream) {
    return guarded([&] { static_cast<c10::Event*>(event)->block(stream_of(device, stream)); });
}

int anello_event_query(void* event, int* done) {
    return guarded([&] { *done = static_cast<c10::Event*>(event)->query() ? 1 : 0; });
}

void anello_event_free(void* event) {
    guarded([&] { delete static_cast<c10::Event*>(event); });
}

// Where graphs that are replayed in the order of their capture keep what they compute: two numbers.
int anello_graph_pool(uint64_t pool[2]) {
    return guarded([&] { std::tie(pool[0], pool[1]) = Graph::new_pool(); });
}

// Begins to capture what any thread puts into the stream that is current on this one, which must not be the default one.
int anello_graph_begin(int32_t device, const uint64_t pool[2], void** out) {
    return guarded([&] {
        c10::DeviceGuard on(cuda(device));
        auto graph = std::make_unique<Graph>();
        graph->begin({pool[0], pool[1]});
        *out = graph.release();
    });
}

int anello_graph_end(int32_t device, void* graph) {
    return guarded([&] {
        c10::DeviceGuard on(cuda(device));
        static_cast<Graph*>(graph)->end();
    });
}

// Puts all that was captured into the current stream.
int anello_graph_replay(int32_t device, void* graph) {
    return guarded([&] {
        c10::DeviceGuard on(cuda(device));
        static_cast<Graph*>(graph)->replay();
    });
}

void anello_graph_free(void* graph) {
    guarded([&] { delete static_cast<Graph*>(graph); });
}

// Gives the device the memory back that LibTorch has and nothing uses.
int anello_empty_cache() {
    return guarded([&] { at::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache(); });
}
}
