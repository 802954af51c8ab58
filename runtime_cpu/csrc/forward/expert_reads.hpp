// What a layer asks of the expert store: the experts that its router chose, and those that the next layers
// will probably choose.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "experts/forecast.hpp"
#include "experts/store.hpp"
#include "forward/compute.hpp"
#include "forward/router.hpp"
#include "forward/weights.hpp"

namespace smallthinker {

// The experts that a batch needs of a layer, ascending, and whether their reads have begun: more than the
// cache has slots for are requested part by part.
struct ExpertDemand {
  std::vector<std::int32_t> experts;
  bool requested = false;
};

// Starts reading `experts` of a layer when they are on disk, for the tokens that use them.
void request_experts(ExpertStore& store, std::int64_t layer, std::span<const std::int32_t> experts,
                     const Routing& routing);

class ExpertReads {
 public:
  // `speculate`: whether the next layers' experts are read ahead.
  ExpertReads(const Hyperparameters& hyper, const Weights& weights, bool speculate);

  // The demand of a layer, requested from the store if that has room for all of it.
  ExpertDemand request(std::int64_t layer, const Routing& routing);

  // Begins to read, as far as there is room, what a later layer's router has chosen already.
  void read_known(std::int64_t layer, const Routing& routing);

  // Whether the routers of the next layers are worth asking for a batch of so many tokens.
  bool forecasts(std::int64_t tokens) const { return forecast_ != nullptr && tokens == 1; }
  // Their logits from the residual stream x [1][hidden] that the router of `layer` reads. Routers read the
  // stream itself, before the norm and before attention, so later layers' already nearly know their choice.
  void add_forecast(std::int64_t layer, const Activations& x, Products& products);
  // Once they are computed, and the layer's own choice is known: begins to read what they name.
  void read_ahead(std::int64_t layer, const Routing& routing);

 private:
  const Hyperparameters& hyper_;
  ExpertStore& store_;
  std::unique_ptr<ExpertForecast> forecast_;  // when experts are on disk and speculation is allowed
};

}  // namespace smallthinker
