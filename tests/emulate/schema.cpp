// The ops of csrc/schema.cpp once more, under the name that the emulated kernels register for.
#include <torch/csrc/stable/library.h>

#define triskele_native triskele_emulated
#include "../../csrc/schema.cpp"
