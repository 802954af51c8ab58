#include "forward/session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace smallthinker {

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

std::size_t KvLayout::bytes() const {
  std::size_t total = 0;
  for (std::size_t i = 0; i < windowed.size(); ++i) total += layer_bytes(static_cast<std::int64_t>(i));
  return total;
}

void Counters::reset(const Hyperparameters& hyper) {
  const auto layers = static_cast<std::size_t>(hyper.layers);
  cache_hits = cache_misses = bytes_read = 0;
  head_rows = head_rows_computed = head_fallbacks = 0;
  waited_s = 0.0;
  neurons.assign(layers, 0);
  active_neurons.assign(layers, 0);
  expert_counts.assign(layers * static_cast<std::size_t>(hyper.experts), 0);
}

void Counters::add(const Counters& other) {
  const auto sum = [](std::vector<std::uint64_t>& to, const std::vector<std::uint64_t>& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  cache_hits += other.cache_hits;
  cache_misses += other.cache_misses;
  bytes_read += other.bytes_read;
  head_rows += other.head_rows;
  head_rows_computed += other.head_rows_computed;
  head_fallbacks += other.head_fallbacks;
  waited_s += other.waited_s;
  sum(neurons, other.neurons);
  sum(active_neurons, other.active_neurons);
  sum(expert_counts, other.expert_counts);
}

Counters Counters::share(std::size_t index, std::size_t count) const {
  const auto part = [&](std::uint64_t value) { return value * (index + 1) / count - value * index / count; };
  Counters result = *this;
  for (std::uint64_t* value : {&result.cache_hits, &result.cache_misses, &result.bytes_read,
                               &result.head_rows, &result.head_rows_computed, &result.head_fallbacks}) {
    *value = part(*value);
  }
  for (std::uint64_t& value : result.neurons) value = part(value);
  for (std::uint64_t& value : result.active_neurons) value = part(value);
  std::fill(result.expert_counts.begin(), result.expert_counts.end(), 0);
  return result;
}

Session::Session(const KvLayout& layout, const Hyperparameters& hyper) : layout_(layout) {
  counters.reset(hyper);
  std::size_t total = 0;
  for (std::size_t i = 0; i < layout_.windowed.size(); ++i) {
    offsets_.push_back(total);
    total += layout_.layer_bytes(static_cast<std::int64_t>(i));
  }
  // Zero pages that the system hands out when they are first written: an unused context costs nothing.
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

// A row of values lies for itself, unless it has 8 bits; keys lie in tiles.
std::byte* Session::at(std::int64_t layer, bool value, std::int64_t head, std::int64_t position) const {
  const std::int64_t capacity = layout_.capacity(layer);
  const std::int64_t place = position % capacity;
  const bool alone = value && layout_.type != KvType::kQ8;
  const std::int64_t index = head * capacity + (alone ? place : place / kKeyTile * kKeyTile);
  const std::size_t half = value ? layout_.layer_bytes(layer) / 2 : 0;
  return memory_.get() + offsets_[static_cast<std::size_t>(layer)] + half +
         static_cast<std::size_t>(index) * layout_.vector_bytes();
}

// In 8 bits, to a lane of a tile. What has no finite scale comes back as no number.
void Session::store_steps(std::byte* tile, std::int64_t lane, bool value, const float* from) const {
  const std::int64_t dim = layout_.head_dim;
  const std::int64_t blocks = Q8Tile::blocks(dim);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = block * kQ8Block;
    const std::int64_t count = std::min(kQ8Block, dim - begin);
    float greatest = 0.0F;
    float damage = 0.0F;  // no number, once one is infinite or none
    for (std::int64_t i = begin; i < begin + count; ++i) {
      greatest = std::max(greatest, std::fabs(from[i]));
      damage += from[i] * 0.0F;
    }
    std::uint16_t stored = float_to_half(greatest / 127.0F);
    float scale = half_to_float(stored);
    if (damage != 0.0F || std::isinf(scale)) {
      stored = 0x7E00;
      scale = 0.0F;
    }
    const float inverse = scale > 0.0F ? 1.0F / scale : 0.0F;
    std::byte* const key_block = tile + block * kKeyTile * (2 + kQ8Block);
    std::byte* const value_row = tile + kKeyTile * blocks * 2 + lane * dim + begin;
    std::memcpy(value ? tile + 2 * (lane * blocks + block) : key_block + 2 * lane, &stored, sizeof stored);
    for (std::int64_t i = 0; i < count; ++i) {
      const float steps = scale > 0.0F ? std::clamp(from[begin + i] * inverse, -127.0F, 127.0F) : 0.0F;
      const float rounded = steps + 12582912.0F;  // 1.5 * 2^23: rounds to nearest
      std::int32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      if (value) {
        value_row[i] = static_cast<std::byte>(bits & 0xFF);
      } else {
        const std::int64_t word = i / kQ8Word * kKeyTile * kQ8Word + lane * kQ8Word + i % kQ8Word;
        key_block[kKeyTile * 2 + word] = static_cast<std::byte>((bits + 128) & 0xFF);
      }
    }
  }
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
        store_steps(key_at, lane, false, key);
        store_steps(value_at, lane, true, value);
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
