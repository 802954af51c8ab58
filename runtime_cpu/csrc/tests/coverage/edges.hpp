// Which edges of the instrumented files a piece of work runs through, and how often.
//
//   start_edges(); parse(bytes); if (new_edges() > 0) keep(bytes);
//
// Files that are compiled with -fsanitize-coverage=trace-pc (CMakeLists.txt: with the address sanitizer) call
// back at every basic block; without any, nothing is ever new.
#pragma once

#include <cstddef>

namespace smallthinker::testing {

void start_edges();
// Of what ran since: pairs of blocks, each with its count by powers of two, that no earlier work had.
std::size_t new_edges();
std::size_t all_edges();

}  // namespace smallthinker::testing
