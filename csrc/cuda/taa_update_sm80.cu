// Pass two of a step: the walk of pass one again, x + R - Σ_q γ_q (ΔX_q + ΔR_q), then the rows that enter below.
#include "cuda/taa.cuh"

namespace triskele::cuda::taa {
namespace {

template <class S, class E>
struct UpdateArgs {
  int64_t window, size, eps_rows, count;
  const S *x, *r;                             // [window + 1, size], [window, size]
  Past<S> past_x, past_r;
  const double* gamma;                        // [window, Q]
  const E* eps;                               // [eps_rows, size]
  const double *enter_a, *enter_w, *enter_c;  // [count], [count, eps_rows], [count]
  const S* enter_noise;                       // [count, size] or null
  S* out;                                     // [count + window, size]
};

// What a row is made of, as it lies in memory: the state, its residual, and of the past rounds what has a weight.
template <class S, class E, int V, int Q>
struct RowInputs {
  Pack<S, V> x, r;
  Pack<S, V> past_x[Q > 0 ? Q : 1], past_r[Q > 0 ? Q : 1];
  S weight[Q > 0 ? Q : 1];
  bool read_past[Q > 0 ? Q : 1];  // it or a further round of this row has a weight
  __device__ __forceinline__ void read(const UpdateArgs<S, E>& p, int64_t t, int64_t at) {
    x = load<S, V>(p.x + t * p.size + at);
    r = load<S, V>(p.r + t * p.size + at);
    bool later = false;
#pragma unroll
    for (int q = Q - 1; q >= 0; --q) {
      const int64_t row = t - (p.window - p.past_r.rows[q]);
      const double gamma = p.gamma[t * Q + q];
      weight[q] = row >= 0 ? static_cast<S>(gamma) : S(0);
      read_past[q] = row >= 0 && (weight[q] != S(0) || later);
      later = later || gamma != 0;
      if (!read_past[q]) continue;
      past_x[q] = load<S, V>(p.past_x.round[q] + row * p.size + at);
      past_r[q] = load<S, V>(p.past_r.round[q] + row * p.size + at);
    }
  }
};

template <class S, class E, int V, int Q>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(const UpdateArgs<S, E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  int* s_range = reinterpret_cast<int*>(shared);   // [count, 2]: first and last ε row with a weight
  for (int64_t row = threadIdx.x / 32; row < p.count; row += kWarps) {
    int low = 0x7fffffff, high = -1;
    for (int64_t s = threadIdx.x % 32; s < p.eps_rows; s += 32)
      if (p.enter_w[row * p.eps_rows + s] != 0) { low = min(low, int(s)); high = max(high, int(s)); }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      low = min(low, __shfl_xor_sync(0xffffffffu, low, step));
      high = max(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    if (threadIdx.x % 32 == 0) { s_range[2 * row] = low; s_range[2 * row + 1] = high; }
  }
  __syncthreads();
  const int64_t at = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * V;
  if (at >= p.size) return;

  Pack<S, V> moved{};
  constexpr int kAhead = rows_ahead(V, Q);
  for (int64_t top = p.window - 1; top >= 0; top -= kAhead) {
    RowInputs<S, E, V, Q> inputs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (top - i >= 0) inputs[i].read(p, top - i, at);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (top - i < 0) break;
      const RowInputs<S, E, V, Q>& in = inputs[i];
#pragma unroll
      for (int v = 0; v < V; ++v) moved.at[v] = in.x.at[v] + in.r.at[v];
      Pack<S, V> newer_x = in.x, newer_r = in.r;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (!in.read_past[q]) continue;
        if (in.weight[q] != S(0)) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            moved.at[v] -= in.weight[q] * ((newer_x.at[v] - in.past_x[q].at[v]) + (newer_r.at[v] - in.past_r[q].at[v]));
        }
        newer_x = in.past_x[q], newer_r = in.past_r[q];
      }
      store<S, V>(p.out + (p.count + top - i) * p.size + at, moved);
    }
  }
  for (int64_t row = p.count - 1; row >= 0; --row) {
    const S scale = static_cast<S>(p.enter_a[row]);
#pragma unroll
    for (int v = 0; v < V; ++v) moved.at[v] = scale == S(0) ? S(0) : scale * moved.at[v];
    for (int s = s_range[2 * row]; s <= s_range[2 * row + 1]; ++s) {
      const S weight = static_cast<S>(p.enter_w[row * p.eps_rows + s]);
      if (weight == S(0)) continue;
      const Pack<E, V> e = load<E, V>(p.eps + s * p.size + at);
#pragma unroll
      for (int v = 0; v < V; ++v) moved.at[v] += weight * static_cast<S>(widen(e.at[v]));
    }
    const S weight = p.enter_noise != nullptr ? static_cast<S>(p.enter_c[row]) : S(0);
    if (weight != S(0)) {
      const Pack<S, V> xi = load<S, V>(p.enter_noise + row * p.size + at);
#pragma unroll
      for (int v = 0; v < V; ++v) moved.at[v] += weight * xi.at[v];
    }
    store<S, V>(p.out + row * p.size + at, moved);
  }
}

Tensor taa_update(const Tensor& x, const Tensor& residual, std::vector<Tensor> past_x, std::vector<Tensor> past_r,
                  const Tensor& gamma, const Tensor& eps, const Tensor& enter_a, const Tensor& enter_w,
                  const Tensor& enter_c, const std::optional<Tensor>& enter_noise) {
  const char* op = "taa_update";
  check_dim(op, "x", x, 2);
  const int64_t window = x.size(0) - 1, size = x.size(1), slots = static_cast<int64_t>(past_r.size());
  check_that(window >= 1, op, "at least one target and the anchor");
  check_matrix(op, "x", x, window + 1, size, x.scalar_type());
  check_matrix(op, "residual", residual, window, size, x.scalar_type());
  check_matrix(op, "gamma", gamma, window, slots, ScalarType::Double);
  check_dim(op, "eps", eps, 2);
  check_matrix(op, "eps", eps, eps.size(0), size, eps.scalar_type());
  check_dim(op, "enter_a", enter_a, 1);
  const int64_t count = enter_a.size(0);
  check_vector(op, "enter_a", enter_a, count);
  check_vector(op, "enter_c", enter_c, count);
  check_matrix(op, "enter_w", enter_w, count, eps.size(0), ScalarType::Double);
  if (enter_noise) check_matrix(op, "enter_noise", *enter_noise, count, size, x.scalar_type());
  check_that(count <= 4096, op, "at most 4096 entering rows");

  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {count + window, size});
  by_dtype(op, x, eps, [&](auto state, auto e) {
    using S = decltype(state);
    using E = decltype(e);
    constexpr int kWide = sizeof(S) == 4 ? 4 : 1;   // double states are for checks, not for speed
    bool wide = size % kWide == 0 && aligned(data<S>(x), kWide * sizeof(S)) &&
                aligned(data<S>(residual), kWide * sizeof(S)) && aligned(data<E>(eps), kWide * sizeof(E)) &&
                (!enter_noise || aligned(data<S>(*enter_noise), kWide * sizeof(S)));
    const Past<S> old_x = past_of<S>(op, "past_x", past_x, window, size, x.scalar_type(), kWide * sizeof(S), &wide);
    const Past<S> old_r = past_of<S>(op, "past_r", past_r, window, size, x.scalar_type(), kWide * sizeof(S), &wide);
    check_that(past_x.size() == past_r.size() && std::memcmp(old_x.rows, old_r.rows, sizeof(old_x.rows)) == 0, op,
               "past_x and past_r with the same rows");
    const UpdateArgs<S, E> args{window, size, eps.size(0), count, data<S>(x), data<S>(residual), old_x, old_r,
                                data<double>(gamma), data<E>(eps), data<double>(enter_a), data<double>(enter_w),
                                data<double>(enter_c), enter_noise ? data<S>(*enter_noise) : nullptr,
                                mutable_data<S>(out)};
    const int64_t blocks = blocks_of(size, wide ? kWide : 1);
    if (blocks == 0) return;
    by_slots(past_r.size(), [&](auto q) {
      constexpr int Q = decltype(q)::value;
      launch_kernel(wide ? update_kernel<S, E, kWide, Q> : update_kernel<S, E, 1, Q>,
                    dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 2 * count * sizeof(int), launch.stream, args);
    });
  });
  return out;
}

}  // namespace
}  // namespace triskele::cuda::taa

TRISKELE_CUDA_OPS(m) { m.impl("taa_update", TORCH_BOX(&triskele::cuda::taa::taa_update)); }
