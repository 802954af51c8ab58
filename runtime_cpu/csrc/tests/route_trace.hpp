// Traces of expert routing, made up or read, and their replay through the cache's policies without any I/O.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <istream>
#include <limits>
#include <numbers>
#include <sstream>
#include <string>
#include <vector>

#include "experts/policy.hpp"
#include "forward/sampler.hpp"

namespace smallthinker::testing {

struct RouteTrace {
  int layers = 0;
  int experts = 0;
  std::vector<std::vector<std::vector<int>>> tokens;  // [token][layer] -> chosen experts

  std::size_t keys() const { return static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts); }
  std::size_t key(int layer, int expert) const {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(experts) +
           static_cast<std::size_t>(expert);
  }
};

struct SyntheticRoutes {
  int layers = 32;
  int experts = 32;
  int used = 4;
  int tokens = 400;
  double skew = 1.0;         // standard deviation of an expert's bias; that of a token's wishes is 1
  double correlation = 0.0;  // of wishes from one token to the next
  std::uint64_t popularity_seed = 1;
  std::uint64_t seed = 2;
};

inline double normal(RandomStream& random) {
  const auto uniform = [&] { return (static_cast<double>(random.next() >> 11U) + 0.5) * 0x1p-53; };
  const double radius = std::sqrt(-2.0 * std::log(uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

inline RouteTrace synthetic_routes(const SyntheticRoutes& recipe) {
  RouteTrace trace{recipe.layers, recipe.experts, {}};
  RandomStream popularity(recipe.popularity_seed);
  RandomStream random(recipe.seed);
  std::vector<double> bias(trace.keys());
  std::vector<double> wish(trace.keys());
  for (double& value : bias) value = recipe.skew * normal(popularity);
  for (double& value : wish) value = normal(random);
  const double fresh = std::sqrt(1.0 - recipe.correlation * recipe.correlation);
  for (int token = 0; token < recipe.tokens; ++token) {
    auto& layers = trace.tokens.emplace_back();
    for (int layer = 0; layer < recipe.layers; ++layer) {
      std::vector<std::pair<double, int>> order;
      for (int expert = 0; expert < recipe.experts; ++expert) {
        double& value = wish[trace.key(layer, expert)];
        value = recipe.correlation * value + fresh * normal(random);
        order.emplace_back(-(bias[trace.key(layer, expert)] + value), expert);
      }
      std::partial_sort(order.begin(), order.begin() + recipe.used, order.end());
      auto& chosen = layers.emplace_back();
      for (int i = 0; i < recipe.used; ++i) chosen.push_back(order[static_cast<std::size_t>(i)].second);
    }
  }
  return trace;
}

// Lines "turn,phase,step,layer,slot,expert,…" after comments; phase 0 is the prompt, 1 the answer.
inline RouteTrace read_routes(std::istream& input, int wanted_phase) {
  RouteTrace trace;
  std::string line;
  long last_step = -1;
  while (std::getline(input, line)) {
    std::istringstream fields(line);
    long turn = 0, phase = 0, step = 0, layer = 0, slot = 0, expert = 0;
    char comma = 0;
    if (!(fields >> turn >> comma >> phase >> comma >> step >> comma >> layer >> comma >> slot >> comma >>
          expert))
      continue;
    trace.layers = std::max(trace.layers, static_cast<int>(layer) + 1);
    trace.experts = std::max(trace.experts, static_cast<int>(expert) + 1);
    if (phase != wanted_phase) continue;
    if (step != last_step) trace.tokens.emplace_back();
    last_step = step;
    auto& layers = trace.tokens.back();
    if (static_cast<long>(layers.size()) <= layer) layers.resize(static_cast<std::size_t>(layer) + 1);
    layers[static_cast<std::size_t>(layer)].push_back(static_cast<int>(expert));
  }
  return trace;
}

// Mean share of a layer's experts that the token before had chosen too.
inline double overlap(const RouteTrace& trace) {
  double shared = 0.0;
  double all = 0.0;
  for (std::size_t t = 1; t < trace.tokens.size(); ++t) {
    for (std::size_t l = 0; l < trace.tokens[t].size() && l < trace.tokens[t - 1].size(); ++l) {
      const auto& before = trace.tokens[t - 1][l];
      for (const int expert : trace.tokens[t][l]) {
        shared += std::find(before.begin(), before.end(), expert) != before.end() ? 1.0 : 0.0;
        all += 1.0;
      }
    }
  }
  return all > 0.0 ? shared / all : 0.0;
}

// Share of tokens that use each expert.
inline std::vector<float> popularity(const RouteTrace& trace) {
  std::vector<float> share(trace.keys());
  for (const auto& token : trace.tokens) {
    for (int layer = 0; layer < static_cast<int>(token.size()); ++layer) {
      for (const int expert : token[static_cast<std::size_t>(layer)]) {
        share[trace.key(layer, expert)] += 1.0F / static_cast<float>(trace.tokens.size());
      }
    }
  }
  return share;
}

struct Replayed {
  std::uint64_t hits = 0;
  std::uint64_t uses = 0;
  double rate() const { return uses > 0 ? static_cast<double>(hits) / static_cast<double>(uses) : 0.0; }
};

// The rules of ExpertCache: what is being requested stays, of the rest the one of least utility goes. `value`
// takes a key and returns its utility.
template <typename Begin, typename Use, typename Utility>
Replayed replay(const RouteTrace& trace, std::size_t slots, std::size_t skipped,
                std::vector<std::size_t> held, const Begin& begin, const Use& use, const Utility& utility) {
  Replayed result;
  std::vector<char> in(trace.keys(), 0);
  std::vector<char> pinned(trace.keys(), 0);
  for (const std::size_t key : held) in[key] = 1;
  for (std::size_t t = 0; t < trace.tokens.size(); ++t) {
    for (int layer = 0; layer < static_cast<int>(trace.tokens[t].size()); ++layer) {
      const auto& chosen = trace.tokens[t][static_cast<std::size_t>(layer)];
      begin(t, layer);
      std::vector<std::size_t> missing;
      for (const int expert : chosen) {
        const std::size_t key = trace.key(layer, expert);
        use(t, key);
        pinned[key] = 1;
        if (in[key] == 0) missing.push_back(key);
      }
      if (t >= skipped) {
        result.uses += chosen.size();
        result.hits += chosen.size() - missing.size();
      }
      for (const std::size_t key : missing) {
        if (held.size() < slots) {
          held.push_back(key);
        } else {
          std::size_t worst = slots;
          double least = std::numeric_limits<double>::infinity();
          for (std::size_t i = 0; i < slots; ++i) {
            if (pinned[held[i]] != 0) continue;
            const double value = utility(held[i]);
            if (worst < slots && value >= least) continue;
            least = value;
            worst = i;
          }
          in[held[worst]] = 0;
          held[worst] = key;
        }
        in[key] = 1;
      }
      for (const int expert : chosen) pinned[trace.key(layer, expert)] = 0;
    }
  }
  return result;
}

// `skipped` tokens at the beginning are not counted; `warm` fills the cache by the prior first.
inline Replayed replay_policy(const RouteTrace& trace, std::size_t slots, const CachePolicy& policy,
                              std::size_t skipped = 0, const std::vector<float>& prior = {},
                              bool warm = false) {
  UseHistory history(trace.layers, trace.experts, prior);
  std::vector<std::size_t> held;
  if (warm) {
    std::vector<std::size_t> order(trace.keys());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return prior[a] > prior[b]; });
    order.resize(std::min(order.size(), slots));
    held = order;
  }
  return replay(
      trace, slots, skipped, held, [&](std::size_t, int layer) { history.begin(layer); },
      [&](std::size_t, std::size_t key) { history.use(key); },
      [&](std::size_t key) { return policy.utility(history, key); });
}

// Knows the future: gives up what is needed last. No cache that has to load what it computes with does
// better.
inline Replayed replay_belady(const RouteTrace& trace, std::size_t slots, std::size_t skipped = 0) {
  std::vector<std::vector<double>> uses(trace.keys());  // moments, last one first
  for (std::size_t t = trace.tokens.size(); t-- > 0;) {
    for (int layer = static_cast<int>(trace.tokens[t].size()); layer-- > 0;) {
      for (const int expert : trace.tokens[t][static_cast<std::size_t>(layer)]) {
        uses[trace.key(layer, expert)].push_back(static_cast<double>(t) * trace.layers + layer);
      }
    }
  }
  return replay(
      trace, slots, skipped, {}, [](std::size_t, int) {},
      [&](std::size_t, std::size_t key) { uses[key].pop_back(); },
      [&](std::size_t key) {
        return uses[key].empty() ? -std::numeric_limits<double>::infinity() : -uses[key].back();
      });
}

}  // namespace smallthinker::testing
