// The experts of a layer: packed neurons that are skipped when silent, or stock rows.
//
// Sums have one order whatever the batch and the threads: the neurons of a slice, the slices of an expert,
// the experts of a token, each ascending.
#include <algorithm>
#include <utility>

#include "forward/runtime.hpp"

namespace smallthinker {

void Runtime::experts(std::int64_t index, std::int64_t tokens) {
  const Hyperparameters& hyper = model_->hyper;
  const Layer& layer = model_->layers[static_cast<std::size_t>(index)];
  const auto at = static_cast<std::size_t>(index);
  const std::int64_t k = hyper.experts_per_token;
  const std::int64_t all_slots = tokens * k;
  Scratch& s = scratch_;

  for (std::int64_t e = 0; e < hyper.experts; ++e) {
    const std::int64_t first = s.expert_begin[e];
    const std::int64_t count = s.expert_begin[e + 1] - first;
    if (count == 0) continue;
    add_tasks(layer.gate, e, s.normed.view(s.slot_tokens + first), count, s.hidden.from(first).f32,
              s.hidden.stride, first);
  }
  pool_.run(static_cast<std::int64_t>(tasks_.size()),
            [&](std::int64_t piece, int) { gate_and_up(layer, tasks_[static_cast<std::size_t>(piece)]); });
  for (const Task& task : tasks_) counters_.active_neurons[at] += task.active;
  counters_.neurons[at] += static_cast<std::uint64_t>(all_slots * hyper.expert_hidden);
  tasks_.clear();

  if (traits_of(layer.down.type).quantised) {
    each_row(all_slots, [&](std::int64_t slot) { quantise(s.hidden.from(slot)); });
  }
  for (std::int64_t e = 0; e < hyper.experts; ++e) {
    const std::int64_t first = s.expert_begin[e];
    const std::int64_t count = s.expert_begin[e + 1] - first;
    if (count == 0) continue;
    add_tasks(layer.down, e, s.hidden.from(first).view(), count, s.down + first * hyper.hidden, hyper.hidden);
  }
  run_matmuls();

  sum_experts(tokens, s.down, hyper.hidden);
}

// x += the weighted sum of every token's experts, in ascending order of the experts.
void Runtime::sum_experts(std::int64_t tokens, const float* down, std::int64_t stride) {
  const Hyperparameters& hyper = model_->hyper;
  const std::int64_t k = hyper.experts_per_token;
  Scratch& s = scratch_;
  each_row(tokens, [&](std::int64_t i) {
    float* sum = s.mixed + i * hyper.hidden;
    std::fill_n(sum, hyper.hidden, 0.0F);
    for (std::int64_t n = 0; n < k; ++n) {
      kernels_.add_scaled(sum, down + s.slots[i * k + n] * stride, hyper.hidden, s.expert_weights[i * k + n]);
    }
    kernels_.add_scaled(s.x.f32 + i * s.x.stride, sum, hyper.hidden, 1.0F);
  });
}

// relu(gate) * up for some neurons of one expert. With a single token the up rows of silent neurons are not
// read.
void Runtime::gate_and_up(const Layer& layer, Task& task) {
  kernels_.matmul(layer.gate, task.expert, task.row_begin, task.row_end, task.x, task.tokens, task.out,
                  task.out_stride);
  const std::int64_t rows = task.row_end - task.row_begin;
  float* up = scratch_.up + task.first_slot * scratch_.hidden.stride + task.row_begin;
  if (task.tokens == 1) {
    for (std::int64_t begin = 0; begin < rows;) {
      if (!(task.out[begin] > 0.0F)) {
        ++begin;
        continue;
      }
      std::int64_t end = begin + 1;
      while (end < rows && task.out[end] > 0.0F) ++end;
      kernels_.matmul(layer.up, task.expert, task.row_begin + begin, task.row_begin + end, task.x, 1,
                      up + begin, task.out_stride);
      begin = end;
    }
  } else {
    kernels_.matmul(layer.up, task.expert, task.row_begin, task.row_end, task.x, task.tokens, up,
                    task.out_stride);
  }
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    float* gate = task.out + t * task.out_stride;
    const float* other = up + t * task.out_stride;
    for (std::int64_t r = 0; r < rows; ++r) {
      const bool active = gate[r] > 0.0F;
      task.active += active ? 1U : 0U;
      gate[r] = active ? gate[r] * other[r] : 0.0F;
    }
  }
}

// Starts reading the experts of a wave when they are on disk.
void Runtime::request_wave(std::int64_t index, std::int64_t tokens) {
  uses_.clear();
  for (const std::int32_t e : wave_) {
    const std::int64_t first = scratch_.expert_begin[e];
    const auto count = static_cast<std::size_t>(scratch_.expert_begin[e + 1] - first);
    uses_.push_back({e, {scratch_.slot_tokens + first, count}});
  }
  weights_.experts->request(index, uses_, tokens);
}

// Which experts of the layer the batch needs.
void Runtime::request_experts(std::int64_t index, std::int64_t tokens) {
  ExpertStore& store = *weights_.experts;
  wave_.clear();
  for (std::int32_t e = 0; e < model_->hyper.experts; ++e) {
    if (scratch_.expert_begin[e + 1] > scratch_.expert_begin[e]) wave_.push_back(e);
  }
  requested_ = static_cast<std::int64_t>(wave_.size()) <= store.most_at_once();
  if (requested_) request_wave(index, tokens);
  // A prompt uses nearly all experts of every layer.
  if (requested_ && tokens * model_->hyper.experts_per_token >= 2 * model_->hyper.experts &&
      index + 1 < model_->hyper.layers) {
    store.speculate(index + 1, wave_);
  }
}

// The next layers' routers on the residual stream as it enters this one: read_ahead() takes what they say.
void Runtime::ask_forecast(std::int64_t index) {
  const std::int64_t last = std::min(index + ExpertForecast::kReach, model_->hyper.layers - 1);
  for (std::int64_t next = index + 1; next <= last; ++next) {
    const TileMatrix& router = forecast_->router(next);
    tasks_.push_back({nullptr, &router, 0, 0, router.tiles(), scratch_.x.view(), 1,
                      forecast_->logits(next - index), router.rows});
  }
}

// Begins to read guesses of the next layers, the nearest first. What is read in vain costs nothing on a disk
// that would do nothing, and on a busy one as much time as a right guess saves.
void Runtime::read_ahead(std::int64_t index) {
  constexpr double kWorthIdle = 0.45;
  constexpr double kWorthBusy = 0.9;
  const Hyperparameters& hyper = model_->hyper;
  ExpertStore& store = *weights_.experts;
  forecast_->learn(index, {scratch_.expert_ids, static_cast<std::size_t>(hyper.experts_per_token)});
  const std::int64_t reach = std::min(ExpertForecast::kReach, hyper.layers - 1 - index);
  for (std::int64_t distance = 1; distance <= reach; ++distance) {
    const std::int64_t next = index + distance;
    const auto in_memory = [&](std::int32_t expert) { return store.in_memory(next, expert); };
    for (const ExpertGuess& guess : forecast_->lacking(index, distance, in_memory)) {
      if (guess.worth >= (store.idle() ? kWorthIdle : kWorthBusy)) store.speculate(next, {&guess.expert, 1});
    }
  }
}

void Runtime::packed_experts(std::int64_t index, std::int64_t tokens) {
  const Hyperparameters& hyper = model_->hyper;
  ExpertStore& store = *weights_.experts;
  const auto at = static_cast<std::size_t>(index);
  const std::int64_t slots = tokens * hyper.experts_per_token;
  counters_.neurons[at] += static_cast<std::uint64_t>(slots * hyper.expert_hidden);
  if (!store.offloads()) request_experts(index, tokens);
  // More experts than the cache has room for come in waves.
  const std::vector<std::int32_t> all = wave_;
  const auto room = static_cast<std::size_t>(store.most_at_once());
  for (std::size_t begin = 0; begin < all.size(); begin += room) {
    const std::size_t end = std::min(begin + room, all.size());
    wave_.assign(all.begin() + static_cast<std::ptrdiff_t>(begin),
                 all.begin() + static_cast<std::ptrdiff_t>(end));
    if (!requested_) request_wave(index, tokens);
    // Pieces are claimed from the back: experts that are there come first, then the others as their reads
    // end.
    std::reverse(wave_.begin(), wave_.end());
    std::stable_partition(wave_.begin(), wave_.end(), [&](std::int32_t e) { return !store.ready(index, e); });
    if (slots <= kSplitSlots) {
      split_slots(index);
    } else {
      token_blocks(index);
    }
    for (const Task& task : tasks_) counters_.active_neurons[at] += task.active;
    tasks_.clear();
    store.release(index);
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));
  }
  sum_experts(tokens, scratch_.down, weights_.plan.expert.padded());
}

// Weights that cannot be had end this batch; the workers themselves must not throw.
template <typename Work>
void Runtime::run_packed(const Work& work) {
  pool_.run(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t piece, int thread) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      work(tasks_[static_cast<std::size_t>(piece)], thread);
    } catch (const EngineError&) {
      const std::lock_guard lock(failure_mutex_);
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  });
}

// Few (token, expert) pairs: every slice of every pair is a piece of work.
void Runtime::split_slots(std::int64_t layer) {
  Scratch& s = scratch_;
  const ExpertShape& shape = weights_.plan.expert;
  const ExpertSlices slices(shape);
  const std::int64_t padded = shape.padded();
  for (const std::int32_t e : wave_) {
    for (std::int64_t slot = s.expert_begin[e]; slot < s.expert_begin[e + 1]; ++slot) {
      for (std::int64_t slice = 0; slice < slices.count; ++slice) {
        Task task{};
        task.expert = e;
        task.row_begin = slice;
        task.first_slot = slot;
        tasks_.push_back(task);
      }
    }
  }
  run_packed([&](Task& task, int thread) {
    const Activations x = s.normed.view(s.slot_tokens + task.first_slot);
    float* gates = s.thread_gates + thread * kTokenBlock * slices.neurons();
    float* out = s.partial + (task.first_slot * slices.count + task.row_begin) * padded;
    std::fill_n(out, padded, 0.0F);
    const std::int64_t begin = slices.begin(task.row_begin);
    const std::int64_t end = slices.end(task.row_begin);
    const std::byte* gate = weights_.experts->gate(layer, task.expert);
    kernels_.tiles(shape.gate(gate), 2 * begin, 2 * end, x, 1, gates, 0);
    const std::byte* expert = weights_.experts->whole(layer, task.expert);
    task.active = static_cast<std::uint64_t>(kernels_.neurons(shape, expert, begin, end, gates, x, 0, out));
  });
  if (failed_.load()) return;
  for (const std::int32_t e : wave_) {
    const std::int64_t first = s.expert_begin[e];
    each_row(s.expert_begin[e + 1] - first, [&](std::int64_t i) {
      float* sum = s.down + (first + i) * padded;
      const float* part = s.partial + (first + i) * slices.count * padded;
      std::copy_n(part, padded, sum);
      for (std::int64_t slice = 1; slice < slices.count; ++slice) {
        kernels_.add_scaled(sum, part + slice * padded, padded, 1.0F);
      }
    });
  }
}

// Many pairs: a piece of work is an expert with some of its tokens; its weights stay in the cache from token
// to token.
void Runtime::token_blocks(std::int64_t layer) {
  Scratch& s = scratch_;
  const ExpertShape& shape = weights_.plan.expert;
  const ExpertSlices slices(shape);
  const std::int64_t padded = shape.padded();
  for (const std::int32_t e : wave_) {
    for (std::int64_t slot = s.expert_begin[e]; slot < s.expert_begin[e + 1]; slot += kTokenBlock) {
      Task task{};
      task.expert = e;
      task.first_slot = slot;
      task.tokens = std::min<std::int64_t>(kTokenBlock, s.expert_begin[e + 1] - slot);
      tasks_.push_back(task);
    }
  }
  run_packed([&](Task& task, int thread) {
    const Activations x = s.normed.view(s.slot_tokens + task.first_slot);
    float* gates = s.thread_gates + thread * kTokenBlock * slices.neurons();
    float* part = s.thread_sums + thread * padded;
    weights_.experts->gate(layer, task.expert);
    const std::byte* expert = weights_.experts->whole(layer, task.expert);
    for (std::int64_t slice = 0; slice < slices.count; ++slice) {
      const std::int64_t begin = slices.begin(slice);
      const std::int64_t end = slices.end(slice);
      kernels_.tiles(shape.gate(expert), 2 * begin, 2 * end, x, task.tokens, gates, slices.neurons());
      for (std::int64_t t = 0; t < task.tokens; ++t) {
        float* sum = s.down + (task.first_slot + t) * padded;
        float* out = slice == 0 ? sum : part;
        std::fill_n(out, padded, 0.0F);
        task.active += static_cast<std::uint64_t>(
            kernels_.neurons(shape, expert, begin, end, gates + t * slices.neurons(), x, t, out));
        if (slice > 0) kernels_.add_scaled(sum, part, padded, 1.0F);
      }
    }
  });
}

}  // namespace smallthinker
