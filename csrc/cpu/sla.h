// What the forward and the backward of sparse-linear attention share: views of the inputs, the map's rows and columns,
// and tiles in "lanes": a tile of up to 64 tokens lies transposed, [D, 64], one token a lane. Row maxima, row sums and
// softmax over D are then plain vector arithmetic, ragged block lengths need no padding on the other side of a product,
// and K, V and Q are read in their own layout.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/simd.h"

namespace triskele::TRISKELE_LEVEL {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLanes = 64;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

enum class Feature : int64_t { kSoftmax, kElu, kRelu };
enum class Scope : int64_t { kAll, kComplement, kMarginal };

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()),
                                  ScalarType::Float);
}

inline Tensor new_like_dtype(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
}

inline const float* floats(const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

struct Problem {
  int64_t batch, heads, queries, keys, dim, block_q, block_k;
  Feature feature;
  Scope scope;
  float scale;
  int64_t q_blocks() const { return (queries + block_q - 1) / block_q; }
  int64_t k_blocks() const { return (keys + block_k - 1) / block_k; }
  int64_t all_heads() const { return batch * heads; }
  int64_t padded() const { return round_up(dim, kVec); }
  float eps() const { return scope == Scope::kAll ? 1e-5f : 0.f; }
  bool covers(int8_t kind) const { return scope == Scope::kComplement ? kind != 1 : kind == 0; }  // not for kAll
  int64_t state() const { return (dim + 1) * padded(); }  // floats of H [D, padded] and, as its last row, Z [D]
};

inline Problem problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& map,
                       int64_t block_q, int64_t block_k, int64_t feature, int64_t scope, double scale) {
  for (const Tensor* x : {&q, &k, &v, &map}) check_equal(op, "dimensions", int64_t{4}, x->dim());
  for (const Tensor* x : {&k, &v}) {
    check_that(x->scalar_type() == q.scalar_type(), op, "k and v of the dtype of q");
    check_equal(op, "batch", q.size(0), x->size(0));
    check_equal(op, "heads", q.size(1), x->size(1));
    check_equal(op, "head_dim", q.size(3), x->size(3));
    check_equal(op, "keys", k.size(2), x->size(2));
  }
  check_that(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16, op, "float32 or bfloat16");
  check_that(block_q >= 1 && block_k >= 1 && q.size(3) >= 1 && q.size(3) <= 256, op, "blocks >= 1 and head_dim 1..256");
  check_that(feature >= 0 && feature <= 2 && scope >= 0 && scope <= 2, op, "a feature map and a scope in 0..2");
  check_that(map.scalar_type() == ScalarType::Char, op, "an int8 map");
  check_contiguous(op, "map", map);
  const Problem p{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), block_q, block_k,
                  static_cast<Feature>(feature), static_cast<Scope>(scope), static_cast<float>(scale)};
  check_equal(op, "map batch", p.batch, map.size(0));
  check_equal(op, "map heads", p.heads, map.size(1));
  check_equal(op, "map query blocks", p.q_blocks(), map.size(2));
  check_equal(op, "map key blocks", p.k_blocks(), map.size(3));
  return p;
}

// The visible keys: those of block j of batch b are packed at j * block_k, `count` of them, in order.
struct Visible {
  std::vector<int64_t> count;  // [B, Nk]
  std::vector<int64_t> index;  // [B, Lk] token of each packed row; empty: no mask, packed is the original
};

inline Visible visible_keys(const char* op, const Problem& p, const OptionalTensor& mask) {
  if (mask) {
    check_that(mask->scalar_type() == ScalarType::Bool, op, "key_mask of dtype bool");
    check_contiguous(op, "key_mask", *mask);
    check_equal(op, "key_mask elements", p.batch * p.keys, mask->numel());
  }
  const int64_t blocks = p.k_blocks();
  Visible seen;
  seen.count.assign(p.batch * blocks, 0);
  if (mask) seen.index.assign(p.batch * p.keys, 0);
  const bool* shown = mask ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = j * p.block_k, last = std::min(p.keys, first + p.block_k);
      int64_t& n = seen.count[b * blocks + j];
      if (!mask) n = last - first;
      for (int64_t t = first; mask && t < last; ++t)
        if (shown[b * p.keys + t]) seen.index[b * p.keys + first + n++] = t;
    }
  return seen;
}

// Rows of a [B, H, L, D] tensor as float32 with unit stride over D: the tensor itself where it is that already,
// otherwise a packed copy (of the visible keys alone where an index is given).
class Rows {
 public:
  Rows(const Tensor& x, const int64_t* index = nullptr, const Visible* seen = nullptr, int64_t block = 0)
      : heads_(x.size(1)), length_(x.size(2)), dim_(x.size(3)) {
    if (x.scalar_type() == ScalarType::Float && (x.stride(3) == 1 || dim_ == 1) && index == nullptr) {
      keep_ = x;
      data_ = x.const_data_ptr<float>();
      batch_stride_ = x.stride(0), head_stride_ = x.stride(1), stride_ = x.stride(2);
      return;
    }
    keep_ = new_floats(x, {x.size(0), heads_, length_, dim_});
    batch_stride_ = heads_ * length_ * dim_, head_stride_ = length_ * dim_, stride_ = dim_;
    data_ = keep_->const_data_ptr<float>();
    if (x.scalar_type() == ScalarType::Float)
      pack(x, x.const_data_ptr<float>(), [](float value) { return value; }, index, seen, block);
    else
      pack(x, static_cast<const uint16_t*>(x.const_data_ptr()), from_bfloat16, index, seen, block);
  }

  const float* head(int64_t head) const {
    return data_ + (head / heads_) * batch_stride_ + (head % heads_) * head_stride_;
  }
  int64_t stride() const { return stride_; }

 private:
  template <class T, class Convert>
  void pack(const Tensor& x, const T* source, Convert convert, const int64_t* index, const Visible* seen,
            int64_t block) {
    float* target = keep_->mutable_data_ptr<float>();
    const int64_t s0 = x.stride(0), s1 = x.stride(1), s2 = x.stride(2), s3 = x.stride(3);
    const int64_t blocks = block > 0 ? (length_ + block - 1) / block : 1;
    torch::stable::parallel_for(0, x.size(0) * heads_ * length_, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t t = row % length_, h = row / length_ % heads_, b = row / length_ / heads_;
        if (index != nullptr && t % block >= seen->count[b * blocks + t / block]) continue;  // past the visible ones
        const T* from = source + b * s0 + h * s1 + (index != nullptr ? index[b * length_ + t] : t) * s2;
        float* to = target + row * dim_;
        if (s3 == 1)
          for (int64_t d = 0; d < dim_; ++d) to[d] = convert(from[d]);
        else
          for (int64_t d = 0; d < dim_; ++d) to[d] = convert(from[d * s3]);
      }
    });
  }

  std::optional<Tensor> keep_;
  const float* data_;
  int64_t heads_, length_, dim_, batch_stride_, head_stride_, stride_;
};

inline Rows key_rows(const Tensor& x, const Visible& seen, int64_t block) {
  return seen.index.empty() ? Rows(x) : Rows(x, seen.index.data(), &seen, block);
}

// ---------------------------------------------------------------------------------------------- tiles in lanes

// rows [count, D] -> lanes [D, kLanes], times `factor`; lanes up to the next multiple of kVec are zero.
inline void to_lanes(const float* rows, int64_t stride, int64_t count, int64_t dim, float factor, float* lanes) {
  const int64_t width = round_up(count, kVec), whole = dim / kVec * kVec;
  int64_t r = 0;
  for (; r + kVec <= count; r += kVec) {
    for (int64_t d = 0; d < whole; d += kVec)
      transpose(rows + r * stride + d, stride, lanes + d * kLanes + r, kLanes, factor);
    for (int64_t d = whole; d < dim; ++d)
      for (int i = 0; i < kVec; ++i) lanes[d * kLanes + r + i] = rows[(r + i) * stride + d] * factor;
  }
  for (; r < count; ++r)
    for (int64_t d = 0; d < dim; ++d) lanes[d * kLanes + r] = rows[r * stride + d] * factor;
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t c = count; c < width; ++c) lanes[d * kLanes + c] = 0.f;
}

inline void store_value(float* p, float x) { *p = x; }
inline void store_value(uint16_t* p, float x) { *p = to_bfloat16(x); }

// lanes [D, kLanes] -> rows of a contiguous output. `index`: the row of each lane, where they are not consecutive.
template <class T>
inline void from_lanes(const float* lanes, int64_t count, int64_t dim, T* rows, const int64_t* index = nullptr) {
  alignas(64) float block[kVec * kVec];
  for (int64_t c = 0; c < count; c += kVec)
    for (int64_t d = 0; d < dim; d += kVec) {
      const int64_t height = std::min<int64_t>(kVec, count - c), width = std::min<int64_t>(kVec, dim - d);
      if (width == kVec) {
        transpose(lanes + d * kLanes + c, kLanes, block, kVec, 1.f);
      } else {
        for (int64_t i = 0; i < width; ++i)
          for (int64_t r = 0; r < height; ++r) block[r * kVec + i] = lanes[(d + i) * kLanes + c + r];
      }
      for (int64_t r = 0; r < height; ++r) {
        T* to = rows + (index != nullptr ? index[c + r] : c + r) * dim + d;
        for (int64_t i = 0; i < width; ++i) store_value(to + i, block[r * kVec + i]);
      }
    }
}

inline void scale_lanes(const float* x, int64_t dim, int64_t width, float factor, float* out) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t c = 0; c < width; c += kVec) store(out + d * kLanes + c, load(x + d * kLanes + c) * factor);
}

// x -> phi(x), in place, [D, kLanes], `width` lanes.
inline void feature_lanes(Feature feature, float* x, int64_t dim, int64_t width) {
  for (int64_t c = 0; c < width; c += kVec) {
    float* column = x + c;
    if (feature == Feature::kRelu) {
      for (int64_t d = 0; d < dim; ++d) {
        const Floats value = load(column + d * kLanes);
        store(column + d * kLanes, value < 0.f ? Floats{} : value);
      }
    } else if (feature == Feature::kElu) {
      for (int64_t d = 0; d < dim; ++d) {
        const Floats value = load(column + d * kLanes);
        store(column + d * kLanes, value > 0.f ? value + 1.f : exp2(value * kLog2E));
      }
    } else {
      // Two chains of maxima and of sums: one alone would wait for itself.
      const int64_t even = dim / 2 * 2;
      Floats top = load(column), other = top, sum{}, rest{};
      for (int64_t d = 0; d < even; d += 2) {
        top = bigger(load(column + d * kLanes), top);
        other = bigger(load(column + (d + 1) * kLanes), other);
      }
      if (even < dim) top = bigger(load(column + even * kLanes), top);
      top = bigger(top, other);
      const auto power = [&](int64_t d) {
        const Floats value = exp2((load(column + d * kLanes) - top) * kLog2E);
        store(column + d * kLanes, value);
        return value;
      };
      for (int64_t d = 0; d < even; d += 2) {
        sum += power(d);
        rest += power(d + 1);
      }
      if (even < dim) sum += power(even);
      sum += rest;
      const Floats inverse = 1.f / sum;
      for (int64_t d = 0; d < dim; ++d) store(column + d * kLanes, load(column + d * kLanes) * inverse);
    }
  }
}

// ---------------------------------------------------------------------------------------------- block states

// Heads whose block states, `floats` a head, are held at a time: 256 MiB of them, at least one head.
inline int64_t heads_at_a_time(const Problem& p, int64_t floats) {
  return std::clamp<int64_t>((int64_t{64} << 20) / std::max<int64_t>(floats, 1), 1, std::max<int64_t>(p.all_heads(), 1));
}

// out [rows, size] = cover [rows, depth] @ states [depth, size] for each of `heads`; cover == nullptr: one row of ones.
// Each sum holds the covered states alone, in order, so no cancellation takes place and an empty one is exactly zero.
inline void combine(int64_t heads, int64_t rows, int64_t depth, int64_t size, const float* cover, bool transposed,
                    const float* states, float* out) {
  constexpr int64_t kStrip = 64;  // floats: a strip of every state stays in the first caches while all rows use it
  const int64_t strips = (size + kStrip - 1) / kStrip;
  torch::stable::parallel_for(0, heads * strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / strips, at = task % strips * kStrip, width = std::min(kStrip, size - at);
      const float one = 1.f;
      const float* mask = cover == nullptr ? &one : cover + head * rows * depth;
      const Operand a = cover == nullptr ? Operand{mask, 0, 0}
                        : transposed     ? Operand{mask, 1, rows}
                                         : Operand{mask, depth, 1};
      product(rows, width, depth, a, states + head * depth * size + at, size, out + head * rows * size + at, size,
              false);
    }
  });
}

// cover [heads, Nq, Nk]: 1 where the linear branch of a query block covers a key block.
inline void cover_of(const Problem& p, const int8_t* map, int64_t first_head, int64_t heads, float* cover) {
  const int64_t size = p.q_blocks() * p.k_blocks();
  torch::stable::parallel_for(0, heads * size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) cover[i] = p.covers(map[first_head * size + i]) ? 1.f : 0.f;
  });
}

// The states h_j = phi(K_j)^T V_j, z_j of segments of key blocks, for `heads` heads from `first_head`.
// A segment is one block, or as many as make about 1024 keys where only the sum over all of them is wanted.
inline int64_t blocks_a_segment(const Problem& p) {
  return p.scope == Scope::kAll ? std::max<int64_t>(1, 1024 / p.block_k) : 1;
}

inline int64_t segments(const Problem& p) {
  const int64_t step = blocks_a_segment(p);
  return (p.k_blocks() + step - 1) / step;
}

inline void key_states(const Problem& p, const Rows& k, const Rows& v, const Visible& seen, int64_t first_head,
                       int64_t heads, float* states) {
  const int64_t count = segments(p), step = blocks_a_segment(p), padded = p.padded();
  torch::stable::parallel_for(0, heads * count, 1, [&](int64_t begin, int64_t end) {
    Scratch phi(p.dim * kLanes), values(kLanes * padded);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = first_head + task / count, segment = task % count;
      float* h = states + task * p.state();
      float* z = h + p.dim * padded;
      std::fill(h, h + p.state(), 0.f);
      for (int64_t j = segment * step; j < std::min(p.k_blocks(), (segment + 1) * step); ++j) {
        const int64_t visible = seen.count[head / p.heads * p.k_blocks() + j];
        for (int64_t t = 0; t < visible; t += kLanes) {
          const int64_t n = std::min(kLanes, visible - t), row = j * p.block_k + t;
          to_lanes(k.head(head) + row * k.stride(), k.stride(), n, p.dim, 1.f, phi);
          feature_lanes(p.feature, phi, p.dim, round_up(n, kVec));
          const float* b = v.head(head) + row * v.stride();
          int64_t ldb = v.stride();
          if (padded != p.dim) {
            for (int64_t r = 0; r < n; ++r) {
              std::copy_n(b + r * v.stride(), p.dim, values + r * padded);
              std::fill(values + r * padded + p.dim, values + (r + 1) * padded, 0.f);
            }
            b = values, ldb = padded;
          }
          product(p.dim, padded, n, {phi, kLanes, 1}, b, ldb, h, padded, true);  // [D, n] @ [n, D]
          for (int64_t d = 0; d < p.dim; ++d) {
            float sum = 0.f;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < n; ++c) sum += phi[d * kLanes + c];
            z[d] += sum;
          }
        }
      }
    }
  });
}

}  // namespace triskele::TRISKELE_LEVEL
