// A file of made-up experts for the tests of the cache.
#pragma once

#include <cstring>
#include <memory>

#include "experts/cache.hpp"
#include "experts/checksum.hpp"
#include "tests/test_file.hpp"

namespace smallthinker::testing {

// Experts of parts of uneven sizes: `packed` at multiples of 4096, otherwise at multiples of 32 as in stock
// GGUF files. The last expert ends with the file, whose size is no multiple of 4096.
struct ExpertFile {
  static constexpr std::size_t kPartBytes[] = {8992, 4096, 2080};

  ExpertFile(int layers, int experts, int parts, bool packed) {
    layout.layers = layers;
    layout.experts = experts;
    std::size_t room = 0;
    for (int part = 0; part < parts; ++part) {
      const std::size_t wide = round(kPartBytes[part] + (packed ? 0 : kReadAlign));
      layout.parts.push_back({room, wide});
      room += wide;
    }
    layout.slot_bytes = room;
    std::size_t at = packed ? kReadAlign : 1056;
    for (int i = 0; i < layers * experts; ++i) {
      for (int part = 0; part < parts; ++part) {
        layout.extents.push_back({at, kPartBytes[part]});
        at += packed ? round(kPartBytes[part]) : kPartBytes[part];
      }
    }
    const ExpertExtent& last = layout.extents.back();
    file = std::make_unique<TestFile>(last.offset + last.bytes);
    for (const ExpertExtent& extent : layout.extents) {
      layout.checksums.push_back(checksum64(&file->content[extent.offset], extent.bytes));
    }
  }
  static std::size_t round(std::size_t bytes) { return (bytes + kReadAlign - 1) / kReadAlign * kReadAlign; }

  const ExpertExtent& extent(int layer, int expert, int part) const {
    const int parts = static_cast<int>(layout.parts.size());
    return layout.extents[static_cast<std::size_t>((layer * layout.experts + expert) * parts + part)];
  }
  bool same(int layer, int expert, int part, const std::byte* data, std::byte mask = std::byte{0}) const {
    const ExpertExtent& where = extent(layer, expert, part);
    const std::byte* expected = &file->content[where.offset];
    if (mask == std::byte{0}) return std::memcmp(data, expected, where.bytes) == 0;
    for (std::size_t i = 0; i < where.bytes; ++i) {
      if ((data[i] ^ mask) != expected[i]) return false;
    }
    return true;
  }

  ExpertLayout layout;
  std::unique_ptr<TestFile> file;
};

}  // namespace smallthinker::testing
