// Chooses the instruction set when the library is loaded, and registers that level's kernels for the CPU.
// TRISKELE_CPU_LEVEL=base|avx2|avx512|avx512_bf16|amx (Arm: base|dotprod) forces a lower level; a higher one than the
// CPU has is refused.
#include "cpu/level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace triskele {

// Weakest first; setup.py says which were built.
#if defined(__aarch64__)
enum Level { kBase, kDotprod };
constexpr const char* kLevelNames[] = {"base", "dotprod"};
constexpr bool kBuilt[] = {true, TRISKELE_HAS_dotprod};
#else
enum Level { kBase, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kLevelNames[] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr bool kBuilt[] = {true, TRISKELE_HAS_avx2, TRISKELE_HAS_avx512, TRISKELE_HAS_avx512_bf16,
                           TRISKELE_HAS_amx};
#endif

#if defined(__x86_64__)
// The kernel keeps the 8 KiB of tile data only for processes that asked: until then a tile instruction is a fault. The
// answer holds for every thread, also later ones; asking again is harmless.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && tiles_granted();
}
#endif

// The highest level whose instructions the CPU has: what may be forced.
Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni"))
    return has_amx() ? kAmx : __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return kAvx2;
#elif defined(__linux__) && defined(__aarch64__)
  constexpr unsigned long kWanted = HWCAP_ASIMDDP | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_CRC32;  // of -march=armv8.2-a
  if ((getauxval(AT_HWCAP) & kWanted) == kWanted) return kDotprod;
#endif
  return kBase;
}

// What is chosen of the levels up to `best`. A dot product of pairs of bfloat16 takes as long as a multiply-add on AMD's
// cores, and four times as long on Intel's, whose float vectors are then the faster way.
Level preferred(int best) {
  const auto serves = [](int level) {
#if defined(__x86_64__)
    if (level == kAvx512Bf16 && !__builtin_cpu_is("amd")) return false;
#endif
    return kBuilt[level];
  };
  while (!serves(best)) --best;
  return static_cast<Level>(best);
}

// The level to register; `problem` says what is wrong with TRISKELE_CPU_LEVEL. No exception here: this runs while the
// library is loaded, where one would end the process.
Level level(std::string* problem = nullptr) {
  const int best = best_level();
  const char* forced = std::getenv("TRISKELE_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') return preferred(best);
  std::string choices;
  for (int i = 0; i <= best; ++i) {
    if (!kBuilt[i]) continue;
    if (std::string(forced) == kLevelNames[i]) return static_cast<Level>(i);
    choices += (i ? ", " : "") + std::string(kLevelNames[i]);
  }
  if (problem != nullptr)
    *problem = "TRISKELE_CPU_LEVEL: expected one of " + choices + " (the levels of this CPU and this build), got '" +
               forced + "'";
  return preferred(best);
}

// Python calls this right after loading, and refuses the library where it throws.
std::string cpu_level() {
  std::string problem;
  const Level chosen = level(&problem);
  if (!problem.empty()) throw std::runtime_error(problem);
  return kLevelNames[chosen];
}

}  // namespace triskele

STABLE_TORCH_LIBRARY_IMPL(triskele_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&triskele::cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(triskele_native, CPU, m) {
#define TRISKELE_REGISTER(family) register_##family(m);
  switch (triskele::level()) {
#if TRISKELE_HAS_amx
    case triskele::kAmx: { using namespace triskele::amx; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
#endif
#if TRISKELE_HAS_avx512_bf16
    case triskele::kAvx512Bf16: { using namespace triskele::avx512_bf16; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
#endif
#if TRISKELE_HAS_avx512
    case triskele::kAvx512: { using namespace triskele::avx512; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
#endif
#if TRISKELE_HAS_avx2
    case triskele::kAvx2: { using namespace triskele::avx2; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
#endif
#if TRISKELE_HAS_dotprod
    case triskele::kDotprod: { using namespace triskele::dotprod; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
#endif
    default: { using namespace triskele::base; TRISKELE_FAMILIES(TRISKELE_REGISTER) break; }
  }
#undef TRISKELE_REGISTER
}
