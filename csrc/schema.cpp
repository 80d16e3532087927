// Every op schema string of the native libraries, nowhere else. These are the raw kernels; the public custom ops
// `triskele::*` (fake kernels, autograd, choice of backend) are defined in Python and call these.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(triskele_native, m) {
  m.def("cpu_level() -> str");
  // sla
  m.def("sla_route(Tensor q, Tensor k, int n_keep, int n_drop, int block_q, int block_k, Tensor? keep_keys, Tensor? key_mask) -> Tensor");
  m.def("sla_lists(Tensor map) -> (Tensor, Tensor, Tensor, Tensor)");  // CUDA alone
  m.def("sla_forward(Tensor q, Tensor k, Tensor v, Tensor map, Tensor? weight, Tensor? bias, Tensor? alpha, Tensor? key_mask, int block_q, int block_k, int feature, int scope, float scale, bool parts) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sla_backward(Tensor q, Tensor k, Tensor v, Tensor map, Tensor o_sparse, Tensor lse, Tensor d_sparse, Tensor? d_linear, Tensor? d_lse, Tensor? key_mask, int block_q, int block_k, int feature, int scope, float scale) -> (Tensor, Tensor, Tensor)");
  // vmoba
  m.def("vmoba_select(Tensor q, Tensor k, Tensor? order, Tensor bounds, str mode, str pool, int top_k, "
        "float threshold) -> Tensor");
  m.def("vmoba_attention(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor bounds, Tensor mask) "
        "-> (Tensor, Tensor)");
  m.def("vmoba_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor? order, Tensor bounds, Tensor mask) -> (Tensor, Tensor, Tensor)");
  // svdq
  m.def("svdq_quantize(Tensor x, Tensor smooth, Tensor lora_down, float shift, int group) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("svdq_gemm(Tensor codes, Tensor token_scales, Tensor sums, Tensor down, Tensor qweight, Tensor wscales, "
        "Tensor lora_up, Tensor? bias, bool e2m1, bool narrow, int epilogue) -> Tensor");
  // svdq: CUDA alone
  m.def("svdq_quantize_int8(Tensor x, Tensor smooth, Tensor lora_down, float shift, int multiple) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("svdq_quantize_int4(Tensor x, Tensor smooth, Tensor lora_down, float shift, bool is_unsigned, int multiple) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("svdq_widen(Tensor qweight, Tensor wscales, bool e2m1, int chunk) -> (Tensor, Tensor)");
  m.def("svdq_multipliers(Tensor qweight, Tensor wscales, bool in_operand) -> (Tensor, Tensor, Tensor)");
  m.def("svdq_w8a8_gemm(Tensor codes, Tensor token_scales, Tensor down, Tensor units, Tensor weights, Tensor scales, "
        "Tensor lora_up, Tensor? bias) -> Tensor");
  m.def("svdq_w4a8_gemm(Tensor codes, Tensor token_scales, Tensor down, Tensor units, Tensor qweight, "
        "Tensor multipliers, Tensor channel_units, Tensor fits, Tensor lora_up, Tensor? bias, bool clusters) "
        "-> Tensor");
  m.def("svdq_w4a4_gemm(Tensor codes, Tensor token_scales, Tensor down, Tensor units, Tensor qweight, Tensor wscales, "
        "Tensor lora_up, Tensor? bias, bool is_unsigned) -> Tensor");
  // taa
  m.def("taa_residual(Tensor x, Tensor eps, Tensor? noise, Tensor a, Tensor b, Tensor c, Tensor[] past_r, int order) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("taa_update(Tensor x, Tensor residual, Tensor[] past_x, Tensor[] past_r, Tensor gamma, Tensor eps, "
        "Tensor enter_a, Tensor enter_w, Tensor enter_c, Tensor? enter_noise) -> Tensor");
  m.def("taa_gamma(Tensor squares, Tensor gram, Tensor rhs, Tensor limits, int[] lengths, float ridge, bool relative) "
        "-> (Tensor, Tensor)");
  // adaln
  m.def("adaln_modulate(Tensor x, Tensor scale, Tensor shift, Tensor? row_index, Tensor? weight, Tensor? bias, "
        "float eps) -> Tensor");
  m.def("adaln_gate(Tensor residual, Tensor x, Tensor gate, Tensor? row_index) -> Tensor");
}
