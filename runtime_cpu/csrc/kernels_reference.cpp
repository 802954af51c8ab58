// Plain scalar kernels: what every other table is tested against. Sums are kept in double precision, and
// quantised weights meet the fp32 activations, so the only errors are those of the stored weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.hpp"

namespace smallthinker {
namespace {

// Layouts of the blocks: ggml-common.h (block_q4_0, block_q8_0, block_q6_K).
void dequantise_q4_0(const std::byte* block, float* out) {
  const float scale = half_to_float(load<std::uint16_t>(block));
  for (int i = 0; i < 16; ++i) {
    const int pair = std::to_integer<int>(block[2 + i]);
    out[i] = static_cast<float>((pair & 15) - 8) * scale;
    out[i + 16] = static_cast<float>((pair >> 4) - 8) * scale;
  }
}

void dequantise_q8_0(const std::byte* block, float* out) {
  const float scale = half_to_float(load<std::uint16_t>(block));
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(load<std::int8_t>(block + 2 + i)) * scale;
}

void dequantise_q6_k(const std::byte* block, float* out) {
  const std::byte* low = block;
  const std::byte* high = block + 128;
  const std::byte* scales = block + 192;
  const float scale = half_to_float(load<std::uint16_t>(block + 208));
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int lane = i % 32;
    const int nibbles = std::to_integer<int>(low[64 * half + 32 * (quarter & 1) + lane]);
    const int upper = std::to_integer<int>(high[32 * half + lane]) >> (2 * quarter) & 3;
    const int value = ((quarter < 2 ? nibbles & 15 : nibbles >> 4) | upper << 4) - 32;
    out[i] = scale * static_cast<float>(load<std::int8_t>(scales + i / 16)) * static_cast<float>(value);
  }
}

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
    if (!finite) {  // let the damage show instead of converting it
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

void rotate(float* x, std::int64_t size, const float* cosines, const float* sines) {
  const std::int64_t half = size / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i] + first * sines[i];
  }
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

void scale(float* x, std::int64_t size, float factor) {
  for (std::int64_t i = 0; i < size; ++i) x[i] *= factor;
}

void add_scaled(float* x, const float* y, std::int64_t size, float factor) {
  for (std::int64_t i = 0; i < size; ++i) x[i] += factor * y[i];
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

void reference_attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys,
                                float scale, float* scores, std::int64_t score_stride) {
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

void reference_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                     const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride) {
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

std::int64_t reference_neurons(const ExpertShape& shape, const std::byte* expert, std::int64_t group_begin,
                               std::int64_t group_end, const float* gate, const Activations& x,
                               std::int64_t token, float* out) {
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

void dequantise(Type type, const std::byte* data, std::int64_t size, float* out) {
  const TypeTraits& traits = traits_of(type);
  for (std::int64_t start = 0; start < size; start += traits.block, data += traits.block_bytes) {
    switch (type) {
      case Type::kF32:
        out[start] = load<float>(data);
        break;
      case Type::kF16:
        out[start] = half_to_float(load<std::uint16_t>(data));
        break;
      case Type::kBF16:
        out[start] = bfloat_to_float(load<std::uint16_t>(data));
        break;
      case Type::kQ4_0:
        dequantise_q4_0(data, out + start);
        break;
      case Type::kQ8_0:
        dequantise_q8_0(data, out + start);
        break;
      case Type::kQ6_K:
        dequantise_q6_k(data, out + start);
        break;
      case Type::kI8:
        throw std::logic_error("packed bytes have no rows");
    }
  }
}

void reference_block_sums(const std::byte* data, std::size_t blocks, std::uint64_t* sums,
                          std::uint64_t* running) {
  for (std::size_t block = 0; block < blocks; ++block) {
    std::uint32_t words[kChecksumLanes];
    std::memcpy(words, data + block * sizeof words, sizeof words);
    for (std::size_t i = 0; i < kChecksumLanes; ++i) {
      sums[i] += words[i];
      running[i] += sums[i];
    }
  }
}

const Kernels& reference_table() {
  static constexpr Kernels kTable = {"reference",
                                     matmul,
                                     quantise,
                                     rms_norm,
                                     rotate,
                                     reference_attention_scores,
                                     exp_sum,
                                     attention_values,
                                     scale,
                                     add_scaled,
                                     to_half,
                                     false,
                                     split_planes,
                                     reference_tiles,
                                     reference_neurons,
                                     run_maxima,
                                     exp_weights,
                                     mass_above,
                                     reference_block_sums};
  return kTable;
}

}  // namespace smallthinker
