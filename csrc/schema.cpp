// Every op schema string of the native libraries, nowhere else. These are the raw kernels; the public custom ops
// `triskele::*` (fake kernels, autograd, choice of backend) are defined in Python and call these.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(triskele_native, m) {
  m.def("cpu_level() -> str");
  // sla
  // vmoba
  // svdq
  // taa
}
