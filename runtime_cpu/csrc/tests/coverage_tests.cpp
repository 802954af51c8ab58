// The readers of stock and packed files under bytes that are chosen by what they reach: a file that runs
// through new edges joins the corpus and is mutated again.
//
//   core_tests --coverage 1000000 --seed 2 coverage      // built with -DSMALLTHINKER_SANITIZE=address
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "model/model.hpp"
#include "tests/check.hpp"
#include "tests/coverage/edges.hpp"
#include "tests/gguf_builder.hpp"
#include "tests/packed_builder.hpp"
#include "tests/short_run.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr std::size_t kMostBytes = 1U << 20U;
constexpr std::array<std::uint64_t, 14> kNumbers = {
    0,          1,          2,          31,          32,          255,         4096,
    0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1ULL << 40U, 1ULL << 62U, 1ULL << 63U, ~0ULL};

struct Sample {
  Bytes bytes;
  std::size_t header = 0;  // where weights begin: what lies behind decides little
  bool accepted = true;
};

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}
  std::size_t below(std::size_t limit) { return limit == 0 ? 0 : random_.next() % limit; }

  Sample mutate(const std::vector<Sample>& corpus) {
    // What was accepted, what came last (it has reached furthest), and anything, each as often.
    const std::size_t latest = std::min<std::size_t>(corpus.size(), 16);
    std::size_t chosen = below(corpus.size());
    switch (below(3)) {
      case 0:
        while (!corpus[chosen].accepted) chosen = below(corpus.size());
        break;
      case 1:
        chosen = corpus.size() - 1 - below(latest);
        break;
      default:
        break;
    }
    Sample sample = corpus[chosen];
    for (std::size_t n = 1 + below(3); n > 0; --n) once(sample, corpus[below(corpus.size())]);
    return sample;
  }

 private:
  void once(Sample& sample, const Sample& other) {
    Bytes& bytes = sample.bytes;
    if (bytes.size() < 32) return;
    const std::size_t range = below(16) == 0 ? bytes.size() : std::min(sample.header, bytes.size());
    const std::size_t at = below(range);
    const std::size_t room = bytes.size() - at;
    const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(8)) {
      case 0:
        bytes[at] ^= static_cast<std::byte>(1U << below(8));
        break;
      case 1:
        bytes[at] = static_cast<std::byte>(below(256));
        break;
      case 2:
      case 3: {
        const std::uint64_t number = kNumbers[below(kNumbers.size())] + below(3) - 1;
        std::memcpy(&bytes[at], &number, std::min(room, below(2) == 0 ? std::size_t{4} : std::size_t{8}));
        break;
      }
      case 4: {  // a number of the file, a little off
        std::uint32_t number = 0;
        const std::size_t size = std::min<std::size_t>(room, 4);
        std::memcpy(&number, &bytes[at], size);
        number += static_cast<std::uint32_t>(below(9)) - 4;
        std::memcpy(&bytes[at], &number, size);
        break;
      }
      case 5: {  // bytes of another file
        const std::size_t from = below(std::min(other.header, other.bytes.size()));
        const std::size_t size = std::min({1 + below(64), room, other.bytes.size() - from});
        std::memcpy(&bytes[at], &other.bytes[from], size);
        break;
      }
      case 6:
        if (below(2) == 0) {
          bytes.erase(place, place + static_cast<std::ptrdiff_t>(std::min(room, 1 + below(16))));
        } else if (bytes.size() < kMostBytes) {
          bytes.insert(place, 1 + below(16), static_cast<std::byte>(below(256)));
        }
        break;
      default:
        if (below(16) == 0) bytes.resize(at);
        break;
    }
  }

  RandomStream random_;
};

void run(const std::shared_ptr<const Model>& model) {
  if (model->hyper.context > 4096 || model->hyper.layers > 8 || model->hyper.vocab > 4096) return;
  run_shortly(model);
}

// Whether the reader took it.
bool parse(const Sample& sample, bool& fresh) {
  // Exactly as many bytes as the file has, so that AddressSanitizer sees one too far.
  const std::unique_ptr<std::byte[]> exact(new std::byte[sample.bytes.size()]);
  std::copy(sample.bytes.begin(), sample.bytes.end(), exact.get());
  std::shared_ptr<const Model> model;
  start_edges();
  try {
    model = Model::from_bytes({exact.get(), sample.bytes.size()});
  } catch (const ModelFileError&) {
  }
  fresh = new_edges() > 0;
  if (model == nullptr) return false;
  try {
    if (fresh) run(model);
  } catch (const EngineError&) {  // a packed file's checksums
  }
  return true;
}

std::vector<Sample> seeds() {
  std::vector<Sample> result;
  const auto add = [&](const Container& file) {
    const Bytes bytes = file.write();
    result.push_back(
        {bytes, bytes.size() - file.tensors.back().offset - file.tensors.back().data.size(), true});
  };
  Shape shape;
  shape.layers = 2;
  shape.experts = 3;
  shape.window = 4;
  for (const Type type : {Type::kF32, Type::kQ4_0}) {
    for (const bool tied : {false, true}) {
      shape.type = type;
      shape.tied = tied;
      shape.predictor_width = tied ? 0 : 32;
      add(make_container(shape, 1));
      shape.predictor_width = 0;
      if (type == Type::kQ4_0) add(make_packed_container(shape, 1));
    }
  }
  return result;
}

}  // namespace

void test_coverage(unsigned long cases, unsigned long seed) {
  std::vector<Sample> corpus = seeds();
  bool fresh = false;
  for (const Sample& sample : corpus) CHECK(parse(sample, fresh), "a sound file is refused");
  const std::size_t sound = all_edges();
  if (sound == 0) {
    std::printf("coverage: not run, the readers are not instrumented in this build\n");
    return;
  }
  const std::size_t first = corpus.size();
  Mutator mutator(seed);
  unsigned long accepted = 0;
  for (unsigned long i = 0; i < cases; ++i) {
    Sample sample = mutator.mutate(corpus);
    sample.accepted = parse(sample, fresh);
    accepted += sample.accepted ? 1 : 0;
    if (fresh) corpus.push_back(std::move(sample));
  }
  // Not all of them refused at the door, and new ground found again and again.
  CHECK(accepted > cases / 200 && accepted < cases / 2, "%lu of %lu accepted", accepted, cases);
  CHECK(all_edges() > sound + sound / 4 && corpus.size() > first + 20, "%zu edges after %zu, %zu files",
        all_edges(), sound, corpus.size());
  std::printf("coverage: %lu cases, %lu accepted, %zu edges (%zu in sound files), %zu files kept: ok\n",
              cases, accepted, all_edges(), sound, corpus.size());
}
