// The 4-bit product for chips whose tensor cores multiply 4-bit integers (sm_80 … sm_89):
//
//   y[m, n] = sum_g a_scale[g, m] w_scale[n, g] (sum over 64 columns of a_code w_code) + down[m] . lora_up[n] + bias[n]
//
// A block of eight warps makes a 128 x 128 tile of y, each warp 32 x 64 of it; codes and scales come through a ring
// of four stages of 128 columns (two groups) by cp.async. A group's integer sum is exact; one conversion and two
// float operations put it into y, which is what limits this kernel: 64 products cost a tensor core as long as 1/2
// such step costs the FP32 pipe. The low-rank branch is a last, 16-bit product on the same accumulators.
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/svdq_common.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;                    // tokens and channels of a block
constexpr int kGroup = 64;
constexpr int kDepth = 128;                   // columns a stage
constexpr int kRowBytes = kDepth / 2;
constexpr int kStages = 4;
constexpr int kCodeBytes = kTile * kRowBytes;
constexpr int kScaleBytes = kTile * 4;        // one group's scales of one operand
constexpr int kStageBytes = 2 * kCodeBytes + 4 * kScaleBytes;   // codes a, w; scales a (2 groups), w (2 groups)
constexpr int kBlocks = 8;                    // of eight channels, a warp

template <class E>
struct GemmArgs {
  const unsigned char* codes;     // [m, stride_a]
  const float* token_scales;      // [groups, stride_scales]
  const unsigned char* qweight;   // [n, stride_w]
  Floats wscales;                 // [n, groups_w]
  const E* down;                  // [m, columns]
  const float* units;             // [m]
  const E* lora_up;               // [n, rank]
  Floats bias;                    // [n] or null
  E* out;                         // [m, n]
  int64_t m, n, stride_a, stride_w, stride_scales, groups_w;
  int depth, rank, columns;       // stages along K; ranks; those of `down`
};

// Piece c (16 bytes) of row t in a stage's codes: two rows share 128 bytes, four such pairs differ by the swizzle.
__device__ __forceinline__ int piece_at(int t, int c) { return t * kRowBytes + ((c ^ (t >> 1 & 3)) * 16); }

template <class E>
__device__ __forceinline__ void load_stage(const GemmArgs<E>& p, int64_t m0, int64_t n0, int step,
                                           unsigned char* stages) {
  if (step < p.depth) {
    unsigned char* stage = stages + step % kStages * kStageBytes;
    for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
      const int t = i / 4, c = i % 4;
      const int64_t at = int64_t(step) * kRowBytes + c * 16;
      const bool token = m0 + t < p.m && at < p.stride_a, channel = n0 + t < p.n && at < p.stride_w;
      copy_async_16(stage + piece_at(t, c), token ? p.codes + (m0 + t) * p.stride_a + at : p.codes, token);
      copy_async_16(stage + kCodeBytes + piece_at(t, c), channel ? p.qweight + (n0 + t) * p.stride_w + at : p.qweight,
                    channel);
    }
    if (threadIdx.x < 2 * kTile / 4) {   // the tokens' scales of two groups
      const int g = threadIdx.x / 32, t = threadIdx.x % 32 * 4;
      const int64_t group = int64_t(step) * 2 + g;
      const bool valid = m0 + t < p.stride_scales && group * kGroup / 2 < p.stride_a;
      copy_async_16(stage + 2 * kCodeBytes + g * kScaleBytes + t * 4,
                    valid ? p.token_scales + group * p.stride_scales + m0 + t : p.token_scales, valid);
    }
  }
  copy_async_commit();                   // empty past the end: groups are counted by step
}

// The weight's scale that this thread provides for a step: one of 128 channels and two groups.
template <class E>
__device__ __forceinline__ float weight_scale(const GemmArgs<E>& p, int64_t n0, int step) {
  const int64_t n = n0 + threadIdx.x % kTile, group = int64_t(step) * 2 + threadIdx.x / kTile;
  return n < p.n && group < p.groups_w ? p.wscales[n * p.groups_w + group] : 0.0f;
}

template <class E, bool kUnsigned>
__global__ void __launch_bounds__(kThreads, 1) w4a4_kernel(const GemmArgs<E> p) {
  TRISKELE_DYNAMIC_SHARED(unsigned char, stages);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int64_t m0 = int64_t(blockIdx.x) * kTile, n0 = int64_t(blockIdx.y) * kTile;
  const int mw = warp / 2 * 32, nw = warp % 2 * 64;   // the warp's corner
  const int row8 = lane % 8, matrix = lane / 8;       // of the ldmatrix row that this lane names

  for (int step = 0; step < kStages - 1; ++step) {
    load_stage(p, m0, n0, step, stages);
    if (step < p.depth)
      reinterpret_cast<float*>(stages + step * kStageBytes + 2 * kCodeBytes + 2 * kScaleBytes)[threadIdx.x] =
          weight_scale(p, n0, step);
  }
  float y[2][kBlocks][4] = {};
  for (int step = 0; step < p.depth; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();                                  // this stage is there, and the one before is done with
    const int next = step + kStages - 1;
    load_stage(p, m0, n0, next, stages);
    const float next_scale = next < p.depth ? weight_scale(p, n0, next) : 0.0f;
    const unsigned char* stage = stages + step % kStages * kStageBytes;
    const float* scales = reinterpret_cast<const float*>(stage + 2 * kCodeBytes);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      uint32_t a[2][4];
      float a_scale[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], stage + piece_at(mw + i * 16 + row8 + matrix % 2 * 8, g * 2 + matrix / 2));
#pragma unroll
        for (int h = 0; h < 2; ++h) a_scale[i][h] = scales[g * kTile + mw + i * 16 + h * 8 + r];
      }
#pragma unroll
      for (int pair = 0; pair < kBlocks / 2; ++pair) {
        uint32_t b[4];                                // two blocks of eight channels
        ldmatrix_x4(b, stage + kCodeBytes + piece_at(nw + pair * 16 + matrix / 2 * 8 + row8, g * 2 + matrix % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int block = pair * 2 + half;
          const float2 w_scale = *reinterpret_cast<const float2*>(scales + (2 + g) * kTile + nw + block * 8 + q * 2);
          const uint32_t both[2] = {b[half * 2], b[half * 2 + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int32_t sum[4] = {0, 0, 0, 0};            // [16, 64] @ [64, 8]
            if constexpr (kUnsigned) mma_u4s4(sum, a[i], both);
            else mma_s4(sum, a[i], both);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              y[i][block][e] += static_cast<float>(sum[e]) * (a_scale[i][e / 2] * (e % 2 == 0 ? w_scale.x : w_scale.y));
          }
        }
      }
    }
    if (next < p.depth)   // that stage's last readers passed this step's barrier; its next ones wait for a later one
      reinterpret_cast<float*>(stages + next % kStages * kStageBytes + 2 * kCodeBytes + 2 * kScaleBytes)[threadIdx.x] =
          next_scale;
  }

  // y / unit += (down / unit) [128, r'] @ lora_up^T [r', 128], through the ring's memory
  copy_async_wait<0>();
  __syncthreads();
  const int stride = p.columns + 8;                   // elements: rows differ by 16 bytes modulo 128 where r' = 64
  E* s_down = reinterpret_cast<E*>(stages);
  E* s_up = s_down + kTile * stride;
  for (int i = threadIdx.x; i < kTile * p.columns; i += kThreads) {
    const int t = i / p.columns, j = i % p.columns;
    s_down[t * stride + j] = m0 + t < p.m ? p.down[(m0 + t) * p.columns + j] : from_float<E>(0.0f);
    s_up[t * stride + j] = n0 + t < p.n && j < p.rank ? p.lora_up[(n0 + t) * p.rank + j] : from_float<E>(0.0f);
  }
  __syncthreads();
  float unit[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t token = m0 + mw + i * 16 + h * 8 + r;
      unit[i][h] = token < p.m ? p.units[token] : 1.0f;
      const float inverse = 1.0f / unit[i][h];        // exact: a power of two
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        y[i][block][h * 2] *= inverse;
        y[i][block][h * 2 + 1] *= inverse;
      }
    }
  for (int k = 0; k < p.columns; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(a[i], s_down + (mw + i * 16 + row8 + matrix % 2 * 8) * stride + k + matrix / 2 * 8);
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4(b, s_up + (nw + pair * 16 + matrix / 2 * 8 + row8) * stride + k + matrix % 2 * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t both[2] = {b[half * 2], b[half * 2 + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_half<E>(y[i][pair * 2 + half], a[i], both);
      }
    }
  }

  const bool even = p.n % 2 == 0;                     // neighbours leave in one store
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int64_t n = n0 + nw + block * 8 + q * 2;
    const float bias[2] = {p.bias.data != nullptr && n < p.n ? p.bias[n] : 0.0f,
                           p.bias.data != nullptr && n + 1 < p.n ? p.bias[n + 1] : 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = m0 + mw + i * 16 + h * 8 + r;
        if (token >= p.m || n >= p.n) continue;
        const float left = y[i][block][h * 2] * unit[i][h] + bias[0];
        const float right = y[i][block][h * 2 + 1] * unit[i][h] + bias[1];
        E* to = p.out + token * p.n + n;
        if (even) {
          *reinterpret_cast<uint32_t*>(to) = pack_halves<E>(left, right);
        } else {
          to[0] = from_float<E>(left);
          if (n + 1 < p.n) to[1] = from_float<E>(right);
        }
      }
  }
}

// codes and scales as svdq_quantize_int4 gives them; qweight uint8 [N, K'/2], wscales [N, K'/64]; lora_up [N, r];
// bias [N] -> [M, N] in the dtype of `down`
Tensor svdq_w4a4_gemm(const Tensor& codes, const Tensor& token_scales, const Tensor& down, const Tensor& units,
                      const Tensor& qweight, const Tensor& wscales, const Tensor& lora_up,
                      const std::optional<Tensor>& bias, bool is_unsigned) {
  constexpr const char* op = "svdq_w4a4_gemm";
  for (const Tensor& t : {codes, token_scales, down, qweight, wscales, lora_up}) check_dim(op, "an operand", t, 2);
  const int64_t m = codes.size(0), n = qweight.size(0), rank = lora_up.size(1), groups = wscales.size(1);
  const ScalarType type = down.scalar_type();
  check_that(type == ScalarType::BFloat16 || type == ScalarType::Half, op, "down in bfloat16 or float16");
  check_operand(op, "codes", codes, m, codes.size(1), ScalarType::Byte);
  check_that(codes.size(1) % (kGroup / 2) == 0, op, "codes in whole groups of 64 columns");
  check_operand(op, "token_scales", token_scales, codes.size(1) * 2 / kGroup, token_scales.size(1), ScalarType::Float);
  check_that(token_scales.size(1) >= m && token_scales.size(1) % 4 == 0, op,
             "a scale a token, in rows of a multiple of 4");
  check_operand(op, "qweight", qweight, n, groups * kGroup / 2, ScalarType::Byte);
  check_equal(op, "groups of codes and weight", groups, token_scales.size(0));
  check_operand(op, "down", down, m, blocks_of(rank, 16) * 16, type);
  check_operand(op, "lora_up", lora_up, n, rank, type);
  check_equal(op, "units size", m, units.numel());
  check_that(units.scalar_type() == ScalarType::Float && units.is_contiguous(), op, "units in float32, contiguous");
  check_that(rank <= 128, op, "a rank of at most 128");
  for (const Tensor& t : {codes, token_scales, qweight}) check_aligned(op, "codes, scales and qweight", t);
  if (bias) check_equal(op, "bias size", n, bias->numel());

  const Launch launch(codes);
  Tensor out = torch::stable::new_empty(down, {m, n});
  if (m == 0 || n == 0) return out;
  auto run = [&](auto element) {
    using E = decltype(element);
    const GemmArgs<E> args{data<unsigned char>(codes), data<float>(token_scales), data<unsigned char>(qweight),
                           floats(op, "wscales", wscales), data<E>(down), data<float>(units), data<E>(lora_up),
                           bias ? floats(op, "bias", *bias) : Floats{}, mutable_data<E>(out), m, n, codes.size(1),
                           qweight.size(1), token_scales.size(1), groups,
                           static_cast<int>(blocks_of(codes.size(1), kRowBytes)), static_cast<int>(rank),
                           static_cast<int>(down.size(1))};
    const dim3 grid(static_cast<unsigned>(blocks_of(m, kTile)), static_cast<unsigned>(blocks_of(n, kTile)));
    launch_kernel(is_unsigned ? w4a4_kernel<E, true> : w4a4_kernel<E, false>, grid, dim3(kThreads),
                  kStages * kStageBytes, launch.stream, args);
  };
  if (type == ScalarType::BFloat16) run(__nv_bfloat16());
  else run(__half());
  return out;
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_w4a4_gemm", TORCH_BOX(&triskele::cuda::svdq::svdq_w4a4_gemm)); }
