#include "experts/checksum.hpp"

#include <cstring>

#include "kernels/table.hpp"
#include "model/mix64.hpp"

namespace smallthinker {
namespace {

constexpr std::uint64_t kSpread = 0x9E3779B97F4A7C16U;  // twice an odd number
constexpr std::uint64_t kChain = 0xD6E8FEB86659FD93U;

}  // namespace

std::uint64_t checksum64(const std::byte* data, std::size_t bytes) {
  static const auto add = select_kernels("auto").block_sums;
  std::uint64_t sums[kChecksumLanes] = {};
  std::uint64_t running[kChecksumLanes] = {};
  const std::size_t blocks = bytes / kChecksumBlock;
  add(data, blocks, sums, running);
  if (const std::size_t rest = bytes % kChecksumBlock; rest != 0) {
    std::byte last[kChecksumBlock] = {};
    std::memcpy(last, data + blocks * kChecksumBlock, rest);
    add(last, 1, sums, running);
  }
  std::uint64_t hash = bytes;
  for (std::size_t i = 0; i < kChecksumLanes; ++i) hash = hash * kChain + sums[i] + kSpread * running[i];
  return mix64(hash);
}

}  // namespace smallthinker
