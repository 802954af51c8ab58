#include "checksum.hpp"

#include <cstring>

#include "kernels.hpp"

namespace smallthinker {
namespace {

constexpr std::uint64_t kSpread = 0x9E3779B97F4A7C16U;  // twice an odd number
constexpr std::uint64_t kChain = 0xD6E8FEB86659FD93U;
constexpr std::size_t kBlock = kChecksumLanes * sizeof(std::uint32_t);

}  // namespace

std::uint64_t checksum64(const std::byte* data, std::size_t bytes) {
  static const BlockSums fastest = select_kernels("auto").block_sums;
  return checksum64(data, bytes, fastest);
}

std::uint64_t checksum64(const std::byte* data, std::size_t bytes, BlockSums add) {
  std::uint64_t sums[kChecksumLanes] = {};
  std::uint64_t running[kChecksumLanes] = {};
  const std::size_t blocks = bytes / kBlock;
  add(data, blocks, sums, running);
  if (const std::size_t rest = bytes % kBlock; rest != 0) {
    std::byte last[kBlock] = {};
    std::memcpy(last, data + blocks * kBlock, rest);
    add(last, 1, sums, running);
  }
  std::uint64_t hash = bytes;
  for (std::size_t i = 0; i < kChecksumLanes; ++i) hash = hash * kChain + sums[i] + kSpread * running[i];
  hash = (hash ^ (hash >> 33U)) * 0xFF51AFD7ED558CCDU;
  hash = (hash ^ (hash >> 33U)) * 0xC4CEB9FE1A85EC53U;
  return hash ^ (hash >> 33U);
}

}  // namespace smallthinker
