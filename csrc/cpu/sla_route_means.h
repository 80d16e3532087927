// Means of blocks of rows in float64, whatever the rows are in: each element is read once and widened exactly.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/widen.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

constexpr int64_t kAhead = 48;  // rows between what is read and what is fetched

inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(uint16_t x) { return from_bfloat16(x); }

// A row's share of Vecs sums: columns [0, Vecs kWide) of it.
template <int Vecs, class T>
inline void add_row(const T* row, Doubles* total) {
  for (int v = 0; v < Vecs; ++v) total[v] += load_doubles(row + v * kWide);
}

// bfloat16 in pairs, one in each half of 32 bits: a shift or a mask widens kVec of them at once. The order of the sums
// is then that of `column_of`.
template <int Vecs>
inline void add_row(const uint16_t* row, Doubles* total) {
  static_assert(Vecs % 4 == 0);
  for (int v = 0; v < Vecs; v += 4) {
    const Bits both = *reinterpret_cast<const UnalignedBits*>(row + v * kWide);
    const Floats even = reinterpret_cast<Floats>(both << 16), odd = reinterpret_cast<Floats>(both & 0xFFFF0000u);
    total[v] += low_doubles(even), total[v + 1] += high_doubles(even);
    total[v + 2] += low_doubles(odd), total[v + 3] += high_doubles(odd);
  }
}

template <class T>
constexpr int64_t column_of(int64_t sum) { return sum; }
template <>
constexpr int64_t column_of<uint16_t>(int64_t sum) {
  const int64_t lane = sum % (2 * kVec);
  return sum - lane + lane % kVec * 2 + lane / kVec;
}

// sum [Vecs kWide] = Σ over the visible ones of `count` rows.
template <int Vecs, bool Masked, class T>
inline void add_rows(const T* rows, int64_t stride, int64_t count, const bool* shown, double* sum) {
  Doubles total[Vecs] = {};
  for (int64_t r = 0; r < count; ++r, rows += stride) {
    const char* ahead = reinterpret_cast<const char*>(rows + kAhead * stride);
    for (int64_t at = 0; at < int64_t(Vecs * kWide * sizeof(T)); at += 64) __builtin_prefetch(ahead + at);
    if (!Masked || shown[r]) add_row<Vecs>(rows, total);
  }
  double flat[Vecs * kWide];
  for (int v = 0; v < Vecs; ++v) store_doubles(flat + v * kWide, total[v]);
  for (int64_t i = 0; i < Vecs * kWide; ++i) sum[column_of<T>(i)] = flat[i];
}

template <bool Masked, class T>
inline void sum_rows(const T* rows, int64_t stride, int64_t channel_stride, int64_t count, int64_t dim,
                     const bool* shown, double* sum) {
  int64_t d = 0;
  if (channel_stride == 1) {
    for (; d + 8 * kWide <= dim; d += 8 * kWide) add_rows<8, Masked>(rows + d, stride, count, shown, sum + d);
    for (; d + 4 * kWide <= dim; d += 4 * kWide) add_rows<4, Masked>(rows + d, stride, count, shown, sum + d);
  }
  for (; d < dim; ++d) {
    sum[d] = 0.0;
    for (int64_t t = 0; t < count; ++t)
      if (!Masked || shown[t]) sum[d] += widen(rows[t * stride + d * channel_stride]);
  }
}

// mean [dim] of the visible ones of `rows` rows; zero where there is none. Strides: of a row, of a channel.
template <class T>
void mean_of(const T* source, int64_t stride, int64_t channel_stride, int64_t rows, int64_t dim, const bool* shown,
             double* mean) {
  int64_t count = rows;
  if (shown == nullptr) {
    sum_rows<false>(source, stride, channel_stride, rows, dim, shown, mean);
  } else {
    sum_rows<true>(source, stride, channel_stride, rows, dim, shown, mean);
    count = std::max<int64_t>(1, std::count(shown, shown + rows, true));
  }
  if ((count & (count - 1)) == 0) {  // the same as to divide, ten times as fast
    const double share = 1.0 / static_cast<double>(count);
    for (int64_t i = 0; i < dim; ++i) mean[i] *= share;
  } else {
    for (int64_t i = 0; i < dim; ++i) mean[i] /= static_cast<double>(count);
  }
}

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
