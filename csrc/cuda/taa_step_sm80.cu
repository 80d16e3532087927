// One step of triangular Anderson acceleration on the device: two passes over the window and the small solve between
// them, without a word to the host. Contracts: python/triskele/ops/taa/api.py; the same step on a CPU: csrc/cpu/taa.cpp.
//
//   taa_residual   a thread owns V neighbouring elements and walks the rows from the top: the order-k sum is a running
//                  scan, each input is read once. A warp leaves its share of the per-row sums; a second kernel adds the
//                  shares in one fixed order (no atomics: the result does not depend on scheduling).
//   taa_gamma      one thread block: the highest unconverged row, suffix sums (a warp an entry), a Q x Q solve a row.
//   taa_update     the same walk: x + R - Σ_q γ_q (ΔX_q + ΔR_q), then the rows that enter below.
//
// Bytes an element at memory 2, float states and bfloat16 ε, without noise: 14 in pass one (x, ε, R of the past round, R),
// 20 in pass two (x, R, both of the past round, the new x).
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"

namespace triskele::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 4;               // past rounds: memory <= 5
constexpr int64_t kStagedWeights = 4096;  // of b, in shared memory; a longer band is read from global memory

constexpr int stats_of(int slots) { return 1 + slots + slots * (slots + 1) / 2; }

// Past rounds, newest first: round q holds rows window - rows[q] … window - 1.
template <class S>
struct Past {
  const S* round[kSlots];
  int64_t rows[kSlots];
};

// ---- pass one -----------------------------------------------------------------------------------------------------

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

// kFull: order >= window. Otherwise the sum of the last `order` terms is split at multiples of `order`, counted from the
// top: `running` comes down from the split, and the scratch rows hold what was gathered up to it in the rows before.
template <class S, class E, int V, int Q, bool kFull>
__global__ void __launch_bounds__(kThreads, 4) residual_kernel(const ResidualArgs<S, E> p) {
  extern __shared__ char shared[];
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
  for (int64_t u = 0; u < p.window; ++u) {
    const int64_t t = p.window - 1 - u;
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
      own = load<S, V>(p.x + t * p.size + at);
      const S scale = s_a[t];
#pragma unroll
      for (int v = 0; v < V; ++v) first[v] = scale * above.at[v];
      for (int64_t d = 0; d < p.depth && t + d < p.eps_rows; ++d) {
        const S weight = staged ? s_b[t * p.depth + d] : static_cast<S>(p.b[t * p.depth + d]);
        if (weight == S(0)) continue;      // the same for all threads
        const Pack<E, V> e = load<E, V>(p.eps + (t + d) * p.size + at);
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
          const Pack<S, V> older = load<S, V>(p.past.round[q] + row * p.size + at);
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

// Adds the warps' shares of one row: block t, a fixed tree over its threads. [shares, window, stats] -> squares, gram, rhs.
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

// ---- the small solve ----------------------------------------------------------------------------------------------

struct GammaArgs {
  int64_t window;
  const double *squares, *gram, *rhs, *limits;
  int64_t lengths[kSlots];
  double ridge;
  bool relative;
  double* sums;       // [window, Q + Q (Q + 1) / 2]: suffix sums
  double* gamma;      // [window, Q]
  int64_t* highest;   // [1]
};

// Gaussian elimination without pivots on the first `count` of Q unknowns; the matrix is a Gram matrix plus a ridge. False
// where a pivot vanishes.
template <int Q>
__device__ bool solve(double (&m)[Q][Q], double (&y)[Q], int count) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < Q; ++i) {
    if (i >= count) break;
    good = good && m[i][i] > 0;
    const double inverse = 1 / m[i][i];
#pragma unroll
    for (int r = i + 1; r < Q; ++r) {
      const double factor = r < count ? m[r][i] * inverse : 0;
#pragma unroll
      for (int k = i; k < Q; ++k) m[r][k] -= factor * m[i][k];
      y[r] -= factor * y[i];
    }
  }
#pragma unroll
  for (int i = Q - 1; i >= 0; --i) {
    if (i >= count) { y[i] = 0; continue; }
#pragma unroll
    for (int k = i + 1; k < Q; ++k)
      if (k < count) y[i] -= m[i][k] * y[k];
    y[i] /= m[i][i];
    good = good && isfinite(y[i]);
  }
  return good;
}

template <int Q>
__global__ void __launch_bounds__(512) gamma_kernel(const GammaArgs p) {
  __shared__ unsigned long long s_highest;
  if (threadIdx.x == 0) s_highest = 0;
  __syncthreads();
  for (int64_t t = threadIdx.x; t < p.window; t += blockDim.x)
    if (p.squares[t] > p.limits[t]) atomicMax(&s_highest, static_cast<unsigned long long>(t));  // exact in any order
  // Suffix sums over the rows: warp s takes entry s of (rhs, upper triangle of gram), 32 rows at a time from the top.
  constexpr int kEntries = Q + Q * (Q + 1) / 2;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int s = threadIdx.x / 32; s < kEntries; s += warps) {
    int i = 0, q = s;
    if (s >= Q)
      for (q = s - Q; q >= Q - i; ++i) q -= Q - i;     // the pair (i, i + q)
    double carry = 0;
    for (int64_t top = p.window - 1; top >= 0; top -= 32) {
      const int64_t t = top - lane;
      double value = 0;
      if (t >= 0) value = s < Q ? p.rhs[t * Q + s] : p.gram[(t * Q + i) * Q + i + q];
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const double other = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += other;
      }
      value += carry;
      if (t >= 0) p.sums[t * kEntries + s] = value;
      carry = __shfl_sync(0xffffffffu, value, 31);
    }
  }
  __syncthreads();
  const int64_t highest = static_cast<int64_t>(s_highest);
  if (threadIdx.x == 0) *p.highest = highest;
  if constexpr (Q > 0) for (int64_t t = threadIdx.x; t < p.window; t += blockDim.x) {
    int count = 0;
#pragma unroll
    for (int q = 0; q < Q; ++q) count += t >= p.window - p.lengths[q];
    double m[Q][Q], y[Q], mean = 0;
    const double* entry = p.sums + t * kEntries;
#pragma unroll
    for (int q = 0; q < Q; ++q) y[q] = *entry++;
#pragma unroll
    for (int i = 0; i < Q; ++i)
#pragma unroll
      for (int q = i; q < Q; ++q) m[i][q] = m[q][i] = *entry++;
#pragma unroll
    for (int q = 0; q < Q; ++q) mean += q < count ? m[q][q] : 0;
    mean /= count > 0 ? count : 1;
    const double ridge = p.relative ? p.ridge * mean : p.ridge;
#pragma unroll
    for (int q = 0; q < Q; ++q) m[q][q] += ridge;
    bool good = count > 0 && mean > 0 && t < highest;
    good = good && solve<Q>(m, y, count);
#pragma unroll
    for (int q = 0; q < Q; ++q) p.gamma[t * Q + q] = good ? y[q] : 0;
  }
}

// ---- pass two -----------------------------------------------------------------------------------------------------

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

template <class S, class E, int V, int Q>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const UpdateArgs<S, E> p) {
  extern __shared__ char shared[];
  int* s_range = reinterpret_cast<int*>(shared);   // [count, 2]: first and last ε row with a weight
  for (int64_t row = threadIdx.x / 32; row < p.count; row += kWarps) {
    int low = 0x7fffffff, high = -1;
    for (int64_t s = threadIdx.x % 32; s < p.eps_rows; s += 32)
      if (p.enter_w[row * p.eps_rows + s] != 0) { low = min(low, int(s)); high = max(high, int(s)); }
    low = __reduce_min_sync(0xffffffffu, low);
    high = __reduce_max_sync(0xffffffffu, high);
    if (threadIdx.x % 32 == 0) { s_range[2 * row] = low; s_range[2 * row + 1] = high; }
  }
  __syncthreads();
  const int64_t at = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * V;
  if (at >= p.size) return;

  Pack<S, V> moved{};
  for (int64_t t = p.window - 1; t >= 0; --t) {
    const Pack<S, V> own = load<S, V>(p.x + t * p.size + at), full = load<S, V>(p.r + t * p.size + at);
#pragma unroll
    for (int v = 0; v < V; ++v) moved.at[v] = own.at[v] + full.at[v];
    Pack<S, V> newer_x = own, newer_r = full;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int64_t row = t - (p.window - p.past_r.rows[q]);
      S weight = 0;
      bool later = false;                     // a further round of this row has a weight
      if (row >= 0) {
        weight = static_cast<S>(p.gamma[t * Q + q]);
#pragma unroll
        for (int k = q + 1; k < Q; ++k) later = later || p.gamma[t * Q + k] != 0;
      }
      if (weight != S(0) || later) {
        const Pack<S, V> older_x = load<S, V>(p.past_x.round[q] + row * p.size + at);
        const Pack<S, V> older_r = load<S, V>(p.past_r.round[q] + row * p.size + at);
        if (weight != S(0)) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            moved.at[v] -= weight * ((newer_x.at[v] - older_x.at[v]) + (newer_r.at[v] - older_r.at[v]));
        }
        newer_x = older_x;
        newer_r = older_r;
      }
    }
    store<S, V>(p.out + (p.count + t) * p.size + at, moved);
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

// ---- launchers ----------------------------------------------------------------------------------------------------

template <class T>
const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T>
T* mutable_data(Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
                  ScalarType dtype) {
  check_dim(op, name, tensor, 2);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_equal(op, name, columns, tensor.size(1));
  check_that(tensor.scalar_type() == dtype, op, std::string(name) + " in another dtype");
}

void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  check_dim(op, name, tensor, 1);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_that(tensor.scalar_type() == ScalarType::Double, op, std::string(name) + " in float64");
}

// The rounds, and whether their addresses allow loads of `bytes`.
template <class S>
Past<S> past_of(const char* op, const char* name, const std::vector<Tensor>& tensors, int64_t window, int64_t size,
                ScalarType dtype, int bytes, bool* wide) {
  Past<S> past{};
  check_that(tensors.size() <= kSlots, op, std::string(name) + " of at most 4 rounds");
  int64_t newer = window;
  for (size_t q = 0; q < tensors.size(); ++q) {
    const Tensor& tensor = tensors[q];
    check_dim(op, name, tensor, 2);
    check_matrix(op, name, tensor, tensor.size(0), size, dtype);
    check_that(tensor.size(0) <= newer, op, std::string(name) + " with no more rows than the newer round");
    past.round[q] = data<S>(tensor);
    past.rows[q] = newer = tensor.size(0);
    *wide = *wide && aligned(past.round[q], bytes);
  }
  return past;
}

template <class F>
void by_dtype(const char* op, const Tensor& x, const Tensor& eps, const F& f) {
  const ScalarType state = x.scalar_type(), e = eps.scalar_type();
  check_that(state == ScalarType::Float || state == ScalarType::Double, op, "x in float32 or float64");
  check_that(e == state || e == ScalarType::BFloat16, op, "eps in the dtype of x or bfloat16");
  const bool half = e == ScalarType::BFloat16;
  if (state == ScalarType::Float) {
    if (half) f(float(), __nv_bfloat16()); else f(float(), float());
  } else {
    if (half) f(double(), __nv_bfloat16()); else f(double(), double());
  }
}

// Calls f with the number of past rounds as a constant.
template <class F>
void by_slots(size_t slots, const F& f) {
  switch (slots) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

int64_t blocks_of(int64_t size, int width) { return (size / width + kThreads - 1) / kThreads; }

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
    bool wide = size % kWide == 0 && aligned(data<S>(x), kWide * sizeof(S)) && aligned(data<E>(eps), kWide * sizeof(E)) &&
                (!noise || aligned(data<S>(*noise), kWide * sizeof(S)));
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
        auto run = [&](auto kernel) {
          STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(bytes)));
          kernel<<<blocks, kThreads, bytes, launch.stream>>>(args);
        };
        if (order >= window) wide ? run(residual_kernel<S, E, kWide, Q, true>) : run(residual_kernel<S, E, 1, Q, true>);
        else wide ? run(residual_kernel<S, E, kWide, Q, false>) : run(residual_kernel<S, E, 1, Q, false>);
      });
      check_launch();
    }
    gather_kernel<S><<<window, kThreads, 0, launch.stream>>>(args.shares, blocks * kWarps, window,
        static_cast<int>(slots), mutable_data<double>(squares), mutable_data<double>(gram), mutable_data<double>(rhs));
    check_launch();
  });
  return {out, squares, gram, rhs};
}

std::tuple<Tensor, Tensor> taa_gamma(const Tensor& squares, const Tensor& gram, const Tensor& rhs, const Tensor& limits,
                                     std::vector<int64_t> lengths, double ridge, bool relative) {
  const char* op = "taa_gamma";
  check_dim(op, "rhs", rhs, 2);
  const int64_t window = rhs.size(0), slots = rhs.size(1);
  check_matrix(op, "rhs", rhs, window, slots, ScalarType::Double);
  check_dim(op, "gram", gram, 3);
  check_contiguous(op, "gram", gram);
  check_equal(op, "gram", window * slots * slots, gram.numel());
  check_that(gram.scalar_type() == ScalarType::Double, op, "gram in float64");
  check_vector(op, "squares", squares, window);
  check_vector(op, "limits", limits, window);
  check_equal(op, "lengths", slots, static_cast<int64_t>(lengths.size()));
  check_that(slots <= kSlots, op, "at most 4 past rounds");

  const Launch launch(rhs);
  Tensor gamma = torch::stable::new_empty(rhs, {window, slots});
  Tensor highest = torch::stable::new_empty(rhs, {1}, ScalarType::Long);
  Tensor sums = torch::stable::new_empty(rhs, {window, slots + slots * (slots + 1) / 2});
  GammaArgs args{window, data<double>(squares), data<double>(gram), data<double>(rhs), data<double>(limits), {},
                 ridge, relative, mutable_data<double>(sums), mutable_data<double>(gamma),
                 mutable_data<int64_t>(highest)};
  for (int64_t q = 0; q < slots; ++q) args.lengths[q] = lengths[q];
  by_slots(lengths.size(), [&](auto q) {
    constexpr int Q = decltype(q)::value;
    gamma_kernel<Q><<<1, 512, 0, launch.stream>>>(args);
  });
  check_launch();
  return {gamma, highest};
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
    bool wide = size % kWide == 0 && aligned(data<S>(x), kWide * sizeof(S)) && aligned(data<S>(residual), kWide * sizeof(S)) &&
                aligned(data<E>(eps), kWide * sizeof(E)) && (!enter_noise || aligned(data<S>(*enter_noise), kWide * sizeof(S)));
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
      const size_t bytes = 2 * count * sizeof(int);
      if (wide) update_kernel<S, E, kWide, Q><<<blocks, kThreads, bytes, launch.stream>>>(args);
      else update_kernel<S, E, 1, Q><<<blocks, kThreads, bytes, launch.stream>>>(args);
    });
    check_launch();
  });
  return out;
}

}  // namespace
}  // namespace triskele::cuda

TRISKELE_CUDA_OPS(m) {
  m.impl("taa_residual", TORCH_BOX(&triskele::cuda::taa_residual));
  m.impl("taa_gamma", TORCH_BOX(&triskele::cuda::taa_gamma));
  m.impl("taa_update", TORCH_BOX(&triskele::cuda::taa_update));
}
