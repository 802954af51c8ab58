// Attention of a layer: full or over a window, with or without RoPE.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "forward/compute.hpp"
#include "forward/scratch.hpp"
#include "forward/session.hpp"
#include "model/model.hpp"

namespace smallthinker {

class Attention {
 public:
  Attention(const Hyperparameters& hyper, const KvLayout& layout, Compute& compute, const Scratch& scratch);

  // The cosines and sines of every row's position, once per batch.
  void set_positions(std::span<const BatchRow> rows) const;

  // Queries, keys and values of the normed activations.
  void add_projections(const LayerWeights& weights, std::int64_t tokens, Products& products) const;

  // Once they are computed: stores the keys and values and attends. Returns the output [tokens][hidden], in
  // the scratch memory.
  const float* run(std::int64_t layer, const LayerWeights& weights, std::span<const BatchRow> rows,
                   Products& products) const;

 private:
  void rotate_and_store(std::int64_t layer, const BatchRow& row, std::int64_t batch_index) const;
  void attend(std::int64_t layer, const BatchRow& row, std::int64_t batch_index, std::int64_t kv_head,
              std::int64_t first, std::int64_t groups, int thread) const;
  float greatest(const float* x, std::int64_t size) const;

  std::int64_t query_size() const { return hyper_.heads * hyper_.head_dim; }
  std::int64_t kv_size() const { return hyper_.kv_heads * hyper_.head_dim; }
  std::int64_t groups() const { return hyper_.heads / hyper_.kv_heads; }  // query heads of a key head

  const Hyperparameters& hyper_;
  Compute& compute_;
  const Scratch& scratch_;
  std::int64_t score_stride_;
  std::vector<float> inverse_frequencies_;  // [head_dim / 2]
};

}  // namespace smallthinker
