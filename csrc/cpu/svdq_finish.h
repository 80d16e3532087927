// Around the products of svdq_planes.h: tokens packed into tiles, and the way from the integer sums to the output.
#pragma once
#if defined(__AMX_INT8__)
#include "cpu/amx.h"
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

// What follows the sums, of one block of channels: 2^e, the bias, lora_up as B tiles of three planes.
struct Finish {
  explicit Finish(const Gemm& p) : up(buffer<uint16_t>(3 * rank_steps(p) * tile::kWords)) {}
  Floats unit{}, bias{};
  Buffer<uint16_t> up;       // [3, ranks / 32, 16, 32]
  bool up_is_exact = false;  // its first plane is all of it
};

inline void prepare_finish(const Gemm& p, int64_t first, const Floats& unit, Finish& to) {
  to.unit = unit;
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

// `Tiles` tiles of tokens, from t on, from their sums [Tiles, 2, 16, 16] to the output. lowrank [Tiles, 16, 16].
template <int Tiles>
inline void finish_planes(const Gemm& p, const Tokens& tokens, int64_t t, const int32_t* sums, const Finish& with,
                          int64_t first, const float* lowrank) {
  const int64_t row = tokens.row + t * kSideRows, rows = std::min(Tiles * kSideRows, tokens.rows - t * kSideRows);
  for (int64_t m = 0; m < rows; ++m) {
    const int32_t* at = sums + m / kSideRows * 2 * kSumWords + m % kSideRows * kLanes;
    const Ints bottom = load<Ints>(at + kSumWords);  // any pair of the same 256 high + low gives the same two floats
    const Floats high = __builtin_convertvector(load<Ints>(at) + (bottom >> 8), Floats);
    const Floats low = __builtin_convertvector(bottom & 255, Floats);
    const Floats y = (high * 256.0f + low) * with.unit * broadcast(p.token_scales[row + m]) + with.bias;
    store(p, row + m, first, y + load<Floats>(lowrank + m * kLanes));
  }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
