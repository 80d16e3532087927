// What both passes of the triangular Anderson step share: lanes of the state's type, and the past rounds.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/widen.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // elements: a row of a block, the row above and the running sum fit the first cache
constexpr int kFused = 4;         // past rounds whose differences stay in registers

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

// Whether a result [rows, size] goes past the caches. Not where more rounds than stay in registers read it again.
template <class S>
bool goes_past(const S* out, int64_t rows, int64_t size, int64_t slots) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(S));
  return slots <= kFused && streams(out, bytes, rows * bytes);
}

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

// ---- lanes --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class S>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(S));

template <class T, int N>
struct Lanes {
  typedef T Vector __attribute__((vector_size(N * sizeof(T))));
  typedef T Memory __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int N>
using Vec = typename Lanes<T, N>::Vector;

// N neighbouring values as lanes of S.
template <class S, int N>
inline Vec<S, N> load(const S* p) { return *reinterpret_cast<const typename Lanes<S, N>::Memory*>(p); }

template <class S, int N>
inline Vec<S, N> load(const BF16* p) {
  const Vec<uint16_t, N> half = *reinterpret_cast<const typename Lanes<uint16_t, N>::Memory*>(p);
  const Vec<uint32_t, N> bits = __builtin_convertvector(half, Vec<uint32_t, N>) << 16;
  const Vec<float, N> wide = reinterpret_cast<Vec<float, N>>(bits);
  if constexpr (sizeof(S) == sizeof(float)) return wide;
  else return __builtin_convertvector(wide, Vec<S, N>);
}

template <class S, int N>
inline void store(S* p, Vec<S, N> value) { *reinterpret_cast<typename Lanes<S, N>::Memory*>(p) = value; }

// Asks for what the row below needs, where this row is at element i: rows lie pages apart, which no hardware foresees.
template <class S, class T>
inline void fetch_below(const T* row, int64_t i, int64_t below) {
  if (i % (64 / static_cast<int64_t>(sizeof(S))) == 0) __builtin_prefetch(row + i - below);
}

// Past the caches, where N lanes fill a register.
template <class S, int N>
inline void stream(S* p, Vec<S, N> value) {
  if constexpr (sizeof(value) == sizeof(Floats))
    TRISKELE_LEVEL::stream(reinterpret_cast<float*>(p), reinterpret_cast<Floats>(value));
  else
    store<S, N>(p, value);
}

template <class S, int N>
inline Vec<S, N> splat(S value) { return value - Vec<S, N>{}; }

}  // namespace
}  // namespace triskele::TRISKELE_LEVEL
