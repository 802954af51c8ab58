// What the NEON kernel files share: loads, and the packed layouts' loops over a `Dot`, the way in which one
// instruction set multiplies bytes. A Dot is a struct of the file's own anonymous namespace, so that every
// instance of these templates belongs to that file alone:
//
//   struct Dot {
//     struct Sum;                                               // four 32-bit sums, however it keeps them
//     static Sum zero();
//     static void add(Sum&, int8x16_t a, int8x16_t b);          // bytes 4 i + k of both, for each sum i
//     template <int J>
//     static void add_word(Sum&, int8x16_t a, int8x16_t b);     // bytes 4 i + k of a and 4 J + k of b
//     static int32x4_t total(const Sum&);                       // of at most 8 additions
//     static void columns(const HiddenColumn&, std::int64_t at, int32x4_t (&sums)[4][2]);
//     static constexpr int kSums;                               // that fit the registers
//   };
#pragma once

#include <arm_neon.h>

#include "kernels/active_neurons.hpp"
#include "kernels/neon/table.hpp"
#include "kernels/token_groups.hpp"

namespace smallthinker::neon {

// ---- loads

SMALLTHINKER_INLINE uint8x16_t load_bytes(const std::byte* at) {
  return vld1q_u8(static_cast<const std::uint8_t*>(static_cast<const void*>(at)));
}

SMALLTHINKER_INLINE float32x4_t four_halves(const std::byte* at) {
  const uint16x4_t bits = vld1_u16(static_cast<const std::uint16_t*>(static_cast<const void*>(at)));
  return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

SMALLTHINKER_INLINE float one_half(const std::byte* at) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load<std::uint16_t>(at)))), 0);
}

SMALLTHINKER_INLINE int8x16_t nibbles(uint8x16_t bytes, bool high) {
  return vreinterpretq_s8_u8(high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
}

SMALLTHINKER_INLINE int8x16_t repeat_word(const std::int8_t* at) {
  return vreinterpretq_s8_s32(vdupq_n_s32(load<std::int32_t>(reinterpret_cast<const std::byte*>(at))));
}

// start + low + 256 * high.
SMALLTHINKER_INLINE float32x4_t join(int32x4_t start, int32x4_t low, int32x4_t high) {
  return vcvtq_f32_s32(vaddq_s32(vaddq_s32(start, low), vshlq_n_s32(high, 8)));
}

SMALLTHINKER_INLINE float sum_lanes(float32x4_t v) {
  const float32x2_t half = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
}

SMALLTHINKER_INLINE void store_rows(float* out, std::int64_t left, float32x4_t values) {
  if (left >= 4) {
    vst1q_f32(out, values);
    return;
  }
  float lanes[4];
  vst1q_f32(lanes, values);
  for (std::int64_t i = 0; i < left; ++i) out[i] = lanes[i];
}

// What the templates of several instruction sets compute with.
struct Floats {
  using Vec = float32x4_t;
  static constexpr int kLanes = 4;
  static SMALLTHINKER_INLINE Vec all(float value) { return vdupq_n_f32(value); }
  static SMALLTHINKER_INLINE Vec load(const float* at) { return vld1q_f32(at); }
  static SMALLTHINKER_INLINE void store(float* at, Vec value) { vst1q_f32(at, value); }
  static SMALLTHINKER_INLINE Vec multiply(Vec a, Vec b) { return vmulq_f32(a, b); }
  static SMALLTHINKER_INLINE Vec fused(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }  // a * b + c
};

// ---- tiles

// The products of word J of every row with N tokens.
template <typename Dot, int J, int N, int R>
SMALLTHINKER_INLINE void tile_word(const std::byte* block, bool upper, const int8x16_t (&x_high)[N],
                                   const int8x16_t (&x_low)[N], typename Dot::Sum (&high)[N][R],
                                   typename Dot::Sum (&low)[N][R]) {
  int8x16_t weights[R];
  for (int r = 0; r < R; ++r) weights[r] = nibbles(load_bytes(block + J * 64 + r * 16), upper);
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) Dot::template add_word<J>(high[n][r], weights[r], x_high[n]);
    for (int r = 0; r < R; ++r) Dot::template add_word<J>(low[n][r], weights[r], x_low[n]);
  }
}

// One block of 32 columns of 4 * R rows with N tokens, by a Dot.
template <typename Dot, int N, int R>
struct DotBlock {
  typename Dot::Sum highs[N][R];
  typename Dot::Sum lows[N][R];

  // `block` [4 words][16 rows][4 bytes] from the first row on; block `b` of the activations.
  SMALLTHINKER_INLINE DotBlock(const std::byte* block, const Planes (&planes)[N], std::int64_t b) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) highs[n][r] = lows[n][r] = Dot::zero();
    }
    for (int half = 0; half < 2; ++half) {
      int8x16_t x_high[N];
      int8x16_t x_low[N];
      for (int n = 0; n < N; ++n) {
        const std::int8_t* values = planes[n].natural() + b * 64 + half * 16;
        x_high[n] = vld1q_s8(values);
        x_low[n] = vld1q_s8(values + 32);
      }
      tile_word<Dot, 0>(block, half != 0, x_high, x_low, highs, lows);
      tile_word<Dot, 1>(block, half != 0, x_high, x_low, highs, lows);
      tile_word<Dot, 2>(block, half != 0, x_high, x_low, highs, lows);
      tile_word<Dot, 3>(block, half != 0, x_high, x_low, highs, lows);
    }
  }
  SMALLTHINKER_INLINE int32x4_t high(int n, int r) const { return Dot::total(highs[n][r]); }
  SMALLTHINKER_INLINE int32x4_t low(int n, int r) const { return Dot::total(lows[n][r]); }
};

// N tokens with R times 4 rows of each tile at a time. `Block` has DotBlock's constructor, high() and low().
template <typename Block, int N, int R>
SMALLTHINKER_NOINLINE void tile_tokens(const TileMatrix& matrix, std::int64_t tile_begin,
                                       std::int64_t tile_end, const Activations& x, std::int64_t token,
                                       float* out, std::int64_t out_stride) {
  const std::int64_t pairs = matrix.pairs();
  Planes planes[N];
  for (int n = 0; n < N; ++n) planes[n] = {x.plane_row(token + n), Planes::blocks(matrix.cols)};
  const std::byte* begin = matrix.data + static_cast<std::size_t>(tile_begin) * matrix.tile_bytes();
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile, begin += matrix.tile_bytes()) {
    for (int first = 0; first < 4; first += R) {
      float32x4_t sums[N][R];
      for (auto& token_sums : sums) {
        for (float32x4_t& sum : token_sums) sum = vdupq_n_f32(0.0F);
      }
      for (std::int64_t b = 0; b < 2 * pairs; ++b) {
        const std::byte* pair = begin + b / 2 * kTilePairBytes;
        const Block block(pair + b % 2 * 256 + first * 16, planes, b);
        for (int r = 0; r < R; ++r) {
          const float32x4_t scales = four_halves(pair + 512 + b % 2 * 32 + (first + r) * 8);
          for (int n = 0; n < N; ++n) {
            const float32x4_t scale = vmulq_n_f32(scales, planes[n].scales()[b]);
            const int32x4_t start = vdupq_n_s32(planes[n].offsets()[b]);
            const float32x4_t value = join(start, block.low(n, r), block.high(n, r));
            sums[n][r] = vfmaq_f32(sums[n][r], value, scale);
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) {
          const std::int64_t row = (tile - tile_begin) * kTileRows + (first + r) * 4;
          store_rows(out + (token + n) * out_stride + row, matrix.rows - tile_begin * kTileRows - row,
                     sums[n][r]);
        }
      }
    }
  }
}

template <typename Dot>
void tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end, const Activations& x,
           std::int64_t tokens, float* out, std::int64_t out_stride) {
  each_token_group(tokens, [&](auto n, std::int64_t t) {
    constexpr int kRows = n == 1 ? 4 : Dot::kSums / n;
    tile_tokens<DotBlock<Dot, n, kRows>, n, kRows>(matrix, tile_begin, tile_end, x, t, out, out_stride);
  });
}

// ---- neurons

struct Nearest {
  static SMALLTHINKER_INLINE std::int32_t of(float value) { return vcvtns_s32_f32(value); }
};

// Dot products of R up rows with x; a register holds 4 of the 16 blocks of a run.
template <typename Dot, int R>
SMALLTHINKER_INLINE void up_rows(const ExpertShape& shape, const std::byte* const* groups,
                                 const std::int32_t* ids, const Planes& x, float* out) {
  float32x4_t sums[R][4];
  for (auto& row : sums) {
    for (float32x4_t& sum : row) sum = vdupq_n_f32(0.0F);
  }
  for (std::int64_t run = 0; run < shape.runs(); ++run) {
    for (int quad = 0; quad < 4; ++quad) {
      const std::int8_t* values = x.transposed() + run * 1024 + quad * 16;
      typename Dot::Sum high[R];
      typename Dot::Sum low[R];
      for (int r = 0; r < R; ++r) high[r] = low[r] = Dot::zero();
      for (int j = 0; j < 4; ++j) {
        for (int r = 0; r < R; ++r) {
          const uint8x16_t bytes =
              load_bytes(groups[r] + shape.up_nibbles(ids[r]) + run * 256 + j * 64 + quad * 16);
          const int8x16_t first = nibbles(bytes, false);
          const int8x16_t second = nibbles(bytes, true);
          Dot::add(high[r], first, vld1q_s8(values + j * 64));
          Dot::add(high[r], second, vld1q_s8(values + (4 + j) * 64));
          Dot::add(low[r], first, vld1q_s8(values + (8 + j) * 64));
          Dot::add(low[r], second, vld1q_s8(values + (12 + j) * 64));
        }
      }
      const int32x4_t start = vld1q_s32(x.offsets() + run * 16 + quad * 4);
      const float32x4_t x_scales = vld1q_f32(x.scales() + run * 16 + quad * 4);
      for (int r = 0; r < R; ++r) {
        const float32x4_t scales = four_halves(groups[r] + shape.up_scales(ids[r]) + run * 32 + quad * 8);
        const float32x4_t value = join(start, Dot::total(low[r]), Dot::total(high[r]));
        sums[r][quad] = vfmaq_f32(sums[r][quad], value, vmulq_f32(x_scales, scales));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    out[r] = sum_lanes(vaddq_f32(vaddq_f32(sums[r][0], sums[r][1]), vaddq_f32(sums[r][2], sums[r][3])));
  }
}

// out += sum over the `count` listed neurons of one group of hidden[i] * down column.
template <typename Dot>
void add_down(const ExpertShape& shape, const std::byte* group, const std::int32_t* ids, const float* hidden,
              std::int64_t count, NeuronFetch& fetch, float* out) {
  HiddenColumn column;
  quantise_hidden<Nearest>(shape, group, ids, hidden, count, column);
  for (std::int64_t at = 0; at < shape.padded() / 2; at += 16) {
    if (at % 32 == 0) fetch.outputs(2 * at);
    int32x4_t sums[4][2];
    for (auto& word : sums) word[0] = word[1] = vdupq_n_s32(-8 * column.total);
    Dot::columns(column, at, sums);
    for (int j = 0; j < 4; ++j) {
      for (int nibble = 0; nibble < 2; ++nibble) {
        const std::int64_t output = at / 64 * 128 + j * 32 + nibble * 16 + at % 64 / 4;
        const float32x4_t factor = vmulq_n_f32(four_halves(group + output * 2), column.scale);
        const float32x4_t value = vcvtq_f32_s32(sums[j][nibble]);
        vst1q_f32(out + output, vfmaq_f32(vld1q_f32(out + output), value, factor));
      }
    }
  }
}

}  // namespace smallthinker::neon
