#include "experts/policy.hpp"

#include <algorithm>
#include <cmath>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {

constexpr double kLargestUnit = 1e200;
constexpr std::int64_t kForgotten = 10000;  // tokens after which a use counts 1e-44

// Tokens since the last use, the one that counts as 1 being the current.
double age(const UseHistory& history, std::size_t key) {
  return static_cast<double>(history.token() - history.last_token(key)) + 1.0;
}

double least_recently_used(const UseHistory& history, std::size_t key) { return history.last_use(key); }

double least_frequently_used(const UseHistory& history, std::size_t key) { return history.frequency(key); }

double frequency_by_age(const UseHistory& history, std::size_t key) {
  return history.frequency(key) / age(history, key);
}

// The same, with the age at the time when the expert's layer is computed next: of two experts alike, the one
// whose layer comes sooner stays. A prompt uses nearly all experts of every layer: those of layers that its
// pass has yet to compute stay, and of the rest those that its text uses most.
double frequency_by_turn(const UseHistory& history, std::size_t key) {
  if (history.sweeping()) {
    const double share = frequency_by_age(history, key);
    return (history.to_come(key) ? 1.0 : 0.0) + share / (1.0 + share);
  }
  const double until_turn = static_cast<double>(history.distance(key)) / history.layers();
  return history.frequency(key) / (age(history, key) + until_turn);
}

// After SpecMD (arXiv 2602.03921): evicted first are those that this pass has not used, and of these the ones
// whose layer is computed last; the older among equals.
double least_stale(const UseHistory& history, std::size_t key) {
  const int turn = history.layers() - history.distance(key);
  const bool stale = history.last_token(key) < history.first_of_pass();
  return turn + (stale ? 0 : history.layers()) + history.last_use(key) * 1e-12;
}

constexpr CachePolicy kPolicies[] = {
    {"lru", least_recently_used},      {"lfu", least_frequently_used}, {"lrfu", frequency_by_age},
    {"lrfu-order", frequency_by_turn}, {"least-stale", least_stale},
};

}  // namespace

UseHistory::UseHistory(int layers, int experts, std::span<const float> prior)
    : layers_(layers), experts_(experts), layer_(layers) {
  entries_.resize(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts));
  if (prior.empty()) return;
  if (prior.size() != entries_.size()) throw EngineError("expert popularity has the wrong number of values");
  for (std::size_t i = 0; i < prior.size(); ++i) {
    // A share above 1, below 0 or NaN comes from a damaged file; it may only cost speed.
    const double share = prior[i] > 0.0F ? std::min(static_cast<double>(prior[i]), 0.999) : 0.0;
    entries_[i].count = share / (1.0 - kFrequencyDecay);  // the limit of such an expert's count
    entries_[i].last_use = share;
  }
}

void UseHistory::begin(int layer, std::int64_t tokens) {
  if (layer < layer_ || layers_ == 1) {
    first_of_last_pass_ = first_of_pass_;
    first_of_pass_ = token_ + 1;
    token_ += tokens;
    unit_ /= std::pow(kFrequencyDecay, std::min(tokens, kForgotten));
    if (unit_ > kLargestUnit) {
      for (Entry& entry : entries_) entry.count /= unit_;
      unit_ = 1.0;
    }
  }
  layer_ = layer;
}

void UseHistory::use(std::size_t key, double weight, std::int64_t ago) {
  Entry& entry = entries_[key];
  entry.count += unit_ * weight;
  entry.last_use = clock_;
  entry.last_token = token_ - ago;
  clock_ += 1.0;
}

int UseHistory::distance(std::size_t key) const {
  return layer_of(key) - layer_ + (to_come(key) ? 0 : layers_);
}

std::span<const CachePolicy> cache_policies() { return kPolicies; }

const CachePolicy& find_policy(const std::string& name) {
  std::string known;
  for (const CachePolicy& policy : kPolicies) {
    if (name == policy.name) return policy;
    known += std::string(known.empty() ? "" : ", ") + policy.name;
  }
  throw EngineError("the expert cache's policy is " + name + "; known are " + known);
}

}  // namespace smallthinker
