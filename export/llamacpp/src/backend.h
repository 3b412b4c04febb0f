// Sparse weights in llama.cpp: what the files of this backend share.
//
// Weights are packed as they are loaded. Products run in one of two ways:
// - in the CPU backend's own graph, by its own threads (no graph split), through the hook that ggml has for repacked
//   weights. That hook is not a part of ggml's public interface, so it is used only in the ggml this was built against;
// - else as a device of type ACCEL, as BLAS is one. Each product is then a graph split.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "sparsedeploy_kernels.h"

// The name to give to llama.cpp's --override-tensor.
#define SPARSEDEPLOY_NAME "SPARSEDEPLOY"

namespace sparsedeploy {

struct Hooks {
  std::vector<ggml_backend_buffer_type_t>& (*extra_buffer_types)();
  void (*barrier)(struct ggml_threadpool* pool);
};

// One thread of those that compute a product together.
struct Member {
  int index, count;
  void (*barrier)(void* context);
  void* context;
};

// choice.cpp: which tensors are packed.

// Whether these may be placed in our buffers, before they are read: a decoder layer's matrix, or a head that gains by being
// repacked. Of those, what is not packed then is moved out.
bool may_place(const ggml_tensor* weights);
// Whether weights of this name, shape and type may be packed, by what is known before they are read.
bool may_pack(const ggml_tensor* weights);
// The packed tensor, or null where it is to stay dense: a type or values that cannot be packed bit for bit, or no gain.
// `data` is the tensor's dense content.
sd_matrix* pack(const ggml_tensor* weights, const void* data);
// Says what was packed since the last call, in one line.
void report();

// buffer.cpp: where they are.

ggml_backend_buffer_type_t buffer_type();
bool is_ours(const ggml_tensor* tensor);
// The packed form of a tensor in one of our buffers, or null. Packs it now if the loader wrote it straight to memory.
const sd_matrix* packed(const ggml_tensor* weights);

// product.cpp

size_t scratch_bytes(const sd_matrix* matrix, const ggml_tensor* op, int threads);
// One member's part of a MUL_MAT; `scratch` is shared by all.
void multiply(const sd_matrix* matrix, ggml_tensor* op, const Member& member, void* scratch);
// Whether `multiply` can do this MUL_MAT.
bool can_multiply(const ggml_tensor* op);

// graph.cpp

// Join the CPU backend's graph; false where this ggml is another one or does not show its hook.
bool join_cpu_graph();
// Whether products run in the CPU backend's graph.
bool in_cpu_graph();
const Hooks& hooks();
// graph.cpp: the object that ggml-cpu asks about tensors in our buffers.
void* extra_buffer_context();

// device.cpp

ggml_backend_dev_t device();

}  // namespace sparsedeploy
