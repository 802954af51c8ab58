// A file of random bytes, with a copy in memory, for the tests that read.
#pragma once

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "experts/file_reader.hpp"
#include "forward/sampler.hpp"
#include "model/tensor.hpp"
#include "tests/check.hpp"

namespace smallthinker::testing {

class TestFile {
 public:
  explicit TestFile(std::size_t bytes, std::uint64_t seed = 7) : content(bytes) {
    RandomStream random(seed);
    for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
      const std::uint64_t value = random.next();
      std::memcpy(&content[at], &value, std::min(sizeof value, bytes - at));
    }
    path = (std::filesystem::temp_directory_path() /
            ("smallthinker-" + std::to_string(::getpid()) + "-" + std::to_string(serial().fetch_add(1))))
               .string();
    restore();
  }
  ~TestFile() { std::filesystem::remove(path); }
  TestFile(const TestFile&) = delete;
  TestFile& operator=(const TestFile&) = delete;
  TestFile(TestFile&&) = delete;
  TestFile& operator=(TestFile&&) = delete;

  // In place, so that readers see it.
  void write(std::size_t offset, const std::byte* data, std::size_t bytes) const {
    const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0 &&
          ::pwrite(file, data, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes));
    ::fsync(file);
    ::close(file);
  }
  void restore() const { write(0, content.data(), content.size()); }
  void damage(std::size_t offset) const {
    const std::byte other = content[offset] ^ std::byte{0x10};
    write(offset, &other, 1);
  }
  void truncate(std::size_t bytes) const { std::filesystem::resize_file(path, bytes); }

  std::vector<std::byte> content;
  std::string path;

 private:
  static std::atomic<int>& serial() {
    static std::atomic<int> number{0};
    return number;
  }
};

struct FreeAligned {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kReadAlign}); }
};

class AlignedMemory {
 public:
  explicit AlignedMemory(std::size_t bytes)
      : memory_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kReadAlign}))), bytes_(bytes) {
    std::memset(memory_.get(), 0xEE, bytes);
  }
  std::byte* data() const { return memory_.get(); }
  std::span<std::byte> span() const { return {memory_.get(), bytes_}; }

 private:
  std::unique_ptr<std::byte, FreeAligned> memory_;
  std::size_t bytes_;
};

// The backends that work here; a container may forbid io_uring, and a file system direct reads.
inline std::vector<std::string> working_backends() {
  const TestFile file(5000);
  std::vector<std::string> names;
  for (const char* name : {"io_uring", "threads", "page_cache"}) {
    try {
      ReaderOptions options;
      options.backend = name;
      CHECK(FileReader::open(file.path, options)->backend() == name);
      names.emplace_back(name);
    } catch (const EngineError& error) {
      std::printf("not tested: %s\n", error.what());
    }
  }
  CHECK(!names.empty() && names.back() == "page_cache");
  return names;
}

template <typename Act>
std::string error_of(const Act& act) {
  try {
    act();
  } catch (const EngineError& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace smallthinker::testing
