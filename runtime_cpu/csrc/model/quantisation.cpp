#include "model/quantisation.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace smallthinker {
namespace {

// Layouts of the blocks: ggml-common.h (block_q4_0, block_q8_0, block_q6_K).
void dequantise_q4_0(const std::byte* block, float* out) {
  const float scale = half_to_float(load<std::uint16_t>(block));
  for (int i = 0; i < 16; ++i) {
    const int pair = std::to_integer<int>(block[2 + i]);
    out[i] = static_cast<float>((pair & 15) - 8) * scale;
    out[i + 16] = static_cast<float>((pair >> 4) - 8) * scale;
  }
}

void dequantise_q8_0(const std::byte* block, float* out) {
  const float scale = half_to_float(load<std::uint16_t>(block));
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(load<std::int8_t>(block + 2 + i)) * scale;
}

void dequantise_q6_k(const std::byte* block, float* out) {
  const std::byte* low = block;
  const std::byte* high = block + 128;
  const std::byte* scales = block + 192;
  const float scale = half_to_float(load<std::uint16_t>(block + 208));
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int lane = i % 32;
    const int nibbles = std::to_integer<int>(low[64 * half + 32 * (quarter & 1) + lane]);
    const int upper = std::to_integer<int>(high[32 * half + lane]) >> (2 * quarter) & 3;
    const int value = ((quarter < 2 ? nibbles & 15 : nibbles >> 4) | upper << 4) - 32;
    out[i] = scale * static_cast<float>(load<std::int8_t>(scales + i / 16)) * static_cast<float>(value);
  }
}

typedef float Vec __attribute__((vector_size(16)));

Vec load_vec(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The value of greatest magnitude of x [32], the first of equals; NaN when one is not finite.
float extreme_of(const float* x) {
  Vec high = load_vec(x);
  Vec low = high;
  Vec damage = high * 0.0F;  // NaN where a value is infinite or NaN
  for (std::int64_t i = 4; i < kActivationBlock; i += 4) {
    const Vec value = load_vec(x + i);
    high = value > high ? value : high;
    low = value < low ? value : low;
    damage += value * 0.0F;
  }
  const float any = (damage[0] + damage[1]) + (damage[2] + damage[3]);
  if (any != 0.0F) return any;
  const float greatest = std::max(std::max(high[0], high[1]), std::max(high[2], high[3]));
  const float least = std::min(std::min(low[0], low[1]), std::min(low[2], low[3]));
  if (-least != greatest) return -least > greatest ? least : greatest;
  return *std::find_if(x, x + kActivationBlock, [&](float value) { return std::fabs(value) == greatest; });
}

void quantise_block(const float* x, std::byte* block) {  // x [32]
  constexpr int kHalf = kActivationBlock / 2;
  const float scale = extreme_of(x) / -8.0F;
  const float inverse = scale != 0.0F ? 1.0F / scale : 0.0F;
  const std::uint16_t stored = float_to_half(scale);
  std::memcpy(block, &stored, sizeof stored);
  std::uint8_t pairs[kHalf] = {};
  if (std::isfinite(inverse)) {  // else NaN, or so small a scale that ggml's infinities convert to 0
    for (int i = 0; i < kHalf; ++i) {
      const int low = std::min(static_cast<int>(x[i] * inverse + 8.5F), 15);
      const int high = std::min(static_cast<int>(x[i + kHalf] * inverse + 8.5F), 15);
      pairs[i] = static_cast<std::uint8_t>(low | high << 4);
    }
  }
  std::memcpy(block + 2, pairs, sizeof pairs);
}

}  // namespace

void dequantise(Type type, const std::byte* data, std::int64_t size, float* out) {
  const TypeTraits& traits = traits_of(type);
  for (std::int64_t start = 0; start < size; start += traits.block, data += traits.block_bytes) {
    switch (type) {
      case Type::kF32:
        out[start] = load<float>(data);
        break;
      case Type::kF16:
        out[start] = half_to_float(load<std::uint16_t>(data));
        break;
      case Type::kBF16:
        out[start] = bfloat_to_float(load<std::uint16_t>(data));
        break;
      case Type::kQ4_0:
        dequantise_q4_0(data, out + start);
        break;
      case Type::kQ8_0:
        dequantise_q8_0(data, out + start);
        break;
      case Type::kQ6_K:
        dequantise_q6_k(data, out + start);
        break;
      case Type::kI8:
        throw std::logic_error("packed bytes have no rows");
    }
  }
}

void quantise_q4_0(const float* x, std::int64_t size, std::byte* out) {
  const std::int64_t block_bytes = traits_of(Type::kQ4_0).block_bytes;
  for (std::int64_t i = 0; i < size; i += kActivationBlock, out += block_bytes) quantise_block(x + i, out);
}

}  // namespace smallthinker
