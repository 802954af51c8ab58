#include "kernels/kv_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace smallthinker {
namespace {

// A block of at most 32 dimensions as integers in [-127, 127] times an fp16 scale.
struct Q8Integers {
  std::uint16_t scale = 0;
  std::int32_t values[kQ8Block] = {};

  Q8Integers(const float* x, std::int64_t count) {  // x [count]
    float greatest = 0.0F;
    float damage = 0.0F;  // NaN as soon as a value is infinite or NaN
    for (std::int64_t i = 0; i < count; ++i) {
      greatest = std::max(greatest, std::fabs(x[i]));
      damage += x[i] * 0.0F;
    }
    scale = float_to_half(greatest / 127.0F);
    float step = half_to_float(scale);
    if (damage != 0.0F || std::isinf(step)) {
      scale = 0x7E00;  // NaN
      step = 0.0F;
    }
    const float inverse = step > 0.0F ? 1.0F / step : 0.0F;
    for (std::int64_t i = 0; i < count; ++i) {
      const float steps = step > 0.0F ? std::clamp(x[i] * inverse, -127.0F, 127.0F) : 0.0F;
      const float rounded = steps + 12582912.0F;  // 1.5 * 2^23: rounds to nearest, into the lowest bits
      std::memcpy(&values[i], &rounded, sizeof rounded);
    }
  }
};

}  // namespace

void store_q8_key(const float* x, std::int64_t head_dim, std::int64_t lane, std::byte* tile) {
  for (std::int64_t begin = 0; begin < head_dim; begin += kQ8Block) {
    const std::int64_t count = std::min(kQ8Block, head_dim - begin);
    const Q8Integers block(x + begin, count);
    std::byte* const to = tile + begin / kQ8Block * kKeyTile * (2 + kQ8Block);
    std::memcpy(to + 2 * lane, &block.scale, sizeof block.scale);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = i / kQ8Word * kKeyTile * kQ8Word + lane * kQ8Word + i % kQ8Word;
      to[kKeyTile * 2 + at] = static_cast<std::byte>((block.values[i] + 128) & 0xFF);
    }
  }
}

void store_q8_value(const float* x, std::int64_t head_dim, std::int64_t lane, std::byte* tile) {
  const std::int64_t blocks = Q8Tile::blocks(head_dim);
  std::byte* const row = tile + kKeyTile * blocks * 2 + lane * head_dim;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t count = std::min(kQ8Block, head_dim - b * kQ8Block);
    const Q8Integers block(x + b * kQ8Block, count);
    std::memcpy(tile + 2 * (lane * blocks + b), &block.scale, sizeof block.scale);
    for (std::int64_t i = 0; i < count; ++i)
      row[b * kQ8Block + i] = static_cast<std::byte>(block.values[i] & 0xFF);
  }
}

}  // namespace smallthinker
