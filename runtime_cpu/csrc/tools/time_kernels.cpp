// time_kernels [REPEATS]: each table's packed Q4_0 kernels beside its own `matmul` on the stock rows, on one
// thread, in the sizes of the 4B model. Times are this thread's processor time, median (10th to 90th
// percentile).
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/table.hpp"
#include "model/huge_memory.hpp"

using namespace smallthinker;

namespace {

constexpr std::int64_t kHidden = 1536;
constexpr std::int64_t kNeurons = 768;
constexpr std::int64_t kExperts = 128;  // some 260 MiB in each form: more than any cache holds
constexpr std::int64_t kTokens = 32;
constexpr std::int64_t kHotRows = 256;  // stay in the L2 cache
constexpr std::int64_t kAtOnce = 16;    // experts per timing

double seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Of `amount` per second, or of the microseconds that each of -amount takes.
template <typename Work>
void report(const char* table, const char* what, const char* unit, double amount, int repeats, Work work) {
  std::vector<double> values;
  for (int i = 0; i < repeats; ++i) {
    const double begin = seconds();
    work();
    const double spent = seconds() - begin;
    values.push_back(amount > 0 ? amount / spent : spent / -amount);
  }
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) { return values[static_cast<std::size_t>(share * (repeats - 1))]; };
  std::printf("%-12s %-34s %7.1f (%.1f to %.1f) %s\n", table, what, at(0.5), at(0.1), at(0.9), unit);
}

struct Inputs {
  std::vector<float> f32, scales;
  std::vector<std::int16_t> q;
  HugeMemory planes;
  Inputs(const Kernels& kernels, std::int64_t rows, std::int64_t cols)
      : f32(static_cast<std::size_t>(rows * cols)),
        scales(f32.size() / 32),
        q(f32.size()),
        planes(static_cast<std::size_t>(rows) * Planes::row_bytes(cols)) {
    for (std::size_t i = 0; i < f32.size(); ++i) f32[i] = static_cast<float>(i * 7919 % 1000) / 500.0F - 1.0F;
    kernels.quantise(f32.data(), rows * cols, q.data(), scales.data());
    for (std::int64_t r = 0; r < rows; ++r) {
      kernels.split_planes(q.data() + r * cols, scales.data() + r * cols / 32, cols,
                           planes.data() + static_cast<std::size_t>(r) * Planes::row_bytes(cols));
    }
  }
  Activations view(std::int64_t cols) const {
    return {f32.data(), q.data(), scales.data(), cols, nullptr, planes.data(), Planes::row_bytes(cols)};
  }
};

struct Weights {
  static constexpr std::size_t kPart = kExperts * kNeurons * kHidden / 32 * 18;
  ExpertShape shape{kHidden, kNeurons};
  HugeMemory stock{3 * kPart};
  HugeMemory packed{static_cast<std::size_t>(kExperts) * shape.bytes()};
  Matrix gate = make_matrix(stock.data(), Type::kQ4_0, kHidden, kNeurons, kExperts);
  Matrix up = make_matrix(stock.data() + kPart, Type::kQ4_0, kHidden, kNeurons, kExperts);
  Matrix down = make_matrix(stock.data() + 2 * kPart, Type::kQ4_0, kNeurons, kHidden, kExperts);
  Weights() {
    std::uint32_t random = 1;
    for (std::size_t i = 0; i < 3 * kPart; ++i) {
      random = random * 1664525U + 1013904223U;
      const std::uint32_t byte = i % 18 == 0 ? 0U : i % 18 == 1 ? 0x20U : random >> 24U;
      stock.data()[i] = static_cast<std::byte>(byte);
    }
    for (std::int64_t e = 0; e < kExperts; ++e) {
      pack_gate(gate, e, shape, expert(e));
      pack_up(up, e, shape, expert(e));
      pack_down(down, e, shape, expert(e));
    }
  }
  std::byte* expert(std::int64_t e) const {
    return packed.data() + static_cast<std::size_t>(e) * shape.bytes();
  }
};

void time_dense(const Kernels& kernels, const Weights& weights, const Inputs& x, int repeats) {
  std::vector<float> out(static_cast<std::size_t>(kTokens * kNeurons));
  const TileMatrix tiled = weights.shape.gate(weights.expert(0));
  for (const std::int64_t tokens : {1, 2, 4, 32}) {
    char what[64];
    const double products = static_cast<double>(kHotRows * kHidden * tokens) / 1e9;
    std::snprintf(what, sizeof what, "dense, cached, %d tokens, stock", static_cast<int>(tokens));
    report(kernels.name, what, "G weights/s", products, repeats, [&] {
      kernels.matmul(weights.gate, 0, 0, kHotRows, x.view(kHidden), tokens, out.data(), kHotRows);
    });
    std::snprintf(what, sizeof what, "dense, cached, %d tokens, packed", static_cast<int>(tokens));
    report(kernels.name, what, "G weights/s", products, repeats, [&] {
      kernels.tiles(tiled, 0, kHotRows / kTileRows, x.view(kHidden), tokens, out.data(), kHotRows);
    });
  }
}

void time_experts(const Kernels& kernels, const Weights& weights, const Inputs& x, int repeats) {
  for (const int percent : {20, 40, 100}) {
    std::vector<float> open(static_cast<std::size_t>(kNeurons));
    for (std::size_t n = 0; n < open.size(); ++n) {
      open[n] = n * 7919 % 100 < static_cast<std::size_t>(percent) ? 1.0F : -1.0F;
    }
    std::vector<float> gates(open.size());
    std::vector<float> hidden(open.size());
    std::vector<float> out(static_cast<std::size_t>(weights.shape.padded()));
    Inputs middle(kernels, 1, kNeurons);
    std::int64_t e = 0;
    char what[64];
    std::snprintf(what, sizeof what, "expert, %d %% active, stock", percent);
    report(kernels.name, what, "us", -1e-6 * kAtOnce, repeats, [&] {
      for (std::int64_t i = 0; i < kAtOnce; ++i, e = (e + 7) % kExperts) {
        kernels.matmul(weights.gate, e, 0, kNeurons, x.view(kHidden), 1, gates.data(), kNeurons);
        for (std::int64_t n = 0; n < kNeurons; ++n) {
          float* value = &hidden[static_cast<std::size_t>(n)];
          *value = 0.0F;
          if (open[static_cast<std::size_t>(n)] > 0.0F)
            kernels.matmul(weights.up, e, n, n + 1, x.view(kHidden), 1, value, 1);
        }
        kernels.quantise(hidden.data(), kNeurons, middle.q.data(), middle.scales.data());
        kernels.matmul(weights.down, e, 0, kHidden, middle.view(kNeurons), 1, out.data(), kHidden);
      }
    });
    std::snprintf(what, sizeof what, "expert, %d %% active, packed", percent);
    report(kernels.name, what, "us", -1e-6 * kAtOnce, repeats, [&] {
      for (std::int64_t i = 0; i < kAtOnce; ++i, e = (e + 7) % kExperts) {
        const std::byte* expert = weights.expert(e);
        kernels.tiles(weights.shape.gate(expert), 0, kNeurons / kTileRows, x.view(kHidden), 1, gates.data(),
                      kNeurons);
        std::fill(out.begin(), out.end(), 0.0F);
        kernels.neurons(weights.shape, expert, 0, weights.shape.groups(), open.data(), x.view(kHidden), 0,
                        out.data());
      }
    });
  }
}

// Rows of an output matrix of 131 MB that a predictor names here and there, and the whole of it.
void time_head(const Kernels& kernels, const Inputs& x, int repeats) {
  constexpr std::int64_t kVocab = 151936;
  Matrix rows = make_matrix(nullptr, Type::kQ4_0, kHidden, kVocab);
  HugeMemory stock(rows.row_bytes * kVocab);
  std::memset(stock.data(), 0x11, rows.row_bytes * kVocab);
  rows.data = stock.data();
  TileMatrix tiles{nullptr, kVocab, kHidden};
  HugeMemory tiled(tiles.bytes());
  pack_tiles(rows, 0, 0, tiles.tiles(), tiled.data());
  tiles.data = tiled.data();
  std::vector<float> out(kVocab);
  report(kernels.name, "head, whole", "ms", -1e-3, repeats,
         [&] { kernels.tiles(tiles, 0, tiles.tiles(), x.view(kHidden), 1, out.data(), kVocab); });
  HugeMemory tile(tiles.tile_bytes());
  for (const int percent : {4, 8, 16}) {
    std::vector<std::int64_t> named;
    std::uint32_t random = 1;
    for (std::int64_t i = 0; i < kVocab; ++i) {
      random = random * 1664525U + 1013904223U;
      if (random >> 8U < static_cast<std::uint32_t>(percent) * ((1U << 24U) / 100)) named.push_back(i);
    }
    char what[64];
    std::snprintf(what, sizeof what, "head, %d %% of rows, scattered", percent);
    report(kernels.name, what, "ms", -1e-3, repeats, [&] {
      for (std::size_t at = 0; at + 16 <= named.size(); at += 16) {
        for (std::size_t n = at + 16; n < std::min(named.size(), at + 32); ++n) prefetch_row(rows, named[n]);
        gather_tile(rows, named.data() + at, 16, tile.data());
        kernels.tiles({tile.data(), 16, kHidden}, 0, 1, x.view(kHidden), 1, out.data(), 16);
      }
    });
  }
}

// One token of the 4B model after 2,048 others: 32 layers of two key heads, which six query heads share.
void time_attention(const Kernels& kernels, int repeats) {
  constexpr std::int64_t kHeads = 64;
  constexpr std::int64_t kPositions = 2048;
  constexpr std::int64_t kDim = 128;
  constexpr std::int64_t kShared = 6;
  std::vector<float> query(kShared * kDim, 0.01F);
  std::vector<float> out(kShared * kDim);
  std::vector<float> scores(kShared * kPositions);
  for (const KvType type : {KvType::kF16, KvType::kQ8}) {
    const std::int64_t bytes =
        type == KvType::kF16 ? kPositions * kDim * 2 : kPositions / kKeyTile * Q8Tile::bytes(kDim);
    HugeMemory cache(static_cast<std::size_t>(2 * kHeads * bytes));
    std::memset(cache.data(), 0x11, static_cast<std::size_t>(2 * kHeads * bytes));
    const char* name = type == KvType::kF16 ? "attention, 2,048 keys, f16" : "attention, 2,048 keys, q8";
    report(kernels.name, name, "ms", -1e-3, repeats, [&] {
      for (std::int64_t h = 0; h < kHeads; ++h) {
        const std::byte* keys = cache.data() + 2 * h * bytes;
        kernels.attention_scores(query.data(), kShared, kDim, {keys, type, kPositions / kKeyTile, 0}, 0.1F,
                                 scores.data(), kPositions);
        for (std::int64_t g = 0; g < kShared; ++g)
          kernels.exp_sum(scores.data() + g * kPositions, kPositions, 1.0F);
        kernels.attention_values(scores.data(), kPositions, kShared, kDim,
                                 {keys + bytes, type, kPositions, 0}, out.data());
      }
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::max(1, std::atoi(argv[1])) : 50;
  const Weights weights;
  for (const Kernels* kernels : available_kernels()) {
    if (kernels == &select_kernels("reference")) continue;
    const Inputs x(*kernels, kTokens, kHidden);
    time_dense(*kernels, weights, x, repeats);
    time_experts(*kernels, weights, x, repeats);
    time_attention(*kernels, repeats);
    time_head(*kernels, x, repeats);
  }
  return 0;
}
