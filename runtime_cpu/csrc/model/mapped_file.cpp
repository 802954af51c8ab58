#include "model/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {

std::string reason() { return std::generic_category().message(errno); }

}  // namespace

MappedFile::MappedFile(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0) throw ModelFileError("cannot open " + path + ": " + reason());
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0) {
    ::close(descriptor_);
    throw ModelFileError(path + " is empty or no regular file");
  }
  size_ = static_cast<std::size_t>(status.st_size);
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (address == MAP_FAILED) {
    const std::string why = reason();
    ::close(descriptor_);
    throw ModelFileError("cannot map " + path + ": " + why);
  }
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  ::munmap(const_cast<std::byte*>(data_), size_);
  ::close(descriptor_);
}

void MappedFile::forget_pages() const { ::madvise(const_cast<std::byte*>(data_), size_, MADV_DONTNEED); }

void MappedFile::read(std::uint64_t offset, std::span<std::byte> to) const {
  const std::uint64_t end = offset + to.size();
  while (!to.empty()) {
    const ssize_t got = ::pread(descriptor_, to.data(), to.size(), static_cast<off_t>(end - to.size()));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw EngineError(path_ + " cannot be read at " + std::to_string(end - to.size()) + ": " +
                        (got < 0 ? reason() : "it ends before"));
    }
    to = to.subspan(static_cast<std::size_t>(got));
  }
}

}  // namespace smallthinker
