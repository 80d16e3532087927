// Scales and factors of the 4-bit linear, stored in bfloat16 or float32, as the kernels read them: float32.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/svdq.h"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr int64_t kConverted = 1 << 15;  // values that are worth a thread

struct Stored {
  const void* data;
  int64_t rows, columns;
  bool wide;  // float32

  Stored(const char* op, const char* name, const torch::stable::Tensor& t)
      : data(t.const_data_ptr()), rows(t.dim() == 2 ? t.size(0) : 1), columns(t.size(t.dim() - 1)),
        wide(t.scalar_type() == torch::headeronly::ScalarType::Float) {
    check_contiguous(op, name, t);
    check_that(wide || t.scalar_type() == torch::headeronly::ScalarType::BFloat16, op,
               std::string(name) + " in float32 or bfloat16");
  }

  float at(int64_t i) const {
    if (wide) return static_cast<const float*>(data)[i];
    return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
};

inline void widen_row(const Stored& from, int64_t row, float* to) {
  const int64_t first = row * from.columns;
  if (from.wide) {
    std::memcpy(to, static_cast<const float*>(from.data) + first, from.columns * sizeof(float));
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(from.data) + first;
#pragma omp simd
  for (int64_t i = 0; i < from.columns; ++i) to[i] = bfloat16_to_float(values[i]);
}

// [rows, width], zeros after the columns; the tensor itself where it is that already.
class AsFloat {
 public:
  AsFloat(const Stored& from, int64_t width) {
    if (from.wide && width == from.columns) {
      data_ = static_cast<const float*>(from.data);
      return;
    }
    own_ = buffer<float>(from.rows * width);
    data_ = own_.get();
    const int64_t grain = std::max<int64_t>(1, kConverted / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, from.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        widen_row(from, row, own_.get() + row * width);
        std::fill(own_.get() + row * width + from.columns, own_.get() + (row + 1) * width, 0.f);
      }
    });
  }
  explicit AsFloat(const Stored& from) : AsFloat(from, from.columns) {}
  operator const float*() const { return data_; }

 private:
  Buffer<float> own_;
  const float* data_ = nullptr;
};

// All ones in the lanes of rows [first, first + 16) that there are.
inline Ints present_rows(const Stored& from, int64_t first) {
  Ints present{};
  for (int64_t i = 0; i < kLanes; ++i) present[i] = first + i < from.rows ? -1 : 0;
  return present;
}

// [r, K] -> [K, width], width a multiple of 16, zeros after the r-th.
inline Buffer<float> turned(const Stored& from, int64_t width) {
  Buffer<float> to = buffer<float>(from.columns * width);
  const int64_t size = from.wide ? 4 : 2, step = kLanes * 4 / size;  // columns of 16 words
  const int64_t steps = (from.columns + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, kConverted / std::max<int64_t>(1, width * step));
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      const uint8_t* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = static_cast<const uint8_t*>(from.data) + std::min(lane + i, from.rows - 1) * from.columns * size;
      const Ints present = present_rows(from, lane);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * step, count = std::min(step, from.columns - first);
        float* out = to.get() + first * width + lane;
        Ints words[kLanes];
        const int64_t whole = count * size / 4;
        transpose(rows, first * size, whole, words);
        for (int64_t i = 0; i < whole; ++i) {
          const Ints word = words[i] & present;
          if (from.wide) {
            std::memcpy(out + i * width, &word, sizeof(word));
          } else {
            const Ints even = word << 16, odd = word & ~0xffff;
            std::memcpy(out + 2 * i * width, &even, sizeof(even));
            std::memcpy(out + (2 * i + 1) * width, &odd, sizeof(odd));
          }
        }
        for (int64_t i = whole * 4 / size; i < count; ++i)  // an odd last column of two bytes
          for (int64_t j = 0; j < kLanes; ++j)
            out[i * width + j] = lane + j < from.rows ? from.at((lane + j) * from.columns + first + i) : 0.f;
      }
    }
  });
  return to;
}

inline Buffer<float> reciprocal(const Stored& from) {
  Buffer<float> to = buffer<float>(from.columns);
  widen_row(from, 0, to.get());
#pragma omp simd
  for (int64_t i = 0; i < from.columns; ++i) to[i] = 1.f / to[i];
  return to;
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
