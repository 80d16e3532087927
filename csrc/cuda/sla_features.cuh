// The feature map phi of sparse-linear attention, of unscaled queries and keys: softmax over the head dimension,
// elu(x) + 1, or relu.
#pragma once
#include <cstdint>

#include "cuda/common/hopper.cuh"

namespace triskele::cuda::sla {

enum class Feature : int { kSoftmax, kElu, kRelu };

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// phi(x); of softmax the numerator alone, with `top` the largest element of the row.
__device__ __forceinline__ float feature(Feature kind, float x, float top) {
  if (kind == Feature::kSoftmax) return exp2_fast((x - top) * kLog2E);
  if (kind == Feature::kElu) return x > 0.f ? x + 1.f : exp2_fast(x * kLog2E);
  return x < 0.f ? 0.f : x;  // (a NaN stays one)
}

// The same of N elements in place, with one decision for all; element i belongs to the row of top[row(i)].
template <int N, int Rows, class Row>
__device__ __forceinline__ void feature_all(Feature kind, float (&x)[N], const float (&top)[Rows], const Row& row) {
  if (kind == Feature::kSoftmax) {
    float bottom[Rows];
#pragma unroll
    for (int i = 0; i < Rows; ++i) bottom[i] = -top[i] * kLog2E;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = exp2_fast(fmaf(x[i], kLog2E, bottom[row(i)]));
  } else if (kind == Feature::kElu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = feature(Feature::kElu, x[i], 0.f);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = feature(Feature::kRelu, x[i], 0.f);
  }
}

}  // namespace triskele::cuda::sla
