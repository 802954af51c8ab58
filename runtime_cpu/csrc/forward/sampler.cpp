#include "forward/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "model/tensor.hpp"

namespace smallthinker {
namespace {

constexpr std::int64_t kChunk = 64 * kLogitRun;  // logits of a piece of work
constexpr std::int64_t kMostLeaders = 1024;      // so many are sorted; a bound for more is searched for
constexpr std::int64_t kMostUndecided = 256;     // logits among which a cut is found by sorting
constexpr double kMostFactor = 1e30;             // 1 / temperature: 0 times this is still 0
constexpr double kLeastExponent = -90.0;         // of a weight that fp32 can hold
constexpr float kNone = -std::numeric_limits<float>::infinity();

// NaN sorts as the least.
float order_key(float logit) { return std::isnan(logit) ? kNone : logit; }

auto better(std::span<const float> logits) {
  return [logits](std::int32_t a, std::int32_t b) {
    const float first = order_key(logits[static_cast<std::size_t>(a)]);
    const float second = order_key(logits[static_cast<std::size_t>(b)]);
    return first != second ? first > second : a < b;
  };
}

std::uint64_t rotate_left(std::uint64_t value, unsigned bits) {
  return (value << bits) | (value >> (64U - bits));
}

}  // namespace

RandomStream::RandomStream(std::uint64_t seed) {
  for (std::uint64_t& word : state_) {
    seed += 0x9E3779B97F4A7C15U;
    std::uint64_t mixed = seed;
    mixed = (mixed ^ (mixed >> 30U)) * 0xBF58476D1CE4E5B9U;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94D049BB133111EBU;
    word = mixed ^ (mixed >> 31U);
  }
}

std::uint64_t RandomStream::next() {
  const std::uint64_t result = rotate_left(state_[1] * 5U, 7U) * 9U;
  const std::uint64_t shifted = state_[1] << 17U;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= shifted;
  state_[3] = rotate_left(state_[3], 45U);
  return result;
}

Sampler::Sampler(std::int64_t vocab, SamplerOptions options)
    : vocab_(vocab), options_(std::move(options)), random_(options_.seed) {
  for (const auto& [id, bias] : options_.logit_bias) {
    if (id < 0 || id >= vocab_)
      throw EngineError("logit_bias names token " + std::to_string(id) + ", outside the vocabulary");
  }
}

void Sampler::observe_prompt(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    if (token >= 0 && token < vocab_) ++seen_[token];
  }
}

template <typename Work>
void Sampler::each_chunk(const Means& means, const Work& work) const {
  const std::int64_t chunks = (vocab_ + kChunk - 1) / kChunk;
  const auto one = [&](std::int64_t chunk, int) {
    const std::int64_t begin = chunk * kChunk;
    work(chunk, begin, std::min(vocab_, begin + kChunk) - begin);
  };
  if (means.pool != nullptr) return means.pool->run(chunks, one);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) one(chunk, 0);
}

// The logarithm of the sum of exponentials; fills in the row's maxima on the way.
double Sampler::measure(const Means& means, Row& row) {
  std::vector<float> peaks(sums_.size());
  each_chunk(means, [&](std::int64_t chunk, std::int64_t begin, std::int64_t size) {
    const float* x = row.logits.data() + begin;
    float* maxima = row.maxima.data() + begin / kLogitRun;
    means.kernels.run_maxima(x, size, maxima);
    const float peak = *std::max_element(maxima, maxima + (size + kLogitRun - 1) / kLogitRun);
    const auto at = static_cast<std::size_t>(chunk);
    peaks[at] = peak;
    // Exponents are relative to the chunk's own greatest logit, so that the row is read once.
    const float shift = std::isfinite(peak) ? peak : 0.0F;
    sums_[at] = static_cast<double>(means.kernels.exp_weights(x, size, shift, 1.0F, 0.0F, nullptr));
  });
  row.peak = *std::max_element(peaks.begin(), peaks.end());
  if (!std::isfinite(row.peak)) return std::numeric_limits<double>::quiet_NaN();
  const auto peak = static_cast<double>(row.peak);
  double sum = 0.0;
  for (std::size_t i = 0; i < sums_.size(); ++i) {
    const double share = std::isfinite(peaks[i]) ? std::exp(static_cast<double>(peaks[i]) - peak) : 0.0;
    sum += sums_[i] * share;
  }
  return peak + std::log(sum);
}

bool Sampler::adjusts() const {
  return !options_.logit_bias.empty() || (options_.repetition_penalty != 1.0 && !seen_.empty()) ||
         ((options_.presence_penalty != 0.0 || options_.frequency_penalty != 0.0) && !generated_.empty());
}

// Into changed_.
void Sampler::adjust(const Means& means) {
  adjusted_.resize(own_.logits.size());
  each_chunk(means, [&](std::int64_t, std::int64_t begin, std::int64_t size) {
    std::copy_n(own_.logits.data() + begin, size, adjusted_.data() + begin);
  });
  for (const auto& [id, bias] : options_.logit_bias) adjusted_[static_cast<std::size_t>(id)] += bias;
  if (options_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    for (const auto& [id, count] : seen_) {
      float& logit = adjusted_[static_cast<std::size_t>(id)];
      logit = logit > 0.0F ? logit / penalty : logit * penalty;
    }
  }
  if (options_.presence_penalty != 0.0 || options_.frequency_penalty != 0.0) {
    for (const auto& [id, count] : generated_) {
      adjusted_[static_cast<std::size_t>(id)] -= static_cast<float>(
          options_.presence_penalty + options_.frequency_penalty * static_cast<double>(count));
    }
  }
  changed_.logits = adjusted_;
  changed_.maxima.resize(own_.maxima.size());
  each_chunk(means, [&](std::int64_t, std::int64_t begin, std::int64_t size) {
    means.kernels.run_maxima(adjusted_.data() + begin, size, changed_.maxima.data() + begin / kLogitRun);
  });
  changed_.peak = *std::max_element(changed_.maxima.begin(), changed_.maxima.end());
}

std::int32_t Sampler::greatest(const Row& row) {
  const auto run = std::find(row.maxima.begin(), row.maxima.end(), row.peak) - row.maxima.begin();
  const auto begin = row.logits.begin() + run * kLogitRun;
  const auto found = std::find(begin, row.logits.end(), row.peak);
  return found == row.logits.end() ? 0 : static_cast<std::int32_t>(found - row.logits.begin());
}

// The `count` best ids, best first.
void Sampler::leaders(const Row& row, std::int64_t count, std::vector<std::int32_t>& ids) {
  const auto runs = static_cast<std::int64_t>(row.maxima.size());
  const auto vocab = static_cast<std::int64_t>(row.logits.size());
  // As many runs have a greatest logit of at least this one, so at least as many logits are.
  float bound = kNone;
  if (count < runs) {
    std::vector<float> sorted = row.maxima;
    std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
    bound = sorted[static_cast<std::size_t>(count - 1)];
  }
  ids.clear();
  for (std::int64_t run = 0; run < runs; ++run) {
    if (row.maxima[static_cast<std::size_t>(run)] < bound) continue;
    for (std::int64_t i = run * kLogitRun; i < std::min(vocab, (run + 1) * kLogitRun); ++i) {
      if (order_key(row.logits[static_cast<std::size_t>(i)]) >= bound)
        ids.push_back(static_cast<std::int32_t>(i));
    }
  }
  const auto kept = std::min(count, static_cast<std::int64_t>(ids.size()));
  std::partial_sort(ids.begin(), ids.begin() + kept, ids.end(), better(row.logits));
  ids.resize(static_cast<std::size_t>(kept));
}

Sampler::Mass Sampler::mass_from(const Means& means, const Row& row, float bound) const {
  std::vector<LogitMass> parts(sums_.size());
  each_chunk(means, [&](std::int64_t chunk, std::int64_t begin, std::int64_t size) {
    parts[static_cast<std::size_t>(chunk)] =
        means.kernels.mass_above(row.logits.data() + begin, weights_.data() + begin, size, bound);
  });
  Mass all;
  for (const LogitMass& part : parts) {
    all.sum += static_cast<double>(part.sum);
    all.count += static_cast<double>(part.count);
  }
  return all;
}

// The shortest front of the order whose sum or count reaches `goal`: bisection between a bound that is too
// high and one that is low enough, until few logits are between them; those are sorted.
Sampler::Cut Sampler::find_cut(const Means& means, const Row& row, double goal, double Mass::* amount) {
  const auto reach = static_cast<float>(static_cast<double>(row.peak) + kLeastExponent * temperature());
  float low = std::max(reach, std::numeric_limits<float>::lowest());
  float high = std::nextafter(row.peak, std::numeric_limits<float>::infinity());
  Mass below = mass_from(means, row, low);  // of all from `low` on
  Mass above;                               // of all from `high` on
  while (below.count - above.count > static_cast<double>(kMostUndecided)) {
    const float middle = low + (high - low) * 0.5F;
    if (!(middle > low && middle < high)) break;  // equal logits
    const Mass mass = mass_from(means, row, middle);
    (mass.*amount >= goal ? low : high) = middle;
    (mass.*amount >= goal ? below : above) = mass;
  }
  std::vector<std::vector<std::int32_t>> found(sums_.size());
  each_chunk(means, [&](std::int64_t chunk, std::int64_t begin, std::int64_t size) {
    std::vector<std::int32_t>& ids = found[static_cast<std::size_t>(chunk)];
    const float* x = row.logits.data();
    for (std::int64_t run = begin; run < begin + size; run += kLogitRun) {
      const std::int64_t end = std::min(begin + size, run + kLogitRun);
      int any = 0;  // most runs hold none: without a branch per logit
      for (std::int64_t i = run; i < end; ++i) any |= int{x[i] >= low} & int{x[i] < high};
      for (std::int64_t i = run; any != 0 && i < end; ++i) {
        if (x[i] >= low && x[i] < high && weights_[static_cast<std::size_t>(i)] > 0.0F)
          ids.push_back(static_cast<std::int32_t>(i));
      }
    }
  });
  order_.clear();
  for (const auto& ids : found) order_.insert(order_.end(), ids.begin(), ids.end());
  if (order_.empty()) return {low, vocab_};
  std::sort(order_.begin(), order_.end(), better(row.logits));
  std::int32_t last = order_.front();
  for (const std::int32_t id : order_) {
    if (above.*amount >= goal) break;
    last = id;
    above.sum += static_cast<double>(weights_[static_cast<std::size_t>(id)]);
    above.count += 1.0;
  }
  return {row.logits[static_cast<std::size_t>(last)], last};
}

// The sum of what a cut leaves, by chunk in sums_.
double Sampler::kept_sum(const Means& means, const Row& row, const Cut& cut) {
  const float above = std::nextafter(cut.logit, std::numeric_limits<float>::infinity());
  each_chunk(means, [&](std::int64_t chunk, std::int64_t begin, std::int64_t size) {
    const std::int64_t equal = std::clamp<std::int64_t>(cut.id + 1 - begin, 0, size);
    const float* x = row.logits.data() + begin;
    const float* weights = weights_.data() + begin;
    sums_[static_cast<std::size_t>(chunk)] =
        static_cast<double>(means.kernels.mass_above(x, weights, equal, cut.logit).sum) +
        static_cast<double>(means.kernels.mass_above(x + equal, weights + equal, size - equal, above).sum);
  });
  double sum = 0.0;
  for (const double part : sums_) sum += part;
  return sum;
}

double Sampler::temperature() const { return std::max(options_.temperature, 1.0 / kMostFactor); }

std::int32_t Sampler::draw(const Means& means, const Row& row) {
  if (!std::isfinite(row.peak)) return greatest(row);
  if (options_.top_k > 0 && options_.top_k <= kMostLeaders && options_.top_k <= vocab_)
    return draw_leader(row);
  const auto factor = static_cast<float>(1.0 / temperature());
  const float least = std::max(static_cast<float>(options_.min_p), std::numeric_limits<float>::min());
  weights_.resize(row.logits.size());
  each_chunk(means, [&](std::int64_t, std::int64_t begin, std::int64_t size) {
    means.kernels.exp_weights(row.logits.data() + begin, size, row.peak, factor, least,
                              weights_.data() + begin);
  });
  Cut cut{kNone, vocab_};
  if (options_.top_k > 0 && options_.top_k < vocab_)
    cut = find_cut(means, row, static_cast<double>(options_.top_k), &Mass::count);
  double total = kept_sum(means, row, cut);
  if (options_.top_p < 1.0) {
    cut = find_cut(means, row, options_.top_p * total, &Mass::sum);
    total = kept_sum(means, row, cut);
  }
  return draw_kept(row, cut, random_.fraction() * total);
}

// In the order of ids.
std::int32_t Sampler::draw_kept(const Row& row, const Cut& cut, double left) const {
  std::int64_t last = 0;
  for (std::size_t chunk = 0; chunk < sums_.size(); ++chunk) {
    const bool here = left < sums_[chunk];
    // Past the end by rounding: the last one that is kept.
    if (!here && (sums_[chunk] == 0.0 || chunk + 1 < sums_.size())) {
      if (sums_[chunk] > 0.0) last = static_cast<std::int64_t>(chunk);
      left -= sums_[chunk];
      continue;
    }
    last = static_cast<std::int64_t>(chunk);
    break;
  }
  std::int64_t found = 0;
  for (std::int64_t i = last * kChunk; i < std::min(vocab_, (last + 1) * kChunk); ++i) {
    const auto at = static_cast<std::size_t>(i);
    const float logit = row.logits[at];
    const bool kept = logit > cut.logit || (logit == cut.logit && i <= cut.id);
    if (!kept || weights_[at] <= 0.0F) continue;
    found = i;
    left -= static_cast<double>(weights_[at]);
    if (left < 0.0) break;
  }
  return static_cast<std::int32_t>(found);
}

// Few are kept: in double precision.
std::int32_t Sampler::draw_leader(const Row& row) {
  leaders(row, options_.top_k, order_);
  std::vector<double> weights;
  double all = 0.0;
  for (const std::int32_t id : order_) {
    const auto logit = static_cast<double>(row.logits[static_cast<std::size_t>(id)]);
    const double weight = std::exp((logit - static_cast<double>(row.peak)) / temperature());
    if (!(weight > 0.0 && weight >= options_.min_p)) break;
    weights.push_back(weight);
    all += weight;
  }
  double total = 0.0;
  std::size_t kept = 0;
  while (kept < weights.size() && (kept == 0 || options_.top_p >= 1.0 || total < options_.top_p * all))
    total += weights[kept++];
  double left = random_.fraction() * total;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0.0) return order_[i];
  }
  return order_[kept - 1];
}

Choice Sampler::sample(std::span<const float> logits, std::int64_t top, const Kernels& kernels,
                       ThreadPool* pool) {
  if (static_cast<std::int64_t>(logits.size()) != vocab_)
    throw EngineError("a row of logits has the wrong size");
  const Means means{kernels, pool};
  own_.logits = logits;
  own_.maxima.resize(static_cast<std::size_t>((vocab_ + kLogitRun - 1) / kLogitRun));
  sums_.resize(static_cast<std::size_t>((vocab_ + kChunk - 1) / kChunk));
  const double normaliser = measure(means, own_);
  if (adjusts()) adjust(means);
  const Row& row = adjusts() ? changed_ : own_;
  Choice choice;
  choice.id = options_.temperature > 0.0 ? draw(means, row) : greatest(row);
  const auto logprob = [&](std::int32_t id) {
    return static_cast<float>(static_cast<double>(logits[static_cast<std::size_t>(id)]) - normaliser);
  };
  choice.logprob = logprob(choice.id);
  if (top > 0) {
    leaders(own_, std::min(top, vocab_), order_);
    for (const std::int32_t id : order_) choice.top.emplace_back(id, logprob(id));
  }
  ++generated_[choice.id];
  ++seen_[choice.id];
  return choice;
}

}  // namespace smallthinker
