#include "experts/forecast.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "model/quantisation.hpp"

namespace smallthinker {
namespace {

constexpr double kDecay = 0.99;  // of a record, per guess

// A damaged file may give NaN, which no sort order has a place for.
float sortable(float score) { return score == score ? score : -std::numeric_limits<float>::infinity(); }

TileMatrix shape_of(const Hyperparameters& hyper) {
  return {nullptr, hyper.experts, round_up(hyper.hidden, kActivationBlock)};
}

void read_row(const Linear& router, std::int64_t row, float* out) {
  if (router.tiled()) return unpack_tile_row(router.tiles, row, out);
  dequantise(router.stock.type, router.stock.row(row), router.stock.cols, out);
}

}  // namespace

std::size_t ExpertForecast::bytes(const Hyperparameters& hyper) {
  return static_cast<std::size_t>(hyper.layers) * shape_of(hyper).bytes();
}

ExpertForecast::ExpertForecast(const Hyperparameters& hyper, std::span<const Linear* const> routers)
    : experts_(hyper.experts),
      used_(hyper.experts_per_token),
      first_(hyper.router_lead),
      memory_(bytes(hyper)),
      logits_(static_cast<std::size_t>(kReach * experts_)),
      records_(static_cast<std::size_t>(kReach * used_)),
      pending_(static_cast<std::size_t>(hyper.layers)),
      order_(static_cast<std::size_t>(experts_)) {
  TileMatrix tiles = shape_of(hyper);
  std::vector<float> row(static_cast<std::size_t>(tiles.cols));
  Matrix stock = make_matrix(nullptr, Type::kQ4_0, tiles.cols, tiles.rows);
  std::vector<std::byte> rows(stock.row_bytes * static_cast<std::size_t>(stock.rows));
  stock.data = rows.data();
  std::byte* next = memory_.data();
  for (const Linear* router : routers) {
    for (std::int64_t r = 0; r < tiles.rows; ++r) {
      read_row(*router, r, row.data());
      quantise_q4_0(row.data(), tiles.cols, rows.data() + stock.row_bytes * static_cast<std::size_t>(r));
    }
    pack_tiles(stock, 0, 0, tiles.tiles(), next);
    tiles.data = next;
    routers_.push_back(tiles);
    next += tiles.bytes();
  }
}

void ExpertForecast::learn(std::int64_t layer, std::span<const std::int32_t> chosen) {
  if (layer == first_) {
    for (std::vector<Pending>& guesses : pending_) guesses.clear();
  }
  std::vector<Pending>& guesses = pending_[static_cast<std::size_t>(layer)];
  for (const Pending& guess : guesses) {
    const bool right = std::find(chosen.begin(), chosen.end(), guess.expert) != chosen.end();
    guess.record->seen = guess.record->seen * kDecay + 1.0;
    guess.record->right = guess.record->right * kDecay + (right ? 1.0 : 0.0);
  }
  guesses.clear();
}

std::span<const ExpertGuess> ExpertForecast::missing(std::int64_t layer, std::int64_t distance,
                                                     const std::function<bool(std::int32_t)>& in_memory) {
  const float* const scores = logits(distance);
  std::iota(order_.begin(), order_.end(), 0);
  std::partial_sort(
      order_.begin(), order_.begin() + used_, order_.end(),
      [&](std::int32_t a, std::int32_t b) { return sortable(scores[a]) > sortable(scores[b]); });
  std::vector<Pending>& guesses = pending_[static_cast<std::size_t>(layer + distance)];
  Record* const records = records_.data() + (distance - 1) * used_;
  missing_.clear();
  for (std::int64_t rank = 0; rank < used_; ++rank) {
    const std::int32_t expert = order_[static_cast<std::size_t>(rank)];
    if (in_memory(expert)) continue;
    guesses.push_back({expert, records + rank});
    missing_.push_back({expert, records[rank].right / records[rank].seen});
  }
  return missing_;
}

}  // namespace smallthinker
