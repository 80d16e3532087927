// The sparse branch's backward on packed tiles: up to 128 queries at a time against chunks of 64 keys, everything
// transposed (a row a key, a lane a query), so that P and dS come out of the vector units as the operands they become:
//
//   S^T  [keys, queries] = K Q^T         dV [keys, D] += P^T dO        dQ^T [D, queries] += K^T dS^T
//   dP^T [keys, queries] = V dO^T        dK [keys, D] += dS^T Q
//
// Keys are packed once a head, in three layouts (K, V by rows, K by columns); queries once a call. One plane where the
// inputs are bfloat16 (P and dS are then rounded to it), three where they are float32: see tiles.h.
#pragma once
#include "cpu/tiles.h"
#if defined(__AVX512BF16__)
#include "cpu/sla_backward.h"

namespace triskele::TRISKELE_LEVEL::backward {

constexpr int64_t kPair = 32;  // queries and keys are padded to multiples of this: one step of depth

constexpr float kLarge = 0x1p20f;  // log2: an lse from which on its rounding shows

// 2^x, zero below 2^-125 (no subnormal number: they are slow); NaN of NaN. Relative error 3e-6 for bfloat16 to come,
// 2e-7 otherwise. `Capped`: at most 1, else for x < 128. No weight passes 1, but a large lse is rounded by any amount.
template <bool Rough, bool Capped>
inline __m512 power(__m512 scores, __m512 factor, __m512 shift) {
  const __m512 magic = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  __m512 x = _mm512_fmsub_ps(scores, factor, shift);
  if constexpr (Capped) x = _mm512_maskz_min_ps(0xFFFF, _mm512_setzero_ps(), x);
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));  // in [-1/2, 1/2]
  __m512 y;
  if constexpr (Rough) {
    y = _mm512_fmadd_ps(_mm512_set1_ps(9.58286e-3f), f, _mm512_set1_ps(5.590643e-2f));
  } else {
    y = _mm512_fmadd_ps(_mm512_set1_ps(1.53533619e-4f), f, _mm512_set1_ps(1.33988744e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61843736e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55033247e-2f));
  }
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(Rough ? 2.4024099e-1f : 2.40226479e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(Rough ? 6.9312419e-1f : 6.93147203e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.f), _CMP_NLT_UQ);
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(normal, _mm512_castps_si512(y), reinterpret_cast<__m512i>(exponent)));
}

// The planes of a float: as tile::split, but one plane is rounded by adding half (ties up) and keeps its low half.
template <int Planes>
inline void cut(__m512 value, __m512i* planes) {
  const __m512i bits = _mm512_castps_si512(value);
  if constexpr (Planes == 1) {
    planes[0] = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
  } else {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    planes[0] = _mm512_and_si512(bits, high);
    const __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(planes[0]));
    planes[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000)), high);
    planes[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(planes[1])));
  }
}

// Words whose low half is the high half of `first`, and whose high half is that of `second`.
inline __m512i join(__m512i first, __m512i second) {
  return reinterpret_cast<__m512i>((reinterpret_cast<tile::Words>(first) >> 16) |
                                   (reinterpret_cast<tile::Words>(second) & 0xFFFF0000u));
}

template <int Planes>
class TileSparse {
 public:
  static constexpr int64_t kChunk = 2 * kLanes;
  static constexpr int64_t kKeys = 64;  // of a chunk
  static int64_t height(const Problem& p) { return round_up(p.block_k, kPair); }
  static int64_t words(const Problem& p) { return p.k_blocks() * block_words(p); }
  static bool takes(const Problem& p) { return p.block_k >= tile::kSide; }

  explicit TileSparse(const Problem& p)
      : deep_(round_up(p.dim, tile::kDepth)), wide_(p.padded()), depths_(deep_ / tile::kDepth),
        columns_(wide_ / tile::kSide), qb_(Planes * kChunk * deep_), gb_(Planes * kChunk * deep_),
        qd_(Planes * kChunk * wide_), gd_(Planes * kChunk * wide_), p_(Planes * kChunk * kKeys),
        ds_(Planes * kChunk * kKeys), ds_b_(Planes * kChunk * kKeys), rows_(kChunk * deep_), lanes_(deep_ * kLanes),
        scores_(kKeys * kPair), gradients_(kKeys * kPair) {}

  // The three layouts of key block j of `head`, into the head's `packed`.
  void pack_keys(const Inputs& in, int64_t head, int64_t j, uint16_t* packed) {
    const Problem& p = in.p;
    uint16_t* to = packed + j * block_words(p);
    const int64_t tall = height(p), visible = in.visible(head, j);
    const int64_t plane = tall * deep_, across = tall * wide_;
    for (int64_t t = 0; t < visible; t += kLanes) {
      const int64_t n = std::min(kLanes, visible - t), filled = round_up(n, kPair), row = j * p.block_k + t;
      const int64_t first = t / tile::kSide;
      const float* k = padded_rows(in.k, head, row, n, filled);
      for (int64_t r = 0; r < filled; r += tile::kSide)
        for (int64_t s = 0; s < depths_; ++s)
          tile::pack_a<Planes>(k + r * deep_ + s * tile::kDepth, deep_,
                               to + ((first + r / tile::kSide) * depths_ + s) * tile::kWords, plane);
      to_lanes(k, deep_, filled, wide_, 1.f, lanes_);
      for (int64_t g = 0; g < filled; g += kPair)
        for (int64_t d = 0; d < columns_; ++d)
          tile::pack_a<Planes>(lanes_ + d * tile::kSide * kLanes + g, kLanes,
                               to + 2 * Planes * plane + ((t + g) / kPair * columns_ + d) * tile::kWords, across);
      const float* v = padded_rows(in.v, head, row, n, filled);
      for (int64_t r = 0; r < filled; r += tile::kSide)
        for (int64_t s = 0; s < depths_; ++s)
          tile::pack_a<Planes>(v + r * deep_ + s * tile::kDepth, deep_,
                               to + Planes * plane + ((first + r / tile::kSide) * depths_ + s) * tile::kWords, plane);
    }
  }

  // Rows [row, row + n) of a query block: dq, two of [D, kLanes], is written, sums are added to.
  void run(const Inputs& in, int64_t head, int64_t row, int64_t n, const std::vector<int64_t>& critical,
           const uint16_t* packed, const KeySums& sums, float* dq) {
    const Problem& p = in.p;
    std::fill(dq, dq + 2 * wide_ * kLanes, 0.f);
    if (critical.empty()) return;
    const int64_t groups = (n + kPair - 1) / kPair, at = head * p.queries + row;
    std::fill(large_, large_ + kGroups, false);
    for (int64_t r = 0; r < groups * kPair; ++r) {
      shift_[r] = r < n ? in.lse[at + r] * kLog2E : 1e30f;  // past the end P is zero
      offset_[r] = r < n ? in.offset[at + r] : 0.f;
      large_[r / kPair] |= r < n && std::fabs(shift_[r]) > kLarge;
    }
    pack_queries(in.q, head, row, n, groups, qb_, qd_);
    pack_queries(in.d_sparse, head, row, n, groups, gb_, gd_);
    const int64_t tall = height(p), plane = tall * deep_, across = tall * wide_;
    for (const int64_t j : critical) {
      const uint16_t* block = packed + j * block_words(p);
      const bool add = sums.touched[j] != 0;
      for (int64_t t = 0; t < in.visible(head, j); t += kKeys) {
        const int64_t m = std::min(kKeys, in.visible(head, j) - t), tiles = round_up(m, kPair) / tile::kSide;
        const uint16_t* k = block + t * deep_;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t b = g * 2 * depths_ * tile::kWords;
          // By the product that the forward takes for the scores: what it rounds off is in lse too, and goes out.
          tile::multiply<Planes>(tiles, 2, {k, depths_ * tile::kWords, tile::kWords, plane},
                                 {qb_ + b, depths_ * tile::kWords, tile::kWords, kChunk * deep_}, depths_, scores_,
                                 kPair, false);
          tile::multiply_exactly<Planes>(tiles, 2, {k + Planes * plane, depths_ * tile::kWords, tile::kWords, plane},
                                 {gb_ + b, depths_ * tile::kWords, tile::kWords, kChunk * deep_}, depths_, gradients_,
                                 kPair, false);
          if (large_[g]) weigh<true>(p.scale * kLog2E, m, tiles, g);
          else weigh<false>(p.scale * kLog2E, m, tiles, g);
        }
        const int64_t key = j * tall + t;
        const tile::Operand weights{p_, kGroups * tile::kWords, tile::kWords, kChunk * kKeys};
        const tile::Operand slopes{ds_, kGroups * tile::kWords, tile::kWords, kChunk * kKeys};
        tile::multiply_exactly<Planes>(tiles, columns_, weights, {gd_, tile::kWords, columns_ * tile::kWords, kChunk * wide_},
                               groups, sums.dv + key * wide_, wide_, add);
        tile::multiply_exactly<Planes>(tiles, columns_, slopes, {qd_, tile::kWords, columns_ * tile::kWords, kChunk * wide_},
                               groups, sums.dk + key * wide_, wide_, add);
        const tile::Operand keys{block + 2 * Planes * plane + t * wide_, tile::kWords, columns_ * tile::kWords, across};
        for (int64_t half = 0; half < groups; half += 2)
          tile::multiply_exactly<Planes>(columns_, 2 * std::min<int64_t>(2, groups - half), keys,
                                 {ds_b_ + half * 2 * kSteps * tile::kWords, kSteps * tile::kWords, tile::kWords,
                                  kChunk * kKeys},
                                 tiles / 2, dq + half / 2 * wide_ * kLanes, kLanes, true);
      }
      sums.touched[j] = 1;
    }
    scale_lanes(dq, 2 * wide_, kLanes, p.scale, dq);
  }

 private:
  static constexpr int64_t kGroups = kChunk / kPair, kSteps = kKeys / kPair;

  static int64_t block_words(const Problem& p) {
    return Planes * height(p) * (2 * round_up(p.dim, tile::kDepth) + p.padded());
  }

  // n rows as float, deep_ wide and `filled` high, zeros where nothing is.
  const float* padded_rows(const Source& x, int64_t head, int64_t row, int64_t n, int64_t filled) {
    int64_t stride;
    const float* from = x.rows(head, row, n, rows_, deep_, true, stride);
    if (from != rows_ + 0)
      for (int64_t r = 0; r < n; ++r) std::copy_n(from + r * stride, deep_, rows_ + r * deep_);
    std::fill(rows_ + n * deep_, rows_ + filled * deep_, 0.f);
    return rows_;
  }

  // `by_depth`: B tiles of x^T, [query tile][step of D]; `by_query`: B tiles of x, [step of queries][tile of D], where a
  // step pairs query r with query r + 16.
  void pack_queries(const Source& x, int64_t head, int64_t row, int64_t n, int64_t groups, uint16_t* by_depth,
                    uint16_t* by_query) {
    const float* rows = padded_rows(x, head, row, n, groups * kPair);
    for (int64_t c = 0; c < groups * kPair; c += kLanes) {
      const int64_t width = std::min(kLanes, groups * kPair - c);
      to_lanes(rows + c * deep_, deep_, width, deep_, 1.f, lanes_);
      for (int64_t t = 0; t < width; t += tile::kSide)
        for (int64_t s = 0; s < depths_; ++s)
          tile::pack_b<Planes>(lanes_ + s * tile::kDepth * kLanes + t, kLanes,
                               by_depth + ((c + t) / tile::kSide * depths_ + s) * tile::kWords, kChunk * deep_);
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t d = 0; d < columns_; ++d)
        for (int64_t r = 0; r < tile::kSide; ++r) {
          const float* from = rows + (g * kPair + r) * deep_ + d * tile::kSide;
          __m512i low[Planes], high[Planes];
          cut<Planes>(_mm512_loadu_ps(from), low);
          cut<Planes>(_mm512_loadu_ps(from + tile::kSide * deep_), high);
          for (int i = 0; i < Planes; ++i)
            _mm512_storeu_si512(by_query + i * kChunk * wide_ + (g * columns_ + d) * tile::kWords + r * tile::kDepth,
                                join(low[i], high[i]));
        }
  }

  // P^T and dS^T of 32 queries (group g) and m keys, as A tiles [key tile][group] and, of dS^T, B tiles
  // [query tile][step of keys]. Rows past the m-th are zero.
  template <bool Capped>
  __attribute__((noinline)) void weigh(float factor, int64_t m, int64_t tiles, int64_t g) {
    const __m512 scale = _mm512_set1_ps(factor);
    const __m512 shift[2] = {_mm512_load_ps(shift_ + g * kPair), _mm512_load_ps(shift_ + g * kPair + 16)};
    const __m512 offset[2] = {_mm512_load_ps(offset_ + g * kPair), _mm512_load_ps(offset_ + g * kPair + 16)};
    constexpr int64_t plane = kChunk * kKeys;
    for (int64_t r = 0; r < tiles * tile::kSide; r += 2) {
      __m512i slopes[2][2][Planes];
      const int64_t line = ((r / tile::kSide) * kGroups + g) * tile::kWords + r % tile::kSide * tile::kDepth;
      for (int64_t i = 0; i < 2; ++i) {
        const bool there = r + i < m;
        __m512i weights[2][Planes];
        for (int64_t h = 0; h < 2; ++h) {
          const int64_t from = (r + i) * kPair + h * tile::kSide;
          __m512 weight = power<Planes == 1, Capped>(_mm512_load_ps(scores_ + from), scale, shift[h]);
          __m512 slope = _mm512_mul_ps(weight, _mm512_sub_ps(_mm512_load_ps(gradients_ + from), offset[h]));
          if (!there) weight = slope = _mm512_setzero_ps();
          cut<Planes>(weight, weights[h]);
          cut<Planes>(slope, slopes[i][h]);
        }
        for (int64_t w = 0; w < Planes; ++w) {
          _mm512_store_si512(p_ + w * plane + line + i * tile::kDepth, join(weights[0][w], weights[1][w]));
          _mm512_store_si512(ds_ + w * plane + line + i * tile::kDepth, join(slopes[i][0][w], slopes[i][1][w]));
        }
      }
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t w = 0; w < Planes; ++w)
          _mm512_store_si512(ds_b_ + w * plane + ((2 * g + h) * kSteps + r / kPair) * tile::kWords +
                                 r % kPair / 2 * tile::kDepth,
                             join(slopes[0][h][w], slopes[1][h][w]));
    }
  }

  int64_t deep_, wide_, depths_, columns_;
  Pages<uint16_t> qb_, gb_, qd_, gd_, p_, ds_, ds_b_;
  Scratch rows_, lanes_, scores_, gradients_;
  alignas(64) float shift_[kChunk], offset_[kChunk];
  bool large_[kGroups];
  tile::Registers registers_;
};

}  // namespace triskele::TRISKELE_LEVEL::backward
#endif
