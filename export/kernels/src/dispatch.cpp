// The choice of the instruction set, and the checks in front of the kernels.

#include <stdio.h>
#include <stdlib.h>

#include <atomic>

#include "matrix.h"
#include "numbers.h"

namespace {

bool supported(int index) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
  switch (index) {
    case 1: return avx2;
    case 2: return avx2 && __builtin_cpu_supports("avxvnni");
    case 3: return avx512;
    case 4: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return index == 0;
}

constexpr int kCount = 5;

const Kernels* by_index(int index) {
  const Kernels* const all[kCount] = {kernels_portable, kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512bf16};
  return supported(index) ? all[index] : nullptr;
}

const Kernels* by_name(const char* name) {
  for (int index = 0; index < kCount; ++index) {
    const Kernels* kernels = by_index(index);
    if (kernels && !strcmp(kernels->name, name)) return kernels;
  }
  return nullptr;
}

// Intel's processors multiply pairs of bfloat16 at half their rate of float32, in products a second (measured on
// Sapphire Rapids): widened to float32, bfloat16 weights take half the time there, and activations need no rounding.
bool gains(int index) {
#if defined(__x86_64__) && defined(__GNUC__)
  return index != 4 || !__builtin_cpu_is("intel");
#endif
  return true;
}

const Kernels* choose() {
  const Kernels* best = kernels_portable;
  for (int index = kCount - 1; index > 0; --index) {
    if (by_index(index) && gains(index)) {
      best = by_index(index);
      break;
    }
  }
  const char* wanted = getenv("SPARSEDEPLOY_ISA");
  if (!wanted || !*wanted) return best;
  if (const Kernels* named = by_name(wanted)) return named;
  fprintf(stderr, "sparsedeploy: SPARSEDEPLOY_ISA=%s is unknown or not in this processor; using %s\n", wanted, best->name);
  return best;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* active() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels) return kernels;
  // Two threads may both choose: they choose the same.
  kernels = choose();
  const Kernels* expected = nullptr;
  chosen.compare_exchange_strong(expected, kernels);
  return expected ? expected : kernels;
}

Activations layout_of(const sd_matrix* m, const Kernels* kernels) {
  const size_t columns = size_t(m->groups) * kGroup;
  const bool integers = m->type == SD_INT8 || m->type == SD_INT4;
  const size_t size = integers ? 1 : m->type == SD_BF16 && kernels->bfloat_activations ? 2 : 4;
  Activations layout;
  layout.scales = (columns * size + 63) / 64 * 64;
  layout.corrections = layout.scales + (integers ? size_t(m->groups) * 4 : 0);
  // An odd number of cache lines: else the same column of many rows falls into the same few lines of the cache.
  layout.stride = ((layout.corrections + (integers ? size_t(m->groups) * 4 : 0) + 63) / 64 | 1) * 64;
  return layout;
}

}  // namespace

extern "C" {

int sd_version(void) { return SD_KERNELS_VERSION; }

const char* sd_status_text(int status) {
  switch (status) {
    case SD_OK: return "done";
    case SD_ERROR_ARGUMENT: return "a null pointer, or a size, type or share of rows that is not allowed";
    case SD_ERROR_MEMORY: return "out of memory";
    case SD_ERROR_SCALE: return "a scale is NaN or infinite";
    case SD_ERROR_FORMAT: return "mask, offsets and values disagree, or a value is out of range";
    case SD_ERROR_INEXACT: return "the blocks have no exact zero, so they cannot be packed bit for bit";
    case SD_ERROR_ISA: return "an instruction set that is unknown or not in this processor";
    default: return "unknown status";
  }
}

const char* sd_isa_name(void) { return active()->name; }

int sd_use_isa(const char* name) {
  const Kernels* kernels = name ? by_name(name) : nullptr;
  if (!kernels) return SD_ERROR_ISA;
  chosen.store(kernels, std::memory_order_release);
  return SD_OK;
}

size_t sd_activation_bytes(const sd_matrix* m, int64_t batch) {
  if (!m || batch < 0) return 0;
  return layout_of(m, active()).stride * size_t(batch);
}

int sd_prepare_activations(const sd_matrix* m, const float* x, int64_t row_stride, int64_t batch, int64_t first,
                           int64_t last, void* buffer) {
  if (!m || !x || !buffer || uintptr_t(buffer) % 64 || row_stride < m->columns || first < 0 || last < first || last > batch)
    return SD_ERROR_ARGUMENT;
  const Kernels* kernels = active();
  const Activations layout = layout_of(m, kernels);
  for (int64_t b = first; b < last; ++b) {
    uint8_t* row = static_cast<uint8_t*>(buffer) + b * layout.stride;
    const float* source = x + b * row_stride;
    if (m->type == SD_INT8 || m->type == SD_INT4) {
      kernels->quantize(source, m->columns, m->groups, bias_of(m->type), reinterpret_cast<int8_t*>(row),
                        reinterpret_cast<float*>(row + layout.scales), reinterpret_cast<int32_t*>(row + layout.corrections));
    } else if (m->type == SD_BF16 && kernels->bfloat_activations) {
      uint16_t* out = reinterpret_cast<uint16_t*>(row);
      for (int64_t c = 0; c < m->columns; ++c) out[c] = float_to_bfloat(source[c]);
      for (int64_t c = m->columns; c < m->groups * kGroup; ++c) out[c] = 0;
    } else {
      memcpy(row, source, m->columns * sizeof(float));
      memset(row + m->columns * sizeof(float), 0, (m->groups * kGroup - m->columns) * sizeof(float));
    }
  }
  return SD_OK;
}

int sd_matmul(const sd_matrix* m, const void* buffer, int64_t batch, int64_t first, int64_t last, float* out,
              int64_t out_stride) {
  if (!m || !buffer || !out || batch < 0 || first < 0 || last > m->rows || first > last || first % kTileRows ||
      (last % kTileRows && last != m->rows) || out_stride < m->rows || uintptr_t(buffer) % 64)
    return SD_ERROR_ARGUMENT;
  if (first == last || batch == 0) return SD_OK;
  const Kernels* kernels = active();
  kernels->matmul(m, static_cast<const uint8_t*>(buffer), layout_of(m, kernels), batch, first / kTileRows,
                  (last + kTileRows - 1) / kTileRows, out, out_stride);
  return SD_OK;
}

void sd_share_rows(const sd_matrix* m, int index, int count, int64_t* first, int64_t* last) {
  *first = m->tiles * index / count * kTileRows;
  *last = m->tiles * (index + 1) / count * kTileRows;
  if (*first > m->rows) *first = m->rows;
  if (*last > m->rows) *last = m->rows;
}

}
