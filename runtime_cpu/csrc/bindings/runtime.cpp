#include "forward/runtime.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings/types.hpp"

namespace smallthinker::bindings {
namespace {

using TokenArray = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

RuntimeOptions checked(const RuntimeOptions& options) {
  if (options.threads < 1 || options.threads > 1024 || options.context < 1 || options.chunk < 1 ||
      options.chunk > (1 << 16)) {
    throw EngineError("threads, context and chunk_tokens have to be positive and sensible");
  }
  return options;
}

void forward(PyRuntime& self, PySession& session, const TokenArray& tokens,
             const std::optional<LogitRows>& logits) {
  if (session.model != self.model) throw EngineError("the session belongs to another model");
  float* out = nullptr;
  std::int64_t rows = 0;
  if (logits) {
    if (static_cast<std::int64_t>(logits->shape(1)) != self.model->hyper.vocab) {
      throw EngineError("logits have to be [rows, vocabulary]");
    }
    out = logits->data();
    rows = static_cast<std::int64_t>(logits->shape(0));
  }
  const std::span<const std::int32_t> ids(tokens.data(), tokens.shape(0));
  const nb::gil_scoped_release release;
  self.runtime.forward(session.session, ids, out, rows);
}

void decode(PyRuntime& self, const std::vector<PySession*>& sessions, const TokenArray& tokens,
            const LogitRows& logits) {
  if (sessions.size() != tokens.shape(0) || sessions.size() != logits.shape(0) ||
      static_cast<std::int64_t>(logits.shape(1)) != self.model->hyper.vocab) {
    throw EngineError("there have to be as many tokens and rows of logits as sessions");
  }
  std::vector<Runtime::Step> steps;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i]->model != self.model) throw EngineError("the session belongs to another model");
    steps.push_back({&sessions[i]->session, tokens.data()[i]});
  }
  const nb::gil_scoped_release release;
  self.runtime.decode(steps, logits.data());
}

nb::dict take_counters(PySession& self) {
  const Counters counters = self.session.counters;
  self.session.counters.reset(self.model->hyper);
  const auto experts = static_cast<std::size_t>(self.model->hyper.experts);
  nb::list neurons;
  nb::list active;
  nb::list choices;
  for (std::size_t layer = 0; layer < counters.neurons.size(); ++layer) {
    neurons.append(counters.neurons[layer]);
    active.append(counters.active_neurons[layer]);
    nb::list row;
    for (std::size_t e = 0; e < experts; ++e) row.append(counters.expert_counts[layer * experts + e]);
    choices.append(row);
  }
  nb::dict result;
  result["neurons"] = neurons;
  result["active_neurons"] = active;
  result["expert_counts"] = choices;
  result["cache_hits"] = counters.cache_hits;
  result["cache_misses"] = counters.cache_misses;
  result["bytes_read"] = counters.bytes_read;
  result["waited_s"] = counters.waited_s;
  result["head_rows"] = counters.head_rows;
  result["head_rows_computed"] = counters.head_rows_computed;
  result["head_fallbacks"] = counters.head_fallbacks;
  return result;
}

nb::dict expert_counters(const PyRuntime& self) {
  nb::dict result;
  const ExpertStore* store = self.runtime.experts();
  if (store == nullptr || !store->offloads()) return result;
  const CacheCounters counters = store->counters();
  result["slots"] = store->cache()->slots();
  result["policy"] = std::string(store->cache()->policy());
  result["backend"] = store->reader()->backend();
  result["backend_reason"] = store->reader()->reason();
  result["hits"] = counters.hits;
  result["joined"] = counters.joined;
  result["misses"] = counters.misses;
  result["evictions"] = counters.evictions;
  result["speculated"] = counters.speculated;
  result["speculated_used"] = counters.speculated_used;
  result["speculated_wasted"] = counters.speculated_wasted;
  result["failures"] = counters.failures;
  result["bytes_read"] = counters.bytes_read;
  result["waited_s"] = counters.waited_s;
  return result;
}

nb::tuple sample(PyRuntime& self, Sampler& sampler, const LogitRow& logits, std::int64_t top) {
  Choice choice;
  {
    const nb::gil_scoped_release release;
    choice = self.runtime.sample(sampler, {logits.data(), logits.shape(0)}, top);
  }
  return nb::make_tuple(choice.id, choice.logprob, choice.top);
}

}  // namespace

void add_runtime(nb::module_& m) {
  nb::class_<Plan>(m, "Plan")
      .def_ro("weight_bytes", &Plan::weight_bytes)
      .def_ro("expert_bytes", &Plan::expert_bytes)
      .def_ro("offload_bytes", &Plan::offload_bytes)
      .def_ro("kv_bytes_per_session", &Plan::kv_bytes_per_session)
      .def_ro("kv_vector_bytes", &Plan::kv_vector_bytes)
      .def_ro("scratch_bytes", &Plan::scratch_bytes);
  m.def(
      "plan",
      [](const PyModel& model, int threads, std::int64_t context, const std::string& kv_type,
         std::int64_t chunk, const std::string& kernels, bool offload, bool predict_head) {
        RuntimeOptions options{.threads = threads,
                               .context = context,
                               .chunk = chunk,
                               .kernels = kernels,
                               .kv_type = kv_type,
                               .predict_head = predict_head};
        options.experts.cache_bytes = offload ? 1 : 0;
        return make_plan(*model.model, checked(options));
      },
      nb::arg("model"), nb::kw_only(), nb::arg("threads"), nb::arg("context"), nb::arg("kv_type") = "auto",
      nb::arg("chunk_tokens"), nb::arg("kernels") = "auto", nb::arg("offload") = false,
      nb::arg("predict_head") = false);
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  nb::class_<PySession>(m, "Session")
      .def_prop_ro("length", [](const PySession& s) { return s.session.length(); })
      .def("tokens", [](const PySession& s) { return s.session.tokens(); })
      .def("take_counters", &take_counters)
      .def_prop_ro("bytes_read", [](const PySession& s) { return s.session.counters.bytes_read; })
      .def(
          "truncate", [](PySession& s, std::int64_t length) { return s.session.truncate(length); },
          nb::arg("length"));

  nb::class_<PyRuntime>(m, "Runtime")
      .def(
          "__init__",
          [](PyRuntime* self, const PyModel& model, int threads, std::int64_t context,
             const std::string& kv_type, const std::string& kernels, std::int64_t chunk,
             std::uint64_t expert_cache_bytes, const std::string& backend, const std::string& policy,
             bool speculate, bool predict_head) {
            RuntimeOptions options{.threads = threads,
                                   .context = context,
                                   .chunk = chunk,
                                   .kernels = kernels,
                                   .kv_type = kv_type,
                                   .predict_head = predict_head,
                                   .speculate = speculate};
            options.experts.cache_bytes = expert_cache_bytes;
            options.experts.backend = backend;
            if (!policy.empty()) options.experts.policy = policy;
            const nb::gil_scoped_release release;
            new (self) PyRuntime{model.model, {model.model, checked(options)}};
          },
          nb::arg("model"), nb::kw_only(), nb::arg("threads"), nb::arg("context"),
          nb::arg("kv_type") = "auto", nb::arg("kernels") = "auto", nb::arg("chunk_tokens"),
          nb::arg("expert_cache_bytes") = 0, nb::arg("reader") = "auto", nb::arg("policy") = "",
          nb::arg("speculate") = true, nb::arg("predict_head") = false)
      .def("decode", &decode, nb::arg("sessions"), nb::arg("token_ids"), nb::kw_only(), nb::arg("logits"))
      .def("load_all",
           [](PyRuntime& s) {
             const nb::gil_scoped_release release;
             if (s.runtime.experts() != nullptr) s.runtime.experts()->load_all();
           })
      .def("expert_counters", &expert_counters)
      .def(
          "set_head_rows",
          [](PyRuntime& s, const std::string& rows) { s.runtime.set_head_rows(find_head_rows(rows)); },
          nb::arg("rows"))
      .def("sample", &sample, nb::arg("sampler"), nb::arg("logits"), nb::kw_only(), nb::arg("top_logprobs"))
      .def("new_session",
           [](const PyRuntime& s) {
             return PySession{s.model, Session(s.runtime.kv_layout(), s.model->hyper)};
           })
      .def("forward", &forward, nb::arg("session"), nb::arg("token_ids"), nb::kw_only(),
           nb::arg("logits").none())
      .def_prop_ro("kernels", [](const PyRuntime& s) { return std::string(s.runtime.kernels().name); })
      .def_prop_ro("kv_type",
                   [](const PyRuntime& s) { return std::string(name_of(s.runtime.kv_layout().type)); })
      .def_prop_ro("threads", [](const PyRuntime& s) { return s.runtime.threads(); });

  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, std::int64_t vocab, double temperature, std::int64_t top_k, double top_p,
             double min_p, double repetition, double presence, double frequency, std::uint64_t seed,
             const nb::dict& bias) {
            SamplerOptions options{.temperature = temperature,
                                   .top_k = top_k,
                                   .top_p = top_p,
                                   .min_p = min_p,
                                   .repetition_penalty = repetition,
                                   .presence_penalty = presence,
                                   .frequency_penalty = frequency,
                                   .seed = seed,
                                   .logit_bias = {}};
            for (const auto& [id, value] : bias)
              options.logit_bias.emplace_back(nb::cast<std::int32_t>(id), nb::cast<float>(value));
            new (self) Sampler(vocab, std::move(options));
          },
          nb::arg("vocab_size"), nb::kw_only(), nb::arg("temperature") = 0.0, nb::arg("top_k") = 0,
          nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0, nb::arg("repetition_penalty") = 1.0,
          nb::arg("presence_penalty") = 0.0, nb::arg("frequency_penalty") = 0.0, nb::arg("seed") = 0,
          nb::arg("logit_bias") = nb::dict())
      .def(
          "observe_prompt",
          [](Sampler& s, const std::vector<std::int32_t>& tokens) { s.observe_prompt(tokens); },
          nb::arg("token_ids"));
}

}  // namespace smallthinker::bindings
