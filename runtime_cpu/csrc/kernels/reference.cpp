// Plain scalar kernels: what every other table is tested against. Sums are kept in double precision, and
// quantised weights are multiplied with the fp32 activations, so the only errors are those of the stored
// weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/elementwise.hpp"
#include "kernels/reference.hpp"
#include "model/quantisation.hpp"

namespace smallthinker::reference {
namespace {

void matmul(const Matrix& matrix, std::int64_t expert, std::int64_t row_begin, std::int64_t row_end,
            const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
  std::vector<float> weights(static_cast<std::size_t>(matrix.cols));
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    dequantise(matrix.type, matrix.row(r, expert), matrix.cols, weights.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* row = x.f32_row(t);
      double sum = 0.0;
      for (std::int64_t i = 0; i < matrix.cols; ++i) {
        sum += static_cast<double>(weights[static_cast<std::size_t>(i)]) * static_cast<double>(row[i]);
      }
      out[t * out_stride + (r - row_begin)] = static_cast<float>(sum);
    }
  }
}

void quantise(const float* x, std::int64_t size, std::int16_t* q, float* scales) {
  for (std::int64_t start = 0; start < size; start += kActivationBlock) {
    float greatest = 0.0F;
    bool finite = true;
    for (std::int64_t i = 0; i < kActivationBlock; ++i) {
      const float magnitude = std::fabs(x[start + i]);
      finite = finite && magnitude <= std::numeric_limits<float>::max();
      greatest = std::max(greatest, magnitude);
    }
    if (!finite) {  // NaN shows in the result; converting it to an integer would hide it
      scales[start / kActivationBlock] = std::numeric_limits<float>::quiet_NaN();
      std::fill_n(q + start, kActivationBlock, std::int16_t{1});
      continue;
    }
    const float scale = greatest / kActivationSteps;
    const float inverse = scale >= std::numeric_limits<float>::min() ? kActivationSteps / greatest : 0.0F;
    scales[start / kActivationBlock] = scale;
    for (std::int64_t i = 0; i < kActivationBlock; ++i) {
      q[start + i] = static_cast<std::int16_t>(std::nearbyint(x[start + i] * inverse));
    }
  }
}

void rms_norm(const float* x, const float* weight, std::int64_t size, float epsilon, float* out) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const auto factor =
      static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(size) + static_cast<double>(epsilon)));
  for (std::int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

float kv_element(const KvRows& rows, std::int64_t index) {
  return rows.type == KvType::kF16 ? half_to_float(static_cast<const std::uint16_t*>(rows.data)[index])
                                   : static_cast<const float*>(rows.data)[index];
}

// Dimension i of key or value j.
float key_element(const KvRows& keys, std::int64_t head_dim, std::int64_t j, std::int64_t i) {
  const std::int64_t tile = j / kKeyTile;
  const std::int64_t lane = j % kKeyTile;
  if (keys.type != KvType::kQ8) return kv_element(keys, (tile * head_dim + i) * kKeyTile + lane);
  const std::byte* block = static_cast<const std::byte*>(keys.data) + tile * Q8Tile::bytes(head_dim) +
                           i / kQ8Block * kKeyTile * (2 + kQ8Block);
  const float scale = half_to_float(load<std::uint16_t>(block + 2 * lane));
  const std::int64_t at = i % kQ8Block / kQ8Word * kKeyTile * kQ8Word + lane * kQ8Word + i % kQ8Word;
  return scale * static_cast<float>(load<std::uint8_t>(block + kKeyTile * 2 + at) - 128);
}

float value_element(const KvRows& values, std::int64_t head_dim, std::int64_t j, std::int64_t i) {
  if (values.type != KvType::kQ8) return kv_element(values, j * head_dim + i);
  const std::int64_t place = values.first + j;
  const std::int64_t lane = place % kKeyTile;
  const std::int64_t blocks = Q8Tile::blocks(head_dim);
  const std::byte* tile =
      static_cast<const std::byte*>(values.data) + place / kKeyTile * Q8Tile::bytes(head_dim);
  const float scale = half_to_float(load<std::uint16_t>(tile + 2 * (lane * blocks + i / kQ8Block)));
  return scale * static_cast<float>(load<std::int8_t>(tile + kKeyTile * blocks * 2 + lane * head_dim + i));
}

float exp_sum(float* x, std::int64_t size, float shift) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) {
    x[i] = std::exp(x[i] - shift);
    sum += static_cast<double>(x[i]);
  }
  return static_cast<float>(sum);
}

void attention_values(const float* weights, std::int64_t weight_stride, std::int64_t groups,
                      std::int64_t head_dim, KvRows values, float* out) {
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < head_dim; ++i) {
      float sum = out[g * head_dim + i];  // in fp32, so that values cut in two give the same bits
      for (std::int64_t j = 0; j < values.count; ++j) {
        sum += weights[g * weight_stride + j] * value_element(values, head_dim, j, i);
      }
      out[g * head_dim + i] = sum;
    }
  }
}

void run_maxima(const float* x, std::int64_t size, float* maxima) {
  for (std::int64_t start = 0; start < size; start += kLogitRun) {
    float best = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = start; i < std::min(size, start + kLogitRun); ++i) best = x[i] > best ? x[i] : best;
    *maxima++ = best;
  }
}

float exp_weights(const float* x, std::int64_t size, float shift, float factor, float least, float* out) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) {
    const double exponent =
        (static_cast<double>(x[i]) - static_cast<double>(shift)) * static_cast<double>(factor);
    auto value = static_cast<float>(std::exp(exponent));
    if (out != nullptr) out[i] = value = value >= least ? value : 0.0F;
    sum += static_cast<double>(value);
  }
  return static_cast<float>(sum);
}

LogitMass mass_above(const float* x, const float* weights, std::int64_t size, float bound) {
  double sum = 0.0;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (!(x[i] >= bound)) continue;
    sum += static_cast<double>(weights[i]);
    count += weights[i] > 0.0F ? 1 : 0;
  }
  return {static_cast<float>(sum), count};
}

void to_half(const float* x, std::int64_t size, std::uint16_t* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = float_to_half(x[i]);
}

}  // namespace

void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float scale,
                      float* scores, std::int64_t score_stride) {
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t j = 0; j < keys.count * kKeyTile; ++j) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < head_dim; ++i) {
        sum +=
            static_cast<double>(q[g * head_dim + i]) * static_cast<double>(key_element(keys, head_dim, j, i));
      }
      scores[g * score_stride + j] = scale * static_cast<float>(sum);
    }
  }
}

namespace {

void tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end, const Activations& x,
           std::int64_t tokens, float* out, std::int64_t out_stride) {
  std::vector<float> weights(static_cast<std::size_t>(matrix.cols));
  for (std::int64_t r = tile_begin * kTileRows; r < std::min(tile_end * kTileRows, matrix.rows); ++r) {
    unpack_tile_row(matrix, r, weights.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* row = x.f32_row(t);
      double sum = 0.0;
      for (std::int64_t i = 0; i < matrix.cols; ++i) {
        sum += static_cast<double>(weights[static_cast<std::size_t>(i)]) * static_cast<double>(row[i]);
      }
      out[t * out_stride + (r - tile_begin * kTileRows)] = static_cast<float>(sum);
    }
  }
}

std::int64_t neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                     std::int64_t group_end, const float* gate, const Activations& x, std::int64_t token,
                     float* out) {
  std::vector<float> up(static_cast<std::size_t>(shape.hidden));
  std::vector<float> down(static_cast<std::size_t>(shape.hidden));
  std::vector<double> sums(static_cast<std::size_t>(shape.hidden), 0.0);
  const float* row = x.f32_row(token);
  std::int64_t active = 0;
  for (std::int64_t n = group_begin * kNeuronGroup; n < group_end * kNeuronGroup; ++n) {
    const float open = gate[n - group_begin * kNeuronGroup];
    if (!(open > 0.0F)) continue;
    ++active;
    unpack_neuron(shape, expert, n, up.data(), down.data());
    double product = 0.0;
    for (std::size_t i = 0; i < up.size(); ++i)
      product += static_cast<double>(up[i]) * static_cast<double>(row[i]);
    const float hidden = open * static_cast<float>(product);
    for (std::size_t i = 0; i < down.size(); ++i)
      sums[i] += static_cast<double>(hidden) * static_cast<double>(down[i]);
  }
  for (std::size_t i = 0; i < sums.size(); ++i) out[i] += static_cast<float>(sums[i]);
  return active;
}

void block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums, std::uint64_t* running) {
  for (std::size_t block = 0; block < blocks; ++block) {
    std::uint32_t words[kChecksumLanes];
    std::memcpy(words, data + block * sizeof words, sizeof words);
    for (std::size_t i = 0; i < kChecksumLanes; ++i) {
      sums[i] += words[i];
      running[i] += sums[i];
    }
  }
}

}  // namespace

void fill(Kernels& table) {
  table.matmul = matmul;
  table.quantise = quantise;
  table.rms_norm = rms_norm;
  table.rotate = rotate;
  table.attention_scores = attention_scores;
  table.exp_sum = exp_sum;
  table.attention_values = attention_values;
  table.scale = scale;
  table.add_scaled = add_scaled;
  table.to_half = to_half;
  table.packed = false;
  table.split_planes = split_planes;
  table.tiles = tiles;
  table.neurons = neurons;
  table.run_maxima = run_maxima;
  table.exp_weights = exp_weights;
  table.mass_above = mass_above;
  table.block_sums = block_sums;
}

}  // namespace smallthinker::reference
