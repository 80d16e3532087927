// The scales of a channel as integers, s[n, g] = unit[n] multiplier[n, g], so that the product of svdq_w4a8_sm90.cu adds
// up in int32 and a channel has one float scale.
//
// Exact where the channel's scales are multiples of one number, up to 18 of it, as the quantizer's scales="integer"
// makes them (and where it has one scale). Otherwise rounded: multiplier = round(c s_g / sum |s|) with c = 33024 -
// groups / 2, at most 32767. Either way sum |multiplier| <= 33026, and a group's |sum of 64 products| <= 64 * 8 * 127 =
// 65024, so all partial sums stay below 2^31. What the rounding costs: docs/cuda_linear.md.
//
// 64 channels share a flag: whether code * multiplier fits int8 in all of them, so that it can be multiplied before the
// product instead of after it. Multiples up to 15 fit with any code, those up to 18 without a code of -8.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/common/launch.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;             // channels that share a flag: those of a warpgroup
constexpr int kMost = 18;             // 7 * 18 = 126
constexpr int kMostWithAnyCode = 15;  // -8 * 15 = -120; a scale may be negative, so 16 would reach + 128
constexpr int kReach = 33024;         // (2^31 - 1) / 65024 = 33026.0, less what float32 rounds
constexpr int kMostGroups = 1024;     // K = 65536

struct MultiplierArgs {
  const uint8_t* qweight;   // [n, 32 groups]
  Floats scales;            // [n, groups]
  int64_t n;
  int groups, stride;
  bool in_operand;
  int16_t* multipliers;     // [n, stride]
  float* units;             // [n]
  int* fits;                // [n up to 64 / 64]
};

// Whether a code of -8 is among the row's.
__device__ __forceinline__ bool has_lowest(const uint8_t* row, int groups, int lane) {
  bool found = false;
  for (int i = lane; i < groups * 2; i += 32) {
    const uint4 words = reinterpret_cast<const uint4*>(row)[i];
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
      const uint32_t zeros = word ^ 0x88888888u;   // a nibble of zero is searched for: one that borrows
      found |= ((zeros - 0x11111111u) & ~zeros & 0x88888888u) != 0;
    }
  }
  return __any_sync(0xffffffffu, found);
}

// A warp makes a channel's multipliers and unit. Returns whether they fit into the operand.
__device__ __forceinline__ bool make_channel(const MultiplierArgs& p, int64_t row, int lane) {
  const int64_t scales = row * p.groups;
  int16_t* out = p.multipliers + row * p.stride;
  uint32_t bits = 0;
  for (int g = lane; g < p.groups; g += 32) bits = max(bits, __float_as_uint(fabsf(p.scales[scales + g])));
  bits = __reduce_max_sync(0xffffffffu, bits);
  const float top = __uint_as_float(bits);
  if (bits >= kInfinityBits || top < kTiny) {   // NaN or infinity gives NaN; below 1e-30 counts as zero
    for (int g = lane; g < p.stride; g += 32) out[g] = 0;
    if (lane == 0) p.units[row] = bits >= kInfinityBits ? __uint_as_float(0x7fc00000u) : 0.0f;
    return true;
  }

  int most = 1;
  float unit = top;
  for (bool exact = false; !exact && most <= kMost; most += !exact) {
    unit = top / static_cast<float>(most);
    exact = true;
    for (int g = lane; g < p.groups; g += 32) {
      const float scale = p.scales[scales + g];
      exact &= rintf(scale / unit) * unit == scale;
    }
    exact = __all_sync(0xffffffffu, exact);
  }
  if (most > kMost) {
    float sum = 0;
    for (int g = lane; g < p.groups; g += 32) sum += fabsf(p.scales[scales + g] / top);
    unit = top * (warp_sum(sum) / static_cast<float>(min(kReach - (p.groups + 1) / 2, 32767)));
  }
  for (int g = lane; g < p.stride; g += 32)
    out[g] = static_cast<int16_t>(g < p.groups ? __float2int_rn(p.scales[scales + g] / unit) : 0);
  if (lane == 0) p.units[row] = unit;
  return most <= kMostWithAnyCode || (most <= kMost && !has_lowest(p.qweight + row * p.groups * 32, p.groups, lane));
}

__global__ void __launch_bounds__(kThreads) multipliers_kernel(const MultiplierArgs p) {
  const int lane = threadIdx.x % 32;
  bool fits = p.in_operand;
  for (int i = threadIdx.x / 32; i < kRows; i += kThreads / 32) {
    const int64_t row = int64_t(blockIdx.x) * kRows + i;
    if (row < p.n) fits &= make_channel(p, row, lane);
  }
  const int all = __syncthreads_and(fits);
  if (threadIdx.x == 0) p.fits[blockIdx.x] = all;
}

// qweight uint8 [N, 32 G] of int4 and wscales [N, G] -> multipliers int16 [N, G up to a multiple of 4] (zeros after G),
// units float32 [N], fits int32 [N up to a multiple of 64 / 64], all zero where !in_operand
std::tuple<Tensor, Tensor, Tensor> svdq_multipliers(const Tensor& qweight, const Tensor& wscales, bool in_operand) {
  constexpr const char* op = "svdq_multipliers";
  check_dim(op, "qweight", qweight, 2);
  check_dim(op, "wscales", wscales, 2);
  const int64_t n = qweight.size(0), groups = wscales.size(1), stride = blocks_of(groups, 4) * 4;
  check_operand(op, "qweight", qweight, n, qweight.size(1), ScalarType::Byte);
  check_equal(op, "wscales rows", n, wscales.size(0));
  check_that(groups > 0 && qweight.size(1) == groups * 32, op, "a scale for every 64 of qweight's columns");
  check_that(groups <= kMostGroups, op, "at most 65536 columns, beyond which sums could pass int32");
  check_aligned(op, "qweight", qweight);
  const Launch launch(qweight);
  Tensor multipliers = torch::stable::new_empty(qweight, {n, stride}, ScalarType::Short);
  Tensor units = torch::stable::new_empty(qweight, {n}, ScalarType::Float);
  Tensor fits = torch::stable::new_empty(qweight, {blocks_of(n, kRows)}, ScalarType::Int);
  if (n == 0) return {multipliers, units, fits};
  const MultiplierArgs args{data<uint8_t>(qweight), floats(op, "wscales", wscales), n, static_cast<int>(groups),
                            static_cast<int>(stride), in_operand, mutable_data<int16_t>(multipliers),
                            mutable_data<float>(units), mutable_data<int>(fits)};
  launch_kernel(multipliers_kernel, dim3(static_cast<unsigned>(blocks_of(n, kRows))), dim3(kThreads), 0, launch.stream,
                args);
  return {multipliers, units, fits};
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_multipliers", TORCH_BOX(&triskele::cuda::svdq::svdq_multipliers)); }
