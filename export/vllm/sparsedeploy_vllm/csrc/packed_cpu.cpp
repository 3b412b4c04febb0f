// The packed matrix product for CPUs: y = x W^T (+ bias), W in the bitmask format.
//
// One file of more than 400 lines, because the plugin compiles it on the user's machine with one call of the compiler,
// and its parts (types, instruction sets, blocks) are templates that inline each other.
//
// A C interface without Python or torch in it, so one binary serves every version of both. It is compiled once for each
// instruction set (see cpu.py); the preprocessor picks the code for the one it is compiled for. Rows are shared out with
// OpenMP, whose functions are those that torch has loaded already: one pool of threads, no two that fight.
//
// Decode is bound by memory, so every packed byte is read from it once: 32 columns of a few weight rows are expanded in
// registers and multiplied with up to four rows of x; for further ones the weight rows are still in the cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SD_AVX512 1
#if defined(__AVX512BF16__)
#define SD_AVX512_BF16 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SD_AVX2 1
#endif
#if defined(SD_AVX512) || defined(SD_AVX2)
#include <immintrin.h>
#endif

namespace {

enum Kind : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
constexpr int64_t kColumns = 32;  // columns of one step: one word of the mask
constexpr int64_t kRowsPerTask = 32;
// The least distance at which values and mask bits are fetched ahead: what is used up while memory answers.
constexpr int64_t kValueBytesAhead = 4096;
constexpr int64_t kMaskBytesAhead = 1024;
// Weight rows that are multiplied together with up to four rows of x: as many sums as the registers hold.
#if defined(SD_AVX512)
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x0400) return bits_to_float(sign | float_to_bits(float(rest) * 0x1p-24f));
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {
    // Adding 0.5 leaves the subnormal's 10 bits, rounded to even, at the end of the mantissa.
    return sign | uint16_t(float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000);
  }
  return sign | uint16_t((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <Kind kind>
using Stored = std::conditional_t<kind == kFloat32, float, uint16_t>;

template <Kind kind>
inline float widen(Stored<kind> value) {
  if constexpr (kind == kBFloat16) return bits_to_float(uint32_t(value) << 16);
  else if constexpr (kind == kFloat16) return half_to_float(value);
  else return value;
}

template <Kind kind>
inline Stored<kind> narrow(float value) {
  if constexpr (kind == kBFloat16) return float_to_bfloat(value);
  else if constexpr (kind == kFloat16) return float_to_half(value);
  else return value;
}

// How many values a step may read beyond those it needs.
constexpr int64_t kOverread = 32;

#if defined(SD_AVX512)

using Sum = __m512;
inline Sum zero() { return _mm512_setzero_ps(); }
inline Sum add(Sum first, Sum second) { return _mm512_add_ps(first, second); }
inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

// Zeros that the compiler does not know for zeros. With them an expansion merges into a register that has just been
// written; the form that clears the other columns itself waits, on Zen 4 and 5, for whatever was in its register before
// (measured: half the speed).
inline __m512i fresh_zeros() {
  __m512i zeros;
  __asm__("vpxord %0, %0, %0" : "=v"(zeros));
  return zeros;
}

// The next values, expanded to 32 columns; `safe` reads not one byte more than there is.
template <bool safe>
inline __m512i expand16(const uint16_t* values, uint32_t mask) {
  __m512i dense;
  if constexpr (safe) {
    const uint32_t count = _mm_popcnt_u32(mask);
    dense = _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, count), values);
  } else {
    dense = _mm512_loadu_si512(values);
  }
  return _mm512_mask_expand_epi16(fresh_zeros(), mask, dense);
}

template <bool safe>
inline __m512 expand32(const float* values, uint32_t mask) {
  if constexpr (safe) return _mm512_maskz_expandloadu_ps(__mmask16(mask), values);
  else return _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zeros()), __mmask16(mask), _mm512_loadu_ps(values));
}

#elif defined(SD_AVX2)

using Sum = __m256;
inline Sum zero() { return _mm256_setzero_ps(); }
inline Sum add(Sum first, Sum second) { return _mm256_add_ps(first, second); }
inline float total(Sum sum) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// For each byte of the mask: where each of its 8 columns finds its value, as byte and as lane indices.
struct Tables {
  alignas(16) uint8_t bytes[256][16];
  alignas(32) int32_t lanes[256][8];
  Tables() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int column = 0; column < 8; ++column) {
        const bool kept = mask >> column & 1;
        bytes[mask][2 * column] = kept ? uint8_t(2 * next) : 0x80;
        bytes[mask][2 * column + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
        lanes[mask][column] = kept ? next : -1;
        next += kept;
      }
    }
  }
};
const Tables tables;

template <bool safe>
inline __m128i expand16(const uint16_t* values, uint32_t mask) {
  __m128i dense;
  if constexpr (safe) {
    alignas(16) uint16_t copy[8] = {};
    std::memcpy(copy, values, 2 * __builtin_popcount(mask));
    dense = _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
  } else {
    dense = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  }
  return _mm_shuffle_epi8(dense, _mm_load_si128(reinterpret_cast<const __m128i*>(tables.bytes[mask])));
}

template <bool safe>
inline __m256 expand32(const float* values, uint32_t mask) {
  __m256 dense;
  if constexpr (safe) {
    alignas(32) float copy[8] = {};
    std::memcpy(copy, values, 4 * __builtin_popcount(mask));
    dense = _mm256_load_ps(copy);
  } else {
    dense = _mm256_loadu_ps(values);
  }
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.lanes[mask]));
  // A lane of -1 has its sign set: turned around, it clears the column.
  const __m256i dropped = _mm256_srai_epi32(lanes, 31);
  return _mm256_andnot_ps(_mm256_castsi256_ps(dropped), _mm256_permutevar8x32_ps(dense, lanes));
}

#else

using Sum = float;
inline Sum zero() { return 0.0f; }
inline Sum add(Sum first, Sum second) { return first + second; }
inline float total(Sum sum) { return sum; }

#endif

// One step: 32 columns of one weight row against `batch` rows of x. Advances `values` past what the mask uses.
template <Kind kind, bool safe, int batch, typename X>
inline void step(Sum* sums, const Stored<kind>*& values, uint32_t mask, const X* x, int64_t stride) {
#if defined(SD_AVX512)
  if constexpr (kind == kFloat32) {
    const __m512 low = expand32<safe>(values, mask & 0xffff);
    values += _mm_popcnt_u32(mask & 0xffff);
    const __m512 high = expand32<safe>(values, mask >> 16);
    values += _mm_popcnt_u32(mask >> 16);
    for (int b = 0; b < batch; ++b) {
      sums[b] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + b * stride), sums[b]);
      sums[b] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + b * stride + 16), sums[b]);
    }
  } else {
    const __m512i weight = expand16<safe>(values, mask);
    values += _mm_popcnt_u32(mask);
    if constexpr (sizeof(X) == 2) {
#if defined(SD_AVX512_BF16)
      for (int b = 0; b < batch; ++b) {
        const __m512i other = _mm512_loadu_si512(x + b * stride);
        sums[b] = _mm512_dpbf16_ps(sums[b], (__m512bh)weight, (__m512bh)other);
      }
#endif
    } else {
      __m512 low, high;
      if constexpr (kind == kFloat16) {
        low = _mm512_cvtph_ps(_mm512_castsi512_si256(weight));
        high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(weight, 1));
      } else {
        // Even columns, then odd ones: copy_x has x in that order.
        low = _mm512_castsi512_ps(_mm512_slli_epi32(weight, 16));
        high = _mm512_castsi512_ps(_mm512_and_si512(weight, _mm512_set1_epi32(int(0xffff0000))));
      }
      for (int b = 0; b < batch; ++b) {
        sums[b] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + b * stride), sums[b]);
        sums[b] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + b * stride + 16), sums[b]);
      }
    }
  }
#elif defined(SD_AVX2)
  for (int part = 0; part < 4; ++part) {
    const uint32_t byte = mask >> (8 * part) & 0xff;
    __m256 weight;
    if constexpr (kind == kFloat32) {
      weight = expand32<safe>(values, byte);
    } else {
      const __m128i packed = expand16<safe>(values, byte);
      if constexpr (kind == kFloat16) weight = _mm256_cvtph_ps(packed);
      else weight = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
    }
    values += __builtin_popcount(byte);
    for (int b = 0; b < batch; ++b) {
      sums[b] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + b * stride + 8 * part), sums[b]);
    }
  }
#else
  while (mask) {
    const int column = __builtin_ctz(mask);
    const float weight = widen<kind>(*values++);
    for (int b = 0; b < batch; ++b) sums[b] += weight * x[b * stride + column];
    mask &= mask - 1;
  }
#endif
}

struct Weight {
  const uint8_t* mask;
  const void* values;
  const int32_t* offsets;
  int64_t rows, columns, count;
  int64_t row_bytes() const { return (columns + 7) / 8; }
};

inline uint32_t mask_word(const uint8_t* bytes, int64_t available) {
  uint32_t word = 0;
  std::memcpy(&word, bytes, std::min<int64_t>(available, 4));
  return word;
}

// `rows` weight rows against `batch` rows of x (padded to whole steps); sums for [row][batch].
//
// Steps alternate between `kChains` sets of sums where there are few, so that additions do not wait for each other. What
// the rows after these will need is fetched ahead: the values lie at no regular distance, and left to the hardware they
// arrive late (measured: half the bandwidth).
template <Kind kind, bool safe, int rows, int batch, typename X>
inline void block(const Weight& weight, int64_t row, const X* x, int64_t stride, float* results) {
  using T = Stored<kind>;
  constexpr int kChains = rows * batch <= 2 ? 2 : 1;
  const T* values[rows];
  const uint8_t* masks[rows];
  int64_t ahead[rows];
  Sum sums[kChains][rows][batch];
  for (int r = 0; r < rows; ++r) {
    const int64_t offset = weight.offsets[row + r];
    values[r] = static_cast<const T*>(weight.values) + offset;
    masks[r] = weight.mask + (row + r) * weight.row_bytes();
    const int64_t next = weight.offsets[std::min(row + rows + r, weight.rows)] - offset;
    ahead[r] = std::max<int64_t>(next, kValueBytesAhead / sizeof(T));
    for (int chain = 0; chain < kChains; ++chain)
      for (int b = 0; b < batch; ++b) sums[chain][r][b] = zero();
  }
  const int64_t mask_ahead = std::max<int64_t>(rows * weight.row_bytes(), kMaskBytesAhead);
  const int64_t whole = weight.columns / kColumns;
  const auto one_step = [&](int64_t c, int chain) {
    for (int r = 0; r < rows; ++r) {
      uint32_t mask;
      std::memcpy(&mask, masks[r] + 4 * c, 4);
      __builtin_prefetch(values[r] + ahead[r]);
      if constexpr (sizeof(T) == 4) __builtin_prefetch(values[r] + ahead[r] + 16);
      step<kind, safe, batch>(sums[chain][r], values[r], mask, x + c * kColumns, stride);
    }
  };
  int64_t c = 0;
  for (; c + 2 <= whole; c += 2) {
    one_step(c, 0);
    one_step(c + 1, kChains - 1);
    for (int r = 0; r < rows; ++r) __builtin_prefetch(masks[r] + 4 * c + mask_ahead);
  }
  if (c < whole) one_step(c, 0);
  if (const int64_t rest = weight.row_bytes() - 4 * whole; rest > 0) {
    for (int r = 0; r < rows; ++r) {
      const uint32_t mask = mask_word(masks[r] + 4 * whole, rest);
      step<kind, true, batch>(sums[0][r], values[r], mask, x + whole * kColumns, stride);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < batch; ++b) {
      results[r * batch + b] = total(kChains == 2 ? add(sums[0][r][b], sums[kChains - 1][r][b]) : sums[0][r][b]);
    }
  }
}

struct Call {
  Weight weight;
  const void* bias;
  void* out;
  int64_t out_stride;
};

template <Kind kind, bool safe, int rows, int batch, typename X>
void rows_and_batch(const Call& call, int64_t row, const X* x, int64_t stride, int64_t first) {
  using T = Stored<kind>;
  float results[rows * batch];
  block<kind, safe, rows, batch>(call.weight, row, x + first * stride, stride, results);
  const T* bias = static_cast<const T*>(call.bias);
  for (int r = 0; r < rows; ++r) {
    const float added = bias ? widen<kind>(bias[row + r]) : 0.0f;
    for (int b = 0; b < batch; ++b) {
      static_cast<T*>(call.out)[(first + b) * call.out_stride + row + r] = narrow<kind>(results[r * batch + b] + added);
    }
  }
}

template <Kind kind, bool safe, int rows, typename X>
void some_rows(const Call& call, int64_t row, const X* x, int64_t stride, int64_t batch) {
  int64_t first = 0;
  for (; batch - first >= 4; first += 4) rows_and_batch<kind, safe, rows, 4>(call, row, x, stride, first);
  if (batch - first >= 2) {
    rows_and_batch<kind, safe, rows, 2>(call, row, x, stride, first);
    first += 2;
  }
  if (batch > first) rows_and_batch<kind, safe, rows, 1>(call, row, x, stride, first);
}

// Several weight rows share each load of x; for one or two rows of x one at a time is better: a single stream of values.
template <Kind kind, int together, typename X>
void all_rows(const Call& call, const X* x, int64_t stride, int64_t batch, int threads) {
  const Weight& weight = call.weight;
  const int64_t tasks = (weight.rows + kRowsPerTask - 1) / kRowsPerTask;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t stop = std::min(weight.rows, (task + 1) * kRowsPerTask);
    int64_t row = task * kRowsPerTask;
    for (; row + together <= stop && weight.offsets[row + together] + kOverread <= weight.count; row += together)
      some_rows<kind, false, together>(call, row, x, stride, batch);
    for (; row < stop; ++row) some_rows<kind, true, 1>(call, row, x, stride, batch);
  }
}

template <Kind kind, typename X>
void all_rows(const Call& call, const X* x, int64_t stride, int64_t batch, int threads) {
  if (batch <= 2) all_rows<kind, 1>(call, x, stride, batch, threads);
  else all_rows<kind, kRowsTogether>(call, x, stride, batch, threads);
}

template <typename T>
inline void expand_row(const T* values, const uint8_t* mask, int64_t columns, int64_t readable, T* out) {
  // Whole vectors as long as neither the values nor the row of `out` ends inside of one; the rest bit by bit.
  int64_t column = 0;
  [[maybe_unused]] const T* const end = values + readable;
#if defined(SD_AVX512)
  for (; column + kColumns <= columns && end - values >= kOverread; column += kColumns) {
    uint32_t word;
    std::memcpy(&word, mask + column / 8, 4);
    if constexpr (sizeof(T) == 2) {
      _mm512_storeu_si512(out + column, expand16<false>(values, word));
    } else {
      _mm512_storeu_ps(out + column, expand32<false>(values, word & 0xffff));
      _mm512_storeu_ps(out + column + 16, expand32<false>(values + _mm_popcnt_u32(word & 0xffff), word >> 16));
    }
    values += _mm_popcnt_u32(word);
  }
#elif defined(SD_AVX2)
  for (; column + 8 <= columns && end - values >= kOverread; column += 8) {
    const uint32_t byte = mask[column / 8];
    if constexpr (sizeof(T) == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + column), expand16<false>(values, byte));
    } else {
      _mm256_storeu_ps(out + column, expand32<false>(values, byte));
    }
    values += __builtin_popcount(byte);
  }
#endif
  for (; column < columns; ++column) {
    const bool kept = mask[column / 8] >> (column % 8) & 1;
    out[column] = kept ? *values : T(0);
    values += kept;
  }
}

template <typename T>
void unpack_rows(const Weight& weight, T* out, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t row = 0; row < weight.rows; ++row) {
    const int64_t offset = weight.offsets[row];
    expand_row(static_cast<const T*>(weight.values) + offset, weight.mask + row * weight.row_bytes(), weight.columns,
               weight.count - offset, out + row * weight.columns);
  }
}

// Where column c of a padded row of x goes: into its place, or, for the kernel that splits bfloat16 pairs, behind the
// others of its parity within the step.
template <Kind kind, typename X>
inline int64_t place_of(int64_t c) {
#if defined(SD_AVX512)
  if constexpr (kind == kBFloat16 && sizeof(X) == 4) return c / 32 * 32 + c % 2 * 16 + c % 32 / 2;
#endif
  return c;
}

template <Kind kind, typename X>
void copy_x(const void* x, int64_t x_stride, int64_t batch, int64_t columns, X* padded, int64_t stride) {
  const Stored<kind>* source = static_cast<const Stored<kind>*>(x);
  std::fill(padded, padded + batch * stride, X(0));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < columns; ++c) {
      const Stored<kind> value = source[b * x_stride + c];
      X* const place = padded + b * stride + place_of<kind, X>(c);
      if constexpr (sizeof(X) == 2) *place = value;
      else *place = widen<kind>(value);
    }
  }
}

template <Kind kind>
void product(const Call& call, const void* x, int64_t x_stride, int64_t batch, int threads) {
#if defined(SD_AVX512_BF16)
  using X = std::conditional_t<kind == kBFloat16, uint16_t, float>;
#else
  using X = float;
#endif
  const int64_t columns = call.weight.columns;
  if (sizeof(X) == sizeof(Stored<kind>) && columns % kColumns == 0) {
    all_rows<kind>(call, static_cast<const X*>(x), x_stride, batch, threads);
    return;
  }
  const int64_t stride = (columns + kColumns - 1) / kColumns * kColumns;
  std::vector<X> padded(batch * stride);
  copy_x<kind>(x, x_stride, batch, columns, padded.data(), stride);
  all_rows<kind>(call, padded.data(), stride, batch, threads);
}

}  // namespace

extern "C" {

// x [batch, columns] (rows x_stride apart) -> out [batch, rows] (rows out_stride apart); bias [rows] or null.
// The weight must have been checked: offsets and mask are trusted here. Returns 0, or 1 for an unknown kind.
int sparsedeploy_linear(int kind, const void* x, int64_t x_stride, int64_t batch, const uint8_t* mask,
                        const void* values, const int32_t* offsets, int64_t rows, int64_t columns, int64_t count,
                        const void* bias, void* out, int64_t out_stride, int threads) {
  const Call call{{mask, values, offsets, rows, columns, count}, bias, out, out_stride};
  switch (kind) {
    case kBFloat16: product<kBFloat16>(call, x, x_stride, batch, threads); return 0;
    case kFloat16: product<kFloat16>(call, x, x_stride, batch, threads); return 0;
    case kFloat32: product<kFloat32>(call, x, x_stride, batch, threads); return 0;
    default: return 1;
  }
}

// The dense rows [rows, columns]. `count` is the number of values from values[0] to the end of their buffer.
int sparsedeploy_unpack(int kind, const uint8_t* mask, const void* values, const int32_t* offsets, int64_t rows,
                        int64_t columns, int64_t count, void* out, int threads) {
  const Weight weight{mask, values, offsets, rows, columns, count};
  switch (kind) {
    case kBFloat16:
    case kFloat16: unpack_rows(weight, static_cast<uint16_t*>(out), threads); return 0;
    case kFloat32: unpack_rows(weight, static_cast<float*>(out), threads); return 0;
    default: return 1;
  }
}

}
