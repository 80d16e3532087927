// Sparse-linear attention, backward: two passes that own what they write, so no atomics and the same bits whatever the
// number of threads. Blocks of queries (64 of them a tile, one a lane) give dq and dH_i, blocks of keys give dk and dv;
// in between dh_j = sum over the query blocks that cover j of dH_i. Scores and block states are recomputed, not stored.
#include "cpu/level.h"
#include "cpu/sla.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

constexpr const char* kOp = "sla_backward";

struct Inputs {
  const Problem& p;
  const Rows &q, &k, &v;
  const Visible& seen;
  const int8_t* map;
  const float *lse, *offset;          // [B, H, Lq]; offset = rowsum(dO_s O_s) - d lse
  const float *d_sparse, *d_linear;   // [B, H, Lq, D]; d_linear null: no linear branch
  const float* d_rows;                // [B, H, Lq] rowsum(dO_l O_l)
};

template <class T>
struct Gradients {
  T *q, *k, *v;
};

// out += (d phi / d x)^T grad; phi = phi(x) tells the derivative by itself. All [D, kLanes].
void feature_backward(Feature feature, const float* phi, const float* grad, float* out, int64_t dim, int64_t width) {
  for (int64_t c = 0; c < width; c += kVec) {
    Floats dot{};
    if (feature == Feature::kSoftmax)
      for (int64_t d = 0; d < dim; ++d) dot += load(phi + d * kLanes + c) * load(grad + d * kLanes + c);
    for (int64_t d = 0; d < dim; ++d) {
      const Floats value = load(phi + d * kLanes + c), g = load(grad + d * kLanes + c);
      Floats dx;
      if (feature == Feature::kSoftmax)
        dx = value * (g - dot);
      else if (feature == Feature::kElu)
        dx = g * (value > 1.f ? splat(1.f) : value);
      else
        dx = value > 0.f ? g : Floats{};
      store(out + d * kLanes + c, load(out + d * kLanes + c) + dx);
    }
  }
}

// The rows of `from` [n, dim] with unit stride padded to `padded` columns: in place where they are wide enough already.
const float* padded_rows(const float* from, int64_t n, int64_t dim, int64_t padded, float* scratch) {
  if (dim == padded) return from;
  for (int64_t r = 0; r < n; ++r) {
    std::copy_n(from + r * dim, dim, scratch + r * padded);
    std::fill(scratch + r * padded + dim, scratch + (r + 1) * padded, 0.f);
  }
  return scratch;
}

class QueryBlock {
 public:
  explicit QueryBlock(const Problem& p)
      : q_(p.dim * kLanes), grad_(p.dim * kLanes), dq_(p.dim * kLanes), phi_(p.dim * kLanes), p_(kLanes * kLanes),
        dp_(kLanes * kLanes), rows_(kLanes * p.padded()) {}

  // state: H_i and Z_i; d_state: their gradients, written. Both null without a linear branch.
  template <class T>
  void run(const Inputs& in, int64_t head, int64_t block, const float* state, float* d_state, T* dq) {
    const Problem& p = in.p;
    const int8_t* kinds = in.map + (head * p.q_blocks() + block) * p.k_blocks();
    critical_.clear();
    for (int64_t j = 0; j < p.k_blocks(); ++j)
      if (kinds[j] == 1) critical_.push_back(j);
    if (d_state != nullptr) std::fill(d_state, d_state + p.state(), 0.f);
    const int64_t last = std::min(p.queries, (block + 1) * p.block_q);
    for (int64_t row = block * p.block_q; row < last; row += kLanes) {
      const int64_t n = std::min(kLanes, last - row), at = head * p.queries + row;
      sparse(in, head, row, n);
      if (state != nullptr) linear(in, head, row, n, state, d_state);
      from_lanes(dq_, n, p.dim, dq + at * p.dim);
    }
  }

 private:
  void sparse(const Inputs& in, int64_t head, int64_t row, int64_t n) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec), at = head * p.queries + row;
    float log_sum[kLanes] = {}, offset[kLanes] = {};
    for (int64_t r = 0; r < n; ++r) log_sum[r] = in.lse[at + r] * kLog2E, offset[r] = in.offset[at + r];
    to_lanes(in.q.head(head) + row * in.q.stride(), in.q.stride(), n, p.dim, 1.f, phi_);
    scale_lanes(phi_, p.dim, width, p.scale * kLog2E, q_);
    to_lanes(in.d_sparse + at * p.dim, p.dim, n, p.dim, 1.f, grad_);
    std::fill(dq_ + 0, dq_ + p.dim * kLanes, 0.f);
    const float *keys = in.k.head(head), *values = in.v.head(head);
    const int64_t* visible = in.seen.count.data() + head / p.heads * p.k_blocks();
    for (const int64_t j : critical_)
      for (int64_t t = 0; t < visible[j]; t += kLanes) {
        const int64_t m = std::min(kLanes, visible[j] - t), key = j * p.block_k + t;
        const float *k = keys + key * in.k.stride(), *v = values + key * in.v.stride();
        product(m, width, p.dim, {k, in.k.stride(), 1}, q_, kLanes, p_, kLanes, false);      // [m, D] @ [D, lanes]
        product(m, width, p.dim, {v, in.v.stride(), 1}, grad_, kLanes, dp_, kLanes, false);  // [m, D] @ [D, lanes]
        for (int64_t c = 0; c < width; c += kVec) {
          const Floats shift = load(log_sum + c), base = load(offset + c);
          for (int64_t i = c; i < m * kLanes; i += kLanes)
            store(dp_ + i, exp2(load(p_ + i) - shift) * (load(dp_ + i) - base));
        }
        product(p.dim, width, m, {k, 1, in.k.stride()}, dp_, kLanes, dq_, kLanes, true);  // [D, m] @ [m, lanes]
      }
    scale_lanes(dq_, p.dim, width, p.scale, dq_);
  }

  // After `sparse`, which left q in phi_.
  void linear(const Inputs& in, int64_t head, int64_t row, int64_t n, const float* state, float* d_state) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec), padded = p.padded(), at = head * p.queries + row;
    const float* z = state + p.dim * padded;
    float d_rows[kLanes] = {};
    for (int64_t r = 0; r < n; ++r) d_rows[r] = in.d_rows[at + r];
    feature_lanes(p.feature, phi_, p.dim, width);
    to_lanes(in.d_linear + at * p.dim, p.dim, n, p.dim, 1.f, grad_);
    product(p.dim, width, p.dim, {state, padded, 1}, grad_, kLanes, q_, kLanes, false);  // H [D, D] @ [D, lanes]
    for (int64_t c = 0; c < width; c += kVec) {
      Floats sum = splat(p.eps());
      for (int64_t d = 0; d < p.dim; ++d) sum += z[d] * load(phi_ + d * kLanes + c);
      const Floats inverse = sum == 0.f ? Floats{} : 1.f / (sum == 0.f ? splat(1.f) : sum);
      const Floats dot = load(d_rows + c);
      for (int64_t d = 0; d < p.dim; ++d) {  // q_ becomes d phi(q), grad_ becomes phi(q) / n
        store(q_ + d * kLanes + c, (load(q_ + d * kLanes + c) - z[d] * dot) * inverse);
        store(grad_ + d * kLanes + c, load(phi_ + d * kLanes + c) * inverse);
      }
    }
    feature_backward(p.feature, phi_, q_, dq_, p.dim, width);
    const float* b = padded_rows(in.d_linear + at * p.dim, n, p.dim, padded, rows_);
    product(p.dim, padded, n, {grad_, kLanes, 1}, b, padded, d_state, padded, true);  // [D, n] @ [n, D]
    float* d_z = d_state + p.dim * padded;
    for (int64_t d = 0; d < p.dim; ++d) {
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < n; ++c) sum += grad_[d * kLanes + c] * d_rows[c];
      d_z[d] -= sum;
    }
  }

  Scratch q_, grad_, dq_, phi_, p_, dp_, rows_;
  std::vector<int64_t> critical_;
};

class KeyBlock {
 public:
  explicit KeyBlock(const Problem& p)
      : k_(p.dim * kLanes), v_(p.dim * kLanes), dk_(p.dim * kLanes), dv_(p.dim * kLanes), phi_(p.dim * kLanes),
        d_phi_(p.dim * kLanes), p_(kLanes * kLanes), ds_(kLanes * kLanes) {}

  // d_state: dh_j and dz_j; null without a linear branch.
  template <class T>
  void run(const Inputs& in, int64_t head, int64_t block, const float* d_state, const Gradients<T>& out) {
    const Problem& p = in.p;
    rows_.clear();
    for (int64_t i = 0; i < p.q_blocks(); ++i)
      if (in.map[(head * p.q_blocks() + i) * p.k_blocks() + block] == 1) rows_.push_back(i);
    const int64_t batch = head / p.heads, visible = in.seen.count[batch * p.k_blocks() + block];
    for (int64_t t = 0; t < visible; t += kLanes) {
      const int64_t n = std::min(kLanes, visible - t), key = block * p.block_k + t;
      sparse(in, head, key, n);
      if (d_state != nullptr) linear(p, n, d_state);
      const int64_t* index = in.seen.index.empty() ? nullptr : in.seen.index.data() + batch * p.keys + key;
      const int64_t at = (head * p.keys + (index == nullptr ? key : 0)) * p.dim;
      from_lanes(dk_, n, p.dim, out.k + at, index);
      from_lanes(dv_, n, p.dim, out.v + at, index);
    }
  }

 private:
  void sparse(const Inputs& in, int64_t head, int64_t key, int64_t n) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec);
    to_lanes(in.k.head(head) + key * in.k.stride(), in.k.stride(), n, p.dim, 1.f, phi_);
    scale_lanes(phi_, p.dim, width, p.scale * kLog2E, k_);
    to_lanes(in.v.head(head) + key * in.v.stride(), in.v.stride(), n, p.dim, 1.f, v_);
    std::fill(dk_ + 0, dk_ + p.dim * kLanes, 0.f);
    std::fill(dv_ + 0, dv_ + p.dim * kLanes, 0.f);
    for (const int64_t i : rows_) {
      const int64_t last = std::min(p.queries, (i + 1) * p.block_q);
      for (int64_t row = i * p.block_q; row < last; row += kLanes) {
        const int64_t m = std::min(kLanes, last - row), at = head * p.queries + row;
        const float *q = in.q.head(head) + row * in.q.stride(), *grad = in.d_sparse + at * p.dim;
        product(m, width, p.dim, {q, in.q.stride(), 1}, k_, kLanes, p_, kLanes, false);  // [m, D] @ [D, lanes]
        product(m, width, p.dim, {grad, p.dim, 1}, v_, kLanes, ds_, kLanes, false);      // [m, D] @ [D, lanes]
        for (int64_t r = 0; r < m; ++r) {
          const float shift = in.lse[at + r] * kLog2E, base = in.offset[at + r];
          for (int64_t c = r * kLanes; c < r * kLanes + width; c += kVec) {
            const Floats weight = exp2(load(p_ + c) - shift);
            store(p_ + c, weight);
            store(ds_ + c, weight * (load(ds_ + c) - base));
          }
        }
        product(p.dim, width, m, {grad, 1, p.dim}, p_, kLanes, dv_, kLanes, true);        // [D, m] @ [m, lanes]
        product(p.dim, width, m, {q, 1, in.q.stride()}, ds_, kLanes, dk_, kLanes, true);  // [D, m] @ [m, lanes]
      }
    }
    scale_lanes(dk_, p.dim, width, p.scale, dk_);
  }

  // After `sparse`, which left k in phi_ and v in v_.
  void linear(const Problem& p, int64_t n, const float* d_state) {
    const int64_t width = round_up(n, kVec), padded = p.padded();
    const float* d_z = d_state + p.dim * padded;
    feature_lanes(p.feature, phi_, p.dim, width);
    product(p.dim, width, p.dim, {d_state, padded, 1}, v_, kLanes, d_phi_, kLanes, false);  // dh [D, D] @ [D, lanes]
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t c = 0; c < width; c += kVec) store(d_phi_ + d * kLanes + c, load(d_phi_ + d * kLanes + c) + d_z[d]);
    product(p.dim, width, p.dim, {d_state, 1, padded}, phi_, kLanes, dv_, kLanes, true);  // dh^T [D, D] @ [D, lanes]
    feature_backward(p.feature, phi_, d_phi_, dk_, p.dim, width);
  }

  Scratch k_, v_, dk_, dv_, phi_, d_phi_, p_, ds_;
  std::vector<int64_t> rows_;
};

template <class T>
void run(const Inputs& in, const Gradients<T>& out) {
  const Problem& p = in.p;
  const bool linear = in.d_linear != nullptr, all = p.scope == Scope::kAll;
  const int64_t nq = p.q_blocks(), nk = p.k_blocks(), size = p.state();
  const int64_t parts = segments(p), q_states = all ? 1 : nq, k_states = all ? 1 : nk, cover = all ? 0 : nq * nk;
  const int64_t a_head = (std::max(parts, k_states) + q_states + nq) * size + cover;
  const int64_t step = linear ? heads_at_a_time(p, a_head) : std::max<int64_t>(p.all_heads(), 1), held = linear ? step : 0;
  Scratch states(held * std::max(parts, k_states) * size), sums(held * q_states * size), d_sums(held * nq * size),
      covered(held * cover);
  const float* mask = all ? nullptr : static_cast<float*>(covered);
  for (int64_t first = 0; first < p.all_heads(); first += step) {
    const int64_t heads = std::min(step, p.all_heads() - first);
    if (linear) {
      key_states(p, in.k, in.v, in.seen, first, heads, states);
      if (!all) cover_of(p, in.map, first, heads, covered);
      combine(heads, q_states, parts, size, mask, false, states, sums);
    }
    torch::stable::parallel_for(0, heads * nq, 1, [&](int64_t begin, int64_t end) {
      QueryBlock work(p);
      for (int64_t task = begin; task < end; ++task) {
        const float* state = linear ? sums + (all ? task / nq : task) * size : nullptr;
        work.run(in, first + task / nq, task % nq, state, linear ? d_sums + task * size : nullptr, out.q);
      }
    });
    if (linear) combine(heads, k_states, nq, size, mask, true, d_sums, states);  // the h_j are no longer needed
    torch::stable::parallel_for(0, heads * nk, 1, [&](int64_t begin, int64_t end) {
      KeyBlock work(p);
      for (int64_t task = begin; task < end; ++task)
        work.run(in, first + task / nk, task % nk, linear ? states + (all ? task / nk : task) * size : nullptr, out);
    });
  }
}

void check_floats(const char* name, const Tensor& x, int64_t elements) {
  check_that(x.scalar_type() == ScalarType::Float, kOp, std::string(name) + " in float32");
  check_contiguous(kOp, name, x);
  check_equal(kOp, name, elements, x.numel());
}

std::tuple<Tensor, Tensor, Tensor> sla_backward(
    Tensor q, Tensor k, Tensor v, Tensor map, Tensor lse, Tensor offset, Tensor d_sparse, OptionalTensor d_rows,
    OptionalTensor d_linear, OptionalTensor key_mask, int64_t block_q, int64_t block_k, int64_t feature, int64_t scope,
    double scale) {
  const Problem p = problem(kOp, q, k, v, map, block_q, block_k, feature, scope, scale);
  const int64_t rows = p.all_heads() * p.queries;
  check_floats("lse", lse, rows);
  check_floats("offset", offset, rows);
  check_floats("d_sparse", d_sparse, rows * p.dim);
  check_that(d_rows.has_value() == d_linear.has_value(), kOp, "d_rows and d_linear together");
  if (d_linear) check_floats("d_linear", *d_linear, rows * p.dim), check_floats("d_rows", *d_rows, rows);
  const Visible seen = visible_keys(kOp, p, key_mask);
  const Rows q_rows(q), k_rows = key_rows(k, seen, block_k), v_rows = key_rows(v, seen, block_k);
  Tensor dq = new_like_dtype(q, {p.batch, p.heads, p.queries, p.dim});
  Tensor dk = new_like_dtype(q, {p.batch, p.heads, p.keys, p.dim});
  Tensor dv = new_like_dtype(q, {p.batch, p.heads, p.keys, p.dim});
  if (key_mask) torch::stable::zero_(dk), torch::stable::zero_(dv);  // rows that nobody sees
  const Inputs in{p, q_rows, k_rows, v_rows, seen, map.const_data_ptr<int8_t>(), lse.const_data_ptr<float>(),
                  offset.const_data_ptr<float>(), d_sparse.const_data_ptr<float>(), floats(d_linear), floats(d_rows)};
  const auto outputs = [&]<class T>(T*) {
    run(in, Gradients<T>{static_cast<T*>(dq.mutable_data_ptr()), static_cast<T*>(dk.mutable_data_ptr()),
                         static_cast<T*>(dv.mutable_data_ptr())});
  };
  if (q.scalar_type() == ScalarType::Float)
    outputs(static_cast<float*>(nullptr));
  else
    outputs(static_cast<uint16_t*>(nullptr));
  return {dq, dk, dv};
}

}  // namespace

void register_sla_backward(torch::stable::detail::StableLibrary& m) { m.impl("sla_backward", TORCH_BOX(&sla_backward)); }

}  // namespace triskele::TRISKELE_LEVEL
