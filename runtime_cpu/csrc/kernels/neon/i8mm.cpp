// NEON with the 8-bit matrix instructions (i8mm: Armv8.6-A, A510, A710 and later) for prompts. One smmla
// multiplies 8 columns of 2 rows with both bytes of one token's activations. Everything else is the
// dot-product table's.
#include "kernels/neon/packed.hpp"

namespace smallthinker::neon {
namespace {

// The products of columns 8 * J … 8 * J + 7 of 4 * R rows, low or upper nibbles, with N tokens.
template <int N, int R>
SMALLTHINKER_INLINE void eight_columns(const std::byte* block, int j, bool upper, const int8x16_t (&x)[N],
                                       int32x4_t (&sums)[N][R][2]) {
  for (int r = 0; r < R; ++r) {
    // [4 rows][4 columns] twice to [2 rows][8 columns] twice
    const uint32x4_t first = vreinterpretq_u32_u8(load_bytes(block + j * 128 + r * 16));
    const uint32x4_t second = vreinterpretq_u32_u8(load_bytes(block + j * 128 + 64 + r * 16));
    const int8x16_t top = nibbles(vreinterpretq_u8_u32(vzip1q_u32(first, second)), upper);
    const int8x16_t bottom = nibbles(vreinterpretq_u8_u32(vzip2q_u32(first, second)), upper);
    for (int n = 0; n < N; ++n) {
      sums[n][r][0] = vmmlaq_s32(sums[n][r][0], top, x[n]);
      sums[n][r][1] = vmmlaq_s32(sums[n][r][1], bottom, x[n]);
    }
  }
}

// As DotBlock, with both bytes of a token in one register.
template <int N, int R>
struct MatrixBlock {
  int32x4_t products[N][R][2];  // of two rows each: high, low, high, low

  SMALLTHINKER_INLINE MatrixBlock(const std::byte* block, const Planes (&planes)[N], std::int64_t b) {
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
        eight_columns(block, j, half != 0, values, products);
      }
    }
  }
  SMALLTHINKER_INLINE int32x4_t high(int n, int r) const {
    return vuzp1q_s32(products[n][r][0], products[n][r][1]);
  }
  SMALLTHINKER_INLINE int32x4_t low(int n, int r) const {
    return vuzp2q_s32(products[n][r][0], products[n][r][1]);
  }
};

void matrix_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                  const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  each_token_group(tokens, [&](auto n, std::int64_t t) {
    if constexpr (n > 1) {
      constexpr int kRows = 8 / n;
      tile_tokens<MatrixBlock<n, kRows>, n, kRows>(matrix, tile_begin, tile_end, x, t, out, out_stride);
    } else {
      // A single token by the dot product: the same integers and the same order of sums, so the same bits.
      Activations last = x;
      const auto row = static_cast<std::int32_t>(x.at(t));
      last.index = &row;
      dotprod_tiles(matrix, tile_begin, tile_end, last, 1, out + t * out_stride, out_stride);
    }
  });
}

}  // namespace

void fill_i8mm(Kernels& table) { table.tiles = matrix_tiles; }

}  // namespace smallthinker::neon
