// Times the packed product, as a model runs it: one matrix after the other, none of them in the cache, which is filled
// with other data before every round. With -DWITH_GGML also the dense product of ggml's CPU backend on the same values.
//
//     product TYPE ROWS COLUMNS BATCH THREADS MEGABYTES ROUNDS RATE...
//
// prints, for the dense product and each rate of zeros (or `full`: no zeros and no masks), the best seconds of one
// product and the weight's bytes.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sparsedeploy_kernels.h"

#if defined(WITH_GGML)
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#endif

// One thread is timed by the processor time that it had, several by the clock on the wall: so that other work on the
// machine disturbs less.
static double now(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Options {
  std::string type;
  int64_t rows, columns, batch;
  int threads;
  double megabytes;
  int rounds;
};

// Threads that meet at a counter after every matrix, without sleeping: what an engine's pool does.
struct Meeting {
  std::atomic<int> arrived{0}, turn{0};
  void wait(int count) {
    const int now = turn.load();
    if (arrived.fetch_add(1) + 1 == count) {
      arrived = 0;
      turn.fetch_add(1);
    } else {
      while (turn.load() == now) __builtin_ia32_pause();
    }
  }
};

struct Case {
  std::string name;
  double bytes = 0;
  std::function<void()> run;
  double best = 1e9;
};

static std::vector<float> random_floats(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

static int gguf_type(const std::string& type) {
  return type == "f32" ? 0 : type == "f16" ? 1 : type == "q4_0" ? 2 : type == "q8_0" ? 8 : 30;
}

static uint16_t to_half(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

// The rows as GGUF stores them, with the smallest magnitudes of every row set to zero.
static std::vector<uint8_t> stored(const Options& o, std::vector<float> w, double rate) {
  std::vector<float> magnitudes(o.columns);
  for (int64_t r = 0; r < o.rows; ++r) {
    float* row = w.data() + r * o.columns;
    for (int64_t c = 0; c < o.columns; ++c) magnitudes[c] = std::fabs(row[c]);
    const int64_t cut = int64_t(rate * double(o.columns));
    if (!cut) continue;
    std::nth_element(magnitudes.begin(), magnitudes.begin() + cut - 1, magnitudes.end());
    for (int64_t c = 0; c < o.columns; ++c)
      if (std::fabs(row[c]) <= magnitudes[cut - 1]) row[c] = 0;
  }
  std::vector<uint8_t> out;
  const auto push = [&](const void* data, size_t size) {
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    out.insert(out.end(), bytes, bytes + size);
  };
  if (o.type == "f32") push(w.data(), w.size() * 4);
  if (o.type == "f16")
    for (float value : w) {
      const uint16_t half = to_half(value);
      push(&half, 2);
    }
  if (o.type == "bf16")
    for (float value : w) {
      uint32_t bits;
      memcpy(&bits, &value, 4);
      const uint16_t half = uint16_t(bits >> 16);
      push(&half, 2);
    }
  if (o.type[0] == 'q') {
    for (size_t i = 0; i < w.size(); i += 32) {
      const bool eight = o.type == "q8_0";
      float largest = 0;
      for (int c = 0; c < 32; ++c) largest = std::max(largest, std::fabs(w[i + c]));
      const float d = largest / (eight ? 127.0f : 7.0f);
      const uint16_t scale = to_half(d);
      push(&scale, 2);
      // A kept weight stays one: at least the smallest step away from zero.
      int8_t q[32];
      for (int c = 0; c < 32; ++c) {
        q[c] = int8_t(std::lround(w[i + c] / d));
        if (q[c] == 0 && w[i + c] != 0) q[c] = w[i + c] > 0 ? 1 : -1;
      }
      if (eight) push(q, 32);
      else
        for (int c = 0; c < 16; ++c) {
          const uint8_t both = uint8_t((q[c] + 8) | (q[c + 16] + 8) << 4);
          push(&both, 1);
        }
    }
  }
  return out;
}

struct Packed {
  std::vector<sd_matrix*> copies;
  std::vector<float> x, out;
  void* buffer;
  Options o;

  void part(int index, Meeting& meeting) {
    for (sd_matrix* m : copies) {
      sd_prepare_activations(m, x.data(), o.columns, o.batch, o.batch * index / o.threads,
                             o.batch * (index + 1) / o.threads, buffer);
      meeting.wait(o.threads);
      int64_t first, last;
      sd_share_rows(m, index, o.threads, &first, &last);
      sd_matmul(m, buffer, o.batch, first, last, out.data(), o.rows);
      meeting.wait(o.threads);
    }
  }
  void run() {
    Meeting meeting;
    std::vector<std::thread> pool;
    for (int t = 1; t < o.threads; ++t) pool.emplace_back([&, t] { part(t, meeting); });
    part(0, meeting);
    for (auto& thread : pool) thread.join();
  }
};

#if defined(WITH_GGML)
// ggml's product of the same matrices: one graph of independent nodes; repacked weights where the backend has them.
struct Dense {
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_context* context;
  ggml_cgraph* graph;
  std::vector<float> result;
  std::string kind;
  size_t bytes;

  Dense(const Options& o, const std::vector<uint8_t>& data, const std::vector<float>& x, int count) {
    ggml_backend_cpu_set_n_threads(backend, o.threads);
    context = ggml_init({size_t(count + 16) * 2 * ggml_tensor_overhead() + ggml_graph_overhead_custom(count + 16, false), nullptr, true});
    const ggml_type type = ggml_type(gguf_type(o.type));
    std::vector<ggml_tensor*> weights;
    for (int i = 0; i < count; ++i) weights.push_back(ggml_new_tensor_2d(context, type, o.columns, o.rows));
    ggml_backend_buffer_type_t chosen = ggml_backend_cpu_buffer_type();
    kind = "plain";
    const auto reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts"));
    if (extra && !getenv("NO_REPACK"))
      for (auto* list = extra(ggml_backend_get_device(backend)); list && *list; ++list) {
        // As llama.cpp asks: a tensor of the type, then whether the backend multiplies with it.
        ggml_context* probe = ggml_init({8 * ggml_tensor_overhead(), nullptr, true});
        ggml_tensor* w = ggml_new_tensor_2d(probe, type, o.columns, o.rows);
        ggml_tensor* in = ggml_new_tensor_2d(probe, GGML_TYPE_F32, o.columns, o.batch);
        ggml_tensor* op = ggml_mul_mat(probe, w, in);
        w->buffer = ggml_backend_buft_alloc_buffer(*list, 0);
        if (ggml_backend_dev_supports_op(ggml_backend_get_device(backend), op)) {
          chosen = *list;
          kind = ggml_backend_buft_name(*list);
        }
        ggml_backend_buffer_free(w->buffer);
        ggml_free(probe);
      }
    bytes = ggml_nbytes(weights[0]);
    ggml_backend_alloc_ctx_tensors_from_buft(context, chosen);
    for (auto* w : weights) ggml_backend_tensor_set(w, data.data(), 0, data.size());
    ggml_context* rest = ggml_init({size_t(count + 16) * ggml_tensor_overhead() + ggml_graph_overhead_custom(count + 16, false), nullptr, true});
    ggml_tensor* in = ggml_new_tensor_2d(rest, GGML_TYPE_F32, o.columns, o.batch);
    graph = ggml_new_graph_custom(rest, count + 16, false);
    for (auto* w : weights) ggml_build_forward_expand(graph, ggml_mul_mat(rest, w, in));
    ggml_backend_alloc_ctx_tensors(rest, backend);
    ggml_backend_tensor_set(in, x.data(), 0, x.size() * 4);
  }
  void run() { ggml_backend_graph_compute(backend, graph); }
  const float* out() { return static_cast<const float*>(ggml_graph_node(graph, 0)->data); }
};
#endif

int main(int argc, char** argv) {
  if (argc < 8) return 2;
  const Options o{argv[1], atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), atoi(argv[5]), atof(argv[6]), atoi(argv[7])};
  const std::vector<std::string> names(argv + 8, argv + argc);
  std::vector<double> rates;
  for (const std::string& name : names) rates.push_back(atof(name.c_str()));
  const std::vector<float> w = random_floats(o.rows * o.columns, 1), x = random_floats(o.batch * o.columns, 2);
  std::vector<Case> cases;
  std::vector<std::unique_ptr<Packed>> packed;
  // As many copies as make the smallest of the matrices fill the memory asked for: a round that lasts long enough.
  int count = 1;
  for (size_t i = rates.size(); i-- > 0;) {
    const std::vector<uint8_t> data = stored(o, w, rates[i]);
    auto p = std::make_unique<Packed>();
    p->o = o;
    p->x = x;
    p->out.assign(o.batch * o.rows, 0);
    double bytes = 0;
    do {
      sd_matrix* m;
      const auto pack = names[i] == "full" ? sd_pack_gguf_full : sd_pack_gguf;
      if (const int status = pack(gguf_type(o.type), data.data(), data.size() / o.rows, o.rows, o.columns, 2, &m)) {
        fprintf(stderr, "%s\n", sd_status_text(status));
        return 1;
      }
      sd_info info;
      sd_describe(m, &info);
      bytes = double(info.bytes);
      if (i + 1 == rates.size()) count = std::max(1, int(o.megabytes * 1e6 / bytes));
      p->copies.push_back(m);
    } while (int(p->copies.size()) < count);
    p->buffer = aligned_alloc(64, (sd_activation_bytes(p->copies[0], o.batch) + 63) / 64 * 64);
    Packed* pointer = p.get();
    cases.push_back({names[i], bytes, [pointer] { pointer->run(); }});
    packed.push_back(std::move(p));
  }
#if defined(WITH_GGML)
  const std::vector<uint8_t> data = stored(o, w, rates.empty() ? 0 : rates[0]);
  Dense dense(o, data, x, count);
  cases.push_back({"dense " + dense.kind, double(dense.bytes), [&] { dense.run(); }});
  dense.run();
  if (!packed.empty()) {
    // The dense product has the weights of the first rate: both must agree.
    packed.back()->run();
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < o.batch * o.rows; ++i) {
      worst = std::max(worst, double(std::fabs(dense.out()[i] - packed.back()->out[i])));
      largest = std::max(largest, double(std::fabs(dense.out()[i])));
    }
    fprintf(stderr, "largest difference %.2e of %.2e\n", worst, largest);
    if (!(worst < 0.02 * largest)) return 1;
  }
#endif
  const std::vector<uint64_t> other(size_t(48) << 20, 1);
  volatile uint64_t sum = 0;
  for (int round = 0; round < o.rounds; ++round)
    for (Case& c : cases) {
      uint64_t total = 0;
      for (uint64_t value : other) total += value;
      sum = sum + total;
      const double start = now(o.threads);
      c.run();
      c.best = std::min(c.best, (now(o.threads) - start) / count);
    }
  for (const Case& c : cases) printf("%s\t%.9f\t%.0f\t%s\n", c.name.c_str(), c.best, c.bytes, sd_isa_name());
}
