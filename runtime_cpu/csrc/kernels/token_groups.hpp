// Tokens in groups of four, then two, then one: as many as share one pass over the weights.
//
//   each_token_group(tokens, [&](auto count, std::int64_t first) { tile_rows<count>(first, ...); });
#pragma once

#include <cstdint>
#include <type_traits>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

template <typename Work>
SMALLTHINKER_INLINE void each_token_group(std::int64_t tokens, const Work& work) {
  std::int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) work(std::integral_constant<int, 4>{}, t);
  for (; t + 2 <= tokens; t += 2) work(std::integral_constant<int, 2>{}, t);
  if (t < tokens) work(std::integral_constant<int, 1>{}, t);
}

}  // namespace
}  // namespace smallthinker
