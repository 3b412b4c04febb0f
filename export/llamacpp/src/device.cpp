// The registration with ggml, and the device that computes products where the CPU's graph cannot be joined.

#include <string.h>

#include <algorithm>

#include "backend.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml-version.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsedeploy {
namespace {

struct Stream {
  int threads = GGML_DEFAULT_N_THREADS;
  std::vector<char> scratch;
};

const char* name(ggml_backend_t) { return SPARSEDEPLOY_NAME; }

void release(ggml_backend_t backend) {
  delete static_cast<Stream*>(backend->context);
  delete backend;
}

#ifdef _OPENMP
void wait(void*) {
#pragma omp barrier
}
#else
void wait(void*) {}
#endif

ggml_status compute(ggml_backend_t backend, ggml_cgraph* graph) {
  Stream* stream = static_cast<Stream*>(backend->context);
  int threads = stream->threads;
#ifndef _OPENMP
  threads = 1;
#endif
  std::vector<ggml_tensor*> products;
  size_t needed = 0;
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->op != GGML_OP_MUL_MAT || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) continue;
    products.push_back(node);
    needed = std::max(needed, scratch_bytes(packed(node->src[0]), node, threads));
  }
  if (products.empty()) return GGML_STATUS_SUCCESS;
  if (stream->scratch.size() < needed) stream->scratch.resize(needed);
  // The CPU backend's threads, where it uses OpenMP too: both start them from the same caller.
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const Member member = {omp_get_thread_num(), omp_get_num_threads(), wait, nullptr};
#else
    const Member member = {0, 1, wait, nullptr};
#endif
    for (size_t i = 0; i < products.size(); ++i) {
      // One product may read another's output, and all share the scratch.
      if (i > 0) wait(nullptr);
      multiply(packed(products[i]->src[0]), products[i], member, stream->scratch.data());
    }
  }
  return GGML_STATUS_SUCCESS;
}

void set_threads(ggml_backend_t backend, int threads) { static_cast<Stream*>(backend->context)->threads = threads; }

ggml_backend_t start(ggml_backend_dev_t dev, const char*) {
  static ggml_guid guid = {0x5d, 0x1f, 0x8e, 0x0b, 0x43, 0x6c, 0x4a, 0x92, 0xb7, 0x30, 0x2c, 0xd9, 0x61, 0x84, 0xfa, 0x17};
  ggml_backend_t backend = new ggml_backend{};
  backend->guid = &guid;
  backend->device = dev;
  backend->context = new Stream;
  backend->iface.get_name = name;
  backend->iface.free = release;
  backend->iface.graph_compute = compute;
  // A context is made after the weights were loaded.
  report();
  return backend;
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
  if (in_cpu_graph() || op->op != GGML_OP_MUL_MAT || !is_ours(op->src[0]) || !can_multiply(op)) return false;
  const ggml_tensor* weights = op->src[0];
  return weights->data == nullptr || weights->buffer->size == 0 ? may_place(weights) : packed(weights) != nullptr;
}

void properties(ggml_backend_dev_t, ggml_backend_dev_props* props) {
  props->name = SPARSEDEPLOY_NAME;
  props->description = sd_isa_name();
  props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
  props->memory_free = props->memory_total = 0;
  props->caps = {};
  props->caps.mmap_support = true;
}

ggml_backend_reg_t registration() {
  static ggml_backend_reg made = [] {
    ggml_backend_reg value = {};
    value.api_version = GGML_BACKEND_API_VERSION;
    value.iface.get_name = [](ggml_backend_reg_t) { return SPARSEDEPLOY_NAME; };
    value.iface.get_device_count = [](ggml_backend_reg_t) { return size_t(1); };
    value.iface.get_device = [](ggml_backend_reg_t, size_t) { return device(); };
    value.iface.get_proc_address = [](ggml_backend_reg_t, const char* wanted) -> void* {
      return !strcmp(wanted, "ggml_backend_set_n_threads") ? reinterpret_cast<void*>(set_threads) : nullptr;
    };
    return value;
  }();
  return &made;
}

}  // namespace

ggml_backend_dev_t device() {
  static ggml_backend_device made = [] {
    ggml_backend_device value = {};
    value.iface.get_name = [](ggml_backend_dev_t) { return SPARSEDEPLOY_NAME; };
    value.iface.get_description = [](ggml_backend_dev_t) { return sd_isa_name(); };
    value.iface.get_memory = [](ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; };
    value.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; };
    value.iface.get_props = properties;
    value.iface.init_backend = start;
    value.iface.get_buffer_type = [](ggml_backend_dev_t) { return buffer_type(); };
    value.iface.supports_op = supports_op;
    value.iface.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
      return type == buffer_type() || ggml_backend_buft_is_host(type);
    };
    value.reg = registration();
    return value;
  }();
  return &made;
}

}  // namespace sparsedeploy

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
  using namespace sparsedeploy;
  if (sd_version() != SD_KERNELS_VERSION) {
    GGML_LOG_ERROR("sparsedeploy: the kernels have version %d, the backend needs %d; build both again\n", sd_version(),
                   SD_KERNELS_VERSION);
    return nullptr;
  }
  if (strcmp(ggml_version(), GGML_VERSION) != 0)
    // ggml itself refuses another API version, right after this.
    GGML_LOG_WARN("sparsedeploy: built for ggml %s (backend API %d), but this is ggml %s; if it is refused or slow, use the "
                  "llama.cpp of 'sparsedeploy runtime install llamacpp'\n",
                  GGML_VERSION, GGML_BACKEND_API_VERSION, ggml_version());
  join_cpu_graph();
  return registration();
}
