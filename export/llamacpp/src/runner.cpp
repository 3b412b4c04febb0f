// llama.cpp behind a few plain functions, for the worker: a model with a cache, and one product for the check.

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Model {
  llama_model* model = nullptr;
  llama_context* context = nullptr;
  const llama_vocab* vocabulary = nullptr;
};

void start() {
  static const bool done = [] {
    // Loads the backend that GGML_BACKEND_PATH names.
    ggml_backend_load_all();
    llama_backend_init();
    return true;
  }();
  (void)done;
}

void close(Model* model) {
  if (model->context) llama_free(model->context);
  if (model->model) llama_model_free(model->model);
  delete model;
}

}  // namespace

// Load a GGUF file with a cache for `positions` tokens in each of `sequences` sequences; null where it fails. `exact`
// keeps the cache and the attention in float32 rather than float16.
EXPORTED void* runner_open(const char* path, int threads, int positions, int sequences, int exact) {
  start();
  Model* model = new Model;
  llama_model_params parameters = llama_model_default_params();
  model->model = llama_model_load_from_file(path, parameters);
  if (!model->model) {
    close(model);
    return nullptr;
  }
  model->vocabulary = llama_model_get_vocab(model->model);
  llama_context_params context = llama_context_default_params();
  context.n_ctx = uint32_t(positions) * uint32_t(sequences);
  context.n_batch = context.n_ctx;
  context.n_ubatch = std::min<uint32_t>(512, context.n_ctx);
  context.n_seq_max = uint32_t(sequences);
  context.n_threads = context.n_threads_batch = threads;
  if (exact) {
    context.type_k = context.type_v = GGML_TYPE_F32;
    // It would cast them to float16.
    context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  }
  model->context = llama_init_from_model(model->model, context);
  if (!model->context) {
    close(model);
    return nullptr;
  }
  return model;
}

EXPORTED void runner_close(void* model) { close(static_cast<Model*>(model)); }

EXPORTED int runner_vocabulary(void* model) { return llama_vocab_n_tokens(static_cast<Model*>(model)->vocabulary); }

// Tokens of a text; the number of them, or less than 0 where `capacity` is too small.
EXPORTED int runner_tokenize(void* model, const char* text, int length, int special, int* tokens, int capacity) {
  return llama_tokenize(static_cast<Model*>(model)->vocabulary, text, length, tokens, capacity, special, false);
}

// Run `count` more tokens [sequences, count] after `past` ones of each sequence; 0 where it works. past 0 starts again.
// `logits` is [sequences * count, vocabulary] where `all` is set, else [sequences, vocabulary], for the last ones; it
// may be null.
EXPORTED int runner_run(void* handle, const int* tokens, int count, int past, int sequences, int all, float* logits) {
  Model* model = static_cast<Model*>(handle);
  if (past == 0) llama_memory_clear(llama_get_memory(model->context), true);
  const int total = count * sequences;
  llama_batch batch = llama_batch_init(total, 0, 1);
  batch.n_tokens = total;
  for (int i = 0; i < total; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = past + i % count;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = i / count;
    batch.logits[i] = int8_t(all || i % count == count - 1);
  }
  const int status = llama_decode(model->context, batch);
  if (status == 0 && logits) {
    const size_t size = size_t(llama_vocab_n_tokens(model->vocabulary));
    for (int i = 0; i < total; ++i) {
      if (!batch.logits[i]) continue;
      memcpy(logits, llama_get_logits_ith(model->context, i), size * sizeof(float));
      logits += size;
    }
  }
  llama_batch_free(batch);
  return status;
}

// out [batch, rows] = x [batch, columns] times a weight of any GGUF type, by llama.cpp's own CPU backend, or with the
// weight offered to ours (`offered`). Returns 1 where the weight was packed, 0 where it was not, less than 0 on failure.
EXPORTED int runner_product(int type, const void* weights, int64_t rows, int64_t columns, const float* x, int64_t batch,
                            int threads, int offered, float* out) {
  start();
  ggml_backend_dev_t own = ggml_backend_dev_by_name("SPARSEDEPLOY");
  if (offered && !own) return -1;
  ggml_init_params parameters = {16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true};
  ggml_context* context = ggml_init(parameters);
  ggml_tensor* w = ggml_new_tensor_2d(context, ggml_type(type), columns, rows);
  ggml_set_name(w, "blk.0.ffn_up.weight");
  ggml_backend_buffer_type_t home = offered ? ggml_backend_dev_buffer_type(own) : ggml_backend_cpu_buffer_type();
  ggml_backend_buffer_t weight_buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, home);
  ggml_backend_buffer_set_usage(weight_buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  ggml_backend_tensor_set(w, weights, 0, ggml_nbytes(w));
  ggml_tensor* input = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, batch);
  ggml_set_input(input);
  ggml_tensor* product = ggml_mul_mat(context, w, input);
  ggml_set_output(product);
  ggml_cgraph* graph = ggml_new_graph(context);
  ggml_build_forward_expand(graph, product);
  ggml_backend_t cpu = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(cpu, threads);
  std::vector<ggml_backend_t> backends;
  if (own) {
    backends.push_back(ggml_backend_dev_init(own, nullptr));
    auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(own), "ggml_backend_set_n_threads"));
    set_threads(backends[0], threads);
  }
  backends.push_back(cpu);
  ggml_backend_sched_t scheduler =
      ggml_backend_sched_new(backends.data(), nullptr, int(backends.size()), GGML_DEFAULT_GRAPH_SIZE, false, false);
  int result = -2;
  if (ggml_backend_sched_alloc_graph(scheduler, graph)) {
    ggml_backend_tensor_set(input, x, 0, ggml_nbytes(input));
    if (ggml_backend_sched_graph_compute(scheduler, graph) == GGML_STATUS_SUCCESS) {
      ggml_backend_tensor_get(product, out, 0, ggml_nbytes(product));
      // A tensor that stays dense is moved out of our buffers, or is computed by the CPU backend.
      result = offered && (ggml_backend_sched_get_tensor_backend(scheduler, product) != cpu || w->extra != nullptr) &&
               w->buffer == weight_buffer;
    }
  }
  ggml_backend_sched_free(scheduler);
  for (ggml_backend_t backend : backends) ggml_backend_free(backend);
  ggml_backend_buffer_free(weight_buffer);
  ggml_free(context);
  return result;
}
