// Which tensors are packed, and what is said about the others.

#include <stdlib.h>
#include <string.h>

#include <set>
#include <string>
#include <thread>

#include "backend.h"
#include "ggml-impl.h"

namespace sparsedeploy {
namespace {

enum class Policy { measured, always, never };

void say_once(const std::string& topic, const std::string& text) {
  static std::set<std::string> said;
  if (said.insert(topic).second) GGML_LOG_WARN("sparsedeploy: %s\n", text.c_str());
}

// SPARSEDEPLOY_PACK, read for each tensor: only while weights are loaded.
Policy policy() {
  const char* text = getenv("SPARSEDEPLOY_PACK");
  if (!text || !*text || !strcmp(text, "auto")) return Policy::measured;
  if (!strcmp(text, "always")) return Policy::always;
  if (!strcmp(text, "never")) return Policy::never;
  say_once("policy", std::string("SPARSEDEPLOY_PACK=") + text + " is unknown (auto, always, never); using auto");
  return Policy::measured;
}

// The share of zeros from which weights are packed; 1 means never. First estimates from the bytes that a product reads,
// still to be set from measured crossings: whole models were measured at 50 % and 70 % only.
double least_zeros(ggml_type type) {
  const char* isa = sd_isa_name();
  if (!strcmp(isa, "portable")) return 1.0;
  const bool avx512 = !strncmp(isa, "avx512", 6);
  switch (type) {
    case GGML_TYPE_Q8_0: return avx512 ? 0.30 : 0.60;
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q4_1: return avx512 ? 0.45 : 0.75;
    default: return avx512 ? 0.30 : 0.45;
  }
}

bool packable_type(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q4_1: return true;
    default: return false;
  }
}

struct Totals {
  int packed, dense;
  double dense_bytes, packed_bytes;
};
Totals totals;

}  // namespace

bool is_layer_matrix(const ggml_tensor* weights) {
  // The embedding and the head are not pruned, and a tied one would be held twice.
  return !strncmp(weights->name, "blk.", 4) && ggml_n_dims(weights) == 2 && !weights->view_src &&
         ggml_is_contiguous(weights);
}

bool may_pack(const ggml_tensor* weights) {
  if (!is_layer_matrix(weights) || policy() == Policy::never) return false;
  if (!packable_type(weights->type)) {
    const std::string type = ggml_type_name(weights->type);
    // Norms and biases have one dimension: what comes here is a weight that could have been sparse.
    say_once("type " + type, "tensors of type " + type +
                                 " are left to llama.cpp; packed are F32, F16, BF16, Q8_0, Q4_0 and Q4_1");
    return false;
  }
  if (policy() == Policy::measured && least_zeros(weights->type) >= 1.0) {
    say_once("isa", std::string("this processor has none of the instructions that sparse weights need (AVX2 or AVX-512; found: ") +
                        sd_isa_name() + "); all weights stay dense");
    return false;
  }
  return true;
}

sd_matrix* pack(const ggml_tensor* weights, const void* data) {
  if (!may_pack(weights)) return nullptr;
  const unsigned cores = std::thread::hardware_concurrency();
  sd_matrix* matrix = nullptr;
  const int status = sd_pack_gguf(weights->type, data, weights->nb[1], weights->ne[1], weights->ne[0],
                                  cores ? int(cores) : 1, &matrix);
  totals.dense += 1;
  if (status != SD_OK) {
    say_once(std::string("status ") + sd_status_text(status),
             std::string(weights->name) + " stays dense: " + sd_status_text(status));
    return nullptr;
  }
  sd_info info;
  sd_describe(matrix, &info);
  const double zeros = 1.0 - double(info.values) / (double(info.rows) * double(info.columns));
  if (policy() == Policy::measured && zeros < least_zeros(weights->type)) {
    sd_free(matrix);
    return nullptr;
  }
  totals.dense -= 1;
  totals.packed += 1;
  totals.dense_bytes += double(ggml_nbytes(weights));
  totals.packed_bytes += double(info.bytes);
  return matrix;
}

void report() {
  if (!totals.packed && !totals.dense) return;
  GGML_LOG_INFO("sparsedeploy: packed %d tensors, %.1f MiB instead of %.1f MiB; %d stay dense (%s, %s)\n", totals.packed,
                totals.packed_bytes / 1048576.0, totals.dense_bytes / 1048576.0, totals.dense, sd_isa_name(),
                in_cpu_graph() ? "in the CPU backend's graph" : "as a device");
  totals = {};
}

}  // namespace sparsedeploy
