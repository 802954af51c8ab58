// The output matrix: whole, or only the rows that a predictor names (the paper's section on the head; the
// authors' engine sets the others to 0, which is a middling logit; here they are minus infinity).
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "forward/runtime.hpp"

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
  if (head_rows_ == HeadRows::kScores) return;

  const float threshold = model_->head_predictor->threshold;
  const std::int64_t pieces = (vocab + kRowsPerPiece - 1) / kRowsPerPiece;
  std::atomic<std::int64_t> named{0};
  pool_.run(pieces, [&](std::int64_t piece, int) {
    const float* begin = logits + piece * kRowsPerPiece;
    const float* end = logits + std::min(vocab, (piece + 1) * kRowsPerPiece);
    named += std::count_if(begin, end, [&](float score) { return score > threshold; });
  });
  const bool all = head_rows_ == HeadRows::kAll;
  if (all || named < std::min(kLeastHeadRows, vocab)) {
    counters_.head_fallbacks += all ? 0U : 1U;
    if (weights_.head_rows.data == nullptr) return head(row, 1, logits);
    std::fill_n(logits, vocab, std::numeric_limits<float>::infinity());  // every row is named
    named = vocab;
  }
  counters_.head_rows += static_cast<std::uint64_t>(vocab);
  counters_.head_rows_computed += static_cast<std::uint64_t>(named.load());
  pool_.run(pieces, [&](std::int64_t piece, int) {
    const auto compute = weights_.head_rows.data != nullptr ? &Runtime::scattered_rows : &Runtime::named_rows;
    (this->*compute)(piece * kRowsPerPiece, std::min(vocab, (piece + 1) * kRowsPerPiece), x.view(), logits);
  });
}

// Rows [begin, end). The named ones are gathered, sixteen to a tile: only they are read, and the tile kernel
// gives them the exact head's bits.
void Runtime::scattered_rows(std::int64_t begin, std::int64_t end, const Activations& x,
                             float* logits) const {
  const Matrix& matrix = weights_.head_rows;
  const float threshold = model_->head_predictor->threshold;
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
  // Aligned as the kernels' streams are, and as long as a thread lives: a row can be any number of columns.
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
    kernels_.tiles({tile, kTileRows, matrix.cols}, 0, 1, x, 1, computed, kTileRows);
    for (std::int64_t n = 0; n < size; ++n) logits[named[first + n]] = computed[n];
  }
}

// Rows [begin, end) of a matrix in rows; neighbours are computed together.
void Runtime::named_rows(std::int64_t begin, std::int64_t end, const Activations& x, float* logits) const {
  const Matrix& matrix = weights_.head.stock;
  const float threshold = model_->head_predictor->threshold;
  float computed[kMostTogether];
  for (std::int64_t at = begin; at < end;) {
    if (!(logits[at] > threshold)) {
      logits[at++] = -std::numeric_limits<float>::infinity();
      continue;
    }
    std::int64_t stop = at + 1;
    while (stop < end && stop - at < kMostTogether && logits[stop] > threshold) ++stop;
    kernels_.matmul(matrix, 0, at, stop, x, 1, computed, kMostTogether);
    std::copy_n(computed, stop - at, logits + at);
    at = stop;
  }
}

}  // namespace smallthinker
