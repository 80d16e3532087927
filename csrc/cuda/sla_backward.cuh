// What the kernels of the backward share: the problem's sizes, the rows' numbers, and loads and stores of tiles. A tile
// is 64 rows of kChunks * 64 channels in shared memory, 128-byte swizzled, a chunk of 64 channels after the other;
// head_dims below that are padded with zeros by the load itself.
#pragma once
#include <cstdint>

#include "cuda/common/hopper.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/sla_features.cuh"

namespace triskele::cuda::backward {

using sla::Feature;
using sla::kLog2E;

constexpr int kRows = 64;                  // of a tile
constexpr int kChunkBytes = kRows * 128;
constexpr int kQueryBlock = 128, kKeyBlock = 64;

struct Sizes {
  int batch, heads, queries, keys, dim;
  int q_blocks, k_blocks;
};

// Of every query, [B H, q_blocks * 128]: queries past the last have the numbers of one that sees no key.
struct RowNumbers {
  float* lse;     // log2 of the sum of the scores' exponentials; +inf where the row sees no key
  float* offset;  // rowsum(dO_s O_s) - d lse
};

// One tile of the tensor behind `map` [D, L, H, B], from row `row` of head (b, h) on.
template <int kChunks>
__device__ __forceinline__ void load_tile(unsigned char* to, const CUtensorMap* map, uint64_t* barrier, int row, int h,
                                          int b) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) tma_load_4d(to + c * kChunkBytes, map, barrier, c * 64, row, h, b);
}

// acc [64, 64] = A [64, D] B [64, D]^T, both tiles.
template <class E, int kChunks>
__device__ __forceinline__ void multiply_rows(float (&acc)[32], const unsigned char* a, const unsigned char* b) {
#pragma unroll
  for (int k = 0; k < kChunks * 4; ++k) {
    const int at = k / 4 * kChunkBytes + k % 4 * 32;
    wgmma_shared<E, Major::kK, Major::kK>(acc, shared_descriptor(a + at, Major::kK),
                                          shared_descriptor(b + at, Major::kK), k > 0);
  }
}

// acc [64, D] += A [64, 64] B [64, D], B a tile, A in registers.
template <class E, int kChunks>
__device__ __forceinline__ void multiply_columns(float (&acc)[kChunks * 32], const uint32_t (&a)[4][4],
                                                 const unsigned char* b) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_registers<E, Major::kMn>(acc, a[k], shared_descriptor(b + k * 2048, Major::kMn, kChunkBytes), true);
}

// An accumulator [64, 64] as the A of multiply_columns.
template <class E>
__device__ __forceinline__ void to_operand(const float (&x)[32], uint32_t (&a)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack_halves<E>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
}


// out[row, :] (+)= factor acc for the rows of this warpgroup's accumulator that `count` holds; zero for hidden ones.
// out: row 0 of the tile, dim elements a row. add: to what is there.
template <class E, int R, class Hidden>
__device__ __forceinline__ void store_rows(const float (&acc)[R], float factor, E* out, int count, int dim, bool add,
                                           const Hidden& hidden) {
  const int t = threadIdx.x % 128, first = t / 32 * 16 + t % 32 / 4, pair = t % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half;
    if (row >= count) continue;
    const bool empty = hidden(row);
#pragma unroll
    for (int j = 0; j < R / 4; ++j) {
      const int column = 8 * j + 2 * pair;
      if (column >= dim) continue;
      uint32_t* to = reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row) * dim + column);
      float low = empty ? 0.f : factor * acc[4 * j + 2 * half], high = empty ? 0.f : factor * acc[4 * j + 2 * half + 1];
      if (add && !empty) {
        const Pack<E, 2> there = load<E, 2>(reinterpret_cast<const E*>(to));
        low += widen(there.at[0]), high += widen(there.at[1]);
      }
      *to = pack_halves<E>(low, high);
    }
  }
}

}  // namespace triskele::cuda::backward
