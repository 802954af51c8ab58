// Waiting for a thread to wait: the order of events instead of a guess at how long they take.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

namespace smallthinker::testing {

inline long this_thread() { return ::syscall(SYS_gettid); }

// Returns when a thread of this process sleeps in the kernel, as on a mutex, a condition or another's end.
// A thread that merely has no core is ready to run, and that is not sleep.
inline void await_sleep(long thread) {
  const std::string path = "/proc/self/task/" + std::to_string(thread) + "/stat";
  while (true) {
    char text[512] = {};
    if (std::FILE* file = std::fopen(path.c_str(), "r")) {
      const std::size_t got = std::fread(text, 1, sizeof text - 1, file);
      std::fclose(file);
      const char* name_end = got > 0 ? std::strrchr(text, ')') : nullptr;
      if (name_end != nullptr && std::strncmp(name_end, ") S", 3) == 0) return;
    }
    std::this_thread::yield();
  }
}

}  // namespace smallthinker::testing
