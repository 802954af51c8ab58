#include "model/model.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/types.hpp"
#include "model/vocabulary.hpp"

namespace smallthinker::bindings {
namespace {

nb::object to_python(const GgufArray& array) {
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

nb::object to_python(const GgufValue& value) {
  if (const auto* natural = std::get_if<std::uint64_t>(&value)) return nb::int_(*natural);
  if (const auto* whole = std::get_if<std::int64_t>(&value)) return nb::int_(*whole);
  if (const auto* real = std::get_if<double>(&value)) return nb::float_(*real);
  if (const auto* truth = std::get_if<bool>(&value)) return nb::bool_(*truth);
  if (const auto* text = std::get_if<std::string_view>(&value)) return to_text(*text);
  return to_python(std::get<GgufArray>(value));
}

nb::dict metadata(const PyModel& self, bool arrays) {
  nb::dict result;
  for (const auto& [key, value] : self.model->file.values()) {
    if (arrays || !std::holds_alternative<GgufArray>(value)) result[to_text(key)] = to_python(value);
  }
  return result;
}

nb::list tensors(const PyModel& self) {
  nb::list result;
  for (const GgufTensor& tensor : self.model->file.tensors()) {
    nb::list shape;
    for (std::uint32_t i = 0; i < tensor.dimensions; ++i) shape.append(tensor.shape[i]);
    result.append(nb::make_tuple(to_text(tensor.name), traits_of(tensor.type).name, nb::tuple(shape),
                                 tensor.offset, tensor.bytes));
  }
  return result;
}

nb::list layout(const std::vector<bool>& entries) {
  nb::list result;
  for (const bool entry : entries) result.append(nb::int_(entry ? 1 : 0));
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

}  // namespace

void add_model(nb::module_& m) {
  nb::class_<PyModel>(m, "Model")
      .def_static(
          "open",
          [](const std::string& path) {
            const nb::gil_scoped_release release;
            return PyModel{Model::open(path)};
          },
          nb::arg("path"))
      .def("metadata", &metadata, nb::arg("arrays") = true)
      .def("tensors", &tensors)
      .def("vocabulary",
           [](const PyModel& self) {
             const nb::gil_scoped_release release;
             Vocabulary made = Vocabulary::from_file(self.model->file);
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
            return std::string(s.model->hyper.router == RouterKind::kSoftmax ? "softmax" : "sigmoid");
          })
      .def_prop_ro("router_lead", [](const PyModel& s) { return s.model->hyper.router_lead; })
      .def_prop_ro("tied_embeddings", [](const PyModel& s) { return s.model->tied; })
      .def_prop_ro("rope_layout", [](const PyModel& s) { return layout(s.model->hyper.rope); })
      .def_prop_ro("sliding_window_layout", [](const PyModel& s) { return layout(s.model->hyper.windowed); })
      .def_prop_ro("file_type",
                   [](const PyModel& s) { return std::string(traits_of(s.model->main_type).name); })
      .def_prop_ro("file_bytes", [](const PyModel& s) { return s.model->file_bytes; })
      .def_prop_ro("weight_bytes", [](const PyModel& s) { return s.model->weight_bytes; })
      .def_prop_ro("parameters", [](const PyModel& s) { return s.model->parameters; })
      .def_prop_ro("head_predictor", &head_predictor)
      .def_prop_ro("packed", [](const PyModel& s) { return s.model->packed; })
      .def_prop_ro("expert_bytes", [](const PyModel& s) { return s.model->expert_shape().bytes(); });
}

}  // namespace smallthinker::bindings
