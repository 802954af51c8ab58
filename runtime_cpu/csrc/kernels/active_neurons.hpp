// One token's active neurons, as every instruction set's `neurons` kernel walks them: list those with a gate
// above zero, prefetch their weights, up rows two by two, then the down columns group by group. The products
// are the instruction set's:
//
//   up_two, up_one(shape, groups, ids, x, dots): dots [2 or 1] = the up rows `ids` of `groups` times x
//   down(shape, group, ids, hidden, count, fetch, out): out [padded] += the down columns ids [count] of one
//   group
//     times hidden [count]; calls fetch.outputs() on its way
//   table.neurons = active_neurons<up_rows<2>, up_rows<1>, add_down>;
#pragma once

#include "kernels/table.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

inline constexpr int kNeuronsAhead = 6;            // whose weights are on their way into the L2 cache
inline constexpr std::int64_t kListedGroups = 16;  // whose active neurons are listed together

// The listed neurons' weights, fetched some lines at a time between the products: asked for all at once they
// would fill the processor's queue, and the products would wait for it and the memory then for them.
class NeuronFetch {
 public:
  SMALLTHINKER_INLINE NeuronFetch(const ExpertShape& shape, const std::byte* const* groups,
                                  const std::int32_t* ids, std::int64_t count)
      : shape_(shape),
        groups_(groups),
        ids_(ids),
        count_(count),
        lines_(static_cast<std::int64_t>(2 * shape.half_bytes()) / kLine) {}

  // The weights of `neurons` further ones, or half of them: the other half goes along with `outputs`.
  SMALLTHINKER_INLINE void whole(std::int64_t neurons) { advance(neurons * lines_); }
  SMALLTHINKER_INLINE void half(std::int64_t neurons) { advance((neurons * lines_ + 1) / 2); }

  // Of a group from whose `active` neurons outputs are made next; `following`: the group after it, if any.
  SMALLTHINKER_INLINE void enter(std::int64_t active, const std::byte* following) {
    pace_ = (active * lines_ * kPaceOutputs + 2 * shape_.padded() - 1) / (2 * shape_.padded());
    following_ = following;
  }
  // `at`, a multiple of 64: the first of 64 outputs that are made now.
  SMALLTHINKER_INLINE void outputs(std::int64_t at) {
    if (following_ != nullptr) {  // the scales of down
      for (int i = 0; i < 2; ++i) __builtin_prefetch(following_ + 2 * at + i * kLine, 0, 2);
    }
    advance(pace_);
  }

 private:
  static constexpr std::int64_t kLine = 64;
  static constexpr std::int64_t kPaceOutputs = 64;

  SMALLTHINKER_INLINE void advance(std::int64_t lines) {
    while (lines > 0 && neuron_ < count_) {
      const std::byte* group = groups_[neuron_];
      if (line_ == 0) {
        const std::byte* scales = group + shape_.up_scales(ids_[neuron_]);
        const std::size_t bytes = shape_.scales_bytes() / kNeuronGroup;
        for (std::size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(scales + i, 0, 2);
      }
      const std::byte* at = group + shape_.up_nibbles(ids_[neuron_]);
      const std::int64_t end = line_ + lines < lines_ ? line_ + lines : lines_;
      lines -= end - line_;
      for (; line_ < end; ++line_) __builtin_prefetch(at + line_ * kLine, 0, 2);
      if (line_ == lines_) {
        line_ = 0;
        ++neuron_;
      }
    }
  }

  const ExpertShape& shape_;
  const std::byte* const* groups_;
  const std::int32_t* ids_;
  std::int64_t count_;
  std::int64_t lines_;  // of a neuron's nibbles
  std::int64_t neuron_ = 0;
  std::int64_t line_ = 0;
  std::int64_t pace_ = 0;  // lines per 64 outputs
  const std::byte* following_ = nullptr;
};

// Hidden values of one group's listed neurons as 16-bit integers 256 * high + low; missing ones weigh
// nothing.
struct HiddenColumn {
  const std::byte* nibbles[kNeuronGroup];  // of each neuron's down column
  alignas(64) std::int8_t highs[kNeuronGroup];
  alignas(64) std::int8_t lows[kNeuronGroup];
  std::int64_t count;
  std::int32_t total;  // sum of the integers
  float scale;         // NaN when a value is not finite
};

// hidden and ids [count]; `Nearest::of` rounds to the nearest integer, halves to even.
template <typename Nearest>
SMALLTHINKER_INLINE void quantise_hidden(const ExpertShape& shape, const std::byte* group,
                                         const std::int32_t* ids, const float* hidden, std::int64_t count,
                                         HiddenColumn& column) {
  float peak = 0.0F;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(hidden[i]);
    finite = finite && magnitude <= __FLT_MAX__;
    peak = magnitude > peak ? magnitude : peak;
  }
  column.scale = finite ? peak / kActivationSteps : __builtin_nanf("");
  const float inverse = column.scale >= __FLT_MIN__ ? kActivationSteps / peak : 0.0F;  // of NaN: 0
  column.count = count;
  column.total = 0;
  for (std::int64_t i = 0; i < kNeuronGroup; ++i) {
    const bool weighs = i < count && finite;
    column.nibbles[i] = group + shape.down_nibbles(ids[i < count ? i : 0]);
    const std::int32_t q = weighs ? Nearest::of(hidden[i] * inverse) : 0;
    const std::int32_t upper = (q + 128) >> 8;
    column.highs[i] = static_cast<std::int8_t>(upper);
    column.lows[i] = static_cast<std::int8_t>(q - 256 * upper);
    column.total += q;
  }
}

// Arguments as Kernels::neurons.
template <auto UpTwo, auto UpOne, auto Down>
std::int64_t active_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                            std::int64_t group_end, const float* gate, const Activations& x,
                            std::int64_t token, float* out) {
  const Planes planes{x.plane_row(token), Planes::blocks(shape.hidden)};
  std::int64_t active = 0;
  for (std::int64_t first = group_begin; first < group_end; first += kListedGroups) {
    const std::int64_t last = first + kListedGroups < group_end ? first + kListedGroups : group_end;
    std::int32_t ids[kListedGroups * kNeuronGroup];
    const std::byte* groups[kListedGroups * kNeuronGroup];
    float hidden[kListedGroups * kNeuronGroup];
    std::int64_t begins[kListedGroups + 1];
    std::int64_t count = 0;
    for (std::int64_t g = first; g < last; ++g) {
      begins[g - first] = count;
      const std::byte* group = expert + shape.group_offset(g);
      const float* values = gate + (g - group_begin) * kNeuronGroup;
      for (std::int32_t n = 0; n < kNeuronGroup; ++n) {
        ids[count] = n;
        groups[count] = group;
        hidden[count] = values[n];
        count += values[n] > 0.0F ? 1 : 0;
      }
    }
    begins[last - first] = count;
    active += count;
    NeuronFetch fetch(shape, groups, ids, count);
    fetch.whole(kNeuronsAhead);
    for (std::int64_t g = first; g < last; ++g) {
      const std::int64_t begin = begins[g - first];
      const std::int64_t end = begins[g - first + 1];
      if (begin == end) continue;
      for (std::int64_t i = begin; i < end; i += 2) {
        fetch.half(2);
        float dots[2];
        if (i + 1 < end) {
          UpTwo(shape, groups + i, ids + i, planes, dots);
          hidden[i + 1] *= dots[1];
        } else {
          UpOne(shape, groups + i, ids + i, planes, dots);
        }
        hidden[i] *= dots[0];
      }
      fetch.enter(end - begin, end < count ? groups[end] : nullptr);
      Down(shape, groups[begin], ids + begin, hidden + begin, end - begin, fetch, out);
    }
  }
  return active;
}

}  // namespace
}  // namespace smallthinker
