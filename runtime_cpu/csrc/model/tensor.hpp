// Storage types of GGUF tensors, the views onto mapped weights, and the activations that kernels read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

// Inline functions that a kernel file calls must not leave a weak symbol compiled for its instruction set,
// which the linker could pick for all callers.
#define SMALLTHINKER_INLINE inline __attribute__((always_inline))
// Loops that fill the registers: inlined into the function that chooses one of them, they get fewer.
#define SMALLTHINKER_NOINLINE __attribute__((noinline))

namespace smallthinker {

// Anything a caller can act on; becomes runtime_cpu.EngineError.
class EngineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The file is damaged or is no SmallThinker model; becomes runtime_cpu.ModelFileError.
class ModelFileError : public EngineError {
 public:
  using EngineError::EngineError;
};

// Values are ggml's type ids (ggml.h, enum ggml_type).
enum class Type : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ8_0 = 8,
  kQ6_K = 14,
  kI8 = 24,
  kBF16 = 30
};

struct TypeTraits {
  Type type;
  const char* name;
  std::int64_t block;        // elements per block
  std::int64_t block_bytes;  // bytes per block
  bool quantised;            // kernels read activations as 16-bit blocks
};

inline constexpr TypeTraits kTypes[] = {
    {Type::kF32, "F32", 1, 4, false},    {Type::kF16, "F16", 1, 2, false},
    {Type::kBF16, "BF16", 1, 2, false},  {Type::kQ4_0, "Q4_0", 32, 18, true},
    {Type::kQ8_0, "Q8_0", 32, 34, true}, {Type::kQ6_K, "Q6_K", 256, 210, true},
    {Type::kI8, "I8", 1, 1, false},  // only as the bytes of packed weights
};

inline const TypeTraits* find_type(std::uint32_t id) {
  for (const TypeTraits& traits : kTypes) {
    if (static_cast<std::uint32_t>(traits.type) == id) return &traits;
  }
  return nullptr;
}

inline const TypeTraits& traits_of(Type type) {
  const TypeTraits* traits = find_type(static_cast<std::uint32_t>(type));
  if (traits == nullptr) throw std::logic_error("unknown tensor type");
  return *traits;
}

// A row-major matrix in the file; `experts` of them lie one after the other. GGUF's ne is {cols, rows,
// experts}. Another layout (neuron-major bundles, interleaved rows) becomes another field here and another
// kernel entry.
struct Matrix {
  const std::byte* data = nullptr;
  Type type = Type::kF32;
  std::int64_t cols = 0;
  std::int64_t rows = 0;
  std::int64_t experts = 1;
  std::size_t row_bytes = 0;

  SMALLTHINKER_INLINE const std::byte* row(std::int64_t row, std::int64_t expert = 0) const {
    return data + row_bytes * static_cast<std::size_t>(expert * rows + row);
  }
};

inline Matrix make_matrix(const std::byte* data, Type type, std::int64_t cols, std::int64_t rows,
                          std::int64_t experts = 1) {
  const TypeTraits& traits = traits_of(type);
  return {data, type,    cols,
          rows, experts, static_cast<std::size_t>(cols / traits.block * traits.block_bytes)};
}

inline constexpr std::int64_t kActivationBlock = 32;
inline constexpr float kActivationSteps = 32512.0F;  // 127 * 256: the upper of two bytes fits a signed one

// Rows of activations, in fp32 and as 16-bit integers with one scale per 32: x = scale * q, |q| <= 32512.
// 16 bits and not llama.cpp's 8: the products still fit 32-bit lanes, and the rounding (3e-5 of a block's
// greatest value) is 256 times finer, so a near-tie between experts is not flipped by it.
struct Activations {
  const float* f32 = nullptr;           // [rows][stride]
  const std::int16_t* q = nullptr;      // [rows][stride]
  const float* scales = nullptr;        // [rows][stride / 32]
  std::int64_t stride = 0;              // elements; a multiple of 32
  const std::int32_t* index = nullptr;  // token i reads row index[i]; none: row i
  const std::byte* planes = nullptr;    // [rows][plane_bytes], the form of packed.hpp
  std::size_t plane_bytes = 0;

  SMALLTHINKER_INLINE std::int64_t at(std::int64_t token) const {
    return index != nullptr ? index[token] : token;
  }
  SMALLTHINKER_INLINE const float* f32_row(std::int64_t token) const { return f32 + at(token) * stride; }
  SMALLTHINKER_INLINE const std::int16_t* q_row(std::int64_t token) const { return q + at(token) * stride; }
  SMALLTHINKER_INLINE const float* scale_row(std::int64_t token) const {
    return scales + at(token) * (stride / kActivationBlock);
  }
  SMALLTHINKER_INLINE const std::byte* plane_row(std::int64_t token) const {
    return planes + static_cast<std::size_t>(at(token)) * plane_bytes;
  }
};

inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T>
SMALLTHINKER_INLINE T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// IEEE half to float without tables or intrinsics (round trips every one of the 65,536 values).
inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16U;
  const std::uint32_t exponent = (half >> 10U) & 0x1FU;
  const std::uint32_t mantissa = half & 0x3FFU;
  std::uint32_t bits = 0;
  if (exponent == 31) {
    bits = sign | 0x7F800000U | (mantissa << 13U);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112U) << 23U) | (mantissa << 13U);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Float to half, to nearest even, as F16C does.
inline std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = (bits >> 16U) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U)
    return static_cast<std::uint16_t>(sign | 0x7E00U | ((magnitude >> 13U) & 0x3FFU));
  if (magnitude >= 0x477FF000U) return static_cast<std::uint16_t>(sign | 0x7C00U);  // rounds to infinity
  if (magnitude < 0x33000001U) return static_cast<std::uint16_t>(sign);             // rounds to zero
  const std::uint32_t exponent = magnitude >> 23U;
  const std::uint32_t mantissa = (magnitude & 0x7FFFFFU) | 0x800000U;
  const std::uint32_t shift = exponent < 113 ? 126U - exponent : 13U;
  std::uint32_t rounded = mantissa >> shift;
  const std::uint32_t rest = mantissa & ((1U << shift) - 1U);
  const std::uint32_t half = 1U << (shift - 1U);
  if (rest > half || (rest == half && (rounded & 1U) != 0)) ++rounded;
  if (exponent >= 113) rounded += (exponent - 113U) << 10U;
  return static_cast<std::uint16_t>(sign | rounded);
}

inline float bfloat_to_float(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16U;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace smallthinker
