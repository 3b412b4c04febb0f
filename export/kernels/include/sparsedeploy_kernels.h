/* Sparse matrix products on CPUs: weights stored as one mask bit each, the kept values, and a 16-bit scale per group.
 *
 * A C interface without Python, torch or any engine in it. The library starts no threads while it multiplies: the
 * caller shares the rows out. Every function may be called from several threads at once on the same matrix.
 *
 * Typical use:
 *
 *     sd_matrix* w;
 *     if (sd_pack_gguf(8, blocks, row_bytes, rows, columns, 4, &w) != SD_OK) ...;      // Q8_0
 *     void* x = aligned_alloc(64, sd_activation_bytes(w, batch));
 *     sd_prepare_activations(w, input, columns, batch, 0, batch, x);                    // once per input
 *     sd_matmul(w, x, batch, 0, rows, output, rows);                                    // or each thread its rows
 *     sd_free(w);
 */
#ifndef SPARSEDEPLOY_KERNELS_H
#define SPARSEDEPLOY_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define SD_KERNELS_VERSION 2
/* Rows are stored in tiles of 16; shares of rows begin at multiples of it. */
#define SD_TILE_ROWS 16

#if defined(_WIN32)
#define SD_API __declspec(dllexport)
#else
#define SD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sd_matrix sd_matrix;

/* What a kept value is stored as. INT4 is two's complement, -8 to 7. */
typedef enum sd_type { SD_F32 = 0, SD_BF16 = 1, SD_F16 = 2, SD_INT8 = 3, SD_INT4 = 4 } sd_type;

typedef enum sd_status {
  SD_OK = 0,
  SD_ERROR_ARGUMENT = 1, /* a null pointer, a size, a type or a share of rows that is not allowed */
  SD_ERROR_MEMORY = 2,
  SD_ERROR_SCALE = 3,  /* a scale is NaN or infinite */
  SD_ERROR_FORMAT = 4, /* mask, offsets and values disagree, or an int4 value is out of range */
  SD_ERROR_INEXACT = 5, /* the source cannot be stored bit for bit (Q4_1 without an exact zero); leave it dense */
  SD_ERROR_ISA = 6      /* an instruction set that is unknown or that this processor lacks */
} sd_status;

typedef struct sd_info {
  int64_t rows, columns;
  sd_type type;
  int32_t group;  /* columns that share a scale; 0 for floating-point values */
  int64_t values; /* kept values; rows * columns where no mask is stored */
  int64_t bytes;  /* memory that the matrix takes */
} sd_info;

/* SD_KERNELS_VERSION of the library: compare it with the header's. */
SD_API int sd_version(void);
/* One line about a status. Never null. */
SD_API const char* sd_status_text(int status);
/* The instruction set in use: "portable", "avx2", "avxvnni", "avx512" or "avx512bf16". It is the fastest that the
 * processor has (on Intel's, avx512 is faster than avx512bf16), or the one that the environment variable SPARSEDEPLOY_ISA
 * names. */
SD_API const char* sd_isa_name(void);
/* Use another instruction set from now on; for tests. Prepared activations must be prepared again. */
SD_API int sd_use_isa(const char* name);

/* Pack a dense floating-point matrix (row_stride in elements). Kept are the weights that `mask` marks (one byte each,
 * [rows, columns]) or, where `mask` is null, those that are not zero; -0.0 counts as zero. Values are kept bit for bit.
 * The packing functions use up to `threads` threads of their own. */
SD_API int sd_pack_dense(int type, const void* weights, int64_t row_stride, int64_t rows, int64_t columns,
                         const uint8_t* mask, int threads, sd_matrix** out);

/* Pack quantised values: `type` SD_INT8 or SD_INT4, values int8 [rows, columns] (-8 to 7 for SD_INT4), scales float16
 * [rows, ceil(columns / group)], `group` a multiple of 32. Without a mask, values that are 0 and whole groups whose
 * scale is 0 are left out. */
SD_API int sd_pack_quantized(int type, int group, const int8_t* values, const uint16_t* scales, int64_t rows,
                             int64_t columns, const uint8_t* mask, int threads, sd_matrix** out);

/* Pack rows of a GGUF tensor. `gguf_type` is the number that GGUF gives it: 0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 8 Q8_0, 30
 * BF16. Quantised values and scales are kept bit for bit: Q8_0 as int8 (zero is 0), Q4_0 as int4 (zero is 8). Q4_1 is
 * taken where every block has a code q0 with d * q0 + m equal to 0 exactly and all q - q0 fit into -8 to 7; otherwise
 * the answer is SD_ERROR_INEXACT. */
SD_API int sd_pack_gguf(int gguf_type, const void* data, size_t row_bytes, int64_t rows, int64_t columns, int threads,
                        sd_matrix** out);

/* The same, but every weight is kept and no mask is stored: for a matrix with few zeros, such as a head. */
SD_API int sd_pack_gguf_full(int gguf_type, const void* data, size_t row_bytes, int64_t rows, int64_t columns,
                             int threads, sd_matrix** out);

SD_API void sd_free(sd_matrix* matrix);
SD_API int sd_describe(const sd_matrix* matrix, sd_info* info);

/* Rows `first` to `last` as float32 [last - first, columns], rows row_stride apart: what the product multiplies with. */
SD_API int sd_unpack(const sd_matrix* matrix, int64_t first, int64_t last, float* out, int64_t row_stride);

/* Bytes for `batch` prepared rows of activations. The buffer must begin at a multiple of 64. */
SD_API size_t sd_activation_bytes(const sd_matrix* matrix, int64_t batch);

/* Bring rows `first` to `last` of x float32 [batch, columns] (rows row_stride apart) into the form that the product
 * reads: for int8 and int4 weights int8 with a scale for every 32 columns, as llama.cpp's Q8_0. Threads may share the
 * rows. One buffer serves every matrix of the same type and number of columns. A NaN or an infinity among 32 activations
 * makes the products that use them NaN. */
SD_API int sd_prepare_activations(const sd_matrix* matrix, const float* x, int64_t row_stride, int64_t batch,
                                  int64_t first, int64_t last, void* buffer);

/* out[b, r] = sum over c of w[r, c] x[b, c] for the rows `first` to `last`; out is float32 [batch, rows], rows
 * out_stride apart. `first` is a multiple of SD_TILE_ROWS, `last` too or the number of rows. */
SD_API int sd_matmul(const sd_matrix* matrix, const void* buffer, int64_t batch, int64_t first, int64_t last,
                     float* out, int64_t out_stride);

/* The rows of thread `index` out of `count`: even shares of whole tiles; first == last for an idle thread. */
SD_API void sd_share_rows(const sd_matrix* matrix, int index, int count, int64_t* first, int64_t* last);

#ifdef __cplusplus
}
#endif
#endif
