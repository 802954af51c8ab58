// A byte-level BPE vocabulary: what bytes an id stands for, and the merges that make ids out of single bytes.
//
//   const Vocabulary vocabulary = Vocabulary::from_file(file);    // throws TokenizerError
//   vocabulary.encode(words, ids);                                // of a text cut by the pre-tokenizer
//
// The tables are made from the file's own text, with no object per token: a small device opens 150,000 tokens
// in a tenth of a second and keeps 7 MB of them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "model/gguf.hpp"

namespace smallthinker {

// The metadata describe no tokenizer that this engine can run exactly; becomes Python's TokenizerError.
class TokenizerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// GPT-2's printable character for a byte, in UTF-8.
std::string byte_character(unsigned char byte);

class Vocabulary {
 public:
  // tokenizer.ggml.token_type, as llama.cpp's llama_token_type. Byte-level BPE has no others.
  enum class Kind : std::uint8_t { kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5 };

  // `tokens` and both parts of a merge ("left right") are spelt in GPT-2's characters for bytes; tokens of
  // other kinds than normal are what they say. Without `kinds` all are normal.
  Vocabulary(std::span<const std::string_view> tokens, std::optional<std::span<const std::int64_t>> kinds,
             std::span<const std::string_view> merges);
  static Vocabulary from_file(const GgufFile& file);

  std::int64_t size() const { return static_cast<std::int64_t>(kinds_.size()); }
  Kind kind(std::int64_t id) const { return kinds_[static_cast<std::size_t>(id)]; }
  std::string_view bytes(std::int64_t id) const {
    const auto at = static_cast<std::size_t>(id);
    return std::string_view(text_).substr(ends_[at], ends_[at + 1] - ends_[at]);
  }
  std::size_t longest() const;  // token, in bytes

  // Appends the ids of `words`, each merged by itself: of its adjacent pairs always the one that was learnt
  // first, of equal ones the leftmost (Sennrich et al. 2016; as the `tokenizers` library does).
  void encode(std::span<const std::string_view> words, std::vector<std::int32_t>& ids) const;

 private:
  struct Merge {
    std::uint64_t pair;
    std::uint32_t rank;
    std::int32_t id;
  };

  std::int32_t find(std::string_view bytes) const;  // a normal token, or -1
  const Merge* find_merge(std::int32_t left, std::int32_t right) const;
  void add_tokens(std::span<const std::string_view> tokens,
                  std::optional<std::span<const std::int64_t>> kinds);
  void add_merges(std::span<const std::string_view> merges, std::span<const std::string_view> tokens);

  std::string text_;
  std::vector<std::uint32_t> ends_;  // of tokens in text_, after a 0
  std::vector<Kind> kinds_;
  std::vector<std::int32_t> ids_by_bytes_;  // open addressing, -1: free
  std::vector<Merge> merges_;               // open addressing, by pair
  std::int32_t byte_ids_[256];
};

}  // namespace smallthinker
