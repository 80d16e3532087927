// The keys' side of the sparse-linear forward on tiles: K and V packed once a head, and H = phi(K)^T V, Z by segments.
#pragma once
#include "cpu/sla_forward_tiles.h"
#if defined(__AVX512BF16__)

namespace triskele::TRISKELE_LEVEL::sla_tiles {

template <class T>
struct Inputs {
  const Problem& p;
  const Layout& layout;
  View<T> q, k, v;
  const Visible& seen;
  const int8_t* map;
  const uint16_t* weight;  // W as A tiles [sides, steps], or null
  const float *bias, *alpha;
};

template <class T>
class KeySegment {
  static constexpr int P = kPlanes<T>;

 public:
  KeySegment(const Problem& p, const Layout& l, bool linear)
      : stage_(l, kStrip), lanes_(l.depth * kLanes), h_(linear ? l.rows * l.rows : 0),
        z_(linear ? p.dim * kVec : 0), phi_(linear ? kBatch * l.v_words : 0), values_(linear ? kBatch * l.v_words : 0) {}

  // Packs the blocks [first, last) of a head. state: their H [D, padded] and Z, or null.
  void run(const Inputs<T>& in, int64_t head, int64_t first, int64_t last, uint16_t* keys, uint16_t* values,
           float* state) {
    const Problem& p = in.p;
    const Layout& l = in.layout;
    const int64_t* visible = in.seen.count.data() + head / p.heads * p.k_blocks();
    const int64_t* index = in.seen.index.empty() ? nullptr : in.seen.index.data() + head / p.heads * p.keys;
    int64_t pending = 0;
    bool add = false;
    if (state != nullptr) std::fill(z_ + 0, z_ + p.dim * kVec, 0.f);
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < visible[j]; t += kStrip) {
        const int64_t n = std::min(kStrip, visible[j] - t), strip = j * l.a_block + t / kStrip;
        stage_.load(in.k, head, index, j * p.block_k + t, n, kStrip, p.dim);
        for (int64_t m = 0; m < 2; ++m)
          for (int64_t s = 0; s < l.steps; ++s)
            stage_.tile_of(m, s, keys + strip * l.k_words + (m * l.steps + s) * tile::kWords, l.k_plane);
        if (state != nullptr) take_features(p, l, n, phi_ + pending * l.v_words);
        stage_.load(in.v, head, index, j * p.block_k + t, n, kStrip, p.dim);
        stage_.columns(l.sides, values + strip * l.v_words, l.v_plane, lanes_);
        if (state == nullptr) continue;
        stage_.pairs(l.sides, values_ + pending * l.v_words, l.v_plane);
        if (++pending == kBatch) multiply(l, pending, add), pending = 0, add = true;
      }
    if (state == nullptr) return;
    if (pending > 0 || !add) multiply(l, pending, add);
    std::memcpy(state, h_, p.dim * l.rows * sizeof(float));
    float* z = state + p.dim * l.rows;
    for (int64_t d = 0; d < p.dim; ++d) {
      float sum = 0.f;
      for (int64_t i = 0; i < kVec; ++i) sum += z_[d * kVec + i];
      z[d] = sum;
    }
    std::fill(z + p.dim, z + l.rows, 0.f);
  }

 private:
  // phi of the staged strip as A tiles, and their sums.
  void take_features(const Problem& p, const Layout& l, int64_t n, uint16_t* to) {
    stage_.turn(kStrip, lanes_);
    feature_lanes(p.feature, lanes_, p.dim, kStrip);
    for (int64_t d = 0; d < p.dim; ++d) {
      float* row = lanes_ + d * kLanes;
      std::fill(row + n, row + kStrip, 0.f);
      store(z_ + d * kVec, load(z_ + d * kVec) + (load(row) + load(row + kVec)));
    }
    for (int64_t m = 0; m < l.sides; ++m)
      tile::pack_a<P>(lanes_ + m * 16 * kLanes, kLanes, to + m * tile::kWords, l.v_plane);
  }

  void multiply(const Layout& l, int64_t strips, bool add) {
    tile::multiply<P>(l.sides, l.sides, {phi_, tile::kWords, l.v_words, l.v_plane},
                      {values_, tile::kWords, l.v_words, l.v_plane}, strips, h_, l.rows, add);
  }

  Stage<T> stage_;
  Scratch lanes_, h_, z_;
  Words16 phi_, values_;
};

}  // namespace triskele::TRISKELE_LEVEL::sla_tiles
#endif
