// Plain scalar kernels: what every other table is tested against, and where it begins.
#pragma once

#include "kernels/table.hpp"

namespace smallthinker::reference {

void fill(Kernels& table);

// For queries too long for the byte kernels; arguments as Kernels::attention_scores.
void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float scale,
                      float* scores, std::int64_t score_stride);

}  // namespace smallthinker::reference
