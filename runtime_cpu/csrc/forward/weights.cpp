#include "forward/weights.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "experts/checksum.hpp"
#include "model/quantisation.hpp"

namespace smallthinker {
namespace {

constexpr std::int64_t kTilesPerPiece = 64;

bool becomes_tiles(const Linear& linear, const Kernels& kernels) {
  return linear.tiled() || (kernels.packed && linear.stock.type == Type::kQ4_0);
}

TileMatrix tiles_of(const Linear& linear) {
  return linear.tiled() ? linear.tiles : TileMatrix{nullptr, linear.stock.rows, linear.stock.cols};
}

// The shape of a tiled or Q4_0 matrix in stock rows.
Matrix rows_of(const Linear& linear) {
  const TileMatrix tiles = tiles_of(linear);
  return make_matrix(nullptr, Type::kQ4_0, tiles.cols, tiles.rows);
}

std::size_t stock_bytes(const Matrix& matrix) {
  return matrix.row_bytes * static_cast<std::size_t>(matrix.rows * matrix.experts);
}

std::size_t copied_bytes(const Matrix& matrix) { return (stock_bytes(matrix) + 63) / 64 * 64; }

}  // namespace

WeightPlan::WeightPlan(const Model& model, const Kernels& kernels, bool offload, bool predictor)
    : expert(model.expert_shape()) {
  bool can_pack = true;
  for (const Layer& layer : model.layers) {
    for (const Matrix* matrix : {&layer.gate, &layer.up, &layer.down}) {
      can_pack = can_pack && (model.packed || matrix->type == Type::kQ4_0);
    }
  }
  packed_experts = can_pack && (model.packed || kernels.packed || offload);
  const auto count = [&](const Linear& linear) {
    if (becomes_tiles(linear, kernels)) {
      dense_bytes += tiles_of(linear).bytes();
    } else if (packed_experts) {
      dense_bytes += copied_bytes(linear.stock);
    } else {
      mapped_bytes += stock_bytes(linear.stock);
    }
  };
  if (predictor) {
    if (!model.head_predictor) {
      throw EngineError(
          "the file has no predictor of the head's rows; open it with the exact head, or export it with a "
          "predictor");
    }
    predictor_width = model.head_predictor->width();
    count(model.head_predictor->down);
    count(model.head_predictor->up);
  }
  for (const Layer& layer : model.layers) {
    for (const Linear* linear : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.router})
      count(*linear);
    if (packed_experts) {
      expert_bytes += static_cast<std::size_t>(model.hyper.experts) * expert.bytes();
    } else {
      mapped_bytes += stock_bytes(layer.gate) + stock_bytes(layer.up) + stock_bytes(layer.down);
    }
  }
  // Rows of an embedding of its own are read from the file one by one.
  if (predictor && becomes_tiles(model.head, kernels)) {
    dense_bytes += copied_bytes(rows_of(model.head));
  } else {
    count(model.head);
  }
}

Weights::Weights(std::shared_ptr<const Model> model, const Kernels& kernels, ThreadPool& pool,
                 const ExpertStoreOptions& options, bool predictor)
    : plan(*model, kernels, options.cache_bytes > 0, predictor),
      model_(std::move(model)),
      dense_(plan.dense_bytes) {
  next_ = dense_.data();
  for (const Layer& layer : model_->layers) {
    layers.push_back({load(layer.query, kernels, pool), load(layer.key, kernels, pool),
                      load(layer.value, kernels, pool), load(layer.output, kernels, pool),
                      load(layer.router, kernels, pool)});
    model_->forget_pages();
  }
  if (predictor && becomes_tiles(model_->head, kernels)) {
    head_rows = load_rows(model_->head, pool);
  } else {
    head = load(model_->head, kernels, pool);
  }
  if (predictor) {
    predictor_down = load(model_->head_predictor->down, kernels, pool);
    predictor_up = load(model_->head_predictor->up, kernels, pool);
  }
  model_->forget_pages();
  if (plan.packed_experts) experts = std::make_unique<ExpertStore>(model_, options, pool.threads());
}

Linear Weights::load(const Linear& from, const Kernels& kernels, ThreadPool& pool) {
  Linear linear;
  if (!becomes_tiles(from, kernels)) {
    linear.stock = from.stock;
    if (!plan.packed_experts) return linear;
    // Under a memory budget, weights that are in the page cache only would be evicted token by token.
    std::memcpy(next_, from.stock.data, stock_bytes(from.stock));
    linear.stock.data = next_;
    next_ += copied_bytes(from.stock);
    return linear;
  }
  linear.tiles = tiles_of(from);
  std::byte* const out = next_;
  next_ += linear.tiles.bytes();
  linear.tiles.data = out;
  const std::int64_t tiles = linear.tiles.tiles();
  pool.run((tiles + kTilesPerPiece - 1) / kTilesPerPiece, [&](std::int64_t piece, int) {
    const std::int64_t begin = piece * kTilesPerPiece;
    const std::int64_t end = std::min(begin + kTilesPerPiece, tiles);
    const std::size_t offset = static_cast<std::size_t>(begin) * linear.tiles.tile_bytes();
    if (from.tiled()) {
      std::memcpy(out + offset, from.tiles.data + offset,
                  static_cast<std::size_t>(end - begin) * linear.tiles.tile_bytes());
    } else {
      pack_tiles(from.stock, 0, begin, end, out + offset);
    }
  });
  if (from.tiled()) check_tiles(from, out);
  return linear;
}

// The head's rows stay rows, because named ones are read one by one: a tile holds fifteen others.
Matrix Weights::load_rows(const Linear& from, ThreadPool& pool) {
  Matrix rows = rows_of(from);
  std::byte* const out = next_;
  next_ += copied_bytes(rows);
  rows.data = out;
  if (from.tiled()) check_tiles(from, from.tiles.data);
  const std::int64_t tiles = tiles_of(from).tiles();
  pool.run((tiles + kTilesPerPiece - 1) / kTilesPerPiece, [&](std::int64_t piece, int) {
    const std::int64_t begin = piece * kTilesPerPiece;
    const std::int64_t end = std::min(begin + kTilesPerPiece, tiles);
    if (from.tiled()) return unpack_tiles(from.tiles, begin, end, out);
    const std::int64_t first = begin * kTileRows;
    const std::int64_t count = std::min(rows.rows, end * kTileRows) - first;
    std::memcpy(out + static_cast<std::size_t>(first) * rows.row_bytes, from.stock.row(first),
                static_cast<std::size_t>(count) * rows.row_bytes);
  });
  return rows;
}

void Weights::check_tiles(const Linear& from, const std::byte* data) const {
  if (checksum64(data, from.tiles.bytes()) == from.checksum) return;
  throw ModelFileError(model_->path + ": the checksum of a matrix of " + std::to_string(from.tiles.rows) +
                       " by " + std::to_string(from.tiles.cols) + " is wrong; the file is damaged");
}

void Weights::embedding(std::int64_t token, float* out) const {
  if (model_->tied && head_rows.data != nullptr)
    return dequantise(head_rows.type, head_rows.row(token), model_->hyper.hidden, out);
  const Linear& table = model_->tied ? head : model_->embedding;
  if (table.tiled()) return unpack_tile_row(table.tiles, token, out);
  const std::byte* const row = table.stock.row(token);
  if (model_->tied) return dequantise(table.stock.type, row, model_->hyper.hidden, out);
  std::vector<std::byte> read(table.stock.row_bytes);
  model_->read(row, read);
  dequantise(table.stock.type, read.data(), model_->hyper.hidden, out);
}

}  // namespace smallthinker
