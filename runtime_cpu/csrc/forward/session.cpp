#include "forward/session.hpp"

#include <algorithm>
#include <cstring>

namespace smallthinker {

KvType find_kv_type(const Model& model, const std::string& name) {
  if (name == "f32") return KvType::kF32;
  if (name == "f16") return KvType::kF16;
  if (name == "q8") return KvType::kQ8;
  if (name == "auto") return model.all_f32 ? KvType::kF32 : KvType::kF16;
  throw EngineError("kv_type is '" + name + "'; allowed are auto, f32, f16 and q8");
}

const char* name_of(KvType type) {
  switch (type) {
    case KvType::kF32:
      return "f32";
    case KvType::kF16:
      return "f16";
    case KvType::kQ8:
      return "q8";
  }
  throw std::logic_error("unknown type of keys and values");
}

KvLayout::KvLayout(const Hyperparameters& hyper, std::int64_t context_tokens, std::int64_t chunk,
                   KvType kv_type)
    : context(context_tokens),
      ring(0),
      full(round_up(context_tokens, kKeyRun)),
      window(hyper.window),
      kv_heads(hyper.kv_heads),
      head_dim(hyper.head_dim),
      windowed(hyper.windowed),
      type(kv_type) {
  ring = std::min(full, round_up(window + chunk - 1, kKeyRun));
}

std::size_t KvLayout::layer_bytes(std::int64_t layer) const {
  return 2 * static_cast<std::size_t>(capacity(layer) * kv_heads) * vector_bytes();
}

std::size_t KvLayout::vector_bytes() const {
  switch (type) {
    case KvType::kF32:
      return static_cast<std::size_t>(head_dim) * 4;
    case KvType::kF16:
      return static_cast<std::size_t>(head_dim) * 2;
    case KvType::kQ8:
      return static_cast<std::size_t>(Q8Tile::bytes(head_dim) / kKeyTile);
  }
  throw std::logic_error("unknown type of keys and values");
}

std::int64_t KvLayout::score_stride() const {
  std::int64_t most = 0;
  for (std::size_t i = 0; i < windowed.size(); ++i)
    most = std::max(most, capacity(static_cast<std::int64_t>(i)));
  return most + kKeyTile;
}

std::size_t KvLayout::bytes() const {
  std::size_t total = 0;
  for (std::size_t i = 0; i < windowed.size(); ++i) total += layer_bytes(static_cast<std::int64_t>(i));
  return total;
}

Session::Session(const KvLayout& layout, const Hyperparameters& hyper) : layout_(layout) {
  counters.reset(hyper);
  std::size_t total = 0;
  for (std::size_t i = 0; i < layout_.windowed.size(); ++i) {
    offsets_.push_back(total);
    total += layout_.layer_bytes(static_cast<std::int64_t>(i));
  }
  // Pages of zeros, which the system allocates when they are first written: an unused context costs no
  // memory.
  memory_.reset(static_cast<std::byte*>(std::calloc(total, 1)));
  if (memory_ == nullptr) {
    throw EngineError("there is no memory for a KV cache of " + std::to_string(total) +
                      " bytes; open with a smaller context");
  }
}

std::int64_t Session::truncate(std::int64_t length) {
  length = std::clamp<std::int64_t>(length, 0, this->length());
  const std::int64_t needed = std::max<std::int64_t>(0, length - layout_.window + 1);
  if (length != this->length() && layout_.window > 0 && needed < intact_from_) length = 0;
  tokens_.resize(static_cast<std::size_t>(length));
  if (length == 0) intact_from_ = 0;
  return length;
}

void Session::append(const std::int32_t* tokens, std::int64_t count) {
  tokens_.insert(tokens_.end(), tokens, tokens + count);
  intact_from_ = std::max(intact_from_, length() - layout_.ring);
}

// Values have a row of their own, unless they have 8 bits; keys lie in tiles.
std::byte* Session::at(std::int64_t layer, bool value, std::int64_t head, std::int64_t position) const {
  const std::int64_t capacity = layout_.capacity(layer);
  const std::int64_t place = position % capacity;
  const bool alone = value && layout_.type != KvType::kQ8;
  const std::int64_t index = head * capacity + (alone ? place : place / kKeyTile * kKeyTile);
  const std::size_t half = value ? layout_.layer_bytes(layer) / 2 : 0;
  return memory_.get() + offsets_[static_cast<std::size_t>(layer)] + half +
         static_cast<std::size_t>(index) * layout_.vector_bytes();
}

void Session::store(std::int64_t layer, std::int64_t position, const float* keys, const float* values,
                    const Kernels& kernels) {
  constexpr std::int64_t kPiece = 64;
  const std::int64_t dim = layout_.head_dim;
  const std::int64_t lane = position % kKeyTile;
  std::uint16_t halves[kPiece];
  for (std::int64_t head = 0; head < layout_.kv_heads; ++head) {
    const float* key = keys + head * dim;
    const float* value = values + head * dim;
    std::byte* const key_at = at(layer, false, head, position);
    std::byte* const value_at = at(layer, true, head, position);
    switch (layout_.type) {
      case KvType::kF32:
        for (std::int64_t i = 0; i < dim; ++i) reinterpret_cast<float*>(key_at)[i * kKeyTile + lane] = key[i];
        std::memcpy(value_at, value, static_cast<std::size_t>(dim) * sizeof(float));
        break;
      case KvType::kF16:
        for (std::int64_t begin = 0; begin < dim; begin += kPiece) {
          const std::int64_t count = std::min(kPiece, dim - begin);
          kernels.to_half(key + begin, count, halves);
          for (std::int64_t i = 0; i < count; ++i)
            reinterpret_cast<std::uint16_t*>(key_at)[(begin + i) * kKeyTile + lane] = halves[i];
        }
        kernels.to_half(value, dim, reinterpret_cast<std::uint16_t*>(value_at));
        break;
      case KvType::kQ8:
        store_q8_key(key, dim, lane, key_at);
        store_q8_value(value, dim, lane, value_at);
        break;
    }
  }
}

std::int64_t Session::contiguous(std::int64_t layer, std::int64_t begin, std::int64_t end) const {
  const std::int64_t capacity = layout_.capacity(layer);
  return std::min(end, (begin / capacity + 1) * capacity);
}

KvRows Session::keys(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const {
  const std::int64_t tiles = (end + kKeyTile - 1) / kKeyTile - begin / kKeyTile;
  return {at(layer, false, head, begin), layout_.type, tiles, 0};
}

KvRows Session::values(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const {
  return {at(layer, true, head, begin), layout_.type, end - begin, begin % kKeyTile};
}

}  // namespace smallthinker
