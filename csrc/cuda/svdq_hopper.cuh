// What the two products of the 4-bit linear on Hopper share: the walk over tiles, the ring of stages between the warp
// that fetches and the warps that multiply, and what TMA is told of the operands.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {

constexpr int kBand = 8;   // tiles along M that are walked before the next along N
constexpr int kWarps = 8, kThreads = 128 + 32 * kWarps;   // a warpgroup that fetches, two that multiply

struct Tile {
  int m, n;
};
// Bands of kBand tiles along M, so that the tiles of one moment share rows of both operands.
__host__ __device__ inline Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int first = index / (kBand * tiles_n) * kBand, inside = index - first * tiles_n;
  const int height = tiles_m - first < kBand ? tiles_m - first : kBand;
  return {first + inside % height, inside / height};
}

// The tiles of a block that stays on its multiprocessor. A cluster's blocks walk together, over neighbours along N: the
// last may lie past the end.
template <int kCluster>
struct Walk {
  int tiles_m, columns;
  __device__ __forceinline__ Walk(int tiles_m, int tiles_n)
      : tiles_m(tiles_m), columns((tiles_n + kCluster - 1) / kCluster) {}
  __device__ __forceinline__ int rank() const { return kCluster > 1 ? cluster_rank() : 0; }   // read, not kept
  __device__ __forceinline__ int first() const { return blockIdx.x / kCluster; }
  __device__ __forceinline__ int end() const { return tiles_m * columns; }
  __device__ __forceinline__ int stride() const { return gridDim.x / kCluster; }
  __device__ __forceinline__ Tile at(int index) const {
    const Tile tile = tile_at(index, tiles_m, columns);
    return {tile.m, tile.n * kCluster + rank()};
  }
};

// Stages of kBytes that go round: the warp that fetches opens one, TMA fills it, all warps that multiply wait for it
// and release it. Each of them counts for itself where it stands. In a cluster a stage is free once all blocks have
// released it, for any of them may load into all.
template <int kStages, int kBytes, int kCluster = 1>
struct Ring {
  unsigned char* base;
  uint64_t *full, *empty;
  int stage = 0, phase = 0;

  // By all threads; kStages barriers of each kind at `barriers`.
  __device__ __forceinline__ Ring(unsigned char* base, unsigned char* barriers)
      : base(base), full(reinterpret_cast<uint64_t*>(barriers)), empty(full + kStages) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, kWarps * kCluster);
      }
      fence_barrier_init();
    }
    if constexpr (kCluster > 1) cluster_sync();
    else __syncthreads();
  }
  __device__ __forceinline__ unsigned char* at() const { return base + stage * kBytes; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  // The barrier at which this stage's `bytes` arrive, once the stage is free.
  __device__ __forceinline__ uint64_t* open(int bytes) const {
    barrier_wait(empty + stage, phase ^ 1);
    barrier_arrive_expect(full + stage, bytes);
    return full + stage;
  }
  __device__ __forceinline__ void wait() const { barrier_wait(full + stage, phase); }
  // By a whole warp.
  __device__ __forceinline__ void release(int of) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if constexpr (kCluster > 1) {
      if (lane < kCluster) barrier_arrive_in_cluster(empty + of, lane);
    } else {
      if (lane == 0) barrier_arrive(empty + of);
    }
  }
  // After its last release: a block stays until nobody can load into it or arrive at it.
  __device__ __forceinline__ void leave() const {
    if constexpr (kCluster > 1) cluster_sync();
  }
};

// load(tile, step) for every stage of every tile of this block: the warp that fetches.
template <class Ring, class Walk, class Load>
__device__ __forceinline__ void fetch(Ring& ring, const Walk& walk, int stages_a_tile, const Load& load) {
  registers_shrink<24>();
  if (threadIdx.x != 0) return;
  for (int index = walk.first(); index < walk.end(); index += walk.stride()) {
    const Tile tile = walk.at(index);
    for (int step = 0; step < stages_a_tile; ++step, ring.advance()) load(tile, step);
  }
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
