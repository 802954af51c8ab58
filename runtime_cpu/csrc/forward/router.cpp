#include "forward/router.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace smallthinker {

Router::Layers Router::reading(std::int64_t layer) const {
  const std::int64_t last = std::min(layer + hyper_.router_lead + 1, hyper_.layers);
  return {layer == 0 ? 0 : std::min(layer + hyper_.router_lead, last), last};
}

void Router::add_product(std::int64_t layer, const Linear& matrix, std::int64_t tokens,
                         Products& products) const {
  products.add(matrix, scratch_.x.view(), tokens, logits(layer), hyper_.experts);
}

// logits [experts]; ids and weights [k].
void Router::choose_of_token(const float* logits, std::int32_t* ids, float* weights) const {
  const std::int64_t k = hyper_.experts_per_token;
  for (std::int64_t n = 0; n < k; ++n) {
    std::int32_t best = -1;
    for (std::int32_t e = 0; e < hyper_.experts; ++e) {
      const bool taken = std::find(ids, ids + n, e) != ids + n;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    ids[n] = best;
  }
  const float greatest = logits[ids[0]];
  std::sort(ids, ids + k);
  double sum = 0.0;
  for (std::int64_t n = 0; n < k; ++n) {
    const double logit = static_cast<double>(logits[ids[n]]);
    const double score = hyper_.router == RouterKind::kSoftmax
                             ? std::exp(logit - static_cast<double>(greatest))
                             : 1.0 / (1.0 + std::exp(-logit));
    weights[n] = static_cast<float>(score);
    sum += score;
  }
  sum = std::max(sum, std::numeric_limits<double>::min());
  for (std::int64_t n = 0; n < k; ++n) {
    weights[n] = static_cast<float>(static_cast<double>(weights[n]) / sum);
  }
}

Routing Router::choose(std::int64_t layer, std::int64_t tokens) const {
  const std::int64_t k = hyper_.experts_per_token;
  const std::int64_t first = room(layer) * chunk_ * k;
  std::int32_t* const expert_ids = scratch_.expert_ids + first;
  std::int32_t* const slots = scratch_.slots + first;
  std::int32_t* const slot_tokens = scratch_.slot_tokens + first;
  float* const weights = scratch_.expert_weights + first;
  std::int32_t* const begin = scratch_.expert_begin + room(layer) * (hyper_.experts + 1);
  std::fill_n(begin, hyper_.experts + 1, 0);
  for (std::int64_t i = 0; i < tokens; ++i) {
    std::int32_t* ids = expert_ids + i * k;
    choose_of_token(logits(layer) + i * hyper_.experts, ids, weights + i * k);
    for (std::int64_t n = 0; n < k; ++n) ++begin[ids[n] + 1];
  }
  for (std::int64_t e = 0; e < hyper_.experts; ++e) begin[e + 1] += begin[e];
  std::vector<std::int32_t> next(begin, begin + hyper_.experts);
  for (std::int64_t i = 0; i < tokens * k; ++i) {
    const std::int32_t slot = next[static_cast<std::size_t>(expert_ids[i])]++;
    slots[i] = slot;
    slot_tokens[slot] = static_cast<std::int32_t>(i / k);
  }
  return {tokens, hyper_.experts, k, expert_ids, weights, slots, slot_tokens, begin};
}

}  // namespace smallthinker
