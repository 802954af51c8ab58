// Every kernel of every table against the plain reference, over ragged and empty shapes, with a bound per
// type.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/table.hpp"
#include "model/quantisation.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr double kEpsilon = 0x1p-24;

struct Inputs {
  std::vector<float> f32;
  std::vector<std::int16_t> q;
  std::vector<float> scales;
  std::int64_t stride = 0;
  Activations view(const std::int32_t* index) const {
    return {f32.data(), q.data(), scales.data(), stride, index};
  }
};

Inputs make_inputs(RandomStream& random, std::int64_t rows, std::int64_t cols) {
  Inputs x;
  x.stride = round_up(cols, kActivationBlock);
  x.f32.assign(static_cast<std::size_t>(rows * x.stride), 0.0F);
  x.q.resize(x.f32.size());
  x.scales.resize(x.f32.size() / kActivationBlock);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < cols; ++i) {
      // A few large values, as real residual streams have.
      const float boost = random.fraction() < 0.02 ? 30.0F : 1.0F;
      x.f32[static_cast<std::size_t>(r * x.stride + i)] = boost * uniform(random);
    }
  }
  select_kernels("reference").quantise(x.f32.data(), rows * x.stride, x.q.data(), x.scales.data());
  return x;
}

// What a correct kernel may differ by: rounding of fp32 sums, and for quantised weights half a step of the
// 16-bit activations per element.
double bound(const std::vector<float>& weights, const Inputs& x, std::int64_t row, bool quantised) {
  double magnitude = 0.0;
  double steps = 0.0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto at = static_cast<std::size_t>(row * x.stride) + i;
    magnitude += std::fabs(static_cast<double>(weights[i]) * static_cast<double>(x.f32[at]));
    steps +=
        std::fabs(static_cast<double>(weights[i])) * static_cast<double>(x.scales[at / kActivationBlock]);
  }
  const double rounding = magnitude * kEpsilon * (8.0 + static_cast<double>(weights.size()) / 8.0);
  return rounding + (quantised ? 0.5001 * steps : 0.0) + 1e-30;
}

void test_matmul(const Kernels& kernels, Type type, std::int64_t cols, RandomStream& random) {
  const TypeTraits& traits = traits_of(type);
  if (cols % traits.block != 0) return;
  constexpr std::int64_t kRows = 7;
  constexpr std::int64_t kExperts = 2;
  const Bytes bytes = random_rows(random, type, cols * kRows * kExperts, 0.3F);
  const Matrix matrix = make_matrix(bytes.data(), type, cols, kRows, kExperts);
  const Inputs x = make_inputs(random, 9, cols);
  const std::vector<std::int32_t> index = {8, 0, 3, 3, 1, 7, 2, 5, 4};
  std::vector<float> weights(static_cast<std::size_t>(cols));
  for (const std::int64_t tokens : {0, 1, 2, 3, 4, 5, 7, 9}) {
    for (const std::int32_t* order : {static_cast<const std::int32_t*>(nullptr), index.data()}) {
      constexpr std::int64_t kStride = kRows + 3;
      std::vector<float> out(static_cast<std::size_t>(9 * kStride), 42.0F);
      kernels.matmul(matrix, 1, 0, kRows, x.view(order), tokens, out.data(), kStride);
      for (std::int64_t t = 0; t < 9; ++t) {
        for (std::int64_t r = 0; r < kStride; ++r) {
          const float value = out[static_cast<std::size_t>(t * kStride + r)];
          if (t >= tokens || r >= kRows) {
            CHECK(value == 42.0F, "%s wrote outside its range", kernels.name);
            continue;
          }
          const std::int64_t row = order != nullptr ? order[t] : t;
          dequantise(type, matrix.row(r, 1), cols, weights.data());
          double exact = 0.0;
          for (std::int64_t i = 0; i < cols; ++i) {
            exact += static_cast<double>(weights[static_cast<std::size_t>(i)]) *
                     static_cast<double>(x.f32[static_cast<std::size_t>(row * x.stride + i)]);
          }
          const double error = std::fabs(static_cast<double>(value) - exact);
          const double allowed = bound(weights, x, row, traits.quantised);
          CHECK(error <= allowed, "%s %s cols %ld tokens %ld: error %g, allowed %g", kernels.name,
                traits.name, static_cast<long>(cols), static_cast<long>(tokens), error, allowed);
          float alone = 0.0F;
          Activations single = x.view(nullptr);
          const auto which = static_cast<std::int32_t>(row);
          single.index = &which;
          kernels.matmul(matrix, 1, r, r + 1, single, 1, &alone, 1);
          CHECK(alone == value, "%s %s: a token alone gives other bits", kernels.name, traits.name);
        }
      }
    }
  }
}

void test_quantise(const Kernels& kernels, RandomStream& random) {
  for (int round = 0; round < 200; ++round) {
    std::vector<float> x(64);
    for (float& value : x) value = std::ldexp(uniform(random), static_cast<int>(random.next() % 80) - 60);
    if (round == 0) x.assign(64, 0.0F);
    if (round == 1) x.assign(64, std::numeric_limits<float>::max());
    if (round == 2) x.assign(64, std::numeric_limits<float>::denorm_min());
    if (round == 3) x[5] = std::numeric_limits<float>::infinity();
    if (round == 4) x[40] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::int16_t> q(64), expected_q(64);
    std::vector<float> scales(2), expected_scales(2);
    select_kernels("reference").quantise(x.data(), 64, expected_q.data(), expected_scales.data());
    kernels.quantise(x.data(), 64, q.data(), scales.data());
    CHECK(q == expected_q, "%s quantise, round %d", kernels.name, round);
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(scales[i] == expected_scales[i] || (std::isnan(scales[i]) && std::isnan(expected_scales[i])),
            "%s quantise scale", kernels.name);
      if (std::isnan(scales[i])) continue;
      for (std::size_t j = 0; j < 32; ++j) {
        const double back = static_cast<double>(q[32 * i + j]) * static_cast<double>(scales[i]);
        const double error = std::fabs(back - static_cast<double>(x[32 * i + j]));
        CHECK(error <= 0.502 * static_cast<double>(scales[i]) + 32512.0 * 1.2e-38, "%s quantise error",
              kernels.name);
      }
    }
  }
}

void compare(const char* what, const std::vector<float>& got, const std::vector<float>& expected,
             double relative, double absolute) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected[i]));
    const double allowed = relative * std::fabs(static_cast<double>(expected[i])) + absolute;
    CHECK(error <= allowed, "%s[%zu]: %.9g, expected %.9g", what, i, static_cast<double>(got[i]),
          static_cast<double>(expected[i]));
  }
}

std::vector<float> random_vector(RandomStream& random, std::int64_t size) {
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = 2.0F * uniform(random);
  return values;
}

void test_elementwise(const Kernels& kernels, std::int64_t size, RandomStream& random) {
  const Kernels& plain = select_kernels("reference");
  const auto x = random_vector(random, size);
  const auto y = random_vector(random, size);
  std::vector<float> got(x.size()), expected(x.size());
  plain.rms_norm(x.data(), y.data(), size, 1e-6F, expected.data());
  kernels.rms_norm(x.data(), y.data(), size, 1e-6F, got.data());
  compare("rms_norm", got, expected, 4 * kEpsilon, 1e-30);
  got = expected = x;
  plain.add_scaled(expected.data(), y.data(), size, 0.3F);
  kernels.add_scaled(got.data(), y.data(), size, 0.3F);
  compare("add_scaled", got, expected, 0.0, 2 * kEpsilon);
  plain.scale(expected.data(), size, 1.7F);
  kernels.scale(got.data(), size, 1.7F);
  compare("scale", got, expected, 2 * kEpsilon, 4 * kEpsilon);
  std::vector<std::uint16_t> half(x.size()), expected_half(x.size());
  plain.to_half(x.data(), size, expected_half.data());
  kernels.to_half(x.data(), size, half.data());
  CHECK(half == expected_half, "%s to_half", kernels.name);
  if (size % 2 == 0) {
    got = expected = x;
    plain.rotate(expected.data(), size, y.data(), y.data() + size / 2);
    kernels.rotate(got.data(), size, y.data(), y.data() + size / 2);
    compare("rotate", got, expected, 0.0, 16 * kEpsilon);
  }
  got = expected = x;
  for (std::size_t i = 0; i < got.size(); ++i)
    got[i] = expected[i] = (i % 5 == 0 ? 30.0F : 3.0F) * (got[i] - 2.0F);
  const float sum = plain.exp_sum(expected.data(), size, 0.0F);
  const float fast = kernels.exp_sum(got.data(), size, 0.0F);
  compare("exp_sum", got, expected, 4 * kEpsilon, 1.3e-38);
  CHECK(std::fabs(sum - fast) <= 1e-5F * sum + 1e-30F, "%s exp_sum over %ld", kernels.name,
        static_cast<long>(size));
}

// Nothing is left of what lies far below, and damage shows: in every lane and in the tail.
void test_exp_edges(const Kernels& kernels) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (std::size_t at = 0; at < 19; ++at) {
    std::vector<float> x(19, 0.0F);
    x[at] = at % 2 == 0 ? -1000.0F : -infinity;
    CHECK(kernels.exp_sum(x.data(), 19, 0.0F) == 18.0F && x[at] == 0.0F, "%s exp_sum far below",
          kernels.name);
    x[at] = std::nanf("");
    CHECK(std::isnan(kernels.exp_sum(x.data(), 19, 0.0F)) && std::isnan(x[at]), "%s exp_sum of no number",
          kernels.name);
  }
}

// What a token is chosen with, in rows that end anywhere.
void test_logits(const Kernels& kernels, std::int64_t size, RandomStream& random) {
  const Kernels& plain = select_kernels("reference");
  const float infinity = std::numeric_limits<float>::infinity();
  auto x = random_vector(random, size);
  for (float& value : x) value *= 12.0F;
  float peak = -infinity;
  for (const float value : x) peak = std::max(peak, value);
  const float lowest = kernels.exp_weights(x.data(), size, peak, 1.0F, 0.0F, nullptr);
  CHECK(std::fabs(lowest - plain.exp_weights(x.data(), size, peak, 1.0F, 0.0F, nullptr)) <= 1e-6F * lowest);
  std::vector<float> damaged = x;
  damaged[static_cast<std::size_t>(size / 2)] = std::nanf("");
  CHECK(std::isnan(kernels.exp_weights(damaged.data(), size, peak, 1.0F, 0.0F, nullptr)),
        "%s: no number does not show in the sum", kernels.name);
  damaged[0] = -infinity;
  for (const auto* row : {&x, &damaged}) {
    std::vector<float> got(static_cast<std::size_t>((size + kLogitRun - 1) / kLogitRun) + 1, 42.0F);
    std::vector<float> expected = got;
    plain.run_maxima(row->data(), size, expected.data());
    kernels.run_maxima(row->data(), size, got.data());
    CHECK(got == expected && got.back() == 42.0F, "%s run_maxima over %ld", kernels.name,
          static_cast<long>(size));
    // Everything, and what weighs at least a share of the best.
    for (const float least : {std::numeric_limits<float>::min(), 0.01F}) {
      std::vector<float> weights(row->size() + 1, 42.0F);
      std::vector<float> exact = weights;
      const float factor = 1.0F / 0.7F;
      const float sum = kernels.exp_weights(row->data(), size, peak, factor, least, weights.data());
      plain.exp_weights(row->data(), size, peak, factor, least, exact.data());
      CHECK(weights.back() == 42.0F, "%s exp_weights wrote past the end", kernels.name);
      double total = 0.0;
      for (std::size_t i = 0; i < row->size(); ++i) {
        // The exponent's own rounding counts as often as the exponent is large.
        const double allowed = 1e-5 * static_cast<double>(exact[i]) + 1e-37;
        const bool edge = std::fabs(exact[i] - least) + std::fabs(weights[i] - least) <= 2.1F * least &&
                          (weights[i] == 0.0F || exact[i] == 0.0F);
        CHECK(edge || std::fabs(static_cast<double>(weights[i]) - static_cast<double>(exact[i])) <= allowed,
              "%s exp_weights[%zu]: %g, expected %g", kernels.name, i, static_cast<double>(weights[i]),
              static_cast<double>(exact[i]));
        total += static_cast<double>(weights[i]);
      }
      CHECK(std::fabs(static_cast<double>(sum) - total) <= 1e-5 * total);
      float before = infinity;
      for (const float bound : {-infinity, peak - 30.0F, peak - 3.0F, peak, infinity}) {
        const LogitMass mass = kernels.mass_above(row->data(), weights.data(), size, bound);
        const LogitMass wanted = plain.mass_above(row->data(), weights.data(), size, bound);
        CHECK(mass.count == wanted.count && std::fabs(mass.sum - wanted.sum) <= 1e-5F * wanted.sum);
        CHECK(mass.sum <= before, "%s: a higher bound weighs more", kernels.name);
        before = mass.sum;
      }
    }
  }
}

// Tiles of random steps with scales of all sizes.
std::vector<std::byte> random_tiles(RandomStream& random, std::int64_t tiles, std::int64_t dim, bool value) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(tiles * Q8Tile::bytes(dim)));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next() % 255 - 127);
  const auto scale = [&](std::int64_t at) {
    const std::uint16_t half = float_to_half(std::ldexp(uniform(random), -6));
    std::memcpy(bytes.data() + at, &half, sizeof half);
  };
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    for (std::int64_t i = 0; i < kKeyTile * Q8Tile::blocks(dim); ++i) {
      const std::int64_t inside =
          value ? 2 * i : i / kKeyTile * kKeyTile * (2 + kQ8Block) + 2 * (i % kKeyTile);
      scale(tile * Q8Tile::bytes(dim) + inside);
    }
  }
  return bytes;
}

void test_block_sums(const Kernels& kernels, RandomStream& random) {
  for (const std::size_t blocks : {0, 1, 2, 3, 7, 64, 1001}) {
    // At any address, and exactly as long as it is.
    std::vector<std::byte> data(1 + blocks * 32);
    for (std::byte& value : data)
      value = static_cast<std::byte>(random.next() % 4 == 0 ? 255 : random.next());
    std::uint64_t got[2][kChecksumLanes], expected[2][kChecksumLanes];
    for (auto& lanes : got) {
      for (std::uint64_t& lane : lanes) lane = random.next();
    }
    std::memcpy(expected, got, sizeof got);
    kernels.block_sums(data.data() + 1, blocks, got[0], got[1]);
    select_kernels("reference").block_sums(data.data() + 1, blocks, expected[0], expected[1]);
    CHECK(std::memcmp(got, expected, sizeof got) == 0, "%s, %zu blocks", kernels.name, blocks);
  }
}

void test_attention(const Kernels& kernels, std::int64_t groups, std::int64_t dim, std::int64_t count,
                    KvType type, RandomStream& random) {
  const auto q = random_vector(random, groups * dim);
  const std::int64_t tiles = (count + kKeyTile - 1) / kKeyTile;
  const auto rows = random_vector(random, tiles * kKeyTile * dim);
  std::vector<std::uint16_t> packed(rows.size());
  select_kernels("reference").to_half(rows.data(), static_cast<std::int64_t>(rows.size()), packed.data());
  const std::vector<std::byte> key_tiles = random_tiles(random, tiles, dim, false);
  const std::vector<std::byte> value_tiles = random_tiles(random, tiles, dim, true);
  KvRows values{rows.data(), type, count, 0};
  if (type == KvType::kF16) values.data = packed.data();
  KvRows keys = values;
  keys.count = tiles;
  if (type == KvType::kQ8) {
    keys.data = key_tiles.data();
    values.data = value_tiles.data();
    values.first = tiles * kKeyTile - count;  // in the middle of a tile
  }
  const std::int64_t stride = tiles * kKeyTile + 1;
  std::vector<float> got(static_cast<std::size_t>(groups * stride), 5.0F);
  std::vector<float> expected = got;
  select_kernels("reference").attention_scores(q.data(), groups, dim, keys, 0.25F, expected.data(), stride);
  kernels.attention_scores(q.data(), groups, dim, keys, 0.25F, got.data(), stride);
  // A table may take the query in 16 bits: half a step of its greatest value times a key of at most 2.
  const double rounding = type == KvType::kQ8 ? 0.25 * 2.0 / kActivationSteps : 0.0;
  compare("attention_scores", got, expected, 4 * kEpsilon,
          static_cast<double>(dim) * (2 * kEpsilon + rounding));
  std::vector<float> out = q;
  std::vector<float> expected_out = q;
  select_kernels("reference")
      .attention_values(expected.data(), stride, groups, dim, values, expected_out.data());
  kernels.attention_values(expected.data(), stride, groups, dim, values, out.data());
  double size = 1.0;
  for (const float value : expected) size += std::fabs(static_cast<double>(value));
  compare("attention_values", out, expected_out, 4 * kEpsilon, size * 8 * kEpsilon);
  // Cut in two: the same bits.
  std::vector<float> cut = q;
  KvRows part = values;
  part.count = count / 3;
  kernels.attention_values(expected.data(), stride, groups, dim, part, cut.data());
  const std::int64_t next = values.first + part.count;
  const std::int64_t skipped = type == KvType::kQ8 ? next / kKeyTile * Q8Tile::bytes(dim)
                                                   : part.count * dim * (type == KvType::kF16 ? 2 : 4);
  part = {static_cast<const std::byte*>(values.data) + skipped, type, count - part.count, next % kKeyTile};
  kernels.attention_values(expected.data() + count / 3, stride, groups, dim, part, cut.data());
  CHECK(cut == out, "%s attention_values in two calls", kernels.name);
  // Head by head: the same bits, or results would depend on how threads share the heads.
  std::vector<float> alone(static_cast<std::size_t>(stride));
  for (std::int64_t g = 0; g < groups; ++g) {
    kernels.attention_scores(q.data() + g * dim, 1, dim, keys, 0.25F, alone.data(), stride);
    CHECK(std::memcmp(alone.data(), got.data() + g * stride,
                      static_cast<std::size_t>(tiles * kKeyTile) * sizeof(float)) == 0,
          "%s attention_scores of head %d alone", kernels.name, static_cast<int>(g));
    std::vector<float> row(q.begin() + g * dim, q.begin() + (g + 1) * dim);
    kernels.attention_values(expected.data() + g * stride, stride, 1, dim, values, row.data());
    CHECK(std::memcmp(row.data(), out.data() + g * dim, static_cast<std::size_t>(dim) * sizeof(float)) == 0,
          "%s attention_values of head %d alone", kernels.name, static_cast<int>(g));
  }
}

}  // namespace

void test_half() {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto half = static_cast<std::uint16_t>(i);
    const float value = half_to_float(half);
    if (std::isnan(value)) {
      CHECK(std::isnan(half_to_float(float_to_half(value))));
    } else {
      CHECK(float_to_half(value) == half, "half %x", i);
    }
  }
  CHECK(half_to_float(0x3C00) == 1.0F && half_to_float(0xC000) == -2.0F && half_to_float(0x0001) == 0x1p-24F);
  // Between two neighbours: to nearest, ties to even.
  for (std::uint32_t i = 0; i < 0x7BFF; ++i) {
    const float low = half_to_float(static_cast<std::uint16_t>(i));
    const float high = half_to_float(static_cast<std::uint16_t>(i + 1));
    const float middle = 0.5F * (low + high);
    CHECK(float_to_half(middle) == (i % 2 == 0 ? i : i + 1), "tie above %x", i);
    CHECK(float_to_half(std::nextafter(middle, 0.0F)) == i &&
          float_to_half(std::nextafter(middle, 1e9F)) == i + 1);
  }
  CHECK(float_to_half(65519.9F) == 0x7BFF && float_to_half(65520.0F) == 0x7C00 &&
        float_to_half(-1e30F) == 0xFC00);
}

void test_kernels() {
  RandomStream random(7);
  for (const Kernels* kernels : available_kernels()) {
    for (const TypeTraits& traits : kTypes) {
      if (traits.type == Type::kI8) continue;
      for (const std::int64_t cols : {1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 96, 100, 160, 256, 512, 768}) {
        test_matmul(*kernels, traits.type, cols, random);
      }
    }
    test_quantise(*kernels, random);
    test_exp_edges(*kernels);
    test_block_sums(*kernels, random);
    for (const std::int64_t size : {1, 2, 3, 7, 8, 9, 16, 30, 32, 64, 100, 257}) {
      test_elementwise(*kernels, size, random);
    }
    for (const std::int64_t size : {1, 5, 16, 31, 63, 64, 65, 200, 1027, 4096}) {
      test_logits(*kernels, size, random);
    }
    for (const std::int64_t groups : {1, 2, 3, 5, 6, 7, 13}) {
      for (const std::int64_t dim : {2, 8, 16, 24, 32, 80, 98, 128, 288}) {
        for (const std::int64_t count : {0, 1, 3, 41, 150}) {
          for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8})
            test_attention(*kernels, groups, dim, count, type, random);
        }
      }
    }
    std::printf("kernels %s: ok\n", kernels->name);
  }
}
