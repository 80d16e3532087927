// Sparse-linear attention, forward. A task is a block of queries of one head, 64 of them (one a lane) at a time: online
// softmax over the critical blocks, then the linear branch from the state H_i of the block, then projection or mix, all
// on tiles in cache. The states come first: h_j of every key block, then H_i = sum over the scope of h_j.
#include "cpu/level.h"
#include "cpu/sla.h"
#include "cpu/sla_forward_queries.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

constexpr const char* kOp = "sla_forward";

struct Softmax {  // running maximum (in log2 units) and sum of each lane
  float top[kLanes], sum[kLanes];
};

// scores [n, kLanes] (log2 units) -> exp2(scores - maximum); rescales what was summed before to the new maximum.
void soften(float* scores, int64_t n, int64_t width, int64_t dim, Softmax& state, float* out) {
  for (int64_t c = 0; c < width; c += kVec) {
    const Floats before = load(state.top + c);
    Floats top = before;
    for (int64_t r = 0; r < n; ++r) top = bigger(load(scores + r * kLanes + c), top);
    const Floats shrink = exp2(before - top);
    Floats sum = load(state.sum + c) * shrink;
    for (int64_t r = 0; r < n; ++r) {
      const Floats p = exp2(load(scores + r * kLanes + c) - top);
      sum += p;
      store(scores + r * kLanes + c, p);
    }
    store(state.top + c, top);
    store(state.sum + c, sum);
    bool moved = false;
    for (int i = 0; i < kVec; ++i) moved |= !(before[i] == top[i]);
    if (!moved) continue;
    for (int64_t d = 0; d < dim; ++d) store(out + d * kLanes + c, load(out + d * kLanes + c) * shrink);
  }
}

struct Inputs {
  const Problem& p;
  const Rows &q, &k, &v;
  const Visible& seen;
  const int8_t* map;
  const float *weight, *bias, *alpha;
};

template <class T>
struct Outputs {
  T *o, *o_sparse, *o_linear;  // the parts may be null
  float* lse;
};

class QueryBlock {
 public:
  explicit QueryBlock(const Problem& p)
      : q_(p.dim * kLanes), phi_(p.dim * kLanes), scores_(kLanes * kLanes), sparse_(p.dim * kLanes),
        linear_(p.dim * kLanes) {}

  template <class T>
  void run(const Inputs& in, int64_t head, int64_t block, const float* state, const Outputs<T>& out) {
    const Problem& p = in.p;
    const int8_t* kinds = in.map + (head * p.q_blocks() + block) * p.k_blocks();
    critical_.clear();
    for (int64_t j = 0; j < p.k_blocks(); ++j)
      if (kinds[j] == 1) critical_.push_back(j);
    const int64_t last = std::min(p.queries, (block + 1) * p.block_q);
    for (int64_t row = block * p.block_q; row < last; row += kLanes) {
      const int64_t n = std::min(kLanes, last - row), at = head * p.queries + row;
      attend(in, head, row, n);
      for (int64_t r = 0; r < n; ++r)
        out.lse[at + r] = softmax_.sum[r] > 0.f ? (softmax_.top[r] + std::log2(softmax_.sum[r])) * kLn2
                          : softmax_.sum[r] == 0.f ? -std::numeric_limits<float>::infinity()
                                                   : softmax_.sum[r];
      if (state != nullptr) {
        attend_linearly(p, n, state);
        if (out.o_sparse != nullptr) from_lanes(sparse_, n, p.dim, out.o_sparse + at * p.dim);
        if (out.o_linear != nullptr) from_lanes(linear_, n, p.dim, out.o_linear + at * p.dim);
        join(in, at, n);
      }
      from_lanes(sparse_, n, p.dim, out.o + at * p.dim);
    }
  }

 private:
  void attend(const Inputs& in, int64_t head, int64_t row, int64_t n) {
    const Problem& p = in.p;
    const int64_t width = round_up(n, kVec);
    to_lanes(in.q.head(head) + row * in.q.stride(), in.q.stride(), n, p.dim, 1.f, phi_);
    scale_lanes(phi_, p.dim, width, p.scale * kLog2E, q_);
    std::fill(sparse_ + 0, sparse_ + p.dim * kLanes, 0.f);
    std::fill(softmax_.top, softmax_.top + kLanes, std::numeric_limits<float>::lowest());
    std::fill(softmax_.sum, softmax_.sum + kLanes, 0.f);
    const float *keys = in.k.head(head), *values = in.v.head(head);
    const int64_t* visible = in.seen.count.data() + head / p.heads * p.k_blocks();
    for (const int64_t j : critical_)
      for (int64_t t = 0; t < visible[j]; t += kLanes) {
        const int64_t m = std::min(kLanes, visible[j] - t), key = j * p.block_k + t;
        // [m, D] @ [D, lanes] -> [m, lanes]; [D, m] @ [m, lanes] -> [D, lanes]
        product(m, width, p.dim, {keys + key * in.k.stride(), in.k.stride(), 1}, q_, kLanes, scores_, kLanes, false);
        soften(scores_, m, width, p.dim, softmax_, sparse_);
        product(p.dim, width, m, {values + key * in.v.stride(), 1, in.v.stride()}, scores_, kLanes, sparse_, kLanes,
                true);
      }
    for (int64_t c = 0; c < width; c += kVec) {
      const Floats sum = load(softmax_.sum + c);
      const Floats divisor = sum == 0.f ? splat(1.f) : sum;
      for (int64_t d = 0; d < p.dim; ++d) store(sparse_ + d * kLanes + c, load(sparse_ + d * kLanes + c) / divisor);
    }
  }

  // After `attend`, which left q in phi_.
  void attend_linearly(const Problem& p, int64_t n, const float* state) {
    const int64_t width = round_up(n, kVec), padded = p.padded();
    feature_lanes(p.feature, phi_, p.dim, width);
    product(p.dim, width, p.dim, {state, 1, padded}, phi_, kLanes, linear_, kLanes, false);  // H^T [D, D] @ [D, lanes]
    const float* z = state + p.dim * padded;
    for (int64_t c = 0; c < width; c += kVec) {
      Floats sum = splat(p.eps());
      for (int64_t d = 0; d < p.dim; ++d) sum += z[d] * load(phi_ + d * kLanes + c);
      const Floats divisor = sum == 0.f ? splat(1.f) : sum;
      for (int64_t d = 0; d < p.dim; ++d) {
        const Floats x = load(linear_ + d * kLanes + c) / divisor;
        store(linear_ + d * kLanes + c, sum == 0.f ? Floats{} : x);
      }
    }
  }

  // sparse_ becomes o.
  void join(const Inputs& in, int64_t at, int64_t n) {
    const int64_t dim = in.p.dim, width = round_up(n, kVec);
    if (in.weight != nullptr)
      product(dim, width, dim, {in.weight, dim, 1}, linear_, kLanes, sparse_, kLanes, true);  // W [D, D] @ [D, lanes]
    if (in.bias != nullptr)
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t c = 0; c < width; c += kVec)
          store(sparse_ + d * kLanes + c, load(sparse_ + d * kLanes + c) + in.bias[d]);
    if (in.alpha != nullptr)
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t r = 0; r < n; ++r) {
          const float mix = in.alpha[at + r];
          sparse_[d * kLanes + r] = mix * sparse_[d * kLanes + r] + (1.f - mix) * linear_[d * kLanes + r];
        }
  }

  Scratch q_, phi_, scores_, sparse_, linear_;
  Softmax softmax_;
  std::vector<int64_t> critical_;
};

template <class T>
void run(const Inputs& in, bool linear, const Outputs<T>& out) {
  const Problem& p = in.p;
  const bool all = p.scope == Scope::kAll;
  const int64_t parts = segments(p), rows = all ? 1 : p.q_blocks(), cover = all ? 0 : p.q_blocks() * p.k_blocks();
  const int64_t step = linear ? heads_at_a_time(p, (parts + rows) * p.state() + cover) : std::max<int64_t>(p.all_heads(), 1);
  Scratch states(linear ? step * parts * p.state() : 0), sums(linear ? step * rows * p.state() : 0),
      covered(linear ? step * cover : 0);
  for (int64_t first = 0; first < p.all_heads(); first += step) {
    const int64_t heads = std::min(step, p.all_heads() - first);
    if (linear) {
      key_states(p, in.k, in.v, in.seen, first, heads, states);
      if (!all) cover_of(p, in.map, first, heads, covered);
      combine(heads, rows, parts, p.state(), all ? nullptr : static_cast<float*>(covered), false, states, sums);
    }
    torch::stable::parallel_for(0, heads * p.q_blocks(), 1, [&](int64_t begin, int64_t end) {
      QueryBlock work(p);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / p.q_blocks(), block = task % p.q_blocks();
        const float* state = linear ? sums + (head * rows + (all ? 0 : block)) * p.state() : nullptr;
        work.run(in, first + head, block, state, out);
      }
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sla_forward(
    Tensor q, Tensor k, Tensor v, Tensor map, OptionalTensor weight, OptionalTensor bias, OptionalTensor alpha,
    OptionalTensor key_mask, int64_t block_q, int64_t block_k, int64_t feature, int64_t scope, double scale, bool parts) {
  const Problem p = problem(kOp, q, k, v, map, block_q, block_k, feature, scope, scale);
  for (const OptionalTensor* x : {&weight, &bias, &alpha})
    if (*x) {
      check_that((*x)->scalar_type() == ScalarType::Float, kOp, "float32 weight, bias and alpha");
      check_contiguous(kOp, "weight, bias and alpha", **x);
    }
  if (weight) check_equal(kOp, "weight elements", p.dim * p.dim, weight->numel());
  if (bias) check_equal(kOp, "bias elements", p.dim, bias->numel());
  if (alpha) check_equal(kOp, "alpha elements", p.all_heads() * p.queries, alpha->numel());
  const Visible seen = visible_keys(kOp, p, key_mask);
  Tensor o = new_like_dtype(q, {p.batch, p.heads, p.queries, p.dim});
  Tensor o_sparse = parts ? new_like_dtype(q, {p.batch, p.heads, p.queries, p.dim}) : new_like_dtype(q, {0});
  Tensor o_linear = parts ? new_like_dtype(q, {p.batch, p.heads, p.queries, p.dim}) : new_like_dtype(q, {0});
  Tensor lse = new_floats(q, {p.batch, p.heads, p.queries});
  const bool linear = parts || weight || alpha;
  const auto attend = [&]<class T>(T*) {
    const auto part = [&](Tensor& x) { return parts ? static_cast<T*>(x.mutable_data_ptr()) : nullptr; };
    T* const all = static_cast<T*>(o.mutable_data_ptr());
#if defined(__AVX512BF16__)
    if constexpr (tile::kTakes<T>)
      if (sla_tiles::pays(p))
        return sla_tiles::run<T>(p, q, k, v, seen, map.const_data_ptr<int8_t>(), floats(weight), floats(bias),
                                 floats(alpha), linear,
                                 {all, part(o_sparse), part(o_linear), lse.mutable_data_ptr<float>()});
#endif
    const Rows q_rows(q), k_rows = key_rows(k, seen, block_k), v_rows = key_rows(v, seen, block_k);
    const Inputs in{p, q_rows, k_rows, v_rows, seen, map.const_data_ptr<int8_t>(), floats(weight), floats(bias),
                    floats(alpha)};
    run(in, linear, Outputs<T>{all, part(o_sparse), part(o_linear), lse.mutable_data_ptr<float>()});
  };
  if (q.scalar_type() == ScalarType::Float)
    attend(static_cast<float*>(nullptr));
  else
    attend(static_cast<uint16_t*>(nullptr));
  return {o, o_sparse, o_linear, lse};
}

}  // namespace

void register_sla_forward(torch::stable::detail::StableLibrary& m) { m.impl("sla_forward", TORCH_BOX(&sla_forward)); }

}  // namespace triskele::TRISKELE_LEVEL
