// The forward pass on packed tiles.
//
//   task    a range of queries of one (batch, head), walking the chunks; their sums stay in L2
//   visit   32 queries of the range that see the chunk, gathered
//   strip   128 keys of the chunk: scores by tiles, weights by vectors, weights @ values by tiles
//
// Scores of the next strip and the product of the last one are interleaved with the weights of this one: tiles and
// vectors then work at the same time. A row's base, which its exponents are measured from, moves only when the largest
// score passes it by 2^8, so that sums are rarely rescaled; no row's arithmetic depends on the rows beside it.
#pragma once
#include "cpu/vmoba_tiles.h"
#if defined(__AVX512BF16__)

namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles {

constexpr float kLn2 = 0.69314718055994531f;
constexpr int64_t kVisit = 32;
constexpr float kHeadroom = 8.f;  // of the weights, in powers of two
constexpr float kLarge = 0x1p20f;  // log2: bases from which on a fused exponent is too rough

template <int Planes>
struct TileScratch {
  Packing query, weights[2];
  Scratch scores[2], part, sums, line;
  std::vector<float> top, mass;  // of the range: the score that exponents are measured from, sum of weights
  std::vector<int32_t> index;
  float base[kVisit], raised[kVisit], factor[kVisit];
  alignas(64) float lanes[kVisit * kVec];  // sums of weights, a partial sum a lane
  int64_t width;                           // of part and sums: D in whole tiles

  TileScratch(const Layout& at, int64_t rows)
      : query(kVisit / kSide * at.across()),
        weights{Packing(kVisit / kSide * kStripSteps * Planes * kWords),
                Packing(kVisit / kSide * kStripSteps * Planes * kWords)},
        scores{Scratch(kVisit * kStripStride), Scratch(kVisit * kStripStride)},
        part(kVisit * (at.columns * kSide + kVec)), sums(rows * at.columns * kSide), line(at.padded()), top(rows),
        mass(rows), index(rows), width(at.columns * kSide) {
    // Rows past the last query of a visit are multiplied too; what comes of them goes nowhere.
    std::fill(query + 0, query + kVisit / kSide * at.across(), 0);
    for (Packing& w : weights) std::fill(w + 0, w + kVisit / kSide * kStripSteps * Planes * kWords, 0);
  }
  int64_t part_stride() const { return width + kVec; }
};

// Moves the bases of rows whose scores pass them; true where a row's sums need x.raised before they are added to.
template <int Planes>
bool raise(int64_t rows, int64_t keys, float scale, float* scores, TileScratch<Planes>& x) {
  const int64_t padded = round_up(keys, kDepth);
  bool any = false;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kStripStride;
    for (int64_t j = keys; j < padded; ++j) row[j] = -kInf;
    __m512 top = _mm512_loadu_ps(row);
    for (int64_t j = kVec; j < padded; j += kVec) top = _mm512_maskz_max_ps(0xFFFF, _mm512_loadu_ps(row + j), top);
    const float now = largest(reinterpret_cast<Floats>(top));
    x.raised[i] = 1.f;
    if ((now - x.base[i]) * scale > kHeadroom) {
      const float factor = std::exp2((x.base[i] - now) * scale);  // 0 at first: the base is -inf
      x.base[i] = now, x.raised[i] = factor, x.factor[i] *= factor;
      float* lanes = x.lanes + i * kVec;
      store(lanes, load(lanes) * factor);
      any = true;
    }
  }
  return any;
}

// Scores of row i -> weights, as a row of an A operand. A product less a rounded base is one instruction, but off by half
// a unit of that base: from 2^31 on by 2^7, for which exp2 has no range.
template <int Planes>
void weigh(int64_t i, int64_t keys, float scale, const float* scores, TileScratch<Planes>& x, uint16_t* weights) {
  const float* row = scores + i * kStripStride;
  uint16_t* to = weights + (i / kSide * kStripSteps * Planes) * kWords + i % kSide * kDepth;
  const float base = x.base[i] == -kInf ? 0.f : x.base[i];
  const __m512 factor = _mm512_set1_ps(scale), top = _mm512_set1_ps(base), shift = _mm512_set1_ps(base * scale);
  __m512 sum = _mm512_load_ps(x.lanes + i * kVec);
  const auto weights_of = [&](auto exponent) __attribute__((always_inline)) {
    for (int64_t j = 0; j < keys; j += kDepth, to += Planes * kWords) {
      const __m512 first = power<Planes>(exponent(_mm512_loadu_ps(row + j)));
      const __m512 second = power<Planes>(exponent(_mm512_loadu_ps(row + j + kVec)));
      sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
      store_weights<Planes>(to, first, second);
    }
  };
  if (std::fabs(base * scale) <= kLarge)
    weights_of([=](__m512 score) { return _mm512_fmsub_ps(score, factor, shift); });
  else
    weights_of([=](__m512 score) { return _mm512_mul_ps(_mm512_sub_ps(score, top), factor); });
  _mm512_store_ps(x.lanes + i * kVec, sum);
}

// Packed keys and values of a chunk.
struct ChunkTiles {
  const uint16_t *keys, *values;
  int64_t count;
};

template <int Planes>
void visit(const Layout& at, const ChunkTiles& chunk, int64_t rows, float scale, TileScratch<Planes>& x) {
  const int64_t tiles = (rows + kSide - 1) / kSide, strips = (chunk.count + kStrip - 1) / kStrip;
  const auto keys_of = [&](int64_t strip) { return std::min(kStrip, chunk.count - strip * kStrip); };
  const auto scores_of = [&](int64_t strip) {
    return Blocks<Planes>{at.across(x.query), at.across(chunk.keys + strip * (kStrip / kSide) * at.across()), tiles,
                          (keys_of(strip) + kDepth - 1) / kDepth * 2, at.steps, x.scores[strip & 1], kStripStride,
                          false};  // [rows, D] @ [D, keys]
  };
  const auto sums_of = [&](int64_t strip) {
    const tile::Operand weights{x.weights[strip & 1], kStripSteps * Planes * kWords, Planes * kWords, kWords};
    return Blocks<Planes>{weights, at.along(chunk.values + strip * kStripSteps * at.along()), tiles, at.columns,
                          (keys_of(strip) + kDepth - 1) / kDepth, x.part, x.part_stride(),
                          strip > 0};  // [rows, keys] @ [keys, D]
  };
  std::fill(x.lanes, x.lanes + rows * kVec, 0.f);
  std::fill(x.factor, x.factor + rows, 1.f);
  scores_of(0).run();
  for (int64_t strip = 0; strip < strips; ++strip) {
    float* scores = x.scores[strip & 1];
    const int64_t keys = keys_of(strip);
    const bool raised = raise(rows, keys, scale, scores, x);
    const bool first = strip == 0, last = strip + 1 == strips;
    const auto next = scores_of(last ? strip : strip + 1), before = sums_of(first ? strip : strip - 1);
    const int64_t ahead = last ? 0 : next.count(), jobs = ahead + (first ? 0 : before.count());
    int64_t row = 0;
    for (int64_t job = 0; job < jobs; ++job) {
      if (job < ahead) next.run(job);
      else before.run(job - ahead);
      for (; row < rows * (job + 1) / jobs; ++row) weigh(row, keys, scale, scores, x, x.weights[strip & 1]);
    }
    for (; row < rows; ++row) weigh(row, keys, scale, scores, x, x.weights[strip & 1]);
    if (raised && !first)
      for (int64_t i = 0; i < rows; ++i)
        if (x.raised[i] != 1.f) {
          float* part = x.part + i * x.part_stride();
          for (int64_t d = 0; d < x.width; d += kVec) store(part + d, load(part + d) * x.raised[i]);
        }
  }
  sums_of(strips - 1).run();
}

template <class T>
void run_forward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const uint8_t* mask,
                 const Tensor& out, float* lse) {
  constexpr int kPlanes = kPlanesOf<T>;
  const Layout at(s, kPlanes);
  const int64_t across = at.keys_across(s.chunks), along = at.keys_along(s.chunks);
  const int64_t pairs = pairs_at_once(s, 2 * (across + along)), width = range_rows(s);
  const int64_t ranges = (s.length + width - 1) / width;
  const Packing keys(pairs * across), values(pairs * along);
  const Rows<T> queries(q), key_rows(k), value_rows(v), outputs(out);
  const Selection selection{s, mask};
  const float scale = kLog2E / std::sqrt(static_cast<float>(s.dim));
  for (int64_t wave = 0; wave < s.pairs(); wave += pairs) {
    const int64_t count = std::min(pairs, s.pairs() - wave);
    torch::stable::parallel_for(0, count * s.chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch lines(kDepth * kLineStride);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / s.chunks, c = task % s.chunks;
        pack_chunk(s, key_rows, wave + pair, c, at, lines, keys + pair * across + at.keys_across(c), nullptr);
        pack_chunk(s, value_rows, wave + pair, c, at, lines, nullptr, values + pair * along + at.keys_along(c));
      }
    });
    torch::stable::parallel_for(0, count * ranges, 1, [&](int64_t begin, int64_t end) {
      const tile::Registers registers;
      const auto scratch = std::make_unique<TileScratch<kPlanes>>(at, std::min(width, s.length));
      TileScratch<kPlanes>& x = *scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = wave + task / ranges, first = task % ranges * width;
        const int64_t last = std::min(first + width, s.length);
        std::fill(x.top.begin(), x.top.end(), -kInf);
        std::fill(x.mass.begin(), x.mass.end(), 0.f);
        std::fill(x.sums + 0, x.sums + (last - first) * x.width, 0.f);
        for (int64_t c = 0; c < s.chunks; ++c) {
          const int64_t selected = selection.rows(pair, c, first, last, x.index.data());
          const ChunkTiles chunk{keys + task / ranges * across + at.keys_across(c),
                                 values + task / ranges * along + at.keys_along(c), s.bounds[c + 1] - s.bounds[c]};
          for (int64_t g = 0; g < selected; g += kVisit) {
            const int64_t rows = std::min(kVisit, selected - g);
            const int32_t* index = x.index.data() + g;
            for (int64_t i = 0; i < rows; ++i) {
              gather_across(queries, pair, s.order[first + index[i]], at, i, x.line, x.query);
              x.base[i] = x.top[index[i]];
            }
            visit(at, chunk, rows, scale, x);
            for (int64_t i = 0; i < rows; ++i) {
              float *sum = x.sums + index[i] * x.width, &mass = x.mass[index[i]];
              const float *part = x.part + i * x.part_stride(), factor = x.factor[i];
              for (int64_t d = 0; d < x.width; d += kVec) store(sum + d, load(sum + d) * factor + load(part + d));
              mass = mass * factor + total(load(x.lanes + i * kVec));
              x.top[index[i]] = x.base[i];
            }
          }
        }
        for (int64_t i = 0; i < last - first; ++i) {
          outputs.write(pair, s.order[first + i], x.sums + i * x.width, 1.f / x.mass[i]);
          const float base = x.top[i] == -kInf ? 0.f : x.top[i];
          lse[pair * s.length + s.order[first + i]] = base * (scale * kLn2) + std::log(x.mass[i]);
        }
      }
    });
  }
}

}  // namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles
#endif
