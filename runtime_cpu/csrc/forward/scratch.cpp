#include "forward/scratch.hpp"

#include "forward/expert_pass.hpp"
#include "forward/router.hpp"

namespace smallthinker {

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
  const std::int64_t rooms = Router::rooms(hyper);
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
  take(router_logits, rooms * chunk * hyper.experts);
  take(expert_weights, rooms * all_slots);
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
  take(thread_scores, threads * groups * layout.score_stride());
  take(thread_totals, threads * groups);
  take(expert_ids, rooms * all_slots);
  take(slots, rooms * all_slots);
  take(slot_tokens, rooms * all_slots);
  take(expert_begin, rooms * (hyper.experts + 1));
  if (weights.predictor_width > 0) take_activations(inner, 1, weights.predictor_width, planes);
  return used + 64;  // room to align the start
}

}  // namespace smallthinker
