// Running a model: threads, scratch memory and the forward pass.
//
//   Runtime runtime(model, {.threads = 2, .context = 4096});
//   Session session(runtime.kv_layout());
//   runtime.forward(session, tokens, logits, 1);     // appends the tokens; logits of the last one
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "experts/forecast.hpp"
#include "forward/sampler.hpp"
#include "forward/session.hpp"
#include "forward/thread_pool.hpp"
#include "forward/weights.hpp"
#include "kernels/table.hpp"
#include "model/model.hpp"

namespace smallthinker {

struct RuntimeOptions {
  int threads = 1;
  std::int64_t context = 512;
  std::int64_t chunk = 128;  // tokens computed together
  std::string kernels = "auto";
  std::string kv_type = "auto";  // "f32", "f16", "q8"
  ExpertStoreOptions experts = {};
  bool predict_head = false;  // compute only the rows of the head that the file's predictor names
  bool speculate = true;      // read what the next layers will probably want
};

// How keys and values are stored. Throws EngineError for another name.
KvType find_kv_type(const Model& model, const std::string& name);
const char* name_of(KvType type);

// What comes out of a predicted head: the named rows' logits; all of them, with the exact head's bits; or the
// predictor's scores in their place. The latter two are for measuring it.
enum class HeadRows { kNamed, kAll, kScores };
// By "named", "all" or "scores". Throws EngineError for another word.
HeadRows find_head_rows(const std::string& name);

// What a runtime will allocate, in bytes.
struct Plan {
  std::uint64_t weight_bytes = 0;   // copied or mapped, without the experts that can be offloaded
  std::uint64_t expert_bytes = 0;   // of one; 0: the experts cannot be offloaded
  std::uint64_t offload_bytes = 0;  // what offloading needs beside the experts' slots
  std::uint64_t kv_bytes_per_session = 0;
  std::uint64_t kv_vector_bytes = 0;  // one key, or one value, of one head
  std::uint64_t scratch_bytes = 0;
};
Plan make_plan(const Model& model, const RuntimeOptions& options);

// An expert's neurons in at most eight slices: the unit of work of few tokens, and of the order of sums.
struct ExpertSlices {
  explicit ExpertSlices(const ExpertShape& shape)
      : groups(shape.groups()),
        each(std::max<std::int64_t>(3, (groups + 7) / 8)),
        count((groups + each - 1) / each) {}

  std::int64_t groups, each, count;
  std::int64_t neurons() const { return each * kNeuronGroup; }
  std::int64_t begin(std::int64_t slice) const { return slice * each; }
  std::int64_t end(std::int64_t slice) const { return std::min(groups, (slice + 1) * each); }
};

inline constexpr std::int64_t kSplitSlots = 32;     // (token, expert) pairs whose slices are pieces of work
inline constexpr std::int64_t kTokenBlock = 32;     // else: tokens that an expert meets in one piece of work
inline constexpr std::int64_t kLeastHeadRows = 64;  // fewer named rows than these: the whole head is computed

// One token of a batch. Rows of different sessions may share a batch: only attention looks at the session.
struct BatchRow {
  Session* session = nullptr;
  std::int32_t token = 0;
  std::int64_t position = 0;
};

// A row-major fp32 buffer and its 16-bit form.
struct ActivationBuffer {
  float* f32 = nullptr;
  std::int16_t* q = nullptr;
  float* scales = nullptr;
  std::byte* planes = nullptr;  // none: no tiled matrix reads it
  std::int64_t stride = 0;
  std::size_t plane_bytes = 0;

  Activations view(const std::int32_t* index = nullptr) const {
    return {f32, q, scales, stride, index, planes, plane_bytes};
  }
  ActivationBuffer from(std::int64_t row) const {
    return {f32 + row * stride,
            q + row * stride,
            scales + row * (stride / kActivationBlock),
            planes + static_cast<std::size_t>(row) * plane_bytes,
            stride,
            plane_bytes};
  }
};

// Everything that a forward pass over `chunk` tokens writes. The same code lays it out and measures it.
struct Scratch {
  ActivationBuffer x, normed, attended, hidden;    // residual stream; after a norm; attention; experts
  ActivationBuffer inner;                          // of the head's predictor: [1][width]
  float *query, *key, *value, *mixed;              // [chunk][...]; mixed: output of attention or experts
  float *router_logits, *expert_weights;           // [chunk][experts], [chunk][k]
  float *up, *down;                                // [chunk * k][...]
  float* partial;                                  // packed experts: [split slots][slices][padded hidden]
  float *thread_gates, *thread_sums;               // per thread: [kTokenBlock][slice], [padded hidden]
  float *cosines, *sines;                          // [chunk][head_dim / 2]
  float *thread_scores, *thread_totals;            // per thread: [groups][score_stride], [groups]
  std::int32_t *expert_ids, *slots, *slot_tokens;  // [chunk][k], [chunk][k], [chunk * k]
  std::int32_t* expert_begin;                      // [experts + 1]

  // With no memory: only measures. Returns the bytes.
  std::size_t lay_out(const Hyperparameters& hyper, const WeightPlan& weights, const KvLayout& layout,
                      int threads, std::int64_t chunk, std::byte* memory);
};

class Runtime {
 public:
  // Throws EngineError for kernels that are not available or memory that cannot be had.
  Runtime(std::shared_ptr<const Model> model, const RuntimeOptions& options);

  const Model& model() const { return *model_; }
  const Kernels& kernels() const { return kernels_; }
  const KvLayout& kv_layout() const { return layout_; }
  int threads() const { return pool_.threads(); }
  // Nothing when no experts are packed.
  ExpertStore* experts() const { return weights_.experts.get(); }

  // Append `tokens` (any number) to `session`; `logits` [logit_rows][vocab] gets those of the last tokens.
  // Throws EngineError when the context is full or a token is outside the vocabulary, the session then being
  // unchanged, and when weights cannot be read or are damaged, the session then being cut back as truncate()
  // can.
  void forward(Session& session, std::span<const std::int32_t> tokens, float* logits,
               std::int64_t logit_rows);

  // One further token of several sequences together; `logits` [steps][vocab]. The bits are those of each
  // alone. At most as many steps as a chunk has tokens, each with a session of its own. Throws as forward()
  // does; every session is then cut back.
  struct Step {
    Session* session;
    std::int32_t token;
  };
  void decode(std::span<const Step> steps, float* logits);

  // For the passes to come; without a predictor in use it has no effect. Not while one is under way.
  void set_head_rows(HeadRows rows) { head_rows_ = rows; }

  // sampler.sample() with this runtime's kernels, and its threads when no forward pass has them.
  Choice sample(Sampler& sampler, std::span<const float> logits, std::int64_t top);

 private:
  struct Task {
    const Matrix* matrix;     // stock rows, or
    const TileMatrix* tiles;  // tiles: then row_begin and row_end count tiles
    std::int64_t expert, row_begin, row_end;
    Activations x;
    std::int64_t tokens;
    float* out;  // of row_begin
    std::int64_t out_stride;
    std::int64_t first_slot = 0;
    std::uint64_t active = 0;
  };

  void check_token(std::int32_t token) const;
  void read_cache_counters(const CacheCounters& earlier);
  void run_batch(std::span<const BatchRow> rows, float* logits, std::int64_t logit_rows);
  void run_layer(std::int64_t index, std::span<const BatchRow> rows);
  void attend(std::int64_t layer, const BatchRow& row, std::int64_t batch_index, std::int64_t kv_head,
              std::int64_t first, std::int64_t groups, int thread);
  float greatest(const float* x, std::int64_t size) const;
  void route(std::int64_t tokens);
  void experts(std::int64_t layer, std::int64_t tokens);
  void gate_and_up(const Layer& layer, Task& task);
  void request_wave(std::int64_t layer, std::int64_t tokens);
  void request_experts(std::int64_t layer, std::int64_t tokens);
  void ask_forecast(std::int64_t layer);
  void read_ahead(std::int64_t layer);
  void packed_experts(std::int64_t layer, std::int64_t tokens);
  void split_slots(std::int64_t layer);
  void token_blocks(std::int64_t layer);
  template <typename Work>
  void run_packed(const Work& work);
  void sum_experts(std::int64_t tokens, const float* down, std::int64_t stride);

  template <typename Work>
  void each_row(std::int64_t rows, const Work& work) {
    pool_.run(rows, [&](std::int64_t row, int) { work(row); });
  }
  void head(std::int64_t first, std::int64_t rows, float* logits);
  void predicted_head(std::int64_t row, float* logits);
  void scattered_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const;
  void named_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const;
  void quantise(const ActivationBuffer& at);
  void normalise(const ActivationBuffer& from, const std::vector<float>& weight, std::int64_t row);
  void add_tasks(const Linear& linear, const Activations& x, std::int64_t tokens, float* out,
                 std::int64_t out_stride);
  void add_tasks(const Matrix& matrix, std::int64_t expert, const Activations& x, std::int64_t tokens,
                 float* out, std::int64_t out_stride, std::int64_t first_slot = 0);
  void run_matmuls();

  std::shared_ptr<const Model> model_;
  const Kernels& kernels_;
  KvLayout layout_;
  std::int64_t chunk_;
  ThreadPool pool_;
  Weights weights_;
  std::vector<std::byte> memory_;
  Scratch scratch_{};
  std::vector<Task> tasks_;
  std::vector<std::int32_t> wave_;  // experts of the layer under way, in the order of their reads
  std::vector<ExpertUse> uses_;
  std::unique_ptr<ExpertForecast> forecast_;  // when experts are on disk and guessing is allowed
  bool requested_ = false;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
  std::mutex failure_mutex_;
  std::vector<float> inverse_frequencies_;
  bool quantise_router_input_ = false;
  HeadRows head_rows_ = HeadRows::kNamed;
  Counters counters_;  // of the forward pass under way
  std::mutex mutex_;
};

}  // namespace smallthinker
