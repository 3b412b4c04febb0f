// float16 and bfloat16 in integer arithmetic. All static: every file is compiled for its own instruction set, and a
// function that two files share could end up with the instructions of the wrong one.
#pragma once

#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x0400) return bits_to_float(sign | float_to_bits(float(rest) * 0x1p-24f));
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

static inline bool half_is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

static inline float bfloat_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

static inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
