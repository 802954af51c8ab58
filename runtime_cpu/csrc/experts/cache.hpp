// Experts in a fixed amount of memory, read from the file on request. It only moves bytes: what is computed
// never depends on its size, its policy or the order in which reads end.
//
//   ExpertCache cache(reader, layout, memory);
//   cache.request(layer, experts);      // once the router has chosen; starts reads, never blocks
//   cache.wait(layer, expert, part);    // by any compute thread: the address, once the part is in memory
//   cache.release(layer);               // after all waits of the layer have returned
//
// An expert occupies one slot and has one or more parts, which are read in order (gate first, so that work
// can begin): of one request first all gates, then all second parts. From request to release its experts are
// pinned: their slots are neither evicted nor reused, and neither is a slot with a read in flight. A part
// that could not be read, or whose checksum is wrong, makes every wait() for it throw until the layer is
// released; the next request reads it again.
//
// request(), release(), speculate() and warm() of one layer belong to one thread at a time; everything may
// run at once for different layers. All threads must have left before the cache is destroyed; the reader has
// to outlive it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "experts/file_reader.hpp"
#include "experts/policy.hpp"

namespace smallthinker {

struct ExpertKey {
  int layer = 0;
  int expert = 0;
};

// An expert that a batch asks for, and the rows of the batch (one at least) that chose it, ascending.
struct ExpertUse {
  std::int32_t expert = 0;
  std::span<const std::int32_t> rows;
};

// The bytes of one part of one expert in the file.
struct ExpertExtent {
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
};

// The room of a part in every slot, in multiples of 4096. Without a transform the surrounding aligned range
// is read into it, so it has to hold aligned_extent(offset, bytes) of every expert.
struct PartRoom {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

struct ExpertLayout {
  int layers = 0;
  int experts = 0;  // per layer
  std::size_t slot_bytes = 0;
  std::vector<PartRoom> parts;
  std::vector<ExpertExtent> extents;     // [layers][experts][parts]
  std::vector<std::uint64_t> checksums;  // checksum64 of each extent, in the same order; none: not verified
  std::vector<float> prior;              // [layers][experts], share of tokens that use it; none: unknown
};

// Converts a part from its form in the file, `staged`, to its form in the slot, `place`. Runs once per read,
// in a compute thread that waits for it; an exception becomes the error of the waits.
using PartTransform = std::function<void(ExpertKey key, int part, const std::byte* staged, std::byte* place)>;

struct CacheOptions {
  std::string policy = kDefaultPolicy;
  PartTransform transform = {};
  int staging_buffers = 4;  // for reads that wait for their transform
};

struct CacheCounters {
  std::uint64_t hits = 0;    // requests that found the expert in memory
  std::uint64_t joined = 0;  // requests that found it being read
  std::uint64_t misses = 0;
  std::uint64_t evictions = 0;
  std::uint64_t speculated = 0;  // experts that speculate() began to read
  std::uint64_t speculated_used = 0;
  std::uint64_t speculated_wasted = 0;  // evicted or cancelled unused
  std::uint64_t failures = 0;           // parts
  std::uint64_t bytes_read = 0;         // by the reader, for all its users
  double waited_s = 0.0;  // in wait() for what was not ready, summed over threads; includes transforms
};

class ExpertCache {
 public:
  // As many slots as fit into `memory`, which is aligned to 4096 and stays the caller's. EngineError when not
  // even one does or when the layout contradicts itself or the file.
  ExpertCache(FileReader& reader, ExpertLayout layout, std::span<std::byte> memory,
              const CacheOptions& options = {});
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;
  ExpertCache(ExpertCache&&) = delete;
  ExpertCache& operator=(ExpertCache&&) = delete;

  // Adds to what is pinned of the layer. EngineError, before anything has changed, when more experts would be
  // pinned than there are slots: a batch that needs more requests and releases them in turns.
  void request(int layer, std::span<const ExpertUse> uses, std::int64_t rows);
  void request(int layer, std::span<const std::int32_t> experts);  // of a single token
  // The part's bytes, until release().
  const std::byte* wait(int layer, int expert, int part);
  void release(int layer);

  // Begins to read experts that may be requested next, as long as the reader's queue is short and there are
  // slots that are empty or were last used before the previous token. Until its layer has been computed, such
  // an expert is evicted only when no other can be. Returns how many experts' reads began.
  int speculate(int layer, std::span<const std::int32_t> experts);
  // Begins to read experts, in this order, into empty slots. Requested ones are read first.
  int warm(std::span<const ExpertKey> experts);
  // Waits for all reads, also of experts that are not requested, and runs their transforms.
  void drain();
  std::vector<ExpertKey> by_popularity() const;  // for warm(); by the layout's prior, most used first

  bool in_memory(int layer, int expert) const;  // or being read
  bool ready(int layer, int expert) const;      // every part: wait() would not block
  int slots() const { return slot_count_; }
  std::size_t memory_bytes() const;  // slots, staging buffers and bookkeeping
  CacheCounters counters() const;
  const char* policy() const { return policy_->name; }

 private:
  enum class Stage : std::uint8_t { kEmpty, kQueued, kReading, kFinishing, kReady, kFailed };
  struct Part {
    std::atomic<Stage> stage{Stage::kEmpty};
    int staging = -1;
    std::size_t lead = 0;
    Read read;
    std::string error;
  };
  struct Slot {
    std::int64_t key = -1;
    std::atomic<bool> pinned{false};
    bool speculative = false;  // read by speculate() and not requested so far
    Part* parts = nullptr;
  };
  struct FreeMemory {
    void operator()(std::byte* memory) const;
  };
  using Lock = std::unique_lock<std::mutex>;

  std::size_t key_of(int layer, int expert) const;
  std::size_t extent_of(std::size_t key, int part) const {
    return key * parts_ + static_cast<std::size_t>(part);
  }
  std::byte* place_of(int slot, int part);
  bool busy(const Slot& slot) const;
  bool broken(const Slot& slot) const;
  int take_slot(std::int64_t used_before);
  bool cancel_unstarted();
  void empty(int slot);
  void detach(int slot);
  int assign(std::size_t key, std::int64_t used_before);
  void start(int slot, int part);
  bool submit(int slot, int part);
  void pump();
  void free_staging(Part& part);
  void finish(Lock& lock, int slot, int part);
  bool progress(Lock& lock, bool draining);
  std::string verify(std::size_t key, int part, const std::byte* data) const;

  FileReader& reader_;
  const ExpertLayout layout_;
  const CacheOptions options_;
  const CachePolicy* policy_;
  std::size_t parts_;
  std::span<std::byte> memory_;
  int slot_count_ = 0;
  std::size_t staging_bytes_ = 0;  // of one buffer
  std::unique_ptr<std::byte, FreeMemory> staging_;
  std::vector<int> free_staging_;

  mutable std::mutex mutex_;  // of everything below that is not atomic
  std::condition_variable changed_;
  UseHistory history_;
  std::unique_ptr<Part[]> part_storage_;
  std::unique_ptr<Slot[]> slots_;
  std::unique_ptr<std::atomic<std::int32_t>[]> slot_of_;  // per key; -1: in no slot
  std::vector<char> requested_;                           // per key: requested and not released
  std::vector<std::vector<std::size_t>> requested_of_;    // keys per layer
  int requested_count_ = 0;
  std::deque<std::pair<int, int>> unstaged_;  // slot and part that wait for a staging buffer
  CacheCounters counters_;
};

}  // namespace smallthinker
