// Writes GGUF bytes from a structure that tests may mutate in every place.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "forward/sampler.hpp"
#include "model/tensor.hpp"

namespace smallthinker::testing {

using Bytes = std::vector<std::byte>;

template <typename T>
void put(Bytes& to, T value) {
  const auto* from = reinterpret_cast<const std::byte*>(&value);
  to.insert(to.end(), from, from + sizeof value);
}

inline void put_text(Bytes& to, const std::string& text) {
  put<std::uint64_t>(to, text.size());
  const auto* from = reinterpret_cast<const std::byte*>(text.data());
  to.insert(to.end(), from, from + text.size());
}

struct Value {
  std::string key;
  std::uint32_t type = 0;  // GGUF's id
  Bytes payload;
};

struct Tensor {
  std::string name;
  std::vector<std::uint64_t> shape;
  std::uint32_t type = 0;
  std::uint64_t offset = 0;
  Bytes data;
};

struct Container {
  std::uint32_t magic = 0x46554747;
  std::uint32_t version = 3;
  std::uint64_t extra_values = 0;  // added to the announced count
  std::uint64_t extra_tensors = 0;
  std::uint64_t alignment = 32;
  std::vector<Value> values;
  std::vector<Tensor> tensors;

  void add_u32(const std::string& key, std::uint32_t number) {
    Value value{key, 4, {}};
    put(value.payload, number);
    values.push_back(value);
  }
  void add_f32(const std::string& key, float number) {
    Value value{key, 6, {}};
    put(value.payload, number);
    values.push_back(value);
  }
  void add_text(const std::string& key, const std::string& text) {
    Value value{key, 8, {}};
    put_text(value.payload, text);
    values.push_back(value);
  }
  void add_i32s(const std::string& key, const std::vector<std::int32_t>& numbers) {
    Value value{key, 9, {}};
    put<std::uint32_t>(value.payload, 5);
    put<std::uint64_t>(value.payload, numbers.size());
    for (const std::int32_t number : numbers) put(value.payload, number);
    values.push_back(value);
  }
  void add_texts(const std::string& key, const std::vector<std::string>& texts) {
    Value value{key, 9, {}};
    put<std::uint32_t>(value.payload, 8);
    put<std::uint64_t>(value.payload, texts.size());
    for (const std::string& text : texts) put_text(value.payload, text);
    values.push_back(value);
  }

  void place_tensors() {
    std::uint64_t offset = 0;
    for (Tensor& tensor : tensors) {
      tensor.offset = offset;
      offset = (offset + tensor.data.size() + alignment - 1) / alignment * alignment;
    }
  }

  Bytes write() const {
    Bytes out;
    put(out, magic);
    put(out, version);
    put(out, std::uint64_t{tensors.size()} + extra_tensors);
    put(out, std::uint64_t{values.size()} + extra_values);
    for (const Value& value : values) {
      put_text(out, value.key);
      put(out, value.type);
      out.insert(out.end(), value.payload.begin(), value.payload.end());
    }
    for (const Tensor& tensor : tensors) {
      put_text(out, tensor.name);
      put(out, static_cast<std::uint32_t>(tensor.shape.size()));
      for (const std::uint64_t size : tensor.shape) put(out, size);
      put(out, tensor.type);
      put(out, tensor.offset);
    }
    const auto align = [&](std::size_t size) { return (size + alignment - 1) / alignment * alignment; };
    const std::size_t start = align(out.size());
    std::size_t end = start;
    for (const Tensor& tensor : tensors)
      end = std::max<std::size_t>(end, start + tensor.offset + tensor.data.size());
    if (end - start > (1U << 24U)) end = start;  // a mutated offset: leave the data out
    out.resize(end);
    for (const Tensor& tensor : tensors) {
      if (start + tensor.offset + tensor.data.size() <= end && !tensor.data.empty()) {
        std::memcpy(out.data() + start + tensor.offset, tensor.data.data(), tensor.data.size());
      }
    }
    return out;
  }
};

inline float uniform(RandomStream& random) { return static_cast<float>(2.0 * random.fraction() - 1.0); }

// Rows of any storage type with weights of about +-`size`.
inline Bytes random_rows(RandomStream& random, Type type, std::int64_t elements, float size) {
  const TypeTraits& traits = traits_of(type);
  Bytes out;
  const auto byte = [&] { return static_cast<std::byte>(random.next() >> 56U); };
  for (std::int64_t i = 0; i < elements; i += traits.block) {
    switch (type) {
      case Type::kF32:
        put(out, size * uniform(random));
        break;
      case Type::kF16:
        put(out, float_to_half(size * uniform(random)));
        break;
      case Type::kBF16: {
        const float value = size * uniform(random);
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        put(out, static_cast<std::uint16_t>(bits >> 16U));
        break;
      }
      case Type::kQ4_0:
      case Type::kQ8_0: {
        const float top = type == Type::kQ4_0 ? 8.0F : 127.0F;
        put(out, float_to_half(size / top * uniform(random)));
        for (std::int64_t j = 2; j < traits.block_bytes; ++j) out.push_back(byte());
        break;
      }
      case Type::kI8:
        out.push_back(byte());
        break;
      case Type::kQ6_K:
        for (std::int64_t j = 0; j < 208; ++j) out.push_back(byte());
        put(out, float_to_half(size / (32.0F * 128.0F)));
        break;
    }
  }
  return out;
}

struct Shape {
  std::int64_t layers = 3, hidden = 32, heads = 4, kv_heads = 2, head_dim = 8, experts = 4, used = 2;
  std::int64_t expert_hidden = 32, vocab = 40, context = 256, window = 0;
  std::vector<std::int32_t> rope, windowed;
  Type type = Type::kF32;
  std::optional<Type> embedding;  // if of another
  bool softmax = true, tied = false;
  std::int64_t router_lead = 0;
  std::int64_t predictor_width = 0;  // 0: no predictor of the head's rows
};

inline Container make_container(const Shape& shape, std::uint64_t seed) {
  RandomStream random(seed);
  Container file;
  const auto key = [](const std::string& name) { return "smallthinker." + name; };
  const auto number = [&](const std::string& name, std::int64_t value) {
    file.add_u32(key(name), static_cast<std::uint32_t>(value));
  };
  file.add_text("general.architecture", shape.router_lead > 0 ? "smallthinker-lead" : "smallthinker");
  number("block_count", shape.layers);
  number("context_length", shape.context);
  number("embedding_length", shape.hidden);
  number("expert_feed_forward_length", shape.expert_hidden);
  number("attention.head_count", shape.heads);
  number("attention.head_count_kv", shape.kv_heads);
  number("attention.key_length", shape.head_dim);
  number("attention.value_length", shape.head_dim);
  number("expert_count", shape.experts);
  number("expert_used_count", shape.used);
  number("expert_gating_func", shape.softmax ? 1 : 2);
  if (shape.router_lead > 0) number("router_lead", shape.router_lead);
  if (shape.window > 0) number("attention.sliding_window", shape.window);
  if (!shape.rope.empty()) file.add_i32s(key("rope_layout"), shape.rope);
  if (!shape.windowed.empty()) file.add_i32s(key("sliding_window_layout"), shape.windowed);
  file.add_f32(key("rope.freq_base"), 10000.0F);
  file.add_f32(key("attention.layer_norm_rms_epsilon"), 1e-6F);
  file.add_texts("tokenizer.ggml.tokens", {"a", "b", "<|im_end|>"});
  const auto tensor = [&](const std::string& name, std::vector<std::uint64_t> sizes, Type type, float size) {
    std::int64_t elements = 1;
    for (const std::uint64_t n : sizes) elements *= static_cast<std::int64_t>(n);
    file.tensors.push_back({name, std::move(sizes), static_cast<std::uint32_t>(type), 0,
                            random_rows(random, type, elements, size)});
  };
  const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  const std::uint64_t hidden = u(shape.hidden);
  const std::uint64_t query = u(shape.heads * shape.head_dim);
  const std::uint64_t shared = u(shape.kv_heads * shape.head_dim);
  const std::uint64_t ffn = u(shape.expert_hidden);
  const std::uint64_t experts = u(shape.experts);
  tensor("token_embd.weight", {hidden, u(shape.vocab)}, shape.embedding.value_or(shape.type), 1.0F);
  if (!shape.tied) tensor("output.weight", {hidden, u(shape.vocab)}, shape.type, 0.5F);
  tensor("output_norm.weight", {hidden}, Type::kF32, 1.0F);
  for (std::int64_t i = 0; i < shape.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    tensor(block + "attn_norm.weight", {hidden}, Type::kF32, 1.0F);
    tensor(block + "ffn_norm.weight", {hidden}, Type::kF32, 1.0F);
    tensor(block + "attn_q.weight", {hidden, query}, shape.type, 0.5F);
    tensor(block + "attn_k.weight", {hidden, shared}, shape.type, 0.5F);
    tensor(block + "attn_v.weight", {hidden, shared}, shape.type, 0.5F);
    tensor(block + "attn_output.weight", {query, hidden}, shape.type, 0.5F);
    tensor(block + "ffn_gate_inp.weight", {hidden, experts}, Type::kF32, 1.0F);
    tensor(block + "ffn_gate_exps.weight", {hidden, ffn, experts}, shape.type, 0.5F);
    tensor(block + "ffn_up_exps.weight", {hidden, ffn, experts}, shape.type, 0.5F);
    tensor(block + "ffn_down_exps.weight", {ffn, hidden, experts}, shape.type, 0.5F);
  }
  if (shape.predictor_width > 0) {
    file.add_u32(key("head_predictor.width"), static_cast<std::uint32_t>(shape.predictor_width));
    file.add_f32(key("head_predictor.threshold"), 0.1F);
    file.add_f32(key("head_predictor.recall"), 0.99F);
    file.add_f32(key("head_predictor.missed_argmax"), 0.01F);
    tensor("head_predictor.down.weight", {hidden, u(shape.predictor_width)}, shape.type, 0.5F);
    tensor("head_predictor.up.weight", {u(shape.predictor_width), u(shape.vocab)}, shape.type, 0.5F);
  }
  file.place_tensors();
  return file;
}

}  // namespace smallthinker::testing
