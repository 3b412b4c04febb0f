#include "matrix.h"
const Kernels* const kernels_avx2 = nullptr;
const Kernels* const kernels_avxvnni = nullptr;
const Kernels* const kernels_avx512 = nullptr;
const Kernels* const kernels_avx512bf16 = nullptr;
