// Q4_0 weights in the order in which the kernels read them. Nothing is rounded again: the nibbles and scales
// are those of the stock file, reordered.
//
// Tiles (dense matrices and the gates of experts): 16 rows interleaved, so that one register holds four
// columns of each row and sums need no reduction. Per two blocks of 32 columns 576 bytes, read in order:
//   2 x [4 words][16 rows][4 bytes]
//       low nibble: column 4 * word + byte of the block; high nibble: the column 16 further
//   2 x [16 rows] fp16 scales
//
// Expert: its gate's tiles, then, from a multiple of 4096 on, its up rows and down columns in groups of 32
// neurons (the extent of a scale of `down`), so that a silent neuron's share of both is never touched. One
// group, with D = hidden padded to 512:
//   [D] fp16
//       scales of down, one per output
//   [32][D / 32] fp16
//       scales of up, one per block
//   [32][D / 2 + D / 2] nibbles of each neuron
//       its up row, block-transposed: per 512 columns [4 words][16 blocks][4 bytes]
//           low nibble: column 4 * word + byte of the block; high nibble: the column 16 further
//       then its down column: per 128 outputs 64 bytes, of which byte 16 L + 4 j + i holds
//           low nibble: output 32 j + 4 L + i; high nibble: the output 16 further
//           so that interleaving four neurons byte by byte gives consecutive outputs
#pragma once

#include <cstddef>
#include <cstdint>

#include "model/tensor.hpp"

namespace smallthinker {

inline constexpr std::int64_t kTileRows = 16;
inline constexpr std::int64_t kTilePairBytes = 576;    // two blocks of 16 rows
inline constexpr std::int64_t kNeuronGroup = 32;       // neurons that share the scales of `down`
inline constexpr std::int64_t kTransposedBlocks = 16;  // blocks of one transposed run: 512 columns

// A matrix in tiles; missing rows and columns are zeros.
struct TileMatrix {
  const std::byte* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;

  SMALLTHINKER_INLINE std::int64_t pairs() const { return (cols / kActivationBlock + 1) / 2; }
  SMALLTHINKER_INLINE std::int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  SMALLTHINKER_INLINE std::size_t tile_bytes() const {
    return static_cast<std::size_t>(pairs() * kTilePairBytes);
  }
  std::size_t bytes() const { return static_cast<std::size_t>(tiles()) * tile_bytes(); }
};

// Sizes and offsets inside one expert of `hidden` inputs and `neurons` (a multiple of 32) neurons.
struct ExpertShape {
  std::int64_t hidden = 0;
  std::int64_t neurons = 0;

  SMALLTHINKER_INLINE std::int64_t runs() const {  // of 512 columns
    return (hidden + kTransposedBlocks * kActivationBlock - 1) / (kTransposedBlocks * kActivationBlock);
  }
  SMALLTHINKER_INLINE std::int64_t padded() const { return runs() * kTransposedBlocks * kActivationBlock; }
  SMALLTHINKER_INLINE std::int64_t groups() const { return neurons / kNeuronGroup; }
  SMALLTHINKER_INLINE std::size_t scales_bytes() const { return static_cast<std::size_t>(padded()) * 2; }
  SMALLTHINKER_INLINE std::size_t half_bytes() const { return static_cast<std::size_t>(padded()) / 2; }
  SMALLTHINKER_INLINE std::size_t group_bytes() const {  // scales of down and up, nibbles of both
    return 2 * scales_bytes() + 2 * kNeuronGroup * half_bytes();
  }
  TileMatrix gate(const std::byte* expert) const { return {expert, neurons, hidden}; }
  // Its two parts, multiples of 4096: experts are read from disk one by one, the gate first.
  SMALLTHINKER_INLINE std::size_t gate_bytes() const {
    const std::int64_t tile = (hidden / kActivationBlock + 1) / 2 * kTilePairBytes;
    return whole_pages(static_cast<std::size_t>(neurons / kTileRows * tile));
  }
  SMALLTHINKER_INLINE std::size_t group_offset(std::int64_t group) const {
    return gate_bytes() + static_cast<std::size_t>(group) * group_bytes();
  }
  std::size_t bytes() const { return whole_pages(group_offset(groups())); }
  SMALLTHINKER_INLINE static std::size_t whole_pages(std::size_t bytes) {
    return (bytes + 4095) / 4096 * 4096;
  }

  // Within a group.
  SMALLTHINKER_INLINE std::size_t up_scales(std::int64_t neuron) const {
    return scales_bytes() + static_cast<std::size_t>(neuron) * (scales_bytes() / kNeuronGroup);
  }
  SMALLTHINKER_INLINE std::size_t up_nibbles(std::int64_t neuron) const {
    return 2 * scales_bytes() + static_cast<std::size_t>(neuron) * 2 * half_bytes();
  }
  SMALLTHINKER_INLINE std::size_t down_nibbles(std::int64_t neuron) const {
    return up_nibbles(neuron) + half_bytes();
  }
};

// Activations as the tile and neuron kernels read them: q = 256 * high + low with both in [-128, 127]. One
// row of `blocks` (of 32, a multiple of 16) holds
//   [blocks][2][32]             high and low bytes in the columns' order
//   [blocks / 16][2][8][16][4]  the same, transposed: of every 16 blocks, word by word, high bytes then low
//   bytes [blocks] fp32               scales [blocks] int32              -8 * sum of q, because nibbles are
//   stored plus 8
struct Planes {
  SMALLTHINKER_INLINE static std::int64_t blocks(std::int64_t cols) {
    return (cols + 511) / 512 * kTransposedBlocks;
  }
  static std::size_t row_bytes(std::int64_t cols) { return static_cast<std::size_t>(blocks(cols)) * 136; }

  const std::byte* row = nullptr;
  std::int64_t count = 0;  // blocks

  SMALLTHINKER_INLINE const std::int8_t* natural() const { return reinterpret_cast<const std::int8_t*>(row); }
  SMALLTHINKER_INLINE const std::int8_t* transposed() const {
    return reinterpret_cast<const std::int8_t*>(row) + count * 64;
  }
  SMALLTHINKER_INLINE const float* scales() const {
    return reinterpret_cast<const float*>(row + count * 128);
  }
  SMALLTHINKER_INLINE const std::int32_t* offsets() const {
    return reinterpret_cast<const std::int32_t*>(row + count * 132);
  }
};

// Fills a row of planes [row_bytes(cols)] from the 16-bit form of `cols` (a multiple of 32) activations.
void split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);

// Stock Q4_0 to tiles [tile_begin, tile_end) of a matrix, out [tile_end - tile_begin][tile_bytes()].
void pack_tiles(const Matrix& stock, std::int64_t expert, std::int64_t tile_begin, std::int64_t tile_end,
                std::byte* out);
// The rows `rows` [count], at most 16, of a stock Q4_0 matrix as one tile, out [tile_bytes()].
void gather_tile(const Matrix& stock, const std::int64_t* rows, std::int64_t count, std::byte* out);
// To call ahead of gather_tile(): the rows are scattered, and the processor's prefetcher cannot predict them.
SMALLTHINKER_INLINE void prefetch_row(const Matrix& stock, std::int64_t row) {
  const std::byte* data = stock.row(row);
  for (std::size_t at = 0; at < stock.row_bytes + 63; at += 64) __builtin_prefetch(data + at, 0, 2);
}
// Tiles [tile_begin, tile_end) back to the rows of stock Q4_0; `rows` is the matrix's first.
void unpack_tiles(const TileMatrix& tiled, std::int64_t tile_begin, std::int64_t tile_end, std::byte* rows);
// Stock Q4_0 gate [neurons][hidden], up [neurons][hidden] and down [hidden][neurons] to one packed expert;
// each writes its own bytes of out [ExpertShape::bytes()] only, and all of them together every byte.
void pack_gate(const Matrix& gate, std::int64_t expert, const ExpertShape& shape, std::byte* out);
void pack_up(const Matrix& up, std::int64_t expert, const ExpertShape& shape, std::byte* out);
void pack_down(const Matrix& down, std::int64_t expert, const ExpertShape& shape, std::byte* out);

// Back to fp32: a row of a tiled matrix to out [cols]; an up row and a down column to up and down [hidden].
void unpack_tile_row(const TileMatrix& matrix, std::int64_t row, float* out);
void unpack_neuron(const ExpertShape& shape, const std::byte* expert, std::int64_t neuron, float* up,
                   float* down);

}  // namespace smallthinker
