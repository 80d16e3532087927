// Vectors of float as wide as the level's registers, exp2, and a register-blocked product of small matrices.
// Written with the compiler's vector extensions, so one text serves AVX-512, AVX2, SSE2 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace triskele::TRISKELE_LEVEL {

#if defined(__AVX512F__)
constexpr int kVec = 16, kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int kVec = 8, kTileRows = 6, kTileVecs = 2;  // 12 of 16
#else
constexpr int kVec = 4, kTileRows = 4, kTileVecs = 2;  // 8 of 16: products need a register of their own
#endif

typedef float Floats __attribute__((vector_size(kVec * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kVec * sizeof(float))));
typedef float UnalignedFloats __attribute__((vector_size(kVec * sizeof(float)), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
inline Floats splat(float x) { return x - Floats{}; }  // x + 0 would cost an addition: -0 + 0 is 0
inline Floats bigger(Floats a, Floats b) { return a > b ? a : b; }  // b where a is NaN
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__AVX512F__)
// 2^x within 2 units in the last place; 0 below 2^-125 (a subnormal result would take as long as thirty others), inf
// above the range, NaN of NaN.
inline Floats exp2(Floats x) {
  const Floats f = _mm512_maskz_reduce_ps(0xFFFF, x, 1);  // x - floor(x)
  Floats p = splat(2.17022555e-4f);                       // minimax of 2^f, relative error 1.9e-9 in exact arithmetic
  p = p * f + 1.24396878e-3f;
  p = p * f + 9.67884100e-3f;
  p = p * f + 5.54833420e-2f;
  p = p * f + 2.40229836e-1f;
  p = p * f + 6.93146984e-1f;
  p = p * f + 1.f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-125.f), _CMP_NLT_UQ), p, x);  // times 2^floor(x)
}
#else
// 2^x within 2 units in the last place; 0 below 2^-126, inf above the range, NaN of NaN.
inline Floats exp2(Floats x) {
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = x < -127.f ? splat(-127.f) : x;
  x = x > 128.f ? splat(128.f) : x;
  const Floats shifted = x + kShift;
  const Ints n = reinterpret_cast<Ints>(shifted) - 0x4B400000;
  const Floats f = x - (shifted - kShift);  // in [-1/2, 1/2]
  Floats p = splat(1.53533619e-4f);         // minimax of (2^f - 1) / f, relative error 2e-9 in exact arithmetic
  p = p * f + 1.33988744e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.f;
  const Ints bits = (n + 127) << 23;
  return p * reinterpret_cast<Floats>(bits);
}
#endif

// One step of a transposition: swaps the blocks of `Distance` lanes off the diagonal of the pair (a, b).
template <int Distance, bool High, int... Lane>
inline Floats swap_lanes(Floats a, Floats b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (((Lane & Distance) != 0) == High ? Lane + (High ? kVec : 0)
                                        : High ? Lane + Distance : Lane - Distance + kVec)...);
#else
  return __builtin_shuffle(a, b, Ints{(((Lane & Distance) != 0) == High ? Lane + (High ? kVec : 0)
                                       : High ? Lane + Distance : Lane - Distance + kVec)...});
#endif
}

template <int Distance>
inline void transpose_step(Floats* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, kVec>();
  for (int i = 0; i < kVec; ++i)
    if ((i & Distance) == 0) {
      const Floats a = rows[i], b = rows[i + Distance];
      rows[i] = swap_lanes<Distance, false>(a, b, lanes);
      rows[i + Distance] = swap_lanes<Distance, true>(a, b, lanes);
    }
  if constexpr (Distance > 1) transpose_step<Distance / 2>(rows);
}

// out [kVec, kVec] = in^T * factor.
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, float factor) {
  Floats rows[kVec];
  for (int i = 0; i < kVec; ++i) rows[i] = load(in + i * in_stride) * factor;
  transpose_step<kVec / 2>(rows);
  for (int i = 0; i < kVec; ++i) store(out + i * out_stride, rows[i]);
}

// A strided operand: element (m, k) is data[m * row + k * col]. It is read one element at a time.
struct Operand {
  const float* data;
  int64_t row, col;
};

template <int Rows, int Vecs>
inline void product_tile(int64_t depth, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
                         int64_t ldc, bool add) {
  Floats sum[Rows][Vecs];
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Vecs; ++n) sum[m][n] = add ? load(c + m * ldc + n * kVec) : Floats{};
  for (int64_t k = 0; k < depth; ++k, a += col, b += ldb) {
    Floats right[Vecs];
    for (int n = 0; n < Vecs; ++n) right[n] = load(b + n * kVec);
    for (int m = 0; m < Rows; ++m) {
      const Floats left = splat(a[m * row]);
      for (int n = 0; n < Vecs; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Vecs; ++n) store(c + m * ldc + n * kVec, sum[m][n]);
}

template <int Vecs>
inline void product_columns(int64_t rows, int64_t depth, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
                            bool add) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    product_tile<kTileRows, Vecs>(depth, a.data + m * a.row, a.row, a.col, b, ldb, c + m * ldc, ldc, add);
  for (; m + 4 <= rows; m += 4)
    product_tile<4, Vecs>(depth, a.data + m * a.row, a.row, a.col, b, ldb, c + m * ldc, ldc, add);
  for (; m + 2 <= rows; m += 2)
    product_tile<2, Vecs>(depth, a.data + m * a.row, a.row, a.col, b, ldb, c + m * ldc, ldc, add);
  for (; m < rows; ++m)
    product_tile<1, Vecs>(depth, a.data + m * a.row, a.row, a.col, b, ldb, c + m * ldc, ldc, add);
}

// C [rows, columns] = A [rows, depth] @ B [depth, columns], added to C where `add`. Columns: a multiple of kVec; B and C
// have unit column stride. The sum over depth runs in order, so results do not depend on how callers cut rows.
inline void product(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + kTileVecs * kVec <= columns; n += kTileVecs * kVec)
    product_columns<kTileVecs>(rows, depth, a, b + n, ldb, c + n, ldc, add);
  for (; n < columns; n += kVec) product_columns<1>(rows, depth, a, b + n, ldb, c + n, ldc, add);
}

// Floats on a cache line boundary; not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * (count > 0 ? count : 1), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline uint16_t to_bfloat16(float x) {  // nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

}  // namespace triskele::TRISKELE_LEVEL
