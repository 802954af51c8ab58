#include "weights.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <utility>

namespace smallthinker {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::int64_t kTilesPerPiece = 64;

bool can_tile(const Matrix& matrix) { return matrix.type == Type::kQ4_0 && matrix.experts == 1; }

std::size_t tiled_bytes(const Matrix& matrix) {
  return TileMatrix{nullptr, matrix.rows, matrix.cols}.bytes();
}

std::size_t stock_bytes(const Matrix& matrix) {
  return matrix.row_bytes * static_cast<std::size_t>(matrix.rows * matrix.experts);
}

std::size_t page_aligned(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

HugeMemory::HugeMemory(std::size_t bytes) {
  if (bytes == 0) return;
  size_ = page_aligned(bytes);
  // Room to start at a huge page; the surplus is given back.
  const std::size_t reserved = size_ + kHugePage;
  void* const start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    throw EngineError("there is no memory for " + std::to_string(size_) + " bytes of weights");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t lead = (kHugePage - address % kHugePage) % kHugePage;
  data_ = static_cast<std::byte*>(start) + lead;
  if (lead > 0) munmap(start, lead);
  if (lead < kHugePage) munmap(data_ + size_, kHugePage - lead);
#if defined(MADV_HUGEPAGE)
  madvise(data_, size_, MADV_HUGEPAGE);  // a wish: where it is refused, pages are small
#endif
}

HugeMemory::~HugeMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

HugeMemory::HugeMemory(HugeMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HugeMemory& HugeMemory::operator=(HugeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

WeightPlan::WeightPlan(const Model& model, const Kernels& kernels) {
  const auto count = [&](const Matrix& matrix) {
    if (kernels.packed && can_tile(matrix)) {
      dense_bytes += tiled_bytes(matrix);
    } else {
      mapped_bytes += stock_bytes(matrix);
    }
  };
  packed_experts = kernels.packed;
  for (const Layer& layer : model.layers) {
    for (const Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.router})
      count(*matrix);
    for (const Matrix* matrix : {&layer.gate, &layer.up, &layer.down}) {
      packed_experts = packed_experts && matrix->type == Type::kQ4_0;
    }
  }
  count(model.head);
  if (!model.tied) mapped_bytes += stock_bytes(model.embedding);
  expert = {model.hyper.hidden, model.hyper.expert_hidden};
  for (const Layer& layer : model.layers) {
    if (packed_experts) {
      expert_bytes += static_cast<std::size_t>(model.hyper.experts) * expert.bytes();
    } else {
      mapped_bytes += stock_bytes(layer.gate) + stock_bytes(layer.up) + stock_bytes(layer.down);
    }
  }
}

Weights::Weights(std::shared_ptr<const Model> model, const Kernels& kernels, ThreadPool& pool)
    : plan(*model, kernels), model_(std::move(model)), dense_(plan.dense_bytes), experts_(plan.expert_bytes) {
  std::byte* next = dense_.data();
  const auto load = [&](const Matrix& matrix) {
    Linear linear{matrix, {}};
    if (!kernels.packed || !can_tile(matrix)) return linear;
    linear.tiles = {next, matrix.rows, matrix.cols};
    next += linear.tiles.bytes();
    const std::int64_t tiles = linear.tiles.tiles();
    std::byte* const out = const_cast<std::byte*>(linear.tiles.data);
    pool.run((tiles + kTilesPerPiece - 1) / kTilesPerPiece, [&](std::int64_t piece, int) {
      const std::int64_t begin = piece * kTilesPerPiece;
      pack_tiles(matrix, 0, begin, std::min(begin + kTilesPerPiece, tiles),
                 out + static_cast<std::size_t>(begin) * linear.tiles.tile_bytes());
    });
    return linear;
  };
  for (const Layer& layer : model_->layers) {
    layers.push_back(
        {load(layer.query), load(layer.key), load(layer.value), load(layer.output), load(layer.router)});
  }
  head = load(model_->head);
  if (!plan.packed_experts) return;
  expert_bytes_ = plan.expert.bytes();
  const std::int64_t experts = model_->hyper.experts;
  pool.run(model_->hyper.layers * experts, [&](std::int64_t piece, int) {
    const Layer& layer = model_->layers[static_cast<std::size_t>(piece / experts)];
    std::byte* const out = experts_.data() + static_cast<std::size_t>(piece) * expert_bytes_;
    pack_gate(layer.gate, piece % experts, plan.expert, out);
    pack_neurons(layer.up, layer.down, piece % experts, plan.expert, out);
  });
}

void Weights::embedding(std::int64_t token, float* out) const {
  if (model_->tied && head.tiled()) return unpack_tile_row(head.tiles, token, out);
  dequantise(model_->embedding.type, model_->embedding.row(token), model_->hyper.hidden, out);
}

}  // namespace smallthinker
