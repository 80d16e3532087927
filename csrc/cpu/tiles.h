// bfloat16 products of packed tiles, for every family that multiplies matrices.
//
// A tile is 16 rows of 64 bytes. A product adds A [16, 32] B [32, 16] to a float32 C [16, 16], where A lies by rows, 32
// bfloat16 each, and B lies in pairs of depth: its row i holds (B[2i, n], B[2i+1, n]) for n = 0..15. Level "amx" has
// registers for whole tiles (tiles_amx.h), level "avx512_bf16" takes a tile by dot products of pairs (tiles_dot.h).
//
// A float32 operand goes as three bfloat16 planes whose sum is the float exactly, and a product as the six pairs of
// planes that reach 2^-24 of it: the error of float32 arithmetic, at 2.7 times the speed of float32 vectors on tile
// registers, which alone take it. `Planes` is 3 then, and 1 where the operands are bfloat16, or are rounded to it.
// Both instructions read subnormal numbers as zero.
#pragma once
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/simd.h"

namespace triskele::TRISKELE_LEVEL::tile {

constexpr int64_t kSide = 16;      // rows of a tile; columns of B and of C
constexpr int64_t kDepth = 32;     // of one product
constexpr int64_t kWords = 512;    // bfloat16 of a tile
constexpr int64_t kRowBytes = 64;
static_assert(kVec == kSide);

// ---------------------------------------------------------------------------------------------- float32 -> planes

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline void store(uint16_t* p, Words x) { std::memcpy(p, &x, sizeof x); }

// The planes of x, each the bits of a float whose low half is zero. One plane: x rounded to nearest, ties to even.
// Three: cut off, rounded, what is left; their sum is x (above 2^-109).
template <int Planes>
inline void split(Floats x, Words* planes) {
  static_assert(Planes == 1 || Planes == 3);
  const Words bits = reinterpret_cast<Words>(x);
  if constexpr (Planes == 1) {
    const Words up = bits + ((bits >> 16) & 1u) + 0x7FFFu;
    planes[0] = (x == x ? up : bits | 0x400000u) & 0xFFFF0000u;  // rounding up could end a NaN as zero
  } else {
    planes[0] = bits & 0xFFFF0000u;
    const Floats rest = x - reinterpret_cast<Floats>(planes[0]);
    planes[1] = (reinterpret_cast<Words>(rest) + 0x8000u) & 0xFFFF0000u;
    planes[2] = reinterpret_cast<Words>(rest - reinterpret_cast<Floats>(planes[1])) & 0xFFFF0000u;  // if subnormal
  }
}

// One plane of 32 floats by the CPU's own rounding: nearest, ties to even, subnormal numbers to zero.
inline Words rounded(Floats first, Floats second) {
  return reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(second, first));
}

// 16 bfloat16 and 16 more -> the first of each, the second of each, ...
inline Words interleaved(Words halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<Words>(
      _mm512_maskz_permutexvar_epi16(0xFFFFFFFF, order, reinterpret_cast<__m512i>(halves)));
}

// Depths 2i (`even`) and 2i+1 (`odd`) of 16 columns -> row i of a B tile.
inline Words pair(Words even, Words odd) { return (even >> 16) | odd; }

// Depths 0..15 and 16..31 of a row -> that row of an A tile.
inline void store_line(uint16_t* p, Words first, Words second) {
  const Halves low = __builtin_convertvector(first >> 16, Halves), high = __builtin_convertvector(second >> 16, Halves);
  std::memcpy(p, &low, sizeof low);
  std::memcpy(p + kSide, &high, sizeof high);
}

// 16 rows of float, `stride` floats apart and 32 wide -> one A tile a plane, planes `plane` words apart.
template <int Planes>
inline void pack_a(const float* rows, int64_t stride, uint16_t* tile, int64_t plane) {
  for (int64_t r = 0; r < kSide; ++r) {
    const Floats low = load(rows + r * stride), high = load(rows + r * stride + kSide);
    if constexpr (Planes == 1) {
      store(tile + r * kDepth, rounded(low, high));
    } else {
      Words first[Planes], second[Planes];
      split<Planes>(low, first);
      split<Planes>(high, second);
      for (int p = 0; p < Planes; ++p) store_line(tile + p * plane + r * kDepth, first[p], second[p]);
    }
  }
}

// 32 rows (the depth) of float, `stride` floats apart and 16 wide -> one B tile a plane.
template <int Planes>
inline void pack_b(const float* rows, int64_t stride, uint16_t* tile, int64_t plane) {
  for (int64_t i = 0; i < kSide; ++i) {
    const Floats upper = load(rows + 2 * i * stride), lower = load(rows + (2 * i + 1) * stride);
    if constexpr (Planes == 1) {
      store(tile + i * kDepth, interleaved(rounded(upper, lower)));
    } else {
      Words even[Planes], odd[Planes];
      split<Planes>(upper, even);
      split<Planes>(lower, odd);
      for (int p = 0; p < Planes; ++p) store(tile + p * plane + i * kDepth, pair(even[p], odd[p]));
    }
  }
}

// ---------------------------------------------------------------------------------------------- products of tiles

// Packed tiles of an operand, in bfloat16 words: `side` to the next 16 rows of A (columns of B), `step` to the next 32
// of depth, `plane` to the next plane. With `order`, depth s is at order[s] * step.
struct Operand {
  const uint16_t* data;
  int64_t side, step, plane;
  const int64_t* order = nullptr;
  const uint16_t* at(int64_t s) const { return data + (order != nullptr ? order[s] : s) * step; }
};

}  // namespace triskele::TRISKELE_LEVEL::tile

#if defined(__AMX_BF16__)
#include "cpu/tiles_amx.h"
#else
#include "cpu/tiles_dot.h"
#endif
#endif
