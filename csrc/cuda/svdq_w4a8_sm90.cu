// The 4-bit linear with int8 activations on Hopper, weights straight from their 4 bits:
//
//   y[m, n] = t[m] sum_g s[n, g] (sum over 64 columns of a[m, k] w[n, k])  +  down[m] . lora_up[n]  +  bias[n]
//
// The product runs transposed: weights are operand A of wgmma, out of registers, tokens operand B, out of shared
// memory. So a word of eight 4-bit codes becomes two registers of int8 by two masks and a shift, as 16 times its
// value (a nibble in the upper half of a byte is that), and a group's scale belongs to a row of accumulators: two
// scales a thread, no table. svdq_quantize_int8 stores a token's columns in the order that the masks take the word
// apart in.
//
// A block stays on its multiprocessor and walks over tiles of 128 channels x 192 tokens. One warp fetches 256 columns
// a stage by TMA, three stages deep: 48 KB of int8 codes, 16 KB of 4-bit weights. Two warpgroups multiply, 64 x 192
// each: the sum of 64 columns is exact in int32 registers, then goes into float registers by one conversion and one
// multiply-add, while the other warpgroup has the tensor cores. The low-rank branch comes through the same ring, 64
// ranks a stage, as a 16-bit product on the float registers. Why so, and what it should take: docs/cuda_linear.md.
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/svdq_hopper.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kChannels = 128;                       // of a tile
constexpr int kWarps = 8, kThreads = 128 + 32 * kWarps;   // a warpgroup that fetches, two that multiply
constexpr int kDepth = 256;                          // columns a stage
constexpr int kGroup = 64;                           // columns of an integer sum
constexpr int kStages = 3;
constexpr int kChannelBytes = kChannels * 128;       // 256 columns of 4-bit codes; also 64 ranks of lora_up
constexpr int kOutStride = 64 * 2 + 16;              // bytes of a token in a warpgroup's part: conflict-free both ways

// By the tokens of a tile: 192, or 64 where fewer tiles would leave multiprocessors without work.
template <int kTokens>
struct Shape {
  static constexpr int kSums = kTokens / 2;                 // accumulators a thread
  static constexpr int kHalfBytes = kTokens * 128;          // 128 columns of codes; also 64 ranks of `down`
  static constexpr int kTokenBytes = 2 * kHalfBytes;
  static constexpr int kStageBytes = kTokenBytes + kChannelBytes;
  static constexpr int kOutTokens = kTokens / 2;            // that leave together
  static constexpr int kOutBytes = kOutTokens * kOutStride;
  static constexpr int kScalesAt = kStages * kStageBytes + 2 * kOutBytes;
  static constexpr int kBarriersAt = kScalesAt + 2 * 2 * kTokens * 4;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
};
constexpr int64_t kMostRows = (int64_t{1} << 31) - 512;

// Scales in float32 or bfloat16, read without a branch: their upper and lower 16 bits, of which bfloat16 has the
// upper ones. Divided by 16 on the way: the codes carry it.
struct Scales {
  const unsigned char* bytes;
  int size;                            // of one
  uint32_t mask;                       // of the lower half: 0 where there is none
  __device__ __forceinline__ float read(const unsigned char* at) const {
    const uint32_t upper = __ldg(reinterpret_cast<const unsigned short*>(at + size - 2));
    const uint32_t lower = __ldg(reinterpret_cast<const unsigned short*>(at));
    return __uint_as_float(upper << 16 | (lower & mask)) * 0.0625f;
  }
};

template <class E>
struct GemmArgs {
  int m, n;
  int tiles_m, tiles_n;
  int steps, slabs, ranks;             // stages along K; stages of 64 ranks; ranks in multiples of 16
  int groups;                          // scales a channel
  Scales wscales;                      // [n, groups]
  const float *token_scales, *units;   // [m]
  Floats bias;                         // [n] or null
  E* out;                              // [m, n]
};

// Operand A of k-step p (32 columns) of a stage: eight codes of row r and of row r + 8, times 16. The first half of the
// step's columns are the even ones of the word, the second half the odd ones.
__device__ __forceinline__ void load_codes(uint32_t (&a)[4], const unsigned char* rows, int r, int q, int p) {
  const unsigned char* word = rows + swizzled_offset(r, 16 * p + 4 * q);
  const uint32_t upper = *reinterpret_cast<const uint32_t*>(word);
  const uint32_t lower = *reinterpret_cast<const uint32_t*>(word + 8 * 128);
  a[0] = upper << 4 & 0xf0f0f0f0u;
  a[1] = lower << 4 & 0xf0f0f0f0u;
  a[2] = upper & 0xf0f0f0f0u;
  a[3] = lower & 0xf0f0f0f0u;
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) w4a8_kernel(const GemmArgs<E> p, const __grid_constant__ Maps maps) {
  using S = Shape<kTokens>;
  constexpr int kSums = S::kSums, kOutTokens = S::kOutTokens, kStageBytes = S::kStageBytes;
  constexpr int kTokenBytes = S::kTokenBytes;
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + S::kBarriersAt);
  uint64_t* empty = full + kStages;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, phase ^= 1;
  };

  if (group == 0) {   // ---- fetch ----
    registers_shrink<24>();
    if (threadIdx.x != 0) return;
    for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
      const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
      for (int step = 0; step < p.steps + p.slabs; ++step, advance()) {
        unsigned char* to = shared + stage * kStageBytes;
        barrier_wait(empty + stage, phase ^ 1);
        if (step < p.steps) {
          barrier_arrive_expect(full + stage, kStageBytes);
          tma_load_2d(to, &maps.codes, full + stage, step * kDepth, tile.m * kTokens);
          tma_load_2d(to + S::kHalfBytes, &maps.codes, full + stage, step * kDepth + 128, tile.m * kTokens);
          tma_load_2d(to + kTokenBytes, &maps.weights, full + stage, step * (kDepth / 2), tile.n * kChannels);
        } else {
          barrier_arrive_expect(full + stage, S::kHalfBytes + kChannelBytes);
          tma_load_2d(to, &maps.down, full + stage, (step - p.steps) * 64, tile.m * kTokens);
          tma_load_2d(to + kTokenBytes, &maps.up, full + stage, (step - p.steps) * 64, tile.n * kChannels);
        }
      }
    }
    return;
  }

  // ---- multiply ----
  registers_grow<240>();
  const int own = threadIdx.x % 128, lane = own % 32, r = lane / 4, q = lane % 4;
  const int corner = (group - 1) * 64;                       // of this warpgroup's channels in the tile
  unsigned char* out = shared + kStages * kStageBytes + (group - 1) * S::kOutBytes;   // [half the tokens][64 channels]
  float* s_scale = reinterpret_cast<float*>(shared + S::kScalesAt) + (group - 1) * 2 * kTokens;
  float* s_unit = s_scale + kTokens;
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + stage);
  };
  for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
    const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
    const int m0 = tile.m * kTokens, channel = tile.n * kChannels + corner + own / 32 * 16 + r;
    // Past the last group and the last channel any scale will do: codes there are zero, results are not stored.
    const unsigned char* scales[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      scales[h] = p.wscales.bytes + int64_t(min(channel + 8 * h, p.n - 1)) * p.groups * p.wscales.size;

    int32_t sum[kSums];
    float y[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0, y[i] = 0;
    for (int step = 0; step < p.steps; ++step, advance()) {
      const unsigned char* at = shared + stage * kStageBytes;
      const unsigned char* rows = at + kTokenBytes + (corner + own / 32 * 16) * 128;
      barrier_wait(full + stage, phase);
      uint32_t a[2][4];
      load_codes(a[0], rows, r, q, 0);
      load_codes(a[1], rows, r, q, 1);
#pragma unroll
      for (int c = 0; c < kDepth / kGroup; ++c) {   // sum [64, tokens] = w [64, 64] @ a^T [64, tokens]
        wgmma_pin(sum);
        wgmma_fence();
        const unsigned char* tokens = at + c / 2 * S::kHalfBytes + c % 2 * 64;
        wgmma_s8_registers(sum, a[0], shared_descriptor(tokens, Major::kK), false);
        wgmma_s8_registers(sum, a[1], shared_descriptor(tokens + 32, Major::kK), true);
        wgmma_commit();
        const int at_group = min(step * (kDepth / kGroup) + c, p.groups - 1) * p.wscales.size;
        const float scale[2] = {p.wscales.read(scales[0] + at_group), p.wscales.read(scales[1] + at_group)};
        wgmma_wait<0>();
        wgmma_pin(sum);
        if (c + 1 < kDepth / kGroup) {   // for the next product, while this one's sums are added up
          load_codes(a[0], rows, r, q, 2 * c + 2);
          load_codes(a[1], rows, r, q, 2 * c + 3);
        } else {
          release();
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) y[i] += static_cast<float>(sum[i]) * scale[i / 2 % 2];
      }
    }

    // The tokens' scales, over the powers of two that `down` was divided by. The last tile's readers are past a
    // barrier.
    for (int t = own; t < kTokens; t += 128) {
      const bool inside = m0 + t < p.m;
      s_unit[t] = inside ? p.units[m0 + t] : 1.0f;
      s_scale[t] = inside ? p.token_scales[m0 + t] / p.units[m0 + t] : 0.0f;
    }
    named_barrier_sync(group, 128);
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float2 t = *reinterpret_cast<const float2*>(s_scale + 8 * j + 2 * q);
      y[4 * j] *= t.x;
      y[4 * j + 1] *= t.y;
      y[4 * j + 2] *= t.x;
      y[4 * j + 3] *= t.y;
    }
    for (int slab = 0; slab < p.slabs; ++slab, advance()) {   // y += lora_up [64, 64] @ down^T [64, tokens]
      const unsigned char* at = shared + stage * kStageBytes;
      barrier_wait(full + stage, phase);
      for (int k = 0; k < 4 && slab * 64 + k * 16 < p.ranks; ++k) {
        wgmma_pin(y);
        wgmma_fence();
        wgmma_shared<E, Major::kK, Major::kK>(y, shared_descriptor(at + kTokenBytes + corner * 128 + 32 * k, Major::kK),
                                              shared_descriptor(at + 32 * k, Major::kK), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(y);
      }
      release();
    }

    // Through shared memory, where rows become tokens: half of them at a time leave in 16-byte pieces.
    const float bias[2] = {p.bias.data != nullptr && channel < p.n ? p.bias[channel] : 0.0f,
                           p.bias.data != nullptr && channel + 8 < p.n ? p.bias[channel + 8] : 0.0f};
    const int n0 = tile.n * kChannels + corner;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kSums / 8; ++j) {
        const int t = 8 * j + 2 * q, i = 4 * (half * (kSums / 8) + j);
        const float2 unit = *reinterpret_cast<const float2*>(s_unit + half * kOutTokens + t);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          *reinterpret_cast<E*>(out + (t + e % 2) * kOutStride + (own / 32 * 16 + r + e / 2 * 8) * 2) =
              from_float<E>(y[i + e] * (e % 2 == 0 ? unit.x : unit.y) + bias[e / 2]);
      }
      named_barrier_sync(group, 128);
      for (int i = own; i < kOutTokens * 8; i += 128) {
        const int t = i / 8, c = i % 8 * 8;
        const int token = m0 + half * kOutTokens + t;
        if (token >= p.m || n0 + c >= p.n) continue;
        const unsigned char* from = out + t * kOutStride + c * 2;
        E* to = p.out + int64_t(token) * p.n + n0 + c;
        if (p.n % 8 == 0) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int e = 0; e < 8 && n0 + c + e < p.n; ++e) to[e] = reinterpret_cast<const E*>(from)[e];
        }
      }
      named_barrier_sync(group, 128);
    }
  }
}

// Whether tiles of 192 tokens finish sooner than tiles of 64, which have a third of the products but take 4/9 of the
// time: by the tiles that the busiest multiprocessor walks.
bool wide_tiles(int64_t m, int64_t tiles_n, int64_t processors) {
  const auto walked = [&](int64_t tokens) { return blocks_of(blocks_of(m, tokens) * tiles_n, processors); };
  return 9 * walked(192) <= 4 * walked(64);
}

// codes int8 [M, K''] with K'' in multiples of 256, token_scales and units [M], down [M, r up to 16] as
// svdq_quantize_int8 gives them; qweight uint8 [N, K'/2] of int4 and wscales [N, G] G = K'/64; lora_up [N, r], r in
// multiples of 8, in the dtype of `down`; bias [N] -> [M, N] in that dtype
Tensor svdq_w4a8_gemm(const Tensor& codes, const Tensor& token_scales, const Tensor& down, const Tensor& units,
                      const Tensor& qweight, const Tensor& wscales, const Tensor& lora_up,
                      const std::optional<Tensor>& bias) {
  constexpr const char* op = "svdq_w4a8_gemm";
  for (const Tensor& t : {codes, down, qweight, wscales, lora_up}) check_dim(op, "an operand", t, 2);
  const int64_t m = codes.size(0), depth = codes.size(1), n = qweight.size(0), rank = lora_up.size(1);
  const int64_t bytes = qweight.size(1), groups = wscales.size(1);
  const ScalarType type = down.scalar_type();
  check_that(type == ScalarType::BFloat16 || type == ScalarType::Half, op, "down in bfloat16 or float16");
  check_operand(op, "codes", codes, m, depth, ScalarType::Char);
  check_that(depth > 0 && depth % kDepth == 0, op, "codes' columns in multiples of 256");
  check_operand(op, "qweight", qweight, n, bytes, ScalarType::Byte);
  check_equal(op, "wscales rows", n, wscales.size(0));
  check_contiguous(op, "wscales", wscales);
  check_that(wscales.scalar_type() == ScalarType::Float || wscales.scalar_type() == ScalarType::BFloat16, op,
             "wscales in float32 or bfloat16");
  check_that(groups > 0 && bytes * 2 == groups * kGroup, op, "a scale for every 64 of qweight's columns");
  check_operand(op, "down", down, m, blocks_of(rank, 16) * 16, type);
  check_operand(op, "lora_up", lora_up, n, rank, type);
  check_equal(op, "lora_up columns modulo 8", int64_t{0}, rank % 8);
  for (const Tensor& t : {token_scales, units}) {
    check_equal(op, "values a token", m, t.numel());
    check_that(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, "token_scales and units in float32");
  }
  for (const Tensor& t : {codes, qweight, down, lora_up}) check_aligned(op, "operands", t);
  if (bias) check_equal(op, "bias size", n, bias->numel());
  check_that(m < kMostRows && n < kMostRows && depth < (int64_t{1} << 31), op, "sizes below 2^31 with a tile to spare");

  const Launch launch(codes);
  Tensor out = torch::stable::new_empty(down, {m, n});
  if (m == 0 || n == 0) return out;
  const TileType half = type == ScalarType::BFloat16 ? TileType::kBFloat16 : TileType::kFloat16;
  const int64_t tiles_n = blocks_of(n, kChannels), processors = multiprocessors(codes.get_device_index());
  const bool wide = wscales.scalar_type() == ScalarType::Float;
  const Scales scales{data<unsigned char>(wscales), wide ? 4 : 2, wide ? 0xffffu : 0u};
  auto run = [&](auto element, auto tokens) {
    using E = decltype(element);
    constexpr int kTokens = decltype(tokens)::value;
    Maps maps{};
    maps.codes = encode_tensor_map(rows_of(TileType::kInt8, codes, 1, 128, kTokens));
    maps.weights = encode_tensor_map(rows_of(TileType::kInt8, qweight, 1, 128, kChannels));
    if (rank > 0) {
      maps.down = encode_tensor_map(rows_of(half, down, 2, 64, kTokens));
      maps.up = encode_tensor_map(rows_of(half, lora_up, 2, 64, kChannels));
    }
    const int64_t tiles_m = blocks_of(m, kTokens), tiles = tiles_m * tiles_n;
    check_that(tiles < (int64_t{1} << 30), op, "fewer than 2^30 tiles");
    const dim3 grid(static_cast<unsigned>(std::min(tiles, processors)));
    const GemmArgs<E> args{static_cast<int>(m), static_cast<int>(n), static_cast<int>(tiles_m),
                           static_cast<int>(tiles_n), static_cast<int>(depth / kDepth),
                           static_cast<int>(blocks_of(rank, 64)), static_cast<int>(down.size(1)),
                           static_cast<int>(groups), scales, data<float>(token_scales), data<float>(units),
                           bias ? floats(op, "bias", *bias) : Floats{}, mutable_data<E>(out)};
    launch_kernel(w4a8_kernel<E, kTokens>, grid, dim3(kThreads), Shape<kTokens>::kSharedBytes, launch.stream, args,
                  maps);
  };
  auto by_tokens = [&](auto element) {
    if (wide_tiles(m, tiles_n, processors)) run(element, std::integral_constant<int, 192>());
    else run(element, std::integral_constant<int, 64>());
  };
  if (type == ScalarType::BFloat16) by_tokens(__nv_bfloat16());
  else by_tokens(__half());
  return out;
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_w4a8_gemm", TORCH_BOX(&triskele::cuda::svdq::svdq_w4a8_gemm)); }
