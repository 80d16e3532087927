// Around the products of svdq_planes.h: tokens packed into tiles, and the way from the integer sums to the output.
#pragma once
#if defined(__AMX_INT8__)
#include "cpu/tiles.h"
#include "cpu/svdq_fixed.h"

namespace triskele::TRISKELE_LEVEL::svdq {

// A block of tokens: codes [ceil(tiles / 2), Kp / 64, 2, 16, 64] (an odd last tile without the 2), and the low-rank
// branch's projections as A tiles of three bfloat16 planes [tiles, 3, ranks / 32, 16, 32].
struct Tokens {
  Tokens(const Gemm& p, int64_t most, bool with_codes);
  int64_t row = -1, rows = 0;
  Buffer<int8_t> codes;
  Buffer<uint16_t> down;
  int64_t tiles() const { return (rows + kSideRows - 1) / kSideRows; }
};

// `tiles` of K, or fewer, or one group's: no group is cut, since its even and odd columns are written together.
inline int64_t whole_groups(const Gemm& p, int64_t tiles) {
  const int64_t group = p.group / kTileColumns;
  return std::max(group, tiles / group * group);
}

inline int64_t rank_steps(const Gemm& p) { return (p.rank + tile::kDepth - 1) / tile::kDepth; }

inline Tokens::Tokens(const Gemm& p, int64_t most, bool with_codes)
    : codes(buffer<int8_t>(with_codes ? most * p.padded : 0)),
      down(buffer<uint16_t>(most * 3 * rank_steps(p) * tile::kDepth)) {}

inline void pack_down(const Gemm& p, int64_t row, int64_t rows, Tokens& to) {
  to.row = row, to.rows = rows;
  if (p.rank == 0) return;
  const int64_t steps = rank_steps(p), width = steps * tile::kDepth;
  const Buffer<float> lines = buffer<float>(kSideRows * width);
  for (int64_t t = 0; t < to.tiles(); ++t) {
    std::fill(lines.get(), lines.get() + kSideRows * width, 0.f);
    for (int64_t m = 0; m < std::min(kSideRows, rows - t * kSideRows); ++m)
      std::memcpy(lines.get() + m * width, p.down + (row + t * kSideRows + m) * p.rank, p.rank * sizeof(float));
    for (int64_t s = 0; s < steps; ++s)
      tile::pack_a<3>(lines.get() + s * tile::kDepth, width, to.down.get() + (t * 3 * steps + s) * tile::kWords,
                      steps * tile::kWords);
  }
}

inline void pack_tokens(const Gemm& p, int64_t row, int64_t rows, Tokens& to) {
  pack_down(p, row, rows, to);
  const int64_t tiles = to.tiles(), columns = p.padded / kTileColumns;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t width = t / 2 * 2 + 1 < tiles ? 2 : 1;
    int8_t* codes = to.codes.get() + t / 2 * 2 * columns * kCodeBytes + (t & 1) * kCodeBytes;
    for (int64_t m = 0; m < kSideRows; ++m)
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t at = t * kSideRows + m;
        const Ints part = at < rows ? load<Ints>(p.codes + (row + at) * p.padded + k * kTileColumns) : Ints{};
        std::memcpy(codes + k * width * kCodeBytes + m * kTileColumns, &part, sizeof(part));
      }
  }
}

// What follows the sums, of one block of channels: 2^e, t, the bias, lora_up as B tiles of three planes.
struct Finish {
  explicit Finish(const Gemm& p) : up(buffer<uint16_t>(3 * rank_steps(p) * tile::kWords)) {}
  Floats unit{}, divisor{}, bias{};
  Buffer<uint16_t> up;       // [3, ranks / 32, 16, 32]
  bool up_is_exact = false;  // its first plane is all of it
};

inline void prepare_finish(const Gemm& p, int64_t first, const FixedScales& scales, Finish& to) {
  to.unit = scales.units[first / kLanes];
  if (scales.ways[first / kGranule] == kBytes) to.divisor = scales.divisors[first / kLanes];
  const int64_t steps = rank_steps(p);
  alignas(64) float lines[tile::kDepth * kLanes];
  const uint8_t* rows[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t channel = std::min(first + lane, p.n - 1);
    to.bias[lane] = p.bias == nullptr ? 0.f : p.bias[channel];
    rows[lane] = reinterpret_cast<const uint8_t*>(p.lora_up + channel * p.rank);
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t r = 0; r < tile::kDepth; r += kLanes) {
      const int64_t from = s * tile::kDepth + r, count = std::clamp<int64_t>(p.rank - from, 0, kLanes);
      Ints part[kLanes] = {};
      if (count > 0) transpose(rows, 4 * from, count, part);
      for (int64_t i = count; i < kLanes; ++i) part[i] = Ints{};
      std::memcpy(lines + r * kLanes, part, sizeof(part));
    }
    tile::pack_b<3>(lines, kLanes, to.up.get() + s * tile::kWords, steps * tile::kWords);
  }
  uint16_t rest = 0;
  for (int64_t i = steps * tile::kWords; i < 3 * steps * tile::kWords; ++i) rest |= to.up[i];
  to.up_is_exact = (rest & 0x7fff) == 0;
}

// lowrank [Tiles, 16, 16] = down up of `Tiles` tiles of tokens: the six products of planes that reach 2^-24, or the
// three that are left where bfloat16 holds lora_up. What is left out would add zeros: the bits are the same.
template <int Tiles>
inline void multiply_up(const Finish& with, const uint16_t* down, int64_t steps, float* lowrank) {
  const int64_t plane = steps * tile::kWords;
#define TRISKELE_UP(a, b)                                                                        \
  TRISKELE_TILE_LOAD(6, with.up.get() + (b) * plane + s * tile::kWords, 64);                     \
  TRISKELE_TILE_LOAD(4, down + (a) * plane + s * tile::kWords, 64);                              \
  if constexpr (Tiles == 2) TRISKELE_TILE_LOAD(5, down + (3 + (a)) * plane + s * tile::kWords, 64); \
  TRISKELE_TILE_DOT(0, 4, 6);                                                                    \
  if constexpr (Tiles == 2) TRISKELE_TILE_DOT(1, 5, 6)
  TRISKELE_TILE_ZERO(0);
  if constexpr (Tiles == 2) TRISKELE_TILE_ZERO(1);
  for (int64_t s = 0; s < steps; ++s) {
    TRISKELE_UP(2, 0);
    if (!with.up_is_exact) { TRISKELE_UP(1, 1); TRISKELE_UP(0, 2); }
    TRISKELE_UP(1, 0);
    if (!with.up_is_exact) { TRISKELE_UP(0, 1); }
    TRISKELE_UP(0, 0);
  }
#undef TRISKELE_UP
  TRISKELE_TILE_STORE(0, lowrank, 64);
  if constexpr (Tiles == 2) TRISKELE_TILE_STORE(1, lowrank + kSumWords, 64);
}

// Whether the output goes past the caches: it is too large to stay in L2, and has whole lines. Its rows lie so far
// apart that lines written half at a time come and go in between.
inline bool streams(const Gemm& p) {
  const int64_t size = p.narrow ? 2 : 4;
  return p.m >= kFewTokens && p.m * p.n * size >= kStreamBytes && p.n * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
}

// One token's 16 channels from their sum in float, before 2^e, to the output. Of bfloat16 they are half a line: the
// first one waits in `half` [16] for the next block of channels.
inline void finish_sum(const Gemm& p, int64_t row, int64_t first, const Finish& with, const Floats& sum,
                       const float* lowrank, uint16_t* half) {
  const Floats scaled = sum * with.unit * broadcast(p.token_scales[row]) + with.bias;
  const Floats y = activated(p.epilogue, scaled + load<Floats>(lowrank));
  if (!p.stream) {
    store(p, row, first, y);
  } else if (!p.narrow) {
    _mm512_stream_ps(static_cast<float*>(p.out) + row * p.n + first, (__m512)y);
  } else if (const __m256i mine = (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)y); first % (2 * kLanes) == 0) {
    std::memcpy(half, &mine, sizeof(mine));
  } else {
    __m512i line{};
    std::memcpy(&line, half, sizeof(mine));
    line = _mm512_maskz_inserti64x4(0xff, line, mine, 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<uint16_t*>(p.out) + row * p.n + first - kLanes), line);
  }
}

// `Tiles` tiles of tokens, from t on, from their sums [Tiles, 2 planes, 16, 16] to the output. lowrank [Tiles, 16, 16];
// halves [tokens of the block, 16].
template <int Tiles>
inline void finish_planes(const Gemm& p, const Tokens& tokens, int64_t t, const int32_t* sums, const Finish& with,
                          int64_t first, const float* lowrank, uint16_t* halves) {
  const int64_t row = tokens.row + t * kSideRows, rows = std::min(Tiles * kSideRows, tokens.rows - t * kSideRows);
  for (int64_t m = 0; m < rows; ++m) {
    const int32_t* at = sums + m / kSideRows * 2 * kSumWords + m % kSideRows * kLanes;
    const Ints bottom = load<Ints>(at + kSumWords);  // any pair of the same 256 high + low gives the same two floats
    const Floats high = __builtin_convertvector(load<Ints>(at) + (bottom >> 8), Floats);
    const Floats low = __builtin_convertvector(bottom & 255, Floats);
    finish_sum(p, row + m, first, with, high * 256.0f + low, lowrank + m * kLanes,
               halves + (t * kSideRows + m) * kLanes);
  }
}

// The same of two blocks of channels, or one, with one plane each: sums [Tiles, 2 blocks, 16, 16], lowrank
// [2, Tiles, 16, 16]. t * sum is rounded once, so the two planes of the same weight give the same bits.
template <int Tiles>
inline void finish_bytes(const Gemm& p, const Tokens& tokens, int64_t t, const int32_t* sums, const Finish* with,
                         int64_t first, const float* lowrank, uint16_t* halves) {
  const int64_t row = tokens.row + t * kSideRows, rows = std::min(Tiles * kSideRows, tokens.rows - t * kSideRows);
  const int64_t blocks = first + kLanes < p.n ? 2 : 1;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t b = 0; b < blocks; ++b) {
      const Ints whole = load<Ints>(sums + (m / kSideRows * 2 + b) * kSumWords + m % kSideRows * kLanes);
      const Floats high = __builtin_convertvector(whole >> 8, Floats);
      const Floats low = __builtin_convertvector(whole & 255, Floats);
      const Floats sum = (Floats)_mm512_maskz_fmadd_ps(0xffff, (__m512)high, (__m512)(256.0f * with[b].divisor),
                                                       (__m512)(low * with[b].divisor));
      finish_sum(p, row + m, first + b * kLanes, with[b], sum, lowrank + (b * Tiles * kSideRows + m) * kLanes,
                 halves + (t * kSideRows + m) * kLanes);
    }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
