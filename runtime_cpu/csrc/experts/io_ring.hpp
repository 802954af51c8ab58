// The few calls of Linux's io_uring that reading a file takes, without liburing.
//
//   IoRing ring(8);                                             // throws EngineError with the reason
//   ring.prepare_read(descriptor, memory, bytes, offset, tag);  // as often as there is space()
//   ring.enter(1);                                              // submit, and wait for one completion
//   while (ring.reap(&tag, &result)) …                          // result: bytes, or minus errno
//
// For one thread. Elsewhere than on Linux the constructor throws.
#pragma once

#include <cstddef>
#include <cstdint>

namespace smallthinker {

class IoRing {
 public:
  explicit IoRing(unsigned entries);
  ~IoRing();
  IoRing(const IoRing&) = delete;
  IoRing& operator=(const IoRing&) = delete;
  IoRing(IoRing&&) = delete;
  IoRing& operator=(IoRing&&) = delete;

  bool prepare_read(int descriptor, void* memory, std::size_t bytes, std::uint64_t offset, std::uint64_t tag);
  // Submits the prepared reads and waits for `completions`. Returns 0, or the errno after which the ring
  // cannot be used any more; interruptions and shortages are retried.
  int enter(unsigned completions);
  bool reap(std::uint64_t* tag, std::int32_t* result);
  // Takes back the last prepared read that the kernel has not seen; false when there is none.
  bool take_back(std::uint64_t* tag);

 private:
  void unmap();

  int ring_ = -1;
  unsigned unsubmitted_ = 0;
  void* submissions_ = nullptr;  // mapping of the submission ring
  void* completions_ = nullptr;
  void* entries_ = nullptr;
  std::size_t submissions_bytes_ = 0;
  std::size_t completions_bytes_ = 0;
  std::size_t entries_bytes_ = 0;
  unsigned* submission_head_ = nullptr;
  unsigned* submission_tail_ = nullptr;
  unsigned* submission_array_ = nullptr;
  unsigned submission_mask_ = 0;
  unsigned* completion_head_ = nullptr;
  unsigned* completion_tail_ = nullptr;
  unsigned completion_mask_ = 0;
  std::byte* completion_entries_ = nullptr;
};

}  // namespace smallthinker
