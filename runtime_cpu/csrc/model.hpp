// A SmallThinker model inside a GGUF file: its hyperparameters and where its matrices lie.
//
//   auto model = Model::open("model.gguf");          // shared, immutable
//   model->layers[0].gate.row(neuron, expert)
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gguf.hpp"
#include "mapped_file.hpp"
#include "tensor.hpp"

namespace smallthinker {

enum class Router { kSoftmax, kSigmoid };

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
  Router router = Router::kSigmoid;
  std::vector<bool> rope;      // per layer
  std::vector<bool> windowed;  // per layer
};

struct Layer {
  std::vector<float> attention_norm;  // [hidden]
  std::vector<float> ffn_norm;        // [hidden]
  Matrix query, key, value, output;   // rows = outputs
  Matrix router;                      // [experts][hidden]
  Matrix gate, up, down;              // one per expert
};

class Model {
 public:
  static std::shared_ptr<const Model> open(const std::string& path);
  // For bytes that the caller keeps alive (tests).
  static std::shared_ptr<const Model> from_bytes(std::span<const std::byte> bytes);

  std::string path;
  GgufFile file;
  Hyperparameters hyper;
  Matrix embedding;                // [vocab][hidden]
  Matrix head;                     // the same when tied
  std::vector<float> output_norm;  // [hidden]
  std::vector<Layer> layers;
  std::vector<std::string> warnings;  // choices made where the file leaves them open
  bool tied = false;
  bool all_f32 = false;
  Type main_type = Type::kF32;  // of most weights
  std::uint64_t file_bytes = 0;
  std::uint64_t weight_bytes = 0;  // of the tensors in use
  std::int64_t parameters = 0;     // in them

 private:
  void load();
  std::unique_ptr<MappedFile> mapping_;
};

}  // namespace smallthinker
