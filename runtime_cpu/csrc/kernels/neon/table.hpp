// The NEON kernels: those of every 64-bit Arm processor, and what the dot-product and the 8-bit matrix
// instructions do faster.
#pragma once

#include "kernels/table.hpp"

namespace smallthinker::neon {

bool supported();
bool dotprod_supported();  // Armv8.2-A
bool i8mm_supported();     // Armv8.6-A; implies the former

void fill(Kernels& table);          // everything but the checksum, over the reference table
void fill_dotprod(Kernels& table);  // over the NEON table
void fill_i8mm(Kernels& table);     // over the dot-product table

// The files' own shares of the NEON table.
void fill_stock(Kernels& table);
void fill_packed(Kernels& table);

// What the kernels for newer instructions fall back on.
void attention_scores(const float* q, std::int64_t groups, std::int64_t head_dim, KvRows keys, float factor,
                      float* scores, std::int64_t stride);
void quantise(const float* x, std::int64_t size, std::int16_t* q, float* scales);
void dotprod_tiles(const TileMatrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                   const Activations& x, std::int64_t tokens, float* out, std::int64_t out_stride);

}  // namespace smallthinker::neon
