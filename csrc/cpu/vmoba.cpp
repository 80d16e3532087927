// VMoBA attention on the CPU: forward, and the gradients of q, k and v.
//
// Promise: inputs of any strides, float32 or bfloat16, accumulated in float32; the result does not depend on the number
// of threads, since every output row is summed in one order, that of the keys.
#include "cpu/vmoba.h"

#include "cpu/level.h"
#include "cpu/vmoba_tiles_backward.h"
#include "cpu/vmoba_tiles_forward.h"
#include "cpu/vmoba_vectors.h"

namespace triskele::TRISKELE_LEVEL {
namespace vmoba {

// On packed tiles where the level has products of them for T.
template <class T>
void forward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const uint8_t* mask, const Tensor& out,
             float* lse) {
#if defined(__AVX512BF16__)
  if constexpr (tile::kTakes<T>) return on_tiles::run_forward<T>(s, q, k, v, mask, out, lse);
  else
#endif
    on_vectors::run_forward<T>(s, q, k, v, mask, out, lse);
}

template <class T>
void backward(const Shape& s, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const float* lse, const uint8_t* mask, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
#if defined(__AVX512BF16__)
  if constexpr (tile::kTakes<T>) return on_tiles::run_backward<T>(s, grad, q, k, v, out, lse, mask, dq, dk, dv);
  else
#endif
    on_vectors::run_backward<T>(s, grad, q, k, v, out, lse, mask, dq, dk, dv);
}

Tensor checked_mask(const char* op, const Shape& s, const Tensor& mask) {
  check_dim(op, "mask", mask, 4);
  check_that(mask.scalar_type() == ScalarType::Bool, op, "mask of dtype bool");
  const int64_t want[] = {s.batch, s.chunks, s.heads, s.length};
  for (int i = 0; i < 4; ++i) check_equal(op, "mask shape", want[i], mask.size(i));
  return torch::stable::contiguous(mask);
}

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

std::tuple<Tensor, Tensor> vmoba_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> order, Tensor bounds,
                                           Tensor mask) {
  constexpr const char* op = "vmoba_attention";
  const Shape s = read_shape(op, q, order, bounds);
  check_like(op, "k", k, q);
  check_like(op, "v", v, q);
  const Tensor chosen = checked_mask(op, s, mask);
  Tensor out = new_like(q), lse = torch::stable::new_empty(q, {s.batch, s.heads, s.length}, ScalarType::Float);
  const auto* bits = static_cast<const uint8_t*>(chosen.const_data_ptr());
  float* logs = static_cast<float*>(lse.mutable_data_ptr());
  if (q.scalar_type() == ScalarType::Float) forward<float>(s, q, k, v, bits, out, logs);
  else if (q.scalar_type() == ScalarType::BFloat16) forward<BFloat16>(s, q, k, v, bits, out, logs);
  else check_that(false, op, "float32 or bfloat16");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> vmoba_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                                                            Tensor lse, std::optional<Tensor> order, Tensor bounds,
                                                            Tensor mask) {
  constexpr const char* op = "vmoba_attention_backward";
  const Shape s = read_shape(op, q, order, bounds);
  check_like(op, "grad", grad, q);
  check_like(op, "k", k, q);
  check_like(op, "v", v, q);
  check_like(op, "out", out, q);
  check_dim(op, "lse", lse, 3);
  check_that(lse.scalar_type() == ScalarType::Float, op, "lse of dtype float32");
  for (int i = 0; i < 3; ++i) check_equal(op, "lse shape", q.size(i), lse.size(i));
  const Tensor chosen = checked_mask(op, s, mask), logs = torch::stable::contiguous(lse);
  Tensor dq = new_like(q), dk = new_like(q), dv = new_like(q);
  const auto* bits = static_cast<const uint8_t*>(chosen.const_data_ptr());
  const float* l = static_cast<const float*>(logs.const_data_ptr());
  if (q.scalar_type() == ScalarType::Float) backward<float>(s, grad, q, k, v, out, l, bits, dq, dk, dv);
  else if (q.scalar_type() == ScalarType::BFloat16) backward<BFloat16>(s, grad, q, k, v, out, l, bits, dq, dk, dv);
  else check_that(false, op, "float32 or bfloat16");
  return {dq, dk, dv};
}

}  // namespace vmoba

void register_vmoba(torch::stable::detail::StableLibrary& m) {
  m.impl("vmoba_attention", TORCH_BOX(&vmoba::vmoba_attention));
  m.impl("vmoba_attention_backward", TORCH_BOX(&vmoba::vmoba_attention_backward));
}

}  // namespace triskele::TRISKELE_LEVEL
