#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "targets.h"
SD_TARGET("avx2,fma,f16c,popcnt,bmi,bmi2,avxvnni")
#define SD_DOT_BYTES 1
#include "avx2.inl"
namespace {
const Kernels kernels{"avxvnni", false, quantize, matmul};
}
SD_TARGET_END
const Kernels* const kernels_avxvnni = &kernels;
#else
const Kernels* const kernels_avxvnni = nullptr;
#endif
