// The checksum, and reading a file by every backend under faults.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <set>
#include <thread>

#include "experts/checksum.hpp"
#include "tests/asleep.hpp"
#include "tests/test_file.hpp"

using namespace smallthinker;
using namespace smallthinker::testing;

void test_checksum() {
  std::vector<std::byte> data(200);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 37 + 11);
  // The file format holds these values: they may never change.
  CHECK(checksum64(data.data(), 0) == 0);
  CHECK(checksum64(data.data(), 200) == 0x54A014A29DCB0838U);

  for (const std::size_t bytes : {1UL, 3UL, 4UL, 31UL, 32UL, 33UL, 64UL, 127UL, 200UL}) {
    std::set<std::uint64_t> seen = {checksum64(data.data(), bytes)};
    for (std::size_t bit = 0; bit < bytes * 8; ++bit) {
      data[bit / 8] ^= std::byte{1} << (bit % 8);
      CHECK(seen.insert(checksum64(data.data(), bytes)).second, "bit %zu of %zu bytes", bit, bytes);
      data[bit / 8] ^= std::byte{1} << (bit % 8);
    }
  }
  // Zeros at the end and swapped words are seen too.
  std::vector<std::byte> zeros(100);
  std::set<std::uint64_t> lengths;
  for (std::size_t bytes = 0; bytes <= zeros.size(); ++bytes) {
    CHECK(lengths.insert(checksum64(zeros.data(), bytes)).second);
  }
  RandomStream random(5);
  std::vector<std::byte> blob(70001);
  for (std::byte& value : blob) value = static_cast<std::byte>(random.next());
  const std::uint64_t right = checksum64(blob.data(), blob.size());
  for (int round = 0; round < 2000; ++round) {
    const std::vector<std::byte> before = blob;
    const std::size_t from = random.next() % blob.size();
    const std::size_t count = std::min<std::size_t>(1 + random.next() % 4096, blob.size() - from);
    if (round % 4 == 0) {
      std::memset(&blob[from], 0, count);
    } else if (round % 4 == 1) {
      const std::size_t other = random.next() % (blob.size() - count);
      std::memmove(&blob[from], &blob[other], count);  // a block from elsewhere
    } else {
      for (std::size_t i = from; i < from + count; i += 1 + random.next() % 64) {
        blob[i] ^= round % 4 == 2 ? static_cast<std::byte>(random.next()) : std::byte{0x80};
      }
    }
    CHECK((checksum64(blob.data(), blob.size()) == right) == (blob == before), "round %d", round);
    blob = before;
  }
  std::printf("checksum: ok\n");
}

namespace {

std::unique_ptr<FileReader> open_reader(const std::string& path, const std::string& backend,
                                        std::function<Fault(const Read&)> fault = {}, int depth = 4) {
  ReaderOptions options;
  options.backend = backend;
  options.depth = depth;
  options.fault = std::move(fault);
  return FileReader::open(path, options);
}

void check_bytes(const TestFile& file, const Read& read) {
  CHECK(read.state() == Read::State::kDone, "%s", read.error().c_str());
  const std::size_t there = std::min(read.bytes, file.content.size() - static_cast<std::size_t>(read.offset));
  CHECK(std::memcmp(read.destination, &file.content[read.offset], there) == 0);
}

void read_at_random(const std::string& backend, const std::function<Fault(const Read&)>& fault, int rounds) {
  const TestFile file(300 * 1024 + 1234);
  const auto reader = open_reader(file.path, backend, fault);
  const auto run = [&](std::uint64_t seed) {
    RandomStream random(seed);
    constexpr std::size_t kReads = 8;
    const AlignedMemory memory(kReads * 16 * kReadAlign);
    for (int round = 0; round < rounds; ++round) {
      Read reads[kReads];
      for (std::size_t i = 0; i < kReads; ++i) {
        std::size_t offset = random.next() % file.content.size();
        if (i == 0) offset = file.content.size() - 1 - random.next() % 5000;  // over the end
        const std::size_t bytes =
            1 + random.next() % std::min<std::size_t>(file.content.size() - offset, 50000);
        reads[i].set(aligned_extent(offset, bytes), memory.data() + i * 16 * kReadAlign);
        reader->submit(reads[i],
                       i % 3 == 0 ? FileReader::Priority::kPrefetch : FileReader::Priority::kDemand);
        if (i == 6) reader->promote(reads[3]);
      }
      for (Read& read : reads) {
        reader->wait(read);
        check_bytes(file, read);
      }
    }
  };
  std::thread other(run, 3);
  run(4);
  other.join();
  CHECK(reader->unfinished() == 0);
}

void fail_and_recover(const std::string& backend) {
  const TestFile file(10 * kReadAlign + 100);
  std::atomic<int> error{0};
  const auto reader = open_reader(file.path, backend, [&](const Read&) {
    Fault fault;
    fault.error = error.load();
    return fault;
  });
  const AlignedMemory memory(32 * kReadAlign);
  const auto outcome = [&](std::uint64_t offset, std::size_t bytes, std::size_t shift = 0) {
    Read read;
    read.set({offset, bytes, 0}, memory.data() + shift);
    reader->submit(read);
    reader->wait(read);
    CHECK(!read.pending());
    if (read.state() == Read::State::kDone) check_bytes(file, read);
    return read.state() == Read::State::kDone ? std::string() : read.error();
  };
  CHECK(outcome(0, 11 * kReadAlign).empty());
  for (const int code : {EIO, EINTR, EAGAIN}) {  // the latter two for ever
    error = code;
    const std::string text = outcome(kReadAlign, kReadAlign);
    CHECK(contains(text, file.path) && contains(text, "offset 4096"), "%s", text.c_str());
    error = 0;
    CHECK(outcome(kReadAlign, kReadAlign).empty());
  }
  CHECK(contains(outcome(1, kReadAlign), "multiples of 4096"));
  CHECK(contains(outcome(0, 100), "multiples of 4096"));
  CHECK(contains(outcome(0, kReadAlign, 32), "multiples of 4096"));
  CHECK(contains(outcome(0, 0), "multiples of 4096"));
  CHECK(contains(outcome(11 * kReadAlign, kReadAlign), "the file has 41060 bytes"));
  CHECK(contains(outcome(0, 12 * kReadAlign), "the file has 41060 bytes"));
  CHECK(contains(outcome(~std::uint64_t{4095}, kReadAlign), "the file has 41060 bytes"));
  for (const std::size_t left : {std::size_t{0}, 3 * kReadAlign, 3 * kReadAlign + 77}) {
    file.truncate(left);
    const std::string text = outcome(2 * kReadAlign, 9 * kReadAlign);
    CHECK(contains(text, "the file ends there"), "%s", text.c_str());
  }
  file.restore();
  CHECK(outcome(2 * kReadAlign, 9 * kReadAlign).empty());
}

void take_back_and_close(const std::string& backend) {
  const TestFile file(64 * kReadAlign);
  const AlignedMemory memory(64 * kReadAlign);
  std::atomic<bool> held{true};
  std::atomic<int> begun{0};
  std::vector<std::uint64_t> order;  // the reader works on one read at a time
  Read reads[8];
  const auto aim = [&](std::size_t i) {
    reads[i].set({i * 8 * kReadAlign, 8 * kReadAlign, 0}, memory.data() + i * 8 * kReadAlign);
  };
  for (std::size_t i = 0; i < 8; ++i) aim(i);
  auto reader = open_reader(
      file.path, backend,
      [&](const Read& read) {
        order.push_back(read.offset / (8 * kReadAlign));
        ++begun;
        while (held) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return Fault{};
      },
      1);
  reader->submit(reads[0]);
  while (begun == 0) std::this_thread::yield();
  for (std::size_t i = 1; i < 4; ++i) reader->submit(reads[i], FileReader::Priority::kPrefetch);
  Read* both[] = {&reads[1], &reads[2]};
  Read* started[] = {&reads[3], &reads[0]};
  CHECK(!reader->cancel(started) && reads[3].pending());  // all or none
  CHECK(reader->cancel(both) && reads[1].state() == Read::State::kIdle && !reads[2].pending());
  for (const std::size_t i : {4UL, 5UL}) reader->submit(reads[i], FileReader::Priority::kPrefetch);
  reader->submit(reads[1]);
  reader->promote(reads[5]);
  CHECK(reader->unfinished() == 5);
  held = false;
  for (const std::size_t i : {0UL, 1UL, 3UL, 4UL, 5UL}) {
    reader->wait(reads[i]);
    check_bytes(file, reads[i]);
  }
  CHECK(order == (std::vector<std::uint64_t>{0, 1, 5, 3, 4}));
  CHECK(reader->unfinished() == 0);
  // Closing waits for what is in flight and fails the rest.
  held = true;
  const int before = begun;
  for (Read& read : reads) reader->submit(read);
  while (begun == before) std::this_thread::yield();
  std::thread opener([&held, closer = this_thread()] {
    await_sleep(closer);  // it waits for the read that is held
    held = false;
  });
  reader.reset();
  opener.join();
  int closed = 0;
  for (const Read& read : reads) {
    CHECK(!read.pending());
    if (read.state() == Read::State::kDone) check_bytes(file, read);
    if (read.state() == Read::State::kFailed) closed += contains(read.error(), "was closed") ? 1 : 100;
  }
  CHECK(closed >= 1 && closed <= 8, "%d", closed);
}

void choose_backend() {
  const TestFile file(5000);
  const std::vector<std::string> working = working_backends();
  CHECK(FileReader::open(file.path)->backend() == working.front());
  ReaderOptions options;
  options.refuse_ring = true;
  auto reader = FileReader::open(file.path, options);
  if (working.size() > 1) CHECK(reader->backend() == "threads" && contains(reader->reason(), "io_uring"));
  options.refuse_direct = true;
  reader = FileReader::open(file.path, options);
  CHECK(reader->backend() == "page_cache" && contains(reader->reason(), "refuses direct reads"));
  for (const char* name : {"io_uring", "threads"}) {
    options.backend = name;
    CHECK(contains(error_of([&] { FileReader::open(file.path, options); }), "does not work for"));
  }
  options = {};
  options.backend = "mmap";
  CHECK(contains(error_of([&] { FileReader::open(file.path, options); }), "allowed are"));
  CHECK(contains(error_of([&] { FileReader::open(file.path + "-none"); }), "cannot open"));
  CHECK(contains(error_of([&] { FileReader::open("/dev/null"); }), "no regular file"));
}

}  // namespace

void test_file_reader() {
  CHECK(aligned_extent(4096, 4096).offset == 4096 && aligned_extent(4096, 4096).bytes == 4096);
  CHECK(aligned_extent(4095, 2).offset == 0 && aligned_extent(4095, 2).bytes == 8192 &&
        aligned_extent(4095, 2).lead == 4095);
  choose_backend();
  for (const std::string& backend : working_backends()) {
    read_at_random(backend, {}, 60);
    std::atomic<std::uint64_t> calls{0};
    read_at_random(
        backend,
        [&](const Read&) {
          RandomStream random(calls.fetch_add(1));
          Fault fault;
          const std::uint64_t kind = random.next() % 8;
          if (kind == 0) fault.delay_us = static_cast<int>(random.next() % 300);
          if (kind == 1) fault.error = EINTR;
          if (kind == 2) fault.error = EAGAIN;
          if (kind >= 3 && kind < 6) fault.most_bytes = random.next() % 9000;
          return fault;
        },
        20);
    fail_and_recover(backend);
    take_back_and_close(backend);
    std::printf("file reader %s: ok\n", backend.c_str());
  }
}
