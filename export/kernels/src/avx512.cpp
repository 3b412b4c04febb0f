#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "targets.h"
SD_TARGET("avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
#include "avx512.inl"
namespace {
const Kernels kernels{"avx512", false, quantize, matmul};
}
SD_TARGET_END
const Kernels* const kernels_avx512 = &kernels;
#else
const Kernels* const kernels_avx512 = nullptr;
#endif
