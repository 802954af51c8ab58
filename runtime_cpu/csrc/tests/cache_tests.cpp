// The expert cache: right bytes under every backend and policy, what may never be evicted, errors and
// recovery.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <mutex>
#include <thread>

#include "forward/thread_pool.hpp"
#include "tests/asleep.hpp"
#include "tests/expert_file.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

namespace {

constexpr std::byte kMask{0x5A};

// Delays, short reads and interruptions, drawn anew for each attempt; `broken` is the offset whose page
// fails.
struct Weather {
  std::atomic<std::uint64_t> calls{0};
  std::atomic<std::int64_t> broken{-1};
  std::atomic<int> attempts_at_broken{0};
  bool rough = false;

  std::function<Fault(const Read&)> hook() {
    return [this](const Read& read) {
      Fault fault;
      if (static_cast<std::int64_t>(read.offset) == broken.load()) fault.error = EIO;
      if (!rough) return fault;
      RandomStream random(calls.fetch_add(1));
      const std::uint64_t kind = random.next() % 6;
      if (kind == 0) fault.delay_us = static_cast<int>(random.next() % 400);
      if (kind == 1 && fault.error == 0) fault.error = EINTR;
      if (kind == 2) fault.most_bytes = random.next() % 6000;
      return fault;
    };
  }
};

std::unique_ptr<FileReader> open_reader(const ExpertFile& experts, Weather& weather,
                                        const std::string& backend = "auto", int depth = 4) {
  ReaderOptions options;
  options.backend = backend;
  options.depth = depth;
  options.fault = weather.hook();
  return FileReader::open(experts.file->path, options);
}

PartTransform masking(const ExpertFile& experts, std::atomic<int>& runs) {
  return [&experts, &runs](ExpertKey key, int part, const std::byte* staged, std::byte* place) {
    const std::size_t bytes = experts.extent(key.layer, key.expert, part).bytes;
    for (std::size_t i = 0; i < bytes; ++i) place[i] = staged[i] ^ kMask;
    ++runs;
  };
}

std::vector<std::int32_t> draw(RandomStream& random, int experts, int count) {
  std::vector<std::int32_t> drawn;
  while (static_cast<int>(drawn.size()) < count) {
    const auto expert = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(experts));
    if (std::find(drawn.begin(), drawn.end(), expert) == drawn.end()) drawn.push_back(expert);
  }
  return drawn;
}

struct Storm {
  std::string backend;
  std::string policy;
  int slots = 0;
  bool packed = true;
  bool transformed = false;
  int staging = 4;
  int rounds = 20;
};

// Two drivers with layers of their own, each with two compute threads that wait for parts in any order.
void weather_storm(const Storm& storm) {
  constexpr int kLayers = 6;
  constexpr int kExperts = 10;
  constexpr int kUsed = 3;
  constexpr int kParts = 3;
  constexpr int kDrivers = 2;
  const ExpertFile experts(kLayers, kExperts, kParts, storm.packed);
  Weather weather;
  weather.rough = true;
  const auto reader = open_reader(experts, weather, storm.backend);
  const AlignedMemory memory(experts.layout.slot_bytes * static_cast<std::size_t>(storm.slots) + 5000);
  std::atomic<int> transforms{0};
  CacheOptions options;
  options.policy = storm.policy;
  options.staging_buffers = storm.staging;
  if (storm.transformed) options.transform = masking(experts, transforms);
  const std::byte mask = storm.transformed ? kMask : std::byte{0};
  std::atomic<std::uint64_t> requested{0};
  {
    ExpertCache cache(*reader, experts.layout, memory.span(), options);
    CHECK(cache.slots() == storm.slots && std::string(cache.policy()) == storm.policy);
    const auto drive = [&](int driver) {
      RandomStream random(static_cast<std::uint64_t>(driver + 1));
      ThreadPool pool(2);
      for (int round = 0; round < storm.rounds; ++round) {
        const int layer = driver + kDrivers * static_cast<int>(random.next() % (kLayers / kDrivers));
        const std::vector<std::int32_t> chosen = draw(random, kExperts, kUsed);
        cache.request(layer, chosen);
        requested += chosen.size();
        const std::uint64_t kind = random.next() % 8;
        if (kind == 0) {  // the request is cancelled: its reads go on, its slots have to stay theirs
          cache.release(layer);
          continue;
        }
        if (kind < 4) cache.speculate((layer + kDrivers) % kLayers, draw(random, kExperts, 2));
        if (kind == 4) cache.warm(std::vector<ExpertKey>{{layer, 1}, {layer, 2}, {layer, 3}});
        const auto verify = [&](std::int64_t piece) {
          const std::int32_t expert = chosen[static_cast<std::size_t>(piece) / kParts % kUsed];
          const int part = static_cast<int>(piece % kParts);
          const std::byte* data = cache.wait(layer, expert, part);
          CHECK(experts.same(layer, expert, part, data, mask), "layer %d expert %d part %d", layer, expert,
                part);
        };
        pool.run(kUsed * kParts * 2, [&](std::int64_t piece, int) { verify(piece); });  // each part twice
        if (kind == 5) cache.drain();
        // Lets reads end in between; no check hangs on it.
        if (kind == 6) std::this_thread::sleep_for(std::chrono::microseconds(300));
        pool.run(kUsed * kParts, [&](std::int64_t piece, int) { verify(piece); });  // still there
        cache.release(layer);
      }
    };
    std::thread other(drive, 1);
    drive(0);
    other.join();
    cache.drain();
    const CacheCounters counters = cache.counters();
    CHECK(counters.hits + counters.joined + counters.misses == requested.load());
    CHECK(counters.failures == 0 && counters.misses >= static_cast<std::uint64_t>(kUsed));
    CHECK(counters.speculated >= counters.speculated_used + counters.speculated_wasted);
    if (storm.transformed) {
      const auto reads = (counters.misses + counters.speculated) * kParts;
      CHECK(transforms > 0 &&
            static_cast<std::uint64_t>(transforms) <= reads + 3 * storm.rounds * kDrivers * kParts);
    }
    cache.request(0, std::vector<std::int32_t>{0, 1, 2});  // destroyed with reads in flight
  }
  CHECK(reader->unfinished() == 0);
}

// One part fails, the rest of the world goes on; after release() the next request reads again.
void fail_and_recover(const std::string& backend, bool transformed) {
  const ExpertFile experts(2, 4, 2, false);
  Weather weather;
  const auto reader = open_reader(experts, weather, backend);
  const AlignedMemory memory(experts.layout.slot_bytes * 4);
  CacheOptions options;
  std::atomic<int> transforms{0};
  std::atomic<bool> throwing{false};
  const PartTransform mask = masking(experts, transforms);
  if (transformed) {
    options.transform = [&](ExpertKey key, int part, const std::byte* staged, std::byte* place) {
      if (throwing) throw EngineError("no such luck");
      mask(key, part, staged, place);
    };
    options.staging_buffers = 1;
  }
  ExpertCache cache(*reader, experts.layout, memory.span(), options);
  const auto good = [&](int expert, int part) {
    return experts.same(1, expert, part, cache.wait(1, expert, part), transformed ? kMask : std::byte{0});
  };
  const auto fails = [&](const char* sentence, int part) {
    cache.request(1, std::vector<std::int32_t>{0, 2, 3});
    std::thread second([&] { CHECK(contains(error_of([&] { cache.wait(1, 2, part); }), sentence)); });
    const std::string error = error_of([&] { cache.wait(1, 2, part); });
    second.join();
    CHECK(contains(error, sentence), "%s", error.c_str());
    CHECK(error_of([&] { cache.wait(1, 2, part); }) == error);  // until the layer is released
    CHECK(good(0, 0) && good(3, 0) && good(3, 1));
    cache.drain();
    CHECK(cache.in_memory(1, 2));
    cache.release(1);
    CHECK(!cache.in_memory(1, 2) && cache.in_memory(1, 3));
  };
  const auto works = [&] {
    cache.request(1, std::vector<std::int32_t>{0, 2, 3});
    CHECK(good(2, 1) && good(2, 0) && good(0, 1) && good(3, 0));
    cache.release(1);
  };
  const auto forget = [&] {  // other experts take all the slots
    cache.request(0, std::vector<std::int32_t>{0, 1, 2, 3});
    for (int expert = 0; expert < 4; ++expert) cache.wait(0, expert, 1);
    cache.release(0);
    CHECK(!cache.in_memory(1, 2));
  };
  for (const int part : {0, 1}) {
    const ExpertExtent& extent = experts.extent(1, 2, part);
    weather.broken = static_cast<std::int64_t>(aligned_extent(extent.offset, extent.bytes).offset);
    fails(experts.file->path.c_str(), part);
    weather.broken = -1;
    works();
    forget();
    experts.file->damage(extent.offset + extent.bytes - 1);
    fails("expert 2 of layer 1 is damaged", part);
    experts.file->restore();
    works();
    forget();
  }
  if (transformed) {
    throwing = true;
    cache.request(1, std::vector<std::int32_t>{2});
    CHECK(contains(error_of([&] { cache.wait(1, 2, 0); }), "no such luck"));
    cache.release(1);
    throwing = false;
    works();
    forget();
  }
  // A file that loses its end: the experts before it go on.
  experts.file->truncate(static_cast<std::size_t>(experts.extent(1, 3, 0).offset));
  cache.request(1, std::vector<std::int32_t>{0, 3});
  CHECK(contains(error_of([&] { cache.wait(1, 3, 1); }), "the file ends there"));
  CHECK(good(0, 0) && good(0, 1));
  cache.release(1);
  experts.file->restore();
  works();
  // A guess that failed is no obstacle: the request reads again.
  forget();
  weather.broken = static_cast<std::int64_t>(
      aligned_extent(experts.extent(1, 2, 0).offset, experts.extent(1, 2, 0).bytes).offset);
  for (int token = 0; token < 3; ++token) {  // lets the others grow old
    cache.request(1, {});
    cache.request(0, {});
  }
  cache.drain();  // a busy reader would drop the guess
  CHECK(cache.speculate(1, std::vector<std::int32_t>{2}) == 1);
  cache.drain();
  weather.broken = -1;
  works();
  CHECK(cache.counters().failures >= 5 && cache.counters().speculated_wasted >= 1);
}

void keep_promises() {
  const ExpertFile experts(3, 6, 2, true);
  Weather weather;
  const auto reader = open_reader(experts, weather);
  const AlignedMemory memory(experts.layout.slot_bytes * 4 + 100);
  ExpertCache cache(*reader, experts.layout, memory.span());
  CHECK(cache.slots() == 4 && cache.memory_bytes() > experts.layout.slot_bytes * 4);
  const auto ids = [](std::initializer_list<std::int32_t> list) { return std::vector<std::int32_t>(list); };

  // Too much at once changes nothing.
  cache.request(0, ids({0, 1, 1, 0}));
  CHECK(contains(error_of([&] { cache.request(1, ids({0, 1, 2})); }), "only 4 slots"));
  CHECK(contains(error_of([&] { cache.request(1, ids({6})); }), "no expert 6"));
  CHECK(contains(error_of([&] { cache.request(3, ids({0})); }), "no layer 3"));
  CHECK(contains(error_of([&] { cache.wait(1, 0, 0); }), "was not requested"));
  CHECK(contains(error_of([&] { cache.wait(0, 0, 2); }), "no part 2"));
  CHECK(cache.counters().misses == 2 && !cache.in_memory(1, 0));
  cache.request(1, ids({4, 5}));  // exactly full
  for (const int expert : {4, 5}) CHECK(experts.same(1, expert, 1, cache.wait(1, expert, 1)));
  CHECK(cache.speculate(2, ids({0, 1})) == 0 && cache.warm(std::vector<ExpertKey>{{2, 0}}) == 0);
  for (const int expert : {0, 1}) CHECK(experts.same(0, expert, 0, cache.wait(0, expert, 0)));
  cache.release(1);
  cache.drain();
  CHECK(cache.speculate(2, ids({0, 1})) == 0);  // all were used just now
  cache.release(0);

  // Old ones give way to a guess; the guess is used once, or wasted.
  for (int token = 0; token < 3; ++token) {
    cache.request(1, {});
    cache.request(0, {});
  }
  CHECK(cache.speculate(2, ids({0, 1, 1})) == 2 && cache.speculate(2, ids({0, 1})) == 0);
  cache.request(2, ids({0}));
  CHECK(experts.same(2, 0, 1, cache.wait(2, 0, 1)));
  cache.release(2);
  CacheCounters counters = cache.counters();
  CHECK(counters.speculated == 2 && counters.speculated_used == 1 && counters.misses == 4);
  CHECK(counters.hits + counters.joined == 1);
  cache.drain();
  for (int token = 0; token < 2; ++token) {
    cache.request(0, ids({2, 3}));
    for (const int expert : {2, 3}) CHECK(experts.same(0, expert, 1, cache.wait(0, expert, 1)));
    cache.request(1, ids({2, 3}));
    for (const int expert : {2, 3}) CHECK(experts.same(1, expert, 0, cache.wait(1, expert, 0)));
    cache.release(0);
    cache.release(1);
  }
  counters = cache.counters();
  CHECK(counters.speculated_wasted == 1 && counters.misses == 8 && counters.hits + counters.joined == 5);
  CHECK(counters.bytes_read > 0);
}

// What was read for a layer to come stays until that layer has had its turn.
void keep_guesses() {
  const ExpertFile experts(4, 6, 2, true);
  Weather weather;
  const auto reader = open_reader(experts, weather);
  const AlignedMemory memory(experts.layout.slot_bytes * 4);
  ExpertCache cache(*reader, experts.layout, memory.span());
  const auto use = [&](int layer, std::initializer_list<std::int32_t> list) {
    const std::vector<std::int32_t> ids(list);
    cache.request(layer, ids);
    for (const std::int32_t expert : ids) cache.wait(layer, expert, 1);
    cache.release(layer);
  };
  for (int token = 0; token < 4; ++token) use(0, {0, 1, 2, 3});  // used often, the guess never
  for (int token = 0; token < 3; ++token) {
    use(1, {});
    use(0, {});
  }
  CHECK(cache.speculate(3, std::vector<std::int32_t>{5}) == 1);
  cache.drain();
  use(1, {0});
  use(2, {0, 1});
  CHECK(cache.in_memory(3, 5), "a guess gave way before its layer's turn");
  use(3, {4});
  CHECK(!cache.in_memory(3, 5), "a guess that was wrong stays");
}

// While reads hang, nothing that they write to is given away, and requests overtake guesses.
void hold_reads() {
  const ExpertFile experts(3, 6, 2, true);
  std::atomic<bool> held{true};
  std::atomic<int> begun{0};
  ReaderOptions options;
  options.depth = 1;
  std::mutex mutex;
  std::vector<std::uint64_t> order;
  options.fault = [&](const Read& read) {
    ++begun;
    {
      const std::lock_guard lock(mutex);
      order.push_back(read.offset);
    }
    while (held) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return Fault{};
  };
  const auto reader = FileReader::open(experts.file->path, options);
  const AlignedMemory memory(experts.layout.slot_bytes * 2);
  ExpertLayout layout = experts.layout;
  layout.prior.assign(18, 0.1F);
  layout.prior[9] = 0.9F;
  layout.prior[2] = std::numeric_limits<float>::quiet_NaN();
  ExpertCache cache(*reader, layout, memory.span());
  const std::vector<ExpertKey> popular = cache.by_popularity();
  CHECK(popular.size() == 18 && popular[0].layer == 1 && popular[0].expert == 3 && popular[17].expert == 2);
  CHECK(cache.warm(popular) == 2 && cache.warm(popular) == 0);
  while (begun == 0) std::this_thread::yield();
  // One of the two warmed has begun to be read and stays; the other gives way to a request at once.
  cache.request(0, std::vector<std::int32_t>{4, 5});
  CHECK(cache.in_memory(1, 3) && cache.in_memory(0, 4) + cache.in_memory(0, 5) == 1);
  CHECK(cache.speculate(2, std::vector<std::int32_t>{1}) == 0);  // the reader is busy
  std::thread release([&held, waiter = this_thread()] {
    await_sleep(waiter);
    held = false;
  });
  for (const int expert : {5, 4}) {
    for (const int part : {1, 0}) CHECK(experts.same(0, expert, part, cache.wait(0, expert, part)));
  }
  release.join();
  cache.release(0);
  CHECK(cache.counters().waited_s > 0.0);
  CHECK(order.size() >= 6 && order[0] == experts.extent(1, 3, 0).offset);
  CHECK(order[1] == experts.extent(0, 4, 0).offset && order[2] == experts.extent(0, 4, 1).offset);
  // All first parts are read before the second ones.
  order.clear();
  cache.request(2, std::vector<std::int32_t>{0, 1});
  cache.drain();
  cache.release(2);
  CHECK(order ==
        (std::vector<std::uint64_t>{experts.extent(2, 0, 0).offset, experts.extent(2, 1, 0).offset,
                                    experts.extent(2, 0, 1).offset, experts.extent(2, 1, 1).offset}));
}

// The first part of a guess has failed while the second is still being read: a request must not get its slot.
void detach_under_way() {
  const ExpertFile experts(2, 2, 2, true);
  std::atomic<bool> failing{true};
  std::atomic<bool> held{true};
  std::atomic<bool> begun{false};
  ReaderOptions options;
  options.fault = [&](const Read& read) {
    Fault fault;
    if (read.offset == experts.extent(1, 1, 0).offset && failing) fault.error = EIO;
    if (read.offset == experts.extent(1, 1, 1).offset) {
      begun = true;
      while (held) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return fault;
  };
  const auto reader = FileReader::open(experts.file->path, options);
  const AlignedMemory memory(experts.layout.slot_bytes);
  ExpertCache cache(*reader, experts.layout, memory.span());
  CHECK(cache.speculate(1, std::vector<std::int32_t>{1}) == 1);
  while (!begun) std::this_thread::yield();
  while (reader->unfinished() > 1) std::this_thread::yield();
  failing = false;
  cache.request(1, std::vector<std::int32_t>{1});
  CHECK(!cache.in_memory(1, 1));
  std::thread release([&held, waiter = this_thread()] {
    await_sleep(waiter);
    held = false;
  });
  for (const int part : {0, 1}) CHECK(experts.same(1, 1, part, cache.wait(1, 1, part)));
  release.join();
  cache.release(1);
}

void refuse_bad_layouts() {
  const ExpertFile experts(2, 3, 2, false);
  const auto reader = FileReader::open(experts.file->path);
  const AlignedMemory memory(experts.layout.slot_bytes * 2);
  const auto refused = [&](const char* sentence, const auto& mutate, std::size_t bytes) {
    ExpertLayout layout = experts.layout;
    mutate(layout);
    const std::string error =
        error_of([&] { ExpertCache(*reader, std::move(layout), memory.span().first(bytes)); });
    CHECK(contains(error, sentence), "%s", error.c_str());
  };
  const std::size_t all = memory.span().size();
  refused("no slot", [](ExpertLayout&) {}, experts.layout.slot_bytes - 1);
  refused("wrong size", [](ExpertLayout& layout) { layout.extents.pop_back(); }, all);
  refused("wrong size", [](ExpertLayout& layout) { layout.experts = 0; }, all);
  refused("checksums", [](ExpertLayout& layout) { layout.checksums.pop_back(); }, all);
  refused("outside the file", [](ExpertLayout& layout) { layout.extents.back().bytes += 1; }, all);
  refused("outside the file", [](ExpertLayout& layout) { layout.extents[0].offset = ~0ULL - 31; }, all);
  refused("larger than its slot", [](ExpertLayout& layout) { layout.extents[0].bytes += 8192; }, all);
  refused("do not fit", [](ExpertLayout& layout) { layout.parts[1].bytes += 4096; }, all);
  refused("do not fit", [](ExpertLayout& layout) { layout.parts[1].offset = 4096; }, all);
  refused("aligned", [](ExpertLayout& layout) { layout.slot_bytes += 8; }, all);
  refused("popularity", [](ExpertLayout& layout) { layout.prior = {0.5F}; }, all);
}

}  // namespace

void test_expert_cache() {
  const std::vector<std::string> backends = working_backends();
  for (const std::string& backend : backends) {
    for (const CachePolicy& policy : cache_policies()) {
      Storm storm{backend, policy.name, 6};  // two drivers' requests, to the slot
      weather_storm(storm);
      storm.slots = 23;
      storm.packed = false;
      weather_storm(storm);
    }
    weather_storm({backend, kDefaultPolicy, 60});
    for (const int staging : {1, 3, 40}) weather_storm({backend, kDefaultPolicy, 7, false, true, staging});
    fail_and_recover(backend, false);
    fail_and_recover(backend, true);
  }
  keep_promises();
  keep_guesses();
  hold_reads();
  detach_under_way();
  refuse_bad_layouts();
  std::printf("expert cache: %zu backends, %zu policies\n", backends.size(), cache_policies().size());
}
