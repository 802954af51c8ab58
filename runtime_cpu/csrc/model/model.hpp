// A SmallThinker model inside a GGUF file: its hyperparameters and the addresses of its matrices.
//
//   auto model = Model::open("model.gguf");          // shared, immutable
//   model->layers[0].gate.row(neuron, expert)
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/gguf.hpp"
#include "model/mapped_file.hpp"
#include "model/packed.hpp"
#include "model/tensor.hpp"

namespace smallthinker {

enum class RouterKind { kSoftmax, kSigmoid };

struct Hyperparameters {
  std::int64_t layers = 0;
  std::int64_t hidden = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
  std::int64_t expert_hidden = 0;
  std::int64_t vocab = 0;
  std::int64_t context = 0;
  std::int64_t window = 0;  // 0: no layer is windowed
  float rope_theta = 0.0F;
  float rms_epsilon = 0.0F;
  RouterKind router = RouterKind::kSigmoid;
  std::int64_t router_lead = 0;  // layer l's router reads the stream as it enters layer max(0, l - lead)
  std::vector<bool> rope;        // per layer
  std::vector<bool> windowed;    // per layer
};

// A matrix in stock rows, or in tiles.
struct Linear {
  Matrix stock;
  TileMatrix tiles;
  std::uint64_t checksum = 0;  // of tiles in a file

  bool tiled() const { return tiles.data != nullptr; }
  std::int64_t rows() const { return tiled() ? tiles.rows : stock.rows; }
  bool quantised() const { return tiled() || traits_of(stock.type).quantised; }
};

struct Layer {
  std::vector<float> attention_norm;  // [hidden]
  std::vector<float> ffn_norm;        // [hidden]
  Linear query, key, value, output;   // rows = outputs
  Linear router;                      // [experts][hidden]
  Matrix gate, up, down;              // one per expert; of stock files
  const std::byte* packed =
      nullptr;  // of packed files: ExpertShape::bytes() each, in the order of Model::places
};

// Names the rows of the head that may matter, by two products and no non-linearity: those whose score
// up * (down * state) is above the threshold. It was trained, and loses some.
struct HeadPredictor {
  Linear down;  // [width][hidden]
  Linear up;    // [vocab][width]
  float threshold = 0.0F;
  // As measured when it was made, both or neither: the share of rows that matter that are named, and of the
  // greatest logits that are not.
  std::optional<float> recall, missed_argmax;

  std::int64_t width() const { return down.rows(); }
};

class Model {
 public:
  static std::shared_ptr<const Model> open(const std::string& path);
  // For bytes that the caller keeps alive (tests).
  static std::shared_ptr<const Model> from_bytes(std::span<const std::byte> bytes);

  std::string path;
  GgufFile file;
  Hyperparameters hyper;
  Linear embedding;  // [vocab][hidden]
  Linear head;       // the same when tied
  std::optional<HeadPredictor> head_predictor;
  std::vector<float> output_norm;  // [hidden]
  std::vector<Layer> layers;
  std::vector<std::string> warnings;  // choices made where the file leaves them open
  bool tied = false;
  bool packed = false;                   // made by runtime_cpu.pack
  std::vector<std::int32_t> places;      // of packed files: [layers][experts], an expert's place in its layer
  std::vector<std::uint64_t> checksums;  // of packed files: [layers][experts][gate, neurons]
  std::vector<float> expert_frequency;   // [layers][experts], share of tokens; empty: unknown
  bool all_f32 = false;
  Type main_type = Type::kF32;  // of most weights
  std::uint64_t file_bytes = 0;
  std::uint64_t weight_bytes = 0;  // of the tensors in use
  std::int64_t parameters = 0;     // in them

  ExpertShape expert_shape() const { return {hyper.hidden, hyper.expert_hidden}; }
  const std::byte* packed_expert(std::int64_t layer, std::int64_t expert) const {
    const std::int32_t place = places[static_cast<std::size_t>(layer * hyper.experts + expert)];
    return layers[static_cast<std::size_t>(layer)].packed +
           static_cast<std::size_t>(place) * expert_shape().bytes();
  }
  // Of bytes of the mapping, from the start of the file.
  std::uint64_t offset_of(const std::byte* data) const { return static_cast<std::uint64_t>(data - start_); }
  // Fills `to` from the file's bytes at `data` by reading: EngineError where touching the mapping of a file
  // that was truncated would end the process (SIGBUS).
  void read(const std::byte* data, std::span<std::byte> to) const;
  // Drops the mapping's resident pages: they no longer count as this process's memory.
  void forget_pages() const;

 private:
  void load();
  void read_places(const GgufArray* order);
  void read_frequencies(const GgufArray& counts);
  const std::byte* start_ = nullptr;
  std::unique_ptr<MappedFile> mapping_;
};

}  // namespace smallthinker
