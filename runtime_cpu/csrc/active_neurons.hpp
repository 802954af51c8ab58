// The walk over one token's active neurons, which every instruction set's `neurons` kernel shares: list those
// with a gate above zero, fetch their weights ahead, up rows two by two, then the down columns group by
// group.
#pragma once

#include "kernels.hpp"

namespace smallthinker {

inline constexpr int kNeuronsAhead = 12;           // whose weights are on their way into the second cache
inline constexpr std::int64_t kListedGroups = 16;  // whose active neurons are listed together

// prefetch(group, neuron); up_two and up_one(groups, neurons, dots) set dots; down(group, neurons, hidden,
// count) adds to the output. All of them are inlined: no copy compiled for newer instructions is left to the
// linker.
template <typename Prefetch, typename UpTwo, typename UpOne, typename Down>
SMALLTHINKER_INLINE std::int64_t walk_active_neurons(const ExpertShape& shape, const std::byte* expert,
                                                     std::int64_t group_begin, std::int64_t group_end,
                                                     const float* gate, const Prefetch& prefetch,
                                                     const UpTwo& up_two, const UpOne& up_one,
                                                     const Down& down) {
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
    for (std::int64_t i = 0; i < (count < kNeuronsAhead ? count : kNeuronsAhead); ++i)
      prefetch(groups[i], ids[i]);
    for (std::int64_t g = first; g < last; ++g) {
      const std::int64_t begin = begins[g - first];
      const std::int64_t end = begins[g - first + 1];
      if (begin == end) continue;
      for (std::int64_t i = begin; i < end; i += 2) {
        const int rows = i + 1 < end ? 2 : 1;
        for (std::int64_t a = i + kNeuronsAhead; a < i + kNeuronsAhead + rows && a < count; ++a) {
          prefetch(groups[a], ids[a]);
        }
        float dots[2];
        if (rows == 2) {
          up_two(groups + i, ids + i, dots);
          hidden[i + 1] *= dots[1];
        } else {
          up_one(groups + i, ids + i, dots);
        }
        hidden[i] *= dots[0];
      }
      down(groups[begin], ids + begin, hidden + begin, end - begin);
    }
  }
  return active;
}

}  // namespace smallthinker
