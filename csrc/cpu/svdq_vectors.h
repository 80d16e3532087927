// The 4-bit linear's multiplication on vectors: 16 channels a vector, four columns a dot product. svdq.cpp includes this
// once for its level and once more, under another namespace, for an instruction that only some CPUs of the level have.
#include "cpu/svdq.h"

namespace triskele::TRISKELE_LEVEL::svdq::TRISKELE_SVDQ_VECTORS {

constexpr int64_t kPanel = 64;  // output channels unpacked at a time: their bytes stay in L2
#if defined(__AVX512VNNI__)
constexpr int kRows = 12;       // tokens of a register tile: 12 integer and 12 float accumulators
#elif defined(__AVX2__)
constexpr int kRows = 6;        // 6 and 6 of 8 channels each, and 4 registers more
#elif defined(__aarch64__)
constexpr int kRows = 12;       // 12 and 12 of 4 channels each, and 8 registers more
#else
constexpr int kRows = 4;
#endif

// before[n] + sum over 4 bytes of unsigned weight[n] * signed activation, and the level's vectors of such sums.
#if defined(__AVX2__) && !defined(__AVX512F__)
typedef int32_t Sums __attribute__((vector_size(32)));
typedef float Scaled __attribute__((vector_size(32)));
inline Sums dot4(const Sums& before, const Sums& weight, int32_t activation) {
  const __m256i a = _mm256_set1_epi32(activation);
#if defined(TRISKELE_SVDQ_AVX_VNNI)
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)before, (__m256i)weight, a);
#else
  return before + (Sums)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)weight, a), _mm256_set1_epi16(1));
#endif
}
#elif defined(__aarch64__)
typedef int32_t Sums __attribute__((vector_size(16)));
typedef float Scaled __attribute__((vector_size(16)));
inline Sums dot4(const Sums& before, const Sums& weight, int32_t activation) {
  const int8x16_t w = (int8x16_t)weight;  // at most 24: a signed byte too
#if defined(__ARM_FEATURE_DOTPROD)
  return (Sums)vdotq_lane_s32((int32x4_t)before, w, vcreate_s8(static_cast<uint32_t>(activation)), 0);
#else
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activation));
  const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a));  // at most 6096
  return (Sums)vpadalq_s16((int32x4_t)before, pairs);
#endif
}
#else
typedef Ints Sums;
typedef Floats Scaled;
inline Sums dot4(const Sums& before, const Sums& weight, int32_t activation) {
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)before, (__m512i)weight, _mm512_set1_epi32(activation));
#else
  Sums acc = before;
  for (int byte = 0; byte < 4; ++byte)
    acc += ((weight >> (8 * byte)) & 255) * static_cast<int32_t>(static_cast<int8_t>(activation >> (8 * byte)));
  return acc;
#endif
}
#endif

// y [Rows, 16] for `Rows` tokens from `row` on and the 16 channels of `block` in the panel.
template <int Rows>
inline void tile(const Gemm& p, const Panel& panel, int64_t block, int64_t row, int64_t first) {
  const int32_t offset = p.e2m1 ? 12 : 8;
  const int64_t words_a_group = p.group / 4;
  const uint32_t* words = panel.words.get() + block * (p.padded / 4) * kLanes;
  const float* scales = panel.scales.get() + block * p.groups * kLanes;
  const int8_t* codes = p.codes + row * p.padded;
  const int32_t* sums = p.sums + row * p.groups;
  Floats y[Rows];
  constexpr int64_t channels = sizeof(Sums) / 4;
  for (int64_t part = 0; part < kLanes; part += channels) {
    const uint32_t* right = words + part;
    const int8_t* left = codes;
    Scaled total[Rows];
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) total[m] = Scaled{};
    for (int64_t g = 0; g < p.groups; ++g) {
      Sums acc[Rows];
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) acc[m] = Sums{} - offset * sums[m * p.groups + g];
      for (int64_t q = 0; q < words_a_group; ++q) {
        const Sums weight = load<Sums>(right + q * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
          int32_t activation;
          std::memcpy(&activation, left + m * p.padded + 4 * q, 4);
          acc[m] = dot4(acc[m], weight, activation);
        }
      }
      right += words_a_group * kLanes;
      left += p.group;
      const Scaled scale = load<Scaled>(scales + g * kLanes + part);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) total[m] += __builtin_convertvector(acc[m], Scaled) * scale;
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) std::memcpy(reinterpret_cast<float*>(&y[m]) + part, &total[m], sizeof(Scaled));
  }
  finish<Rows>(p, panel, block, row, first, y);
}

inline void tiles(const Gemm& p, const Panel& panel, int64_t first, int64_t row, int64_t end) {
  const int64_t blocks = std::min(kPanel / kLanes, (p.n - first + kLanes - 1) / kLanes);
  while (row < end) {
    const int64_t left = end - row;
    const int64_t rows = left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int64_t block = 0; block < blocks; ++block) {
      switch (rows) {
        case kRows: tile<kRows>(p, panel, block, row, first); break;
#if defined(__AVX2__) || defined(__aarch64__)
        case 4: tile<4>(p, panel, block, row, first); break;
#endif
        case 2: tile<2>(p, panel, block, row, first); break;
        default: tile<1>(p, panel, block, row, first);
      }
    }
    row += rows;
  }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq::TRISKELE_SVDQ_VECTORS
