// One step of triangular Anderson acceleration over a window, in two passes. Each thread takes blocks of elements and
// walks the rows of the window from the top, so that the order-k sum is a running scan and the window is read once a pass.
//
//   taa_residual   R, and per row: sum of squares of the first-order residual, products of the differences of R
//   taa_update     x + R - Σ_q γ_q (ΔX_q + ΔR_q), and the rows that enter the window below it
//
// Contracts (shapes, order of rows, past rounds): python/triskele/ops/taa/api.py. States are float or double, ε the same
// or bfloat16; weights, γ and sums over blocks are double. Sums are taken block by block in one fixed order, so results do
// not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 512;  // elements: a row of a block, its R and its differences stay in the first-level cache

struct BF16 { uint16_t bits; };

inline float widen(BF16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

template <class T>
const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

int64_t grain(int64_t rows) { return 1 + 65536 / (kBlock * (rows + 1)); }  // blocks a thread is worth waking for

template <class S>
double dot(const S* p, const S* q, int64_t n) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += p[i] * q[i];
  return sum;
}

template <class S, class E>
void add_scaled(S* out, S scale, const E* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += scale * static_cast<S>(widen(in[i]));
}

// Past rounds, newest first: round q holds rows window - rows[q] … window - 1.
template <class S>
struct Past {
  std::vector<const S*> rounds;
  std::vector<int64_t> rows;
  int64_t window = 0, size = 0;

  Past(const char* op, const char* name, const std::vector<Tensor>& tensors, int64_t window, int64_t size,
       ScalarType dtype) : window(window), size(size) {
    int64_t newer = window;
    for (const Tensor& tensor : tensors) {
      check_dim(op, name, tensor, 2);
      check_contiguous(op, name, tensor);
      check_that(tensor.scalar_type() == dtype, op, std::string(name) + " in the dtype of x");
      check_equal(op, name, size, tensor.size(1));
      check_that(tensor.size(0) <= newer, op, std::string(name) + " with no more rows than the newer round");
      newer = tensor.size(0);
      rounds.push_back(data<S>(tensor));
      rows.push_back(newer);
    }
  }
  int64_t slots() const { return static_cast<int64_t>(rounds.size()); }
  // How many rounds row t has behind it.
  int64_t known(int64_t t) const {
    int64_t count = 0;
    while (count < slots() && t >= window - rows[count]) ++count;
    return count;
  }
  const S* row(int64_t q, int64_t t) const { return rounds[q] + (t - (window - rows[q])) * size; }
};

// ---- pass one -----------------------------------------------------------------------------------------------------

template <class S, class E>
struct Residual {
  int64_t window, size, eps_rows, depth, order;
  const S* x;        // [window + 1, size]
  const E* eps;      // [eps_rows, size]
  const S* noise;    // [window, size] or null
  const double *a, *b, *c;
  const Past<S>& past;
  S* out;            // [window, size]

  int64_t stats() const { return 1 + past.slots() + past.slots() * (past.slots() + 1) / 2; }

  // r[i] = a x_{t+1} + Σ_d b_d ε_{t+1+d} + c ξ - x_t
  void first_order(int64_t t, int64_t at, int64_t n, S* r) const {
    const S* above = x + (t + 1) * size + at;
    const S scale = static_cast<S>(a[t]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) r[i] = scale * above[i];
    for (int64_t d = 0; d < depth && t + d < eps_rows; ++d)
      if (b[t * depth + d] != 0) add_scaled(r, static_cast<S>(b[t * depth + d]), eps + (t + d) * size + at, n);
    if (noise != nullptr && c[t] != 0) add_scaled(r, static_cast<S>(c[t]), noise + t * size + at, n);
    const S* own = x + t * size + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) r[i] -= own[i];
  }

  // Sums of one row of one block: Σ r², ⟨D_q, R⟩, ⟨D_p, D_q⟩ (p <= q).
  void products(int64_t t, int64_t at, int64_t n, const S* r, const S* full, S* differences, double* sums) const {
    *sums++ = dot(r, r, n);
    const int64_t slots = past.slots(), known = past.known(t);
    const S* newer = full;
    for (int64_t q = 0; q < known; ++q) {
      const S* older = past.row(q, t) + at;
      S* difference = differences + q * kBlock;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) difference[i] = newer[i] - older[i];
      newer = older;
    }
    for (int64_t q = 0; q < slots; ++q) *sums++ = q < known ? dot(differences + q * kBlock, full, n) : 0.0;
    for (int64_t p = 0; p < slots; ++p)
      for (int64_t q = p; q < slots; ++q)
        *sums++ = q < known ? dot(differences + p * kBlock, differences + q * kBlock, n) : 0.0;
  }

  // One block of elements, all rows. With order < window the sum of the last `order` terms is split at multiples of
  // `order` (counted from the top): S runs down from the split, Q was gathered up to it in the block of rows before, so
  // nothing is ever subtracted again. `scratch`: 2 order + 2 + slots rows of kBlock.
  void block(int64_t at, int64_t n, S* scratch, double* sums) const {
    const bool full_order = order >= window;
    S* total = scratch;
    S* running = scratch + kBlock;
    S* differences = scratch + 2 * kBlock;
    S* current = differences + past.slots() * kBlock;
    S* previous = current + (full_order ? 0 : order) * kBlock;
    double reach = 1;
    for (int64_t u = 0; u < window; ++u) {
      const int64_t t = window - 1 - u, j = full_order ? u : u % order;
      if (!full_order && j == 0 && u > 0) {
        std::swap(current, previous);
        double weight = 1;
        for (int64_t k = order - 2; k >= 0; --k) {   // rows u - order + k, counted from the top
          weight *= a[window - 1 - (u - order + k + 1)];
          S* sum = previous + k * kBlock;
          const S* below = sum + kBlock;
          const S scale = static_cast<S>(weight);
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) sum[i] = below[i] + scale * sum[i];
        }
      }
      S* r = current + (full_order ? 0 : j) * kBlock;
      first_order(t, at, n, r);
      if (j == 0) {
        std::memcpy(running, r, n * sizeof(S));
        reach = a[t];
      } else {
        const S scale = static_cast<S>(a[t]);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) running[i] = r[i] + scale * running[i];
        reach *= a[t];
      }
      const S* full = running;
      if (!full_order && u >= order && j < order - 1) {
        const S* earlier = previous + (j + 1) * kBlock;
        const S scale = static_cast<S>(reach);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) total[i] = running[i] + scale * earlier[i];
        full = total;
      }
      std::memcpy(out + t * size + at, full, n * sizeof(S));
      products(t, at, n, r, full, differences, sums + t * stats());
    }
  }

  void run(double* squares, double* gram, double* rhs) const {
    const int64_t blocks = (size + kBlock - 1) / kBlock, width = stats(), slots = past.slots();
    std::vector<double> partial(blocks * window * width);
    torch::stable::parallel_for(0, blocks, grain(window), [&](int64_t begin, int64_t end) {
      std::vector<S> scratch((2 + slots + (order >= window ? 1 : 2 * order)) * kBlock);
      for (int64_t i_block = begin; i_block < end; ++i_block) {
        const int64_t at = i_block * kBlock, n = std::min(kBlock, size - at);
        block(at, n, scratch.data(), partial.data() + i_block * window * width);
      }
    });
    torch::stable::parallel_for(0, window, 1 + 16384 / (blocks * width + 1), [&](int64_t begin, int64_t end) {
      std::vector<double> sums(width);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t i_block = 0; i_block < blocks; ++i_block)
          for (int64_t k = 0; k < width; ++k) sums[k] += partial[(i_block * window + t) * width + k];
        squares[t] = sums[0];
        const double* next = sums.data() + 1;
        for (int64_t q = 0; q < slots; ++q) rhs[t * slots + q] = *next++;
        for (int64_t p = 0; p < slots; ++p)
          for (int64_t q = p; q < slots; ++q)
            gram[(t * slots + p) * slots + q] = gram[(t * slots + q) * slots + p] = *next++;
      }
    });
  }
};

// ---- pass two -----------------------------------------------------------------------------------------------------

template <class S, class E>
struct Update {
  int64_t window, size, eps_rows, count;
  const S *x, *r;
  const Past<S>&past_x, &past_r;
  const double* gamma;                       // [window, slots]
  const E* eps;
  const double *enter_a, *enter_w, *enter_c; // [count], [count, eps_rows], [count]
  const S* enter_noise;                      // [count, size] or null
  S* out;                                    // [count + window, size]

  void move(int64_t t, int64_t at, int64_t n) const {
    const S *own = x + t * size + at, *full = r + t * size + at;
    S* to = out + (count + t) * size + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = own[i] + full[i];
    const S *newer_x = own, *newer_r = full;
    for (int64_t q = 0, known = past_r.known(t); q < known; ++q) {
      const S *older_x = past_x.row(q, t) + at, *older_r = past_r.row(q, t) + at;
      const S weight = static_cast<S>(gamma[t * past_r.slots() + q]);
      if (weight != 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] -= weight * ((newer_x[i] - older_x[i]) + (newer_r[i] - older_r[i]));
      }
      newer_x = older_x;
      newer_r = older_r;
    }
  }

  void enter(int64_t j, int64_t at, int64_t n) const {
    const S* above = out + (j + 1) * size + at;
    S* to = out + j * size + at;
    const S scale = static_cast<S>(enter_a[j]);
    if (scale == 0) {
      std::fill(to, to + n, S(0));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = scale * above[i];
    }
    for (int64_t s = 0; s < eps_rows; ++s)
      if (enter_w[j * eps_rows + s] != 0)
        add_scaled(to, static_cast<S>(enter_w[j * eps_rows + s]), eps + s * size + at, n);
    if (enter_noise != nullptr && enter_c[j] != 0)
      add_scaled(to, static_cast<S>(enter_c[j]), enter_noise + j * size + at, n);
  }

  void run() const {
    const int64_t blocks = (size + kBlock - 1) / kBlock;
    torch::stable::parallel_for(0, blocks, grain(window + count), [&](int64_t begin, int64_t end) {
      for (int64_t i_block = begin; i_block < end; ++i_block) {
        const int64_t at = i_block * kBlock, n = std::min(kBlock, size - at);
        for (int64_t t = window - 1; t >= 0; --t) move(t, at, n);
        for (int64_t j = count - 1; j >= 0; --j) enter(j, at, n);
      }
    });
  }
};

// ---- launchers ----------------------------------------------------------------------------------------------------

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

}  // namespace

void register_taa(torch::stable::detail::StableLibrary& m) {
  m.impl("taa_residual", TORCH_BOX(&taa_residual));
  m.impl("taa_update", TORCH_BOX(&taa_update));
}

}  // namespace triskele::TRISKELE_LEVEL
