// The product, written once for every instruction set with vectors. A file that includes this has defined, for one vector
// of the 16 rows of a tile and for each type of value:
//
//   Rows                    16 sums of float32; zero_rows, load_rows, store_rows, add_rows, scaled (sum + float(a) * s * x)
//   Op<type>::Word          the weights of one mask word, expanded; kWordBytes of it in memory; load, store
//   Op<type>::Sum           sums within a group: start, dot (part p of kParts of a Word times its columns of x;
//                           kStepBytes for 4 columns; kChains sums that a single row of x needs), add, finish
//   Reader<type, full>      expands a tile's words in order: group() before each group, then next() eight times; `full`
//                           where there are no masks
//
// Small batches multiply each word as it is expanded. Larger ones expand a block of columns of `kTiles` tiles into the
// cache once and multiply it with every row of x.
#pragma once

#include "matrix.h"


namespace {

constexpr int kMostBatch = 256;  // rows of x whose sums are kept for one expanded block

template <int type>
struct Expanded {
  const uint8_t* data;
  SD_INLINE void group() {}
  SD_INLINE typename Op<type>::Word next() {
    const auto word = Op<type>::load(data);
    data += Op<type>::kWordBytes;
    return word;
  }
};

// What the loops need to know about x and the scales; `x` stands at the first column, and so do the others.
struct Operands {
  const uint8_t* x;
  const float* x_scales;
  const int32_t* corrections;
  size_t stride;
  const uint16_t* scales[2];  // of each tile
  int64_t first_group;        // within the row: where the first scale belongs
  int groups_per_scale;
};

template <int number>
struct Constant {
  constexpr operator int() const { return number; }
};

template <int type>
constexpr bool kIntegers = type == SD_INT8 || type == SD_INT4;

// `groups` groups of `tiles` tiles times `batch` rows of x, added to `sums`.
template <int type, int tiles, int batch, typename Source>
SD_INLINE void multiply(Source* source, int64_t groups, const Operands& o, Rows (&sums)[tiles][batch]) {
  // Few sums at once wait for each other: several chains of them.
  constexpr int parts_of_word = Op<type>::kParts;
  constexpr int chains = tiles * batch == 1 ? Op<type>::kChains : tiles * batch == 2 && Op<type>::kChains > 1 ? 2 : 1;
  using Sum = typename Op<type>::Sum;
  Sum parts[chains][tiles][batch];
  const auto begin = [&] {
#pragma GCC unroll 4
    for (int chain = 0; chain < chains; ++chain)
#pragma GCC unroll 2
      for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 16
        for (int b = 0; b < batch; ++b) parts[chain][t][b] = Op<type>::start();
  };
  const auto joined = [&](int t, int b) {
    if constexpr (chains == 1) return parts[0][t][b];
    Sum sum = Op<type>::add(parts[0][t][b], parts[1][t][b]);
    if constexpr (chains == 4) sum = Op<type>::add(sum, Op<type>::add(parts[2][t][b], parts[3][t][b]));
    return sum;
  };
  if constexpr (!kIntegers<type>) begin();
  const uint8_t* x = o.x;
  // One word; `half` is 0 and 1 by turns, a constant so that the sums stay in registers.
  const auto step = [&](auto half) SD_INLINE_LAMBDA {
    typename Op<type>::Word words[tiles];
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t) words[t] = source[t].next();
#pragma GCC unroll 16
    for (int b = 0; b < batch; ++b)
#pragma GCC unroll 2
      for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 4
        for (int p = 0; p < parts_of_word; ++p)
          Op<type>::dot(parts[(half * parts_of_word + p) % chains][t][b], words[t], p, x + b * o.stride);
    x += Op<type>::kStepBytes;
  };
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (kIntegers<type>) begin();
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t) source[t].group();
    for (int w = 0; w < kWords; w += 2) {
      step(Constant<0>());
      step(Constant<1>());
    }
    if constexpr (kIntegers<type>) {
      const int64_t index = o.groups_per_scale == 1 ? g : (o.first_group + g) / o.groups_per_scale - o.first_group / o.groups_per_scale;
#pragma GCC unroll 2
      for (int t = 0; t < tiles; ++t) {
        const Rows scale = load_halves(o.scales[t] + index * kTileRows);
#pragma GCC unroll 16
        for (int b = 0; b < batch; ++b) {
          const size_t at = b * (o.stride / 4) + g;
          sums[t][b] = scaled(sums[t][b], Op<type>::finish(joined(t, b), o.corrections[at]), scale, o.x_scales[at]);
        }
      }
    }
  }
  if constexpr (!kIntegers<type>) {
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 16
      for (int b = 0; b < batch; ++b) sums[t][b] = add_rows(sums[t][b], joined(t, b));
  }
}

struct Call {
  const sd_matrix* m;
  const uint8_t* buffer;
  Activations layout;
  float* out;
  int64_t out_stride;

  Operands operands(int64_t tile, int tiles, int64_t group, int64_t b, size_t group_bytes) const {
    const uint8_t* row = buffer + b * layout.stride;
    Operands o{row + group * group_bytes,
               reinterpret_cast<const float*>(row + layout.scales) + group,
               reinterpret_cast<const int32_t*>(row + layout.corrections) + group,
               layout.stride,
               {},
               group,
               m->scale_group / kGroup};
    if (m->scale_group)
      for (int t = 0; t < tiles; ++t)
        o.scales[t] = m->scales + ((tile + t) * m->scale_groups + group / o.groups_per_scale) * kTileRows;
    return o;
  }

  void put(int64_t tile, int64_t b, const float* sums) const {
    const int64_t rows = m->rows - tile * kTileRows < kTileRows ? m->rows - tile * kTileRows : kTileRows;
    memcpy(out + b * out_stride + tile * kTileRows, sums, rows * sizeof(float));
  }
};

template <int type, bool full, int batch>
void direct(const Call& call, int64_t first_tile, int64_t last_tile) {
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    Rows sums[1][batch];
#pragma GCC unroll 16
    for (int b = 0; b < batch; ++b) sums[0][b] = zero_rows();
    Reader<type, full> reader(call.m, tile);
    multiply<type, 1, batch>(&reader, call.m->groups, call.operands(tile, 1, 0, 0, 0), sums);
    for (int b = 0; b < batch; ++b) {
      float values[kTileRows];
      store_rows(values, sums[0][b]);
      call.put(tile, b, values);
    }
  }
}

template <int type, bool full, int most>
void direct_of(const Call& call, int64_t batch, int64_t first_tile, int64_t last_tile) {
  if constexpr (most > 0) {
    if (batch == most) direct<type, full, most>(call, first_tile, last_tile);
    else direct_of<type, full, most - 1>(call, batch, first_tile, last_tile);
  }
}

// `batch` rows of x from row b on, times an expanded block; the sums live in memory between blocks.
template <int type, int tiles, int batch>
void block_rows(const uint8_t* const* blocks, int64_t groups, const Operands& o, float* const* sums) {
  Rows registers[tiles][batch];
  Expanded<type> source[tiles];
  for (int t = 0; t < tiles; ++t) {
    source[t].data = blocks[t];
    for (int b = 0; b < batch; ++b) registers[t][b] = load_rows(sums[t] + b * kTileRows);
  }
  multiply<type, tiles, batch>(source, groups, o, registers);
  for (int t = 0; t < tiles; ++t)
    for (int b = 0; b < batch; ++b) store_rows(sums[t] + b * kTileRows, registers[t][b]);
}

template <int type, int tiles, int most>
void block_rows_of(int64_t batch, const uint8_t* const* blocks, int64_t groups, const Operands& o, float* const* sums) {
  if constexpr (most > 0) {
    if (batch >= most) block_rows<type, tiles, most>(blocks, groups, o, sums);
    else block_rows_of<type, tiles, most - 1>(batch, blocks, groups, o, sums);
  }
}

template <int type, bool full, int tiles>
void expanded(const Call& call, int64_t first_b, int64_t batch, int64_t tile) {
  constexpr size_t group_bytes = Op<type>::kWordBytes * kWords;
  constexpr int64_t block_groups = kBlockBytes / group_bytes;
  alignas(64) uint8_t blocks[tiles][kBlockBytes];
  alignas(64) float sums[tiles][kMostBatch * kTileRows];
  for (int t = 0; t < tiles; ++t) memset(sums[t], 0, batch * kTileRows * sizeof(float));
  Reader<type, full> readers[tiles];
  for (int t = 0; t < tiles; ++t) readers[t] = Reader<type, full>(call.m, tile + t);
  for (int64_t g = 0; g < call.m->groups; g += block_groups) {
    const int64_t groups = call.m->groups - g < block_groups ? call.m->groups - g : block_groups;
    const uint8_t* pointers[tiles];
    for (int t = 0; t < tiles; ++t) {
      pointers[t] = blocks[t];
      uint8_t* next = blocks[t];
      for (int64_t i = 0; i < groups; ++i) {
        readers[t].group();
        for (int w = 0; w < kWords; ++w, next += Op<type>::kWordBytes) Op<type>::store(next, readers[t].next());
      }
    }
    for (int64_t b = 0; b < batch; b += kRowsTogether) {
      float* places[tiles];
      for (int t = 0; t < tiles; ++t) places[t] = sums[t] + b * kTileRows;
      const Operands o = call.operands(tile, tiles, g, first_b + b, Op<type>::kStepBytes * kWords);
      block_rows_of<type, tiles, kRowsTogether>(batch - b, pointers, groups, o, places);
    }
  }
  for (int t = 0; t < tiles; ++t)
    for (int64_t b = 0; b < batch; ++b) call.put(tile + t, first_b + b, sums[t] + b * kTileRows);
}

template <int type, bool full>
void multiply_all(const Call& call, int64_t batch, int64_t first_tile, int64_t last_tile) {
  if (batch <= kDirectBatch) {
    direct_of<type, full, kDirectBatch>(call, batch, first_tile, last_tile);
    return;
  }
  for (int64_t first = 0; first < batch; first += kMostBatch) {
    const int64_t rows = batch - first < kMostBatch ? batch - first : kMostBatch;
    int64_t tile = first_tile;
    for (; tile + kTiles <= last_tile; tile += kTiles) expanded<type, full, kTiles>(call, first, rows, tile);
    for (; tile < last_tile; ++tile) expanded<type, full, 1>(call, first, rows, tile);
  }
}

template <int type>
void product(const Call& call, int64_t batch, int64_t first_tile, int64_t last_tile) {
  if (call.m->masks) multiply_all<type, false>(call, batch, first_tile, last_tile);
  else multiply_all<type, true>(call, batch, first_tile, last_tile);
}

void matmul(const sd_matrix* m, const uint8_t* buffer, const Activations& layout, int64_t batch, int64_t first_tile,
            int64_t last_tile, float* out, int64_t out_stride) {
  const Call call{m, buffer, layout, out, out_stride};
  switch (m->type) {
    case SD_F32: product<SD_F32>(call, batch, first_tile, last_tile); break;
    case SD_BF16: product<SD_BF16>(call, batch, first_tile, last_tile); break;
    case SD_F16: product<SD_F16>(call, batch, first_tile, last_tile); break;
    case SD_INT8: product<SD_INT8>(call, batch, first_tile, last_tile); break;
    default: product<SD_INT4>(call, batch, first_tile, last_tile);
  }
}

}  // namespace
