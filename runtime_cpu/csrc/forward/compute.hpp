// Kernels and threads: what every part of the forward pass computes with.
//
//   Products products(compute);                                     // matrix products of one step
//   products.add(weights.query, x.view(), tokens, query, stride);   // as many as do not depend on one
//   another products.run();                                                 // shared out among all threads
#pragma once

#include <cstdint>
#include <vector>

#include "forward/scratch.hpp"
#include "forward/thread_pool.hpp"
#include "kernels/table.hpp"
#include "model/model.hpp"

namespace smallthinker {

struct Compute {
  Compute(const Kernels& k, int threads) : kernels(k), pool(threads) {}

  const Kernels& kernels;
  ThreadPool pool;

  // `work(row)` for every row in [0, rows).
  template <typename Work>
  void each_row(std::int64_t rows, const Work& work) {
    pool.run(rows, [&](std::int64_t row, int) { work(row); });
  }

  // The fp32 values of a buffer's first row to the other forms in which kernels read them.
  void quantise(const ActivationBuffer& row) const {
    kernels.quantise(row.f32, row.stride, row.q, row.scales);
    if (row.plane_bytes > 0) kernels.split_planes(row.q, row.scales, row.stride, row.planes);
  }
};

// How many rows of a matrix in stock rows make a piece of work.
std::int64_t rows_per_piece(std::int64_t rows, int threads);

// Matrix products that wait to be computed together. All that is named has to outlive run().
class Products {
 public:
  explicit Products(Compute& compute) : compute_(compute) {}

  // out[t * out_stride + r] = dot(row r, token t of x), for all rows.
  void add(const Linear& matrix, const Activations& x, std::int64_t tokens, float* out,
           std::int64_t out_stride);
  void add(const Matrix& matrix, std::int64_t expert, const Activations& x, std::int64_t tokens, float* out,
           std::int64_t out_stride);
  // As one piece of work, for small matrices.
  void add_whole(const TileMatrix& tiles, const Activations& x, float* out);

  void run();  // afterwards none waits

 private:
  struct Piece {
    const Matrix* matrix;     // stock rows, or
    const TileMatrix* tiles;  // tiles: then begin and end count tiles
    std::int64_t expert, begin, end;
    Activations x;
    std::int64_t tokens;
    float* out;  // of row `begin`
    std::int64_t out_stride;
  };

  Compute& compute_;
  std::vector<Piece> pieces_;
};

}  // namespace smallthinker
