#include "forward/thread_pool.hpp"

#if defined(SMALLTHINKER_X86)
#include <immintrin.h>
#endif

namespace smallthinker {
namespace {

constexpr std::uint64_t kLow = 0xFFFFFFFFU;
constexpr int kSpins = 4000;  // some 50 microseconds: longer than the serial parts of a layer
constexpr int kYields = 200;

void relax() {
#if defined(SMALLTHINKER_X86)
  _mm_pause();
#elif defined(SMALLTHINKER_ARM64)
  // `yield` does nothing on most cores; `isb` drains the pipeline, which leaves the cache line to its writer.
  __asm__ volatile("isb" ::: "memory");
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work_loop(i); });
  } catch (...) {
    stopping_.store(true);
    {
      const std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  {
    const std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::dispatch(std::int64_t pieces, Function function, const void* context) {
  function_ = function;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const std::uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32U) + 1;
  // Sequentially consistent against the sleepers' count: either we see the sleeper or it sees the job.
  ticket_.store((job << 32U) | static_cast<std::uint64_t>(pieces));
  if (sleepers_.load() > 0) {
    const std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  while (claim_one(0)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != pieces; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

bool ThreadPool::claim_one(int thread) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if ((ticket & kLow) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
  function_(context_, static_cast<std::int64_t>(ticket & kLow) - 1, thread);
  done_.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

std::uint64_t ThreadPool::wait_for_job(std::uint64_t seen) {
  const auto ready = [&] { return (ticket_.load() >> 32U) != seen || stopping_.load(); };
  for (int i = 0; i < kSpins; ++i) {
    if (ready()) return ticket_.load() >> 32U;
    relax();
  }
  for (int i = 0; i < kYields; ++i) {
    if (ready()) return ticket_.load() >> 32U;
    std::this_thread::yield();
  }
  std::unique_lock lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, ready);
  sleepers_.fetch_sub(1);
  return ticket_.load() >> 32U;
}

void ThreadPool::work_loop(int thread) {
  std::uint64_t seen = 0;
  while (true) {
    seen = wait_for_job(seen);
    if (stopping_.load()) return;
    while (claim_one(thread)) {
    }
  }
}

}  // namespace smallthinker
