// triskele._C: how the native libraries were built and what this CPU has. No kernels are reached through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> out;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define TRISKELE_FEATURE(name) if (__builtin_cpu_supports(name)) out.push_back(name);
  TRISKELE_FEATURE("avx2") TRISKELE_FEATURE("fma") TRISKELE_FEATURE("avx512f") TRISKELE_FEATURE("avx512bw")
  TRISKELE_FEATURE("avx512vl") TRISKELE_FEATURE("avx512vnni") TRISKELE_FEATURE("avx512bf16") TRISKELE_FEATURE("avx512vbmi")
  TRISKELE_FEATURE("amx-tile") TRISKELE_FEATURE("amx-int8") TRISKELE_FEATURE("amx-bf16")
#undef TRISKELE_FEATURE
#elif defined(__aarch64__)
  out.push_back("neon");
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) out.push_back("dotprod");
#endif
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How triskele's native libraries were built, and what this CPU has.";
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the kernels know of.");
  m.def("cpu_levels", [] { return words(TRISKELE_CPU_LEVELS); }, "Levels that libtriskele_cpu.so was compiled for.");
  m.def("cuda_targets", [] { return words(TRISKELE_CUDA_TARGETS); }, "Targets of libtriskele_cuda.so; empty without it.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The C++ compiler.");
}
