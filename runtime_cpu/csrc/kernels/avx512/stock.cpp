// AVX-512 VNNI on stock rows and logits: a block of 32 weights is one register and one vpdpwssd.
#include <immintrin.h>

#include "kernels/avx2/table.hpp"
#include "kernels/avx512/table.hpp"
#include "kernels/logits.hpp"
#include "kernels/token_groups.hpp"

namespace smallthinker::avx512 {
namespace {

SMALLTHINKER_INLINE float half(const std::byte* at) { return _cvtsh_ss(load<std::uint16_t>(at)); }

SMALLTHINKER_INLINE __m256i load256(const std::byte* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

struct RowQ4 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m512i& weights) {
    const std::byte* block = row + b * 18;
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2));
    const __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
    const __m256i nibbles = _mm256_and_si256(both, _mm256_set1_epi8(15));
    weights = _mm512_cvtepi8_epi16(_mm256_sub_epi8(nibbles, _mm256_set1_epi8(8)));
    return half(block);
  }
};

struct RowQ8 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m512i& weights) {
    const std::byte* block = row + b * 34;
    weights = _mm512_cvtepi8_epi16(load256(block + 2));
    return half(block);
  }
};

struct RowQ6 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m512i& weights) {
    const std::byte* block = row + (b >> 3) * 210;
    const int part = static_cast<int>(b & 7);
    const int quarter = part & 3;
    const __m128i shift_low = _mm_cvtsi32_si128(quarter < 2 ? 0 : 4);
    const __m128i shift_high = _mm_cvtsi32_si128(2 * quarter);
    const __m256i nibbles = load256(block + 64 * (part >> 2) + 32 * (quarter & 1));
    const __m256i upper = load256(block + 128 + 32 * (part >> 2));
    const __m256i bottom = _mm256_and_si256(_mm256_srl_epi16(nibbles, shift_low), _mm256_set1_epi8(15));
    const __m256i top = _mm256_and_si256(_mm256_srl_epi16(upper, shift_high), _mm256_set1_epi8(3));
    const __m256i value =
        _mm256_sub_epi8(_mm256_or_si256(bottom, _mm256_slli_epi16(top, 4)), _mm256_set1_epi8(32));
    const auto first = static_cast<std::int16_t>(load<std::int8_t>(block + 192 + 2 * part));
    const auto second = static_cast<std::int16_t>(load<std::int8_t>(block + 193 + 2 * part));
    const __m512i scales = _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16(second), 1);
    weights = _mm512_mullo_epi16(_mm512_cvtepi8_epi16(value), scales);
    return half(block + 208);
  }
};

template <typename Row, int N>
void tile_rows(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
               const Activations& x, std::int64_t token, float* out, std::int64_t out_stride) {
  const std::int64_t blocks = matrix.cols / kActivationBlock;
  const std::int16_t* q[N];
  const float* scales[N];
  for (int n = 0; n < N; ++n) {
    q[n] = x.q_row(token + n);
    scales[n] = x.scale_row(token + n);
  }
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const std::byte* row = matrix.row(r, expert);
    __m512 even[N];
    __m512 odd[N];
    for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
    const auto step = [&](std::int64_t b, __m512* accumulators) __attribute__((always_inline)) {
      __m512i weights;
      const float weight_scale = Row::unpack(row, b, weights);
      for (int n = 0; n < N; ++n) {
        const __m512i values = _mm512_loadu_si512(q[n] + b * kActivationBlock);
        const __m512i products = _mm512_dpwssd_epi32(_mm512_setzero_si512(), weights, values);
        const __m512 scale = _mm512_set1_ps(weight_scale * scales[n][b]);
        accumulators[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, accumulators[n]);
      }
    };
    std::int64_t b = 0;
    for (; b + 1 < blocks; b += 2) {
      step(b, even);
      step(b + 1, odd);
    }
    if (b < blocks) step(b, even);
    for (int n = 0; n < N; ++n) {
      out[(token + n) * out_stride + (r - row_begin)] = _mm512_reduce_add_ps(_mm512_add_ps(even[n], odd[n]));
    }
  }
}

template <typename Row>
void matmul_rows(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
                 const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  each_token_group(tokens, [&](auto n, std::int64_t t) {
    tile_rows<Row, n>(matrix, expert, row_begin, row_end, x, t, out, out_stride);
  });
}

void matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
            const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  switch (matrix.type) {
    case Type::kQ4_0:
      return matmul_rows<RowQ4>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
    case Type::kQ8_0:
      return matmul_rows<RowQ8>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
    case Type::kQ6_K:
      return matmul_rows<RowQ6>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
    default:
      return avx2::matmul(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
  }
}

void block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums, std::uint64_t* running) {
  __m512i sum = _mm512_loadu_si512(sums);
  __m512i total = _mm512_loadu_si512(running);
  for (std::size_t block = 0; block < blocks; ++block) {
    const __m256i words = load256(data + block * kChecksumBlock);
    sum = _mm512_add_epi64(sum, _mm512_cvtepu32_epi64(words));
    total = _mm512_add_epi64(total, sum);
  }
  _mm512_storeu_si512(sums, sum);
  _mm512_storeu_si512(running, total);
}

}  // namespace

void fill_stock(Kernels& table) {
  table.matmul = matmul;
  table.run_maxima = run_maxima<16>;
  table.exp_weights = exp_weights<16>;
  table.mass_above = mass_above<16>;
  table.block_sums = block_sums;
}

}  // namespace smallthinker::avx512
