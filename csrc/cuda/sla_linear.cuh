// The states of the linear branch, for a group of heads at a time: of every query block (one a head where the scope is
// all keys) Z[d] = sum of phi(K)[:, d] and the averages Hn[d, e] = (phi(K)^T V)[d, e] / Z[d] over the covered keys.
//
//   state_kernel    phi(K)^T V and Z; a thread block walks a segment of the blocks of keys, about as many segments as the
//                   chip holds. Scope all: the sum over the segment, in float32. Otherwise: of every block by itself, in
//                   bfloat16 (float16 inputs: in two bfloat16 terms, h = high + low, for the range of one and the
//                   precision of the other). On the side: the scope's bits of the map, and W in the tile's dtype.
//   gather_kernel   scope all: adds the segments in order, divides, folds W in: Hn W^T.
//   cover_kernel    other scopes: a matrix product of the map's bits with the blocks' states. It adds covered blocks
//                   alone, so nothing cancels and an empty scope is exactly zero.
//
// D is the head dimension of the tiles (64 or 128); columns past `dim` are zero in all states.
#pragma once
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/sla_features.cuh"
#include "cuda/sla_tiles.cuh"

namespace triskele::cuda::sla {
namespace {

enum class Scope : int { kAll, kComplement, kMarginal };

constexpr int linear_threads(int d) { return 4 * d; }  // of the kernels with a matrix product: warps in 4 x D / 32
constexpr int kPad = 8;  // elements after each row of a tile in shared memory: ldmatrix meets every bank once

__host__ __device__ inline bool covers(Scope scope, int8_t kind) {
  return scope == Scope::kComplement ? kind != 1 : kind == 0;
}

// Rows of D elements of [B, H, L, D]: strides in elements, D contiguous.
template <class E>
struct Rows {
  const E* data;
  int64_t batch, head, row;
  int heads;  // of one sample
  __device__ const E* at(int all_head, int64_t r) const {
    return data + all_head / heads * batch + all_head % heads * head + r * row;
  }
};

// ---- key_mask -----------------------------------------------------------------------------------------------------

// there [B, blocks]: bit t of block j says whether key 64 j + t is there. A warp a word.
template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32) there_kernel(const bool* mask, int64_t words, int keys, int blocks,
                                                            uint64_t* there) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (word >= words) return;
  const bool* row = mask + word / blocks * keys;
  const int first = static_cast<int>(word % blocks) * kBlock + lane, second = first + 32;
  const uint64_t low = __ballot_sync(0xffffffffu, first < keys && row[first]);
  const uint64_t high = __ballot_sync(0xffffffffu, second < keys && row[second]);
  if (lane == 0) there[word] = low | high << 32;
}

// Copies of K and V (y = 0, 1) with zeros where a key is not there: what the mask hides may hold NaN, and 0 NaN is NaN.
// A thread 16 bytes.
template <class E>
__global__ void __launch_bounds__(256) hide_kernel(Rows<E> k, Rows<E> v, const bool* mask, int64_t rows, int keys,
                                                   int dim, E* k_out, E* v_out) {
  const int pieces = dim / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, row = index / pieces;
  if (row >= rows) return;
  const int head = static_cast<int>(row / keys), t = static_cast<int>(row % keys);
  const int at = static_cast<int>(index % pieces) * 8;
  uint4 piece{0, 0, 0, 0};
  if (mask[static_cast<int64_t>(head / k.heads) * keys + t])
    piece = *reinterpret_cast<const uint4*>((blockIdx.y == 0 ? k.at(head, t) : v.at(head, t)) + at);
  *reinterpret_cast<uint4*>((blockIdx.y == 0 ? k_out : v_out) + row * dim + at) = piece;
}

// ---- states of segments -------------------------------------------------------------------------------------------

template <class E>
struct StateArgs {
  Rows<E> k, v;
  const uint64_t* there;  // [B, blocks] or null
  int first_head, heads;  // the group: heads first_head … of all heads
  int keys, dim, blocks, segments, segment_blocks;
  Feature feature;
  float* sums;           // [heads, segments, D, D], of scope all
  __nv_bfloat16* terms;  // [heads, kTerms, blocks, D, D], of the others
  float* z;              // [heads, segments or blocks, D]
  // on the side, each null where not wanted
  const int8_t* map;     // [heads of the group, q_blocks, blocks] -> bits [heads, q_blocks, ceil(blocks / 32)]
  uint32_t* bits;
  int q_blocks;
  Scope scope;
  const float* weight;   // [dim, dim] -> half_weight [dim, dim]
  E* half_weight;
};

// A warp's part of a matrix product [kRowsAll, D]: a quarter of the rows, 32 columns.
template <int kRowsAll, int D>
struct WarpTile {
  static constexpr int kM = kRowsAll / 4 / 16, kN = 4;  // of 16 x 8
  float d[kM][kN][4];
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / D * (kRowsAll / 4); }
  static __device__ __forceinline__ int first_column() { return static_cast<int>(threadIdx.x) % D / 32 * 32; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] = 0.f;
  }
  // Rows and columns of d[m][n][0]; [1] is the next column, [2] and [3] eight rows below.
  static __device__ __forceinline__ int row(int m) {
    return first_row() + 16 * m + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  static __device__ __forceinline__ int column(int n) {
    return first_column() + 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4);
  }
};

// b of columns e … e + 15 and 16 steps from `tile`, [steps, columns] with rows of `stride` elements
template <class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int stride, int step, int e) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, tile + (step + lane % 16) * stride + e + lane / 16 * 8);
}

template <class E, int D>
struct StateShared {
  static constexpr int kStride = D + kPad;
  E k[3][kBlock * kStride], v[3][kBlock * kStride];  // of block j in slot j % 3: this one, and two on their way
  E phi[2][kBlock * kStride];
  float z[2][linear_threads(D) / (D / 8) * D];  // [threads of a column, D], in two slots like phi
};

template <class E, int D, int kTerms>  // kTerms 0: float32 sums
__global__ void __launch_bounds__(linear_threads(D), D == 128 ? 1 : 2) state_kernel(const StateArgs<E> p) {
  using Shared = StateShared<E, D>;
  constexpr int kThreads = linear_threads(D), kWarps = kThreads / 32;
  constexpr int kPieces = D / 8, kStride = Shared::kStride, kGroups = kThreads / kPieces, kLoads = kBlock / kGroups;
  TRISKELE_DYNAMIC_SHARED(unsigned char, dynamic);
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.x / p.segments, segment = blockIdx.x % p.segments, all_head = p.first_head + head;
  const int piece = threadIdx.x % kPieces, group = threadIdx.x / kPieces;  // 8 columns; rows group, + kGroups, …

  if (p.bits != nullptr) {
    const int words = (p.blocks + 31) / 32;
    const int64_t count = static_cast<int64_t>(p.heads) * p.q_blocks * words;
    for (int64_t word = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; word < count;
         word += static_cast<int64_t>(gridDim.x) * kWarps) {
      const int j = static_cast<int>(word % words) * 32 + lane;
      const bool covered = j < p.blocks && covers(p.scope, p.map[word / words * p.blocks + j]);
      const uint32_t found = __ballot_sync(0xffffffffu, covered);
      if (lane == 0) p.bits[word] = found;
    }
  }
  if (p.half_weight != nullptr)
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < p.dim * p.dim; i += gridDim.x * kThreads)
      narrow(p.weight[i], p.half_weight[i]);

  const int first = segment * p.segment_blocks, last = min(p.blocks, first + p.segment_blocks);
  const bool inside = piece * 8 < p.dim;
  const auto there = [&](int j) {
    return p.there == nullptr ? keys_there(j, p.keys)
                              : p.there[static_cast<int64_t>(all_head / p.k.heads) * p.blocks + j];
  };
  const E *k_rows = p.k.at(all_head, 0) + piece * 8, *v_rows = p.v.at(all_head, 0) + piece * 8;
  const auto fetch = [&](int j) {
    if (j < last) {
      const uint64_t word = there(j);
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int row = group + n * kGroups;
        const bool valid = inside && (word >> row & 1);
        const int64_t t = valid ? static_cast<int64_t>(j) * kBlock + row : 0;
        copy_async_16(s.k[j % 3] + row * kStride + piece * 8, valid ? k_rows + t * p.k.row : p.k.data, valid);
        copy_async_16(s.v[j % 3] + row * kStride + piece * 8, valid ? v_rows + t * p.v.row : p.v.data, valid);
      }
    }
    copy_async_commit();
  };

  WarpTile<D, D> sum;
  sum.clear();
  float z[8] = {};
  // This thread's share of Z, of its 8 columns and some of the rows.
  const auto post = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s.z[slot][group * D + piece * 8 + i] = z[i];
      z[i] = 0.f;
    }
  };
  // The state that ends with block j.
  const auto leave = [&](int j, int slot) {
    const int64_t plane = static_cast<int64_t>(p.blocks) * D * D;
#pragma unroll
    for (int m = 0; m < WarpTile<D, D>::kM; ++m)
#pragma unroll
      for (int n = 0; n < WarpTile<D, D>::kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float x = sum.d[m][n][2 * i], y = sum.d[m][n][2 * i + 1];
          const int at = (sum.row(m) + 8 * i) * D + sum.column(n);
          if constexpr (kTerms == 0) {
            *reinterpret_cast<float2*>(p.sums + static_cast<int64_t>(blockIdx.x) * D * D + at) = {x, y};
          } else {
            __nv_bfloat16* to = p.terms + head * kTerms * plane + static_cast<int64_t>(j) * D * D + at;
            *reinterpret_cast<uint32_t*>(to) = pack_halves<__nv_bfloat16>(x, y);
            if constexpr (kTerms == 2)
              *reinterpret_cast<uint32_t*>(to + plane) =
                  pack_halves<__nv_bfloat16>(x - __bfloat162float(__float2bfloat16(x)),
                                             y - __bfloat162float(__float2bfloat16(y)));
          }
        }
    if (threadIdx.x < D) {
      float total = 0.f;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total += s.z[slot][g * D + threadIdx.x];
      const int64_t state = kTerms == 0 ? blockIdx.x : static_cast<int64_t>(head) * p.blocks + j;
      p.z[state * D + threadIdx.x] = total;
    }
  };
  fetch(first);
  fetch(first + 1);
  for (int j = first; j < last; ++j) {
    const uint64_t word = there(j);
    E* s_phi = s.phi[j % 2];
    copy_async_wait<1>();  // of the same pieces that this thread has fetched
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int row = group + n * kGroups;
      const Pack<E, 8> x = load<E, 8>(s.k[j % 3] + row * kStride + piece * 8);
      const bool counts = inside && (word >> row & 1);
      float phi[8], top[1] = {-INFINITY};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        phi[i] = widen(x.at[i]);
        if (inside) top[0] = fmaxf(top[0], phi[i]);
      }
#pragma unroll
      for (int step = 1; step < kPieces; step *= 2) top[0] = fmaxf(top[0], __shfl_xor_sync(0xffffffffu, top[0], step));
      feature_all(p.feature, phi, top, [](int) { return 0; });
      float factor = counts ? 1.f : 0.f;
      if (p.feature == Feature::kSoftmax) {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += counts ? phi[i] : 0.f;
#pragma unroll
        for (int step = 1; step < kPieces; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        factor = counts ? 1.f / total : 0.f;
      }
      Pack<E, 8> rounded;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        narrow(counts ? phi[i] * factor : 0.f, rounded.at[i]);
        z[i] += widen(rounded.at[i]);
      }
      store<E, 8>(s_phi + row * kStride + piece * 8, rounded);
    }
    const bool whole = kTerms > 0 || j + 1 == last;  // a state ends with this block
    if (whole) post(j % 2);
    __syncthreads();  // all have read block j - 1: its slots are free, those in pairs from the next block on
    fetch(j + 2);
#pragma unroll
    for (int step = 0; step < kBlock; step += 16) {  // [D, 16] @ [16, D]
      uint32_t a[WarpTile<D, D>::kM][4], b[4];
#pragma unroll
      for (int m = 0; m < WarpTile<D, D>::kM; ++m)
        ldmatrix_x4_trans(a[m], s_phi + (step + lane / 16 * 8 + lane % 8) * kStride + sum.first_row() + 16 * m +
                                    lane / 8 % 2 * 8);
#pragma unroll
      for (int n = 0; n < WarpTile<D, D>::kN; n += 2) {
        load_b(b, s.v[j % 3], kStride, step, sum.first_column() + 8 * n);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < WarpTile<D, D>::kM; ++m) {
          mma_half<E>(sum.d[m][n], a[m], left);
          mma_half<E>(sum.d[m][n + 1], a[m], right);
        }
      }
    }
    if (whole) {
      leave(j, j % 2);
      sum.clear();
    }
  }
  if (first >= last) {  // no keys at all
    post(0);
    __syncthreads();
    leave(first, 0);
  }
}

// ---- scope all ----------------------------------------------------------------------------------------------------

constexpr int kGatherRows = 4;

// A thread block: rows d … d + 3 of one head's state; a thread one column.
template <class E, int D>
__global__ void __launch_bounds__(D) gather_kernel(const float* sums, const float* shares, int segments, int dim,
                                                   const float* weight, E* h, float* z) {
  __shared__ float s_row[kGatherRows][D];
  constexpr int kBlocks = D / kGatherRows;
  const int head = blockIdx.x / kBlocks, first = blockIdx.x % kBlocks * kGatherRows, e = threadIdx.x;
  float sum[kGatherRows] = {}, total[kGatherRows] = {};
#pragma unroll 4
  for (int s = 0; s < segments; ++s) {
    const int64_t state = static_cast<int64_t>(head) * segments + s;
#pragma unroll
    for (int r = 0; r < kGatherRows; ++r) {
      sum[r] += sums[(state * D + first + r) * D + e];
      total[r] += shares[state * D + first + r];
    }
  }
#pragma unroll
  for (int r = 0; r < kGatherRows; ++r) {
    sum[r] = total[r] == 0.f ? 0.f : sum[r] / total[r];
    if (e == 0) z[static_cast<int64_t>(head) * D + first + r] = total[r];
  }
  if (weight != nullptr) {
#pragma unroll
    for (int r = 0; r < kGatherRows; ++r) {
      s_row[r][e] = sum[r];
      sum[r] = 0.f;
    }
    __syncthreads();
    for (int i = 0; e < dim && i < dim; ++i) {
      const float w = weight[e * dim + i];
#pragma unroll
      for (int r = 0; r < kGatherRows; ++r) sum[r] = fmaf(s_row[r][i], w, sum[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kGatherRows; ++r) narrow(sum[r], h[(static_cast<int64_t>(head) * D + first + r) * D + e]);
}

// ---- other scopes -------------------------------------------------------------------------------------------------

struct CoverArgs {
  const uint32_t* bits;        // [heads, q_blocks, ceil(blocks / 32)]
  const __nv_bfloat16* terms;  // [heads, kTerms, blocks, D, D]
  const float* shares;         // [heads, blocks, D]
  int q_blocks, blocks;
  void* h;                     // [heads, q_blocks, D, D]
  float* z;                    // [heads, q_blocks, D]
};

template <int D>
struct CoverShared {
  static constexpr int kStride = D + kPad, kBitStride = kBlock + kPad;
  __nv_bfloat16 cover[kRows * kBitStride];
  __nv_bfloat16 terms[2][kBlock * kStride];
  float shares[2][kBlock];
  float z[D / 32][kRows];
};

// [128 query blocks, D] = bits [128, blocks] @ row d of the blocks' states; blockIdx.x runs over the tiles of query
// blocks first, so that they find the states in L2.
template <class E, int D, int kTerms>
__global__ void __launch_bounds__(linear_threads(D), D == 128 ? 1 : 2) cover_kernel(const CoverArgs p) {
  using Shared = CoverShared<D>;
  constexpr int kThreads = linear_threads(D), kParts = kThreads / kRows, kPart = kBlock / kParts;
  TRISKELE_DYNAMIC_SHARED(unsigned char, dynamic);
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  const int tiles = (p.q_blocks + kRows - 1) / kRows, words = (p.blocks + 31) / 32;
  const int tile = blockIdx.x % tiles, d = blockIdx.x / tiles % D, head = blockIdx.x / tiles / D;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / kParts, part = threadIdx.x % kParts, line = tile * kRows + row;  // its bits of a step
  const int steps = (p.blocks + kBlock - 1) / kBlock;
  constexpr int kPieces = D / 8, kGroups = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, group = threadIdx.x / kPieces;  // 8 columns; rows group, + kGroups, …
  const __nv_bfloat16* terms =
      p.terms + ((static_cast<int64_t>(head) * kTerms * p.blocks + group) * D + d) * D + piece * 8;
  const uint32_t* bits = p.bits + (static_cast<int64_t>(head) * p.q_blocks + line) * words;

  const auto fetch = [&](int step) {  // 64 blocks of one term
    const int j = step % steps * kBlock;
    const __nv_bfloat16* from = terms + (static_cast<int64_t>(step / steps) * p.blocks + j) * D * D;
#pragma unroll
    for (int n = 0; n < kBlock / kGroups; ++n) {
      const int r = group + n * kGroups;
      const bool valid = j + r < p.blocks;
      copy_async_16(s.terms[step % 2] + r * Shared::kStride + piece * 8,
                    valid ? from + n * kGroups * D * D : p.terms, valid);
    }
    if (threadIdx.x < kBlock) {
      const int block = j + static_cast<int>(threadIdx.x);
      s.shares[step % 2][threadIdx.x] =
          block < p.blocks ? p.shares[(static_cast<int64_t>(head) * p.blocks + block) * D + d] : 0.f;
    }
    copy_async_commit();
  };

  WarpTile<kRows, D> sum;
  sum.clear();
  float z = 0.f;
  fetch(0);
  for (int step = 0; step < kTerms * steps; ++step) {
    const int word = step % steps * 2 + part * kPart / 32;
    const uint32_t mine = line < p.q_blocks && word < words ? bits[word] >> (part * kPart % 32) : 0;
#pragma unroll
    for (int i = 0; i < kPart / 8; ++i) {
      uint32_t pairs[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t two = mine >> (8 * i + 2 * k);
        pairs[k] = (two & 1 ? 0x3f80u : 0u) | (two & 2 ? 0x3f800000u : 0u);  // 1 or 0 in bfloat16
      }
      *reinterpret_cast<uint4*>(s.cover + row * Shared::kBitStride + part * kPart + i * 8) =
          uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
    copy_async_wait<0>();
    __syncthreads();
    if (step + 1 < kTerms * steps) fetch(step + 1);
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) z += mine >> i & 1 ? s.shares[step % 2][part * kPart + i] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kBlock; k += 16) {  // [128, 16] @ [16, D]
      uint32_t a[WarpTile<kRows, D>::kM][4], b[4];
#pragma unroll
      for (int m = 0; m < WarpTile<kRows, D>::kM; ++m)
        ldmatrix_x4(a[m], s.cover + (sum.first_row() + 16 * m + lane % 16) * Shared::kBitStride + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < WarpTile<kRows, D>::kN; n += 2) {
        load_b(b, s.terms[step % 2], Shared::kStride, k, sum.first_column() + 8 * n);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < WarpTile<kRows, D>::kM; ++m) {
          mma_bf16(sum.d[m][n], a[m], left);
          mma_bf16(sum.d[m][n + 1], a[m], right);
        }
      }
    }
    __syncthreads();
  }

  s.z[part][row] = z;
  __syncthreads();
  const auto total_of = [&](int r) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kParts; ++i) total += s.z[i][r];
    return total;
  };
  if (part == 0 && line < p.q_blocks) p.z[(static_cast<int64_t>(head) * p.q_blocks + line) * D + d] = total_of(row);
  E* h = static_cast<E*>(p.h);
#pragma unroll
  for (int m = 0; m < WarpTile<kRows, D>::kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = sum.row(m) + 8 * i;
      if (tile * kRows + r >= p.q_blocks) continue;
      const float total = total_of(r), divisor = total == 0.f ? 1.f : total;  // (0 where nothing is covered)
      E* to = h + ((static_cast<int64_t>(head) * p.q_blocks + tile * kRows + r) * D + d) * D;
#pragma unroll
      for (int n = 0; n < WarpTile<kRows, D>::kN; ++n)
        *reinterpret_cast<uint32_t*>(to + sum.column(n)) =
            pack_halves<E>(sum.d[m][n][2 * i] / divisor, sum.d[m][n][2 * i + 1] / divisor);
    }
}

}  // namespace
}  // namespace triskele::cuda::sla
