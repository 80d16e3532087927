// VMoBA attention on the CPU: forward, and the gradients of q, k and v.
//
// Promise: inputs of any strides, float32 or bfloat16, accumulated in float32; the result does not depend on the number
// of threads, since every output row is summed by one task, in one order.
//
// Why it looks so: gates are per token, so neighbouring queries choose different chunks, and a dense tile over the
// union of their chunks would compute much that nobody asked for. A task takes kQueryRows queries, walks the chunks,
// and per chunk compacts the rows whose bit is set into dense tiles; each row's running softmax moves on per block of
// keys. So the products do the selected share of the dense work and no more, whatever the pattern; the price is a copy
// of the gathered rows, D floats against D * (keys of the chunk) multiplications.
#include "cpu/vmoba.h"

#include <utility>

#include "cpu/level.h"

namespace triskele::TRISKELE_LEVEL {
namespace vmoba {

constexpr int64_t kGather = 48;      // rows of a dense tile, a multiple of every kTileRows
constexpr int64_t kKeys = 128;       // keys of a dense tile, a multiple of every kPanel
constexpr int64_t kQueryRows = 256;  // queries of a task
constexpr int64_t kRowStride = kMaxDim + kVec, kScoreStride = kKeys + kVec;  // no powers of two: they crowd cache sets
constexpr float kLog2E = 1.44269504088896341f;

// Every lane becomes the largest (the sum) of all, by swapping halves, quarters, ... : log2(kVec) steps.
template <int Step, int... Lane>
Floats swapped(Floats x, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (Lane ^ Step)...);
#else
  return __builtin_shuffle(x, Ints{(Lane ^ Step)...});
#endif
}

template <int Step = kVec / 2>
float largest(Floats x) {
  if constexpr (Step == 0) return x[0];
  else return largest<Step / 2>(bigger(x, swapped<Step>(x, std::make_integer_sequence<int, kVec>{})));
}

template <int Step = kVec / 2>
float total(Floats x) {
  if constexpr (Step == 0) return x[0];
  else return total<Step / 2>(x + swapped<Step>(x, std::make_integer_sequence<int, kVec>{}));
}

// e^(scale score - base): one rounding before the difference, which is small where it counts.
Floats weight_of(const float* score, float scale, float base) { return exp2((load(score) * scale - base) * kLog2E); }

// scores [rows, keys] = a [rows, D] times packed panels [D, kPanel]
void score(int64_t rows, int64_t keys, int64_t dim, const float* a, const float* panels, float* scores) {
  for (int64_t j = 0; j < keys; j += kPanel, panels += dim * kPanel)
    product(rows, round_up(std::min(kPanel, keys - j), kVec), dim, {a, kRowStride, 1}, panels, kPanel, scores + j,
            kScoreStride, false);
}

// Which queries see a chunk. The mask is [B, C, H, S] by token; a query sees its own chunk in any case.
struct Selection {
  const Shape& s;
  const uint8_t* mask;

  // The positions in [begin, end), less `begin`, whose query sees chunk c; how many.
  int64_t rows(int64_t pair, int64_t c, int64_t begin, int64_t end, int32_t* out) const {
    const uint8_t* m = mask + ((pair / s.heads * s.chunks + c) * s.heads + pair % s.heads) * s.length;
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      out[n] = static_cast<int32_t>(i - begin);
      n += m[s.order[i]] | (s.bounds[c] <= i && i < s.bounds[c + 1]);
    }
    return n;
  }
};

Tensor checked_mask(const char* op, const Shape& s, const Tensor& mask) {
  check_dim(op, "mask", mask, 4);
  check_that(mask.scalar_type() == ScalarType::Bool, op, "mask of dtype bool");
  const int64_t want[] = {s.batch, s.chunks, s.heads, s.length};
  for (int i = 0; i < 4; ++i) check_equal(op, "mask shape", want[i], mask.size(i));
  return torch::stable::contiguous(mask);
}

void gather(const float* rows, int64_t dp, const int32_t* index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kRowStride, rows + index[i] * dp, dp * sizeof(float));
}

// f(first key position, keys, panel) over the dense tiles of chunk c of a pair.
template <class F>
void each_key_block(const Shape& s, int64_t pair, int64_t c, const F& f) {
  for (int64_t j = s.bounds[c]; j < s.bounds[c + 1]; j += kKeys)
    f(j, std::min(kKeys, s.bounds[c + 1] - j), pair * s.panels[s.chunks] + s.panels[c] + (j - s.bounds[c]) / kPanel);
}

// f(pair, first, last) over the blocks of kQueryRows positions, in parallel; `make` gives each thread its scratch.
template <class Make, class F>
void each_query_block(const Shape& s, const Make& make, const F& f) {
  const int64_t blocks = (s.length + kQueryRows - 1) / kQueryRows;
  torch::stable::parallel_for(0, s.pairs() * blocks, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kQueryRows;
      f(scratch, task / blocks, first, std::min(first + kQueryRows, s.length));
    }
  });
}

// ---------------------------------------------------------------------------------------------- forward

struct ForwardScratch {
  Scratch rows, sum, query, scores, part;
  int32_t index[kQueryRows];
  float top[kQueryRows], mass[kQueryRows * kVec], shrink[kGather + kVec];  // mass: a partial sum a lane
  explicit ForwardScratch(const Shape& s)
      : rows(kQueryRows * s.dp), sum(kQueryRows * s.dp), query(kGather * kRowStride), scores(kGather * kScoreStride),
        part(kGather * kRowStride) {}
};

// Raw scores -> weights against each row's new maximum; shrink[i] is the factor that the row's earlier sums need.
void soften(int64_t rows, int64_t keys, float scale, const int32_t* index, ForwardScratch& x) {
  const int64_t padded = round_up(keys, kVec);
  float sums[kGather * kVec];
  for (int64_t i = 0; i < rows; ++i) {
    float* scores = x.scores + i * kScoreStride;
    std::fill(scores + keys, scores + padded, -kInf);
    Floats top = load(scores);
    for (int64_t j = kVec; j < padded; j += kVec) top = bigger(load(scores + j), top);
    const float before = x.top[index[i]], now = std::max(before, largest(top) * scale);
    const float base = now == -kInf ? 0.f : now;
    Floats sum{};
    for (int64_t j = 0; j < padded; j += kVec) {
      const Floats weight = weight_of(scores + j, scale, base);
      store(scores + j, weight);
      sum += weight;
    }
    x.top[index[i]] = now;
    x.shrink[i] = (before - base) * kLog2E;
    store(sums + i * kVec, sum);
  }
  std::fill(x.shrink + rows, x.shrink + round_up(rows, kVec), 0.f);
  for (int64_t i = 0; i < rows; i += kVec) store(x.shrink + i, exp2(load(x.shrink + i)));
  for (int64_t i = 0; i < rows; ++i) {
    float* mass = x.mass + index[i] * kVec;
    store(mass, load(mass) * x.shrink[i] + load(sums + i * kVec));
  }
}

template <class T>
void forward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const uint8_t* mask, const Tensor& out,
             float* lse) {
  const Scratch keys(panel_floats(s)), values(s.pairs() * s.length * s.dp);
  pack_panels<T>(s, k, keys);
  pack_rows<T>(s, v, values);
  const Rows<T> queries(q), outputs(out);
  const Selection selection{s, mask};
  const float scale = 1.f / std::sqrt(static_cast<float>(s.dim));
  const auto make = [&] { return std::make_unique<ForwardScratch>(s); };
  each_query_block(s, make, [&](auto& scratch, int64_t pair, int64_t first, int64_t last) {
    ForwardScratch& x = *scratch;
    for (int64_t i = 0; i < last - first; ++i) queries.read(pair, s.order[first + i], s.dp, x.rows + i * s.dp);
    std::fill(x.top, x.top + kQueryRows, -kInf);
    std::fill(x.mass, x.mass + kQueryRows * kVec, 0.f);
    std::fill(x.sum + 0, x.sum + (last - first) * s.dp, 0.f);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t selected = selection.rows(pair, c, first, last, x.index);
      for (int64_t g = 0; g < selected; g += kGather) {
        const int64_t rows = std::min(kGather, selected - g);
        const int32_t* index = x.index + g;
        gather(x.rows, s.dp, index, rows, x.query);
        each_key_block(s, pair, c, [&](int64_t key, int64_t count, int64_t panel) {
          score(rows, count, s.dim, x.query, keys + panel * s.dim * kPanel, x.scores);  // [rows, D] @ [D, keys]
          soften(rows, count, scale, index, x);
          product(rows, s.dp, count, {x.scores, kScoreStride, 1}, values + (pair * s.length + key) * s.dp, s.dp, x.part,
                  kRowStride, false);  // [rows, keys] @ [keys, D]
          for (int64_t i = 0; i < rows; ++i) {
            float* sum = x.sum + index[i] * s.dp;
            for (int64_t d = 0; d < s.dp; d += kVec)
              store(sum + d, load(sum + d) * x.shrink[i] + load(x.part + i * kRowStride + d));
          }
        });
      }
    }
    for (int64_t i = 0; i < last - first; ++i) {
      const float mass = total(load(x.mass + i * kVec));
      outputs.write(pair, s.order[first + i], x.sum + i * s.dp, 1.f / mass);
      lse[pair * s.length + s.order[first + i]] = x.top[i] + std::log(mass);
    }
  });
}

// ---------------------------------------------------------------------------------------------- backward

// What both passes read, in chunk order: rows, panels, and per row lse and rowsum(dO O).
struct Packed {
  Scratch query, key, grad, key_panels, value_panels, lse, delta;

  explicit Packed(const Shape& s)
      : query(s.pairs() * s.length * s.dp), key(s.pairs() * s.length * s.dp), grad(s.pairs() * s.length * s.dp),
        key_panels(panel_floats(s)), value_panels(panel_floats(s)), lse(s.pairs() * s.length),
        delta(s.pairs() * s.length) {}

  template <class T>
  void fill(const Shape& s, const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& out, const float* row_lse) {
    pack_rows<T>(s, q, query);
    pack_rows<T>(s, k, key);
    pack_rows<T>(s, g, grad);
    pack_panels<T>(s, k, key_panels);
    pack_panels<T>(s, v, value_panels);
    const Rows<T> outputs(out);
    torch::stable::parallel_for(0, s.pairs() * s.length, 256, [&](int64_t begin, int64_t end) {
      alignas(64) float line[kMaxDim];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / s.length, token = s.order[i % s.length];
        outputs.read(pair, token, s.dp, line);
        Floats sum{};
        for (int64_t d = 0; d < s.dp; d += kVec) sum += load(line + d) * load(grad + i * s.dp + d);
        delta[i] = total(sum);
        lse[i] = row_lse[pair * s.length + token];
      }
    });
  }
};

struct BackwardScratch {
  Scratch query, grad, weights, slopes, part, first, second;
  std::vector<int32_t> index;
  BackwardScratch(const Shape& s, int64_t sums, int64_t rows)
      : query(kGather * kRowStride), grad(kGather * kRowStride), weights(kGather * kScoreStride),
        slopes(kGather * kScoreStride), part(kGather * kRowStride), first(sums * s.dp), second(sums * s.dp),
        index(rows) {}
};

// weights = P = exp(S - lse) and slopes = dS = P (dP - delta) of the gathered rows against a block of keys.
void weights_and_slopes(const Shape& s, const Packed& p, int64_t rows, int64_t base, const int32_t* index,
                        int64_t panel, int64_t keys, float scale, BackwardScratch& x) {
  score(rows, keys, s.dim, x.query, p.key_panels + panel * s.dim * kPanel, x.weights);  // [rows, D] @ [D, keys]
  score(rows, keys, s.dim, x.grad, p.value_panels + panel * s.dim * kPanel, x.slopes);  // [rows, D] @ [D, keys]
  for (int64_t i = 0; i < rows; ++i) {
    const float lse = p.lse[base + index[i]], delta = p.delta[base + index[i]];
    float *weights = x.weights + i * kScoreStride, *slopes = x.slopes + i * kScoreStride;
    for (int64_t j = 0; j < keys; j += kVec) {
      const Floats weight = weight_of(weights + j, scale, lse);
      store(weights + j, weight);
      store(slopes + j, weight * (load(slopes + j) - delta));
    }
  }
}

// dQ = dS K / sqrt(D): a task a block of queries, walking the chunks that they see.
template <class T>
void backward_queries(const Shape& s, const Packed& p, const Selection& selection, float scale, const Tensor& dq) {
  const Rows<T> outputs(dq);
  const auto make = [&] { return std::make_unique<BackwardScratch>(s, kQueryRows, kQueryRows); };
  each_query_block(s, make, [&](auto& scratch, int64_t pair, int64_t first, int64_t last) {
    BackwardScratch& x = *scratch;
    const int64_t base = pair * s.length + first;
    std::fill(x.first + 0, x.first + (last - first) * s.dp, 0.f);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t selected = selection.rows(pair, c, first, last, x.index.data());
      for (int64_t g = 0; g < selected; g += kGather) {
        const int64_t rows = std::min(kGather, selected - g);
        const int32_t* index = x.index.data() + g;
        gather(p.query + base * s.dp, s.dp, index, rows, x.query);
        gather(p.grad + base * s.dp, s.dp, index, rows, x.grad);
        each_key_block(s, pair, c, [&](int64_t key, int64_t count, int64_t panel) {
          weights_and_slopes(s, p, rows, base, index, panel, count, scale, x);
          product(rows, s.dp, count, {x.slopes, kScoreStride, 1}, p.key + (pair * s.length + key) * s.dp, s.dp, x.part,
                  kRowStride, false);  // [rows, keys] @ [keys, D]
          for (int64_t i = 0; i < rows; ++i) {
            float* sum = x.first + index[i] * s.dp;
            for (int64_t d = 0; d < s.dp; d += kVec)
              store(sum + d, load(sum + d) + load(x.part + i * kRowStride + d));
          }
        });
      }
    }
    for (int64_t i = 0; i < last - first; ++i) outputs.write(pair, s.order[first + i], x.first + i * s.dp, scale);
  });
}

// dV = P^T dO, dK = dS^T Q / sqrt(D): a task a block of keys of one chunk, walking all queries that see it.
template <class T>
void backward_keys(const Shape& s, const Packed& p, const Selection& selection, float scale, const Tensor& dk,
                   const Tensor& dv) {
  const Rows<T> key_outputs(dk), value_outputs(dv);
  struct Block {
    int64_t chunk, key, count, panel;
  };
  std::vector<Block> blocks;  // of the first pair
  for (int64_t c = 0; c < s.chunks; ++c)
    each_key_block(s, 0, c, [&](int64_t key, int64_t keys, int64_t panel) { blocks.push_back({c, key, keys, panel}); });
  const int64_t tasks = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, s.pairs() * tasks, 1, [&](int64_t begin, int64_t end) {
    BackwardScratch x(s, kKeys, s.length);
    int64_t listed_pair = -1, listed_chunk = -1, selected = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / tasks, base = pair * s.length;
      const Block& block = blocks[task % tasks];
      if (pair != listed_pair || block.chunk != listed_chunk)
        selected = selection.rows(pair, block.chunk, 0, s.length, x.index.data());
      listed_pair = pair, listed_chunk = block.chunk;
      float *dkey = x.first, *dvalue = x.second;
      std::fill(dkey, dkey + block.count * s.dp, 0.f);
      std::fill(dvalue, dvalue + block.count * s.dp, 0.f);
      for (int64_t g = 0; g < selected; g += kGather) {
        const int64_t rows = std::min(kGather, selected - g);
        const int32_t* index = x.index.data() + g;
        gather(p.query + base * s.dp, s.dp, index, rows, x.query);
        gather(p.grad + base * s.dp, s.dp, index, rows, x.grad);
        weights_and_slopes(s, p, rows, base, index, pair * s.panels[s.chunks] + block.panel, block.count, scale, x);
        product(block.count, s.dp, rows, {x.weights, 1, kScoreStride}, x.grad, kRowStride, dvalue, s.dp,
                true);  // [keys, rows] @ [rows, D]
        product(block.count, s.dp, rows, {x.slopes, 1, kScoreStride}, x.query, kRowStride, dkey, s.dp,
                true);  // [keys, rows] @ [rows, D]
      }
      for (int64_t j = 0; j < block.count; ++j) {
        key_outputs.write(pair, s.order[block.key + j], dkey + j * s.dp, scale);
        value_outputs.write(pair, s.order[block.key + j], dvalue + j * s.dp, 1.f);
      }
    }
  });
}

template <class T>
void backward(const Shape& s, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const float* lse, const uint8_t* mask, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const float scale = 1.f / std::sqrt(static_cast<float>(s.dim));
  Packed packed(s);
  packed.fill<T>(s, grad, q, k, v, out, lse);
  const Selection selection{s, mask};
  backward_queries<T>(s, packed, selection, scale, dq);
  backward_keys<T>(s, packed, selection, scale, dk, dv);
}

// ---------------------------------------------------------------------------------------------- the native ops

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

std::tuple<Tensor, Tensor> vmoba_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> order, Tensor bounds,
                                           Tensor mask) {
  constexpr const char* op = "vmoba_attention";
  const Shape s = read_shape(op, q, order, bounds);
  check_like(op, "k", k, q);
  check_like(op, "v", v, q);
  const Tensor chosen = checked_mask(op, s, mask);
  Tensor out = new_like(q), lse = torch::stable::new_empty(q, {s.batch, s.heads, s.length}, ScalarType::Float);
  const auto* bits = static_cast<const uint8_t*>(chosen.const_data_ptr());
  float* logs = static_cast<float*>(lse.mutable_data_ptr());
  if (q.scalar_type() == ScalarType::Float) forward<float>(s, q, k, v, bits, out, logs);
  else if (q.scalar_type() == ScalarType::BFloat16) forward<BFloat16>(s, q, k, v, bits, out, logs);
  else check_that(false, op, "float32 or bfloat16");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> vmoba_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                                                            Tensor lse, std::optional<Tensor> order, Tensor bounds,
                                                            Tensor mask) {
  constexpr const char* op = "vmoba_attention_backward";
  const Shape s = read_shape(op, q, order, bounds);
  check_like(op, "grad", grad, q);
  check_like(op, "k", k, q);
  check_like(op, "v", v, q);
  check_like(op, "out", out, q);
  check_dim(op, "lse", lse, 3);
  check_that(lse.scalar_type() == ScalarType::Float, op, "lse of dtype float32");
  for (int i = 0; i < 3; ++i) check_equal(op, "lse shape", q.size(i), lse.size(i));
  const Tensor chosen = checked_mask(op, s, mask), logs = torch::stable::contiguous(lse);
  Tensor dq = new_like(q), dk = new_like(q), dv = new_like(q);
  const auto* bits = static_cast<const uint8_t*>(chosen.const_data_ptr());
  const float* l = static_cast<const float*>(logs.const_data_ptr());
  if (q.scalar_type() == ScalarType::Float) backward<float>(s, grad, q, k, v, out, l, bits, dq, dk, dv);
  else if (q.scalar_type() == ScalarType::BFloat16) backward<BFloat16>(s, grad, q, k, v, out, l, bits, dq, dk, dv);
  else check_that(false, op, "float32 or bfloat16");
  return {dq, dk, dv};
}

}  // namespace vmoba

void register_vmoba(torch::stable::detail::StableLibrary& m) {
  m.impl("vmoba_attention", TORCH_BOX(&vmoba::vmoba_attention));
  m.impl("vmoba_attention_backward", TORCH_BOX(&vmoba::vmoba_attention_backward));
}

}  // namespace triskele::TRISKELE_LEVEL
