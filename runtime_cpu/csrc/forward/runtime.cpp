#include "forward/runtime.hpp"

#include <algorithm>

namespace smallthinker {
namespace {

// What the experts' cache did between two readings.
void add_cache_counters(const CacheCounters& before, const CacheCounters& after, Counters& counters) {
  counters.cache_hits += after.hits + after.joined - before.hits - before.joined;
  counters.cache_misses += after.misses - before.misses;
  counters.bytes_read += after.bytes_read - before.bytes_read;
  counters.waited_s += after.waited_s - before.waited_s;
}

void count_experts(std::int64_t layer, std::span<const BatchRow> rows, const Routing& routing) {
  for (std::int64_t i = 0; i < routing.tokens; ++i) {
    Counters& counters = rows[static_cast<std::size_t>(i)].session->counters;
    for (const std::int32_t expert : routing.experts_of(i))
      ++counters.expert_counts[static_cast<std::size_t>(layer * routing.experts + expert)];
  }
}

}  // namespace

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
      layout_(model_->hyper, options.context, options.chunk, find_kv_type(*model_, options.kv_type)),
      chunk_(options.chunk),
      compute_(select_kernels(options.kernels), options.threads),
      weights_(model_, compute_.kernels, compute_.pool, options.experts, options.predict_head),
      scratch_{},
      products_(compute_),
      router_(model_->hyper, scratch_, chunk_),
      routings_(static_cast<std::size_t>(Router::rooms(model_->hyper))),
      attention_(model_->hyper, layout_, compute_, scratch_),
      expert_pass_(*model_, weights_, compute_, scratch_),
      head_(*model_, weights_, compute_, scratch_) {
  const auto lay_out = [&](std::byte* memory) {
    return scratch_.lay_out(model_->hyper, weights_.plan, layout_, threads(), chunk_, memory);
  };
  memory_.resize(lay_out(nullptr));
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
  lay_out(memory_.data() + (64 - address % 64) % 64);
  if (weights_.experts != nullptr) expert_reads_.emplace(model_->hyper, weights_, options.speculate);
}

void Runtime::check_token(std::int32_t token) const {
  if (token < 0 || token >= model_->hyper.vocab) {
    throw EngineError("token " + std::to_string(token) + " is outside the vocabulary of " +
                      std::to_string(model_->hyper.vocab));
  }
}

CacheCounters Runtime::cache_counters() const {
  return weights_.experts != nullptr ? weights_.experts->counters() : CacheCounters{};
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
  Counters counters = Counters::of_pass(model_->hyper);
  const CacheCounters earlier = cache_counters();
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
      run_batch(rows, logits, wanted, counters);
    } catch (...) {
      session.truncate(before);
      throw;
    }
    if (logits != nullptr) logits += wanted * model_->hyper.vocab;
  }
  add_cache_counters(earlier, cache_counters(), counters);
  session.counters.add(counters);
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
  Counters counters = Counters::of_pass(model_->hyper);
  const CacheCounters earlier = cache_counters();
  for (const Step& step : steps) step.session->append(&step.token, 1);
  try {
    run_batch(rows, logits, static_cast<std::int64_t>(steps.size()), counters);
  } catch (...) {
    for (const Step& step : steps) step.session->truncate(step.session->length() - 1);
    throw;
  }
  add_cache_counters(earlier, cache_counters(), counters);
  for (std::size_t i = 0; i < steps.size(); ++i)
    steps[i].session->counters.add(counters.share(i, steps.size()));
}

void Runtime::run_batch(std::span<const BatchRow> rows, float* logits, std::int64_t logit_rows,
                        Counters& counters) {
  embed(rows);
  attention_.set_positions(rows);
  for (std::int64_t layer = 0; layer < model_->hyper.layers; ++layer) {
    const NeuronCounts neurons = run_layer(layer, rows);
    counters.neurons[static_cast<std::size_t>(layer)] += neurons.computed;
    counters.active_neurons[static_cast<std::size_t>(layer)] += neurons.active;
  }
  if (logit_rows == 0) return;
  const std::int64_t first = static_cast<std::int64_t>(rows.size()) - logit_rows;
  compute_.each_row(logit_rows, [&](std::int64_t i) { normalise(model_->output_norm, first + i); });
  const HeadCounts head = head_.run(first, logit_rows, head_rows_, logits, products_);
  counters.head_rows += head.rows;
  counters.head_rows_computed += head.computed;
  counters.head_fallbacks += head.fallbacks;
}

// By this thread alone, because reading a row may throw.
void Runtime::embed(std::span<const BatchRow> rows) const {
  float* x = scratch_.x.f32;
  for (const BatchRow& row : rows) {
    weights_.embedding(row.token, x);
    x += scratch_.x.stride;
  }
}

NeuronCounts Runtime::run_layer(std::int64_t index, std::span<const BatchRow> rows) {
  const Layer& layer = model_->layers[static_cast<std::size_t>(index)];
  const LayerWeights& weights = weights_.layers[static_cast<std::size_t>(index)];
  const auto tokens = static_cast<std::int64_t>(rows.size());
  const Scratch& s = scratch_;
  const bool offloads = weights_.experts != nullptr && weights_.experts->offloads();
  const Router::Layers reading = router_.reading(index);
  const bool forecasts = expert_reads_ && expert_reads_->forecasts(tokens) && reading.last > reading.first;

  compute_.each_row(tokens, [&](std::int64_t i) {
    normalise(layer.attention_norm, i);
    if (weights.router.quantised() || forecasts) compute_.quantise(s.x.from(i));
  });

  // The router reads the residual stream itself, before the norm and before attention; with a lead it is that
  // of a later layer. With experts on disk it goes first, so that they are read during attention; else its
  // product shares a step with the projections.
  const auto choose = [&] {
    for (std::int64_t later = reading.first; later < reading.last; ++later)
      routing_of(later) = router_.choose(later, tokens);
  };
  const Routing& routing = routing_of(index);
  ExpertDemand demand;
  for (std::int64_t later = reading.first; later < reading.last; ++later)
    router_.add_product(later, weights_.layers[static_cast<std::size_t>(later)].router, tokens, products_);
  if (offloads) {
    const std::int64_t latest = reading.last - 1;
    if (forecasts) expert_reads_->add_forecast(latest, s.x.view(), products_);
    products_.run();
    choose();
    demand = expert_reads_->request(index, routing);
    for (std::int64_t next = index + 1;
         next < std::min(index + static_cast<std::int64_t>(routings_.size()), model_->hyper.layers); ++next)
      expert_reads_->read_known(next, routing_of(next));
    if (forecasts) expert_reads_->read_ahead(latest, routing_of(latest));
  }
  attention_.add_projections(weights, tokens, products_);
  products_.run();
  if (!offloads) {
    choose();
    if (expert_reads_) demand = expert_reads_->request(index, routing);
  }
  count_experts(index, rows, routing);

  const float* attended = attention_.run(index, weights, rows, products_);
  const std::int64_t hidden = model_->hyper.hidden;
  compute_.each_row(tokens, [&](std::int64_t i) {
    compute_.kernels.add_scaled(s.x.f32 + i * s.x.stride, attended + i * hidden, hidden, 1.0F);
    normalise(layer.ffn_norm, i);
  });

  return weights_.plan.packed_experts ? expert_pass_.run(index, routing, demand)
                                      : expert_pass_.run(index, routing, products_);
}

// A row of the residual stream, normed and in every form in which kernels read it.
void Runtime::normalise(const std::vector<float>& weight, std::int64_t row) const {
  const ActivationBuffer to = scratch_.normed.from(row);
  compute_.kernels.rms_norm(scratch_.x.f32 + row * scratch_.x.stride, weight.data(), model_->hyper.hidden,
                            model_->hyper.rms_epsilon, to.f32);
  compute_.quantise(to);
}

Choice Runtime::sample(Sampler& sampler, std::span<const float> logits, std::int64_t top) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  return sampler.sample(logits, top, compute_.kernels, lock.owns_lock() ? &compute_.pool : nullptr);
}

}  // namespace smallthinker
