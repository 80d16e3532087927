// The main kernel of the Hopper SLA forward; the launcher is csrc/cuda/sla_forward_sm90.cu.
//
// One persistent thread block an SM, tiles of 128 queries in head-major order:
//   producer warp     walks the list of the tile's critical blocks; a stage is two of them side by side, 128 keys, each
//                     half a TMA box of its own; then H (and W) through the ring of V; the next tile follows at once
//   two warpgroups    64 queries each: O += P V_(i-1) runs beside the softmax of S_i = Q K_i^T; P stays in registers.
//                     Then the linear branch, and the output by way of Q's buffer.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/sla_features.cuh"
#include "cuda/sla_lists.cuh"
#include "cuda/sla_tiles.cuh"

namespace triskele::cuda::sla {
namespace {

constexpr int kThreads = 3 * 128;
constexpr int kConsumerWarps = 8;

enum class Join : int { kNone, kAdd, kProject, kMix };  // of O_linear: none, added (W is in H), by W, by alpha

template <class E>
struct ForwardArgs {
  CUtensorMap q, k, v;         // [B, H, L, D], boxes of 128 queries or 64 keys by 64 columns
  CUtensorMap h, w;            // Hn [states, D, D] (or Hn W^T), W [D, D]; boxes of D rows by 64 columns
  lists::Lists critical;       // of every row of the map
  const uint64_t* there;       // [B, k_blocks] which keys are there; null: all of them
  const float* z;              // [states, D of the tile]
  const float *bias, *alpha;   // [dim], [B, H, Lq], or null
  E *o, *o_sparse, *o_linear;  // [B, H, Lq, dim]; the parts may be null
  float* lse;                  // [B, H, Lq]
  Tiles tiles;
  int heads, queries, keys, dim, k_blocks;  // heads: of one sample
  int state_step;              // states a head: 1, or one a query block
  float scale_log2, eps;
  Feature feature;
  bool linear;
  Join join;
};

template <int D>
struct Layout {  // of the dynamic shared memory
  static constexpr int kKeys = D == 128 ? 2 : 4, kValues = D == 128 ? 3 : 4;  // slots; H and W pass through those of V
  static constexpr int kTile = kRows * D * 2;  // bytes of 128 queries, of 128 keys, or (at least) of H
  static constexpr int kQ = 0, kK = 2 * kTile, kV = kK + kKeys * kTile, kBytes = kV + kValues * kTile;
};

template <int D>
struct Barriers {
  static constexpr int kKeys = Layout<D>::kKeys, kValues = Layout<D>::kValues;
  uint64_t q_full[2], q_empty[2], k_full[kKeys], k_empty[kKeys], v_full[kValues], v_empty[kValues];
  uint64_t there[kKeys][2];  // of the two blocks of a stage of K: which keys are there
  int selected[2];           // of the tile whose Q this is: blocks
};

// ---- the producer -------------------------------------------------------------------------------------------------

template <class E, int D>
__device__ __forceinline__ void produce(const ForwardArgs<E>& p, unsigned char* shared, Barriers<D>& bars) {
  using L = Layout<D>;
  Ring<2> q_ring;
  Ring<L::kKeys> k_ring;
  Ring<L::kValues> v_ring;
  // [rows, D] of one box: chunks of 64 columns, each a swizzled tile of `pitch` rows
  const auto load_box = [&](unsigned char* to, const CUtensorMap* map, uint64_t* full, int row, int head, int pitch) {
#pragma unroll
    for (int c = 0; c < D / kChunk; ++c)
      tma_load_4d(to + c * pitch * 128, map, full, c * kChunk, row, head % p.heads, head / p.heads);
  };
  const auto load_matrix = [&](const CUtensorMap* map, int index) {
    barrier_wait(&bars.v_empty[v_ring.slot], v_ring.parity ^ 1);
    uint64_t* full = &bars.v_full[v_ring.slot];
    barrier_arrive_expect(full, D * D * 2);
#pragma unroll
    for (int c = 0; c < D / kChunk; ++c)
      tma_load_3d(shared + L::kV + v_ring.slot * L::kTile + c * D * 128, map, full, c * kChunk, 0, index);
    v_ring.advance();
  };

  for (int64_t index = blockIdx.x; index < p.tiles.count(); index += gridDim.x) {
    const Tile tile = p.tiles.at(index);
    const int64_t line = static_cast<int64_t>(tile.head) * p.tiles.q_blocks + tile.block;
    const int32_t* entries = p.critical.entries + line * p.k_blocks;
    const int selected = p.critical.counts[line];
    const auto entry = [&](int n) { return n < selected ? __ldg(entries + n) : -1; };
    int left = entry(0), right = entry(1);

    barrier_wait(&bars.q_empty[q_ring.slot], q_ring.parity ^ 1);
    bars.selected[q_ring.slot] = selected;
    barrier_arrive_expect(&bars.q_full[q_ring.slot], L::kTile);
    load_box(shared + L::kQ + q_ring.slot * L::kTile, &p.q, &bars.q_full[q_ring.slot], tile.block * kRows, tile.head,
             kRows);
    q_ring.advance();

    for (int stage = 0; stage < stages_of(selected); ++stage) {
      const int next_left = entry(2 * stage + 2), next_right = entry(2 * stage + 3);  // on their way during the waits
      const auto seen = [&](int j) {
        if (p.there == nullptr || j < 0) return keys_there(j, p.keys);
        return __ldg(p.there + static_cast<int64_t>(tile.head / p.heads) * p.k_blocks + j);
      };
      barrier_wait(&bars.k_empty[k_ring.slot], k_ring.parity ^ 1);
      bars.there[k_ring.slot][0] = seen(left);
      bars.there[k_ring.slot][1] = seen(right);
      barrier_arrive_expect(&bars.k_full[k_ring.slot], L::kTile);
      unsigned char* to = shared + L::kK + k_ring.slot * L::kTile;
      load_box(to, &p.k, &bars.k_full[k_ring.slot], box_row(left, p.k_blocks), tile.head, kStageKeys);
      load_box(to + kBlock * 128, &p.k, &bars.k_full[k_ring.slot], box_row(right, p.k_blocks), tile.head, kStageKeys);
      k_ring.advance();

      barrier_wait(&bars.v_empty[v_ring.slot], v_ring.parity ^ 1);
      barrier_arrive_expect(&bars.v_full[v_ring.slot], L::kTile);
      to = shared + L::kV + v_ring.slot * L::kTile;
      load_box(to, &p.v, &bars.v_full[v_ring.slot], box_row(left, p.k_blocks), tile.head, kStageKeys);
      load_box(to + kBlock * 128, &p.v, &bars.v_full[v_ring.slot], box_row(right, p.k_blocks), tile.head, kStageKeys);
      v_ring.advance();
      left = next_left, right = next_right;
    }
    if (p.linear) {
      const int state = (tile.head - p.tiles.first_head) * p.state_step + (p.state_step > 1 ? tile.block : 0);
      load_matrix(&p.h, state);
      if (p.join == Join::kProject) load_matrix(&p.w, 0);
    }
  }
}

// ---- the consumers ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Scores of keys that are not there -> -inf.
__device__ __forceinline__ void hide(float (&s)[64], const uint64_t (&there)[2], int pair) {
  if ((there[0] & there[1]) == kEveryKey) return;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const unsigned bits = static_cast<unsigned>(there[j / 8] >> (8 * (j % 8) + 2 * pair));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if ((bits >> (i & 1) & 1u) == 0) s[4 * j + i] = -INFINITY;
  }
}

// Running maximum of the unscaled scores and this thread's share of the sum, of its two rows.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// s -> exp2(scale (s - maximum)); `shrink`: what earlier sums and outputs have to be multiplied with.
__device__ __forceinline__ void soften(float (&s)[64], Softmax& state, float scale_log2, float (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = state.top[i];
#pragma unroll
    for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    top = quad_max(top);
    const float base = top == -INFINITY ? 0.f : top * scale_log2;  // a row that has seen no key yet
    shrink[i] = exp2_fast(fmaf(state.top[i], scale_log2, -base));
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      s[4 * j + 2 * i] = exp2_fast(fmaf(s[4 * j + 2 * i], scale_log2, -base));
      s[4 * j + 2 * i + 1] = exp2_fast(fmaf(s[4 * j + 2 * i + 1], scale_log2, -base));
      sum += s[4 * j + 2 * i] + s[4 * j + 2 * i + 1];
    }
    state.top[i] = top;
    state.sum[i] = fmaf(state.sum[i], shrink[i], sum);
  }
}

// Accumulators -> register A of the product over their columns.
template <class E, int R>
__device__ __forceinline__ void to_operand(const float (&d)[R], uint32_t (&a)[R / 8][4]) {
#pragma unroll
  for (int k = 0; k < R / 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack_halves<E>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

template <class E>
__device__ __forceinline__ float2 unpack_halves(uint32_t both) {
  const E* halves = reinterpret_cast<const E*>(&both);
  return {widen(halves[0]), widen(halves[1])};
}

// Where a consumer thread stands, and what it shares with its warpgroup.
template <class E, int D>
struct Consumer {
  static constexpr int kSteps = D / 16;
  using L = Layout<D>;

  const ForwardArgs<E>& p;
  unsigned char* shared;
  Barriers<D>& bars;
  int group, warp, lane;  // of the two warpgroups, of the group's four warps
  Ring<2> q_ring;
  Ring<L::kKeys> k_ring;
  Ring<L::kValues> v_ring;

  __device__ __forceinline__ int pair() const { return lane % 4; }
  __device__ __forceinline__ unsigned char* q_tile() const { return shared + L::kQ + q_ring.slot * L::kTile; }

  // This warp is done with the buffer behind the barrier.
  __device__ __forceinline__ void release(uint64_t* empty) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  }
  __device__ __forceinline__ void release_v() {
    release(&bars.v_empty[v_ring.slot]);
    v_ring.advance();
  }

  // s [64, 128] = Q [64, D] @ K^T [D, 128], started
  __device__ __forceinline__ void start_scores(float (&s)[64]) const {
    const unsigned char *q = q_tile() + group * 64 * 128, *k = shared + L::kK + k_ring.slot * L::kTile;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = step / 4 * kRows * 128 + step % 4 * 32;  // both tiles have 128 rows
      wgmma_shared<E, Major::kK, Major::kK>(s, shared_descriptor(q + at, Major::kK),
                                            shared_descriptor(k + at, Major::kK), step > 0);
    }
    wgmma_commit();
  }

  // o [64, D] += a [64, 16 Steps] @ B [16 Steps, D], B in V's ring with D contiguous and `Rows` rows; started
  template <int Steps, int Rows>
  __device__ __forceinline__ void start_values(float (&o)[D / 2], const uint32_t (&a)[Steps][4],
                                               bool accumulate) const {
    const unsigned char* v = shared + L::kV + v_ring.slot * L::kTile;
#pragma unroll
    for (int step = 0; step < Steps; ++step)
      wgmma_registers<E, Major::kMn>(o, a[step], shared_descriptor(v + step * 16 * 128, Major::kMn, Rows * 128),
                                     accumulate || step > 0);
    wgmma_commit();
  }

  // o = sum over the stages of exp2(scale (S - maximum)) V; the last product is under way on return: finish_values
  __device__ __forceinline__ void attend(int stages, float (&o)[D / 2], Softmax& state) {
    float s[64], shrink[2];
    uint32_t weights[8][4];
    barrier_wait(&bars.k_full[k_ring.slot], k_ring.parity);
    wgmma_pin(s);
    wgmma_fence();
    start_scores(s);
    wgmma_wait<0>();
    wgmma_pin(s);
    hide(s, bars.there[k_ring.slot], pair());
    release(&bars.k_empty[k_ring.slot]);
    k_ring.advance();
    soften(s, state, p.scale_log2, shrink);
    to_operand<E>(s, weights);

    if (stages > 1) barrier_wait(&bars.k_full[k_ring.slot], k_ring.parity);
    for (int stage = 1; stage < stages; ++stage) {
      wgmma_pin(s);
      wgmma_pin(o);
      wgmma_fence();
      start_scores(s);
      barrier_wait(&bars.v_full[v_ring.slot], v_ring.parity);
      start_values<8, kStageKeys>(o, weights, stage > 1);
      wgmma_wait<1>();
      wgmma_pin(s);
      hide(s, bars.there[k_ring.slot], pair());
      release(&bars.k_empty[k_ring.slot]);
      k_ring.advance();
      soften(s, state, p.scale_log2, shrink);
      // Here, so that a loop stands between the softmax and the wait for O: ptxas moves that wait up over plain
      // arithmetic, and the two would no longer overlap.
      if (stage + 1 < stages) barrier_wait(&bars.k_full[k_ring.slot], k_ring.parity);
      finish_values(o);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= shrink[i / 2 % 2];
      to_operand<E>(s, weights);
    }
    barrier_wait(&bars.v_full[v_ring.slot], v_ring.parity);
    wgmma_pin(o);
    wgmma_fence();
    start_values<8, kStageKeys>(o, weights, stages > 1);
  }

  __device__ __forceinline__ void finish_values(float (&o)[D / 2]) {
    wgmma_wait<0>();
    wgmma_pin(o);
    release_v();
  }

  // a = A of this warp's 16 rows (docs/cuda_sla.md), from Q [128, D] in shared memory and Z
  __device__ __forceinline__ void linear_weights(const float* z, uint32_t (&a)[kSteps][4]) const {
    const unsigned char* q = q_tile();
    const int row = group * 64 + warp * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(a[k], q + k / 4 * kRows * 128 + swizzled_offset(row, k % 4 * 32 + lane / 16 * 16));
    // a[k][i]: row i % 2, columns 16 k + 8 (i / 2) + 2 pair and the next; columns past dim are zeros that do not count
    float weight[kSteps * 8], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, plain[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kSteps * 4; ++n) {
      const float2 x = unpack_halves<E>(a[n / 4][n % 4]);
      weight[2 * n] = x.x, weight[2 * n + 1] = x.y;
      if (n / 2 * 8 < p.dim) top[n % 2] = fmaxf(top[n % 2], fmaxf(x.x, x.y));
    }
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
    feature_all(p.feature, weight, top, [](int i) { return i / 2 % 2; });
#pragma unroll
    for (int m = 0; m < kSteps * 2; ++m) {
      const bool counts = m * 8 < p.dim;
      const float2 share = counts ? __ldg(reinterpret_cast<const float2*>(z + m * 8 + 2 * pair())) : float2{0.f, 0.f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &x = weight[4 * m + 2 * i], &y = weight[4 * m + 2 * i + 1];
        plain[i] += counts ? x + y : 0.f;
        x = counts ? x * share.x : 0.f;
        y = counts ? y * share.y : 0.f;
        total[i] += x + y;
      }
    }
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float n = quad_sum(total[i]) + p.eps * (p.feature == Feature::kSoftmax ? quad_sum(plain[i]) : 1.f);
      inverse[i] = n == 0.f ? 0.f : fminf(1.f / n, FLT_MAX);  // (of a subnormal n it would be infinite)
    }
#pragma unroll
    for (int n = 0; n < kSteps * 4; ++n)
      a[n / 4][n % 4] = pack_halves<E>(weight[2 * n] * inverse[n % 2], weight[2 * n + 1] * inverse[n % 2]);
  }

  // out [64, D] = A [64, D] @ Hn [D, D], or out += that
  __device__ __forceinline__ void attend_linearly(const uint32_t (&a)[kSteps][4], float (&out)[D / 2], bool add) {
    barrier_wait(&bars.v_full[v_ring.slot], v_ring.parity);
    wgmma_pin(out);
    wgmma_fence();
    start_values<kSteps, D>(out, a, add);
    finish_values(out);
  }

  // o [64, D] += linear [64, D] @ W^T [D, D]
  __device__ __forceinline__ void project(const float (&linear)[D / 2], float (&o)[D / 2]) {
    uint32_t a[kSteps][4];
    to_operand<E>(linear, a);
    const unsigned char* w = shared + L::kV + v_ring.slot * L::kTile;
    barrier_wait(&bars.v_full[v_ring.slot], v_ring.parity);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma_registers<E, Major::kK>(o, a[step], shared_descriptor(w + step / 4 * D * 128 + step % 4 * 32, Major::kK),
                                    true);
    wgmma_commit();
    finish_values(o);
  }

  // This warp's 16 rows to global memory, through its own rows of Q's buffer: 16 bytes a lane, whole rows at a time.
  // `first`: of the warp in [B H Lq]; `rows` of the 16 are there.
  __device__ __forceinline__ void store(const float (&d)[D / 2], E* to, int64_t first, int rows) const {
    unsigned char* tile = q_tile();
    const int top = group * 64 + warp * 16;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<uint32_t*>(tile + j / 8 * kRows * 128 +
                                     swizzled_offset(top + lane / 4 + 8 * i, j % 8 * 16 + 4 * pair())) =
            pack_halves<E>(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
    __syncwarp();
    constexpr int kPieces = D / 8;
#pragma unroll
    for (int n = 0; n < 16 * kPieces / 32; ++n) {
      const int row = (n * 32 + lane) / kPieces, piece = (n * 32 + lane) % kPieces;
      if (row < rows && piece * 8 < p.dim)
        *reinterpret_cast<uint4*>(to + (first + row) * p.dim + piece * 8) = *reinterpret_cast<const uint4*>(
            tile + piece / 8 * kRows * 128 + swizzled_offset(top + row, piece % 8 * 16));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    for (int64_t index = blockIdx.x; index < p.tiles.count(); index += gridDim.x) {
      const Tile tile = p.tiles.at(index);
      barrier_wait(&bars.q_full[q_ring.slot], q_ring.parity);
      const int stages = stages_of(bars.selected[q_ring.slot]);
      const int linear_state =
          (tile.head - p.tiles.first_head) * p.state_step + (p.state_step > 1 ? tile.block : 0);
      float o[D / 2];
      uint32_t a[kSteps][4];
      Softmax state;
      attend(stages, o, state);
      if (p.linear) linear_weights(p.z + static_cast<int64_t>(linear_state) * D, a);  // beside the last product
      finish_values(o);

      const int top = tile.block * kRows + group * 64 + warp * 16;  // query of the warp's first row
      const int rows = p.queries - top;
      const int64_t first = static_cast<int64_t>(tile.head) * p.queries + top;
      float scaled[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(state.sum[i]);
        scaled[i] = sum == 0.f ? 1.f : 1.f / sum;
        const int row = lane / 4 + 8 * i;
        if (pair() == 0 && row < rows)
          p.lse[first + row] = sum == 0.f ? -INFINITY : (state.top[i] * p.scale_log2 + log2f(sum)) * kLn2;
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= scaled[i / 2 % 2];
      finish(a, o, first, rows);
      // Q's buffer was read and written by hand: order that before the next load into it.
      fence_proxy_async();
      release(&bars.q_empty[q_ring.slot]);
      q_ring.advance();
    }
  }

  // o = alpha o + (1 - alpha) linear
  __device__ __forceinline__ void mix(const float (&linear)[D / 2], float (&o)[D / 2], int64_t first, int rows) const {
    float alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      alpha[i] = row < rows ? __ldg(p.alpha + first + row) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = alpha[i / 2 % 2] * o[i] + (1.f - alpha[i / 2 % 2]) * linear[i];
  }

  // From o_sparse to the output.
  __device__ __forceinline__ void finish(const uint32_t (&a)[kSteps][4], float (&o)[D / 2], int64_t first, int rows) {
    if (!p.linear) {
      named_barrier_sync(1 + group, 128);  // the group's products have read Q
      store(o, p.o, first, rows);
      return;
    }
    if (p.join == Join::kAdd) {
      attend_linearly(a, o, true);
      named_barrier_sync(1 + group, 128);
    } else {
      float linear[D / 2];
      attend_linearly(a, linear, false);
      named_barrier_sync(1 + group, 128);
      if (p.o_sparse != nullptr) {
        store(o, p.o_sparse, first, rows);
        store(linear, p.o_linear, first, rows);
      }
      if (p.join == Join::kProject) project(linear, o);
      if (p.join == Join::kMix) mix(linear, o, first, rows);
    }
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        if (8 * j >= p.dim) break;
        const float2 b = __ldg(reinterpret_cast<const float2*>(p.bias + 8 * j + 2 * pair()));
        o[4 * j] += b.x, o[4 * j + 1] += b.y, o[4 * j + 2] += b.x, o[4 * j + 3] += b.y;
      }
    }
    store(o, p.o, first, rows);
  }
};

template <class E, int D>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Barriers<D> bars;
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&bars.q_full[i], 1);
      barrier_init(&bars.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Layout<D>::kKeys; ++i) {
      barrier_init(&bars.k_full[i], 1);
      barrier_init(&bars.k_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Layout<D>::kValues; ++i) {
      barrier_init(&bars.v_full[i], 1);
      barrier_init(&bars.v_empty[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    registers_shrink<24>();
    if (threadIdx.x == 0) produce<E, D>(p, shared, bars);
    return;
  }
  registers_grow<240>();
  Consumer<E, D> consumer{p, shared, bars, warpgroup - 1, static_cast<int>(threadIdx.x / 32 % 4),
                          static_cast<int>(threadIdx.x % 32)};
  consumer.run();
}

}  // namespace
}  // namespace triskele::cuda::sla
