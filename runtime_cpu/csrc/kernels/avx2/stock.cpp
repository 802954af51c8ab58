// AVX2 + FMA + F16C on stock rows, activations and attention. Quantised weights are widened to 16 bits and
// multiplied with the 16-bit activations by vpmaddwd: exact integers within a block, one fp32 multiply-add
// per block and lane.
#include <immintrin.h>

#include <cstring>

#include "kernels/attention.hpp"
#include "kernels/attention_q8.hpp"
#include "kernels/avx2/table.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/exponential.hpp"
#include "kernels/logits.hpp"
#include "kernels/stock_rows.hpp"

namespace smallthinker::avx2 {
namespace {

// ---- helpers

SMALLTHINKER_INLINE float horizontal_sum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  sum = _mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1));
  return _mm_cvtss_f32(sum);
}

SMALLTHINKER_INLINE float half(const std::byte* at) { return _cvtsh_ss(load<std::uint16_t>(at)); }

SMALLTHINKER_INLINE __m128i load128(const std::byte* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

// ---- quantised rows: block b of 32 weights as 16-bit integers (first and second 16) and their scale

struct RowQ4 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m256i& low, __m256i& high) {
    const std::byte* block = row + b * 18;
    const __m128i packed = load128(block + 2);
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i eight = _mm_set1_epi8(8);
    low = _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_and_si128(packed, mask), eight));
    high = _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), mask), eight));
    return half(block);
  }
};

struct RowQ8 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m256i& low, __m256i& high) {
    const std::byte* block = row + b * 34;
    low = _mm256_cvtepi8_epi16(load128(block + 2));
    high = _mm256_cvtepi8_epi16(load128(block + 18));
    return half(block);
  }
};

// Six bits times the 8-bit scale of each 16 weights still fit 16 bits, and 32 products of them 32 bits.
struct RowQ6 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, __m256i& low, __m256i& high) {
    const std::byte* block = row + (b >> 3) * 210;
    const int part = static_cast<int>(b & 7);
    const int quarter = part & 3;
    const std::byte* nibbles = block + 64 * (part >> 2) + 32 * (quarter & 1);
    const std::byte* upper = block + 128 + 32 * (part >> 2);
    const __m128i shift_low = _mm_cvtsi32_si128(quarter < 2 ? 0 : 4);
    const __m128i shift_high = _mm_cvtsi32_si128(2 * quarter);
    const auto widen = [&](int offset, int group) {
      const __m128i mask4 = _mm_set1_epi8(15);
      const __m128i mask2 = _mm_set1_epi8(3);
      const __m128i bottom = _mm_and_si128(_mm_srl_epi16(load128(nibbles + offset), shift_low), mask4);
      const __m128i top = _mm_and_si128(_mm_srl_epi16(load128(upper + offset), shift_high), mask2);
      const __m128i value = _mm_sub_epi8(_mm_or_si128(bottom, _mm_slli_epi16(top, 4)), _mm_set1_epi8(32));
      const auto scale = static_cast<std::int16_t>(load<std::int8_t>(block + 192 + 2 * part + group));
      return _mm256_mullo_epi16(_mm256_cvtepi8_epi16(value), _mm256_set1_epi16(scale));
    };
    low = widen(0, 0);
    high = widen(16, 1);
    return half(block + 208);
  }
};

// One row with N tokens. Two accumulators (even and odd blocks) hide the latency of the additions.
template <typename Row, int N>
SMALLTHINKER_INLINE void dot_quantised(const std::byte* row, std::int64_t blocks,
                                       const std::int16_t* const* q, const float* const* scales,
                                       float* sums) {
  __m256 even[N];
  __m256 odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm256_setzero_ps();
  const auto step = [&](std::int64_t b, __m256* accumulators) __attribute__((always_inline)) {
    __m256i low;
    __m256i high;
    const __m256 weight_scale = _mm256_set1_ps(Row::unpack(row, b, low, high));
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const __m256i*>(q[n] + b * kActivationBlock);
      const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256(x)),
                                                _mm256_madd_epi16(high, _mm256_loadu_si256(x + 1)));
      const __m256 scale = _mm256_mul_ps(weight_scale, _mm256_broadcast_ss(scales[n] + b));
      accumulators[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, accumulators[n]);
    }
  };
  std::int64_t b = 0;
  for (; b + 1 < blocks; b += 2) {
    step(b, even);
    step(b + 1, odd);
  }
  if (b < blocks) step(b, even);
  for (int n = 0; n < N; ++n) sums[n] = horizontal_sum(_mm256_add_ps(even[n], odd[n]));
}

// ---- rows of real numbers

struct RowF32 {
  static constexpr std::int64_t kBytes = 4;
  static SMALLTHINKER_INLINE __m256 eight(const std::byte* at) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return load<float>(at); }
};

struct RowF16 {
  static constexpr std::int64_t kBytes = 2;
  static SMALLTHINKER_INLINE __m256 eight(const std::byte* at) { return _mm256_cvtph_ps(load128(at)); }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return half(at); }
};

struct RowBF16 {
  static constexpr std::int64_t kBytes = 2;
  static SMALLTHINKER_INLINE __m256 eight(const std::byte* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(at)), 16));
  }
  static SMALLTHINKER_INLINE float one(const std::byte* at) {
    const std::uint32_t bits = static_cast<std::uint32_t>(load<std::uint16_t>(at)) << 16U;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <typename Row, int N>
SMALLTHINKER_INLINE void dot_real(const std::byte* row, std::int64_t size, const float* const* x,
                                  float* sums) {
  __m256 even[N];
  __m256 odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm256_setzero_ps();
  std::int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m256 first = Row::eight(row + i * Row::kBytes);
    const __m256 second = Row::eight(row + (i + 8) * Row::kBytes);
    for (int n = 0; n < N; ++n) {
      even[n] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x[n] + i), even[n]);
      odd[n] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x[n] + i + 8), odd[n]);
    }
  }
  float tails[N] = {};
  for (; i < size; ++i) {
    const float weight = Row::one(row + i * Row::kBytes);
    for (int n = 0; n < N; ++n) tails[n] = __builtin_fmaf(weight, x[n][i], tails[n]);
  }
  for (int n = 0; n < N; ++n) sums[n] = horizontal_sum(_mm256_add_ps(even[n], odd[n])) + tails[n];
}

// ---- one row with N tokens

template <typename Row, int N>
struct QuantisedTile {
  static SMALLTHINKER_INLINE void run(const std::byte* row, std::int64_t cols, const Activations& x,
                                      std::int64_t token, float* sums) {
    const std::int16_t* q[N];
    const float* scales[N];
    for (int n = 0; n < N; ++n) {
      q[n] = x.q_row(token + n);
      scales[n] = x.scale_row(token + n);
    }
    dot_quantised<Row, N>(row, cols / kActivationBlock, q, scales, sums);
  }
};

template <typename Row, int N>
struct RealTile {
  static SMALLTHINKER_INLINE void run(const std::byte* row, std::int64_t cols, const Activations& x,
                                      std::int64_t token, float* sums) {
    const float* rows[N];
    for (int n = 0; n < N; ++n) rows[n] = x.f32_row(token + n);
    dot_real<Row, N>(row, cols, rows, sums);
  }
};

struct StockRows {
  template <typename Row, int N>
  using Quantised = QuantisedTile<Row, N>;
  template <typename Row, int N>
  using Real = RealTile<Row, N>;
  using F32 = RowF32;
  using F16 = RowF16;
  using BF16 = RowBF16;
  using Q4 = RowQ4;
  using Q8 = RowQ8;
  using Q6 = RowQ6;
};

}  // namespace

void matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
            const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  matmul_stock<StockRows>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
}

// ---- activations

// Equal to the reference bit for bit.
void quantise(const float* x, std::int64_t size, std::int16_t* q, float* scales) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  const __m256 most = _mm256_set1_ps(__FLT_MAX__);
  for (std::int64_t start = 0; start < size; start += kActivationBlock) {
    __m256 v[4];
    __m256 greatest = _mm256_setzero_ps();
    __m256 finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + start + 8 * i);
      const __m256 magnitude = _mm256_and_ps(v[i], absolute);
      finite = _mm256_and_ps(finite, _mm256_cmp_ps(magnitude, most, _CMP_LE_OQ));
      greatest = _mm256_max_ps(greatest, magnitude);
    }
    if (_mm256_movemask_ps(finite) != 0xFF) {
      scales[start / kActivationBlock] = __builtin_nanf("");
      for (std::int64_t i = 0; i < kActivationBlock; ++i) q[start + i] = 1;
      continue;
    }
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(greatest), _mm256_extractf128_ps(greatest, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    top = _mm_max_ss(top, _mm_shuffle_ps(top, top, 1));
    const float peak = _mm_cvtss_f32(top);
    const float scale = peak / kActivationSteps;
    scales[start / kActivationBlock] = scale;
    const __m256 inverse = _mm256_set1_ps(scale >= __FLT_MIN__ ? kActivationSteps / peak : 0.0F);
    for (int i = 0; i < 4; i += 2) {
      const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
      const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(v[i + 1], inverse));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + start + 8 * i), packed);
    }
  }
}

namespace {

void rms_norm(const float* x, const float* weight, std::int64_t size, float epsilon, float* out) {
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + i));
    const __m256d b = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4));
    low = _mm256_fmadd_pd(a, a, low);
    high = _mm256_fmadd_pd(b, b, high);
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, _mm256_add_pd(low, high));
  double sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  for (; i < size; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double mean = sum / static_cast<double>(size) + static_cast<double>(epsilon);
  const auto factor = static_cast<float>(1.0 / __builtin_sqrt(mean));
  const __m256 factors = _mm256_set1_ps(factor);
  for (i = 0; i + 8 <= size; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), factors);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), scaled));
  }
  for (; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

void to_half(const float* x, std::int64_t size, std::uint16_t* out) {
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), packed);
  }
  for (; i < size; ++i) out[i] = static_cast<std::uint16_t>(_cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT));
}

// ---- attention

constexpr int kMostHeads = 6;               // whose sums fit the registers
constexpr std::int64_t kRowsTogether = 32;  // of values, whose columns are then all read from the L1 cache

template <typename Row, int G>
SMALLTHINKER_INLINE void score_group(const float* q, std::int64_t head_dim, const std::byte* keys,
                                     std::int64_t tiles, float factor, float* scores, std::int64_t stride) {
  const __m256 factors = _mm256_set1_ps(factor);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::byte* tile = keys + t * head_dim * kKeyTile * Row::kBytes;
    __m256 first[G];
    __m256 second[G];
    for (int g = 0; g < G; ++g) first[g] = second[g] = _mm256_setzero_ps();
    for (std::int64_t i = 0; i < head_dim; ++i, tile += kKeyTile * Row::kBytes) {
      __builtin_prefetch(tile + head_dim * kKeyTile * Row::kBytes, 0, 3);
      const __m256 a = Row::eight(tile);
      const __m256 b = Row::eight(tile + 8 * Row::kBytes);
      for (int g = 0; g < G; ++g) {
        const __m256 value = _mm256_broadcast_ss(q + g * head_dim + i);
        first[g] = _mm256_fmadd_ps(value, a, first[g]);
        second[g] = _mm256_fmadd_ps(value, b, second[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      _mm256_storeu_ps(scores + g * stride + t * kKeyTile, _mm256_mul_ps(first[g], factors));
      _mm256_storeu_ps(scores + g * stride + t * kKeyTile + 8, _mm256_mul_ps(second[g], factors));
    }
  }
}

template <typename Row>
void score_rows(const float* q, std::int64_t groups, std::int64_t head_dim, const KvRows& keys, float factor,
                float* scores, std::int64_t stride) {
  each_head_group<kMostHeads>(groups, [&](auto size, std::int64_t g) {
    score_group<Row, size>(q + g * head_dim, head_dim, static_cast<const std::byte*>(keys.data), keys.count,
                           factor, scores + g * stride, stride);
  });
}

// What the templates of several instruction sets compute with.
struct Floats {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static SMALLTHINKER_INLINE Vec all(float value) { return _mm256_set1_ps(value); }
  static SMALLTHINKER_INLINE Vec load(const float* at) { return _mm256_loadu_ps(at); }
  static SMALLTHINKER_INLINE void store(float* at, Vec value) { _mm256_storeu_ps(at, value); }
  static SMALLTHINKER_INLINE Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static SMALLTHINKER_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
};

struct Bytes : Floats {
  static constexpr int kGroups = 4;
  static constexpr int kTiles = 1;
  static constexpr int kPanel = 2;
  static SMALLTHINKER_INLINE Vec halves(const std::byte* at) { return RowF16::eight(at); }
  static SMALLTHINKER_INLINE float half(const std::byte* at) { return RowF16::one(at); }
  static SMALLTHINKER_INLINE Vec byte_of_words(const std::byte* at, int byte) {
    const __m256i steps =
        _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), _mm256_set1_epi8(-128));
    const __m256i upper = _mm256_sll_epi32(steps, _mm_cvtsi32_si128(24 - 8 * byte));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 24));
  }
  static SMALLTHINKER_INLINE Vec bytes(const std::byte* at) {
    const __m128i steps = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(steps));
  }
};

void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float factor,
                      float* scores, std::int64_t stride) {
  if (keys.type == KvType::kQ8) return q8_scores<Bytes>(q, groups, head_dim, keys, factor, scores, stride);
  if (keys.type == KvType::kF16) return score_rows<RowF16>(q, groups, head_dim, keys, factor, scores, stride);
  return score_rows<RowF32>(q, groups, head_dim, keys, factor, scores, stride);
}

template <typename Row, int G>
SMALLTHINKER_INLINE void value_group(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                                     const std::byte* values, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) {
    __m256 first[G];
    __m256 second[G];
    for (int g = 0; g < G; ++g) {
      first[g] = _mm256_loadu_ps(out + g * head_dim + i);
      second[g] = _mm256_loadu_ps(out + g * head_dim + i + 8);
    }
    for (std::int64_t j = 0; j < count; ++j) {
      const std::byte* row = values + (j * head_dim + i) * Row::kBytes;
      __builtin_prefetch(row + kRowsTogether * head_dim * Row::kBytes, 0, 3);
      const __m256 a = Row::eight(row);
      const __m256 b = Row::eight(row + 8 * Row::kBytes);
      for (int g = 0; g < G; ++g) {
        const __m256 weight = _mm256_broadcast_ss(weights + g * weight_stride + j);
        first[g] = _mm256_fmadd_ps(weight, a, first[g]);
        second[g] = _mm256_fmadd_ps(weight, b, second[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      _mm256_storeu_ps(out + g * head_dim + i, first[g]);
      _mm256_storeu_ps(out + g * head_dim + i + 8, second[g]);
    }
  }
  add_last_columns<Row, G>(weights, weight_stride, head_dim, values, count, i, out);
}

template <typename Row>
void value_rows(const float* weights, std::int64_t weight_stride, std::int64_t groups, std::int64_t head_dim,
                const KvRows& values, float* out) {
  const auto* data = static_cast<const std::byte*>(values.data);
  for (std::int64_t j = 0; j < values.count; j += kRowsTogether) {
    const std::int64_t rows = values.count - j < kRowsTogether ? values.count - j : kRowsTogether;
    each_head_group<kMostHeads>(groups, [&](auto size, std::int64_t g) {
      value_group<Row, size>(weights + g * weight_stride + j, weight_stride, head_dim,
                             data + j * head_dim * Row::kBytes, rows, out + g * head_dim);
    });
  }
}

void attention_values(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                      std::int64_t head_dim, KvRows values, float* out) {
  if (values.type == KvType::kQ8)
    return q8_values<Bytes>(weights, weight_stride, groups, head_dim, values, out);
  if (values.type == KvType::kF16)
    return value_rows<RowF16>(weights, weight_stride, groups, head_dim, values, out);
  return value_rows<RowF32>(weights, weight_stride, groups, head_dim, values, out);
}

struct Exponential : Floats {
  static SMALLTHINKER_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static SMALLTHINKER_INLINE Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static SMALLTHINKER_INLINE Vec fused_negative(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
  static SMALLTHINKER_INLINE float sum(Vec value) { return horizontal_sum(value); }
  static SMALLTHINKER_INLINE Vec clamp(Vec x, float least,
                                       float most) {  // NaN is the second operand: it stays
    return _mm256_max_ps(_mm256_set1_ps(least), _mm256_min_ps(_mm256_set1_ps(most), x));
  }
  static SMALLTHINKER_INLINE Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static SMALLTHINKER_INLINE Vec scale_by_power(Vec p, Vec n, Vec x) {
    const __m256 alive = _mm256_cmp_ps(x, _mm256_set1_ps(kLeastExponent), _CMP_NLT_UQ);
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), alive);
  }
  static SMALLTHINKER_INLINE Vec load_some(const float* from, int count) {
    alignas(32) float lanes[kLanes];
    for (int k = 0; k < kLanes; ++k) lanes[k] = k < count ? from[k] : 0.0F;
    return _mm256_load_ps(lanes);
  }
  static SMALLTHINKER_INLINE void store_some(float* to, int count, Vec value) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, value);
    for (int k = 0; k < count; ++k) to[k] = lanes[k];
  }
  static SMALLTHINKER_INLINE Vec first_lanes(Vec value, int count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes)));
  }
};

void block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums, std::uint64_t* running) {
  const auto words = [&](std::size_t block, int half) {
    return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + block * 32) + half));
  };
  auto* const sum_out = reinterpret_cast<__m256i*>(sums);
  auto* const running_out = reinterpret_cast<__m256i*>(running);
  __m256i sum[2], total[2];
  for (int half = 0; half < 2; ++half) {
    sum[half] = _mm256_loadu_si256(sum_out + half);
    total[half] = _mm256_loadu_si256(running_out + half);
  }
  for (std::size_t block = 0; block < blocks; ++block) {
    for (int half = 0; half < 2; ++half) {
      sum[half] = _mm256_add_epi64(sum[half], words(block, half));
      total[half] = _mm256_add_epi64(total[half], sum[half]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    _mm256_storeu_si256(sum_out + half, sum[half]);
    _mm256_storeu_si256(running_out + half, total[half]);
  }
}

}  // namespace

void fill_stock(Kernels& table) {
  table.matmul = matmul;
  table.quantise = quantise;
  table.rms_norm = rms_norm;
  table.rotate = rotate;
  table.attention_scores = attention_scores;
  table.exp_sum = exp_sum<Exponential>;
  table.attention_values = attention_values;
  table.scale = scale;
  table.add_scaled = add_scaled;
  table.to_half = to_half;
  table.run_maxima = run_maxima<Exponential::kLanes>;
  table.exp_weights = exp_weights<Exponential::kLanes>;
  table.mass_above = mass_above<Exponential::kLanes>;
  table.block_sums = block_sums;
}

}  // namespace smallthinker::avx2
