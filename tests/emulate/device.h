// CUDA C++ as C++: the qualifiers, the built-in variables and the intrinsics that kernels use. Included before every
// source by the compiler's -include, so it also gathers the headers that are slow to read (one precompiled header).
#ifndef TRISKELE_EMULATE_DEVICE
#define TRISKELE_EMULATE_DEVICE
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// One copy for all fibers of the CPU thread, in the library's thread-local segment, which the runtime fills with NaN.
#define __shared__ static thread_local
// nvcc takes it after __shared__, where C++ does not take the standard spelling
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __builtin_assume(...) static_cast<void>(0)

#define threadIdx (::emulate::here.thread)
#define blockIdx (::emulate::here.block)
#define blockDim (::emulate::here.block_size)
#define gridDim (::emulate::here.grid_size)
inline constexpr int warpSize = 32;

// ---- barriers and warps -------------------------------------------------------------------------------------------

inline void __syncthreads() { ::emulate::block_sum(0); }
inline int __syncthreads_count(int holds) { return ::emulate::block_sum(holds != 0); }
inline int __syncthreads_or(int holds) { return ::emulate::block_sum(holds != 0) > 0; }
inline int __syncthreads_and(int holds) { return ::emulate::block_sum(holds == 0) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { ::emulate::yield(); }
[[noreturn]] inline void __trap() { ::emulate::fail("__trap"); }

namespace emulate {

// What lane i brought and what it gets: `source(i)` tells from which lane, itself where there is none.
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, int width, const Source& source) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2));
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("%s: a width of %d", what, width);
  struct Mine { T value, result; int from; } mine{value, value, source(lane())};
  meet(what, mask, &mine, [](void* const* lanes, uint32_t there, const void* name) {
    for (int i = 0; i < 32; ++i) {
      if (!(there >> i & 1)) continue;
      Mine* own = static_cast<Mine*>(lanes[i]);
      if (!(there >> own->from & 1))
        fail("%s: lane %d reads lane %d, which is not there", static_cast<const char*>(name), i, own->from);
      own->result = static_cast<const Mine*>(lanes[own->from])->value;
    }
  }, what);
  return mine.result;
}

// fold(results, there, lanes) on one 64-bit word a lane.
struct Word { uint64_t value, result; };
template <class Fold>
uint64_t fold(const char* what, unsigned mask, uint64_t value, Fold) {
  static_assert(std::is_empty_v<Fold>);
  Word mine{value, 0};
  meet(what, mask, &mine, [](void* const* lanes, uint32_t there, const void*) {
    Word* words[32];
    for (int i = 0; i < 32; ++i) words[i] = there >> i & 1 ? static_cast<Word*>(lanes[i]) : nullptr;
    Fold()(words);
  });
  return mine.result;
}

template <class T, class Op>
T reduce(const char* what, unsigned mask, T value, Op) {
  return static_cast<T>(fold(what, mask, static_cast<uint64_t>(value), [](Word** words) {
    bool first = true;
    T total{};
    for (int i = 0; i < 32; ++i) {
      if (!words[i]) continue;
      const T own = static_cast<T>(words[i]->value);
      total = first ? own : Op()(total, own);
      first = false;
    }
    for (int i = 0; i < 32; ++i) if (words[i]) words[i]->result = static_cast<uint64_t>(total);
  }));
}

}  // namespace emulate

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return ::emulate::shuffle("__shfl_sync", mask, value, width,
                            [=](int i) { return (i & ~(width - 1)) + (from & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return ::emulate::shuffle("__shfl_xor_sync", mask, value, width, [=](int i) {
    const int from = i ^ bits;
    return from >= (i & ~(width - 1)) + width ? i : from;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::emulate::shuffle("__shfl_up_sync", mask, value, width, [=](int i) {
    const int from = i - static_cast<int>(delta);
    return from < (i & ~(width - 1)) ? i : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::emulate::shuffle("__shfl_down_sync", mask, value, width, [=](int i) {
    const int from = i + static_cast<int>(delta);
    return from >= (i & ~(width - 1)) + width ? i : from;
  });
}

inline unsigned __ballot_sync(unsigned mask, int holds) {
  return static_cast<unsigned>(::emulate::fold("__ballot_sync", mask, holds != 0, [](::emulate::Word** words) {
    uint64_t bits = 0;
    for (int i = 0; i < 32; ++i) if (words[i]) bits |= words[i]->value << i;
    for (int i = 0; i < 32; ++i) if (words[i]) words[i]->result = bits;
  }));
}
inline int __any_sync(unsigned mask, int holds) { return __ballot_sync(mask, holds) != 0; }
inline int __all_sync(unsigned mask, int holds) { return __ballot_sync(mask, !holds) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::emulate::fold("__syncwarp", mask, 0, [](::emulate::Word**) {});
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return static_cast<unsigned>(::emulate::fold("__match_any_sync", mask, bits, [](::emulate::Word** words) {
    for (int i = 0; i < 32; ++i) {
      if (!words[i]) continue;
      uint64_t same = 0;
      for (int j = 0; j < 32; ++j) if (words[j] && words[j]->value == words[i]->value) same |= uint64_t(1) << j;
      words[i]->result = same;
    }
  }));
}
#define EMULATE_REDUCE(name, type, expression) \
  inline type name(unsigned mask, type value) { \
    return ::emulate::reduce(#name, mask, value, [](type a, type b) -> type { return expression; }); \
  }
EMULATE_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATE_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMULATE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMULATE_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMULATE_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMULATE_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMULATE_REDUCE(__reduce_and_sync, unsigned, a & b)
EMULATE_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMULATE_REDUCE

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T __ldca(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }
template <class T> void __stcg(T* to, T value) { *to = value; }
template <class T> void __stwt(T* to, T value) { *to = value; }

#define EMULATE_ATOMIC(name, expression) \
  template <class T> T name(T* at, std::type_identity_t<T> value) { \
    const T old = *at; \
    *at = expression; \
    return old; \
  }
EMULATE_ATOMIC(atomicAdd, old + value)
EMULATE_ATOMIC(atomicSub, old - value)
EMULATE_ATOMIC(atomicMax, old < value ? value : old)
EMULATE_ATOMIC(atomicMin, value < old ? value : old)
EMULATE_ATOMIC(atomicAnd, old & value)
EMULATE_ATOMIC(atomicOr, old | value)
EMULATE_ATOMIC(atomicExch, value)
#undef EMULATE_ATOMIC
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  T old = *at;
  if (old == expected) *at = value;
  return old;
}

inline size_t __cvta_generic_to_shared(const void* pointer) { return ::emulate::shared_address(pointer); }

// ---- integers and bits --------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xf, byte = bytes >> 8 * (pick & 7) & 0xff;
    result |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;   // bit 3: the byte's sign, repeated
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }

// ---- floats -------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline int __float2int_rn(float x) { return static_cast<int>(lrintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(llrintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }

#define EMULATE_MIN_MAX(a, b, type) \
  inline type min(a x, b y) { return static_cast<type>(x) < static_cast<type>(y) ? x : y; } \
  inline type max(a x, b y) { return static_cast<type>(x) > static_cast<type>(y) ? x : y; }
EMULATE_MIN_MAX(int, int, int)
EMULATE_MIN_MAX(unsigned, unsigned, unsigned)
EMULATE_MIN_MAX(int, unsigned, unsigned)
EMULATE_MIN_MAX(unsigned, int, unsigned)
EMULATE_MIN_MAX(long, long, long)
EMULATE_MIN_MAX(long, int, long)
EMULATE_MIN_MAX(int, long, long)
EMULATE_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATE_MIN_MAX(long long, long long, long long)
EMULATE_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMULATE_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

#endif
