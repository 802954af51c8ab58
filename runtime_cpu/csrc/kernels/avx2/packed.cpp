// AVX2 on the packed layouts. vpmaddubsw multiplies the unsigned nibbles with the signed bytes of an
// activation (256 * high + low); a sum of up to 16 such products fits 16 bits, so blocks widen to 32 bits
// only once.
#include <immintrin.h>

#include "kernels/active_neurons.hpp"
#include "kernels/avx2/table.hpp"
#include "kernels/token_groups.hpp"

namespace smallthinker::avx2 {
namespace {

constexpr std::int64_t kNarrow = 16;  // neurons whose products 16 bits can sum: 16 * 15 * 128 < 2^15

SMALLTHINKER_INLINE __m256i load256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

SMALLTHINKER_INLINE __m256 load_halves(const std::byte* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

SMALLTHINKER_INLINE __m256i low_nibbles(__m256i bytes) {
  return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

SMALLTHINKER_INLINE __m256i high_nibbles(__m256i bytes) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}

SMALLTHINKER_INLINE __m256i word(const std::int8_t* from) {
  return _mm256_set1_epi32(load<std::int32_t>(reinterpret_cast<const std::byte*>(from)));
}

SMALLTHINKER_INLINE __m256i pair_of_bytes(const std::int8_t* from) {
  return _mm256_set1_epi16(load<std::int16_t>(reinterpret_cast<const std::byte*>(from)));
}

struct Nearest {
  static SMALLTHINKER_INLINE std::int32_t of(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
};

// sums += nibbles * bytes, two neighbours to a 16-bit lane. The empty statement keeps the compiler from
// adding the products up in a tree of its own, which needs more registers than there are.
SMALLTHINKER_INLINE void multiply(__m256i& sums, __m256i nibbles, __m256i bytes) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, bytes));
  __asm__("" : "+x"(sums));
}

// start + low + 256 * high, two 16-bit lanes to one of 32.
SMALLTHINKER_INLINE __m256 join(__m256i start, __m256i low, __m256i high) {
  const __m256i bottom = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
  const __m256i top = _mm256_madd_epi16(high, _mm256_set1_epi16(256));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(start, _mm256_add_epi32(bottom, top)));
}

SMALLTHINKER_INLINE void store_rows(float* out, std::int64_t left, __m256 values) {
  if (left >= 8) {
    _mm256_storeu_ps(out, values);
    return;
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, values);
  for (std::int64_t i = 0; i < left; ++i) out[i] = lanes[i];
}

// The processor's own prefetcher does not run far enough ahead of so many products.
constexpr std::int64_t kPairsAhead = 8;

// N tokens with H times 8 rows of each tile at a time.
template <int N, int H>
SMALLTHINKER_NOINLINE void tile_tokens(const TileMatrix& matrix, std::int64_t tile_begin,
                                       std::int64_t tile_end, const Activations& x, std::int64_t token,
                                       float* out, std::int64_t out_stride) {
  const std::int64_t pairs = matrix.pairs();
  Planes planes[N];
  for (int n = 0; n < N; ++n) planes[n] = {x.plane_row(token + n), Planes::blocks(matrix.cols)};
  const std::byte* begin = matrix.data + static_cast<std::size_t>(tile_begin) * matrix.tile_bytes();
  const std::byte* const last =
      matrix.data + static_cast<std::size_t>(tile_end) * matrix.tile_bytes() - kTilePairBytes;
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile, begin += matrix.tile_bytes()) {
    for (int first_half = 0; first_half < 2; first_half += H) {
      const std::byte* pair = begin;
      __m256 sums[N][H];
      for (auto& token_sums : sums) {
        for (__m256& sum : token_sums) sum = _mm256_setzero_ps();
      }
      for (std::int64_t p = 0; p < pairs; ++p, pair += kTilePairBytes) {
        const std::byte* ahead = pair + kPairsAhead * kTilePairBytes;
        if (ahead > last) ahead = last;
        for (std::int64_t i = 0; i < kTilePairBytes; i += 64) __builtin_prefetch(ahead + i, 0, 3);
        for (std::int64_t z = 0; z < 2; ++z) {
          const std::int64_t b = 2 * p + z;
          __m256i low[N][H];
          __m256i high[N][H];
          for (int n = 0; n < N; ++n) {
            for (int h = 0; h < H; ++h) low[n][h] = high[n][h] = _mm256_setzero_si256();
          }
          for (int j = 0; j < 4; ++j) {
            __m256i first[H];
            __m256i second[H];
            for (int h = 0; h < H; ++h) {
              const __m256i bytes = load256(pair + z * 256 + j * 64 + (first_half + h) * 32);
              first[h] = low_nibbles(bytes);
              second[h] = high_nibbles(bytes);
            }
            for (int n = 0; n < N; ++n) {
              const std::int8_t* at = planes[n].natural() + b * 64 + j * 4;
              for (int h = 0; h < H; ++h) multiply(high[n][h], first[h], word(at));
              for (int h = 0; h < H; ++h) multiply(high[n][h], second[h], word(at + 16));
              for (int h = 0; h < H; ++h) multiply(low[n][h], first[h], word(at + 32));
              for (int h = 0; h < H; ++h) multiply(low[n][h], second[h], word(at + 48));
            }
          }
          for (int h = 0; h < H; ++h) {
            const __m256 scales = load_halves(pair + 512 + z * 32 + (first_half + h) * 16);
            for (int n = 0; n < N; ++n) {
              const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(planes[n].scales()[b]), scales);
              const __m256i start = _mm256_set1_epi32(planes[n].offsets()[b]);
              sums[n][h] = _mm256_fmadd_ps(join(start, low[n][h], high[n][h]), scale, sums[n][h]);
            }
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int h = 0; h < H; ++h) {
          const std::int64_t row = (tile - tile_begin) * kTileRows + (first_half + h) * 8;
          store_rows(out + (token + n) * out_stride + row, matrix.rows - tile_begin * kTileRows - row,
                     sums[n][h]);
        }
      }
    }
  }
}

// The dot product of R up rows with x.
template <int R>
SMALLTHINKER_INLINE void up_rows(const ExpertShape& shape, const std::byte* const* groups,
                                 const std::int32_t* ids, const Planes& x, float* out) {
  __m256 sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (std::int64_t run = 0; run < shape.runs(); ++run) {
    for (int h = 0; h < 2; ++h) {  // 8 of the run's 16 blocks
      const std::int8_t* values = x.transposed() + run * 1024 + h * 32;
      __m256i low[R];
      __m256i high[R];
      for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
      for (int j = 0; j < 4; ++j) {
        for (int r = 0; r < R; ++r) {
          const __m256i bytes = load256(groups[r] + shape.up_nibbles(ids[r]) + run * 256 + j * 64 + h * 32);
          const __m256i first = low_nibbles(bytes);
          const __m256i second = high_nibbles(bytes);
          multiply(high[r], first, load256(values + j * 64));
          multiply(high[r], second, load256(values + (4 + j) * 64));
          multiply(low[r], first, load256(values + (8 + j) * 64));
          multiply(low[r], second, load256(values + (12 + j) * 64));
        }
      }
      const __m256i start = load256(x.offsets() + run * 16 + h * 8);
      const __m256 x_scales = _mm256_loadu_ps(x.scales() + run * 16 + h * 8);
      for (int r = 0; r < R; ++r) {
        const __m256 scales = load_halves(groups[r] + shape.up_scales(ids[r]) + run * 32 + h * 16);
        sums[r][h] =
            _mm256_fmadd_ps(join(start, low[r], high[r]), _mm256_mul_ps(x_scales, scales), sums[r][h]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const __m256 both = _mm256_add_ps(sums[r][0], sums[r][1]);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    out[r] = _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
  }
}

// The 64 outputs of bytes [at, at + 32) of each column, from neurons [first, last): per unpacked half and
// nibble 16 outputs, of which the low and the high four of each 128 bits go to two registers of integers.
SMALLTHINKER_INLINE void column_sums(const HiddenColumn& column, std::int64_t at, std::int64_t first,
                                     std::int64_t last, __m256i (&sums)[2][2][2]) {
  __m256i low[2][2];
  __m256i high[2][2];
  for (int i = 0; i < 2; ++i) {
    for (int nibble = 0; nibble < 2; ++nibble) low[i][nibble] = high[i][nibble] = _mm256_setzero_si256();
  }
  for (std::int64_t k = first; k < last; k += 2) {
    const __m256i a = load256(column.nibbles[k] + at);
    const __m256i b = load256(column.nibbles[k + 1] + at);
    const __m256i high_pair = pair_of_bytes(column.highs + k);
    const __m256i low_pair = pair_of_bytes(column.lows + k);
    const __m256i mixed[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    for (int i = 0; i < 2; ++i) {
      const __m256i nibbles[2] = {low_nibbles(mixed[i]), high_nibbles(mixed[i])};
      for (int nibble = 0; nibble < 2; ++nibble) {
        multiply(high[i][nibble], nibbles[nibble], high_pair);
        multiply(low[i][nibble], nibbles[nibble], low_pair);
      }
    }
  }
  const __m256i weights = _mm256_set1_epi32(256 << 16 | 1);
  for (int i = 0; i < 2; ++i) {
    for (int nibble = 0; nibble < 2; ++nibble) {
      const __m256i lower = _mm256_unpacklo_epi16(low[i][nibble], high[i][nibble]);
      const __m256i upper = _mm256_unpackhi_epi16(low[i][nibble], high[i][nibble]);
      sums[i][nibble][0] = _mm256_add_epi32(sums[i][nibble][0], _mm256_madd_epi16(lower, weights));
      sums[i][nibble][1] = _mm256_add_epi32(sums[i][nibble][1], _mm256_madd_epi16(upper, weights));
    }
  }
}

// out += sum over the `count` listed neurons of one group of hidden[i] * down column.
void add_down(const ExpertShape& shape, const std::byte* group, const std::int32_t* ids, const float* hidden,
              std::int64_t count, NeuronFetch& fetch, float* out) {
  HiddenColumn column;
  quantise_hidden<Nearest>(shape, group, ids, hidden, count, column);
  const std::int64_t even = (count + 1) / 2 * 2;
  const __m256i start = _mm256_set1_epi32(-8 * column.total);
  const __m256 scales = _mm256_set1_ps(column.scale);
  for (std::int64_t at = 0; at < shape.padded() / 2; at += 32) {
    fetch.outputs(2 * at);
    __m256i sums[2][2][2];
    for (auto& half : sums) {
      for (auto& nibble : half) nibble[0] = nibble[1] = start;
    }
    for (std::int64_t first = 0; first < even; first += kNarrow) {
      column_sums(column, at, first, first + kNarrow < even ? first + kNarrow : even, sums);
    }
    for (int i = 0; i < 2; ++i) {
      for (int nibble = 0; nibble < 2; ++nibble) {
        for (int k = 0; k < 2; ++k) {
          const std::int64_t output = at / 64 * 128 + (2 * i + k) * 32 + nibble * 16 + at % 64 / 4;
          const __m256 factor = _mm256_mul_ps(load_halves(group + output * 2), scales);
          const __m256 value = _mm256_cvtepi32_ps(sums[i][nibble][k]);
          _mm256_storeu_ps(out + output, _mm256_fmadd_ps(value, factor, _mm256_loadu_ps(out + output)));
        }
      }
    }
  }
}

void split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row) {
  const std::int64_t blocks = Planes::blocks(cols);
  const std::int64_t used = cols / kActivationBlock;
  std::byte* transposed = row + blocks * 64;
  auto* out_scales = reinterpret_cast<float*>(row + blocks * 128);
  auto* offsets = reinterpret_cast<std::int32_t*>(row + blocks * 132);
  const __m256i byte = _mm256_set1_epi16(255);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i first = b < used ? load256(q + b * kActivationBlock) : zero;
    const __m256i second = b < used ? load256(q + b * kActivationBlock + 16) : zero;
    const __m256i upper_first = _mm256_srai_epi16(_mm256_add_epi16(first, _mm256_set1_epi16(128)), 8);
    const __m256i upper_second = _mm256_srai_epi16(_mm256_add_epi16(second, _mm256_set1_epi16(128)), 8);
    const __m256i high = _mm256_packs_epi16(upper_first, upper_second);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte));
    auto* to = reinterpret_cast<__m256i*>(row + b * 64);
    _mm256_storeu_si256(to, _mm256_permute4x64_epi64(high, 0xD8));
    _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(low, 0xD8));
    const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
    offsets[b] = -8 * _mm_cvtsi128_si32(sum);
    out_scales[b] = b < used ? scales[b] : 0.0F;
  }
  for (std::int64_t b = 0; b < blocks; b += 4) {  // 4 blocks times 4 words
    std::byte* to = transposed + b / 16 * 1024 + b % 16 * 4;
    for (int w = 0; w < 16; w += 4) {
      const auto part = [&](std::int64_t i) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (b + i) * 64 + w * 4));
      };
      const __m128i t0 = _mm_unpacklo_epi32(part(0), part(1));
      const __m128i t1 = _mm_unpackhi_epi32(part(0), part(1));
      const __m128i t2 = _mm_unpacklo_epi32(part(2), part(3));
      const __m128i t3 = _mm_unpackhi_epi32(part(2), part(3));
      const auto put = [&](int i, __m128i value) __attribute__((always_inline)) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (w + i) * 64), value);
      };
      put(0, _mm_unpacklo_epi64(t0, t2));
      put(1, _mm_unpackhi_epi64(t0, t2));
      put(2, _mm_unpacklo_epi64(t1, t3));
      put(3, _mm_unpackhi_epi64(t1, t3));
    }
  }
}

void tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end, const Activations& x,
           std::int64_t tokens, float* out, std::int64_t out_stride) {
  each_token_group(tokens, [&](auto n, std::int64_t t) {
    tile_tokens<n, n == 4 ? 1 : 2>(matrix, tile_begin, tile_end, x, t, out, out_stride);
  });
}

}  // namespace

void fill_packed(Kernels& table) {
  table.packed = true;
  table.split_planes = split_planes;
  table.tiles = tiles;
  table.neurons = active_neurons<up_rows<2>, up_rows<1>, add_down>;
}

}  // namespace smallthinker::avx2
