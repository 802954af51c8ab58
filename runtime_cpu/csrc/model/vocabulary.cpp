#include "model/vocabulary.hpp"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <functional>
#include <limits>
#include <set>
#include <system_error>

#include "model/mix64.hpp"

namespace smallthinker {
namespace {

constexpr std::uint64_t kNoPair = ~std::uint64_t{0};
constexpr std::size_t kCharacters = 324;  // 256 and the 68 bytes that are not printable

// GPT-2's printable character for each byte, from the character's side; -1 where it stands for none.
constexpr std::array<std::int16_t, kCharacters> byte_of_character() {
  std::array<std::int16_t, kCharacters> bytes{};
  bytes.fill(-1);
  std::size_t next = 256;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte < 127) || (byte >= 161 && byte < 173) || (byte >= 174 && byte < 256);
    bytes[printable ? byte : next++] = static_cast<std::int16_t>(byte);
  }
  return bytes;
}
constexpr auto kByteOf = byte_of_character();

// Appends the bytes that `spelt` stands for. Returns npos, or the offset of the first character that stands
// for no byte.
std::size_t spell(std::string_view spelt, std::string& out) {
  for (std::size_t i = 0; i < spelt.size();) {
    const auto first = static_cast<unsigned char>(spelt[i]);
    std::size_t character = first;
    std::size_t length = 1;
    if (first >= 0x80) {  // all 324 characters have one byte or two
      const auto second =
          i + 1 < spelt.size() ? static_cast<unsigned char>(spelt[i + 1]) : static_cast<unsigned char>(0);
      if (first < 0xC2 || first > 0xC5 || (second & 0xC0U) != 0x80U) return i;
      character = (first & 0x1FU) << 6U | (second & 0x3FU);
      length = 2;
    }
    if (character >= kCharacters || kByteOf[character] < 0) return i;
    out.push_back(static_cast<char>(kByteOf[character]));
    i += length;
  }
  return std::string_view::npos;
}

// The character of UTF-8 text that begins at `at`.
std::string_view character_at(std::string_view text, std::size_t at) {
  std::size_t end = at + 1;
  while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) ++end;
  return text.substr(at, end - at);
}

std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U |
         static_cast<std::uint32_t>(right);
}

// 64 bits that nobody knows beforehand. Not std::random_device: libstdc++'s, linked into a wheel, asks for
// glibc 2.36.
std::uint64_t drawn_seed() {
  std::uint64_t seed = 0;
  if (getentropy(&seed, sizeof seed) != 0) {
    throw std::system_error(errno, std::generic_category(), "no random bits");
  }
  return seed;
}

// Where a search in a hash table of 2^k entries begins. The seed is random, so that no file can be made whose
// entries all collide, which would take minutes to open.
std::size_t place(std::uint64_t hash, std::size_t size) {
  static const std::uint64_t seed = drawn_seed();
  return static_cast<std::size_t>(mix64(hash ^ seed)) & (size - 1);
}

std::size_t table_size(std::size_t entries) { return std::bit_ceil(entries + entries / 2 + 1); }

std::span<const std::string_view> texts_of(const GgufFile& file, std::string_view key) {
  const GgufValue* const value = file.find(key);
  if (value == nullptr)
    throw TokenizerError("the file has no " + std::string(key) + "; export it with its tokenizer");
  const auto* const array = std::get_if<GgufArray>(value);
  if (array == nullptr || (!array->is_text && array->size() != 0))
    throw TokenizerError(std::string(key) + " should be an array of text");
  return array->texts;
}

}  // namespace

std::string byte_character(unsigned char byte) {
  const auto character =
      static_cast<std::size_t>(std::find(kByteOf.begin(), kByteOf.end(), byte) - kByteOf.begin());
  if (character < 0x80) return {static_cast<char>(character)};
  return {static_cast<char>(0xC0U | character >> 6U), static_cast<char>(0x80U | (character & 0x3FU))};
}

Vocabulary::Vocabulary(std::span<const std::string_view> tokens,
                       std::optional<std::span<const std::int64_t>> kinds,
                       std::span<const std::string_view> merges) {
  if (kinds && kinds->size() != tokens.size()) {
    throw TokenizerError("tokenizer.ggml.token_type has " + std::to_string(kinds->size()) +
                         " entries, tokenizer.ggml.tokens has " + std::to_string(tokens.size()));
  }
  add_tokens(tokens, kinds);
  add_merges(merges, tokens);
}

Vocabulary Vocabulary::from_file(const GgufFile& file) {
  const auto tokens = texts_of(file, "tokenizer.ggml.tokens");
  const auto merges = texts_of(file, "tokenizer.ggml.merges");
  const GgufArray* kinds = nullptr;
  try {
    kinds = file.integers("tokenizer.ggml.token_type");
  } catch (const ModelFileError& error) {
    throw TokenizerError(error.what());
  }
  if (kinds == nullptr) return {tokens, std::nullopt, merges};
  return {tokens, kinds->integers, merges};
}

void Vocabulary::add_tokens(std::span<const std::string_view> tokens,
                            std::optional<std::span<const std::int64_t>> kinds) {
  std::size_t bytes = 0;
  for (const std::string_view token : tokens) bytes += token.size();
  if (tokens.size() > std::numeric_limits<std::int32_t>::max() ||
      bytes > std::numeric_limits<std::uint32_t>::max()) {
    throw TokenizerError("tokenizer.ggml.tokens has " + std::to_string(tokens.size()) + " tokens of " +
                         std::to_string(bytes) + " bytes, more than this engine can hold");
  }
  text_.reserve(bytes);
  ends_.reserve(tokens.size() + 1);
  ends_.push_back(0);
  kinds_.reserve(tokens.size());
  ids_by_bytes_.assign(table_size(tokens.size()), -1);
  std::set<std::string_view> special;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string_view token = tokens[i];
    const std::int64_t kind = kinds ? (*kinds)[i] : 1;
    if (kind != 1 && kind != 3 && kind != 4 && kind != 5) {
      throw TokenizerError("token " + std::to_string(i) + " has type " + std::to_string(kind) +
                           "; byte-level BPE knows 1, 3, 4 and 5");
    }
    kinds_.push_back(static_cast<Kind>(kind));
    if (kinds_.back() != Kind::kNormal) {
      if (kinds_.back() != Kind::kUnused && (token.empty() || !special.insert(token).second)) {
        throw TokenizerError("special token " + std::to_string(i) +
                             " is empty or repeats another: " + printable(token));
      }
      text_ += token;
      ends_.push_back(static_cast<std::uint32_t>(text_.size()));
      continue;
    }
    const std::size_t wrong = spell(token, text_);
    if (wrong != std::string_view::npos) {
      throw TokenizerError("token " + std::to_string(i) + " (" + printable(token) + ") has the character " +
                           printable(character_at(token, wrong)) + ", which stands for no byte");
    }
    ends_.push_back(static_cast<std::uint32_t>(text_.size()));
    const std::string_view spelt = this->bytes(static_cast<std::int64_t>(i));
    std::size_t at = place(std::hash<std::string_view>{}(spelt), ids_by_bytes_.size());
    for (; ids_by_bytes_[at] >= 0; at = (at + 1) & (ids_by_bytes_.size() - 1)) {
      if (this->bytes(ids_by_bytes_[at]) == spelt) {
        throw TokenizerError("token " + printable(token) + " occurs twice, as " +
                             std::to_string(ids_by_bytes_[at]) + " and " + std::to_string(i));
      }
    }
    ids_by_bytes_[at] = static_cast<std::int32_t>(i);
  }
  int missing = 0;
  int first = 0;
  for (int byte = 255; byte >= 0; --byte) {
    const auto character = static_cast<char>(byte);
    byte_ids_[byte] = find({&character, 1});
    if (byte_ids_[byte] >= 0) continue;
    ++missing;
    first = byte;
  }
  if (missing > 0) {
    constexpr char kDigits[] = "0123456789abcdef";
    throw TokenizerError("the vocabulary lacks " + std::to_string(missing) + " of the 256 bytes, first 0x" +
                         kDigits[first / 16] + kDigits[first % 16]);
  }
}

void Vocabulary::add_merges(std::span<const std::string_view> merges,
                            std::span<const std::string_view> tokens) {
  merges_.assign(table_size(merges.size()), {kNoPair, 0, -1});
  std::string spelt;
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string_view line = merges[rank];
    const std::size_t cut = line.find(' ');
    if (cut == std::string_view::npos || cut == 0 || cut + 1 == line.size() ||
        line.find(' ', cut + 1) != std::string_view::npos) {
      throw TokenizerError("tokenizer.ggml.merges[" + std::to_string(rank) + "] is " + printable(line) +
                           "; it should be two tokens and a space");
    }
    const std::string_view left = line.substr(0, cut);
    const std::string_view right = line.substr(cut + 1);
    spelt.clear();
    const bool left_spelt = spell(left, spelt) == std::string_view::npos;
    const std::size_t middle = spelt.size();
    const bool spelt_out = left_spelt && spell(right, spelt) == std::string_view::npos;
    const std::string_view both = spelt;
    const std::int32_t left_id = left_spelt ? find(both.substr(0, middle)) : -1;
    const std::int32_t right_id = spelt_out ? find(both.substr(middle)) : -1;
    const std::int32_t id = spelt_out ? find(both) : -1;
    if (left_id < 0 || right_id < 0 || id < 0) {
      const std::string text = std::string(left) + std::string(right);
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (kinds_[i] != Kind::kNormal && kinds_[i] != Kind::kUnused && tokens[i] == text) {
          throw TokenizerError("the merge " + printable(left) + " " + printable(right) +
                               " makes the special token " + printable(text));
        }
      }
      const std::string_view lacking = left_id < 0 ? left : right_id < 0 ? right : std::string_view(text);
      throw TokenizerError("tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: " + printable(lacking) +
                           " of the merge " + printable(line) + " is no token");
    }
    const std::uint64_t pair = pair_of(left_id, right_id);
    std::size_t at = place(pair, merges_.size());
    while (merges_[at].pair != kNoPair && merges_[at].pair != pair) at = (at + 1) & (merges_.size() - 1);
    merges_[at] = {pair, static_cast<std::uint32_t>(rank), id};
  }
}

std::size_t Vocabulary::longest() const {
  std::size_t most = 0;
  for (std::int64_t id = 0; id < size(); ++id) most = std::max(most, bytes(id).size());
  return most;
}

std::int32_t Vocabulary::find(std::string_view bytes) const {
  std::size_t at = place(std::hash<std::string_view>{}(bytes), ids_by_bytes_.size());
  for (; ids_by_bytes_[at] >= 0; at = (at + 1) & (ids_by_bytes_.size() - 1)) {
    if (this->bytes(ids_by_bytes_[at]) == bytes) return ids_by_bytes_[at];
  }
  return -1;
}

const Vocabulary::Merge* Vocabulary::find_merge(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair = pair_of(left, right);
  std::size_t at = place(pair, merges_.size());
  for (; merges_[at].pair != kNoPair; at = (at + 1) & (merges_.size() - 1)) {
    if (merges_[at].pair == pair) return &merges_[at];
  }
  return nullptr;
}

void Vocabulary::encode(std::span<const std::string_view> words, std::vector<std::int32_t>& ids) const {
  struct Symbol {
    std::int32_t id;  // -1: part of the one before
    std::size_t before, after;
  };
  struct Candidate {
    std::uint32_t rank;
    std::int32_t id;
    std::size_t at;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  constexpr std::size_t kNone = std::string_view::npos;
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  const std::greater<> later;
  const auto offer = [&](std::size_t at) {
    const Symbol& symbol = symbols[at];
    if (symbol.after == kNone) return;
    const Merge* const merge = find_merge(symbol.id, symbols[symbol.after].id);
    if (merge == nullptr) return;
    heap.push_back({merge->rank, merge->id, at});
    std::push_heap(heap.begin(), heap.end(), later);
  };
  for (const std::string_view word : words) {
    symbols.clear();
    for (std::size_t i = 0; i < word.size(); ++i) {
      symbols.push_back({byte_ids_[static_cast<unsigned char>(word[i])], i == 0 ? kNone : i - 1,
                         i + 1 == word.size() ? kNone : i + 1});
    }
    for (std::size_t i = 0; i < word.size(); ++i) offer(i);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      const Candidate best = heap.back();
      heap.pop_back();
      Symbol& symbol = symbols[best.at];
      if (symbol.id < 0 || symbol.after == kNone) continue;
      Symbol& next = symbols[symbol.after];
      const Merge* const merge = find_merge(symbol.id, next.id);
      if (merge == nullptr || merge->id != best.id) continue;  // one of the two was merged meanwhile
      symbol.id = best.id;
      next.id = -1;
      symbol.after = next.after;
      if (symbol.after != kNone) symbols[symbol.after].before = best.at;
      if (symbol.before != kNone) offer(symbol.before);
      offer(best.at);
    }
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      if (symbols[i].id >= 0) ids.push_back(symbols[i].id);
    }
  }
}

}  // namespace smallthinker
