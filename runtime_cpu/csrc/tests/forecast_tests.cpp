// What is guessed of the layers to come: by routers in Q4_0, counted right or wrong by what the layers chose.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <span>
#include <vector>

#include "experts/forecast.hpp"
#include "kernels/table.hpp"
#include "model/quantisation.hpp"
#include "tests/check.hpp"
#include "tests/gguf_builder.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

const auto kNothing = [](std::int32_t) { return false; };

void set_logits(ExpertForecast& forecast, std::int64_t distance, std::span<const float> values) {
  std::copy(values.begin(), values.end(), forecast.logits(distance));
}

ExpertForecast forecast_of(const Model& model) {
  std::vector<const Linear*> routers;
  for (const Layer& layer : model.layers) routers.push_back(&layer.router);
  return {model.hyper, routers};
}

void test_routers(const Model& model) {
  const ExpertForecast forecast = forecast_of(model);
  const Hyperparameters& hyper = model.hyper;
  std::vector<float> rounded(static_cast<std::size_t>(round_up(hyper.hidden, kActivationBlock)));
  for (std::int64_t layer = 0; layer < hyper.layers; ++layer) {
    const Matrix& router = model.layers[static_cast<std::size_t>(layer)].router.stock;
    std::vector<float> exact(static_cast<std::size_t>(hyper.hidden));
    for (std::int64_t e = 0; e < hyper.experts; ++e) {
      dequantise(router.type, router.row(e), hyper.hidden, exact.data());
      unpack_tile_row(forecast.router(layer), e, rounded.data());
      for (std::size_t begin = 0; begin < exact.size(); begin += kActivationBlock) {
        float greatest = 0.0F;
        for (std::size_t i = begin; i < begin + kActivationBlock; ++i)
          greatest = std::max(greatest, std::fabs(exact[i]));
        for (std::size_t i = begin; i < begin + kActivationBlock; ++i) {
          // Half a step, or a whole one at the end of the range that -8 to 7 leaves out.
          CHECK(std::fabs(exact[i] - rounded[i]) <= greatest / 8.0F * 1.001F, "layer %ld: %f became %f",
                static_cast<long>(layer), static_cast<double>(exact[i]), static_cast<double>(rounded[i]));
        }
      }
    }
  }
}

void test_probability(const Model& model) {
  ExpertForecast forecast = forecast_of(model);
  const std::vector<float> logits = {0.5F, 3.0F, std::numeric_limits<float>::quiet_NaN(), 1.0F};
  const std::vector<std::int32_t> both = {1, 3}, first = {0, 1};
  for (int pass = 0; pass < 400; ++pass) {
    forecast.learn(0, first);
    set_logits(forecast, 1, logits);
    const auto guesses = forecast.missing(0, 1, kNothing);
    CHECK(guesses.size() == 2 && guesses[0].expert == 1 && guesses[1].expert == 3);
    set_logits(forecast, 2, logits);
    forecast.missing(0, 2, [](std::int32_t expert) { return expert == 1; });
    forecast.learn(1, first);  // of rank 0 right, of rank 1 wrong
    forecast.learn(2, both);   // both right; only the second was missing
  }
  auto guesses = forecast.missing(0, 1, kNothing);
  CHECK(guesses[0].probability > 0.99 && guesses[1].probability < 0.05, "%f and %f", guesses[0].probability,
        guesses[1].probability);
  guesses = forecast.missing(0, 2, kNothing);
  CHECK(std::fabs(guesses[0].probability - 0.8) < 1e-9, "what was in memory taught something: %f",
        guesses[0].probability);
  CHECK(guesses[1].probability > 0.99);
  CHECK(forecast.missing(0, 1, [](std::int32_t) { return true; }).empty());

  // A pass that was broken off teaches nothing.
  const double before = forecast.missing(0, 2, kNothing)[1].probability;
  forecast.learn(0, first);
  forecast.learn(2, first);
  CHECK(forecast.missing(0, 2, kNothing)[1].probability == before);
}

}  // namespace

void test_forecast() {
  Shape shape;
  shape.hidden = 96;
  const Bytes bytes = make_container(shape, 3).write();
  const auto model = Model::from_bytes(bytes);
  test_routers(*model);
  test_probability(*model);
  std::printf("forecast: ok\n");
}
