// Which queries see which chunk, how a task's queries are cut, sums over lanes: what the vector and the tile kernels
// have in common.
#pragma once
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "cpu/vmoba.h"

namespace triskele::TRISKELE_LEVEL::vmoba {

constexpr float kLog2E = 1.44269504088896341f;

// Every lane becomes the largest (the sum) of all, by swapping halves, quarters, ... : log2(kVec) steps.
template <int Step, int... Lane>
Floats swapped(Floats x, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (Lane ^ Step)...);
#else
  return __builtin_shuffle(x, Ints{(Lane ^ Step)...});
#endif
}

template <int Step = kVec / 2>
float largest(Floats x) {
  if constexpr (Step == 0) return x[0];
  else return largest<Step / 2>(bigger(x, swapped<Step>(x, std::make_integer_sequence<int, kVec>{})));
}

template <int Step = kVec / 2>
float total(Floats x) {
  if constexpr (Step == 0) return x[0];
  else return total<Step / 2>(x + swapped<Step>(x, std::make_integer_sequence<int, kVec>{}));
}

// Which queries see a chunk. The mask is [B, C, H, S] by token; a query sees its own chunk in any case.
struct Selection {
  const Shape& s;
  const uint8_t* mask;

  // The positions in [begin, end), less `begin`, whose query sees chunk c; how many. `out` has room for all of them.
  int64_t rows(int64_t pair, int64_t c, int64_t begin, int64_t end, int32_t* out) const {
    const uint8_t* m = mask + ((pair / s.heads * s.chunks + c) * s.heads + pair % s.heads) * s.length;
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      out[n] = static_cast<int32_t>(i - begin);
      n += m[s.order[i]] | (s.bounds[c] <= i && i < s.bounds[c + 1]);
    }
    return n;
  }
};

// Queries of a task: so many that the lists of a chunk fill tiles, so few that their sums stay in L2.
inline int64_t range_rows(const Shape& s) { return s.dim <= 64 ? 2048 : s.dim <= 128 ? 1024 : 512; }

// Pairs whose packed operands, `bytes` each, are held at once: as many as 16 MiB take, and enough for the threads;
// `even`: the same number for each of these, where there are so many.
inline int64_t pairs_at_once(const Shape& s, int64_t bytes, bool even = false) {
  const int64_t threads = torch::stable::get_num_threads(), ranges = (s.length + range_rows(s) - 1) / range_rows(s);
  const int64_t busy = 4 * threads / std::max<int64_t>(ranges, 1) + 1;
  const int64_t pairs = std::max((int64_t{16} << 20) / std::max<int64_t>(bytes, 1), busy);
  return std::clamp<int64_t>(even ? round_up(pairs, threads) : pairs, 1, std::max<int64_t>(s.pairs(), 1));
}

}  // namespace triskele::TRISKELE_LEVEL::vmoba
