// The state of one sequence: its tokens and, per layer, the keys and values that later tokens may look at.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/table.hpp"
#include "model/model.hpp"

namespace smallthinker {

// Capacities are multiples of this: whole tiles of keys, and cache lines of values.
inline constexpr std::int64_t kKeyRun = 64;

// How much each layer keeps. A windowed layer is a ring: its window, and room for one chunk of new tokens,
// whose keys are written before the first of them looks back.
struct KvLayout {
  KvLayout(const Hyperparameters& hyper, std::int64_t context, std::int64_t chunk, KvType type);

  std::int64_t context;
  std::int64_t ring;  // positions kept by a windowed layer, a multiple of kKeyRun
  std::int64_t full;  // by the others
  std::int64_t window;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  std::vector<bool> windowed;
  KvType type;

  std::int64_t capacity(std::int64_t layer) const {
    return windowed[static_cast<std::size_t>(layer)] ? ring : full;
  }
  std::size_t vector_bytes() const;                   // of one key or value, on average over a tile
  std::size_t layer_bytes(std::int64_t layer) const;  // keys and values
  std::size_t bytes() const;
};

// What the experts did for one sequence.
struct Counters {
  std::vector<std::uint64_t> neurons;         // per layer: computed
  std::vector<std::uint64_t> active_neurons;  // per layer: with a gate above zero
  std::vector<std::uint64_t> expert_counts;   // [layers][experts]: how often chosen
  // Experts on disk: found in memory or on their way, read, bytes read meanwhile, seconds that threads
  // waited.
  std::uint64_t cache_hits = 0;
  std::uint64_t cache_misses = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t head_rows = 0, head_rows_computed = 0;  // of the output matrix
  std::uint64_t head_fallbacks = 0;                     // tokens for which its predictor named too few rows
  double waited_s = 0.0;

  void reset(const Hyperparameters& hyper);
  void add(const Counters& other);
  // The share of sequence `index` of `count` that were computed together; the shares add up. Without
  // expert_counts, which are counted where each token chooses.
  Counters share(std::size_t index, std::size_t count) const;
};

class Session {
 public:
  // Throws EngineError when there is no memory.
  Session(const KvLayout& layout, const Hyperparameters& hyper);

  const KvLayout& layout() const { return layout_; }
  std::int64_t length() const { return static_cast<std::int64_t>(tokens_.size()); }
  const std::vector<std::int32_t>& tokens() const { return tokens_; }

  // Forget everything after `length` tokens; returns how many are left: 0 when a ring has already overwritten
  // what the next token would need to see.
  std::int64_t truncate(std::int64_t length);

  // Kept until somebody clears them.
  Counters counters;

  void append(const std::int32_t* tokens, std::int64_t count);

  // Store keys and values [kv_heads][head_dim] of `position`.
  void store(std::int64_t layer, std::int64_t position, const float* keys, const float* values,
             const Kernels& kernels);
  // Where the positions from `begin` on stop lying one after the other (a ring's end), at most `end`.
  std::int64_t contiguous(std::int64_t layer, std::int64_t begin, std::int64_t end) const;
  // Contiguous positions [begin, end); of keys, the tiles that they lie in.
  KvRows keys(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const;
  KvRows values(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const;

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  // A value's row, or the tile that holds a key.
  std::byte* at(std::int64_t layer, bool value, std::int64_t head, std::int64_t position) const;
  void store_steps(std::byte* tile, std::int64_t lane, bool value, const float* from) const;

  KvLayout layout_;
  std::vector<std::int32_t> tokens_;
  std::int64_t intact_from_ = 0;  // rings hold every position from here on
  std::vector<std::size_t> offsets_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace smallthinker
