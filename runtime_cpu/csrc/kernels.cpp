#include "kernels.hpp"

#if defined(SMALLTHINKER_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace smallthinker {
#if defined(SMALLTHINKER_ARM64)
namespace {

struct ArmFeatures {
  bool dot_product = false;
  bool matrix_product = false;
};

ArmFeatures arm_features() {
#if defined(__linux__)  // bits of asm/hwcap.h, which may be older than the processor
  constexpr unsigned long kDotProduct = 1UL << 20U;     // HWCAP_ASIMDDP
  constexpr unsigned long kMatrixProduct = 1UL << 13U;  // HWCAP2_I8MM
  return {(getauxval(AT_HWCAP) & kDotProduct) != 0, (getauxval(AT_HWCAP2) & kMatrixProduct) != 0};
#else
  return {};
#endif
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> result{&reference_table()};
#if defined(SMALLTHINKER_X86)
  const auto has = [](int supported) { return supported != 0; };
  if (has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
      has(__builtin_cpu_supports("f16c"))) {
    result.push_back(&avx2_table());
    static const Kernels avx512 = [] {
      Kernels table = avx2_table();
      table.name = "avx512";
      table.matmul = avx512_matmul;
      table.attention_scores = avx512_attention_scores;
      table.exp_sum = avx512_exp_sum;
      table.attention_values = avx512_attention_values;
      table.packed = true;
      table.split_planes = avx512_split_planes;
      table.tiles = avx512_tiles;
      table.neurons = avx512_neurons;
      table.run_maxima = avx512_run_maxima;
      table.exp_weights = avx512_exp_weights;
      table.mass_above = avx512_mass_above;
      table.block_sums = avx512_block_sums;
      return table;
    }();
    if (has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
        has(__builtin_cpu_supports("avx512vl")) && has(__builtin_cpu_supports("avx512dq")) &&
        has(__builtin_cpu_supports("avx512vnni"))) {
      result.push_back(&avx512);
    }
  }
#endif
#if defined(SMALLTHINKER_ARM64)
  const ArmFeatures features = arm_features();
  result.push_back(&neon_table());
  static const Kernels dotprod = [] {
    Kernels table = neon_table();
    table.name = "neon_dotprod";
    table.tiles = neon_dotprod_tiles;
    table.neurons = neon_dotprod_neurons;
    table.attention_scores = neon_dotprod_attention_scores;
    return table;
  }();
  static const Kernels i8mm = [] {
    Kernels table = dotprod;
    table.name = "neon_i8mm";
    table.tiles = neon_i8mm_tiles;
    return table;
  }();
  if (features.dot_product) result.push_back(&dotprod);
  if (features.dot_product && features.matrix_product) result.push_back(&i8mm);
#endif
  return result;
}

const Kernels& select_kernels(const std::string& name) {
  const auto offered = available_kernels();
  if (name == "auto") return *offered.back();
  std::string names = "auto";
  for (const Kernels* kernels : offered) {
    if (name == kernels->name) return *kernels;
    names += std::string(", ") + kernels->name;
  }
  throw EngineError("there are no kernels '" + name + "' on this machine; allowed are " + names);
}

}  // namespace smallthinker
