#include "forward/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace smallthinker {

Attention::Attention(const Hyperparameters& hyper, const KvLayout& layout, Compute& compute,
                     const Scratch& scratch)
    : hyper_(hyper), compute_(compute), scratch_(scratch), score_stride_(layout.score_stride()) {
  // As the model was trained: frequencies and angles in fp32.
  for (std::int64_t i = 0; i < hyper.head_dim / 2; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(hyper.head_dim);
    inverse_frequencies_.push_back(
        static_cast<float>(std::pow(static_cast<double>(hyper.rope_theta), -exponent)));
  }
}

void Attention::set_positions(std::span<const BatchRow> rows) const {
  const std::int64_t pairs = hyper_.head_dim / 2;
  compute_.each_row(static_cast<std::int64_t>(rows.size()), [&](std::int64_t i) {
    const auto position = static_cast<float>(rows[static_cast<std::size_t>(i)].position);
    for (std::int64_t j = 0; j < pairs; ++j) {
      const float angle = position * inverse_frequencies_[static_cast<std::size_t>(j)];
      scratch_.cosines[i * pairs + j] = std::cos(angle);
      scratch_.sines[i * pairs + j] = std::sin(angle);
    }
  });
}

void Attention::add_projections(const LayerWeights& weights, std::int64_t tokens, Products& products) const {
  const Scratch& s = scratch_;
  products.add(weights.query, s.normed.view(), tokens, s.query, query_size());
  products.add(weights.key, s.normed.view(), tokens, s.key, kv_size());
  products.add(weights.value, s.normed.view(), tokens, s.value, kv_size());
}

const float* Attention::run(std::int64_t layer, const LayerWeights& weights, std::span<const BatchRow> rows,
                            Products& products) const {
  const auto tokens = static_cast<std::int64_t>(rows.size());
  const Scratch& s = scratch_;
  compute_.each_row(tokens,
                    [&](std::int64_t i) { rotate_and_store(layer, rows[static_cast<std::size_t>(i)], i); });

  // As few pieces as keep all threads busy: the query heads of a piece share what it reads.
  const std::int64_t kv_heads = hyper_.kv_heads;
  const std::int64_t parts = std::min<std::int64_t>(
      groups(), (compute_.pool.threads() + tokens * kv_heads - 1) / (tokens * kv_heads));
  compute_.pool.run(tokens * kv_heads * parts, [&](std::int64_t piece, int thread) {
    const std::int64_t i = piece / (kv_heads * parts);
    const std::int64_t part = piece % parts;
    const std::int64_t first = part * groups() / parts;
    attend(layer, rows[static_cast<std::size_t>(i)], i, piece / parts % kv_heads, first,
           (part + 1) * groups() / parts - first, thread);
  });

  if (weights.output.quantised()) {
    compute_.each_row(tokens, [&](std::int64_t i) { compute_.quantise(s.attended.from(i)); });
  }
  products.add(weights.output, s.attended.view(), tokens, s.mixed, hyper_.hidden);
  products.run();
  return s.mixed;
}

void Attention::rotate_and_store(std::int64_t layer, const BatchRow& row, std::int64_t batch_index) const {
  const std::int64_t dim = hyper_.head_dim;
  float* const query = scratch_.query + batch_index * query_size();
  float* const key = scratch_.key + batch_index * kv_size();
  const float* const value = scratch_.value + batch_index * kv_size();
  if (hyper_.rope[static_cast<std::size_t>(layer)]) {
    const float* cosines = scratch_.cosines + batch_index * (dim / 2);
    const float* sines = scratch_.sines + batch_index * (dim / 2);
    for (std::int64_t h = 0; h < hyper_.heads; ++h)
      compute_.kernels.rotate(query + h * dim, dim, cosines, sines);
    for (std::int64_t h = 0; h < hyper_.kv_heads; ++h)
      compute_.kernels.rotate(key + h * dim, dim, cosines, sines);
  }
  row.session->store(layer, row.position, key, value, compute_.kernels);
}

// One token, one key head and `groups` of the query heads that share it, from `first` on.
void Attention::attend(std::int64_t layer, const BatchRow& row, std::int64_t batch_index,
                       std::int64_t kv_head, std::int64_t first, std::int64_t groups, int thread) const {
  const Kernels& kernels = compute_.kernels;
  const std::int64_t dim = hyper_.head_dim;
  const std::int64_t shared = hyper_.heads / hyper_.kv_heads;
  const std::int64_t head = kv_head * shared + first;
  const float* query = scratch_.query + (batch_index * hyper_.heads + head) * dim;
  float* out = scratch_.attended.f32 + batch_index * scratch_.attended.stride + head * dim;
  const std::int64_t end = row.position + 1;
  // A window of w: the token itself and the w - 1 before it.
  const bool windowed = hyper_.windowed[static_cast<std::size_t>(layer)];
  const std::int64_t begin = windowed ? std::max<std::int64_t>(0, end - hyper_.window) : 0;
  const std::int64_t origin = begin / kKeyTile * kKeyTile;  // position of scores[0]
  const std::int64_t stride = score_stride_;
  float* scores = scratch_.thread_scores + thread * shared * stride;
  float* totals = scratch_.thread_totals + thread * shared;
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const Session& session = *row.session;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t stop = session.contiguous(layer, at, end);
    kernels.attention_scores(query, groups, dim, session.keys(layer, kv_head, at, stop), scale,
                             scores + (at / kKeyTile * kKeyTile - origin), stride);
    at = stop;
  }
  float* const weights = scores + (begin - origin);
  std::fill_n(out, groups * dim, 0.0F);
  for (std::int64_t g = 0; g < groups; ++g) {
    float* run = weights + g * stride;
    totals[g] = kernels.exp_sum(run, end - begin, greatest(run, end - begin));
  }
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t stop = session.contiguous(layer, at, end);
    kernels.attention_values(weights + (at - begin), stride, groups, dim,
                             session.values(layer, kv_head, at, stop), out);
    at = stop;
  }
  // The softmax's division, of the weighted sum of the values instead of every weight.
  for (std::int64_t g = 0; g < groups; ++g) kernels.scale(out + g * dim, dim, 1.0F / totals[g]);
}

float Attention::greatest(const float* x, std::int64_t size) const {  // x [size]
  constexpr std::int64_t kRuns = 64;
  float maxima[kRuns];
  float best = -std::numeric_limits<float>::infinity();
  for (std::int64_t begin = 0; begin < size; begin += kRuns * kLogitRun) {
    const std::int64_t count = std::min(size - begin, kRuns * kLogitRun);
    compute_.kernels.run_maxima(x + begin, count, maxima);
    best = std::max(best, *std::max_element(maxima, maxima + (count + kLogitRun - 1) / kLogitRun));
  }
  return best;
}

}  // namespace smallthinker
