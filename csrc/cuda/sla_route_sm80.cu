// Block routing of sparse-linear attention on the device: three launches and no word to the host. The same on a CPU:
// csrc/cpu/sla_route.cpp; the contract: route_blocks in python/triskele/ops/sla/api.py.
//
//   pool     one read of Q and K: the float32 mean of every block; of every block of keys whether a key of it is
//            visible, and whether one must be kept
//   score    mean(q block) . mean(k block) in float32, left as an unsigned number that sorts as the score does: 0 is a
//            block that nobody sees, a score that is not a number comes right above
//   select   a warp a row: the smallest key among the best n by a search from the highest bit down, each step one count
//            over the row; ties go to the lowest index. No sort.
//
// It also holds sla_lists, the map's critical blocks as lists of rows and of columns (cuda/sla_lists.cuh).
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/sla_lists.cuh"

namespace triskele::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "sla_route";
constexpr int kPoolThreads = 256;
constexpr int kTile = 64, kDepth = 32, kScoreThreads = 256;  // of the scores' product: kTile^2 of them, 4 x 4 a thread
constexpr int kSelectWarps = 4;
constexpr size_t kStagedBytes = 64 * 1024;  // of rows held in shared memory while they are searched
constexpr uint8_t kSeen = 1, kKept = 2;     // flags of a block of keys

// [B, H, L, D] in any strides; runs of V channels lie next to each other.
template <class T>
struct Rows {
  const T* data;
  int64_t s0, s1, s2, s3, length, block, blocks;
  float* means;  // [B, H, blocks, D]
};

template <class T>
struct PoolArgs {
  Rows<T> q, k;
  int64_t batch, heads;
  int dim;
  const bool* key_mask;   // [B, Lk] or null
  const bool* keep_keys;  // [B or 1, Lk] or null
  int64_t keep_batches;
  uint8_t* flags;         // [B, blocks of keys]
};

// A thread block a block of tokens: thread t takes the channels of run t % runs of every groups-th row; the groups'
// sums are added in their order.
template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, 6) pool_kernel(const PoolArgs<T> p) {
  __shared__ float partial[kPoolThreads * V];
  const int64_t queries = p.batch * p.heads * p.q.blocks;
  const bool keys = blockIdx.x >= queries;
  const Rows<T>& x = keys ? p.k : p.q;
  const int64_t task = keys ? blockIdx.x - queries : blockIdx.x;
  const int64_t i_block = task % x.blocks, h = task / x.blocks % p.heads, b = task / x.blocks / p.heads;
  const int64_t first = i_block * x.block, rows = min(x.block, x.length - first);
  const bool* mask = keys && p.key_mask != nullptr ? p.key_mask + b * x.length + first : nullptr;
  int64_t count = rows;
  if (mask != nullptr) {
    count = 0;
    for (int64_t r = 0; r < rows; r += kPoolThreads)
      count += __syncthreads_count(r + threadIdx.x < rows && mask[r + threadIdx.x]);
  }
  if (keys && h == 0) {
    int kept = 0;
    if (p.keep_keys != nullptr) {
      const bool* keep = p.keep_keys + (p.keep_batches == 1 ? 0 : b) * x.length + first;
      for (int64_t r = 0; r < rows; r += kPoolThreads)
        kept += __syncthreads_count(r + threadIdx.x < rows && keep[r + threadIdx.x]);
    }
    if (threadIdx.x == 0)
      p.flags[b * x.blocks + i_block] =
          static_cast<uint8_t>((count > 0 ? kSeen : 0) | (kept > 0 ? kKept : 0));
  }

  const int runs = p.dim / V, groups = kPoolThreads / runs;
  const int run = threadIdx.x % runs, group = threadIdx.x / runs;
  if (group < groups) {
    float sum[V] = {};
    const T* from = x.data + b * x.s0 + h * x.s1 + first * x.s2 + run * V * x.s3;
#pragma unroll 4
    for (int64_t r = group; r < rows; r += groups) {
      if (mask != nullptr && !mask[r]) continue;  // what nobody sees may hold anything
      const Pack<T, V> row = load<T, V>(from + r * x.s2);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(row.at[v]);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) partial[group * p.dim + run * V + v] = sum[v];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.dim; d += kPoolThreads) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += partial[g * p.dim + d];
    x.means[task * p.dim + d] = count > 0 ? sum / static_cast<float>(count) : 0.f;
  }
}

// Sorts as the float does, with one zero; every finite float gives more than 0.
__device__ __forceinline__ uint32_t sortable(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct ScoreArgs {
  const float *q, *k;    // means: [heads, rows, dim], [heads, columns, dim]
  const uint8_t* flags;  // [batch, columns]
  int64_t heads_a_batch;
  int rows, columns, dim;
  uint32_t* keys;        // [heads, rows, columns]
};

__global__ void __launch_bounds__(kScoreThreads) score_kernel(const ScoreArgs p) {
  __shared__ float s_q[kDepth][kTile + 1], s_k[kDepth][kTile + 1];  // [channel, block]
  const int across = (p.columns + kTile - 1) / kTile, down = (p.rows + kTile - 1) / kTile;
  const int64_t head = blockIdx.x / (static_cast<int64_t>(across) * down);
  const int tile = static_cast<int>(blockIdx.x % (static_cast<int64_t>(across) * down));
  const int first_row = tile / across * kTile, first_column = tile % across * kTile;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const float *q = p.q + head * p.rows * p.dim, *k = p.k + head * p.columns * p.dim;
  float dots[4][4] = {};
  for (int first = 0; first < p.dim; first += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kScoreThreads) {
      const int d = i % kDepth, n = i / kDepth, channel = first + d;
      const int row = first_row + n, column = first_column + n;
      s_q[d][n] = channel < p.dim && row < p.rows ? q[static_cast<int64_t>(row) * p.dim + channel] : 0.f;
      s_k[d][n] = channel < p.dim && column < p.columns ? k[static_cast<int64_t>(column) * p.dim + channel] : 0.f;
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      float left[4], right[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) left[r] = s_q[d][ty * 4 + r];
#pragma unroll
      for (int c = 0; c < 4; ++c) right[c] = s_k[d][tx + 16 * c];
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) dots[r][c] = fmaf(left[r], right[c], dots[r][c]);
    }
    __syncthreads();
  }
  const uint8_t* flags = p.flags + head / p.heads_a_batch * p.columns;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = first_row + ty * 4 + r, column = first_column + tx + 16 * c;
      if (row >= p.rows || column >= p.columns) continue;
      constexpr float kLargest = 3.402823466e38f;
      float score = dots[r][c];
      if (!(score >= -kLargest && score <= kLargest)) score = score > 0.f ? kLargest : -kLargest;
      p.keys[(head * p.rows + row) * p.columns + column] = (flags[column] & kSeen) != 0 ? sortable(score) : 0u;
    }
  }
}

// The best n of a row are those above `key`, and the first `ties` of those equal to it.
struct Bound {
  uint32_t key;
  int ties;
};

__device__ __forceinline__ int count_from(const uint32_t* keys, int columns, uint32_t least) {
  int count = 0;
  for (int j = threadIdx.x % 32; j < columns; j += 32) count += keys[j] >= least;
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) count += __shfl_xor_sync(0xffffffffu, count, step);
  return count;
}

__device__ Bound best(const uint32_t* keys, int columns, int n) {
  if (n <= 0) return {0xffffffffu, 0};
  if (n >= columns) return {0u, columns};
  uint32_t bound = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = bound | (1u << bit);
    const int count = count_from(keys, columns, higher);
    if (count < n) continue;
    bound = higher;
    if (count == n) return {bound, columns};
  }
  return {bound, n - (bound == 0xffffffffu ? 0 : count_from(keys, columns, bound + 1))};
}

// Whether this lane's key is among the best; `passed` counts the ties in the lanes and rounds before.
__device__ __forceinline__ bool among(const Bound& bound, uint32_t key, bool inside, int& passed) {
  const unsigned lane = threadIdx.x % 32, ties = __ballot_sync(0xffffffffu, inside && key == bound.key);
  const int rank = passed + __popc(ties & ((1u << lane) - 1));
  passed += __popc(ties);
  return key > bound.key || (key == bound.key && rank < bound.ties);
}

struct SelectArgs {
  const uint32_t* keys;  // [rows, columns], of all heads
  const uint8_t* flags;  // [batch, columns]
  int64_t rows, rows_a_batch;
  int columns, keep, drop;
  bool staged;
  int8_t* map;           // [rows, columns]
};

__global__ void __launch_bounds__(kSelectWarps * 32) select_kernel(const SelectArgs p) {
  TRISKELE_DYNAMIC_SHARED(uint32_t, staged);  // [warps, columns], where it fits
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectWarps + warp;
  if (row >= p.rows) return;
  const uint32_t* keys = p.keys + row * p.columns;
  if (p.staged) {
    uint32_t* own = staged + warp * p.columns;
    for (int j = lane; j < p.columns; j += 32) own[j] = keys[j];
    __syncwarp();
    keys = own;
  }
  const Bound critical = best(keys, p.columns, p.keep), remaining = best(keys, p.columns, p.columns - p.drop);
  const uint8_t* flags = p.flags + row / p.rows_a_batch * p.columns;
  int8_t* out = p.map + row * p.columns;
  int passed = 0, also_passed = 0;
  for (int first = 0; first < p.columns; first += 32) {
    const int j = first + lane;
    const bool inside = j < p.columns;
    const uint32_t key = inside ? keys[j] : 0u;
    const bool kept = inside && (flags[j] & kKept) != 0;
    const bool is_critical = among(critical, key, inside, passed), remains = among(remaining, key, inside, also_passed);
    if (inside) out[j] = key != 0 && (is_critical || kept) ? 1 : remains ? 0 : -1;
  }
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <class T>
Rows<T> rows_of(const Tensor& x, int64_t block, Tensor& means) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.size(2),
          block, (x.size(2) + block - 1) / block, static_cast<float*>(means.mutable_data_ptr())};
}

// Whether 16-byte loads fit.
template <class T>
bool wide(const Tensor& x) {
  constexpr int64_t kRun = 16 / sizeof(T);
  bool fits = aligned(x.const_data_ptr(), 16) && x.stride(3) == 1 && x.size(3) % kRun == 0;
  for (int axis = 0; axis < 3; ++axis) fits = fits && (x.size(axis) <= 1 || x.stride(axis) % kRun == 0);
  return fits;
}

template <class T>
void pool(const Tensor& q, const Tensor& k, PoolArgs<T> args, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(T);
  const int64_t tasks = args.batch * args.heads * (args.q.blocks + args.k.blocks);
  launch_kernel(wide<T>(q) && wide<T>(k) ? pool_kernel<T, kRun> : pool_kernel<T, 1>, dim3(static_cast<unsigned>(tasks)),
                dim3(kPoolThreads), 0, stream, args);
}

Tensor sla_route(Tensor q, Tensor k, int64_t n_keep, int64_t n_drop, int64_t block_q, int64_t block_k,
                 std::optional<Tensor> keep_keys, std::optional<Tensor> key_mask) {
  check_dim(kOp, "q", q, 4);
  check_dim(kOp, "k", k, 4);
  check_that(k.scalar_type() == q.scalar_type(), kOp, "k of the dtype of q");
  check_that(block_q >= 1 && block_k >= 1, kOp, "blocks of at least one token");
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(3), keys = k.size(2);
  check_equal(kOp, "batch of k", batch, k.size(0));
  check_equal(kOp, "heads of k", heads, k.size(1));
  check_equal(kOp, "head_dim of k", dim, k.size(3));
  check_that(dim >= 1 && dim <= kPoolThreads, kOp, "head_dim in 1..256");
  const bool* mask = nullptr;
  const bool* keep = nullptr;
  if (key_mask) {
    check_contiguous(kOp, "key_mask", *key_mask);
    check_that(key_mask->scalar_type() == ScalarType::Bool, kOp, "key_mask of dtype bool");
    check_equal(kOp, "key_mask elements", batch * keys, key_mask->numel());
    mask = static_cast<const bool*>(key_mask->const_data_ptr());
  }
  if (keep_keys) {
    check_contiguous(kOp, "keep_keys", *keep_keys);
    check_that(keep_keys->scalar_type() == ScalarType::Bool, kOp, "keep_keys of dtype bool");
    check_dim(kOp, "keep_keys", *keep_keys, 2);
    check_equal(kOp, "keep_keys length", keys, keep_keys->size(1));
    check_that(keep_keys->size(0) == 1 || keep_keys->size(0) == batch, kOp, "keep_keys for one or every batch");
    keep = static_cast<const bool*>(keep_keys->const_data_ptr());
  }
  const int64_t rows = (q.size(2) + block_q - 1) / block_q, columns = (keys + block_k - 1) / block_k;
  const int64_t all = batch * heads;
  check_that(rows < (int64_t{1} << 30) && columns < (int64_t{1} << 30), kOp, "fewer than 2^30 blocks a row");

  const Launch launch(q);
  Tensor map = torch::stable::new_empty(q, {batch, heads, rows, columns}, ScalarType::Char);
  if (map.numel() == 0) return map;
  Tensor q_means = torch::stable::new_empty(q, {all, rows, dim}, ScalarType::Float);
  Tensor k_means = torch::stable::new_empty(q, {all, columns, dim}, ScalarType::Float);
  Tensor flags = torch::stable::new_empty(q, {batch, columns}, ScalarType::Byte);
  Tensor scores = torch::stable::new_empty(q, {all, rows, columns}, ScalarType::Int);
  uint8_t* const marks = static_cast<uint8_t*>(flags.mutable_data_ptr());
  uint32_t* const sorting = static_cast<uint32_t*>(scores.mutable_data_ptr());

  const auto means = [&]<class T>(T*) {
    pool<T>(q, k, {rows_of<T>(q, block_q, q_means), rows_of<T>(k, block_k, k_means), batch, heads,
                   static_cast<int>(dim), mask, keep, keep_keys ? keep_keys->size(0) : 1, marks}, launch.stream);
  };
  switch (q.scalar_type()) {
    case ScalarType::Float: means(static_cast<float*>(nullptr)); break;
    case ScalarType::Half: means(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: means(static_cast<__nv_bfloat16*>(nullptr)); break;
    default: check_that(false, kOp, "float32, float16 or bfloat16");
  }

  const int64_t tiles = all * ((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  launch_kernel(score_kernel, dim3(static_cast<unsigned>(tiles)), dim3(kScoreThreads), 0, launch.stream,
                ScoreArgs{static_cast<const float*>(q_means.const_data_ptr()),
                          static_cast<const float*>(k_means.const_data_ptr()), marks, heads, static_cast<int>(rows),
                          static_cast<int>(columns), static_cast<int>(dim), sorting});

  const auto within = [&](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > columns ? columns : n); };
  const size_t bytes = kSelectWarps * columns * sizeof(uint32_t);
  const bool staged = bytes <= kStagedBytes;
  launch_kernel(select_kernel, dim3(static_cast<unsigned>((all * rows + kSelectWarps - 1) / kSelectWarps)),
                dim3(kSelectWarps * 32), staged ? bytes : 0, launch.stream,
                SelectArgs{sorting, marks, all * rows, heads * rows, static_cast<int>(columns), within(n_keep),
                           within(n_drop), staged, static_cast<int8_t*>(map.mutable_data_ptr())});
  return map;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sla_lists(Tensor map) {
  check_dim("sla_lists", "map", map, 4);
  check_contiguous("sla_lists", "map", map);
  check_that(map.scalar_type() == ScalarType::Char, "sla_lists", "an int8 map");
  const Launch launch(map);
  lists::Both out = lists::build(map, launch.stream);
  return {out.rows, out.row_counts, out.columns, out.column_counts};
}

}  // namespace
}  // namespace triskele::cuda

TRISKELE_CUDA_OPS(m) {
  m.impl("sla_route", TORCH_BOX(&triskele::cuda::sla_route));
  m.impl("sla_lists", TORCH_BOX(&triskele::cuda::sla_lists));
}
