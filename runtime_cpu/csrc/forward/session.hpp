// The state of one sequence: its tokens and, per layer, the keys and values that later tokens may look at.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "forward/counters.hpp"
#include "kernels/table.hpp"
#include "model/model.hpp"

namespace smallthinker {

// Capacities are multiples of this: whole tiles of keys, and cache lines of values.
inline constexpr std::int64_t kKeyRun = 64;

// How keys and values are stored, by "f32", "f16", "q8" or "auto". Throws EngineError for another name.
KvType find_kv_type(const Model& model, const std::string& name);
const char* name_of(KvType type);

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
  // Of a row of attention scores: every position that a layer keeps, from the start of a tile to the end of
  // one.
  std::int64_t score_stride() const;
  std::size_t vector_bytes() const;                   // of one key or value, on average over a tile
  std::size_t layer_bytes(std::int64_t layer) const;  // keys and values
  std::size_t bytes() const;
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

  // Of every pass since the caller last reset them.
  Counters counters;

  void append(const std::int32_t* tokens, std::int64_t count);  // tokens [count]

  // Stores keys and values, both [kv_heads][head_dim], of `position`.
  void store(std::int64_t layer, std::int64_t position, const float* keys, const float* values,
             const Kernels& kernels);
  // The end of the positions from `begin` on that are contiguous in memory (a ring wraps around), at most
  // `end`.
  std::int64_t contiguous(std::int64_t layer, std::int64_t begin, std::int64_t end) const;
  // Contiguous positions [begin, end); of keys, the tiles that hold them.
  KvRows keys(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const;
  KvRows values(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const;

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  // A value's row, or the tile that holds a key.
  std::byte* at(std::int64_t layer, bool value, std::int64_t head, std::int64_t position) const;

  KvLayout layout_;
  std::vector<std::int32_t> tokens_;
  std::int64_t intact_from_ = 0;      // rings hold every position from here on
  std::vector<std::size_t> offsets_;  // [layers], of a layer's keys in the memory; its values follow them
  std::unique_ptr<std::byte, Free> memory_;
};

// One token of a batch. Rows of different sessions may share a batch: only attention looks at the session.
struct BatchRow {
  Session* session = nullptr;
  std::int32_t token = 0;
  std::int64_t position = 0;
};

}  // namespace smallthinker
