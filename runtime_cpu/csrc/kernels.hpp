// The kernels as one table of functions; one file per instruction set fills it.
//
//   const Kernels& k = select_kernels("auto");
//   k.matmul(matrix, row_begin, row_end, activations, tokens, out, stride);
//
// To add an instruction set: write kernels_<name>.cpp with a table, name it in kernels.cpp (which asks the
// processor first, and is itself compiled for the oldest one) and in CMakeLists.txt. The tests find it by
// available_kernels().
//
// Promise of every kernel: the result of one (row, token) pair depends on that row and that token only, never
// on how many are computed together. Threads and prompt chunks therefore cannot change a bit of the output.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checksum.hpp"
#include "packed.hpp"
#include "tensor.hpp"

namespace smallthinker {

// Keys lie in tiles of 16 positions, [head_dim][16], so that a register holds one dimension of 16 keys;
// values lie position by position, [head_dim].
inline constexpr std::int64_t kKeyTile = 16;

enum class KvType { kF32, kF16, kQ8 };

// 8-bit keys and values: whole numbers in [-127, 127] with an fp16 scale for each 32 dimensions. Both lie in
// tiles of 16 positions of the same size. Of keys, per 32 dimensions, [16] scales and [dims / 4][16][4] steps
// plus 128, the unsigned side of a byte product; of values [16][blocks] scales and [16][head_dim] steps.
inline constexpr std::int64_t kQ8Block = 32;
inline constexpr std::int64_t kQ8Word = 4;  // dimensions of a key side by side
struct Q8Tile {
  SMALLTHINKER_INLINE static std::int64_t blocks(std::int64_t head_dim) {
    return (head_dim + kQ8Block - 1) / kQ8Block;
  }
  SMALLTHINKER_INLINE static std::int64_t bytes(std::int64_t head_dim) {
    return kKeyTile * (2 * blocks(head_dim) + (head_dim + kQ8Word - 1) / kQ8Word * kQ8Word);
  }
};

// Keys or values of consecutive positions: `count` tiles or rows, one after the other.
struct KvRows {
  const void* data = nullptr;
  KvType type = KvType::kF32;
  std::int64_t count = 0;
  std::int64_t first = 0;  // of 8-bit values: the first one's place in its tile
};

inline constexpr std::int64_t kLogitRun = 64;  // logits whose greatest one is kept

struct LogitMass {
  float sum = 0.0F;
  std::int64_t count = 0;  // of weights above 0
};

struct Kernels {
  const char* name;

  // out[t * out_stride + (r - row_begin)] = dot(row r of `expert`, token t) for r in [row_begin, row_end).
  void (*matmul)(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
                 const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);

  // q = round(x / scale), scale = max|x| / kActivationSteps per block of 32; `size` is a multiple of 32.
  void (*quantise)(const float* x, std::int64_t size, std::int16_t* q, float* scales);

  // out = weight * (x / sqrt(mean(x^2) + epsilon)); returns nothing; out may be x.
  void (*rms_norm)(const float* x, const float* weight, std::int64_t size, float epsilon, float* out);

  // Half-rotation (NeoX): dimension i pairs with i + size / 2; cosines and sines [size / 2].
  void (*rotate)(float* x, std::int64_t size, const float* cosines, const float* sines);

  // scores[g * score_stride + 16 * t + lane] = scale * dot(q row g, that key of tile t), for all `count`
  // tiles.
  void (*attention_scores)(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                           float scale, float* scores, std::int64_t score_stride);

  // x[i] = exp(x[i] - shift) in place; returns their sum.
  float (*exp_sum)(float* x, std::int64_t size, float shift);

  // out row g += sum over j of weights[g * weight_stride + j] * value j, one after the other: cutting the
  // values in two calls changes no bit.
  void (*attention_values)(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                           std::int64_t head_dim, KvRows values, float* out);

  void (*scale)(float* x, std::int64_t size, float factor);                       // x *= factor
  void (*add_scaled)(float* x, const float* y, std::int64_t size, float factor);  // x += factor * y
  void (*to_half)(const float* x, std::int64_t size, std::uint16_t* out);

  // The packed layouts (packed.hpp); `packed` says that these are faster than `matmul` on stock rows.
  bool packed;
  void (*split_planes)(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);
  // out[t * out_stride + (r - 16 * tile_begin)] for the rows of tiles [tile_begin, tile_end), as matmul.
  void (*tiles)(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
  // One token, neuron groups [group_begin, group_end) of one expert: out[padded] += sum over the neurons n
  // with gate[n] > 0 of gate[n] * dot(up n, x) * (down column n); gate[0] is of the first group's first
  // neuron. Weights of other neurons are not read. Returns how many were active.
  std::int64_t (*neurons)(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                          std::int64_t group_end, const float* gate, const Activations& x, std::int64_t token,
                          float* out);

  // Choosing a token (logit_kernels.hpp). The greatest of each 64 of x; NaN is passed over.
  void (*run_maxima)(const float* x, std::int64_t size, float* maxima);
  // The sum of w = exp((x[i] - shift) * factor) over x[i] <= shift, factor > 0. With `out`, w is written
  // there, as 0 where it is less than `least` or no number; without, NaN shows in the sum.
  float (*exp_weights)(const float* x, std::int64_t size, float shift, float factor, float least, float* out);
  // The weights of the x that are at least `bound`. Not less for a lower bound: same order of sums.
  LogitMass (*mass_above)(const float* x, const float* weights, std::int64_t size, float bound);

  BlockSums block_sums;  // checksum.hpp
};

const Kernels& reference_table();
void reference_block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums,
                          std::uint64_t* running);
void reference_attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                                float scale, float* scores, std::int64_t score_stride);
void reference_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                     const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
std::int64_t reference_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                               std::int64_t group_end, const float* gate, const Activations& x,
                               std::int64_t token, float* out);
#if defined(SMALLTHINKER_X86)
const Kernels& avx2_table();
void avx2_split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);
void avx2_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
std::int64_t avx2_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                          std::int64_t group_end, const float* gate, const Activations& x, std::int64_t token,
                          float* out);
// The AVX-512 table is AVX2's with these (needs F, BW, DQ, VL and VNNI).
void avx512_attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                             float scale, float* scores, std::int64_t score_stride);
float avx512_exp_sum(float* x, std::int64_t size, float shift);
void avx512_attention_values(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                             std::int64_t head_dim, KvRows values, float* out);
void avx512_split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);
void avx512_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                  const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
void avx512_block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums,
                       std::uint64_t* running);
void avx512_run_maxima(const float* x, std::int64_t size, float* maxima);
float avx512_exp_weights(const float* x, std::int64_t size, float shift, float factor, float least,
                         float* out);
LogitMass avx512_mass_above(const float* x, const float* weights, std::int64_t size, float bound);
std::int64_t avx512_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                            std::int64_t group_end, const float* gate, const Activations& x,
                            std::int64_t token, float* out);
void avx512_matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
                   const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
#endif
#if defined(SMALLTHINKER_ARM64)
const Kernels& neon_table();
void neon_split_planes(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);
void neon_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
std::int64_t neon_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                          std::int64_t group_end, const float* gate, const Activations& x, std::int64_t token,
                          float* out);
// The dot-product table is NEON's with these, and the i8mm table is that with its own tiles.
void neon_dotprod_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                        const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
void neon_dotprod_attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                                   float scale, float* scores, std::int64_t score_stride);
std::int64_t neon_dotprod_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                                  std::int64_t group_end, const float* gate, const Activations& x,
                                  std::int64_t token, float* out);
void neon_i8mm_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                     const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
#endif

// Those that this processor can run, slowest first.
std::vector<const Kernels*> available_kernels();
// "auto" takes the fastest. Throws EngineError for a name that is not available.
const Kernels& select_kernels(const std::string& name);

// A row of any storage type to fp32 (plain code: embedding rows and norms only).
void dequantise(Type type, const std::byte* data, std::int64_t size, float* out);

}  // namespace smallthinker
