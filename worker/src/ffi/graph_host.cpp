// Graphs on a CPU, for tests: every operation that LibTorch comes to is written down with its arguments, and a replay carries
// it out again on the same memory. So what a graph of a GPU keeps is kept here (numbers that the host gave, shapes, places),
// and what it reads anew is read anew.
//
// The operations are seen below autograd, where those of a forward and of a backward look the same, by a fallback of the
// dispatch key that LibTorch leaves to others.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace {

using Stack = torch::jit::Stack;
constexpr auto KEY = c10::DispatchKey::Fake;

struct Call {
    c10::OperatorHandle op;
    Stack inputs;
    std::vector<at::Tensor> outputs;
};

struct Graph {
    uint64_t pool;
    std::vector<Call> calls;
    // Memory that the capture itself made, which nobody else knows.
    std::set<const void*> own;
    // What was written to beside that: how it was before, since a capture does nothing.
    std::map<const void*, std::pair<c10::Storage, std::vector<char>>> before;
};

thread_local Graph* capturing = nullptr;
thread_local uint64_t replays = 0;
std::atomic<uint64_t> pools = 0;
// Graphs of each pool that there are.
thread_local std::map<uint64_t, int64_t> used;

void each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& see) {
    if (value.isTensor()) {
        if (value.toTensor().defined()) {
            see(value.toTensor());
        }
    } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) {
            see(tensor);
        }
    }
}

void write_down(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto& schema = op.schema();
    const auto inputs = schema.arguments().size();
    Call call{op, Stack(stack->end() - static_cast<std::ptrdiff_t>(inputs), stack->end()), {}};
    std::set<const void*> known;
    for (size_t i = 0; i < inputs; ++i) {
        const auto* alias = schema.arguments()[i].alias_info();
        each_tensor(call.inputs[i], [&](const at::Tensor& tensor) {
            const auto& storage = tensor.storage();
            known.insert(storage.data());
            if (alias && alias->isWrite() && !capturing->own.count(storage.data()) && !capturing->before.count(storage.data())) {
                const char* bytes = static_cast<const char*>(storage.data());
                capturing->before.emplace(storage.data(), std::pair(storage, std::vector<char>(bytes, bytes + storage.nbytes())));
            }
        });
    }
    {
        c10::impl::ExcludeDispatchKeyGuard within(KEY);
        op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, KEY), stack);
    }
    for (auto at = stack->end() - static_cast<std::ptrdiff_t>(schema.returns().size()); at != stack->end(); ++at) {
        each_tensor(*at, [&](const at::Tensor& tensor) {
            call.outputs.push_back(tensor);
            if (!known.count(tensor.storage().data())) {
                capturing->own.insert(tensor.storage().data());
            }
        });
    }
    capturing->calls.push_back(std::move(call));
}

void carry_out(const Call& call) {
    Stack stack = call.inputs;
    const size_t n = call.op.schema().returns().size();
    call.op.callBoxed(&stack);
    auto recorded = call.outputs.begin();
    for (auto at = stack.end() - static_cast<std::ptrdiff_t>(n); at != stack.end(); ++at) {
        each_tensor(*at, [&](const at::Tensor& tensor) {
            const at::Tensor& place = *recorded++;
            // A view, or what it was given to write to, is there already.
            if (tensor.storage().data() != place.storage().data()) {
                place.copy_(tensor);
            }
        });
    }
}

template <typename Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "graph_host.cpp: %s\n", error.what());
    }
    return -1;
}

void capture(bool on) { c10::impl::tls_set_dispatch_key_included(KEY, on); }

TORCH_LIBRARY_IMPL(_, Fake, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&write_down>()); }

}  // namespace

extern "C" {

int anello_host_graph_pool(uint64_t pool[2]) {
    pool[0] = 0;
    pool[1] = ++pools;
    return 0;
}

int anello_host_graph_empty_cache() { return 0; }

int anello_host_graph_begin(int32_t, const uint64_t pool[2], void** out) {
    return guarded([&] {
        const auto of = used.find(pool[1]);
        if (of != used.end() && of->second == 0) {
            throw std::runtime_error("this pool's last graph is gone");
        }
        if (capturing) {
            throw std::runtime_error("a graph is being captured already");
        }
        capturing = new Graph;
        capturing->pool = pool[1];
        ++used[pool[1]];
        capture(true);
        *out = capturing;
    });
}

int anello_host_graph_end(int32_t, void* graph) {
    return guarded([&] {
        if (graph != capturing) {
            throw std::runtime_error("another graph is being captured");
        }
        capture(false);
        capturing = nullptr;
        for (auto& [data, kept] : static_cast<Graph*>(graph)->before) {
            std::memcpy(kept.first.mutable_data(), kept.second.data(), kept.second.size());
        }
        static_cast<Graph*>(graph)->before.clear();
    });
}

int anello_host_graph_replay(int32_t, void* graph) {
    return guarded([&] {
        c10::AutoGradMode off(false);
        ++replays;
        for (const Call& call : static_cast<Graph*>(graph)->calls) {
            carry_out(call);
        }
    });
}

void anello_host_graph_free(void* graph) {
    --used[static_cast<Graph*>(graph)->pool];
    delete static_cast<Graph*>(graph);
}

// Graphs that this thread has replayed.
uint64_t anello_host_graph_replays() { return replays; }
}
