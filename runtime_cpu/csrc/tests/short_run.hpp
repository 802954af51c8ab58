// A few tokens through a model that a reader accepted: every weight that the file promises is read.
//
//   run_shortly(Model::from_bytes(bytes));
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "forward/runtime.hpp"
#include "forward/session.hpp"
#include "model/model.hpp"

namespace smallthinker {

inline void run_shortly(const std::shared_ptr<const Model>& model) {
  RuntimeOptions options;
  options.context = std::min<std::int64_t>(model->hyper.context, 16);
  options.chunk = 4;
  options.predict_head = model->head_predictor.has_value();
  Runtime runtime(model, options);
  Session session(runtime.kv_layout(), model->hyper);
  std::vector<float> logits(static_cast<std::size_t>(model->hyper.vocab));
  const auto last = static_cast<std::int32_t>(model->hyper.vocab - 1);
  const std::vector<std::int32_t> tokens(static_cast<std::size_t>(std::min<std::int64_t>(options.context, 3)),
                                         last);
  runtime.forward(session, tokens, logits.data(), 1);
}

}  // namespace smallthinker
