// Sparse-linear attention, backward, on sm_90a. The same on a CPU: csrc/cpu/sla_backward.cpp; the formulas:
// python/triskele/ops/sla/reference.py.
//
//   prepare   of every query: rowsum(dO_s O_s) - d lse, its lse in base 2, and dO_s in the 16-bit type of q
//   lists     critical blocks by row and by column (cuda/sla_lists.cuh)
//   linear    where there is a linear branch: its dq, dk, dv (cuda/sla_backward_linear.cuh)
//   queries   a thread block a block of 128 queries over its row list: S = Q K^T, dP = dO V^T, dQ += dS K. A producer
//             warp loads by TMA; two warpgroups of 64 queries each multiply by wgmma.
//   keys      a thread block a block of 64 keys over its column list. Each of two warpgroups takes one half of every
//             query block, with a ring of tiles of its own: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q;
//             at the end the two halves are added.
// P = exp(S - lse), dS = P (dP - offset). Every sum has one fixed order: no atomics, the same bits in every run.
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/launch.cuh"
#include "cuda/sla_backward.cuh"
#include "cuda/sla_backward_linear.cuh"
#include "cuda/sla_lists.cuh"

namespace triskele::cuda {
namespace {

using namespace backward;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "sla_backward";

// ---- prepare ------------------------------------------------------------------------------------------------------

template <class E, class G>
struct PrepareArgs {
  Sizes n;
  const E* o_sparse;     // [B, H, Lq, D]
  const G* d_sparse;     // [B, H, Lq, D]
  const float *lse, *d_lse;  // [B, H, Lq]; d_lse or null
  RowNumbers rows;
  E* grad;               // d_sparse as E
};

constexpr int kPrepareWarps = 8;

// A warp a query, four channels a lane.
template <class E, class G>
__global__ void __launch_bounds__(kPrepareWarps * 32) prepare_kernel(const PrepareArgs<E, G> p) {
  const int lane = threadIdx.x % 32, padded = p.n.q_blocks * kQueryBlock;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + threadIdx.x / 32;  // of [B H, padded]
  if (at >= static_cast<int64_t>(p.n.batch) * p.n.heads * padded) return;
  const int query = static_cast<int>(at % padded);
  const int64_t row = at / padded * p.n.queries + query;
  float dot = 0;
  if (query < p.n.queries && lane * 4 < p.n.dim) {
    const int64_t from = row * p.n.dim + lane * 4;
    const Pack<E, 4> o = load<E, 4>(p.o_sparse + from);
    const Pack<G, 4> g = load<G, 4>(p.d_sparse + from);
    Pack<E, 4> rounded;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      narrow(widen(g.at[v]), rounded.at[v]);
      dot += widen(g.at[v]) * widen(o.at[v]);
    }
    store<E, 4>(p.grad + from, rounded);
  }
  dot = warp_sum(dot);
  if (lane != 0) return;
  const float lse = query < p.n.queries ? p.lse[row] : -INFINITY;
  const bool sees = lse > -INFINITY;
  p.rows.lse[at] = sees ? lse * kLog2E : INFINITY;
  p.rows.offset[at] = sees ? dot - (p.d_lse != nullptr ? p.d_lse[row] : 0.f) : 0.f;
}

// ---- what both products know --------------------------------------------------------------------------------------

template <class E>
struct Args {
  Sizes n;
  lists::Lists list;
  RowNumbers rows;
  const bool* key_mask;  // [B, Lk] or null; hidden keys and values are zero
  float scale;
  bool add;              // to what the outputs hold
  E *first, *second;     // dq; or dk and dv
};

// Which of a block's keys nobody sees.
struct Hidden {
  const bool* mask;  // of the block's first key, or null
  int count;         // keys of the block
  __device__ bool operator()(int key) const { return key >= count || (mask != nullptr && !mask[key]); }
  __device__ bool any() const { return count < kKeyBlock || mask != nullptr; }
};

template <class E>
__device__ __forceinline__ Hidden hidden_keys(const Args<E>& p, int b, int block) {
  const int first = block * kKeyBlock;
  return {p.key_mask != nullptr ? p.key_mask + static_cast<int64_t>(b) * p.n.keys + first : nullptr,
          min(kKeyBlock, p.n.keys - first)};
}

// ---- dq -----------------------------------------------------------------------------------------------------------

constexpr int kStages = 3;
constexpr int kQueryThreads = 2 * 128 + 32;

template <int kChunks>
constexpr size_t query_bytes() {
  return (4 + 2 * kStages) * kChunks * kChunkBytes + (1 + 2 * kStages) * sizeof(uint64_t);
}

template <class E, int kChunks>
__global__ void __launch_bounds__(kQueryThreads, 1)
    query_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
                 const Args<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int kTile = kChunks * kChunkBytes;
  unsigned char *s_q = shared, *s_grad = s_q + 2 * kTile, *s_keys = s_grad + 2 * kTile;  // keys: (K, V) a stage
  uint64_t* ready = reinterpret_cast<uint64_t*>(s_keys + 2 * kStages * kTile);
  uint64_t *full = ready + 1, *empty = full + kStages;
  const int64_t line = blockIdx.x;
  const int i_block = static_cast<int>(line % p.n.q_blocks), head = static_cast<int>(line / p.n.q_blocks);
  const int h = head % p.n.heads, b = head / p.n.heads;
  const int count = p.list.counts[line];
  const int32_t* list = p.list.entries + line * p.n.k_blocks;
  if (threadIdx.x == 0) {
    barrier_init(ready, 1);
    for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1), barrier_init(empty + s, 8);
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= 256) {  // the producer
    if (threadIdx.x != 256 || count == 0) return;
    barrier_arrive_expect(ready, 4 * kTile);
    for (int half = 0; half < 2; ++half) {
      const int row = i_block * kQueryBlock + half * kRows;
      load_tile<kChunks>(s_q + half * kTile, &q_map, ready, row, h, b);
      load_tile<kChunks>(s_grad + half * kTile, &grad_map, ready, row, h, b);
    }
    for (int n = 0; n < count; ++n) {
      const int stage = n % kStages, key = list[n] * kKeyBlock;
      if (n >= kStages) barrier_wait(empty + stage, (n / kStages - 1) & 1);
      barrier_arrive_expect(full + stage, 2 * kTile);
      load_tile<kChunks>(s_keys + 2 * stage * kTile, &k_map, full + stage, key, h, b);
      load_tile<kChunks>(s_keys + (2 * stage + 1) * kTile, &v_map, full + stage, key, h, b);
    }
    return;
  }

  const int group = threadIdx.x / 128, t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4, pair = t % 4;
  const int64_t number = static_cast<int64_t>(head) * p.n.q_blocks * kQueryBlock + i_block * kQueryBlock +
                         group * kRows + row;
  const float lse[2] = {p.rows.lse[number], p.rows.lse[number + 8]};
  const float offset[2] = {p.rows.offset[number], p.rows.offset[number + 8]};
  const float factor = p.scale * kLog2E;
  float dq[kChunks * 32] = {};
  if (count > 0) barrier_wait(ready, 0);
  for (int n = 0; n < count; ++n) {
    const int stage = n % kStages;
    const unsigned char *k = s_keys + 2 * stage * kTile, *v = k + kTile;
    barrier_wait(full + stage, n / kStages & 1);
    float s[32] = {}, dp[32] = {};
    wgmma_pin(s), wgmma_pin(dp);
    wgmma_fence();
    multiply_rows<E, kChunks>(s, s_q + group * kTile, k);       // [64, D] @ [D, 64]
    multiply_rows<E, kChunks>(dp, s_grad + group * kTile, v);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s), wgmma_pin(dp);
    const Hidden hidden = hidden_keys(p, b, list[n]);
    const bool some = hidden.any();
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int half = i / 2 % 2;
      const float weight = exp2f(s[i] * factor - lse[half]);
      s[i] = weight * (dp[i] - offset[half]);
      if (some && hidden(i / 4 * 8 + 2 * pair + i % 2)) s[i] = 0;
    }
    uint32_t ds[4][4];
    to_operand<E>(s, ds);
    wgmma_pin(dq);
    wgmma_fence();
    multiply_columns<E, kChunks>(dq, ds, k);                    // [64, 64] @ [64, D]
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(dq);
    if (t % 32 == 0) barrier_arrive(empty + stage);
  }
  const int first = i_block * kQueryBlock + group * kRows;
  E* out = p.first + (static_cast<int64_t>(head) * p.n.queries + first) * p.n.dim;
  store_rows(dq, p.scale, out, p.n.queries - first, p.n.dim, p.add, [](int) { return false; });
}

// ---- dk, dv -------------------------------------------------------------------------------------------------------

constexpr int kKeyStages = 2;
constexpr int kKeyThreads = 2 * 128;
constexpr int kNumberBytes = kRows * sizeof(float);

template <int kChunks>
constexpr size_t key_bytes() {
  constexpr size_t kTile = kChunks * kChunkBytes;
  return (2 + 4 * kKeyStages) * kTile + 4 * kKeyStages * kNumberBytes + (1 + 2 * kKeyStages) * sizeof(uint64_t);
}

template <class E, int kChunks>
__global__ void __launch_bounds__(kKeyThreads, 1)
    key_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
               const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
               const __grid_constant__ CUtensorMap lse_map, const __grid_constant__ CUtensorMap offset_map,
               const Args<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int kTile = kChunks * kChunkBytes;
  const int group = threadIdx.x / 128, t = threadIdx.x % 128, pair = t % 4;
  unsigned char *s_k = shared, *s_v = s_k + kTile, *s_tiles = s_v + kTile;   // tiles: (Q, dO) a stage and group
  unsigned char* s_numbers = s_tiles + 4 * kKeyStages * kTile;               // (lse, offset) a stage and group
  uint64_t* ready = reinterpret_cast<uint64_t*>(s_numbers + 4 * kKeyStages * kNumberBytes);
  unsigned char* own_tiles = s_tiles + group * 2 * kKeyStages * kTile;
  unsigned char* own_numbers = s_numbers + group * 2 * kKeyStages * kNumberBytes;
  uint64_t* full = ready + 1 + group * kKeyStages;
  const int64_t line = blockIdx.x;
  const int j_block = static_cast<int>(line % p.n.k_blocks), head = static_cast<int>(line / p.n.k_blocks);
  const int h = head % p.n.heads, b = head / p.n.heads;
  const int count = p.list.counts[line];
  const int32_t* list = p.list.entries + line * p.n.q_blocks;

  const auto fetch = [&](int n) {  // by one thread of the group
    const int stage = n % kKeyStages, query = list[n] * kQueryBlock + group * kRows;
    barrier_arrive_expect(full + stage, 2 * kTile + 2 * kNumberBytes);
    load_tile<kChunks>(own_tiles + 2 * stage * kTile, &q_map, full + stage, query, h, b);
    load_tile<kChunks>(own_tiles + (2 * stage + 1) * kTile, &grad_map, full + stage, query, h, b);
    tma_load_2d(own_numbers + 2 * stage * kNumberBytes, &lse_map, full + stage, query, head);
    tma_load_2d(own_numbers + (2 * stage + 1) * kNumberBytes, &offset_map, full + stage, query, head);
  };
  if (threadIdx.x == 0) {
    barrier_init(ready, 1);
    for (int s = 0; s < 2 * kKeyStages; ++s) barrier_init(ready + 1 + s, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0 && count > 0) {
    barrier_arrive_expect(ready, 2 * kTile);
    load_tile<kChunks>(s_k, &k_map, ready, j_block * kKeyBlock, h, b);
    load_tile<kChunks>(s_v, &v_map, ready, j_block * kKeyBlock, h, b);
  }
  if (t == 0)
    for (int n = 0; n < min(count, kKeyStages); ++n) fetch(n);

  const float factor = p.scale * kLog2E;
  float dk[kChunks * 32] = {}, dv[kChunks * 32] = {};
  if (count > 0) barrier_wait(ready, 0);
  for (int n = 0; n < count; ++n) {
    const int stage = n % kKeyStages;
    const unsigned char *q = own_tiles + 2 * stage * kTile, *grad = q + kTile;
    const float* lse = reinterpret_cast<const float*>(own_numbers + 2 * stage * kNumberBytes) + 2 * pair;
    const float* offset = lse + kRows;
    barrier_wait(full + stage, n / kKeyStages & 1);
    float s[32] = {}, dp[32] = {};
    wgmma_pin(s), wgmma_pin(dp);
    wgmma_fence();
    multiply_rows<E, kChunks>(s, s_k, q);                       // [64 keys, D] @ [D, 64 queries]
    multiply_rows<E, kChunks>(dp, s_v, grad);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s), wgmma_pin(dp);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int query = i / 4 * 8 + i % 2;
      s[i] = exp2f(s[i] * factor - lse[query]);
      dp[i] = s[i] * (dp[i] - offset[query]);
    }
    uint32_t weights[4][4], ds[4][4];
    to_operand<E>(s, weights);
    to_operand<E>(dp, ds);
    wgmma_pin(dv), wgmma_pin(dk);
    wgmma_fence();
    multiply_columns<E, kChunks>(dv, weights, grad);            // [64 keys, 64 queries] @ [64, D]
    multiply_columns<E, kChunks>(dk, ds, q);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(dv), wgmma_pin(dk);
    fence_proxy_async();                                        // the numbers were read by hand
    named_barrier_sync(1 + group, 128);
    if (t == 0 && n + kKeyStages < count) fetch(n + kKeyStages);
  }

  // The groups' sums: the first finishes dv, the second dk. Their tiles are no longer needed.
  __syncthreads();
  float* mine = reinterpret_cast<float*>(s_tiles) + (group == 0 ? 0 : kChunks * 32 * 128) + t;
  const float* other = reinterpret_cast<float*>(s_tiles) + (group == 0 ? kChunks * 32 * 128 : 0) + t;
#pragma unroll
  for (int i = 0; i < kChunks * 32; ++i) mine[i * 128] = group == 0 ? dk[i] : dv[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kChunks * 32; ++i) dv[i] = (group == 0 ? dv[i] : dk[i]) + other[i * 128];
  const int first = j_block * kKeyBlock;
  E* out = (group == 0 ? p.second : p.first) + (static_cast<int64_t>(head) * p.n.keys + first) * p.n.dim;
  const Hidden hidden = hidden_keys(p, b, j_block);
  store_rows(dv, group == 0 ? 1.f : p.scale, out, p.n.keys - first, p.n.dim, p.add, hidden);
}

// ---- launcher -----------------------------------------------------------------------------------------------------

template <class T>
const T* data(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T>
T* mutable_data(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

template <class E>
View<E> view_of(const Tensor& x) { return {data<E>(x), x.stride(0), x.stride(1), x.stride(2)}; }

// Tiles of 64 rows and 64 channels of x [B, H, L, D].
template <class E>
CUtensorMap tiles_of(const Tensor& x) {
  constexpr TileType kType = std::is_same_v<E, __half> ? TileType::kFloat16 : TileType::kBFloat16;
  const auto stride = [&](int axis) {  // of an axis of one, any that the encoder takes
    return int64_t{sizeof(E)} * (x.size(axis) == 1 ? x.size(2) * x.size(3) : x.stride(axis));
  };
  return encode_tensor_map({kType, x.const_data_ptr(), 4, {x.size(3), x.size(2), x.size(1), x.size(0)},
                            {0, stride(2), stride(1), stride(0)}, {64, kRows, 1, 1}, true});
}

// 64 of the rows' numbers [heads, padded].
CUtensorMap numbers_of(const Tensor& x) {
  return encode_tensor_map({TileType::kFloat32, x.const_data_ptr(), 2, {x.size(1), x.size(0)},
                            {0, x.size(1) * int64_t{sizeof(float)}}, {kRows, 1}, false});
}

void check_tiles(const char* name, const Tensor& x, ScalarType dtype) {
  check_dim(kOp, name, x, 4);
  check_that(x.scalar_type() == dtype, kOp, std::string(name) + " of the dtype of q");
  check_that(x.stride(3) == 1 && aligned(x.const_data_ptr(), 16), kOp, std::string(name) + " in rows of 16-byte steps");
  for (int axis = 0; axis < 3; ++axis)
    check_that(x.size(axis) <= 1 || x.stride(axis) % 8 == 0, kOp, std::string(name) + " in rows of 16-byte steps");
}

void check_block(const char* name, int64_t block, int64_t wanted, int64_t length) {
  check_that(block == wanted || (block >= length && length <= wanted), kOp,
             std::string(name) + " of " + std::to_string(wanted) + ", or a single block");
}

void check_floats(const char* name, const Tensor& x, int64_t count) {
  check_that(x.scalar_type() == ScalarType::Float, kOp, std::string(name) + " in float32");
  check_contiguous(kOp, name, x);
  check_equal(kOp, name, count, x.numel());
}

template <class E, int kChunks>
void run(const Sizes& n, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad, const Tensor& lse,
         const Tensor& offset, lists::Both& blocks, Args<E> args, Tensor& dq, Tensor& dk, Tensor& dv,
         cudaStream_t stream) {
  const CUtensorMap q_map = tiles_of<E>(q), k_map = tiles_of<E>(k), v_map = tiles_of<E>(v);
  const CUtensorMap grad_map = tiles_of<E>(grad);
  const unsigned heads = static_cast<unsigned>(n.batch) * n.heads;
  args.list = lists::Both::view(blocks.rows, blocks.row_counts);
  args.first = mutable_data<E>(dq);
  launch_kernel(query_kernel<E, kChunks>, dim3(heads * n.q_blocks), dim3(kQueryThreads), query_bytes<kChunks>(), stream,
                q_map, k_map, v_map, grad_map, args);
  args.list = lists::Both::view(blocks.columns, blocks.column_counts);
  args.first = mutable_data<E>(dk), args.second = mutable_data<E>(dv);
  launch_kernel(key_kernel<E, kChunks>, dim3(heads * n.k_blocks), dim3(kKeyThreads), key_bytes<kChunks>(), stream,
                q_map, k_map, v_map, grad_map, numbers_of(lse), numbers_of(offset), args);
}

std::tuple<Tensor, Tensor, Tensor> sla_backward(
    Tensor q, Tensor k, Tensor v, Tensor map, Tensor o_sparse, Tensor lse, Tensor d_sparse,
    std::optional<Tensor> d_linear, std::optional<Tensor> d_lse, std::optional<Tensor> key_mask, int64_t block_q,
    int64_t block_k, int64_t feature, int64_t scope, double scale) {
  const ScalarType dtype = q.scalar_type();
  check_that(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, kOp, "float16 or bfloat16");
  check_tiles("q", q, dtype), check_tiles("k", k, dtype), check_tiles("v", v, dtype);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), dim = q.size(3);
  for (const Tensor* x : {&k, &v}) {
    check_equal(kOp, "batch", batch, x->size(0));
    check_equal(kOp, "heads", heads, x->size(1));
    check_equal(kOp, "keys", keys, x->size(2));
    check_equal(kOp, "head_dim", dim, x->size(3));
  }
  check_that(dim >= 8 && dim <= 128 && dim % 8 == 0, kOp, "head_dim up to 128 in multiples of 8");
  check_block("block_q", block_q, kQueryBlock, queries);
  check_block("block_k", block_k, kKeyBlock, keys);
  const int64_t q_blocks = (queries + kQueryBlock - 1) / kQueryBlock, k_blocks = (keys + kKeyBlock - 1) / kKeyBlock;
  check_dim(kOp, "map", map, 4);
  check_contiguous(kOp, "map", map);
  check_that(map.scalar_type() == ScalarType::Char, kOp, "an int8 map");
  check_equal(kOp, "map elements", batch * heads * q_blocks * k_blocks, map.numel());
  check_tiles("o_sparse", o_sparse, dtype);
  check_contiguous(kOp, "o_sparse", o_sparse);
  check_equal(kOp, "o_sparse elements", q.numel(), o_sparse.numel());
  check_floats("lse", lse, batch * heads * queries);
  if (d_lse) check_floats("d_lse", *d_lse, batch * heads * queries);
  check_floats("d_sparse", d_sparse, q.numel());
  if (d_linear) check_floats("d_linear", *d_linear, q.numel());
  check_that(feature >= 0 && feature <= 2, kOp, "a feature map in 0..2");
  check_that(scope >= 0 && scope <= 2, kOp, "a scope in 0..2");
  if (key_mask) {
    check_that(key_mask->scalar_type() == ScalarType::Bool, kOp, "key_mask of dtype bool");
    check_contiguous(kOp, "key_mask", *key_mask);
    check_equal(kOp, "key_mask elements", batch * keys, key_mask->numel());
  }

  const Launch launch(q);
  Tensor dq = torch::stable::new_empty(q, {batch, heads, queries, dim});
  Tensor dk = torch::stable::new_empty(q, {batch, heads, keys, dim});
  Tensor dv = torch::stable::new_empty(q, {batch, heads, keys, dim});
  if (batch * heads == 0 || queries == 0 || keys == 0) {
    torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  const Sizes n{static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(queries), static_cast<int>(keys),
                static_cast<int>(dim), static_cast<int>(q_blocks), static_cast<int>(k_blocks)};
  const int64_t padded = q_blocks * kQueryBlock, lines = batch * heads * padded;
  Tensor grad = torch::stable::new_empty(q, {batch, heads, queries, dim});
  Tensor row_lse = torch::stable::new_empty(q, {batch * heads, padded}, ScalarType::Float);
  Tensor row_offset = torch::stable::new_empty(q, {batch * heads, padded}, ScalarType::Float);
  const RowNumbers rows{mutable_data<float>(row_lse), mutable_data<float>(row_offset)};
  lists::Both blocks = lists::build(map, launch.stream);
  const auto by_type = [&]<class E>(E*) {
    launch_kernel(prepare_kernel<E, float>, dim3(static_cast<unsigned>((lines + kPrepareWarps - 1) / kPrepareWarps)),
                  dim3(kPrepareWarps * 32), 0, launch.stream,
                  PrepareArgs<E, float>{n, data<E>(o_sparse), data<float>(d_sparse), data<float>(lse),
                                        d_lse ? data<float>(*d_lse) : nullptr, rows, mutable_data<E>(grad)});
    const bool* mask = key_mask ? data<bool>(*key_mask) : nullptr;
    if (d_linear) {
      const LinearArgs<E> linear{n, static_cast<Feature>(feature), view_of<E>(q), view_of<E>(k), view_of<E>(v),
                                 data<float>(*d_linear), mask, 0, 0, 0, nullptr, nullptr, nullptr, 0.f, 1.f,
                                 mutable_data<E>(dq), mutable_data<E>(dk), mutable_data<E>(dv)};
      const auto by_width = [&](auto width) {
        constexpr int DP = decltype(width)::value;
        if (scope == 0) run_linear<E, DP>(linear, q, launch.stream);
        else run_linear_scoped<E, DP>(linear, data<int8_t>(map), static_cast<Scope>(scope), q, launch.stream);
      };
      if (dim <= 64) by_width(std::integral_constant<int, 64>());
      else by_width(std::integral_constant<int, 128>());
    }
    const Args<E> args{n, {}, rows, mask, static_cast<float>(scale), d_linear.has_value(), nullptr, nullptr};
    if (dim <= 64) run<E, 1>(n, q, k, v, grad, row_lse, row_offset, blocks, args, dq, dk, dv, launch.stream);
    else run<E, 2>(n, q, k, v, grad, row_lse, row_offset, blocks, args, dq, dk, dv, launch.stream);
  };
  if (dtype == ScalarType::Half) by_type(static_cast<__half*>(nullptr));
  else by_type(static_cast<__nv_bfloat16*>(nullptr));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace triskele::cuda

TRISKELE_CUDA_OPS(m) { m.impl("sla_backward", TORCH_BOX(&triskele::cuda::sla_backward)); }
