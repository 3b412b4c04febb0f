#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "targets.h"
SD_TARGET("avx2,fma,f16c,popcnt,bmi,bmi2")
#include "avx2.inl"
namespace {
const Kernels kernels{"avx2", false, quantize, matmul};
}
SD_TARGET_END
const Kernels* const kernels_avx2 = &kernels;
#else
const Kernels* const kernels_avx2 = nullptr;
#endif
