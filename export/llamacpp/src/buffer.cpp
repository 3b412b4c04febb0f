// The buffer type that packs weights as they are loaded.
//
// In the CPU backend's graph a buffer is only an address range that cannot be touched: every tensor is either packed or
// moved to where llama.cpp would have put it. As a device, a buffer is host memory, reserved in full and touched only
// where a tensor stays dense; the loader may write it directly, and then it is packed when it is first asked for.

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <unordered_map>

#include "backend.h"
#include "ggml-backend.h"
#include "ggml-cpu/traits.h"
#include "ggml-impl.h"

namespace sparsedeploy {
namespace {

struct Buffer {
  char* base = nullptr;
  size_t size = 0;
  // First byte of a tensor -> its packed form, or null where it was looked at and stays dense.
  std::unordered_map<const void*, sd_matrix*> weights;
  // What holds the tensors that were moved.
  std::vector<ggml_backend_buffer_t> homes;
};

Buffer* buffer_of(ggml_backend_buffer_t buffer) { return static_cast<Buffer*>(buffer->context); }

void release(ggml_backend_buffer_t buffer) {
  Buffer* own = buffer_of(buffer);
  for (auto& [data, matrix] : own->weights) sd_free(matrix);
  for (ggml_backend_buffer_t home : own->homes) ggml_backend_buffer_free(home);
  if (own->base) munmap(own->base, own->size);
  delete own;
}

void* base(ggml_backend_buffer_t buffer) { return buffer_of(buffer)->base; }

// Give a tensor's pages back: whole ones only.
void forget(const ggml_tensor* tensor) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t first = (reinterpret_cast<size_t>(tensor->data) + page - 1) / page * page;
  const size_t last = (reinterpret_cast<size_t>(tensor->data) + ggml_nbytes(tensor)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// Where llama.cpp puts these weights without us: the first of the CPU's buffer types for repacked weights that takes
// them, else the plain one.
ggml_backend_buffer_type_t other_home(ggml_tensor* weights) {
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const ggml_init_params parameters = {4 * ggml_tensor_overhead(), nullptr, true};
  ggml_context* context = ggml_init(parameters);
  ggml_tensor* copy = ggml_dup_tensor(context, weights);
  ggml_tensor* product = nullptr;
  if (ggml_n_dims(weights) == 2)
    product = ggml_mul_mat(context, copy, ggml_new_tensor_2d(context, GGML_TYPE_F32, weights->ne[0], 1));
  ggml_backend_buffer_type_t home = ggml_backend_dev_buffer_type(cpu);
  for (ggml_backend_buffer_type_t type : hooks().extra_buffer_types()) {
    if (!product || type == buffer_type()) continue;
    copy->buffer = ggml_backend_buft_alloc_buffer(type, 0);
    const bool takes = ggml_backend_dev_supports_op(cpu, product);
    ggml_backend_buffer_free(copy->buffer);
    if (takes) {
      home = type;
      break;
    }
  }
  ggml_free(context);
  return home;
}

// Move a tensor that stays dense out of our buffer.
void move_out(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data) {
  ggml_backend_buffer_type_t type = other_home(tensor);
  ggml_backend_buffer_t home = ggml_backend_buft_alloc_buffer(type, ggml_backend_buft_get_alloc_size(type, tensor));
  if (!home) GGML_ABORT("sparsedeploy: out of memory for %s", tensor->name);
  buffer_of(buffer)->homes.push_back(home);
  ggml_backend_buffer_set_usage(home, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  tensor->buffer = nullptr;
  tensor->data = nullptr;
  tensor->extra = nullptr;
  ggml_backend_tensor_alloc(home, tensor, ggml_backend_buffer_get_base(home));
  ggml_backend_tensor_set(tensor, data, 0, ggml_nbytes(tensor));
}

void set(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
  const bool whole = offset == 0 && size == ggml_nbytes(tensor);
  Buffer* own = buffer_of(buffer);
  if (in_cpu_graph()) {
    if (!whole) GGML_ABORT("sparsedeploy: %s was written in parts", tensor->name);
    sd_matrix* matrix = pack(tensor, data);
    if (matrix) {
      own->weights[tensor->data] = matrix;
      tensor->extra = matrix;
    } else {
      move_out(buffer, tensor, data);
    }
    return;
  }
  if (whole && buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && may_pack(tensor)) {
    sd_matrix* matrix = pack(tensor, data);
    own->weights[tensor->data] = matrix;
    if (matrix) return;
  } else if (own->weights.count(tensor->data) && own->weights[tensor->data]) {
    GGML_ABORT("sparsedeploy: %s is packed and cannot be written in parts", tensor->name);
  }
  memcpy(static_cast<char*>(tensor->data) + offset, data, size);
}

void get(ggml_backend_buffer_t buffer, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
  const auto found = buffer_of(buffer)->weights.find(tensor->data);
  if (in_cpu_graph() || (found != buffer_of(buffer)->weights.end() && found->second))
    GGML_ABORT("sparsedeploy: %s is packed; its dense form is no longer there", tensor->name);
  memcpy(data, static_cast<const char*>(tensor->data) + offset, size);
}

void fill(ggml_backend_buffer_t, ggml_tensor* tensor, uint8_t value, size_t offset, size_t size) {
  if (in_cpu_graph()) GGML_ABORT("sparsedeploy: %s cannot be filled", tensor->name);
  memset(static_cast<char*>(tensor->data) + offset, value, size);
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
  if (!in_cpu_graph() && buffer_of(buffer)->base) memset(buffer_of(buffer)->base, value, buffer_of(buffer)->size);
}

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
  Buffer* own = new Buffer;
  if (size > 0) {
    const int access = in_cpu_graph() ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* memory = mmap(nullptr, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      GGML_LOG_ERROR("sparsedeploy: cannot reserve %zu bytes\n", size);
      delete own;
      return nullptr;
    }
    own->base = static_cast<char*>(memory);
    own->size = size;
  }
  ggml_backend_buffer_i interface = {};
  interface.free_buffer = release;
  interface.get_base = base;
  interface.memset_tensor = fill;
  interface.set_tensor = set;
  interface.get_tensor = get;
  interface.clear = clear;
  return ggml_backend_buffer_init(type, interface, own, size);
}

}  // namespace

ggml_backend_buffer_type_t buffer_type() {
  static ggml_backend_buffer_type type = [] {
    ggml_backend_buffer_type made = {};
    made.iface.get_name = [](ggml_backend_buffer_type_t) { return SPARSEDEPLOY_NAME; };
    made.iface.alloc_buffer = allocate;
    made.iface.get_alignment = [](ggml_backend_buffer_type_t) { return size_t(64); };
    // Host memory for a device: else activations are copied at each split. In the CPU's graph nothing reads it.
    made.iface.is_host = [](ggml_backend_buffer_type_t) { return !in_cpu_graph(); };
    made.device = device();
    made.context = extra_buffer_context();
    return made;
  }();
  return &type;
}

bool is_ours(const ggml_tensor* tensor) { return tensor->buffer && tensor->buffer->buft == buffer_type(); }

const sd_matrix* packed(const ggml_tensor* weights) {
  if (in_cpu_graph()) return static_cast<const sd_matrix*>(weights->extra);
  Buffer* own = buffer_of(weights->buffer);
  const auto found = own->weights.find(weights->data);
  if (found != own->weights.end()) return found->second;
  if (weights->buffer->usage != GGML_BACKEND_BUFFER_USAGE_WEIGHTS || weights->op != GGML_OP_NONE) return nullptr;
  sd_matrix* matrix = pack(weights, weights->data);
  own->weights[weights->data] = matrix;
  if (matrix) forget(weights);
  return matrix;
}

}  // namespace sparsedeploy
