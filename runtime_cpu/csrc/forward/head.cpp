#include "forward/head.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

namespace smallthinker {
namespace {

constexpr std::int64_t kRowsPerPiece = 1024;
constexpr std::int64_t kMostTogether = 256;  // rows of one call

}  // namespace

HeadRows find_head_rows(const std::string& name) {
  if (name == "named") return HeadRows::kNamed;
  if (name == "all") return HeadRows::kAll;
  if (name == "scores") return HeadRows::kScores;
  throw EngineError("head rows are '" + name + "'; allowed are named, all and scores");
}

HeadCounts Head::run(std::int64_t first, std::int64_t rows, HeadRows wanted, float* logits,
                     Products& products) const {
  if (weights_.plan.predictor_width == 0) return whole(first, rows, logits, products);
  HeadCounts counts;
  for (std::int64_t i = 0; i < rows; ++i) {
    const HeadCounts one = predicted(first + i, wanted, logits + i * model_.hyper.vocab, products);
    counts.rows += one.rows;
    counts.computed += one.computed;
    counts.fallbacks += one.fallbacks;
  }
  return counts;
}

HeadCounts Head::whole(std::int64_t first, std::int64_t rows, float* logits, Products& products) const {
  const std::int64_t vocab = model_.hyper.vocab;
  products.add(weights_.head, scratch_.normed.from(first).view(), rows, logits, vocab);
  products.run();
  const auto computed = static_cast<std::uint64_t>(vocab * rows);
  return {computed, computed, 0};
}

// Scores go where the logits will be, and each row's logit takes the place of its own score.
HeadCounts Head::predicted(std::int64_t row, HeadRows wanted, float* logits, Products& products) const {
  const std::int64_t vocab = model_.hyper.vocab;
  const ActivationBuffer x = scratch_.normed.from(row);
  const ActivationBuffer& inner = scratch_.inner;
  products.add(weights_.predictor_down, x.view(), 1, inner.f32, inner.stride);
  products.run();
  compute_.quantise(inner);
  products.add(weights_.predictor_up, inner.view(), 1, logits, vocab);
  products.run();
  if (wanted == HeadRows::kScores) return {};

  const bool all = wanted == HeadRows::kAll;
  std::int64_t named = count_named(logits);
  const bool falls_back = !all && named < std::min(kLeastHeadRows, vocab);
  const bool gathers = weights_.head_rows.data != nullptr;
  HeadCounts counts;
  if ((all || falls_back) && !gathers) {
    counts = whole(row, 1, logits, products);
  } else {
    if (all || falls_back) {  // every row is named
      std::fill_n(logits, vocab, std::numeric_limits<float>::infinity());
      named = vocab;
    }
    const auto compute = gathers ? &Head::gathered_rows : &Head::named_rows;
    compute_.pool.run(pieces(), [&](std::int64_t piece, int) {
      (this->*compute)(piece * kRowsPerPiece, std::min(vocab, (piece + 1) * kRowsPerPiece), x.view(), logits);
    });
    counts = {static_cast<std::uint64_t>(vocab), static_cast<std::uint64_t>(named), 0};
  }
  counts.fallbacks = falls_back ? 1U : 0U;
  return counts;
}

std::int64_t Head::pieces() const { return (model_.hyper.vocab + kRowsPerPiece - 1) / kRowsPerPiece; }

// How many of the scores [vocab] are above the predictor's threshold.
std::int64_t Head::count_named(const float* scores) const {
  const float threshold = model_.head_predictor->threshold;
  std::atomic<std::int64_t> named{0};
  compute_.pool.run(pieces(), [&](std::int64_t piece, int) {
    const float* begin = scores + piece * kRowsPerPiece;
    const float* end = scores + std::min(model_.hyper.vocab, (piece + 1) * kRowsPerPiece);
    named += std::count_if(begin, end, [&](float score) { return score > threshold; });
  });
  return named.load();
}

// Rows [begin, end). The named ones are gathered, sixteen to a tile: only they are read, and the tile kernel
// gives them the exact head's bits.
void Head::gathered_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const {
  const Matrix& matrix = weights_.head_rows;
  const float threshold = model_.head_predictor->threshold;
  std::int64_t named[kRowsPerPiece + kTileRows];
  std::int64_t count = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    if (logits[i] > threshold) {
      named[count++] = i;
    } else {
      logits[i] = -std::numeric_limits<float>::infinity();
    }
  }
  const auto fetch = [&](std::int64_t first) {
    for (std::int64_t n = first; n < std::min(count, first + kTileRows); ++n) prefetch_row(matrix, named[n]);
  };
  // Aligned for the kernels' loads. It stays allocated for the thread's life, because its size depends on the
  // model.
  const TileMatrix shape{nullptr, kTileRows, matrix.cols};
  static thread_local std::vector<std::byte> memory;
  memory.resize(shape.tile_bytes() + 64);
  std::byte* const tile = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  float computed[kTileRows];
  fetch(0);
  for (std::int64_t first = 0; first < count; first += kTileRows) {
    fetch(first + kTileRows);
    const std::int64_t size = std::min(count - first, kTileRows);
    gather_tile(matrix, named + first, size, tile);
    compute_.kernels.tiles({tile, kTileRows, matrix.cols}, 0, 1, x, 1, computed, kTileRows);
    for (std::int64_t n = 0; n < size; ++n) logits[named[first + n]] = computed[n];
  }
}

// Rows [begin, end) of a matrix in rows; neighbours are computed together.
void Head::named_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const {
  const Matrix& matrix = weights_.head.stock;
  const float threshold = model_.head_predictor->threshold;
  float computed[kMostTogether];
  for (std::int64_t at = begin; at < end;) {
    if (!(logits[at] > threshold)) {
      logits[at++] = -std::numeric_limits<float>::infinity();
      continue;
    }
    std::int64_t stop = at + 1;
    while (stop < end && stop - at < kMostTogether && logits[stop] > threshold) ++stop;
    compute_.kernels.matmul(matrix, 0, at, stop, x, 1, computed, kMostTogether);
    std::copy_n(computed, stop - at, logits + at);
    at = stop;
  }
}

}  // namespace smallthinker
