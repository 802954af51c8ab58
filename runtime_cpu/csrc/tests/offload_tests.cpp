// Experts on disk must not change a bit: any cache size, backend, policy, number of threads and timing of
// reads gives the logits of the model in memory. Failing reads end one batch and nothing else.
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "forward/runtime.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr std::int64_t kTokens = 60;

struct TemporaryFile {
  std::string path;
  explicit TemporaryFile(const Bytes& bytes)
      : path((std::filesystem::temp_directory_path() / ("offload_tests." + std::to_string(getpid())))
                 .string()) {
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    CHECK(out.good(), "cannot write %s", path.c_str());
  }
  ~TemporaryFile() { std::filesystem::remove(path); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
};

RuntimeOptions options_for(int threads, std::int64_t chunk, std::size_t cache_bytes) {
  RuntimeOptions options;
  options.threads = threads;
  options.context = 128;
  options.chunk = chunk;
  options.experts.cache_bytes = cache_bytes;
  return options;
}

// A prompt in chunks, then token by token.
std::vector<float> run(Runtime& runtime, const Model& model, const std::vector<std::int32_t>& tokens) {
  Session session(runtime.kv_layout(), model.hyper);
  const auto vocab = static_cast<std::size_t>(model.hyper.vocab);
  const std::size_t half = tokens.size() / 2;
  std::vector<float> logits(tokens.size() * vocab);
  runtime.forward(session, std::span(tokens).first(half), logits.data(), static_cast<std::int64_t>(half));
  for (std::size_t i = half; i < tokens.size(); ++i) {
    runtime.forward(session, std::span(tokens).subspan(i, 1), logits.data() + i * vocab, 1);
  }
  return logits;
}

// A file that is cut off ends requests, not the process: embedding rows are read with an error to give, or
// lie in memory.
void cut_off_file(bool tied) {
  Shape shape;
  shape.type = Type::kQ4_0;
  shape.embedding = Type::kQ8_0;  // which is never tiled
  shape.tied = tied;
  const Bytes bytes = make_container(shape, 22).write();
  const TemporaryFile file(bytes);
  const auto model = Model::open(file.path);
  Runtime runtime(model, options_for(2, 8, 2 * model->expert_shape().bytes()));
  const std::vector<std::int32_t> tokens = {1, 2, 3, 4};
  const std::vector<float> whole = run(runtime, *model, tokens);
  const std::shared_ptr<const Model> of_memory = Model::from_bytes(bytes);
  Runtime other(of_memory, options_for(2, 8, 0));
  CHECK(run(other, *of_memory, tokens) == whole, "from a file and from memory: other bits");

  std::filesystem::resize_file(file.path, 0);
  Session session(runtime.kv_layout(), model->hyper);
  std::vector<float> row(static_cast<std::size_t>(shape.vocab));
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::string message;
    try {
      runtime.forward(session, tokens, row.data(), 1);
    } catch (const EngineError& error) {
      message = error.what();
    }
    CHECK(message.size() > 10 && session.length() == 0, "'%s'", message.c_str());
    CHECK(tied || message.find("it ends before") != std::string::npos, "'%s'", message.c_str());
  }
}

Shape four_layers(std::int64_t router_lead) {
  Shape shape;
  shape.type = Type::kQ4_0;
  shape.layers = 4;
  shape.hidden = 64;
  shape.expert_hidden = 96;
  shape.experts = 6;
  shape.used = 2;
  shape.router_lead = router_lead;
  return shape;
}

std::vector<std::int32_t> random_tokens() {
  RandomStream random(5);
  std::vector<std::int32_t> tokens;
  const auto vocab = static_cast<std::uint64_t>(Shape().vocab);
  for (std::int64_t i = 0; i < kTokens; ++i)
    tokens.push_back(static_cast<std::int32_t>(random.next() % vocab));
  return tokens;
}

void from_disk_as_in_memory(std::int64_t router_lead) {
  const Shape shape = four_layers(router_lead);
  const TemporaryFile file(make_container(shape, 21).write());
  const auto model = Model::open(file.path);
  const std::size_t each = model->expert_shape().bytes();
  const std::vector<std::int32_t> tokens = random_tokens();
  // Room for all: the packed layout, and nothing on disk.
  Runtime in_memory(model, options_for(2, 16, each * static_cast<std::size_t>(shape.layers * shape.experts)));
  const auto expected = run(in_memory, *model, tokens);
  CHECK(!in_memory.experts()->offloads());

  std::atomic<std::uint64_t> noise{1};
  const auto delays = [&noise](const Read&) {
    Fault fault;
    const std::uint64_t draw = noise.fetch_add(0x9E3779B97F4A7C15U) >> 40U;
    fault.delay_us = draw % 16 == 0 ? static_cast<int>(draw % 300) : 0;
    if (draw % 5 == 0) fault.most_bytes = 4096;
    return fault;
  };
  int round = 0;
  std::uint64_t guessed = 0;
  for (const std::size_t slots : {2, 3, 5, 6, 11, 23}) {
    for (const char* backend : {"threads", "page_cache"}) {
      RuntimeOptions options = options_for(1 + round % 4, std::int64_t{1} << (round % 6), slots * each);
      options.experts.backend = backend;
      options.experts.policy = round % 3 == 0 ? "lru" : round % 3 == 1 ? "lfu" : kDefaultPolicy;
      options.experts.reader.fault = delays;
      options.experts.reader.refuse_direct = std::string(backend) == "page_cache";
      options.speculate = round % 2 == 0;
      Runtime runtime(model, options);
      CHECK(runtime.experts() != nullptr && runtime.experts()->offloads());
      CHECK(run(runtime, *model, tokens) == expected, "%zu slots, %s, %d threads change the bits", slots,
            backend, options.threads);
      const CacheCounters counters = runtime.experts()->counters();
      CHECK(counters.misses > 0 && counters.bytes_read > 0 && counters.failures == 0);
      guessed += counters.speculated;
      ++round;
    }
  }
  CHECK(guessed > 0, "nothing was guessed");
  CHECK(run(in_memory, *model, tokens) == expected, "a second run gave other bits");
}

// What a router with a lead has chosen is read ahead, guesses or not, and is always used.
void known_choices_are_read_ahead() {
  for (const std::int64_t lead : {0, 1, 2, 3}) {
    const TemporaryFile file(make_container(four_layers(lead), 21).write());
    const auto model = Model::open(file.path);
    RuntimeOptions options = options_for(2, 1, 12 * model->expert_shape().bytes());
    options.speculate = false;
    Runtime runtime(model, options);
    run(runtime, *model, random_tokens());
    const CacheCounters counters = runtime.experts()->counters();
    CHECK((counters.speculated > 0) == (lead > 0), "%lu read ahead with a lead of %ld",
          static_cast<unsigned long>(counters.speculated), static_cast<long>(lead));
    CHECK(counters.speculated_wasted == 0, "%lu of %lu read in vain with a lead of %ld",
          static_cast<unsigned long>(counters.speculated_wasted),
          static_cast<unsigned long>(counters.speculated), static_cast<long>(lead));
  }
}

// A disk that fails now and then: each failure is one error with a sentence, and the next attempt can
// succeed.
void failing_disk(std::int64_t router_lead) {
  const TemporaryFile file(make_container(four_layers(router_lead), 21).write());
  const auto model = Model::open(file.path);
  const std::size_t each = model->expert_shape().bytes();
  const std::vector<std::int32_t> tokens = random_tokens();
  std::atomic<int> failing{0};
  RuntimeOptions options = options_for(3, 8, 4 * each);
  options.experts.backend = "threads";
  options.experts.reader.fault = [&failing](const Read&) {
    Fault fault;
    if (failing.fetch_sub(1) == 1) fault.error = EIO;
    return fault;
  };
  Runtime runtime(model, options);
  Session session(runtime.kv_layout(), model->hyper);
  std::vector<float> row(static_cast<std::size_t>(model->hyper.vocab));
  const std::vector<float> whole = run(runtime, *model, tokens);
  int errors = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    failing.store(1 + attempt % 7);
    session.truncate(0);
    try {
      runtime.forward(session, tokens, row.data(), 1);
    } catch (const EngineError& error) {
      ++errors;
      CHECK(std::string(error.what()).size() > 10);
      CHECK(session.length() == 0, "%ld tokens are left of a failed batch",
            static_cast<long>(session.length()));
    }
  }
  CHECK(errors > 5, "%d errors", errors);
  failing.store(0);
  CHECK(run(runtime, *model, tokens) == whole, "errors left traces");
}

}  // namespace

void test_offload() {
  for (const std::int64_t lead : {0, 1, 3, 5}) from_disk_as_in_memory(lead);
  known_choices_are_read_ahead();
  for (const std::int64_t lead : {0, 2}) failing_disk(lead);
  for (const bool tied : {false, true}) cut_off_file(tied);
  std::printf("offload: ok\n");
}
