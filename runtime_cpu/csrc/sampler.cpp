#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "tensor.hpp"

namespace smallthinker {
namespace {

std::uint64_t rotate_left(std::uint64_t value, unsigned bits) {
  return (value << bits) | (value >> (64U - bits));
}

}  // namespace

RandomStream::RandomStream(std::uint64_t seed) {
  for (std::uint64_t& word : state_) {
    seed += 0x9E3779B97F4A7C15U;
    std::uint64_t mixed = seed;
    mixed = (mixed ^ (mixed >> 30U)) * 0xBF58476D1CE4E5B9U;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94D049BB133111EBU;
    word = mixed ^ (mixed >> 31U);
  }
}

std::uint64_t RandomStream::next() {
  const std::uint64_t result = rotate_left(state_[1] * 5U, 7U) * 9U;
  const std::uint64_t shifted = state_[1] << 17U;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= shifted;
  state_[3] = rotate_left(state_[3], 45U);
  return result;
}

Sampler::Sampler(std::int64_t vocab, SamplerOptions options)
    : vocab_(vocab), options_(std::move(options)), random_(options_.seed) {
  for (const auto& [id, bias] : options_.logit_bias) {
    if (id < 0 || id >= vocab_)
      throw EngineError("logit_bias names token " + std::to_string(id) + ", outside the vocabulary");
  }
}

void Sampler::observe_prompt(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    if (token >= 0 && token < vocab_) ++seen_[token];
  }
}

void Sampler::adjust() {
  for (const auto& [id, bias] : options_.logit_bias) logits_[static_cast<std::size_t>(id)] += bias;
  if (options_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    for (const auto& [id, count] : seen_) {
      float& logit = logits_[static_cast<std::size_t>(id)];
      logit = logit > 0.0F ? logit / penalty : logit * penalty;
    }
  }
  for (const auto& [id, count] : generated_) {
    logits_[static_cast<std::size_t>(id)] -= static_cast<float>(
        options_.presence_penalty + options_.frequency_penalty * static_cast<double>(count));
  }
}

std::int32_t Sampler::greatest() const {
  return static_cast<std::int32_t>(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
}

std::int32_t Sampler::draw() {
  const auto logit = [&](std::int32_t id) {
    return static_cast<double>(logits_[static_cast<std::size_t>(id)]);
  };
  const std::int32_t best = greatest();
  const double peak = logit(best);
  if (!std::isfinite(peak)) return best;
  // Relative probabilities; the best one has 1.
  const auto weight = [&](std::int32_t id) { return weights_[static_cast<std::size_t>(id)]; };
  order_.clear();
  weights_.resize(logits_.size());
  double all = 0.0;
  for (std::int32_t id = 0; id < vocab_; ++id) {
    const double exponent = (logit(id) - peak) / options_.temperature;
    const double value = exponent <= 0.0 ? std::exp(exponent) : 0.0;  // also drops NaN
    weights_[static_cast<std::size_t>(id)] = value;
    if (value > 0.0 && value >= options_.min_p) {
      order_.push_back(id);
      all += value;
    }
  }
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float first = logits_[static_cast<std::size_t>(a)];
    const float second = logits_[static_cast<std::size_t>(b)];
    return first != second ? first > second : a < b;
  };
  if (options_.top_k > 0 && options_.top_k < static_cast<std::int64_t>(order_.size())) {
    const auto middle = order_.begin() + options_.top_k;
    std::nth_element(order_.begin(), middle, order_.end(), before);
    order_.erase(middle, order_.end());
  }
  double total = 0.0;
  if (options_.top_p < 1.0) {
    if (options_.top_k > 0) {
      all = 0.0;
      for (const std::int32_t id : order_) all += weight(id);
    }
    // All tokens below this together weigh less than what top_p leaves out: none of them is needed.
    const double least = (1.0 - options_.top_p) * all / static_cast<double>(order_.size() + 1);
    std::erase_if(order_, [&](std::int32_t id) { return weight(id) < least; });
    // The fewest best tokens that reach top_p together; sorted in growing pieces, since few are usually
    // enough.
    std::size_t kept = 0;
    std::size_t sorted = 0;
    for (std::size_t piece = 256; kept < order_.size(); piece *= 8) {
      const std::size_t until = std::min(order_.size(), sorted + piece);
      std::partial_sort(order_.begin() + static_cast<std::ptrdiff_t>(sorted),
                        order_.begin() + static_cast<std::ptrdiff_t>(until), order_.end(), before);
      sorted = until;
      while (kept < sorted && (kept == 0 || total < options_.top_p * all)) total += weight(order_[kept++]);
      if (kept < sorted) break;
    }
    order_.resize(kept);
  } else {
    std::sort(order_.begin(), order_.end());  // nth_element leaves an order that libraries choose differently
    for (const std::int32_t id : order_) total += weight(id);
  }
  double left = random_.fraction() * total;
  for (const std::int32_t id : order_) {
    left -= weight(id);
    if (left < 0.0) return id;
  }
  return order_.back();
}

Choice Sampler::sample(std::span<const float> logits, std::int64_t top) {
  if (static_cast<std::int64_t>(logits.size()) != vocab_)
    throw EngineError("a row of logits has the wrong size");
  logits_.assign(logits.begin(), logits.end());
  adjust();
  Choice choice;
  choice.id = options_.temperature > 0.0 ? draw() : greatest();
  ++generated_[choice.id];
  ++seen_[choice.id];

  const float peak = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float value : logits) sum += std::exp(static_cast<double>(value) - static_cast<double>(peak));
  const double normaliser = static_cast<double>(peak) + std::log(sum);
  const auto logprob = [&](std::int32_t id) {
    return static_cast<float>(static_cast<double>(logits[static_cast<std::size_t>(id)]) - normaliser);
  };
  choice.logprob = logprob(choice.id);
  const std::int64_t listed = std::clamp<std::int64_t>(top, 0, vocab_);
  if (listed > 0) {
    order_.resize(static_cast<std::size_t>(vocab_));
    std::iota(order_.begin(), order_.end(), 0);
    std::partial_sort(order_.begin(), order_.begin() + listed, order_.end(),
                      [&](std::int32_t a, std::int32_t b) {
                        const float first = logits[static_cast<std::size_t>(a)];
                        const float second = logits[static_cast<std::size_t>(b)];
                        return first != second ? first > second : a < b;
                      });
    for (std::int64_t i = 0; i < listed; ++i) {
      const std::int32_t id = order_[static_cast<std::size_t>(i)];
      choice.top.emplace_back(id, logprob(id));
    }
  }
  return choice;
}

}  // namespace smallthinker
