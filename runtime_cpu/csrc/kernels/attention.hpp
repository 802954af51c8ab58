// What the attention kernels of every instruction set share: the query heads of a key head in groups whose
// sums fit the registers, and the columns that fill no register.
//
//   each_head_group<6>(heads, [&](auto size, std::int64_t first) { score_group<size>(first, ...); });
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

// Groups of at most `Most` heads, as even as possible: each group reads the keys or values once more.
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

// Columns [begin, head_dim) of attention_values for G heads, one after the other; weights [G][weight_stride],
// values [count][head_dim] of type `Row`, out [G][head_dim].
template <typename Row, int G>
void add_last_columns(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                      const std::byte* values, std::int64_t count, std::int64_t begin, float* out) {
  for (std::int64_t i = begin; i < head_dim; ++i) {
    for (int g = 0; g < G; ++g) {
      float sum = out[g * head_dim + i];
      for (std::int64_t j = 0; j < count; ++j) {
        sum = __builtin_fmaf(weights[g * weight_stride + j],
                             Row::one(values + (j * head_dim + i) * Row::kBytes), sum);
      }
      out[g * head_dim + i] = sum;
    }
  }
}

}  // namespace
}  // namespace smallthinker
