// Products of packed tiles by dot products of pairs: VDPBF16PS multiplies a pair of one row of A with the pairs of 16
// columns of B. For operands of one plane: float32 costs more as six such products than as float32 vectors.
// Included by tiles.h.
#pragma once

namespace triskele::TRISKELE_LEVEL::tile {

template <class T>
constexpr bool kTakes = sizeof(T) == sizeof(uint16_t);  // operands that were T: bfloat16

class Registers {  // none to hold
 public:
  Registers() {}
};

// C [Rows, 16 Vecs] = (or, with `add`, +=) A B, from row `row` of the tiles of `a` on: as many sums as registers hold.
template <int Rows, int Vecs>
inline void multiply_rows(const Operand& a, int64_t row, const Operand& b, int64_t steps, float* c, int64_t stride,
                          bool add) {
  __m512 sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vecs; ++n) sums[r][n] = add ? _mm512_loadu_ps(c + r * stride + n * kSide) : _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t *left = a.at(s) + row * kDepth, *right = b.at(s);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kDepth; i += 2, right += kDepth) {
      __m512bh pairs[Vecs];
      for (int n = 0; n < Vecs; ++n) std::memcpy(&pairs[n], right + n * b.side, sizeof pairs[n]);
      for (int r = 0; r < Rows; ++r) {
        int32_t pair;
        std::memcpy(&pair, left + r * kDepth + i, sizeof pair);
        const __m512bh every = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int n = 0; n < Vecs; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], every, pairs[n]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vecs; ++n) _mm512_storeu_ps(c + r * stride + n * kSide, sums[r][n]);
}

// C [16 Rows, 16 Columns] float, `stride` floats a row, = (or, with `add`, +=) A B over `steps` times 32 of depth.
// The order of the sums does not depend on Rows and Columns.
template <int Planes, int Rows, int Columns>
inline void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, int64_t stride, bool add) {
  static_assert(Planes == 1);
  constexpr int kHigh = Columns == 4 ? 4 : 8;  // 8 to 16 sums: as many as hide the latency of one
  for (int64_t m = 0; m < Rows; ++m) {
    const Operand left{a.data + m * a.side, a.side, a.step, a.plane, a.order};
    for (int64_t r = 0; r < kSide; r += kHigh)
      multiply_rows<kHigh, Columns>(left, r, b, steps, c + (m * kSide + r) * stride, stride, add);
  }
}

// C [16 rows, 16 columns], rows and columns counted in tiles.
template <int Planes>
inline void multiply(int64_t rows, int64_t columns, const Operand& a, const Operand& b, int64_t steps, float* c,
                     int64_t stride, bool add) {
  for (int64_t m = 0; m < rows; ++m) {
    const Operand left{a.data + m * a.side, a.side, a.step, a.plane, a.order};
    for (int64_t n = 0, wide; n < columns; n += wide) {
      const Operand right{b.data + n * b.side, b.side, b.step, b.plane, b.order};
      float* to = c + m * kSide * stride + n * kSide;
      wide = columns - n >= 4 ? 4 : columns - n >= 2 ? 2 : 1;
      if (wide == 4) multiply<Planes, 1, 4>(left, right, steps, to, stride, add);
      else if (wide == 2) multiply<Planes, 1, 2>(left, right, steps, to, stride, add);
      else multiply<Planes, 1, 1>(left, right, steps, to, stride, add);
    }
  }
}

template <int Planes>
inline void multiply_exactly(int64_t rows, int64_t columns, const Operand& a, const Operand& b, int64_t steps, float* c,
                             int64_t stride, bool add) {
  multiply<Planes>(rows, columns, a, b, steps, c, stride, add);
}

}  // namespace triskele::TRISKELE_LEVEL::tile
