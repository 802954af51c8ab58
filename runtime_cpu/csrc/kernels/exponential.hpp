// The softmax's exponential on vectors of any width: `Isa` gives the operations.
//
//   struct Isa {
//     using Vec = __m256; static constexpr int kLanes = 8;
//     all load store load_some store_some first_lanes add subtract multiply fused fused_negative sum
//     clamp round scale_by_power
//   };
//   exp_sum<Isa>(x, size, shift);
#pragma once

#include <cstdint>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

inline constexpr float kLeastExponent = -87.33654F;  // below it the result is 0
inline constexpr float kGreatestExponent = 88.3F;

// exp to 2 ulp on [-87.3, 88.3] (Cephes' polynomial), 0 below; NaN stays NaN.
template <typename Isa>
SMALLTHINKER_INLINE typename Isa::Vec exponential(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  const Vec clamped = Isa::clamp(x, kLeastExponent, kGreatestExponent);
  const Vec n = Isa::round(Isa::multiply(clamped, Isa::all(1.44269504F)));
  Vec r = Isa::fused_negative(n, Isa::all(0.693359375F), clamped);
  r = Isa::fused_negative(n, Isa::all(-2.12194440e-4F), r);
  Vec p = Isa::all(1.9875691500e-4F);
  p = Isa::fused(p, r, Isa::all(1.3981999507e-3F));
  p = Isa::fused(p, r, Isa::all(8.3334519073e-3F));
  p = Isa::fused(p, r, Isa::all(4.1665795894e-2F));
  p = Isa::fused(p, r, Isa::all(1.6666665459e-1F));
  p = Isa::fused(p, r, Isa::all(5.0000001201e-1F));
  p = Isa::add(Isa::fused(p, Isa::multiply(r, r), r), Isa::all(1.0F));
  return Isa::scale_by_power(p, n, x);  // p * 2^n, 0 where x is below the least exponent
}

// x[i] = exp(x[i] - shift) in place, x [size]; returns their sum.
template <typename Isa>
float exp_sum(float* x, std::int64_t size, float shift) {
  using Vec = typename Isa::Vec;
  const Vec shifts = Isa::all(shift);
  Vec sum = Isa::all(0.0F);
  std::int64_t i = 0;
  for (; i + Isa::kLanes <= size; i += Isa::kLanes) {
    const Vec value = exponential<Isa>(Isa::subtract(Isa::load(x + i), shifts));
    Isa::store(x + i, value);
    sum = Isa::add(sum, value);
  }
  if (i < size) {
    const auto rest = static_cast<int>(size - i);
    const Vec value = exponential<Isa>(Isa::subtract(Isa::load_some(x + i, rest), shifts));
    Isa::store_some(x + i, rest, value);
    sum = Isa::add(sum, Isa::first_lanes(value, rest));
  }
  return Isa::sum(sum);
}

}  // namespace
}  // namespace smallthinker
