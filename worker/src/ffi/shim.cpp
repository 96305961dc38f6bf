// What LibTorch offers in C++ and tch does not wrap: the switches of its arithmetic, streams, events, pinned memory.
// It needs no header of CUDA: c10's guard finds the implementation that libtorch_cuda.so registers when it is loaded.
//
// Every function returns 0, or -1 with its reason in anello_error(). No exception passes.

#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

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

int anello_event_new(int32_t device, int64_t stream, void** out) {
    return guarded([&] {
        auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
        event->record(stream_of(device, stream));
        *out = event.release();
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
}
