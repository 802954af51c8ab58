#include "session.hpp"

#include <algorithm>
#include <cstring>

namespace smallthinker {

KvLayout::KvLayout(const Hyperparameters& hyper, std::int64_t context_tokens, std::int64_t chunk,
                   bool half_precision)
    : context(context_tokens),
      ring(0),
      full(round_up(context_tokens, kKeyRun)),
      window(hyper.window),
      kv_heads(hyper.kv_heads),
      head_dim(hyper.head_dim),
      windowed(hyper.windowed),
      half(half_precision) {
  ring = std::min(full, round_up(window + chunk - 1, kKeyRun));
}

std::size_t KvLayout::layer_bytes(std::int64_t layer) const {
  return 2 * static_cast<std::size_t>(capacity(layer) * kv_heads * head_dim) * element_bytes();
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

std::byte* Session::at(std::int64_t layer, bool value, std::int64_t head, std::int64_t position) const {
  const std::int64_t capacity = layout_.capacity(layer);
  const std::int64_t place = position % capacity;
  const std::int64_t index =
      (head * capacity + (value ? place : place / kKeyTile * kKeyTile)) * layout_.head_dim;
  const std::size_t half = value ? layout_.layer_bytes(layer) / 2 : 0;
  return memory_.get() + offsets_[static_cast<std::size_t>(layer)] + half +
         static_cast<std::size_t>(index) * layout_.element_bytes();
}

void Session::store_key(std::byte* tile, std::int64_t lane, const float* key) const {
  for (std::int64_t i = 0; i < layout_.head_dim; ++i) {
    const std::int64_t index = i * kKeyTile + lane;
    if (layout_.half) {
      reinterpret_cast<std::uint16_t*>(tile)[index] = float_to_half(key[i]);
    } else {
      reinterpret_cast<float*>(tile)[index] = key[i];
    }
  }
}

void Session::store(std::int64_t layer, std::int64_t position, const float* keys, const float* values,
                    const Kernels& kernels) {
  for (std::int64_t head = 0; head < layout_.kv_heads; ++head) {
    store_key(at(layer, false, head, position), position % kKeyTile, keys + head * layout_.head_dim);
    const float* from = values + head * layout_.head_dim;
    std::byte* to = at(layer, true, head, position);
    if (layout_.half) {
      kernels.to_half(from, layout_.head_dim, reinterpret_cast<std::uint16_t*>(to));
    } else {
      std::memcpy(to, from, static_cast<std::size_t>(layout_.head_dim) * sizeof(float));
    }
  }
}

std::int64_t Session::contiguous(std::int64_t layer, std::int64_t begin, std::int64_t end) const {
  const std::int64_t capacity = layout_.capacity(layer);
  return std::min(end, (begin / capacity + 1) * capacity);
}

KvRows Session::keys(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const {
  return {at(layer, false, head, begin), layout_.half, (end + kKeyTile - 1) / kKeyTile - begin / kKeyTile};
}

KvRows Session::values(std::int64_t layer, std::int64_t head, std::int64_t begin, std::int64_t end) const {
  return {at(layer, true, head, begin), layout_.half, end - begin};
}

}  // namespace smallthinker
