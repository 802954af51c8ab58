// A packed file from the structure of a stock one, to be mutated like it.
#pragma once

#include <string>
#include <vector>

#include "experts/checksum.hpp"
#include "model/packed.hpp"
#include "tests/gguf_builder.hpp"

namespace smallthinker::testing {

// `shape` of type Q4_0, with hidden sizes that are multiples of 32.
inline Container make_packed_container(const Shape& shape, std::uint64_t seed) {
  Container stock = make_container(shape, seed);
  Container file = stock;
  file.tensors.clear();
  file.alignment = 4096;
  const auto u32 = [&](const std::string& key, std::uint64_t value) {
    file.add_u32(key, static_cast<std::uint32_t>(value));
  };
  u32("general.alignment", 4096);
  u32("smallthinker.packed.version", 1);
  u32("smallthinker.vocab_size", static_cast<std::uint64_t>(shape.vocab));
  const auto i8 = [&](const std::string& name, std::vector<std::uint64_t> sizes, Bytes data) {
    file.tensors.push_back(
        {name, std::move(sizes), static_cast<std::uint32_t>(Type::kI8), 0, std::move(data)});
  };
  const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  const ExpertShape expert{shape.hidden, shape.expert_hidden};
  Bytes checksums;
  const auto matrix = [&](const std::string& name, std::int64_t experts) {
    for (const Tensor& tensor : stock.tensors) {
      if (tensor.name == name) {
        return make_matrix(tensor.data.data(), Type::kQ4_0, static_cast<std::int64_t>(tensor.shape[0]),
                           static_cast<std::int64_t>(tensor.shape[1]), experts);
      }
    }
    return Matrix{};
  };
  for (const Tensor& tensor : stock.tensors) {
    const bool is_expert = tensor.name.find("_exps.") != std::string::npos;
    if (is_expert) continue;
    if (tensor.type != static_cast<std::uint32_t>(Type::kQ4_0) ||
        (!shape.tied && tensor.name == "token_embd.weight")) {
      file.tensors.push_back(tensor);
      continue;
    }
    const std::string stem = tensor.name.substr(0, tensor.name.size() - 7);  // without .weight
    const Matrix from = matrix(tensor.name, 1);
    const TileMatrix tiled{nullptr, from.rows, from.cols};
    Bytes data(tiled.bytes());
    pack_tiles(from, 0, 0, tiled.tiles(), data.data());
    Value checksum{"smallthinker.packed.checksum." + stem, 10, {}};
    put(checksum.payload, checksum64(data.data(), data.size()));
    file.values.push_back(checksum);
    i8(stem + ".tiles", {tiled.tile_bytes(), u(tiled.tiles())}, std::move(data));
  }
  for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".ffn_";
    Bytes data(expert.bytes() * u(shape.experts));
    for (std::int64_t e = 0; e < shape.experts; ++e) {
      std::byte* out = data.data() + expert.bytes() * u(e);
      pack_gate(matrix(block + "gate_exps.weight", shape.experts), e, expert, out);
      pack_up(matrix(block + "up_exps.weight", shape.experts), e, expert, out);
      pack_down(matrix(block + "down_exps.weight", shape.experts), e, expert, out);
      put(checksums, checksum64(out, expert.gate_bytes()));
      put(checksums, checksum64(out + expert.gate_bytes(), expert.bytes() - expert.gate_bytes()));
    }
    i8(block + "experts.packed", {expert.bytes(), u(shape.experts)}, std::move(data));
  }
  i8("experts.checksums", {16, u(shape.experts), u(shape.layers)}, std::move(checksums));
  file.place_tensors();
  return file;
}

}  // namespace smallthinker::testing
