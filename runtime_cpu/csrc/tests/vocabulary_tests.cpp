// Byte-level BPE against merging by the book, and vocabularies that are wrong in every way.
#include "model/vocabulary.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

// GPT-2's character for a byte, in UTF-8: printable ones stand for themselves, the others follow from 256 on.
std::string character_of(int byte) {
  const auto stands_for_itself = [](int b) {
    return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
  };
  int point = byte;
  if (!stands_for_itself(byte)) {
    point = 256;
    for (int b = 0; b < byte; ++b) point += stands_for_itself(b) ? 0 : 1;
  }
  if (point < 0x80) return {static_cast<char>(point)};
  return {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
}

struct Text {
  std::vector<std::string> tokens;
  std::vector<std::int64_t> kinds;
  std::vector<std::string> merges;
  bool says_kinds = true;

  Vocabulary build() const {
    const std::vector<std::string_view> token_views(tokens.begin(), tokens.end());
    const std::vector<std::string_view> merge_views(merges.begin(), merges.end());
    if (!says_kinds) return {token_views, std::nullopt, merge_views};
    return {token_views, kinds, merge_views};
  }
};

Text bytes_only() {
  Text text;
  for (int byte = 0; byte < 256; ++byte) text.tokens.push_back(character_of(byte));
  text.kinds.assign(256, 1);
  return text;
}

// Merges of what is there already, mostly of the few bytes that words are made of.
Text random_text(RandomStream& random, std::size_t merges) {
  Text text = bytes_only();
  std::vector<std::string> parts;
  for (const int byte : {0x61, 0x62, 0x63, 0xE4, 0x20}) parts.push_back(character_of(byte));
  std::set<std::string> known(text.tokens.begin(), text.tokens.end());
  while (text.merges.size() < merges) {
    const std::string& left = parts[random.next() % parts.size()];
    const std::string& right = parts[random.next() % parts.size()];
    const std::string both = left + right;
    const std::string line = left + " " + right;
    if (both.size() > 24 || std::find(text.merges.begin(), text.merges.end(), line) != text.merges.end())
      continue;
    text.merges.push_back(line);
    if (!known.insert(both).second) continue;  // a second way to an old token
    if (random.next() % 16 == 0) {
      text.tokens.push_back("<|" + std::to_string(text.tokens.size()) + "|>");
      text.kinds.push_back(3 + static_cast<std::int64_t>(random.next() % 3));
    }
    text.tokens.push_back(both);
    text.kinds.push_back(1);
    parts.push_back(both);
  }
  return text;
}

std::vector<std::string> merged_by_the_book(const Text& text, const std::string& word) {
  std::vector<std::string> parts;
  for (const char c : word) parts.push_back(character_of(static_cast<unsigned char>(c)));
  for (;;) {
    std::size_t best = text.merges.size();
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = std::find(text.merges.begin(), text.merges.end(), parts[i] + " " + parts[i + 1]);
      const auto rank = static_cast<std::size_t>(found - text.merges.begin());
      if (rank >= best) continue;
      best = rank;
      at = i;
    }
    if (best == text.merges.size()) return parts;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

std::string random_word(RandomStream& random, std::size_t most) {
  constexpr char kLetters[] = {'a', 'b', 'c', static_cast<char>(0xE4), ' '};
  std::string word(random.next() % (most + 1), '\0');
  for (char& c : word)
    c = random.next() % 20 == 0 ? static_cast<char>(random.next()) : kLetters[random.next() % 5];
  return word;
}

std::string spelt(const Vocabulary& vocabulary, std::span<const std::int32_t> ids) {
  std::string text;
  for (const std::int32_t id : ids) text += vocabulary.bytes(id);
  return text;
}

void check_merging() {
  RandomStream random(11);
  for (int round = 0; round < 12; ++round) {
    const Text text = random_text(random, static_cast<std::size_t>(round) * 12);
    const Vocabulary vocabulary = text.build();
    std::map<std::string, std::int32_t> ids;
    for (std::size_t i = 0; i < text.tokens.size(); ++i) {
      if (text.kinds[i] == 1) ids[text.tokens[i]] = static_cast<std::int32_t>(i);
    }
    std::vector<std::string> words;
    std::vector<std::int32_t> expected;
    for (int i = 0; i < 60; ++i) {
      words.push_back(random_word(random, 40));
      for (const std::string& part : merged_by_the_book(text, words.back())) expected.push_back(ids.at(part));
    }
    std::vector<std::int32_t> found;
    const std::vector<std::string_view> views(words.begin(), words.end());
    vocabulary.encode(views, found);
    CHECK(found == expected, "round %d", round);
    for (std::size_t i = 0; i < text.tokens.size(); ++i) {
      if (text.kinds[i] != 1) CHECK(vocabulary.bytes(static_cast<std::int64_t>(i)) == text.tokens[i]);
    }
  }
  // A word as long as a book: a quadratic merge would be seen.
  Text runs = bytes_only();
  std::string longest = "a";
  for (int i = 0; i < 5; ++i) {
    runs.merges.push_back(longest + " " + longest);
    longest += longest;
    runs.tokens.push_back(longest);
    runs.kinds.push_back(1);
  }
  const std::string book(1U << 20U, 'a');
  const std::string_view view = book;
  std::vector<std::int32_t> ids;
  const Vocabulary vocabulary = runs.build();
  vocabulary.encode({&view, 1}, ids);
  CHECK(ids == std::vector<std::int32_t>(book.size() / 32, 260));
  CHECK(vocabulary.longest() == 32);
}

template <typename Change>
void refuses(const char* reason, Change change) {
  RandomStream random(5);
  Text text = random_text(random, 20);
  change(text);
  std::string message;
  try {
    text.build();
  } catch (const TokenizerError& error) {
    message = error.what();
  }
  CHECK(message.find(reason) != std::string::npos, "wanted '%s', got '%s'", reason, message.c_str());
}

void check_refusals() {
  refuses("token_type has 3 entries", [](Text& t) { t.kinds.resize(3); });
  refuses("token_type has 0 entries", [](Text& t) { t.kinds.clear(); });
  refuses("token 7 has type 6", [](Text& t) { t.kinds[7] = 6; });
  refuses("special token 9 is empty", [](Text& t) { t.tokens[9].clear(), t.kinds[9] = 3; });
  refuses("special token 258 is empty or repeats another: '<|x|>'", [](Text& t) {
    t.tokens[257] = t.tokens[258] = "<|x|>";
    t.kinds[257] = t.kinds[258] = 4;
  });
  refuses("lacks 1 of the 256 bytes, first 0x0a", [](Text& t) { t.tokens[10] = "zzzz"; });
  refuses("occurs twice, as 65 and 66", [](Text& t) { t.tokens[66] = t.tokens[65]; });
  refuses("token 66 ('a\u4e2d') has the character '\u4e2d'", [](Text& t) { t.tokens[66] = "a\u4e2d"; });
  refuses("token 66 ('a?') has the character '?'", [](Text& t) { t.tokens[66] = "a\xC4"; });
  refuses("token 66 (' ') has the character ' '", [](Text& t) { t.tokens[66] = " "; });
  for (const char* line : {"", "ab", " a", "a ", "a  b", "a b c", " "})
    refuses("merges[20] is '", [&](Text& t) { t.merges.push_back(line); });
  refuses("'zz' of the merge 'zz a' is no token", [](Text& t) { t.merges.push_back("zz a"); });
  refuses("'\u4e2d' of the merge 'a \u4e2d' is no token", [](Text& t) { t.merges.push_back("a \u4e2d"); });
  refuses("'zz' of the merge 'z z' is no token", [](Text& t) { t.merges.push_back("z z"); });
  refuses("makes the special token '<|x|>'", [](Text& t) {
    t.tokens.insert(t.tokens.end(), {"<|x|>", "<|x"});
    t.kinds.insert(t.kinds.end(), {3, 1});
    t.merges.push_back("<|x |>");
  });
}

// Whatever the tables hold, they are refused, or text comes back whole.
void check_bent_tables() {
  RandomStream random(23);
  int accepted = 0;
  constexpr int kCases = 3000;
  for (int i = 0; i < kCases; ++i) {
    Text text = random_text(random, random.next() % 30);
    for (std::uint64_t n = random.next() % 3; n > 0; --n) {
      const auto some = [&](auto& items) -> auto& { return items[random.next() % items.size()]; };
      switch (random.next() % 6) {
        case 0:
          some(text.tokens) = random_word(random, 6);
          break;
        case 1:
          some(text.kinds) = static_cast<std::int64_t>(random.next() % 8);
          break;
        case 2:
          text.merges.push_back(random_word(random, 6));
          break;
        case 3:
          if (!text.merges.empty()) std::swap(some(text.merges), some(text.merges));
          break;
        case 4:
          text.tokens.push_back(some(text.tokens) + some(text.tokens));
          text.kinds.push_back(1);
          break;
        default:
          text.says_kinds = false;
          break;
      }
    }
    try {
      const Vocabulary vocabulary = text.build();
      ++accepted;
      const std::string word = random_word(random, 30);
      const std::string_view view = word;
      std::vector<std::int32_t> ids;
      vocabulary.encode({&view, 1}, ids);
      CHECK(spelt(vocabulary, ids) == word);
    } catch (const TokenizerError&) {
    }
  }
  CHECK(accepted > kCases / 10 && accepted < kCases - kCases / 10, "%d accepted", accepted);
}

void check_files() {
  const auto message = [](const std::function<void(Container&)>& fill) {
    Container file;
    fill(file);
    const Bytes bytes = file.write();
    try {
      Vocabulary::from_file(GgufFile::parse(bytes));
    } catch (const TokenizerError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const Text text = bytes_only();
  const std::string tokens = "tokenizer.ggml.tokens", merges = "tokenizer.ggml.merges";
  CHECK(message([&](Container&) {}).find("has no tokenizer.ggml.tokens") != std::string::npos);
  CHECK(message([&](Container& f) { f.add_u32(tokens, 1); }).find("array of text") != std::string::npos);
  CHECK(message([&](Container& f) { f.add_i32s(tokens, {1}); }).find("array of text") != std::string::npos);
  CHECK(message([&](Container& f) { f.add_texts(tokens, text.tokens); }).find("has no " + merges) !=
        std::string::npos);
  const auto whole = [&](Container& f) {
    f.add_texts(tokens, text.tokens);
    f.add_i32s(merges, {});  // how an empty list is written
  };
  CHECK(message(whole).empty());
  CHECK(message([&](Container& f) {
          whole(f);
          f.add_text("tokenizer.ggml.token_type", "normal");
        }).find("token_type") != std::string::npos);
}

}  // namespace

void test_vocabulary() {
  check_merging();
  check_refusals();
  check_bent_tables();
  check_files();
  std::printf("vocabulary: ok\n");
}
