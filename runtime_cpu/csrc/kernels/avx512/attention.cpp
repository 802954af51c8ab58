// AVX-512 attention: a register holds one dimension of 16 keys, or 16 dimensions of one value, so neither
// product needs a sum across lanes. All query heads of a key head share each load.
#include <immintrin.h>

#include "kernels/attention.hpp"
#include "kernels/attention_q8.hpp"
#include "kernels/avx2/table.hpp"
#include "kernels/avx512/table.hpp"
#include "kernels/exponential.hpp"

namespace smallthinker::avx512 {
namespace {

struct Half {
  static constexpr std::int64_t kBytes = 2;
  static SMALLTHINKER_INLINE __m512 load16(const std::byte* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return _cvtsh_ss(load<std::uint16_t>(at)); }
};

struct Single {
  static constexpr std::int64_t kBytes = 4;
  static SMALLTHINKER_INLINE __m512 load16(const std::byte* at) { return _mm512_loadu_ps(at); }
  static SMALLTHINKER_INLINE float one(const std::byte* at) { return load<float>(at); }
};

constexpr int kMostHeads = 7;
constexpr std::int64_t kRowsTogether = 64;  // of values, whose columns are then all read from the L1 cache

SMALLTHINKER_INLINE void fetch(const std::byte* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

template <typename Element, int G, int T>
SMALLTHINKER_INLINE void score_tiles(const float* q, std::int64_t head_dim, const std::byte* keys,
                                     float factor, float* scores, std::int64_t stride) {
  const std::int64_t tile_bytes = head_dim * kKeyTile * Element::kBytes;
  __m512 sums[T][G];
  for (auto& tile : sums) {
    for (__m512& sum : tile) sum = _mm512_setzero_ps();
  }
  for (std::int64_t i = 0; i < head_dim; ++i) {
    for (int t = 0; t < T; ++t) fetch(keys + (T + t) * tile_bytes + i * kKeyTile * Element::kBytes);
    __m512 key[T];
    for (int t = 0; t < T; ++t)
      key[t] = Element::load16(keys + t * tile_bytes + i * kKeyTile * Element::kBytes);
    for (int g = 0; g < G; ++g) {
      const __m512 value = _mm512_set1_ps(q[g * head_dim + i]);
      for (int t = 0; t < T; ++t) sums[t][g] = _mm512_fmadd_ps(value, key[t], sums[t][g]);
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int g = 0; g < G; ++g) {
      _mm512_storeu_ps(scores + g * stride + t * kKeyTile, _mm512_mul_ps(sums[t][g], _mm512_set1_ps(factor)));
    }
  }
}

template <typename Element, int G>
void score_group(const float* q, std::int64_t head_dim, const KvRows& keys, float factor, float* scores,
                 std::int64_t stride) {
  const auto* data = static_cast<const std::byte*>(keys.data);
  const std::int64_t tile_bytes = head_dim * kKeyTile * Element::kBytes;
  std::int64_t t = 0;
  for (; t + 2 <= keys.count; t += 2) {
    score_tiles<Element, G, 2>(q, head_dim, data + t * tile_bytes, factor, scores + t * kKeyTile, stride);
  }
  if (t < keys.count) {
    score_tiles<Element, G, 1>(q, head_dim, data + t * tile_bytes, factor, scores + t * kKeyTile, stride);
  }
}

template <typename Element, int G, int V>
SMALLTHINKER_INLINE void value_columns(const float* weights, std::int64_t weight_stride,
                                       std::int64_t head_dim, const std::byte* values, std::int64_t count,
                                       float* out) {
  __m512 sums[G][V];
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < V; ++v) sums[g][v] = _mm512_loadu_ps(out + g * head_dim + 16 * v);
  }
  for (std::int64_t j = 0; j < count; ++j, values += head_dim * Element::kBytes) {
    __m512 row[V];
    for (int v = 0; v < V; v += 2) fetch(values + (kRowsTogether * head_dim + 16 * v) * Element::kBytes);
    for (int v = 0; v < V; ++v) row[v] = Element::load16(values + 16 * v * Element::kBytes);
    for (int g = 0; g < G; ++g) {
      const __m512 weight = _mm512_set1_ps(weights[g * weight_stride + j]);
      for (int v = 0; v < V; ++v) sums[g][v] = _mm512_fmadd_ps(weight, row[v], sums[g][v]);
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + g * head_dim + 16 * v, sums[g][v]);
  }
}

template <typename Element, int G>
void value_group(const float* weights, std::int64_t weight_stride, std::int64_t head_dim,
                 const KvRows& values, float* out) {
  constexpr std::int64_t kPanel = G <= 6 ? 64 : 32;  // G * kPanel / 16 sums have to fit the registers
  const auto* data = static_cast<const std::byte*>(values.data);
  std::int64_t i = 0;
  for (std::int64_t j = 0; j < values.count; j += kRowsTogether) {
    const std::int64_t rows = values.count - j < kRowsTogether ? values.count - j : kRowsTogether;
    for (i = 0; i + kPanel <= head_dim; i += kPanel) {
      value_columns<Element, G, kPanel / 16>(weights + j, weight_stride, head_dim,
                                             data + (j * head_dim + i) * Element::kBytes, rows, out + i);
    }
  }
  for (; i + 16 <= head_dim; i += 16) {
    value_columns<Element, G, 1>(weights, weight_stride, head_dim, data + i * Element::kBytes, values.count,
                                 out + i);
  }
  add_last_columns<Element, G>(weights, weight_stride, head_dim, data, values.count, i, out);
}

template <typename Element>
void scores_of(const float* q, std::int64_t groups, std::int64_t head_dim, const KvRows& keys, float factor,
               float* scores, std::int64_t stride) {
  each_head_group<kMostHeads>(groups, [&](auto size, std::int64_t g) {
    score_group<Element, size>(q + g * head_dim, head_dim, keys, factor, scores + g * stride, stride);
  });
}

template <typename Element>
void values_of(const float* weights, std::int64_t stride, std::int64_t groups, std::int64_t head_dim,
               const KvRows& values, float* out) {
  each_head_group<kMostHeads>(groups, [&](auto size, std::int64_t g) {
    value_group<Element, size>(weights + g * stride, stride, head_dim, values, out + g * head_dim);
  });
}

// What the templates of several instruction sets compute with.
struct Floats {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static SMALLTHINKER_INLINE Vec all(float value) { return _mm512_set1_ps(value); }
  static SMALLTHINKER_INLINE Vec load(const float* at) { return _mm512_loadu_ps(at); }
  static SMALLTHINKER_INLINE void store(float* at, Vec value) { _mm512_storeu_ps(at, value); }
  static SMALLTHINKER_INLINE Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static SMALLTHINKER_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
};

struct Bytes : Floats {
  using Int = __m512i;
  static constexpr int kGroups = 6;
  static constexpr int kDotGroups = 7;
  static constexpr bool kUnsigned = true;
  static constexpr int kPanel = 4;
  static SMALLTHINKER_INLINE Vec halves(const std::byte* at) { return Half::load16(at); }
  static SMALLTHINKER_INLINE float half(const std::byte* at) { return Half::one(at); }
  static SMALLTHINKER_INLINE Int all_ints(std::int32_t value) { return _mm512_set1_epi32(value); }
  static SMALLTHINKER_INLINE Int key_words(const std::byte* at) { return _mm512_loadu_si512(at); }
  static SMALLTHINKER_INLINE Int dot(Int sum, Int key, Int query) {
    return _mm512_dpbusd_epi32(sum, key, query);
  }
  static SMALLTHINKER_INLINE Vec joined(Int high, Int low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }
  static SMALLTHINKER_INLINE Vec bytes(const std::byte* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
  }
};

struct Exponential : Floats {
  static SMALLTHINKER_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1 << count) - 1); }
  static SMALLTHINKER_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static SMALLTHINKER_INLINE Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static SMALLTHINKER_INLINE Vec fused_negative(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
  static SMALLTHINKER_INLINE float sum(Vec value) { return _mm512_reduce_add_ps(value); }
  static SMALLTHINKER_INLINE Vec clamp(Vec x, float least,
                                       float most) {  // NaN is the second operand: it stays
    return _mm512_max_ps(_mm512_set1_ps(least), _mm512_min_ps(_mm512_set1_ps(most), x));
  }
  static SMALLTHINKER_INLINE Vec round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static SMALLTHINKER_INLINE Vec scale_by_power(Vec p, Vec n, Vec x) {
    const __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLeastExponent), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(alive, p, n);
  }
  static SMALLTHINKER_INLINE Vec load_some(const float* from, int count) {
    return _mm512_maskz_loadu_ps(first(count), from);
  }
  static SMALLTHINKER_INLINE void store_some(float* to, int count, Vec value) {
    _mm512_mask_storeu_ps(to, first(count), value);
  }
  static SMALLTHINKER_INLINE Vec first_lanes(Vec value, int count) {
    return _mm512_maskz_mov_ps(first(count), value);
  }
};

void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float scale,
                      float* scores, std::int64_t score_stride) {
  if (keys.type == KvType::kQ8) {
    return q8_dot_scores<Bytes>(q, groups, head_dim, keys, scale, scores, score_stride, avx2::quantise);
  }
  if (keys.type == KvType::kF16)
    return scores_of<Half>(q, groups, head_dim, keys, scale, scores, score_stride);
  return scores_of<Single>(q, groups, head_dim, keys, scale, scores, score_stride);
}

void attention_values(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                      std::int64_t head_dim, KvRows values, float* out) {
  if (values.type == KvType::kQ8)
    return q8_values<Bytes>(weights, weight_stride, groups, head_dim, values, out);
  if (values.type == KvType::kF16)
    return values_of<Half>(weights, weight_stride, groups, head_dim, values, out);
  return values_of<Single>(weights, weight_stride, groups, head_dim, values, out);
}

}  // namespace

void fill_attention(Kernels& table) {
  table.attention_scores = attention_scores;
  table.exp_sum = exp_sum<Exponential>;
  table.attention_values = attention_values;
}

}  // namespace smallthinker::avx512
