#include "model/model.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>

#include "model/quantisation.hpp"

namespace smallthinker {
namespace {

constexpr std::string_view kArchitecture = "smallthinker";  // also the prefix of the keys of the other
constexpr std::string_view kLeadArchitecture = "smallthinker-lead";
constexpr std::int64_t kMaxLayers = 1024;
constexpr std::int64_t kMaxWidth = 1 << 20;
constexpr std::int64_t kMaxVocab = 1 << 24;
constexpr std::int64_t kMaxContext = 1 << 24;
constexpr std::int64_t kMaxExperts = 4096;
constexpr std::int64_t kMaxHeadDim = 1024;
constexpr std::int64_t kLlamaCppPeriod = 4;  // llama.cpp: layer i is global and NoPE when i % 4 == 0

std::string key(std::string_view name) { return std::string(kArchitecture) + "." + std::string(name); }

std::int64_t required(const GgufFile& file, std::string_view name, std::int64_t low, std::int64_t high) {
  const auto value = file.integer(key(name), low, high);
  if (!value) throw ModelFileError("the file has no " + key(name));
  return *value;
}

float required_real(const GgufFile& file, std::string_view name, double low, double high) {
  const auto value = file.real(key(name));
  if (!value) throw ModelFileError("the file has no " + key(name));
  if (!(*value >= low && *value <= high)) {
    throw ModelFileError(key(name) + " is " + std::to_string(*value) + "; allowed is " + std::to_string(low) +
                         " to " + std::to_string(high));
  }
  return static_cast<float>(*value);
}

std::vector<bool> layout(const GgufFile& file, std::string_view name, std::int64_t layers) {
  const GgufArray* array = file.integers(key(name));
  if (array == nullptr) return {};
  if (array->integers.size() != static_cast<std::size_t>(layers)) {
    throw ModelFileError(key(name) + " has " + std::to_string(array->integers.size()) +
                         " entries; the model has " + std::to_string(layers) + " layers");
  }
  std::vector<bool> result;
  for (const std::int64_t entry : array->integers) {
    if (entry != 0 && entry != 1)
      throw ModelFileError(key(name) + " holds " + std::to_string(entry) + "; allowed are 0 and 1");
    result.push_back(entry == 1);
  }
  return result;
}

Hyperparameters read_hyperparameters(const GgufFile& file, std::vector<std::string>& warnings) {
  const auto architecture = file.text("general.architecture");
  const bool leads = architecture && *architecture == kLeadArchitecture;
  if (!leads && (!architecture || *architecture != kArchitecture)) {
    throw ModelFileError("the file's architecture is " + printable(architecture.value_or("")) +
                         "; this engine runs '" + std::string(kArchitecture) + "' and '" +
                         std::string(kLeadArchitecture) + "'");
  }
  Hyperparameters hyper;
  hyper.layers = required(file, "block_count", 1, kMaxLayers);
  // Only a file of the other name has the key: readers that know nothing of it have to refuse such a file.
  if (leads) hyper.router_lead = required(file, "router_lead", 1, kMaxLayers);
  if (!leads && file.integer(key("router_lead"), 0, kMaxLayers).value_or(0) != 0) {
    throw ModelFileError("the file has " + key("router_lead") + ", which goes with the architecture '" +
                         std::string(kLeadArchitecture) + "', and calls itself '" +
                         std::string(kArchitecture) + "'");
  }
  hyper.context = required(file, "context_length", 1, kMaxContext);
  hyper.hidden = required(file, "embedding_length", 1, kMaxWidth);
  hyper.heads = required(file, "attention.head_count", 1, kMaxWidth);
  hyper.kv_heads = file.integer(key("attention.head_count_kv"), 1, kMaxWidth).value_or(hyper.heads);
  if (hyper.heads % hyper.kv_heads != 0) {
    throw ModelFileError("there are " + std::to_string(hyper.heads) + " query heads for " +
                         std::to_string(hyper.kv_heads) +
                         " key heads; the one has to be a multiple of the other");
  }
  if (const auto stated = file.integer(key("attention.key_length"), 2, kMaxHeadDim)) {
    hyper.head_dim = *stated;
  } else if (hyper.hidden % hyper.heads == 0 && hyper.hidden / hyper.heads <= kMaxHeadDim) {
    hyper.head_dim = hyper.hidden / hyper.heads;
  } else {
    throw ModelFileError("the file has no " + key("attention.key_length"));
  }
  for (const char* same : {"attention.value_length", "rope.dimension_count"}) {
    if (file.integer(key(same), 1, kMaxWidth).value_or(hyper.head_dim) != hyper.head_dim) {
      throw ModelFileError(key(same) + " differs from the head size " + std::to_string(hyper.head_dim) +
                           "; this architecture has them equal");
    }
  }
  if (hyper.head_dim % 2 != 0) throw ModelFileError(key("attention.key_length") + " has to be even");
  hyper.experts = required(file, "expert_count", 1, kMaxExperts);
  hyper.experts_per_token = required(file, "expert_used_count", 1, hyper.experts);
  if (const auto stated = file.integer(key("expert_feed_forward_length"), 1, kMaxWidth)) {
    hyper.expert_hidden = *stated;
  } else {
    hyper.expert_hidden = required(file, "feed_forward_length", 1, kMaxWidth);
  }
  hyper.rms_epsilon = required_real(file, "attention.layer_norm_rms_epsilon", 0.0, 1.0);
  hyper.rope_theta = required_real(file, "rope.freq_base", 1.0, 1e12);

  if (const auto gating = file.integer(key("expert_gating_func"), 1, 2)) {
    hyper.router = *gating == 1 ? RouterKind::kSoftmax : RouterKind::kSigmoid;
  } else {
    // The one converter that leaves the key out does so exactly when the router is no softmax
    // (docs/engine.md).
    hyper.router = RouterKind::kSigmoid;
    warnings.push_back("it does not say how experts are weighted (" + key("expert_gating_func") +
                       "); taking the sigmoid, as converters that leave the key out mean it");
  }

  hyper.window = file.integer(key("attention.sliding_window"), 0, kMaxContext).value_or(0);
  hyper.rope = layout(file, "rope_layout", hyper.layers);
  hyper.windowed = layout(file, "sliding_window_layout", hyper.layers);
  const bool periodic = hyper.window > 0;
  for (std::vector<bool>* list : {&hyper.rope, &hyper.windowed}) {
    if (!list->empty()) continue;
    const bool is_rope = list == &hyper.rope;
    for (std::int64_t i = 0; i < hyper.layers; ++i) {
      list->push_back(periodic ? i % kLlamaCppPeriod != 0 : is_rope);
    }
  }
  bool any_window = false;
  for (const bool windowed : hyper.windowed) any_window = any_window || windowed;
  if (any_window && hyper.window == 0) {
    throw ModelFileError(key("sliding_window_layout") + " has windowed layers and " +
                         key("attention.sliding_window") + " is missing");
  }
  if (!any_window) hyper.window = 0;
  return hyper;
}

constexpr std::uint64_t kPackedVersion = 1;
constexpr std::int64_t kMaxPredictorWidth = 1 << 14;
constexpr const char* kPredictorDown = "head_predictor.down";
constexpr const char* kPredictorUp = "head_predictor.up";

class Tensors {
 public:
  Tensors(const GgufFile& file, Model& model) : file_(file), model_(model) {}

  bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

  Matrix matrix(const std::string& name, std::int64_t cols, std::int64_t rows, std::int64_t experts = 1) {
    const GgufTensor& tensor = take(name, {cols, rows, experts, 1});
    if (tensor.type == Type::kI8)
      throw ModelFileError("the tensor '" + name + "' has the type I8, which is no weight's");
    model_.parameters += cols * rows * experts;
    bytes_by_type[tensor.type] += tensor.bytes;
    return make_matrix(file_.data(tensor), tensor.type, cols, rows, experts);
  }

  // `name`.weight in stock rows, or `name`.tiles.
  Linear linear(const std::string& name, std::int64_t cols, std::int64_t rows) {
    if (!model_.packed || !has(name + ".tiles")) return {matrix(name + ".weight", cols, rows), {}, 0};
    Linear result;
    if (cols % kActivationBlock != 0)
      throw ModelFileError(name + ".tiles: its " + std::to_string(cols) +
                           " columns are no whole blocks of 32");
    result.tiles = {nullptr, rows, cols};
    const auto bytes = static_cast<std::int64_t>(result.tiles.tile_bytes());
    result.tiles.data = packed(name + ".tiles", {bytes, result.tiles.tiles(), 1, 1});
    const std::string key_name = key("packed.checksum." + name);
    const auto* checksum = std::get_if<std::uint64_t>(file_.find(key_name));
    if (checksum == nullptr) throw ModelFileError("the file has no " + key_name);
    result.checksum = *checksum;
    model_.parameters += cols * rows;
    bytes_by_type[Type::kQ4_0] += result.tiles.bytes();
    return result;
  }

  const std::byte* packed(const std::string& name, const std::array<std::int64_t, 4>& shape) {
    const GgufTensor& tensor = take(name, shape);
    if (tensor.type != Type::kI8) {
      throw ModelFileError("the tensor '" + name + "' has the type " + traits_of(tensor.type).name +
                           "; packed ones are I8");
    }
    if (tensor.offset % 4096 != 0)
      throw ModelFileError("the tensor '" + name + "' does not start at a multiple of 4096");
    return file_.data(tensor);
  }

  // Norm weights are few: they are copied to fp32, whatever they are stored as.
  std::vector<float> vector(const std::string& name, std::int64_t size) {
    const GgufTensor& tensor = take(name, {size, 1, 1, 1});
    if (tensor.type == Type::kI8)
      throw ModelFileError("the tensor '" + name + "' has the type I8, which is no weight's");
    model_.parameters += size;
    std::vector<float> values(static_cast<std::size_t>(size));
    dequantise(tensor.type, file_.data(tensor), size, values.data());
    return values;
  }

  // The predictor is no part of the model unless it is switched on, so sizes and parameters do not count it.
  std::optional<HeadPredictor> head_predictor() {
    bool any = false;
    for (const std::string name : {kPredictorDown, kPredictorUp})
      any = any || has(name + ".weight") || has(name + ".tiles");
    if (!any) return std::nullopt;
    const std::int64_t width = required(file_, "head_predictor.width", 1, kMaxPredictorWidth);
    const auto types = bytes_by_type;
    const auto parameters = model_.parameters;
    const auto weight_bytes = model_.weight_bytes;
    const bool all_f32 = model_.all_f32;
    HeadPredictor result;
    result.down = linear(kPredictorDown, model_.hyper.hidden, width);
    result.up = linear(kPredictorUp, width, model_.hyper.vocab);
    bytes_by_type = types;
    model_.parameters = parameters;
    model_.weight_bytes = weight_bytes;
    model_.all_f32 = all_f32;
    result.threshold = required_real(file_, "head_predictor.threshold", -1e30, 1e30);
    // An imported one was not measured; half of the measurement is a damaged file.
    if (file_.find(key("head_predictor.recall")) || file_.find(key("head_predictor.missed_argmax"))) {
      result.recall = required_real(file_, "head_predictor.recall", 0.0, 1.0);
      result.missed_argmax = required_real(file_, "head_predictor.missed_argmax", 0.0, 1.0);
    }
    return result;
  }

  std::map<Type, std::uint64_t> bytes_by_type;

 private:
  const GgufTensor& take(const std::string& name, const std::array<std::int64_t, 4>& shape) {
    const GgufTensor* tensor = file_.find_tensor(name);
    if (tensor == nullptr) throw ModelFileError("the file has no tensor '" + name + "'");
    if (tensor->shape != shape) {
      throw ModelFileError("the tensor '" + name + "' has the shape " + format(tensor->shape) +
                           "; the metadata ask for " + format(shape));
    }
    model_.weight_bytes += tensor->bytes;
    if (tensor->type != Type::kF32) model_.all_f32 = false;
    return *tensor;
  }

  static std::string format(const std::array<std::int64_t, 4>& shape) {
    std::string text = "{";
    for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "}";
  }

  const GgufFile& file_;
  Model& model_;
};

}  // namespace

std::shared_ptr<const Model> Model::open(const std::string& path) {
  auto model = std::make_shared<Model>();
  model->path = path;
  model->mapping_ = std::make_unique<MappedFile>(path);
  const auto bytes = model->mapping_->bytes();
  model->start_ = bytes.data();
  try {
    model->file = GgufFile::parse(bytes);
    model->load();
  } catch (const ModelFileError& error) {
    throw ModelFileError(path + ": " + error.what());
  }
  model->file_bytes = bytes.size();
  return model;
}

std::shared_ptr<const Model> Model::from_bytes(std::span<const std::byte> bytes) {
  auto model = std::make_shared<Model>();
  model->start_ = bytes.data();
  model->file = GgufFile::parse(bytes);
  model->load();
  model->file_bytes = bytes.size();
  return model;
}

void Model::read(const std::byte* data, std::span<std::byte> to) const {
  if (mapping_ != nullptr) return mapping_->read(offset_of(data), to);
  std::memcpy(to.data(), data, to.size());
}

void Model::forget_pages() const {
  if (mapping_ != nullptr) mapping_->forget_pages();
}

void Model::load() {
  hyper = read_hyperparameters(file, warnings);
  all_f32 = true;
  if (const auto version = file.integer(key("packed.version"), 0, 1 << 20)) {
    if (*version != kPackedVersion) {
      throw ModelFileError("it was packed in version " + std::to_string(*version) +
                           " of the layout; this engine reads " + std::to_string(kPackedVersion) +
                           ": pack the original file again");
    }
    packed = true;
  }
  Tensors tensors(file, *this);

  const auto stated = file.integer(key("vocab_size"), 1, kMaxVocab);
  if (const GgufTensor* stored = file.find_tensor("token_embd.weight"); stored != nullptr) {
    hyper.vocab = stored->shape[1];
    if (hyper.vocab > kMaxVocab)
      throw ModelFileError("the vocabulary has " + std::to_string(hyper.vocab) +
                           " entries; at most 16777216 are allowed");
    if (stated && *stated != hyper.vocab) {
      throw ModelFileError(key("vocab_size") + " is " + std::to_string(*stated) +
                           " and token_embd.weight has " + std::to_string(hyper.vocab) + " rows");
    }
  } else {
    if (!packed) throw ModelFileError("the file has no tensor 'token_embd.weight'");
    if (!stated) throw ModelFileError("the file has no " + key("vocab_size"));
    hyper.vocab = *stated;
  }
  embedding = tensors.linear("token_embd", hyper.hidden, hyper.vocab);
  tied = !tensors.has("output.weight") && !tensors.has("output.tiles");
  head = tied ? embedding : tensors.linear("output", hyper.hidden, hyper.vocab);
  head_predictor = tensors.head_predictor();
  output_norm = tensors.vector("output_norm.weight", hyper.hidden);

  const std::int64_t query = hyper.heads * hyper.head_dim;
  const std::int64_t shared = hyper.kv_heads * hyper.head_dim;
  const ExpertShape shape = expert_shape();
  if (packed && (shape.hidden % kActivationBlock != 0 || shape.neurons % kNeuronGroup != 0)) {
    throw ModelFileError("packed experts of " + std::to_string(shape.neurons) + " neurons and " +
                         std::to_string(shape.hidden) + " inputs cannot be: both are multiples of 32");
  }
  for (std::int64_t i = 0; i < hyper.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    Layer layer;
    layer.attention_norm = tensors.vector(block + "attn_norm.weight", hyper.hidden);
    layer.ffn_norm = tensors.vector(block + "ffn_norm.weight", hyper.hidden);
    layer.query = tensors.linear(block + "attn_q", hyper.hidden, query);
    layer.key = tensors.linear(block + "attn_k", hyper.hidden, shared);
    layer.value = tensors.linear(block + "attn_v", hyper.hidden, shared);
    layer.output = tensors.linear(block + "attn_output", query, hyper.hidden);
    layer.router = tensors.linear(block + "ffn_gate_inp", hyper.hidden, hyper.experts);
    if (packed) {
      layer.packed = tensors.packed(block + "ffn_experts.packed",
                                    {static_cast<std::int64_t>(shape.bytes()), hyper.experts, 1, 1});
      parameters += 3 * hyper.hidden * hyper.expert_hidden * hyper.experts;
      tensors.bytes_by_type[Type::kQ4_0] += shape.bytes() * static_cast<std::uint64_t>(hyper.experts);
    } else {
      layer.gate =
          tensors.matrix(block + "ffn_gate_exps.weight", hyper.hidden, hyper.expert_hidden, hyper.experts);
      layer.up =
          tensors.matrix(block + "ffn_up_exps.weight", hyper.hidden, hyper.expert_hidden, hyper.experts);
      layer.down =
          tensors.matrix(block + "ffn_down_exps.weight", hyper.expert_hidden, hyper.hidden, hyper.experts);
    }
    layers.push_back(std::move(layer));
  }
  if (packed) {
    read_places(file.integers(key("packed.expert_order")));
    const std::byte* sums = tensors.packed("experts.checksums", {16, hyper.experts, hyper.layers, 1});
    for (std::int64_t i = 0; i < 2 * hyper.experts * hyper.layers; ++i)
      checksums.push_back(smallthinker::load<std::uint64_t>(sums + 8 * i));
  }
  if (const GgufArray* counts = file.integers(key("expert_counts")); counts != nullptr)
    read_frequencies(*counts);
  std::uint64_t most = 0;
  for (const auto& [type, bytes] : tensors.bytes_by_type) {
    if (bytes > most) {
      most = bytes;
      main_type = type;
    }
  }
}

// `order` [layers][experts] names the expert at each place of the file; without it they are in ascending
// order.
void Model::read_places(const GgufArray* order) {
  const std::int64_t all = hyper.layers * hyper.experts;
  if (order != nullptr && order->integers.size() != static_cast<std::size_t>(all)) {
    throw ModelFileError(key("packed.expert_order") + " has " + std::to_string(order->integers.size()) +
                         " entries; the model has " + std::to_string(all) + " experts");
  }
  places.assign(static_cast<std::size_t>(all), -1);
  for (std::int64_t i = 0; i < all; ++i) {
    const std::int64_t place = i % hyper.experts;
    const std::int64_t expert = order != nullptr ? order->integers[static_cast<std::size_t>(i)] : place;
    const std::int64_t first = i - place;
    if (expert < 0 || expert >= hyper.experts || places[static_cast<std::size_t>(first + expert)] >= 0) {
      throw ModelFileError(key("packed.expert_order") + " does not name every expert of layer " +
                           std::to_string(i / hyper.experts) + " once");
    }
    places[static_cast<std::size_t>(first + expert)] = static_cast<std::int32_t>(place);
  }
}

// How often each expert was chosen in some run: [layers][experts].
void Model::read_frequencies(const GgufArray& counts) {
  const auto experts = static_cast<std::size_t>(hyper.experts);
  if (counts.integers.size() != static_cast<std::size_t>(hyper.layers) * experts) {
    throw ModelFileError(key("expert_counts") + " has " + std::to_string(counts.integers.size()) +
                         " entries; the model has " + std::to_string(hyper.layers * hyper.experts) +
                         " experts");
  }
  for (std::size_t first = 0; first < counts.integers.size(); first += experts) {
    double total = 0.0;
    for (std::size_t e = 0; e < experts; ++e) {
      if (counts.integers[first + e] < 0)
        throw ModelFileError(key("expert_counts") + " holds a negative count");
      total += static_cast<double>(counts.integers[first + e]);
    }
    const double tokens = std::max(1.0, total / static_cast<double>(hyper.experts_per_token));
    for (std::size_t e = 0; e < experts; ++e) {
      expert_frequency.push_back(
          static_cast<float>(static_cast<double>(counts.integers[first + e]) / tokens));
    }
  }
}

}  // namespace smallthinker
