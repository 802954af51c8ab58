// Attention over 8-bit keys and values for any instruction set: `Isa` gives the vectors, this the order of
// work, which is that of the F16 kernels. Layout: Q8Tile in kernels/kv_rows.hpp.
//
//   struct Isa { using Vec = __m512; static constexpr int kLanes = 16; ... };
//   q8_scores<Isa>(q, groups, head_dim, keys, factor, scores, stride);
#pragma once

#include <cstdint>

#include "kernels/attention.hpp"
#include "kernels/reference.hpp"

namespace smallthinker {
namespace {  // a copy per kernel file: each is compiled for other instructions

constexpr std::int64_t kWordBytes = kKeyTile * kQ8Word;
constexpr std::int64_t kTilesTogether = 4;
constexpr std::int64_t kMostDotDims = 256;  // of a query in bytes; longer ones go through plain code

// Queries in the two signed bytes of 16 bits, q = 256 * high + low, word by word.
template <int G>
struct ByteQueries {
  static constexpr std::int64_t kBlocks = kMostDotDims / kQ8Block;
  static constexpr std::int64_t kWords = kQ8Block / kQ8Word;
  std::int32_t high[G][kBlocks][kWords];
  std::int32_t low[G][kBlocks][kWords];
  float scales[G][kBlocks];
  std::int32_t offsets[G][kBlocks];  // -128 * sum of q: the keys' offset

  template <typename Quantise>
  ByteQueries(const float* q, std::int64_t head_dim, const Quantise& quantise) {
    const std::int64_t blocks = Q8Tile::blocks(head_dim);
    float row[kMostDotDims];
    std::int16_t steps[kMostDotDims];
    std::int8_t bytes[2][kMostDotDims];
    for (int g = 0; g < G; ++g) {
      __builtin_memcpy(row, q + g * head_dim, static_cast<std::size_t>(head_dim) * sizeof(float));
      for (std::int64_t i = head_dim; i < blocks * kQ8Block; ++i) row[i] = 0.0F;
      quantise(row, blocks * kQ8Block, steps, scales[g]);
      for (std::int64_t b = 0; b < blocks; ++b) {
        std::int32_t sum = 0;
        for (std::int64_t i = b * kQ8Block; i < (b + 1) * kQ8Block; ++i) {
          const int upper = (steps[i] + 128) >> 8;
          bytes[0][i] = static_cast<std::int8_t>(upper);
          bytes[1][i] = static_cast<std::int8_t>(steps[i] - 256 * upper);
          sum += steps[i];
        }
        offsets[g][b] = -128 * sum;
        __builtin_memcpy(high[g][b], bytes[0] + b * kQ8Block, kQ8Block);
        __builtin_memcpy(low[g][b], bytes[1] + b * kQ8Block, kQ8Block);
      }
    }
  }
};

// With products of bytes: exact integers within a block of 32 dimensions, so only the query's rounding to 16
// bits is lost.
template <typename Isa, int G>
void q8_dot_group(const ByteQueries<G>& queries, std::int64_t head_dim, const KvRows& keys, float factor,
                  float* scores, std::int64_t stride) {
  constexpr int kParts = kKeyTile / Isa::kLanes;
  const auto* block = static_cast<const std::byte*>(keys.data);
  for (std::int64_t t = 0; t < keys.count; ++t) {
    typename Isa::Vec sums[G][kParts];
    for (auto& group : sums) {
      for (auto& sum : group) sum = Isa::all(0.0F);
    }
    for (std::int64_t b = 0; b * kQ8Block < head_dim; ++b) {
      const std::int64_t rest = head_dim - b * kQ8Block;
      const std::int64_t words = ((rest < kQ8Block ? rest : kQ8Block) + kQ8Word - 1) / kQ8Word;
      typename Isa::Int high[G][kParts];
      typename Isa::Int low[G][kParts];
      for (int g = 0; g < G; ++g) {
        for (int p = 0; p < kParts; ++p) {
          high[g][p] = Isa::all_ints(0);
          low[g][p] = Isa::all_ints(Isa::kUnsigned ? queries.offsets[g][b] : 0);
        }
      }
      const std::byte* row = block + kKeyTile * 2;
      for (std::int64_t w = 0; w < words; ++w, row += kWordBytes) {
        __builtin_prefetch(row + Q8Tile::bytes(head_dim), 0, 3);
        typename Isa::Int key[kParts];
        for (int p = 0; p < kParts; ++p) key[p] = Isa::key_words(row + p * Isa::kLanes * kQ8Word);
        for (int g = 0; g < G; ++g) {
          const typename Isa::Int upper = Isa::all_ints(queries.high[g][b][w]);
          const typename Isa::Int lower = Isa::all_ints(queries.low[g][b][w]);
          for (int p = 0; p < kParts; ++p) {
            high[g][p] = Isa::dot(high[g][p], key[p], upper);
            low[g][p] = Isa::dot(low[g][p], key[p], lower);
          }
        }
      }
      for (int g = 0; g < G; ++g) {
        for (int p = 0; p < kParts; ++p) {
          const auto scale = Isa::multiply(Isa::halves(block + p * Isa::kLanes * 2),
                                           Isa::all(queries.scales[g][b] * factor));
          sums[g][p] = Isa::fused(Isa::joined(high[g][p], low[g][p]), scale, sums[g][p]);
        }
      }
      block = row;
    }
    for (int g = 0; g < G; ++g) {
      for (int p = 0; p < kParts; ++p)
        Isa::store(scores + g * stride + t * kKeyTile + p * Isa::kLanes, sums[g][p]);
    }
  }
}

template <typename Isa, typename Quantise>
void q8_dot_scores(const float* q, std::int64_t groups, std::int64_t head_dim, const KvRows& keys,
                   float factor, float* scores, std::int64_t stride, const Quantise& quantise) {
  if (head_dim > kMostDotDims)
    return reference::attention_scores(q, groups, head_dim, keys, factor, scores, stride);
  each_head_group<Isa::kDotGroups>(groups, [&](auto size, std::int64_t g) {
    const ByteQueries<size> queries(q + g * head_dim, head_dim, quantise);
    q8_dot_group<Isa, size>(queries, head_dim, keys, factor, scores + g * stride, stride);
  });
}

template <typename Isa, int G, int T>
SMALLTHINKER_INLINE void q8_score_tiles(const float* q, std::int64_t head_dim, const std::byte* keys,
                                        float factor, float* scores, std::int64_t stride) {
  constexpr int kParts = kKeyTile / Isa::kLanes;  // vectors of a tile's 16 keys
  using Vec = typename Isa::Vec;
  const std::int64_t tile_bytes = Q8Tile::bytes(head_dim);
  Vec sums[G][T * kParts];
  for (int g = 0; g < G; ++g) {
    for (int p = 0; p < T * kParts; ++p) sums[g][p] = Isa::all(0.0F);
  }
  const std::byte* block = keys;
  for (std::int64_t start = 0; start < head_dim; start += kQ8Block) {
    const std::int64_t dims = head_dim - start < kQ8Block ? head_dim - start : kQ8Block;
    Vec scales[T * kParts];
    for (int p = 0; p < T * kParts; ++p) {
      scales[p] = Isa::halves(block + p / kParts * tile_bytes + p % kParts * Isa::kLanes * 2);
    }
    const std::byte* row = block + kKeyTile * 2;
    for (std::int64_t i = 0; i < dims; ++i) {
      Vec key[T * kParts];
      for (int p = 0; p < T * kParts; ++p) {
        const std::byte* words =
            row + i / kQ8Word * kWordBytes + p / kParts * tile_bytes + p % kParts * Isa::kLanes * kQ8Word;
        key[p] = Isa::multiply(Isa::byte_of_words(words, static_cast<int>(i % kQ8Word)), scales[p]);
      }
      for (int g = 0; g < G; ++g) {
        const Vec value = Isa::all(q[g * head_dim + start + i]);
        for (int p = 0; p < T * kParts; ++p) sums[g][p] = Isa::fused(value, key[p], sums[g][p]);
      }
    }
    block = row + (dims + kQ8Word - 1) / kQ8Word * kWordBytes;
  }
  for (int g = 0; g < G; ++g) {
    for (int p = 0; p < T * kParts; ++p) {
      Isa::store(scores + g * stride + p * Isa::kLanes, Isa::multiply(sums[g][p], Isa::all(factor)));
    }
  }
}

template <typename Isa, int G>
void q8_score_group(const float* q, std::int64_t head_dim, const KvRows& keys, float factor, float* scores,
                    std::int64_t stride) {
  constexpr int kTogether = Isa::kTiles;
  const auto* data = static_cast<const std::byte*>(keys.data);
  const std::int64_t tile_bytes = Q8Tile::bytes(head_dim);
  std::int64_t t = 0;
  for (; t + kTogether <= keys.count; t += kTogether) {
    q8_score_tiles<Isa, G, kTogether>(q, head_dim, data + t * tile_bytes, factor, scores + t * kKeyTile,
                                      stride);
  }
  for (; t < keys.count; ++t)
    q8_score_tiles<Isa, G, 1>(q, head_dim, data + t * tile_bytes, factor, scores + t * kKeyTile, stride);
}

template <typename Isa>
void q8_scores(const float* q, std::int64_t groups, std::int64_t head_dim, const KvRows& keys, float factor,
               float* scores, std::int64_t stride) {
  each_head_group<Isa::kGroups>(groups, [&](auto size, std::int64_t g) {
    q8_score_group<Isa, size>(q + g * head_dim, head_dim, keys, factor, scores + g * stride, stride);
  });
}

// `work(row, scales, j)` for every value: its bytes [head_dim], the scales of its blocks [blocks], its index.
template <typename Work>
SMALLTHINKER_INLINE void q8_each_value(const KvRows& values, std::int64_t head_dim, const Work& work) {
  const auto* tile = static_cast<const std::byte*>(values.data);
  const std::int64_t blocks = Q8Tile::blocks(head_dim);
  std::int64_t lane = values.first;
  for (std::int64_t j = 0; j < values.count; ++j) {
    work(tile + kKeyTile * blocks * 2 + lane * head_dim, tile + lane * blocks * 2, j);
    if (++lane == kKeyTile) {
      lane = 0;
      tile += Q8Tile::bytes(head_dim);
    }
  }
}

template <typename Isa, int G, int V>
SMALLTHINKER_INLINE void q8_value_columns(const float* weights, std::int64_t weight_stride,
                                          std::int64_t head_dim, const KvRows& values, std::int64_t column,
                                          float* out) {
  using Vec = typename Isa::Vec;
  Vec sums[G][V];
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < V; ++v) sums[g][v] = Isa::load(out + g * head_dim + column + v * Isa::kLanes);
  }
  q8_each_value(values, head_dim,
                [&](const std::byte* row, const std::byte* scales, std::int64_t j)
                    __attribute__((always_inline)) {
                      __builtin_prefetch(row + column + kTilesTogether * Q8Tile::bytes(head_dim), 0, 3);
                      Vec value[V];
                      for (int v = 0; v < V; ++v) {
                        const std::int64_t at = column + v * Isa::kLanes;
                        const Vec scale = Isa::all(Isa::half(scales + at / kQ8Block * 2));
                        value[v] = Isa::multiply(Isa::bytes(row + at), scale);
                      }
                      for (int g = 0; g < G; ++g) {
                        const Vec weight = Isa::all(weights[g * weight_stride + j]);
                        for (int v = 0; v < V; ++v) sums[g][v] = Isa::fused(weight, value[v], sums[g][v]);
                      }
                    });
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < V; ++v) Isa::store(out + g * head_dim + column + v * Isa::kLanes, sums[g][v]);
  }
}

template <typename Isa, int G>
void q8_value_block(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                    const KvRows& values, float* out) {
  constexpr int kPanel = Isa::kPanel * Isa::kLanes;
  std::int64_t i = 0;
  for (; i + kPanel <= head_dim; i += kPanel)
    q8_value_columns<Isa, G, Isa::kPanel>(weights, weight_stride, head_dim, values, i, out);
  for (; i + Isa::kLanes <= head_dim; i += Isa::kLanes)
    q8_value_columns<Isa, G, 1>(weights, weight_stride, head_dim, values, i, out);
  for (; i < head_dim; ++i) {
    q8_each_value(values, head_dim, [&](const std::byte* row, const std::byte* scales, std::int64_t j) {
      const float value =
          static_cast<float>(load<std::int8_t>(row + i)) * Isa::half(scales + i / kQ8Block * 2);
      for (int g = 0; g < G; ++g) {
        float& sum = out[g * head_dim + i];
        sum = __builtin_fmaf(weights[g * weight_stride + j], value, sum);
      }
    });
  }
}

// Some tiles at a time, so that all their columns are read before they leave the L1 cache.
template <typename Isa, int G>
void q8_value_group(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                    const KvRows& values, float* out) {
  KvRows block = values;
  for (std::int64_t j = 0; j < values.count; j += block.count, block.first = 0) {
    block.count = kTilesTogether * kKeyTile - block.first;
    if (block.count > values.count - j) block.count = values.count - j;
    q8_value_block<Isa, G>(weights + j, weight_stride, head_dim, block, out);
    block.data = static_cast<const std::byte*>(block.data) + kTilesTogether * Q8Tile::bytes(head_dim);
  }
}

template <typename Isa>
void q8_values(const float* weights, std::int64_t stride, std::int64_t groups, std::int64_t head_dim,
               const KvRows& values, float* out) {
  each_head_group<Isa::kGroups>(groups, [&](auto size, std::int64_t g) {
    q8_value_group<Isa, size>(weights + g * stride, stride, head_dim, values, out + g * head_dim);
  });
}

}  // namespace
}  // namespace smallthinker
