// One step of triangular Anderson acceleration over a window: two passes, and a small solve between them. Threads take
// blocks of elements and walk the rows of the window from the top, so that the order-k sum is a running scan and the
// window is read once a pass.
//
//   taa_residual   R, and per row: sum of squares of the first-order residual, products of the differences of R
//   taa_gamma      γ of each row from the sums over it and the rows above; the highest unconverged row
//   taa_update     x + R - Σ_q γ_q (ΔX_q + ΔR_q), and the rows that enter the window below it
//
// Contracts (shapes, order of rows, past rounds): python/triskele/ops/taa/api.py. States are float or double, ε the same
// or bfloat16; weights, γ and sums over blocks are double. Sums are taken block by block in one fixed order, so results do
// not depend on the number of threads.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/taa_gamma.h"
#include "cpu/taa_residual.h"
#include "cpu/taa_update.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
                  ScalarType dtype) {
  check_dim(op, name, tensor, 2);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_equal(op, name, columns, tensor.size(1));
  check_that(tensor.scalar_type() == dtype, op, std::string(name) + " in another dtype");
}

void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  check_dim(op, name, tensor, 1);
  check_contiguous(op, name, tensor);
  check_equal(op, name, rows, tensor.size(0));
  check_that(tensor.scalar_type() == ScalarType::Double, op, std::string(name) + " in float64");
}

// Calls f with a null pointer of the state's and of ε's type.
template <class F>
void by_dtype(const char* op, const Tensor& x, const Tensor& eps, const F& f) {
  const ScalarType state = x.scalar_type(), e = eps.scalar_type();
  check_that(state == ScalarType::Float || state == ScalarType::Double, op, "x in float32 or float64");
  check_that(e == state || e == ScalarType::BFloat16, op, "eps in the dtype of x or bfloat16");
  const bool half = e == ScalarType::BFloat16;
  if (state == ScalarType::Float) half ? f((float*)nullptr, (BF16*)nullptr) : f((float*)nullptr, (float*)nullptr);
  else half ? f((double*)nullptr, (BF16*)nullptr) : f((double*)nullptr, (double*)nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> taa_residual(
    const Tensor& x, const Tensor& eps, const std::optional<Tensor>& noise, const Tensor& a, const Tensor& b,
    const Tensor& c, std::vector<Tensor> past_r, int64_t order) {
  const char* op = "taa_residual";
  check_dim(op, "x", x, 2);
  const int64_t window = x.size(0) - 1, size = x.size(1), slots = static_cast<int64_t>(past_r.size());
  check_that(window >= 1, op, "at least one target and the anchor");
  check_matrix(op, "x", x, window + 1, size, x.scalar_type());
  check_dim(op, "eps", eps, 2);
  check_that(eps.size(0) >= window, op, "a row of eps for each target");
  check_matrix(op, "eps", eps, eps.size(0), size, eps.scalar_type());
  if (noise) check_matrix(op, "noise", *noise, window, size, x.scalar_type());
  check_vector(op, "a", a, window);
  check_vector(op, "c", c, window);
  check_dim(op, "b", b, 2);
  check_matrix(op, "b", b, window, b.size(1), ScalarType::Double);
  check_that(order >= 1, op, "order of at least 1");

  Tensor out = torch::stable::new_empty(x, {window, size});
  Tensor squares = torch::stable::new_empty(a, {window});
  Tensor gram = torch::stable::new_empty(a, {window, slots, slots});
  Tensor rhs = torch::stable::new_empty(a, {window, slots});
  by_dtype(op, x, eps, [&](auto* state, auto* e) {
    using S = std::remove_pointer_t<decltype(state)>;
    using E = std::remove_pointer_t<decltype(e)>;
    const Past<S> past(op, "past_r", past_r, window, size, x.scalar_type());
    Residual<S, E>{window, size, eps.size(0), b.size(1), order, data<S>(x), data<E>(eps),
                   noise ? data<S>(*noise) : nullptr, data<double>(a), data<double>(b), data<double>(c), past,
                   static_cast<S*>(out.mutable_data_ptr())}
        .run(static_cast<double*>(squares.mutable_data_ptr()), static_cast<double*>(gram.mutable_data_ptr()),
             static_cast<double*>(rhs.mutable_data_ptr()));
  });
  return {out, squares, gram, rhs};
}

Tensor taa_update(const Tensor& x, const Tensor& residual, std::vector<Tensor> past_x, std::vector<Tensor> past_r,
                  const Tensor& gamma, const Tensor& eps, const Tensor& enter_a, const Tensor& enter_w,
                  const Tensor& enter_c, const std::optional<Tensor>& enter_noise) {
  const char* op = "taa_update";
  check_dim(op, "x", x, 2);
  const int64_t window = x.size(0) - 1, size = x.size(1), slots = static_cast<int64_t>(past_r.size());
  check_that(window >= 1, op, "at least one target and the anchor");
  check_matrix(op, "x", x, window + 1, size, x.scalar_type());
  check_matrix(op, "residual", residual, window, size, x.scalar_type());
  check_matrix(op, "gamma", gamma, window, slots, ScalarType::Double);
  check_dim(op, "eps", eps, 2);
  check_matrix(op, "eps", eps, eps.size(0), size, eps.scalar_type());
  check_dim(op, "enter_a", enter_a, 1);
  const int64_t count = enter_a.size(0);
  check_vector(op, "enter_a", enter_a, count);
  check_vector(op, "enter_c", enter_c, count);
  check_matrix(op, "enter_w", enter_w, count, eps.size(0), ScalarType::Double);
  if (enter_noise) check_matrix(op, "enter_noise", *enter_noise, count, size, x.scalar_type());

  Tensor out = torch::stable::new_empty(x, {count + window, size});
  by_dtype(op, x, eps, [&](auto* state, auto* e) {
    using S = std::remove_pointer_t<decltype(state)>;
    using E = std::remove_pointer_t<decltype(e)>;
    const Past<S> old_x(op, "past_x", past_x, window, size, x.scalar_type());
    const Past<S> old_r(op, "past_r", past_r, window, size, x.scalar_type());
    check_that(old_x.rows == old_r.rows, op, "past_x and past_r with the same rows");
    Update<S, E>{window, size, eps.size(0), count, data<S>(x), data<S>(residual), old_x, old_r, data<double>(gamma),
                 data<E>(eps), data<double>(enter_a), data<double>(enter_w), data<double>(enter_c),
                 enter_noise ? data<S>(*enter_noise) : nullptr, static_cast<S*>(out.mutable_data_ptr())}
        .run();
  });
  return out;
}

std::tuple<Tensor, Tensor> taa_gamma(const Tensor& squares, const Tensor& gram, const Tensor& rhs,
                                     const Tensor& limits, std::vector<int64_t> lengths, double ridge, bool relative) {
  const char* op = "taa_gamma";
  check_dim(op, "rhs", rhs, 2);
  const int64_t window = rhs.size(0), slots = rhs.size(1);
  check_vector(op, "squares", squares, window);
  check_vector(op, "limits", limits, window);
  check_matrix(op, "rhs", rhs, window, slots, ScalarType::Double);
  check_dim(op, "gram", gram, 3);
  check_contiguous(op, "gram", gram);
  check_that(gram.size(0) == window && gram.size(1) == slots && gram.size(2) == slots, op,
             "gram with a matrix of all slots a row");
  check_that(gram.scalar_type() == ScalarType::Double, op, "gram in float64");
  check_equal(op, "lengths", slots, static_cast<int64_t>(lengths.size()));
  Tensor out = torch::stable::new_empty(rhs, {window, slots});
  Tensor highest = torch::stable::new_empty(rhs, {1}, ScalarType::Long);
  const Gamma gamma{window, slots, data<double>(squares), data<double>(gram), data<double>(rhs), data<double>(limits),
                    lengths, ridge, relative, static_cast<double*>(out.mutable_data_ptr())};
  *static_cast<int64_t*>(highest.mutable_data_ptr()) = window > 0 ? gamma.highest() : 0;
  gamma.run();
  return {out, highest};
}

}  // namespace

void register_taa(torch::stable::detail::StableLibrary& m) {
  m.impl("taa_residual", TORCH_BOX(&taa_residual));
  m.impl("taa_gamma", TORCH_BOX(&taa_gamma));
  m.impl("taa_update", TORCH_BOX(&taa_update));
}

}  // namespace triskele::TRISKELE_LEVEL
