#include "experts/io_ring.hpp"

#include <cerrno>
#include <system_error>

#include "model/tensor.hpp"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#endif

namespace smallthinker {

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
namespace {

constexpr int kShortages = 1000;  // of 1 ms each

// The kernel is the other thread here: acquire and release on the indices of the shared rings.
unsigned load_index(const unsigned* index) { return __atomic_load_n(index, __ATOMIC_ACQUIRE); }
void store_index(unsigned* index, unsigned value) { __atomic_store_n(index, value, __ATOMIC_RELEASE); }

void* map(int ring, std::size_t bytes, std::uint64_t what) {
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                         static_cast<off_t>(what));
  return address == MAP_FAILED ? nullptr : address;
}

unsigned* index_at(void* ring, std::uint32_t offset) {
  return reinterpret_cast<unsigned*>(static_cast<std::byte*>(ring) + offset);
}

}  // namespace

IoRing::IoRing(unsigned entries) {
  io_uring_params parameters{};
  ring_ = static_cast<int>(::syscall(SYS_io_uring_setup, entries, &parameters));
  if (ring_ < 0) {
    throw EngineError("io_uring cannot be set up: " + std::generic_category().message(errno));
  }
  const io_sqring_offsets& sq = parameters.sq_off;
  const io_cqring_offsets& cq = parameters.cq_off;
  submissions_bytes_ = sq.array + parameters.sq_entries * sizeof(unsigned);
  completions_bytes_ = cq.cqes + parameters.cq_entries * sizeof(io_uring_cqe);
  entries_bytes_ = parameters.sq_entries * sizeof(io_uring_sqe);
  submissions_ = map(ring_, submissions_bytes_, IORING_OFF_SQ_RING);
  completions_ = map(ring_, completions_bytes_, IORING_OFF_CQ_RING);
  entries_ = map(ring_, entries_bytes_, IORING_OFF_SQES);
  if (submissions_ == nullptr || completions_ == nullptr || entries_ == nullptr) {
    const std::string reason = std::generic_category().message(errno);
    unmap();
    throw EngineError("io_uring's memory cannot be mapped: " + reason);
  }
  submission_head_ = index_at(submissions_, sq.head);
  submission_tail_ = index_at(submissions_, sq.tail);
  submission_array_ = index_at(submissions_, sq.array);
  submission_mask_ = *index_at(submissions_, sq.ring_mask);
  completion_head_ = index_at(completions_, cq.head);
  completion_tail_ = index_at(completions_, cq.tail);
  completion_mask_ = *index_at(completions_, cq.ring_mask);
  completion_entries_ = static_cast<std::byte*>(completions_) + cq.cqes;
}

IoRing::~IoRing() { unmap(); }

void IoRing::unmap() {
  if (submissions_ != nullptr) ::munmap(submissions_, submissions_bytes_);
  if (completions_ != nullptr) ::munmap(completions_, completions_bytes_);
  if (entries_ != nullptr) ::munmap(entries_, entries_bytes_);
  if (ring_ >= 0) ::close(ring_);
}

bool IoRing::prepare_read(int descriptor, void* memory, std::size_t bytes, std::uint64_t offset,
                          std::uint64_t tag) {
  const unsigned tail = *submission_tail_;  // only this thread writes it
  if (tail - load_index(submission_head_) > submission_mask_) return false;
  const unsigned place = tail & submission_mask_;
  io_uring_sqe entry{};
  entry.opcode = IORING_OP_READ;
  entry.fd = descriptor;
  entry.addr = reinterpret_cast<std::uintptr_t>(memory);
  entry.len = static_cast<std::uint32_t>(bytes);
  entry.off = offset;
  entry.user_data = tag;
  static_cast<io_uring_sqe*>(entries_)[place] = entry;
  submission_array_[place] = place;
  store_index(submission_tail_, tail + 1);
  ++unsubmitted_;
  return true;
}

int IoRing::enter(unsigned completions) {
  int shortages = 0;
  while (true) {
    const unsigned flags = completions > 0 ? static_cast<unsigned>(IORING_ENTER_GETEVENTS) : 0U;
    const long taken =
        ::syscall(SYS_io_uring_enter, ring_, unsubmitted_, completions, flags, nullptr, std::size_t{0});
    if (taken >= 0) unsubmitted_ -= static_cast<unsigned>(taken);
    if (taken >= 0 && unsubmitted_ == 0) return 0;
    if (taken > 0 || (taken < 0 && errno == EINTR)) continue;
    // The kernel is short of memory or of space for completions; the latter ends with the caller's reaping.
    const int error = taken == 0 ? EAGAIN : errno;
    if ((error != EAGAIN && error != EBUSY) || ++shortages > kShortages) return error;
    if (load_index(completion_tail_) != *completion_head_) return 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

bool IoRing::reap(std::uint64_t* tag, std::int32_t* result) {
  const unsigned head = *completion_head_;
  if (head == load_index(completion_tail_)) return false;
  const io_uring_cqe& entry = reinterpret_cast<io_uring_cqe*>(completion_entries_)[head & completion_mask_];
  *tag = entry.user_data;
  *result = entry.res;
  store_index(completion_head_, head + 1);
  return true;
}

bool IoRing::take_back(std::uint64_t* tag) {
  const unsigned tail = *submission_tail_;
  if (tail == load_index(submission_head_)) return false;
  *tag = static_cast<io_uring_sqe*>(entries_)[(tail - 1) & submission_mask_].user_data;
  store_index(submission_tail_, tail - 1);
  --unsubmitted_;
  return true;
}

#else

IoRing::IoRing(unsigned) { throw EngineError("io_uring is a part of Linux"); }
IoRing::~IoRing() = default;
void IoRing::unmap() {}
bool IoRing::prepare_read(int, void*, std::size_t, std::uint64_t, std::uint64_t) { return false; }
int IoRing::enter(unsigned) { return ENOSYS; }
bool IoRing::reap(std::uint64_t*, std::int32_t*) { return false; }
bool IoRing::take_back(std::uint64_t*) { return false; }

#endif

}  // namespace smallthinker
