// What the kernels of the backward share: rows of the inputs as float, the sums that a task owns, tasks in threads.
#pragma once
#include <atomic>
#include <memory>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/sla.h"

namespace triskele::TRISKELE_LEVEL::backward {

// Rows of a [B, H, L, D] tensor of float32 or bfloat16, any strides; of keys and values the visible ones, packed.
struct Source {
  const void* data;
  bool half;
  int64_t heads, length, dim, s0, s1, s2, s3;
  const int64_t* index;  // [B, L] token of each packed row, or null

  Source(const Tensor& x, const int64_t* index = nullptr)
      : data(x.const_data_ptr()), half(x.scalar_type() == ScalarType::BFloat16), heads(x.size(1)), length(x.size(2)),
        dim(x.size(3)), s0(x.stride(0)), s1(x.stride(1)), s2(x.stride(2)), s3(dim == 1 ? 1 : x.stride(3)), index(index) {}

  // n rows from `row` on: the tensor itself where that will do, otherwise a copy in `scratch`, `width` floats a row, with
  // zeros after the dim-th. `whole`: the caller reads all `width` of them. The stride of what is returned in `stride`.
  const float* rows(int64_t head, int64_t row, int64_t n, float* scratch, int64_t width, bool whole,
                    int64_t& stride) const {
    const int64_t base = head / heads * s0 + head % heads * s1;
    if (!half && s3 == 1 && index == nullptr && (!whole || width == dim)) {
      stride = s2;
      return static_cast<const float*>(data) + base + row * s2;
    }
    stride = width;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = base + (index != nullptr ? index[head / heads * length + row + r] : row + r) * s2;
      float* to = scratch + r * width;
      if (half) copy(static_cast<const uint16_t*>(data) + at, to, from_bfloat16);
      else copy(static_cast<const float*>(data) + at, to, [](float x) { return x; });
      for (int64_t d = dim; d < width; ++d) to[d] = 0.f;
    }
    return scratch;
  }

 private:
  template <class T, class Convert>
  void copy(const T* from, float* to, Convert convert) const {
    if (s3 == 1)
      for (int64_t d = 0; d < dim; ++d) to[d] = convert(from[d]);
    else
      for (int64_t d = 0; d < dim; ++d) to[d] = convert(from[d * s3]);
  }
};

struct Inputs {
  const Problem& p;
  const Source &q, &k, &v;
  const Visible& seen;
  const int8_t* map;
  const float *lse, *offset;          // [B, H, Lq]; offset = rowsum(dO_s O_s) - d lse
  const Source &d_sparse, *d_linear;  // [B, H, Lq, D]; d_linear null: no linear branch
  int64_t visible(int64_t head, int64_t block) const { return seen.count[head / p.heads * p.k_blocks() + block]; }
};

// Sums over query blocks that one task owns: dk (less the scale) and dv of every key block of a head.
struct KeySums {
  float *dk, *dv;   // [key blocks * height, padded]
  uint8_t* touched;  // [key blocks]: 0 where a block holds nothing yet
};

// Memory that is large and short-lived: in big pages where the system gives them, since a fault a page would cost more
// than the arithmetic on it. Not initialised.
template <class T>
class Pages {
 public:
  explicit Pages(int64_t count) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(count > 0 ? count : 1);
    const bool large = bytes >= kLarge;
    align_ = std::align_val_t(large ? kLarge : 64);
    data_ = static_cast<T*>(::operator new(large ? (bytes + kLarge - 1) / kLarge * kLarge : bytes, align_));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (large) madvise(data_, bytes, MADV_HUGEPAGE);  // a hint: nothing depends on its answer
#endif
  }
  ~Pages() { ::operator delete(data_, align_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr size_t kLarge = size_t{1} << 21;
  std::align_val_t align_;
  T* data_;
};

// Runs make() once a thread and what it returns on each of `count` tasks; a thread that is done takes the next one.
template <class Make>
inline void tasks(int64_t count, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t task = next++; task < count; task = next++) work(task);
  });
}

// out += (d phi / d x)^T grad; phi = phi(x) tells the derivative by itself. All [D, kLanes].
inline void feature_backward(Feature feature, const float* phi, const float* grad, float* out, int64_t dim,
                             int64_t width) {
  for (int64_t c = 0; c < width; c += kVec) {
    Floats dot{};
    if (feature == Feature::kSoftmax)
      for (int64_t d = 0; d < dim; ++d) dot += load(phi + d * kLanes + c) * load(grad + d * kLanes + c);
    for (int64_t d = 0; d < dim; ++d) {
      const Floats value = load(phi + d * kLanes + c), g = load(grad + d * kLanes + c);
      Floats dx;
      if (feature == Feature::kSoftmax)
        dx = value * (g - dot);
      else if (feature == Feature::kElu)
        dx = g * (value > 1.f ? splat(1.f) : value);
      else
        dx = value > 0.f ? g : Floats{};
      store(out + d * kLanes + c, load(out + d * kLanes + c) + dx);
    }
  }
}

}  // namespace triskele::TRISKELE_LEVEL::backward
