// How keys and values lie in memory, as the attention kernels read them and a session writes them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model/tensor.hpp"

namespace smallthinker {

// Keys lie in tiles of 16 positions, [head_dim][16], so that a register holds one dimension of 16 keys;
// values lie position by position, [head_dim].
inline constexpr std::int64_t kKeyTile = 16;

enum class KvType { kF32, kF16, kQ8 };

// 8-bit keys and values: integers in [-127, 127] with an fp16 scale for each 32 dimensions. Both lie in tiles
// of 16 positions of the same size. Of keys, per 32 dimensions, [16] scales and [dims / 4][16][4] integers
// plus 128, because byte products take one unsigned side; of values [16][blocks] scales and [16][head_dim]
// integers.
inline constexpr std::int64_t kQ8Block = 32;
inline constexpr std::int64_t kQ8Word = 4;  // dimensions of a key side by side
struct Q8Tile {
  SMALLTHINKER_INLINE static std::int64_t blocks(std::int64_t head_dim) {
    return (head_dim + kQ8Block - 1) / kQ8Block;
  }
  SMALLTHINKER_INLINE static std::int64_t bytes(std::int64_t head_dim) {
    return kKeyTile * (2 * blocks(head_dim) + (head_dim + kQ8Word - 1) / kQ8Word * kQ8Word);
  }
};

// One key or value x [head_dim] in 8 bits, to lane `lane` of a tile. A block that holds NaN or infinity, or
// is too large for a finite scale, is stored with the scale NaN.
void store_q8_key(const float* x, std::int64_t head_dim, std::int64_t lane, std::byte* tile);
void store_q8_value(const float* x, std::int64_t head_dim, std::int64_t lane, std::byte* tile);

// Keys or values of consecutive positions.
struct KvRows {
  const void* data = nullptr;  // keys: [count][tile of 16]; values: [count][head_dim], 8-bit ones in tiles
  KvType type = KvType::kF32;
  std::int64_t count = 0;  // tiles of keys, or rows of values
  std::int64_t first = 0;  // of 8-bit values: the first one's place in its tile
};

}  // namespace smallthinker
