// A whole linear layer on OpenMP threads, with activations of 16 or 32 bits: for callers such as torch that have such
// threads already. Engines with threads of their own leave this file out.

#include <omp.h>
#include <stdlib.h>

#include "../src/numbers.h"
#include "sparsedeploy_kernels.h"

namespace {

uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // 0.5 has an ulp of 2^-24, which is the step of float16's smallest numbers.
  if (rest < 0x38800000) return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
  return uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// Loops that are compiled for AVX2 too, where the loader can choose one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define SD_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SD_CLONES
#endif

SD_CLONES void widen(const uint16_t* from, int type, int64_t count, float* to) {
  if (type == SD_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = bfloat_to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
}

SD_CLONES void narrow(const float* from, int type, int64_t count, uint16_t* to) {
  if (type == SD_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
}

SD_CLONES void add(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Memory that begins at a multiple of 64 and grows; each calling thread keeps its own.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;

  ~Buffer() { free(data); }

  bool reserve(size_t wanted) {
    if (wanted <= size) return true;
    free(data);
    size = (wanted + 4095) / 4096 * 4096;
    data = aligned_alloc(64, size);
    if (!data) size = 0;
    return data != nullptr;
  }
};

}  // namespace

extern "C" {

/* out[b, r] = sum over c of w[r, c] x[b, c] + bias[r]. x [batch, columns], bias [rows] (may be null) and out
 * [batch, rows] are of `dtype`: SD_F32, SD_BF16 or SD_F16; rows of x and out are x_stride and out_stride elements apart. */
SD_API int sd_linear(const sd_matrix* m, int dtype, const void* x, int64_t columns, int64_t x_stride, int64_t batch,
                     const void* bias, void* out, int64_t out_stride, int threads) {
  sd_info info;
  if (sd_describe(m, &info) != SD_OK || !x || !out || columns != info.columns || x_stride < columns || batch < 0 ||
      dtype < SD_F32 || dtype > SD_F16 || out_stride < info.rows || threads < 1)
    return SD_ERROR_ARGUMENT;
  static thread_local Buffer prepared_memory, wide_x_memory, wide_out_memory, wide_bias_memory;
  const bool wide = dtype == SD_F32;
  if (!prepared_memory.reserve(sd_activation_bytes(m, batch) + 64) ||
      (!wide && (!wide_x_memory.reserve(batch * columns * sizeof(float) + 64) ||
                 !wide_out_memory.reserve(batch * info.rows * sizeof(float) + 64) ||
                 !wide_bias_memory.reserve(info.rows * sizeof(float) + 64))))
    return SD_ERROR_MEMORY;
  // The threads below must not look at their own buffers.
  void* const prepared = prepared_memory.data;
  float* const wide_x = static_cast<float*>(wide_x_memory.data);
  float* const sums = wide ? static_cast<float*>(out) : static_cast<float*>(wide_out_memory.data);
  const int64_t stride = wide ? out_stride : info.rows;
  const float* wide_bias = static_cast<const float*>(bias);
  if (bias && !wide) {
    widen(static_cast<const uint16_t*>(bias), dtype, info.rows, static_cast<float*>(wide_bias_memory.data));
    wide_bias = static_cast<const float*>(wide_bias_memory.data);
  }

  const auto prepare = [&](int64_t first, int64_t last) {
    if (wide) return sd_prepare_activations(m, static_cast<const float*>(x), x_stride, batch, first, last, prepared);
    for (int64_t b = first; b < last; ++b)
      widen(static_cast<const uint16_t*>(x) + b * x_stride, dtype, columns, wide_x + b * columns);
    return sd_prepare_activations(m, wide_x, columns, batch, first, last, prepared);
  };
  const auto finish = [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < batch; ++b) {
      float* const row = sums + b * stride + first;
      if (bias) add(wide_bias + first, last - first, row);
      if (!wide) narrow(row, dtype, last - first, static_cast<uint16_t*>(out) + b * out_stride + first);
    }
  };

  int failed = SD_OK;
  // One row of x is prepared sooner than threads have met.
  const bool alone = batch < threads;
  if (alone) failed = prepare(0, batch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int index = omp_get_thread_num(), count = omp_get_num_threads();
    int status = SD_OK;
    if (!alone) {
      status = prepare(batch * index / count, batch * (index + 1) / count);
#pragma omp barrier
    }
    int64_t first, last;
    sd_share_rows(m, index, count, &first, &last);
    if (status == SD_OK) status = sd_matmul(m, prepared, batch, first, last, sums, stride);
    if (status == SD_OK) finish(first, last);
    if (status != SD_OK) {
#pragma omp atomic write
      failed = status;
    }
  }
  return failed;
}

}
