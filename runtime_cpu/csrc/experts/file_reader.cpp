#include "experts/file_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/eventfd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <new>
#include <system_error>

#include "experts/io_ring.hpp"
#include "model/tensor.hpp"
#if defined(SMALLTHINKER_X86)
#include <immintrin.h>
#endif

namespace smallthinker {
namespace {

constexpr int kStalls = 64;  // attempts in a row without a byte before a read fails
constexpr std::size_t kLongest = std::size_t{1} << 30U;  // of one attempt; the kernel takes less than 2 GiB
constexpr int kSpins = 200;                              // some 5 microseconds
constexpr std::uint64_t kSignal = ~std::uint64_t{0};

std::string message(int error) { return std::generic_category().message(error); }

struct Free {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kReadAlign}); }
};
using Page = std::unique_ptr<std::byte, Free>;
Page make_page() {
  return Page(static_cast<std::byte*>(::operator new(kReadAlign, std::align_val_t{kReadAlign})));
}

}  // namespace

// One system call, and the fault that a test injects into it.
struct FileReader::Attempt {
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  std::byte* destination = nullptr;
  std::size_t most = SIZE_MAX;  // bytes of the result that count
  int error = 0;                // instead of the call
};

class FileReader::Ring {
 public:
  explicit Ring(unsigned depth) : ring(depth + 1), flights(depth) {
#if defined(__linux__)
    event = ::eventfd(0, EFD_CLOEXEC);
#endif
    if (event < 0) throw EngineError("no eventfd for io_uring: " + message(errno));
  }
  ~Ring() { ::close(event); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  Ring(Ring&&) = delete;
  Ring& operator=(Ring&&) = delete;

  void signal() const {
    const std::uint64_t one = 1;
    while (::write(event, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  struct Flight {
    Read* read = nullptr;
    Attempt attempt;
  };

  int event = -1;
  std::uint64_t counter = 0;  // where the kernel stores the event's value
  IoRing ring;
  std::vector<Flight> flights;
};

std::unique_ptr<FileReader> FileReader::open(const std::string& path, const ReaderOptions& options) {
  std::unique_ptr<FileReader> reader(new FileReader(path, options));
  reader->start_threads();
  return reader;
}

FileReader::FileReader(const std::string& path, const ReaderOptions& options)
    : path_(path), options_(options) {
  const std::string& wanted = options_.backend;
  const bool automatic = wanted == "auto";
  if (!automatic && wanted != "io_uring" && wanted != "threads" && wanted != "page_cache") {
    throw EngineError("the reader's backend is " + wanted +
                      "; allowed are auto, io_uring, threads and page_cache");
  }
  if (options_.depth < 1 || options_.depth > 256) throw EngineError("the reader's depth is not in 1 to 256");
  open_descriptor();
  try {
    backend_ = "page_cache";
    if (wanted != "page_cache") {
      reason_ = try_direct();
      direct_ = reason_.empty();
      if (direct_) backend_ = "threads";
    }
    if (direct_ && wanted != "threads") {
      reason_ = try_ring();
      if (reason_.empty()) backend_ = "io_uring";
    }
    if (!automatic && backend_ != wanted) {
      throw EngineError("the reader's backend " + wanted + " does not work for " + path_ + ": " + reason_);
    }
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

void FileReader::open_descriptor() {
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw EngineError("cannot open " + path_ + ": " + message(errno));
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0) {
    ::close(descriptor_);
    throw EngineError(path_ + " is empty or no regular file");
  }
  file_bytes_ = static_cast<std::uint64_t>(status.st_size);
#if defined(POSIX_FADV_RANDOM)
  ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM);  // no readahead into a page cache that is not used
#endif
}

// Replaces the descriptor by one with O_DIRECT that has read a page. Returns the reason if that fails.
std::string FileReader::try_direct() {
#if defined(__linux__)
  if (options_.refuse_direct) return "the file system refuses direct reads (a test says so)";
  const int direct = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (direct < 0) return "the file system refuses direct reads (" + message(errno) + ")";
  const Page page = make_page();
  ssize_t got = 0;
  do {
    got = ::pread(direct, page.get(), kReadAlign, 0);
  } while (got < 0 && errno == EINTR);
  if (got <= 0) {
    const std::string why = got < 0 ? message(errno) : "nothing read";
    ::close(direct);
    return "the file system refuses direct reads (" + why + ")";
  }
  ::close(descriptor_);
  descriptor_ = direct;
  return {};
#else
  return "direct reads are implemented for Linux only";
#endif
}

// Returns the reason if io_uring does not work. Containers often forbid it, some only at the first read.
std::string FileReader::try_ring() {
  if (options_.refuse_ring) return "io_uring is not available (a test says so)";
  try {
    auto ring = std::make_unique<Ring>(static_cast<unsigned>(options_.depth));
    const Page page = make_page();
    std::uint64_t tag = 0;
    std::int32_t result = 0;
    ring->ring.prepare_read(descriptor_, page.get(), kReadAlign, 0, 1);
    const int error = ring->ring.enter(1);
    if (error != 0) return "io_uring does not start reads: " + message(error);
    if (!ring->ring.reap(&tag, &result) || result <= 0) {
      return "io_uring's trial read failed: " + message(result < 0 ? -result : EIO);
    }
    ring_ = std::move(ring);
  } catch (const EngineError& error) {
    return error.what();
  }
  return {};
}

void FileReader::start_threads() {
  const int count = ring_ != nullptr ? 1 : options_.depth;
  for (int i = 0; i < count; ++i) {
    threads_.emplace_back([this] { ring_ != nullptr ? ring_loop() : read_loop(); });
  }
}

FileReader::~FileReader() {
  close();
  for (Read* read : demands_) finish(*read, "the reader of " + path_ + " was closed before it began to read");
  for (Read* read : prefetches_)
    finish(*read, "the reader of " + path_ + " was closed before it began to read");
  ring_.reset();
  ::close(descriptor_);
}

void FileReader::close() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  if (ring_ != nullptr) ring_->signal();
  for (std::thread& thread : threads_) thread.join();
}

// Why a read cannot be tried at all; empty if it can.
std::string FileReader::refusal(const Read& read) const {
  const std::uint64_t reach = (file_bytes_ + kReadAlign - 1) / kReadAlign * kReadAlign;
  std::string why;
  if (read.bytes == 0 || read.offset % kReadAlign != 0 || read.bytes % kReadAlign != 0 ||
      reinterpret_cast<std::uintptr_t>(read.destination) % kReadAlign != 0) {
    why = "offset, size and memory have to be multiples of 4096";
  } else if (read.offset > reach || read.bytes > reach - read.offset) {
    why = "the file has " + std::to_string(file_bytes_) + " bytes";
  } else {
    return {};
  }
  return "cannot read " + std::to_string(read.bytes) + " bytes at offset " + std::to_string(read.offset) +
         " of " + path_ + ": " + why;
}

void FileReader::submit(Read& read, Priority priority) {
  read.error_ = refusal(read);
  if (!read.error_.empty()) {
    read.state_.store(Read::State::kFailed, std::memory_order_release);
    return;
  }
  read.needed_ = static_cast<std::size_t>(std::min<std::uint64_t>(read.bytes, file_bytes_ - read.offset));
  read.got_ = 0;
  read.stalls_ = 0;
  read.started_ = false;
  read.prefetch_ = priority == Priority::kPrefetch;
  {
    const std::lock_guard lock(mutex_);
    read.state_.store(Read::State::kPending, std::memory_order_relaxed);
    unfinished_.fetch_add(1, std::memory_order_relaxed);
    (read.prefetch_ ? prefetches_ : demands_).push_back(&read);
  }
  work_.notify_one();
  if (ring_ != nullptr) ring_->signal();
}

void FileReader::promote(Read& read) {
  const std::lock_guard lock(mutex_);
  if (!read.prefetch_ || !read.pending()) return;
  read.prefetch_ = false;
  if (read.started_) {
    --prefetches_in_flight_;  // leaves room for another prefetch, which the next submit or finish starts
    return;
  }
  prefetches_.erase(std::find(prefetches_.begin(), prefetches_.end(), &read));
  demands_.push_back(&read);
  work_.notify_one();
  if (ring_ != nullptr) ring_->signal();  // the limit on prefetches may have kept it waiting
}

bool FileReader::cancel(std::span<Read* const> reads) {
  const std::lock_guard lock(mutex_);
  for (Read* read : reads) {
    if (std::find(prefetches_.begin(), prefetches_.end(), read) == prefetches_.end()) return false;
  }
  for (Read* read : reads) {
    prefetches_.erase(std::find(prefetches_.begin(), prefetches_.end(), read));
    read->state_.store(Read::State::kIdle, std::memory_order_release);
    unfinished_.fetch_sub(1, std::memory_order_relaxed);
  }
  done_.notify_all();
  return true;
}

void FileReader::wait(const Read& read) {
  for (int i = 0; i < kSpins; ++i) {
    if (!read.pending()) return;
#if defined(SMALLTHINKER_X86)
    _mm_pause();
#endif
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return !read.pending(); });
}

void FileReader::finish(Read& read, const std::string& error) {
  const std::lock_guard lock(mutex_);
  read.error_ = error;
  if (read.prefetch_ && read.started_) {
    --prefetches_in_flight_;
    work_.notify_one();
  }
  unfinished_.fetch_sub(1, std::memory_order_relaxed);
  // The waiter may free the read as soon as it sees the state: nothing of it may be touched after this.
  read.state_.store(error.empty() ? Read::State::kDone : Read::State::kFailed, std::memory_order_release);
  done_.notify_all();
}

// The next read to start; null when none may start now (or, when blocking, when the reader closes).
Read* FileReader::take(bool block) {
  std::unique_lock lock(mutex_);
  const int most_prefetches = std::max(1, options_.depth / 2);
  const auto ready = [&] {
    return stopping_ || !demands_.empty() ||
           (!prefetches_.empty() && prefetches_in_flight_ < most_prefetches);
  };
  if (block) work_.wait(lock, ready);
  if (stopping_ || !ready()) return nullptr;
  std::deque<Read*>& queue = demands_.empty() ? prefetches_ : demands_;
  Read* read = queue.front();
  queue.pop_front();
  read->started_ = true;
  if (read->prefetch_) ++prefetches_in_flight_;
  return read;
}

FileReader::Attempt FileReader::prepare(Read& read) {
  Attempt attempt;
  // After a short direct read the last, partly filled page is read again: offsets stay aligned.
  const std::size_t begin = direct_ ? read.got_ / kReadAlign * kReadAlign : read.got_;
  attempt.offset = read.offset + begin;
  attempt.bytes = std::min(read.bytes - begin, kLongest);
  attempt.destination = read.destination + begin;
  if (options_.fault) {
    const Fault fault = options_.fault(read);
    if (fault.delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(fault.delay_us));
    attempt.error = fault.error;
    attempt.most = fault.most_bytes;
    // The bytes after a short read are not read either, so that a test of resuming would miss them.
    const std::size_t pages =
        std::max<std::size_t>(1, (std::min(fault.most_bytes, attempt.bytes) + kReadAlign - 1) / kReadAlign);
    attempt.bytes = std::min(attempt.bytes, pages * kReadAlign);
  }
  return attempt;
}

std::int64_t FileReader::perform(const Attempt& attempt) const {
  if (attempt.error != 0) return -attempt.error;
  const ssize_t got =
      ::pread(descriptor_, attempt.destination, attempt.bytes, static_cast<off_t>(attempt.offset));
  return got < 0 ? -errno : got;
}

// Accounts for the result of an attempt: bytes, or minus errno. True: the read is finished, and its owner may
// already have freed it.
bool FileReader::advance(Read& read, const Attempt& attempt, std::int64_t result) {
  const std::uint64_t file_offset = read.offset + read.got_;
  const std::size_t before = read.got_;
  std::string error;
  if (result >= 0) {
    const std::size_t counted = std::min(static_cast<std::size_t>(result), attempt.most);
    read.got_ = static_cast<std::size_t>(attempt.offset - read.offset) + counted;
    read.got_ = std::min(std::max(read.got_, before), read.needed_);
    bytes_read_.fetch_add(static_cast<std::uint64_t>(result), std::memory_order_relaxed);
    if (read.got_ == before && static_cast<std::size_t>(result) <= attempt.most) {
      error =
          "the file ends there, although it had " + std::to_string(file_bytes_) + " bytes when it was opened";
    }
  } else if (result != -EINTR && result != -EAGAIN) {
    error = message(static_cast<int>(-result));
  }
  const bool complete = read.got_ == read.needed_;
  if (!complete && error.empty()) {
    read.stalls_ = read.got_ > before ? 0 : read.stalls_ + 1;
    if (read.stalls_ < kStalls) {
      if (result == -EAGAIN) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return false;
    }
    error = "no byte came in " + std::to_string(kStalls) + " attempts";
  }
#if defined(POSIX_FADV_DONTNEED)
  if (!direct_) {
    ::posix_fadvise(descriptor_, static_cast<off_t>(read.offset), static_cast<off_t>(read.bytes),
                    POSIX_FADV_DONTNEED);
  }
#endif
  finish(read, complete ? ""
                        : "reading " + std::to_string(read.bytes) + " bytes at offset " +
                              std::to_string(read.offset) + " of " + path_ + " failed at offset " +
                              std::to_string(file_offset) + ": " + error);
  return true;
}

void FileReader::read_loop() {
  while (Read* read = take(true)) {
    while (true) {
      const Attempt attempt = prepare(*read);
      if (advance(*read, attempt, perform(attempt))) break;
    }
  }
}

void FileReader::ring_loop() {
  IoRing& ring = ring_->ring;
  std::vector<Ring::Flight>& flights = ring_->flights;
  std::size_t in_flight = 0;
  bool armed = false;  // a read of the event waits in the ring for submit() or close()
  int broken = 0;

  // Puts the next attempt of a read into the ring; attempts that a test fails end here.
  const auto launch = [&](std::size_t place) {
    Ring::Flight& flight = flights[place];
    while (true) {
      flight.attempt = prepare(*flight.read);
      const Attempt& attempt = flight.attempt;
      if (attempt.error == 0 &&
          ring.prepare_read(descriptor_, attempt.destination, attempt.bytes, attempt.offset, place)) {
        return;
      }
      // A full ring cannot be, since it has an entry for each flight; reading here would be right anyway.
      if (advance(*flight.read, attempt, perform(attempt))) break;
    }
    flight.read = nullptr;
    --in_flight;
  };

  while (broken == 0) {
    bool stopping = false;
    {
      const std::lock_guard lock(mutex_);
      stopping = stopping_;
    }
    if (stopping && in_flight == 0 && !armed) return;
    if (!armed && !stopping) {
      armed = ring.prepare_read(ring_->event, &ring_->counter, sizeof ring_->counter, 0, kSignal);
    }
    for (std::size_t place = 0; place < flights.size(); ++place) {
      while (flights[place].read == nullptr) {
        flights[place].read = take(false);
        if (flights[place].read == nullptr) break;
        ++in_flight;
        launch(place);
      }
    }
    broken = ring.enter(1);
    std::uint64_t tag = 0;
    std::int32_t result = 0;
    while (ring.reap(&tag, &result)) {
      if (tag == kSignal) {
        armed = false;
        continue;
      }
      Ring::Flight& flight = flights[tag];
      if (advance(*flight.read, flight.attempt, result)) {
        flight.read = nullptr;
        --in_flight;
      } else {
        launch(tag);
      }
    }
  }

  // The ring refuses to work: what it has not begun, and all that follows, is read by this thread alone; what
  // it has begun may still write into the caller's memory and has to be awaited.
  std::uint64_t tag = 0;
  std::int32_t result = 0;
  const auto read_here = [&](std::size_t place) {
    Ring::Flight& flight = flights[place];
    do {
      flight.attempt = prepare(*flight.read);
    } while (!advance(*flight.read, flight.attempt, perform(flight.attempt)));
    flight.read = nullptr;
    --in_flight;
  };
  while (ring.take_back(&tag)) {
    if (tag != kSignal) read_here(tag);
  }
  while (in_flight > 0) {
    while (ring.reap(&tag, &result)) {
      if (tag == kSignal) continue;
      if (advance(*flights[tag].read, flights[tag].attempt, result)) {
        flights[tag].read = nullptr;
        --in_flight;
      } else {
        read_here(tag);
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  read_loop();
}

}  // namespace smallthinker
