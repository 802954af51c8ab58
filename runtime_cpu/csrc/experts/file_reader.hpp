// Asynchronous reads of one file into the caller's memory, past the page cache where the system allows.
//
//   auto reader = FileReader::open("model.gguf");
//   Read read;
//   read.set(aligned_extent(offset, bytes), memory);   // the bytes will be at memory + extent.lead
//   reader->submit(read);
//   reader->wait(read);                                // read.state() is kDone or kFailed
//
// Offsets, sizes and memory are multiples of 4096, which is what direct reads ask for; aligned_extent()
// widens any extent to that, so the memory has to be sized for the widened one. A range may reach over the
// end of the file up to the next multiple. A read ends as kDone with all its bytes or as kFailed with one
// sentence in error(), never in an exception, whatever the disk does.
//
// Backends, best first: "io_uring" (one thread that sleeps in the kernel), "threads" (direct pread), and
// "page_cache" (pread, then posix_fadvise(DONTNEED), so that the cache does not grow behind a memory budget)
// for file systems that refuse direct reads and for systems other than Linux. "auto" takes the first that
// works in a trial read; another name that does not work is an EngineError.
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
#include <thread>
#include <vector>

namespace smallthinker {

inline constexpr std::size_t kReadAlign = 4096;

struct AlignedExtent {
  std::uint64_t offset = 0;  // multiples of kReadAlign
  std::size_t bytes = 0;
  std::size_t lead = 0;  // of the unaligned bytes within it
};

constexpr AlignedExtent aligned_extent(std::uint64_t offset, std::size_t bytes) {
  const std::size_t lead = offset % kReadAlign;
  return {offset - lead, (lead + bytes + kReadAlign - 1) / kReadAlign * kReadAlign, lead};
}

// One read; it and its destination [bytes] have to stay alive and in place until it is finished.
class Read {
 public:
  enum class State : std::uint8_t { kIdle, kPending, kDone, kFailed };

  void set(const AlignedExtent& extent, std::byte* to) {
    offset = extent.offset;
    bytes = extent.bytes;
    destination = to;
  }

  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  std::byte* destination = nullptr;

  State state() const { return state_.load(std::memory_order_acquire); }
  bool pending() const { return state() == State::kPending; }
  const std::string& error() const { return error_; }  // of a failed read

 private:
  friend class FileReader;
  std::atomic<State> state_{State::kIdle};
  std::string error_;
  std::size_t needed_ = 0;  // bytes that the file has in this range
  std::size_t got_ = 0;
  int stalls_ = 0;         // attempts in a row that read no byte
  bool prefetch_ = false;  // these two under the reader's mutex
  bool started_ = false;
};

// What a test does to one attempt at reading.
struct Fault {
  int delay_us = 0;
  std::size_t most_bytes = SIZE_MAX;  // a short read
  int error = 0;                      // an errno instead of bytes
};

struct ReaderOptions {
  std::string backend = "auto";
  int depth = 4;                                 // reads in flight at once
  std::function<Fault(const Read&)> fault = {};  // for tests; called by the reading threads
  bool refuse_ring = false;                      // for tests: as on systems without
  bool refuse_direct = false;
};

class FileReader {
 public:
  // Prefetches start when no demanded read waits, and fill at most half of the depth.
  enum class Priority { kDemand, kPrefetch };

  // Throws EngineError.
  static std::unique_ptr<FileReader> open(const std::string& path, const ReaderOptions& options = {});
  // Waits for reads in flight; those that have not started fail.
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;
  FileReader(FileReader&&) = delete;
  FileReader& operator=(FileReader&&) = delete;

  // All of these may be called by any thread.
  void submit(Read& read, Priority priority = Priority::kDemand);
  void promote(Read& read);  // a prefetch that is now demanded
  // Cancels prefetches of which none has started (true), or none of them (false).
  bool cancel(std::span<Read* const> reads);
  void wait(const Read& read);

  int unfinished() const { return unfinished_.load(std::memory_order_relaxed); }  // queued or in flight
  int depth() const { return options_.depth; }
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  const std::string& backend() const { return backend_; }
  // One sentence for the log on why a better backend was not taken; empty if there is no better one.
  const std::string& reason() const { return reason_; }

 private:
  class Ring;
  struct Attempt;

  FileReader(const std::string& path, const ReaderOptions& options);
  void open_descriptor();
  std::string try_direct();
  std::string try_ring();
  void start_threads();
  std::string refusal(const Read& read) const;
  Attempt prepare(Read& read);
  std::int64_t perform(const Attempt& attempt) const;
  bool advance(Read& read, const Attempt& attempt, std::int64_t result);
  void finish(Read& read, const std::string& error);
  Read* take(bool block);
  void read_loop();
  void ring_loop();
  void close() noexcept;

  std::string path_;
  ReaderOptions options_;
  std::string backend_;
  std::string reason_;
  int descriptor_ = -1;
  bool direct_ = false;
  std::uint64_t file_bytes_ = 0;

  std::mutex mutex_;
  std::condition_variable work_;  // for the reading threads
  std::condition_variable done_;  // for wait()
  std::deque<Read*> demands_;
  std::deque<Read*> prefetches_;
  int prefetches_in_flight_ = 0;
  bool stopping_ = false;
  std::atomic<int> unfinished_{0};
  std::atomic<std::uint64_t> bytes_read_{0};
  std::unique_ptr<Ring> ring_;
  std::vector<std::thread> threads_;
};

}  // namespace smallthinker
