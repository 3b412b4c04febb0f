// Products in the CPU backend's own graph, through the hook for repacked weights (ggml-cpu/traits.h).
//
// The hook's functions are looked up by name, so that the library also loads where ggml hides them.

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "ggml-backend.h"
#include "ggml-cpu/ggml-cpu-impl.h"
#include "ggml-cpu/traits.h"
#include "ggml-impl.h"
#include "ggml-version.h"

// The bases' destructors, for this library alone: it must not need ggml-cpu's own to load.
namespace ggml::cpu {
tensor_traits::~tensor_traits() {}
extra_buffer_type::~extra_buffer_type() {}
}  // namespace ggml::cpu

namespace sparsedeploy {
namespace {

Hooks found = {};
bool joined = false;

void wait(void* pool) { found.barrier(static_cast<ggml_threadpool*>(pool)); }

class Traits : public ggml::cpu::tensor_traits {
  bool work_size(int threads, const ggml_tensor* op, size_t& size) override {
    size = scratch_bytes(packed(op->src[0]), op, threads);
    return true;
  }

  bool compute_forward(ggml_compute_params* parameters, ggml_tensor* op) override {
    multiply(packed(op->src[0]), op, {parameters->ith, parameters->nth, wait, parameters->threadpool}, parameters->wdata);
    return true;
  }
};

class Extra : public ggml::cpu::extra_buffer_type {
  // Asked about operations with a tensor in one of our buffers: before the weights are read, and for each graph.
  bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) override {
    for (const ggml_tensor* source : op->src) {
      if (!source || !is_ours(source)) continue;
      // Not read yet: whatever is not packed then is moved to where the CPU backend can use it.
      if (source->data == nullptr || source->buffer->size == 0)
        return op->op == GGML_OP_MUL_MAT && source == op->src[0] && may_place(source);
      return source == op->src[0] && can_multiply(op) && packed(source) != nullptr;
    }
    return false;
  }

  ggml::cpu::tensor_traits* get_tensor_traits(const ggml_tensor* op) override {
    if (op->op != GGML_OP_MUL_MAT || !is_ours(op->src[0])) return nullptr;
    return &traits;
  }

  Traits traits;
};

void* look_up(const char* name) {
  if (void* symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  for (const char* library : {"libggml-cpu.so.0", "libggml-cpu.so"}) {
    // Already loaded, but not visible to all: opened again only if it is there.
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (void* symbol = handle ? dlsym(handle, name) : nullptr) return symbol;
  }
  return nullptr;
}

}  // namespace

bool join_cpu_graph() {
  if (joined) return true;
  const char* mode = getenv("SPARSEDEPLOY_LLAMACPP");
  if (mode && !strcmp(mode, "device")) return false;
  if (strcmp(ggml_version(), GGML_VERSION) != 0 || strcmp(ggml_commit(), GGML_COMMIT) != 0)
    return false;
  // std::vector<ggml_backend_buffer_type_t>& ggml_backend_cpu_get_extra_buffer_types()
  found.extra_buffer_types = reinterpret_cast<decltype(found.extra_buffer_types)>(
      look_up("_Z39ggml_backend_cpu_get_extra_buffer_typesv"));
  found.barrier = reinterpret_cast<decltype(found.barrier)>(look_up("ggml_barrier"));
  if (!found.extra_buffer_types || !found.barrier) return false;
  joined = true;
  // First, so that it is asked before the type that repacks dense Q4_0.
  auto& types = found.extra_buffer_types();
  types.insert(types.begin(), buffer_type());
  return true;
}

bool in_cpu_graph() { return joined; }

const Hooks& hooks() { return found; }

void* extra_buffer_context() {
  static Extra extra;
  return static_cast<ggml::cpu::extra_buffer_type*>(&extra);
}

}  // namespace sparsedeploy
