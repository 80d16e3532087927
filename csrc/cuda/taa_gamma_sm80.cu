// The small solve between the passes, one thread block: the highest unconverged row, suffix sums (a warp an entry), and
// a Q x Q ridge solve a row.
#include "cuda/taa.cuh"

namespace triskele::cuda::taa {
namespace {

constexpr int kSolveThreads = 512;

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

// Gaussian elimination without pivots on the first `count` of Q unknowns; the matrix is a Gram matrix plus a ridge.
// False where a pivot vanishes.
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
    good = good && y[i] - y[i] == 0;  // finite
  }
  return good;
}

template <int Q>
__global__ void __launch_bounds__(kSolveThreads) gamma_kernel(const GammaArgs p) {
  __shared__ int s_highest[kSolveThreads / 32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int found = 0;
  for (int64_t t = threadIdx.x; t < p.window; t += blockDim.x)
    if (p.squares[t] > p.limits[t]) found = max(found, static_cast<int>(t));
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) found = max(found, __shfl_xor_sync(0xffffffffu, found, step));
  if (lane == 0) s_highest[threadIdx.x / 32] = found;
  // Suffix sums over the rows: warp s takes entry s of (rhs, upper triangle of gram), 32 rows at a time from the top.
  constexpr int kEntries = Q + Q * (Q + 1) / 2;
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
  int highest = 0;
  for (int w = 0; w < warps; ++w) highest = max(highest, s_highest[w]);
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
    launch_kernel(gamma_kernel<Q>, dim3(1), dim3(kSolveThreads), 0, launch.stream, args);
  });
  return {gamma, highest};
}

}  // namespace
}  // namespace triskele::cuda::taa

TRISKELE_CUDA_OPS(m) { m.impl("taa_gamma", TORCH_BOX(&triskele::cuda::taa::taa_gamma)); }
