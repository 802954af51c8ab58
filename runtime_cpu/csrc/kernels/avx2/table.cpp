// Compiled for the oldest processor, because it runs before the instruction sets of this one are known.
#include "kernels/avx2/table.hpp"

namespace smallthinker::avx2 {

bool supported() {
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
         __builtin_cpu_supports("f16c") != 0;
}

void fill(Kernels& table) {
  fill_stock(table);
  fill_packed(table);
}

}  // namespace smallthinker::avx2
