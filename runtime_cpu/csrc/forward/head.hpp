// The output matrix: whole, or only the rows that a predictor names (the paper's section on the head; the
// authors' engine sets the others to 0, which is a middling logit; here they are minus infinity).
#pragma once

#include <cstdint>
#include <string>

#include "forward/compute.hpp"
#include "forward/scratch.hpp"
#include "forward/weights.hpp"
#include "model/model.hpp"

namespace smallthinker {

// What comes out of a predicted head: the named rows' logits; all of them, with the exact head's bits; or the
// predictor's scores in their place. The latter two are for measuring it.
enum class HeadRows { kNamed, kAll, kScores };
// By "named", "all" or "scores". Throws EngineError for another word.
HeadRows find_head_rows(const std::string& name);

inline constexpr std::int64_t kLeastHeadRows = 64;  // fewer named rows than these: the whole head is computed

struct HeadCounts {
  std::uint64_t rows = 0;  // of the output matrix, for all tokens
  std::uint64_t computed = 0;
  std::uint64_t fallbacks = 0;  // tokens for which the predictor named too few rows
};

class Head {
 public:
  Head(const Model& model, const Weights& weights, Compute& compute, const Scratch& scratch)
      : model_(model), weights_(weights), compute_(compute), scratch_(scratch) {}

  // logits [rows][vocab] of the normed activations from row `first` on. `wanted` has no effect without a
  // predictor in use.
  HeadCounts run(std::int64_t first, std::int64_t rows, HeadRows wanted, float* logits,
                 Products& products) const;

 private:
  HeadCounts whole(std::int64_t first, std::int64_t rows, float* logits, Products& products) const;
  HeadCounts predicted(std::int64_t row, HeadRows wanted, float* logits, Products& products) const;
  std::int64_t pieces() const;
  std::int64_t count_named(const float* scores) const;
  void gathered_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const;
  void named_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const;

  const Model& model_;
  const Weights& weights_;
  Compute& compute_;
  const Scratch& scratch_;
};

}  // namespace smallthinker
