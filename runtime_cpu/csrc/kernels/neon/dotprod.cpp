// NEON with the dot-product instructions (Armv8.2-A: A55, A76): four bytes to a 32-bit lane at once, on the
// packed layouts.
#include "kernels/attention_q8.hpp"
#include "kernels/neon/packed.hpp"

namespace smallthinker::neon {
namespace {

struct Dot {
  using Sum = int32x4_t;
  static constexpr int kSums = 8;

  static SMALLTHINKER_INLINE Sum zero() { return vdupq_n_s32(0); }
  static SMALLTHINKER_INLINE void add(Sum& sum, int8x16_t a, int8x16_t b) { sum = vdotq_s32(sum, a, b); }
  template <int J>
  static SMALLTHINKER_INLINE void add_word(Sum& sum, int8x16_t a, int8x16_t b) {
    sum = vdotq_laneq_s32(sum, a, b, J);
  }
  static SMALLTHINKER_INLINE int32x4_t total(const Sum& sum) { return sum; }

  // Four neurons to a word, byte by byte.
  static SMALLTHINKER_INLINE void columns(const HiddenColumn& column, std::int64_t at,
                                          int32x4_t (&sums)[4][2]) {
    int32x4_t high[4][2];
    for (auto& word : high) word[0] = word[1] = vdupq_n_s32(0);
    for (std::int64_t k = 0; k < column.count; k += 4) {
      const uint8x16_t a = load_bytes(column.nibbles[k] + at);
      const uint8x16_t b = load_bytes(column.nibbles[k + 1] + at);
      const uint8x16_t c = load_bytes(column.nibbles[k + 2] + at);
      const uint8x16_t d = load_bytes(column.nibbles[k + 3] + at);
      const uint8x16x2_t first = vzipq_u8(a, c);
      const uint8x16x2_t second = vzipq_u8(b, d);
      const uint8x16x2_t lower = vzipq_u8(first.val[0], second.val[0]);
      const uint8x16x2_t upper = vzipq_u8(first.val[1], second.val[1]);
      const uint8x16_t mixed[4] = {lower.val[0], lower.val[1], upper.val[0], upper.val[1]};
      const int8x16_t high_word = repeat_word(column.highs + k);
      const int8x16_t low_word = repeat_word(column.lows + k);
      for (int j = 0; j < 4; ++j) {
        for (int nibble = 0; nibble < 2; ++nibble) {
          const int8x16_t weights = neon::nibbles(mixed[j], nibble != 0);
          high[j][nibble] = vdotq_s32(high[j][nibble], weights, high_word);
          sums[j][nibble] = vdotq_s32(sums[j][nibble], weights, low_word);
        }
      }
    }
    for (int j = 0; j < 4; ++j) {
      for (int nibble = 0; nibble < 2; ++nibble) {
        sums[j][nibble] = vaddq_s32(sums[j][nibble], vshlq_n_s32(high[j][nibble], 8));
      }
    }
  }
};

struct Bytes : Floats {
  using Int = int32x4_t;
  static constexpr int kDotGroups = 2;
  static constexpr bool kUnsigned = false;
  static SMALLTHINKER_INLINE Vec halves(const std::byte* at) { return four_halves(at); }
  static SMALLTHINKER_INLINE Int all_ints(std::int32_t value) { return vdupq_n_s32(value); }
  static SMALLTHINKER_INLINE Int key_words(const std::byte* at) {
    return vreinterpretq_s32_u8(veorq_u8(load_bytes(at), vdupq_n_u8(128)));
  }
  static SMALLTHINKER_INLINE Int dot(Int sum, Int key, Int query) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(key), vreinterpretq_s8_s32(query));
  }
  static SMALLTHINKER_INLINE Vec joined(Int high, Int low) {
    return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
  }
};

void byte_attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                           float scale, float* scores, std::int64_t score_stride) {
  if (keys.type != KvType::kQ8)
    return attention_scores(q, groups, head_dim, keys, scale, scores, score_stride);
  q8_dot_scores<Bytes>(q, groups, head_dim, keys, scale, scores, score_stride, quantise);
}

}  // namespace

void dotprod_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                   const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  tiles<Dot>(matrix, tile_begin, tile_end, x, tokens, out, out_stride);
}

void fill_dotprod(Kernels& table) {
  table.tiles = dotprod_tiles;
  table.neurons = active_neurons<up_rows<Dot, 2>, up_rows<Dot, 1>, add_down<Dot>>;
  table.attention_scores = byte_attention_scores;
}

}  // namespace smallthinker::neon
