// Between the passes: suffix sums over the rows, and a small ridge solve a row, in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace triskele::TRISKELE_LEVEL {
namespace {

// x ← M^{-1} x, M [n, n] and x [n] overwritten: elimination with row pivots. False where M is singular.
bool solve(double* m, double* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::abs(m[i * n + k]) > std::abs(m[pivot * n + k])) pivot = i;
    if (!(std::abs(m[pivot * n + k]) > 0)) return false;
    if (pivot != k) {
      std::swap_ranges(m + k * n, m + (k + 1) * n, m + pivot * n);
      std::swap(x[k], x[pivot]);
    }
    for (int64_t i = k + 1; i < n; ++i) {
      const double factor = m[i * n + k] / m[k * n + k];
      for (int64_t j = k; j < n; ++j) m[i * n + j] -= factor * m[k * n + j];
      x[i] -= factor * x[k];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < n; ++j) x[k] -= m[k * n + j] * x[j];
    x[k] /= m[k * n + k];
    if (!std::isfinite(x[k])) return false;
  }
  return true;
}

// γ of every row from the sums over it and the rows above it; a row knows the newest `known` of the rounds.
struct Gamma {
  int64_t window, slots;
  const double *squares, *gram, *rhs, *limits;  // [window], [window, slots, slots], [window, slots], [window]
  const std::vector<int64_t>& lengths;
  double ridge;
  bool relative;
  double* out;                                  // [window, slots]

  int64_t highest() const {
    int64_t row = window - 1;
    while (row > 0 && !(squares[row] > limits[row])) --row;
    return row;
  }

  void run() const {
    const int64_t top = highest();
    std::vector<double> total(slots * slots), right(slots), matrix(slots * slots), solution(slots);
    for (int64_t t = window - 1; t >= 0; --t) {
      for (int64_t k = 0; k < slots * slots; ++k) total[k] += gram[t * slots * slots + k];
      for (int64_t q = 0; q < slots; ++q) right[q] += rhs[t * slots + q];
      double* gamma = out + t * slots;
      std::fill(gamma, gamma + slots, 0.0);
      int64_t known = 0;
      while (known < slots && t >= window - lengths[known]) ++known;
      double mean = 0;
      for (int64_t q = 0; q < known; ++q) mean += total[q * slots + q] / known;
      if (known == 0 || t >= top || !(mean > 0)) continue;
      for (int64_t p = 0; p < known; ++p) {
        for (int64_t q = 0; q < known; ++q) matrix[p * known + q] = total[p * slots + q];
        matrix[p * known + p] += relative ? ridge * mean : ridge;
        solution[p] = right[p];
      }
      if (solve(matrix.data(), solution.data(), known)) std::copy_n(solution.begin(), known, gamma);
    }
  }
};

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
