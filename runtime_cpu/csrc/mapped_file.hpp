// A file mapped read-only into memory, and a file of which few bytes are read at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace smallthinker {

class MappedFile {
 public:
  // Throws ModelFileError when the file cannot be opened, is empty or cannot be mapped.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  MappedFile(MappedFile&&) = delete;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Drop the pages read so far from this process; the next access brings them back.
  void forget_pages() const;

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Reads that end in an error where a mapping of a file that was cut off would end the process.
class SparseFile {
 public:
  explicit SparseFile(const std::string& path);  // ModelFileError
  ~SparseFile();
  SparseFile(const SparseFile&) = delete;
  SparseFile& operator=(const SparseFile&) = delete;
  SparseFile(SparseFile&&) = delete;
  SparseFile& operator=(SparseFile&&) = delete;

  // Fills `to`. EngineError when the file does not hold as much there, or does not give it. By any thread.
  void read(std::uint64_t offset, std::span<std::byte> to) const;

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace smallthinker
