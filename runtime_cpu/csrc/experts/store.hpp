// The packed experts of a model, where the forward pass finds them: all in memory, filled in the background
// while the engine already computes, or as many as a budget allows, over the file.
//
//   ExpertStore store(model, {.cache_bytes = 600 << 20}, 2);
//   store.request(layer, experts);             // once the router has spoken
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
  std::int64_t most_of_one_request() const;  // distinct experts of one request
  void request(std::int64_t layer, std::span<const ExpertUse> uses, std::int64_t rows);
  void release(std::int64_t layer);
  bool ready(std::int64_t layer, std::int64_t expert) const;
  bool in_memory(std::int64_t layer, std::int64_t expert) const;  // or on its way
  const std::byte* gate(std::int64_t layer, std::int64_t expert);
  const std::byte* whole(std::int64_t layer, std::int64_t expert);

  // Whether the disk has nothing to do; reads of what may be wanted next, as far as the reader has room.
  bool idle() const { return cache_ != nullptr && reader_->unfinished() == 0; }
  void speculate(std::int64_t layer, std::span<const std::int32_t> experts);

  // Of a store without a cache: wait until everything is in memory.
  void load_all();
  CacheCounters counters() const { return cache_ != nullptr ? cache_->counters() : CacheCounters{}; }
  const ExpertCache* cache() const { return cache_.get(); }
  const FileReader* reader() const { return reader_.get(); }

 private:
  enum class State : std::uint8_t { kEmpty, kLoading, kReady };  // of a copy; of a check in the file

  std::size_t key(std::int64_t layer, std::int64_t expert) const {
    return static_cast<std::size_t>(layer * model_->hyper.experts + expert);
  }
  std::byte* place(std::size_t key) const { return memory_.data() + key * shape_.bytes(); }
  void open_cache(const ExpertStoreOptions& options, std::size_t slots);
  const std::byte* at_once(std::size_t key);
  const std::byte* loaded(std::size_t key);
  template <typename Act>
  static void once(std::atomic<State>& state, const Act& act);
  void load(std::size_t key);
  void verify(std::size_t key, const std::byte* expert) const;
  const std::byte* in_file(std::size_t key) const;
  void load_in_background();

  std::shared_ptr<const Model> model_;
  ExpertShape shape_;
  HugeMemory memory_;
  // Without a cache.
  std::unique_ptr<std::atomic<State>[]> states_, verified_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> loaders_;
  // With one.
  std::unique_ptr<FileReader> reader_;
  std::unique_ptr<ExpertCache> cache_;
  int parts_ = 0;
};

}  // namespace smallthinker
