// Sparse-linear attention, forward, on packed bfloat16 tiles; float32 as three planes of bfloat16 (tiles.h).
//
//   strip   32 visible keys of one block, fewer at its end: packed once a head, K as rows and V transposed
//   tile    64 queries of one block, one a lane: scores S^T = K Q^T and output O^T = V^T P^T stand with queries along the
//           vectors, so that maxima, sums, exponentials and the packing of P are vertical arithmetic
//   chunk   up to kChunk strips between two looks at the maximum, and two passes of the output through the tiles: as
//           few as keep scores, P and output in the first cache
//
// The linear branch goes the same way: H = phi(K)^T V by segments of keys while they are packed, then H^T phi(Q)^T and
// the projection W on a tile's lanes.
#pragma once
#include "cpu/sla_forward_keys.h"
#if defined(__AVX512BF16__)

namespace triskele::TRISKELE_LEVEL::sla_tiles {

constexpr int64_t kSmallestBlock = 16;               // of keys: below it a strip would be padding for the most part
constexpr int64_t kPackedBytes = int64_t{2} << 20;  // of heads that are packed at a time, at least one
constexpr float kSlack = 8.f;                        // log2: how far the maximum may rise before sums are rescaled
constexpr float kLarge = 0x1p20f;                    // log2: maxima from which on a fused exponent is too rough

inline bool pays(const Problem& p) { return p.block_k >= kSmallestBlock; }

template <class T>
struct Outputs {
  T *o, *o_sparse, *o_linear;  // the parts may be null
  float* lse;
};

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// 2^x within 2 units in the last place: exp2 less what guards it from subnormal results, which are zero here.
inline Floats power(Floats x) {
  const Floats f = _mm512_maskz_reduce_ps(0xFFFF, x, 1);  // x - floor(x)
  Floats y = splat(1.87757669e-3f);                       // minimax of 2^f, relative error 7.5e-8
  y = y * f + 8.98933969e-3f;
  y = y * f + 5.58263175e-2f;
  y = y * f + 2.40153611e-1f;
  y = y * f + 6.93153083e-1f;
  y = y * f + 9.99999940e-1f;
  return _mm512_maskz_scalef_ps(0xFFFF, y, x);
}

// P of two keys -> a row of a B tile of each plane.
template <int Planes>
__attribute__((always_inline)) inline void store_pair(uint16_t* to, int64_t plane, Floats even, Floats odd) {
  if constexpr (Planes == 1) {  // positive: adding a half rounds
    const tile::Words low = reinterpret_cast<tile::Words>(even) + 0x8000u, high = reinterpret_cast<tile::Words>(odd) + 0x8000u;
    tile::store(to, (low >> 16) | (high & 0xFFFF0000u));
  } else {
    tile::Words low[Planes], high[Planes];
    tile::split<Planes>(even, low);
    tile::split<Planes>(odd, high);
    for (int p = 0; p < Planes; ++p) tile::store(to + p * plane, tile::pair(low[p], high[p]));
  }
}

// lanes [16 steps.., kLanes] -> B tiles [steps, 4], `width` lanes.
template <int Planes>
inline void pack_lanes(const float* lanes, int64_t steps, int64_t width, uint16_t* to) {
  const int64_t step = 4 * tile::kWords;
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t c = 0; c < width; c += kVec)
      tile::pack_b<Planes>(lanes + s * 32 * kLanes + c, kLanes, to + s * step + c / kVec * tile::kWords, steps * step);
}

template <class T>
class QueryBlock {
  static constexpr int P = kPlanes<T>;
  static constexpr int64_t kRow = kLanes + kVec;      // floats of a row of scores: a power of two would crowd some sets
  static constexpr int64_t kStep = 4 * tile::kWords;  // of a B operand of 64 lanes: one plane, one depth of 32

 public:
  QueryBlock(const Problem& p, const Layout& l)
      : stage_(l, kLanes), q_(l.depth * kLanes), scores_(kChunk * kStrip * kRow), sparse_(l.depth * kLanes),
        linear_(l.depth * kLanes), packed_(P * l.steps * kStep), p_(P * kChunk * kStep),
        h_(P * l.sides * l.steps * tile::kWords) {}

  // state: H_i and Z_i of the block, or null; `fresh`: another one than before.
  void run(const Inputs<T>& in, int64_t head, int64_t block, const uint16_t* keys, const uint16_t* values,
           const float* state, bool fresh, const Outputs<T>& out) {
    const Problem& p = in.p;
    const Layout& l = in.layout;
    const int8_t* kinds = in.map + (head * p.q_blocks() + block) * p.k_blocks();
    const int64_t* visible = in.seen.count.data() + head / p.heads * p.k_blocks();
    strips_.clear(), counts_.clear();
    for (int64_t j = 0; j < p.k_blocks(); ++j)
      for (int64_t t = 0; kinds[j] == 1 && t < visible[j]; t += kStrip) {
        strips_.push_back(j * l.a_block + t / kStrip);
        counts_.push_back(std::min(kStrip, visible[j] - t));
      }
    if (state != nullptr && fresh) take_state(p, l, state);
    const int64_t last = std::min(p.queries, (block + 1) * p.block_q);
    const float factor = factor_of(p);
    for (int64_t row = block * p.block_q; row < last; row += kLanes) {
      const int64_t n = std::min(kLanes, last - row), at = head * p.queries + row, width = round_up(n, kVec);
      stage_.load(in.q, head, nullptr, row, n, width, p.dim);
      if (P == 3 || state != nullptr) stage_.turn(width, q_);
      attend(p, l, width, keys, values, row == block * p.block_q);
      for (int64_t r = 0; r < n; ++r)
        out.lse[at + r] = sum_[r] > 0.f ? (top_[r] * factor + std::log2(sum_[r])) * kLn2
                          : sum_[r] == 0.f ? -std::numeric_limits<float>::infinity() : sum_[r];
      if (state != nullptr) {
        attend_linearly(p, l, width, state + p.dim * l.rows);
        if (out.o_sparse != nullptr) give(sparse_, n, p.dim, out.o_sparse + at * p.dim);
        if (out.o_linear != nullptr) give(linear_, n, p.dim, out.o_linear + at * p.dim);
        join(in, at, n, width);
      }
      give(sparse_, n, p.dim, out.o + at * p.dim);
    }
  }

 private:
  static float factor_of(const Problem& p) { return std::fabs(p.scale) * kLog2E; }  // of scores, to log2 units

  // `cold`: the first tile of a block. A head's strips exceed the second cache and are chosen, not consecutive, so that
  // only this code can know which come next.
  void attend(const Problem& p, const Layout& l, int64_t width, const uint16_t* keys, const uint16_t* values, bool cold) {
    const auto fetch = [&](int64_t at) {
      if (!cold || at >= static_cast<int64_t>(strips_.size())) return;
      prefetch(keys + strips_[at] * l.k_words, l.k_words * 2);
      prefetch(values + strips_[at] * l.v_words, l.v_words * 2);
    };
    const float factor = factor_of(p);
    for (int64_t s = 0; s < kChunk; ++s) fetch(s);
    if constexpr (P == 1) {
      stage_.operand(width, p.scale < 0.f, packed_);
    } else if (p.scale < 0.f) {
      scale_lanes(q_, l.depth, width, -1.f, linear_);
      pack_lanes<P>(linear_, l.steps, width, packed_);
    } else {
      pack_lanes<P>(q_, l.steps, width, packed_);
    }
    std::fill(top_, top_ + kLanes, std::numeric_limits<float>::lowest());
    std::fill(sum_, sum_ + kLanes, 0.f);
    const int64_t columns = width / kVec, total = static_cast<int64_t>(strips_.size());
    if (total == 0) std::fill(sparse_ + 0, sparse_ + l.rows * kLanes, 0.f);
    for (int64_t from = 0; from < total; from += kChunk) {
      const int64_t count = std::min(kChunk, total - from);
      for (int64_t s = 0; s < count; ++s)
        tile::multiply<P>(2, columns, {keys + strips_[from + s] * l.k_words, l.steps * tile::kWords, tile::kWords, l.k_plane},
                          {packed_, tile::kWords, kStep, l.steps * kStep}, l.steps, scores_ + s * kStrip * kRow, kRow, false);
      raise(l, counts_.data() + from, count, width, factor, from > 0);
      for (int64_t s = 0; s < count; ++s) {
        fetch(from + kChunk + s);
        soften(s, counts_[from + s], width, factor);
      }
      tile::multiply<P>(l.sides, columns, {values, tile::kWords, l.v_words, l.v_plane, strips_.data() + from},
                        {p_, tile::kWords, P * kStep, kStep}, count, sparse_, kLanes, from > 0);
    }
    for (int64_t c = 0; c < width; c += kVec) {
      const Floats sum = load(sum_ + c), inverse = 1.f / (sum == 0.f ? splat(1.f) : sum);
      for (int64_t d = 0; d < p.dim; ++d) store(sparse_ + d * kLanes + c, load(sparse_ + d * kLanes + c) * inverse);
    }
  }

  // Takes the maximum of a chunk, of scores as they come; rescales what was summed before where it rose by much.
  void raise(const Layout& l, const int64_t* counts, int64_t strips, int64_t width, float factor, bool summed) {
    for (int64_t c = 0; c < width; c += kVec) {
      Floats best[4];
      for (auto& b : best) b = splat(-std::numeric_limits<float>::infinity());
      for (int64_t s = 0; s < strips; ++s) {
        const float* from = scores_ + s * kStrip * kRow + c;
        int64_t r = 0;
        for (; r + 4 <= counts[s]; r += 4)
          for (int i = 0; i < 4; ++i) best[i] = bigger(load(from + (r + i) * kRow), best[i]);
        for (; r < counts[s]; ++r) best[0] = bigger(load(from + r * kRow), best[0]);
      }
      const Floats before = load(top_ + c);
      const Floats top = bigger(bigger(bigger(best[0], best[1]), bigger(best[2], best[3])), before);
      if (summed) {
        const auto risen = (top - before) * factor > kSlack;
        bool any = false;
        for (int i = 0; i < kVec; ++i) any |= risen[i] != 0;
        if (!any) continue;
        const Floats shrink = exp2((before - top) * factor);
        store(sum_ + c, load(sum_ + c) * shrink);
        for (int64_t d = 0; d < l.rows; ++d) store(sparse_ + d * kLanes + c, load(sparse_ + d * kLanes + c) * shrink);
      }
      store(top_ + c, top);
    }
  }

  // Scores of strip s of the chunk -> P as B tiles, and its sums. A product less a rounded maximum is one instruction, but
  // off by half a unit of that maximum: from 2^31 on by 2^7, for which exp2 has no range.
  void soften(int64_t s, int64_t n, int64_t width, float factor) {
    for (int64_t c = 0; c < width; c += kVec) {
      const Floats top = load(top_ + c), base = top * factor;
      if (_mm512_cmp_ps_mask(_mm512_abs_ps(base), splat(kLarge), _CMP_GT_OQ) == 0)
        soften_column(s, n, c, [=](Floats score) { return score * factor - base; });
      else
        soften_column(s, n, c, [=](Floats score) { return (score - top) * factor; });
    }
  }

  template <class Exponent>
  __attribute__((always_inline)) inline void soften_column(int64_t s, int64_t n, int64_t c, Exponent exponent) {
    const float* from = scores_ + s * kStrip * kRow + c;
    uint16_t* to = p_ + s * P * kStep + c / kVec * tile::kWords;
    Floats even{}, odd{};
    int64_t r = 0;
    for (; r + 2 <= n; r += 2) {
      const Floats a = power(exponent(load(from + r * kRow)));
      const Floats b = power(exponent(load(from + (r + 1) * kRow)));
      even += a, odd += b;
      store_pair<P>(to + r * 16, kStep, a, b);
    }
    for (; r < kStrip; r += 2) {
      const Floats a = r < n ? power(exponent(load(from + r * kRow))) : Floats{};
      even += a;
      store_pair<P>(to + r * 16, kStep, a, Floats{});
    }
    store(sum_ + c, load(sum_ + c) + (even + odd));
  }

  // H^T of the block as A tiles [sides, steps].
  void take_state(const Problem& p, const Layout& l, const float* state) {
    Scratch turned(l.rows * l.depth);
    std::fill(turned + 0, turned + l.rows * l.depth, 0.f);
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t e = 0; e < p.dim; ++e) turned[e * l.depth + d] = state[d * l.rows + e];
    for (int64_t m = 0; m < l.sides; ++m)
      for (int64_t s = 0; s < l.steps; ++s)
        tile::pack_a<P>(turned + m * 16 * l.depth + s * 32, l.depth, h_ + (m * l.steps + s) * tile::kWords,
                        l.sides * l.steps * tile::kWords);
  }

  // The product with A tiles [sides, steps] of what `packed_` holds.
  void multiply(const Layout& l, int64_t width, const uint16_t* a, float* to, bool add) {
    tile::multiply<P>(l.sides, width / kVec, {a, l.steps * tile::kWords, tile::kWords, l.sides * l.steps * tile::kWords},
                      {packed_, tile::kWords, kStep, l.steps * kStep}, l.steps, to, kLanes, add);
  }

  void attend_linearly(const Problem& p, const Layout& l, int64_t width, const float* z) {
    feature_lanes(p.feature, q_, p.dim, width);
    pack_lanes<P>(q_, l.steps, width, packed_);
    multiply(l, width, h_, linear_, false);
    for (int64_t c = 0; c < width; c += kVec) {
      Floats sum = splat(p.eps());
      for (int64_t d = 0; d < p.dim; ++d) sum += z[d] * load(q_ + d * kLanes + c);
      const Floats inverse = 1.f / (sum == 0.f ? splat(1.f) : sum);
      for (int64_t d = 0; d < p.dim; ++d) {
        const Floats x = load(linear_ + d * kLanes + c) * inverse;
        store(linear_ + d * kLanes + c, sum == 0.f ? Floats{} : x);
      }
    }
  }

  // sparse_ becomes o.
  void join(const Inputs<T>& in, int64_t at, int64_t n, int64_t width) {
    const Layout& l = in.layout;
    const int64_t dim = in.p.dim;
    if (in.weight != nullptr) {
      std::fill(linear_ + dim * kLanes, linear_ + l.depth * kLanes, 0.f);
      pack_lanes<P>(linear_, l.steps, width, packed_);
      multiply(l, width, in.weight, sparse_, true);
    }
    if (in.bias != nullptr)
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t c = 0; c < width; c += kVec)
          store(sparse_ + d * kLanes + c, load(sparse_ + d * kLanes + c) + in.bias[d]);
    if (in.alpha == nullptr) return;
    float mix[kLanes] = {};
    std::copy_n(in.alpha + at, n, mix);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t c = 0; c < width; c += kVec) {
        float* o = sparse_ + d * kLanes + c;
        const Floats share = load(mix + c);
        store(o, share * load(o) + (1.f - share) * load(linear_ + d * kLanes + c));
      }
  }

  // lanes -> n rows of an output.
  static void give(const float* lanes, int64_t n, int64_t dim, T* out) {
    for (int64_t c = 0; c < n; c += kVec)
      for (int64_t d = 0; d < dim; d += kVec) {
        T* to = out + c * dim + d;
        if (n - c < kVec || dim - d < kVec) {
          for (int64_t r = c; r < std::min(n, c + kVec); ++r)
            for (int64_t i = d; i < std::min(dim, d + kVec); ++i) store_value(out + r * dim + i, lanes[i * kLanes + r]);
        } else if constexpr (P == 3) {
          transpose(lanes + d * kLanes + c, kLanes, to, dim, 1.f);
        } else {
          alignas(64) float block[kVec * kVec];
          transpose(lanes + d * kLanes + c, kLanes, block, kVec, 1.f);
          for (int64_t r = 0; r < kVec; r += 2) {
            const tile::Words two = tile::rounded(load(block + r * kVec), load(block + (r + 1) * kVec));
            std::memcpy(to + r * dim, &two, 32);
            std::memcpy(to + (r + 1) * dim, reinterpret_cast<const char*>(&two) + 32, 32);
          }
        }
      }
  }

  Stage<T> stage_;
  Scratch q_, scores_, sparse_, linear_;
  Words16 packed_, p_, h_;
  alignas(64) float top_[kLanes], sum_[kLanes];
  std::vector<int64_t> strips_, counts_;
};

// ---------------------------------------------------------------------------------------------- all heads

// body(begin, end) over tasks of these costs, cut so that every thread gets about the same.
template <class Body>
void balanced(const std::vector<int64_t>& cost, Body body) {
  std::vector<int64_t> before(cost.size() + 1, 0);
  for (size_t i = 0; i < cost.size(); ++i) before[i + 1] = before[i] + cost[i];
  const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
  const auto at = [&](int64_t part) {
    const int64_t wanted = before.back() / parts * part + before.back() % parts * part / parts;
    if (part == parts) return static_cast<int64_t>(cost.size());
    return static_cast<int64_t>(std::lower_bound(before.begin(), before.end() - 1, wanted) - before.begin());
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = at(begin), last = at(end);
    if (first < last) body(first, last);
  });
}

template <class T>
void run(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Visible& seen, const int8_t* map,
         const float* weight, const float* bias, const float* alpha, bool linear, const Outputs<T>& out) {
  constexpr int P = kPlanes<T>;
  const Layout l(p, P);
  const bool all = p.scope == Scope::kAll;
  const int64_t nq = p.q_blocks(), nk = p.k_blocks(), size = p.state(), steps = blocks_a_segment(p), parts = segments(p);
  const int64_t states_a_head = linear ? all ? 1 : nq : 0, cover = linear && !all ? nq * nk : 0;
  Words16 w(weight != nullptr ? P * l.sides * l.steps * tile::kWords : 0);
  if (weight != nullptr) {
    Scratch wide(l.rows * l.depth);
    std::fill(wide + 0, wide + l.rows * l.depth, 0.f);
    for (int64_t d = 0; d < p.dim; ++d) std::copy_n(weight + d * p.dim, p.dim, wide + d * l.depth);
    for (int64_t m = 0; m < l.sides; ++m)
      for (int64_t s = 0; s < l.steps; ++s)
        tile::pack_a<P>(wide + m * 16 * l.depth + s * 32, l.depth, w + (m * l.steps + s) * tile::kWords,
                        l.sides * l.steps * tile::kWords);
  }
  const Inputs<T> in{p, l, View<T>(q, p.heads), View<T>(k, p.heads), View<T>(v, p.heads), seen, map,
                     weight != nullptr ? static_cast<uint16_t*>(w) : nullptr, bias, alpha};
  int64_t step = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(1, 2 * l.words()), 1, std::max<int64_t>(1, p.all_heads()));
  if (linear) step = std::min(step, heads_at_a_time(p, (parts + states_a_head) * size + cover));
  Words16 keys(step * l.strips * l.k_words), values(step * l.strips * l.v_words);
  Scratch states(linear ? step * parts * size : 0), sums(step * states_a_head * size), covered(step * cover);
  std::vector<int64_t> cost;
  for (int64_t first = 0; first < p.all_heads(); first += step) {
    const int64_t heads = std::min(step, p.all_heads() - first);
    torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      const Mode mode;
      KeySegment<T> work(p, l, linear);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / parts, block = task % parts * steps;
        work.run(in, first + head, block, std::min(nk, block + steps), keys + head * l.strips * l.k_words,
                 values + head * l.strips * l.v_words, linear ? states + task * size : nullptr);
      }
    });
    if (linear) {
      if (!all) cover_of(p, map, first, heads, covered);
      combine(heads, all ? 1 : nq, parts, size, all ? nullptr : static_cast<float*>(covered), false, states, sums);
    }
    cost.assign(heads * nq, 1);  // the rest of a block costs about as much as one critical block
    for (int64_t i = 0; i < heads * nq; ++i)
      for (int64_t j = 0; j < nk; ++j) cost[i] += map[(first * nq + i) * nk + j] == 1;
    balanced(cost, [&](int64_t begin, int64_t end) {
      const Mode mode;
      QueryBlock<T> work(p, l);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / nq;
        const float* state = linear ? sums + (all ? head : task) * size : nullptr;
        work.run(in, first + head, task % nq, keys + head * l.strips * l.k_words, values + head * l.strips * l.v_words,
                 state, !all || task == begin || task % nq == 0, out);
      }
    });
  }
}

}  // namespace triskele::TRISKELE_LEVEL::sla_tiles
#endif
