// V neighbouring elements that move in one memory transaction, and their arithmetic type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace triskele::cuda {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16(value); }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& value) {
  *reinterpret_cast<Pack<T, V>*>(to) = value;
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// The sum over a warp's lanes, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

}  // namespace triskele::cuda
