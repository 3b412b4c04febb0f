# Included by ggml's project().
# With AVX512-FP16 ggml's loops over float16 take 128 values a step, and attention with heads of 64 values is left to
# their scalar remainder. Without it a step is 64: SmolLM2 in Q4_0 decodes 140 tokens/s instead of 100.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-avx512fp16 knows_avx512fp16)
if(knows_avx512fp16)
  add_compile_options(-mno-avx512fp16)
endif()
