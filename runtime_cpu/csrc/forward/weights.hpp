// A runtime's weights: packed copies in huge pages where the kernels want them, the file's own rows
// elsewhere.
//
//   Weights weights(model, kernels, pool, {});   // copies and packs the dense ones, with all threads
//   weights.layers[0].query.tiled(); weights.experts->request(0, ids);
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "experts/store.hpp"
#include "forward/thread_pool.hpp"
#include "kernels/table.hpp"
#include "model/huge_memory.hpp"
#include "model/model.hpp"
#include "model/packed.hpp"

namespace smallthinker {

struct LayerWeights {
  Linear query, key, value, output, router;
};

// Which matrices of a model are copied, packed or left in the file for some kernels.
struct WeightPlan {
  WeightPlan(const Model& model, const Kernels& kernels, bool offload, bool predictor);

  bool packed_experts = false;
  ExpertShape expert;
  std::size_t dense_bytes = 0;       // copied: tiles, and beside packed experts every other matrix
  std::size_t expert_bytes = 0;      // of every expert, when packed
  std::size_t mapped_bytes = 0;      // computed with in the mapped file
  std::int64_t predictor_width = 0;  // 0: the head is computed whole
};

class Weights {
 public:
  Weights(std::shared_ptr<const Model> model, const Kernels& kernels, ThreadPool& pool,
          const ExpertStoreOptions& options, bool predictor);

  WeightPlan plan;
  Linear head;                          // whole; or, beside a predictor of its rows,
  Matrix head_rows;                     // its Q4_0 rows, one after the other, where `head` would be tiles
  Linear predictor_down, predictor_up;  // when the plan has one
  std::vector<LayerWeights> layers;
  std::unique_ptr<ExpertStore> experts;  // when packed

  // The token's row to out [hidden]. EngineError when it cannot be read.
  void embedding(std::int64_t token, float* out) const;

 private:
  Linear load(const Linear& from, const Kernels& kernels, ThreadPool& pool);
  Matrix load_rows(const Linear& from, ThreadPool& pool);
  void check_tiles(const Linear& from, const std::byte* data) const;

  std::shared_ptr<const Model> model_;
  HugeMemory dense_;
  std::byte* next_ = nullptr;
};

}  // namespace smallthinker
