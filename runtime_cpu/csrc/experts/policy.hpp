// Which expert a full cache evicts: a history of uses, and one number per expert computed from it.
//
//   UseHistory history(layers, experts, prior);
//   history.begin(layer);  history.use(key);              // key = layer * experts + expert
//   find_policy("lru").utility(history, key)                // the least of the evictable ones is evicted
//
// docs/experiments/0005-cache-policies.md holds the measurements behind kDefaultPolicy;
// csrc/tools/replay_routes.cpp repeats them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace smallthinker {

inline constexpr const char* kDefaultPolicy = "lrfu-order";
inline constexpr double kFrequencyDecay = 0.99;  // per token

class UseHistory {
 public:
  // `prior` is empty or holds, per key, the share of tokens that use the expert (from the model file).
  UseHistory(int layers, int experts, std::span<const float> prior);

  // Before the uses of a layer by so many tokens that are computed together; going back to an earlier layer
  // starts a pass.
  void begin(int layer, std::int64_t tokens = 1);
  // Requested, whether it was in memory or not. `weight` sums kFrequencyDecay to the power of the tokens
  // since, over those of the pass that use it; `ago` are those since the last of them.
  void use(std::size_t key, double weight = 1.0, std::int64_t ago = 0);

  std::int64_t token() const { return token_; }
  // The pass under way has so many tokens that it needs most experts.
  bool sweeping() const { return 2 * (token_ + 1 - first_of_pass_) >= experts_; }
  std::int64_t first_of_pass() const { return first_of_pass_; }
  std::int64_t first_of_last_pass() const { return first_of_last_pass_; }
  std::int64_t last_token(std::size_t key) const { return entries_[key].last_token; }
  // Order of uses. Experts that were never used keep their prior, in [0, 1), before all others.
  double last_use(std::size_t key) const { return entries_[key].last_use; }
  // Uses, each counting 0.99 per token that has passed since; begins at what the prior amounts to.
  double frequency(std::size_t key) const { return entries_[key].count / unit_; }
  // Whether the pass under way has yet to compute the expert's layer.
  bool to_come(std::size_t key) const { return layer_of(key) > layer_; }
  // Layers from the current one until the expert's is computed next: 1 to `layers`.
  int distance(std::size_t key) const;
  int layers() const { return layers_; }

 private:
  struct Entry {
    double count = 0.0;  // in units of the token at which it is read: ages without being touched
    double last_use = 0.0;
    std::int64_t last_token = -1;
  };
  int layer_of(std::size_t key) const { return static_cast<int>(key / static_cast<std::size_t>(experts_)); }

  int layers_;
  int experts_;
  int layer_;                // at first after the last one: any use starts a pass
  std::int64_t token_ = -1;  // the last of the pass under way
  std::int64_t first_of_pass_ = 0;
  std::int64_t first_of_last_pass_ = 0;
  double clock_ = 1.0;
  double unit_ = 1.0;  // what one use adds now
  std::vector<Entry> entries_;
};

struct CachePolicy {
  const char* name;
  double (*utility)(const UseHistory& history, std::size_t key);
};

std::span<const CachePolicy> cache_policies();
const CachePolicy& find_policy(const std::string& name);  // throws EngineError

}  // namespace smallthinker
