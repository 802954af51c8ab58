// Running a model: what it allocates, and the forward pass (the model's specification: docs/engine.md).
//
//   Runtime runtime(model, {.threads = 2, .context = 4096});
//   Session session(runtime.kv_layout(), model->hyper);
//   runtime.forward(session, tokens, logits, 1);     // appends the tokens; logits of the last one
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "forward/attention.hpp"
#include "forward/compute.hpp"
#include "forward/expert_pass.hpp"
#include "forward/expert_reads.hpp"
#include "forward/head.hpp"
#include "forward/router.hpp"
#include "forward/sampler.hpp"
#include "forward/scratch.hpp"
#include "forward/session.hpp"
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

class Runtime {
 public:
  // Throws EngineError for kernels that are not available or memory that cannot be had.
  Runtime(std::shared_ptr<const Model> model, const RuntimeOptions& options);
  Runtime(const Runtime&) = delete;  // its parts refer to one another
  Runtime& operator=(const Runtime&) = delete;
  Runtime(Runtime&&) = delete;
  Runtime& operator=(Runtime&&) = delete;
  ~Runtime() = default;

  const Model& model() const { return *model_; }
  const Kernels& kernels() const { return compute_.kernels; }
  const KvLayout& kv_layout() const { return layout_; }
  int threads() const { return compute_.pool.threads(); }
  // Null when no experts are packed.
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
  void check_token(std::int32_t token) const;
  CacheCounters cache_counters() const;
  // The rows' tokens through all layers, and `logits` [logit_rows][vocab] of the last rows; adds to
  // `counters`.
  void run_batch(std::span<const BatchRow> rows, float* logits, std::int64_t logit_rows, Counters& counters);
  void embed(std::span<const BatchRow> rows) const;
  NeuronCounts run_layer(std::int64_t index, std::span<const BatchRow> rows);
  Routing& routing_of(std::int64_t layer) {
    return routings_[static_cast<std::size_t>(layer) % routings_.size()];
  }
  void normalise(const std::vector<float>& weight, std::int64_t row) const;

  std::shared_ptr<const Model> model_;
  KvLayout layout_;
  std::int64_t chunk_;
  Compute compute_;
  Weights weights_;
  std::vector<std::byte> memory_;
  Scratch scratch_;
  Products products_;
  Router router_;
  std::vector<Routing> routings_;            // [rooms]: of the layer in turn and those already chosen
  std::optional<ExpertReads> expert_reads_;  // when experts are packed
  Attention attention_;
  ExpertPass expert_pass_;
  Head head_;
  HeadRows head_rows_ = HeadRows::kNamed;
  std::mutex mutex_;
};

}  // namespace smallthinker
