// The output matrix: whole, or only the rows that a predictor names (the paper's section on the head; the
// authors' engine sets the others to 0, which is a middling logit; here they are minus infinity).
#include <algorithm>
#include <atomic>
#include <limits>

#include "runtime.hpp"

namespace smallthinker {
namespace {

constexpr std::int64_t kRowsPerPiece = 1024;
constexpr std::int64_t kMostTogether = 256;  // rows of one call

}  // namespace

void Runtime::head(std::int64_t first, std::int64_t rows, float* logits) {
  const auto vocab = static_cast<std::uint64_t>(model_->hyper.vocab);
  counters_.head_rows += vocab * static_cast<std::uint64_t>(rows);
  counters_.head_rows_computed += vocab * static_cast<std::uint64_t>(rows);
  add_tasks(weights_.head, scratch_.normed.from(first).view(), rows, logits, model_->hyper.vocab);
  run_matmuls();
}

// Scores go where the logits will be, and each row's logit takes the place of its own score.
void Runtime::predicted_head(std::int64_t row, float* logits) {
  const std::int64_t vocab = model_->hyper.vocab;
  const ActivationBuffer x = scratch_.normed.from(row);
  add_tasks(weights_.predictor_down, x.view(), 1, scratch_.inner.f32, scratch_.inner.stride);
  run_matmuls();
  quantise(scratch_.inner);
  add_tasks(weights_.predictor_up, scratch_.inner.view(), 1, logits, vocab);
  run_matmuls();

  const float threshold = model_->head_predictor->threshold;
  const std::int64_t pieces = (vocab + kRowsPerPiece - 1) / kRowsPerPiece;
  std::atomic<std::int64_t> named{0};
  pool_.run(pieces, [&](std::int64_t piece, int) {
    const float* begin = logits + piece * kRowsPerPiece;
    const float* end = logits + std::min(vocab, (piece + 1) * kRowsPerPiece);
    named += std::count_if(begin, end, [&](float score) { return score > threshold; });
  });
  if (named < std::min(kLeastHeadRows, vocab)) {
    ++counters_.head_fallbacks;
    return head(row, 1, logits);
  }
  counters_.head_rows += static_cast<std::uint64_t>(vocab);
  counters_.head_rows_computed += static_cast<std::uint64_t>(named.load());
  pool_.run(pieces, [&](std::int64_t piece, int) {
    named_rows(piece * kRowsPerPiece, std::min(vocab, (piece + 1) * kRowsPerPiece), x.view(), logits);
  });
}

// Rows [begin, end), of which begin starts a tile. Neighbours are computed together; of tiles, all rows are
// read when one is named, and the others' results dropped.
void Runtime::named_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const {
  const Linear& matrix = weights_.head;
  const float threshold = model_->head_predictor->threshold;
  const std::int64_t unit = matrix.tiled() ? kTileRows : 1;
  const auto named = [&](std::int64_t first) {
    return std::any_of(logits + first, logits + std::min(end, first + unit),
                       [&](float score) { return score > threshold; });
  };
  float computed[kMostTogether];
  for (std::int64_t at = begin; at < end;) {
    if (!named(at)) {
      std::fill(logits + at, logits + std::min(end, at + unit), -std::numeric_limits<float>::infinity());
      at += unit;
      continue;
    }
    std::int64_t stop = at + unit;
    while (stop < end && stop - at < kMostTogether && named(stop)) stop += unit;
    if (matrix.tiled()) {
      kernels_.tiles(matrix.tiles, at / kTileRows, stop / kTileRows, x, 1, computed, kMostTogether);
    } else {
      kernels_.matmul(matrix.stock, 0, at, stop, x, 1, computed, kMostTogether);
    }
    for (std::int64_t i = at; i < std::min(end, stop); ++i) {
      logits[i] = logits[i] > threshold ? computed[i - at] : -std::numeric_limits<float>::infinity();
    }
    at = stop;
  }
}

}  // namespace smallthinker
