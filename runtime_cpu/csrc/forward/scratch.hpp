// The memory that a forward pass writes to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "forward/session.hpp"
#include "forward/weights.hpp"
#include "model/model.hpp"
#include "model/tensor.hpp"

namespace smallthinker {

// Rows of activations: row-major fp32, and the forms in which the kernels read them.
struct ActivationBuffer {
  float* f32 = nullptr;         // [rows][stride]
  std::int16_t* q = nullptr;    // [rows][stride]
  float* scales = nullptr;      // [rows][stride / 32]
  std::byte* planes = nullptr;  // [rows][plane_bytes], or none: no tiled matrix reads it
  std::int64_t stride = 0;      // elements; a multiple of 32
  std::size_t plane_bytes = 0;

  // `index` [tokens]: the rows that the tokens read; none: row i is token i's.
  Activations view(const std::int32_t* index = nullptr) const {
    return {f32, q, scales, stride, index, planes, plane_bytes};
  }
  ActivationBuffer from(std::int64_t row) const {
    return {f32 + row * stride,
            q + row * stride,
            scales + row * (stride / kActivationBlock),
            planes + static_cast<std::size_t>(row) * plane_bytes,
            stride,
            plane_bytes};
  }
};

// Everything that a forward pass over `chunk` tokens writes. The same code lays it out and measures it. A
// slot is one (token, expert) pair, in the order of the experts; there are chunk * k of them. What routers
// choose has a room for each layer whose choice is known at once.
struct Scratch {
  ActivationBuffer x;          // [chunk][hidden], the residual stream
  ActivationBuffer normed;     // [chunk][hidden], after a norm
  ActivationBuffer attended;   // [chunk][heads * head_dim], of attention, before its output matrix
  ActivationBuffer hidden;     // [slots][expert_hidden], of stock experts
  ActivationBuffer inner;      // [1][width], of the head's predictor
  float* query;                // [chunk][heads][head_dim]
  float* key;                  // [chunk][kv_heads][head_dim]
  float* value;                // [chunk][kv_heads][head_dim]
  float* mixed;                // [chunk][hidden], output of attention or of the experts
  float* router_logits;        // [rooms][chunk][experts]
  float* expert_weights;       // [rooms][chunk][k]
  float* up;                   // [slots][hidden.stride], of stock experts
  float* down;                 // [slots][hidden], or of packed experts [slots][padded hidden]
  float* partial;              // [kSplitSlots][slices][padded hidden], of packed experts
  float* thread_gates;         // [threads][kTokenBlock][neurons of a slice]
  float* thread_sums;          // [threads][padded hidden]
  float* cosines;              // [chunk][head_dim / 2]
  float* sines;                // [chunk][head_dim / 2]
  float* thread_scores;        // [threads][groups][score_stride]
  float* thread_totals;        // [threads][groups]
  std::int32_t* expert_ids;    // [rooms][chunk][k]
  std::int32_t* slots;         // [rooms][chunk][k]
  std::int32_t* slot_tokens;   // [rooms][slots]
  std::int32_t* expert_begin;  // [rooms][experts + 1]

  // With no memory: only measures. Returns the bytes.
  std::size_t lay_out(const Hyperparameters& hyper, const WeightPlan& weights, const KvLayout& layout,
                      int threads, std::int64_t chunk, std::byte* memory);
};

}  // namespace smallthinker
