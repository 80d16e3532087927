// 4-bit weights to 8 bits, once a call, for the int8 product that follows: they stay in L2 (9 MB at 3072 x 3072) and
// the layer keeps no copy. One scale a chunk of 64 or 256 columns replaces those of the groups in it:
//
//   S = max|s_g| / t,   code8 = round_half_even(code s_g / S),   t = 18 (15 where a code of -8 would pass 127)
//
// t is an integer, so the group with the largest scale keeps its values exactly; the others are rounded to 1/18 of
// that group's step. A chunk that lies in one group is exact. e2m1 codes count as twice their value, an integer up to
// 12, and t is 10. What the rounding costs: docs/cuda_linear.md.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/common/launch.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kThreads = 128;

struct WidenArgs {
  const uint8_t* qweight;   // [n, bytes]
  Floats scales;            // [n, groups]
  int64_t bytes, groups, stride;
  int group, padded;
  int8_t* codes;            // [n, padded]
  float* chunk_scales;      // [padded / chunk, stride]
};

// int4: -8 … 7. e2m1: twice its value, -12 … 12, an integer.
template <bool kE2m1>
__device__ __forceinline__ int value_of(uint32_t nibble) {
  if constexpr (kE2m1) {
    const int magnitude = 0xc8643210u >> ((nibble & 7u) * 4) & 15;   // 0 1 2 3 4 6 8 12
    return nibble & 8u ? -magnitude : magnitude;
  } else {
    return static_cast<int>(nibble ^ 8u) - 8;
  }
}

// A block owns a row; kLanes of a warp share a chunk, eight columns each.
template <bool kE2m1, int kLanes>
__global__ void __launch_bounds__(kThreads) widen_kernel(const WidenArgs p) {
  const int64_t row = blockIdx.x;
  for (int column = threadIdx.x * 8; column < p.padded; column += kThreads * 8) {   // whole warps: padded % 256 == 0
    uint32_t word = 0;
    float scale = 0;
    if (column < p.bytes * 2) {
      word = *reinterpret_cast<const uint32_t*>(p.qweight + row * p.bytes + column / 2);
      scale = p.scales[row * p.groups + column / p.group] * (kE2m1 ? 0.5f : 1.0f);
    }
    int value[8], most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      value[i] = value_of<kE2m1>(word >> (4 * i) & 15u);
      most = max(most, value[i] < 0 ? -value[i] : value[i]);
    }
    float top = fabsf(scale), reach = top * static_cast<float>(most);
#pragma unroll
    for (int lane = 1; lane < kLanes; lane <<= 1) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lane));
      reach = fmaxf(reach, __shfl_xor_sync(0xffffffffu, reach, lane));
    }
    const float steps = kE2m1 ? 10.0f : reach * 18.0f <= top * 127.0f ? 18.0f : 15.0f;   // 12, 7, 8 times that: <= 127
    const bool alive = top >= kTiny;
    const float factor = alive ? scale * (steps / top) : 0.0f;
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      even |= (static_cast<uint32_t>(__float2int_rn(static_cast<float>(value[2 * i]) * factor)) & 0xffu) << (i * 8);
      odd |= (static_cast<uint32_t>(__float2int_rn(static_cast<float>(value[2 * i + 1]) * factor)) & 0xffu) << (i * 8);
    }
    int8_t* to = p.codes + row * p.padded + column / 32 * 32 + column % 32 / 2;
    *reinterpret_cast<uint32_t*>(to) = even;
    *reinterpret_cast<uint32_t*>(to + 16) = odd;
    if (threadIdx.x % kLanes == 0) p.chunk_scales[column / (kLanes * 8) * p.stride + row] = alive ? top / steps : 0.0f;
  }
}

// qweight uint8 [N, K'/2], wscales [N, G] -> codes int8 [N, K' up to a multiple of 256], each 32 columns as their
// even and then their odd ones (as svdq_quantize_int8 orders a token's), scales float32 [columns / chunk, N up to a
// multiple of 4] (the rest of a row is undefined)
std::tuple<Tensor, Tensor> svdq_widen(const Tensor& qweight, const Tensor& wscales, bool e2m1, int64_t chunk) {
  constexpr const char* op = "svdq_widen";
  check_dim(op, "qweight", qweight, 2);
  check_dim(op, "wscales", wscales, 2);
  const int64_t n = qweight.size(0), bytes = qweight.size(1), groups = wscales.size(1);
  check_operand(op, "qweight", qweight, n, bytes, ScalarType::Byte);
  check_equal(op, "wscales rows", n, wscales.size(0));
  check_that(groups > 0 && bytes > 0 && bytes * 2 % groups == 0 && bytes * 2 / groups % 16 == 0, op,
             "qweight's columns to be groups of a multiple of 16");
  check_that(bytes < (int64_t{1} << 29), op, "fewer than 2^30 columns");
  check_that(chunk == 64 || chunk == 256, op, "a chunk of 64 or 256 columns");
  check_aligned(op, "qweight", qweight);
  const int64_t padded = blocks_of(bytes * 2, 256) * 256, stride = blocks_of(n, 4) * 4;
  const Launch launch(qweight);
  Tensor codes = torch::stable::new_empty(qweight, {n, padded}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(qweight, {padded / chunk, stride}, ScalarType::Float);
  if (n == 0) return {codes, scales};
  const WidenArgs args{data<uint8_t>(qweight), floats(op, "wscales", wscales), bytes, groups, stride,
                       static_cast<int>(bytes * 2 / groups), static_cast<int>(padded), mutable_data<int8_t>(codes),
                       mutable_data<float>(scales)};
  auto run = [&](auto kernel) {
    launch_kernel(kernel, dim3(static_cast<unsigned>(n)), dim3(kThreads), 0, launch.stream, args);
  };
  if (e2m1) chunk == 64 ? run(widen_kernel<true, 8>) : run(widen_kernel<true, 32>);
  else chunk == 64 ? run(widen_kernel<false, 8>) : run(widen_kernel<false, 32>);
  return {codes, scales};
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_widen", TORCH_BOX(&triskele::cuda::svdq::svdq_widen)); }
