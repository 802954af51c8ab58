// Thread pool, sampler and forward pass: the properties that the engine promises.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <thread>

#include "forward/runtime.hpp"
#include "forward/sampler.hpp"
#include "forward/thread_pool.hpp"
#include "model/model.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

std::vector<std::int32_t> random_tokens(std::int64_t count, std::int64_t vocab, std::uint64_t seed) {
  RandomStream random(seed);
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(vocab)));
  }
  return tokens;
}

std::vector<float> logits_of(const std::shared_ptr<const Model>& model,
                             const std::vector<std::int32_t>& tokens, int threads, std::int64_t chunk,
                             const std::string& kernels, const std::string& kv = "f32") {
  Runtime runtime(model, {threads, 256, chunk, kernels, kv});
  Session session(runtime.kv_layout(), model->hyper);
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(model->hyper.vocab));
  runtime.forward(session, tokens, logits.data(), static_cast<std::int64_t>(tokens.size()));
  return logits;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / size);
}

}  // namespace

void test_thread_pool() {
  for (const int threads : {1, 2, 4, 9}) {
    ThreadPool pool(threads);
    const int rounds = threads > 4 ? 200 : 1000;  // more threads than cores wait for the system's turns
    for (int round = 0; round < rounds; ++round) {
      const std::int64_t pieces = round % 37;
      std::vector<int> touched(static_cast<std::size_t>(pieces),
                               0);  // not atomic: TSan would see two claims of one
      pool.run(pieces, [&](std::int64_t piece, int thread) {
        CHECK(thread >= 0 && thread < threads);
        touched[static_cast<std::size_t>(piece)] += 1;
      });
      CHECK(std::accumulate(touched.begin(), touched.end(), 0) == static_cast<int>(pieces));
      // Lets the workers fall asleep, so that both ways of waking them are tested; no check hangs on it.
      if (round % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  std::printf("thread pool: ok\n");
}

void test_sampler() {
  // First outputs of the reference implementations (xoshiro256** over splitmix64 of 0).
  RandomStream random(0);
  CHECK(random.next() == 0x99EC5F36CB75F2B4U && random.next() == 0xBF6E1F784956452AU);

  const Kernels& fastest = select_kernels("auto");
  const std::vector<float> logits = {0.0F, 2.0F, 2.0F, -1.0F, 1.0F};
  const auto pick = [&](SamplerOptions options, int draws) {
    std::vector<int> counts(logits.size());
    for (int i = 0; i < draws; ++i) {
      options.seed = static_cast<std::uint64_t>(i);
      ++counts[static_cast<std::size_t>(Sampler(5, options).sample(logits, 0, fastest).id)];
    }
    return counts;
  };
  using Counts = std::vector<int>;
  CHECK(pick({}, 3) == (Counts{0, 3, 0, 0, 0}));  // greedy: the lowest id among equals
  SamplerOptions options;
  options.logit_bias = {{1, -100.0F}};
  CHECK(pick(options, 3) == (Counts{0, 0, 3, 0, 0}));
  options = {};
  options.temperature = 1.0;
  options.top_k = 1;
  CHECK(pick(options, 50) == (Counts{0, 50, 0, 0, 0}));
  options.top_k = 2;
  Counts counts = pick(options, 400);
  CHECK(counts[1] > 150 && counts[2] > 150 && counts[1] + counts[2] == 400);
  options.top_k = 0;
  options.top_p = 0.75;  // 1 and 2 hold 0.77 together
  counts = pick(options, 400);
  CHECK(counts[1] + counts[2] == 400 && counts[2] > 100);
  options.top_p = 1.0;
  options.min_p = 0.3;  // e^-1 = 0.37 stays, e^-2 = 0.14 goes
  counts = pick(options, 400);
  CHECK(counts[0] == 0 && counts[3] == 0 && counts[4] > 20);
  options.min_p = 0.0;
  counts = pick(options, 4000);
  const std::vector<double> expected = {0.0530, 0.3917, 0.3917, 0.0195, 0.1441};  // softmax
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::fabs(counts[i] / 4000.0 - expected[i]) < 0.025, "token %zu drawn %d times", i, counts[i]);
  }
  // Penalties act on what came before.
  options = {};
  options.presence_penalty = 0.5;
  Sampler sampler(5, options);
  CHECK(sampler.sample(logits, 0, fastest).id == 1 && sampler.sample(logits, 0, fastest).id == 2 &&
        sampler.sample(logits, 0, fastest).id == 1);
  options = {};
  options.repetition_penalty = 3.0;
  Sampler repeating(5, options);
  const std::vector<std::int32_t> prompt = {1, 2};
  repeating.observe_prompt(prompt);
  CHECK(repeating.sample(logits, 0, fastest).id == 4);
  const Choice choice = Sampler(5, {}).sample(logits, 3, fastest);
  CHECK(choice.top.size() == 3 && choice.top[0].first == 1 && choice.top[1].first == 2 &&
        choice.top[2].first == 4);
  CHECK(std::fabs(std::exp(static_cast<double>(choice.logprob)) - 0.3917) < 1e-4);
  // Damaged logits give some token, not undefined behaviour.
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    options = {};
    options.temperature = 0.7;
    options.top_p = 0.9;
    std::vector<float> row(5, bad);
    CHECK(Sampler(5, options).sample(row, 5, fastest).id < 5);
    row[2] = 1.0F;
    CHECK(Sampler(5, options).sample(row, 5, fastest).id < 5);
  }
  std::printf("sampler: ok\n");
}

void test_forward() {
  Shape shape;
  shape.layers = 4;
  shape.rope = {0, 1, 1, 0};
  shape.windowed = {0, 1, 0, 1};
  shape.window = 11;
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16, Type::kQ4_0, Type::kQ8_0}) {
    shape.type = type;
    shape.softmax = type != Type::kF32;
    shape.tied = type == Type::kQ8_0;
    const Bytes bytes = make_container(shape, 11).write();
    const auto model = Model::from_bytes(bytes);
    const auto tokens = random_tokens(150, shape.vocab, 5);
    const auto exact = logits_of(model, tokens, 1, 128, "reference");
    for (const Kernels* kernels : available_kernels()) {
      const auto logits = logits_of(model, tokens, 1, 128, kernels->name);
      const double error = distance(logits, exact);
      CHECK(error < 2e-3, "%s %s: %g from the reference", kernels->name, traits_of(type).name, error);
      for (const auto& [threads, chunk] :
           {std::pair(2, 1), std::pair(3, 7), std::pair(4, 64), std::pair(1, 5)}) {
        CHECK(logits_of(model, tokens, threads, chunk, kernels->name) == logits,
              "%s %s: %d threads and chunks of %d change the bits", kernels->name, traits_of(type).name,
              threads, chunk);
      }
    }
    CHECK(distance(logits_of(model, tokens, 2, 16, "auto", "f16"), exact) < 2e-2);
    const auto steps = logits_of(model, tokens, 1, 128, "auto", "q8");
    CHECK(distance(steps, exact) < 1e-1, "8 bits: %g", distance(steps, exact));
    CHECK(logits_of(model, tokens, 3, 7, "auto", "q8") == steps, "8 bits: threads change the bits");

    // Going back: wherever it is allowed, the future is the same; where a ring forgot, everything is.
    const std::string kept_as = type == Type::kQ4_0 ? "q8" : "f32";
    Runtime runtime(model, {2, 256, 16, "auto", kept_as});
    Session session(runtime.kv_layout(), model->hyper);
    const auto all = logits_of(model, tokens, 2, 16, "auto", kept_as);
    const auto vocab = static_cast<std::size_t>(shape.vocab);
    RandomStream random(3);
    int kept = 0;
    for (int round = 0; round < 40; ++round) {
      const std::int64_t target = static_cast<std::int64_t>(random.next() % 150);
      const std::int64_t length = session.truncate(target);
      CHECK(length == 0 || length == target || target > length);
      kept += length > 0 ? 1 : 0;
      const auto start = static_cast<std::size_t>(length);
      const std::size_t count = 1 + random.next() % (tokens.size() - start);
      std::vector<float> row(vocab);
      runtime.forward(session, std::span(tokens).subspan(start, count), row.data(), 1);
      const auto expected = all.begin() + static_cast<std::ptrdiff_t>((start + count - 1) * vocab);
      CHECK(std::equal(row.begin(), row.end(), expected), "going back to %zu changed the logits", start);
    }
    CHECK(kept > 5);

    try {
      runtime.forward(session, std::vector<std::int32_t>(257, 1), nullptr, 0);
      CHECK(false, "a full context was not refused");
    } catch (const EngineError&) {
    }
    try {
      runtime.forward(session, std::vector<std::int32_t>{40}, nullptr, 0);
      CHECK(false, "a token outside the vocabulary was not refused");
    } catch (const EngineError&) {
    }
  }
  // Q6_K needs rows of 256.
  Shape wide;
  wide.type = Type::kQ6_K;
  wide.hidden = wide.expert_hidden = 256;
  wide.head_dim = 64;
  const Bytes bytes = make_container(wide, 2).write();
  const auto model = Model::from_bytes(bytes);
  const auto tokens = random_tokens(20, wide.vocab, 1);
  const auto exact = logits_of(model, tokens, 1, 128, "reference");
  for (const Kernels* kernels : available_kernels()) {
    CHECK(distance(logits_of(model, tokens, 2, 6, kernels->name), exact) < 2e-3);
  }

  // Several callers of one runtime, each with a session of its own.
  Runtime runtime(model, {2, 64, 8, "auto", "f32"});
  std::vector<std::thread> callers;
  std::vector<std::vector<float>> results(3, std::vector<float>(static_cast<std::size_t>(wide.vocab)));
  for (std::vector<float>& row : results) {
    callers.emplace_back([&] {
      Session session(runtime.kv_layout(), model->hyper);
      for (const std::int32_t token : tokens) runtime.forward(session, std::span(&token, 1), row.data(), 1);
      CHECK(session.counters.neurons[0] == tokens.size() * 2U * 256U);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(results[0] == results[1] && results[1] == results[2]);
  std::printf("forward: ok\n");
}

void test_golden(const char* folder) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".gguf") continue;
    const auto model = Model::open(entry.path().string());
    const auto tokens = random_tokens(40, model->hyper.vocab, 9);
    const auto exact = logits_of(model, tokens, 1, 64, "reference");
    const auto fast = logits_of(model, tokens, 3, 9, "auto");
    CHECK(distance(fast, exact) < 5e-3, "%s: %g", entry.path().c_str(), distance(fast, exact));
    ++files;
  }
  CHECK(files > 0, "there is no .gguf file in %s", folder);
  std::printf("golden: %d files: ok\n", files);
}
