#include "model/packed.hpp"

#include <algorithm>
#include <cstring>

namespace smallthinker {
namespace {

constexpr std::size_t kStockBlock = 18;  // fp16 scale, 16 bytes of nibbles

std::byte* at(std::byte* base, std::int64_t offset) { return base + static_cast<std::size_t>(offset); }

float nibble_value(std::byte pair, bool high, float scale) {
  const int bits = std::to_integer<int>(pair);
  return static_cast<float>((high ? bits >> 4 : bits & 15) - 8) * scale;
}

}  // namespace

void split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row) {
  const std::int64_t blocks = Planes::blocks(cols);
  auto* natural = reinterpret_cast<std::int8_t*>(row);
  auto* transposed = natural + blocks * 64;
  auto* out_scales = reinterpret_cast<float*>(row + blocks * 128);
  auto* offsets = reinterpret_cast<std::int32_t*>(row + blocks * 132);
  const std::int64_t used = cols / kActivationBlock;
  for (std::int64_t b = 0; b < used; ++b) {
    std::int8_t* high = natural + b * 64;
    std::int8_t* low = high + 32;
    const std::int16_t* block = q + b * kActivationBlock;
    std::int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
      const int value = block[i];
      const int upper = (value + 128) >> 8;
      high[i] = static_cast<std::int8_t>(upper);
      low[i] = static_cast<std::int8_t>(value - 256 * upper);
      sum += value;
    }
    out_scales[b] = scales[b];
    offsets[b] = -8 * sum;
  }
  std::memset(natural + used * 64, 0, static_cast<std::size_t>(blocks - used) * 64);
  std::fill(out_scales + used, out_scales + blocks, 0.0F);
  std::fill(offsets + used, offsets + blocks, 0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    std::int8_t* to = transposed + b / 16 * 1024 + b % 16 * 4;
    for (int word = 0; word < 16; ++word) std::memcpy(to + word * 64, natural + b * 64 + word * 4, 4);
  }
}

namespace {

// A row's blocks to and from its lane of a tile.
void row_to_tile(const std::byte* from, std::int64_t blocks, std::int64_t lane, std::byte* tile) {
  for (std::int64_t b = 0; b < blocks; ++b, from += kStockBlock) {
    std::byte* pair = at(tile, b / 2 * kTilePairBytes);
    std::byte* nibbles = at(pair, b % 2 * 256 + lane * 4);
    for (std::int64_t word = 0; word < 4; ++word) std::memcpy(at(nibbles, word * 64), from + 2 + word * 4, 4);
    std::memcpy(at(pair, 512 + b % 2 * 32 + lane * 2), from, 2);
  }
}

void tile_to_row(const std::byte* tile, std::int64_t blocks, std::int64_t lane, std::byte* to) {
  for (std::int64_t b = 0; b < blocks; ++b, to += kStockBlock) {
    const std::byte* pair = tile + b / 2 * kTilePairBytes;
    const std::byte* nibbles = pair + b % 2 * 256 + lane * 4;
    for (std::int64_t word = 0; word < 4; ++word) std::memcpy(to + 2 + word * 4, nibbles + word * 64, 4);
    std::memcpy(to, pair + 512 + b % 2 * 32 + lane * 2, 2);
  }
}

}  // namespace

void pack_tiles(const Matrix& stock, std::int64_t expert, std::int64_t tile_begin, std::int64_t tile_end,
                std::byte* out) {
  const TileMatrix tiled{nullptr, stock.rows, stock.cols};
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile, out += tiled.tile_bytes()) {
    std::memset(out, 0, tiled.tile_bytes());
    for (std::int64_t r = 0; r < std::min(kTileRows, stock.rows - tile * kTileRows); ++r)
      row_to_tile(stock.row(tile * kTileRows + r, expert), stock.cols / kActivationBlock, r, out);
  }
}

namespace {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SMALLTHINKER_SHUFFLES
#endif
#endif

#if defined(SMALLTHINKER_SHUFFLES)
// Four words of four rows to four rows of a word, which is what a tile's lanes are.
void four_rows_to_tile(const std::byte* const* rows, std::byte* nibbles) {
  typedef std::int32_t Words __attribute__((vector_size(16)));
  Words row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], rows[i], sizeof row[i]);
  const Words a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Words b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Words c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Words d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Words words[4] = {
      __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
      __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(nibbles + i * 64, &words[i], sizeof words[i]);
}
#endif

}  // namespace

void gather_tile(const Matrix& stock, const std::int64_t* rows, std::int64_t count, std::byte* out) {
  const std::int64_t blocks = stock.cols / kActivationBlock;
  const TileMatrix tiled{nullptr, kTileRows, stock.cols};
#if defined(SMALLTHINKER_SHUFFLES)
  if (count == kTileRows) {
    const std::byte* from[kTileRows];
    for (std::int64_t r = 0; r < kTileRows; ++r) from[r] = stock.row(rows[r]) + 2;
    if (blocks % 2 != 0) std::memset(at(out, blocks / 2 * kTilePairBytes), 0, kTilePairBytes);
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::byte* pair = at(out, b / 2 * kTilePairBytes);
      std::byte* scales = at(pair, 512 + b % 2 * 32);
      for (std::int64_t r = 0; r < kTileRows; r += 4)
        four_rows_to_tile(from + r, at(pair, b % 2 * 256 + r * 4));
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        std::memcpy(scales + 2 * r, from[r] - 2, 2);
        from[r] += kStockBlock;
      }
    }
    return;
  }
#endif
  std::memset(out, 0, tiled.tile_bytes());
  for (std::int64_t r = 0; r < count; ++r) row_to_tile(stock.row(rows[r]), blocks, r, out);
}

void unpack_tiles(const TileMatrix& tiled, std::int64_t tile_begin, std::int64_t tile_end, std::byte* rows) {
  const std::int64_t blocks = tiled.cols / kActivationBlock;
  const std::int64_t end = std::min(tiled.rows, tile_end * kTileRows);
  for (std::int64_t row = tile_begin * kTileRows; row < end; ++row) {
    const std::byte* tile = tiled.data + static_cast<std::size_t>(row / kTileRows) * tiled.tile_bytes();
    tile_to_row(tile, blocks, row % kTileRows, rows + static_cast<std::size_t>(row * blocks) * kStockBlock);
  }
}

void pack_gate(const Matrix& gate, std::int64_t expert, const ExpertShape& shape, std::byte* out) {
  const TileMatrix tiled = shape.gate(out);
  pack_tiles(gate, expert, 0, tiled.tiles(), out);
  std::memset(out + tiled.bytes(), 0, shape.gate_bytes() - tiled.bytes());
}

void pack_up(const Matrix& up, std::int64_t expert, const ExpertShape& shape, std::byte* out) {
  const std::int64_t blocks = shape.hidden / kActivationBlock;
  for (std::int64_t g = 0; g < shape.groups(); ++g) {
    std::byte* group = out + shape.group_offset(g);
    std::memset(group + shape.up_scales(0), 0, shape.scales_bytes());
    for (std::int64_t n = 0; n < kNeuronGroup; ++n) {
      const std::byte* from = up.row(g * kNeuronGroup + n, expert);
      std::byte* nibbles = group + shape.up_nibbles(n);
      std::memset(nibbles, 0, shape.half_bytes());
      for (std::int64_t b = 0; b < blocks; ++b, from += kStockBlock) {
        std::memcpy(group + shape.up_scales(n) + static_cast<std::size_t>(b) * 2, from, 2);
        std::byte* to = at(nibbles, b / 16 * 256 + b % 16 * 4);
        for (std::int64_t word = 0; word < 4; ++word) std::memcpy(at(to, word * 64), from + 2 + word * 4, 4);
      }
    }
  }
}

void pack_down(const Matrix& down, std::int64_t expert, const ExpertShape& shape, std::byte* out) {
  for (std::int64_t g = 0; g < shape.groups(); ++g) {
    std::byte* group = out + shape.group_offset(g);
    std::memset(group, 0, shape.scales_bytes());
    for (std::int64_t n = 0; n < kNeuronGroup; ++n)
      std::memset(group + shape.down_nibbles(n), 0, shape.half_bytes());
    // A stock block holds one output's weights of these 32 neurons. The outputs d and d + 16 of 32 share a
    // byte.
    for (std::int64_t d = 0; d < shape.hidden; d += 32) {
      const std::size_t place = static_cast<std::size_t>(d / 128 * 64 + d % 128 / 32 * 4);
      for (std::int64_t lane = 0; lane < 16; ++lane) {
        const std::byte* low = down.row(d + lane, expert) + static_cast<std::size_t>(g) * kStockBlock;
        const std::byte* high = down.row(d + lane + 16, expert) + static_cast<std::size_t>(g) * kStockBlock;
        std::memcpy(at(group, (d + lane) * 2), low, 2);
        std::memcpy(at(group, (d + lane + 16) * 2), high, 2);
        std::byte* to =
            group + shape.down_nibbles(0) + place + static_cast<std::size_t>(lane / 4 * 16 + lane % 4);
        const std::size_t step = 2 * shape.half_bytes();
        for (std::size_t n = 0; n < 16; ++n) {
          const int a = std::to_integer<int>(low[2 + n]);
          const int b = std::to_integer<int>(high[2 + n]);
          to[n * step] = static_cast<std::byte>((a & 15) | (b & 15) << 4);
          to[(n + 16) * step] = static_cast<std::byte>(a >> 4 | (b & 0xF0));
        }
      }
    }
  }
  const std::size_t end = shape.group_offset(shape.groups());
  std::memset(out + end, 0, shape.bytes() - end);
}

void unpack_tile_row(const TileMatrix& matrix, std::int64_t row, float* out) {
  const std::byte* tile = matrix.data + static_cast<std::size_t>(row / kTileRows) * matrix.tile_bytes();
  const std::int64_t r = row % kTileRows;
  for (std::int64_t b = 0; b < matrix.cols / kActivationBlock; ++b) {
    const std::byte* pair = tile + static_cast<std::size_t>(b / 2 * kTilePairBytes);
    const float scale = half_to_float(load<std::uint16_t>(pair + 512 + b % 2 * 32 + r * 2));
    for (std::int64_t i = 0; i < 32; ++i) {
      const std::byte bits = pair[b % 2 * 256 + i % 16 / 4 * 64 + r * 4 + i % 4];
      out[b * 32 + i] = nibble_value(bits, i >= 16, scale);
    }
  }
}

void unpack_neuron(const ExpertShape& shape, const std::byte* expert, std::int64_t neuron, float* up,
                   float* down) {
  const std::byte* group = expert + shape.group_offset(neuron / kNeuronGroup);
  const std::int64_t n = neuron % kNeuronGroup;
  for (std::int64_t i = 0; i < shape.hidden; ++i) {
    const std::int64_t b = i / 32;
    const std::int64_t within = i % 32;
    const std::int64_t lane = within % 16;
    const float up_scale = half_to_float(load<std::uint16_t>(group + shape.up_scales(n) + b * 2));
    const std::byte up_bits =
        group[shape.up_nibbles(n) +
              static_cast<std::size_t>(b / 16 * 256 + lane / 4 * 64 + b % 16 * 4 + lane % 4)];
    up[i] = nibble_value(up_bits, within >= 16, up_scale);
    const float down_scale = half_to_float(load<std::uint16_t>(group + i * 2));
    const std::byte down_bits =
        group[shape.down_nibbles(n) +
              static_cast<std::size_t>(i / 128 * 64 + lane / 4 * 16 + i % 128 / 32 * 4 + lane % 4)];
    down[i] = nibble_value(down_bits, within >= 16, down_scale);
  }
}

}  // namespace smallthinker
