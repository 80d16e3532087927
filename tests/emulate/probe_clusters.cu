// A probe of clusters: blocks that load into each other's shared memory and arrive at each other's barriers.
#include "cuda/common/hopper.cuh"
#include "probe.h"

using namespace triskele::cuda;

// out[b, t] = the sum of tile t, of 128 floats, in block b; each block of a cluster loads its part of the tile into all,
// in a ring of two buffers. wrong: 1 barriers used before the cluster has met, 2 a buffer counts as free once this
// block has released it, 3 blocks leave without meeting, 4 loads to a block that is not there, 5 a block takes a tile
// less
template <int kCluster>
__global__ void cluster_kernel(const __grid_constant__ CUtensorMap map, int tiles, int wrong, float* out) {
  TRISKELE_DYNAMIC_SHARED(float, shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + 256);
  uint64_t* empty = full + 2;
  __shared__ int whose;
  constexpr int kPart = 128 / kCluster;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    whose = static_cast<int>(blockIdx.x);
    for (int i = 0; i < 2; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, wrong == 2 ? 1 : kCluster);
    }
    fence_barrier_init();
  }
  if (wrong == 1) __syncthreads(); else cluster_sync();
  if (wrong == 5 && rank == 1) --tiles;
  if (threadIdx.x == 32) {
    for (int t = 0; t < tiles; ++t) {
      const int buffer = t % 2, round = t / 2 % 2;
      barrier_wait(empty + buffer, round ^ 1);
      barrier_arrive_expect(full + buffer, 512);
      tma_load_2d_cluster(shared + 128 * buffer + kPart * rank, &map, full + buffer, kPart * rank, t,
                          wrong == 4 ? 1u << kCluster : (1u << kCluster) - 1);
    }
  } else if (threadIdx.x < 32) {
    for (int t = 0; t < tiles; ++t) {
      const int buffer = t % 2, round = t / 2 % 2;
      barrier_wait(full + buffer, round);
      float value = 0;
      for (int i = threadIdx.x; i < 128; i += 32) value += shared[128 * buffer + i];
      for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
      if (threadIdx.x == 0) out[whose * tiles + t] = value;
      __syncwarp();
      if (wrong == 2 && threadIdx.x == 0) barrier_arrive(empty + buffer);
      if (wrong != 2 && threadIdx.x < kCluster) barrier_arrive_in_cluster(empty + buffer, threadIdx.x);
    }
    if (wrong != 3) cluster_sync();
  }
}
PROBE(clusters, const float* tiles, int count, int size, int blocks, int wrong, float* out) {
  return probed([&] {
    const CUtensorMap map =
        encode_tensor_map({TileType::kFloat32, tiles, 2, {128, count}, {0, 512}, {128 / size, 1}, false});
    const auto kernel = size == 2 ? &cluster_kernel<2> : &cluster_kernel<4>;
    launch_clusters(size, kernel, blocks, 64, 1024 + 32, nullptr, map, count, wrong, out);
  });
}
