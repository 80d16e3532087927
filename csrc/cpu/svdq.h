// What the multiplications of the 4-bit linear share: the problem, a panel of widened weights, what follows the sums.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors wider than the level's registers are passed between functions of one file only, so no ABI is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr int64_t kLanes = 16;  // output channels of one vector
constexpr int64_t kGranule = 256;  // channels that are multiplied the same way
constexpr int64_t kAhead = 512;  // bytes of packed weights fetched before they are needed

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <class Vector, class T>
inline Vector load(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline Floats broadcast(float value) { return value - Floats{}; }  // x - 0 is x, also for -0: no addition is left

}  // namespace triskele::TRISKELE_LEVEL::svdq

#include "cpu/svdq_gelu.h"

namespace triskele::TRISKELE_LEVEL::svdq {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {  // aligned to a cache line
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
  T* p = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(p);
}

struct Gemm {
  int64_t m, n, padded, groups, group, rank;
  const int8_t* codes;      // [M, Kp]
  const float* token_scales;
  const int32_t* sums;      // [M, G]
  const float* down;        // [M, r]
  const uint8_t* qweight;   // [N, Kp/2]
  const float* wscales;     // [N, G]
  const float* lora_up;     // [N, r]
  const float* bias;        // [N] or null
  void* out;                // [M, N]
  bool e2m1, narrow;        // values of the codes; bfloat16 output
  bool stream;              // svdq_finish.h: the output goes past the caches
  int64_t epilogue;         // svdq_gelu.h
  const uint8_t* done;      // granules of 256 channels that svdq_planes.h has multiplied, or null

  bool is_done(int64_t channel) const { return done != nullptr && done[channel / kGranule] != 0; }
};

// Weights of a few channels, a multiple of 16, as the multiplication reads them.
struct Panel {
  int64_t width;            // channels
  int64_t groups;           // that `words` has room for: all, or a stretch of K at a time
  Buffer<uint32_t> words;   // [width/16, groups * group/4, 16]: 4 bytes (code + offset) of 16 channels
  Buffer<float> scales;     // [width/16, G, 16]
  Buffer<float> up;         // [width/16, r, 16]
  Buffer<float> bias;       // [width]
};

inline Panel make_panel(const Gemm& p, int64_t width, int64_t groups) {
  return {width, groups, buffer<uint32_t>(width * groups * p.group / 4), buffer<float>(width * p.groups),
          buffer<float>(width * p.rank), buffer<float>(width)};
}

// Codes in the low nibbles of bytes -> bytes of code (two's complement) or 2 * e2m1; unsigned: code + 8, 2 * e2m1 + 12.
template <bool Unsigned>
inline Ints widened(const Ints& nibbles, bool e2m1) {
  typedef int8_t Bytes __attribute__((vector_size(64)));
  const Bytes code = (Bytes)nibbles;
  constexpr int8_t eight = Unsigned ? 0 : 8, twelve = Unsigned ? 12 : 0;
  if (!e2m1) return (Ints)((code ^ 8) - eight);
  const Bytes magnitude = code & 7, negative = code > 7;  // a comparison gives -1
  const Bytes twice = magnitude - (magnitude > 4) - (magnitude > 5) - 3 * (magnitude > 6);  // 0 1 2 3 4 6 8 12
  return (Ints)(((twice ^ negative) - negative) + twelve);
}

// 16 rows of `count` <= 16 words, one row a lane -> `count` vectors, one word each of all rows.
inline void transpose(const uint8_t* const (&rows)[kLanes], int64_t at, int64_t count, Ints (&out)[kLanes]) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  constexpr __mmask16 all = 0xffff;  // masks nothing: GCC 12 warns of its own header's unmasked forms
  constexpr __mmask8 half = 0xff;
  const __mmask16 inside = static_cast<__mmask16>((1u << count) - 1);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(inside, rows[i] + at);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(all, r[i], r[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(all, r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_maskz_unpacklo_epi64(half, t[i], t[i + 2]);
    r[i + 1] = _mm512_maskz_unpackhi_epi64(half, t[i], t[i + 2]);
    r[i + 2] = _mm512_maskz_unpacklo_epi64(half, t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_maskz_unpackhi_epi64(half, t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // r[4 j + c], quarter q: word 4 q + c of rows 4 j .. 4 j + 3
    const __m512i a = _mm512_maskz_shuffle_i32x4(all, r[c], r[4 + c], 0x88);
    const __m512i b = _mm512_maskz_shuffle_i32x4(all, r[c], r[4 + c], 0xdd);
    const __m512i d = _mm512_maskz_shuffle_i32x4(all, r[8 + c], r[12 + c], 0x88);
    const __m512i e = _mm512_maskz_shuffle_i32x4(all, r[8 + c], r[12 + c], 0xdd);
    out[c] = (Ints)_mm512_maskz_shuffle_i32x4(all, a, d, 0x88);
    out[4 + c] = (Ints)_mm512_maskz_shuffle_i32x4(all, b, e, 0x88);
    out[8 + c] = (Ints)_mm512_maskz_shuffle_i32x4(all, a, d, 0xdd);
    out[12 + c] = (Ints)_mm512_maskz_shuffle_i32x4(all, b, e, 0xdd);
  }
#else
  for (int64_t q = 0; q < count; ++q) {
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int32_t word;
      std::memcpy(&word, rows[lane] + at + 4 * q, 4);
      out[q][lane] = word;
    }
  }
#endif
}

// The weights of groups [from, to) of the panel's channels. Channels beyond N repeat the last one: their results are
// not stored.
template <bool Unsigned>
void fill_words(const Gemm& p, int64_t first, int64_t from, int64_t to, Panel& panel) {
  const int64_t words_a_group = p.group / 8;  // packed; each gives 4 even and 4 odd columns
  for (int64_t block = 0; block < panel.width / kLanes && first + block * kLanes < p.n; ++block) {
    const uint8_t* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane)
      rows[lane] = p.qweight + std::min(first + block * kLanes + lane, p.n - 1) * (p.padded / 2);
    uint32_t* words = panel.words.get() + block * panel.groups * (p.group / 4) * kLanes;
    int64_t place = 0;  // of a word in its group
    for (int64_t word = from * words_a_group; word < to * words_a_group; word += kLanes) {
      const int64_t count = std::min(kLanes, to * words_a_group - word);
      // 16 streams are too many for the hardware to foresee; past the stretch, the next block's rows begin
      const int64_t ahead = 4 * word + kAhead;
      const int64_t skip = ahead < 4 * to * words_a_group ? 0 : kLanes * (p.padded / 2) - 4 * (to - from) * words_a_group;
      for (int64_t lane = 0; lane < kLanes; ++lane) __builtin_prefetch(rows[lane] + ahead + skip);
      Ints packed[kLanes];
      transpose(rows, 4 * word, count, packed);
      for (int64_t q = 0; q < count; ++q) {
        const Ints even = widened<Unsigned>(packed[q] & 0x0f0f0f0f, p.e2m1);
        const Ints odd = widened<Unsigned>((packed[q] >> 4) & 0x0f0f0f0f, p.e2m1);
        std::memcpy(words + place * kLanes, &even, sizeof(Ints));
        std::memcpy(words + (words_a_group + place) * kLanes, &odd, sizeof(Ints));
        if (++place == words_a_group) place = 0, words += 2 * words_a_group * kLanes;
      }
    }
  }
}

inline void fill_factors(const Gemm& p, int64_t first, Panel& panel) {
  for (int64_t block = 0; block < panel.width / kLanes && first + block * kLanes < p.n; ++block) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t channel = std::min(first + block * kLanes + lane, p.n - 1);
      for (int64_t g = 0; g < p.groups; ++g)
        panel.scales[(block * p.groups + g) * kLanes + lane] =
            p.wscales[channel * p.groups + g] * (p.e2m1 ? 0.5f : 1.0f);
      for (int64_t r = 0; r < p.rank; ++r)
        panel.up[(block * p.rank + r) * kLanes + lane] = p.lora_up[channel * p.rank + r];
      panel.bias[block * kLanes + lane] = p.bias == nullptr ? 0.0f : p.bias[channel];
    }
  }
}

inline void store(const Gemm& p, int64_t row, int64_t column, const Floats& value) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const int64_t at = row * p.n + column, count = std::min(kLanes, p.n - column);
  if (p.narrow) {  // to nearest, ties to even; NaN stays one
#if defined(__AVX512BF16__)
    const Halves narrow = (Halves)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)value);  // subnormal values to zero
#else
    const Ints bits = (Ints)value;
    const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Ints nan = (bits & 0x7fffffff) > 0x7f800000;
    const Halves narrow = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
#endif
    uint16_t* to = static_cast<uint16_t*>(p.out) + at;
    if (count == kLanes) std::memcpy(to, &narrow, sizeof(narrow));
    else std::memcpy(to, &narrow, count * 2);
  } else {
    float* to = static_cast<float*>(p.out) + at;
    if (count == kLanes) std::memcpy(to, &value, sizeof(value));
    else std::memcpy(to, &value, count * 4);
  }
}

// From the scaled sums y [Rows, 16] to the output: the token's scale, the bias, the low-rank branch, the epilogue.
template <int Rows>
inline void finish(const Gemm& p, const Panel& panel, int64_t block, int64_t row, int64_t first, Floats (&y)[Rows]) {
  const Floats bias = load<Floats>(panel.bias.get() + block * kLanes);
  const float* up = panel.up.get() + block * p.rank * kLanes;
  const float* down = p.down + row * p.rank;
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m) y[m] = y[m] * broadcast(p.token_scales[row + m]) + bias;
  for (int64_t r = 0; r < p.rank; ++r) {
    const Floats column = load<Floats>(up + r * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) y[m] += broadcast(down[m * p.rank + r]) * column;
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m) store(p, row + m, first + block * kLanes, activated(p.epilogue, y[m]));
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
