#include "forward/compute.hpp"

#include <algorithm>

namespace smallthinker {
namespace {

constexpr std::int64_t kMostRows = 64;  // of a piece of work: its weights stay in the L2 cache
constexpr std::int64_t kLeastRows = 8;
constexpr std::int64_t kLeastTiles = 4;  // a short stream never reaches the memory's full bandwidth
constexpr std::int64_t kMostTiles = 64;

}  // namespace

std::int64_t rows_per_piece(std::int64_t rows, int threads) {
  const std::int64_t share = rows / (4 * static_cast<std::int64_t>(threads));
  return std::clamp(round_up(share, kLeastRows), kLeastRows, kMostRows);
}

void Products::add(const Matrix& matrix, std::int64_t expert, const Activations& x, std::int64_t tokens,
                   float* out, std::int64_t out_stride) {
  const std::int64_t rows = rows_per_piece(matrix.rows, compute_.pool.threads());
  for (std::int64_t begin = 0; begin < matrix.rows; begin += rows) {
    const std::int64_t end = std::min(begin + rows, matrix.rows);
    pieces_.push_back({&matrix, nullptr, expert, begin, end, x, tokens, out + begin, out_stride});
  }
}

void Products::add(const Linear& matrix, const Activations& x, std::int64_t tokens, float* out,
                   std::int64_t out_stride) {
  if (!matrix.tiled()) return add(matrix.stock, 0, x, tokens, out, out_stride);
  const std::int64_t all = matrix.tiles.tiles();
  const std::int64_t tiles =
      std::clamp<std::int64_t>(all / (4 * compute_.pool.threads()), kLeastTiles, kMostTiles);
  for (std::int64_t begin = 0; begin < all; begin += tiles) {
    const std::int64_t end = std::min(begin + tiles, all);
    pieces_.push_back(
        {nullptr, &matrix.tiles, 0, begin, end, x, tokens, out + begin * kTileRows, out_stride});
  }
}

void Products::add_whole(const TileMatrix& tiles, const Activations& x, float* out) {
  pieces_.push_back({nullptr, &tiles, 0, 0, tiles.tiles(), x, 1, out, tiles.rows});
}

void Products::run() {
  const Kernels& kernels = compute_.kernels;
  compute_.pool.run(static_cast<std::int64_t>(pieces_.size()), [&](std::int64_t i, int) {
    const Piece& piece = pieces_[static_cast<std::size_t>(i)];
    if (piece.tiles != nullptr) {
      kernels.tiles(*piece.tiles, piece.begin, piece.end, piece.x, piece.tokens, piece.out, piece.out_stride);
      return;
    }
    kernels.matmul(*piece.matrix, piece.expert, piece.begin, piece.end, piece.x, piece.tokens, piece.out,
                   piece.out_stride);
  });
  pieces_.clear();
}

}  // namespace smallthinker
