// From a row of logits to a token. Order: bias, repetition, presence and frequency penalties, temperature,
// min-p, top-k, top-p, then one draw.
//
// Each of min-p, top-k and top-p keeps the front of one order: greater logits first, lower ids among equals.
// So a row is never sorted whole: only the few logits above a bound are, or the bound itself is searched for.
//
// Randomness is xoshiro256** (Blackman and Vigna) seeded by four steps of splitmix64: one 64-bit number per
// token, its upper 53 bits as a fraction in [0, 1). The same seed, logits, options and kernels give the same
// tokens, with any number of threads: a row is cut in the same pieces, whose sums are added in their order.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "forward/thread_pool.hpp"
#include "kernels/table.hpp"

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

  // The chosen token then counts for all penalties. Without a pool the caller's thread does all of it.
  Choice sample(std::span<const float> logits, std::int64_t top, const Kernels& kernels,
                ThreadPool* pool = nullptr);

 private:
  // A row with the greatest logit of each run of kLogitRun.
  struct Row {
    std::span<const float> logits;
    std::vector<float> maxima;
    float peak = 0.0F;
  };
  // Kept are greater logits, and equal ones up to this id.
  struct Cut {
    float logit;
    std::int64_t id;
  };

  struct Mass {
    double sum = 0.0;
    double count = 0.0;
  };

  // What one call of sample() computes with.
  struct Means {
    const Kernels& kernels;
    ThreadPool* pool;  // null: the caller's thread alone
  };

  template <typename Work>
  void each_chunk(const Means& means, const Work& work) const;
  double measure(const Means& means, Row& row);
  bool adjusts() const;
  void adjust(const Means& means);
  double temperature() const;
  static std::int32_t greatest(const Row& row);
  static void leaders(const Row& row, std::int64_t count, std::vector<std::int32_t>& ids);
  Mass mass_from(const Means& means, const Row& row, float bound) const;
  Cut find_cut(const Means& means, const Row& row, double goal, double Mass::* amount);
  double kept_sum(const Means& means, const Row& row, const Cut& cut);
  std::int32_t draw(const Means& means, const Row& row);
  std::int32_t draw_leader(const Row& row);
  std::int32_t draw_kept(const Row& row, const Cut& cut, double left) const;

  std::int64_t vocab_;
  SamplerOptions options_;
  RandomStream random_;
  std::unordered_map<std::int32_t, std::int64_t> generated_;  // how often
  std::unordered_map<std::int32_t, std::int64_t> seen_;       // in prompt or answer
  Row own_;                                                   // untouched
  Row changed_;
  std::vector<float> adjusted_;
  std::vector<float> weights_;  // by id; 0 of what is not kept
  std::vector<double> sums_;    // by chunk
  std::vector<std::int32_t> order_;
};

}  // namespace smallthinker
