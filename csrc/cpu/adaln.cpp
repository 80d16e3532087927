// What surrounds the matrix products of a diffusion transformer's block, each in one pass over the tokens:
//
//   adaln_modulate   (LayerNorm(x) * weight + bias) * (1 + scale[row]) + shift[row]
//   adaln_gate       residual + gate[row] * x
//
// `row` is the sample's row of the modulation, row_index[b]; contracts: python/triskele/ops/adaln/api.py. A token is read
// once and stays in the first-level cache for its mean and variance; all arithmetic is float32, whatever x is. Tokens are
// independent, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/widen.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// T is float, or uint16_t for bfloat16.
using TRISKELE_LEVEL::load;
using TRISKELE_LEVEL::store;

inline Floats load(const uint16_t* p) { return load_bfloat16(p); }
inline void store(uint16_t* p, Floats x) { store_bfloat16(p, x); }

template <bool Streams, class T>
inline void put(T* p, Floats x) {
  if constexpr (!Streams) store(p, x);
  else if constexpr (std::is_same_v<T, float>) stream(p, x);
  else stream_bfloat16(p, x);
}
inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return from_bfloat16(*p); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = to_bfloat16(x); }

inline float across(Floats x) {  // by halves: a chain of kVec additions would take longer than the token's other work
  float lanes[kVec];
  store(lanes, x);
  for (int width = kVec / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

constexpr int kChains = 4;  // sums that run side by side, so that none waits for its last addition

// Σ f(i) over [0, n), f giving kVec values at i; `rest` one value.
template <class F, class Rest>
inline float sum_of(int64_t n, const F& f, const Rest& rest) {
  Floats sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kVec <= n; i += kChains * kVec)
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += f(i + chain * kVec);
  for (; i + kVec <= n; i += kVec) sums[0] += f(i);
  float total = across((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += rest(i);
  return total;
}

// [batch, tokens, channels] with unit channel stride.
template <class T>
struct Tokens {
  T* data;
  int64_t batch_stride, token_stride;
  T* at(int64_t b, int64_t l) const { return data + b * batch_stride + l * token_stride; }
};

// [rows, channels] of the modulation, and the row of each sample: 0 where there is one row, b where there are as many as
// samples, unless an index says otherwise.
struct Rows {
  int64_t count;
  const int64_t* index;
  int64_t of(int64_t b) const { return index != nullptr ? index[b] : count == 1 ? 0 : b; }
};

struct Table {
  const float* data;
  int64_t stride;
  const float* row(int64_t r) const { return data + r * stride; }
};

int64_t tokens_a_thread(int64_t channels) { return 1 + 32768 / channels; }

constexpr int64_t kAhead = 2048;  // bytes between what is read and what is fetched

template <class T>
inline void fetch(const T* p) { __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead); }

template <class T, bool Streams>
void modulate(Tokens<const T> x, Tokens<T> out, int64_t batch, int64_t tokens, int64_t channels, Rows rows, Table scale,
              Table shift, const float* weight, const float* bias, float eps) {
  torch::stable::parallel_for(0, batch * tokens, tokens_a_thread(channels), [&](int64_t begin, int64_t end) {
    const int64_t n = channels, padded = round_up(n, kVec), whole = n - n % kVec;
    Scratch scratch(3 * padded);
    float *factor = scratch, *offset = scratch + padded, *wide = scratch + 2 * padded;
    int64_t made = -1;                      // the row that factor and offset were made for
    for (int64_t i_token = begin; i_token < end; ++i_token) {
      const int64_t b = i_token / tokens, l = i_token % tokens, r = rows.of(b);
      if (r != made) {                      // (z w + β)(1 + s) + t = z (w (1 + s)) + (β (1 + s) + t)
        made = r;
        const float *s = scale.row(r), *t = shift.row(r);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const float gain = 1.f + s[i];
          factor[i] = weight != nullptr ? weight[i] * gain : gain;
          offset[i] = bias != nullptr ? bias[i] * gain + t[i] : t[i];
        }
      }
      const T* in = x.at(b, l);
      const float* row;
      if constexpr (std::is_same_v<T, float>) {
        row = in;
      } else {
        for (int64_t i = 0; i < whole; i += kVec) store(wide + i, load(in + i));
        for (int64_t i = whole; i < n; ++i) wide[i] = get(in + i);
        row = wide;
      }
      const float mean = sum_of(n, [&](int64_t i) { return load(row + i); }, [&](int64_t i) { return row[i]; }) / n;
      const Floats center = splat(mean);
      const float variance = sum_of(n, [&](int64_t i) { const Floats d = load(row + i) - center; return d * d; },
                                    [&](int64_t i) { return (row[i] - mean) * (row[i] - mean); }) / n;
      const float inverse = 1.f / std::sqrt(variance + eps);
      T* to = out.at(b, l);
      for (int64_t i = 0; i < whole; i += kVec)
        put<Streams>(to + i, (load(row + i) - center) * inverse * load(factor + i) + load(offset + i));
      for (int64_t i = whole; i < n; ++i) put(to + i, (row[i] - mean) * inverse * factor[i] + offset[i]);
    }
    if constexpr (Streams) streamed();
  });
}

template <class T, bool Streams>
void gate_residual(Tokens<const T> residual, Tokens<const T> x, Tokens<T> out, int64_t batch, int64_t tokens,
                   int64_t channels, Rows rows, Table gate) {
  torch::stable::parallel_for(0, batch * tokens, tokens_a_thread(channels), [&](int64_t begin, int64_t end) {
    const int64_t n = channels, whole = n - n % kVec;
    for (int64_t i_token = begin; i_token < end; ++i_token) {
      const int64_t b = i_token / tokens, l = i_token % tokens;
      const float* g = gate.row(rows.of(b));
      const T *kept = residual.at(b, l), *in = x.at(b, l);
      T* to = out.at(b, l);
      for (int64_t i = 0; i < whole; i += kVec) {
        fetch(kept + i), fetch(in + i);
        put<Streams>(to + i, load(kept + i) + load(g + i) * load(in + i));
      }
      for (int64_t i = whole; i < n; ++i) put(to + i, get(kept + i) + g[i] * get(in + i));
    }
    if constexpr (Streams) streamed();
  });
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <class T>
Tokens<const T> tokens_of(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <class T>
Tokens<T> tokens_of_result(Tensor& out) {
  return {static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1)};
}

void check_tokens(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  check_dim(op, name, x, 3);
  for (int64_t axis = 0; axis < 3; ++axis) check_equal(op, name, like.size(axis), x.size(axis));
  check_that(x.scalar_type() == like.scalar_type(), op, std::string(name) + " in the dtype of the other");
  check_that(x.size(2) == 1 || (x.size(2) > 1 && x.stride(2) == 1), op,
             std::string(name) + " with unit channel stride");
}

Table table_of(const char* op, const char* name, const Tensor& value, int64_t rows, int64_t channels) {
  check_dim(op, name, value, 2);
  check_equal(op, name, rows, value.size(0));
  check_equal(op, name, channels, value.size(1));
  check_that(value.scalar_type() == ScalarType::Float, op, std::string(name) + " in float32");
  check_that(channels == 1 || value.stride(1) == 1, op, std::string(name) + " with unit channel stride");
  return {static_cast<const float*>(value.const_data_ptr()), value.stride(0)};
}

Rows rows_of(const char* op, const std::optional<Tensor>& index, int64_t count, int64_t batch) {
  if (!index) {
    check_that(count == batch || count == 1, op, "a row for each sample, or one");
    return {count, nullptr};
  }
  check_dim(op, "row_index", *index, 1);
  check_contiguous(op, "row_index", *index);
  check_equal(op, "row_index", batch, index->size(0));
  check_that(index->scalar_type() == ScalarType::Long, op, "row_index in int64");
  const int64_t* rows = static_cast<const int64_t*>(index->const_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    check_that(rows[b] >= 0 && rows[b] < count, op, "row_index from 0 to " + std::to_string(count - 1));
  return {count, rows};
}

const float* vector_of(const char* op, const char* name, const std::optional<Tensor>& value, int64_t channels) {
  if (!value) return nullptr;
  check_dim(op, name, *value, 1);
  check_contiguous(op, name, *value);
  check_equal(op, name, channels, value->size(0));
  check_that(value->scalar_type() == ScalarType::Float, op, std::string(name) + " in float32");
  return static_cast<const float*>(value->const_data_ptr());
}

// Calls f with a null pointer of the tokens' type, and with whether the result `out` goes past the caches.
template <class F>
void by_dtype(const char* op, const Tensor& out, const F& f) {
  const ScalarType type = out.scalar_type();
  check_that(type == ScalarType::Float || type == ScalarType::BFloat16, op, "x in float32 or bfloat16");
  const auto with = [&](auto* tokens) {
    const int64_t row = out.size(2) * static_cast<int64_t>(sizeof(*tokens));
    streams(out.const_data_ptr(), row, out.numel() * static_cast<int64_t>(sizeof(*tokens)))
        ? f(tokens, std::true_type()) : f(tokens, std::false_type());
  };
  type == ScalarType::Float ? with((float*)nullptr) : with((uint16_t*)nullptr);
}

Tensor adaln_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& row_index,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const char* op = "adaln_modulate";
  check_tokens(op, "x", x, x);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), count = scale.size(0);
  const Table scales = table_of(op, "scale", scale, count, channels);
  const Table shifts = table_of(op, "shift", shift, count, channels);
  const Rows rows = rows_of(op, row_index, count, batch);
  const float* w = vector_of(op, "weight", weight, channels);
  const float* b = vector_of(op, "bias", bias, channels);
  Tensor out = torch::stable::new_empty(x, {batch, tokens, channels});
  by_dtype(op, out, [&](auto* type, auto past) {
    using T = std::remove_pointer_t<decltype(type)>;
    modulate<T, past()>(tokens_of<T>(x), tokens_of_result<T>(out), batch, tokens, channels, rows, scales, shifts, w, b,
                        static_cast<float>(eps));
  });
  return out;
}

Tensor adaln_gate(const Tensor& residual, const Tensor& x, const Tensor& gate, const std::optional<Tensor>& row_index) {
  const char* op = "adaln_gate";
  check_tokens(op, "residual", residual, residual);
  check_tokens(op, "x", x, residual);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), count = gate.size(0);
  const Table gates = table_of(op, "gate", gate, count, channels);
  const Rows rows = rows_of(op, row_index, count, batch);
  Tensor out = torch::stable::new_empty(residual, {batch, tokens, channels});
  by_dtype(op, out, [&](auto* type, auto past) {
    using T = std::remove_pointer_t<decltype(type)>;
    gate_residual<T, past()>(tokens_of<T>(residual), tokens_of<T>(x), tokens_of_result<T>(out), batch, tokens, channels,
                             rows, gates);
  });
  return out;
}

}  // namespace

void register_adaln(torch::stable::detail::StableLibrary& m) {
  m.impl("adaln_modulate", TORCH_BOX(&adaln_modulate));
  m.impl("adaln_gate", TORCH_BOX(&adaln_gate));
}

}  // namespace triskele::TRISKELE_LEVEL
