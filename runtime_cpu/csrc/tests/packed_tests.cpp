// The packed layouts: nothing is lost in packing, and every table's kernels on them against plain sums.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/table.hpp"
#include "model/quantisation.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr double kEpsilon = 0x1p-24;

// Activations in every form.
struct Inputs {
  std::vector<float> f32, scales;
  std::vector<std::int16_t> q;
  Bytes planes;
  std::int64_t cols = 0;

  Inputs(RandomStream& random, const Kernels& kernels, std::int64_t rows, std::int64_t columns)
      : cols(columns) {
    const auto size = static_cast<std::size_t>(rows * cols);
    f32.resize(size);
    q.resize(size);
    scales.resize(size / 32);
    for (float& value : f32) value = (random.fraction() < 0.02 ? 30.0F : 1.0F) * uniform(random);
    planes.resize(static_cast<std::size_t>(rows) * Planes::row_bytes(cols));
    requantise(kernels);
  }
  void requantise(const Kernels& kernels) {
    kernels.quantise(f32.data(), static_cast<std::int64_t>(f32.size()), q.data(), scales.data());
    split(kernels);
  }
  void split(const Kernels& kernels) {
    const std::size_t bytes = Planes::row_bytes(cols);
    for (std::size_t r = 0; r < planes.size() / bytes; ++r) {
      const auto at = r * static_cast<std::size_t>(cols);
      kernels.split_planes(q.data() + at, scales.data() + at / 32, cols, planes.data() + r * bytes);
    }
  }
  Activations view(const std::int32_t* index = nullptr) const {
    return {f32.data(), q.data(), scales.data(), cols, index, planes.data(), Planes::row_bytes(cols)};
  }
  double step(std::int64_t row, std::int64_t i) const {
    return static_cast<double>(scales[static_cast<std::size_t>((row * cols + i) / 32)]);
  }
  double at(std::int64_t row, std::int64_t i) const {
    return static_cast<double>(f32[static_cast<std::size_t>(row * cols + i)]);
  }
};

struct Stock {
  Bytes bytes;
  Matrix matrix;
  Stock(RandomStream& random, std::int64_t cols, std::int64_t rows, std::int64_t experts = 1)
      : bytes(random_rows(random, Type::kQ4_0, cols * rows * experts, 0.3F)),
        matrix(make_matrix(bytes.data(), Type::kQ4_0, cols, rows, experts)) {}
  std::vector<float> row(std::int64_t row, std::int64_t expert = 0) const {
    std::vector<float> values(static_cast<std::size_t>(matrix.cols));
    dequantise(Type::kQ4_0, matrix.row(row, expert), matrix.cols, values.data());
    return values;
  }
};

// Kernels read registers at 64-byte boundaries.
struct Aligned {
  Bytes bytes;
  std::byte* data;
  explicit Aligned(std::size_t size) : bytes(size + 64, std::byte{0x5A}) {
    data = bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64;
  }
};

void test_tiles(const Kernels& kernels, std::int64_t rows, std::int64_t cols, RandomStream& random) {
  const Stock stock(random, cols, rows, 2);
  TileMatrix tiled{nullptr, rows, cols};
  const Aligned memory(tiled.bytes());
  tiled.data = memory.data;
  pack_tiles(stock.matrix, 1, 0, tiled.tiles(), memory.data);
  std::vector<float> back(static_cast<std::size_t>(cols));
  for (std::int64_t r = 0; r < rows; ++r) {
    unpack_tile_row(tiled, r, back.data());
    CHECK(back == stock.row(r, 1), "tile row %ld of %ld x %ld", static_cast<long>(r), static_cast<long>(rows),
          static_cast<long>(cols));
  }
  constexpr std::int64_t kTokens = 15;
  const Inputs x(random, kernels, kTokens, cols);
  std::vector<std::int32_t> index;
  for (std::int32_t t = 0; t < kTokens; ++t) index.push_back((7 * t + 3) % kTokens);
  const std::int64_t stride = rows + 5;
  for (const std::int64_t tokens : {1, 2, 3, 5, 7, 15}) {
    std::vector<float> out(static_cast<std::size_t>(kTokens * stride), 42.0F);
    kernels.tiles(tiled, 0, tiled.tiles(), x.view(index.data()), tokens, out.data(), stride);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t r = 0; r < stride; ++r) {
        const float value = out[static_cast<std::size_t>(t * stride + r)];
        if (t >= tokens || r >= rows) {
          CHECK(value == 42.0F, "%s tiles wrote outside its range", kernels.name);
          continue;
        }
        const auto weights = stock.row(r, 1);
        double exact = 0.0, allowed = 1e-30;
        for (std::int64_t i = 0; i < cols; ++i) {
          const double weight = static_cast<double>(weights[static_cast<std::size_t>(i)]);
          exact += weight * x.at(index[static_cast<std::size_t>(t)], i);
          allowed += std::fabs(weight) * 0.5001 * x.step(index[static_cast<std::size_t>(t)], i);
          allowed += std::fabs(weight * x.at(index[static_cast<std::size_t>(t)], i)) * kEpsilon * 16;
        }
        CHECK(std::fabs(static_cast<double>(value) - exact) <= allowed,
              "%s tiles %ld x %ld: %g for %g, allowed %g", kernels.name, static_cast<long>(rows),
              static_cast<long>(cols), static_cast<double>(value), exact, allowed);
      }
      // One tile, one token: the same bits.
      if (t >= tokens) continue;
      const std::int64_t tile = tiled.tiles() - 1;
      std::vector<float> alone(kTileRows, 42.0F);
      kernels.tiles(tiled, tile, tile + 1, x.view(index.data() + t), 1, alone.data(), kTileRows);
      for (std::int64_t r = tile * kTileRows; r < rows; ++r) {
        CHECK(alone[static_cast<std::size_t>(r - tile * kTileRows)] ==
                  out[static_cast<std::size_t>(t * stride + r)],
              "%s tiles: a token alone gives other bits", kernels.name);
      }
    }
  }
}

void test_neurons(const Kernels& kernels, std::int64_t hidden, std::int64_t neurons, double share,
                  RandomStream& random) {
  const ExpertShape shape{hidden, neurons};
  const Stock gate(random, hidden, neurons, 2), up(random, hidden, neurons, 2),
      down(random, neurons, hidden, 2);
  const Aligned memory(shape.bytes());
  pack_gate(gate.matrix, 1, shape, memory.data);
  pack_down(down.matrix, 1, shape, memory.data);
  pack_up(up.matrix, 1, shape, memory.data);
  std::vector<float> up_row(static_cast<std::size_t>(hidden)), column(up_row.size()), gate_row(up_row.size());
  std::vector<std::vector<float>> downs;
  for (std::int64_t d = 0; d < hidden; ++d) downs.push_back(down.row(d, 1));
  for (std::int64_t n = 0; n < neurons; ++n) {
    unpack_neuron(shape, memory.data, n, up_row.data(), column.data());
    unpack_tile_row(shape.gate(memory.data), n, gate_row.data());
    CHECK(up_row == up.row(n, 1) && gate_row == gate.row(n, 1), "neuron %ld", static_cast<long>(n));
    for (std::size_t d = 0; d < column.size(); ++d) {
      CHECK(column[d] == downs[d][static_cast<std::size_t>(n)], "down %zu of neuron %ld", d,
            static_cast<long>(n));
    }
  }
  const Inputs x(random, kernels, 2, hidden);
  std::vector<float> gates(static_cast<std::size_t>(neurons));
  std::int64_t expected_active = 0;
  const std::int64_t begin = neurons > kNeuronGroup ? 1 : 0;  // a slice
  for (std::size_t n = 0; n < gates.size(); ++n) {
    gates[n] = random.fraction() < share ? 0.1F + uniform(random) * uniform(random) : -1.0F;
    expected_active += gates[n] > 0.0F && n >= static_cast<std::size_t>(begin * kNeuronGroup) ? 1 : 0;
  }
  if (share > 0.0) gates[0] = std::nanf("");  // no neuron is active by accident
  if (begin == 0 && share > 0.0) {
    expected_active = 0;
    for (const float value : gates) expected_active += value > 0.0F ? 1 : 0;
  }
  std::vector<float> out(static_cast<std::size_t>(shape.padded()), 0.25F);
  const std::int64_t active = kernels.neurons(shape, memory.data, begin, shape.groups(),
                                              gates.data() + begin * kNeuronGroup, x.view(), 1, out.data());
  CHECK(active == expected_active, "%s: %ld active neurons", kernels.name, static_cast<long>(active));
  std::vector<double> exact(out.size(), 0.25), allowed(out.size(), kEpsilon);
  for (std::int64_t g = begin; g < shape.groups(); ++g) {
    std::vector<double> values(kNeuronGroup, 0.0), errors(kNeuronGroup, 0.0);
    double peak = 0.0;
    for (std::int64_t n = 0; n < kNeuronGroup; ++n) {
      const float open = gates[static_cast<std::size_t>(g * kNeuronGroup + n)];
      if (!(open > 0.0F)) continue;
      const auto weights = up.row(g * kNeuronGroup + n, 1);
      double dot = 0.0, error = 0.0;
      for (std::int64_t i = 0; i < hidden; ++i) {
        const double weight = static_cast<double>(weights[static_cast<std::size_t>(i)]);
        dot += weight * x.at(1, i);
        error += std::fabs(weight) * (0.5001 * x.step(1, i) + std::fabs(x.at(1, i)) * kEpsilon * 16);
      }
      values[static_cast<std::size_t>(n)] = static_cast<double>(open) * dot;
      errors[static_cast<std::size_t>(n)] = static_cast<double>(open) * error;
      peak = std::max(peak,
                      std::fabs(values[static_cast<std::size_t>(n)]) + errors[static_cast<std::size_t>(n)]);
    }
    const double half_step = 0.502 * peak / static_cast<double>(kActivationSteps);
    for (std::int64_t d = 0; d < hidden; ++d) {
      const auto at = static_cast<std::size_t>(d);
      for (std::int64_t n = 0; n < kNeuronGroup; ++n) {
        if (!(gates[static_cast<std::size_t>(g * kNeuronGroup + n)] > 0.0F)) continue;
        const double weight = static_cast<double>(downs[at][static_cast<std::size_t>(g * kNeuronGroup + n)]);
        const double value = values[static_cast<std::size_t>(n)];
        exact[at] += weight * value;
        allowed[at] += std::fabs(weight) * (errors[static_cast<std::size_t>(n)] + half_step);
        allowed[at] += std::fabs(weight * value) * kEpsilon * 16;
      }
      allowed[at] += std::fabs(exact[at]) * kEpsilon * 4;
    }
  }
  for (std::size_t d = 0; d < out.size(); ++d) {
    CHECK(std::fabs(static_cast<double>(out[d]) - exact[d]) <= allowed[d],
          "%s neurons %ld x %ld output %zu: %g for %g, allowed %g", kernels.name, static_cast<long>(hidden),
          static_cast<long>(neurons), d, static_cast<double>(out[d]), exact[d], allowed[d]);
  }
}

// Damage must show, not vanish in a conversion.
void test_not_finite(const Kernels& kernels, RandomStream& random) {
  const ExpertShape shape{64, 32};
  const Stock up(random, 64, 32), down(random, 32, 64);
  const Aligned memory(shape.bytes());
  std::memset(memory.data, 0, shape.bytes());
  pack_up(up.matrix, 0, shape, memory.data);
  pack_down(down.matrix, 0, shape, memory.data);
  const Inputs x(random, kernels, 1, 64);
  std::vector<float> gates(32, 1.0F), out(static_cast<std::size_t>(shape.padded()), 0.0F);
  gates[3] = std::numeric_limits<float>::infinity();
  kernels.neurons(shape, memory.data, 0, 1, gates.data(), x.view(), 0, out.data());
  CHECK(!std::isfinite(out[0]), "%s: an infinite neuron left no trace", kernels.name);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    Inputs damaged(random, kernels, 1, 64);
    damaged.f32[40] = bad;
    damaged.requantise(kernels);
    pack_tiles(up.matrix, 0, 0, 2, memory.data);
    std::vector<float> rows(32, 0.0F);
    kernels.tiles({memory.data, 32, 64}, 0, 2, damaged.view(), 1, rows.data(), 32);
    for (const float value : rows) CHECK(!std::isfinite(value), "%s: damage left no trace", kernels.name);
  }
}

// Both forms of a row and its scales and offsets, byte for byte as the plain code splits it.
void test_planes(const Kernels& kernels, RandomStream& random) {
  for (const std::int64_t cols : {32, 96, 512, 544, 1536}) {
    const Inputs x(random, kernels, 2, cols);
    Bytes expected(x.planes.size(), std::byte{0x33});
    const std::size_t bytes = Planes::row_bytes(cols);
    for (std::size_t r = 0; r < 2; ++r) {
      const auto at = r * static_cast<std::size_t>(cols);
      split_planes(x.q.data() + at, x.scales.data() + at / 32, cols, expected.data() + r * bytes);
    }
    CHECK(x.planes == expected, "%s split_planes of %ld", kernels.name, static_cast<long>(cols));
  }
}

// The greatest sums there can be: every nibble 15, or 0, and activations whose upper byte is the greatest or
// whose lower byte is the least. Narrow sums must hold them.
void test_extremes(const Kernels& kernels, RandomStream& random) {
  constexpr std::int64_t kSize = 544;
  const ExpertShape shape{kSize, 64};
  for (const auto& [value, bits] : {std::pair(7.0, 0xFF), std::pair(-8.0, 0x00)}) {
    Stock up(random, kSize, 64), down(random, 64, kSize);
    for (Stock* stock : {&up, &down}) {
      for (std::size_t i = 0; i < stock->bytes.size(); ++i) {
        stock->bytes[i] = static_cast<std::byte>(i % 18 == 0 ? 0x00 : i % 18 == 1 ? 0x3C : bits);
      }
    }
    for (const int q : {32512, 32384, -32512, -32384, -128, 127}) {
      Inputs x(random, kernels, 4, kSize);
      std::fill(x.f32.begin(), x.f32.end(), static_cast<float>(q));
      std::fill(x.q.begin(), x.q.end(), static_cast<std::int16_t>(q));
      std::fill(x.scales.begin(), x.scales.end(), 1.0F);
      x.split(kernels);
      const double dot = value * q * kSize;
      const Aligned memory(shape.bytes());
      const TileMatrix tiled{memory.data, 64, kSize};
      pack_tiles(up.matrix, 0, 0, tiled.tiles(), memory.data);
      for (const std::int64_t tokens : {1, 2, 4}) {
        std::vector<float> out(static_cast<std::size_t>(tokens * 64));
        kernels.tiles(tiled, 0, tiled.tiles(), x.view(), tokens, out.data(), 64);
        for (const float one : out) {
          CHECK(std::fabs(static_cast<double>(one) - dot) <= std::fabs(dot) * kEpsilon * 16,
                "%s tiles: %g for %g", kernels.name, static_cast<double>(one), dot);
        }
      }
      // One neuron of each group at 32512 steps, the others at 32384: the lower byte is -128.
      pack_up(up.matrix, 0, shape, memory.data);
      pack_down(down.matrix, 0, shape, memory.data);
      std::vector<float> gates(64, 32384.0F / 32512.0F);
      gates[5] = gates[40] = 1.0F;
      const double exact = value * dot * (2.0 + 62.0 * 32384.0 / 32512.0);
      std::vector<float> out(static_cast<std::size_t>(shape.padded()), 0.0F);
      kernels.neurons(shape, memory.data, 0, 2, gates.data(), x.view(), 0, out.data());
      for (std::int64_t d = 0; d < kSize; ++d) {
        const double one = static_cast<double>(out[static_cast<std::size_t>(d)]);
        CHECK(std::fabs(one - exact) <= std::fabs(exact) * 1e-5, "%s neurons: %g for %g", kernels.name, one,
              exact);
      }
    }
  }
}

}  // namespace

void test_packed() {
  RandomStream random(11);
  for (const Kernels* kernels : available_kernels()) {
    for (const std::int64_t cols : {32, 64, 96, 160, 512, 544}) {
      for (const std::int64_t rows : {1, 5, 12, 15, 16, 17, 25, 48}) test_tiles(*kernels, rows, cols, random);
    }
    for (const std::int64_t hidden : {32, 96, 512, 640, 1024}) {
      for (const std::int64_t neurons : {32, 64, 96}) {
        for (const double share : {0.0, 0.04, 0.4, 1.0})
          test_neurons(*kernels, hidden, neurons, share, random);
      }
    }
    test_neurons(*kernels, 64, 32 * 40, 0.5, random);
    test_not_finite(*kernels, random);
    test_extremes(*kernels, random);
    test_planes(*kernels, random);
  }
}
