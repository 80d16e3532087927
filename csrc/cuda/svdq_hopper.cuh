// What the two products of the 4-bit linear on Hopper share: the walk over tiles, and what TMA is told of the operands.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {

constexpr int kBand = 8;   // tiles along M that are walked before the next along N

struct Tile {
  int m, n;
};
// Bands of kBand tiles along M, so that the tiles of one moment share rows of both operands.
__host__ __device__ inline Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int first = index / (kBand * tiles_n) * kBand, inside = index - first * tiles_n;
  const int height = tiles_m - first < kBand ? tiles_m - first : kBand;
  return {first + inside % height, inside / height};
}

// Operands of a product: tokens are rows of codes and down, channels rows of weights, up and (W8A8) columns of scales.
struct Maps {
  CUtensorMap codes, weights, scales, down, up;
};

inline int multiprocessors(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// A row-major matrix in boxes of columns x rows; a box's row is 128 bytes.
inline TileSource rows_of(TileType type, const Tensor& tensor, int bytes, int columns, int rows) {
  return {type, tensor.const_data_ptr(), 2, {tensor.size(1), tensor.size(0)}, {0, tensor.size(1) * bytes},
          {columns, rows}, true};
}

}  // namespace triskele::cuda::svdq
