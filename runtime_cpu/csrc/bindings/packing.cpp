// Weights in the forms that files hold: Q4_0 blocks, and the packed layout.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/types.hpp"
#include "experts/checksum.hpp"
#include "forward/thread_pool.hpp"
#include "model/packed.hpp"
#include "model/quantisation.hpp"

namespace smallthinker::bindings {
namespace {

using ByteArray = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

ByteArray new_bytes(std::size_t size, std::byte*& data) {
  data = new std::byte[size];
  return ByteArray(data, {size}, nb::capsule(data, [](void* memory) noexcept {
                     delete[] static_cast<std::byte*>(memory);
                   }));
}

const Layer& layer_of(const PyModel& model, std::int64_t layer) {
  if (layer < 0 || layer >= model.model->hyper.layers)
    throw EngineError("there is no layer " + std::to_string(layer));
  return model.model->layers[static_cast<std::size_t>(layer)];
}

ByteArray tiles_of(const Matrix& matrix, int threads) {
  const TileMatrix tiled{nullptr, matrix.rows, matrix.cols};
  std::byte* data = nullptr;
  ByteArray result = new_bytes(tiled.bytes(), data);
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  pool.run(tiled.tiles(), [&](std::int64_t tile, int) {
    pack_tiles(matrix, 0, tile, tile + 1, data + static_cast<std::size_t>(tile) * tiled.tile_bytes());
  });
  return result;
}

// A Q4_0 matrix of a stock file in tiles.
ByteArray matrix_tiles(const PyModel& model, const std::string& name, int threads) {
  const GgufTensor* tensor = model.model->file.find_tensor(name);
  if (tensor == nullptr || tensor->type != Type::kQ4_0 || tensor->shape[2] != 1) {
    throw EngineError("the file has no Q4_0 matrix '" + name + "'");
  }
  ByteArray result =
      tiles_of(make_matrix(model.model->file.data(*tensor), tensor->type, tensor->shape[0], tensor->shape[1]),
               threads);
  model.model->forget_pages();
  return result;
}

// Q4_0 rows that lie in no model file, in tiles.
ByteArray row_tiles(const ConstBytes& rows, std::int64_t cols, int threads) {
  const std::int64_t row_bytes = cols > 0 && cols % 32 == 0 ? cols / 32 * 18 : 0;
  const auto size = static_cast<std::int64_t>(rows.shape(0));
  if (row_bytes == 0 || size == 0 || size % row_bytes != 0) {
    throw EngineError(std::to_string(size) + " bytes are no Q4_0 rows of " + std::to_string(cols) +
                      " columns");
  }
  return tiles_of(
      make_matrix(reinterpret_cast<const std::byte*>(rows.data()), Type::kQ4_0, cols, size / row_bytes),
      threads);
}

// Experts `ids` of a layer of a stock file, one after the other, and the checksums of their two parts.
nb::tuple packed_experts(const PyModel& model, std::int64_t layer, const std::vector<std::int64_t>& ids,
                         int threads) {
  const Layer& from = layer_of(model, layer);
  const ExpertShape shape = model.model->expert_shape();
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= model.model->hyper.experts)
      throw EngineError("there is no expert " + std::to_string(id));
  }
  for (const Matrix* matrix : {&from.gate, &from.up, &from.down}) {
    if (matrix->data == nullptr || matrix->type != Type::kQ4_0) {
      throw EngineError("only the Q4_0 experts of a stock file can be packed");
    }
  }
  std::byte* data = nullptr;
  ByteArray result = new_bytes(ids.size() * shape.bytes(), data);
  std::vector<std::uint64_t> sums(2 * ids.size());
  {
    const nb::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.run(static_cast<std::int64_t>(ids.size()), [&](std::int64_t i, int) {
      const auto at = static_cast<std::size_t>(i);
      std::byte* out = data + at * shape.bytes();
      pack_gate(from.gate, ids[at], shape, out);
      pack_up(from.up, ids[at], shape, out);
      pack_down(from.down, ids[at], shape, out);
      sums[2 * at] = checksum64(out, shape.gate_bytes());
      sums[2 * at + 1] = checksum64(out + shape.gate_bytes(), shape.bytes() - shape.gate_bytes());
    });
    model.model->forget_pages();
  }
  return nb::make_tuple(result, sums);
}

ByteArray q4_0(const Floats& values) {
  const auto size = static_cast<std::int64_t>(values.shape(0));
  if (size % kActivationBlock != 0)
    throw EngineError(std::to_string(size) + " weights are no whole blocks of 32");
  std::byte* data = nullptr;
  const auto bytes = static_cast<std::size_t>(size / kActivationBlock * traits_of(Type::kQ4_0).block_bytes);
  ByteArray result = new_bytes(bytes, data);
  const nb::gil_scoped_release release;
  quantise_q4_0(values.data(), size, data);
  return result;
}

std::uint64_t checksum(const ConstBytes& data) {
  const nb::gil_scoped_release release;
  return checksum64(reinterpret_cast<const std::byte*>(data.data()), data.shape(0));
}

}  // namespace

void add_packing(nb::module_& m) {
  m.def("pack_tiles", &matrix_tiles, nb::arg("model"), nb::arg("name"), nb::kw_only(),
        nb::arg("threads") = 1);
  m.def("pack_experts", &packed_experts, nb::arg("model"), nb::arg("layer"), nb::kw_only(), nb::arg("ids"),
        nb::arg("threads") = 1);
  m.def("pack_rows", &row_tiles, nb::arg("rows"), nb::kw_only(), nb::arg("columns"), nb::arg("threads") = 1);
  m.def("quantise_q4_0", &q4_0, nb::arg("values"));
  m.def("checksum64", &checksum, nb::arg("data"));
}

}  // namespace smallthinker::bindings
