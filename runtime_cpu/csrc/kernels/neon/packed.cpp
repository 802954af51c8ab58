// The packed layouts for every 64-bit Arm processor (Armv8.0-A: A53, A72), which multiply-adds bytes into 16
// bits only.
#include "kernels/neon/packed.hpp"

namespace smallthinker::neon {
namespace {

struct Dot {
  // Of rows 0 and 1, 2 and 3: the sums of up to 8 products of an unsigned nibble and a signed byte fit 16
  // bits even when four neighbours are added.
  struct Sum {
    int16x8_t first;
    int16x8_t second;
  };
  static constexpr int kSums = 4;

  static SMALLTHINKER_INLINE Sum zero() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
  static SMALLTHINKER_INLINE void add(Sum& sum, int8x16_t a, int8x16_t b) {
    sum.first = vmlal_s8(sum.first, vget_low_s8(a), vget_low_s8(b));
    sum.second = vmlal_high_s8(sum.second, a, b);
  }
  template <int J>
  static SMALLTHINKER_INLINE void add_word(Sum& sum, int8x16_t a, int8x16_t b) {
    add(sum, a, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(b), J)));
  }
  static SMALLTHINKER_INLINE int32x4_t total(const Sum& sum) {
    return vpaddlq_s16(vpaddq_s16(sum.first, sum.second));
  }

  static SMALLTHINKER_INLINE void columns(const HiddenColumn& column, std::int64_t at,
                                          int32x4_t (&sums)[4][2]) {
    constexpr std::int64_t kNarrow = 16;  // 16 * 15 * 128 < 2^15
    for (std::int64_t begin = 0; begin < column.count; begin += kNarrow) {
      const std::int64_t end = begin + kNarrow < column.count ? begin + kNarrow : column.count;
      Sum high[2] = {zero(), zero()};
      Sum low[2] = {zero(), zero()};
      for (std::int64_t k = begin; k < end; ++k) {
        const uint8x16_t bytes = load_bytes(column.nibbles[k] + at);
        const int8x16_t high_value = vdupq_n_s8(column.highs[k]);
        const int8x16_t low_value = vdupq_n_s8(column.lows[k]);
        for (int nibble = 0; nibble < 2; ++nibble) {
          const int8x16_t weights = neon::nibbles(bytes, nibble != 0);
          add(high[nibble], weights, high_value);
          add(low[nibble], weights, low_value);
        }
      }
      for (int nibble = 0; nibble < 2; ++nibble) {
        const auto widen_to = [&](int32x4_t& sum, int16x4_t lower, int16x4_t upper)
                                  __attribute__((always_inline)) {
                                    sum = vaddq_s32(vaddw_s16(sum, lower), vshll_n_s16(upper, 8));
                                  };
        const Sum& l = low[nibble];
        const Sum& h = high[nibble];
        widen_to(sums[0][nibble], vget_low_s16(l.first), vget_low_s16(h.first));
        widen_to(sums[1][nibble], vget_high_s16(l.first), vget_high_s16(h.first));
        widen_to(sums[2][nibble], vget_low_s16(l.second), vget_low_s16(h.second));
        widen_to(sums[3][nibble], vget_high_s16(l.second), vget_high_s16(h.second));
      }
    }
  }
};

void split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row) {
  const std::int64_t blocks = Planes::blocks(cols);
  const std::int64_t used = cols / kActivationBlock;
  auto* natural = static_cast<std::int8_t*>(static_cast<void*>(row));
  std::int8_t* transposed = natural + blocks * 64;
  auto* out_scales = static_cast<float*>(static_cast<void*>(row + blocks * 128));
  auto* offsets = static_cast<std::int32_t*>(static_cast<void*>(row + blocks * 132));
  for (std::int64_t b = 0; b < blocks; ++b) {
    std::int32_t sum = 0;
    for (int i = 0; i < 4; ++i) {
      const int16x8_t values = b < used ? vld1q_s16(q + b * kActivationBlock + 8 * i) : vdupq_n_s16(0);
      const int16x8_t upper = vshrq_n_s16(vaddq_s16(values, vdupq_n_s16(128)), 8);
      vst1_s8(natural + b * 64 + 8 * i, vmovn_s16(upper));
      vst1_s8(natural + b * 64 + 32 + 8 * i, vmovn_s16(values));  // the lower byte, signed
      sum += vaddlvq_s16(values);
    }
    offsets[b] = -8 * sum;
    out_scales[b] = b < used ? scales[b] : 0.0F;
  }
  for (std::int64_t b = 0; b < blocks; b += 4) {  // 4 blocks times 4 words
    std::int8_t* to = transposed + b / 16 * 1024 + b % 16 * 4;
    for (int w = 0; w < 16; w += 4) {
      const auto part = [&](std::int64_t i) __attribute__((always_inline)) {
        return vreinterpretq_s32_s8(vld1q_s8(natural + (b + i) * 64 + w * 4));
      };
      const int32x4x2_t even = vzipq_s32(part(0), part(2));
      const int32x4x2_t odd = vzipq_s32(part(1), part(3));
      const int32x4x2_t lower = vzipq_s32(even.val[0], odd.val[0]);
      const int32x4x2_t upper = vzipq_s32(even.val[1], odd.val[1]);
      vst1q_s8(to + w * 64, vreinterpretq_s8_s32(lower.val[0]));
      vst1q_s8(to + w * 64 + 64, vreinterpretq_s8_s32(lower.val[1]));
      vst1q_s8(to + w * 64 + 128, vreinterpretq_s8_s32(upper.val[0]));
      vst1q_s8(to + w * 64 + 192, vreinterpretq_s8_s32(upper.val[1]));
    }
  }
}

}  // namespace

void fill_packed(Kernels& table) {
  table.packed = true;
  table.split_planes = split_planes;
  table.tiles = tiles<Dot>;
  table.neurons = active_neurons<up_rows<Dot, 2>, up_rows<Dot, 1>, add_down<Dot>>;
}

}  // namespace smallthinker::neon
