// The k best of a row of scores without sorting it: a bar is found by partitioning, without a branch an element.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

namespace triskele::TRISKELE_LEVEL {
namespace {

// The k-th largest (1 <= k <= size) of `values`, which are overwritten, as is `spare`, of the same size. No NaN.
inline double kth_largest(double* values, double* spare, int64_t size, int64_t k) {
  for (int round = 0; round < 64; ++round) {
    const double a = values[0], b = values[size / 2], c = values[size - 1];
    const double pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t above = 0, below = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double x = values[i];
      spare[above] = x;
      above += x > pivot;
      values[below] = x;  // never ahead of what is read
      below += x < pivot;
    }
    if (k > size - below) {
      k -= size - below;
      size = below;
    } else if (k > above) {
      return pivot;
    } else {
      std::swap(values, spare);
      size = above;
    }
  }
  std::nth_element(values, values + (k - 1), values + size, std::greater<>());  // pivots that hardly parted anything
  return values[k - 1];
}

// Scratch of one row's selection.
struct Ranked {
  double *values, *spare;
};

// Marks the `count` largest of `scores`; of equal ones the first. Those above -inf alone: -inf is what nobody sees.
inline void mark_first(const double* scores, int64_t size, int64_t count, Ranked ranked, int8_t* out) {
  std::copy_n(scores, size, ranked.values);
  const double least = kth_largest(ranked.values, ranked.spare, size, count);
  int64_t reached = 0;
  for (int64_t j = 0; j < size; ++j) reached += scores[j] >= least;
  if (reached == count) {
    for (int64_t j = 0; j < size; ++j) out[j] = scores[j] >= least ? 1 : out[j];
  } else {
    int64_t equal = count;  // places that those above leave to those equal to the least
    for (int64_t j = 0; j < size; ++j) equal -= scores[j] > least;
    for (int64_t j = 0; j < size; ++j)
      if (scores[j] > least || (scores[j] == least && equal-- > 0)) out[j] = 1;
  }
}

// Marks the `count` smallest scores; of equal ones the last.
inline void mark_last(const double* scores, int64_t size, int64_t count, Ranked ranked, int8_t* out) {
  std::copy_n(scores, size, ranked.values);
  const double most = kth_largest(ranked.values, ranked.spare, size, size + 1 - count);
  int64_t equal = count;
  for (int64_t j = 0; j < size; ++j) equal -= scores[j] < most;
  for (int64_t j = size - 1; j >= 0; --j)
    if (scores[j] < most || (scores[j] == most && equal-- > 0)) out[j] = -1;
}

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
