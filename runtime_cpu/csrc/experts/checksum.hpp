// A 64-bit checksum for blobs of megabytes, fast enough to run on every read. It finds damage, not malice.
//
// Definition (little-endian, the last block padded with zeros): word i of every 32-byte block goes to lane i,
// which keeps a = sum of its words and b = sum of a after each block. With c = a + kSpread * b the lanes are
// chained, starting from the length: h = h * kChain + c; mix64, a bijection, closes.
// A changed word moves its lane's c by d * (1 + kSpread * position): kSpread is even, so the factor is odd,
// and d is no multiple of 2^64, so any change within one aligned 32-bit word changes the result for certain.
// Only additions run per byte, because 64-bit multiplications are slow on cores without AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>

namespace smallthinker {

// Of data [bytes], by the fastest kernels that this processor has: all give the same.
std::uint64_t checksum64(const std::byte* data, std::size_t bytes);

}  // namespace smallthinker
