// What surrounds the matrix products of a diffusion transformer's block, each in one pass over the tokens:
//
//   adaln_modulate   (LayerNorm(x) * weight + bias) * (1 + scale[row]) + shift[row]
//   adaln_gate       residual + gate[row] * x
//
// `row` is the sample's row of the modulation, row_index[b]; contracts: python/triskele/ops/adaln/api.py; the same on a
// CPU: csrc/cpu/adaln.cpp. A thread block takes a few tokens of one sample, one after the other, and each of its
// threads the same channels of all of them: what the modulation's row makes of these channels is computed once and
// stays in registers, a token is read once, and the next one is on its way while this one is reduced. Arithmetic is
// float32.
//
// Bytes an element: sizeof(T) read and written (gate: two read), and the modulation's float32 row once a thread block.
#include <cmath>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"

namespace triskele::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMostChannels = 8192;
constexpr int kMostTokens = 16;     // a thread block
constexpr int64_t kBlocks = 4096;   // thread blocks that fill any chip a few times over

// Channels a thread holds, in runs of V: fewer where each has an address of its own.
template <int V>
constexpr int kHeld = V > 1 ? 16 : 8;
template <int V>
constexpr int kMostThreads = kMostChannels / kHeld<V>;

// [batch, tokens, channels] with unit channel stride.
template <class T>
struct Tokens {
  const T* data;
  int64_t batch_stride, token_stride;
};

// [count, channels] of the modulation with unit channel stride.
struct Table {
  const float* data;
  int64_t stride;
};

struct Shape {
  int64_t batch, tokens, rows;
  int channels;
  const int64_t* row_index;  // [batch] or null: row b, or row 0 where there is one
  int64_t per_block;         // tokens a thread block
};

// The tokens of this thread block: [first, last) of sample b.
struct Span {
  int64_t b, first, last;
  __device__ explicit Span(const Shape& p) {
    const int64_t parts = (p.tokens + p.per_block - 1) / p.per_block;
    b = blockIdx.x / parts;
    first = blockIdx.x % parts * p.per_block;
    last = min(p.tokens, first + p.per_block);
  }
};

// The first of this thread's i-th run of V channels. A run past the last channel belongs to nobody.
template <int V>
__device__ __forceinline__ int channel_of(int i) {
  return static_cast<int>(i * blockDim.x + threadIdx.x) * V;
}

// V floats from `from` on.
template <int V>
__device__ __forceinline__ void load_floats(const float* from, float* to) {
  constexpr int kWidth = V < 4 ? V : 4;
#pragma unroll
  for (int k = 0; k < V; k += kWidth) {
    const Pack<float, kWidth> part = load<float, kWidth>(from + k);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) to[k + v] = part.at[v];
  }
}

// This thread's channels of the row of sample b; NaN where row_index names none, which shows and reads nothing.
template <int V>
__device__ __forceinline__ void load_row(const Shape& p, const Table& table, int64_t b, float (&to)[kHeld<V>]) {
  const int64_t row = p.row_index != nullptr ? p.row_index[b] : p.rows == 1 ? 0 : b;
  const bool known = row >= 0 && row < p.rows;
#pragma unroll
  for (int i = 0; i < kHeld<V> / V; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[i * V + v] = NAN;
    if (known && channel_of<V>(i) < p.channels)
      load_floats<V>(table.data + row * table.stride + channel_of<V>(i), to + i * V);
  }
}

// This thread's channels of one token, as they lie in memory.
template <class T, int V>
struct Held {
  Pack<T, V> run[kHeld<V> / V];
  __device__ __forceinline__ void read(const T* token, int channels) {
#pragma unroll
    for (int i = 0; i < kHeld<V> / V; ++i)
      if (channel_of<V>(i) < channels) run[i] = load<T, V>(token + channel_of<V>(i));
  }
};

// The sum over the thread block, in every thread; `partial` is free again after the next barrier.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) total += partial[w];
  return total;
}

template <class T>
struct ModulateArgs {
  Shape shape;
  Tokens<T> x;
  Table scale, shift;
  const float *weight, *bias;  // [channels] or null
  float eps;
  T* out;                      // [batch, tokens, channels]
};

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads<V>) modulate_kernel(const ModulateArgs<T> p) {
  __shared__ float partial[2][kMostThreads<V> / 32];  // of mean and variance: one is read before the other's barrier
  const Span span(p.shape);
  const int channels = p.shape.channels;
  float factor[kHeld<V>], offset[kHeld<V>];  // (z w + β)(1 + s) + t = z (w (1 + s)) + (β (1 + s) + t)
  load_row<V>(p.shape, p.scale, span.b, factor);
  load_row<V>(p.shape, p.shift, span.b, offset);
#pragma unroll
  for (int i = 0; i < kHeld<V> / V; ++i) {
    float weight[V], bias[V];
    const bool inside = channel_of<V>(i) < channels;
    if (p.weight != nullptr && inside) load_floats<V>(p.weight + channel_of<V>(i), weight);
    if (p.bias != nullptr && inside) load_floats<V>(p.bias + channel_of<V>(i), bias);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float gain = 1.f + factor[i * V + v];
      factor[i * V + v] = p.weight != nullptr && inside ? weight[v] * gain : gain;
      if (p.bias != nullptr && inside) offset[i * V + v] = bias[v] * gain + offset[i * V + v];
    }
  }

  const T* token = p.x.data + span.b * p.x.batch_stride + span.first * p.x.token_stride;
  T* to = p.out + (span.b * p.shape.tokens + span.first) * channels;
  Held<T, V> next{};
  next.read(token, channels);
#pragma unroll 1
  for (int64_t l = span.first; l < span.last; ++l) {
    float x[kHeld<V>], sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < kHeld<V>; ++k) {
      x[k] = widen(next.run[k / V].at[k % V]);
      if (channel_of<V>(k / V) < channels) sum += x[k];
    }
    token += p.x.token_stride;
    if (l + 1 < span.last) next.read(token, channels);
    const float mean = block_sum(sum, partial[0]) / static_cast<float>(channels);
#pragma unroll
    for (int k = 0; k < kHeld<V>; ++k) {
      x[k] -= mean;
      if (channel_of<V>(k / V) < channels) squares += x[k] * x[k];
    }
    const float inverse = rsqrtf(block_sum(squares, partial[1]) / static_cast<float>(channels) + p.eps);
#pragma unroll
    for (int i = 0; i < kHeld<V> / V; ++i) {
      if (channel_of<V>(i) >= channels) continue;
      Pack<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v)
        narrow(x[i * V + v] * inverse * factor[i * V + v] + offset[i * V + v], result.at[v]);
      store<T, V>(to + channel_of<V>(i), result);
    }
    to += channels;
  }
}

template <class T>
struct GateArgs {
  Shape shape;
  Tokens<T> residual, x;
  Table gate;
  T* out;  // [batch, tokens, channels]
};

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads<V>) gate_kernel(const GateArgs<T> p) {
  const Span span(p.shape);
  const int channels = p.shape.channels;
  float gate[kHeld<V>];
  load_row<V>(p.shape, p.gate, span.b, gate);
  const T* kept = p.residual.data + span.b * p.residual.batch_stride + span.first * p.residual.token_stride;
  const T* token = p.x.data + span.b * p.x.batch_stride + span.first * p.x.token_stride;
  T* to = p.out + (span.b * p.shape.tokens + span.first) * channels;
#pragma unroll 1
  for (int64_t l = span.first; l < span.last; ++l) {
    Held<T, V> residual, x;
    residual.read(kept, channels);
    x.read(token, channels);
#pragma unroll
    for (int i = 0; i < kHeld<V> / V; ++i) {
      if (channel_of<V>(i) >= channels) continue;
      Pack<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v)
        narrow(widen(residual.run[i].at[v]) + gate[i * V + v] * widen(x.run[i].at[v]), result.at[v]);
      store<T, V>(to + channel_of<V>(i), result);
    }
    kept += p.residual.token_stride, token += p.x.token_stride, to += channels;
  }
}

// ---- launchers ----------------------------------------------------------------------------------------------------

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

const float* vector_of(const char* op, const char* name, const std::optional<Tensor>& value, int64_t channels) {
  if (!value) return nullptr;
  check_dim(op, name, *value, 1);
  check_contiguous(op, name, *value);
  check_equal(op, name, channels, value->size(0));
  check_that(value->scalar_type() == ScalarType::Float, op, std::string(name) + " in float32");
  return static_cast<const float*>(value->const_data_ptr());
}

Shape shape_of(const char* op, const Tensor& x, const std::optional<Tensor>& index, int64_t rows) {
  check_that(x.size(2) <= kMostChannels, op, "at most 8192 channels");
  Shape shape{x.size(0), x.size(1), rows, static_cast<int>(x.size(2)), nullptr, 1};
  if (index) {
    check_dim(op, "row_index", *index, 1);
    check_contiguous(op, "row_index", *index);
    check_equal(op, "row_index", shape.batch, index->size(0));
    check_that(index->scalar_type() == ScalarType::Long, op, "row_index in int64");
    shape.row_index = static_cast<const int64_t*>(index->const_data_ptr());
  } else {
    check_that(rows == shape.batch || rows == 1, op, "a row for each sample, or one");
  }
  const int64_t wanted = (shape.batch * shape.tokens + kBlocks - 1) / kBlocks;
  shape.per_block = wanted < 1 ? 1 : wanted > kMostTokens ? kMostTokens : wanted;
  return shape;
}

dim3 grid_of(const Shape& p) {
  return dim3(static_cast<unsigned>(p.batch * ((p.tokens + p.per_block - 1) / p.per_block)));
}

// Whole warps for `held` channels a thread.
dim3 threads_of(const Shape& p, int held) {
  return dim3(static_cast<unsigned>((p.channels + held * 32 - 1) / (held * 32) * 32));
}

// Whether 16-byte accesses fit.
template <class T>
bool wide_tokens(const Tensor& x) {
  constexpr int64_t kRun = 16 / sizeof(T);
  return aligned(x.const_data_ptr(), 16) && x.size(2) % kRun == 0 && (x.size(0) == 1 || x.stride(0) % kRun == 0) &&
         (x.size(1) == 1 || x.stride(1) % kRun == 0);
}

bool wide_table(const Table& table, int64_t rows) {
  return aligned(table.data, 16) && (rows == 1 || table.stride % 4 == 0);
}

// Calls f with a null pointer of the tokens' type.
template <class F>
void by_dtype(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    default: check_that(false, op, "x in float32, float16 or bfloat16");
  }
}

template <class T>
Tokens<T> tokens_of(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

Tensor adaln_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& row_index,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const char* op = "adaln_modulate";
  check_tokens(op, "x", x, x);
  const int64_t rows = scale.size(0), channels = x.size(2);
  const Table scales = table_of(op, "scale", scale, rows, channels);
  const Table shifts = table_of(op, "shift", shift, rows, channels);
  const float *w = vector_of(op, "weight", weight, channels), *b = vector_of(op, "bias", bias, channels);
  const Shape shape = shape_of(op, x, row_index, rows);
  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.tokens, channels});
  by_dtype(op, x, [&]<class T>(T*) {
    if (shape.batch * shape.tokens == 0) return;
    const bool wide = wide_tokens<T>(x) && wide_table(scales, rows) && wide_table(shifts, rows) && aligned(w, 16) &&
                      aligned(b, 16);
    const ModulateArgs<T> args{shape, tokens_of<T>(x), scales, shifts, w, b, static_cast<float>(eps),
                               static_cast<T*>(out.mutable_data_ptr())};
    constexpr int kRun = 16 / sizeof(T);
    launch_kernel(wide ? modulate_kernel<T, kRun> : modulate_kernel<T, 1>, grid_of(shape),
                  threads_of(shape, wide ? kHeld<kRun> : kHeld<1>), 0, launch.stream, args);
  });
  return out;
}

Tensor adaln_gate(const Tensor& residual, const Tensor& x, const Tensor& gate, const std::optional<Tensor>& row_index) {
  const char* op = "adaln_gate";
  check_tokens(op, "residual", residual, residual);
  check_tokens(op, "x", x, residual);
  const int64_t rows = gate.size(0), channels = x.size(2);
  const Table gates = table_of(op, "gate", gate, rows, channels);
  const Shape shape = shape_of(op, x, row_index, rows);
  const Launch launch(x);
  Tensor out = torch::stable::new_empty(residual, {shape.batch, shape.tokens, channels});
  by_dtype(op, x, [&]<class T>(T*) {
    if (shape.batch * shape.tokens == 0) return;
    const bool wide = wide_tokens<T>(residual) && wide_tokens<T>(x) && wide_table(gates, rows);
    const GateArgs<T> args{shape, tokens_of<T>(residual), tokens_of<T>(x), gates,
                           static_cast<T*>(out.mutable_data_ptr())};
    constexpr int kRun = 16 / sizeof(T);
    launch_kernel(wide ? gate_kernel<T, kRun> : gate_kernel<T, 1>, grid_of(shape),
                  threads_of(shape, wide ? kHeld<kRun> : kHeld<1>), 0, launch.stream, args);
  });
  return out;
}

}  // namespace
}  // namespace triskele::cuda

TRISKELE_CUDA_OPS(m) {
  m.impl("adaln_modulate", TORCH_BOX(&triskele::cuda::adaln_modulate));
  m.impl("adaln_gate", TORCH_BOX(&triskele::cuda::adaln_gate));
}
