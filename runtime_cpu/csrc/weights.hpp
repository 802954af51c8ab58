// A runtime's weights: packed copies in huge pages where the kernels want them, the file's own rows
// elsewhere.
//
//   Weights weights(model, kernels, pool);       // copies and packs, with all threads
//   weights.layers[0].query.tiled
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "model.hpp"
#include "packed.hpp"
#include "thread_pool.hpp"

namespace smallthinker {

// Anonymous memory in pages of 2 MiB where the system has them: a sixth more bandwidth than 4 KiB pages.
class HugeMemory {
 public:
  HugeMemory() = default;
  explicit HugeMemory(std::size_t bytes);  // zeros; throws EngineError when there is none
  ~HugeMemory();
  HugeMemory(HugeMemory&& other) noexcept;
  HugeMemory& operator=(HugeMemory&& other) noexcept;
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// One matrix as the forward pass uses it: tiles when `tiles.data` is set, else stock rows.
struct Linear {
  Matrix stock;
  TileMatrix tiles;

  bool tiled() const { return tiles.data != nullptr; }
  std::int64_t rows() const { return tiled() ? tiles.rows : stock.rows; }
};

struct LayerWeights {
  Linear query, key, value, output, router;
};

// What `kernels` make of a model.
struct WeightPlan {
  WeightPlan(const Model& model, const Kernels& kernels);

  bool packed_experts = false;
  ExpertShape expert;
  std::size_t dense_bytes = 0;   // copied: tiles
  std::size_t expert_bytes = 0;  // copied: every expert, when packed
  std::size_t mapped_bytes = 0;  // read where they lie in the file
};

class Weights {
 public:
  Weights(std::shared_ptr<const Model> model, const Kernels& kernels, ThreadPool& pool);

  WeightPlan plan;
  Linear head;
  std::vector<LayerWeights> layers;

  const std::byte* expert(std::int64_t layer, std::int64_t expert) const {
    return experts_.data() + static_cast<std::size_t>(layer * model_->hyper.experts + expert) * expert_bytes_;
  }
  void embedding(std::int64_t token, float* out) const;

 private:
  std::shared_ptr<const Model> model_;
  HugeMemory dense_, experts_;
  std::size_t expert_bytes_ = 0;
};

}  // namespace smallthinker
