// The 4-bit linear's multiplication on tile registers with float sums, for the scales that svdq_planes.h leaves: one TDPBSSD is 16 tokens x 16 channels x 64 columns, a group
// of int4, so that its int32 sums are scaled and added to float32 vectors at once.
//
//   panel          up to 256 channels, and as much of K as keeps their widened weights in L2
//   block of rows  128 tokens, which pass under
//   chunk          the groups of 64 channels whose weights stay in L1 while the block passes; the float sums wait in
//                  memory between chunks
//
// The sums are added in the order of K, by the operations of the vector kernel: both give the same bits, and so the
// choice between them by M leaves a token's result independent of the batch.
#pragma once
#if defined(__AMX_INT8__)
#include <immintrin.h>

#include <utility>

#include <torch/csrc/stable/ops.h>

#include "cpu/tiles.h"
#include "cpu/svdq.h"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr int64_t kTileRows = 16;             // tokens of a tile
constexpr int64_t kTileBytes = 64;            // columns of a tile
constexpr int64_t kTileWords = kTileRows * kLanes;
constexpr int64_t kTileRowsPay = 6;           // tokens from which on tiles are faster than vectors
constexpr int64_t kWidest = 256;              // channels of a panel
constexpr int64_t kPanelBytes = 768 * 1024;   // of widened weights, in an L2 of 2 MiB
constexpr int64_t kChunkBytes = 24 * 1024;    // of widened weights, in an L1 of 48 KiB
constexpr int64_t kChunkWidth = 64;           // channels that share a chunk of activations
constexpr int64_t kBlockRows = 128;
constexpr int64_t kFewRows = 128;
constexpr int64_t kStretchRows = 1024;        // tokens of a task at most: their float sums stay near

inline bool tiles_pay(const Gemm& p) { return p.m >= kTileRowsPay && p.group % kTileBytes == 0; }

// Where one tile of the output finds its chunk.
struct Chunk {
  const int8_t* codes;     // 16 tokens, `stride` apart
  const uint32_t* words;
  const float* scales;
  float* y;                // [16, 16]
  int64_t stride, groups, group;
  bool start;              // of K: y holds nothing yet
};

#define TRISKELE_GROUP(C, A, B)                                \
  _tile_zero(C);                                               \
  for (int64_t k = 0; k < at.group; k += kTileBytes) {         \
    _tile_loadd(A, codes + k, at.stride);                      \
    _tile_loadd(B, words + k / 4 * kLanes, kTileBytes);        \
    _tile_dpbssd(C, A, B);                                     \
  }                                                            \
  _tile_stored(C, sums, kTileBytes)

// sums [16, 16] of group g. Two sets of registers take turns, so that a group does not wait for the one before.
inline void multiply_group(const Chunk& at, int64_t g, int32_t* sums) {
  const int8_t* codes = at.codes + g * at.group;
  const uint32_t* words = at.words + g * (at.group / 4 * kLanes);
  if ((g & 1) == 0) {
    TRISKELE_GROUP(0, 2, 4);
  } else {
    TRISKELE_GROUP(1, 3, 5);
  }
}
#undef TRISKELE_GROUP

// The sums of `next` by tiles, into memory, while those of `last` are scaled and added by vectors: what a tile stores
// is read a whole chunk later, when it has arrived.
template <bool Next, bool Last>
inline void multiply_chunk(const Chunk& next, int32_t* sums, const Chunk& last, const int32_t* ready) {
  Floats y[kTileRows];
  if constexpr (Last) {
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) y[m] = last.start ? Floats{} : load<Floats>(last.y + m * kLanes);
  }
  const int64_t groups = Next ? next.groups : last.groups;
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (Next) multiply_group(next, g, sums + g * kTileWords);
    if constexpr (Last) {
      const Floats scale = load<Floats>(last.scales + g * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m)
        y[m] += __builtin_convertvector(load<Ints>(ready + g * kTileWords + m * kLanes), Floats) * scale;
    }
  }
  if constexpr (Last) {
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) std::memcpy(last.y + m * kLanes, &y[m], sizeof(Floats));
  }
}

inline int64_t groups_of_a_chunk(const Gemm& p) {
  return std::max<int64_t>(1, kChunkBytes / (kChunkWidth * p.group));
}

// Scratch of a thread.
struct TileScratch {
  Buffer<int32_t> sums;   // [2, chunk, 16, 16]
  Buffer<float> y;        // [kStretchRows / 16, width / 16, 16, 16]
  Buffer<int8_t> tail;    // [16, Kp]: the last tokens, where they are fewer than 16, and zeros
};

// Channels from `first` on for tokens [row, end).
inline void multiply_panel(const Gemm& p, Panel& panel, TileScratch& scratch, int64_t first, int64_t row, int64_t end) {
  const int64_t blocks = std::min(panel.width / kLanes, (p.n - first + kLanes - 1) / kLanes);
  const int64_t tiles = (end - row + kTileRows - 1) / kTileRows, last_rows = (end - row) % kTileRows;
  if (last_rows != 0) {
    std::memcpy(scratch.tail.get(), p.codes + (end - last_rows) * p.padded, last_rows * p.padded);
    std::memset(scratch.tail.get() + last_rows * p.padded, 0, (kTileRows - last_rows) * p.padded);
  }
  const int64_t chunk = groups_of_a_chunk(p);
  const int64_t tile_words = p.group / 4 * kLanes, wide = panel.width / kLanes;
  fill_factors(p, first, panel);
  for (int64_t from = 0; from < p.groups; from += panel.groups) {
    const int64_t to = std::min(p.groups, from + panel.groups);
    fill_words<false>(p, first, from, to, panel);
    asm volatile("" : : : "memory");  // the compiler does not know that tile loads read these buffers
    for (int64_t low = 0; low < tiles; low += kBlockRows / kTileRows) {
      const int64_t high = std::min(tiles, low + kBlockRows / kTileRows);
      for (int64_t left = 0; left < blocks; left += kChunkWidth / kLanes) {
        const int64_t right = std::min(blocks, left + kChunkWidth / kLanes);
        for (int64_t g = from; g < to; g += chunk) {
          Chunk last{};
          int32_t *sums = scratch.sums.get(), *ready = sums + chunk * kTileWords;
          for (int64_t t = low; t < high; ++t) {
            const bool partial = last_rows != 0 && t == tiles - 1;
            const int8_t* codes = partial ? scratch.tail.get() : p.codes + (row + t * kTileRows) * p.padded;
            for (int64_t b = left; b < right; ++b) {
              const Chunk next{codes + g * p.group,
                               panel.words.get() + (b * panel.groups + g - from) * tile_words,
                               panel.scales.get() + (b * p.groups + g) * kLanes,
                               scratch.y.get() + (t * wide + b) * kTileWords,
                               p.padded, std::min(chunk, to - g), p.group, g == 0};
              if (last.codes == nullptr) multiply_chunk<true, false>(next, sums, last, ready);
              else multiply_chunk<true, true>(next, sums, last, ready);
              last = next;
              std::swap(sums, ready);
            }
          }
          multiply_chunk<false, true>(last, sums, last, ready);
        }
      }
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = row + t * kTileRows, rows = std::min(kTileRows, end - at);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* from = scratch.y.get() + (t * wide + b) * kTileWords;
      if (rows == kTileRows) {
        Floats y[kTileRows];
        std::memcpy(y, from, sizeof(y));
        finish<kTileRows>(p, panel, b, at, first, y);
      } else {
        for (int64_t m = 0; m < rows; ++m) {
          Floats y[1] = {load<Floats>(from + m * kLanes)};
          finish<1>(p, panel, b, at + m, first, y);
        }
      }
    }
  }
}

inline void multiply_by_tiles(const Gemm& p) {
  // Narrower panels, and then shorter stretches of tokens, only where there would be too few tasks for the threads.
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads == 1 ? 1 : 4 * threads;
  int64_t width = p.m <= kFewRows ? kChunkWidth : kWidest;  // few tokens do not pay for fresh memory
  while (width > kChunkWidth && (p.n + width - 1) / width < wanted) width /= 2;
  const int64_t panels = (p.n + width - 1) / width;
  const int64_t parts = std::max((p.m + kStretchRows - 1) / kStretchRows, (wanted + panels - 1) / panels);
  const int64_t stretch = ((p.m + parts - 1) / parts + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t stretches = (p.m + stretch - 1) / stretch;
  const int64_t groups = std::clamp<int64_t>(kPanelBytes / (width * p.group), 1, p.groups);
  torch::stable::parallel_for(0, panels * stretches, 1, [&](int64_t begin, int64_t end) {
    const tile::Registers registers;
    Panel panel = make_panel(p, width, groups);
    TileScratch scratch{buffer<int32_t>(2 * groups_of_a_chunk(p) * kTileWords), buffer<float>(stretch * width),
                        buffer<int8_t>(kTileRows * p.padded)};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / stretches * width, row = task % stretches * stretch;
      if (!p.is_done(first)) multiply_panel(p, panel, scratch, first, row, std::min(p.m, row + stretch));
    }
  });
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
