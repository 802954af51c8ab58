// A few lines of test harness: CHECK stops the program with the place and the reason.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition, ...)                                                      \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: %s is false.", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, " " __VA_ARGS__);                                       \
      std::fprintf(stderr, "\n");                                                  \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

void test_half();
void test_kernels();
void test_packed();
void test_thread_pool();
void test_reader();
void test_reader_fuzz(unsigned long cases, unsigned long seed);
void test_coverage(unsigned long cases, unsigned long seed);
void test_sampler();
void test_vocabulary();
void test_checksum();
void test_file_reader();
void test_expert_cache();
void test_cache_policies();
void test_forecast();
void test_forward();
void test_head();
void test_offload();
void test_golden(const char* folder);
