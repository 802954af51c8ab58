// The matrix product on rows as GGUF stores them, for instruction sets that have an unpacking of every type:
// an `Isa` names it.
//
//   struct Isa {
//     template <typename Row, int N> using Quantised = ...;   // run(row, cols, x, token, sums [N])
//     template <typename Row, int N> using Real = ...;        // the same of F32, F16 and BF16
//     using F32 = ...; using F16 = ...; using BF16 = ...; using Q4 = ...; using Q8 = ...; using Q6 = ...;
//   };
//   matmul_stock<Isa>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
#pragma once

#include <cstdint>

#include "kernels/token_groups.hpp"
#include "model/tensor.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

// N tokens stay in the L1 cache while the rows pass by.
template <typename Dot, int N>
void dot_rows(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
              const Activations& x, std::int64_t token, float* out, std::int64_t out_stride) {
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    float sums[N];
    Dot::run(matrix.row(r, expert), matrix.cols, x, token, sums);
    for (int n = 0; n < N; ++n) out[(token + n) * out_stride + (r - row_begin)] = sums[n];
  }
}

template <typename Isa>
void matmul_stock(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
                  const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  const auto quantised = [&]<typename Row>(Row*) {
    each_token_group(tokens, [&](auto n, std::int64_t t) {
      dot_rows<typename Isa::template Quantised<Row, n>, n>(matrix, expert, row_begin, row_end, x, t, out,
                                                            out_stride);
    });
  };
  const auto real = [&]<typename Row>(Row*) {
    each_token_group(tokens, [&](auto n, std::int64_t t) {
      dot_rows<typename Isa::template Real<Row, n>, n>(matrix, expert, row_begin, row_end, x, t, out,
                                                       out_stride);
    });
  };
  switch (matrix.type) {
    case Type::kF32:
      return real(static_cast<typename Isa::F32*>(nullptr));
    case Type::kF16:
      return real(static_cast<typename Isa::F16*>(nullptr));
    case Type::kBF16:
      return real(static_cast<typename Isa::BF16*>(nullptr));
    case Type::kQ4_0:
      return quantised(static_cast<typename Isa::Q4*>(nullptr));
    case Type::kQ8_0:
      return quantised(static_cast<typename Isa::Q8*>(nullptr));
    case Type::kQ6_K:
      return quantised(static_cast<typename Isa::Q6*>(nullptr));
    case Type::kI8:  // refused when the file is opened
      return;
  }
}

}  // namespace
}  // namespace smallthinker
