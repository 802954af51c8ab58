// Which experts the next layers will probably choose, so that they can be read before they are requested.
//
// Routers read the raw residual stream, which changes little from layer to layer: the routers of the next
// layers, applied to the stream as it enters this one, already name most of what they will choose. How often
// a guess of a rank and a distance was right is learnt while the text is computed. The routers are kept a
// second time as Q4_0 tiles, a seventh of the bytes and nearly as right
// (docs/experiments/0069-guess-shares.md).
//
//   kernels.tiles(forecast.router(layer + d), ..., forecast.logits(d), ...);  // on what enters `layer`
//   forecast.learn(layer, chosen);                                            // by its own router
//   for (const ExpertGuess& guess : forecast.missing(layer, d, in_memory)) ...
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "model/model.hpp"
#include "model/packed.hpp"

namespace smallthinker {

struct ExpertGuess {
  std::int32_t expert = 0;
  double probability = 0.0;  // share of such guesses that were right
};

class ExpertForecast {
 public:
  static constexpr std::int64_t kReach = 4;  // layers ahead

  // The routers of all layers are only read here.
  ExpertForecast(const Hyperparameters& hyper, std::span<const Linear* const> routers);
  static std::size_t bytes(const Hyperparameters& hyper);

  const TileMatrix& router(std::int64_t layer) const { return routers_[static_cast<std::size_t>(layer)]; }
  // [experts], of the layer that many further on.
  float* logits(std::int64_t distance) { return logits_.data() + (distance - 1) * experts_; }

  // The experts that a layer chose. The first that could be guessed begins a pass: guesses of the one before
  // are dropped.
  void learn(std::int64_t layer, std::span<const std::int32_t> chosen);
  // From logits(distance): what the layer `distance` after `layer` will choose and for which `in_memory` is
  // false, most probable first. Valid until the next call.
  std::span<const ExpertGuess> missing(std::int64_t layer, std::int64_t distance,
                                       const std::function<bool(std::int32_t)>& in_memory);

 private:
  struct Record {  // of a distance and a rank: guesses that were not in memory, the latest counting most
    double seen = 5.0;
    double right = 4.0;
  };
  struct Pending {
    std::int32_t expert;
    Record* record;
  };

  std::int64_t experts_;
  std::int64_t used_;   // per token
  std::int64_t first_;  // layer; those before it choose at the same time
  std::vector<std::byte> memory_;
  std::vector<TileMatrix> routers_;
  std::vector<float> logits_;                  // [kReach][experts]
  std::vector<Record> records_;                // [kReach][used]
  std::vector<std::vector<Pending>> pending_;  // per layer
  std::vector<std::int32_t> order_;
  std::vector<ExpertGuess> missing_;
};

}  // namespace smallthinker
