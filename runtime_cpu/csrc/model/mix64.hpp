// The finaliser of MurmurHash3: a bijection of 64-bit numbers in which every bit depends on every other.
#pragma once

#include <cstdint>

namespace smallthinker {

constexpr std::uint64_t mix64(std::uint64_t hash) {
  hash = (hash ^ (hash >> 33U)) * 0xFF51AFD7ED558CCDU;
  hash = (hash ^ (hash >> 33U)) * 0xC4CEB9FE1A85EC53U;
  return hash ^ (hash >> 33U);
}

}  // namespace smallthinker
