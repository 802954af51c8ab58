// Kernels without an order of sums: plain loops, which the compiler vectorises for the instructions of the
// file that includes this.
#pragma once

#include <cstdint>

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

// x [size], cosines and sines [size / 2].
void rotate(float* x, std::int64_t size, const float* cosines, const float* sines) {
  const std::int64_t pairs = size / 2;
  for (std::int64_t i = 0; i < pairs; ++i) {
    const float first = x[i];
    const float second = x[i + pairs];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + pairs] = second * cosines[i] + first * sines[i];
  }
}

void scale(float* x, std::int64_t size, float factor) {  // x [size]
  for (std::int64_t i = 0; i < size; ++i) x[i] *= factor;
}

void add_scaled(float* x, const float* y, std::int64_t size, float factor) {  // x and y [size]
  for (std::int64_t i = 0; i < size; ++i) x[i] += factor * y[i];
}

}  // namespace
}  // namespace smallthinker
