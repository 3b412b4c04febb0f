// Any processor: one set bit after the other.

#include <math.h>

#include "matrix.h"
#include "numbers.h"

namespace {

void quantize(const float* x, int64_t columns, int64_t groups, int bias, int8_t* q, float* scales, int32_t* corrections) {
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t used = columns - g * kGroup < kGroup ? columns - g * kGroup : kGroup;
    // The largest magnitude by its bits, in which a NaN is larger than every number.
    uint32_t largest = 0;
    for (int64_t c = 0; c < used; ++c) {
      const uint32_t bits = float_to_bits(x[g * kGroup + c]) & 0x7fffffff;
      if (bits > largest) largest = bits;
    }
    const float magnitude = bits_to_float(largest);
    const bool none = magnitude < 1e-30f;
    const float inverse = none ? 0.0f : 127.0f / magnitude;
    int32_t sum = 0;
    for (int64_t c = 0; c < kGroup; ++c) {
      const float scaled = c < used ? x[g * kGroup + c] * inverse : 0.0f;
      const int8_t rounded = scaled >= -127.5f && scaled <= 127.5f ? int8_t(nearbyintf(scaled)) : int8_t(0);
      q[g * kGroup + c] = rounded;
      sum += rounded;
    }
    scales[g] = none ? 0.0f : magnitude / 127.0f;
    corrections[g] = -bias * sum;
  }
}

template <int type>
inline float value_at(const uint8_t* values, int64_t index) {
  if constexpr (type == SD_F32) {
    float value;
    memcpy(&value, values + 4 * index, 4);
    return value;
  }
  uint16_t half;
  memcpy(&half, values + 2 * index, 2);
  return type == SD_F16 ? half_to_float(half) : bfloat_to_float(half);
}

template <int type>
void tile_product(const sd_matrix* m, int64_t tile, const uint8_t* row, const Activations& layout, float* sums) {
  constexpr int lane = lane_columns(type);
  const uint8_t* values = m->values + m->offsets[tile];
  for (int64_t g = 0; g < m->groups; ++g) {
    int32_t integers[kTileRows] = {};
    for (int w = 0; w < kWords; ++w) {
      uint64_t mask = m->masks ? m->masks[(tile * m->groups + g) * kWords + w] : ~uint64_t(0);
      int64_t index = 0;
      for (; mask; mask &= mask - 1, ++index) {
        const int bit = __builtin_ctzll(mask);
        const int r = bit / lane % kTileRows;
        const int64_t column = g * kGroup + 4 * w + bit / (lane * kTileRows) * lane + bit % lane;
        if constexpr (type >= SD_INT8) {
          int8_t weight;
          if (type == SD_INT8) weight = int8_t(values[index]);
          else weight = int8_t(uint8_t(index % 2 ? values[index / 2] & 0xf0 : values[index / 2] << 4)) >> 4;
          integers[r] += int32_t(weight) * reinterpret_cast<const int8_t*>(row)[column];
        } else {
          sums[r] += value_at<type>(values, index) * reinterpret_cast<const float*>(row)[column];
        }
      }
      values += (index * value_bits(type) + 7) / 8;
    }
    if constexpr (type >= SD_INT8) {
      const uint16_t* scales = m->scales + (tile * m->scale_groups + g * kGroup / m->scale_group) * kTileRows;
      const float x = reinterpret_cast<const float*>(row + layout.scales)[g];
      for (int r = 0; r < kTileRows; ++r) sums[r] += float(integers[r]) * (half_to_float(scales[r]) * x);
    }
  }
}

void matmul(const sd_matrix* m, const uint8_t* buffer, const Activations& layout, int64_t batch, int64_t first_tile,
            int64_t last_tile, float* out, int64_t out_stride) {
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t rows = m->rows - tile * kTileRows < kTileRows ? m->rows - tile * kTileRows : kTileRows;
    for (int64_t b = 0; b < batch; ++b) {
      float sums[kTileRows] = {};
      const uint8_t* row = buffer + b * layout.stride;
      switch (m->type) {
        case SD_F32: tile_product<SD_F32>(m, tile, row, layout, sums); break;
        case SD_BF16: tile_product<SD_BF16>(m, tile, row, layout, sums); break;
        case SD_F16: tile_product<SD_F16>(m, tile, row, layout, sums); break;
        case SD_INT8: tile_product<SD_INT8>(m, tile, row, layout, sums); break;
        default: tile_product<SD_INT4>(m, tile, row, layout, sums);
      }
      memcpy(out + b * out_stride + tile * kTileRows, sums, rows * sizeof(float));
    }
  }
}

const Kernels kernels{"portable", false, quantize, matmul};

}  // namespace

const Kernels* const kernels_portable = &kernels;
