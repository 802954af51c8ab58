// Reading a GGUF container: every field of the untrusted bytes is checked before it is used.
//
//   GgufFile file = GgufFile::parse(bytes);       // throws ModelFileError
//   const GgufTensor* tensor = file.find_tensor("token_embd.weight");
//
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "model/tensor.hpp"

namespace smallthinker {

struct GgufArray;
// Unsigned and signed integers are widened to 64 bits; F32 and F64 to double.
using GgufValue = std::variant<std::uint64_t, std::int64_t, double, bool, std::string_view, GgufArray>;

// Strings of an array stay in the file; numbers are widened. One of the two is filled.
struct GgufArray {
  bool is_text = false;
  bool is_real = false;
  bool is_bool = false;
  std::vector<std::string_view> texts;
  std::vector<double> reals;
  std::vector<std::int64_t> integers;  // of every integer type and bool

  std::size_t size() const { return is_text ? texts.size() : is_real ? reals.size() : integers.size(); }
};

struct GgufTensor {
  std::string_view name;
  Type type = Type::kF32;
  std::array<std::int64_t, 4> shape{1, 1, 1, 1};  // ggml's ne: the first one is contiguous
  std::uint32_t dimensions = 1;
  std::uint64_t offset = 0;  // from the start of the bytes
  std::uint64_t bytes = 0;
};

class GgufFile {
 public:
  // `bytes` must outlive the result.
  static GgufFile parse(std::span<const std::byte> bytes);

  const std::map<std::string_view, GgufValue>& values() const { return values_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find_tensor(std::string_view name) const;
  const std::byte* data(const GgufTensor& tensor) const { return bytes_.data() + tensor.offset; }

  // Values by key: nullopt or null if there is none; one of the wrong kind or range is a ModelFileError.
  const GgufValue* find(std::string_view key) const;
  std::optional<std::int64_t> integer(std::string_view key, std::int64_t low, std::int64_t high) const;
  std::optional<double> real(std::string_view key) const;
  std::optional<std::string_view> text(std::string_view key) const;
  const GgufArray* integers(std::string_view key) const;

 private:
  std::span<const std::byte> bytes_;
  std::map<std::string_view, GgufValue> values_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string_view, std::size_t> tensor_index_;
};

// Untrusted text for a message, in quotes: about 64 bytes; invalid UTF-8 and unprintable characters become
// '?'.
std::string printable(std::string_view text);

}  // namespace smallthinker
