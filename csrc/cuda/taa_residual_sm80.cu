// Pass one of a step: a thread owns V neighbouring elements and walks the rows from the top: the order-k sum is a
// running scan, each input is read once. A warp leaves its share of the per-row sums; a second kernel adds the shares
// in one fixed order (no atomics: the result does not depend on scheduling).
#include "cuda/taa.cuh"

namespace triskele::cuda::taa {
namespace {

constexpr int64_t kStagedWeights = 4096;  // of b, in shared memory; a longer band is read from global memory

constexpr int stats_of(int slots) { return 1 + slots + slots * (slots + 1) / 2; }

template <class S, class E>
struct ResidualArgs {
  int64_t window, size, eps_rows, depth, order;
  const S* x;                  // [window + 1, size]
  const E* eps;                // [eps_rows, size]
  const S* noise;              // [window, size] or null
  const double *a, *b, *c;     // [window], [window, depth], [window]
  Past<S> past;
  S* out;                      // [window, size]
  S* scratch;                  // [2 order, size] where order < window
  S* shares;                   // [warps of the grid, window, stats]
};

// What a row is made of, as it lies in memory: the state, the newest ε, the past rounds where they have the row.
template <class S, class E, int V, int Q>
struct RowInputs {
  Pack<S, V> x;
  Pack<E, V> eps;
  Pack<S, V> past[Q > 0 ? Q : 1];
  __device__ __forceinline__ void read(const ResidualArgs<S, E>& p, int64_t t, int64_t at) {
    x = load<S, V>(p.x + t * p.size + at);
    eps = load<E, V>(p.eps + t * p.size + at);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int64_t row = t - (p.window - p.past.rows[q]);
      if (row >= 0) past[q] = load<S, V>(p.past.round[q] + row * p.size + at);
    }
  }
};

// kFull: order >= window. Otherwise the sum of the last `order` terms is split at multiples of `order`, counted from
// the top: `running` comes down from the split, the scratch rows hold what was gathered up to it in the rows before.
template <class S, class E, int V, int Q, bool kFull>
__global__ void __launch_bounds__(kThreads, 2) residual_kernel(const ResidualArgs<S, E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  S* s_a = reinterpret_cast<S*>(shared);   // [window]
  S* s_c = s_a + p.window;                 // [window]
  S* s_b = s_c + p.window;                 // [window, depth], if it fits
  const bool staged = p.window * p.depth <= kStagedWeights;
  for (int64_t t = threadIdx.x; t < p.window; t += kThreads) {
    s_a[t] = static_cast<S>(p.a[t]);
    s_c[t] = p.noise != nullptr ? static_cast<S>(p.c[t]) : S(0);
  }
  if (staged)
    for (int64_t k = threadIdx.x; k < p.window * p.depth; k += kThreads) s_b[k] = static_cast<S>(p.b[k]);
  __syncthreads();

  constexpr int kStats = stats_of(Q);
  const int lane = threadIdx.x % 32;
  const int64_t at = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * V;
  const bool inside = at < p.size;         // size is a multiple of V; outside threads only join the sums
  S* share = p.shares + (blockIdx.x * int64_t(kWarps) + threadIdx.x / 32) * p.window * kStats;

  S running[V] = {}, reach = 1;
  S *current = p.scratch, *previous = p.scratch + (kFull ? 0 : p.order * p.size);
  Pack<S, V> above{};
  if (inside) above = load<S, V>(p.x + p.window * p.size + at);
  int64_t j = 0;                           // row within its group of `order`
  constexpr int kAhead = rows_ahead(V, Q);
  for (int64_t start = 0; start < p.window; start += kAhead) {
    RowInputs<S, E, V, Q> inputs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (inside && start + i < p.window) inputs[i].read(p, p.window - 1 - start - i, at);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t u = start + i, t = p.window - 1 - u;
      if (t < 0) break;
      const RowInputs<S, E, V, Q>& row_inputs = inputs[i];
      S full[V] = {}, first[V] = {};
      Pack<S, V> own{};
      if (inside) {
        if (!kFull && j == 0 && u > 0) {     // a group is complete: gather it from its last row up
          S* swap = current; current = previous; previous = swap;
          S weight = 1, sum[V];
          Pack<S, V> last = load<S, V>(previous + (p.order - 1) * p.size + at);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] = last.at[v];
          for (int64_t k = p.order - 2; k >= 0; --k) {
            weight *= s_a[p.window - 1 - (u - p.order + k + 1)];
            Pack<S, V> term = load<S, V>(previous + k * p.size + at);
#pragma unroll
            for (int v = 0; v < V; ++v) term.at[v] = sum[v] += weight * term.at[v];
            store<S, V>(previous + k * p.size + at, term);
          }
        }
        own = row_inputs.x;
        const S scale = s_a[t];
#pragma unroll
        for (int v = 0; v < V; ++v) first[v] = scale * above.at[v];
        for (int64_t d = 0; d < p.depth && t + d < p.eps_rows; ++d) {
          const S weight = staged ? s_b[t * p.depth + d] : static_cast<S>(p.b[t * p.depth + d]);
          if (weight == S(0)) continue;      // the same for all threads
          const Pack<E, V> e = d == 0 ? row_inputs.eps : load<E, V>(p.eps + (t + d) * p.size + at);
#pragma unroll
          for (int v = 0; v < V; ++v) first[v] += weight * static_cast<S>(widen(e.at[v]));
        }
        if (const S weight = s_c[t]; weight != S(0)) {
          const Pack<S, V> xi = load<S, V>(p.noise + t * p.size + at);
#pragma unroll
          for (int v = 0; v < V; ++v) first[v] += weight * xi.at[v];
        }
        Pack<S, V> kept;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          first[v] -= own.at[v];
          kept.at[v] = first[v];
          running[v] = j == 0 ? first[v] : first[v] + scale * running[v];
          full[v] = running[v];
        }
        reach = j == 0 ? scale : reach * scale;
        if (!kFull) {
          store<S, V>(current + j * p.size + at, kept);
          if (u >= p.order && j < p.order - 1) {
            const Pack<S, V> earlier = load<S, V>(previous + (j + 1) * p.size + at);
#pragma unroll
            for (int v = 0; v < V; ++v) full[v] += reach * earlier.at[v];
          }
        }
        Pack<S, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.at[v] = full[v];
        store<S, V>(p.out + t * p.size + at, result);
        above = own;
      }

      // Sums of this row: Σ r², ⟨D_q, R⟩, ⟨D_p, D_q⟩ for p <= q; D is zero where the row has no such round.
      S difference[Q > 0 ? Q : 1][V] = {};
      if (inside) {
        S newer[V];
#pragma unroll
        for (int v = 0; v < V; ++v) newer[v] = full[v];
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int64_t row = t - (p.window - p.past.rows[q]);
          if (row >= 0) {
            const Pack<S, V>& older = row_inputs.past[q];
#pragma unroll
            for (int v = 0; v < V; ++v) { difference[q][v] = newer[v] - older.at[v]; newer[v] = older.at[v]; }
          }
        }
      }
      S sums[kStats] = {};
#pragma unroll
      for (int v = 0; v < V; ++v) sums[0] += first[v] * first[v];
      int k = 1;
#pragma unroll
      for (int q = 0; q < Q; ++q, ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) sums[k] += difference[q][v] * full[v];
#pragma unroll
      for (int i = 0; i < Q; ++i)
#pragma unroll
        for (int q = i; q < Q; ++q, ++k)
#pragma unroll
          for (int v = 0; v < V; ++v) sums[k] += difference[i][v] * difference[q][v];
#pragma unroll
      for (int s = 0; s < kStats; ++s) {
        const S total = warp_sum(sums[s]);
        if (lane == s % 32) share[t * kStats + s] = total;
      }
      if (!kFull && ++j == p.order) j = 0;
      if (kFull) j = 1;
    }
  }
}

// Adds the warps' shares of one row: block t, a fixed tree over its threads.
// [shares, window, stats] -> squares, gram, rhs.
template <class S>
__global__ void __launch_bounds__(kThreads) gather_kernel(const S* shares, int64_t count, int64_t window, int slots,
                                                          double* squares, double* gram, double* rhs) {
  __shared__ double partial[kWarps];
  const int stats = stats_of(slots);
  const int64_t t = blockIdx.x;
  int i = 0, q = 0;                        // the pair of the Gram entry at hand
  for (int s = 0; s < stats; ++s) {
    double sum = 0;
    for (int64_t w = threadIdx.x; w < count; w += kThreads) sum += shares[(w * window + t) * stats + s];
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += partial[w];
      if (s == 0) {
        squares[t] = total;
      } else if (s <= slots) {
        rhs[t * slots + s - 1] = total;
      } else {
        gram[(t * slots + i) * slots + q] = gram[(t * slots + q) * slots + i] = total;
      }
    }
    if (s > slots && ++q == slots) q = ++i;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> taa_residual(
    const Tensor& x, const Tensor& eps, const std::optional<Tensor>& noise, const Tensor& a, const Tensor& b,
    const Tensor& c, std::vector<Tensor> past_r, int64_t order) {
  const char* op = "taa_residual";
  check_dim(op, "x", x, 2);
  const int64_t window = x.size(0) - 1, size = x.size(1), slots = static_cast<int64_t>(past_r.size());
  check_that(window >= 1, op, "at least one target and the anchor");
  check_matrix(op, "x", x, window + 1, size, x.scalar_type());
  check_dim(op, "eps", eps, 2);
  check_that(eps.size(0) >= window, op, "a row of eps for each target");
  check_matrix(op, "eps", eps, eps.size(0), size, eps.scalar_type());
  if (noise) check_matrix(op, "noise", *noise, window, size, x.scalar_type());
  check_vector(op, "a", a, window);
  check_vector(op, "c", c, window);
  check_dim(op, "b", b, 2);
  check_matrix(op, "b", b, window, b.size(1), ScalarType::Double);
  check_that(order >= 1, op, "order of at least 1");
  check_that(window <= 1024, op, "a window of at most 1024 rows");

  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {window, size});
  Tensor squares = torch::stable::new_empty(a, {window});
  Tensor gram = torch::stable::new_empty(a, {window, slots, slots});
  Tensor rhs = torch::stable::new_empty(a, {window, slots});
  Tensor scratch = torch::stable::new_empty(x, {order < window ? 2 * order : 0, size});
  by_dtype(op, x, eps, [&](auto state, auto e) {
    using S = decltype(state);
    using E = decltype(e);
    constexpr int kWide = sizeof(S) == 4 ? 4 : 1;   // double states are for checks, not for speed
    bool wide = size % kWide == 0 && aligned(data<S>(x), kWide * sizeof(S)) &&
                aligned(data<E>(eps), kWide * sizeof(E)) && (!noise || aligned(data<S>(*noise), kWide * sizeof(S)));
    ResidualArgs<S, E> args{window, size, eps.size(0), b.size(1), order, data<S>(x), data<E>(eps),
                            noise ? data<S>(*noise) : nullptr, data<double>(a), data<double>(b), data<double>(c),
                            past_of<S>(op, "past_r", past_r, window, size, x.scalar_type(), kWide * sizeof(S), &wide),
                            mutable_data<S>(out), mutable_data<S>(scratch), nullptr};
    const int64_t blocks = blocks_of(size, wide ? kWide : 1);
    Tensor shares = torch::stable::new_empty(x, {blocks * kWarps, window, stats_of(static_cast<int>(slots))});
    args.shares = mutable_data<S>(shares);
    const int64_t weights = 2 * window + (window * b.size(1) <= kStagedWeights ? window * b.size(1) : 0);
    const size_t bytes = weights * sizeof(S);
    if (blocks > 0) {
      by_slots(past_r.size(), [&](auto q) {
        constexpr int Q = decltype(q)::value;
        const auto run = [&](auto kernel) {
          launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, launch.stream, args);
        };
        if (order >= window) wide ? run(residual_kernel<S, E, kWide, Q, true>) : run(residual_kernel<S, E, 1, Q, true>);
        else wide ? run(residual_kernel<S, E, kWide, Q, false>) : run(residual_kernel<S, E, 1, Q, false>);
      });
    }
    launch_kernel(gather_kernel<S>, dim3(static_cast<unsigned>(window)), dim3(kThreads), 0, launch.stream, args.shares,
                  blocks * kWarps, window, static_cast<int>(slots), mutable_data<double>(squares),
                  mutable_data<double>(gram), mutable_data<double>(rhs));
  });
  return {out, squares, gram, rhs};
}

}  // namespace
}  // namespace triskele::cuda::taa

TRISKELE_CUDA_OPS(m) { m.impl("taa_residual", TORCH_BOX(&triskele::cuda::taa::taa_residual)); }
