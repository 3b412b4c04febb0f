// AVX2 with FMA and F16C: values are moved to their columns by byte shuffles, 16 columns a step, whose indices stand in
// tables for every 8 mask bits. With SD_DOT_BYTES the processor has the VEX form of VNNI.

#include <immintrin.h>

#include "matrix.h"
#include "numbers.h"
#include "quantize.h"

namespace {

constexpr int kDirectBatch = 4;   // up to here words are multiplied as they are expanded
constexpr int kRowsTogether = 4;  // rows of x per pass over an expanded block
constexpr int kTiles = 1;
constexpr size_t kBlockBytes = 16384;
constexpr int kValueBytesAhead = 2048;  // how far ahead of its use memory is asked for
constexpr int kMaskBytesAhead = 1024;
constexpr int kScaleBytesAhead = 512;

struct Rows {
  __m256 low, high;
};
inline Rows zero_rows() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Rows load_rows(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store_rows(float* to, Rows rows) {
  _mm256_storeu_ps(to, rows.low);
  _mm256_storeu_ps(to + 8, rows.high);
}
inline Rows add_rows(Rows a, Rows b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Rows load_halves(const uint16_t* from) {
  const __m128i* const halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

struct Integers {
  __m256i low, high;
};
inline Rows scaled(Rows sum, Integers integers, Rows scale, float x) {
  const __m256 factor = _mm256_set1_ps(x);
  return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(integers.low), _mm256_mul_ps(scale.low, factor), sum.low),
          _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers.high), _mm256_mul_ps(scale.high, factor), sum.high)};
}

// For 8 mask bits, where each of the 8 columns finds its value; 0x80 or -1 for none.
struct Tables {
  // For the first 8 columns of 16, counted from the first value; for the last 8, in the 16 bytes that end with the last
  // value. The other half of each is empty.
  alignas(64) uint8_t first[256][16];
  alignas(64) uint8_t last[256][16];
  alignas(64) uint8_t pairs[256][16];  // 8 values of two bytes
  alignas(64) int32_t lanes[256][8];
  constexpr Tables() : first(), last(), pairs(), lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      const int count = __builtin_popcount(mask);
      for (int column = 0; column < 8; ++column) {
        const bool kept = mask >> column & 1;
        first[mask][column] = kept ? uint8_t(next) : 0x80;
        first[mask][8 + column] = 0x80;
        last[mask][column] = 0x80;
        last[mask][8 + column] = kept ? uint8_t(16 - count + next) : 0x80;
        pairs[mask][2 * column] = kept ? uint8_t(2 * next) : 0x80;
        pairs[mask][2 * column + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
        lanes[mask][column] = kept ? next : -1;
        next += kept;
      }
    }
  }
};
constexpr Tables tables;

// The row of a table for the 8 mask bits from `bit` on.
SD_INLINE const __m128i* table_row(const uint8_t (&table)[256][16], uint64_t mask, int bit) {
  const uint64_t offset = (bit >= 4 ? mask >> (bit - 4) : mask << 4) & 0xff0;
  return reinterpret_cast<const __m128i*>(&table[0][0] + offset);
}

template <int type>
struct Op {
  struct Word {
    Rows columns[4];
  };
  using Sum = Rows;
  static constexpr int kWordBytes = 256, kStepBytes = 16, kParts = 4, kChains = 4;
  static inline Word load(const uint8_t* from) {
    Word word;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) word.columns[c] = load_rows(reinterpret_cast<const float*>(from) + 16 * c);
    return word;
  }
  static inline void store(uint8_t* to, const Word& word) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store_rows(reinterpret_cast<float*>(to) + 16 * c, word.columns[c]);
  }
  static inline Sum start() { return zero_rows(); }
  static inline Sum add(Sum a, Sum b) { return add_rows(a, b); }
  static inline void dot(Sum& sum, const Word& word, int c, const uint8_t* x) {
    const __m256 factor = _mm256_broadcast_ss(reinterpret_cast<const float*>(x) + c);
    sum.low = _mm256_fmadd_ps(word.columns[c].low, factor, sum.low);
    sum.high = _mm256_fmadd_ps(word.columns[c].high, factor, sum.high);
  }
};

struct IntegerOp {
  using Word = Integers;
  using Sum = Integers;
  static constexpr int kWordBytes = 64, kStepBytes = 4, kParts = 1;
#if defined(SD_DOT_BYTES)
  static constexpr int kChains = 2;
#else
  static constexpr int kChains = 1;
#endif
  static inline Word load(const uint8_t* from) {
    const __m256i* const halves = reinterpret_cast<const __m256i*>(from);
    return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
  }
  static inline void store(uint8_t* to, const Word& word) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), word.low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, word.high);
  }
  static inline Sum start() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static inline Sum add(Sum a, Sum b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  static inline __m256i four(const uint8_t* x) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  static inline Integers corrected(Sum sum, int32_t correction) {
    const __m256i added = _mm256_set1_epi32(correction);
    return {_mm256_add_epi32(sum.low, added), _mm256_add_epi32(sum.high, added)};
  }
};

#if defined(SD_DOT_BYTES)

// Weights without a sign (the value plus a bias) times x; the correction takes the bias times the sum of x off again.
struct BiasedOp : IntegerOp {
  static inline void dot(Sum& sum, const Word& word, int, const uint8_t* x) {
    const __m256i other = four(x);
    sum.low = _mm256_dpbusd_avx_epi32(sum.low, word.low, other);
    sum.high = _mm256_dpbusd_avx_epi32(sum.high, word.high, other);
  }
  static inline Integers finish(Sum sum, int32_t correction) { return corrected(sum, correction); }
};
template <>
struct Op<SD_INT8> : BiasedOp {
  static constexpr int kBias = 128;
};
template <>
struct Op<SD_INT4> : BiasedOp {
  static constexpr int kBias = 8;
};

#else

// The sign moves from the weight to x: a product of a pair is at most 2 * 128 * 127 and fits into 16 bits.
template <>
struct Op<SD_INT8> : IntegerOp {
  static constexpr int kBias = 0;
  static inline __m256i part(__m256i weight, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static inline void dot(Sum& sum, const Word& word, int, const uint8_t* x) {
    const __m256i other = four(x);
    sum.low = _mm256_add_epi32(sum.low, part(word.low, other));
    sum.high = _mm256_add_epi32(sum.high, part(word.high, other));
  }
  static inline Integers finish(Sum sum, int32_t) { return sum; }
};

// Weights from 0 to 15 (the value plus 8): eight sums of pairs, each at most 2 * 15 * 127, fit into 16 bits.
template <>
struct Op<SD_INT4> : IntegerOp {
  static constexpr int kBias = 8;
  static inline Sum add(Sum a, Sum b) {
    return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
  }
  static inline void dot(Sum& sum, const Word& word, int, const uint8_t* x) {
    const __m256i other = four(x);
    sum.low = _mm256_add_epi16(sum.low, _mm256_maddubs_epi16(word.low, other));
    sum.high = _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(word.high, other));
  }
  static inline Integers finish(Sum sum, int32_t correction) {
    const __m256i ones = _mm256_set1_epi16(1);
    return corrected({_mm256_madd_epi16(sum.low, ones), _mm256_madd_epi16(sum.high, ones)}, correction);
  }
};

#endif

SD_INLINE __m256i two_loads(const void* low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// 32 columns of int8, as two times 16 whose values are [begin, middle) and [middle, end).
SD_INLINE __m256i expand_bytes(const uint8_t* begin, const uint8_t* middle, const uint8_t* end, uint64_t mask, int bit) {
  const __m256i first = two_loads(table_row(tables.first, mask, bit), table_row(tables.first, mask, bit + 16));
  const __m256i last = two_loads(table_row(tables.last, mask, bit + 8), table_row(tables.last, mask, bit + 24));
  return _mm256_or_si256(_mm256_shuffle_epi8(two_loads(begin, middle), first),
                         _mm256_shuffle_epi8(two_loads(middle - 16, end - 16), last));
}

SD_INLINE Integers expand_word(const uint8_t* values, const uint8_t* end, uint64_t mask) {
  const uint8_t* const one = values + _mm_popcnt_u32(uint32_t(mask) << 16);
  const uint8_t* const two = values + _mm_popcnt_u32(uint32_t(mask));
  const uint8_t* const three = values + _mm_popcnt_u64(mask << 16);
  return {expand_bytes(values, one, two, mask, 0), expand_bytes(two, three, end, mask, 32)};
}

SD_INLINE __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// 16 bytes to their 32 halves, one to a byte.
SD_INLINE __m256i nibbles(const uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(0x0f));
}

// 8 columns of two bytes each, from the 8 mask bits from `bit` on.
template <bool full>
SD_INLINE __m128i expand_pairs(const uint8_t*& values, uint64_t mask, int bit) {
  const __m128i dense = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  if constexpr (full) {
    values += 16;
    return dense;
  }
  values += 2 * _mm_popcnt_u32(uint32_t(mask >> bit) << 24);
  return _mm_shuffle_epi8(dense, _mm_load_si128(table_row(tables.pairs, mask, bit)));
}

template <bool full>
SD_INLINE __m256 expand_floats(const uint8_t*& values, uint32_t mask) {
  const __m256 dense = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  if constexpr (full) {
    values += 32;
    return dense;
  }
  values += 4 * _mm_popcnt_u32(mask);
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.lanes[mask]));
  // A lane of -1 has its sign set: turned around, it clears the column.
  const __m256 dropped = _mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31));
  return _mm256_andnot_ps(dropped, _mm256_permutevar8x32_ps(dense, lanes));
}

template <int type, bool full>
struct Reader {
  const uint64_t* masks;
  const uint8_t* values;
  const uint8_t* scales;
  int scale_step;
  // For int4: the values of a group, one to a byte. They are written a group ahead, because a load of bytes that two
  // stores have just written waits for both. 32 bytes in front and behind because expand_bytes reads there.
  static constexpr bool kStaged = type == SD_INT4 && !full;
  static constexpr int kUnpacked = kStaged ? 576 : 1;
  alignas(32) uint8_t space[2][kUnpacked];
  const uint8_t* unpacked;
  int64_t left, turn = 0;

  Reader() = default;
  Reader(const sd_matrix* m, int64_t tile)
      : masks(full ? nullptr : m->masks + tile * m->groups * kWords),
        values(m->values + m->offsets[tile]),
        scales(reinterpret_cast<const uint8_t*>(m->scales + tile * m->scale_groups * kTileRows)),
        scale_step(m->scale_group ? 2 * kTileRows * kGroup / m->scale_group : 0),
        left(m->groups) {
    if constexpr (kStaged) unpack_group(masks);
  }

  // The halves of the next group's bytes into the other space.
  SD_INLINE void unpack_group(const uint64_t* words) {
    int64_t bytes = 0;
#pragma GCC unroll 8
    for (int w = 0; w < kWords; ++w) bytes += (_mm_popcnt_u64(words[w]) + 1) / 2;
    uint8_t* to = space[turn ^ 1] + 32;
    for (int64_t i = 0; i < bytes; i += 16, to += 32) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), nibbles(values + i));
      _mm_prefetch(values + i + kValueBytesAhead, _MM_HINT_T0);
    }
    values += bytes;
  }

  inline void group() {
    if constexpr (!full) _mm_prefetch(reinterpret_cast<const char*>(masks) + kMaskBytesAhead, _MM_HINT_T0);
    if constexpr (type == SD_INT8 || type == SD_INT4) {
      _mm_prefetch(scales + kScaleBytesAhead, _MM_HINT_T0);
      scales += scale_step;
    }
    if constexpr (kStaged) {
      turn ^= 1;
      unpacked = space[turn] + 32;
      if (--left > 0) unpack_group(masks + kWords);
    }
  }

  // The next columns of 8 rows each, from 8 mask bits that begin at `bit`.
  SD_INLINE __m256 part(uint64_t mask, int bit) {
    if constexpr (type == SD_F32) return expand_floats<full>(values, uint32_t(mask >> bit) & 0xff);
    else return _mm256_cvtph_ps(expand_pairs<full>(values, mask, bit));
  }

  SD_INLINE typename Op<type>::Word next() {
    const uint64_t mask = full ? ~uint64_t(0) : *masks++;
    if constexpr (!kStaged) _mm_prefetch(values + kValueBytesAhead, _MM_HINT_T0);
    if constexpr (type == SD_INT8) {
      const uint8_t* const end = values + (full ? 64 : _mm_popcnt_u64(mask));
      Integers word = full ? Integers{load_bytes(values), load_bytes(values + 32)} : expand_word(values, end, mask);
      values = end;
      if (Op<type>::kBias) {
        const __m256i bias = _mm256_set1_epi8(char(0x80));
        word = {_mm256_xor_si256(word.low, bias), _mm256_xor_si256(word.high, bias)};
      }
      return word;
    } else if constexpr (type == SD_INT4) {
      Integers word;
      if constexpr (full) {
        word = {nibbles(values), nibbles(values + 16)};
        values += 32;
      } else {
        const int64_t count = _mm_popcnt_u64(mask);
        word = expand_word(unpacked, unpacked + count, mask);
        unpacked += (count + 1) & ~int64_t(1);
      }
      const __m256i bias = _mm256_set1_epi8(8);
      return {_mm256_xor_si256(word.low, bias), _mm256_xor_si256(word.high, bias)};
    } else {
      typename Op<type>::Word word;
      if constexpr (type == SD_BF16) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i rows[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const __m128i first = expand_pairs<full>(values, mask, 32 * half + 16 * i);
            const __m128i second = expand_pairs<full>(values, mask, 32 * half + 16 * i + 8);
            rows[i] = _mm256_set_m128i(second, first);
          }
          const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
          word.columns[2 * half] = {_mm256_castsi256_ps(_mm256_slli_epi32(rows[0], 16)),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(rows[1], 16))};
          word.columns[2 * half + 1] = {_mm256_castsi256_ps(_mm256_and_si256(rows[0], odd)),
                                        _mm256_castsi256_ps(_mm256_and_si256(rows[1], odd))};
        }
      } else {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const __m256 low = part(mask, 16 * c);
          word.columns[c] = {low, part(mask, 16 * c + 8)};
          if (type == SD_F32 && c) _mm_prefetch(values + kValueBytesAhead + 64 * c, _MM_HINT_T0);
        }
      }
      return word;
    }
  }
};

}  // namespace

#include "product.h"
