// The experts of a layer: packed neurons that are skipped when silent, or stock rows.
//
// Sums have one order whatever the batch and the threads: the neurons of a slice, the slices of an expert,
// the experts of a token, each ascending.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "forward/compute.hpp"
#include "forward/expert_reads.hpp"
#include "forward/router.hpp"
#include "forward/scratch.hpp"
#include "forward/weights.hpp"
#include "model/model.hpp"

namespace smallthinker {

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

inline constexpr std::int64_t kSplitSlots = 32;  // at most so many slots: their slices are pieces of work
inline constexpr std::int64_t kTokenBlock = 32;  // else: tokens of an expert that make a piece of work

struct NeuronCounts {
  std::uint64_t computed = 0;
  std::uint64_t active = 0;  // with a gate above zero
};

class ExpertPass {
 public:
  ExpertPass(const Model& model, const Weights& weights, Compute& compute, const Scratch& scratch)
      : model_(model), weights_(weights), compute_(compute), scratch_(scratch) {}

  // x += the weighted sum of every token's experts, of the normed activations. EngineError for weights that
  // cannot be read or are damaged. The first of stock rows, the second of packed experts.
  NeuronCounts run(std::int64_t layer, const Routing& routing, Products& products) const;
  NeuronCounts run(std::int64_t layer, const Routing& routing, const ExpertDemand& demand) const;

 private:
  struct RowPiece;
  struct PackedPiece;

  void gate_and_up(const Layer& layer, const Routing& routing, RowPiece& piece) const;
  std::uint64_t split_slots(std::int64_t layer, std::span<const std::int32_t> experts,
                            const Routing& routing) const;
  std::uint64_t token_blocks(std::int64_t layer, std::span<const std::int32_t> experts,
                             const Routing& routing) const;
  template <typename Work>
  std::uint64_t run_pieces(std::vector<PackedPiece>& pieces, const Work& work) const;
  void sum_slices(std::span<const std::int32_t> experts, const Routing& routing) const;
  void add_experts(const Routing& routing, const float* down, std::int64_t stride) const;

  const Model& model_;
  const Weights& weights_;
  Compute& compute_;
  const Scratch& scratch_;
};

}  // namespace smallthinker
