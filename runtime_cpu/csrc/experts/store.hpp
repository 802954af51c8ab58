// The packed experts of a model: all in memory, loaded in the background while the engine already computes,
// or as many as a memory budget allows, over the file.
//
//   ExpertStore store(model, {.cache_bytes = 600 << 20}, 2);
//   store.request(layer, uses, rows);          // once the router has chosen
//   store.gate(layer, e); store.whole(layer, e);   // any compute thread; waits; EngineError for damaged
//   bytes store.release(layer);
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "experts/cache.hpp"
#include "experts/file_reader.hpp"
#include "model/huge_memory.hpp"
#include "model/model.hpp"

namespace smallthinker {

struct ExpertStoreOptions {
  std::size_t cache_bytes = 0;   // for experts' slots; 0: all of them stay in memory
  std::string backend = "auto";  // of FileReader
  std::string policy = kDefaultPolicy;
  ReaderOptions reader = {};  // for tests: faults; its backend is the one above
};

class ExpertStore {
 public:
  ExpertStore(std::shared_ptr<const Model> model, const ExpertStoreOptions& options, int threads);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;
  ExpertStore(ExpertStore&&) = delete;
  ExpertStore& operator=(ExpertStore&&) = delete;

  // Bytes that a cache needs beside its slots.
  static std::size_t overhead_bytes(const Model& model);

  bool offloads() const { return cache_ != nullptr; }
  std::int64_t request_limit() const;  // distinct experts of one request
  // Pins the experts until release() and starts their reads; `rows` of the batch. Nothing to do without a
  // cache.
  void request(std::int64_t layer, std::span<const ExpertUse> uses, std::int64_t rows);
  void release(std::int64_t layer);
  bool ready(std::int64_t layer, std::int64_t expert) const;      // gate() and whole() would not wait
  bool in_memory(std::int64_t layer, std::int64_t expert) const;  // or being read
  // Both wait. The gate [ExpertShape::gate_bytes()] and the whole expert [ExpertShape::bytes()]; what follows
  // a gate may still be being read.
  const std::byte* gate(std::int64_t layer, std::int64_t expert);
  const std::byte* whole(std::int64_t layer, std::int64_t expert);

  // Whether no read is queued or in flight.
  bool idle() const { return cache_ != nullptr && reader_->unfinished() == 0; }
  // Begins to read experts that may be requested next, as far as the reader has room.
  void speculate(std::int64_t layer, std::span<const std::int32_t> experts);

  // Of a store without a cache: wait until everything is in memory.
  void load_all();
  CacheCounters counters() const { return cache_ != nullptr ? cache_->counters() : CacheCounters{}; }
  const ExpertCache* cache() const { return cache_.get(); }
  const FileReader* reader() const { return reader_.get(); }

 private:
  // Of a copy in memory, or of the checksum of the file's own bytes.
  enum class State : std::uint8_t { kEmpty, kLoading, kReady };

  std::size_t key(std::int64_t layer, std::int64_t expert) const {
    return static_cast<std::size_t>(layer * model_->hyper.experts + expert);
  }
  std::byte* place(std::size_t key) const { return memory_.data() + key * shape_.bytes(); }
  void open_cache(const ExpertStoreOptions& options, std::size_t slots);
  const std::byte* copy_or_mapping(std::size_t key);
  const std::byte* loaded(std::size_t key);
  template <typename Act>
  static void once(std::atomic<State>& state, const Act& act);
  void load(std::size_t key);
  void verify(std::size_t key, const std::byte* expert) const;
  const std::byte* mapped(std::size_t key) const;
  void load_in_background();

  std::shared_ptr<const Model> model_;
  ExpertShape shape_;
  HugeMemory memory_;
  // Without a cache, per expert [layers][experts].
  std::unique_ptr<std::atomic<State>[]> states_, verified_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> loaders_;
  // With a cache.
  std::unique_ptr<FileReader> reader_;
  std::unique_ptr<ExpertCache> cache_;
  int parts_ = 0;
};

}  // namespace smallthinker
