// Probes of the scheduler: barriers, warps, shared memory and its bounds, ldmatrix, mma.sync and cp.async on one warp.
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "probe.h"

using namespace triskele::cuda;

// out[block][i] = sum over the block's threads of their index, by a tree in shared memory
__global__ void tree_kernel(int* out, int barriers) {
  __shared__ int sum[256];
  const int i = threadIdx.x;
  sum[i] = i + 1;
  if (barriers) __syncthreads();
  for (int step = 128; step > 0; step /= 2) {
    if (i < step) sum[i] += sum[i + step];
    if (barriers) __syncthreads();
  }
  out[blockIdx.x * blockDim.x + i] = sum[0];
}
PROBE(tree, int* out, int blocks, int barriers) {
  return probed([&] { launch_kernel(tree_kernel, blocks, 256, 0, nullptr, out, barriers); });
}

// Lanes below `lanes` take part: [up 1, down 1, xor 3, from 5 within 8, ballot of odd lanes, sum]
__global__ void warp_kernel(int* out, int lanes) {
  const int i = threadIdx.x;
  if (i >= lanes) return;
  const unsigned mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  int* row = out + 6 * i;
  row[0] = __shfl_up_sync(mask, 10 * i, 1);
  row[1] = __shfl_down_sync(mask, 10 * i, 1, 8);
  row[2] = __shfl_xor_sync(mask, 10 * i, 3);
  row[3] = __shfl_sync(mask, 10 * i, 5, 8);
  row[4] = __ballot_sync(mask, i & 1);
  row[5] = __reduce_add_sync(mask, i);
}
PROBE(warp, int* out, int lanes) { return probed([&] { launch_kernel(warp_kernel, 1, 32, 0, nullptr, out, lanes); }); }

// A block reads what the block before it has written: right in one order only
__global__ void chain_kernel(int* out) { out[blockIdx.x + 1] = out[blockIdx.x] + 1; }
PROBE(chain, int* out, int blocks) { return probed([&] { launch_kernel(chain_kernel, blocks, 1, 0, nullptr, out); }); }

// What goes wrong, by number
__global__ void wrong_kernel(int which, int at, float* out) {
  TRISKELE_DYNAMIC_SHARED(float, shared);
  __shared__ alignas(16) float fixed[64];
  const int i = threadIdx.x;
  fixed[i % 64] = 0;
  switch (which) {
    case 0: if (i < 32) __syncthreads(); else __syncwarp(i == 40 ? 3u << 8 : ~0u); break;
    case 1: shared[at] = 1; break;
    case 2: out[i] = reinterpret_cast<float4*>(fixed + at)->x; break;
    case 3: fixed[at] = 1; out[i] = fixed[at]; break;
    case 4: if (i < 16) __shfl_sync(0xffffffffu, i, 0); else __syncwarp(); break;
    case 5: out[i] = shared[at]; break;             // never written
    case 6: __shfl_sync(1u, i, 0); break;
    default: break;
  }
}
PROBE(wrong, int which, int at, int bytes, float* out) {
  return probed([&] { launch_kernel(wrong_kernel, 1, 64, bytes, nullptr, which, at, out); });
}

// c[16, 8] += a[16, K] b[8, K]^T by ldmatrix and one mma; a, b: rows of 32 bytes
template <int Which>
__global__ void product_kernel(const unsigned char* a, const unsigned char* b, uint32_t* c) {
  __shared__ alignas(16) unsigned char left[16][32], right[8][32];
  const int lane = threadIdx.x;
  copy_async_16(left[lane / 2] + lane % 2 * 16, a + lane * 16);
  copy_async_16(right[lane / 2 % 8] + lane % 2 * 16, b + lane % 16 * 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t x[4], y[2];
  ldmatrix_x4(x, left[lane % 16] + lane / 16 * 16);
  ldmatrix_x2(y, right[lane % 8] + lane / 8 % 2 * 16);
  uint32_t* row[2] = {c + lane / 4 * 8 + lane % 4 * 2, c + (lane / 4 + 8) * 8 + lane % 4 * 2};
  uint32_t d[4] = {row[0][0], row[0][1], row[1][0], row[1][1]};
  if constexpr (Which == 0) mma_bf16(reinterpret_cast<float (&)[4]>(d), x, y);
  if constexpr (Which == 1) mma_f16(reinterpret_cast<float (&)[4]>(d), x, y);
  if constexpr (Which == 2) mma_s8(reinterpret_cast<int32_t (&)[4]>(d), x, y);
  if constexpr (Which == 3) mma_s4(reinterpret_cast<int32_t (&)[4]>(d), x, y);
  if constexpr (Which == 4) mma_u4s4(reinterpret_cast<int32_t (&)[4]>(d), x, y);
  for (int i = 0; i < 4; ++i) row[i / 2][i % 2] = d[i];
}
PROBE(product, int which, const unsigned char* a, const unsigned char* b, uint32_t* c) {
  return probed([&] {
    switch (which) {
      case 0: return launch_kernel(product_kernel<0>, 1, 32, 0, nullptr, a, b, c);
      case 1: return launch_kernel(product_kernel<1>, 1, 32, 0, nullptr, a, b, c);
      case 2: return launch_kernel(product_kernel<2>, 1, 32, 0, nullptr, a, b, c);
      case 3: return launch_kernel(product_kernel<3>, 1, 32, 0, nullptr, a, b, c);
      default: return launch_kernel(product_kernel<4>, 1, 32, 0, nullptr, a, b, c);
    }
  });
}

// out[64 rows of 4 matrices][8] = the 8 x 8 matrices of 16 bits, each transposed by ldmatrix
__global__ void transpose_kernel(const uint16_t* from, uint16_t* out) {
  __shared__ alignas(16) uint16_t tile[32][8];
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[lane][i] = from[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile[lane]);
  for (int j = 0; j < 4; ++j)
    for (int half = 0; half < 2; ++half)
      out[(8 * j + lane / 4) * 8 + lane % 4 * 2 + half] = static_cast<uint16_t>(r[j] >> 16 * half);
}
PROBE(transpose, const uint16_t* from, uint16_t* out) {
  return probed([&] { launch_kernel(transpose_kernel, 1, 32, 0, nullptr, from, out); });
}

// Two copies in two groups; reads after waiting for all but `pending` (0 or 1). A wait too few leaves NaN.
__global__ void groups_kernel(const float* from, float* out, int pending) {
  __shared__ alignas(16) float tile[2][4];
  for (int group = 0; group < 2; ++group) {
    copy_async_16(tile[group], from + 4 * group, group == 0);
    copy_async_commit();
  }
  if (pending == 0) copy_async_wait<0>(); else copy_async_wait<1>();
  for (int i = 0; i < 8; ++i) out[i] = tile[i / 4][i % 4];
}
PROBE(groups, const float* from, float* out, int pending) {
  return probed([&] { launch_kernel(groups_kernel, 1, 1, 0, nullptr, from, out, pending); });
}
