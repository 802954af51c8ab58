// What a forward pass did for one sequence, or for several that were computed together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/model.hpp"

namespace smallthinker {

struct Counters {
  std::vector<std::uint64_t> neurons;         // [layers]: computed
  std::vector<std::uint64_t> active_neurons;  // [layers]: with a gate above zero
  std::vector<std::uint64_t> expert_counts;   // [layers][experts]: how often chosen
  // Experts on disk: found in memory or on their way, read, bytes read meanwhile, seconds that threads
  // waited.
  std::uint64_t cache_hits = 0;
  std::uint64_t cache_misses = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t head_rows = 0, head_rows_computed = 0;  // of the output matrix
  std::uint64_t head_fallbacks = 0;                     // tokens for which its predictor named too few rows
  double waited_s = 0.0;

  // Of a pass: zeros, without expert_counts, which each token's own session counts.
  static Counters of_pass(const Hyperparameters& hyper);
  void reset(const Hyperparameters& hyper);
  void add(const Counters& other);
  // Of a pass, the share of sequence `index` of `count` that were computed together; the shares add up.
  Counters share(std::size_t index, std::size_t count) const;
};

}  // namespace smallthinker
