// A 64-bit checksum for blobs of megabytes, fast enough to run on every read. It finds damage, not malice.
//
//   checksum64(data, bytes)
//
// Definition (little-endian, the last block padded with zeros): word i of every 32-byte block goes to lane i,
// which keeps a = sum of its words and b = sum of a after each block. With c = a + kSpread * b the lanes are
// chained, starting from the length: h = h * kChain + c; murmur3's finaliser, a bijection, closes.
// A changed word moves its lane's c by d * (1 + kSpread * position): kSpread is even, so the factor is odd,
// and d is no multiple of 2^64, so any change within one aligned 32-bit word changes the result for certain.
// Only additions run per byte, because 64-bit multiplications are slow on cores without AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace smallthinker {

inline constexpr std::uint64_t kChecksumSpread = 0x9E3779B97F4A7C16U;  // twice an odd number
inline constexpr std::uint64_t kChecksumChain = 0xD6E8FEB86659FD93U;
inline constexpr std::size_t kChecksumLanes = 8;

inline std::uint64_t checksum64(const std::byte* data, std::size_t bytes) {
  constexpr std::size_t kBlock = kChecksumLanes * sizeof(std::uint32_t);
  std::uint64_t sums[kChecksumLanes] = {};
  std::uint64_t running[kChecksumLanes] = {};
  const auto add_block = [&](const std::byte* from) {
    std::uint32_t words[kChecksumLanes];
    std::memcpy(words, from, kBlock);
    for (std::size_t i = 0; i < kChecksumLanes; ++i) {
      sums[i] += words[i];
      running[i] += sums[i];
    }
  };
  const std::size_t whole = bytes / kBlock * kBlock;
  for (std::size_t at = 0; at < whole; at += kBlock) add_block(data + at);
  if (whole != bytes) {
    std::byte last[kBlock] = {};
    std::memcpy(last, data + whole, bytes - whole);
    add_block(last);
  }
  std::uint64_t hash = bytes;
  for (std::size_t i = 0; i < kChecksumLanes; ++i) {
    hash = hash * kChecksumChain + sums[i] + kChecksumSpread * running[i];
  }
  hash = (hash ^ (hash >> 33U)) * 0xFF51AFD7ED558CCDU;
  hash = (hash ^ (hash >> 33U)) * 0xC4CEB9FE1A85EC53U;
  return hash ^ (hash >> 33U);
}

}  // namespace smallthinker
