// Sparse-linear attention, backward. Blocks of queries come first: each takes its critical blocks of keys once, which
// gives its dq and adds to dk and dv; then its part of the linear branch, which gives dH_i. Blocks of keys end it:
// dh_j = sum over the query blocks that cover j of dH_i, and dk, dv. Scores and states are recomputed, not stored.
//
// A task is a run of query blocks of one head, cut by the shape and the map alone, and owns the sums that it adds to:
// no atomics on data, and the same bits whatever the number of threads.
#include "cpu/level.h"
#include "cpu/sla_backward_tiles.h"
#include "cpu/sla_backward_linear.h"
#include "cpu/sla_backward_vector.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using namespace backward;

constexpr const char* kOp = "sla_backward";

template <class T>
struct Gradients {
  T *q, *k, *v;
};

// Tasks of a head: one where there are heads enough, since each has sums of its own.
int64_t parts_of(const Problem& p) {
  constexpr int64_t kEnough = 8;
  return std::clamp<int64_t>((kEnough + p.all_heads() - 1) / std::max<int64_t>(p.all_heads(), 1), 1,
                             std::max<int64_t>(p.q_blocks(), 1));
}

// critical [q_blocks]: the critical blocks of keys of every block of queries of a head that hold a visible key.
// starts [parts + 1]: runs of query blocks with about as many of them each.
struct Plan {
  std::vector<std::vector<int64_t>> critical;
  std::vector<int64_t> starts;
};

Plan plan(const Inputs& in, int64_t head, int64_t parts) {
  const Problem& p = in.p;
  const int64_t nq = p.q_blocks(), nk = p.k_blocks();
  Plan out{std::vector<std::vector<int64_t>>(nq), std::vector<int64_t>(parts + 1, nq)};
  int64_t total = nq;  // one for each block's own work
  for (int64_t i = 0; i < nq; ++i) {
    const int8_t* kinds = in.map + (head * nq + i) * nk;
    for (int64_t j = 0; j < nk; ++j)
      if (kinds[j] == 1 && in.visible(head, j) > 0) out.critical[i].push_back(j);
    total += static_cast<int64_t>(out.critical[i].size());
  }
  out.starts[0] = 0;
  for (int64_t i = 0, part = 1, sum = 0; i < nq && part < parts; ++i) {
    sum += 1 + static_cast<int64_t>(out.critical[i].size());
    while (part < parts && sum * parts >= part * total) out.starts[part++] = i + 1;
  }
  return out;
}

// The sums of the parts of a head, for the rows [row, row + n): [n, padded] in `to`, times `factor`.
void gather(const float* const* parts, int64_t count, int64_t size, float factor, float* to) {
  std::fill(to, to + size, 0.f);
  for (int64_t part = 0; part < count; ++part)
    for (int64_t i = 0; i < size; ++i) to[i] += parts[part][i];
  for (int64_t i = 0; i < size; ++i) to[i] *= factor;
}

template <class T, class Sparse>
void run(const Inputs& in, const Gradients<T>& out) {
  const Problem& p = in.p;
  const bool linear = in.d_linear != nullptr, all = p.scope == Scope::kAll;
  const int64_t nq = p.q_blocks(), nk = p.k_blocks(), padded = p.padded(), parts = parts_of(p);
  const int64_t state = linear ? p.state() : 0, segments_ = segments(p);
  const int64_t q_states = all ? 1 : nq, k_states = all ? 1 : nk, d_states = all ? parts : nq;
  const int64_t cover = linear && !all ? nq * nk : 0;
  const int64_t tall = Sparse::height(p), sums_size = nk * tall * padded, words = Sparse::words(p);
  const int64_t a_head = (std::max(segments_, k_states) + q_states + d_states) * state + cover + words / 2 +
                         2 * parts * sums_size;
  // Few heads at a time keep what they hold near, and need not be many for threads that share their tasks.
  const int64_t step = std::min(heads_at_a_time(p, a_head), std::max<int64_t>(4, 2 * torch::stable::get_num_threads()));
  const int64_t held = std::min(step, std::max<int64_t>(p.all_heads(), 1));
  Pages<float> states(held * std::max(segments_, k_states) * state), sums(held * q_states * state),
      d_sums(held * d_states * state), covered(held * cover), key_sums(held * parts * 2 * sums_size);
  Pages<uint16_t> packed(held * words);
  std::vector<uint8_t> touched(held * parts * nk);
  std::vector<Plan> plans(held);
  const float* mask = all ? nullptr : static_cast<float*>(covered);
  for (int64_t first = 0; first < p.all_heads(); first += step) {
    const int64_t heads = std::min(step, p.all_heads() - first);
    if (linear) {
      states_of_keys(in, first, heads, states);
      if (!all) cover_of(p, in.map, first, heads, covered);
      combine(heads, q_states, segments_, p.state(), mask, false, states, sums);
    }
    std::fill(touched.begin(), touched.end(), uint8_t{0});
    tasks(heads, [&] { return [&](int64_t head) { plans[head] = plan(in, first + head, parts); }; });
    if (words > 0)
      tasks(heads * nk, [&] {
        return [&, sparse = std::make_unique<Sparse>(p)](int64_t task) {
          sparse->pack_keys(in, first + task / nk, task % nk, packed + task / nk * words);
        };
      });
    tasks(heads * parts, [&] {
      return [&, sparse = std::make_unique<Sparse>(p), more = std::make_unique<LinearQueries>(p),
              dq = std::make_unique<Scratch>(Sparse::kChunk * padded)](int64_t task) {
        const int64_t local = task / parts, part = task % parts, head = first + local;
        const Plan& plan = plans[local];
        const KeySums mine{key_sums + task * 2 * sums_size, key_sums + (task * 2 + 1) * sums_size,
                           touched.data() + task * nk};
        if (linear && all) std::fill_n(d_sums + task * state, state, 0.f);
        for (int64_t i = plan.starts[part]; i < plan.starts[part + 1]; ++i) {
          const float* h = linear ? sums + (all ? local : local * nq + i) * state : nullptr;
          float* d_h = linear ? d_sums + (all ? task : local * nq + i) * state : nullptr;
          if (linear && !all) std::fill_n(d_h, state, 0.f);
          const int64_t last = std::min(p.queries, (i + 1) * p.block_q);
          for (int64_t row = i * p.block_q; row < last; row += Sparse::kChunk) {
            const int64_t rows = std::min(Sparse::kChunk, last - row);
            sparse->run(in, head, row, rows, plan.critical[i], packed + local * words, mine, *dq);
            for (int64_t r = 0; r < rows; r += kLanes) {
              const int64_t n = std::min(kLanes, rows - r);
              float* lanes = *dq + r * padded;
              if (linear) more->run(in, head, row + r, n, h, d_h, lanes);
              from_lanes(lanes, n, p.dim, out.q + (head * p.queries + row + r) * p.dim);
            }
          }
        }
      };
    });
    if (linear) combine(heads, k_states, d_states, p.state(), mask, true, d_sums, states);  // the h_j are done with
    tasks(heads * nk, [&] {
      return [&, more = std::make_unique<LinearKeys>(p), rows = std::make_unique<Scratch>(2 * kLanes * padded)](
                 int64_t task) {
        const int64_t local = task / nk, j = task % nk, head = first + local, batch = head / p.heads;
        const float* d_h = linear ? states + (all ? local : task) * state : nullptr;
        std::vector<const float*> dks, dvs;
        for (int64_t part = 0; part < parts; ++part)
          if (touched[(local * parts + part) * nk + j] != 0) {
            const float* sums_of = key_sums + (local * parts + part) * 2 * sums_size + j * tall * padded;
            dks.push_back(sums_of), dvs.push_back(sums_of + sums_size);
          }
        float *dk = *rows, *dv = dk + kLanes * padded;
        const int64_t count = static_cast<int64_t>(dks.size()), visible = in.visible(head, j);
        for (int64_t t = 0; t < visible; t += kLanes) {
          const int64_t n = std::min(kLanes, visible - t), key = j * p.block_k + t;
          gather(dks.data(), count, n * padded, p.scale, dk);
          gather(dvs.data(), count, n * padded, 1.f, dv);
          for (const float*& x : dks) x += n * padded;
          for (const float*& x : dvs) x += n * padded;
          if (linear) more->run(in, head, key, n, d_h, dk, dv);
          for (int64_t r = 0; r < n; ++r) {
            const int64_t token = in.seen.index.empty() ? key + r : in.seen.index[batch * p.keys + key + r];
            T *to_k = out.k + (head * p.keys + token) * p.dim, *to_v = out.v + (head * p.keys + token) * p.dim;
            for (int64_t d = 0; d < p.dim; ++d) store_value(to_k + d, dk[r * padded + d]);
            for (int64_t d = 0; d < p.dim; ++d) store_value(to_v + d, dv[r * padded + d]);
          }
        }
      };
    });
  }
}

template <class T>
void choose(const Inputs& in, const Gradients<T>& out) {
#if defined(__AVX512BF16__)
  if constexpr (tile::kTakes<T>) {
    constexpr int kPlanes = std::is_same_v<T, float> ? 3 : 1;
    if (TileSparse<kPlanes>::takes(in.p)) return run<T, TileSparse<kPlanes>>(in, out);
  }
#endif
  run<T, VectorSparse>(in, out);
}

// [B, H, Lq] rowsum(a b), less what is given. a and b: [B, H, Lq, D].
void row_dots(const Problem& p, const Source& a, const Source& b, const float* less, float* out) {
  const int64_t pieces = (p.queries + kLanes - 1) / kLanes, padded = p.padded();
  tasks(p.all_heads() * pieces, [&] {
    return [&, rows = std::make_unique<Scratch>(2 * kLanes * padded)](int64_t task) {
      const int64_t head = task / pieces, row = task % pieces * kLanes, n = std::min(kLanes, p.queries - row);
      int64_t a_stride, b_stride;
      const float* x = a.rows(head, row, n, *rows, padded, false, a_stride);
      const float* y = b.rows(head, row, n, *rows + kLanes * padded, padded, false, b_stride);
      for (int64_t r = 0; r < n; ++r) {
        const float *left = x + r * a_stride, *right = y + r * b_stride;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < p.dim; ++d) sum += left[d] * right[d];
        const int64_t at = head * p.queries + row + r;
        out[at] = less == nullptr ? sum : sum - less[at];
      }
    };
  });
}

void check_rows(const char* name, const Tensor& x, const Problem& p) {
  check_that(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, kOp,
             std::string(name) + " in float32 or bfloat16");
  check_dim(kOp, name, x, 4);
  const int64_t sizes[] = {p.batch, p.heads, p.queries, p.dim};
  for (int64_t i = 0; i < 4; ++i) check_equal(kOp, name, sizes[i], x.size(i));
}

void check_floats(const char* name, const Tensor& x, const Problem& p) {
  check_that(x.scalar_type() == ScalarType::Float, kOp, std::string(name) + " in float32");
  check_contiguous(kOp, name, x);
  check_equal(kOp, name, p.all_heads() * p.queries, x.numel());
}

std::tuple<Tensor, Tensor, Tensor> sla_backward(
    Tensor q, Tensor k, Tensor v, Tensor map, Tensor o_sparse, Tensor lse, Tensor d_sparse, OptionalTensor d_linear,
    OptionalTensor d_lse, OptionalTensor key_mask, int64_t block_q, int64_t block_k, int64_t feature, int64_t scope,
    double scale) {
  const Problem p = problem(kOp, q, k, v, map, block_q, block_k, feature, scope, scale);
  check_floats("lse", lse, p);
  if (d_lse) check_floats("d_lse", *d_lse, p);
  check_rows("o_sparse", o_sparse, p);
  check_rows("d_sparse", d_sparse, p);
  if (d_linear) check_rows("d_linear", *d_linear, p);
  const Visible seen = visible_keys(kOp, p, key_mask);
  const int64_t* index = key_mask ? seen.index.data() : nullptr;
  const Source q_rows(q), k_rows(k, index), v_rows(v, index), d_sparse_rows(d_sparse);
  const std::optional<Source> d_linear_rows = d_linear ? std::optional<Source>(*d_linear) : std::nullopt;
  Tensor dq = new_like_dtype(q, {p.batch, p.heads, p.queries, p.dim});
  Tensor dk = new_like_dtype(q, {p.batch, p.heads, p.keys, p.dim});
  Tensor dv = new_like_dtype(q, {p.batch, p.heads, p.keys, p.dim});
  if (key_mask) torch::stable::zero_(dk), torch::stable::zero_(dv);  // rows that nobody sees
  Scratch offset(p.all_heads() * p.queries);
  row_dots(p, d_sparse_rows, Source(o_sparse), floats(d_lse), offset);
  const Inputs in{p, q_rows, k_rows, v_rows, seen, map.const_data_ptr<int8_t>(), lse.const_data_ptr<float>(), offset,
                  d_sparse_rows, d_linear_rows ? &*d_linear_rows : nullptr};
  const auto outputs = [&]<class T>(T*) {
    choose(in, Gradients<T>{static_cast<T*>(dq.mutable_data_ptr()), static_cast<T*>(dk.mutable_data_ptr()),
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
