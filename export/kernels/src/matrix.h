// What the instruction sets share: the matrix in memory and the table of functions that each of them fills.
//
// Rows come in tiles of 16, columns in groups of 32. A mask word has 64 bits for 16 rows and 4 columns. Within a word the
// weights are ordered so that one vector of 16 lanes has one lane for each row: columns come in chunks of `lane_columns`
// (4 for int8 and int4, 2 for bfloat16, 1 for the others), bit = chunk * 16 * lane_columns + row * lane_columns + column
// in the chunk. Values follow in the order of their bits. A product so needs no sums across lanes, whatever the batch.
//
// int4 values are two to a byte, the first in the low half; each word begins at a byte.
//
// A full matrix keeps every weight of its tiles, and has no masks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "sparsedeploy_kernels.h"

constexpr int kTileRows = SD_TILE_ROWS;
constexpr int kGroup = 32;            // columns of a group of activations, and the unit of all loops
constexpr int kWords = 8;             // mask words of one tile and group
constexpr size_t kPadding = 128;      // bytes that a kernel may read before and behind the values

struct sd_matrix {
  int64_t rows, columns, tiles, groups;  // groups of 32 columns
  int type, scale_group;                 // columns per scale; 0 for floating-point values
  int64_t scale_groups, count;
  size_t bytes, value_bytes;
  uint64_t* masks;    // [tiles][groups][kWords]; null where the matrix is full
  uint8_t* values;    // kPadding readable bytes before and behind
  uint64_t* offsets;  // [tiles + 1], in bytes
  uint16_t* scales;   // [tiles][scale_groups][kTileRows], float16
};

// One prepared row of activations: the values (int8, bfloat16 or float32, padded to whole groups), then for int8 a scale
// and a correction for every group.
struct Activations {
  size_t stride;       // bytes from row to row
  size_t scales;       // offset of float [groups]
  size_t corrections;  // offset of int32 [groups]: -bias * sum of the group, for kernels that add a bias to the weights
};

struct Kernels {
  const char* name;
  bool bfloat_activations;  // whether bfloat16 weights meet activations rounded to bfloat16
  void (*quantize)(const float* x, int64_t columns, int64_t groups, int bias, int8_t* q, float* scales, int32_t* corrections);
  void (*matmul)(const sd_matrix* matrix, const uint8_t* buffer, const Activations& layout, int64_t batch,
                 int64_t first_tile, int64_t last_tile, float* out, int64_t out_stride);
};

// Null where the compiler does not build for that instruction set.
extern const Kernels* const kernels_portable;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_avxvnni;
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx512bf16;

#define SD_INLINE inline __attribute__((always_inline))
#define SD_INLINE_LAMBDA __attribute__((always_inline))

constexpr int lane_columns(int type) { return type >= SD_INT8 ? 4 : type == SD_BF16 ? 2 : 1; }
constexpr int value_bits(int type) { return type == SD_F32 ? 32 : type == SD_INT8 ? 8 : type == SD_INT4 ? 4 : 16; }
// What a kernel adds to a weight so that it has no sign.
constexpr int bias_of(int type) { return type == SD_INT8 ? 128 : type == SD_INT4 ? 8 : 0; }
