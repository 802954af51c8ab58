#include "experts/store.hpp"

#include <algorithm>
#include <cstring>

#include "experts/checksum.hpp"

namespace smallthinker {
namespace {

constexpr int kStagingBuffers = 4;
constexpr std::size_t kForgetEvery = 32;  // experts, after which the mapping's pages are dropped
constexpr int kReadDepth = 4;

int narrow(std::int64_t value) { return static_cast<int>(value); }

}  // namespace

ExpertStore::ExpertStore(std::shared_ptr<const Model> model, const ExpertStoreOptions& options, int threads)
    : model_(std::move(model)), shape_(model_->expert_shape()) {
  const auto all = static_cast<std::size_t>(model_->hyper.layers * model_->hyper.experts);
  const std::size_t slots = std::min(options.cache_bytes / shape_.bytes(), all);
  if (options.cache_bytes > 0 && slots < all) {
    if (slots < static_cast<std::size_t>(model_->hyper.experts_per_token)) {
      throw EngineError("a cache of " + std::to_string(options.cache_bytes) + " bytes holds " +
                        std::to_string(slots) + " experts of " + std::to_string(shape_.bytes()) +
                        " bytes; one token needs " + std::to_string(model_->hyper.experts_per_token));
    }
    memory_ = HugeMemory(slots * shape_.bytes());
    open_cache(options, slots);
    return;
  }
  memory_ = HugeMemory(all * shape_.bytes());
  states_ = std::make_unique<std::atomic<State>[]>(all);
  verified_ = std::make_unique<std::atomic<State>[]>(all);
  for (int i = 0; i < std::max(1, threads / 2); ++i) loaders_.emplace_back([this] { load_in_background(); });
}

ExpertStore::~ExpertStore() {
  stopping_.store(true);
  for (std::thread& loader : loaders_) loader.join();
}

std::size_t ExpertStore::overhead_bytes(const Model& model) {
  const std::size_t largest = model.packed ? 0 : model.expert_shape().bytes() / 2;
  return kStagingBuffers * largest + static_cast<std::size_t>(model.hyper.layers * model.hyper.experts) * 512;
}

void ExpertStore::open_cache(const ExpertStoreOptions& options, std::size_t slots) {
  if (model_->path.empty()) throw EngineError("experts can be read on demand from a file only");
  ReaderOptions reading = options.reader;
  reading.backend = options.backend;
  reading.depth = kReadDepth;
  reader_ = FileReader::open(model_->path, reading);
  ExpertLayout layout;
  layout.layers = narrow(model_->hyper.layers);
  layout.experts = narrow(model_->hyper.experts);
  layout.slot_bytes = shape_.bytes();
  layout.prior = model_->expert_frequency;
  const std::size_t gate = shape_.gate_bytes();
  const std::size_t rest = shape_.bytes() - gate;
  CacheOptions cache;
  cache.policy = options.policy;
  cache.staging_buffers = kStagingBuffers;
  if (model_->packed) {
    layout.parts = {{0, gate}, {gate, rest}};
    layout.checksums = model_->checksums;
  } else {
    // Up and down of a stock file are read one by one, but both are packed into the room of the two together.
    const std::size_t half = ExpertShape::whole_pages(rest / 2);
    layout.parts = {{0, gate}, {gate, half}, {gate + half, rest - half}};
    cache.transform = [this, gate, half](ExpertKey at, int part, const std::byte* staged, std::byte* place) {
      const Layer& layer = model_->layers[static_cast<std::size_t>(at.layer)];
      const Matrix* stock[] = {&layer.gate, &layer.up, &layer.down};
      Matrix one = *stock[part];
      one.data = staged;
      one.experts = 1;
      if (part == 0) pack_gate(one, 0, shape_, place);
      if (part == 1) pack_up(one, 0, shape_, place - gate);
      if (part == 2) pack_down(one, 0, shape_, place - gate - half);
    };
  }
  parts_ = narrow(static_cast<std::int64_t>(layout.parts.size()));
  for (std::int64_t index = 0; index < model_->hyper.layers; ++index) {
    const Layer& layer = model_->layers[static_cast<std::size_t>(index)];
    for (std::int64_t e = 0; e < model_->hyper.experts; ++e) {
      if (model_->packed) {
        const std::uint64_t start = model_->offset_of(model_->packed_expert(index, e));
        layout.extents.push_back({start, gate});
        layout.extents.push_back({start + gate, rest});
      } else {
        for (const Matrix* matrix : {&layer.gate, &layer.up, &layer.down}) {
          layout.extents.push_back({model_->offset_of(matrix->row(0, e)),
                                    matrix->row_bytes * static_cast<std::size_t>(matrix->rows)});
        }
      }
    }
  }
  cache_ = std::make_unique<ExpertCache>(*reader_, std::move(layout),
                                         std::span<std::byte>(memory_.data(), slots * shape_.bytes()), cache);
  if (!model_->expert_frequency.empty()) cache_->warm(cache_->by_popularity());
}

std::int64_t ExpertStore::request_limit() const {
  return cache_ != nullptr ? cache_->slots() : model_->hyper.experts;
}

void ExpertStore::request(std::int64_t layer, std::span<const ExpertUse> uses, std::int64_t rows) {
  if (cache_ != nullptr) cache_->request(narrow(layer), uses, rows);
}

void ExpertStore::release(std::int64_t layer) {
  if (cache_ != nullptr) cache_->release(narrow(layer));
}

bool ExpertStore::ready(std::int64_t layer, std::int64_t expert) const {
  if (cache_ != nullptr) return cache_->ready(narrow(layer), narrow(expert));
  return states_[key(layer, expert)].load(std::memory_order_relaxed) == State::kReady;
}

bool ExpertStore::in_memory(std::int64_t layer, std::int64_t expert) const {
  return cache_ == nullptr || cache_->in_memory(narrow(layer), narrow(expert));
}

void ExpertStore::speculate(std::int64_t layer, std::span<const std::int32_t> experts) {
  if (cache_ != nullptr) cache_->speculate(narrow(layer), experts);
}

const std::byte* ExpertStore::gate(std::int64_t layer, std::int64_t expert) {
  if (cache_ != nullptr) return cache_->wait(narrow(layer), narrow(expert), 0);
  return copy_or_mapping(key(layer, expert));
}

const std::byte* ExpertStore::whole(std::int64_t layer, std::int64_t expert) {
  if (cache_ == nullptr) return copy_or_mapping(key(layer, expert));
  for (int part = 1; part < parts_; ++part) cache_->wait(narrow(layer), narrow(expert), part);
  return cache_->wait(narrow(layer), narrow(expert), 0);
}

// The copy, or until there is one the file's own bytes where their layout allows it: the first touch of fresh
// memory can be as slow as a disk.
const std::byte* ExpertStore::copy_or_mapping(std::size_t key) {
  if (states_[key].load(std::memory_order_acquire) == State::kReady) return place(key);
  const std::byte* const there = mapped(key);
  if (there == nullptr) return loaded(key);
  once(verified_[key], [&] { verify(key, there); });
  return there;
}

const std::byte* ExpertStore::loaded(std::size_t key) {
  once(states_[key], [&] { load(key); });
  return place(key);
}

// As std::call_once: the first thread acts and the others wait; after an exception the next one tries again.
template <typename Act>
void ExpertStore::once(std::atomic<State>& state, const Act& act) {
  while (true) {
    State now = state.load(std::memory_order_acquire);
    if (now == State::kReady) return;
    if (now == State::kLoading) {
      state.wait(State::kLoading, std::memory_order_acquire);
      continue;
    }
    if (!state.compare_exchange_strong(now, State::kLoading)) continue;
    const auto leave = [&](State as) {
      state.store(as, std::memory_order_release);
      state.notify_all();
    };
    try {
      act();
    } catch (...) {
      leave(State::kEmpty);
      throw;
    }
    leave(State::kReady);
  }
}

// The expert's bytes [ExpertShape::bytes()] in the mapped file; null if the file holds stock rows, which have
// to be packed first, or if the mapping is not aligned to pages.
const std::byte* ExpertStore::mapped(std::size_t key) const {
  if (!model_->packed) return nullptr;
  const auto experts = static_cast<std::size_t>(model_->hyper.experts);
  const std::byte* expert = model_->packed_expert(static_cast<std::int64_t>(key / experts),
                                                  static_cast<std::int64_t>(key % experts));
  return reinterpret_cast<std::uintptr_t>(expert) % kReadAlign == 0 ? expert : nullptr;
}

void ExpertStore::load(std::size_t key) {
  const auto experts = static_cast<std::size_t>(model_->hyper.experts);
  const auto index = static_cast<std::int64_t>(key / experts);
  const auto expert = static_cast<std::int64_t>(key % experts);
  std::byte* const to = place(key);
  if (model_->packed) {
    std::memcpy(to, model_->packed_expert(index, expert), shape_.bytes());
    return verify(key, to);
  }
  const Layer& layer = model_->layers[static_cast<std::size_t>(index)];
  pack_gate(layer.gate, expert, shape_, to);
  pack_up(layer.up, expert, shape_, to);
  pack_down(layer.down, expert, shape_, to);
}

void ExpertStore::verify(std::size_t key, const std::byte* expert) const {
  const std::size_t gate = shape_.gate_bytes();
  if (checksum64(expert, gate) == model_->checksums[2 * key] &&
      checksum64(expert + gate, shape_.bytes() - gate) == model_->checksums[2 * key + 1]) {
    return;
  }
  const auto experts = static_cast<std::size_t>(model_->hyper.experts);
  throw EngineError(model_->path + ": the checksum of expert " + std::to_string(key % experts) +
                    " of layer " + std::to_string(key / experts) + " is wrong; the file is damaged");
}

void ExpertStore::load_in_background() {
  const auto all = static_cast<std::size_t>(model_->hyper.layers * model_->hyper.experts);
  while (!stopping_.load(std::memory_order_relaxed)) {
    const std::size_t key = next_.fetch_add(1, std::memory_order_relaxed);
    if (key >= all) break;
    try {
      loaded(key);
    } catch (const EngineError&) {
      continue;  // the thread that needs this expert tries again and reports the error
    }
    if (key % kForgetEvery == kForgetEvery - 1) model_->forget_pages();
  }
  model_->forget_pages();
}

void ExpertStore::load_all() {
  if (cache_ != nullptr) return;
  for (std::size_t key = 0; key < static_cast<std::size_t>(model_->hyper.layers * model_->hyper.experts);
       ++key) {
    loaded(key);
  }
}

}  // namespace smallthinker
