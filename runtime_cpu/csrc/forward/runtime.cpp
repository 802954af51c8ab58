// The forward pass (the model's specification, docs/engine.md): NoPE or RoPE and windows per layer, a router
// that reads the raw residual stream, ReGLU experts.
#include "forward/runtime.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace smallthinker {
namespace {

constexpr std::int64_t kMostRows = 64;  // of a piece of work: its weights stay in the second cache
constexpr std::int64_t kLeastRows = 8;
constexpr std::int64_t kLeastTiles = 4;  // a short stream never gets up to speed
constexpr std::int64_t kMostTiles = 64;

bool any_quantised(const Model& model) {
  for (const Layer& layer : model.layers) {
    if (layer.router.quantised()) return true;
  }
  return false;
}

}  // namespace

KvType find_kv_type(const Model& model, const std::string& name) {
  if (name == "f32") return KvType::kF32;
  if (name == "f16") return KvType::kF16;
  if (name == "q8") return KvType::kQ8;
  if (name == "auto") return model.all_f32 ? KvType::kF32 : KvType::kF16;
  throw EngineError("kv_type is '" + name + "'; allowed are auto, f32, f16 and q8");
}

const char* name_of(KvType type) {
  switch (type) {
    case KvType::kF32:
      return "f32";
    case KvType::kF16:
      return "f16";
    case KvType::kQ8:
      return "q8";
  }
  throw std::logic_error("unknown type of keys and values");
}

namespace {

// Scores of a row: every position that a layer keeps, from the start of a tile to the end of one.
std::int64_t score_stride(const Hyperparameters& hyper, const KvLayout& layout) {
  std::int64_t most = 0;
  for (std::int64_t layer = 0; layer < hyper.layers; ++layer) most = std::max(most, layout.capacity(layer));
  return most + kKeyTile;
}

}  // namespace

std::size_t Scratch::lay_out(const Hyperparameters& hyper, const WeightPlan& weights, const KvLayout& layout,
                             int threads, std::int64_t chunk, std::byte* memory) {
  std::size_t used = 0;
  const auto take = [&]<typename T>(T*& pointer, std::int64_t count) {
    pointer = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
  };
  const auto take_activations = [&](ActivationBuffer& buffer, std::int64_t rows, std::int64_t cols,
                                    bool planes) {
    buffer.stride = round_up(cols, kActivationBlock);
    take(buffer.f32, rows * buffer.stride);
    take(buffer.q, rows * buffer.stride);
    take(buffer.scales, rows * buffer.stride / kActivationBlock);
    buffer.plane_bytes = planes ? Planes::row_bytes(cols) : 0;
    if (planes) take(buffer.planes, rows * static_cast<std::int64_t>(buffer.plane_bytes));
  };
  const std::int64_t per_token = hyper.experts_per_token;
  const std::int64_t all_slots = chunk * per_token;
  const std::int64_t query_size = hyper.heads * hyper.head_dim;
  const std::int64_t kv_size = hyper.kv_heads * hyper.head_dim;
  const std::int64_t groups = hyper.heads / hyper.kv_heads;
  const bool planes = weights.dense_bytes > 0 || weights.packed_experts;
  take_activations(x, chunk, hyper.hidden, planes);
  take_activations(normed, chunk, hyper.hidden, planes);
  take_activations(attended, chunk, query_size, planes);
  take(query, chunk * query_size);
  take(key, chunk * kv_size);
  take(value, chunk * kv_size);
  take(mixed, chunk * hyper.hidden);
  take(router_logits, chunk * hyper.experts);
  take(expert_weights, all_slots);
  if (weights.packed_experts) {
    const ExpertSlices slices(weights.expert);
    take(down, all_slots * weights.expert.padded());
    take(partial, kSplitSlots * slices.count * weights.expert.padded());
    take(thread_gates, threads * kTokenBlock * slices.neurons());
    take(thread_sums, threads * weights.expert.padded());
  } else {
    take_activations(hidden, all_slots, hyper.expert_hidden, false);
    take(up, all_slots * hidden.stride);
    take(down, all_slots * hyper.hidden);
  }
  take(cosines, chunk * (hyper.head_dim / 2));
  take(sines, chunk * (hyper.head_dim / 2));
  take(thread_scores, threads * groups * score_stride(hyper, layout));
  take(thread_totals, threads * groups);
  take(expert_ids, all_slots);
  take(slots, all_slots);
  take(slot_tokens, all_slots);
  take(expert_begin, hyper.experts + 1);
  if (weights.predictor_width > 0) take_activations(inner, 1, weights.predictor_width, planes);
  return used + 64;  // room to align the start
}

Plan make_plan(const Model& model, const RuntimeOptions& options) {
  const KvLayout layout(model.hyper, options.context, options.chunk, find_kv_type(model, options.kv_type));
  const WeightPlan weights(model, select_kernels(options.kernels), options.experts.cache_bytes > 0,
                           options.predict_head);
  Scratch scratch{};
  const bool can_offload = weights.packed_experts;
  return {weights.dense_bytes + weights.mapped_bytes + (can_offload ? 0 : weights.expert_bytes),
          can_offload ? weights.expert.bytes() : 0,
          can_offload ? ExpertStore::overhead_bytes(model) + ExpertForecast::bytes(model.hyper) : 0,
          layout.bytes(),
          layout.vector_bytes(),
          scratch.lay_out(model.hyper, weights, layout, options.threads, options.chunk, nullptr)};
}

Runtime::Runtime(std::shared_ptr<const Model> model, const RuntimeOptions& options)
    : model_(std::move(model)),
      kernels_(select_kernels(options.kernels)),
      layout_(model_->hyper, options.context, options.chunk, find_kv_type(*model_, options.kv_type)),
      chunk_(options.chunk),
      pool_(options.threads),
      weights_(model_, kernels_, pool_, options.experts, options.predict_head),
      quantise_router_input_(any_quantised(*model_)) {
  const Hyperparameters& hyper = model_->hyper;
  memory_.resize(scratch_.lay_out(hyper, weights_.plan, layout_, pool_.threads(), chunk_, nullptr));
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
  scratch_.lay_out(hyper, weights_.plan, layout_, pool_.threads(), chunk_,
                   memory_.data() + (64 - address % 64) % 64);
  if (options.speculate && weights_.experts != nullptr && weights_.experts->offloads()) {
    std::vector<const Linear*> routers;
    for (const LayerWeights& layer : weights_.layers) routers.push_back(&layer.router);
    forecast_ = std::make_unique<ExpertForecast>(hyper, routers);
  }
  // As the model was trained: frequencies and angles in fp32.
  for (std::int64_t i = 0; i < hyper.head_dim / 2; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(hyper.head_dim);
    inverse_frequencies_.push_back(
        static_cast<float>(std::pow(static_cast<double>(hyper.rope_theta), -exponent)));
  }
}

void Runtime::check_token(std::int32_t token) const {
  if (token < 0 || token >= model_->hyper.vocab) {
    throw EngineError("token " + std::to_string(token) + " is outside the vocabulary of " +
                      std::to_string(model_->hyper.vocab));
  }
}

void Runtime::read_cache_counters(const CacheCounters& earlier) {
  if (weights_.experts == nullptr) return;
  const CacheCounters now = weights_.experts->counters();
  counters_.cache_hits = now.hits + now.joined - earlier.hits - earlier.joined;
  counters_.cache_misses = now.misses - earlier.misses;
  counters_.bytes_read = now.bytes_read - earlier.bytes_read;
  counters_.waited_s = now.waited_s - earlier.waited_s;
}

void Runtime::forward(Session& session, std::span<const std::int32_t> tokens, float* logits,
                      std::int64_t logit_rows) {
  const std::lock_guard lock(mutex_);
  const auto count = static_cast<std::int64_t>(tokens.size());
  if (session.length() + count > layout_.context) {
    throw EngineError("the context of " + std::to_string(layout_.context) + " tokens is full");
  }
  for (const std::int32_t token : tokens) check_token(token);
  if (logit_rows < 0 || logit_rows > count) throw EngineError("there are more rows of logits than tokens");
  counters_.reset(model_->hyper);
  const CacheCounters earlier = weights_.experts != nullptr ? weights_.experts->counters() : CacheCounters{};
  const std::int64_t before = session.length();
  std::vector<BatchRow> rows;
  for (std::int64_t start = 0; start < count; start += chunk_) {
    const std::int64_t size = std::min(chunk_, count - start);
    rows.clear();
    for (std::int64_t i = 0; i < size; ++i) {
      rows.push_back({&session, tokens[static_cast<std::size_t>(start + i)], session.length() + i});
    }
    const std::int64_t wanted = std::clamp<std::int64_t>(start + size - (count - logit_rows), 0, size);
    session.append(tokens.data() + start, size);
    try {
      run_batch(rows, logits, wanted);
    } catch (...) {
      session.truncate(before);
      throw;
    }
    if (logits != nullptr) logits += wanted * model_->hyper.vocab;
  }
  read_cache_counters(earlier);
  session.counters.add(counters_);
}

void Runtime::decode(std::span<const Step> steps, float* logits) {
  const std::lock_guard lock(mutex_);
  if (steps.empty()) return;
  if (static_cast<std::int64_t>(steps.size()) > chunk_) {
    throw EngineError(std::to_string(steps.size()) + " sequences are too many for one step; at most " +
                      std::to_string(chunk_) + " tokens are computed together");
  }
  std::vector<BatchRow> rows;
  for (const Step& step : steps) {
    check_token(step.token);
    if (step.session->length() >= layout_.context) {
      throw EngineError("the context of " + std::to_string(layout_.context) + " tokens is full");
    }
    for (const BatchRow& row : rows) {
      if (row.session == step.session) throw EngineError("a sequence takes one step at a time");
    }
    rows.push_back({step.session, step.token, step.session->length()});
  }
  counters_.reset(model_->hyper);
  const CacheCounters earlier = weights_.experts != nullptr ? weights_.experts->counters() : CacheCounters{};
  for (const Step& step : steps) step.session->append(&step.token, 1);
  try {
    run_batch(rows, logits, static_cast<std::int64_t>(steps.size()));
  } catch (...) {
    for (const Step& step : steps) step.session->truncate(step.session->length() - 1);
    throw;
  }
  read_cache_counters(earlier);
  for (std::size_t i = 0; i < steps.size(); ++i)
    steps[i].session->counters.add(counters_.share(i, steps.size()));
}

Choice Runtime::sample(Sampler& sampler, std::span<const float> logits, std::int64_t top) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  return sampler.sample(logits, top, kernels_, lock.owns_lock() ? &pool_ : nullptr);
}

void Runtime::normalise(const ActivationBuffer& from, const std::vector<float>& weight, std::int64_t row) {
  const ActivationBuffer& to = scratch_.normed;
  kernels_.rms_norm(from.f32 + row * from.stride, weight.data(), model_->hyper.hidden,
                    model_->hyper.rms_epsilon, to.f32 + row * to.stride);
  quantise(to.from(row));
}

// The first row of a buffer to the forms in which kernels read it.
void Runtime::quantise(const ActivationBuffer& at) {
  kernels_.quantise(at.f32, at.stride, at.q, at.scales);
  if (at.plane_bytes > 0) kernels_.split_planes(at.q, at.scales, at.stride, at.planes);
}

void Runtime::add_tasks(const Matrix& matrix, std::int64_t expert, const Activations& x, std::int64_t tokens,
                        float* out, std::int64_t out_stride, std::int64_t first_slot) {
  const std::int64_t share = matrix.rows / (4 * static_cast<std::int64_t>(pool_.threads()));
  const std::int64_t rows = std::clamp(round_up(share, kLeastRows), kLeastRows, kMostRows);
  for (std::int64_t begin = 0; begin < matrix.rows; begin += rows) {
    const std::int64_t end = std::min(begin + rows, matrix.rows);
    tasks_.push_back(
        {&matrix, nullptr, expert, begin, end, x, tokens, out + begin, out_stride, first_slot, 0});
  }
}

void Runtime::add_tasks(const Linear& linear, const Activations& x, std::int64_t tokens, float* out,
                        std::int64_t out_stride) {
  if (!linear.tiled()) return add_tasks(linear.stock, 0, x, tokens, out, out_stride);
  const std::int64_t all = linear.tiles.tiles();
  const std::int64_t tiles = std::clamp<std::int64_t>(all / (4 * pool_.threads()), kLeastTiles, kMostTiles);
  for (std::int64_t begin = 0; begin < all; begin += tiles) {
    const std::int64_t end = std::min(begin + tiles, all);
    tasks_.push_back(
        {nullptr, &linear.tiles, 0, begin, end, x, tokens, out + begin * kTileRows, out_stride, 0, 0});
  }
}

void Runtime::run_matmuls() {
  pool_.run(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t piece, int) {
    const Task& task = tasks_[static_cast<std::size_t>(piece)];
    if (task.tiles != nullptr) {
      kernels_.tiles(*task.tiles, task.row_begin, task.row_end, task.x, task.tokens, task.out,
                     task.out_stride);
      return;
    }
    kernels_.matmul(*task.matrix, task.expert, task.row_begin, task.row_end, task.x, task.tokens, task.out,
                    task.out_stride);
  });
  tasks_.clear();
}

void Runtime::run_batch(std::span<const BatchRow> rows, float* logits, std::int64_t logit_rows) {
  const Hyperparameters& hyper = model_->hyper;
  const auto tokens = static_cast<std::int64_t>(rows.size());
  const std::int64_t pairs = hyper.head_dim / 2;
  for (std::int64_t i = 0; i < tokens; ++i)  // here, because it may throw
    weights_.embedding(rows[static_cast<std::size_t>(i)].token, scratch_.x.f32 + i * scratch_.x.stride);
  each_row(tokens, [&](std::int64_t i) {
    const BatchRow& row = rows[static_cast<std::size_t>(i)];
    for (std::int64_t j = 0; j < pairs; ++j) {
      const float angle =
          static_cast<float>(row.position) * inverse_frequencies_[static_cast<std::size_t>(j)];
      scratch_.cosines[i * pairs + j] = std::cos(angle);
      scratch_.sines[i * pairs + j] = std::sin(angle);
    }
  });
  for (std::int64_t layer = 0; layer < hyper.layers; ++layer) run_layer(layer, rows);
  if (logit_rows == 0) return;
  const std::int64_t first = tokens - logit_rows;
  each_row(logit_rows, [&](std::int64_t i) { normalise(scratch_.x, model_->output_norm, first + i); });
  if (weights_.plan.predictor_width == 0) return head(first, logit_rows, logits);
  for (std::int64_t i = 0; i < logit_rows; ++i) predicted_head(first + i, logits + i * hyper.vocab);
}

void Runtime::run_layer(std::int64_t index, std::span<const BatchRow> rows) {
  const Hyperparameters& hyper = model_->hyper;
  const Layer& layer = model_->layers[static_cast<std::size_t>(index)];
  const LayerWeights& weights = weights_.layers[static_cast<std::size_t>(index)];
  const auto tokens = static_cast<std::int64_t>(rows.size());
  const std::int64_t query_size = hyper.heads * hyper.head_dim;
  const std::int64_t kv_size = hyper.kv_heads * hyper.head_dim;
  const std::int64_t pairs = hyper.head_dim / 2;
  Scratch& s = scratch_;

  // The router reads the residual stream itself, before the norm and before attention: what it chooses can be
  // read from disk meanwhile, and what the next layers will choose can be guessed.
  const bool early = weights_.experts != nullptr && weights_.experts->offloads();
  const bool ahead = forecast_ != nullptr && tokens == 1;
  each_row(tokens, [&](std::int64_t i) {
    normalise(s.x, layer.attention_norm, i);
    if (quantise_router_input_ || ahead) quantise(s.x.from(i));
  });
  add_tasks(weights.router, s.x.view(), tokens, s.router_logits, hyper.experts);
  if (early) {
    if (ahead) ask_forecast(index);
    run_matmuls();
    route(tokens);
    request_experts(index, tokens);
    if (ahead) read_ahead(index);
  }
  add_tasks(weights.query, s.normed.view(), tokens, s.query, query_size);
  add_tasks(weights.key, s.normed.view(), tokens, s.key, kv_size);
  add_tasks(weights.value, s.normed.view(), tokens, s.value, kv_size);
  run_matmuls();

  each_row(tokens, [&](std::int64_t i) {
    if (hyper.rope[static_cast<std::size_t>(index)]) {
      const float* cosines = s.cosines + i * pairs;
      const float* sines = s.sines + i * pairs;
      for (std::int64_t h = 0; h < hyper.heads; ++h) {
        kernels_.rotate(s.query + i * query_size + h * hyper.head_dim, hyper.head_dim, cosines, sines);
      }
      for (std::int64_t h = 0; h < hyper.kv_heads; ++h) {
        kernels_.rotate(s.key + i * kv_size + h * hyper.head_dim, hyper.head_dim, cosines, sines);
      }
    }
    const BatchRow& row = rows[static_cast<std::size_t>(i)];
    row.session->store(index, row.position, s.key + i * kv_size, s.value + i * kv_size, kernels_);
  });
  if (!early) route(tokens);
  for (std::int64_t i = 0; i < tokens; ++i) {
    std::uint64_t* counts =
        rows[static_cast<std::size_t>(i)].session->counters.expert_counts.data() + index * hyper.experts;
    for (std::int64_t n = 0; n < hyper.experts_per_token; ++n) {
      ++counts[s.expert_ids[i * hyper.experts_per_token + n]];
    }
  }

  // As few pieces as keep all threads busy: the query heads of a piece share what it reads.
  const std::int64_t groups = hyper.heads / hyper.kv_heads;
  const std::int64_t parts = std::min<std::int64_t>(
      groups, (pool_.threads() + tokens * hyper.kv_heads - 1) / (tokens * hyper.kv_heads));
  pool_.run(tokens * hyper.kv_heads * parts, [&](std::int64_t piece, int thread) {
    const std::int64_t i = piece / (hyper.kv_heads * parts);
    const std::int64_t part = piece % parts;
    const std::int64_t first = part * groups / parts;
    attend(index, rows[static_cast<std::size_t>(i)], i, piece / parts % hyper.kv_heads, first,
           (part + 1) * groups / parts - first, thread);
  });
  if (weights.output.quantised()) {
    each_row(tokens, [&](std::int64_t i) { quantise(s.attended.from(i)); });
  }
  add_tasks(weights.output, s.attended.view(), tokens, s.mixed, hyper.hidden);
  run_matmuls();

  each_row(tokens, [&](std::int64_t i) {
    kernels_.add_scaled(s.x.f32 + i * s.x.stride, s.mixed + i * hyper.hidden, hyper.hidden, 1.0F);
    normalise(s.x, layer.ffn_norm, i);
  });
  if (weights_.plan.packed_experts) {
    packed_experts(index, tokens);
  } else {
    experts(index, tokens);
  }
}

// One token, one key head and some of the query heads that share it.
void Runtime::attend(std::int64_t layer, const BatchRow& row, std::int64_t batch_index, std::int64_t kv_head,
                     std::int64_t first, std::int64_t groups, int thread) {
  const Hyperparameters& hyper = model_->hyper;
  const std::int64_t dim = hyper.head_dim;
  const std::int64_t head = kv_head * (hyper.heads / hyper.kv_heads) + first;
  const float* query = scratch_.query + (batch_index * hyper.heads + head) * dim;
  float* out = scratch_.attended.f32 + batch_index * scratch_.attended.stride + head * dim;
  const std::int64_t end = row.position + 1;
  // A window of w: the token itself and the w - 1 before it.
  const bool windowed = hyper.windowed[static_cast<std::size_t>(layer)];
  const std::int64_t begin = windowed ? std::max<std::int64_t>(0, end - hyper.window) : 0;
  const std::int64_t origin = begin / kKeyTile * kKeyTile;  // position of scores[0]
  const std::int64_t stride = score_stride(hyper, layout_);
  float* scores = scratch_.thread_scores + thread * (hyper.heads / hyper.kv_heads) * stride;
  float* totals = scratch_.thread_totals + thread * (hyper.heads / hyper.kv_heads);
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const Session& session = *row.session;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t stop = session.contiguous(layer, at, end);
    kernels_.attention_scores(query, groups, dim, session.keys(layer, kv_head, at, stop), scale,
                              scores + (at / kKeyTile * kKeyTile - origin), stride);
    at = stop;
  }
  float* const weights = scores + (begin - origin);
  std::fill_n(out, groups * dim, 0.0F);
  for (std::int64_t g = 0; g < groups; ++g) {
    float* run = weights + g * stride;
    totals[g] = kernels_.exp_sum(run, end - begin, greatest(run, end - begin));
  }
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t stop = session.contiguous(layer, at, end);
    kernels_.attention_values(weights + (at - begin), stride, groups, dim,
                              session.values(layer, kv_head, at, stop), out);
    at = stop;
  }
  // The values' sum instead of every weight.
  for (std::int64_t g = 0; g < groups; ++g) kernels_.scale(out + g * dim, dim, 1.0F / totals[g]);
}

float Runtime::greatest(const float* x, std::int64_t size) const {
  constexpr std::int64_t kRuns = 64;
  float maxima[kRuns];
  float best = -std::numeric_limits<float>::infinity();
  for (std::int64_t begin = 0; begin < size; begin += kRuns * kLogitRun) {
    const std::int64_t count = std::min(size - begin, kRuns * kLogitRun);
    kernels_.run_maxima(x + begin, count, maxima);
    best = std::max(best, *std::max_element(maxima, maxima + (count + kLogitRun - 1) / kLogitRun));
  }
  return best;
}

// Choose the k greatest logits of every token (the lower index among equals), weight them, and sort the
// (token, expert) pairs by expert. Scores are taken over the chosen logits only.
void Runtime::route(std::int64_t tokens) {
  const Hyperparameters& hyper = model_->hyper;
  const std::int64_t k = hyper.experts_per_token;
  std::fill_n(scratch_.expert_begin, hyper.experts + 1, 0);
  for (std::int64_t i = 0; i < tokens; ++i) {
    const float* logits = scratch_.router_logits + i * hyper.experts;
    std::int32_t* ids = scratch_.expert_ids + i * k;
    float* weights = scratch_.expert_weights + i * k;
    for (std::int64_t n = 0; n < k; ++n) {
      std::int32_t best = -1;
      for (std::int32_t e = 0; e < hyper.experts; ++e) {
        const bool taken = std::find(ids, ids + n, e) != ids + n;
        if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
      }
      ids[n] = best;
    }
    const float greatest = logits[ids[0]];
    std::sort(ids, ids + k);
    double sum = 0.0;
    for (std::int64_t n = 0; n < k; ++n) {
      const double logit = static_cast<double>(logits[ids[n]]);
      const double score = hyper.router == Router::kSoftmax ? std::exp(logit - static_cast<double>(greatest))
                                                            : 1.0 / (1.0 + std::exp(-logit));
      weights[n] = static_cast<float>(score);
      sum += score;
    }
    sum = std::max(sum, std::numeric_limits<double>::min());
    for (std::int64_t n = 0; n < k; ++n) {
      weights[n] = static_cast<float>(static_cast<double>(weights[n]) / sum);
      ++scratch_.expert_begin[ids[n] + 1];
    }
  }
  for (std::int64_t e = 0; e < hyper.experts; ++e) scratch_.expert_begin[e + 1] += scratch_.expert_begin[e];
  std::vector<std::int32_t> next(scratch_.expert_begin, scratch_.expert_begin + hyper.experts);
  for (std::int64_t i = 0; i < tokens * k; ++i) {
    const std::int32_t slot = next[static_cast<std::size_t>(scratch_.expert_ids[i])]++;
    scratch_.slots[i] = slot;
    scratch_.slot_tokens[slot] = static_cast<std::int32_t>(i / k);
  }
}

}  // namespace smallthinker
