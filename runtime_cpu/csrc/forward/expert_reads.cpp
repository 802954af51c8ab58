#include "forward/expert_reads.hpp"

#include <algorithm>

namespace smallthinker {
namespace {

// Ascending.
std::vector<std::int32_t> used_experts(const Routing& routing) {
  std::vector<std::int32_t> used;
  used.reserve(static_cast<std::size_t>(std::min(routing.experts, routing.all_slots())));
  for (std::int32_t e = 0; e < routing.experts; ++e) {
    if (routing.slot_count(e) > 0) used.push_back(e);
  }
  return used;
}

}  // namespace

void request_experts(ExpertStore& store, std::int64_t layer, std::span<const std::int32_t> experts,
                     const Routing& routing) {
  if (!store.offloads()) return;
  std::vector<ExpertUse> uses;
  uses.reserve(experts.size());
  for (const std::int32_t e : experts) uses.push_back({e, routing.tokens_of(e)});
  store.request(layer, uses, routing.tokens);
}

ExpertReads::ExpertReads(const Hyperparameters& hyper, const Weights& weights, bool speculate)
    : hyper_(hyper), store_(*weights.experts) {
  if (!speculate || !store_.offloads()) return;
  std::vector<const Linear*> routers;
  for (const LayerWeights& layer : weights.layers) routers.push_back(&layer.router);
  forecast_ = std::make_unique<ExpertForecast>(hyper, routers);
}

ExpertDemand ExpertReads::request(std::int64_t layer, const Routing& routing) {
  ExpertDemand demand;
  demand.experts = used_experts(routing);
  demand.requested = static_cast<std::int64_t>(demand.experts.size()) <= store_.request_limit();
  if (!demand.requested) return demand;
  request_experts(store_, layer, demand.experts, routing);
  // A prompt uses nearly all experts of every layer, so the next layer will want these experts too.
  const bool unknown = hyper_.router_lead == 0 && layer + 1 < hyper_.layers;
  if (unknown && routing.all_slots() >= 2 * hyper_.experts) store_.speculate(layer + 1, demand.experts);
  return demand;
}

void ExpertReads::read_known(std::int64_t layer, const Routing& routing) {
  store_.speculate(layer, used_experts(routing));
}

void ExpertReads::add_forecast(std::int64_t layer, const Activations& x, Products& products) {
  const std::int64_t last = std::min(layer + ExpertForecast::kReach, hyper_.layers - 1);
  for (std::int64_t next = layer + 1; next <= last; ++next)
    products.add_whole(forecast_->router(next), x, forecast_->logits(next - layer));
}

// The nearest layer first. A wrong guess costs nothing on an idle disk, and on a busy one as much time as a
// right guess saves.
void ExpertReads::read_ahead(std::int64_t layer, const Routing& routing) {
  constexpr double kLeastIdle = 0.45;
  constexpr double kLeastBusy = 0.9;
  forecast_->learn(layer, routing.experts_of(0));
  const std::int64_t reach = std::min(ExpertForecast::kReach, hyper_.layers - 1 - layer);
  for (std::int64_t distance = 1; distance <= reach; ++distance) {
    const std::int64_t next = layer + distance;
    const auto in_memory = [&](std::int32_t expert) { return store_.in_memory(next, expert); };
    for (const ExpertGuess& guess : forecast_->missing(layer, distance, in_memory)) {
      if (guess.probability >= (store_.idle() ? kLeastIdle : kLeastBusy))
        store_.speculate(next, {&guess.expert, 1});
    }
  }
}

}  // namespace smallthinker
