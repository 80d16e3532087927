// A layer's input, read once: z = (x + shift) / smooth as integers, and x lora_down^T for the low-rank branch.
//
//   svdq_quantize_int8   a scale a token: code = round_half_even(z 127 / max|z|)
//   svdq_quantize_int4   a scale a token and group of 64, packed nibbles; levels 7, or 15 where z >= 0 is promised
//
// A block owns 16 tokens, the height of an mma fragment, and walks along K in panels of 512 columns, of which six (96
// KB: all of K = 3072) stay in shared memory. Each warp projects its two 32-column spans of a panel down with
// mma.sync and takes the maxima of two tokens. For int8 the codes need the maximum of the whole row: the panels that
// are still in shared memory come second-hand from there, earlier ones from L2. What a token gets depends on nothing
// but that token: spans belong to warps by their place in K, and the warps' sums are added in one order.
//
// The sum over K has no order that a fragment must keep, so lane q of a row takes 8 neighbouring columns (16 bytes)
// of a span for two k-steps, of x and of lora_down alike.
#include <optional>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 16;
constexpr int kPanel = 512;                            // columns
constexpr int kPieces = kPanel / 8;                    // of 16 bytes, in a row of a panel
constexpr int kSlots = 6;                              // panels in shared memory
constexpr int kSlotBytes = kTokens * kPanel * 2;
constexpr int kGroup = 64;                             // columns that share an int4 scale
constexpr float kLeastUnit = 5.42101086e-20f;          // 2^-64: a projection below is as good as zero

template <class E>
struct QuantizeArgs {
  const E* x;                // [m, k]
  Floats smooth;             // [k]
  const E* lora_down;        // [rank, k]
  int64_t m, k, padded;      // columns of the codes
  int64_t stride;            // of int4 scales: m up to a multiple of 4
  int rank, columns;         // of lora_down; columns of `down`: rank up to a multiple of 16
  float shift;
  bool is_unsigned;
  unsigned char* codes;      // [m, padded] int8, or [m, padded / 2] nibbles
  float* scales;             // [m], or [padded / 64, stride]
  E* down;                   // [m, columns]
  float* units;              // [m]
};

// Byte offset of 16-byte piece c of row t in a slot: rows alternate by 64 bytes, so that eight lanes of two rows that
// read four neighbouring pieces each touch every bank once.
__device__ __forceinline__ int piece_at(int t, int c) { return t * (kPanel * 2) + ((c ^ ((t & 1) << 2)) * 16); }

// z of eight neighbouring columns.
template <class E>
__device__ __forceinline__ void smoothed(const uint4& piece, const float* inverse, float shift, float (&z)[8]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  const float4 low = *reinterpret_cast<const float4*>(inverse), high = *reinterpret_cast<const float4*>(inverse + 4);
  const float factors[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen_pair<E>(words[i]);
    z[2 * i] = (pair.x + shift) * factors[2 * i];
    z[2 * i + 1] = (pair.y + shift) * factors[2 * i + 1];
  }
}

__device__ __forceinline__ uint32_t largest(const float (&z)[8]) {   // as bits: NaN and infinity come out on top
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) top = max(top, __float_as_uint(z[i]) & 0x7fffffffu);
  return top;
}

// The two 1 / smooth that this thread provides for a panel; zero beyond K, so that padding becomes zero codes.
template <class E>
__device__ __forceinline__ void fill_inverse(const QuantizeArgs<E>& p, int64_t panel, float* inverse) {
  for (int i = threadIdx.x; i < kPanel; i += kThreads) {
    const int64_t column = panel * kPanel + i;
    inverse[i] = column < p.k ? 1.0f / p.smooth[column] : 0.0f;
  }
}

template <class E>
__device__ __forceinline__ void load_panel(const QuantizeArgs<E>& p, int64_t first, int64_t panel, int64_t panels,
                                           unsigned char* slots) {
  if (panel < panels) {
    unsigned char* slot = slots + panel % kSlots * kSlotBytes;
    for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
      const int t = i / kPieces, c = i % kPieces;
      const int64_t column = panel * kPanel + c * 8;
      const bool valid = first + t < p.m && column < p.k;
      copy_async_16(slot + piece_at(t, c), valid ? p.x + (first + t) * p.k + column : p.x, valid);
    }
  }
  copy_async_commit();       // empty past the end: groups are counted by panel
}

// The codes of one token's piece, int8: in each 32 columns the even ones and then the odd ones, which is the order
// that a word of 4-bit weights comes apart in. A pair of lanes trades halves, so that each writes eight neighbouring
// bytes.
template <class E>
__device__ __forceinline__ void store_int8(const QuantizeArgs<E>& p, int64_t token, int64_t panel, int c,
                                           const uint4& piece, const float* inverse, const Step& step) {
  float z[8];
  smoothed<E>(piece, inverse + c * 8, p.shift, z);
  uint32_t even = 0, odd = 0;
  if (step.alive) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {   // |z| <= max: within a rounding of 127, no clamp
      even |= (static_cast<uint32_t>(__float2int_rn(z[2 * i] * step.factor)) & 0xffu) << (i * 8);
      odd |= (static_cast<uint32_t>(__float2int_rn(z[2 * i + 1] * step.factor)) & 0xffu) << (i * 8);
    }
  }
  const bool right = c % 2 != 0;
  const uint32_t traded = __shfl_xor_sync(0xffffffffu, right ? even : odd, 1);
  const int64_t column = panel * kPanel + c / 4 * 32 + (right ? 16 : 0) + c % 4 / 2 * 8;
  if (token < p.m && column < p.padded)
    *reinterpret_cast<uint2*>(p.codes + token * p.padded + column) =
        right ? make_uint2(traded, odd) : make_uint2(even, traded);
}

// Eight lanes hold a group of 64 columns of one token: they settle its scale and write its nibbles.
template <class E>
__device__ __forceinline__ void store_int4(const QuantizeArgs<E>& p, int64_t token, int64_t panel, int c,
                                           const float (&z)[8]) {
  uint32_t top = largest(z);
#pragma unroll
  for (int lane = 1; lane < 8; lane <<= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, lane));
  const float levels = p.is_unsigned ? 15.0f : 7.0f;
  const Step step = step_of(top, levels);
  const int64_t column = panel * kPanel + c * 8;
  if (token >= p.m || column >= p.padded) return;
  uint32_t packed = 0;
  if (step.alive) {
    const int low = p.is_unsigned ? 0 : -7, high = p.is_unsigned ? 15 : 7;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int code = min(max(__float2int_rn(z[i] * step.factor), low), high);
      packed |= (static_cast<uint32_t>(code) & 15u) << (i * 4);
    }
  }
  *reinterpret_cast<uint32_t*>(p.codes + (token * p.padded + column) / 2) = packed;
  if (c % 8 == 0) p.scales[column / kGroup * p.stride + token] = step.scale;
}

// kBlocks: of eight ranks each.
template <class E, int kBlocks, bool kInt4>
__global__ void __launch_bounds__(kThreads, kBlocks == 4 ? 2 : 1) quantize_kernel(const QuantizeArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, slots);   // [6][16][512] of x; at the end the warps' sums
  __shared__ __align__(16) float inverse[kPanel];   // with the slots: within the 99 KB of sm_86 and sm_89
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t panels = (max(p.padded, p.k) + kPanel - 1) / kPanel;
  for (int slot = 0; slot < kSlots; ++slot) load_panel(p, first, slot, panels, slots);

  float sums[kBlocks][4] = {};       // [16 tokens, 8 ranks] a block, of this warp's spans
  uint32_t top[2] = {0, 0};          // of tokens 2 warp and 2 warp + 1, this lane's columns
  for (int64_t panel = 0; panel < panels; ++panel) {
    fill_inverse(p, panel, inverse);
    copy_async_wait<kSlots - 1>();
    __syncthreads();
    const unsigned char* slot = slots + panel % kSlots * kSlotBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * warp + i;
#pragma unroll
      for (int c = lane; c < kPieces; c += 32) {
        float z[8];
        smoothed<E>(*reinterpret_cast<const uint4*>(slot + piece_at(t, c)), inverse + c * 8, p.shift, z);
        if constexpr (kInt4) store_int4(p, first + t, panel, c, z);
        else top[i] = max(top[i], largest(z));
      }
    }
    // down [16, 8 kBlocks] += x [16, 32] @ lora_down^T [32, 8 kBlocks]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int span = warp + i * kWarps;
      const int64_t column = panel * kPanel + span * 32 + q * 8;
      const uint4 upper = *reinterpret_cast<const uint4*>(slot + piece_at(r, span * 4 + q));
      const uint4 lower = *reinterpret_cast<const uint4*>(slot + piece_at(r + 8, span * 4 + q));
      const uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y}, a1[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int n = block * 8 + r;
        uint4 factors = make_uint4(0, 0, 0, 0);
        if (n < p.rank && column < p.k) factors = __ldg(reinterpret_cast<const uint4*>(p.lora_down + n * p.k + column));
        const uint32_t b0[2] = {factors.x, factors.y}, b1[2] = {factors.z, factors.w};
        mma_half<E>(sums[block], a0, b0);
        mma_half<E>(sums[block], a1, b1);
      }
    }
    __syncthreads();                   // everyone is done with this slot and the panel's 1 / smooth
    load_panel(p, first, panel + kSlots, panels, slots);
  }

  if constexpr (!kInt4) {
    Step step[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int other = 16; other > 0; other >>= 1) top[i] = max(top[i], __shfl_xor_sync(0xffffffffu, top[i], other));
      step[i] = step_of(top[i], 127.0f);
      const int64_t token = first + 2 * warp + i;
      if (lane == 0 && token < p.m) p.scales[token] = step[i].scale;
    }
    const int64_t kept = max(panels - kSlots, int64_t(0));   // panels from here on are in shared memory
    for (int64_t at = 0; at < panels; ++at) {
      const int64_t panel = at < panels - kept ? kept + at : at - (panels - kept);
      fill_inverse(p, panel, inverse);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * warp + i;
#pragma unroll
        for (int c = lane; c < kPieces; c += 32) {
          uint4 piece = make_uint4(0, 0, 0, 0);
          const int64_t column = panel * kPanel + c * 8;
          const unsigned char* slot = slots + panel % kSlots * kSlotBytes;
          if (panel >= kept) piece = *reinterpret_cast<const uint4*>(slot + piece_at(t, c));
          else if (first + t < p.m && column < p.k)
            piece = __ldg(reinterpret_cast<const uint4*>(p.x + (first + t) * p.k + column));
          store_int8(p, first + t, panel, c, piece, inverse, step[i]);
        }
      }
      __syncthreads();
    }
  }

  // The warps' sums in one order; a power of two takes the token's size out.
  constexpr int kRanks = kBlocks * 8;
  float* shares = reinterpret_cast<float*>(slots);   // [8 warps][16][kRanks]
  copy_async_wait<0>();
  __syncthreads();                                   // the panels are done with
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shares[(warp * kTokens + r + i / 2 * 8) * kRanks + block * 8 + q * 2 + i % 2] = sums[block][i];
  __syncthreads();
  const int t = threadIdx.x / 16, j = threadIdx.x % 16;   // 16 threads a token
  float total[kRanks / 16];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kRanks / 16; ++i) {
    total[i] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[i] += shares[(w * kTokens + t) * kRanks + i * 16 + j];
    most = max(most, __float_as_uint(total[i]) & 0x7fffffffu);
  }
#pragma unroll
  for (int other = 8; other > 0; other >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, other));
  const float unit = most >= kInfinityBits ? __uint_as_float(0x7fc00000u)
                                           : max(__uint_as_float(most & kInfinityBits), kLeastUnit);
  const int64_t token = first + t;
  if (token >= p.m) return;
  if (j == 0) p.units[token] = unit;
#pragma unroll
  for (int i = 0; i < kRanks / 16; ++i)
    if (i * 16 + j < p.columns) p.down[token * p.columns + i * 16 + j] = from_float<E>(total[i] / unit);
}

template <bool kInt4>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const char* op, const Tensor& x, const Tensor& smooth,
                                                    const Tensor& lora_down, double shift, bool is_unsigned,
                                                    int64_t multiple) {
  check_dim(op, "x", x, 2);
  check_dim(op, "smooth", smooth, 1);
  check_dim(op, "lora_down", lora_down, 2);
  const int64_t m = x.size(0), k = x.size(1), rank = lora_down.size(0);
  const ScalarType type = x.scalar_type();
  check_that(type == ScalarType::BFloat16 || type == ScalarType::Half, op, "x in bfloat16 or float16");
  check_operand(op, "x", x, m, k, type);
  check_operand(op, "lora_down", lora_down, rank, k, type);
  check_equal(op, "smooth size", k, smooth.size(0));
  check_that(k > 0 && k % 8 == 0, op, "K in multiples of 8");
  check_that(rank <= 128, op, "a rank of at most 128");
  check_that(multiple >= 64 && multiple % 64 == 0, op, "padding to a multiple of 64");
  check_aligned(op, "x", x);
  check_aligned(op, "lora_down", lora_down);
  const int64_t padded = blocks_of(k, multiple) * multiple, columns = blocks_of(rank, 16) * 16;
  const int64_t stride = blocks_of(m, 4) * 4;

  const Launch launch(x);
  Tensor codes = kInt4 ? torch::stable::new_empty(x, {m, padded / 2}, ScalarType::Byte)
                       : torch::stable::new_empty(x, {m, padded}, ScalarType::Char);
  Tensor scales = kInt4 ? torch::stable::new_empty(x, {padded / kGroup, stride}, ScalarType::Float)
                        : torch::stable::new_empty(x, {m}, ScalarType::Float);
  Tensor down = torch::stable::new_empty(x, {m, columns});
  Tensor units = torch::stable::new_empty(x, {m}, ScalarType::Float);
  if (m > 0) {
    auto run = [&](auto element, auto blocks) {
      using E = decltype(element);
      constexpr int kBlocks = decltype(blocks)::value;
      const QuantizeArgs<E> args{data<E>(x), floats(op, "smooth", smooth), data<E>(lora_down), m, k, padded, stride,
                                 static_cast<int>(rank), static_cast<int>(columns), static_cast<float>(shift),
                                 is_unsigned, static_cast<unsigned char*>(codes.mutable_data_ptr()),
                                 mutable_data<float>(scales), mutable_data<E>(down), mutable_data<float>(units)};
      constexpr int kShares = kWarps * kTokens * kBlocks * 8 * 4;
      const int64_t panels = blocks_of(padded, kPanel);
      const int64_t bytes = std::max<int64_t>(std::min<int64_t>(panels, kSlots) * kSlotBytes, kShares);
      launch_kernel(quantize_kernel<E, kBlocks, kInt4>, dim3(static_cast<unsigned>(blocks_of(m, kTokens))),
                    dim3(kThreads), bytes, launch.stream, args);
    };
    auto by_rank = [&](auto element) {
      if (rank <= 32) run(element, std::integral_constant<int, 4>());
      else if (rank <= 64) run(element, std::integral_constant<int, 8>());
      else run(element, std::integral_constant<int, 16>());
    };
    if (type == ScalarType::BFloat16) by_rank(__nv_bfloat16());
    else by_rank(__half());
  }
  return {codes, scales, down, units};
}

// codes int8 [M, K up to `multiple`], each 32 columns as their even and then their odd ones; scales [M], down [M, r
// up to 16] = x lora_down^T / unit, units [M] (powers of two)
std::tuple<Tensor, Tensor, Tensor, Tensor> svdq_quantize_int8(const Tensor& x, const Tensor& smooth,
                                                              const Tensor& lora_down, double shift, int64_t multiple) {
  return quantize<false>("svdq_quantize_int8", x, smooth, lora_down, shift, false, multiple);
}

// codes uint8 [M, K'/2], K' = K up to `multiple`, column 2 i in the low nibble; scales [K'/64, M up to a multiple of
// 4]; down and units as above
std::tuple<Tensor, Tensor, Tensor, Tensor> svdq_quantize_int4(const Tensor& x, const Tensor& smooth,
                                                              const Tensor& lora_down, double shift, bool is_unsigned,
                                                              int64_t multiple) {
  return quantize<true>("svdq_quantize_int4", x, smooth, lora_down, shift, is_unsigned, multiple);
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) {
  m.impl("svdq_quantize_int8", TORCH_BOX(&triskele::cuda::svdq::svdq_quantize_int8));
  m.impl("svdq_quantize_int4", TORCH_BOX(&triskele::cuda::svdq::svdq_quantize_int4));
}
