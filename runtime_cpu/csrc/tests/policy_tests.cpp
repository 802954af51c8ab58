// Which expert a cache gives up: the history of uses, the policies, and what they leave in memory.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/expert_file.hpp"
#include "tests/route_trace.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

// What each policy gives up first, of experts 0 to 3 in each of four layers.
void rank_by_policy() {
  const auto order = [](const char* name, const UseHistory& history, std::vector<std::size_t> keys) {
    const CachePolicy& policy = find_policy(name);
    std::stable_sort(keys.begin(), keys.end(), [&](std::size_t a, std::size_t b) {
      return policy.utility(history, a) < policy.utility(history, b);
    });
    return keys;
  };
  using Keys = std::vector<std::size_t>;
  UseHistory history(4, 4, {});
  const auto pass = [&](const Keys& keys) {
    for (int layer = 0; layer < 4; ++layer) {
      history.begin(layer);
      for (const std::size_t key : keys) {
        if (static_cast<int>(key / 4) == layer) history.use(key);
      }
    }
  };
  for (int token = 0; token < 30; ++token) pass({1, 4});  // an old love
  for (int token = 0; token < 4; ++token) pass({2});
  pass({5, 9});      // new ones
  history.begin(1);  // the next token stands at layer 1
  CHECK(history.token() == 35 && history.distance(4) == 4 && history.distance(9) == 1 &&
        history.distance(1) == 3);
  CHECK(std::fabs(history.frequency(2) -
                  (std::pow(0.99, 2) + std::pow(0.99, 3) + std::pow(0.99, 4) + std::pow(0.99, 5))) < 1e-9);
  CHECK(order("lru", history, {9, 5, 2, 4, 1}) == (Keys{1, 4, 2, 5, 9}));
  CHECK(order("lfu", history, {4, 2, 5}) == (Keys{5, 2, 4}) && history.frequency(4) == history.frequency(1));
  CHECK(order("lrfu", history, {1, 2, 5}) == (Keys{5, 2, 1}));
  CHECK(order("lrfu-order", history, {9, 5, 4, 1}) == (Keys{5, 9, 4, 1}));  // equals go by their layer's turn
  CHECK(order("least-stale", history, {9, 2, 1, 5, 4}) == (Keys{4, 5, 1, 2, 9}));
  history.use(4);  // what this pass has used goes last
  CHECK(order("least-stale", history, {4, 9}) == (Keys{9, 4}));
  // A prior ranks what was never used, and is outlived.
  std::vector<float> prior(16, 0.0F);
  prior[3] = 0.4F;
  prior[7] = 0.2F;
  prior[8] = std::numeric_limits<float>::quiet_NaN();
  prior[9] = std::numeric_limits<float>::infinity();
  UseHistory seeded(4, 4, prior);
  for (const CachePolicy& policy : cache_policies()) {
    if (policy.name == std::string("least-stale")) continue;
    CHECK(order(policy.name, seeded, {3, 7, 8}) == (Keys{8, 7, 3}), "%s", policy.name);
  }
  for (int token = 0; token < 60000; ++token) {  // past the point where counts are rescaled
    seeded.begin(0);
    seeded.begin(1);
    seeded.use(7);
  }
  CHECK(order("lfu", seeded, {3, 7, 9}) == (Keys{3, 9, 7}) ||
        order("lfu", seeded, {3, 7, 9}) == (Keys{9, 3, 7}));
  CHECK(std::fabs(seeded.frequency(7) - 100.0) < 1e-6 && seeded.frequency(9) < 1e-6);
}

// Tokens that are computed together leave the history that they leave one by one.
void prompts_count_by_token() {
  const std::vector<std::vector<std::size_t>> chosen = {{0, 2}, {1, 2}, {0, 3}, {2, 3},
                                                        {1, 3}, {1, 2}, {1, 3}};
  UseHistory alone(2, 20, {});
  UseHistory together(2, 20, {});
  const auto pass = [](UseHistory& history, std::int64_t tokens, const auto& use) {
    for (int layer = 0; layer < 2; ++layer) {
      history.begin(layer, tokens);
      use(static_cast<std::size_t>(layer) * 20);
    }
  };
  for (const auto& keys : chosen) {
    pass(alone, 1, [&](std::size_t first) {
      for (const std::size_t key : keys) alone.use(first + key);
    });
  }
  pass(together, 7, [&](std::size_t first) {
    for (std::size_t key = 0; key < 4; ++key) {
      double weight = 0.0;
      std::int64_t ago = 0;
      for (std::size_t t = 0; t < chosen.size(); ++t) {
        if (std::find(chosen[t].begin(), chosen[t].end(), key) == chosen[t].end()) continue;
        ago = static_cast<std::int64_t>(chosen.size() - 1 - t);
        weight += std::pow(kFrequencyDecay, ago);
      }
      together.use(first + key, weight, ago);
    }
  });
  CHECK(alone.token() == together.token() && together.first_of_pass() == 0 && alone.first_of_pass() == 6 &&
        alone.first_of_last_pass() == 5 && !together.sweeping());
  for (std::size_t key = 0; key < 40; ++key) {
    CHECK(alone.last_token(key) == together.last_token(key));
    CHECK(std::fabs(alone.frequency(key) - together.frequency(key)) < 1e-12);
  }
  pass(together, std::int64_t{1} << 40, [&](std::size_t first) { together.use(first); });
  CHECK(std::fabs(together.frequency(0) - 1.0) < 1e-12 && together.frequency(1) < 1e-12);

  // A prompt gives up what its pass has done with, of each layer what the text uses least.
  const CachePolicy& policy = find_policy(kDefaultPolicy);
  UseHistory history(3, 4, {});
  for (int layer = 0; layer < 3; ++layer) {
    history.begin(layer, 8);
    for (std::size_t expert = 0; expert < 4; ++expert) {
      history.use(static_cast<std::size_t>(layer) * 4 + expert, 1.0 + static_cast<double>(expert), 1);
    }
  }
  history.begin(0, 8);
  history.begin(1, 8);
  CHECK(history.sweeping());
  std::vector<std::size_t> keys = {8, 0, 11, 3, 4, 1, 7};
  std::stable_sort(keys.begin(), keys.end(), [&](std::size_t a, std::size_t b) {
    return policy.utility(history, a) < policy.utility(history, b);
  });
  CHECK(keys == (std::vector<std::size_t>{0, 4, 1, 3, 7, 8, 11}));
}

// After a prompt the memory holds what its last tokens used, not what happened to be read last.
void prompts_leave_what_is_used() {
  ExpertFile experts(4, 16, 1, true);
  const auto reader = FileReader::open(experts.file->path);
  const AlignedMemory memory(experts.layout.slot_bytes * 40);
  ExpertCache cache(*reader, experts.layout, memory.span());
  std::vector<std::int32_t> once;
  std::vector<std::int32_t> often;
  for (std::int32_t row = 0; row < 64; ++row) (row % 16 == 5 ? once : often).push_back(row);
  std::vector<ExpertUse> uses;
  for (std::int32_t e = 0; e < 16; ++e) uses.push_back({e, e % 3 == 0 ? often : once});
  for (int pass = 0; pass < 3; ++pass) {
    for (int layer = 0; layer < 4; ++layer) {
      cache.request(layer, uses, 64);
      for (std::int32_t e = 0; e < 16; ++e) CHECK(experts.same(layer, e, 0, cache.wait(layer, e, 0)));
      cache.release(layer);
    }
  }
  for (int layer = 0; layer < 4; ++layer) {
    for (int e = 0; e < 16; e += 3) CHECK(cache.in_memory(layer, e), "expert %d of layer %d", e, layer);
  }
  // At best 40 of 64 experts stay from pass to pass; in order of use it would be none.
  CHECK(cache.counters().hits >= 2 * 30, "%llu hits", static_cast<unsigned long long>(cache.counters().hits));
}

// The study's simulation and the cache make the same decisions.
void agree_with_replay() {
  SyntheticRoutes recipe;
  recipe.layers = 5;
  recipe.experts = 12;
  recipe.used = 3;
  recipe.tokens = 60;
  recipe.correlation = 0.4;
  const RouteTrace trace = synthetic_routes(recipe);
  ExpertFile experts(recipe.layers, recipe.experts, 1, true);
  experts.layout.prior = popularity(trace);
  const auto reader = FileReader::open(experts.file->path);
  for (const CachePolicy& policy : cache_policies()) {
    for (const std::size_t slots : {std::size_t{3}, std::size_t{20}, std::size_t{60}}) {
      const AlignedMemory memory(experts.layout.slot_bytes * slots);
      CacheOptions options;
      options.policy = policy.name;
      ExpertCache cache(*reader, experts.layout, memory.span(), options);
      for (const auto& token : trace.tokens) {
        for (int layer = 0; layer < recipe.layers; ++layer) {
          const auto& chosen = token[static_cast<std::size_t>(layer)];
          cache.request(layer, std::vector<std::int32_t>(chosen.begin(), chosen.end()));
          for (const int expert : chosen) CHECK(experts.same(layer, expert, 0, cache.wait(layer, expert, 0)));
          cache.release(layer);
        }
      }
      const Replayed expected = replay_policy(trace, slots, policy, 0, experts.layout.prior);
      CHECK(cache.counters().hits == expected.hits, "%s with %zu slots: %llu hits, not %llu", policy.name,
            slots, static_cast<unsigned long long>(cache.counters().hits),
            static_cast<unsigned long long>(expected.hits));
      CHECK(expected.hits <= replay_belady(trace, slots).hits);
    }
  }
  CHECK(contains(error_of([] { find_policy("fifo"); }), "known are lru, lfu"));
}

}  // namespace

void test_cache_policies() {
  rank_by_policy();
  prompts_count_by_token();
  prompts_leave_what_is_used();
  agree_with_replay();
  std::printf("cache policies: ok\n");
}
