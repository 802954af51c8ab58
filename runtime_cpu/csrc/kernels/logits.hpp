// The passes over a row of logits that choose a token, on vectors of any width: a kernel file includes this
// with the width of its registers, and its compiler flags decide the instructions.
//
//   table.run_maxima = run_maxima<16>;  // 16 floats to a register
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/table.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

template <int Width>
struct Lanes {
  static constexpr int kBytes = Width * 4;
  typedef float Float __attribute__((vector_size(kBytes)));
  typedef std::int32_t Int __attribute__((vector_size(kBytes)));

  static SMALLTHINKER_INLINE Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static SMALLTHINKER_INLINE void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }
  static SMALLTHINKER_INLINE Float all(float value) { return Float{} + value; }

  // exp to some ulp below 0 (Cephes' polynomial), 0 below -87.3; NaN stays NaN.
  static SMALLTHINKER_INLINE Float exponential(Float x) {
    constexpr float kLeast = -87.33654F;
    constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
    const Int low = x < kLeast;
    const Float clamped = low ? all(kLeast) : x;
    const Float shifted = clamped * 1.44269504F + kRound;
    const Float n = shifted - kRound;
    const Float r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
    Float p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = (p * (r * r) + r) + 1.0F;
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;
    Float power;
    std::memcpy(&power, &bits, sizeof power);
    return low ? Float{} : p * power;
  }

  static SMALLTHINKER_INLINE float sum(Float value) {
    float lanes[Width];
    store(lanes, value);
    for (int width = Width / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

template <int Width>
float greatest_of_run(const float* x) {
  using L = Lanes<Width>;
  typename L::Float best = L::all(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < kLogitRun; i += Width) {
    const typename L::Float value = L::load(x + i);
    best = value > best ? value : best;
  }
  float lanes[Width];
  L::store(lanes, best);
  for (int width = Width / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  }
  return lanes[0];
}

template <int Width>
void run_maxima(const float* x, std::int64_t size, float* maxima) {
  std::int64_t i = 0;
  for (; i + kLogitRun <= size; i += kLogitRun) *maxima++ = greatest_of_run<Width>(x + i);
  if (i == size) return;
  float best = -std::numeric_limits<float>::infinity();
  for (; i < size; ++i) best = x[i] > best ? x[i] : best;
  *maxima = best;
}

// The last, incomplete register of a row, filled up with `rest`.
template <int Width>
SMALLTHINKER_INLINE typename Lanes<Width>::Float load_tail(const float* from, std::int64_t count,
                                                           float rest) {
  float lanes[Width];
  for (int i = 0; i < Width; ++i) lanes[i] = i < count ? from[i] : rest;
  return Lanes<Width>::load(lanes);
}

template <int Width>
float exp_weights(const float* x, std::int64_t size, float shift, float factor, float least, float* out) {
  using L = Lanes<Width>;
  const auto weigh = [&](typename L::Float values) __attribute__((always_inline)) {
    const typename L::Float value = L::exponential((values - shift) * factor);
    if (out == nullptr) return value;
    const typename L::Int kept = value >= least;  // false for NaN
    return kept ? value : typename L::Float{};
  };
  typename L::Float sums[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * Width <= size; i += 2 * Width) {
    for (int k = 0; k < 2; ++k) {
      const typename L::Float value = weigh(L::load(x + i + k * Width));
      if (out != nullptr) L::store(out + i + k * Width, value);
      sums[k] += value;
    }
  }
  for (; i < size; i += Width) {
    const std::int64_t count = size - i < Width ? size - i : Width;
    const typename L::Float value =
        weigh(load_tail<Width>(x + i, count, -std::numeric_limits<float>::infinity()));
    if (out != nullptr) std::memcpy(out + i, &value, static_cast<std::size_t>(count) * sizeof(float));
    sums[0] += value;
  }
  return L::sum(sums[0] + sums[1]);
}

template <int Width>
LogitMass mass_above(const float* x, const float* weights, std::int64_t size, float bound) {
  using L = Lanes<Width>;
  typename L::Float sums[4] = {};
  typename L::Int counts[4] = {};
  const auto add = [&](int k, typename L::Float values, typename L::Float masses)
                       __attribute__((always_inline)) {
                         const typename L::Float kept = values >= bound ? masses : typename L::Float{};
                         sums[k] += kept;
                         counts[k] -= kept > 0.0F;
                       };
  std::int64_t i = 0;
  for (; i + 4 * Width <= size; i += 4 * Width) {
    for (int k = 0; k < 4; ++k) add(k, L::load(x + i + k * Width), L::load(weights + i + k * Width));
  }
  for (; i < size; i += Width) {
    add(0, load_tail<Width>(x + i, size - i, 0.0F), load_tail<Width>(weights + i, size - i, 0.0F));
  }
  const typename L::Float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const typename L::Int count = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  LogitMass mass{L::sum(sum), 0};
  std::int32_t lanes[Width];
  std::memcpy(lanes, &count, sizeof count);
  for (const std::int32_t lane : lanes) mass.count += lane;
  return mass;
}

}  // namespace
}  // namespace smallthinker
