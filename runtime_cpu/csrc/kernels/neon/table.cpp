// Compiled for the oldest 64-bit Arm processor, because it runs before the instructions of this one are
// known.
#include "kernels/neon/table.hpp"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace smallthinker::neon {

bool supported() { return true; }

#if defined(__linux__)
// The bits of asm/hwcap.h are written out, because that header may be older than the processor.
bool dotprod_supported() {
  constexpr unsigned long kDotProduct = 1UL << 20U;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
}

bool i8mm_supported() {
  constexpr unsigned long kMatrixProduct = 1UL << 13U;  // HWCAP2_I8MM
  return dotprod_supported() && (getauxval(AT_HWCAP2) & kMatrixProduct) != 0;
}
#else
bool dotprod_supported() { return false; }
bool i8mm_supported() { return false; }
#endif

void fill(Kernels& table) {
  fill_stock(table);
  fill_packed(table);
}

}  // namespace smallthinker::neon
