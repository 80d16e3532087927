// Pass one of the step: each row of a block of elements, from the top. R, the first-order residual and the differences
// of R are made and multiplied in registers; every input is read once. Sums are taken block by block in one fixed order.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cpu/taa.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

constexpr int64_t pairs(int64_t slots) { return slots * (slots + 1) / 2; }

template <class S, class E>
struct Residual {
  // One term of a row's first-order residual: weight times a row of ε.
  struct Term { const E* at; S weight; };

  // A row of a block: where its inputs are, and where its results go.
  struct Row {
    const S *above, *own;         // x_{t+1}, x_t
    const Term* terms;
    int64_t count;
    const S* noise;               // null: none
    S noise_weight, scale, reach; // scale: a_t
    S* running;                   // the sum from the split above down; R itself where the order covers the window
    S* kept;                      // r, null: not wanted
    const S* earlier;             // the part of the sum above the split, null: none
    const S* older[kFused];       // R of past rounds
    S* out;                       // R
    bool past;                    // out goes past the caches
    int64_t below;                // elements from the row below to this one, 0: there is none
  };

  int64_t window, size, eps_rows, depth, order;
  const S* x;        // [window + 1, size]
  const E* eps;      // [eps_rows, size]
  const S* noise;    // [window, size] or null
  const double *a, *b, *c;
  const Past<S>& past;
  S* out;            // [window, size]

  int64_t stats() const { return 1 + past.slots() + pairs(past.slots()); }

  // Elements [begin, end) of a row, N at a time: r, R, the differences D of R, and Σ r², ⟨D_q, R⟩, ⟨D_p, D_q⟩ (p <= q).
  template <int Q, int N>
  static void span(const Row& row, int64_t begin, int64_t end, double* sums) {
    constexpr int kSums = 1 + Q + pairs(Q);
    Vec<S, N> total[kSums] = {};
    const Vec<S, N> scale = splat<S, N>(row.scale), reach = splat<S, N>(row.reach);
    for (int64_t i = begin; i < end; i += N) {
      fetch_below<S>(row.own, i, row.below);
      for (int64_t k = 0; k < row.count; ++k) fetch_below<S>(row.terms[k].at, i, row.below);
      for (int q = 0; q < Q; ++q) fetch_below<S>(row.older[q], i, row.below);
      Vec<S, N> r = scale * load<S, N>(row.above + i);
      for (int64_t k = 0; k < row.count; ++k) r += row.terms[k].weight * load<S, N>(row.terms[k].at + i);
      if (row.noise != nullptr) r += row.noise_weight * load<S, N>(row.noise + i);
      r -= load<S, N>(row.own + i);
      if (row.kept != nullptr) store<S, N>(row.kept + i, r);
      Vec<S, N> full = r + scale * load<S, N>(row.running + i);
      store<S, N>(row.running + i, full);
      if (row.earlier != nullptr) full += reach * load<S, N>(row.earlier + i);
      if (row.past) stream<S, N>(row.out + i, full);
      else store<S, N>(row.out + i, full);
      total[0] += r * r;
      Vec<S, N> difference[Q > 0 ? Q : 1], newer = full;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Vec<S, N> older = load<S, N>(row.older[q] + i);
        difference[q] = newer - older;
        newer = older;
        total[1 + q] += difference[q] * full;
      }
      int k = 1 + Q;
#pragma GCC unroll 8
      for (int p = 0; p < Q; ++p)
#pragma GCC unroll 8
        for (int q = p; q < Q; ++q) total[k++] += difference[p] * difference[q];
    }
    for (int k = 0; k < kSums; ++k)
      for (int lane = 0; lane < N; ++lane) sums[k] += total[k][lane];
  }

  // A row with Q past rounds. Its sums go to their places among those of all `slots` rounds, the rest stays zero.
  template <int Q>
  static void fused(const Row& row, int64_t n, int64_t slots, double* out) {
    double sums[1 + Q + pairs(Q)] = {};
    const int64_t whole = n - n % kLanes<S>;
    span<Q, kLanes<S>>(row, 0, whole, sums);
    if (whole < n) span<Q, 1>(row, whole, n, sums);
    out[0] = sums[0];
    for (int q = 0; q < Q; ++q) out[1 + q] = sums[1 + q];
    const double* next = sums + 1 + Q;
    double* products = out + 1 + slots;
    for (int64_t p = 0; p < slots; ++p)
      for (int64_t q = p; q < slots; ++q, ++products)
        if (p < Q && q < Q) *products = *next++;
  }

  // More past rounds than stay in registers: the differences go through memory, `differences` [known, kBlock].
  void products(int64_t t, int64_t at, int64_t n, const S* full, S* differences, double* sums) const {
    const int64_t slots = past.slots(), known = past.known(t);
    const S* newer = full;
    for (int64_t q = 0; q < known; ++q) {
      const S* older = past.row(q, t) + at;
      S* difference = differences + q * kBlock;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) difference[i] = newer[i] - older[i];
      newer = older;
    }
    double* next = sums + 1;
    for (int64_t q = 0; q < slots; ++q) *next++ = q < known ? dot(differences + q * kBlock, full, n) : 0.0;
    for (int64_t p = 0; p < slots; ++p)
      for (int64_t q = p; q < slots; ++q, ++next)
        if (q < known) *next = dot(differences + p * kBlock, differences + q * kBlock, n);
  }

  // One block of elements, all rows. With order < window the sum of the last `order` terms is split at multiples of
  // `order` (counted from the top): `running` comes down from the split, `previous` was gathered up to it in the block
  // of rows before, so nothing is ever subtracted again. `scratch`: `scratch_rows()` rows of kBlock.
  void block(int64_t at, int64_t n, S* scratch, Term* terms, double* sums) const {
    const bool whole = order >= window;
    const int64_t slots = past.slots();
    S* running = scratch;
    S* current = running + kBlock;
    S* previous = current + (whole ? 0 : order) * kBlock;
    S* differences = previous + (whole ? 0 : order) * kBlock;
    Row row{};
    row.running = running;
    row.past = goes_past(out, window, size, slots);
    double reach = 1;
    for (int64_t u = 0; u < window; ++u) {
      const int64_t t = window - 1 - u, j = whole ? u : u % order;
      if (j == 0) {
        if (u > 0) {
          std::swap(current, previous);
          gather(previous, n, u);
        }
        std::fill(running, running + n, S(0));
        reach = 1;
      }
      reach *= a[t];
      row.above = x + (t + 1) * size + at;
      row.own = x + t * size + at;
      row.scale = static_cast<S>(a[t]);
      row.reach = static_cast<S>(reach);
      row.terms = terms;
      row.count = 0;
      for (int64_t d = 0; d < depth && t + d < eps_rows; ++d)
        if (b[t * depth + d] != 0)
          terms[row.count++] = {eps + (t + d) * size + at, static_cast<S>(b[t * depth + d])};
      const bool noisy = noise != nullptr && c[t] != 0;
      row.noise = noisy ? noise + t * size + at : nullptr;
      row.noise_weight = noisy ? static_cast<S>(c[t]) : S(0);
      row.kept = whole ? nullptr : current + j * kBlock;
      row.earlier = !whole && u >= order && j < order - 1 ? previous + (j + 1) * kBlock : nullptr;
      row.out = out + t * size + at;
      row.below = t > 0 ? size : 0;
      const int64_t known = past.known(t);
      for (int64_t q = 0; q < std::min<int64_t>(known, kFused); ++q) row.older[q] = past.row(q, t) + at;
      double* own_sums = sums + t * stats();
      switch (known) {
        case 0: fused<0>(row, n, slots, own_sums); break;
        case 1: fused<1>(row, n, slots, own_sums); break;
        case 2: fused<2>(row, n, slots, own_sums); break;
        case 3: fused<3>(row, n, slots, own_sums); break;
        case 4: fused<4>(row, n, slots, own_sums); break;
        default:
          fused<0>(row, n, slots, own_sums);
          products(t, at, n, row.out, differences, own_sums);
      }
    }
  }

  // previous[j] ← what the rows u - order + j … u - 1, counted from the top, add to a row below the split before u.
  void gather(S* previous, int64_t n, int64_t u) const {
    double weight = 1;
    for (int64_t k = order - 2; k >= 0; --k) {
      weight *= a[window - 1 - (u - order + k + 1)];
      S* sum = previous + k * kBlock;
      const S* below = sum + kBlock;
      const S scale = static_cast<S>(weight);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sum[i] = below[i] + scale * sum[i];
    }
  }

  int64_t scratch_rows() const {
    return 1 + (order >= window ? 0 : 2 * order) + (past.slots() > kFused ? past.slots() : 0);
  }

  void run(double* squares, double* gram, double* rhs) const {
    const int64_t blocks = (size + kBlock - 1) / kBlock, width = stats(), slots = past.slots();
    std::vector<double> partial(blocks * window * width);
    torch::stable::parallel_for(0, blocks, grain(window), [&](int64_t begin, int64_t end) {
      std::vector<S> scratch(scratch_rows() * kBlock);
      std::vector<Term> terms(depth);
      for (int64_t i_block = begin; i_block < end; ++i_block) {
        const int64_t at = i_block * kBlock, n = std::min(kBlock, size - at);
        block(at, n, scratch.data(), terms.data(), partial.data() + i_block * window * width);
      }
      streamed();
    });
    std::vector<double> sums(width);
    for (int64_t t = 0; t < window; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i_block = 0; i_block < blocks; ++i_block)
        for (int64_t k = 0; k < width; ++k) sums[k] += partial[(i_block * window + t) * width + k];
      squares[t] = sums[0];
      const double* next = sums.data() + 1;
      for (int64_t q = 0; q < slots; ++q) rhs[t * slots + q] = *next++;
      for (int64_t p = 0; p < slots; ++p)
        for (int64_t q = p; q < slots; ++q)
          gram[(t * slots + p) * slots + q] = gram[(t * slots + q) * slots + p] = *next++;
    }
  }
};

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
