// Products of packed tiles on tile registers: TDPBF16PS. Included by tiles.h.
#pragma once

namespace triskele::TRISKELE_LEVEL::tile {

template <class T>
constexpr bool kTakes = true;  // operands that were T: float, in three planes, or bfloat16

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

// Tiles 0 to 3 are the sums, 4 and 5 a plane of `a`, from `left`, 6 and 7 one of `b`, from `right`.
#define TRISKELE_ZEROS                                                          \
  TRISKELE_TILE_ZERO(0);                                                        \
  if constexpr (Columns == 2) TRISKELE_TILE_ZERO(1);                            \
  if constexpr (Rows == 2) TRISKELE_TILE_ZERO(2);                               \
  if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_ZERO(3)
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
    TRISKELE_ZEROS;
  }
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

// As multiply, two by two tiles at most, but of three planes every small product of all steps goes before the
// first large one, and what is in C is added last: a sum is rounded at full size as often as one of floats would be.
template <int Rows, int Columns>
inline void multiply_exactly(const Operand& a, const Operand& b, int64_t steps, float* c, int64_t stride,
                             bool add) {
  alignas(64) float sums[4][kSide * kSide];
  TRISKELE_ZEROS;
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t *left = a.at(s), *right = b.at(s);
    TRISKELE_LOAD_A(2); TRISKELE_LOAD_B(0); TRISKELE_DOTS;
    TRISKELE_LOAD_A(1); TRISKELE_DOTS;
    TRISKELE_LOAD_B(1); TRISKELE_DOTS;
    TRISKELE_LOAD_A(0); TRISKELE_DOTS;
    TRISKELE_LOAD_B(2); TRISKELE_DOTS;
  }
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t *left = a.at(s), *right = b.at(s);
    TRISKELE_LOAD_A(0); TRISKELE_LOAD_B(0); TRISKELE_DOTS;
  }
  const int64_t bytes = (add ? kSide : stride) * static_cast<int64_t>(sizeof(float));
  float* low = c + kSide * stride;
  TRISKELE_TILE_STORE(0, add ? sums[0] : c, bytes);
  if constexpr (Columns == 2) TRISKELE_TILE_STORE(1, add ? sums[1] : c + kSide, bytes);
  if constexpr (Rows == 2) TRISKELE_TILE_STORE(2, add ? sums[2] : low, bytes);
  if constexpr (Rows == 2 && Columns == 2) TRISKELE_TILE_STORE(3, add ? sums[3] : low + kSide, bytes);
  if (!add) return;
  for (int64_t m = 0; m < Rows; ++m)
    for (int64_t n = 0; n < Columns; ++n)
      for (int64_t r = 0; r < kSide; ++r) {
        float* to = c + (m * kSide + r) * stride + n * kSide;
        TRISKELE_LEVEL::store(to, load(to) + load(sums[2 * m + n] + r * kSide));
      }
}

// C [16 rows, 16 columns], rows and columns counted in tiles; the same as multiply for one plane.
template <int Planes>
inline void multiply_exactly(int64_t rows, int64_t columns, const Operand& a, const Operand& b, int64_t steps,
                           float* c, int64_t stride, bool add) {
  if constexpr (Planes == 1) return multiply<1>(rows, columns, a, b, steps, c, stride, add);
  for (int64_t m = 0; m < rows; m += 2)
    for (int64_t n = 0; n < columns; n += 2) {
      const Operand left{a.data + m * a.side, a.side, a.step, a.plane};
      const Operand right{b.data + n * b.side, b.side, b.step, b.plane};
      float* to = c + m * kSide * stride + n * kSide;
      if (m + 1 < rows && n + 1 < columns) multiply_exactly<2, 2>(left, right, steps, to, stride, add);
      else if (m + 1 < rows) multiply_exactly<2, 1>(left, right, steps, to, stride, add);
      else if (n + 1 < columns) multiply_exactly<1, 2>(left, right, steps, to, stride, add);
      else multiply_exactly<1, 1>(left, right, steps, to, stride, add);
    }
}

#undef TRISKELE_ZEROS
#undef TRISKELE_LOAD_A
#undef TRISKELE_LOAD_B
#undef TRISKELE_DOTS

}  // namespace triskele::TRISKELE_LEVEL::tile
