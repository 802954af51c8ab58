// Rows of weights between their storage types and fp32, in plain code: embedding rows, norms and routers. The
// kernels compute on the stored form.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model/tensor.hpp"

namespace smallthinker {

// A row of any storage type, `data` [size], to `out` [size]; `size` is a multiple of the type's block.
void dequantise(Type type, const std::byte* data, std::int64_t size, float* out);

// x [size], a multiple of 32, to Q4_0 blocks [size / 32] with the bits of ggml's reference quantiser
// (quantize_row_q4_0_ref): the value of greatest magnitude becomes -8. A block of zeros keeps its first
// zero's sign in the scale, as the gguf package has it; ggml drops that sign. A block that holds NaN or
// infinity gets the scale NaN, and one that is too large for fp16 the scale infinity.
void quantise_q4_0(const float* x, std::int64_t size, std::byte* out);

}  // namespace smallthinker
