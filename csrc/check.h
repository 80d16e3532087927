// Checks that print what was expected and what came. Public arguments are checked in Python (api.py);
// these guard the native ops against a caller who skips that layer.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace triskele {

template <class Expected, class Got>
inline void check_equal(const char* op, const char* what, const Expected& expected, const Got& got) {
  if (!(expected == got)) {
    std::ostringstream message;
    message << op << ": " << what << ": expected " << expected << ", got " << got;
    throw std::runtime_error(message.str());
  }
}

inline void check_that(bool holds, const char* op, const std::string& expected) {
  if (!holds) throw std::runtime_error(std::string(op) + ": expected " + expected);
}

inline void check_dim(const char* op, const char* name, const torch::stable::Tensor& tensor, int64_t dim) {
  check_equal(op, (std::string(name) + " dimensions").c_str(), dim, tensor.dim());
}

inline void check_contiguous(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  check_that(tensor.is_contiguous(), op, std::string(name) + " contiguous");
}

}  // namespace triskele
