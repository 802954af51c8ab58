// The Python module runtime_cpu._core.
#include <nanobind/nanobind.h>

#include "bindings/types.hpp"
#include "model/tensor.hpp"

namespace smallthinker::bindings {

nb::object to_text(std::string_view text) {
  PyObject* object =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape");
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

}  // namespace smallthinker::bindings

NB_MODULE(_core, m) {
  using namespace smallthinker;
  m.doc() = "The C++ core of runtime_cpu.";
  // Registered first: nanobind asks the newest translator first, and a ModelFileError is an EngineError.
  nanobind::exception<EngineError> engine_error(m, "EngineError");
  nanobind::exception<ModelFileError>(m, "ModelFileError", engine_error.ptr());
  bindings::add_vocabulary(m);
  bindings::add_model(m);
  bindings::add_packing(m);
  bindings::add_runtime(m);
}
