// Probes of mbarriers, TMA and wgmma.
#include "cuda/common/hopper.cuh"
#include "probe.h"

using namespace triskele::cuda;

// ---- TMA: out = the bytes that one load leaves in shared memory ---------------------------------------------------

// wrong: 0 nothing, 1 expects too many bytes, 2 too few, 3 barrier not made known, 4 does not wait, 5 two loads where
// one is expected
__global__ void tma_kernel(const __grid_constant__ CUtensorMap map, int rank, int bytes, int c0, int c1, int c2, int c3,
                           int wrong, unsigned char* out) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ alignas(8) uint64_t arrived;
  if (threadIdx.x == 0) {
    barrier_init(&arrived, 1);
    if (wrong != 3) fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(&arrived, bytes + (wrong == 1 ? 16 : wrong == 2 ? -16 : 0));
    for (int times = 0; times < (wrong == 5 ? 2 : 1); ++times) {
      if (rank == 2) tma_load_2d(shared, &map, &arrived, c0, c1);
      if (rank == 3) tma_load_3d(shared, &map, &arrived, c0, c1, c2);
      if (rank == 4) tma_load_4d(shared, &map, &arrived, c0, c1, c2, c3);
    }
  }
  if (wrong != 4) barrier_wait(&arrived, 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = shared[i];
}
// geometry: rank, sizes, strides in bytes, box (4 each)
PROBE(tma, const void* base, int type, const int64_t* geometry, int swizzled, const int* corner, int bytes, int wrong,
      unsigned char* out) {
  return probed([&] {
    TileSource source{static_cast<TileType>(type), base, static_cast<int>(geometry[0]), {}, {}, {}, swizzled != 0};
    for (int d = 0; d < 4; ++d) {
      source.size[d] = geometry[1 + d];
      source.stride[d] = geometry[5 + d];
      source.box[d] = static_cast<int>(geometry[9 + d]);
    }
    const CUtensorMap map = encode_tensor_map(source);
    launch_kernel(tma_kernel, 1, 64, bytes, nullptr, map, source.rank, bytes, corner[0], corner[1], corner[2],
                  corner[3], wrong, out);
  });
}

// ---- wgmma: d [64, N] += a b from images of shared memory ---------------------------------------------------------

struct Product {
  const unsigned char *a, *b;   // images of shared memory, or (a in registers) rows of 64 x depth
  void* d;                      // [64, N] of 32 bits
  int a_bytes, b_bytes, depth, a_chunk, b_chunk;   // depth in steps of 32 bytes; bytes from one chunk to the next
  int wrong;  // 1 no wait, 2 no wgmma_fence, 3 no fence_proxy_async, 4 B overwritten too early, 5 a warp stays away
};

__device__ uint64_t operand(const unsigned char* at, Major major, int step, int chunk) {
  if (major == Major::kMn) return shared_descriptor(at + step * 2048, Major::kMn, chunk);
  return shared_descriptor(at + step / 4 * chunk + step % 4 * 32, Major::kK);
}

template <class E, int R, bool kRegisters, Major kA, Major kB>
__global__ void product_kernel(const Product p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char *a = shared, *b = shared + p.a_bytes;
  for (int i = threadIdx.x; i < p.a_bytes; i += 128) a[i] = p.a[i];
  for (int i = threadIdx.x; i < p.b_bytes; i += 128) b[i] = p.b[i];
  if (p.wrong != 3) fence_proxy_async();
  __syncthreads();
  using D = std::conditional_t<std::is_same_v<E, int8_t>, int32_t, float>;
  const int w = threadIdx.x / 32, r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  if (p.wrong == 5 && w == 2) return;
  D* out = static_cast<D*>(p.d);
  const auto place = [&](int i) { return (16 * w + r + i / 2 % 2 * 8) * 2 * R + i / 4 * 8 + 2 * q + i % 2; };
  D d[R];
  for (int i = 0; i < R; ++i) d[i] = out[place(i)];
  if (p.wrong != 2) wgmma_fence();
  for (int step = 0; step < p.depth; ++step) {
    const uint64_t right = operand(b, kB, step, p.b_chunk);
    if constexpr (kRegisters) {
      uint32_t left[4];
      for (int i = 0; i < 4; ++i)
        memcpy(&left[i], p.a + (16 * w + r + i % 2 * 8) * p.depth * 32 + step * 32 + i / 2 * 16 + 4 * q, 4);
      if constexpr (std::is_same_v<E, int8_t>) wgmma_s8_registers(d, left, right, true);
      else wgmma_registers<E, kB>(d, left, right, true);
    } else {
      const uint64_t left = operand(a, kA, step, p.a_chunk);
      if constexpr (std::is_same_v<E, int8_t>) wgmma_s8_shared(d, left, right, true);
      else wgmma_shared<E, kA, kB>(d, left, right, true);
    }
  }
  wgmma_commit();
  if (p.wrong == 4) {
    __syncthreads();
    if (threadIdx.x == 0) b[17] ^= 1, fence_proxy_async();
    __syncthreads();
  }
  if (p.wrong != 1) wgmma_wait<0>();
  for (int i = 0; i < R; ++i) out[place(i)] = d[i];
  wgmma_wait<0>();
}

template <class E, int R>
void multiply_with(int a, int b, const Product& p) {
  const auto run = [&](auto kernel) { launch_kernel(kernel, 1, 128, p.a_bytes + p.b_bytes, nullptr, p); };
  constexpr Major K = Major::kK, M = Major::kMn;
  if constexpr (std::is_same_v<E, int8_t>)
    return a == 2 ? run(product_kernel<E, R, true, K, K>) : run(product_kernel<E, R, false, K, K>);
  else if (a == 2) return b == 0 ? run(product_kernel<E, R, true, K, K>) : run(product_kernel<E, R, true, K, M>);
  else if (a == 0) return b == 0 ? run(product_kernel<E, R, false, K, K>) : run(product_kernel<E, R, false, K, M>);
  else return b == 0 ? run(product_kernel<E, R, false, M, K>) : run(product_kernel<E, R, false, M, M>);
}
// type: 0 bfloat16, 1 float16, 2 int8; a: 0 K-major, 1 MN-major, 2 registers; b likewise; sizes: as in Product
PROBE(product, int type, int columns, int a, int b, const unsigned char* left, const unsigned char* right, void* d,
      const int* sizes, int wrong) {
  return probed([&] {
    const Product p{left, right, d, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], wrong};
    const auto by_columns = [&](auto element) {
      using E = decltype(element);
      switch (columns) {
        case 64: return multiply_with<E, 32>(a, b, p);
        case 96: return multiply_with<E, 48>(a, b, p);
        case 128: return multiply_with<E, 64>(a, b, p);
        default: return multiply_with<E, 128>(a, b, p);
      }
    };
    if (type == 0) by_columns(__nv_bfloat16());
    else if (type == 1) by_columns(__half());
    else by_columns(int8_t());
  });
}

// ---- a ring of two buffers between a producer warp and a consumer warpgroup ---------------------------------------

// out[t] = the sum of tile t of 128 floats, by TMA. wrong: 1 the producer does not wait for free buffers, 2 starts with
// the wrong parity, 3 the roles ask for too many registers
__global__ void ring_kernel(const __grid_constant__ CUtensorMap map, int tiles, int wrong, float* out) {
  TRISKELE_DYNAMIC_SHARED(float, shared);
  __shared__ alignas(8) uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 128);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    registers_grow<240>();
  } else if (threadIdx.x >= 128) {
    if (wrong == 3) registers_shrink<40>(); else registers_shrink<24>();
    if (threadIdx.x == 128)
      for (int t = 0; t < tiles; ++t) {
        const int buffer = t % 2, round = t / 2 % 2;
        if (wrong != 1) barrier_wait(&empty[buffer], wrong == 2 ? round : round ^ 1);
        barrier_arrive_expect(&full[buffer], 512);
        tma_load_2d(shared + 128 * buffer, &map, &full[buffer], 0, t);
      }
  } else {
    registers_grow<240>();
    for (int t = 0; t < tiles; ++t) {
      const int buffer = t % 2, round = t / 2 % 2;
      barrier_wait(&full[buffer], round);
      named_barrier_sync(1, 128);
      float value = shared[128 * buffer + threadIdx.x];
      for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
      if (threadIdx.x % 32 == 0) atomicAdd(&out[t], value);
      barrier_arrive(&empty[buffer]);
    }
  }
}
PROBE(ring, const float* tiles, int count, int wrong, float* out) {
  return probed([&] {
    const CUtensorMap map = encode_tensor_map({TileType::kFloat32, tiles, 2, {128, count}, {0, 512}, {128, 1}, false});
    launch_kernel(ring_kernel, 1, 384, 1024, nullptr, map, count, wrong, out);
  });
}
