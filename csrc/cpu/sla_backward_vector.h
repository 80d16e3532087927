// The sparse branch's backward on float vectors, any level: 64 queries a tile, one a lane.
#pragma once
#include "cpu/sla_backward.h"

namespace triskele::TRISKELE_LEVEL::backward {

class VectorSparse {
 public:
  static constexpr int64_t kChunk = kLanes;  // rows of a call
  static int64_t height(const Problem& p) { return p.block_k; }  // rows of a key block in KeySums
  static int64_t words(const Problem&) { return 0; }             // of packed keys a head
  static bool takes(const Problem&) { return true; }

  explicit VectorSparse(const Problem& p)
      : q_(p.dim * kLanes), grad_(p.dim * kLanes), p_(kLanes * kLanes), ds_(kLanes * kLanes),
        q_rows_(kLanes * p.padded()), grad_rows_(kLanes * p.padded()), k_rows_(kLanes * p.padded()),
        v_rows_(kLanes * p.padded()) {}

  void pack_keys(const Inputs&, int64_t, int64_t, uint16_t*) {}

  // Rows [row, row + n) of a query block: dq [D, kLanes] is written, sums are added to.
  void run(const Inputs& in, int64_t head, int64_t row, int64_t n, const std::vector<int64_t>& critical,
           const uint16_t*, const KeySums& sums, float* dq) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec), at = head * p.queries + row, padded = p.padded();
    std::fill(dq, dq + p.dim * kLanes, 0.f);
    if (critical.empty()) return;
    float log_sum[kLanes] = {}, offset[kLanes] = {};
    for (int64_t r = 0; r < n; ++r) log_sum[r] = in.lse[at + r] * kLog2E, offset[r] = in.offset[at + r];
    int64_t q_stride, grad_stride, k_stride, v_stride;
    const float* q = in.q.rows(head, row, n, q_rows_, padded, true, q_stride);
    const float* grad = in.d_sparse.rows(head, row, n, grad_rows_, padded, true, grad_stride);
    to_lanes(q, q_stride, n, p.dim, p.scale * kLog2E, q_);
    to_lanes(grad, grad_stride, n, p.dim, 1.f, grad_);
    for (const int64_t j : critical) {
      for (int64_t t = 0; t < in.visible(head, j); t += kLanes) {
        const int64_t m = std::min(kLanes, in.visible(head, j) - t), key = j * p.block_k + t;
        const float* k = in.k.rows(head, key, m, k_rows_, p.dim, false, k_stride);
        const float* v = in.v.rows(head, key, m, v_rows_, p.dim, false, v_stride);
        product(m, width, p.dim, {k, k_stride, 1}, q_, kLanes, p_, kLanes, false);      // [m, D] @ [D, lanes]
        product(m, width, p.dim, {v, v_stride, 1}, grad_, kLanes, ds_, kLanes, false);  // [m, D] @ [D, lanes]
        for (int64_t c = 0; c < width; c += kVec) {
          const Floats shift = load(log_sum + c), base = load(offset + c);
          for (int64_t i = c; i < m * kLanes; i += kLanes) {
            const Floats power = load(p_ + i) - shift, weight = exp2(power > 0.f ? Floats{} : power);  // P <= 1
            store(p_ + i, weight);
            store(ds_ + i, weight * (load(ds_ + i) - base));
          }
        }
        product(p.dim, width, m, {k, 1, k_stride}, ds_, kLanes, dq, kLanes, true);  // [D, m] @ [m, lanes]
        const bool add = sums.touched[j] != 0;
        float *dk = sums.dk + key * padded, *dv = sums.dv + key * padded;
        product(m, padded, n, {p_, kLanes, 1}, grad, grad_stride, dv, padded, add);  // [m, n] @ [n, D]
        product(m, padded, n, {ds_, kLanes, 1}, q, q_stride, dk, padded, add);       // [m, n] @ [n, D]
      }
      sums.touched[j] = 1;
    }
    scale_lanes(dq, p.dim, width, p.scale, dq);
  }

 private:
  Scratch q_, grad_, p_, ds_, q_rows_, grad_rows_, k_rows_, v_rows_;
};

}  // namespace triskele::TRISKELE_LEVEL::backward
