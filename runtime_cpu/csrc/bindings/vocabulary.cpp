#include "model/vocabulary.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings/types.hpp"

namespace smallthinker::bindings {
namespace {

// Texts as the bytes of a file: to_text()'s other direction.
std::vector<std::string> to_bytes(const nb::sequence& texts, const char* key) {
  std::vector<std::string> result;
  for (const nb::handle text : texts) {
    PyObject* object = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
    if (object == nullptr) {
      PyErr_Clear();
      throw TokenizerError(std::string(key) + "[" + std::to_string(result.size()) +
                           "] is no text that UTF-8 can hold");
    }
    const auto bytes = nb::steal<nb::bytes>(object);
    result.emplace_back(bytes.c_str(), bytes.size());
  }
  return result;
}

Vocabulary vocabulary(const nb::sequence& tokens, const std::optional<std::vector<std::int64_t>>& kinds,
                      const nb::sequence& merges) {
  const auto texts = to_bytes(tokens, "tokenizer.ggml.tokens");
  const auto lines = to_bytes(merges, "tokenizer.ggml.merges");
  const std::vector<std::string_view> text_views(texts.begin(), texts.end());
  const std::vector<std::string_view> line_views(lines.begin(), lines.end());
  if (!kinds) return {text_views, std::nullopt, line_views};
  return {text_views, *kinds, line_views};
}

nb::bytes token_bytes(const Vocabulary& self, std::int64_t id) {
  if (id < 0 || id >= self.size()) {
    throw TokenizerError("token id " + std::to_string(id) + " is outside the vocabulary of " +
                         std::to_string(self.size()));
  }
  const std::string_view bytes = self.bytes(id);
  return nb::bytes(bytes.data(), bytes.size());
}

// Ids of the tokens of a kind, and their text.
nb::dict tokens_of_kind(const Vocabulary& self, int kind) {
  nb::dict result;
  for (std::int64_t id = 0; id < self.size(); ++id) {
    if (static_cast<int>(self.kind(id)) == kind) result[to_text(self.bytes(id))] = id;
  }
  return result;
}

std::vector<std::int32_t> encode_words(const Vocabulary& self, const std::vector<std::string>& words) {
  const nb::gil_scoped_release release;
  const std::vector<std::string_view> views(words.begin(), words.end());
  std::vector<std::int32_t> ids;
  self.encode(views, ids);
  return ids;
}

std::vector<std::string> byte_alphabet() {
  std::vector<std::string> characters;
  for (int byte = 0; byte < 256; ++byte)
    characters.push_back(byte_character(static_cast<unsigned char>(byte)));
  return characters;
}

}  // namespace

void add_vocabulary(nb::module_& m) {
  nb::exception<TokenizerError>(m, "TokenizerError", PyExc_ValueError);
  nb::enum_<Vocabulary::Kind>(m, "TokenType", nb::is_arithmetic())
      .value("NORMAL", Vocabulary::Kind::kNormal)
      .value("CONTROL", Vocabulary::Kind::kControl)
      .value("USER_DEFINED", Vocabulary::Kind::kUserDefined)
      .value("UNUSED", Vocabulary::Kind::kUnused);
  m.def("byte_alphabet", &byte_alphabet);
  nb::class_<Vocabulary>(m, "Vocabulary")
      .def_static("of", &vocabulary, nb::arg("tokens"), nb::kw_only(), nb::arg("kinds").none(),
                  nb::arg("merges"))
      .def("__len__", &Vocabulary::size)
      .def("token_bytes", &token_bytes, nb::arg("id"))
      .def("tokens_of_kind", &tokens_of_kind, nb::arg("kind"))
      .def("encode", &encode_words, nb::arg("words"))
      .def_prop_ro("longest_token_bytes", &Vocabulary::longest);
}

}  // namespace smallthinker::bindings
