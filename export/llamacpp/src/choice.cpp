// Which tensors are packed, and what is said about the others.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
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

// For a type: the share of zeros from which a decoder layer's weights are packed (1 means never), and whether those with
// fewer zeros, and the head, are repacked into tiles without masks.
struct Rule {
  double least_zeros;
  bool full;
};

// Without a measurement on this machine: what `after_install.py` measures with AVX-512, and with both sides kept to AVX2,
// rounded up.
Rule usual_rule(ggml_type type) {
  const char* isa = sd_isa_name();
  if (!strcmp(isa, "portable")) return {1.0, false};
  const bool avx512 = !strncmp(isa, "avx512", 6);
  switch (type) {
    case GGML_TYPE_Q8_0: return {0.20, true};
    // Of four bits AVX2 unpacks a mask more slowly than it reads the zeros.
    case GGML_TYPE_Q4_0: return avx512 ? Rule{0.30, true} : Rule{1.0, true};
    default: return {0.30, true};
  }
}

// What was measured on this machine: the file choice.txt beside this library, one line for each type. Rules of another
// instruction set than the one in use would be wrong.
std::map<std::string, Rule> read_rules() {
  std::map<std::string, Rule> rules;
  Dl_info library;
  if (getenv("SPARSEDEPLOY_ISA") || !dladdr(reinterpret_cast<const void*>(&read_rules), &library)) return rules;
  const std::string own = library.dli_fname;
  const std::string path = own.substr(0, own.find_last_of('/') + 1) + "choice.txt";
  FILE* file = fopen(path.c_str(), "r");
  if (!file) return rules;
  char line[256], type[32];
  while (fgets(line, sizeof line, file)) {
    double least_zeros;
    int full;
    if (line[0] == '#') continue;
    if (sscanf(line, "%31s %lf %d", type, &least_zeros, &full) == 3 && least_zeros > 0 && least_zeros <= 1) {
      rules[type] = {least_zeros, full != 0};
    } else {
      say_once("rules", path + " is damaged and not used; delete it and run: sparsedeploy runtime install llamacpp");
      rules.clear();
      break;
    }
  }
  fclose(file);
  return rules;
}

Rule rule(ggml_type type) {
  static const std::map<std::string, Rule> measured = read_rules();
  // The kernel is the same.
  if (type == GGML_TYPE_Q4_1) type = GGML_TYPE_Q4_0;
  const auto found = measured.find(ggml_type_name(type));
  return found == measured.end() ? usual_rule(type) : found->second;
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

bool is_plain_matrix(const ggml_tensor* weights) {
  return ggml_n_dims(weights) == 2 && !weights->view_src && ggml_is_contiguous(weights);
}

bool is_layer_matrix(const ggml_tensor* weights) { return !strncmp(weights->name, "blk.", 4) && is_plain_matrix(weights); }

// The embedding, where it is the head too, is asked for a second time, as a factor.
bool is_head(const ggml_tensor* weights) {
  return (!strcmp(weights->name, "output.weight") || !strcmp(weights->name, "token_embd.weight")) && is_plain_matrix(weights);
}

bool may_be_full(ggml_type type) {
  // Q4_1 has an exact zero or not, block by block, and a head that was placed with us must be taken.
  return type != GGML_TYPE_Q4_1 && (policy() == Policy::always || rule(type).full);
}

// The share of zeros, on at most some hundred rows spread evenly; less than 0 for a type whose zeros cannot be seen.
double share_of_zeros(const ggml_tensor* weights, const void* data) {
  const int64_t rows = weights->ne[1], columns = weights->ne[0], step = rows / 256 + 1;
  int64_t zeros = 0, seen = 0;
  for (int64_t r = 0; r < rows; r += step, seen += columns) {
    const uint8_t* row = static_cast<const uint8_t*>(data) + r * weights->nb[1];
    switch (weights->type) {
      case GGML_TYPE_F32: {
        const float* values = reinterpret_cast<const float*>(row);
        for (int64_t c = 0; c < columns; ++c) zeros += values[c] == 0.0f;
        break;
      }
      case GGML_TYPE_F16:
      case GGML_TYPE_BF16: {
        const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
        for (int64_t c = 0; c < columns; ++c) zeros += (bits[c] & 0x7fff) == 0;
        break;
      }
      case GGML_TYPE_Q8_0:
        for (int64_t block = 0; block < columns / 32; ++block)
          for (int i = 0; i < 32; ++i) zeros += row[34 * block + 2 + i] == 0;
        break;
      case GGML_TYPE_Q4_0:
        for (int64_t block = 0; block < columns / 32; ++block)
          for (int i = 0; i < 16; ++i) zeros += ((row[18 * block + 2 + i] & 0xf) == 8) + (row[18 * block + 2 + i] >> 4 == 8);
        break;
      default: return -1;
    }
  }
  return double(zeros) / double(seen);
}

struct Totals {
  int packed, full, dense;
  double dense_bytes, packed_bytes;
};
Totals totals;

}  // namespace

bool may_place(const ggml_tensor* weights) {
  return is_layer_matrix(weights) ||
         (is_head(weights) && packable_type(weights->type) && policy() != Policy::never && may_be_full(weights->type));
}

bool may_pack(const ggml_tensor* weights) {
  if (policy() == Policy::never || !(is_layer_matrix(weights) || is_head(weights))) return false;
  if (!packable_type(weights->type)) {
    const std::string type = ggml_type_name(weights->type);
    // Norms and biases have one dimension: what comes here is a weight that could have been sparse.
    say_once("type " + type, "tensors of type " + type +
                                 " are left to llama.cpp; packed are F32, F16, BF16, Q8_0, Q4_0 and Q4_1");
    return false;
  }
  if (policy() == Policy::measured && rule(weights->type).least_zeros >= 1.0 && !rule(weights->type).full) {
    say_once("isa", std::string("packed weights gain nothing on this processor (instructions: ") + sd_isa_name() +
                        "); they stay dense");
    return false;
  }
  return true;
}

sd_matrix* pack(const ggml_tensor* weights, const void* data) {
  if (!may_pack(weights)) return nullptr;
  const unsigned cores = std::thread::hardware_concurrency();
  const auto by = [&](auto function, sd_matrix** matrix) {
    return function(weights->type, data, weights->nb[1], weights->ne[1], weights->ne[0], cores ? int(cores) : 1, matrix);
  };
  sd_matrix* matrix = nullptr;
  int status = SD_OK;
  const double least = policy() == Policy::always ? 0.0 : rule(weights->type).least_zeros;
  const double seen = share_of_zeros(weights, data);
  if (is_layer_matrix(weights) && (seen < 0 || seen >= least)) {
    status = by(sd_pack_gguf, &matrix);
    if (status == SD_OK) {
      sd_info info;
      sd_describe(matrix, &info);
      if (1.0 - double(info.values) / (double(info.rows) * double(info.columns)) >= least || seen >= 0) {
        totals.packed += 1;
        totals.dense_bytes += double(ggml_nbytes(weights));
        totals.packed_bytes += double(info.bytes);
        return matrix;
      }
      sd_free(matrix);
      matrix = nullptr;
    }
  }
  if (status == SD_OK && may_be_full(weights->type)) status = by(sd_pack_gguf_full, &matrix);
  if (status != SD_OK)
    say_once(std::string("status ") + sd_status_text(status),
             std::string(weights->name) + " stays dense: " + sd_status_text(status));
  (matrix ? totals.full : totals.dense) += 1;
  return matrix;
}

void report() {
  if (!totals.packed && !totals.full && !totals.dense) return;
  GGML_LOG_INFO("sparsedeploy: packed %d tensors, %.1f MiB instead of %.1f MiB; %d repacked without masks, %d stay dense (%s, %s)\n",
                totals.packed, totals.packed_bytes / 1048576.0, totals.dense_bytes / 1048576.0, totals.full, totals.dense,
                sd_isa_name(), in_cpu_graph() ? "in the CPU backend's graph" : "as a device");
  totals = {};
}

}  // namespace sparsedeploy
