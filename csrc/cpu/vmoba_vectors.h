// VMoBA on vectors of float: the levels without products of packed tiles. Forward, and the gradients of q, k and v.
//
// Gates are per token, so neighbouring queries choose different chunks, and a dense tile over the union of their chunks
// would compute much that nobody asked for. A task takes a range of queries, walks the chunks, and per chunk gathers
// the rows whose bit is set into dense tiles; each row's running softmax moves on per block of keys. So the products do
// the selected share of the dense work and no more, whatever the pattern; the price is a copy of the gathered rows, D
// floats against D * (keys of the chunk) multiplications.
#pragma once
#include <utility>

#include "cpu/vmoba_lists.h"

namespace triskele::TRISKELE_LEVEL::vmoba::on_vectors {

constexpr int64_t kGather = 48;      // rows of a dense tile, a multiple of every kTileRows
constexpr int64_t kKeys = 128;       // keys of a dense tile, a multiple of every kPanel
constexpr int64_t kRowStride = kMaxDim + kVec, kScoreStride = kKeys + kVec;  // no powers of two: they crowd cache sets

// P = e^(scale score - lse), at most 1 however lse was rounded.
inline Floats weight_of(const float* score, float scale, float lse) {
  const Floats power = (load(score) * scale - lse) * kLog2E;
  return exp2(power > 0.f ? Floats{} : power);
}

// scores [rows, keys] = a [rows, D] times packed panels [D, kPanel]
inline void score(int64_t rows, int64_t keys, int64_t dim, const float* a, const float* panels, float* scores) {
  for (int64_t j = 0; j < keys; j += kPanel, panels += dim * kPanel)
    product(rows, round_up(std::min(kPanel, keys - j), kVec), dim, {a, kRowStride, 1}, panels, kPanel, scores + j,
            kScoreStride, false);
}

// The same, summed in runs of kRun of D: dP is taken from rowsum(dO O), and where a row sees one key nothing should be
// left of the two, so that the roundings of one chain over D would show. `part` [rows, kPanel]: scratch.
inline void score_in_runs(int64_t rows, int64_t keys, int64_t dim, const float* a, const float* panels, float* scores,
                          float* part) {
  constexpr int64_t kRun = 32;
  for (int64_t j = 0; j < keys; j += kPanel, panels += dim * kPanel) {
    const int64_t width = round_up(std::min(kPanel, keys - j), kVec);
    for (int64_t d = 0; d < dim; d += kRun) {
      product(rows, width, std::min(kRun, dim - d), {a + d, kRowStride, 1}, panels + d * kPanel, kPanel,
              d == 0 ? scores + j : part, d == 0 ? kScoreStride : kPanel, false);
      for (int64_t i = 0; i < rows && d > 0; ++i)
        for (int64_t c = 0; c < width; c += kVec) {
          float* to = scores + i * kScoreStride + j + c;
          store(to, load(to) + load(part + i * kPanel + c));
        }
    }
  }
}

inline void gather(const float* rows, int64_t dp, const int32_t* index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kRowStride, rows + index[i] * dp, dp * sizeof(float));
}

// f(first key position, keys, panel) over the dense tiles of chunk c of a pair.
template <class F>
void each_key_block(const Shape& s, int64_t pair, int64_t c, const F& f) {
  for (int64_t j = s.bounds[c]; j < s.bounds[c + 1]; j += kKeys)
    f(j, std::min(kKeys, s.bounds[c + 1] - j), pair * s.panels[s.chunks] + s.panels[c] + (j - s.bounds[c]) / kPanel);
}

// Queries of a task: half a range, since both their rows and their sums are floats here.
inline int64_t query_rows(const Shape& s) { return range_rows(s) / 2; }

// f(pair, first, last) over the blocks of query_rows positions, in parallel; `make` gives each thread its scratch.
template <class Make, class F>
void each_query_block(const Shape& s, const Make& make, const F& f) {
  const int64_t rows = query_rows(s), blocks = (s.length + rows - 1) / rows;
  torch::stable::parallel_for(0, s.pairs() * blocks, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * rows;
      f(scratch, task / blocks, first, std::min(first + rows, s.length));
    }
  });
}

// ---------------------------------------------------------------------------------------------- forward

struct ForwardScratch {
  Scratch rows, sum, query, scores, part, mass;  // mass: a partial sum a lane
  std::vector<int32_t> index;
  std::vector<float> top;
  float shrink[kGather + kVec];
  explicit ForwardScratch(const Shape& s)
      : rows(query_rows(s) * s.dp), sum(query_rows(s) * s.dp), query(kGather * kRowStride),
        scores(kGather * kScoreStride), part(kGather * kRowStride), mass(query_rows(s) * kVec), index(query_rows(s)),
        top(query_rows(s)) {}
};

// Raw scores -> weights against each row's new maximum; shrink[i] is the factor that the row's earlier sums need.
inline void soften(int64_t rows, int64_t keys, float scale, const int32_t* index, ForwardScratch& x) {
  const int64_t padded = round_up(keys, kVec);
  const float factor = scale * kLog2E;
  float sums[kGather * kVec];
  for (int64_t i = 0; i < rows; ++i) {
    float* scores = x.scores + i * kScoreStride;
    std::fill(scores + keys, scores + padded, -kInf);
    Floats top = load(scores);
    for (int64_t j = kVec; j < padded; j += kVec) top = bigger(load(scores + j), top);
    const float before = x.top[index[i]], now = std::max(before, largest(top));
    const float base = now == -kInf ? 0.f : now;
    Floats sum{};
    for (int64_t j = 0; j < padded; j += kVec) {
      const Floats weight = exp2((load(scores + j) - base) * factor);  // the difference first: exact where it counts
      store(scores + j, weight);
      sum += weight;
    }
    x.top[index[i]] = now;
    x.shrink[i] = (before - base) * factor;
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
void run_forward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const uint8_t* mask,
                 const Tensor& out, float* lse) {
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
    std::fill(x.top.begin(), x.top.end(), -kInf);
    std::fill(x.mass + 0, x.mass + (last - first) * kVec, 0.f);
    std::fill(x.sum + 0, x.sum + (last - first) * s.dp, 0.f);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t selected = selection.rows(pair, c, first, last, x.index.data());
      for (int64_t g = 0; g < selected; g += kGather) {
        const int64_t rows = std::min(kGather, selected - g);
        const int32_t* index = x.index.data() + g;
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
      lse[pair * s.length + s.order[first + i]] = x.top[i] * scale + std::log(mass);
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
  Scratch query, grad, weights, slopes, run, part, first, second;
  std::vector<int32_t> index;
  BackwardScratch(const Shape& s, int64_t sums, int64_t rows)
      : query(kGather * kRowStride), grad(kGather * kRowStride), weights(kGather * kScoreStride),
        slopes(kGather * kScoreStride), run(kGather * kPanel), part(kGather * kRowStride),
        first(sums * s.dp), second(sums * s.dp),
        index(rows) {}
};

// weights = P = exp(S - lse) and slopes = dS = P (dP - delta) of the gathered rows against a block of keys.
inline void weights_and_slopes(const Shape& s, const Packed& p, int64_t rows, int64_t base, const int32_t* index,
                        int64_t panel, int64_t keys, float scale, BackwardScratch& x) {
  score(rows, keys, s.dim, x.query, p.key_panels + panel * s.dim * kPanel, x.weights);  // [rows, D] @ [D, keys]
  score_in_runs(rows, keys, s.dim, x.grad, p.value_panels + panel * s.dim * kPanel, x.slopes,
                x.run);  // [rows, D] @ [D, keys]
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
  const auto make = [&] { return std::make_unique<BackwardScratch>(s, query_rows(s), query_rows(s)); };
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
void run_backward(const Shape& s, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const float* lse, const uint8_t* mask, const Tensor& dq, const Tensor& dk,
                  const Tensor& dv) {
  const float scale = 1.f / std::sqrt(static_cast<float>(s.dim));
  Packed packed(s);
  packed.fill<T>(s, grad, q, k, v, out, lse);
  const Selection selection{s, mask};
  backward_queries<T>(s, packed, selection, scale, dq);
  backward_keys<T>(s, packed, selection, scale, dk, dv);
}

}  // namespace triskele::TRISKELE_LEVEL::vmoba::on_vectors
