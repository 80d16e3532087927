// What the VMoBA kernels share: the problem read off the arguments, tokens brought into chunk order, and packing.
//
// "Position" is a place in chunk order, "token" the caller's place; `order` maps the one to the other. A pair is one
// (batch, head).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "cpu/simd.h"

namespace triskele::TRISKELE_LEVEL::vmoba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDim = 256;
constexpr int64_t kPanel = kTileVecs * kVec;  // keys a packed panel: as wide as a tile of a product
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Shape {
  int64_t batch, heads, length, dim, chunks;
  int64_t dp;                   // dim rounded up to whole vectors
  std::vector<int64_t> order;   // position -> token
  std::vector<int64_t> bounds;  // chunk -> first position
  std::vector<int64_t> panels;  // chunk -> first panel
  int64_t pairs() const { return batch * heads; }
};

inline Shape read_shape(const char* op, const Tensor& q, const std::optional<Tensor>& order, const Tensor& bounds) {
  check_dim(op, "q", q, 4);
  Shape s;
  s.batch = q.size(0), s.heads = q.size(1), s.length = q.size(2), s.dim = q.size(3);
  check_that(s.dim >= 1 && s.dim <= kMaxDim, op, "head_dim in [1, 256]");
  s.dp = round_up(s.dim, kVec);
  check_dim(op, "bounds", bounds, 1);
  check_that(bounds.scalar_type() == ScalarType::Int, op, "bounds of dtype int32");
  check_contiguous(op, "bounds", bounds);
  s.chunks = bounds.size(0) - 1;
  const int32_t* b = static_cast<const int32_t*>(bounds.const_data_ptr());
  check_that(s.chunks >= 0 && b[0] == 0 && b[s.chunks] == s.length, op, "bounds from 0 to the number of tokens");
  s.bounds.assign(b, b + s.chunks + 1);
  s.panels.resize(s.chunks + 1);
  for (int64_t c = 0; c < s.chunks; ++c) {
    check_that(b[c] < b[c + 1], op, "bounds that increase");
    s.panels[c + 1] = s.panels[c] + (b[c + 1] - b[c] + kPanel - 1) / kPanel;
  }
  s.order.resize(s.length);
  if (!order.has_value()) {
    for (int64_t i = 0; i < s.length; ++i) s.order[i] = i;
    return s;
  }
  check_dim(op, "order", *order, 1);
  check_that(order->scalar_type() == ScalarType::Long, op, "order of dtype int64");
  check_contiguous(op, "order", *order);
  check_equal(op, "order entries", s.length, order->size(0));
  const int64_t* o = static_cast<const int64_t*>(order->const_data_ptr());
  std::vector<uint8_t> seen(s.length);
  for (int64_t i = 0; i < s.length; ++i) {
    check_that(o[i] >= 0 && o[i] < s.length && !seen[o[i]], op, "order to be a permutation of the tokens");
    seen[o[i]] = 1, s.order[i] = o[i];
  }
  return s;
}

inline void check_like(const char* op, const char* name, const Tensor& x, const Tensor& q) {
  check_dim(op, name, x, q.dim());
  for (int64_t i = 0; i < q.dim(); ++i) check_equal(op, name, q.size(i), x.size(i));
  check_that(x.scalar_type() == q.scalar_type(), op, std::string(name) + " of the dtype of q");
}

struct BFloat16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bfloat16(x.bits); }
inline void assign(float* out, float x) { *out = x; }
inline void assign(BFloat16* out, float x) { out->bits = to_bfloat16(x); }

// A [B, H, S, D] tensor of any strides, by (pair, token).
template <class T>
struct Rows {
  T* data;
  int64_t heads, dim, sb, sh, ss, sd;
  explicit Rows(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())), heads(x.size(1)), dim(x.size(3)), sb(x.stride(0)), sh(x.stride(1)),
        ss(x.stride(2)), sd(x.size(3) == 1 ? 1 : x.stride(3)) {}

  T* row(int64_t pair, int64_t token) const { return data + pair / heads * sb + pair % heads * sh + token * ss; }

  // f(d, element) over a row; the compiler gets the contiguous case apart.
  template <class F>
  void each(int64_t pair, int64_t token, const F& f) const {
    T* p = row(pair, token);
    if (sd == 1)
      for (int64_t d = 0; d < dim; ++d) f(d, p[d]);
    else
      for (int64_t d = 0; d < dim; ++d) f(d, p[d * sd]);
  }

  // out [0 .. padded) = row, zeros past D
  void read(int64_t pair, int64_t token, int64_t padded, float* out) const {
    each(pair, token, [=](int64_t d, const T& x) { out[d] = to_float(x); });
    std::fill(out + dim, out + padded, 0.f);
  }

  void write(int64_t pair, int64_t token, const float* in, float factor) const {
    each(pair, token, [=](int64_t d, T& x) { assign(&x, in[d] * factor); });
  }
};

// out [pairs][S][dp]: rows in chunk order.
template <class T>
void pack_rows(const Shape& s, const Tensor& x, float* out) {
  const Rows<T> rows(x);
  torch::stable::parallel_for(0, s.pairs() * s.length, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows.read(i / s.length, s.order[i % s.length], s.dp, out + i * s.dp);
  });
}

inline int64_t panel_floats(const Shape& s) { return s.pairs() * s.panels[s.chunks] * s.dim * kPanel; }

// out [pairs][panels][D][kPanel]: each chunk transposed, one key a column, zeros past its end.
template <class T>
void pack_panels(const Shape& s, const Tensor& x, float* out) {
  constexpr int kAtOnce = 4;  // rows transposed together, so that stores are not one float each; divides kPanel
  const int64_t size = s.dim * kPanel, per_pair = s.panels[s.chunks];
  const Rows<T> rows(x);
  torch::stable::parallel_for(0, s.pairs() * s.chunks, 1, [&](int64_t begin, int64_t end) {
    float lines[kAtOnce][kMaxDim];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / s.chunks, c = i % s.chunks, first = s.bounds[c], count = s.bounds[c + 1] - first;
      float* panels = out + (pair * per_pair + s.panels[c]) * size;
      for (int64_t j = 0; j < (s.panels[c + 1] - s.panels[c]) * kPanel; j += kAtOnce) {
        for (int r = 0; r < kAtOnce; ++r)
          if (j + r < count) rows.read(pair, s.order[first + j + r], s.dim, lines[r]);
          else std::fill(lines[r], lines[r] + s.dim, 0.f);
        float* column = panels + j / kPanel * size + j % kPanel;
        for (int64_t d = 0; d < s.dim; ++d)
          for (int r = 0; r < kAtOnce; ++r) column[d * kPanel + r] = lines[r][d];
      }
    }
  });
}

}  // namespace triskele::TRISKELE_LEVEL::vmoba
