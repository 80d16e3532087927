// What the linear branch's backward is made of: rows element by element, products with a state, sums of states. 256
// threads on tiles of 64 rows; DP is the head dimension of the tiles, 64 or 128, zeros past `dim`.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/sla_backward.cuh"

namespace triskele::cuda::backward {

constexpr int kLinearThreads = 256;

template <int DP>
constexpr int kStride = DP + 8;   // elements of a row in shared memory: ldmatrix without bank conflicts
template <int DP>
constexpr int kFloatStride = DP + 4;

// The shared memory of a thread block.
template <class E, int DP>
struct LinearShared {
  E *state, *left, *right;  // [DP][DP + 8], [64][DP + 8] twice
  float *floats, *vector, *weights, *scratch;  // [64][DP + 4], [DP], [64], [8]
  __device__ explicit LinearShared(unsigned char* at)
      : state(reinterpret_cast<E*>(at)), left(state + DP * kStride<DP>), right(left + kRows * kStride<DP>),
        floats(reinterpret_cast<float*>(right + kRows * kStride<DP>)), vector(floats + kRows * kFloatStride<DP>),
        weights(vector + DP), scratch(weights + kRows) {}
  static constexpr size_t kBytes = (DP + 2 * kRows) * kStride<DP> * sizeof(E) +
                                   (kRows * kFloatStride<DP> + DP + kRows + 8) * sizeof(float);
};

// ---- element by element: thread t has channels 32 i + 8 (t % 4) … + 7 of row t / 4, i = 0 … DP / 32 - 1 ------------

template <int DP>
struct Part {
  float at[DP / 4];
  static __device__ int channel(int i) { return 32 * i + threadIdx.x % 4 * 8; }
};

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Zeros where the row is not there, and past the last channel.
template <int DP, class T>
__device__ __forceinline__ void read(const T* row, bool there, int dim, Part<DP>& x) {
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) {
    constexpr int kWidth = sizeof(T) == 2 ? 8 : 4;
#pragma unroll
    for (int v = 0; v < 8; v += kWidth) {
      Pack<T, kWidth> part{};
      if (there && Part<DP>::channel(i) < dim) part = load<T, kWidth>(row + Part<DP>::channel(i) + v);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x.at[8 * i + v + k] = widen(part.at[k]);
    }
  }
}

template <int DP, class E>
__device__ __forceinline__ Pack<E, 8> rounded(const Part<DP>& x, int i) {
  Pack<E, 8> out;
#pragma unroll
  for (int v = 0; v < 8; ++v) narrow(x.at[8 * i + v], out.at[v]);
  return out;
}

// Into this thread's row of a tile in shared memory.
template <int DP, class E>
__device__ __forceinline__ void to_tile(const Part<DP>& x, E* tile) {
#pragma unroll
  for (int i = 0; i < DP / 32; ++i)
    store<E, 8>(tile + threadIdx.x / 4 * kStride<DP> + Part<DP>::channel(i), rounded<DP, E>(x, i));
}

template <int DP, class E>
__device__ __forceinline__ void write(const Part<DP>& x, E* row, int dim) {
#pragma unroll
  for (int i = 0; i < DP / 32; ++i)
    if (Part<DP>::channel(i) < dim) store<E, 8>(row + Part<DP>::channel(i), rounded<DP, E>(x, i));
}

// x -> phi(x); zero past the last channel, and everywhere where the row does not count.
template <int DP>
__device__ __forceinline__ void to_feature(Feature feature, bool counts, int dim, Part<DP>& x) {
  float top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < DP / 4; ++i)
    if (Part<DP>::channel(i / 8) < dim) top = max(top, x.at[i]);
  if (feature == Feature::kSoftmax) top = row_max(top);
#pragma unroll
  for (int i = 0; i < DP / 4; ++i) {
    float value = sla::feature(feature, x.at[i], top);
    if (!counts || Part<DP>::channel(i / 8) >= dim) value = 0;
    sum += x.at[i] = value;
  }
  if (feature != Feature::kSoftmax) return;
  sum = row_sum(sum);
  const float inverse = counts ? 1 / sum : 0.f;
#pragma unroll
  for (int i = 0; i < DP / 4; ++i) x.at[i] *= inverse;
}

// d phi(x) -> dx
template <int DP>
__device__ __forceinline__ void feature_backward(Feature feature, const Part<DP>& phi, Part<DP>& grad) {
  float dot = 0;
#pragma unroll
  for (int i = 0; i < DP / 4; ++i) dot += phi.at[i] * grad.at[i];
  if (feature == Feature::kSoftmax) dot = row_sum(dot);
#pragma unroll
  for (int i = 0; i < DP / 4; ++i)
    grad.at[i] = feature == Feature::kSoftmax ? phi.at[i] * (grad.at[i] - dot)
                 : feature == Feature::kElu   ? grad.at[i] * min(phi.at[i], 1.f)
                                              : (phi.at[i] > 0 ? grad.at[i] : 0.f);
}

// ---- products -----------------------------------------------------------------------------------------------------

// Warp w's part of a [64, DP] product: rows 16 (w % 4) …, columns DP / 2 (w / 4) …, as DP / 16 accumulators of 8
// columns.
template <int DP>
using RowsPart = float[DP / 16][4];

// acc = A [64, DP] B, B [DP, DP] = state (or its transpose).
template <class E, int DP, bool kTransposed>
__device__ __forceinline__ void times_state(const E* a, const E* state, RowsPart<DP>& acc) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp / 4 * (DP / 2);
#pragma unroll
  for (int i = 0; i < DP / 16; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = 0;
#pragma unroll
  for (int k = 0; k < DP; k += 16) {
    uint32_t left[4];
    ldmatrix_x4(left, a + (warp % 4 * 16 + lane % 16) * kStride<DP> + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < DP / 2; n += 16) {
      uint32_t both[4];  // of columns first + n …, and of the 8 after these
      if constexpr (kTransposed)
        ldmatrix_x4(both, state + (first + n + lane / 16 * 8 + lane % 8) * kStride<DP> + k + lane / 8 % 2 * 8);
      else
        ldmatrix_x4_trans(both, state + (k + lane % 16) * kStride<DP> + first + n + lane / 16 * 8);
      mma_half<E>(acc[n / 8], left, {both[0], both[1]});
      mma_half<E>(acc[n / 8 + 1], left, {both[2], both[3]});
    }
  }
}

// f(row, column, first of two neighbours) for this thread's pairs of a RowsPart.
template <int DP, class F>
__device__ __forceinline__ void for_pairs(RowsPart<DP>& acc, const F& f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < DP / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      f(warp % 4 * 16 + lane / 4 + 8 * half, warp / 4 * (DP / 2) + 8 * i + lane % 4 * 2, &acc[i][2 * half]);
}

// The running sum of left^T right [DP, DP] over tiles of 64 rows, and of weighted rows of left.
template <class E, int DP>
struct StateSum {
  static constexpr int kAcross = 128 / DP;                // warps along a row of the sum
  static constexpr int kTiles = DP / kAcross / 8;
  float acc[kTiles][4] = {};
  float vector = 0;                                       // of channel threadIdx.x

  // After a barrier. weights: a number a row.
  __device__ __forceinline__ void add(const E* left, const E* right, const float* weights) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / kAcross * 16, column = warp % kAcross * (kTiles * 8);
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, left + (k + lane / 16 * 8 + lane % 8) * kStride<DP> + row + lane / 8 % 2 * 8);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t both[4];
        ldmatrix_x4_trans(both, right + (k + lane % 16) * kStride<DP> + column + n * 8 + lane / 16 * 8);
        mma_half<E>(acc[n], a, {both[0], both[1]});
        mma_half<E>(acc[n + 1], a, {both[2], both[3]});
      }
    }
    if (threadIdx.x < DP)
      for (int r = 0; r < kRows; ++r) vector += weights[r] * widen(left[r * kStride<DP> + threadIdx.x]);
  }

  // f(index in [DP + 1, DP], value) for what this thread holds; its pairs lie next to each other.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / kAcross * 16 + lane / 4, column = warp % kAcross * (kTiles * 8) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) f((row + 8 * half) * DP + column + n * 8 + i, acc[n][2 * half + i]);
    if (threadIdx.x < DP) f(DP * DP + threadIdx.x, vector);
  }
};

// A state from memory: into shared memory, divided by what is returned; its vector as it is. Ends with a barrier.
template <class E, int DP>
__device__ __forceinline__ float load_state(const float* from, const LinearShared<E, DP>& s) {
  float top = 0;
  for (int i = threadIdx.x; i < DP * DP; i += kLinearThreads) top = max(top, fabsf(from[i]));
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
  if (threadIdx.x % 32 == 0) s.scratch[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kLinearThreads / 32; ++w) top = max(top, s.scratch[w]);
  const uint32_t exponent = __float_as_uint(top) & 0x7f800000u;
  const float unit = exponent >= 0x10000000u && exponent <= 0x70000000u ? __uint_as_float(exponent) : 1.f;
  const float inverse = 1 / unit;
  for (int i = threadIdx.x; i < DP * DP; i += kLinearThreads)
    narrow(from[i] * inverse, s.state[i / DP * kStride<DP> + i % DP]);
  if (threadIdx.x < DP) s.vector[threadIdx.x] = from[DP * DP + threadIdx.x];
  __syncthreads();
  return unit;
}

}  // namespace triskele::cuda::backward
