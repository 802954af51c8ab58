#include "forward/counters.hpp"

namespace smallthinker {

Counters Counters::of_pass(const Hyperparameters& hyper) {
  Counters result;
  result.neurons.assign(static_cast<std::size_t>(hyper.layers), 0);
  result.active_neurons.assign(static_cast<std::size_t>(hyper.layers), 0);
  return result;
}

void Counters::reset(const Hyperparameters& hyper) {
  *this = of_pass(hyper);
  expert_counts.assign(static_cast<std::size_t>(hyper.layers * hyper.experts), 0);
}

void Counters::add(const Counters& other) {
  const auto sum = [](std::vector<std::uint64_t>& to, const std::vector<std::uint64_t>& from) {
    for (std::size_t i = 0; i < from.size(); ++i) to[i] += from[i];
  };
  cache_hits += other.cache_hits;
  cache_misses += other.cache_misses;
  bytes_read += other.bytes_read;
  head_rows += other.head_rows;
  head_rows_computed += other.head_rows_computed;
  head_fallbacks += other.head_fallbacks;
  waited_s += other.waited_s;
  sum(neurons, other.neurons);
  sum(active_neurons, other.active_neurons);
  sum(expert_counts, other.expert_counts);
}

Counters Counters::share(std::size_t index, std::size_t count) const {
  const auto part = [&](std::uint64_t value) { return value * (index + 1) / count - value * index / count; };
  Counters result = *this;
  for (std::uint64_t* value : {&result.cache_hits, &result.cache_misses, &result.bytes_read,
                               &result.head_rows, &result.head_rows_computed, &result.head_fallbacks}) {
    *value = part(*value);
  }
  for (std::uint64_t& value : result.neurons) value = part(value);
  for (std::uint64_t& value : result.active_neurons) value = part(value);
  return result;
}

}  // namespace smallthinker
