// MUL_MAT with packed weights, shared by the threads of a graph. Activations are read and written in place.

#include "backend.h"
#include "ggml-impl.h"

namespace sparsedeploy {
namespace {

// Up to this many rows of activations each thread prepares for itself: cheaper than waiting for the others.
constexpr int64_t kOwnRows = 2;

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The activations as equal planes of rows: one plane where their rows follow each other evenly.
struct Planes {
  int64_t rows, second, third;
};

Planes planes_of(const ggml_tensor* op) {
  const ggml_tensor* x = op->src[1];
  const bool even = x->nb[2] == x->nb[1] * size_t(x->ne[1]) && x->nb[3] == x->nb[2] * size_t(x->ne[2]) &&
                    op->nb[2] == op->nb[1] * size_t(op->ne[1]) && op->nb[3] == op->nb[2] * size_t(op->ne[2]);
  if (even) return {x->ne[1] * x->ne[2] * x->ne[3], 1, 1};
  return {x->ne[1], x->ne[2], x->ne[3]};
}

void check(int status, const ggml_tensor* op) {
  if (status != SD_OK) GGML_ABORT("sparsedeploy: %s: %s", op->name, sd_status_text(status));
}

}  // namespace

bool can_multiply(const ggml_tensor* op) {
  const ggml_tensor* w = op->src[0];
  const ggml_tensor* x = op->src[1];
  return op->op == GGML_OP_MUL_MAT && w->view_src == nullptr && w->ne[2] == 1 && w->ne[3] == 1 &&
         x->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) &&
         op->nb[0] == sizeof(float) && (x->ne[1] == 1 || x->nb[1] >= x->ne[0] * sizeof(float));
}

size_t scratch_bytes(const sd_matrix* matrix, const ggml_tensor* op, int threads) {
  const int64_t rows = planes_of(op).rows;
  const size_t one = aligned(sd_activation_bytes(matrix, rows));
  return (rows <= kOwnRows ? one * size_t(threads) : one) + 64;
}

void multiply(const sd_matrix* matrix, ggml_tensor* op, const Member& member, void* scratch) {
  const ggml_tensor* x = op->src[1];
  const Planes planes = planes_of(op);
  // The stride of a single row means nothing.
  const int64_t x_stride = planes.rows > 1 ? int64_t(x->nb[1] / sizeof(float)) : x->ne[0];
  const int64_t out_stride = planes.rows > 1 ? int64_t(op->nb[1] / sizeof(float)) : op->ne[0];
  char* prepared = reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(scratch)));
  const bool alone = planes.rows <= kOwnRows || member.count == 1;
  int64_t from = 0, to = planes.rows;
  if (planes.rows <= kOwnRows) {
    prepared += aligned(sd_activation_bytes(matrix, planes.rows)) * size_t(member.index);
  } else {
    from = planes.rows * member.index / member.count;
    to = planes.rows * (member.index + 1) / member.count;
  }
  int64_t first, last;
  sd_share_rows(matrix, member.index, member.count, &first, &last);
  for (int64_t i3 = 0; i3 < planes.third; ++i3) {
    for (int64_t i2 = 0; i2 < planes.second; ++i2) {
      const char* in = static_cast<const char*>(x->data) + i2 * x->nb[2] + i3 * x->nb[3];
      char* out = static_cast<char*>(op->data) + i2 * op->nb[2] + i3 * op->nb[3];
      if (!alone && i2 + i3 > 0) member.barrier(member.context);
      check(sd_prepare_activations(matrix, reinterpret_cast<const float*>(in), x_stride, planes.rows, from, to, prepared), op);
      if (!alone) member.barrier(member.context);
      if (first < last)
        check(sd_matmul(matrix, prepared, planes.rows, first, last, reinterpret_cast<float*>(out), out_stride), op);
    }
  }
}

}  // namespace sparsedeploy
