// Packing: from dense rows, quantised values and GGUF blocks into tiles; and back.

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "matrix.h"
#include "numbers.h"

namespace {

constexpr size_t kHugePage = size_t(1) << 21;

// Zeroed memory; large blocks begin at a huge page, which spares the processor page walks while it streams.
void* allocate(size_t bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes ? bytes : 64)) return nullptr;
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  memset(memory, 0, bytes);
  return memory;
}

// Call task(first, last) on shares of `count` items.
template <typename Task>
void in_threads(int64_t count, int threads, Task task) {
  if (threads > count / 4) threads = int(count / 4);
  if (threads <= 1) {
    task(int64_t(0), count);
    return;
  }
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] { task(count * t / threads, count * (t + 1) / threads); });
  for (auto& thread : pool) thread.join();
}

// A group of 16 rows and 32 columns on its way into a tile: bit patterns of the values, and which are kept.
struct Block {
  uint32_t values[kTileRows][kGroup];
  uint8_t kept[kTileRows][kGroup];  // 0 or 1
};

// The mask of a block's word: columns 4 w to 4 w + 3.
uint64_t word_of(const Block& block, int w, int lane) {
  uint64_t word = 0;
  for (int r = 0; r < kTileRows; ++r) {
    // Four bytes of 0 or 1 to four bits: the product brings byte c to bit 24 + c.
    uint32_t bytes;
    memcpy(&bytes, block.kept[r] + 4 * w, 4);
    const uint64_t bits = bytes * 0x01020408u >> 24 & 0xf;
    if (lane == 4) word |= bits << (4 * r);
    else if (lane == 2) word |= (bits & 3) << (2 * r) | (bits >> 2) << (2 * kTileRows + 2 * r);
    else for (int c = 0; c < 4; ++c) word |= (bits >> c & 1) << (kTileRows * c + r);
  }
  return word;
}

// Row and column of each bit of a word.
struct Places {
  uint8_t row[64], column[64];
  explicit Places(int lane) {
    for (int bit = 0; bit < 64; ++bit) {
      row[bit] = uint8_t(bit / lane % kTileRows);
      column[bit] = uint8_t(bit / (lane * kTileRows) * lane + bit % lane);
    }
  }
};

uint64_t mask_of(const sd_matrix* m, int64_t tile, int64_t g, int w) {
  return m->masks ? m->masks[(tile * m->groups + g) * kWords + w] : ~uint64_t(0);
}

// A source fills a block and, where a scale begins, the scales: int source.read(tile, group, block, scales), a status.
// Groups of a tile are read in order; source.start(tile) comes before the first.
// A full matrix keeps every weight.
template <typename Source>
int pack(const Source& prototype, int type, int scale_group, int64_t rows, int64_t columns, bool full, int threads,
         sd_matrix** out) {
  sd_matrix* m = new (std::nothrow) sd_matrix{};
  if (!m) return SD_ERROR_MEMORY;
  m->rows = rows;
  m->columns = columns;
  m->tiles = (rows + kTileRows - 1) / kTileRows;
  m->groups = (columns + kGroup - 1) / kGroup;
  m->type = type;
  m->scale_group = scale_group;
  m->scale_groups = scale_group ? (columns + scale_group - 1) / scale_group : 0;
  const size_t mask_bytes = full ? 0 : size_t(m->tiles) * m->groups * kWords * 8;
  const size_t scale_bytes = size_t(m->tiles) * m->scale_groups * kTileRows * 2;
  const size_t offset_bytes = size_t(m->tiles + 1) * 8;
  if (!full) m->masks = static_cast<uint64_t*>(allocate(mask_bytes));
  m->offsets = static_cast<uint64_t*>(allocate(offset_bytes));
  m->scales = static_cast<uint16_t*>(allocate(scale_bytes + 2 * kPadding));
  if ((!full && !m->masks) || !m->offsets || !m->scales) {
    sd_free(m);
    return SD_ERROR_MEMORY;
  }
  const int lane = lane_columns(type);
  const Places places(lane);
  std::atomic<int> status{SD_OK};
  std::atomic<int64_t> count{0};
  const auto blocks_of = [&](int64_t first, int64_t last, auto&& visit) {
    Source source = prototype;
    Block block;
    uint16_t scales[kTileRows];
    for (int64_t tile = first; tile < last; ++tile) {
      source.start(tile);
      for (int64_t g = 0; g < m->groups; ++g) {
        memset(&block, 0, sizeof block);
        memset(scales, 0, sizeof scales);
        if (const int failed = source.read(tile, g, block, scales)) {
          status = failed;
          return;
        }
        visit(tile, g, block, scales);
      }
    }
  };
  in_threads(m->tiles, threads, [&](int64_t first, int64_t last) {
    int64_t found = 0;
    blocks_of(first, last, [&](int64_t tile, int64_t g, const Block& block, const uint16_t* scales) {
      for (int w = 0; w < kWords; ++w) {
        int64_t set = 64;
        if (!full) {
          const uint64_t word = word_of(block, w, lane);
          m->masks[(tile * m->groups + g) * kWords + w] = word;
          set = __builtin_popcountll(word);
        }
        found += set;
        m->offsets[tile + 1] += (set * value_bits(type) + 7) / 8;
      }
      if (scale_group && g * kGroup % scale_group == 0)
        memcpy(m->scales + (tile * m->scale_groups + g * kGroup / scale_group) * kTileRows, scales, sizeof(uint16_t) * kTileRows);
    });
    count += found;
  });
  if (status != SD_OK) {
    sd_free(m);
    return status;
  }
  for (int64_t tile = 0; tile < m->tiles; ++tile) m->offsets[tile + 1] += m->offsets[tile];
  m->count = full ? rows * columns : int64_t(count);
  m->value_bytes = m->offsets[m->tiles];
  uint8_t* memory = static_cast<uint8_t*>(allocate(m->value_bytes + 2 * kPadding));
  if (!memory) {
    sd_free(m);
    return SD_ERROR_MEMORY;
  }
  m->values = memory + kPadding;
  m->bytes = mask_bytes + offset_bytes + scale_bytes + m->value_bytes + 4 * kPadding + sizeof *m;
  in_threads(m->tiles, threads, [&](int64_t first, int64_t last) {
    uint8_t* next = nullptr;
    blocks_of(first, last, [&](int64_t tile, int64_t g, const Block& block, const uint16_t*) {
      if (g == 0) next = m->values + m->offsets[tile];
      for (int w = 0; w < kWords; ++w) {
        int64_t index = 0;
        for (uint64_t mask = mask_of(m, tile, g, w); mask; mask &= mask - 1, ++index) {
          const int bit = __builtin_ctzll(mask);
          const uint32_t value = block.values[places.row[bit]][4 * w + places.column[bit]];
          if (type == SD_INT4) next[index / 2] |= uint8_t((value & 0xf) << (index % 2 * 4));
          else memcpy(next + index * value_bits(type) / 8, &value, value_bits(type) / 8);
        }
        next += (index * value_bits(type) + 7) / 8;
      }
    });
  });
  *out = m;
  return SD_OK;
}

struct DenseSource {
  int type;
  const uint8_t* weights;
  size_t row_bytes;
  int64_t rows, columns;
  const uint8_t* mask;

  void start(int64_t) {}
  int read(int64_t tile, int64_t g, Block& block, uint16_t*) const {
    if (type == SD_F32) fill<uint32_t>(tile, g, block, 0x7fffffff);
    else fill<uint16_t>(tile, g, block, 0x7fff);
    return SD_OK;
  }

  template <typename Bits>
  void fill(int64_t tile, int64_t g, Block& block, uint32_t magnitude) const {
    const int used = int(columns - g * kGroup < kGroup ? columns - g * kGroup : kGroup);
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
      const int64_t row = tile * kTileRows + r;
      Bits bits[kGroup] = {};
      memcpy(bits, weights + row * row_bytes + g * kGroup * sizeof(Bits), used * sizeof(Bits));
      for (int c = 0; c < kGroup; ++c) {
        block.values[r][c] = bits[c];
        block.kept[r][c] = (bits[c] & magnitude) != 0;
      }
      if (mask)
        for (int c = 0; c < used; ++c) block.kept[r][c] = mask[row * columns + g * kGroup + c] != 0;
    }
  }
};

struct QuantizedSource {
  int type, group;
  const int8_t* values;
  const uint16_t* scales;
  int64_t rows, columns;
  const uint8_t* mask;

  void start(int64_t) {}
  int read(int64_t tile, int64_t g, Block& block, uint16_t* out) const {
    const int64_t scale_groups = (columns + group - 1) / group;
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
      const int64_t row = tile * kTileRows + r;
      out[r] = scales[row * scale_groups + g * kGroup / group];
      if (!half_is_finite(out[r])) return SD_ERROR_SCALE;
      const bool zero = (out[r] & 0x7fff) == 0;
      for (int c = 0; c < kGroup && g * kGroup + c < columns; ++c) {
        const int64_t column = g * kGroup + c;
        const int8_t value = values[row * columns + column];
        block.kept[r][c] = mask ? mask[row * columns + column] != 0 : value != 0 && !zero;
        if (block.kept[r][c] && type == SD_INT4 && (value < -8 || value > 7)) return SD_ERROR_FORMAT;
        block.values[r][c] = uint8_t(value);
      }
    }
    return SD_OK;
  }
};

// GGUF's blocks of 32 weights. Q8_0: float16 d, int8 q[32]. Q4_0: float16 d, 16 bytes whose low halves are weights 0 to 15
// and whose high halves are 16 to 31, value d (q - 8). Q4_1: float16 d, float16 m, 16 bytes likewise, value d q + m.
struct BlockSource {
  int gguf_type;
  const uint8_t* data;
  size_t row_bytes;
  int64_t rows;

  void start(int64_t) {}
  int read(int64_t tile, int64_t g, Block& block, uint16_t* out) const {
    const size_t size = gguf_type == 8 ? 34 : gguf_type == 2 ? 18 : 20;
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
      const uint8_t* source = data + (tile * kTileRows + r) * row_bytes + g * size;
      memcpy(out + r, source, 2);
      if (!half_is_finite(out[r])) return SD_ERROR_SCALE;
      int zero_code = gguf_type == 8 ? 0 : 8;
      if (gguf_type == 3) {
        uint16_t minimum;
        memcpy(&minimum, source + 2, 2);
        if (!half_is_finite(minimum)) return SD_ERROR_SCALE;
        const float d = half_to_float(out[r]), m = half_to_float(minimum);
        // A product of an 11-bit and a 4-bit number is exact, and so is a sum that is 0.
        for (zero_code = 0; zero_code < 16 && d * float(zero_code) + m != 0.0f; ++zero_code) {}
        if (zero_code == 16) return SD_ERROR_INEXACT;
      }
      if ((out[r] & 0x7fff) == 0) continue;
      const uint8_t* codes = source + size - (gguf_type == 8 ? 32 : 16);
      for (int c = 0; c < kGroup; ++c) {
        int value;
        if (gguf_type == 8) value = int8_t(codes[c]);
        else value = (c < 16 ? codes[c] & 0xf : codes[c - 16] >> 4) - zero_code;
        if (gguf_type == 3 && (value < -8 || value > 7)) return SD_ERROR_INEXACT;
        block.values[r][c] = uint8_t(value);
        block.kept[r][c] = value != 0;
      }
    }
    return SD_OK;
  }
};

bool bad_shape(int64_t rows, int64_t columns, int threads) {
  return rows < 1 || columns < 1 || rows > (int64_t(1) << 31) || columns > (int64_t(1) << 31) || threads < 1;
}

// Nothing may leave a C interface by an exception.
template <typename Call>
int guarded(sd_matrix** out, Call call) {
  *out = nullptr;
  try {
    return call();
  } catch (...) {
    return SD_ERROR_MEMORY;
  }
}

int pack_gguf(int gguf_type, const void* data, size_t row_bytes, int64_t rows, int64_t columns, bool full, int threads,
              sd_matrix** out) {
  if (!out || !data || bad_shape(rows, columns, threads)) return SD_ERROR_ARGUMENT;
  if (gguf_type == 0 || gguf_type == 1 || gguf_type == 30) {
    const int type = gguf_type == 0 ? SD_F32 : gguf_type == 1 ? SD_F16 : SD_BF16;
    if (row_bytes < size_t(columns) * value_bits(type) / 8) return SD_ERROR_ARGUMENT;
    const DenseSource source{type, static_cast<const uint8_t*>(data), row_bytes, rows, columns, nullptr};
    return guarded(out, [&] { return pack(source, type, 0, rows, columns, full, threads, out); });
  }
  const size_t block_bytes = gguf_type == 8 ? 34 : gguf_type == 2 ? 18 : gguf_type == 3 ? 20 : 0;
  if (!block_bytes || columns % kGroup || row_bytes < size_t(columns) / kGroup * block_bytes) return SD_ERROR_ARGUMENT;
  const BlockSource source{gguf_type, static_cast<const uint8_t*>(data), row_bytes, rows};
  const int type = gguf_type == 8 ? SD_INT8 : SD_INT4;
  return guarded(out, [&] { return pack(source, type, kGroup, rows, columns, full, threads, out); });
}

}  // namespace

extern "C" {

int sd_pack_dense(int type, const void* weights, int64_t row_stride, int64_t rows, int64_t columns, const uint8_t* mask,
                  int threads, sd_matrix** out) {
  if (!out || !weights || bad_shape(rows, columns, threads) || row_stride < columns || type < SD_F32 || type > SD_F16)
    return SD_ERROR_ARGUMENT;
  const size_t row_bytes = size_t(row_stride) * value_bits(type) / 8;
  const DenseSource source{type, static_cast<const uint8_t*>(weights), row_bytes, rows, columns, mask};
  return guarded(out, [&] { return pack(source, type, 0, rows, columns, false, threads, out); });
}

int sd_pack_quantized(int type, int group, const int8_t* values, const uint16_t* scales, int64_t rows, int64_t columns,
                      const uint8_t* mask, int threads, sd_matrix** out) {
  if (!out || !values || !scales || bad_shape(rows, columns, threads) || (type != SD_INT8 && type != SD_INT4) ||
      group < kGroup || group % kGroup)
    return SD_ERROR_ARGUMENT;
  const QuantizedSource source{type, group, values, scales, rows, columns, mask};
  return guarded(out, [&] { return pack(source, type, group, rows, columns, false, threads, out); });
}

int sd_pack_gguf(int gguf_type, const void* data, size_t row_bytes, int64_t rows, int64_t columns, int threads,
                 sd_matrix** out) {
  return pack_gguf(gguf_type, data, row_bytes, rows, columns, false, threads, out);
}

int sd_pack_gguf_full(int gguf_type, const void* data, size_t row_bytes, int64_t rows, int64_t columns, int threads,
                      sd_matrix** out) {
  return pack_gguf(gguf_type, data, row_bytes, rows, columns, true, threads, out);
}

void sd_free(sd_matrix* m) {
  if (!m) return;
  free(m->masks);
  free(m->offsets);
  free(m->scales);
  if (m->values) free(m->values - kPadding);
  delete m;
}

int sd_describe(const sd_matrix* m, sd_info* info) {
  if (!m || !info) return SD_ERROR_ARGUMENT;
  *info = sd_info{m->rows, m->columns, sd_type(m->type), m->scale_group, m->count, int64_t(m->bytes)};
  return SD_OK;
}

int sd_unpack(const sd_matrix* m, int64_t first, int64_t last, float* out, int64_t row_stride) {
  if (!m || !out || first < 0 || last > m->rows || first > last || row_stride < m->columns) return SD_ERROR_ARGUMENT;
  const int lane = lane_columns(m->type);
  for (int64_t row = first; row < last; ++row) memset(out + (row - first) * row_stride, 0, m->columns * sizeof(float));
  for (int64_t tile = first / kTileRows; tile * kTileRows < last; ++tile) {
    const uint8_t* values = m->values + m->offsets[tile];
    for (int64_t g = 0; g < m->groups; ++g) {
      for (int w = 0; w < kWords; ++w) {
        int64_t index = 0;
        for (uint64_t mask = mask_of(m, tile, g, w); mask; mask &= mask - 1, ++index) {
          const int bit = __builtin_ctzll(mask);
          const int r = bit / lane % kTileRows;
          const int64_t row = tile * kTileRows + r;
          const int64_t column = g * kGroup + 4 * w + bit / (lane * kTileRows) * lane + bit % lane;
          if (row < first || row >= last || column >= m->columns) continue;
          float value;
          uint16_t half = 0;
          if (m->type == SD_F32) {
            memcpy(&value, values + 4 * index, 4);
          } else if (m->type == SD_INT8 || m->type == SD_INT4) {
            int integer = int8_t(values[index]);
            if (m->type == SD_INT4)
              integer = int8_t(uint8_t(index % 2 ? values[index / 2] & 0xf0 : values[index / 2] << 4)) >> 4;
            value = float(integer) * half_to_float(m->scales[(tile * m->scale_groups + g * kGroup / m->scale_group) * kTileRows + r]);
          } else {
            memcpy(&half, values + 2 * index, 2);
            value = m->type == SD_F16 ? half_to_float(half) : bfloat_to_float(half);
          }
          out[(row - first) * row_stride + column] = value;
        }
        values += (index * value_bits(m->type) + 7) / 8;
      }
    }
  }
  return SD_OK;
}

}
