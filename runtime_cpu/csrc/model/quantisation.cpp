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

void quantise_block(const float* x, std::byte* block) {
  float extreme = 0.0F;
  for (std::int64_t i = 0; i < kActivationBlock; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  const std::uint16_t scale = float_to_half(extreme / -8.0F);
  const float step = half_to_float(scale);
  const float inverse = step != 0.0F ? 1.0F / step : 0.0F;
  const auto nibble = [&](float value) {
    const float q = value * inverse + 8.5F;
    return static_cast<unsigned>(q > 0.0F ? std::min(q, 15.0F) : 0.0F);  // NaN becomes 0
  };
  std::memcpy(block, &scale, sizeof scale);
  for (std::int64_t i = 0; i < kActivationBlock / 2; ++i) {
    block[2 + i] = static_cast<std::byte>(nibble(x[i]) | nibble(x[i + kActivationBlock / 2]) << 4U);
  }
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
