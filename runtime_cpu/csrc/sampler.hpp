// From a row of logits to a token. Order: bias, repetition, presence and frequency penalties, temperature,
// min-p, top-k, top-p, then one draw.
//
// Randomness is xoshiro256** (Blackman and Vigna) seeded by four steps of splitmix64: one 64-bit number per
// token, its upper 53 bits as a fraction in [0, 1). The same seed, logits and options give the same tokens
// everywhere.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

namespace smallthinker {

class RandomStream {
 public:
  explicit RandomStream(std::uint64_t seed);
  std::uint64_t next();
  double fraction() { return static_cast<double>(next() >> 11U) * 0x1p-53; }

 private:
  std::array<std::uint64_t, 4> state_{};
};

struct SamplerOptions {
  double temperature = 0.0;  // 0: the greatest logit, the lowest id among equals
  std::int64_t top_k = 0;    // 0: all
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  std::uint64_t seed = 0;
  std::vector<std::pair<std::int32_t, float>> logit_bias;
};

struct Choice {
  std::int32_t id = 0;
  float logprob = 0.0F;                             // of the untouched logits
  std::vector<std::pair<std::int32_t, float>> top;  // best first
};

class Sampler {
 public:
  // Throws EngineError for a bias outside the vocabulary. Ranges of the options are the caller's business.
  Sampler(std::int64_t vocab, SamplerOptions options);

  // Tokens of the prompt count for the repetition penalty.
  void observe_prompt(std::span<const std::int32_t> tokens);

  // The chosen token then counts for all penalties.
  Choice sample(std::span<const float> logits, std::int64_t top);

 private:
  void adjust();
  std::int32_t greatest() const;
  std::int32_t draw();

  std::int64_t vocab_;
  SamplerOptions options_;
  RandomStream random_;
  std::unordered_map<std::int32_t, std::int64_t> generated_;  // how often
  std::unordered_map<std::int32_t, std::int64_t> seen_;       // in prompt or answer
  std::vector<float> logits_;
  std::vector<std::int32_t> order_;
  std::vector<double> weights_;  // by id
};

}  // namespace smallthinker
