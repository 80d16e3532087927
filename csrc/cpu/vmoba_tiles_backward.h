// The backward pass on packed tiles: scores and weights are computed once, for all three gradients.
//
//   segment  up to 512 keys of a chunk, whose gradients (transposed) stay in L2
//   visit    128 queries that see the chunk, gathered: as rows for scores, transposed for the keys' gradients
//   strip    128 keys, taken 32 queries at a time: scores and dP by tiles, P and dS by vectors; then the three products
//
// As in the forward, tiles work on the next scores and the last strip's products while vectors do P and dS.
//
// A query gets a part of dQ from each segment, and these are added in the order of the keys. One task a (batch, head)
// adds them as they come; where there are too few of those for the threads, a task is a segment and leaves its parts in
// slots, which a second pass adds in the same order: the same bits either way.
#pragma once
#include "cpu/vmoba_tiles.h"
#if defined(__AVX512BF16__)

namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles {

constexpr int64_t kBackVisit = 128;
constexpr int64_t kBackBlock = 32;    // queries of a block of scores: a step of depth
constexpr int64_t kSegment = 512;
constexpr int64_t kGradStride = kSegment + kVec;
constexpr int64_t kSlotFloats = int64_t{16} << 20;

struct Segment {
  int64_t chunk, first, count;  // first position, keys
};

inline std::vector<Segment> segments_of(const Shape& s) {
  std::vector<Segment> out;
  for (int64_t c = 0; c < s.chunks; ++c)
    for (int64_t j = s.bounds[c]; j < s.bounds[c + 1]; j += kSegment)
      out.push_back({c, j, std::min(kSegment, s.bounds[c + 1] - j)});
  return out;
}

template <int Planes>
struct BackwardTileScratch {
  Packing query, grad, query_lines, grad_lines;  // A operands: [queries, D], and [D, queries]
  Packing weights[2], slopes[2], slope_rows[2];  // P and dS as B [queries, keys]; dS as A [queries, keys]
  Scratch scores[2], slants[2], part, dkeys, dvalues, lines;
  std::vector<int32_t> index;
  float lse[kBackVisit], delta[kBackVisit];
  int64_t width;

  static Packing strip() { return Packing(kBackVisit * kStrip * Planes); }
  static Scratch block() { return Scratch(kBackBlock * kStripStride); }
  BackwardTileScratch(const Layout& at, int64_t length)
      : query(kBackVisit / kSide * at.across()), grad(kBackVisit / kSide * at.across()),
        query_lines(kBackVisit / kDepth * at.along()), grad_lines(kBackVisit / kDepth * at.along()),
        weights{strip(), strip()}, slopes{strip(), strip()}, slope_rows{strip(), strip()}, scores{block(), block()},
        slants{block(), block()}, part(kBackVisit * (at.columns * kSide + kVec)),
        dkeys(at.columns * kSide * kGradStride), dvalues(at.columns * kSide * kGradStride),
        lines(kBackBlock * kLineStride), index(length), width(at.columns * kSide) {}
  int64_t part_stride() const { return width + kVec; }
};

// Rows 2i and 2i+1 of B operands from 16 columns of two rows.
template <int Planes>
__attribute__((always_inline)) inline void store_pair(uint16_t* to, __m512 even, __m512 odd) {
  if constexpr (Planes == 1) {
    static constexpr auto kInterleave = [] {
      struct alignas(64) {
        uint16_t lane[32];
      } index{};
      for (int i = 0; i < 32; ++i) index.lane[i] = i / 2 + i % 2 * 16;
      return index;
    }();
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(&kInterleave), both));
  } else {
    tile::Words a[3], b[3];
    tile::split<3>(even, a);
    tile::split<3>(odd, b);
    for (int p = 0; p < 3; ++p) tile::store(to + p * kWords, tile::pair(a[p], b[p]));
  }
}

// P = 2^(scale S - lse), at most 1 however lse was rounded, and dS = P (dP - delta) of rows i and i + 1, i even.
template <int Planes>
void weigh_pair(int64_t block, int64_t i, int64_t keys, float scale, const float* scores, const float* slants,
                int64_t buffer, BackwardTileScratch<Planes>& x) {
  const int64_t row = block * kBackBlock + i, tiles = kStrip / kSide;
  const float *s0 = scores + i * kStripStride, *s1 = s0 + kStripStride;
  const float *d0 = slants + i * kStripStride, *d1 = d0 + kStripStride;
  uint16_t* weights = x.weights[buffer] + block * tiles * Planes * kWords + i / 2 * kDepth;
  uint16_t* slopes = x.slopes[buffer] + block * tiles * Planes * kWords + i / 2 * kDepth;
  uint16_t* rows = x.slope_rows[buffer] + row / kSide * kStripSteps * Planes * kWords + row % kSide * kDepth;
  const __m512 factor = _mm512_set1_ps(scale), none = _mm512_setzero_ps();
  const __m512 lse0 = _mm512_set1_ps(x.lse[row]), lse1 = _mm512_set1_ps(x.lse[row + 1]);
  const __m512 delta0 = _mm512_set1_ps(x.delta[row]), delta1 = _mm512_set1_ps(x.delta[row + 1]);
  for (int64_t j = 0; j < keys; j += kDepth) {
    __m512 slope0[2], slope1[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = j + half * kSide, to = at / kSide * Planes * kWords;
      const __m512 x0 = _mm512_fmsub_ps(_mm512_loadu_ps(s0 + at), factor, lse0);
      const __m512 x1 = _mm512_fmsub_ps(_mm512_loadu_ps(s1 + at), factor, lse1);
      const __m512 p0 = power<Planes>(_mm512_maskz_min_ps(0xFFFF, none, x0));
      const __m512 p1 = power<Planes>(_mm512_maskz_min_ps(0xFFFF, none, x1));
      slope0[half] = _mm512_mul_ps(p0, _mm512_sub_ps(_mm512_loadu_ps(d0 + at), delta0));
      slope1[half] = _mm512_mul_ps(p1, _mm512_sub_ps(_mm512_loadu_ps(d1 + at), delta1));
      store_pair<Planes>(weights + to, p0, p1);
      store_pair<Planes>(slopes + to, slope0[half], slope1[half]);
    }
    uint16_t* to = rows + j / kDepth * Planes * kWords;
    store_weights<Planes>(to, slope0[0], slope0[1]);
    store_weights<Planes>(to + kDepth, slope1[0], slope1[1]);
  }
}

// Packed keys and values of a segment: across for scores and dP, along for dQ.
struct SegmentTiles {
  const uint16_t *keys, *values, *key_rows;
  int64_t count;
};

template <int Planes>
void visit_backward(const Layout& at, const SegmentTiles& segment, int64_t rows, float scale,
                    BackwardTileScratch<Planes>& x) {
  using Product = Blocks<Planes>;
  constexpr int64_t kTile = Planes * kWords;
  const int64_t blocks = (rows + kBackBlock - 1) / kBackBlock, strips = (segment.count + kStrip - 1) / kStrip;
  const auto keys_of = [&](int64_t strip) { return std::min(kStrip, segment.count - strip * kStrip); };
  const auto steps_of = [&](int64_t strip) { return (keys_of(strip) + kDepth - 1) / kDepth; };
  const auto scores_of = [&](int64_t stage, const uint16_t* left, const uint16_t* right, float* to) {
    const int64_t strip = stage / blocks, block = stage % blocks;  // [queries, D] @ [D, keys]
    return Product{at.across(left + block * 2 * at.across()), at.across(right + strip * (kStrip / kSide) * at.across()),
                   2, 2 * steps_of(strip), at.steps, to, kStripStride, false};
  };
  const auto keys_grad_of = [&](int64_t strip, const uint16_t* left, const uint16_t* right, float* to) {
    return Product{{left, kBackVisit / kDepth * kTile, kTile, kWords}, {right, kTile, kStrip / kSide * kTile, kWords},
                   at.columns, 2 * steps_of(strip), blocks, to + strip * kStrip, kGradStride,
                   true};  // [D, queries] @ [queries, keys]
  };
  const auto products_of = [&](int64_t strip, Product* out) {
    const int64_t b = strip & 1;
    out[0] = keys_grad_of(strip, x.grad_lines, x.weights[b], x.dvalues);
    out[1] = keys_grad_of(strip, x.query_lines, x.slopes[b], x.dkeys);
    out[2] = Product{{x.slope_rows[b], kStripSteps * kTile, kTile, kWords},
                     at.along(segment.key_rows + strip * kStripSteps * at.along()), 2 * blocks, at.columns,
                     steps_of(strip), x.part, x.part_stride(), strip > 0};  // [queries, keys] @ [keys, D]
  };
  const auto run = [](const Product* products, int64_t job) {
    while (job >= products->count()) job -= products->count(), ++products;
    products->run(job);
  };
  const int64_t stages = strips * blocks;
  Product next[2] = {scores_of(0, x.query, segment.keys, x.scores[0]),
                     scores_of(0, x.grad, segment.values, x.slants[0])};
  Product before[3];
  next[0].run(), next[1].run();
  int64_t due = 0;  // jobs of the strip before
  for (int64_t stage = 0; stage < stages; ++stage) {
    const int64_t strip = stage / blocks, block = stage % blocks, keys = keys_of(strip), turn = stage & 1;
    if (block == 0 && strip > 0) {
      products_of(strip - 1, before);
      due = before[0].count() + before[1].count() + before[2].count();
    }
    int64_t ahead = 0;
    if (stage + 1 < stages) {
      next[0] = scores_of(stage + 1, x.query, segment.keys, x.scores[turn ^ 1]);
      next[1] = scores_of(stage + 1, x.grad, segment.values, x.slants[turn ^ 1]);
      ahead = next[0].count() + next[1].count();
    }
    const int64_t done = due * block / blocks, jobs = ahead + due * (block + 1) / blocks - done;
    float *scores = x.scores[turn], *slants = x.slants[turn];
    for (int64_t i = 0; i < kBackBlock; ++i)
      for (int64_t j = keys; j < steps_of(strip) * kDepth; ++j) scores[i * kStripStride + j] = -kInf;
    int64_t row = 0;
    const auto weigh_to = [&](int64_t end) {
      for (; row < end; row += 2) weigh_pair(block, row, keys, scale, scores, slants, strip & 1, x);
    };
    for (int64_t job = 0; job < jobs; ++job) {
      if (job < ahead) run(next, job);
      else run(before, done + job - ahead);
      weigh_to(kBackBlock * (job + 1) / jobs);
    }
    weigh_to(kBackBlock);
  }
  products_of(strips - 1, before);
  for (const Product& product : before) product.run();
}

// 32 rows of floats as a step of depth of an A operand whose rows are D.
template <int Planes>
void pack_lines(const float* rows, int64_t stride, const Layout& at, int64_t step, uint16_t* out) {
  for (int64_t n = 0; n < at.columns; ++n) {
    Floats first[kSide], second[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      first[i] = load(rows + i * stride + n * kSide);
      second[i] = load(rows + (kSide + i) * stride + n * kSide);
    }
    transpose_step<kSide / 2>(first);
    transpose_step<kSide / 2>(second);
    uint16_t* to = out + (n * (kBackVisit / kDepth) + step) * Planes * kWords;
    for (int64_t i = 0; i < kSide; ++i)
      store_weights<Planes>(to + i * kDepth, reinterpret_cast<__m512>(first[i]), reinterpret_cast<__m512>(second[i]));
  }
}

// The whole backward of some pairs: what it reads, packed, and what both ways of adding dQ share.
template <class T>
struct BackwardTiles {
  static constexpr int kPlanes = kPlanesOf<T>;
  using X = BackwardTileScratch<kPlanes>;
  const Shape& s;
  const Layout at;
  const Rows<T> queries, keys, values, outputs, grads, dq, dk, dv;
  const float* row_lse;
  const Selection selection;
  const std::vector<Segment> segments;
  const int64_t across, along, pairs, width;
  const Packing key_tiles, value_tiles, key_row_tiles;
  const Scratch lse, delta, sums;
  const float scale;
  int64_t wave = 0;

  BackwardTiles(const Shape& s, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& out, const float* row_lse, const uint8_t* mask, const Tensor& dq, const Tensor& dk,
                const Tensor& dv)
      : s(s), at(s, kPlanes), queries(q), keys(k), values(v), outputs(out), grads(grad), dq(dq), dk(dk), dv(dv),
        row_lse(row_lse), selection{s, mask}, segments(segments_of(s)), across(at.keys_across(s.chunks)),
        along(at.keys_along(s.chunks)), pairs(pairs_at_once(s, 2 * (2 * across + along) + 4 * s.length * s.dp, true)),
        width(at.columns * kSide), key_tiles(pairs * across), value_tiles(pairs * across),
        key_row_tiles(pairs * along), lse(pairs * s.length), delta(pairs * s.length), sums(pairs * s.length * width),
        scale(1.f / std::sqrt(static_cast<float>(s.dim))) {}

  void pack(int64_t count) const {
    torch::stable::parallel_for(0, count * s.chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch lines(kDepth * kLineStride);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / s.chunks, c = task % s.chunks;
        const int64_t across_at = pair * across + at.keys_across(c);
        pack_chunk(s, keys, wave + pair, c, at, lines, key_tiles + across_at,
                   key_row_tiles + pair * along + at.keys_along(c));
        pack_chunk(s, values, wave + pair, c, at, lines, value_tiles + across_at, nullptr);
      }
    });
    torch::stable::parallel_for(0, count * s.length, 256, [&](int64_t begin, int64_t end) {
      alignas(64) float out[kMaxDim], grad[kMaxDim];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = wave + i / s.length, token = s.order[i % s.length];
        outputs.read(pair, token, s.dp, out);
        grads.read(pair, token, s.dp, grad);
        Floats sum{};
        for (int64_t d = 0; d < s.dp; d += kVec) sum += load(out + d) * load(grad + d);
        delta[i] = total(sum);
        lse[i] = row_lse[pair * s.length + token] * kLog2E;
      }
    });
    std::fill(sums + 0, sums + count * s.length * width, 0.f);
  }

  // Queries index[0 .. rows) of a pair, as both kinds of A operand; zeros, and weights of zero, past the last.
  void gather(int64_t pair, const int32_t* index, int64_t rows, X& x) const {
    const int64_t base = (pair - wave) * s.length;
    for (int64_t block = 0; block * kBackBlock < rows; ++block)
      for (int which = 0; which < 2; ++which) {
        for (int64_t r = 0; r < kBackBlock; ++r) {
          const int64_t i = block * kBackBlock + r;
          float* line = x.lines + r * kLineStride;
          if (i < rows) (which ? grads : queries).read(pair, s.order[index[i]], at.padded(), line);
          else std::fill(line, line + at.padded(), 0.f);
          if (which == 0) x.lse[i] = i < rows ? lse[base + index[i]] : kInf;
          else x.delta[i] = i < rows ? delta[base + index[i]] : 0.f;
        }
        uint16_t* to = (which ? x.grad : x.query) + block * 2 * at.across();
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t step = 0; step < at.steps; ++step)
            tile::pack_a<kPlanes>(x.lines + half * kSide * kLineStride + step * kDepth, kLineStride,
                                  to + half * at.across() + step * kPlanes * kWords, kWords);
        pack_lines<kPlanes>(x.lines, kLineStride, at, block, which ? x.grad_lines : x.query_lines);
      }
  }

  // A segment's gradients, and a part of dQ for each query that sees it: add(number in the list, query, part).
  template <class Add>
  void run(int64_t pair, const Segment& segment, int64_t selected, X& x, const Add& add) const {
    const int64_t local = pair - wave, step = (segment.first - s.bounds[segment.chunk]) / kDepth;
    const int64_t keys_at = local * across + at.keys_across(segment.chunk) + 2 * step * at.across();
    const SegmentTiles tiles{key_tiles + keys_at, value_tiles + keys_at,
                             key_row_tiles + local * along + at.keys_along(segment.chunk) + step * at.along(),
                             segment.count};
    std::fill(x.dkeys + 0, x.dkeys + width * kGradStride, 0.f);
    std::fill(x.dvalues + 0, x.dvalues + width * kGradStride, 0.f);
    for (int64_t g = 0; g < selected; g += kBackVisit) {
      const int64_t rows = std::min(kBackVisit, selected - g);
      gather(pair, x.index.data() + g, rows, x);
      visit_backward(at, tiles, rows, scale * kLog2E, x);
      for (int64_t i = 0; i < rows; ++i) add(g + i, x.index[g + i], x.part + i * x.part_stride());
    }
    for (int64_t j = 0; j < segment.count; j += kSide)
      for (int which = 0; which < 2; ++which) {
        for (int64_t d = 0; d < width; d += kSide)
          transpose((which ? x.dvalues : x.dkeys) + d * kGradStride + j, kGradStride, x.lines + d, kLineStride, 1.f);
        for (int64_t r = 0; r < std::min(kSide, segment.count - j); ++r)
          (which ? dv : dk).write(pair, s.order[segment.first + j + r], x.lines + r * kLineStride, which ? 1.f : scale);
      }
  }

  void add_row(float* sum, const float* part) const {
    for (int64_t d = 0; d < width; d += kVec) store(sum + d, load(sum + d) + load(part + d));
  }

  void by_pairs(int64_t count) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const tile::Registers registers;
      const auto x = std::make_unique<X>(at, s.length);
      for (int64_t local = begin; local < end; ++local) {
        int64_t chunk = -1, selected = 0;
        for (const Segment& segment : segments) {
          if (segment.chunk != chunk)
            selected = selection.rows(wave + local, chunk = segment.chunk, 0, s.length, x->index.data());
          run(wave + local, segment, selected, *x, [&](int64_t, int64_t query, const float* part) {
            add_row(sums + (local * s.length + query) * width, part);
          });
        }
      }
    });
  }

  void by_segments(int64_t count) const {
    const int64_t rows = range_rows(s), ranges = (s.length + rows - 1) / rows, all = segments.size();
    std::vector<int64_t> before(count * s.chunks * (ranges + 1));  // queries that see the chunk, before each range
    torch::stable::parallel_for(0, count * s.chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(rows);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < ranges; ++r)
          before[i * (ranges + 1) + r + 1] =
              before[i * (ranges + 1) + r] + selection.rows(wave + i / s.chunks, i % s.chunks, r * rows,
                                                            std::min((r + 1) * rows, s.length), index.data());
    });
    const auto before_range = [&](int64_t local, int64_t chunk, int64_t range) {
      return before[(local * s.chunks + chunk) * (ranges + 1) + range];
    };
    for (int64_t from = 0, to = 0; from < all; from = to) {
      std::vector<int64_t> slot;  // [segments from .. to][pairs]: first of its slots
      int64_t slots = 0;
      for (; to < all && (to == from || slots * width < kSlotFloats); ++to)
        for (int64_t local = 0; local < count; ++local) {
          slot.push_back(slots);
          slots += before_range(local, segments[to].chunk, ranges);
        }
      const Scratch parts(slots * width);
      torch::stable::parallel_for(0, (to - from) * count, 1, [&](int64_t begin, int64_t end) {
        const tile::Registers registers;
        const auto x = std::make_unique<X>(at, s.length);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = wave + i % count;
          const Segment& segment = segments[from + i / count];
          const int64_t selected = selection.rows(pair, segment.chunk, 0, s.length, x->index.data());
          run(pair, segment, selected, *x, [&](int64_t number, int64_t, const float* part) {
            std::memcpy(parts + (slot[i] + number) * width, part, width * sizeof(float));
          });
        }
      });
      torch::stable::parallel_for(0, count * ranges, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> index(rows);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t local = task / ranges, range = task % ranges, first = range * rows;
          for (int64_t i = from; i < to; ++i) {
            const int64_t chunk = segments[i].chunk, last = std::min(first + rows, s.length);
            const int64_t selected = selection.rows(wave + local, chunk, first, last, index.data());
            const float* part = parts + (slot[(i - from) * count + local] + before_range(local, chunk, range)) * width;
            for (int64_t n = 0; n < selected; ++n)
              add_row(sums + (local * s.length + first + index[n]) * width, part + n * width);
          }
        }
      });
    }
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads();
    for (wave = 0; wave < s.pairs(); wave += pairs) {
      const int64_t count = std::min(pairs, s.pairs() - wave);
      pack(count);
      if (count % threads == 0 || count >= 4 * threads) by_pairs(count);
      else by_segments(count);
      torch::stable::parallel_for(0, count * s.length, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          dq.write(wave + i / s.length, s.order[i % s.length], sums + i * width, scale);
      });
    }
  }
};

template <class T>
void run_backward(const Shape& s, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const float* lse, const uint8_t* mask, const Tensor& dq, const Tensor& dk,
                  const Tensor& dv) {
  BackwardTiles<T>(s, grad, q, k, v, out, lse, mask, dq, dk, dv).run();
}

}  // namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles
#endif
