#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "targets.h"
SD_TARGET("avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16")
#define SD_DOT_BF16 1
#include "avx512.inl"
namespace {
const Kernels kernels{"avx512bf16", true, quantize, matmul};
}
SD_TARGET_END
const Kernels* const kernels_avx512bf16 = &kernels;
#else
const Kernels* const kernels_avx512bf16 = nullptr;
#endif
