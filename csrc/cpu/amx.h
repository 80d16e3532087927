// bfloat16 products on tile registers (level "amx"), for every family that multiplies matrices.
//
// A tile is 16 rows of 64 bytes. TDPBF16PS adds A [16, 32] B [32, 16] to a float32 C [16, 16], where A lies by rows, 32
// bfloat16 each, and B lies in pairs of depth: its row i holds (B[2i, n], B[2i+1, n]) for n = 0..15.
//
// A float32 operand goes as three bfloat16 planes whose sum is the float exactly, and a product as the six pairs of
// planes that reach 2^-24 of it: the error of float32 arithmetic, at 2.7 times the speed of float32 vectors.
// `Planes` is 3 then, and 1 where the operands are bfloat16, or are rounded to it.
// Tile instructions read subnormal numbers as zero.
#pragma once
#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/simd.h"

namespace triskele::TRISKELE_LEVEL::tile {

constexpr int64_t kSide = 16;      // rows of a tile; columns of B and of C
constexpr int64_t kDepth = 32;     // of one product
constexpr int64_t kWords = 512;    // bfloat16 of a tile
constexpr int64_t kRowBytes = 64;
static_assert(kVec == kSide);

// Tile registers of this thread while the object lives: a thread that holds them pays for them at each switch.
class Registers {
 public:
  Registers() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int t = 0; t < 8; ++t) config.columns[t] = kRowBytes, config.rows[t] = kSide;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// With the clobber, unlike the compiler's own: what was written to memory before is there when the tile reads it.
#define TRISKELE_TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TRISKELE_TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define TRISKELE_TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TRISKELE_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t : :)

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

// C [16 Rows, 16 Columns] float, `stride` floats a row, = (or, with `add`, +=) A B over `steps` times 32 of depth.
// Small planes go first. The order of the sums does not depend on Rows and Columns.
template <int Planes, int Rows, int Columns>
inline void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, int64_t stride, bool add) {
  static_assert((Rows == 1 || Rows == 2) && (Columns == 1 || Columns == 2));
  float* low = c + kSide * stride;
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (add) {
    TRISKELE_TILE_LOAD(0, c, bytes);
    if constexpr (Columns == 2) TRISKELE_TILE_LOAD(1, c + kSide, bytes);
    if constexpr (Rows == 2) TRISKELE_TILE_LOAD(2, low, bytes);
    if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_LOAD(3, low + kSide, bytes);
  } else {
    TRISKELE_TILE_ZERO(0);
    if constexpr (Columns == 2) TRISKELE_TILE_ZERO(1);
    if constexpr (Rows == 2) TRISKELE_TILE_ZERO(2);
    if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_ZERO(3);
  }
#define TRISKELE_LOAD_A(p)                                                      \
  TRISKELE_TILE_LOAD(4, left + (p) * a.plane, kRowBytes);                       \
  if constexpr (Rows == 2) TRISKELE_TILE_LOAD(5, left + (p) * a.plane + a.side, kRowBytes)
#define TRISKELE_LOAD_B(p)                                                      \
  TRISKELE_TILE_LOAD(6, right + (p) * b.plane, kRowBytes);                      \
  if constexpr (Columns == 2) TRISKELE_TILE_LOAD(7, right + (p) * b.plane + b.side, kRowBytes)
#define TRISKELE_DOTS                                                           \
  TRISKELE_TILE_DOT(0, 4, 6);                                                   \
  if constexpr (Columns == 2) TRISKELE_TILE_DOT(1, 4, 7);                       \
  if constexpr (Rows == 2) TRISKELE_TILE_DOT(2, 5, 6);                          \
  if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_DOT(3, 5, 7)
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t *left = a.at(s), *right = b.at(s);
    if constexpr (Planes == 3) {
      TRISKELE_LOAD_A(2); TRISKELE_LOAD_B(0); TRISKELE_DOTS;
      TRISKELE_LOAD_A(1); TRISKELE_DOTS;
      TRISKELE_LOAD_B(1); TRISKELE_DOTS;
      TRISKELE_LOAD_A(0); TRISKELE_DOTS;
      TRISKELE_LOAD_B(2); TRISKELE_DOTS;
      TRISKELE_LOAD_B(0); TRISKELE_DOTS;
    } else {
      TRISKELE_LOAD_A(0); TRISKELE_LOAD_B(0); TRISKELE_DOTS;
    }
  }
#undef TRISKELE_LOAD_A
#undef TRISKELE_LOAD_B
#undef TRISKELE_DOTS
  TRISKELE_TILE_STORE(0, c, bytes);
  if constexpr (Columns == 2) TRISKELE_TILE_STORE(1, c + kSide, bytes);
  if constexpr (Rows == 2) TRISKELE_TILE_STORE(2, low, bytes);
  if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_STORE(3, low + kSide, bytes);
}

// C [16 rows, 16 columns], rows and columns counted in tiles.
template <int Planes>
inline void multiply(int64_t rows, int64_t columns, const Operand& a, const Operand& b, int64_t steps, float* c,
                     int64_t stride, bool add) {
  for (int64_t m = 0; m < rows; m += 2)
    for (int64_t n = 0; n < columns; n += 2) {
      const Operand left{a.data + m * a.side, a.side, a.step, a.plane, a.order};
      const Operand right{b.data + n * b.side, b.side, b.step, b.plane, b.order};
      float* to = c + m * kSide * stride + n * kSide;
      if (m + 1 < rows && n + 1 < columns) multiply<Planes, 2, 2>(left, right, steps, to, stride, add);
      else if (m + 1 < rows) multiply<Planes, 2, 1>(left, right, steps, to, stride, add);
      else if (n + 1 < columns) multiply<Planes, 1, 2>(left, right, steps, to, stride, add);
      else multiply<Planes, 1, 1>(left, right, steps, to, stride, add);
    }
}

}  // namespace triskele::TRISKELE_LEVEL::tile
#endif
