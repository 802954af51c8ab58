#include "tests/coverage/edges.hpp"

#include <array>
#include <bit>
#include <cstdint>

extern "C" char __executable_start;  // of the linker: places count from here, wherever the program lies

namespace {

constexpr std::size_t kSlots = 1U << 16U;
std::array<std::uint8_t, kSlots> counts{};
std::array<std::uint8_t, kSlots> seen{};  // bits: counts of 1, 2 to 3, 4 to 7, ...
std::size_t known = 0;
thread_local bool recording = false;  // the thread that asked; threads of a runtime do not read files
thread_local std::uintptr_t before = 0;

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  if (!recording) return;
  const auto place = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) -
                     reinterpret_cast<std::uintptr_t>(&__executable_start);
  const std::uintptr_t block = place * 0x9E3779B97F4A7C15U >> 40U;
  std::uint8_t& count = counts[(block ^ before) % kSlots];
  if (count < 255) ++count;
  before = block >> 1U;
}

namespace smallthinker::testing {

void start_edges() {
  counts.fill(0);
  before = 0;
  recording = true;
}

std::size_t new_edges() {
  recording = false;
  std::size_t found = 0;
  for (std::size_t i = 0; i < kSlots; ++i) {
    if (counts[i] == 0) continue;
    const auto bit = static_cast<std::uint8_t>(1U << (static_cast<unsigned>(std::bit_width(counts[i])) - 1U));
    if ((seen[i] & bit) != 0) continue;
    seen[i] = static_cast<std::uint8_t>(seen[i] | bit);
    ++found;
  }
  known += found;
  return found;
}

std::size_t all_edges() { return known; }

}  // namespace smallthinker::testing
