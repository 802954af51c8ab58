// The AVX-512 kernels, for processors with F, BW, DQ, VL and VNNI.
#pragma once

#include "kernels/table.hpp"

namespace smallthinker::avx512 {

bool supported();           // by this processor and its operating system
void fill(Kernels& table);  // over a table of AVX2's

// The files' own shares of it.
void fill_stock(Kernels& table);
void fill_packed(Kernels& table);
void fill_attention(Kernels& table);

}  // namespace smallthinker::avx512
