// The 4-bit linear's projection x lora_down^T on tile registers. bfloat16 x times factors that bfloat16 holds, as stored
// ones are, are exact products; anything else goes as three planes (tiles.h). A token's sums depend on K alone.
#pragma once
#if defined(__AMX_BF16__)
#include <torch/csrc/stable/ops.h>

#include "cpu/tiles.h"
#include "cpu/svdq.h"
#include "cpu/svdq_stored.h"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr int64_t kDownSteps = 8;   // of 32 columns, packed at a time

struct Projection {
  int64_t m, k, rank;  // rank: a multiple of 16
  const void* x;       // [M, K] float32 (`wide`) or bfloat16
  bool wide;
  const Stored* stored;  // [r', K], r' <= r
  float* out;            // [M, r]
};

inline bool held_by_bfloat16(const float* x, int64_t count) {
  uint32_t low = 0;
#pragma omp simd reduction(| : low)
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    low |= bits & 0xffff;
  }
  return low == 0;
}

// Rows [row, row + 16) below `last` and columns [column, + 32), zeros beyond -> an A tile a plane. `lines` [16, 32]: scratch.
template <int Planes>
inline void pack_rows(const Projection& p, int64_t row, int64_t last, int64_t column, float* lines, uint16_t* to, int64_t plane) {
  const int64_t rows = std::min(tile::kSide, last - row);
  const int64_t columns = std::min(tile::kDepth, p.k - column);
  if constexpr (Planes == 1) {
    if (rows < tile::kSide || columns < tile::kDepth) std::fill(to, to + tile::kWords, uint16_t{0});
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + row * p.k + column;
    if (columns == tile::kDepth) for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * tile::kDepth, from + r * p.k, 64);
    else for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * tile::kDepth, from + r * p.k, 2 * columns);
  } else {
    if (rows < tile::kSide || columns < tile::kDepth) std::fill(lines, lines + tile::kWords, 0.f);
    for (int64_t r = 0; r < rows; ++r) {
      float* line = lines + r * tile::kDepth;
      const int64_t at = (row + r) * p.k + column;
      if (p.wide) {
        std::memcpy(line, static_cast<const float*>(p.x) + at, 4 * columns);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(p.x) + at;
        for (int64_t i = 0; i < columns; ++i) {
          const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
          std::memcpy(line + i, &bits, 4);
        }
      }
    }
    tile::pack_a<3>(lines, tile::kDepth, to, plane);
  }
}

// The factors as B tiles [planes, ranks / 16, columns / 32], for all threads.
struct Factors {
  int planes = 0;
  int64_t steps = 0, plane = 0;
  Buffer<uint16_t> tiles;
};

// The stored bfloat16 themselves: 16 rows of 16 pairs of columns, turned, are a B tile.
inline void pack_stored(const Projection& p, Factors& to) {
  const Stored& from = *p.stored;
  torch::stable::parallel_for(0, to.steps, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < p.rank; n += tile::kSide) {
      const uint8_t* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = static_cast<const uint8_t*>(from.data) + std::min(n + i, from.rows - 1) * from.columns * 2;
      const Ints present = present_rows(from, n);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * tile::kDepth, count = std::min(tile::kDepth, p.k - first);
        Ints words[kLanes] = {};
        transpose(rows, 2 * first, count / 2, words);
        if (count % 2 != 0)
          for (int64_t i = 0; i < kLanes; ++i) {
            uint16_t last;
            std::memcpy(&last, rows[i] + 2 * (first + count - 1), 2);
            words[count / 2][i] = last;
          }
        for (int64_t i = 0; i < kLanes; ++i) words[i] = i < (count + 1) / 2 ? words[i] & present : Ints{};
        std::memcpy(to.tiles.get() + (n / tile::kSide * to.steps + s) * tile::kWords, words, sizeof(words));
      }
    }
  });
}

template <int Planes>
inline void pack_factors(const Projection& p, const float* factors, Factors& to) {
  const int64_t sides = p.rank / tile::kSide;
  torch::stable::parallel_for(0, to.steps, 16, [&](int64_t begin, int64_t end) {
    const Buffer<float> lines = buffer<float>(tile::kDepth * p.rank);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t count = std::min(tile::kDepth, p.k - s * tile::kDepth) * p.rank;
      std::memcpy(lines.get(), factors + s * tile::kDepth * p.rank, count * sizeof(float));
      std::fill(lines.get() + count, lines.get() + tile::kDepth * p.rank, 0.f);
      for (int64_t n = 0; n < sides; ++n)
        tile::pack_b<Planes>(lines.get() + n * tile::kSide, p.rank,
                             to.tiles.get() + (n * to.steps + s) * tile::kWords, to.plane);
    }
  });
}

inline Factors pack_factors(const Projection& p) {
  Factors to;
  const bool as_stored = !p.wide && !p.stored->wide;
  const Buffer<float> factors = as_stored ? Buffer<float>{} : turned(*p.stored, p.rank);
  to.planes = as_stored || (!p.wide && held_by_bfloat16(factors.get(), p.k * p.rank)) ? 1 : 3;
  to.steps = (p.k + tile::kDepth - 1) / tile::kDepth;
  to.plane = p.rank / tile::kSide * to.steps * tile::kWords;
  to.tiles = buffer<uint16_t>(to.planes * to.plane);
  if (as_stored) pack_stored(p, to);
  else if (to.planes == 1) pack_factors<1>(p, factors.get(), to);
  else pack_factors<3>(p, factors.get(), to);
  return to;
}

// Scratch of a thread.
struct ProjectionScratch {
  ProjectionScratch(const Factors& f, int64_t rank)
      : lines(buffer<float>(tile::kWords)), sums(buffer<float>(2 * tile::kSide * rank)),
        rows(buffer<uint16_t>(f.planes * 2 * kDownSteps * tile::kWords)) {}
  Buffer<float> lines, sums;
  Buffer<uint16_t> rows;  // [planes, 2, steps] A tiles
};

template <int Planes>
inline void project_by_tiles(const Projection& p, const Factors& f, ProjectionScratch& scratch, int64_t first,
                             int64_t last) {
  constexpr int64_t plane = 2 * kDownSteps * tile::kWords;
  for (int64_t row = first; row < last; row += 2 * tile::kSide) {
    const int64_t count = std::min(2 * tile::kSide, last - row), tiles = count > tile::kSide ? 2 : 1;
    for (int64_t s = 0; s < f.steps; s += kDownSteps) {
      const int64_t some = std::min(kDownSteps, f.steps - s);
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t i = 0; i < some; ++i)
          pack_rows<Planes>(p, row + t * tile::kSide, last, (s + i) * tile::kDepth, scratch.lines.get(),
                            scratch.rows.get() + (t * kDownSteps + i) * tile::kWords, plane);
      tile::multiply<Planes>(tiles, p.rank / tile::kSide,
                             {scratch.rows.get(), kDownSteps * tile::kWords, tile::kWords, plane},
                             {f.tiles.get() + s * tile::kWords, f.steps * tile::kWords, tile::kWords, f.plane}, some,
                             scratch.sums.get(), p.rank, s > 0);
    }
    std::memcpy(p.out + row * p.rank, scratch.sums.get(), count * p.rank * sizeof(float));
  }
}

// Rows [first, last) of the product.
inline void project_by_tiles(const Projection& p, const Factors& f, ProjectionScratch& scratch, int64_t first,
                             int64_t last) {
  if (f.planes == 1) project_by_tiles<1>(p, f, scratch, first, last);
  else project_by_tiles<3>(p, f, scratch, first, last);
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
