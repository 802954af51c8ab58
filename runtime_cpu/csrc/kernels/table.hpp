// The kernels as one table of functions, which the folders of the instruction sets fill in.
//
//   const Kernels& k = select_kernels("auto");
//   k.matmul(matrix, expert, row_begin, row_end, activations, tokens, out, stride);
//
// To add an instruction set: a folder with a table.hpp that offers `supported()` and `fill(Kernels&)`, a line
// in select.cpp, and its files with their compiler flags in CMakeLists.txt. A table starts as a copy of the
// one before it, so fill() sets only what its instructions do faster. `supported()` is compiled for the
// oldest processor, because it runs on every one. The tests find the new table by available_kernels().
//
// Promise of every kernel: the result of one (row, token) pair depends on that row and that token only, never
// on how many are computed together. Threads and prompt chunks therefore cannot change a bit of the output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kv_rows.hpp"
#include "model/packed.hpp"
#include "model/tensor.hpp"

namespace smallthinker {

inline constexpr std::int64_t kLogitRun = 64;  // logits of which run_maxima keeps the greatest one

inline constexpr std::size_t kChecksumLanes = 8;
inline constexpr std::size_t kChecksumBlock = kChecksumLanes * sizeof(std::uint32_t);

struct LogitMass {
  float sum = 0.0F;
  std::int64_t count = 0;  // of weights above 0
};

struct Kernels {
  const char* name;

  // out[t * out_stride + (r - row_begin)] = dot(row r of `expert`, token t) for r in [row_begin, row_end).
  void (*matmul)(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
                 const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);

  // q [size] = round(x [size] / scale), scales [size / 32] = max|x| / kActivationSteps of each block of 32;
  // `size` is a multiple of 32. A block that holds NaN or infinity gets the scale NaN.
  void (*quantise)(const float* x, std::int64_t size, std::int16_t* q, float* scales);

  // out [size] = weight [size] * (x [size] / sqrt(mean(x^2) + epsilon)); out may be x.
  void (*rms_norm)(const float* x, const float* weight, std::int64_t size, float epsilon, float* out);

  // RoPE of x [size] by half-rotation (NeoX): dimension i pairs with i + size / 2; cosines and sines [size /
  // 2].
  void (*rotate)(float* x, std::int64_t size, const float* cosines, const float* sines);

  // scores[g * score_stride + 16 * t + lane] = scale * dot(q row g, that key of tile t), for all `count`
  // tiles; q [groups][head_dim].
  void (*attention_scores)(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                           float scale, float* scores, std::int64_t score_stride);

  // x[i] = exp(x[i] - shift) in place, x [size]; returns their sum.
  float (*exp_sum)(float* x, std::int64_t size, float shift);

  // out [groups][head_dim]: row g += sum over j of weights[g * weight_stride + j] * value j, one after the
  // other: splitting the values between two calls changes no bit.
  void (*attention_values)(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                           std::int64_t head_dim, KvRows values, float* out);

  void (*scale)(float* x, std::int64_t size, float factor);                       // x [size] *= factor
  void (*add_scaled)(float* x, const float* y, std::int64_t size, float factor);  // x += factor * y, [size]
  void (*to_half)(const float* x, std::int64_t size, std::uint16_t* out);         // [size] to fp16 [size]

  // The packed layouts (model/packed.hpp); `packed` says that these are faster than `matmul` on stock rows.
  bool packed;
  // q [cols] and scales [cols / 32] to one row of Planes.
  void (*split_planes)(const std::int16_t* q, const float* scales, std::int64_t cols, std::byte* row);
  // out[t * out_stride + (r - 16 * tile_begin)] for the rows of tiles [tile_begin, tile_end), as matmul.
  void (*tiles)(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);
  // One token, neuron groups [group_begin, group_end) of one expert: out [padded] += sum over the neurons n
  // with gate[n] > 0 of gate[n] * dot(up n, x) * (down column n); gate [groups * 32] begins with the first
  // group's first neuron. Weights of other neurons are not read. Returns how many were active.
  std::int64_t (*neurons)(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                          std::int64_t group_end, const float* gate, const Activations& x, std::int64_t token,
                          float* out);

  // Choosing a token (kernels/logits.hpp). The greatest of each 64 of x [size], to maxima [size / 64, rounded
  // up]; NaN is passed over.
  void (*run_maxima)(const float* x, std::int64_t size, float* maxima);
  // The sum of w = exp((x[i] - shift) * factor) over x [size], x[i] <= shift, factor > 0. With `out` [size],
  // w is written there, as 0 where it is less than `least` or NaN; without, NaN shows in the sum.
  float (*exp_weights)(const float* x, std::int64_t size, float shift, float factor, float least, float* out);
  // The sum and number of the weights [size] whose x [size] is at least `bound`. The order of the additions
  // does not depend on `bound`, so a lower bound never gives a smaller sum.
  LogitMass (*mass_above)(const float* x, const float* weights, std::int64_t size, float bound);

  // The inner loop of checksum64 (experts/checksum.hpp): for each of `blocks` blocks of 32 bytes, word i is
  // added to sums[i] and then sums[i] to running[i]; sums and running are [kChecksumLanes].
  void (*block_sums)(const std::byte* data, std::size_t blocks, std::uint64_t* sums, std::uint64_t* running);
};

// Those that this processor can run, slowest first; the first is "reference".
std::vector<const Kernels*> available_kernels();
// "auto" takes the fastest. Throws EngineError for a name that is not available.
const Kernels& select_kernels(const std::string& name);

}  // namespace smallthinker
