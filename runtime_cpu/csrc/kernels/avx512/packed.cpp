// AVX-512 VNNI on the packed layouts. A 16-bit activation is 256 * high + low, so vpdpbusd multiplies the
// unsigned nibbles with both bytes, and every product within a block stays an exact integer.
#include <immintrin.h>

#include "kernels/active_neurons.hpp"
#include "kernels/avx512/table.hpp"
#include "kernels/token_groups.hpp"

namespace smallthinker::avx512 {
namespace {

SMALLTHINKER_INLINE __m512i load512(const void* from) { return _mm512_loadu_si512(from); }

SMALLTHINKER_INLINE __m512 load_halves(const std::byte* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

SMALLTHINKER_INLINE __m512i low_nibbles(__m512i bytes) {
  return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
}

SMALLTHINKER_INLINE __m512i high_nibbles(__m512i bytes) {
  return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}

SMALLTHINKER_INLINE __m512i word(const std::int8_t* from) {
  return _mm512_set1_epi32(load<std::int32_t>(reinterpret_cast<const std::byte*>(from)));
}

SMALLTHINKER_INLINE __m512 join(__m512i low, __m512i high) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8)));
}

struct Nearest {
  static SMALLTHINKER_INLINE std::int32_t of(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
};

// The processor's own prefetcher does not run far enough ahead of so many products.
constexpr std::int64_t kPairsAhead = 8;

// N tokens with T tiles at a time, which share the loads of their activations.
template <int N, int T>
SMALLTHINKER_INLINE void some_tiles(const TileMatrix& matrix, std::int64_t tile, std::int64_t tile_begin,
                                    const std::byte* last, const Planes* planes, float* out,
                                    std::int64_t out_stride) {
  const auto tile_bytes = static_cast<std::int64_t>(matrix.tile_bytes());
  const std::byte* pair = matrix.data + tile * tile_bytes;
  __m512 sums[T][N];
  for (auto& tokens : sums) {
    for (__m512& sum : tokens) sum = _mm512_setzero_ps();
  }
  for (std::int64_t p = 0; p < matrix.pairs(); ++p, pair += kTilePairBytes) {
    for (int t = 0; t < T; ++t) {
      // A tile's last pairs are followed by those of the tile T further.
      const std::byte* ahead = pair + t * tile_bytes + kPairsAhead * kTilePairBytes;
      if (p + kPairsAhead >= matrix.pairs()) ahead += (T - 1) * tile_bytes;
      ahead = ahead < last ? ahead : last;
      for (std::int64_t i = 0; i < kTilePairBytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
    }
    for (std::int64_t z = 0; z < 2; ++z) {
      const std::int64_t b = 2 * p + z;
      __m512i low[T][N];
      __m512i high[T][N];
      for (int n = 0; n < N; ++n) {
        for (int t = 0; t < T; ++t) {
          low[t][n] = _mm512_set1_epi32(planes[n].offsets()[b]);
          high[t][n] = _mm512_setzero_si512();
        }
      }
      for (int j = 0; j < 4; ++j) {
        __m512i first[T];
        __m512i second[T];
        for (int t = 0; t < T; ++t) {
          const __m512i bytes = load512(pair + t * tile_bytes + z * 256 + j * 64);
          first[t] = low_nibbles(bytes);
          second[t] = high_nibbles(bytes);
        }
        for (int n = 0; n < N; ++n) {
          const std::int8_t* at = planes[n].natural() + b * 64 + j * 4;
          const __m512i words[4] = {word(at), word(at + 16), word(at + 32), word(at + 48)};
          for (int t = 0; t < T; ++t) {
            high[t][n] = _mm512_dpbusd_epi32(high[t][n], first[t], words[0]);
            high[t][n] = _mm512_dpbusd_epi32(high[t][n], second[t], words[1]);
            low[t][n] = _mm512_dpbusd_epi32(low[t][n], first[t], words[2]);
            low[t][n] = _mm512_dpbusd_epi32(low[t][n], second[t], words[3]);
          }
        }
      }
      for (int t = 0; t < T; ++t) {
        const __m512 scales = load_halves(pair + t * tile_bytes + 512 + z * 32);
        for (int n = 0; n < N; ++n) {
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(planes[n].scales()[b]), scales);
          sums[t][n] = _mm512_fmadd_ps(join(low[t][n], high[t][n]), scale, sums[t][n]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    const std::int64_t left = matrix.rows - (tile + t) * kTileRows;
    const auto mask = static_cast<__mmask16>(left >= kTileRows ? 0xFFFF : (1 << left) - 1);
    for (int n = 0; n < N; ++n) {
      _mm512_mask_storeu_ps(out + n * out_stride + (tile + t - tile_begin) * kTileRows, mask, sums[t][n]);
    }
  }
}

template <int N>
SMALLTHINKER_NOINLINE void tile_tokens(const TileMatrix& matrix, std::int64_t tile_begin,
                                       std::int64_t tile_end, const Activations& x, std::int64_t token,
                                       float* out, std::int64_t out_stride) {
  // One token is bound by memory, which is fastest with a single stream; several by the loads of activations.
  constexpr int kTogether = N == 1 ? 1 : 2;
  Planes planes[N];
  for (int n = 0; n < N; ++n) planes[n] = {x.plane_row(token + n), Planes::blocks(matrix.cols)};
  const std::byte* const last =
      matrix.data + static_cast<std::size_t>(tile_end) * matrix.tile_bytes() - kTilePairBytes;
  out += token * out_stride;
  std::int64_t tile = tile_begin;
  for (; tile + kTogether <= tile_end; tile += kTogether)
    some_tiles<N, kTogether>(matrix, tile, tile_begin, last, planes, out, out_stride);
  for (; tile < tile_end; ++tile) some_tiles<N, 1>(matrix, tile, tile_begin, last, planes, out, out_stride);
}

// Dot products of R up rows with x.
template <int R>
SMALLTHINKER_INLINE void up_rows(const ExpertShape& shape, const std::byte* const* groups,
                                 const std::int32_t* ids, const Planes& x, float* out) {
  __m512 sums[R];
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
  for (std::int64_t run = 0; run < shape.runs(); ++run) {
    const std::int8_t* values = x.transposed() + run * 1024;
    __m512i low[R];
    __m512i high[R];
    for (int r = 0; r < R; ++r) {
      low[r] = load512(x.offsets() + run * 16);
      high[r] = _mm512_setzero_si512();
    }
    for (int j = 0; j < 4; ++j) {
      const __m512i first_high = load512(values + j * 64);
      const __m512i second_high = load512(values + (4 + j) * 64);
      const __m512i first_low = load512(values + (8 + j) * 64);
      const __m512i second_low = load512(values + (12 + j) * 64);
      for (int r = 0; r < R; ++r) {
        const __m512i bytes = load512(groups[r] + shape.up_nibbles(ids[r]) + run * 256 + j * 64);
        const __m512i first = low_nibbles(bytes);
        const __m512i second = high_nibbles(bytes);
        high[r] = _mm512_dpbusd_epi32(high[r], first, first_high);
        high[r] = _mm512_dpbusd_epi32(high[r], second, second_high);
        low[r] = _mm512_dpbusd_epi32(low[r], first, first_low);
        low[r] = _mm512_dpbusd_epi32(low[r], second, second_low);
      }
    }
    const __m512 x_scales = _mm512_loadu_ps(x.scales() + run * 16);
    for (int r = 0; r < R; ++r) {
      const __m512 scales = load_halves(groups[r] + shape.up_scales(ids[r]) + run * 32);
      sums[r] = _mm512_fmadd_ps(join(low[r], high[r]), _mm512_mul_ps(x_scales, scales), sums[r]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
}

// out += sum over the `count` listed neurons of one group of hidden[i] * down column.
void add_down(const ExpertShape& shape, const std::byte* group, const std::int32_t* ids, const float* hidden,
              std::int64_t count, NeuronFetch& fetch, float* out) {
  HiddenColumn column;
  quantise_hidden<Nearest>(shape, group, ids, hidden, count, column);
  const std::int64_t quads = (count + 3) / 4;
  // Upper nibbles stay where they are: their sums, and with them the offset, are 16 times as large, and their
  // scale a 16th, which changes no bit.
  const __m512i starts[2] = {_mm512_set1_epi32(-8 * column.total), _mm512_set1_epi32(-128 * column.total)};
  const __m512 scales[2] = {_mm512_set1_ps(column.scale), _mm512_set1_ps(column.scale / 16.0F)};
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xF0));
  for (std::int64_t c = 0; c < shape.padded() / 128; ++c) {
    fetch.outputs(128 * c);
    fetch.outputs(128 * c + 64);
    __m512i low[8];
    __m512i high[8];
    for (int j = 0; j < 8; ++j) {
      low[j] = starts[j % 2];
      high[j] = _mm512_setzero_si512();
    }
    for (std::int64_t k = 0; k < quads; ++k) {
      const __m512i a = load512(column.nibbles[4 * k] + c * 64);
      const __m512i b = load512(column.nibbles[4 * k + 1] + c * 64);
      const __m512i d = load512(column.nibbles[4 * k + 2] + c * 64);
      const __m512i e = load512(column.nibbles[4 * k + 3] + c * 64);
      const __m512i t0 = _mm512_unpacklo_epi8(a, b);
      const __m512i t1 = _mm512_unpackhi_epi8(a, b);
      const __m512i t2 = _mm512_unpacklo_epi8(d, e);
      const __m512i t3 = _mm512_unpackhi_epi8(d, e);
      const __m512i mixed[4] = {_mm512_unpacklo_epi16(t0, t2), _mm512_unpackhi_epi16(t0, t2),
                                _mm512_unpacklo_epi16(t1, t3), _mm512_unpackhi_epi16(t1, t3)};
      const __m512i high_word = word(column.highs + 4 * k);
      const __m512i low_word = word(column.lows + 4 * k);
      for (int j = 0; j < 4; ++j) {
        const __m512i first = low_nibbles(mixed[j]);
        const __m512i second = _mm512_and_si512(mixed[j], upper);
        high[2 * j] = _mm512_dpbusd_epi32(high[2 * j], first, high_word);
        low[2 * j] = _mm512_dpbusd_epi32(low[2 * j], first, low_word);
        high[2 * j + 1] = _mm512_dpbusd_epi32(high[2 * j + 1], second, high_word);
        low[2 * j + 1] = _mm512_dpbusd_epi32(low[2 * j + 1], second, low_word);
      }
    }
    for (int j = 0; j < 8; ++j) {
      const std::int64_t at = c * 128 + j * 16;
      const __m512 factor = _mm512_mul_ps(load_halves(group + at * 2), scales[j % 2]);
      _mm512_storeu_ps(out + at, _mm512_fmadd_ps(join(low[j], high[j]), factor, _mm512_loadu_ps(out + at)));
    }
  }
}

void split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row) {
  const std::int64_t blocks = Planes::blocks(cols);
  const std::int64_t used = cols / kActivationBlock;
  std::byte* transposed = row + blocks * 64;
  auto* out_scales = reinterpret_cast<float*>(row + blocks * 128);
  auto* offsets = reinterpret_cast<std::int32_t*>(row + blocks * 132);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const __m512i values = b < used ? load512(q + b * kActivationBlock) : _mm512_setzero_si512();
    const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(values, _mm512_set1_epi16(128)), 8);
    auto* to = reinterpret_cast<__m256i*>(row + b * 64);
    _mm256_storeu_si256(to, _mm512_cvtepi16_epi8(upper));
    _mm256_storeu_si256(to + 1, _mm512_cvtepi16_epi8(values));  // the lower byte, signed
    offsets[b] = -8 * _mm512_reduce_add_epi32(_mm512_madd_epi16(values, _mm512_set1_epi16(1)));
    out_scales[b] = b < used ? scales[b] : 0.0F;
  }
  const __m512i every = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  for (std::int64_t b = 0; b < blocks; b += kTransposedBlocks) {
    for (int w = 0; w < 16; ++w) {
      _mm512_storeu_si512(transposed + b * 64 + w * 64,
                          _mm512_i32gather_epi32(every, row + b * 64 + w * 4, 4));
    }
  }
}

void tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end, const Activations& x,
           std::int64_t tokens, float* out, std::int64_t out_stride) {
  each_token_group(tokens, [&](auto n, std::int64_t t) {
    tile_tokens<n>(matrix, tile_begin, tile_end, x, t, out, out_stride);
  });
}

}  // namespace

void fill_packed(Kernels& table) {
  table.packed = true;
  table.split_planes = split_planes;
  table.tiles = tiles;
  table.neurons = active_neurons<up_rows<2>, up_rows<1>, add_down>;
}

}  // namespace smallthinker::avx512
