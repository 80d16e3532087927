// The 4-bit linear's multiplication on tile registers with the group scales folded into the weights, exactly.
//
// Scales are stored in 16 bits or fewer, so within a channel they are small integers times one power of two:
// s[g] = q[g] 2^e. Where |q| stays below 2^12, code * q fits into 16 bits and is written as 256 high + low with two
// signed bytes. Both planes are multiplied in int32 over the whole of K, and
//
//   y = (256 H + L) 2^e
//
// is the sum over groups of scale * integer sum without a rounding before the last step. No float touches the inner
// loop: scaling each group's sums in float32 costs more than multiplying them (svdq_amx.h). Few tokens do not pay for
// the second plane: there the vectors add q times a group's sum, which is the same integer.
//
// Where the q of each channel of a granule are small multiples of one number t, up to 18 as `scales="integer"` makes
// them, code * q / t fits one signed byte: two blocks of channels then stand where one block's two planes did, and
// y = t L 2^e. t L is rounded to float once, as 256 H + L is: the same bits at half the products.
//
// Whether a granule of channels qualifies depends on its scales and codes alone, and few tokens give the bits of many: a
// token's result does not depend on its batch. The other granules take the float sums of svdq_amx.h and svdq.cpp.
//
//   block of tokens    256, their codes packed into tiles
//   chunk of channels  up to 256: where K is longer than a segment, their int32 sums wait in memory
//   segment of K       whose codes of all tokens stay in L2 while the channels pass
//   block of channels  16
//   stretch of K       1024 columns: the block's two planes, 32 KiB, are written into L1 and stay there while all
//                      tokens pass under. The codes are loaded with the hint not to keep them, or they would push the
//                      planes out: 13.6 ns a pair of tile products and not 18 (development reading).
#pragma once
#if defined(__AMX_INT8__)
#include "cpu/svdq_finish.h"

namespace triskele::TRISKELE_LEVEL::svdq {

#define TRISKELE_TILE_STREAM(t, from) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #t : : "r"(from), "r"(int64_t{64}) : "memory")
#define TRISKELE_TILE_BYTES(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

// ---- products --------------------------------------------------------------------------------------------------

// sums [Tiles, 2 planes, 16, 16] (+)= codes planes over `count` tiles of K. codes [count, Tiles, 16, 64]. The planes
// are the high and the low bytes of one block of channels, or those of two blocks that need one each.
template <int Tiles>
inline void multiply_planes(const int8_t* codes, const uint32_t* planes, int64_t count, bool start, int32_t* sums) {
  if (start) {
    TRISKELE_TILE_ZERO(0);
    TRISKELE_TILE_ZERO(1);
    if constexpr (Tiles == 2) TRISKELE_TILE_ZERO(2);
    if constexpr (Tiles == 2) TRISKELE_TILE_ZERO(3);
  } else {
    TRISKELE_TILE_LOAD(0, sums, 64);
    TRISKELE_TILE_LOAD(1, sums + kSumWords, 64);
    if constexpr (Tiles == 2) TRISKELE_TILE_LOAD(2, sums + 2 * kSumWords, 64);
    if constexpr (Tiles == 2) TRISKELE_TILE_LOAD(3, sums + 3 * kSumWords, 64);
  }
  for (int64_t k = 0; k < count; ++k) {
    TRISKELE_TILE_STREAM(4, codes);
    TRISKELE_TILE_LOAD(6, planes, 64);
    TRISKELE_TILE_BYTES(0, 4, 6);
    TRISKELE_TILE_LOAD(7, planes + kSumWords, 64);
    TRISKELE_TILE_BYTES(1, 4, 7);
    if constexpr (Tiles == 2) {
      TRISKELE_TILE_STREAM(5, codes + kCodeBytes);
      TRISKELE_TILE_BYTES(2, 5, 6);
      TRISKELE_TILE_BYTES(3, 5, 7);
    }
    codes += Tiles * kCodeBytes;
    planes += 2 * kSumWords;
  }
  TRISKELE_TILE_STORE(0, sums, 64);
  TRISKELE_TILE_STORE(1, sums + kSumWords, 64);
  if constexpr (Tiles == 2) TRISKELE_TILE_STORE(2, sums + 2 * kSumWords, 64);
  if constexpr (Tiles == 2) TRISKELE_TILE_STORE(3, sums + 3 * kSumWords, 64);
}

// Scratch of a thread.
struct PlaneScratch {
  PlaneScratch(const Gemm& p, int64_t rows, int64_t kept)
      : tokens(p, rows, true), finish{Finish(p), Finish(p)},
        planes(buffer<uint32_t>(whole_groups(p, kStretch) * 2 * kSumWords)),
        sums(buffer<int32_t>(kept * rows / kSideRows * 2 * kSumWords)), lowrank(buffer<float>(4 * kSumWords)),
        halves(buffer<uint16_t>(rows * kLanes)) {
    std::fill(lowrank.get(), lowrank.get() + 4 * kSumWords, 0.f);  // stays, without a rank
    std::fill(planes.get(), planes.get() + whole_groups(p, kStretch) * 2 * kSumWords, 0);  // a block without a partner
  }
  Tokens tokens;
  Finish finish[2];
  Buffer<uint32_t> planes;  // of a stretch
  Buffer<int32_t> sums;     // [blocks of the chunk, tiles, 2, 16, 16]; one block where K is one segment
  Buffer<float> lowrank;    // [2 blocks, 2 tiles, 16, 16]
  Buffer<uint16_t> halves;  // [tokens, 16] of an output that is streamed
};

// Tiles [from, to) of K for `Tiles` tiles of tokens from t on. The low-rank branch goes first: what it waits for passes
// under the long product.
template <int Tiles, bool Bytes>
inline void multiply_pair(const Gemm& p, PlaneScratch& scratch, int64_t t, int64_t from, int64_t to, int32_t* sums,
                          bool final, int64_t channel) {
  const Tokens& tokens = scratch.tokens;
  const int64_t columns = p.padded / kTileColumns, steps = rank_steps(p);
  for (int b = 0; b < (Bytes ? 2 : 1) && final && p.rank > 0; ++b)
    multiply_up<Tiles>(scratch.finish[b], tokens.down.get() + t * 3 * steps * tile::kWords, steps,
                       scratch.lowrank.get() + b * Tiles * kSumWords);
  multiply_planes<Tiles>(tokens.codes.get() + (t * columns + Tiles * from) * kCodeBytes, scratch.planes.get(), to - from,
                         from == 0, sums);
  if (!final) return;
  const float* lowrank = scratch.lowrank.get();
  uint16_t* halves = scratch.halves.get();
  if constexpr (Bytes) finish_bytes<Tiles>(p, tokens, t, sums, scratch.finish, channel, lowrank, halves);
  else finish_planes<Tiles>(p, tokens, t, sums, scratch.finish[0], channel, lowrank, halves);
}

// Channels [first, last) for the block of tokens in `scratch`.
template <bool Bytes>
inline void multiply_chunk(const Gemm& p, const FixedScales& scales, PlaneScratch& scratch, int64_t first,
                           int64_t last) {
  constexpr int64_t wide_block = Bytes ? 2 * kLanes : kLanes;  // channels under way
  const Tokens& tokens = scratch.tokens;
  const int64_t columns = p.padded / kTileColumns, tiles = tokens.tiles();
  const int64_t wide = whole_groups(p, kSegment), stretch = whole_groups(p, kStretch);
  for (int64_t segment = 0; segment < columns; segment += wide) {
    const int64_t segment_end = std::min(columns, segment + wide);
    for (int64_t channel = first; channel < last; channel += wide_block) {
      const int64_t kept = columns > wide ? (channel - first) / wide_block : 0;
      int32_t* sums = scratch.sums.get() + kept * tiles * 2 * kSumWords;
      for (int64_t from = segment; from < segment_end; from += stretch) {
        const int64_t to = std::min(segment_end, from + stretch);
        for (int64_t at = channel; at < std::min(last, channel + wide_block); at += kLanes)
          fill_planes<Bytes>(p, at, from, to, scales.quotients.get() + at / kLanes * p.groups, tiles <= 4,
                             scratch.planes.get() + (at - channel) / kLanes * kSumWords);
        const bool more = to < segment_end, over = channel + wide_block < last;  // what comes next
        const int64_t next = more ? channel : channel + wide_block, next_from = more ? to : segment;
        const int64_t next_to = std::min(segment_end, next_from + stretch);
        const bool final = to == columns;
        for (int64_t at = channel; at < std::min(last, channel + wide_block) && final; at += kLanes)
          prepare_finish(p, at, scales, scratch.finish[(at - channel) / kLanes]);
        for (int64_t t = 0; t < tiles; t += 2) {
          if (tiles > 4 && (more || over))
            fetch_weights(p, next, wide_block, next_from, next_to, t / 2, (tiles + 1) / 2);
          if (t + 1 < tiles) multiply_pair<2, Bytes>(p, scratch, t, from, to, sums + t * 2 * kSumWords, final, channel);
          else multiply_pair<1, Bytes>(p, scratch, t, from, to, sums + t * 2 * kSumWords, final, channel);
        }
      }
    }
  }
}

// All granules that qualify.
inline void multiply_by_planes(const Gemm& p, const FixedScales& scales) {
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t token_blocks = (p.m + kBlockTokens - 1) / kBlockTokens;
  int64_t width = kGranule;  // of a chunk; narrower where there would be too few tasks for the threads
  while (width > 2 * kLanes && token_blocks * ((p.n + width - 1) / width) < wanted) width /= 2;
  const int64_t chunks = (p.n + width - 1) / width;
  const int64_t rows = std::min(kBlockTokens, (p.m + kSideRows - 1) / kSideRows * kSideRows);
  const int64_t kept = p.padded / kTileColumns > whole_groups(p, kSegment) ? width / kLanes : 1;
  torch::stable::parallel_for(0, token_blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    const tile::Registers registers;
    PlaneScratch scratch(p, rows, kept);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks * kBlockTokens, first = task % chunks * width;
      const uint8_t way = scales.ways[first / kGranule];
      if (way == kFloats) continue;
      if (scratch.tokens.row != row) pack_tokens(p, row, std::min(kBlockTokens, p.m - row), scratch.tokens);
      if (way == kBytes) multiply_chunk<true>(p, scales, scratch, first, std::min(p.n, first + width));
      else multiply_chunk<false>(p, scales, scratch, first, std::min(p.n, first + width));
    }
    if (p.stream) _mm_sfence();  // before another thread is told that it is there
  });
}

// ---- few tokens --------------------------------------------------------------------------------------------------

// sums [2, 16, 16] of `Rows` tokens from `row` on: 256 high + low = sum over groups of q * (sum of code * activation).
template <int Rows>
inline void add_groups(const Gemm& p, const uint32_t* words, const Ints* quotients, int64_t row, int32_t* sums) {
  const int32_t offset = p.e2m1 ? 12 : 8;
  const int64_t words_a_group = p.group / 4;
  const int8_t* codes = p.codes + row * p.padded;
  Ints high[Rows] = {}, low[Rows] = {};
  for (int64_t g = 0; g < p.groups; ++g, codes += p.group) {
    Ints acc[Rows];
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) acc[m] = Ints{} - offset * p.sums[(row + m) * p.groups + g];
    for (int64_t i = 0; i < words_a_group; ++i, words += kLanes) {
      const Ints weight = load<Ints>(words);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        int32_t activation;
        std::memcpy(&activation, codes + m * p.padded + 4 * i, 4);
        acc[m] = vectors::dot4(acc[m], weight, activation);
      }
    }
    const Ints q = (quotients[g] << 16) >> 16;
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Ints product = acc[m] * q;
      high[m] += product >> 8;
      low[m] += product & 255;
    }
  }
  for (int m = 0; m < Rows; ++m) {
    std::memcpy(sums + m * kLanes, &high[m], sizeof(Ints));
    std::memcpy(sums + kSumWords + m * kLanes, &low[m], sizeof(Ints));
  }
}

// All granules that qualify, for fewer than kFewTokens tokens.
inline void multiply_few(const Gemm& p, const FixedScales& scales) {
  constexpr int64_t width = 64;  // channels whose bytes stay in L2
  const int64_t rows = (p.m + kSideRows - 1) / kSideRows * kSideRows;
  torch::stable::parallel_for(0, (p.n + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    const tile::Registers registers;
    Panel panel{width, p.groups, buffer<uint32_t>(width * p.padded / 4), {}, {}, {}};
    Tokens tokens(p, rows, false);
    pack_down(p, 0, p.m, tokens);
    Finish finish(p);
    const Buffer<int32_t> sums = buffer<int32_t>(2 * kSumWords);
    const Buffer<float> lowrank = buffer<float>(kSumWords);
    std::fill(lowrank.get(), lowrank.get() + kSumWords, 0.f);
    for (int64_t first = begin * width; first < std::min(p.n, end * width); first += width) {
      if (scales.ways[first / kGranule] == kFloats) continue;
      fill_words<true>(p, first, 0, p.groups, panel);
      for (int64_t channel = first; channel < std::min(p.n, first + width); channel += kLanes) {
        const uint32_t* words = panel.words.get() + (channel - first) * p.padded / 4;
        const Ints* quotients = scales.quotients.get() + channel / kLanes * p.groups;
        prepare_finish(p, channel, scales, finish);
        for (int64_t t = 0; t < tokens.tiles(); ++t) {
          const int64_t last = std::min(p.m, (t + 1) * kSideRows);
          for (int64_t row = t * kSideRows; row < last;) {
            int32_t* to = sums.get() + (row - t * kSideRows) * kLanes;
            if (last - row >= 8) add_groups<8>(p, words, quotients, row, to), row += 8;
            else if (last - row >= 4) add_groups<4>(p, words, quotients, row, to), row += 4;
            else if (last - row >= 2) add_groups<2>(p, words, quotients, row, to), row += 2;
            else add_groups<1>(p, words, quotients, row, to), row += 1;
          }
          if (p.rank > 0)
            multiply_up<1>(finish, tokens.down.get() + t * 3 * rank_steps(p) * tile::kWords, rank_steps(p), lowrank.get());
          finish_planes<1>(p, tokens, t, sums.get(), finish, channel, lowrank.get(), nullptr);
        }
      }
    }
  });
}

#undef TRISKELE_TILE_STREAM
#undef TRISKELE_TILE_BYTES

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
