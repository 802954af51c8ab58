// The AVX2 + FMA + F16C kernels.
#pragma once

#include "kernels/table.hpp"

namespace smallthinker::avx2 {

bool supported();           // by this processor and its operating system
void fill(Kernels& table);  // everything

// The files' own shares of it.
void fill_stock(Kernels& table);
void fill_packed(Kernels& table);

// What AVX-512's kernels fall back on.
void matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
            const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
void quantise(const float* x, std::int64_t size, std::int16_t* q, float* scales);

}  // namespace smallthinker::avx2
