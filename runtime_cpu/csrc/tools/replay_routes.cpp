// Hit rates of the expert cache's policies, and of a cache that knows the future, on traces of routing.
//
//   replay_routes                                synthetic routing of the 4B and the 21B shape
//   zcat model.route.csv.gz | replay_routes -    a trace: lines "turn,phase,step,layer,slot,expert,…"
//   replay_routes model.route.csv …
//
// Prints Markdown. Real traces count every decoded token, first touches included, from an empty cache;
// synthetic ones 400 tokens after 200. "seeded" columns of the last table begin with statistics of other
// text.
#include <cstdio>
#include <fstream>
#include <iostream>

#include "tests/route_trace.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr double kShares[] = {0.10, 0.20, 0.35};

void print_header() {
  std::printf("| routing | cached |");
  for (const CachePolicy& policy : cache_policies()) std::printf(" %s |", policy.name);
  std::printf(" Belady |\n| --- | --- |");
  for (std::size_t i = 0; i <= cache_policies().size(); ++i) std::printf(" --- |");
  std::printf("\n");
}

void print_rows(const std::string& name, const RouteTrace& trace, std::size_t skipped) {
  for (const double share : kShares) {
    const auto slots = static_cast<std::size_t>(share * static_cast<double>(trace.keys()));
    std::printf("| %s, overlap %.2f | %.0f %% |", name.c_str(), overlap(trace), share * 100.0);
    for (const CachePolicy& policy : cache_policies()) {
      std::printf(" %.1f |", 100.0 * replay_policy(trace, slots, policy, skipped).rate());
    }
    std::printf(" %.1f |\n", 100.0 * replay_belady(trace, slots, skipped).rate());
  }
}

struct Case {
  const char* name;
  SyntheticRoutes recipe;
};

}  // namespace

int main(int argc, char** argv) {
  print_header();
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    std::ifstream file;
    if (path != "-") file.open(path);
    std::istream& input = path == "-" ? std::cin : file;
    const RouteTrace trace = read_routes(input, 1);
    if (trace.tokens.empty()) {
      std::fprintf(stderr, "%s holds no decoded tokens\n", path.c_str());
      return 1;
    }
    print_rows(path, trace, 0);
  }
  if (argc > 1) return 0;

  const Case cases[] = {
      {"4B, independent tokens", {32, 32, 4, 600, 1.0, 0.0}},
      {"4B, text-like", {32, 32, 4, 600, 0.5, 0.45}},
      {"4B, skewed and text-like", {32, 32, 4, 600, 1.0, 0.6}},
      {"21B, independent tokens", {52, 64, 6, 600, 1.0, 0.0}},
      {"21B, text-like", {52, 64, 6, 600, 0.5, 0.53}},
  };
  for (const Case& one : cases) print_rows(one.name, synthetic_routes(one.recipe), 200);

  std::printf(
      "\n| first 64 tokens, 4B, 35 %% | empty | empty, seeded | warm, seeded |\n| --- | --- | --- | --- |\n");
  for (const Case& one : cases) {
    if (one.recipe.layers != 32) continue;
    SyntheticRoutes other = one.recipe;
    other.seed = 3;  // other text, the same model
    const std::vector<float> prior = popularity(synthetic_routes(other));
    SyntheticRoutes recipe = one.recipe;
    recipe.tokens = 64;
    const RouteTrace trace = synthetic_routes(recipe);
    const auto slots = static_cast<std::size_t>(0.35 * static_cast<double>(trace.keys()));
    for (const CachePolicy& policy : cache_policies()) {
      std::printf("| %s, %s | %.1f | %.1f | %.1f |\n", one.name, policy.name,
                  100.0 * replay_policy(trace, slots, policy).rate(),
                  100.0 * replay_policy(trace, slots, policy, 0, prior).rate(),
                  100.0 * replay_policy(trace, slots, policy, 0, prior, true).rate());
    }
  }
  return 0;
}
