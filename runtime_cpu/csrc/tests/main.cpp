// core_tests [--golden FOLDER] [--fuzz CASES] [--coverage CASES] [--seed N] [TEST...]
#include <string>
#include <vector>

#include "tests/check.hpp"

int main(int argc, char** argv) {
  unsigned long cases = 20000;
  unsigned long guided = 10000;
  unsigned long seed = 1;
  const char* golden = nullptr;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--fuzz" && has_value) {
      cases = std::strtoul(argv[++i], nullptr, 10);
    } else if (argument == "--coverage" && has_value) {
      guided = std::strtoul(argv[++i], nullptr, 10);
    } else if (argument == "--seed" && has_value) {
      seed = std::strtoul(argv[++i], nullptr, 10);
    } else if (argument == "--golden" && has_value) {
      golden = argv[++i];
    } else {
      wanted.push_back(argument);
    }
  }
  const auto runs = [&](const char* name) {
    if (wanted.empty()) return true;
    for (const std::string& one : wanted) {
      if (one == name) return true;
    }
    return false;
  };
  if (runs("half")) test_half();
  if (runs("kernels")) test_kernels();
  if (runs("packed")) test_packed();
  if (runs("pool")) test_thread_pool();
  if (runs("sampler")) test_sampler();
  if (runs("vocabulary")) test_vocabulary();
  if (runs("checksum")) test_checksum();
  if (runs("file")) test_file_reader();
  if (runs("cache")) test_expert_cache();
  if (runs("policies")) test_cache_policies();
  if (runs("reader")) test_reader();
  if (runs("fuzz")) test_reader_fuzz(cases, seed);
  if (runs("coverage")) test_coverage(guided, seed);
  if (runs("forecast")) test_forecast();
  if (runs("forward")) test_forward();
  if (runs("head")) test_head();
  if (runs("offload")) test_offload();
  if (golden != nullptr && runs("golden")) test_golden(golden);
  std::puts("all tests passed");
  return 0;
}
