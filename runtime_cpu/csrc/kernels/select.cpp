#include "kernels/reference.hpp"
#include "kernels/table.hpp"
#if defined(SMALLTHINKER_X86)
#include "kernels/avx2/table.hpp"
#include "kernels/avx512/table.hpp"
#elif defined(SMALLTHINKER_ARM64)
#include "kernels/neon/table.hpp"
#endif

namespace smallthinker {
namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  void (*fill)(Kernels& table);  // over the table of the set before it
};

constexpr InstructionSet kInstructionSets[] = {
    {"reference", [] { return true; }, reference::fill},
#if defined(SMALLTHINKER_X86)
    {"avx2", avx2::supported, avx2::fill},
    {"avx512", avx512::supported, avx512::fill},
#elif defined(SMALLTHINKER_ARM64)
    {"neon", neon::supported, neon::fill},
    {"neon_dotprod", neon::dotprod_supported, neon::fill_dotprod},
    {"neon_i8mm", neon::i8mm_supported, neon::fill_i8mm},
#endif
};

// Each set needs the one before it, so the first that is missing ends the list.
std::vector<Kernels> make_tables() {
  std::vector<Kernels> tables;
  Kernels table{};
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.supported()) break;
    set.fill(table);
    table.name = set.name;
    tables.push_back(table);
  }
  return tables;
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  static const std::vector<Kernels> tables = make_tables();
  std::vector<const Kernels*> result;
  for (const Kernels& table : tables) result.push_back(&table);
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
