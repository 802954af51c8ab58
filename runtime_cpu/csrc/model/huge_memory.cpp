#include "model/huge_memory.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <string>
#include <utility>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t page_aligned(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

HugeMemory::HugeMemory(std::size_t bytes) {
  if (bytes == 0) return;
  size_ = page_aligned(bytes);
  // Room to start at a huge page; the surplus is given back.
  const std::size_t reserved = size_ + kHugePage;
  void* const start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    throw EngineError("there is no memory for " + std::to_string(size_) + " bytes of weights");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t lead = (kHugePage - address % kHugePage) % kHugePage;
  data_ = static_cast<std::byte*>(start) + lead;
  if (lead > 0) munmap(start, lead);
  if (lead < kHugePage) munmap(data_ + size_, kHugePage - lead);
#if defined(MADV_HUGEPAGE)
  madvise(data_, size_, MADV_HUGEPAGE);  // a wish: where it is refused, pages are small
#endif
}

HugeMemory::~HugeMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

HugeMemory::HugeMemory(HugeMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HugeMemory& HugeMemory::operator=(HugeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace smallthinker
