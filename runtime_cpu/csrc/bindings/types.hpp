// What the files of the Python module runtime_cpu._core share. Its types are described in
// runtime_cpu/_core.pyi.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string_view>

#include "forward/runtime.hpp"
#include "forward/session.hpp"
#include "model/model.hpp"

namespace smallthinker::bindings {

namespace nb = nanobind;

struct PyModel {
  std::shared_ptr<const Model> model;
};

struct PySession {
  std::shared_ptr<const Model> model;
  Session session;
};

struct PyRuntime {
  std::shared_ptr<const Model> model;
  Runtime runtime;
};

// Text of a file need not be UTF-8; other bytes become lone surrogates.
nb::object to_text(std::string_view text);

// Each adds its file's names to the module.
void add_model(nb::module_& m);
void add_packing(nb::module_& m);
void add_runtime(nb::module_& m);
void add_vocabulary(nb::module_& m);

}  // namespace smallthinker::bindings
