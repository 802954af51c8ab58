// How fast a disk delivers experts: random reads of one size through every backend.
//
//   read_speed FILE [BYTES [DEPTH...]]      Markdown: GB/s, processor time per GB, median latency at depth 1
//
// The file has to be much larger than what is read, or the disk's own cache answers.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "experts/file_reader.hpp"
#include "forward/sampler.hpp"
#include "model/tensor.hpp"

using namespace smallthinker;

namespace {

constexpr double kSeconds = 3.0;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double processor_s() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void measure(const std::string& path, const char* backend, int depth, std::size_t bytes, std::byte* memory) {
  ReaderOptions options;
  options.backend = backend;
  options.depth = depth;
  const auto reader = FileReader::open(path, options);
  if (reader->file_bytes() < bytes) throw EngineError(path + " is smaller than one read");
  const auto reads = std::make_unique<Read[]>(static_cast<std::size_t>(depth));
  RandomStream random(static_cast<std::uint64_t>(depth));
  const std::uint64_t places = (reader->file_bytes() - bytes) / kReadAlign + 1;
  std::vector<double> latencies;
  const double begin = now();
  const double processor = processor_s();
  for (std::size_t i = 0; now() - begin < kSeconds; ++i) {
    const std::size_t place = i % static_cast<std::size_t>(depth);
    Read& read = reads[place];
    const double submitted = now();
    reader->wait(read);
    if (read.state() == Read::State::kFailed) throw EngineError(read.error());
    read.set({random.next() % places * kReadAlign, bytes, 0}, memory + place * bytes);
    reader->submit(read);
    if (depth == 1) reader->wait(read);
    latencies.push_back(now() - submitted);
  }
  for (int i = 0; i < depth; ++i) reader->wait(reads[static_cast<std::size_t>(i)]);
  const double gigabytes = static_cast<double>(reader->bytes_read()) * 1e-9;
  const double seconds = now() - begin;
  std::nth_element(latencies.begin(), latencies.begin() + static_cast<std::ptrdiff_t>(latencies.size() / 2),
                   latencies.end());
  std::printf("| %s | %d | %.2f | %.3f |", backend, depth, gigabytes / seconds,
              (processor_s() - processor) / gigabytes);
  if (depth == 1) std::printf(" %.2f |\n", latencies[latencies.size() / 2] * 1e3);
  if (depth != 1) std::printf(" |\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: read_speed FILE [BYTES [DEPTH...]]\n");
    return 2;
  }
  const std::size_t asked = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 663552;
  const std::size_t bytes = aligned_extent(0, asked).bytes;
  std::vector<int> depths;
  for (int i = 3; i < argc; ++i) depths.push_back(std::atoi(argv[i]));
  if (depths.empty()) depths = {1, 4};
  const int deepest = *std::max_element(depths.begin(), depths.end());
  std::printf(
      "| backend | depth | GB/s | processor s per GB | latency ms |\n| --- | --- | --- | --- | --- |\n");
  for (const char* backend : {"io_uring", "threads", "page_cache"}) {
    for (const int depth : depths) {
      try {
        struct Free {
          void operator()(std::byte* at) const { ::operator delete(at, std::align_val_t{kReadAlign}); }
        };
        const std::unique_ptr<std::byte, Free> memory(static_cast<std::byte*>(
            ::operator new(bytes* static_cast<std::size_t>(deepest), std::align_val_t{kReadAlign})));
        measure(argv[1], backend, depth, bytes, memory.get());
      } catch (const EngineError& error) {
        std::fprintf(stderr, "%s\n", error.what());
      }
    }
  }
  return 0;
}
