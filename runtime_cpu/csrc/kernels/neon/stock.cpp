// NEON of every 64-bit Arm processor (Armv8.0-A: A53, A72). Quantised weights are widened to 16 bits and
// multiplied with the 16-bit activations exactly, in 32-bit sums.
#include "kernels/attention.hpp"
#include "kernels/attention_q8.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/exponential.hpp"
#include "kernels/logits.hpp"
#include "kernels/neon/packed.hpp"
#include "kernels/stock_rows.hpp"

namespace smallthinker::neon {
namespace {

// ---- quantised rows: block b of 32 weights as 16-bit integers, and their scale

SMALLTHINKER_INLINE void widen(int8x16_t bytes, int16x8_t* weights) {
  weights[0] = vmovl_s8(vget_low_s8(bytes));
  weights[1] = vmovl_high_s8(bytes);
}

SMALLTHINKER_INLINE int8x16_t load_signed(const std::byte* at) { return vreinterpretq_s8_u8(load_bytes(at)); }

struct RowQ4 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, int16x8_t (&weights)[4]) {
    const std::byte* block = row + b * 18;
    const uint8x16_t packed = load_bytes(block + 2);
    widen(vsubq_s8(nibbles(packed, false), vdupq_n_s8(8)), weights);
    widen(vsubq_s8(nibbles(packed, true), vdupq_n_s8(8)), weights + 2);
    return one_half(block);
  }
};

struct RowQ8 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, int16x8_t (&weights)[4]) {
    const std::byte* block = row + b * 34;
    widen(load_signed(block + 2), weights);
    widen(load_signed(block + 18), weights + 2);
    return one_half(block);
  }
};

// Six bits times the 8-bit scale of each 16 weights still fit 16 bits, and 8 products of them 32 bits.
struct RowQ6 {
  static SMALLTHINKER_INLINE float unpack(const std::byte* row, std::int64_t b, int16x8_t (&weights)[4]) {
    const std::byte* block = row + (b >> 3) * 210;
    const int part = static_cast<int>(b & 7);
    const int quarter = part & 3;
    const std::byte* lower = block + 64 * (part >> 2) + 32 * (quarter & 1);
    const std::byte* upper = block + 128 + 32 * (part >> 2);
    const int8x16_t shift = vdupq_n_s8(static_cast<std::int8_t>(-2 * quarter));
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t bytes = load_bytes(lower + 16 * i);
      const uint8x16_t bottom = quarter < 2 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
      const uint8x16_t top = vandq_u8(vshlq_u8(load_bytes(upper + 16 * i), shift), vdupq_n_u8(3));
      const int8x16_t value = vreinterpretq_s8_u8(vorrq_u8(bottom, vshlq_n_u8(top, 4)));
      widen(vsubq_s8(value, vdupq_n_s8(32)), weights + 2 * i);
      const auto scale = static_cast<std::int16_t>(load<std::int8_t>(block + 192 + 2 * part + i));
      weights[2 * i] = vmulq_n_s16(weights[2 * i], scale);
      weights[2 * i + 1] = vmulq_n_s16(weights[2 * i + 1], scale);
    }
    return one_half(block + 208);
  }
};

// One row with N tokens. Two accumulators (even and odd blocks) hide the latency of the additions.
template <typename Row, int N>
struct QuantisedTile {
  static SMALLTHINKER_INLINE void run(const std::byte* row, std::int64_t cols, const Activations& x,
                                      std::int64_t token, float* sums) {
    const std::int64_t blocks = cols / kActivationBlock;
    const std::int16_t* q[N];
    const float* scales[N];
    float32x4_t accumulators[N][2];
    for (int n = 0; n < N; ++n) {
      q[n] = x.q_row(token + n);
      scales[n] = x.scale_row(token + n);
      accumulators[n][0] = accumulators[n][1] = vdupq_n_f32(0.0F);
    }
    const auto step = [&](std::int64_t b, int which) __attribute__((always_inline)) {
      int16x8_t weights[4];
      const float weight_scale = Row::unpack(row, b, weights);
      for (int n = 0; n < N; ++n) {
        int32x4_t products = vdupq_n_s32(0);
        for (int i = 0; i < 4; ++i) {
          const int16x8_t values = vld1q_s16(q[n] + b * kActivationBlock + 8 * i);
          products = vmlal_s16(products, vget_low_s16(weights[i]), vget_low_s16(values));
          products = vmlal_high_s16(products, weights[i], values);
        }
        const float32x4_t scale = vdupq_n_f32(weight_scale * scales[n][b]);
        accumulators[n][which] = vfmaq_f32(accumulators[n][which], vcvtq_f32_s32(products), scale);
      }
    };
    std::int64_t b = 0;
    for (; b + 1 < blocks; b += 2) {
      step(b, 0);
      step(b + 1, 1);
    }
    if (b < blocks) step(b, 0);
    for (int n = 0; n < N; ++n) sums[n] = sum_lanes(vaddq_f32(accumulators[n][0], accumulators[n][1]));
  }
};

// ---- rows of real numbers

struct RowF32 {
  static constexpr std::int64_t kBytes = 4;
  static SMALLTHINKER_INLINE float32x4_t four(const std::byte* at) {
    return vreinterpretq_f32_u8(load_bytes(at));
  }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return load<float>(at); }
};

struct RowF16 {
  static constexpr std::int64_t kBytes = 2;
  static SMALLTHINKER_INLINE float32x4_t four(const std::byte* at) { return four_halves(at); }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return one_half(at); }
};

struct RowBF16 {
  static constexpr std::int64_t kBytes = 2;
  static SMALLTHINKER_INLINE float32x4_t four(const std::byte* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(load<std::uint64_t>(at)), 16));
  }
  static SMALLTHINKER_INLINE float one(const std::byte* at) {
    const std::uint32_t bits = static_cast<std::uint32_t>(load<std::uint16_t>(at)) << 16U;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <typename Row, int N>
struct RealTile {
  static SMALLTHINKER_INLINE void run(const std::byte* row, std::int64_t cols, const Activations& x,
                                      std::int64_t token, float* sums) {
    const float* rows[N];
    float32x4_t accumulators[N][4];
    for (int n = 0; n < N; ++n) {
      rows[n] = x.f32_row(token + n);
      for (float32x4_t& sum : accumulators[n]) sum = vdupq_n_f32(0.0F);
    }
    std::int64_t i = 0;
    for (; i + 16 <= cols; i += 16) {
      for (int k = 0; k < 4; ++k) {
        const float32x4_t weights = Row::four(row + (i + 4 * k) * Row::kBytes);
        for (int n = 0; n < N; ++n) {
          accumulators[n][k] = vfmaq_f32(accumulators[n][k], weights, vld1q_f32(rows[n] + i + 4 * k));
        }
      }
    }
    float tails[N] = {};
    for (; i < cols; ++i) {
      const float weight = Row::one(row + i * Row::kBytes);
      for (int n = 0; n < N; ++n) tails[n] = __builtin_fmaf(weight, rows[n][i], tails[n]);
    }
    for (int n = 0; n < N; ++n) {
      const float32x4_t* four = accumulators[n];
      sums[n] = sum_lanes(vaddq_f32(vaddq_f32(four[0], four[1]), vaddq_f32(four[2], four[3]))) + tails[n];
    }
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

// ---- activations

// Equal to the reference bit for bit.
void quantise(const float* x, std::int64_t size, std::int16_t* q, float* scales) {
  for (std::int64_t start = 0; start < size; start += kActivationBlock) {
    float32x4_t v[8];
    float32x4_t greatest = vdupq_n_f32(0.0F);
    uint32x4_t finite = vdupq_n_u32(~0U);
    for (int i = 0; i < 8; ++i) {
      v[i] = vld1q_f32(x + start + 4 * i);
      const float32x4_t magnitude = vabsq_f32(v[i]);
      finite = vandq_u32(finite, vcleq_f32(magnitude, vdupq_n_f32(__FLT_MAX__)));
      greatest = vmaxq_f32(greatest, magnitude);
    }
    if (vminvq_u32(finite) == 0) {
      scales[start / kActivationBlock] = __builtin_nanf("");
      for (std::int64_t i = 0; i < kActivationBlock; ++i) q[start + i] = 1;
      continue;
    }
    const float peak = vmaxvq_f32(greatest);
    const float scale = peak / kActivationSteps;
    scales[start / kActivationBlock] = scale;
    const float inverse = scale >= __FLT_MIN__ ? kActivationSteps / peak : 0.0F;
    for (int i = 0; i < 8; i += 2) {
      const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
      const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(v[i + 1], inverse));
      vst1q_s16(q + start + 4 * i, vcombine_s16(vmovn_s32(first), vmovn_s32(second)));
    }
  }
}

namespace {

void rms_norm(const float* x, const float* weight, std::int64_t size, float epsilon, float* out) {
  float64x2_t low = vdupq_n_f64(0.0);
  float64x2_t high = vdupq_n_f64(0.0);
  std::int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    const float32x4_t four = vld1q_f32(x + i);
    const float64x2_t a = vcvt_f64_f32(vget_low_f32(four));
    const float64x2_t b = vcvt_high_f64_f32(four);
    low = vfmaq_f64(low, a, a);
    high = vfmaq_f64(high, b, b);
  }
  const float64x2_t both = vaddq_f64(low, high);
  double sum = vgetq_lane_f64(both, 0) + vgetq_lane_f64(both, 1);
  for (; i < size; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double mean = sum / static_cast<double>(size) + static_cast<double>(epsilon);
  const auto factor = static_cast<float>(1.0 / __builtin_sqrt(mean));
  for (i = 0; i + 4 <= size; i += 4) {
    vst1q_f32(out + i, vmulq_f32(vld1q_f32(weight + i), vmulq_n_f32(vld1q_f32(x + i), factor)));
  }
  for (; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

void to_half(const float* x, std::int64_t size, std::uint16_t* out) {
  std::int64_t i = 0;
  for (; i + 4 <= size; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
  for (; i < size; ++i) {
    out[i] = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x[i]))), 0);
  }
}

// ---- attention

template <typename Row, int G>
SMALLTHINKER_INLINE void score_group(const float* q, std::int64_t head_dim, const std::byte* keys,
                                     std::int64_t tiles, float factor, float* scores, std::int64_t stride) {
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::byte* tile = keys + t * head_dim * kKeyTile * Row::kBytes;
    float32x4_t sums[G][4];
    for (auto& group : sums) {
      for (float32x4_t& sum : group) sum = vdupq_n_f32(0.0F);
    }
    for (std::int64_t i = 0; i < head_dim; ++i, tile += kKeyTile * Row::kBytes) {
      float32x4_t key[4];
      for (int k = 0; k < 4; ++k) key[k] = Row::four(tile + 4 * k * Row::kBytes);
      for (int g = 0; g < G; ++g) {
        for (int k = 0; k < 4; ++k) sums[g][k] = vfmaq_n_f32(sums[g][k], key[k], q[g * head_dim + i]);
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int k = 0; k < 4; ++k) {
        vst1q_f32(scores + g * stride + t * kKeyTile + 4 * k, vmulq_n_f32(sums[g][k], factor));
      }
    }
  }
}

template <typename Row>
void score_rows(const float* q, std::int64_t groups, std::int64_t head_dim, const KvRows& keys, float factor,
                float* scores, std::int64_t stride) {
  const auto* data = static_cast<const std::byte*>(keys.data);
  std::int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    score_group<Row, 4>(q + g * head_dim, head_dim, data, keys.count, factor, scores + g * stride, stride);
  }
  for (; g + 2 <= groups; g += 2) {
    score_group<Row, 2>(q + g * head_dim, head_dim, data, keys.count, factor, scores + g * stride, stride);
  }
  if (g < groups)
    score_group<Row, 1>(q + g * head_dim, head_dim, data, keys.count, factor, scores + g * stride, stride);
}

struct Bytes : Floats {
  static constexpr int kGroups = 4;
  static constexpr int kTiles = 1;
  static constexpr int kPanel = 4;
  static SMALLTHINKER_INLINE Vec halves(const std::byte* at) { return RowF16::four(at); }
  static SMALLTHINKER_INLINE float half(const std::byte* at) { return RowF16::one(at); }
  static SMALLTHINKER_INLINE Vec byte_of_words(const std::byte* at, int byte) {
    const int32x4_t steps = vreinterpretq_s32_u8(veorq_u8(load_bytes(at), vdupq_n_u8(128)));
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(steps, vdupq_n_s32(24 - 8 * byte)), 24));
  }
  static SMALLTHINKER_INLINE Vec bytes(const std::byte* at) {
    const int8x8_t steps = vreinterpret_s8_u32(vdup_n_u32(smallthinker::load<std::uint32_t>(at)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(steps))));
  }
};

}  // namespace

void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float factor,
                      float* scores, std::int64_t stride) {
  if (keys.type == KvType::kQ8) return q8_scores<Bytes>(q, groups, head_dim, keys, factor, scores, stride);
  if (keys.type == KvType::kF16) return score_rows<RowF16>(q, groups, head_dim, keys, factor, scores, stride);
  return score_rows<RowF32>(q, groups, head_dim, keys, factor, scores, stride);
}

namespace {

template <typename Row, int G>
SMALLTHINKER_INLINE void value_group(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                                     const std::byte* values, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) {
    float32x4_t sums[G][4];
    for (int g = 0; g < G; ++g) {
      for (int k = 0; k < 4; ++k) sums[g][k] = vld1q_f32(out + g * head_dim + i + 4 * k);
    }
    for (std::int64_t j = 0; j < count; ++j) {
      const std::byte* row = values + (j * head_dim + i) * Row::kBytes;
      float32x4_t value[4];
      for (int k = 0; k < 4; ++k) value[k] = Row::four(row + 4 * k * Row::kBytes);
      for (int g = 0; g < G; ++g) {
        const float weight = weights[g * weight_stride + j];
        for (int k = 0; k < 4; ++k) sums[g][k] = vfmaq_n_f32(sums[g][k], value[k], weight);
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int k = 0; k < 4; ++k) vst1q_f32(out + g * head_dim + i + 4 * k, sums[g][k]);
    }
  }
  add_last_columns<Row, G>(weights, weight_stride, head_dim, values, count, i, out);
}

template <typename Row>
void value_rows(const float* weights, std::int64_t weight_stride, std::int64_t groups, std::int64_t head_dim,
                const KvRows& values, float* out) {
  const auto* data = static_cast<const std::byte*>(values.data);
  std::int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    value_group<Row, 4>(weights + g * weight_stride, weight_stride, head_dim, data, values.count,
                        out + g * head_dim);
  }
  for (; g < groups; ++g) {
    value_group<Row, 1>(weights + g * weight_stride, weight_stride, head_dim, data, values.count,
                        out + g * head_dim);
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
  static SMALLTHINKER_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static SMALLTHINKER_INLINE Vec subtract(Vec a, Vec b) { return vsubq_f32(a, b); }
  static SMALLTHINKER_INLINE Vec fused_negative(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
  static SMALLTHINKER_INLINE float sum(Vec value) { return sum_lanes(value); }
  static SMALLTHINKER_INLINE Vec clamp(Vec x, float least, float most) {  // NaN stays NaN
    return vmaxq_f32(vminq_f32(x, vdupq_n_f32(most)), vdupq_n_f32(least));
  }
  static SMALLTHINKER_INLINE Vec round(Vec x) { return vrndnq_f32(x); }
  static SMALLTHINKER_INLINE Vec scale_by_power(Vec p, Vec n, Vec x) {
    const uint32x4_t dead = vcltq_f32(x, vdupq_n_f32(kLeastExponent));
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    const float32x4_t value = vmulq_f32(p, vreinterpretq_f32_s32(exponent));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), dead));
  }
  static SMALLTHINKER_INLINE Vec load_some(const float* from, int count) {
    float lanes[kLanes];
    for (int k = 0; k < kLanes; ++k) lanes[k] = k < count ? from[k] : 0.0F;
    return vld1q_f32(lanes);
  }
  static SMALLTHINKER_INLINE void store_some(float* to, int count, Vec value) {
    float lanes[kLanes];
    vst1q_f32(lanes, value);
    for (int k = 0; k < count; ++k) to[k] = lanes[k];
  }
  static SMALLTHINKER_INLINE Vec first_lanes(Vec value, int count) {
    float lanes[kLanes];
    vst1q_f32(lanes, value);
    for (int k = count; k < kLanes; ++k) lanes[k] = 0.0F;
    return vld1q_f32(lanes);
  }
};

void matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
            const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  matmul_stock<StockRows>(matrix, expert, row_begin, row_end, x, tokens, out, out_stride);
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
}

}  // namespace smallthinker::neon
