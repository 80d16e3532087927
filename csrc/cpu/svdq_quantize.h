// A token of the 4-bit linear: smoothing, its scale, its int8 codes in the order that packed weights unpack to.
#pragma once
#include <cmath>

#include "cpu/svdq.h"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr float kTiny = 1e-30f;  // a token whose maximum is below counts as zero

inline float to_float(uint16_t bits) { return bfloat16_to_float(bits); }
inline float to_float(float value) { return value; }

// z = (x + shift) / smooth; returns the bits of the largest |z|: NaN and infinity come out on top.
template <class T>
inline int32_t smooth_token(const T* x, const float* inverse_smooth, float shift, int64_t k, float* z) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < k; ++i) {
    const float value = (to_float(x[i]) + shift) * inverse_smooth[i];
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    std::memcpy(z + i, &value, 4);
    bits &= 0x7fffffff;
    top = top > bits ? top : bits;
  }
  return top;
}

#if defined(__AVX512VBMI__)
// What the end of quantize_token does, for groups of 64: a group is one vector of bytes.
inline void order_groups_of_64(const float* z, float factor, int64_t padded, int8_t* codes, int32_t* sums) {
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  constexpr Bytes even_odd = {
      0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58,
      60, 62, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55,
      57, 59, 61, 63};
  constexpr __mmask16 all = 0xffff;  // masks nothing: GCC 12 warns of its own header's unmasked forms
  for (int64_t g = 0; g < padded / 64; ++g, z += 64, codes += 64) {
    alignas(64) int8_t ordered[64];
    for (int i = 0; i < 4; ++i) {
      const Ints rounded = (Ints)_mm512_maskz_cvtps_epi32(all, (__m512)(load<Floats>(z + 16 * i) * factor));
      _mm_store_si128(reinterpret_cast<__m128i*>(ordered + 16 * i), _mm512_maskz_cvtepi32_epi8(all, (__m512i)rounded));
    }
    const __m512i bytes = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, (__m512i)even_odd, _mm512_load_si512(ordered));
    _mm512_storeu_si512(codes, bytes);
    const Ints fours = (Ints)_mm512_dpbusd_epi32(__m512i{}, _mm512_set1_epi8(1), bytes);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int lane = 0; lane < 16; ++lane) sum += fours[lane];
    sums[g] = sum;
  }
}
#endif

// The token at x + at. z and ordered [Kp] are scratch; codes [Kp] hold, in each group, its even columns and then its odd ones,
// which is the order that the weight's nibbles unpack to. sums [G]: the codes' sum a group.
inline void quantize_token(const void* x, bool wide, int64_t at, const float* inverse_smooth, float shift, int64_t k,
                           int64_t padded, int64_t group, float* z, int8_t* ordered, int8_t* codes, float* scale,
                           int32_t* sums) {
  const int32_t top = wide ? smooth_token(static_cast<const float*>(x) + at, inverse_smooth, shift, k, z)
                           : smooth_token(static_cast<const uint16_t*>(x) + at, inverse_smooth, shift, k, z);
  float amax;
  std::memcpy(&amax, &top, 4);
  const bool finite = top < 0x7f800000;
  const bool dead = finite && amax < kTiny;
  *scale = !finite ? NAN : dead ? 0.0f : amax / 127.0f;
  if (!finite || dead) {
    std::memset(codes, 0, padded);
    std::fill(sums, sums + padded / group, 0);
    return;
  }
  const float factor = 127.0f / amax;
  for (int64_t i = k; i < padded; ++i) z[i] = 0.0f;
#if defined(__AVX512VBMI__)
  if (group == 64) return order_groups_of_64(z, factor, padded, codes, sums);
#endif
  // ties to even; |z| <= amax keeps the product within a rounding of 127, so the nearest integer needs no clamp
  for (int64_t i = 0; i < padded; ++i)
    ordered[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(z[i] * factor)));
  typedef int16_t Pair __attribute__((may_alias));
  const int64_t half = group / 2;
  for (int64_t g = 0; g < padded / group; ++g) {
    const int8_t* from = ordered + g * group;
    const Pair* pairs = reinterpret_cast<const Pair*>(from);
    int8_t *even = codes + g * group, *odd = even + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) even[i] = static_cast<int8_t>(pairs[i]);  // the low byte
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) odd[i] = static_cast<int8_t>(pairs[i] >> 8);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < group; ++i) sum += from[i];
    sums[g] = sum;
  }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
