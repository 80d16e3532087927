// What the kernels of a step of triangular Anderson acceleration share: the past rounds, checks, dispatch by dtype and
// by the number of rounds. Contracts: python/triskele/ops/taa/api.py; the same step on a CPU: csrc/cpu/taa.cpp.
//
//   taa_residual_sm80.cu   pass one: R and each row's sums
//   taa_gamma_sm80.cu      suffix sums, ridge solve, highest unconverged row, without a word to the host
//   taa_update_sm80.cu     pass two: x + R - Σ_q γ_q (ΔX_q + ΔR_q), then the rows that enter below
//
// Bytes an element at memory 2, float states and bfloat16 ε, without noise: 14 in pass one (x, ε, R of the past round,
// R), 20 in pass two (x, R, both of the past round, the new x).
#pragma once
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"

namespace triskele::cuda::taa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 4;  // past rounds: memory <= 5

// Rows whose inputs a thread asks for before it works on the first of them. A latent of an image gives each
// multiprocessor a few warps, which would otherwise wait for every row in turn; more rounds leave fewer registers.
constexpr int rows_ahead(int width, int slots) { return width == 1 ? 1 : slots > 2 ? 2 : slots == 2 ? 4 : 8; }

// Past rounds, newest first: round q holds rows window - rows[q] … window - 1.
template <class S>
struct Past {
  const S* round[kSlots];
  int64_t rows[kSlots];
};

template <class T>
const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T>
T* mutable_data(Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

inline void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
                  ScalarType dtype) {
  check_dim(op, name, tensor, 2);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_equal(op, name, columns, tensor.size(1));
  check_that(tensor.scalar_type() == dtype, op, std::string(name) + " in another dtype");
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  check_dim(op, name, tensor, 1);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_that(tensor.scalar_type() == ScalarType::Double, op, std::string(name) + " in float64");
}

// The rounds, and whether their addresses allow loads of `bytes`.
template <class S>
Past<S> past_of(const char* op, const char* name, const std::vector<Tensor>& tensors, int64_t window, int64_t size,
                ScalarType dtype, int bytes, bool* wide) {
  Past<S> past{};
  check_that(tensors.size() <= kSlots, op, std::string(name) + " of at most 4 rounds");
  int64_t newer = window;
  for (size_t q = 0; q < tensors.size(); ++q) {
    const Tensor& tensor = tensors[q];
    check_dim(op, name, tensor, 2);
    check_matrix(op, name, tensor, tensor.size(0), size, dtype);
    check_that(tensor.size(0) <= newer, op, std::string(name) + " with no more rows than the newer round");
    past.round[q] = data<S>(tensor);
    past.rows[q] = newer = tensor.size(0);
    *wide = *wide && aligned(past.round[q], bytes);
  }
  return past;
}

template <class F>
void by_dtype(const char* op, const Tensor& x, const Tensor& eps, const F& f) {
  const ScalarType state = x.scalar_type(), e = eps.scalar_type();
  check_that(state == ScalarType::Float || state == ScalarType::Double, op, "x in float32 or float64");
  check_that(e == state || e == ScalarType::BFloat16, op, "eps in the dtype of x or bfloat16");
  const bool half = e == ScalarType::BFloat16;
  if (state == ScalarType::Float) {
    if (half) f(float(), __nv_bfloat16()); else f(float(), float());
  } else {
    if (half) f(double(), __nv_bfloat16()); else f(double(), double());
  }
}

// Calls f with the number of past rounds as a constant.
template <class F>
void by_slots(size_t slots, const F& f) {
  switch (slots) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

inline int64_t blocks_of(int64_t size, int width) { return (size / width + kThreads - 1) / kThreads; }

}  // namespace triskele::cuda::taa
