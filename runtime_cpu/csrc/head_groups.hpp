// The query heads of a key head in groups of at most `Most` whose sums fit the registers, as even as
// possible: each group reads the keys or values once more.
//
//   each_head_group<6>(heads, [&](auto size, std::int64_t first) { score_group<size>(first, ...); });
#pragma once

#include <cstdint>
#include <type_traits>

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

template <int Most, typename Work>
void each_head_group(std::int64_t heads, const Work& work) {
  const std::int64_t groups = (heads + Most - 1) / Most;
  for (std::int64_t first = 0, left = groups; left > 0; --left) {
    const std::int64_t size = (heads - first + left - 1) / left;
    const auto at = [&]<int Size>(std::integral_constant<int, Size> constant) {
      if constexpr (Size <= Most) {
        if (size == Size) work(constant, first);
      }
    };
    at(std::integral_constant<int, 1>{});
    at(std::integral_constant<int, 2>{});
    at(std::integral_constant<int, 3>{});
    at(std::integral_constant<int, 4>{});
    at(std::integral_constant<int, 5>{});
    at(std::integral_constant<int, 6>{});
    at(std::integral_constant<int, 7>{});
    static_assert(Most <= 7);
    first += size;
  }
}

}  // namespace
}  // namespace smallthinker
