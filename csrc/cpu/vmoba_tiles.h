// VMoBA on packed tiles: what forward and backward share. Operands are packed tiles of bfloat16 (cpu/tiles.h), one
// plane where the inputs are bfloat16 and three where they are float32.
#pragma once
#if defined(__AVX512BF16__)
#include <type_traits>

#include "cpu/tiles.h"
#include "cpu/vmoba_lists.h"

namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles {

using tile::kDepth;
using tile::kSide;
using tile::kWords;

constexpr int64_t kStrip = 128;  // keys of a block of scores
constexpr int64_t kStripStride = kStrip + kVec;
constexpr int64_t kStripSteps = kStrip / kDepth;

template <class T>
constexpr int kPlanesOf = std::is_same_v<T, float> ? 3 : 1;

// Packed bfloat16 words on a cache line boundary; not initialised.
class Packing {
 public:
  explicit Packing(int64_t words) : data_((words + 1) / 2) {}
  operator uint16_t*() const { return reinterpret_cast<uint16_t*>(static_cast<float*>(data_)); }

 private:
  Scratch data_;
};

// How the packed chunks of a pair lie: each chunk padded with zero keys to whole steps of depth.
struct Layout {
  int64_t planes, steps, columns;  // depth steps of D; tiles that D takes as columns
  std::vector<int64_t> first;      // chunk -> its first step of 32 keys
  Layout(const Shape& s, int planes)
      : planes(planes), steps((s.dim + kDepth - 1) / kDepth), columns((s.dim + kSide - 1) / kSide),
        first(s.chunks + 1) {
    for (int64_t c = 0; c < s.chunks; ++c)
      first[c + 1] = first[c] + (s.bounds[c + 1] - s.bounds[c] + kDepth - 1) / kDepth;
  }
  int64_t padded() const { return steps * kDepth; }
  int64_t across() const { return steps * planes * kWords; }    // 16 rows of D deep
  int64_t along() const { return columns * planes * kWords; }   // 32 rows as depth, D wide
  int64_t keys_across(int64_t c) const { return 2 * first[c] * across(); }
  int64_t keys_along(int64_t c) const { return first[c] * along(); }
  tile::Operand across(const uint16_t* data) const { return {data, across(), planes * kWords, kWords}; }
  tile::Operand along(const uint16_t* data) const { return {data, planes * kWords, along(), kWords}; }
};

constexpr int64_t kLineStride = kMaxDim + kVec;

// 16 rows (columns of B) of `steps` * 32 floats -> B tiles, depth along the rows.
template <int Planes>
inline void pack_columns(const float* rows, int64_t stride, int64_t steps, uint16_t* out) {
  for (int64_t half = 0; half < 2 * steps; ++half) {
    Floats lanes[kSide];
    for (int i = 0; i < kSide; ++i) lanes[i] = load(rows + i * stride + half * kSide);
    transpose_step<kSide / 2>(lanes);  // a depth each, 16 columns
    uint16_t* to = out + half / 2 * Planes * kWords + half % 2 * (kWords / 2);
    for (int i = 0; i < kSide / 2; ++i) {
      tile::Words even[Planes], odd[Planes];
      tile::split<Planes>(lanes[2 * i], even);
      tile::split<Planes>(lanes[2 * i + 1], odd);
      for (int p = 0; p < Planes; ++p) tile::store(to + p * kWords + i * kDepth, tile::pair(even[p], odd[p]));
    }
  }
}

// Chunk c of a pair: `across` its rows as columns of B tiles, `along` as their depth; null where not wanted.
template <class T>
void pack_chunk(const Shape& s, const Rows<T>& rows, int64_t pair, int64_t c, const Layout& at, float* lines,
                uint16_t* across, uint16_t* along) {
  constexpr int kPlanes = kPlanesOf<T>;
  const int64_t end = s.bounds[c + 1];
  for (int64_t j = s.bounds[c]; j < end; j += kDepth) {
    for (int64_t r = 0; r < kDepth; ++r)
      if (j + r < end) rows.read(pair, s.order[j + r], at.padded(), lines + r * kLineStride);
      else std::fill(lines + r * kLineStride, lines + r * kLineStride + at.padded(), 0.f);
    if (across != nullptr)
      for (int64_t half = 0; half < 2; ++half, across += at.across())
        pack_columns<kPlanes>(lines + half * kSide * kLineStride, kLineStride, at.steps, across);
    if (along != nullptr)
      for (int64_t n = 0; n < at.columns; ++n, along += kPlanes * kWords)
        tile::pack_b<kPlanes>(lines + n * kSide, kLineStride, along, kWords);
  }
}

// 2^x within 3e-6 where the weights are rounded to bfloat16 (their sum is not), else within 1e-7.
// 0 of -inf, NaN of NaN.
template <int Planes>
__attribute__((always_inline)) inline __m512 power(__m512 x) {
  const __m512 f = _mm512_maskz_reduce_ps(0xFFFF, x, 9);  // x - floor(x), in [0, 1]
  const auto constant = [](float value) { return _mm512_set1_ps(value); };
  __m512 p;
  if constexpr (Planes == 1) {  // minimax of 2^f, relative
    p = _mm512_fmadd_ps(constant(0.013534168f), f, constant(0.0520114611f));
    p = _mm512_fmadd_ps(p, f, constant(0.241442756f));
    p = _mm512_fmadd_ps(p, f, constant(0.693003835f));
    p = _mm512_fmadd_ps(p, f, constant(1.00000259f));
  } else {
    p = _mm512_fmadd_ps(constant(0.00187757668f), f, constant(0.00898934014f));
    p = _mm512_fmadd_ps(p, f, constant(0.0558263179f));
    p = _mm512_fmadd_ps(p, f, constant(0.240153617f));
    p = _mm512_fmadd_ps(p, f, constant(0.693153073f));
    p = _mm512_fmadd_ps(p, f, constant(0.999999925f));
  }
  return _mm512_maskz_scalef_ps(0xFFFF, p, x);
}

// 32 floats -> a row of an A tile in each plane.
template <int Planes>
__attribute__((always_inline)) inline void store_weights(uint16_t* to, __m512 first, __m512 second) {
  if constexpr (Planes == 1) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  } else {
    tile::Words low[3], high[3];
    tile::split<3>(first, low);
    tile::split<3>(second, high);
    static constexpr auto kHighHalves = [] {
      struct alignas(64) {
        uint16_t lane[32];
      } index{};
      for (int i = 0; i < 32; ++i) index.lane[i] = 2 * i + 1;
      return index;
    }();
    const __m512i index = _mm512_load_si512(&kHighHalves);
    for (int p = 0; p < 3; ++p)
      _mm512_storeu_si512(to + p * kWords, _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(low[p]), index,
                                                                      reinterpret_cast<__m512i>(high[p])));
  }
}

// Row i of an A operand whose depth is D, read from row `token`: 32 of D a tile.
template <class T>
inline void gather_across(const Rows<T>& rows, int64_t pair, int64_t token, const Layout& at, int64_t i, float* line,
                          uint16_t* out) {
  constexpr int kPlanes = kPlanesOf<T>;
  uint16_t* to = out + i / kSide * at.across() + i % kSide * kDepth;
  if constexpr (kPlanes == 1)
    if (rows.sd == 1) {
      const T* from = rows.row(pair, token);
      int64_t step = 0;
      for (; (step + 1) * kDepth <= rows.dim; ++step) std::memcpy(to + step * kWords, from + step * kDepth, 2 * kDepth);
      if (step < at.steps) {
        uint16_t last[kDepth] = {};
        std::memcpy(last, from + step * kDepth, 2 * (rows.dim - step * kDepth));
        std::memcpy(to + step * kWords, last, sizeof last);
      }
      return;
    }
  rows.read(pair, token, at.padded(), line);
  for (int64_t step = 0; step < at.steps; ++step)
    store_weights<kPlanes>(to + step * kPlanes * kWords, reinterpret_cast<__m512>(load(line + step * kDepth)),
                           reinterpret_cast<__m512>(load(line + step * kDepth + kSide)));
}

// A product cut into blocks of 2 x 2 tiles, which its owner computes one by one between other work.
template <int Planes>
struct Blocks {
  tile::Operand a, b;
  int64_t rows, columns, steps;  // rows and columns in tiles
  float* c;
  int64_t stride;
  bool add;

  int64_t count() const { return (rows + 1) / 2 * ((columns + 1) / 2); }
  void run(int64_t block) const {
    const int64_t m = block / ((columns + 1) / 2) * 2, n = block % ((columns + 1) / 2) * 2;
    tile::Operand left = a, right = b;
    left.data += m * a.side, right.data += n * b.side;
    float* to = c + m * kSide * stride + n * kSide;
    const bool two = m + 1 < rows, twice = n + 1 < columns;
    if (two && twice) tile::multiply<Planes, 2, 2>(left, right, steps, to, stride, add);
    else if (two) tile::multiply<Planes, 2, 1>(left, right, steps, to, stride, add);
    else if (twice) tile::multiply<Planes, 1, 2>(left, right, steps, to, stride, add);
    else tile::multiply<Planes, 1, 1>(left, right, steps, to, stride, add);
  }
  void run() const {
    for (int64_t block = 0; block < count(); ++block) run(block);
  }
};

}  // namespace triskele::TRISKELE_LEVEL::vmoba::on_tiles
#endif
