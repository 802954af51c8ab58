// The Python module runtime_cpu._core. Its types are described in runtime_cpu/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>

#include "experts/checksum.hpp"
#include "forward/runtime.hpp"
#include "forward/sampler.hpp"
#include "model/model.hpp"
#include "model/vocabulary.hpp"

namespace nb = nanobind;
namespace st = smallthinker;

namespace {

using TokenArray = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct PyModel {
  std::shared_ptr<const st::Model> model;
};

struct PySession {
  std::shared_ptr<const st::Model> model;
  st::Session session;
};

struct PyRuntime {
  std::shared_ptr<const st::Model> model;
  st::Runtime runtime;
};

// Text of a file need not be UTF-8; other bytes become lone surrogates.
nb::object to_text(std::string_view text) {
  PyObject* object =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape");
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

nb::object to_python(const st::GgufArray& array) {
  nb::list list;
  for (const std::string_view text : array.texts) list.append(to_text(text));
  for (const double value : array.reals) list.append(nb::float_(value));
  for (const std::int64_t value : array.integers) {
    if (array.is_bool) {
      list.append(nb::bool_(value != 0));
    } else {
      list.append(nb::int_(value));
    }
  }
  return list;
}

nb::object to_python(const st::GgufValue& value) {
  if (const auto* natural = std::get_if<std::uint64_t>(&value)) return nb::int_(*natural);
  if (const auto* whole = std::get_if<std::int64_t>(&value)) return nb::int_(*whole);
  if (const auto* real = std::get_if<double>(&value)) return nb::float_(*real);
  if (const auto* truth = std::get_if<bool>(&value)) return nb::bool_(*truth);
  if (const auto* text = std::get_if<std::string_view>(&value)) return to_text(*text);
  return to_python(std::get<st::GgufArray>(value));
}

nb::dict metadata(const PyModel& self, bool arrays) {
  nb::dict result;
  for (const auto& [key, value] : self.model->file.values()) {
    if (arrays || !std::holds_alternative<st::GgufArray>(value)) result[to_text(key)] = to_python(value);
  }
  return result;
}

nb::list tensors(const PyModel& self) {
  nb::list result;
  for (const st::GgufTensor& tensor : self.model->file.tensors()) {
    nb::list shape;
    for (std::uint32_t i = 0; i < tensor.dimensions; ++i) shape.append(tensor.shape[i]);
    result.append(nb::make_tuple(to_text(tensor.name), st::traits_of(tensor.type).name, nb::tuple(shape),
                                 tensor.offset, tensor.bytes));
  }
  return result;
}

// Texts as the bytes of a file: to_text()'s other direction.
std::vector<std::string> to_bytes(const nb::sequence& texts, const char* key) {
  std::vector<std::string> result;
  for (const nb::handle text : texts) {
    PyObject* object = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
    if (object == nullptr) {
      PyErr_Clear();
      throw st::TokenizerError(std::string(key) + "[" + std::to_string(result.size()) +
                               "] is no text that UTF-8 can hold");
    }
    const auto bytes = nb::steal<nb::bytes>(object);
    result.emplace_back(bytes.c_str(), bytes.size());
  }
  return result;
}

st::Vocabulary vocabulary(const nb::sequence& tokens, const std::optional<std::vector<std::int64_t>>& kinds,
                          const nb::sequence& merges) {
  const auto texts = to_bytes(tokens, "tokenizer.ggml.tokens");
  const auto lines = to_bytes(merges, "tokenizer.ggml.merges");
  const std::vector<std::string_view> text_views(texts.begin(), texts.end());
  const std::vector<std::string_view> line_views(lines.begin(), lines.end());
  if (!kinds) return {text_views, std::nullopt, line_views};
  return {text_views, *kinds, line_views};
}

nb::bytes token_bytes(const st::Vocabulary& self, std::int64_t id) {
  if (id < 0 || id >= self.size()) {
    throw st::TokenizerError("token id " + std::to_string(id) + " is outside the vocabulary of " +
                             std::to_string(self.size()));
  }
  const std::string_view bytes = self.bytes(id);
  return nb::bytes(bytes.data(), bytes.size());
}

// Ids of the tokens of a kind, and their text.
nb::dict tokens_of_kind(const st::Vocabulary& self, int kind) {
  nb::dict result;
  for (std::int64_t id = 0; id < self.size(); ++id) {
    if (static_cast<int>(self.kind(id)) == kind) result[to_text(self.bytes(id))] = id;
  }
  return result;
}

std::vector<std::int32_t> encode_words(const st::Vocabulary& self, const std::vector<std::string>& words) {
  const nb::gil_scoped_release release;
  const std::vector<std::string_view> views(words.begin(), words.end());
  std::vector<std::int32_t> ids;
  self.encode(views, ids);
  return ids;
}

nb::list layout(const std::vector<bool>& entries) {
  nb::list result;
  for (const bool entry : entries) result.append(nb::int_(entry ? 1 : 0));
  return result;
}

void forward(PyRuntime& self, PySession& session, const TokenArray& tokens,
             const std::optional<LogitRows>& logits) {
  if (session.model != self.model) throw st::EngineError("the session belongs to another model");
  float* out = nullptr;
  std::int64_t rows = 0;
  if (logits) {
    if (static_cast<std::int64_t>(logits->shape(1)) != self.model->hyper.vocab) {
      throw st::EngineError("logits have to be [rows, vocabulary]");
    }
    out = logits->data();
    rows = static_cast<std::int64_t>(logits->shape(0));
  }
  const std::span<const std::int32_t> ids(tokens.data(), tokens.shape(0));
  const nb::gil_scoped_release release;
  self.runtime.forward(session.session, ids, out, rows);
}

void decode(PyRuntime& self, const std::vector<PySession*>& sessions, const TokenArray& tokens,
            const LogitRows& logits) {
  if (sessions.size() != tokens.shape(0) || sessions.size() != logits.shape(0) ||
      static_cast<std::int64_t>(logits.shape(1)) != self.model->hyper.vocab) {
    throw st::EngineError("there have to be as many tokens and rows of logits as sessions");
  }
  std::vector<st::Runtime::Step> steps;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i]->model != self.model) throw st::EngineError("the session belongs to another model");
    steps.push_back({&sessions[i]->session, tokens.data()[i]});
  }
  const nb::gil_scoped_release release;
  self.runtime.decode(steps, logits.data());
}

nb::dict take_counters(PySession& self) {
  const st::Counters counters = self.session.counters;
  self.session.counters.reset(self.model->hyper);
  const auto experts = static_cast<std::size_t>(self.model->hyper.experts);
  nb::list neurons;
  nb::list active;
  nb::list choices;
  for (std::size_t layer = 0; layer < counters.neurons.size(); ++layer) {
    neurons.append(counters.neurons[layer]);
    active.append(counters.active_neurons[layer]);
    nb::list row;
    for (std::size_t e = 0; e < experts; ++e) row.append(counters.expert_counts[layer * experts + e]);
    choices.append(row);
  }
  nb::dict result;
  result["neurons"] = neurons;
  result["active_neurons"] = active;
  result["expert_counts"] = choices;
  result["cache_hits"] = counters.cache_hits;
  result["cache_misses"] = counters.cache_misses;
  result["bytes_read"] = counters.bytes_read;
  result["waited_s"] = counters.waited_s;
  result["head_rows"] = counters.head_rows;
  result["head_rows_computed"] = counters.head_rows_computed;
  result["head_fallbacks"] = counters.head_fallbacks;
  return result;
}

nb::object head_predictor(const PyModel& self) {
  const auto& predictor = self.model->head_predictor;
  if (!predictor) return nb::none();
  nb::dict result;
  result["width"] = predictor->width();
  result["threshold"] = predictor->threshold;
  result["recall"] = predictor->recall;
  result["missed_argmax"] = predictor->missed_argmax;
  return result;
}

st::RuntimeOptions options(int threads, std::int64_t context, const std::string& kv_type,
                           const std::string& kernels, std::int64_t chunk) {
  if (threads < 1 || threads > 1024 || context < 1 || chunk < 1 || chunk > (1 << 16)) {
    throw st::EngineError("threads, context and chunk_tokens have to be positive and sensible");
  }
  st::RuntimeOptions result;
  result.threads = threads;
  result.context = context;
  result.chunk = chunk;
  result.kernels = kernels;
  result.kv_type = kv_type;
  return result;
}

using ByteArray = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

ByteArray new_bytes(std::size_t size, std::byte*& data) {
  data = new std::byte[size];
  return ByteArray(data, {size}, nb::capsule(data, [](void* memory) noexcept {
                     delete[] static_cast<std::byte*>(memory);
                   }));
}

const st::Layer& layer_of(const PyModel& model, std::int64_t layer) {
  if (layer < 0 || layer >= model.model->hyper.layers)
    throw st::EngineError("there is no layer " + std::to_string(layer));
  return model.model->layers[static_cast<std::size_t>(layer)];
}

ByteArray tiles_of(const st::Matrix& matrix, int threads) {
  const st::TileMatrix tiled{nullptr, matrix.rows, matrix.cols};
  std::byte* data = nullptr;
  ByteArray result = new_bytes(tiled.bytes(), data);
  const nb::gil_scoped_release release;
  st::ThreadPool pool(threads);
  pool.run(tiled.tiles(), [&](std::int64_t tile, int) {
    st::pack_tiles(matrix, 0, tile, tile + 1, data + static_cast<std::size_t>(tile) * tiled.tile_bytes());
  });
  return result;
}

// A Q4_0 matrix of a stock file in tiles.
ByteArray pack_tiles(const PyModel& model, const std::string& name, int threads) {
  const st::GgufTensor* tensor = model.model->file.find_tensor(name);
  if (tensor == nullptr || tensor->type != st::Type::kQ4_0 || tensor->shape[2] != 1) {
    throw st::EngineError("the file has no Q4_0 matrix '" + name + "'");
  }
  ByteArray result = tiles_of(
      st::make_matrix(model.model->file.data(*tensor), tensor->type, tensor->shape[0], tensor->shape[1]),
      threads);
  model.model->forget_pages();
  return result;
}

// Q4_0 rows that lie in no model file, in tiles.
ByteArray pack_rows(const ConstBytes& rows, std::int64_t cols, int threads) {
  const std::int64_t row_bytes = cols > 0 && cols % 32 == 0 ? cols / 32 * 18 : 0;
  const auto size = static_cast<std::int64_t>(rows.shape(0));
  if (row_bytes == 0 || size == 0 || size % row_bytes != 0) {
    throw st::EngineError(std::to_string(size) + " bytes are no Q4_0 rows of " + std::to_string(cols) +
                          " columns");
  }
  return tiles_of(st::make_matrix(reinterpret_cast<const std::byte*>(rows.data()), st::Type::kQ4_0, cols,
                                  size / row_bytes),
                  threads);
}

// Experts `ids` of a layer of a stock file, one after the other, and the checksums of their two parts.
nb::tuple pack_experts(const PyModel& model, std::int64_t layer, const std::vector<std::int64_t>& ids,
                       int threads) {
  const st::Layer& from = layer_of(model, layer);
  const st::ExpertShape shape = model.model->expert_shape();
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= model.model->hyper.experts)
      throw st::EngineError("there is no expert " + std::to_string(id));
  }
  for (const st::Matrix* matrix : {&from.gate, &from.up, &from.down}) {
    if (matrix->data == nullptr || matrix->type != st::Type::kQ4_0) {
      throw st::EngineError("only the Q4_0 experts of a stock file can be packed");
    }
  }
  std::byte* data = nullptr;
  ByteArray result = new_bytes(ids.size() * shape.bytes(), data);
  std::vector<std::uint64_t> sums(2 * ids.size());
  {
    const nb::gil_scoped_release release;
    st::ThreadPool pool(threads);
    pool.run(static_cast<std::int64_t>(ids.size()), [&](std::int64_t i, int) {
      const auto at = static_cast<std::size_t>(i);
      std::byte* out = data + at * shape.bytes();
      st::pack_gate(from.gate, ids[at], shape, out);
      st::pack_up(from.up, ids[at], shape, out);
      st::pack_down(from.down, ids[at], shape, out);
      sums[2 * at] = st::checksum64(out, shape.gate_bytes());
      sums[2 * at + 1] = st::checksum64(out + shape.gate_bytes(), shape.bytes() - shape.gate_bytes());
    });
    model.model->forget_pages();
  }
  return nb::make_tuple(result, sums);
}

nb::dict expert_counters(const PyRuntime& self) {
  nb::dict result;
  const st::ExpertStore* store = self.runtime.experts();
  if (store == nullptr || !store->offloads()) return result;
  const st::CacheCounters counters = store->counters();
  result["slots"] = store->cache()->slots();
  result["policy"] = std::string(store->cache()->policy());
  result["backend"] = store->reader()->backend();
  result["backend_reason"] = store->reader()->reason();
  result["hits"] = counters.hits;
  result["joined"] = counters.joined;
  result["misses"] = counters.misses;
  result["evictions"] = counters.evictions;
  result["speculated"] = counters.speculated;
  result["speculated_used"] = counters.speculated_used;
  result["speculated_wasted"] = counters.speculated_wasted;
  result["failures"] = counters.failures;
  result["bytes_read"] = counters.bytes_read;
  result["waited_s"] = counters.waited_s;
  return result;
}

nb::tuple sample(PyRuntime& self, st::Sampler& sampler, const LogitRow& logits, std::int64_t top) {
  st::Choice choice;
  {
    const nb::gil_scoped_release release;
    choice = self.runtime.sample(sampler, {logits.data(), logits.shape(0)}, top);
  }
  return nb::make_tuple(choice.id, choice.logprob, choice.top);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The C++ core of runtime_cpu.";
  // Registered first: nanobind asks the newest translator first, and a ModelFileError is an EngineError.
  nb::exception<st::EngineError> engine_error(m, "EngineError");
  nb::exception<st::ModelFileError>(m, "ModelFileError", engine_error.ptr());

  nb::exception<st::TokenizerError>(m, "TokenizerError", PyExc_ValueError);

  nb::class_<st::Vocabulary>(m, "Vocabulary")
      .def_static("of", &vocabulary, nb::arg("tokens"), nb::arg("kinds").none(), nb::arg("merges"))
      .def("__len__", &st::Vocabulary::size)
      .def("token_bytes", &token_bytes, nb::arg("id"))
      .def("tokens_of_kind", &tokens_of_kind, nb::arg("kind"))
      .def("encode", &encode_words, nb::arg("words"))
      .def_prop_ro("longest_token_bytes", &st::Vocabulary::longest);

  nb::class_<PyModel>(m, "Model")
      .def_static("open",
                  [](const std::string& path) {
                    const nb::gil_scoped_release release;
                    return PyModel{st::Model::open(path)};
                  })
      .def("metadata", &metadata, nb::arg("arrays") = true)
      .def("tensors", &tensors)
      .def("vocabulary",
           [](const PyModel& self) {
             const nb::gil_scoped_release release;
             st::Vocabulary made = st::Vocabulary::from_file(self.model->file);
             self.model->forget_pages();
             return made;
           })
      .def_prop_ro("path", [](const PyModel& s) { return s.model->path; })
      .def_prop_ro("warnings", [](const PyModel& s) { return s.model->warnings; })
      .def_prop_ro("hidden", [](const PyModel& s) { return s.model->hyper.hidden; })
      .def_prop_ro("layers", [](const PyModel& s) { return s.model->hyper.layers; })
      .def_prop_ro("heads", [](const PyModel& s) { return s.model->hyper.heads; })
      .def_prop_ro("kv_heads", [](const PyModel& s) { return s.model->hyper.kv_heads; })
      .def_prop_ro("head_dim", [](const PyModel& s) { return s.model->hyper.head_dim; })
      .def_prop_ro("experts", [](const PyModel& s) { return s.model->hyper.experts; })
      .def_prop_ro("experts_per_token", [](const PyModel& s) { return s.model->hyper.experts_per_token; })
      .def_prop_ro("expert_hidden", [](const PyModel& s) { return s.model->hyper.expert_hidden; })
      .def_prop_ro("vocab_size", [](const PyModel& s) { return s.model->hyper.vocab; })
      .def_prop_ro("context_length", [](const PyModel& s) { return s.model->hyper.context; })
      .def_prop_ro("window", [](const PyModel& s) { return s.model->hyper.window; })
      .def_prop_ro("rope_theta", [](const PyModel& s) { return s.model->hyper.rope_theta; })
      .def_prop_ro("rms_epsilon", [](const PyModel& s) { return s.model->hyper.rms_epsilon; })
      .def_prop_ro(
          "router",
          [](const PyModel& s) {
            return std::string(s.model->hyper.router == st::RouterKind::kSoftmax ? "softmax" : "sigmoid");
          })
      .def_prop_ro("tied_embeddings", [](const PyModel& s) { return s.model->tied; })
      .def_prop_ro("rope_layout", [](const PyModel& s) { return layout(s.model->hyper.rope); })
      .def_prop_ro("sliding_window_layout", [](const PyModel& s) { return layout(s.model->hyper.windowed); })
      .def_prop_ro("file_type",
                   [](const PyModel& s) { return std::string(st::traits_of(s.model->main_type).name); })
      .def_prop_ro("file_bytes", [](const PyModel& s) { return s.model->file_bytes; })
      .def_prop_ro("weight_bytes", [](const PyModel& s) { return s.model->weight_bytes; })
      .def_prop_ro("parameters", [](const PyModel& s) { return s.model->parameters; })
      .def_prop_ro("head_predictor", &head_predictor)
      .def_prop_ro("packed", [](const PyModel& s) { return s.model->packed; })
      .def_prop_ro("expert_bytes", [](const PyModel& s) { return s.model->expert_shape().bytes(); })
      .def("pack_tiles", &pack_tiles, nb::arg("name"), nb::arg("threads") = 1)
      .def("pack_experts", &pack_experts, nb::arg("layer"), nb::arg("ids"), nb::arg("threads") = 1);
  m.def("pack_rows", &pack_rows, nb::arg("rows"), nb::arg("columns"), nb::arg("threads") = 1);
  m.def("checksum64", [](const ConstBytes& data) {
    const nb::gil_scoped_release release;
    return st::checksum64(reinterpret_cast<const std::byte*>(data.data()), data.shape(0));
  });

  nb::class_<st::Plan>(m, "Plan")
      .def_ro("weight_bytes", &st::Plan::weight_bytes)
      .def_ro("expert_bytes", &st::Plan::expert_bytes)
      .def_ro("offload_bytes", &st::Plan::offload_bytes)
      .def_ro("kv_bytes_per_session", &st::Plan::kv_bytes_per_session)
      .def_ro("kv_vector_bytes", &st::Plan::kv_vector_bytes)
      .def_ro("scratch_bytes", &st::Plan::scratch_bytes);
  m.def(
      "plan",
      [](const PyModel& model, int threads, std::int64_t context, const std::string& kv_type,
         std::int64_t chunk, const std::string& kernels, bool offload, bool predict_head) {
        st::RuntimeOptions chosen = options(threads, context, kv_type, kernels, chunk);
        chosen.experts.cache_bytes = offload ? 1 : 0;
        chosen.predict_head = predict_head;
        return st::make_plan(*model.model, chosen);
      },
      nb::arg("model"), nb::arg("threads"), nb::arg("context"), nb::arg("kv_type"), nb::arg("chunk_tokens"),
      nb::arg("kernels"), nb::arg("offload"), nb::arg("predict_head") = false);
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const st::Kernels* kernels : st::available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  nb::class_<PySession>(m, "Session")
      .def_prop_ro("length", [](const PySession& s) { return s.session.length(); })
      .def("tokens", [](const PySession& s) { return s.session.tokens(); })
      .def("take_counters", &take_counters)
      .def_prop_ro("bytes_read", [](const PySession& s) { return s.session.counters.bytes_read; })
      .def("truncate", [](PySession& s, std::int64_t length) { return s.session.truncate(length); });

  nb::class_<PyRuntime>(m, "Runtime")
      .def(
          "__init__",
          [](PyRuntime* self, const PyModel& model, int threads, std::int64_t context,
             const std::string& kv_type, const std::string& kernels, std::int64_t chunk,
             std::uint64_t expert_cache_bytes, const std::string& backend, const std::string& policy,
             bool speculate, bool predict_head) {
            st::RuntimeOptions chosen = options(threads, context, kv_type, kernels, chunk);
            chosen.experts.cache_bytes = expert_cache_bytes;
            chosen.experts.backend = backend;
            if (!policy.empty()) chosen.experts.policy = policy;
            chosen.speculate = speculate;
            chosen.predict_head = predict_head;
            const nb::gil_scoped_release release;
            new (self) PyRuntime{model.model, {model.model, chosen}};
          },
          nb::arg("model"), nb::arg("threads"), nb::arg("context"), nb::arg("kv_type"), nb::arg("kernels"),
          nb::arg("chunk_tokens"), nb::arg("expert_cache_bytes"), nb::arg("reader"), nb::arg("policy"),
          nb::arg("speculate"), nb::arg("predict_head") = false)
      .def("decode", &decode, nb::arg("sessions"), nb::arg("token_ids"), nb::arg("logits"))
      .def("load_all",
           [](PyRuntime& s) {
             const nb::gil_scoped_release release;
             if (s.runtime.experts() != nullptr) s.runtime.experts()->load_all();
           })
      .def("expert_counters", &expert_counters)
      .def("set_head_rows",
           [](PyRuntime& s, const std::string& rows) { s.runtime.set_head_rows(st::find_head_rows(rows)); })
      .def("sample", &sample, nb::arg("sampler"), nb::arg("logits"), nb::arg("top_logprobs"))
      .def("new_session",
           [](const PyRuntime& s) {
             return PySession{s.model, st::Session(s.runtime.kv_layout(), s.model->hyper)};
           })
      .def("forward", &forward, nb::arg("session"), nb::arg("token_ids"), nb::arg("logits").none())
      .def_prop_ro("kernels", [](const PyRuntime& s) { return std::string(s.runtime.kernels().name); })
      .def_prop_ro("kv_type",
                   [](const PyRuntime& s) { return std::string(st::name_of(s.runtime.kv_layout().type)); })
      .def_prop_ro("threads", [](const PyRuntime& s) { return s.runtime.threads(); });

  nb::class_<st::Sampler>(m, "Sampler")
      .def("__init__",
           [](st::Sampler* self, std::int64_t vocab, double temperature, std::int64_t top_k, double top_p,
              double min_p, double repetition, double presence, double frequency, std::uint64_t seed,
              const nb::dict& bias) {
             st::SamplerOptions o{temperature, top_k,     top_p, min_p, repetition,
                                  presence,    frequency, seed,  {}};
             for (const auto& [id, value] : bias) {
               o.logit_bias.emplace_back(nb::cast<std::int32_t>(id), nb::cast<float>(value));
             }
             new (self) st::Sampler(vocab, std::move(o));
           })
      .def("observe_prompt",
           [](st::Sampler& s, const std::vector<std::int32_t>& tokens) { s.observe_prompt(tokens); });
}
