// The linear branch's backward. With H = phi(K)^T V, Z = column sums of phi(K) over the keys that a query block covers
// and n = phi(Q) Z + eps:
//   dH = (phi(Q)/n)^T dO,  dZ = -(phi(Q)/n)^T D,  D = rowsum(dO O): summed over the query blocks that cover a key,
//   dphi(Q) = (dO H^T - D Z^T) / n,  dphi(K) = V dH^T + dZ,  dV = phi(K) dH.
//
//   key_states    H and Z of runs of keys
//   query_linear  dq of runs of queries, and their dH and dZ
//   key_linear    dk and dv of runs of keys
//
// Between them the runs' states are summed. Scope "all": runs of 1024 rows, their float32 states added in order. Other
// scopes: a run is a block, its state is in bfloat16 (float16 inputs: in two terms, high + low, for the range of one
// and the precision of the other), and the sums over the map's covered blocks are a matrix product with zeros and ones
// (cover): nothing cancels, an empty sum is exactly zero.
//
// 256 threads on 64 rows at a time. Element by element, four threads share a row; products are mma.sync on 16-bit tiles
// in shared memory. A state enters them divided by a power of two, so that its largest element is in [1, 2), and
// phi(Q)/n times another (lift): sums over 30,000 keys would leave float16's range, and their inverses its precision.
#pragma once
#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/sla_backward.cuh"
#include "cuda/sla_backward_tiles.cuh"

namespace triskele::cuda::backward {
namespace {

template <int DP>
constexpr int kLinearBlocks = DP == 64 ? 2 : 1;   // a multiprocessor
constexpr int kRun = 1024;                // rows of a thread block where the scope is all keys
constexpr float kBlockLift = 512;         // of other scopes, where n sums 64 keys or all of them
constexpr int64_t kHeldBytes = int64_t{256} << 20;  // of states of other scopes: so many heads are taken at a time

enum class Scope : int { kAll, kComplement, kMarginal };

// [B, H, L, D] with unit channel stride, 16-byte aligned rows.
template <class T>
struct View {
  const T* data;
  int64_t s0, s1, s2;
  __device__ const T* row(int b, int h, int64_t r) const { return data + b * s0 + h * s1 + r * s2; }
};

template <class E>
struct LinearArgs {
  Sizes n;
  Feature feature;
  View<E> q, k, v;
  const float* grad;      // d_linear [B, H, Lq, D]
  const bool* key_mask;   // [B, Lk] or null
  int first_head, query_run, key_run;  // of this launch; rows a run
  const float* state;     // [heads (, runs of queries), DP + 1, DP]: H and, as the last row, Z
  const float* d_state;   // [heads (, runs of keys), DP + 1, DP]: dH and dZ times lift
  void* parts;            // of runs, float32 [heads, runs, DP + 1, DP] or bfloat16 [heads, runs, kTerms<E>, DP + 1, DP]
  float eps, lift;        // lift: a power of two
  E *dq, *dk, *dv;
};

// ---- kernels ------------------------------------------------------------------------------------------------------

// Where a thread block works: rows [first, last) of head (b, h).
struct RunOf {
  int local, head, h, b, first, last;  // local: head of this launch, head: of all
  int64_t at;                          // of [heads, runs]
  __device__ RunOf(const Sizes& n, int first_head, int length, int run) {
    const int runs = (length + run - 1) / run;
    at = blockIdx.x;
    local = static_cast<int>(at / runs), head = first_head + local, h = head % n.heads, b = head / n.heads;
    first = static_cast<int>(at % runs) * run, last = min(length, first + run);
  }
  __device__ int64_t state(bool scoped) const { return scoped ? at : local; }
};

template <class E>
constexpr int kTerms = std::is_same_v<E, __half> ? 2 : 1;

// The run's state into its place among the parts.
template <bool kScoped, class E, int DP>
__device__ __forceinline__ void write_part(const StateSum<E, DP>& sum, void* parts, int64_t run) {
  constexpr int kSize = (DP + 1) * DP;
  if constexpr (kScoped) {
    __nv_bfloat16* to = static_cast<__nv_bfloat16*>(parts) + run * kTerms<E> * kSize;
    sum.for_each([&](int i, float value) {
      const __nv_bfloat16 high = __float2bfloat16(value);
      to[i] = high;
      if constexpr (kTerms<E> == 2) to[kSize + i] = __float2bfloat16(value - __bfloat162float(high));
    });
  } else {
    float* to = static_cast<float*>(parts) + run * kSize;
    sum.for_each([&](int i, float value) { to[i] = value; });
  }
}

template <class E>
__device__ __forceinline__ bool sees(const LinearArgs<E>& p, int b, int key, int last) {
  return key < last && (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(b) * p.n.keys + key]);
}

template <class E, int DP, bool kScoped>
__global__ void __launch_bounds__(kLinearThreads, kLinearBlocks<DP>) key_states_kernel(const LinearArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  const LinearShared<E, DP> s(shared);
  const RunOf run(p.n, p.first_head, p.n.keys, p.key_run);
  if (threadIdx.x < kRows) s.weights[threadIdx.x] = 1;
  StateSum<E, DP> sum;
#pragma unroll 1
  for (int first = run.first; first < run.last; first += kRows) {
    const int key = first + threadIdx.x / 4;
    const bool seen = sees(p, run.b, key, run.last);
    Part<DP> x;
    read(p.v.row(run.b, run.h, key), seen, p.n.dim, x);
    to_tile(x, s.right);
    read(p.k.row(run.b, run.h, key), seen, p.n.dim, x);
    to_feature(p.feature, seen, p.n.dim, x);
    to_tile(x, s.left);
    __syncthreads();
    sum.add(s.left, s.right, s.weights);
    __syncthreads();
  }
  write_part<kScoped>(sum, p.parts, run.at);
}

// out [heads, size] = the parts [heads, runs, size], added in order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) add_states_kernel(const float* parts, int runs, int size, float* out) {
  const int across = (size + kThreads - 1) / kThreads;
  const int64_t head = blockIdx.x / across;
  const int i = static_cast<int>(blockIdx.x % across) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int r = 0; r < runs; ++r) sum += parts[(head * runs + r) * size + i];
  out[head * size + i] = sum;
}

// The map of a group of heads, [heads, rows, columns], and which of its blocks the branch covers.
struct Cover {
  const int8_t* map;
  int rows, columns;
  Scope scope;
  __device__ bool at(int64_t head, int row, int column) const {
    const int8_t kind = map[(head * rows + row) * columns + column];
    return scope == Scope::kComplement ? kind != 1 : kind == 0;
  }
};

constexpr int kCoverLines = 128, kCoverWidth = 64, kCoverDepth = 64;

// out [heads, lines, size] = cover [lines, depth] @ parts [heads, depth, terms, size], summed over the terms; lines are
// rows of the map and depth its columns, or the other way round. A warp 16 lines of a tile of 128 x 64; size is a
// multiple of 64.
template <bool kTransposed>
__global__ void __launch_bounds__(256) cover_kernel(const Cover p, const __nv_bfloat16* parts, int terms, int size,
                                                    float* out) {
  using E = __nv_bfloat16;
  __shared__ __align__(16) E s_parts[kCoverDepth][kCoverWidth + 8];
  __shared__ __align__(16) uint8_t s_cover[kCoverLines][kCoverDepth + 4];
  const int lines = kTransposed ? p.columns : p.rows, depth = kTransposed ? p.rows : p.columns;
  const int down = (lines + kCoverLines - 1) / kCoverLines, across = size / kCoverWidth;
  const int64_t head = blockIdx.x / (static_cast<int64_t>(down) * across);
  const int tile = static_cast<int>(blockIdx.x % (static_cast<int64_t>(down) * across));
  const int first_line = tile % down * kCoverLines, column = tile / down * kCoverWidth;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t ones = pack_halves<E>(1.f, 1.f);
  float acc[kCoverWidth / 8][4] = {};
  for (int first = 0; first < depth; first += kCoverDepth) {
    for (int i = threadIdx.x; i < kCoverLines * kCoverDepth; i += 256) {
      const int l = kTransposed ? i % kCoverLines : i / kCoverDepth;
      const int d = kTransposed ? i / kCoverLines : i % kCoverDepth;
      const int line = first_line + l, at = first + d;
      s_cover[l][d] = line < lines && at < depth && (kTransposed ? p.at(head, at, line) : p.at(head, line, at));
    }
    for (int term = 0; term < terms; ++term) {
      for (int i = threadIdx.x; i < kCoverDepth * kCoverWidth / 8; i += 256) {
        const int d = i / (kCoverWidth / 8), c = i % (kCoverWidth / 8) * 8;
        Pack<E, 8> part{};
        if (first + d < depth)
          part = load<E, 8>(parts + ((head * depth + first + d) * terms + term) * size + column + c);
        store<E, 8>(&s_parts[d][c], part);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kCoverDepth; k += 16) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* two = &s_cover[warp * 16 + lane / 4 + i % 2 * 8][k + i / 2 * 8 + lane % 4 * 2];
          a[i] = ones & (two[0] * 0xffffu | two[1] * 0xffff0000u);
        }
#pragma unroll
        for (int n = 0; n < kCoverWidth; n += 16) {
          uint32_t both[4];
          ldmatrix_x4_trans(both, &s_parts[k + lane % 16][n + lane / 16 * 8]);
          mma_half<E>(acc[n / 8], a, {both[0], both[1]});
          mma_half<E>(acc[n / 8 + 1], a, {both[2], both[3]});
        }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int n = 0; n < kCoverWidth / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = first_line + warp * 16 + lane / 4 + 8 * half;
      if (line < lines)
        store<float, 2>(out + (head * lines + line) * size + column + n * 8 + lane % 4 * 2,
                        {acc[n][2 * half], acc[n][2 * half + 1]});
    }
}

template <class E, int DP, bool kScoped>
__global__ void __launch_bounds__(kLinearThreads, kLinearBlocks<DP>) query_linear_kernel(const LinearArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  const LinearShared<E, DP> s(shared);
  const RunOf run(p.n, p.first_head, p.n.queries, p.query_run);
  const float unit = load_state(p.state + run.state(kScoped) * (DP + 1) * DP, s);
  const int row = threadIdx.x / 4;
  StateSum<E, DP> sum;
#pragma unroll 1
  for (int first = run.first; first < run.last; first += kRows) {
    const int query = first + row;
    const bool there = query < run.last;
    const int64_t at = (static_cast<int64_t>(run.head) * p.n.queries + query) * p.n.dim;
    Part<DP> phi, grad;
    read(p.grad + at, there, p.n.dim, grad);
    to_tile(grad, s.right);
    read(p.q.row(run.b, run.h, query), there, p.n.dim, phi);
    to_feature(p.feature, there, p.n.dim, phi);
    __syncthreads();
    RowsPart<DP> acc;
    times_state<E, DP, true>(s.right, s.state, acc);       // [64, DP] @ [DP, DP] = dO H^T
    for_pairs<DP>(acc, [&](int r, int c, const float* pair) {
      store<float, 2>(s.floats + r * kFloatStride<DP> + c, {pair[0] * unit, pair[1] * unit});
    });
    __syncthreads();
    float n = 0, dot = 0;
#pragma unroll
    for (int i = 0; i < DP / 4; ++i) {
      const int channel = Part<DP>::channel(i / 8) + i % 8;
      grad.at[i] = s.floats[row * kFloatStride<DP> + channel];
      n += phi.at[i] * s.vector[channel];
      dot += phi.at[i] * grad.at[i];
    }
    n = row_sum(n) + p.eps;
    const float inverse = n == 0 ? 0.f : 1 / n;
    dot = row_sum(dot) * inverse;                          // rowsum(dO O)
    Part<DP> left;
#pragma unroll
    for (int i = 0; i < DP / 4; ++i) {
      grad.at[i] = (grad.at[i] - s.vector[Part<DP>::channel(i / 8) + i % 8] * dot) * inverse;
      left.at[i] = phi.at[i] * (inverse * p.lift);
    }
    to_tile(left, s.left);
    if (threadIdx.x % 4 == 0) s.weights[row] = -dot;
    feature_backward(p.feature, phi, grad);
    if (there) write(grad, p.dq + at, p.n.dim);
    __syncthreads();
    sum.add(s.left, s.right, s.weights);
    __syncthreads();
  }
  write_part<kScoped>(sum, p.parts, run.at);
}

template <class E, int DP, bool kScoped>
__global__ void __launch_bounds__(kLinearThreads, kLinearBlocks<DP>) key_linear_kernel(const LinearArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  const LinearShared<E, DP> s(shared);
  const RunOf run(p.n, p.first_head, p.n.keys, p.key_run);
  const float lowered = 1 / p.lift;
  const float unit = load_state(p.d_state + run.state(kScoped) * (DP + 1) * DP, s) * lowered;
  const int row = threadIdx.x / 4;
#pragma unroll 1
  for (int first = run.first; first < run.last; first += kRows) {
    const int key = first + row;
    const bool seen = sees(p, run.b, key, run.last);
    Part<DP> phi, grad;
    read(p.v.row(run.b, run.h, key), seen, p.n.dim, grad);
    to_tile(grad, s.right);
    read(p.k.row(run.b, run.h, key), seen, p.n.dim, phi);
    to_feature(p.feature, seen, p.n.dim, phi);
    to_tile(phi, s.left);
    __syncthreads();
    RowsPart<DP> acc;
    times_state<E, DP, true>(s.right, s.state, acc);       // [64, DP] @ [DP, DP] = V dH^T
    for_pairs<DP>(acc, [&](int r, int c, const float* pair) {
      store<float, 2>(s.floats + r * kFloatStride<DP> + c, {pair[0] * unit, pair[1] * unit});
    });
    times_state<E, DP, false>(s.left, s.state, acc);       // phi(K) dH
    for_pairs<DP>(acc, [&](int r, int c, const float* pair) {
      if (first + r >= run.last || c >= p.n.dim) return;
      Pack<E, 2> out;
      narrow(pair[0] * unit, out.at[0]), narrow(pair[1] * unit, out.at[1]);
      store<E, 2>(p.dv + (static_cast<int64_t>(run.head) * p.n.keys + first + r) * p.n.dim + c, out);
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < DP / 4; ++i) {
      const int channel = Part<DP>::channel(i / 8) + i % 8;
      grad.at[i] = s.floats[row * kFloatStride<DP> + channel] + s.vector[channel] * lowered;
    }
    feature_backward(p.feature, phi, grad);
    if (key < run.last) write(grad, p.dk + (static_cast<int64_t>(run.head) * p.n.keys + key) * p.n.dim, p.n.dim);
    __syncthreads();
  }
}

// ---- launcher -----------------------------------------------------------------------------------------------------

torch::stable::Tensor new_floats(const torch::stable::Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Float);
}

// Scope "all".
template <class E, int DP>
void run_linear(LinearArgs<E> args, const torch::stable::Tensor& like, cudaStream_t stream) {
  constexpr int kAddThreads = 256, kSize = (DP + 1) * DP;
  constexpr size_t kBytes = LinearShared<E, DP>::kBytes;
  const int64_t heads = static_cast<int64_t>(args.n.batch) * args.n.heads;
  const int64_t key_runs = (args.n.keys + kRun - 1) / kRun, query_runs = (args.n.queries + kRun - 1) / kRun;
  auto parts = new_floats(like, heads * std::max(key_runs, query_runs) * kSize);
  auto state = new_floats(like, heads * kSize), d_state = new_floats(like, heads * kSize);
  args.parts = parts.mutable_data_ptr();
  args.state = static_cast<const float*>(state.const_data_ptr());
  args.d_state = static_cast<const float*>(d_state.const_data_ptr());
  args.first_head = 0, args.query_run = args.key_run = kRun;
  args.eps = 1e-5f;
  for (args.lift = 1; args.lift < static_cast<float>(args.n.keys);) args.lift *= 2;  // 1 / n is about 1 / keys
  const auto add = [&](int64_t runs, torch::stable::Tensor& to) {
    launch_kernel(add_states_kernel<kAddThreads>,
                  dim3(static_cast<unsigned>(heads * ((kSize + kAddThreads - 1) / kAddThreads))), dim3(kAddThreads), 0,
                  stream, static_cast<const float*>(args.parts), static_cast<int>(runs), kSize,
                  static_cast<float*>(to.mutable_data_ptr()));
  };
  const dim3 key_grid(static_cast<unsigned>(heads * key_runs)), query_grid(static_cast<unsigned>(heads * query_runs));
  launch_kernel(key_states_kernel<E, DP, false>, key_grid, dim3(kLinearThreads), kBytes, stream, args);
  add(key_runs, state);
  launch_kernel(query_linear_kernel<E, DP, false>, query_grid, dim3(kLinearThreads), kBytes, stream, args);
  add(query_runs, d_state);
  launch_kernel(key_linear_kernel<E, DP, false>, key_grid, dim3(kLinearThreads), kBytes, stream, args);
}

// The other scopes; map: [B H, q_blocks, k_blocks].
template <class E, int DP>
void run_linear_scoped(LinearArgs<E> args, const int8_t* map, Scope scope, const torch::stable::Tensor& like,
                       cudaStream_t stream) {
  constexpr int kSize = (DP + 1) * DP;
  constexpr size_t kBytes = LinearShared<E, DP>::kBytes;
  static_assert(kSize % kCoverWidth == 0);
  const int64_t all = static_cast<int64_t>(args.n.batch) * args.n.heads;
  const int64_t rows = args.n.q_blocks, columns = args.n.k_blocks;
  const int64_t a_part = kTerms<E> * kSize;
  const int64_t a_head = (rows + columns) * kSize * sizeof(float) + std::max(rows, columns) * a_part * sizeof(E);
  const int64_t step = std::clamp<int64_t>(kHeldBytes / a_head, 1, all);
  auto state = new_floats(like, step * rows * kSize), d_state = new_floats(like, step * columns * kSize);
  auto parts = torch::stable::new_empty(like, {step * std::max(rows, columns) * a_part},
                                       torch::headeronly::ScalarType::BFloat16);
  args.parts = parts.mutable_data_ptr();
  float *const sums = static_cast<float*>(state.mutable_data_ptr()),
        *const d_sums = static_cast<float*>(d_state.mutable_data_ptr());
  args.state = sums, args.d_state = d_sums;
  args.query_run = kQueryBlock, args.key_run = kKeyBlock;
  args.eps = 0, args.lift = kBlockLift;
  for (int64_t first = 0; first < all; first += step) {
    const int64_t heads = std::min(step, all - first);
    args.first_head = static_cast<int>(first);
    const Cover cover{map + first * rows * columns, args.n.q_blocks, args.n.k_blocks, scope};
    const auto tiles = [&](int64_t lines) {
      return dim3(static_cast<unsigned>(heads * ((lines + kCoverLines - 1) / kCoverLines) * (kSize / kCoverWidth)));
    };
    const dim3 key_grid(static_cast<unsigned>(heads * columns)), query_grid(static_cast<unsigned>(heads * rows));
    const __nv_bfloat16* held = static_cast<const __nv_bfloat16*>(args.parts);
    launch_kernel(key_states_kernel<E, DP, true>, key_grid, dim3(kLinearThreads), kBytes, stream, args);
    launch_kernel(cover_kernel<false>, tiles(rows), dim3(256), 0, stream, cover, held, kTerms<E>, kSize, sums);
    launch_kernel(query_linear_kernel<E, DP, true>, query_grid, dim3(kLinearThreads), kBytes, stream, args);
    launch_kernel(cover_kernel<true>, tiles(columns), dim3(256), 0, stream, cover, held, kTerms<E>, kSize, d_sums);
    launch_kernel(key_linear_kernel<E, DP, true>, key_grid, dim3(kLinearThreads), kBytes, stream, args);
  }
}

}  // namespace
}  // namespace triskele::cuda::backward
