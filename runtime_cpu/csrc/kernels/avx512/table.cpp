// Compiled for the oldest processor, because it runs before the instruction sets of this one are known.
#include "kernels/avx512/table.hpp"

namespace smallthinker::avx512 {

bool supported() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("avx512vnni") != 0;
}

void fill(Kernels& table) {
  fill_stock(table);
  fill_packed(table);
  fill_attention(table);
}

}  // namespace smallthinker::avx512
