// AVX-512 with VBMI2 and VNNI: one register holds a word's 64 int8 weights, expanded by the mask. With SD_DOT_BF16,
// bfloat16 weights meet bfloat16 activations.

#include <immintrin.h>

#include "matrix.h"
#include "numbers.h"
#include "quantize.h"

namespace {

constexpr int kDirectBatch = 16;   // up to here words are multiplied as they are expanded
constexpr int kRowsTogether = 6;   // rows of x per pass over an expanded block
constexpr int kTiles = 2;
constexpr size_t kBlockBytes = 16384;
constexpr int kValueBytesAhead = 2048;  // how far ahead of its use memory is asked for
constexpr int kMaskBytesAhead = 1024;
constexpr int kScaleBytesAhead = 512;

using Rows = __m512;
inline Rows zero_rows() { return _mm512_setzero_ps(); }
inline Rows load_rows(const float* from) { return _mm512_loadu_ps(from); }
inline void store_rows(float* to, Rows rows) { _mm512_storeu_ps(to, rows); }
inline Rows add_rows(Rows a, Rows b) { return _mm512_add_ps(a, b); }
inline Rows load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Rows scaled(Rows sum, __m512i integers, Rows scale, float x) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), _mm512_mul_ps(scale, _mm512_set1_ps(x)), sum);
}

// Zeros that the compiler does not know for zeros. With them an expansion merges into a register that has just been
// written; the form that clears the other columns itself waits, on Zen 4 and 5, for whatever was in its register before
// (measured: half the speed).
inline __m512i fresh_zeros() {
  __m512i zeros;
  __asm__("vpxord %0, %0, %0" : "=v"(zeros));
  return zeros;
}

template <int type>
struct Op {
  struct Word {
    __m512 columns[4];
  };
  using Sum = Rows;
  static constexpr int kWordBytes = 256, kStepBytes = 16, kParts = 4, kChains = 4;
  static inline Word load(const uint8_t* from) {
    Word word;
    for (int c = 0; c < 4; ++c) word.columns[c] = _mm512_load_ps(from + 64 * c);
    return word;
  }
  static inline void store(uint8_t* to, const Word& word) {
    for (int c = 0; c < 4; ++c) _mm512_store_ps(to + 64 * c, word.columns[c]);
  }
  static inline Sum start() { return zero_rows(); }
  static inline Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static inline void dot(Sum& sum, const Word& word, int c, const uint8_t* x) {
    sum = _mm512_fmadd_ps(word.columns[c], _mm512_set1_ps(reinterpret_cast<const float*>(x)[c]), sum);
  }
};

#if defined(SD_DOT_BF16)
template <>
struct Op<SD_BF16> {
  struct Word {
    __m512i pairs[2];
  };
  using Sum = Rows;
  static constexpr int kWordBytes = 128, kStepBytes = 8, kParts = 2, kChains = 4;
  static inline Word load(const uint8_t* from) {
    return {{_mm512_load_si512(from), _mm512_load_si512(from + 64)}};
  }
  static inline void store(uint8_t* to, const Word& word) {
    _mm512_store_si512(to, word.pairs[0]);
    _mm512_store_si512(to + 64, word.pairs[1]);
  }
  static inline Sum start() { return zero_rows(); }
  static inline Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static inline void dot(Sum& sum, const Word& word, int p, const uint8_t* x) {
    const __m512i pair = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x)[p]);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)word.pairs[p], (__m512bh)pair);
  }
};
#endif

// Weights without a sign (the value plus a bias), for the one product there is: unsigned times signed bytes. The
// correction takes the bias times the sum of x off again.
struct IntegerOp {
  using Word = __m512i;
  using Sum = __m512i;
  static constexpr int kWordBytes = 64, kStepBytes = 4, kParts = 1, kChains = 2;
  static inline Word load(const uint8_t* from) { return _mm512_load_si512(from); }
  static inline void store(uint8_t* to, Word word) { _mm512_store_si512(to, word); }
  static inline Sum start() { return _mm512_setzero_si512(); }
  static inline Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static inline void dot(Sum& sum, Word word, int, const uint8_t* x) {
    sum = _mm512_dpbusd_epi32(sum, word, _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)));
  }
  static inline __m512i finish(Sum sum, int32_t correction) { return _mm512_add_epi32(sum, _mm512_set1_epi32(correction)); }
};
template <>
struct Op<SD_INT8> : IntegerOp {};
template <>
struct Op<SD_INT4> : IntegerOp {};

template <int type, bool full>
struct Reader {
  const uint64_t* masks;
  const uint8_t* values;
  const uint8_t* scales;
  int scale_step;

  Reader() = default;
  Reader(const sd_matrix* m, int64_t tile)
      : masks(full ? nullptr : m->masks + tile * m->groups * kWords),
        values(m->values + m->offsets[tile]),
        scales(reinterpret_cast<const uint8_t*>(m->scales + tile * m->scale_groups * kTileRows)),
        scale_step(m->scale_group ? 2 * kTileRows * kGroup / m->scale_group : 0) {}

  inline void group() {
    if constexpr (!full) _mm_prefetch(reinterpret_cast<const char*>(masks) + kMaskBytesAhead, _MM_HINT_T0);
    if constexpr (type == SD_INT8 || type == SD_INT4) {
      _mm_prefetch(scales + kScaleBytesAhead, _MM_HINT_T0);
      scales += scale_step;
    }
  }

  inline __m512i expand16(uint32_t mask) {
    if constexpr (full) {
      values += 64;
      return _mm512_loadu_si512(values - 64);
    }
    const __m512i dense = _mm512_mask_expand_epi16(fresh_zeros(), mask, _mm512_loadu_si512(values));
    values += 2 * _mm_popcnt_u32(mask);
    return dense;
  }

  inline typename Op<type>::Word next() {
    const uint64_t mask = full ? ~uint64_t(0) : *masks++;
    _mm_prefetch(values + kValueBytesAhead, _MM_HINT_T0);
    if constexpr (type == SD_INT8) {
      __m512i dense = _mm512_loadu_si512(values);
      if constexpr (!full) dense = _mm512_mask_expand_epi8(fresh_zeros(), mask, dense);
      values += full ? 64 : _mm_popcnt_u64(mask);
      return _mm512_xor_si512(dense, _mm512_set1_epi8(char(0x80)));
    } else if constexpr (type == SD_INT4) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
      // (wide | wide << 4) & 0x0f0f
      const __m512i halves = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi8(0x0f), 0xa8);
      values += full ? 32 : (_mm_popcnt_u64(mask) + 1) / 2;
      return _mm512_xor_si512(full ? halves : _mm512_mask_expand_epi8(fresh_zeros(), mask, halves), _mm512_set1_epi8(8));
    } else {
      typename Op<type>::Word word;
      if constexpr (type == SD_F32) {
        for (int c = 0; c < 4; ++c) {
          const uint32_t part = uint32_t(mask >> (16 * c)) & 0xffff;
          word.columns[c] = _mm512_loadu_ps(values);
          if constexpr (!full)
            word.columns[c] = _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zeros()), __mmask16(part), word.columns[c]);
          values += full ? 64 : 4 * _mm_popcnt_u32(part);
          if (c) _mm_prefetch(values + kValueBytesAhead + 64 * c, _MM_HINT_T0);
        }
      } else {
        _mm_prefetch(values + kValueBytesAhead + 64, _MM_HINT_T0);
        for (int half = 0; half < 2; ++half) {
          const __m512i dense = expand16(uint32_t(mask >> (32 * half)));
          if constexpr (type == SD_F16) {
            word.columns[2 * half] = _mm512_cvtph_ps(_mm512_castsi512_si256(dense));
            word.columns[2 * half + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(dense, 1));
          } else {
#if defined(SD_DOT_BF16)
            word.pairs[half] = dense;
#else
            word.columns[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(dense, 16));
            word.columns[2 * half + 1] = _mm512_castsi512_ps(_mm512_and_si512(dense, _mm512_set1_epi32(int(0xffff0000))));
#endif
          }
        }
      }
      return word;
    }
  }
};

}  // namespace

#include "product.h"
