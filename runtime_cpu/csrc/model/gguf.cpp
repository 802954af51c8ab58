#include "model/gguf.hpp"

#include <algorithm>
#include <bit>
#include <limits>

namespace smallthinker {
namespace {

static_assert(std::endian::native == std::endian::little,
              "GGUF is read in place: little-endian machines only");

constexpr std::uint64_t kMaxKeyBytes = 65535;
constexpr std::uint64_t kMaxTensorNameBytes = 1024;
constexpr std::uint64_t kMaxArrayLength = std::uint64_t{1} << 24U;  // a vocabulary has 150,000 entries
constexpr std::uint32_t kDefaultAlignment = 32;

enum class ValueType : std::uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64
};

// Bytes of a scalar; 0 for text, arrays and unknown ids.
std::uint64_t scalar_bytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
      return 8;
    default:
      return 0;
  }
}

[[noreturn]] void fail(const std::string& message) { throw ModelFileError(message); }

class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::uint64_t position() const { return position_; }
  std::uint64_t left() const { return bytes_.size() - position_; }

  template <typename T>
  T take(const char* what) {
    require(sizeof(T), what);
    const T value = load<T>(bytes_.data() + position_);
    position_ += sizeof(T);
    return value;
  }

  std::string_view text(std::uint64_t most, const char* what) {
    const auto length = take<std::uint64_t>(what);
    if (length > most) {
      fail(std::string(what) + " is " + std::to_string(length) + " bytes long; at most " +
           std::to_string(most) + " are allowed");
    }
    require(length, what);
    const auto* start = reinterpret_cast<const char*>(bytes_.data() + position_);
    position_ += length;
    return {start, static_cast<std::size_t>(length)};
  }

  void require(std::uint64_t bytes, const char* what) const {
    if (bytes > left()) {
      fail(std::string("the file ends inside ") + what + " at byte " + std::to_string(position_) + " of " +
           std::to_string(bytes_.size()));
    }
  }

 private:
  std::span<const std::byte> bytes_;
  std::uint64_t position_ = 0;
};

std::int64_t signed_or_fail(std::uint64_t value, std::string_view key) {
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    fail("an entry of " + printable(key) + " exceeds 63 bits");
  }
  return static_cast<std::int64_t>(value);
}

bool read_bool(Cursor& cursor, std::string_view key) {
  const auto value = cursor.take<std::uint8_t>("a truth value");
  if (value > 1)
    fail(printable(key) + " holds the truth value " + std::to_string(value) + "; allowed are 0 and 1");
  return value == 1;
}

GgufArray read_array(Cursor& cursor, std::string_view key) {
  const auto type = static_cast<ValueType>(cursor.take<std::uint32_t>("an array's type"));
  const auto count = cursor.take<std::uint64_t>("an array's length");
  GgufArray array;
  // The bytes that `count` elements need at least are checked before memory is reserved for them.
  const std::uint64_t element = type == ValueType::kString ? sizeof(std::uint64_t) : scalar_bytes(type);
  if (element == 0) {
    fail(printable(key) + " is an array of type " + std::to_string(static_cast<std::uint32_t>(type)) +
         "; allowed are numbers, truth values and text");
  }
  if (count > cursor.left() / element || count > kMaxArrayLength) {
    fail(printable(key) + " announces " + std::to_string(count) +
         " elements, more than the file or this engine can hold");
  }
  const auto size = static_cast<std::size_t>(count);
  if (type == ValueType::kString) {
    array.is_text = true;
    array.texts.reserve(size);
    for (std::size_t i = 0; i < size; ++i)
      array.texts.push_back(cursor.text(cursor.left(), "text of an array"));
    return array;
  }
  if (type == ValueType::kFloat32 || type == ValueType::kFloat64) {
    array.is_real = true;
    array.reals.reserve(size);
    for (std::size_t i = 0; i < size; ++i) {
      array.reals.push_back(type == ValueType::kFloat32 ? static_cast<double>(cursor.take<float>("an array"))
                                                        : cursor.take<double>("an array"));
    }
    return array;
  }
  array.is_bool = type == ValueType::kBool;
  array.integers.reserve(size);
  for (std::size_t i = 0; i < size; ++i) {
    std::int64_t value = 0;
    switch (type) {
      case ValueType::kUint8:
        value = cursor.take<std::uint8_t>("an array");
        break;
      case ValueType::kInt8:
        value = cursor.take<std::int8_t>("an array");
        break;
      case ValueType::kUint16:
        value = cursor.take<std::uint16_t>("an array");
        break;
      case ValueType::kInt16:
        value = cursor.take<std::int16_t>("an array");
        break;
      case ValueType::kUint32:
        value = cursor.take<std::uint32_t>("an array");
        break;
      case ValueType::kInt32:
        value = cursor.take<std::int32_t>("an array");
        break;
      case ValueType::kUint64:
        value = signed_or_fail(cursor.take<std::uint64_t>("an array"), key);
        break;
      case ValueType::kInt64:
        value = cursor.take<std::int64_t>("an array");
        break;
      default:
        value = read_bool(cursor, key) ? 1 : 0;
        break;
    }
    array.integers.push_back(value);
  }
  return array;
}

GgufValue read_value(Cursor& cursor, std::string_view key) {
  const auto type = cursor.take<std::uint32_t>("a value's type");
  switch (static_cast<ValueType>(type)) {
    case ValueType::kUint8:
      return std::uint64_t{cursor.take<std::uint8_t>("a value")};
    case ValueType::kInt8:
      return std::int64_t{cursor.take<std::int8_t>("a value")};
    case ValueType::kUint16:
      return std::uint64_t{cursor.take<std::uint16_t>("a value")};
    case ValueType::kInt16:
      return std::int64_t{cursor.take<std::int16_t>("a value")};
    case ValueType::kUint32:
      return std::uint64_t{cursor.take<std::uint32_t>("a value")};
    case ValueType::kInt32:
      return std::int64_t{cursor.take<std::int32_t>("a value")};
    case ValueType::kFloat32:
      return static_cast<double>(cursor.take<float>("a value"));
    case ValueType::kBool:
      return read_bool(cursor, key);
    case ValueType::kString:
      return cursor.text(cursor.left(), "a text");
    case ValueType::kArray:
      return read_array(cursor, key);
    case ValueType::kUint64:
      return std::uint64_t{cursor.take<std::uint64_t>("a value")};
    case ValueType::kInt64:
      return std::int64_t{cursor.take<std::int64_t>("a value")};
    case ValueType::kFloat64:
      return cursor.take<double>("a value");
  }
  fail(printable(key) + " has the unknown value type " + std::to_string(type));
}

GgufTensor read_tensor(Cursor& cursor) {
  GgufTensor tensor;
  tensor.name = cursor.text(kMaxTensorNameBytes, "a tensor's name");
  const std::string name = "tensor " + printable(tensor.name);
  tensor.dimensions = cursor.take<std::uint32_t>("a tensor's dimensions");
  if (tensor.dimensions < 1 || tensor.dimensions > 4) {
    fail(name + " has " + std::to_string(tensor.dimensions) + " dimensions; allowed are 1 to 4");
  }
  std::uint64_t elements = 1;
  for (std::uint32_t i = 0; i < tensor.dimensions; ++i) {
    const auto size = cursor.take<std::uint64_t>("a tensor's shape");
    constexpr std::uint64_t kMost = std::uint64_t{1} << 56U;  // times any block's bytes still fits 64 bits
    if (size == 0 || size > kMost || elements > kMost / size) {
      fail(name + " has an impossible shape: dimension " + std::to_string(i) + " is " + std::to_string(size));
    }
    elements *= size;
    tensor.shape[i] = static_cast<std::int64_t>(size);
  }
  const auto type_id = cursor.take<std::uint32_t>("a tensor's type");
  const TypeTraits* traits = find_type(type_id);
  if (traits == nullptr) {
    fail(name + " has the storage type " + std::to_string(type_id) +
         "; this engine reads F32, F16, BF16, Q4_0, Q8_0 and Q6_K");
  }
  if (tensor.shape[0] % traits->block != 0) {
    fail(name + " has rows of " + std::to_string(tensor.shape[0]) + " elements; " + traits->name +
         " needs a multiple of " + std::to_string(traits->block));
  }
  tensor.type = traits->type;
  tensor.bytes =
      elements / static_cast<std::uint64_t>(traits->block) * static_cast<std::uint64_t>(traits->block_bytes);
  tensor.offset = cursor.take<std::uint64_t>("a tensor's offset");
  return tensor;
}

// Bytes of the character at the front of `text` if it is well-formed UTF-8 and printable, else 0.
std::size_t shown_character(std::string_view text) {
  const auto first = static_cast<unsigned char>(text[0]);
  if (first < 0x80) return first >= ' ' && first <= '~' ? 1 : 0;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  std::uint32_t point = first & (0x7FU >> length);
  for (std::size_t i = 1; i < length; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if ((byte & 0xC0U) != 0x80U) return 0;
    point = point << 6U | (byte & 0x3FU);
  }
  constexpr std::uint32_t kLeast[] = {0xA0, 0x800, 0x10000};  // below: controls, or a longer form than needed
  const auto between = [&](std::uint32_t low, std::uint32_t high) { return point >= low && point <= high; };
  const bool surrogate = between(0xD800, 0xDFFF);
  // Unicode's format characters: marks of direction, joiners, and ignorable ones.
  const bool unseen = point == 0xAD || point == 0x61C || point == 0x180E || between(0x200B, 0x200F) ||
                      between(0x2028, 0x202E) || between(0x2060, 0x206F) || point == 0xFEFF ||
                      between(0xFFF9, 0xFFFB) || between(0xE0000, 0xE0FFF);
  return point < kLeast[length - 2] || point > 0x10FFFF || surrogate || unseen ? 0 : length;
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr std::size_t kMost = 64;
  std::string result = "'";
  std::size_t at = 0;
  while (at < text.size() && at < kMost) {
    const std::size_t length = shown_character(text.substr(at));
    result += length == 0 ? "?" : text.substr(at, length);
    at += std::max<std::size_t>(length, 1);
  }
  result += at < text.size() ? "...'" : "'";
  return result;
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes) {
  GgufFile file;
  file.bytes_ = bytes;
  Cursor cursor(bytes);
  const auto magic = cursor.take<std::uint32_t>("the magic number");
  if (magic != 0x46554747U) fail("the file does not begin with 'GGUF'; it is no GGUF file");
  const auto version = cursor.take<std::uint32_t>("the version");
  if (version != 2 && version != 3) {
    fail("the file has GGUF version " + std::to_string(version) + "; this engine reads versions 2 and 3");
  }
  const auto tensor_count = cursor.take<std::uint64_t>("the tensor count");
  const auto value_count = cursor.take<std::uint64_t>("the metadata count");
  // The least bytes of an entry: a value has a key's length, a type and a byte; a tensor a name's length, one
  // dimension, its size, type and offset.
  if (value_count > cursor.left() / 13 || tensor_count > cursor.left() / 32) {
    fail("the file announces " + std::to_string(value_count) + " values and " + std::to_string(tensor_count) +
         " tensors, more than it can hold");
  }
  for (std::uint64_t i = 0; i < value_count; ++i) {
    const std::string_view key = cursor.text(kMaxKeyBytes, "a metadata key");
    if (!file.values_.emplace(key, read_value(cursor, key)).second)
      fail("the key " + printable(key) + " occurs twice");
  }

  std::uint64_t alignment = kDefaultAlignment;
  if (const auto stated = file.integer("general.alignment", 8, 1 << 20)) {
    alignment = static_cast<std::uint64_t>(*stated);
    if (!std::has_single_bit(alignment))
      fail("general.alignment is " + std::to_string(alignment) + ", no power of two");
  }

  file.tensors_.reserve(static_cast<std::size_t>(tensor_count));
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    GgufTensor tensor = read_tensor(cursor);
    if (!file.tensor_index_.emplace(tensor.name, file.tensors_.size()).second) {
      fail("the tensor " + printable(tensor.name) + " occurs twice");
    }
    file.tensors_.push_back(tensor);
  }

  // position() <= size, and size < 2^63, so rounding up cannot overflow.
  const std::uint64_t start = (cursor.position() + alignment - 1) / alignment * alignment;
  for (GgufTensor& tensor : file.tensors_) {
    if (tensor.offset % alignment != 0) {
      fail("tensor " + printable(tensor.name) + " lies at offset " + std::to_string(tensor.offset) +
           ", which is no multiple of the alignment " + std::to_string(alignment));
    }
    if (start > bytes.size() || tensor.offset > bytes.size() - start ||
        tensor.bytes > bytes.size() - start - tensor.offset) {
      fail("tensor " + printable(tensor.name) + " reaches past the end of the file (" +
           std::to_string(bytes.size()) + " bytes); the file is incomplete");
    }
    tensor.offset += start;
  }

  std::vector<const GgufTensor*> ordered;
  ordered.reserve(file.tensors_.size());
  for (const GgufTensor& tensor : file.tensors_) ordered.push_back(&tensor);
  std::sort(ordered.begin(), ordered.end(),
            [](const GgufTensor* a, const GgufTensor* b) { return a->offset < b->offset; });
  for (std::size_t i = 1; i < ordered.size(); ++i) {
    if (ordered[i - 1]->offset + ordered[i - 1]->bytes > ordered[i]->offset) {
      fail("the tensors " + printable(ordered[i - 1]->name) + " and " + printable(ordered[i]->name) +
           " overlap");
    }
  }
  return file;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

std::optional<std::int64_t> GgufFile::integer(std::string_view key, std::int64_t low,
                                              std::int64_t high) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  std::int64_t number = 0;
  if (const auto* natural = std::get_if<std::uint64_t>(value)) {
    number = static_cast<std::int64_t>(
        std::min(*natural, static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())));
  } else if (const auto* whole = std::get_if<std::int64_t>(value)) {
    number = *whole;
  } else {
    fail(std::string(key) + " should be a whole number");
  }
  if (number < low || number > high) {
    fail(std::string(key) + " is " + std::to_string(number) + "; allowed is " + std::to_string(low) + " to " +
         std::to_string(high));
  }
  return number;
}

std::optional<double> GgufFile::real(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* number = std::get_if<double>(value)) return *number;
  fail(std::string(key) + " should be a real number");
}

std::optional<std::string_view> GgufFile::text(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* text = std::get_if<std::string_view>(value)) return *text;
  fail(std::string(key) + " should be text");
}

const GgufArray* GgufFile::integers(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return nullptr;
  const auto* array = std::get_if<GgufArray>(value);
  if (array == nullptr || array->is_text || array->is_real)
    fail(std::string(key) + " should be an array of integers");
  return array;
}

}  // namespace smallthinker
