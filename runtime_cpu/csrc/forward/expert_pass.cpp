#include "forward/expert_pass.hpp"

#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>

namespace smallthinker {

// ---- stock rows

// Some neurons of one expert, with all tokens that use it.
struct ExpertPass::RowPiece {
  std::int64_t expert, begin, end;  // neurons
  std::int64_t first_slot, tokens;
  std::uint64_t active = 0;
};

NeuronCounts ExpertPass::run(std::int64_t index, const Routing& routing, Products& products) const {
  const Hyperparameters& hyper = model_.hyper;
  const Layer& layer = model_.layers[static_cast<std::size_t>(index)];
  const Scratch& s = scratch_;
  std::vector<RowPiece> pieces;
  const std::int64_t rows = rows_per_piece(hyper.expert_hidden, compute_.pool.threads());
  const std::int64_t used = std::min(hyper.experts, routing.all_slots());
  pieces.reserve(static_cast<std::size_t>(used * ((hyper.expert_hidden + rows - 1) / rows)));
  for (std::int64_t e = 0; e < hyper.experts; ++e) {
    if (routing.slot_count(e) == 0) continue;
    for (std::int64_t begin = 0; begin < hyper.expert_hidden; begin += rows) {
      const std::int64_t end = std::min(begin + rows, hyper.expert_hidden);
      pieces.push_back({e, begin, end, routing.first_slot(e), routing.slot_count(e)});
    }
  }
  compute_.pool.run(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, int) {
    gate_and_up(layer, routing, pieces[static_cast<std::size_t>(i)]);
  });

  if (traits_of(layer.down.type).quantised) {
    compute_.each_row(routing.all_slots(),
                      [&](std::int64_t slot) { compute_.quantise(s.hidden.from(slot)); });
  }
  for (std::int64_t e = 0; e < hyper.experts; ++e) {
    const std::int64_t first = routing.first_slot(e);
    const std::int64_t count = routing.slot_count(e);
    if (count == 0) continue;
    products.add(layer.down, e, s.hidden.from(first).view(), count, s.down + first * hyper.hidden,
                 hyper.hidden);
  }
  products.run();
  add_experts(routing, s.down, hyper.hidden);

  NeuronCounts counts{static_cast<std::uint64_t>(routing.all_slots() * hyper.expert_hidden)};
  for (const RowPiece& piece : pieces) counts.active += piece.active;
  return counts;
}

// relu(gate) * up, to the hidden buffer. With a single token the up rows of silent neurons are not read.
void ExpertPass::gate_and_up(const Layer& layer, const Routing& routing, RowPiece& piece) const {
  const Kernels& kernels = compute_.kernels;
  const std::int64_t stride = scratch_.hidden.stride;
  const Activations x = scratch_.normed.view(routing.slot_tokens + piece.first_slot);
  float* const gates = scratch_.hidden.f32 + piece.first_slot * stride + piece.begin;  // [tokens][stride]
  float* const ups = scratch_.up + piece.first_slot * stride + piece.begin;            // [tokens][stride]
  kernels.matmul(layer.gate, piece.expert, piece.begin, piece.end, x, piece.tokens, gates, stride);
  const std::int64_t rows = piece.end - piece.begin;
  if (piece.tokens == 1) {
    for (std::int64_t begin = 0; begin < rows;) {
      if (!(gates[begin] > 0.0F)) {
        ++begin;
        continue;
      }
      std::int64_t end = begin + 1;
      while (end < rows && gates[end] > 0.0F) ++end;
      kernels.matmul(layer.up, piece.expert, piece.begin + begin, piece.begin + end, x, 1, ups + begin,
                     stride);
      begin = end;
    }
  } else {
    kernels.matmul(layer.up, piece.expert, piece.begin, piece.end, x, piece.tokens, ups, stride);
  }
  for (std::int64_t t = 0; t < piece.tokens; ++t) {
    float* gate = gates + t * stride;
    const float* up = ups + t * stride;
    for (std::int64_t r = 0; r < rows; ++r) {
      const bool active = gate[r] > 0.0F;
      piece.active += active ? 1U : 0U;
      gate[r] = active ? gate[r] * up[r] : 0.0F;
    }
  }
}

// ---- packed experts

// A slice of an expert with one token, or the whole expert with some of its tokens.
struct ExpertPass::PackedPiece {
  std::int64_t expert, first_slot, tokens;
  std::int64_t slice = 0;
  std::uint64_t active = 0;
};

NeuronCounts ExpertPass::run(std::int64_t layer, const Routing& routing, const ExpertDemand& demand) const {
  ExpertStore& store = *weights_.experts;
  NeuronCounts counts{static_cast<std::uint64_t>(routing.all_slots() * model_.hyper.expert_hidden)};
  struct Release {  // also when an expert cannot be read
    ExpertStore& store;
    std::int64_t layer;
    ~Release() { store.release(layer); }
  };
  // A cache without slots for all of them takes them in turns.
  const auto room = static_cast<std::size_t>(store.request_limit());
  for (std::size_t begin = 0; begin < demand.experts.size(); begin += room) {
    const std::size_t end = std::min(begin + room, demand.experts.size());
    std::vector<std::int32_t> experts(demand.experts.begin() + static_cast<std::ptrdiff_t>(begin),
                                      demand.experts.begin() + static_cast<std::ptrdiff_t>(end));
    const Release release{store, layer};
    if (!demand.requested) request_experts(store, layer, experts, routing);
    // Pieces are claimed from the back: first the experts that are in memory, then the others as their reads
    // end.
    std::reverse(experts.begin(), experts.end());
    std::stable_partition(experts.begin(), experts.end(),
                          [&](std::int32_t e) { return !store.ready(layer, e); });
    const bool few = routing.all_slots() <= kSplitSlots;
    counts.active += few ? split_slots(layer, experts, routing) : token_blocks(layer, experts, routing);
  }
  add_experts(routing, scratch_.down, weights_.plan.expert.padded());
  return counts;
}

// Runs the pieces on all threads; returns how many neurons were active. The first error ends the batch: the
// threads themselves must not throw.
template <typename Work>
std::uint64_t ExpertPass::run_pieces(std::vector<PackedPiece>& pieces, const Work& work) const {
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  std::mutex mutex;
  compute_.pool.run(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, int thread) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      work(pieces[static_cast<std::size_t>(i)], thread);
    } catch (const EngineError&) {
      const std::lock_guard lock(mutex);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  std::uint64_t active = 0;
  for (const PackedPiece& piece : pieces) active += piece.active;
  return active;
}

// Few slots: every slice of every slot is a piece of work.
std::uint64_t ExpertPass::split_slots(std::int64_t layer, std::span<const std::int32_t> experts,
                                      const Routing& routing) const {
  const Scratch& s = scratch_;
  const Kernels& kernels = compute_.kernels;
  const ExpertShape& shape = weights_.plan.expert;
  const ExpertSlices slices(shape);
  const std::int64_t padded = shape.padded();
  std::vector<PackedPiece> pieces;
  pieces.reserve(static_cast<std::size_t>(routing.all_slots() * slices.count));
  for (const std::int32_t e : experts) {
    for (std::int64_t i = 0; i < routing.slot_count(e); ++i) {
      for (std::int64_t slice = 0; slice < slices.count; ++slice)
        pieces.push_back({e, routing.first_slot(e) + i, 1, slice});
    }
  }
  const std::uint64_t active = run_pieces(pieces, [&](PackedPiece& piece, int thread) {
    const Activations x = s.normed.view(routing.slot_tokens + piece.first_slot);
    float* gates = s.thread_gates + thread * kTokenBlock * slices.neurons();
    float* out = s.partial + (piece.first_slot * slices.count + piece.slice) * padded;
    std::fill_n(out, padded, 0.0F);
    const std::int64_t begin = slices.begin(piece.slice);
    const std::int64_t end = slices.end(piece.slice);
    const std::byte* gate = weights_.experts->gate(layer, piece.expert);
    kernels.tiles(shape.gate(gate), 2 * begin, 2 * end, x, 1, gates, 0);
    const std::byte* expert = weights_.experts->whole(layer, piece.expert);
    piece.active = static_cast<std::uint64_t>(kernels.neurons(shape, expert, begin, end, gates, x, 0, out));
  });
  sum_slices(experts, routing);
  return active;
}

// The partial sums of every slot's slices to its output.
void ExpertPass::sum_slices(std::span<const std::int32_t> experts, const Routing& routing) const {
  const ExpertSlices slices(weights_.plan.expert);
  const std::int64_t padded = weights_.plan.expert.padded();
  for (const std::int32_t e : experts) {
    compute_.each_row(routing.slot_count(e), [&](std::int64_t i) {
      const std::int64_t slot = routing.first_slot(e) + i;
      float* sum = scratch_.down + slot * padded;
      const float* part = scratch_.partial + slot * slices.count * padded;
      std::copy_n(part, padded, sum);
      for (std::int64_t slice = 1; slice < slices.count; ++slice)
        compute_.kernels.add_scaled(sum, part + slice * padded, padded, 1.0F);
    });
  }
}

// Many slots: a piece of work is an expert with some of its tokens; its weights stay in the cache from token
// to token.
std::uint64_t ExpertPass::token_blocks(std::int64_t layer, std::span<const std::int32_t> experts,
                                       const Routing& routing) const {
  const Scratch& s = scratch_;
  const Kernels& kernels = compute_.kernels;
  const ExpertShape& shape = weights_.plan.expert;
  const ExpertSlices slices(shape);
  const std::int64_t padded = shape.padded();
  std::vector<PackedPiece> pieces;
  pieces.reserve(experts.size() + static_cast<std::size_t>(routing.all_slots() / kTokenBlock));
  for (const std::int32_t e : experts) {
    const std::int64_t count = routing.slot_count(e);
    for (std::int64_t first = 0; first < count; first += kTokenBlock)
      pieces.push_back({e, routing.first_slot(e) + first, std::min(kTokenBlock, count - first)});
  }
  return run_pieces(pieces, [&](PackedPiece& piece, int thread) {
    const Activations x = s.normed.view(routing.slot_tokens + piece.first_slot);
    float* gates = s.thread_gates + thread * kTokenBlock * slices.neurons();
    float* part = s.thread_sums + thread * padded;
    weights_.experts->gate(layer,
                           piece.expert);  // its checksum is computed while the rest is still being read
    const std::byte* expert = weights_.experts->whole(layer, piece.expert);
    for (std::int64_t slice = 0; slice < slices.count; ++slice) {
      const std::int64_t begin = slices.begin(slice);
      const std::int64_t end = slices.end(slice);
      kernels.tiles(shape.gate(expert), 2 * begin, 2 * end, x, piece.tokens, gates, slices.neurons());
      for (std::int64_t t = 0; t < piece.tokens; ++t) {
        float* sum = s.down + (piece.first_slot + t) * padded;
        float* out = slice == 0 ? sum : part;
        std::fill_n(out, padded, 0.0F);
        piece.active += static_cast<std::uint64_t>(
            kernels.neurons(shape, expert, begin, end, gates + t * slices.neurons(), x, t, out));
        if (slice > 0) kernels.add_scaled(sum, part, padded, 1.0F);
      }
    }
  });
}

// ---- both

// x += the weighted sum of every token's experts, in ascending order of the experts; down [slots][stride].
void ExpertPass::add_experts(const Routing& routing, const float* down, std::int64_t stride) const {
  const std::int64_t hidden = model_.hyper.hidden;
  const std::int64_t k = routing.per_token;
  const Scratch& s = scratch_;
  compute_.each_row(routing.tokens, [&](std::int64_t i) {
    float* sum = s.mixed + i * hidden;
    std::fill_n(sum, hidden, 0.0F);
    for (std::int64_t n = i * k; n < (i + 1) * k; ++n)
      compute_.kernels.add_scaled(sum, down + routing.slots[n] * stride, hidden, routing.weights[n]);
    compute_.kernels.add_scaled(s.x.f32 + i * s.x.stride, sum, hidden, 1.0F);
  });
}

}  // namespace smallthinker
