// The GGUF reader against damaged files: named damages with the message they must give, and a fuzzer that
// mutates the structure (counts, lengths, types, offsets, shapes, values) as well as raw bytes.
#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include "model/model.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"
#include "tests/packed_builder.hpp"
#include "tests/short_run.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

// Exactly as many bytes as the file has, so that AddressSanitizer sees one too far.
struct Exact {
  explicit Exact(const Bytes& bytes) : size(bytes.size()), data(new std::byte[bytes.size()]) {
    std::copy(bytes.begin(), bytes.end(), data.get());
  }
  std::span<const std::byte> span() const { return {data.get(), size}; }
  std::size_t size;
  std::unique_ptr<std::byte[]> data;
};

std::string refusal(const Bytes& bytes) {
  const Exact exact(bytes);
  try {
    Model::from_bytes(exact.span());
  } catch (const ModelFileError& error) {
    return error.what();
  }
  return "";
}

template <typename Change>
void refuses(const char* reason, Change change, Shape shape = {}) {
  Container file = make_container(shape, 3);
  change(file);
  const std::string message = refusal(file.write());
  CHECK(message.find(reason) != std::string::npos, "wanted '%s', got '%s'", reason, message.c_str());
}

Value& value_of(Container& file, const std::string& key) {
  for (Value& value : file.values) {
    if (value.key == key) return value;
  }
  CHECK(false, "no key %s", key.c_str());
  std::abort();
}

void set_u32(Container& file, const std::string& key, std::uint32_t number,
             const std::string& prefix = "smallthinker.") {
  Value& value = value_of(file, prefix + key);
  value.payload.clear();
  value.type = 4;
  put(value.payload, number);
}

void remove_value(Container& file, const std::string& key) {
  std::erase_if(file.values, [&](const Value& value) { return value.key == "smallthinker." + key; });
}

constexpr std::array<std::uint64_t, 16> kHostile = {0,
                                                    1,
                                                    2,
                                                    3,
                                                    31,
                                                    33,
                                                    255,
                                                    65536,
                                                    0x7FFFFFFF,
                                                    0x80000000,
                                                    0xFFFFFFFF,
                                                    0x100000000,
                                                    1ULL << 40U,
                                                    1ULL << 62U,
                                                    0x7FFFFFFFFFFFFFFF,
                                                    0xFFFFFFFFFFFFFFFF};

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::uint64_t below(std::uint64_t limit) { return limit == 0 ? 0 : random_.next() % limit; }
  std::uint64_t hostile() {
    return below(4) == 0 ? random_.next() >> below(64) : kHostile[below(kHostile.size())];
  }

  void mutate(Container& file) {
    switch (below(16)) {
      case 0:
        file.magic ^= 1U << below(32);
        break;
      case 1:
        file.version = static_cast<std::uint32_t>(hostile());
        break;
      case 2:
        file.extra_values = hostile();
        break;
      case 3:
        file.extra_tensors = hostile();
        break;
      case 4:
        some(file.values).type = static_cast<std::uint32_t>(below(2) == 0 ? below(14) : hostile());
        break;
      case 5:
        overwrite(some(file.values).payload, 4);
        break;
      case 6:
        overwrite(some(file.values).payload, 8);
        break;
      case 7: {
        Value& value = some(file.values);
        value.payload.resize(below(value.payload.size() + 9));
        break;
      }
      case 8:
        std::swap(some(file.values).key, some(file.values).key);
        break;
      case 9:
        file.values.erase(file.values.begin() + static_cast<std::ptrdiff_t>(below(file.values.size())));
        break;
      case 10:
        some(file.tensors).offset = below(2) == 0 ? hostile() : some(file.tensors).offset + 32 * below(9);
        break;
      case 11: {
        auto& shape = some(file.tensors).shape;
        if (!shape.empty()) shape[below(shape.size())] = hostile();
        break;
      }
      case 12:
        some(file.tensors).shape.resize(below(6), hostile());
        break;
      case 13:
        some(file.tensors).type = static_cast<std::uint32_t>(below(2) == 0 ? below(32) : hostile());
        break;
      case 14:
        std::swap(some(file.tensors).name, some(file.tensors).name);
        break;
      default:
        file.add_u32("general.alignment", static_cast<std::uint32_t>(hostile()));
        break;
    }
    if (file.values.empty()) file.add_u32("a", 1);
  }

  void mutate(Bytes& bytes) {
    switch (below(4)) {
      case 0:
        bytes.resize(below(bytes.size() + 1));
        break;
      case 1:
        for (std::uint64_t i = below(8); !bytes.empty() && i > 0; --i) {
          bytes[below(bytes.size())] = static_cast<std::byte>(below(256));
        }
        break;
      case 2:
        overwrite(bytes, 8, 1024);
        break;  // somewhere in the metadata
      default:
        break;
    }
  }

 private:
  template <typename T>
  T& some(std::vector<T>& items) {
    return items[below(items.size())];
  }

  void overwrite(Bytes& bytes, std::size_t width, std::size_t range = SIZE_MAX) {
    if (bytes.size() < width) return;
    const std::uint64_t number = hostile();
    std::memcpy(bytes.data() + below(std::min(bytes.size(), range) - width + 1), &number, width);
  }

  RandomStream random_;
};

}  // namespace

void test_reader() {
  const Shape shape;
  const Bytes good = make_container(shape, 3).write();
  CHECK(refusal(good).empty(), "%s", refusal(good).c_str());
  for (std::size_t size = 0; size < good.size(); size += size < 2048 ? 1 : 97) {
    const Bytes torn(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(!refusal(torn).empty(), "a file of %zu bytes was taken", size);
  }
  refuses("does not begin with 'GGUF'", [](Container& f) { f.magic = 0; });
  refuses("GGUF version 1", [](Container& f) { f.version = 1; });
  refuses("more than it can hold", [](Container& f) { f.extra_values = 1ULL << 40U; });
  refuses("more than it can hold", [](Container& f) { f.extra_tensors = 1ULL << 40U; });
  refuses("occurs twice", [](Container& f) { f.values.push_back(f.values[2]); });
  refuses("tensor 'token_embd.weight' occurs twice", [](Container& f) { f.tensors.push_back(f.tensors[0]); });
  refuses("no power of two", [](Container& f) { f.add_u32("general.alignment", 48); });
  refuses("no multiple of the alignment", [](Container& f) { f.tensors[1].offset += 4; });
  refuses("overlap", [](Container& f) { f.tensors[1].offset = 0; });
  refuses("past the end of the file", [](Container& f) { f.tensors[3].offset = 1ULL << 60U; });
  refuses("impossible shape", [](Container& f) { f.tensors[0].shape = {1ULL << 40U, 1ULL << 40U}; });
  refuses("dimensions; allowed are 1 to 4", [](Container& f) { f.tensors[0].shape.assign(5, 1); });
  refuses("storage type 3", [](Container& f) { f.tensors[0].type = 3; });
  refuses("needs a multiple of 32", [](Container& f) {
    f.tensors[0].type = 2;
    f.tensors[0].shape[0] = 33;
  });
  refuses("architecture is 'llama'", [](Container& f) {
    f.values.erase(f.values.begin());
    f.add_text("general.architecture", "llama");
  });
  refuses("has no smallthinker.block_count", [](Container& f) { remove_value(f, "block_count"); });
  refuses("smallthinker.block_count is 0; allowed is 1 to",
          [](Container& f) { set_u32(f, "block_count", 0); });
  refuses("has no tensor 'blk.3.attn_norm.weight'", [](Container& f) { set_u32(f, "block_count", 4); });
  refuses("has the shape", [](Container& f) { set_u32(f, "expert_count", 3); });
  refuses("expert_used_count is 5; allowed is 1 to 4",
          [](Container& f) { set_u32(f, "expert_used_count", 5); });
  refuses("expert_gating_func is 3", [](Container& f) { set_u32(f, "expert_gating_func", 3); });
  refuses("query heads for 3 key heads", [](Container& f) { set_u32(f, "attention.head_count_kv", 3); });
  refuses("should be a whole number", [](Container& f) { value_of(f, "smallthinker.block_count").type = 6; });
  refuses("has 2 entries; the model has 3 layers",
          [](Container& f) { f.add_i32s("smallthinker.rope_layout", {0, 1}); });
  refuses("holds 7; allowed are 0 and 1",
          [](Container& f) { f.add_i32s("smallthinker.rope_layout", {0, 1, 7}); });
  refuses("attention.sliding_window is missing",
          [](Container& f) { f.add_i32s("smallthinker.sliding_window_layout", {0, 1, 0}); });

  // A router lead goes with an architecture of its own, which readers that know nothing of it refuse.
  Shape leading;
  leading.router_lead = 2;
  const Bytes led = make_container(leading, 3).write();
  CHECK(Model::from_bytes(led)->hyper.router_lead == 2);
  const auto bad_lead = [&](const std::string& message, const auto& mutate) {
    Container file = make_container(leading, 3);
    mutate(file);
    const std::string found = refusal(file.write());
    CHECK(found.find(message) != std::string::npos, "'%s' instead of '%s'", found.c_str(), message.c_str());
  };
  bad_lead("router_lead is 0; allowed is 1 to", [](Container& f) { set_u32(f, "router_lead", 0); });
  bad_lead("router_lead is 4294967295; allowed is 1 to",
           [](Container& f) { set_u32(f, "router_lead", 4294967295U); });
  bad_lead("has no smallthinker.router_lead", [](Container& f) { remove_value(f, "router_lead"); });
  bad_lead("calls itself 'smallthinker'", [](Container& f) {
    f.values.erase(f.values.begin());
    f.add_text("general.architecture", "smallthinker");
  });

  // A predictor of the head's rows is whole and sane, or the file is refused, by every reader.
  Shape predicting;
  predicting.predictor_width = 16;
  const auto bad_predictor = [&](const std::string& message, const auto& mutate) {
    Container file = make_container(predicting, 3);
    mutate(file);
    file.place_tensors();
    const std::string found = refusal(file.write());
    CHECK(found.find(message) != std::string::npos, "'%s' instead of '%s'", found.c_str(), message.c_str());
  };
  CHECK(refusal(make_container(predicting, 3).write()).empty());
  for (const char* name : {"width", "threshold", "recall", "missed_argmax"}) {
    const std::string key = std::string("head_predictor.") + name;
    bad_predictor("has no smallthinker." + key, [&](Container& f) { remove_value(f, key); });
  }
  Container unmeasured = make_container(predicting, 3);
  for (const char* name : {"recall", "missed_argmax"})
    remove_value(unmeasured, std::string("head_predictor.") + name);
  const Bytes imported = unmeasured.write();
  const auto predictor = Model::from_bytes(imported)->head_predictor;
  CHECK(predictor && !predictor->recall && !predictor->missed_argmax);
  bad_predictor("head_predictor.width is 0", [](Container& f) { set_u32(f, "head_predictor.width", 0); });
  bad_predictor("'head_predictor.down.weight' has the shape",
                [](Container& f) { set_u32(f, "head_predictor.width", 17); });
  bad_predictor("has no tensor 'head_predictor.up.weight'", [](Container& f) { f.tensors.pop_back(); });
  bad_predictor("has no tensor 'head_predictor.down.weight'",
                [](Container& f) { f.tensors.erase(f.tensors.end() - 2); });
  bad_predictor("'head_predictor.up.weight' has the shape", [](Container& f) {
    f.tensors.back().shape[1] -= 1;
    f.tensors.back().data.resize(f.tensors.back().data.size() - 64);
  });
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), 1.5F, -0.5F}) {
    bad_predictor("head_predictor.recall is", [&](Container& f) {
      remove_value(f, "head_predictor.recall");
      f.add_f32("smallthinker.head_predictor.recall", value);
    });
  }
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    bad_predictor("head_predictor.threshold is", [&](Container& f) {
      remove_value(f, "head_predictor.threshold");
      f.add_f32("smallthinker.head_predictor.threshold", value);
    });
  }

  // Which layers rotate and which are windowed, with and without our own keys.
  const auto layouts = [](Shape s) {
    const Exact exact(make_container(s, 3).write());
    const Hyperparameters hyper = Model::from_bytes(exact.span())->hyper;
    return std::pair(hyper.rope, hyper.windowed);
  };
  using Flags = std::vector<bool>;
  Shape plain;
  plain.layers = 5;
  CHECK(layouts(plain) == std::pair(Flags(5, true), Flags(5, false)));
  plain.window = 16;
  CHECK(layouts(plain) ==
        std::pair(Flags{false, true, true, true, false}, Flags{false, true, true, true, false}));
  plain.rope = {1, 1, 0, 0, 1};
  plain.windowed = {0, 1, 0, 1, 1};
  CHECK(layouts(plain) ==
        std::pair(Flags{true, true, false, false, true}, Flags{false, true, false, true, true}));

  // Packed files.
  Shape q4;
  q4.type = Type::kQ4_0;
  for (const bool tied : {false, true}) {
    q4.tied = tied;
    CHECK(refusal(make_packed_container(q4, 3).write()).empty(), "a sound packed file is refused");
    const auto bad = [&](const std::string& message, const auto& mutate) {
      Container file = make_packed_container(q4, 3);
      mutate(file);
      const std::string found = refusal(file.write());
      CHECK(found.find(message) != std::string::npos, "'%s' instead of '%s'", found.c_str(), message.c_str());
    };
    bad("version 9 of the layout", [](Container& f) { set_u32(f, "packed.version", 9); });
    bad("has no smallthinker.packed.checksum.blk.0.attn_q",
        [](Container& f) { remove_value(f, "packed.checksum.blk.0.attn_q"); });
    bad("has no tensor 'blk.2.ffn_experts.packed'",
        [](Container& f) { f.tensors.erase(f.tensors.end() - 2); });
    bad("has no tensor 'experts.checksums'", [](Container& f) { f.tensors.pop_back(); });
    bad("'experts.checksums' has the shape", [](Container& f) {
      f.tensors.back().shape[0] = 8;
      f.tensors.back().data.resize(f.tensors.back().data.size() / 2);
    });
    bad("has 2 entries; the model has 12 experts",
        [](Container& f) { f.add_i32s("smallthinker.packed.expert_order", {0, 1}); });
    bad("does not name every expert of layer 0 once", [](Container& f) {
      f.add_i32s("smallthinker.packed.expert_order", std::vector<std::int32_t>(12, 1));
    });
    bad("does not name every expert of layer 0 once", [](Container& f) {
      f.add_i32s("smallthinker.packed.expert_order", std::vector<std::int32_t>(12, -1));
    });
    bad("has 1 entries", [](Container& f) { f.add_i32s("smallthinker.expert_counts", {1}); });
    bad("negative count",
        [](Container& f) { f.add_i32s("smallthinker.expert_counts", std::vector<std::int32_t>(12, -1)); });
    bad("does not start at a multiple of 4096", [](Container& f) {
      f.alignment = 32;
      set_u32(f, "alignment", 32, "general.");
      f.place_tensors();
    });
  }

  Container silent = make_container(shape, 3);
  remove_value(silent, "expert_gating_func");
  const Exact exact(silent.write());
  const auto model = Model::from_bytes(exact.span());
  CHECK(model->hyper.router == RouterKind::kSigmoid && model->warnings.size() == 1);
  std::printf("reader: ok\n");
}

void test_reader_fuzz(unsigned long cases, unsigned long seed) {
  Shape shape;
  shape.layers = 2;
  shape.experts = 3;
  shape.window = 4;
  unsigned long accepted = 0;
  Mutator mutator(seed);
  const std::array<Type, 3> types = {Type::kF32, Type::kQ4_0, Type::kQ8_0};
  for (unsigned long i = 0; i < cases; ++i) {
    shape.type = types[i % types.size()];
    shape.predictor_width = i % 4 == 0 ? 32 : 0;
    const bool packed = shape.type == Type::kQ4_0 && i % 2 == 0;
    if (packed) shape.predictor_width = 0;
    shape.tied = packed && i % 4 == 0;
    Container file = packed ? make_packed_container(shape, 1 + i % 3) : make_container(shape, 1 + i % 3);
    for (std::uint64_t n = mutator.below(3); n > 0; --n) mutator.mutate(file);
    Bytes bytes = file.write();
    mutator.mutate(bytes);
    const Exact exact(bytes);
    try {
      const auto model = Model::from_bytes(exact.span());
      ++accepted;
      if (model->hyper.context > 4096 || model->hyper.layers > 8) continue;
      // An accepted file must also run: every weight it promises is read.
      if (accepted % 8 != 0) continue;
      run_shortly(model);
    } catch (const EngineError&) {  // of a packed file also later, by the checksum of an expert
    }
  }
  CHECK(accepted > cases / 20 && accepted < cases - cases / 20, "the fuzzer is one-sided: %lu accepted",
        accepted);
  std::printf("reader fuzz: %lu cases, %lu accepted: ok\n", cases, accepted);
}
