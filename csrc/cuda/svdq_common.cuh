// What the kernels of the 4-bit linear share: operands of any floating dtype, the rule of a scale, checks of operands.
//
//   svdq_quantize_sm80.cu      codes and scale of each token (or group), and the token's low-rank projection
//   svdq_multipliers_sm80.cu   the scales of 4-bit weights as integers
//   svdq_w4a8_sm90.cu          8-bit codes on 4-bit weights with wgmma
//   svdq_widen_sm80.cu         4-bit weights to 8 bits, one scale a chunk of columns
//   svdq_w8a8_sm90.cu          8-bit codes on those with wgmma
//   svdq_w4a4_sm80.cu          4-bit codes on 4-bit weights with mma.sync
//
// The projection down = x lora_down^T leaves svdq_quantize divided by a power of two, one a token (`units`), so that
// it fits the 16-bit dtype it is multiplied in whatever the token's size.
#pragma once
#include <string>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/pack.cuh"

namespace triskele::cuda::svdq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kTiny = 1e-30f;             // a token, group or chunk whose maximum is below counts as zero
constexpr uint32_t kInfinityBits = 0x7f800000u;

// A constant operand in float32, bfloat16 or float16.
struct Floats {
  const void* data = nullptr;
  int kind = 0;                             // 0 float32, 1 bfloat16, 2 float16
  __device__ __forceinline__ float operator[](int64_t i) const {
    if (kind == 0) return static_cast<const float*>(data)[i];
    if (kind == 1) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return __half2float(static_cast<const __half*>(data)[i]);
  }
};

inline Floats floats(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check_that(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
             std::string(name) + " in float32, bfloat16 or float16");
  check_contiguous(op, name, tensor);
  return {tensor.const_data_ptr(), type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2};
}

__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }
template <class E>
__device__ __forceinline__ E from_float(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }

// Two neighbours in a register, widened.
template <class E>
__device__ __forceinline__ float2 widen_pair(uint32_t both);
template <>
__device__ __forceinline__ float2 widen_pair<__nv_bfloat16>(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 widen_pair<__half>(uint32_t both) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(both & 0xffffu))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16))));
}

// From the largest |z| of a token or group, as bits: the scale that is stored, and what z is multiplied with. As
// csrc/cpu/svdq.cpp decides it: NaN or infinity gives NaN, below 1e-30 zero, and codes of zero in both cases.
struct Step {
  float scale, factor;
  bool alive;
};
__device__ __forceinline__ Step step_of(uint32_t top, float levels) {
  const float amax = __uint_as_float(top);
  if (top >= kInfinityBits) return {__uint_as_float(0x7fc00000u), 0.0f, false};
  if (amax < kTiny) return {0.0f, 0.0f, false};
  return {amax / levels, levels / amax, true};
}

template <class T>
inline const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T>
inline T* mutable_data(Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

inline int64_t blocks_of(int64_t size, int64_t width) { return (size + width - 1) / width; }

inline void check_operand(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
                          ScalarType type) {
  check_dim(op, name, tensor, 2);
  check_contiguous(op, name, tensor);
  check_equal(op, (std::string(name) + " rows").c_str(), rows, tensor.size(0));
  check_equal(op, (std::string(name) + " columns").c_str(), columns, tensor.size(1));
  check_that(tensor.scalar_type() == type, op, std::string(name) + " in the dtype of its contract");
}

// 16-byte loads: TMA, cp.async and vectors need it.
inline void check_aligned(const char* op, const char* name, const Tensor& tensor) {
  check_that(aligned(tensor.const_data_ptr(), 16), op, std::string(name) + " at an address in multiples of 16");
}

}  // namespace triskele::cuda::svdq
