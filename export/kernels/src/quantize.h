// Activations to int8 with AVX2; the same numbers as the portable code, bit for bit.
#pragma once

#include <immintrin.h>

#include "matrix.h"
#include "numbers.h"

namespace {

inline int32_t largest_lane(__m256i v) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}

void quantize(const float* x, int64_t columns, int64_t groups, int bias, int8_t* q, float* scales, int32_t* corrections) {
  float last[kGroup] = {};
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < groups; ++g) {
    const float* source = x + g * kGroup;
    if (columns - g * kGroup < kGroup) {
      memcpy(last, source, (columns - g * kGroup) * sizeof(float));
      source = last;
    }
    __m256 v[4];
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(source + 8 * i);
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude_bits));
    }
    const uint32_t bits = uint32_t(largest_lane(largest));
    const float magnitude = bits_to_float(bits);
    const bool finite = bits < 0x7f800000, none = magnitude < 1e-30f;
    const __m256 inverse = _mm256_set1_ps(none || !finite ? 0.0f : 127.0f / magnitude);
    __m256i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + g * kGroup),
                        finite ? _mm256_permutevar8x32_epi32(bytes, order) : _mm256_setzero_si256());
    scales[g] = none ? 0.0f : finite ? magnitude / 127.0f : __builtin_nanf("");
    corrections[g] = finite ? -bias * _mm_cvtsi128_si32(sum) : 0;
  }
}

}  // namespace
