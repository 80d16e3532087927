// The 4-bit linear with int8 activations on Hopper: int8 codes times weights that svdq_widen has just made 8 bits
// wide, by wgmma, with one scale a token and one a (channel, chunk of 64 or 256 columns):
//
//   y[m, n] = t[m] sum_c S[c, n] (sum over chunk c of a[m, k] w[n, k])  +  down[m] . lora_up[n]  +  bias[n]
//
// A block stays on its multiprocessor and walks over 128 x 192 tiles of y. One warp fetches: a stage is 128 columns
// of both operands and the chunks' scales, by TMA, in a ring of four. Two warpgroups multiply, 64 x 192 each: a
// chunk's sum is exact in int32 registers, then goes into float registers by one conversion and one multiply-add,
// while the other warpgroup has the tensor cores. The low-rank branch comes through the same ring, 64 ranks a stage,
// as a 16-bit product on the float registers. Why these sizes, and what they should take: docs/cuda_linear.md.
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/svdq_hopper.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kTokens = 128;                         // of a tile
constexpr int kDepth = 128;                          // columns a stage: bytes of a swizzled row
constexpr int kStages = 4;
constexpr int kTokenBytes = kTokens * kDepth;

// By the columns of a chunk. Twice as many integer registers as sums would not fit beside 192 channels where a scale
// comes every 64 columns.
template <int kChunk>
struct Shape {
  static constexpr int kChannels = kChunk == 64 ? 128 : 192;       // of a tile
  static constexpr int kSums = kChannels / 2;                      // accumulators a thread
  static constexpr int kScaleRows = kChunk == 64 ? 2 : 1;          // chunks that a stage brings the scales of
  static constexpr int kChannelBytes = kChannels * kDepth;
  static constexpr int kScaleBytes = kChannels * 4 * kScaleRows;
  static constexpr int kStageBytes = kTokenBytes + kChannelBytes + 1024;
  static constexpr int kOutStride = kChannels * 2 + 16;            // bytes: rows shift by four banks
  static constexpr int kOutBytes = 16 * kOutStride;                // a warp's part of the tile
  static constexpr int kSharedBytes = kStages * kStageBytes + kWarps * kOutBytes + 2 * kStages * 8;
};

template <class E>
struct GemmArgs {
  int64_t m, n;
  int tiles_m, tiles_n;
  int steps, slabs, ranks;         // stages along K; stages of 64 ranks; ranks in multiples of 16
  const float *token_scales, *units;   // [m]
  Floats bias;                     // [n] or null
  E* out;                          // [m, n]
};

// y += S * sum: channels 8 j + 2 q and the next of each block of eight
template <int kSums>
__device__ __forceinline__ void promote(float (&y)[kSums], const int32_t (&sum)[kSums], const float* scales, int q) {
#pragma unroll
  for (int j = 0; j < kSums / 4; ++j) {
    const float2 s = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * q);
    y[4 * j] += static_cast<float>(sum[4 * j]) * s.x;
    y[4 * j + 1] += static_cast<float>(sum[4 * j + 1]) * s.y;
    y[4 * j + 2] += static_cast<float>(sum[4 * j + 2]) * s.x;
    y[4 * j + 3] += static_cast<float>(sum[4 * j + 3]) * s.y;
  }
}

// sum (+)= a [64, 32 Count] @ w^T [32 Count, channels], from k-step `first` of the stage on
template <int Count, int kSums>
__device__ __forceinline__ void multiply(int32_t (&sum)[kSums], const unsigned char* a, const unsigned char* w,
                                         int first, bool accumulate) {
  wgmma_pin(sum);
  wgmma_fence();
#pragma unroll
  for (int k = first; k < first + Count; ++k)
    wgmma_s8_shared(sum, shared_descriptor(a + 32 * k, Major::kK), shared_descriptor(w + 32 * k, Major::kK),
                    accumulate || k > first);
  wgmma_commit();
}

// kChunk: columns that share a scale, 64 or 256.
template <class E, int kChunk>
__global__ void __launch_bounds__(kThreads, 1) w8a8_kernel(const GemmArgs<E> p, const __grid_constant__ Maps maps) {
  using S = Shape<kChunk>;
  constexpr int kSums = S::kSums, kStageBytes = S::kStageBytes, kScalesAt = kTokenBytes + S::kChannelBytes;
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Walk<1> walk(p.tiles_m, p.tiles_n);
  Ring<kStages, kStageBytes> ring(shared, shared + kStages * kStageBytes + kWarps * S::kOutBytes);

  if (group == 0) {   // ---- fetch ----
    fetch(ring, walk, p.steps + p.slabs, [&](Tile tile, int step) {
      unsigned char* to = ring.at();
      if (step < p.steps) {
        uint64_t* full = ring.open(kScalesAt + S::kScaleBytes);
        tma_load_2d(to, &maps.codes, full, step * kDepth, tile.m * kTokens);
        tma_load_2d(to + kTokenBytes, &maps.weights, full, step * kDepth, tile.n * S::kChannels);
        tma_load_2d(to + kScalesAt, &maps.scales, full, tile.n * S::kChannels, kChunk == 64 ? step * 2 : step / 2);
      } else {
        uint64_t* full = ring.open(kScalesAt);
        tma_load_2d(to, &maps.down, full, (step - p.steps) * 64, tile.m * kTokens);
        tma_load_2d(to + kTokenBytes, &maps.up, full, (step - p.steps) * 64, tile.n * S::kChannels);
      }
    });
    return;
  }

  // ---- multiply ----
  registers_grow<240>();
  const int r = lane / 4, q = lane % 4, row = (warp - 4) * 16;   // this thread's rows of the tile: row + r, row + r + 8
  const int a_at = (group - 1) * 64 * kDepth;
  unsigned char* out = shared + kStages * kStageBytes + (warp - 4) * S::kOutBytes;
  for (int index = walk.first(); index < walk.end(); index += walk.stride()) {
    const Tile tile = walk.at(index);
    const int64_t token = int64_t(tile.m) * kTokens + row + r, n0 = int64_t(tile.n) * S::kChannels;
    int32_t sum[kSums];
    float y[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0, y[i] = 0;

    if constexpr (kChunk == 256) {
      for (int step = 0; step < p.steps; step += 2) {   // an even number of stages: K is padded to 256
        const int before = ring.stage;
        const unsigned char* at = ring.at();
        ring.wait();
        multiply<4>(sum, at + a_at, at + kTokenBytes, 0, false);
        ring.advance();
        at = ring.at();
        ring.wait();
        multiply<4>(sum, at + a_at, at + kTokenBytes, 0, true);
        wgmma_wait<1>();
        ring.release(before);
        wgmma_wait<0>();
        wgmma_pin(sum);
        promote(y, sum, reinterpret_cast<const float*>(at + kScalesAt), q);
        ring.release(ring.stage);
        ring.advance();
      }
    } else {
      for (int step = 0; step < p.steps; ++step, ring.advance()) {
        const unsigned char* at = ring.at();
        ring.wait();
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          multiply<2>(sum, at + a_at, at + kTokenBytes, chunk * 2, false);
          wgmma_wait<0>();
          wgmma_pin(sum);
          promote(y, sum, reinterpret_cast<const float*>(at + kScalesAt) + chunk * S::kChannels, q);
        }
        ring.release(ring.stage);
      }
    }

    // The token's scale, over the power of two that `down` was divided by.
    const bool upper = token < p.m, lower = token + 8 < p.m;
    const float unit[2] = {upper ? p.units[token] : 1.0f, lower ? p.units[token + 8] : 1.0f};
    const float scale[2] = {upper ? p.token_scales[token] / unit[0] : 0.0f,
                            lower ? p.token_scales[token + 8] / unit[1] : 0.0f};
#pragma unroll
    for (int i = 0; i < kSums; ++i) y[i] *= scale[i / 2 % 2];
    for (int slab = 0; slab < p.slabs; ++slab, ring.advance()) {   // y += down [64, 64] @ lora_up^T [64, 192]
      const unsigned char* at = ring.at();
      ring.wait();
      for (int k = 0; k < 4 && slab * 64 + k * 16 < p.ranks; ++k) {
        wgmma_pin(y);
        wgmma_fence();
        wgmma_shared<E, Major::kK, Major::kK>(y, shared_descriptor(at + a_at + 32 * k, Major::kK),
                                              shared_descriptor(at + kTokenBytes + 32 * k, Major::kK), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(y);
      }
      ring.release(ring.stage);
    }

    // Through shared memory, so that rows leave in 16-byte pieces.
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const int64_t n = n0 + 8 * j + 2 * q;
      const float left = p.bias.data != nullptr && n < p.n ? p.bias[n] : 0.0f;
      const float right = p.bias.data != nullptr && n + 1 < p.n ? p.bias[n + 1] : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t*>(out + (r + 8 * h) * S::kOutStride + (8 * j + 2 * q) * 2) =
            pack_halves<E>(y[4 * j + 2 * h] * unit[h] + left, y[4 * j + 2 * h + 1] * unit[h] + right);
    }
    __syncwarp();
    constexpr int kPieces = S::kChannels / 8;
    const int64_t first = int64_t(tile.m) * kTokens + row;
    for (int i = lane; i < 16 * kPieces; i += 32) {
      const int t = i / kPieces, c = i % kPieces * 8;
      if (first + t >= p.m || n0 + c >= p.n) continue;
      const unsigned char* from = out + t * S::kOutStride + c * 2;
      E* to = p.out + (first + t) * p.n + n0 + c;
      if (p.n % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < 8 && n0 + c + e < p.n; ++e) to[e] = reinterpret_cast<const E*>(from)[e];
      }
    }
    __syncwarp();
  }
}

// codes int8 [M, K'] with K' in multiples of 256, token_scales and units [M], down [M, r up to 16] as
// svdq_quantize_int8 gives them; weights int8 [N, >= K'] and scales [chunks, N up to 4] as svdq_widen does; lora_up
// [N, r], r in multiples of 8, in the dtype of `down`; bias [N] -> [M, N] in that dtype
Tensor svdq_w8a8_gemm(const Tensor& codes, const Tensor& token_scales, const Tensor& down, const Tensor& units,
                      const Tensor& weights, const Tensor& scales, const Tensor& lora_up,
                      const std::optional<Tensor>& bias) {
  constexpr const char* op = "svdq_w8a8_gemm";
  for (const Tensor& t : {codes, down, weights, scales, lora_up}) check_dim(op, "an operand", t, 2);
  const int64_t m = codes.size(0), depth = codes.size(1), n = weights.size(0), rank = lora_up.size(1);
  const ScalarType type = down.scalar_type();
  check_that(type == ScalarType::BFloat16 || type == ScalarType::Half, op, "down in bfloat16 or float16");
  check_operand(op, "codes", codes, m, depth, ScalarType::Char);
  check_that(depth > 0 && depth % 256 == 0, op, "codes' columns in multiples of 256");
  check_operand(op, "weights", weights, n, weights.size(1), ScalarType::Char);
  check_that(weights.size(1) >= depth && weights.size(1) % 256 == 0, op, "weights with the columns of codes");
  check_operand(op, "scales", scales, scales.size(0), blocks_of(n, 4) * 4, ScalarType::Float);
  const int64_t chunk = scales.size(0) > 0 ? weights.size(1) / scales.size(0) : 0;
  check_that(chunk == 64 || chunk == 256, op, "scales for chunks of 64 or 256 columns");
  check_operand(op, "down", down, m, blocks_of(rank, 16) * 16, type);
  check_operand(op, "lora_up", lora_up, n, rank, type);
  check_equal(op, "lora_up columns modulo 8", int64_t{0}, rank % 8);
  for (const Tensor& t : {token_scales, units}) {
    check_equal(op, "values a token", m, t.numel());
    check_that(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, "token_scales and units in float32");
  }
  for (const Tensor& t : {codes, weights, scales, down, lora_up}) check_aligned(op, "operands", t);
  if (bias) check_equal(op, "bias size", n, bias->numel());
  check_that(m < (int64_t{1} << 31) && n < (int64_t{1} << 31) && depth < (int64_t{1} << 31), op, "sizes below 2^31");

  const Launch launch(codes);
  Tensor out = torch::stable::new_empty(down, {m, n});
  if (m == 0 || n == 0) return out;
  const int64_t chunks = scales.size(0);
  auto run = [&](auto element, auto columns) {
    using E = decltype(element);
    using S = Shape<decltype(columns)::value>;
    const TileType half = type == ScalarType::BFloat16 ? TileType::kBFloat16 : TileType::kFloat16;
    Maps maps{};
    maps.codes = encode_tensor_map(rows_of(TileType::kInt8, codes, 1, kDepth, kTokens));
    maps.weights = encode_tensor_map(rows_of(TileType::kInt8, weights, 1, kDepth, S::kChannels));
    TileSource source = rows_of(TileType::kFloat32, scales, 4, S::kChannels, S::kScaleRows);
    source.swizzled = false;
    maps.scales = encode_tensor_map(source);
    if (rank > 0) {
      maps.down = encode_tensor_map(rows_of(half, down, 2, 64, kTokens));
      maps.up = encode_tensor_map(rows_of(half, lora_up, 2, 64, S::kChannels));
    }
    const int64_t tiles_m = blocks_of(m, kTokens), tiles_n = blocks_of(n, S::kChannels), tiles = tiles_m * tiles_n;
    check_that(tiles < (int64_t{1} << 30), op, "fewer than 2^30 tiles");
    const GemmArgs<E> args{m, n, static_cast<int>(tiles_m), static_cast<int>(tiles_n), static_cast<int>(depth / kDepth),
                           static_cast<int>(blocks_of(rank, 64)), static_cast<int>(down.size(1)),
                           data<float>(token_scales), data<float>(units), bias ? floats(op, "bias", *bias) : Floats{},
                           mutable_data<E>(out)};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors(codes.get_device_index()))));
    launch_kernel(w8a8_kernel<E, decltype(columns)::value>, grid, dim3(kThreads), S::kSharedBytes, launch.stream,
                  args, maps);
  };
  auto by_chunk = [&](auto element) {
    if (weights.size(1) / chunks == 64) run(element, std::integral_constant<int, 64>());
    else run(element, std::integral_constant<int, 256>());
  };
  if (type == ScalarType::BFloat16) by_chunk(__nv_bfloat16());
  else by_chunk(__half());
  return out;
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_w8a8_gemm", TORCH_BOX(&triskele::cuda::svdq::svdq_w8a8_gemm)); }
