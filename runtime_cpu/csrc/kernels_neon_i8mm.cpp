// NEON with the 8-bit matrix instructions (i8mm: Armv8.6-A, A510, A710 and later) for prompts. One smmla
// multiplies 8 columns of 2 rows with both bytes of one token's activations. Everything else is the
// dot-product table's.
#include "kernels_neon.hpp"

namespace smallthinker {
namespace {

// The products of columns 8 * J … 8 * J + 7 of 4 * R rows, low or upper nibbles, with N tokens.
template <int N, int R>
SMALLTHINKER_INLINE void eight_columns(const std::byte* block, int j, bool upper, const int8x16_t (&x)[N],
                                       int32x4_t (&sums)[N][R][2]) {
  for (int r = 0; r < R; ++r) {
    // [4 rows][4 columns] twice to [2 rows][8 columns] twice
    const uint32x4_t first = vreinterpretq_u32_u8(neon::load_bytes(block + j * 128 + r * 16));
    const uint32x4_t second = vreinterpretq_u32_u8(neon::load_bytes(block + j * 128 + 64 + r * 16));
    const int8x16_t top = neon::nibbles(vreinterpretq_u8_u32(vzip1q_u32(first, second)), upper);
    const int8x16_t bottom = neon::nibbles(vreinterpretq_u8_u32(vzip2q_u32(first, second)), upper);
    for (int n = 0; n < N; ++n) {
      sums[n][r][0] = vmmlaq_s32(sums[n][r][0], top, x[n]);
      sums[n][r][1] = vmmlaq_s32(sums[n][r][1], bottom, x[n]);
    }
  }
}

template <int N, int R>
void tile_tokens(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                 const Activations& x, std::int64_t token, float* out, std::int64_t out_stride) {
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
        int32x4_t products[N][R][2];  // of two rows each: high, low, high, low
        for (int n = 0; n < N; ++n) {
          for (int r = 0; r < R; ++r) products[n][r][0] = products[n][r][1] = vdupq_n_s32(0);
        }
        for (int half = 0; half < 2; ++half) {
          for (int j = 0; j < 2; ++j) {
            int8x16_t values[N];
            for (int n = 0; n < N; ++n) {
              const std::int8_t* at = planes[n].natural() + b * 64 + half * 16 + j * 8;
              values[n] = vcombine_s8(vld1_s8(at), vld1_s8(at + 32));
            }
            eight_columns(pair + b % 2 * 256 + first * 16, j, half != 0, values, products);
          }
        }
        for (int r = 0; r < R; ++r) {
          const float32x4_t scales = neon::four_halves(pair + 512 + b % 2 * 32 + (first + r) * 8);
          for (int n = 0; n < N; ++n) {
            const int32x4_t high = vuzp1q_s32(products[n][r][0], products[n][r][1]);
            const int32x4_t low = vuzp2q_s32(products[n][r][0], products[n][r][1]);
            const float32x4_t value = neon::join(vdupq_n_s32(planes[n].offsets()[b]), low, high);
            sums[n][r] = vfmaq_f32(sums[n][r], value, vmulq_n_f32(scales, planes[n].scales()[b]));
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) {
          const std::int64_t row = (tile - tile_begin) * kTileRows + (first + r) * 4;
          neon::store_rows(out + (token + n) * out_stride + row, matrix.rows - tile_begin * kTileRows - row,
                           sums[n][r]);
        }
      }
    }
  }
}

}  // namespace

void neon_i8mm_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                     const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  std::int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) tile_tokens<4, 2>(matrix, tile_begin, tile_end, x, t, out, out_stride);
  for (; t + 2 <= tokens; t += 2) tile_tokens<2, 4>(matrix, tile_begin, tile_end, x, t, out, out_stride);
  if (t == tokens) return;
  // The same integers and the same order of sums, so the same bits.
  Activations last = x;
  const auto row = static_cast<std::int32_t>(x.at(t));
  last.index = &row;
  neon_dotprod_tiles(matrix, tile_begin, tile_end, last, 1, out + t * out_stride, out_stride);
}

}  // namespace smallthinker
