// Loads that widen and stores that narrow, a register at a time: bfloat16 <-> float, float -> double; stores past the
// caches. Spelled out where the level has an instruction, as compilers take __builtin_convertvector apart into halves.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace triskele::TRISKELE_LEVEL {

constexpr int kWide = kVec / 2;  // doubles in a register

typedef double Doubles __attribute__((vector_size(kWide * sizeof(double))));
typedef double UnalignedDoubles __attribute__((vector_size(kWide * sizeof(double)), aligned(8), may_alias));

// Lanes of a register that hold bfloat16 as it arrives and leaves.
typedef uint32_t Bits __attribute__((vector_size(kVec * sizeof(uint32_t))));
typedef uint32_t UnalignedBits __attribute__((vector_size(kVec * sizeof(uint32_t)), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kVec * sizeof(uint16_t))));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVec * sizeof(uint16_t)), aligned(2), may_alias));

inline Floats load_bfloat16(const uint16_t* p) {
#if defined(__AVX512F__)
  const Bits wide = (Bits)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const Bits wide = (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const Bits wide = __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Bits);
#endif
  return reinterpret_cast<Floats>(wide << 16);
}

inline Bits round_bfloat16(Floats x) {  // nearest, ties to even; NaN stays NaN. In the lower half of each lane
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = bits + (((bits >> 16) & 1) + 0x7FFF);
  return (x == x ? rounded : bits | 0x400000) >> 16;
}

#if defined(__AVX512F__)
inline __m256i narrow(Bits x) { return _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x); }
#elif defined(__AVX2__)
inline __m128i narrow(Bits x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // each 128-bit half twice
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
inline Halves narrow(Bits x) { return __builtin_convertvector(x, Halves); }
#endif

inline void store_bfloat16(uint16_t* p, Floats x) {
  *reinterpret_cast<UnalignedHalves*>(p) = (Halves)narrow(round_bfloat16(x));
}

// Stores past the caches, which need not read the line first: for results larger than the caches. p is aligned to the
// register's share of it. `streamed` has to follow before another thread may read them.
inline void stream(float* p, Floats x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX__)
  _mm256_stream_ps(p, x);
#elif defined(__x86_64__)
  _mm_stream_ps(p, x);
#else
  store(p, x);
#endif
}

inline void stream_bfloat16(uint16_t* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(round_bfloat16(x)));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(round_bfloat16(x)));
#else
  store_bfloat16(p, x);
#endif
}

inline void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Whether rows of `row_bytes` at `data`, `bytes` in all, are to be streamed: beyond what second-level caches hold.
inline bool streams(const void* data, int64_t row_bytes, int64_t bytes) {
  constexpr int64_t kCaches = int64_t(4) << 20;
  return bytes >= kCaches && reinterpret_cast<uintptr_t>(data) % 64 == 0 && row_bytes % 64 == 0;
}

inline Doubles load_doubles(const double* p) { return *reinterpret_cast<const UnalignedDoubles*>(p); }
inline void store_doubles(double* p, Doubles x) { *reinterpret_cast<UnalignedDoubles*>(p) = x; }

inline Doubles load_doubles(const float* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#elif defined(__x86_64__)
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadu_si64(p)));
#else
  typedef float Half __attribute__((vector_size(kWide * sizeof(float)), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Doubles);
#endif
}

// The lower and the upper lanes of a register.
inline Doubles low_doubles(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, x, 0));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#elif defined(__x86_64__)
  return _mm_cvtps_pd(x);
#else
  return Doubles{x[0], x[1]};
#endif
}

inline Doubles high_doubles(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, x, 1));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__x86_64__)
  return _mm_cvtps_pd(_mm_movehl_ps(x, x));
#else
  return Doubles{x[2], x[3]};
#endif
}

}  // namespace triskele::TRISKELE_LEVEL
