// The 4-bit linear with int8 activations on Hopper, weights straight from their 4 bits:
//
//   y[m, n] = t[m] unit[n] sum_g multiplier[n, g] (sum over 64 columns of a[m, k] w[n, k])  +  down[m] . lora_up[n]
//             +  bias[n]
//
// in integers up to the scales t[m] unit[n]: svdq_multipliers_sm80.cu makes the multipliers and bounds the sums.
//
// The product runs transposed: weights are operand A of wgmma, out of registers, tokens operand B, out of shared
// memory. So a lane has eight codes in a word that it loads, and makes two registers of int8 of it. svdq_quantize_int8
// stores a token's columns in the order that the word comes apart in. Two ways, for each 64 channels by their flag:
//
//   multiply_before   code * multiplier is made in the register (it fits int8), and one chain of products over all of K
//                     does the rest: 7 instructions for 8 codes, none for an output
//   multiply_after    the sum of 64 columns goes into a second set of registers by one integer multiply-add an output,
//                     while the other warpgroup has the tensor cores
//
// Where both can be had they give the same integers, so the same bits.
//
// A block stays on its multiprocessor and walks over tiles of 128 channels x 192 tokens. One warp fetches 256 columns
// a stage by TMA, three stages deep: 48 KB of int8 codes, 16 KB of 4-bit weights. Two warpgroups multiply, 64 x 192
// each. The low-rank branch comes through the same ring, 64 ranks a stage, as a 16-bit product on the sums as floats.
// Why so, and what it should take: docs/cuda_linear.md.
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/svdq_hopper.cuh"

namespace triskele::cuda::svdq {
namespace {

constexpr int kChannels = 128;                       // of a tile
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

template <class E>
struct GemmArgs {
  int m, n;
  int tiles_m, tiles_n;
  int steps, slabs, ranks;             // stages along K; stages of 64 ranks; ranks in multiples of 16
  const int16_t* multipliers;          // [n, 4 steps]
  const float* channel_units;          // [n]
  const int* fits;                     // [n up to 64 / 64]
  const float *token_scales, *units;   // [m]
  Floats bias;                         // [n] or null
  E* out;                              // [m, n]
};

// Four codes, nibbles in the lower halves of the bytes, times `by` as int8. A code plus eight is 0 … 15; the sum over i
// of 256^i (code + 8) by, less 8 by and plus 128 in each byte, has digits 0 … 255, so none runs into the next.
__device__ __forceinline__ uint32_t widened(uint32_t word, uint32_t by, uint32_t offset) {
  return (((word & 0x0f0f0f0fu) ^ 0x08080808u) * by + offset) ^ 0x80808080u;
}

// Where a lane finds its operands: rows r and r + 8 of its warp's 16 channels.
struct Lane {
  int r, q;
  int corner;                          // of the warp's channels in the tile
  const int16_t* multipliers[2];
};

// Those of a stage's four groups for the lane's two channels.
struct Multipliers {
  uint2 of[2];
  __device__ __forceinline__ Multipliers(const Lane& lane, int step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) of[h] = __ldg(reinterpret_cast<const uint2*>(lane.multipliers[h]) + step);
  }
  __device__ __forceinline__ int at(int h, int c) const {
    const uint32_t pair = c < 2 ? of[h].x : of[h].y;
    return static_cast<int>(c % 2 == 0 ? pair << 16 : pair) >> 16;
  }
};

// Operand A of k-step p (32 columns) of a stage: eight codes of row r times by[0], of row r + 8 times by[1]. The first
// half of the step's columns are the even ones of the word, the second half the odd ones.
__device__ __forceinline__ void load_codes(uint32_t (&a)[4], const unsigned char* rows, const Lane& lane, int p,
                                           int by0, int by1) {
  const unsigned char* word = rows + swizzled_offset(lane.r, 16 * p + 4 * lane.q);
  const uint32_t upper = *reinterpret_cast<const uint32_t*>(word);
  const uint32_t lower = *reinterpret_cast<const uint32_t*>(word + 8 * 128);
  const uint32_t times[2] = {static_cast<uint32_t>(by0), static_cast<uint32_t>(by1)};
  const uint32_t offset[2] = {0x80808080u - 0x08080808u * times[0], 0x80808080u - 0x08080808u * times[1]};
  a[0] = widened(upper, times[0], offset[0]);
  a[1] = widened(lower, times[1], offset[1]);
  a[2] = widened(upper >> 4, times[0], offset[0]);
  a[3] = widened(lower >> 4, times[1], offset[1]);
}

// Group c of a stage: sum [64, tokens] (+)= a [64, 64] @ tokens^T [64, tokens]
template <int kTokens>
__device__ __forceinline__ void multiply(int32_t (&sum)[kTokens / 2], const uint32_t (&a)[2][4],
                                         const unsigned char* at, int c, bool accumulate) {
  const unsigned char* tokens = at + c / 2 * Shape<kTokens>::kHalfBytes + c % 2 * 64;
  wgmma_fence();
  wgmma_s8_registers(sum, a[0], shared_descriptor(tokens, Major::kK), accumulate);
  wgmma_s8_registers(sum, a[1], shared_descriptor(tokens + 32, Major::kK), true);
  wgmma_commit();
}

// total [64, tokens] += (codes multipliers) [64, K] @ tokens^T [K, tokens]. A group's operand is made while the group
// before is multiplied.
template <int kTokens, class Ring>
__device__ __forceinline__ void multiply_before(int32_t (&total)[kTokens / 2], Ring& ring, int steps,
                                                const Lane& lane) {
  using S = Shape<kTokens>;
  Multipliers next(lane, 0);
  int before = 0;
  wgmma_pin(total);
  for (int step = 0; step < steps; ++step, ring.advance()) {
    const Multipliers by = next;
    next = Multipliers(lane, min(step + 1, steps - 1));
    const unsigned char* at = ring.at();
    ring.wait();
#pragma unroll
    for (int c = 0; c < kDepth / kGroup; ++c) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        load_codes(a[k], at + S::kTokenBytes + lane.corner * 128, lane, 2 * c + k, by.at(0, c), by.at(1, c));
      multiply<kTokens>(total, a, at, c, true);
      wgmma_wait<1>();
      if (c == 0 && step > 0) ring.release(before);   // its last group is through
    }
    before = ring.stage;
  }
  wgmma_wait<0>();
  wgmma_pin(total);
  ring.release(before);
}

// The same: total += sum over groups of multiplier (codes [64, 64] @ tokens^T [64, tokens])
template <int kTokens, class Ring>
__device__ __forceinline__ void multiply_after(int32_t (&total)[kTokens / 2], Ring& ring, int steps, const Lane& lane) {
  using S = Shape<kTokens>;
  int32_t sum[S::kSums];
#pragma unroll
  for (int i = 0; i < S::kSums; ++i) sum[i] = 0;
  for (int step = 0; step < steps; ++step, ring.advance()) {
    const Multipliers by(lane, step);
    const unsigned char* at = ring.at();
    const unsigned char* rows = at + S::kTokenBytes + lane.corner * 128;
    ring.wait();
    uint32_t a[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) load_codes(a[k], rows, lane, k, 1, 1);
#pragma unroll
    for (int c = 0; c < kDepth / kGroup; ++c) {
      wgmma_pin(sum);
      multiply<kTokens>(sum, a, at, c, false);
      wgmma_wait<0>();
      wgmma_pin(sum);
      if (c + 1 < kDepth / kGroup) {   // for the next product, while this one's sums are added up
#pragma unroll
        for (int k = 0; k < 2; ++k) load_codes(a[k], rows, lane, 2 * c + 2 + k, 1, 1);
      } else {
        ring.release(ring.stage);
      }
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) total[i] += sum[i] * by.at(i / 2 % 2, c);
    }
  }
}

// Blocks of a cluster have the same tokens: each loads its share of them into all, and its own weights.
template <class E, int kTokens, int kCluster>
__global__ void __launch_bounds__(kThreads, 1) w4a8_kernel(const GemmArgs<E> p, const __grid_constant__ Maps maps) {
  using S = Shape<kTokens>;
  constexpr int kSums = S::kSums, kOutTokens = S::kOutTokens, kStageBytes = S::kStageBytes;
  constexpr int kTokenBytes = S::kTokenBytes;
  TRISKELE_DYNAMIC_SHARED(unsigned char, shared);
  const int group = threadIdx.x / 128;
  const Walk<kCluster> walk(p.tiles_m, p.tiles_n);
  Ring<kStages, kStageBytes, kCluster> ring(shared, shared + S::kBarriersAt);

  if (group == 0) {   // ---- fetch ----
    const auto load_tokens = [&](unsigned char* to, const CUtensorMap* map, uint64_t* full, int column, int token) {
      constexpr int kShare = kTokens / kCluster;
      if constexpr (kCluster == 1) {
        tma_load_2d(to, map, full, column, token);
      } else {
        const int first = walk.rank() * kShare;
        tma_load_2d_cluster(to + first * 128, map, full, column, token + first, (1u << kCluster) - 1);
      }
    };
    fetch(ring, walk, p.steps + p.slabs, [&](Tile tile, int step) {
      unsigned char* to = ring.at();
      if (step < p.steps) {
        uint64_t* full = ring.open(kStageBytes);
        load_tokens(to, &maps.codes, full, step * kDepth, tile.m * kTokens);
        load_tokens(to + S::kHalfBytes, &maps.codes, full, step * kDepth + 128, tile.m * kTokens);
        tma_load_2d(to + kTokenBytes, &maps.weights, full, step * (kDepth / 2), tile.n * kChannels);
      } else {
        uint64_t* full = ring.open(S::kHalfBytes + kChannelBytes);
        load_tokens(to, &maps.down, full, (step - p.steps) * 64, tile.m * kTokens);
        tma_load_2d(to + kTokenBytes, &maps.up, full, (step - p.steps) * 64, tile.n * kChannels);
      }
    });
    return;
  }

  // ---- multiply ----
  registers_grow<240>();
  const int own = threadIdx.x % 128, r = own % 32 / 4, q = own % 4;
  const int corner = (group - 1) * 64;                       // of this warpgroup's channels in the tile
  unsigned char* out = shared + kStages * kStageBytes + (group - 1) * S::kOutBytes;   // [half the tokens][64 channels]
  float* s_scale = reinterpret_cast<float*>(shared + S::kScalesAt) + (group - 1) * 2 * kTokens;
  float* s_unit = s_scale + kTokens;
  for (int index = walk.first(); index < walk.end(); index += walk.stride()) {
    const Tile tile = walk.at(index);
    const int m0 = tile.m * kTokens, channel = tile.n * kChannels + corner + own / 32 * 16 + r;
    // Past the last channel any multiplier will do: codes there are zero, results are not stored.
    Lane lane{r, q, corner + own / 32 * 16, {}};
#pragma unroll
    for (int h = 0; h < 2; ++h)
      lane.multipliers[h] = p.multipliers + int64_t(min(channel + 8 * h, p.n - 1)) * (p.steps * (kDepth / kGroup));
    int32_t total[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0;
    if (p.fits[min(tile.n * kChannels + corner, p.n - 1) / 64]) multiply_before<kTokens>(total, ring, p.steps, lane);
    else multiply_after<kTokens>(total, ring, p.steps, lane);

    // The tokens' scales, over the powers of two that `down` was divided by. The last tile's readers are past a
    // barrier.
    for (int t = own; t < kTokens; t += 128) {
      const bool inside = m0 + t < p.m;
      s_unit[t] = inside ? p.units[m0 + t] : 1.0f;
      s_scale[t] = inside ? p.token_scales[m0 + t] / p.units[m0 + t] : 0.0f;
    }
    const float channel_unit[2] = {p.channel_units[min(channel, p.n - 1)], p.channel_units[min(channel + 8, p.n - 1)]};
    named_barrier_sync(group, 128);
    float y[kSums];
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float2 t = *reinterpret_cast<const float2*>(s_scale + 8 * j + 2 * q);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        y[4 * j + e] = static_cast<float>(total[4 * j + e]) * channel_unit[e / 2] * (e % 2 == 0 ? t.x : t.y);
    }
    for (int slab = 0; slab < p.slabs; ++slab, ring.advance()) {   // y += lora_up [64, 64] @ down^T [64, tokens]
      const unsigned char* at = ring.at();
      ring.wait();
      for (int k = 0; k < 4 && slab * 64 + k * 16 < p.ranks; ++k) {
        wgmma_pin(y);
        wgmma_fence();
        wgmma_shared<E, Major::kK, Major::kK>(y, shared_descriptor(at + kTokenBytes + corner * 128 + 32 * k, Major::kK),
                                              shared_descriptor(at + 32 * k, Major::kK), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(y);
      }
      ring.release(ring.stage);
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
  ring.leave();
}

// Whether tiles of 192 tokens finish sooner than tiles of 64, by the tiles that the busiest multiprocessor walks. The
// small ones have a third of the products, but L2 lets them take 2/3 of the time, half of it where blocks are alone.
bool wide_tiles(int64_t m, int64_t tiles_n, int64_t processors, int64_t cluster) {
  const int64_t places = std::max(processors / cluster, int64_t{1});
  const int64_t wide = blocks_of(blocks_of(m, 192) * blocks_of(tiles_n, cluster), places);
  return (cluster > 1 ? 3 : 4) * wide <= 2 * blocks_of(blocks_of(m, 64) * tiles_n, processors);
}

// codes int8 [M, K''] with K'' in multiples of 256, token_scales and units [M], down [M, r up to 16] as
// svdq_quantize_int8 gives them; qweight uint8 [N, K'/2] of int4; multipliers [N, K''/64], channel_units [N] and
// fits as svdq_multipliers makes them; lora_up [N, r], r in multiples of 8, in the dtype of `down`; bias [N] -> [M, N]
// in that dtype. clusters: whether tiles of 192 tokens go in pairs that share them, where few of the pairs' tiles would
// lie past the end
Tensor svdq_w4a8_gemm(const Tensor& codes, const Tensor& token_scales, const Tensor& down, const Tensor& units,
                      const Tensor& qweight, const Tensor& multipliers, const Tensor& channel_units,
                      const Tensor& fits, const Tensor& lora_up, const std::optional<Tensor>& bias,
                      bool clusters) {
  constexpr const char* op = "svdq_w4a8_gemm";
  for (const Tensor& t : {codes, down, qweight, multipliers, lora_up}) check_dim(op, "an operand", t, 2);
  const int64_t m = codes.size(0), depth = codes.size(1), n = qweight.size(0), rank = lora_up.size(1);
  const int64_t bytes = qweight.size(1);
  const ScalarType type = down.scalar_type();
  check_that(type == ScalarType::BFloat16 || type == ScalarType::Half, op, "down in bfloat16 or float16");
  check_operand(op, "codes", codes, m, depth, ScalarType::Char);
  check_that(depth > 0 && depth % kDepth == 0, op, "codes' columns in multiples of 256");
  check_operand(op, "qweight", qweight, n, bytes, ScalarType::Byte);
  check_that(bytes * 2 > depth - kDepth && bytes * 2 <= depth, op, "qweight with the columns of codes");
  check_operand(op, "multipliers", multipliers, n, depth / kGroup, ScalarType::Short);
  check_equal(op, "channel_units size", n, channel_units.numel());
  check_equal(op, "fits size", blocks_of(n, 64), fits.numel());
  check_that(channel_units.scalar_type() == ScalarType::Float && channel_units.is_contiguous(), op,
             "channel_units in float32");
  check_that(fits.scalar_type() == ScalarType::Int && fits.is_contiguous(), op, "fits in int32");
  check_operand(op, "down", down, m, blocks_of(rank, 16) * 16, type);
  check_operand(op, "lora_up", lora_up, n, rank, type);
  check_equal(op, "lora_up columns modulo 8", int64_t{0}, rank % 8);
  for (const Tensor& t : {token_scales, units}) {
    check_equal(op, "values a token", m, t.numel());
    check_that(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, "token_scales and units in float32");
  }
  for (const Tensor& t : {codes, qweight, multipliers, down, lora_up}) check_aligned(op, "operands", t);
  if (bias) check_equal(op, "bias size", n, bias->numel());
  check_that(m < kMostRows && n < kMostRows && depth < (int64_t{1} << 31), op, "sizes below 2^31 with a tile to spare");

  const Launch launch(codes);
  Tensor out = torch::stable::new_empty(down, {m, n});
  if (m == 0 || n == 0) return out;
  const TileType half = type == ScalarType::BFloat16 ? TileType::kBFloat16 : TileType::kFloat16;
  const int64_t tiles_n = blocks_of(n, kChannels), processors = multiprocessors(codes.get_device_index());
  auto run = [&](auto element, auto tokens, auto together) {
    using E = decltype(element);
    constexpr int kTokens = decltype(tokens)::value, kCluster = decltype(together)::value;
    Maps maps{};
    maps.codes = encode_tensor_map(rows_of(TileType::kInt8, codes, 1, 128, kTokens / kCluster));
    maps.weights = encode_tensor_map(rows_of(TileType::kInt8, qweight, 1, 128, kChannels));
    if (rank > 0) {
      maps.down = encode_tensor_map(rows_of(half, down, 2, 64, kTokens / kCluster));
      maps.up = encode_tensor_map(rows_of(half, lora_up, 2, 64, kChannels));
    }
    const int64_t tiles_m = blocks_of(m, kTokens), places = std::max(processors / kCluster, int64_t{1});
    check_that(tiles_m * tiles_n < (int64_t{1} << 30), op, "fewer than 2^30 tiles");
    const dim3 grid(static_cast<unsigned>(kCluster * std::min(tiles_m * blocks_of(tiles_n, kCluster), places)));
    const GemmArgs<E> args{static_cast<int>(m), static_cast<int>(n), static_cast<int>(tiles_m),
                           static_cast<int>(tiles_n), static_cast<int>(depth / kDepth),
                           static_cast<int>(blocks_of(rank, 64)), static_cast<int>(down.size(1)),
                           data<int16_t>(multipliers), data<float>(channel_units), data<int>(fits),
                           data<float>(token_scales), data<float>(units),
                           bias ? floats(op, "bias", *bias) : Floats{}, mutable_data<E>(out)};
    constexpr auto kernel = &w4a8_kernel<E, kTokens, kCluster>;
    constexpr int kShared = Shape<kTokens>::kSharedBytes;
    if constexpr (kCluster > 1)
      launch_clusters(kCluster, kernel, grid, dim3(kThreads), kShared, launch.stream, args, maps);
    else
      launch_kernel(kernel, grid, dim3(kThreads), kShared, launch.stream, args, maps);
  };
  const bool pairs = clusters && (tiles_n % 2 == 0 || tiles_n > 8);
  auto by_tokens = [&](auto element) {
    using std::integral_constant;
    if (!wide_tiles(m, tiles_n, processors, pairs ? 2 : 1))
      run(element, integral_constant<int, 64>(), integral_constant<int, 1>());
    else if (pairs) run(element, integral_constant<int, 192>(), integral_constant<int, 2>());
    else run(element, integral_constant<int, 192>(), integral_constant<int, 1>());
  };
  if (type == ScalarType::BFloat16) by_tokens(__nv_bfloat16());
  else by_tokens(__half());
  return out;
}

}  // namespace
}  // namespace triskele::cuda::svdq

TRISKELE_CUDA_OPS(m) { m.impl("svdq_w4a8_gemm", TORCH_BOX(&triskele::cuda::svdq::svdq_w4a8_gemm)); }
