// Which experts the tokens of a batch use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "forward/compute.hpp"
#include "forward/scratch.hpp"
#include "model/model.hpp"

namespace smallthinker {

// A layer's choice, in the scratch memory until the choice of the layer `rooms` further on. A slot is one
// (token, expert) pair; slots are sorted by expert, then by token.
struct Routing {
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t per_token = 0;                  // k
  const std::int32_t* expert_ids = nullptr;    // [tokens][k], ascending within a token
  const float* weights = nullptr;              // [tokens][k]
  const std::int32_t* slots = nullptr;         // [tokens][k]
  const std::int32_t* slot_tokens = nullptr;   // [tokens * k]
  const std::int32_t* expert_begin = nullptr;  // [experts + 1]: expert e has slots [begin[e], begin[e + 1])

  std::int64_t all_slots() const { return tokens * per_token; }
  std::int64_t first_slot(std::int64_t expert) const { return expert_begin[expert]; }
  std::int64_t slot_count(std::int64_t expert) const {
    return expert_begin[expert + 1] - expert_begin[expert];
  }
  std::span<const std::int32_t> tokens_of(std::int64_t expert) const {
    return {slot_tokens + first_slot(expert), static_cast<std::size_t>(slot_count(expert))};
  }
  std::span<const std::int32_t> experts_of(std::int64_t token) const {
    return {expert_ids + token * per_token, static_cast<std::size_t>(per_token)};
  }
};

class Router {
 public:
  Router(const Hyperparameters& hyper, const Scratch& scratch, std::int64_t chunk)
      : hyper_(hyper), scratch_(scratch), chunk_(chunk) {}

  // Choices that exist at once: of a layer and of those whose routers read the stream before it does.
  static std::int64_t rooms(const Hyperparameters& hyper) {
    return std::min(hyper.router_lead + 1, hyper.layers);
  }
  // The layers [first, last) whose routers read the stream as it enters `layer`.
  struct Layers {
    std::int64_t first, last;
  };
  Layers reading(std::int64_t layer) const;

  // A layer's logits from the residual stream x; `matrix` [experts][hidden].
  void add_product(std::int64_t layer, const Linear& matrix, std::int64_t tokens, Products& products) const;
  // Once they are computed: the k greatest logits of every token (the lower index among equals), weighted by
  // the model's function over the chosen logits only.
  Routing choose(std::int64_t layer, std::int64_t tokens) const;

 private:
  float* logits(std::int64_t layer) const {
    return scratch_.router_logits + room(layer) * chunk_ * hyper_.experts;
  }
  std::int64_t room(std::int64_t layer) const { return layer % rooms(hyper_); }
  void choose_of_token(const float* logits, std::int32_t* ids, float* weights) const;

  const Hyperparameters& hyper_;
  const Scratch& scratch_;
  std::int64_t chunk_;
};

}  // namespace smallthinker
