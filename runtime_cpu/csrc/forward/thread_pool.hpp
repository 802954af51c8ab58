// Persistent threads that share out numbered pieces of work.
//
//   pool.run(pieces, [&](std::int64_t piece, int thread) { ... });   // returns when all are done
//
// Pieces are claimed one by one, and the caller waits for claimed pieces only, never for a thread to arrive:
// a worker that is preempted costs only its own share. Idle workers spin shortly, yield, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace smallthinker {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // including the caller of run()
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ThreadPool(ThreadPool&&) = delete;
  ThreadPool& operator=(ThreadPool&&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // `work(piece, thread)` for every piece in [0, pieces); it must not throw. One caller at a time.
  template <typename Work>
  void run(std::int64_t pieces, const Work& work) {
    if (pieces <= 1 || workers_.empty()) {
      for (std::int64_t i = 0; i < pieces; ++i) work(i, 0);
      return;
    }
    dispatch(
        pieces,
        [](const void* context, std::int64_t piece, int thread) {
          (*static_cast<const Work*>(context))(piece, thread);
        },
        &work);
  }

 private:
  using Function = void (*)(const void* context, std::int64_t piece, int thread);

  void dispatch(std::int64_t pieces, Function function, const void* context);
  bool claim_one(int thread);
  void work_loop(int thread);
  std::uint64_t wait_for_job(std::uint64_t seen);

  // Job number in the upper half, pieces left in the lower: a stale claim cannot take from a new job.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<std::int64_t> done_{0};
  alignas(64) Function function_ = nullptr;  // written before the ticket, read after a claim
  const void* context_ = nullptr;

  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace smallthinker
