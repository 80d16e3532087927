// Pass two of the step: x + R - Σ_q γ_q (ΔX_q + ΔR_q) for every row of a block of elements, and the rows that enter below.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cpu/taa.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

template <class S, class E>
struct Update {
  // A row of a block, as in pass one.
  struct Row {
    const S *x, *r;
    const S *older_x[kFused], *older_r[kFused];
    S weight[kFused];
    S* out;
    bool past;
    int64_t below;
  };

  int64_t window, size, eps_rows, count;
  const S *x, *r;
  const Past<S>&past_x, &past_r;
  const double* gamma;                       // [window, slots]
  const E* eps;
  const double *enter_a, *enter_w, *enter_c; // [count], [count, eps_rows], [count]
  const S* enter_noise;                      // [count, size] or null
  S* out;                                    // [count + window, size]

  template <int Q, int N>
  static void span(const Row& row, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += N) {
      fetch_below<S>(row.x, i, row.below), fetch_below<S>(row.r, i, row.below);
      for (int q = 0; q < Q; ++q)
        fetch_below<S>(row.older_x[q], i, row.below), fetch_below<S>(row.older_r[q], i, row.below);
      Vec<S, N> newer_x = load<S, N>(row.x + i), newer_r = load<S, N>(row.r + i);
      Vec<S, N> moved = newer_x + newer_r;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Vec<S, N> older_x = load<S, N>(row.older_x[q] + i), older_r = load<S, N>(row.older_r[q] + i);
        moved -= row.weight[q] * ((newer_x - older_x) + (newer_r - older_r));
        newer_x = older_x;
        newer_r = older_r;
      }
      if (row.past) stream<S, N>(row.out + i, moved);
      else store<S, N>(row.out + i, moved);
    }
  }

  template <int Q>
  static void fused(const Row& row, int64_t n) {
    const int64_t whole = n - n % kLanes<S>;
    span<Q, kLanes<S>>(row, 0, whole);
    if (whole < n) span<Q, 1>(row, whole, n);
  }

  void move(int64_t t, int64_t at, int64_t n) const {
    const int64_t slots = past_r.slots();
    int64_t known = past_r.known(t);
    while (known > 0 && gamma[t * slots + known - 1] == 0) --known;   // past rounds without a weight are not read
    Row row{};
    row.x = x + t * size + at;
    row.r = r + t * size + at;
    row.out = out + (count + t) * size + at;
    row.below = t > 0 ? size : 0;
    row.past = goes_past(out, count + window, size, slots);
    for (int64_t q = 0; q < std::min<int64_t>(known, kFused); ++q) {
      row.older_x[q] = past_x.row(q, t) + at;
      row.older_r[q] = past_r.row(q, t) + at;
      row.weight[q] = static_cast<S>(gamma[t * slots + q]);
    }
    switch (std::min<int64_t>(known, kFused)) {
      case 0: fused<0>(row, n); break;
      case 1: fused<1>(row, n); break;
      case 2: fused<2>(row, n); break;
      case 3: fused<3>(row, n); break;
      default: fused<4>(row, n);
    }
    for (int64_t q = kFused; q < known; ++q) {
      const S *newer_x = past_x.row(q - 1, t) + at, *newer_r = past_r.row(q - 1, t) + at;
      const S *older_x = past_x.row(q, t) + at, *older_r = past_r.row(q, t) + at;
      const S weight = static_cast<S>(gamma[t * slots + q]);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        row.out[i] -= weight * ((newer_x[i] - older_x[i]) + (newer_r[i] - older_r[i]));
    }
  }

  void enter(int64_t j, int64_t at, int64_t n) const {
    const S* above = out + (j + 1) * size + at;
    S* to = out + j * size + at;
    const S scale = static_cast<S>(enter_a[j]);
    if (scale == 0) {
      std::fill(to, to + n, S(0));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = scale * above[i];
    }
    for (int64_t s = 0; s < eps_rows; ++s)
      if (enter_w[j * eps_rows + s] != 0)
        add_scaled(to, static_cast<S>(enter_w[j * eps_rows + s]), eps + s * size + at, n);
    if (enter_noise != nullptr && enter_c[j] != 0)
      add_scaled(to, static_cast<S>(enter_c[j]), enter_noise + j * size + at, n);
  }

  void run() const {
    const int64_t blocks = (size + kBlock - 1) / kBlock;
    torch::stable::parallel_for(0, blocks, grain(window + count), [&](int64_t begin, int64_t end) {
      for (int64_t i_block = begin; i_block < end; ++i_block) {
        const int64_t at = i_block * kBlock, n = std::min(kBlock, size - at);
        for (int64_t t = window - 1; t >= 0; --t) move(t, at, n);
        for (int64_t j = count - 1; j >= 0; --j) enter(j, at, n);
      }
      streamed();
    });
  }
};

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
