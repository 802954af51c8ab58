// The Python module runtime_cpu._core. Its types are described in runtime_cpu/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>

#include "model.hpp"
#include "runtime.hpp"
#include "sampler.hpp"

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

// Text of a file need not be UTF-8; what is not comes back as lone surrogates.
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

nb::dict metadata(const PyModel& self) {
  nb::dict result;
  for (const auto& [key, value] : self.model->file.values()) result[to_text(key)] = to_python(value);
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
  return result;
}

st::RuntimeOptions options(int threads, std::int64_t context, const std::string& kv_type,
                           const std::string& kernels, std::int64_t chunk) {
  if (threads < 1 || threads > 1024 || context < 1 || chunk < 1 || chunk > (1 << 16)) {
    throw st::EngineError("threads, context and chunk_tokens have to be positive and sensible");
  }
  return {threads, context, chunk, kernels, kv_type};
}

nb::tuple sample(st::Sampler& self, const LogitRow& logits, std::int64_t top) {
  st::Choice choice;
  {
    const nb::gil_scoped_release release;
    choice = self.sample({logits.data(), logits.shape(0)}, top);
  }
  return nb::make_tuple(choice.id, choice.logprob, choice.top);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The C++ core of runtime_cpu.";
  // Registered first: nanobind asks the newest translator first, and a ModelFileError is an EngineError.
  nb::exception<st::EngineError> engine_error(m, "EngineError");
  nb::exception<st::ModelFileError>(m, "ModelFileError", engine_error.ptr());

  nb::class_<PyModel>(m, "Model")
      .def_static("open",
                  [](const std::string& path) {
                    const nb::gil_scoped_release release;
                    return PyModel{st::Model::open(path)};
                  })
      .def("metadata", &metadata)
      .def("tensors", &tensors)
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
            return std::string(s.model->hyper.router == st::Router::kSoftmax ? "softmax" : "sigmoid");
          })
      .def_prop_ro("tied_embeddings", [](const PyModel& s) { return s.model->tied; })
      .def_prop_ro("rope_layout", [](const PyModel& s) { return layout(s.model->hyper.rope); })
      .def_prop_ro("sliding_window_layout", [](const PyModel& s) { return layout(s.model->hyper.windowed); })
      .def_prop_ro("file_type",
                   [](const PyModel& s) { return std::string(st::traits_of(s.model->main_type).name); })
      .def_prop_ro("file_bytes", [](const PyModel& s) { return s.model->file_bytes; })
      .def_prop_ro("weight_bytes", [](const PyModel& s) { return s.model->weight_bytes; })
      .def_prop_ro("parameters", [](const PyModel& s) { return s.model->parameters; });

  nb::class_<st::Plan>(m, "Plan")
      .def_ro("weight_bytes", &st::Plan::weight_bytes)
      .def_ro("kv_bytes_per_session", &st::Plan::kv_bytes_per_session)
      .def_ro("scratch_bytes", &st::Plan::scratch_bytes);
  m.def("plan", [](const PyModel& model, int threads, std::int64_t context, const std::string& kv_type,
                   std::int64_t chunk) {
    return st::make_plan(*model.model, options(threads, context, kv_type, "auto", chunk));
  });
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const st::Kernels* kernels : st::available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  nb::class_<PySession>(m, "Session")
      .def_prop_ro("length", [](const PySession& s) { return s.session.length(); })
      .def("tokens", [](const PySession& s) { return s.session.tokens(); })
      .def("take_counters", &take_counters)
      .def("truncate", [](PySession& s, std::int64_t length) { return s.session.truncate(length); });

  nb::class_<PyRuntime>(m, "Runtime")
      .def("__init__",
           [](PyRuntime* self, const PyModel& model, int threads, std::int64_t context,
              const std::string& kv_type, const std::string& kernels, std::int64_t chunk) {
             new (self)
                 PyRuntime{model.model, {model.model, options(threads, context, kv_type, kernels, chunk)}};
           })
      .def("new_session",
           [](const PyRuntime& s) {
             return PySession{s.model, st::Session(s.runtime.kv_layout(), s.model->hyper)};
           })
      .def("forward", &forward, nb::arg("session"), nb::arg("token_ids"), nb::arg("logits").none())
      .def_prop_ro("kernels", [](const PyRuntime& s) { return std::string(s.runtime.kernels().name); })
      .def_prop_ro("kv_type",
                   [](const PyRuntime& s) { return std::string(s.runtime.kv_layout().half ? "f16" : "f32"); })
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
           [](st::Sampler& s, const std::vector<std::int32_t>& tokens) { s.observe_prompt(tokens); })
      .def("sample", &sample);
}
