#include "experts/cache.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

#include "experts/checksum.hpp"
#include "model/tensor.hpp"

namespace smallthinker {
namespace {

constexpr std::int64_t kAnyTime = std::numeric_limits<std::int64_t>::max();
constexpr double kSpeculativeUtility = 1e12;  // more than any policy's
constexpr std::int64_t kOnlyEmpty = std::numeric_limits<std::int64_t>::min();

std::size_t at(int index) { return static_cast<std::size_t>(index); }

[[noreturn]] void refuse(const std::string& what) { throw EngineError("expert cache: " + what); }

void check(bool holds, const std::string& what) {
  if (!holds) refuse(what);
}

}  // namespace

void ExpertCache::FreeMemory::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t{kReadAlign});
}

ExpertCache::ExpertCache(FileReader& reader, ExpertLayout layout, std::span<std::byte> memory,
                         const CacheOptions& options)
    : reader_(reader),
      layout_(std::move(layout)),
      options_(options),
      policy_(&find_policy(options.policy)),
      parts_(layout_.parts.size()),
      memory_(memory),
      history_(layout_.layers, layout_.experts, layout_.prior) {
  const std::size_t keys = at(layout_.layers) * at(layout_.experts);
  check(keys > 0 && parts_ > 0 && layout_.extents.size() == keys * parts_, "the layout has the wrong size");
  check(layout_.checksums.empty() || layout_.checksums.size() == keys * parts_,
        "the layout has the wrong number of checksums");
  check(layout_.slot_bytes > 0 && layout_.slot_bytes % kReadAlign == 0 &&
            reinterpret_cast<std::uintptr_t>(memory.data()) % kReadAlign == 0,
        "memory and slots have to be aligned to 4096");
  std::size_t end = 0;
  for (const PartRoom& room : layout_.parts) {
    check(room.offset % kReadAlign == 0 && room.bytes % kReadAlign == 0 && room.offset >= end &&
              room.offset <= layout_.slot_bytes && room.bytes <= layout_.slot_bytes - room.offset,
          "the parts do not fit into a slot");
    end = room.offset + room.bytes;
  }
  std::size_t widest = 0;
  for (std::size_t i = 0; i < layout_.extents.size(); ++i) {
    const ExpertExtent& extent = layout_.extents[i];
    check(extent.bytes > 0 && extent.bytes <= reader.file_bytes() &&
              extent.offset <= reader.file_bytes() - extent.bytes,
          "an expert lies outside the file of " + std::to_string(reader.file_bytes()) + " bytes");
    const std::size_t wide = aligned_extent(extent.offset, extent.bytes).bytes;
    check(options_.transform || wide <= layout_.parts[i % parts_].bytes, "an expert is larger than its slot");
    widest = std::max(widest, wide);
  }
  const std::size_t count = memory.size() / layout_.slot_bytes;
  check(count > 0, "no slot of " + std::to_string(layout_.slot_bytes) + " bytes fits into " +
                       std::to_string(memory.size()) + " bytes");
  slot_count_ = static_cast<int>(std::min(count, keys));
  if (options_.transform) {
    check(options_.staging_buffers > 0, "a transform needs at least one staging buffer");
    staging_bytes_ = widest;
    staging_.reset(static_cast<std::byte*>(
        ::operator new(staging_bytes_ * at(options_.staging_buffers), std::align_val_t{kReadAlign})));
    for (int i = options_.staging_buffers - 1; i >= 0; --i) free_staging_.push_back(i);
  }
  part_storage_ = std::make_unique<Part[]>(at(slot_count_) * parts_);
  slots_ = std::make_unique<Slot[]>(at(slot_count_));
  for (int i = 0; i < slot_count_; ++i) slots_[at(i)].parts = &part_storage_[at(i) * parts_];
  slot_of_ = std::make_unique<std::atomic<std::int32_t>[]>(keys);
  for (std::size_t i = 0; i < keys; ++i) slot_of_[i].store(-1, std::memory_order_relaxed);
  requested_.assign(keys, 0);
  requested_of_.resize(at(layout_.layers));
}

ExpertCache::~ExpertCache() {
  for (std::size_t i = 0; i < at(slot_count_) * parts_; ++i) {
    Read* read = &part_storage_[i].read;
    if (read->pending() && !reader_.cancel({&read, 1})) reader_.wait(*read);
  }
}

std::size_t ExpertCache::key_of(int layer, int expert) const {
  if (layer < 0 || layer >= layout_.layers || expert < 0 || expert >= layout_.experts) {
    refuse("there is no expert " + std::to_string(expert) + " in layer " + std::to_string(layer));
  }
  return at(layer) * at(layout_.experts) + at(expert);
}

std::byte* ExpertCache::place_of(int slot, int part) {
  return memory_.data() + at(slot) * layout_.slot_bytes + layout_.parts[at(part)].offset;
}

// Whether a read or a transform may still write into the slot.
bool ExpertCache::busy(const Slot& slot) const {
  for (std::size_t i = 0; i < parts_; ++i) {
    const Stage stage = slot.parts[i].stage.load(std::memory_order_relaxed);
    if (stage == Stage::kQueued || stage == Stage::kFinishing) return true;
    if (stage == Stage::kReading && slot.parts[i].read.pending()) return true;
  }
  return false;
}

bool ExpertCache::broken(const Slot& slot) const {
  for (std::size_t i = 0; i < parts_; ++i) {
    const Part& part = slot.parts[i];
    const Stage stage = part.stage.load(std::memory_order_relaxed);
    if (stage == Stage::kFailed) return true;
    if (stage == Stage::kReading && part.read.state() == Read::State::kFailed) return true;
  }
  return false;
}

// An empty slot, or else the one of least utility among those last used before token `used_before`; -1 if
// there is none.
int ExpertCache::take_slot(std::int64_t used_before) {
  int worst = -1;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < slot_count_; ++i) {
    const Slot& slot = slots_[at(i)];
    if (slot.pinned.load(std::memory_order_relaxed)) continue;
    if (slot.key < 0) {
      if (busy(slot)) continue;  // a detached expert is still being read into it
      worst = i;
      break;
    }
    const auto key = static_cast<std::size_t>(slot.key);
    if (history_.last_token(key) >= used_before || (slot.speculative && used_before != kAnyTime)) continue;
    double utility = policy_->utility(history_, key);
    if (slot.speculative && history_.to_come(key)) utility += kSpeculativeUtility;
    if (worst >= 0 && utility >= least) continue;
    if (busy(slot)) continue;  // checked last: the parts of thousands of slots do not fit into the L2 cache
    least = utility;
    worst = i;
  }
  if (worst < 0) return -1;
  if (slots_[at(worst)].key >= 0) ++counters_.evictions;
  empty(worst);
  return worst;
}

void ExpertCache::empty(int index) {
  Slot& slot = slots_[at(index)];
  if (slot.key >= 0) slot_of_[static_cast<std::size_t>(slot.key)].store(-1, std::memory_order_relaxed);
  slot.key = -1;
  if (slot.speculative) ++counters_.speculated_wasted;
  slot.speculative = false;
  for (std::size_t i = 0; i < parts_; ++i) {
    free_staging(slot.parts[i]);
    slot.parts[i].stage.store(Stage::kEmpty, std::memory_order_relaxed);
  }
}

// Removes the expert from a slot into which reads may still be in flight.
void ExpertCache::detach(int index) {
  Slot& slot = slots_[at(index)];
  std::erase_if(unstaged_, [index](const auto& entry) { return entry.first == index; });
  for (std::size_t i = 0; i < parts_; ++i) {
    std::atomic<Stage>& stage = slot.parts[i].stage;
    if (stage.load(std::memory_order_relaxed) == Stage::kQueued) {
      stage.store(Stage::kEmpty, std::memory_order_relaxed);
    }
  }
  slot_of_[static_cast<std::size_t>(slot.key)].store(-1, std::memory_order_relaxed);
  slot.key = -1;
  if (!busy(slot)) empty(index);
}

// Empties a slot of an expert that is not requested and of which no part has begun to be read: a queue of
// speculative reads must not keep a requested expert out.
bool ExpertCache::cancel_unstarted() {
  for (int i = slot_count_ - 1; i >= 0; --i) {
    Slot& slot = slots_[at(i)];
    if (slot.key < 0 || slot.pinned.load(std::memory_order_relaxed)) continue;
    std::vector<Read*> reads;
    bool begun = false;
    for (std::size_t j = 0; j < parts_; ++j) {
      const Stage stage = slot.parts[j].stage.load(std::memory_order_relaxed);
      if (stage == Stage::kReading) {
        reads.push_back(&slot.parts[j].read);
      } else if (stage != Stage::kQueued) {
        begun = true;
      }
    }
    if (begun || !reader_.cancel(reads)) continue;
    detach(i);
    return true;
  }
  return false;
}

// Gives the expert a slot, without starting its reads. Returns the slot, or -1 while none is free.
int ExpertCache::assign(std::size_t key, std::int64_t used_before) {
  int index = take_slot(used_before);
  if (index < 0 && requested_[key] != 0 && cancel_unstarted()) index = take_slot(used_before);
  if (index < 0) return -1;
  Slot& slot = slots_[at(index)];
  slot.key = static_cast<std::int64_t>(key);
  slot.pinned.store(requested_[key] != 0, std::memory_order_relaxed);
  slot.speculative = false;
  for (std::size_t i = 0; i < parts_; ++i)
    slot.parts[i].stage.store(Stage::kQueued, std::memory_order_relaxed);
  slot_of_[key].store(index, std::memory_order_release);
  return index;
}

void ExpertCache::start(int slot, int part) {
  if (!submit(slot, part)) unstaged_.emplace_back(slot, part);
}

// Hands a queued part to the reader, unless it has to wait for a staging buffer.
bool ExpertCache::submit(int index, int number) {
  Slot& slot = slots_[at(index)];
  Part& part = slot.parts[number];
  const ExpertExtent& extent = layout_.extents[extent_of(static_cast<std::size_t>(slot.key), number)];
  std::byte* to = place_of(index, number);
  if (options_.transform) {
    if (free_staging_.empty()) return false;
    part.staging = free_staging_.back();
    free_staging_.pop_back();
    to = staging_.get() + at(part.staging) * staging_bytes_;
  }
  const AlignedExtent wide = aligned_extent(extent.offset, extent.bytes);
  part.lead = wide.lead;
  part.read.set(wide, to);
  const bool wanted = slot.pinned.load(std::memory_order_relaxed);
  reader_.submit(part.read, wanted ? FileReader::Priority::kDemand : FileReader::Priority::kPrefetch);
  part.stage.store(Stage::kReading, std::memory_order_release);
  return true;
}

void ExpertCache::free_staging(Part& part) {
  if (part.staging < 0) return;
  free_staging_.push_back(part.staging);
  part.staging = -1;
}

// Starts parts that waited for a staging buffer, the requested ones first.
void ExpertCache::pump() {
  while (!unstaged_.empty() && !free_staging_.empty()) {
    auto next = std::find_if(unstaged_.begin(), unstaged_.end(), [&](const auto& entry) {
      return slots_[at(entry.first)].pinned.load(std::memory_order_relaxed);
    });
    if (next == unstaged_.end()) next = unstaged_.begin();
    const auto [slot, part] = *next;
    unstaged_.erase(next);
    submit(slot, part);
  }
}

void ExpertCache::request(int layer, std::span<const std::int32_t> experts) {
  constexpr std::int32_t kOnlyRow[] = {0};
  std::vector<ExpertUse> uses;
  for (const std::int32_t expert : experts) uses.push_back({expert, kOnlyRow});
  request(layer, uses, 1);
}

void ExpertCache::request(int layer, std::span<const ExpertUse> uses, std::int64_t rows) {
  if (layer < 0 || layer >= layout_.layers) refuse("there is no layer " + std::to_string(layer));
  struct Wanted {
    std::size_t key;
    double weight;
    std::int64_t ago;
  };
  std::vector<Wanted> keys;
  for (const ExpertUse& use : uses) {
    const std::size_t key = key_of(layer, use.expert);
    if (std::any_of(keys.begin(), keys.end(), [&](const Wanted& other) { return other.key == key; }))
      continue;
    double weight = 0.0;
    for (const std::int32_t row : use.rows) weight += std::pow(kFrequencyDecay, rows - 1 - row);
    keys.push_back({key, weight, rows - 1 - use.rows.back()});
  }
  const Lock lock(mutex_);
  std::erase_if(keys, [&](const Wanted& one) { return requested_[one.key] != 0; });
  if (requested_count_ + static_cast<int>(keys.size()) > slot_count_) {
    refuse(std::to_string(keys.size()) + " experts are requested and " + std::to_string(requested_count_) +
           " in use, but there are only " + std::to_string(slot_count_) + " slots");
  }
  history_.begin(layer, rows);
  std::vector<std::size_t> missing;
  for (const auto& [key, weight, ago] : keys) {
    history_.use(key, weight, ago);
    requested_[key] = 1;
    requested_of_[at(layer)].push_back(key);
    ++requested_count_;
    const int index = slot_of_[key].load(std::memory_order_relaxed);
    if (index < 0) {
      missing.push_back(key);
      continue;
    }
    Slot& slot = slots_[at(index)];
    if (broken(slot)) {  // a speculative read failed; others of it may still run, so it gets another slot
      detach(index);
      missing.push_back(key);
      continue;
    }
    slot.pinned.store(true, std::memory_order_relaxed);
    if (slot.speculative) ++counters_.speculated_used;
    slot.speculative = false;
    ++(busy(slot) ? counters_.joined : counters_.hits);
    for (std::size_t i = 0; i < parts_; ++i) {
      if (slot.parts[i].read.pending()) reader_.promote(slot.parts[i].read);
    }
  }
  // All hits are pinned by now, so making room cannot cost one of them. An expert that finds no slot (all are
  // in flight) gets its own in wait().
  counters_.misses += missing.size();
  std::vector<int> assigned;
  for (const std::size_t key : missing) {
    const int slot = assign(key, kAnyTime);
    if (slot >= 0) assigned.push_back(slot);
  }
  for (int part = 0; part < static_cast<int>(parts_); ++part) {
    for (const int slot : assigned) start(slot, part);
  }
}

const std::byte* ExpertCache::wait(int layer, int expert, int part) {
  const std::size_t key = key_of(layer, expert);
  if (part < 0 || at(part) >= parts_) refuse("there is no part " + std::to_string(part));
  const auto address = [&](int slot) {
    return place_of(slot, part) + (options_.transform ? 0 : slots_[at(slot)].parts[part].lead);
  };
  // The common case takes no lock: the slot of a pinned expert stays.
  const int quick = slot_of_[key].load(std::memory_order_acquire);
  if (quick >= 0 && slots_[at(quick)].pinned.load(std::memory_order_relaxed) &&
      slots_[at(quick)].parts[part].stage.load(std::memory_order_acquire) == Stage::kReady) {
    return address(quick);
  }
  const auto begin = std::chrono::steady_clock::now();
  Lock lock(mutex_);
  if (requested_[key] == 0) {
    refuse("expert " + std::to_string(expert) + " of layer " + std::to_string(layer) + " was not requested");
  }
  const auto stop_clock = [&] {
    counters_.waited_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  while (true) {
    int index = slot_of_[key].load(std::memory_order_relaxed);
    if (index < 0) {
      index = assign(key, kAnyTime);
      for (int i = 0; index >= 0 && i < static_cast<int>(parts_); ++i) start(index, i);
      if (index < 0) progress(lock, false);
      continue;
    }
    Part& wanted = slots_[at(index)].parts[part];
    switch (wanted.stage.load(std::memory_order_relaxed)) {
      case Stage::kReady:
        stop_clock();
        return address(index);
      case Stage::kReading:
        if (wanted.read.pending()) {
          lock.unlock();
          reader_.wait(wanted.read);
          lock.lock();
        } else {
          finish(lock, index, part);
        }
        break;
      case Stage::kFinishing:
        changed_.wait(lock);
        break;
      case Stage::kQueued:
        progress(lock, false);
        break;
      case Stage::kEmpty:
      case Stage::kFailed:
        stop_clock();
        throw EngineError(wanted.error);
    }
  }
}

// Moves a part whose read has ended to kReady or kFailed; checksum and transform run without the lock.
void ExpertCache::finish(Lock& lock, int index, int number) {
  Slot& slot = slots_[at(index)];
  Part& part = slot.parts[number];
  const auto key = static_cast<std::size_t>(slot.key);
  part.error.clear();
  if (part.read.state() == Read::State::kFailed) {
    part.error = part.read.error();
  } else if (options_.transform || !layout_.checksums.empty()) {
    part.stage.store(Stage::kFinishing, std::memory_order_relaxed);
    lock.unlock();
    const std::byte* data = part.read.destination + part.lead;
    std::string error = verify(key, number, data);
    if (error.empty() && options_.transform) {
      const int experts = layout_.experts;
      const ExpertKey who{static_cast<int>(key) / experts, static_cast<int>(key) % experts};
      try {
        options_.transform(who, number, data, place_of(index, number));
      } catch (const std::exception& thrown) {
        error = std::string("an expert cannot be converted: ") + thrown.what();
      }
    }
    lock.lock();
    part.error = std::move(error);
  }
  if (!part.error.empty()) ++counters_.failures;
  part.stage.store(part.error.empty() ? Stage::kReady : Stage::kFailed, std::memory_order_release);
  free_staging(part);
  pump();
  changed_.notify_all();
}

std::string ExpertCache::verify(std::size_t key, int part, const std::byte* data) const {
  if (layout_.checksums.empty()) return {};
  const std::size_t i = extent_of(key, part);
  const ExpertExtent& extent = layout_.extents[i];
  if (checksum64(data, extent.bytes) == layout_.checksums[i]) return {};
  const auto experts = at(layout_.experts);
  return "expert " + std::to_string(key % experts) + " of layer " + std::to_string(key / experts) +
         " is damaged: the checksum of " + std::to_string(extent.bytes) + " bytes at offset " +
         std::to_string(extent.offset) + " is wrong";
}

// Does, or waits for, one step that frees a staging buffer or a slot; when draining, also one that merely
// makes a part ready. False: no read or transform is under way.
bool ExpertCache::progress(Lock& lock, bool draining) {
  pump();
  Read* pending = nullptr;
  bool finishing = false;
  for (int i = 0; i < slot_count_; ++i) {
    const Slot& slot = slots_[at(i)];
    for (int j = 0; j < static_cast<int>(parts_); ++j) {
      Part& part = slot.parts[j];
      const Stage stage = part.stage.load(std::memory_order_relaxed);
      finishing = finishing || stage == Stage::kFinishing;
      if (stage != Stage::kReading) continue;
      if (part.read.pending()) {
        // Preferably one that is not requested: its end frees a slot.
        if (pending == nullptr || !slot.pinned.load(std::memory_order_relaxed)) pending = &part.read;
      } else if (slot.key < 0) {
        free_staging(part);
        part.stage.store(Stage::kEmpty, std::memory_order_relaxed);
        pump();
      } else if (draining || part.staging >= 0) {
        finish(lock, i, j);
        return true;
      }
    }
  }
  if (pending != nullptr) {
    lock.unlock();
    reader_.wait(*pending);  // its Read lives as long as the cache, even if it is reused meanwhile
    lock.lock();
  } else if (finishing) {
    changed_.wait(lock);
  }
  return pending != nullptr || finishing;
}

void ExpertCache::release(int layer) {
  if (layer < 0 || layer >= layout_.layers) refuse("there is no layer " + std::to_string(layer));
  const Lock lock(mutex_);
  for (const std::size_t key : requested_of_[at(layer)]) {
    requested_[key] = 0;
    --requested_count_;
    const int index = slot_of_[key].load(std::memory_order_relaxed);
    if (index < 0) continue;
    Slot& slot = slots_[at(index)];
    slot.pinned.store(false, std::memory_order_relaxed);
    if (broken(slot) && !busy(slot)) empty(index);
  }
  requested_of_[at(layer)].clear();
}

int ExpertCache::speculate(int layer, std::span<const std::int32_t> experts) {
  const Lock lock(mutex_);
  int begun = 0;
  for (const std::int32_t expert : experts) {
    const std::size_t key = key_of(layer, expert);
    if (reader_.unfinished() > reader_.depth() || !unstaged_.empty()) break;
    if (slot_of_[key].load(std::memory_order_relaxed) >= 0 || requested_[key] != 0) continue;
    const int slot = assign(key, history_.first_of_last_pass());
    if (slot < 0) break;
    slots_[at(slot)].speculative = true;
    ++counters_.speculated;
    ++begun;
    for (int part = 0; part < static_cast<int>(parts_); ++part) start(slot, part);
  }
  return begun;
}

int ExpertCache::warm(std::span<const ExpertKey> experts) {
  const Lock lock(mutex_);
  int begun = 0;
  for (const ExpertKey& one : experts) {
    const std::size_t key = key_of(one.layer, one.expert);
    if (slot_of_[key].load(std::memory_order_relaxed) >= 0 || requested_[key] != 0) continue;
    const int slot = assign(key, kOnlyEmpty);
    if (slot < 0) break;
    ++begun;
    for (int part = 0; part < static_cast<int>(parts_); ++part) start(slot, part);
  }
  return begun;
}

void ExpertCache::drain() {
  Lock lock(mutex_);
  while (progress(lock, true)) {
  }
}

std::vector<ExpertKey> ExpertCache::by_popularity() const {
  std::vector<std::size_t> keys(layout_.prior.size());
  std::iota(keys.begin(), keys.end(), std::size_t{0});
  // NaN, which a damaged file may hold, counts as zero: a sort needs an order.
  const auto share = [&](std::size_t key) { return layout_.prior[key] > 0.0F ? layout_.prior[key] : 0.0F; };
  std::stable_sort(keys.begin(), keys.end(),
                   [&](std::size_t a, std::size_t b) { return share(a) > share(b); });
  std::vector<ExpertKey> order;
  for (const std::size_t key : keys) {
    const auto experts = at(layout_.experts);
    order.push_back({static_cast<int>(key / experts), static_cast<int>(key % experts)});
  }
  return order;
}

bool ExpertCache::ready(int layer, int expert) const {
  const std::int32_t slot = slot_of_[key_of(layer, expert)].load(std::memory_order_acquire);
  if (slot < 0) return false;
  const Part* parts = slots_[at(slot)].parts;
  return std::all_of(parts, parts + parts_, [](const Part& part) {
    return part.stage.load(std::memory_order_acquire) == Stage::kReady;
  });
}

bool ExpertCache::in_memory(int layer, int expert) const {
  return slot_of_[key_of(layer, expert)].load(std::memory_order_acquire) >= 0;
}

std::size_t ExpertCache::memory_bytes() const {
  const std::size_t keys = requested_.size();
  return at(slot_count_) * (layout_.slot_bytes + sizeof(Slot) + parts_ * sizeof(Part)) +
         (options_.transform ? at(options_.staging_buffers) * staging_bytes_ : 0) +
         keys * (parts_ * (sizeof(ExpertExtent) + sizeof(std::uint64_t)) + 48);
}

CacheCounters ExpertCache::counters() const {
  const Lock lock(mutex_);
  CacheCounters counters = counters_;
  counters.bytes_read = reader_.bytes_read();
  return counters;
}

}  // namespace smallthinker
