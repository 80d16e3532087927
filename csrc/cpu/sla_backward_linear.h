// The linear branch's backward, on tiles of 64 tokens, one a lane.
#pragma once
#include "cpu/sla_backward.h"

namespace triskele::TRISKELE_LEVEL::backward {

// The states h_j, z_j of segments of key blocks, for `heads` heads from `first` on.
inline void states_of_keys(const Inputs& in, int64_t first, int64_t heads, float* states) {
  const Problem& p = in.p;
  const int64_t count = segments(p), step = blocks_a_segment(p), padded = p.padded();
  tasks(heads * count, [&] {
    return [&, phi = std::make_unique<Scratch>(p.dim * kLanes), rows = std::make_unique<Scratch>(2 * kLanes * padded)](
               int64_t task) {
      const int64_t head = first + task / count, segment = task % count;
      float *h = states + task * p.state(), *z = h + p.dim * padded;
      std::fill(h, h + p.state(), 0.f);
      for (int64_t j = segment * step; j < std::min(p.k_blocks(), (segment + 1) * step); ++j)
        for (int64_t t = 0; t < in.visible(head, j); t += kLanes) {
          const int64_t n = std::min(kLanes, in.visible(head, j) - t), row = j * p.block_k + t;
          int64_t k_stride, v_stride;
          const float* k = in.k.rows(head, row, n, *rows, padded, false, k_stride);
          const float* v = in.v.rows(head, row, n, *rows + kLanes * padded, padded, true, v_stride);
          to_lanes(k, k_stride, n, p.dim, 1.f, *phi);
          feature_lanes(p.feature, *phi, p.dim, round_up(n, kVec));
          product(p.dim, padded, n, {*phi, kLanes, 1}, v, v_stride, h, padded, true);  // [D, n] @ [n, D]
          for (int64_t d = 0; d < p.dim; ++d) {
            const float* line = *phi + d * kLanes;
            float sum = 0.f;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < n; ++c) sum += line[c];
            z[d] += sum;
          }
        }
    };
  });
}

constexpr float kLeast = 0x1p-100f;  // a denominator below counts as zero: nothing passes through the row

class LinearQueries {
 public:
  explicit LinearQueries(const Problem& p)
      : phi_(p.dim * kLanes), grad_(p.dim * kLanes), d_phi_(p.dim * kLanes), rows_(kLanes * p.padded()),
        grad_rows_(kLanes * p.padded()) {}

  // dq [D, kLanes] of n rows and d_state, dH_i and dZ_i, are added to; state holds H_i and Z_i.
  void run(const Inputs& in, int64_t head, int64_t row, int64_t n, const float* state, float* d_state, float* dq) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec), padded = p.padded();
    const float* z = state + p.dim * padded;
    alignas(64) float d_rows[kLanes] = {};
    int64_t q_stride, grad_stride;
    const float* q = in.q.rows(head, row, n, rows_, padded, false, q_stride);
    const float* grad = in.d_linear->rows(head, row, n, grad_rows_, padded, true, grad_stride);
    to_lanes(q, q_stride, n, p.dim, 1.f, phi_);
    feature_lanes(p.feature, phi_, p.dim, width);
    to_lanes(grad, grad_stride, n, p.dim, 1.f, grad_);
    product(p.dim, width, p.dim, {state, padded, 1}, grad_, kLanes, d_phi_, kLanes, false);  // H [D, D] @ [D, lanes]
    for (int64_t c = 0; c < width; c += kVec) {
      // D_l = rowsum(dO_l O_l) from the same H: the saved O_l is rounded, which costs most where n is small.
      Floats sum = splat(p.eps()), dot{};
      for (int64_t d = 0; d < p.dim; ++d) {
        const Floats phi = load(phi_ + d * kLanes + c);
        sum += z[d] * phi;
        dot += load(d_phi_ + d * kLanes + c) * phi;
      }
      // From kLeast down 1 / n times what comes may pass float32's range, and meet a feature that is zero there.
      const Floats inverse = sum < kLeast ? Floats{} : 1.f / (sum < kLeast ? splat(1.f) : sum);
      dot *= inverse;
      store(d_rows + c, dot);
      for (int64_t d = 0; d < p.dim; ++d) {  // d_phi_ becomes d phi(q), grad_ becomes phi(q) / n
        store(d_phi_ + d * kLanes + c, (load(d_phi_ + d * kLanes + c) - z[d] * dot) * inverse);
        store(grad_ + d * kLanes + c, load(phi_ + d * kLanes + c) * inverse);
      }
    }
    feature_backward(p.feature, phi_, d_phi_, dq, p.dim, width);
    product(p.dim, padded, n, {grad_, kLanes, 1}, grad, grad_stride, d_state, padded, true);  // [D, n] @ [n, D]
    float* d_z = d_state + p.dim * padded;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float* line = grad_ + d * kLanes;
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < n; ++c) sum += line[c] * d_rows[c];
      d_z[d] -= sum;
    }
  }

 private:
  Scratch phi_, grad_, d_phi_, rows_, grad_rows_;
};

class LinearKeys {
 public:
  explicit LinearKeys(const Problem& p)
      : phi_(p.dim * kLanes), v_(p.dim * kLanes), d_phi_(p.padded() * kLanes), dk_(p.padded() * kLanes),
        rows_(kLanes * p.padded()) {}

  // dk and dv [n, padded] are added to; d_state holds dh_j and dz_j.
  void run(const Inputs& in, int64_t head, int64_t key, int64_t n, const float* d_state, float* dk, float* dv) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec), padded = p.padded();
    const float* d_z = d_state + p.dim * padded;
    int64_t stride;
    const float* k = in.k.rows(head, key, n, rows_, padded, false, stride);
    to_lanes(k, stride, n, p.dim, 1.f, phi_);
    feature_lanes(p.feature, phi_, p.dim, width);
    const float* v = in.v.rows(head, key, n, rows_, padded, false, stride);
    to_lanes(v, stride, n, p.dim, 1.f, v_);
    product(p.dim, width, p.dim, {d_state, padded, 1}, v_, kLanes, d_phi_, kLanes, false);  // dh [D, D] @ [D, lanes]
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t c = 0; c < width; c += kVec) store(d_phi_ + d * kLanes + c, load(d_phi_ + d * kLanes + c) + d_z[d]);
    product(n, padded, p.dim, {phi_, 1, kLanes}, d_state, padded, dv, padded, true);  // [n, D] @ dh [D, D]
    std::fill(dk_ + 0, dk_ + padded * kLanes, 0.f);
    feature_backward(p.feature, phi_, d_phi_, dk_, p.dim, width);
    from_lanes(dk_, n, p.dim, static_cast<float*>(rows_));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < p.dim; ++d) dk[r * padded + d] += rows_[r * p.dim + d];
  }

 private:
  Scratch phi_, v_, d_phi_, dk_, rows_;
};

}  // namespace triskele::TRISKELE_LEVEL::backward
