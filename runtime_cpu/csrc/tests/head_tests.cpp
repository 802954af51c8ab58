// The predicted head: rows that are computed have the exact head's bits, all others are minus infinity.
#include <cmath>
#include <limits>

#include "forward/runtime.hpp"
#include "model/model.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

struct Result {
  std::vector<float> logits;
  Counters counters;
};

Result run(const std::shared_ptr<const Model>& model, const std::vector<std::int32_t>& tokens, bool predict,
           int threads, std::int64_t chunk, const std::string& kernels, HeadRows rows = HeadRows::kNamed) {
  RuntimeOptions options;
  options.threads = threads;
  options.context = 64;
  options.chunk = chunk;
  options.kernels = kernels;
  options.predict_head = predict;
  Runtime runtime(model, options);
  runtime.set_head_rows(rows);
  Session session(runtime.kv_layout(), model->hyper);
  Result result;
  result.logits.resize(tokens.size() * static_cast<std::size_t>(model->hyper.vocab));
  runtime.forward(session, tokens, result.logits.data(), static_cast<std::int64_t>(tokens.size()));
  result.counters = session.counters;
  return result;
}

Bytes with_threshold(Container file, float threshold) {
  for (Value& value : file.values) {
    if (value.key != "smallthinker.head_predictor.threshold") continue;
    value.payload.clear();
    put(value.payload, threshold);
  }
  return file.write();
}

}  // namespace

void test_head() {
  Shape shape;
  shape.vocab = 1500;  // several pieces of work, and a last tile of 12 rows
  const std::vector<std::int32_t> tokens = {3, 1499, 7, 7, 800, 64, 2};
  for (const Type type : {Type::kF32, Type::kF16, Type::kQ4_0, Type::kQ8_0}) {
    for (const std::int64_t width : {std::int64_t{32}, std::int64_t{96}}) {
      for (const bool tied : {false, true}) {
        shape.type = type;
        shape.predictor_width = width;
        shape.tied = tied;
        const Container file = make_container(shape, 7);
        const Bytes bytes = file.write();
        const auto model = Model::from_bytes(bytes);
        for (const Kernels* kernels : available_kernels()) {
          const char* name = kernels->name;
          const Result exact = run(model, tokens, false, 2, 4, name);
          const Result found = run(model, tokens, true, 1, 4, name);
          CHECK(exact.counters.head_rows == exact.counters.head_rows_computed);
          CHECK(found.counters.head_rows == exact.counters.head_rows && found.counters.head_fallbacks == 0);
          std::uint64_t named = 0;
          for (std::size_t i = 0; i < exact.logits.size(); ++i) {
            const bool lost = found.logits[i] == -std::numeric_limits<float>::infinity();
            CHECK(lost || found.logits[i] == exact.logits[i], "%s %s: row %zu has other bits", name,
                  traits_of(type).name, i);
            named += lost ? 0 : 1;
          }
          CHECK(named == found.counters.head_rows_computed);
          CHECK(named > exact.logits.size() / 10 && named < exact.logits.size() * 9 / 10,
                "%s %s: %lu of %zu rows named", name, traits_of(type).name, named, exact.logits.size());
          for (const auto& [threads, chunk] : {std::pair(2, 1), std::pair(3, 7), std::pair(4, 3)}) {
            CHECK(run(model, tokens, true, threads, chunk, name).logits == found.logits,
                  "%s %s: %d threads and chunks of %d change the bits", name, traits_of(type).name, threads,
                  chunk);
          }
          // Too few rows: the whole head. All of them: the same, without falling back.
          const Bytes high = with_threshold(file, 1e29F);
          const Result none = run(Model::from_bytes(high), tokens, true, 2, 4, name);
          CHECK(none.logits == exact.logits && none.counters.head_fallbacks == tokens.size());
          CHECK(none.counters.head_rows_computed == exact.counters.head_rows_computed);
          const Bytes low = with_threshold(file, -1e29F);
          const Result all = run(Model::from_bytes(low), tokens, true, 2, 4, name);
          CHECK(all.logits == exact.logits && all.counters.head_fallbacks == 0);
          // For measuring: everything whatever the threshold, and what is compared with it.
          CHECK(run(Model::from_bytes(high), tokens, true, 2, 4, name, HeadRows::kAll).logits ==
                exact.logits);
          const Result scores = run(model, tokens, true, 2, 4, name, HeadRows::kScores);
          const float threshold = model->head_predictor->threshold;
          for (std::size_t i = 0; i < scores.logits.size(); ++i)
            CHECK((scores.logits[i] > threshold) == (found.logits[i] == exact.logits[i]));
        }
      }
    }
  }
  shape.predictor_width = 0;
  const Bytes bytes = make_container(shape, 7).write();
  try {
    run(Model::from_bytes(bytes), tokens, true, 1, 4, "auto");
    CHECK(false, "a file without a predictor was run with one");
  } catch (const EngineError&) {
  }
  std::printf("head: ok\n");
}
