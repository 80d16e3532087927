// The 4-bit linear with int8 activations (W4A8), in two kernels:
//
//   svdq_quantize   z = (x + shift) / smooth, one scale a token, int8 codes; and x lora_down^T from the same rows
//   svdq_gemm       y = scale_m * sum_g wscale[n, g] * (sum over group g of code * a)  +  down lora_up^T  +  bias
//
// Integer sums are exact: unsigned bytes (weight code + offset, at most 24) times signed bytes (at most 127), so that
// neither vpdpbusd nor vpmaddubsw can saturate; the offset is taken back with the group's sum of activation codes.
// Where there are tile registers, many tokens take svdq_amx.h instead. Every level gives the same integers. Each output
// element is computed by one thread in an order that depends on nothing but K: the result is the same for any number
// of threads and any batch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/level.h"
#include "cpu/svdq.h"
#include "cpu/svdq_amx.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace svdq;

constexpr int64_t kPanel = 64;      // output channels unpacked at a time: their bytes stay in L2
constexpr int64_t kDownRows = 8;    // tokens projected down together
constexpr float kTiny = 1e-30f;     // a token whose maximum is below counts as zero
#if defined(__AVX512VNNI__)
constexpr int kRows = 12;           // tokens of a register tile: 12 integer and 12 float accumulators
#else
constexpr int kRows = 4;
#endif

// before[n] + sum over 4 bytes of unsigned weight[n] * signed activation: the one instruction that differs by level.
inline Ints dot4(const Ints& before, const Ints& weight, int32_t activation) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)before, (__m512i)weight, _mm512_set1_epi32(activation));
#elif defined(__AVX2__)
  const __m256i a = _mm256_set1_epi32(activation), ones = _mm256_set1_epi16(1);
  __m256i part[2], sum[2];
  std::memcpy(part, &weight, sizeof(part));
  std::memcpy(sum, &before, sizeof(sum));
  for (int i = 0; i < 2; ++i)
    sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(part[i], a), ones));
  Ints acc;
  std::memcpy(&acc, sum, sizeof(acc));
  return acc;
#else
  Ints acc = before;
  for (int byte = 0; byte < 4; ++byte)
    acc += ((weight >> (8 * byte)) & 255) * static_cast<int32_t>(static_cast<int8_t>(activation >> (8 * byte)));
  return acc;
#endif
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// ---- kernel 1: quantize and project down -----------------------------------------------------------------------

// One token. z and ordered [Kp] are scratch; codes [Kp] hold, in each group, its even columns and then its odd ones,
// which is the order that the weight's nibbles unpack to. sums [G]: the codes' sum a group.
void quantize_token(const float* x, const float* inverse_smooth, float shift, int64_t k, int64_t padded, int64_t group,
                    float* z, int8_t* ordered, int8_t* codes, float* scale, int32_t* sums) {
  int32_t top = 0;  // |z| compared as bits: NaN and infinity come out on top
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < k; ++i) {
    z[i] = (x[i] + shift) * inverse_smooth[i];
    int32_t bits;
    std::memcpy(&bits, z + i, 4);
    bits &= 0x7fffffff;
    top = top > bits ? top : bits;
  }
  float amax;
  std::memcpy(&amax, &top, 4);
  const bool finite = top < 0x7f800000;
  const bool dead = finite && amax < kTiny;
  *scale = !finite ? NAN : dead ? 0.0f : amax / 127.0f;
  if (!finite || dead) {
    std::memset(codes, 0, padded);
    std::fill(sums, sums + padded / group, 0);
    return;
  }
  const float factor = 127.0f / amax;
  for (int64_t i = k; i < padded; ++i) z[i] = 0.0f;
  // ties to even; |z| <= amax keeps the product within a rounding of 127, so the nearest integer needs no clamp
  for (int64_t i = 0; i < padded; ++i)
    ordered[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(z[i] * factor)));
  typedef int16_t Pair __attribute__((may_alias));
  const int64_t half = group / 2;
  for (int64_t g = 0; g < padded / group; ++g) {
    const int8_t* from = ordered + g * group;
    const Pair* pairs = reinterpret_cast<const Pair*>(from);
    int8_t *even = codes + g * group, *odd = even + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) even[i] = static_cast<int8_t>(pairs[i]);  // the low byte
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) odd[i] = static_cast<int8_t>(pairs[i] >> 8);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < group; ++i) sum += from[i];
    sums[g] = sum;
  }
}

// down [Rows, r] = x [Rows, K] @ lora_down_t [K, r]; r is a multiple of the lanes. The order over k is one chain.
template <int Rows>
void project_down(const float* x, int64_t stride, int64_t k, const float* lora_down_t, int64_t rank, float* down) {
  for (int64_t j = 0; j < rank; j += kLanes) {
    Floats acc[Rows] = {};
    for (int64_t i = 0; i < k; ++i) {
      const Floats column = load<Floats>(lora_down_t + i * rank + j);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) acc[m] += broadcast(x[m * stride + i]) * column;
    }
    for (int m = 0; m < Rows; ++m) std::memcpy(down + m * rank + j, &acc[m], sizeof(Floats));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svdq_quantize(Tensor x, Tensor inverse_smooth, Tensor lora_down_t,
                                                         double shift, int64_t group) {
  constexpr const char* op = "svdq_quantize";
  check_dim(op, "x", x, 2);
  check_dim(op, "inverse_smooth", inverse_smooth, 1);
  check_dim(op, "lora_down_t", lora_down_t, 2);
  const int64_t m = x.size(0), k = x.size(1), rank = lora_down_t.size(1);
  check_equal(op, "inverse_smooth size", k, inverse_smooth.size(0));
  check_equal(op, "lora_down_t rows", k, lora_down_t.size(0));
  check_equal(op, "lora_down_t columns modulo 16", int64_t{0}, rank % kLanes);
  check_that(group >= 16 && group % 16 == 0, op, "group to be a multiple of 16");
  for (const Tensor& t : {x, inverse_smooth, lora_down_t}) check_contiguous(op, "inputs", t);
  const bool wide = x.scalar_type() == ScalarType::Float;
  check_that(wide || x.scalar_type() == ScalarType::BFloat16, op, "x in float32 or bfloat16");
  check_that(inverse_smooth.scalar_type() == ScalarType::Float && lora_down_t.scalar_type() == ScalarType::Float, op,
             "inverse_smooth and lora_down_t in float32");
  const int64_t groups = (k + group - 1) / group, padded = groups * group;
  Tensor codes = torch::stable::new_empty(x, {m, padded}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {m}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {m, groups}, ScalarType::Int);
  Tensor down = torch::stable::new_empty(x, {m, rank}, ScalarType::Float);

  const void* in = x.const_data_ptr();
  const float* inverse = inverse_smooth.const_data_ptr<float>();
  const float* factors = lora_down_t.const_data_ptr<float>();
  int8_t* codes_out = codes.mutable_data_ptr<int8_t>();
  float* scales_out = scales.mutable_data_ptr<float>();
  int32_t* sums_out = sums.mutable_data_ptr<int32_t>();
  float* down_out = down.mutable_data_ptr<float>();
  const int64_t blocks = (m + kDownRows - 1) / kDownRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> z = buffer<float>(padded), converted = buffer<float>(wide ? 0 : kDownRows * k);
    const Buffer<int8_t> ordered = buffer<int8_t>(padded);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kDownRows, count = std::min(kDownRows, m - first);
      const float* rows = static_cast<const float*>(in) + first * k;
      if (!wide) {
        const uint16_t* from = static_cast<const uint16_t*>(in) + first * k;
        for (int64_t i = 0; i < count * k; ++i) converted[i] = bfloat16_to_float(from[i]);
        rows = converted.get();
      }
      for (int64_t i = 0; i < count; ++i)
        quantize_token(rows + i * k, inverse, static_cast<float>(shift), k, padded, group, z.get(),
                       ordered.get(), codes_out + (first + i) * padded, scales_out + first + i,
                       sums_out + (first + i) * groups);
      float* to = down_out + first * rank;
      if (count == kDownRows) {
        project_down<kDownRows>(rows, k, k, factors, rank, to);
      } else {
        for (int64_t i = 0; i < count; ++i) project_down<1>(rows + i * k, k, k, factors, rank, to + i * rank);
      }
    }
  });
  return {codes, scales, sums, down};
}

// ---- kernel 2: multiply, scale, project up, add the bias -------------------------------------------------------

// y [Rows, 16] for `Rows` tokens from `row` on and the 16 channels of `block` in the panel.
template <int Rows>
void tile(const Gemm& p, const Panel& panel, int64_t block, int64_t row, int64_t first) {
  const int32_t offset = p.e2m1 ? 12 : 8;
  const int64_t words_a_group = p.group / 4;
  const uint32_t* words = panel.words.get() + block * (p.padded / 4) * kLanes;
  const float* scales = panel.scales.get() + block * p.groups * kLanes;
  const int8_t* codes = p.codes + row * p.padded;
  const int32_t* sums = p.sums + row * p.groups;
  Floats y[Rows] = {};
  for (int64_t g = 0; g < p.groups; ++g) {
    Ints acc[Rows];
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) acc[m] = Ints{} - offset * sums[m * p.groups + g];
    for (int64_t q = 0; q < words_a_group; ++q) {
      const Ints weight = load<Ints>(words + q * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        int32_t activation;
        std::memcpy(&activation, codes + m * p.padded + 4 * q, 4);
        acc[m] = dot4(acc[m], weight, activation);
      }
    }
    words += words_a_group * kLanes;
    codes += p.group;
    const Floats scale = load<Floats>(scales + g * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) y[m] += __builtin_convertvector(acc[m], Floats) * scale;
  }
  finish<Rows>(p, panel, block, row, first, y);
}

void tiles(const Gemm& p, const Panel& panel, int64_t first, int64_t row, int64_t end) {
  const int64_t blocks = std::min(kPanel / kLanes, (p.n - first + kLanes - 1) / kLanes);
  while (row < end) {
    const int64_t left = end - row;
    const int64_t rows = left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int64_t block = 0; block < blocks; ++block) {
      switch (rows) {
        case kRows: tile<kRows>(p, panel, block, row, first); break;
#if defined(__AVX512VNNI__)
        case 4: tile<4>(p, panel, block, row, first); break;
#endif
        case 2: tile<2>(p, panel, block, row, first); break;
        default: tile<1>(p, panel, block, row, first);
      }
    }
    row += rows;
  }
}

Tensor svdq_gemm(Tensor codes, Tensor token_scales, Tensor sums, Tensor down, Tensor qweight, Tensor wscales,
                 Tensor lora_up_t, std::optional<Tensor> bias, bool e2m1, bool narrow) {
  constexpr const char* op = "svdq_gemm";
  check_dim(op, "codes", codes, 2);
  check_dim(op, "token_scales", token_scales, 1);
  check_dim(op, "sums", sums, 2);
  check_dim(op, "down", down, 2);
  check_dim(op, "qweight", qweight, 2);
  check_dim(op, "wscales", wscales, 2);
  check_dim(op, "lora_up_t", lora_up_t, 2);
  Gemm p{};
  p.m = codes.size(0), p.padded = codes.size(1), p.n = qweight.size(0);
  p.groups = wscales.size(1), p.rank = down.size(1), p.e2m1 = e2m1, p.narrow = narrow;
  check_that(p.groups > 0 && p.padded % p.groups == 0 && p.padded / p.groups % 16 == 0, op,
             "codes' columns to be groups of a multiple of 16");
  p.group = p.padded / p.groups;
  check_equal(op, "token_scales size", p.m, token_scales.size(0));
  check_equal(op, "sums rows", p.m, sums.size(0));
  check_equal(op, "sums columns", p.groups, sums.size(1));
  check_equal(op, "down rows", p.m, down.size(0));
  check_equal(op, "qweight columns", p.padded / 2, qweight.size(1));
  check_equal(op, "wscales rows", p.n, wscales.size(0));
  check_equal(op, "lora_up_t rows", p.rank, lora_up_t.size(0));
  check_equal(op, "lora_up_t columns", p.n, lora_up_t.size(1));
  for (const Tensor& t : {codes, token_scales, sums, down, qweight, wscales, lora_up_t})
    check_contiguous(op, "inputs", t);
  check_that(codes.scalar_type() == ScalarType::Char && sums.scalar_type() == ScalarType::Int &&
                 qweight.scalar_type() == ScalarType::Byte, op, "codes int8, sums int32, qweight uint8");
  for (const Tensor& t : {token_scales, down, wscales, lora_up_t})
    check_that(t.scalar_type() == ScalarType::Float, op, "scales and factors in float32");
  if (bias.has_value()) {
    check_dim(op, "bias", *bias, 1);
    check_equal(op, "bias size", p.n, bias->size(0));
    check_contiguous(op, "bias", *bias);
    check_that(bias->scalar_type() == ScalarType::Float, op, "bias in float32");
    p.bias = bias->const_data_ptr<float>();
  }
  p.codes = codes.const_data_ptr<int8_t>();
  p.token_scales = token_scales.const_data_ptr<float>();
  p.sums = sums.const_data_ptr<int32_t>();
  p.down = down.const_data_ptr<float>();
  p.qweight = qweight.const_data_ptr<uint8_t>();
  p.wscales = wscales.const_data_ptr<float>();
  p.lora_up_t = lora_up_t.const_data_ptr<float>();
  Tensor out = torch::stable::new_empty(codes, {p.m, p.n}, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  p.out = out.mutable_data_ptr();
  if (p.m == 0 || p.n == 0) return out;
#if defined(__AMX_INT8__)
  if (tiles_pay(p)) {
    multiply_by_tiles(p);
    return out;
  }
#endif

  // A task is one panel and a stretch of tokens; tokens are split only where the panels are too few for the threads.
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  const int64_t wanted = std::max<int64_t>(1, 4 * torch::stable::get_num_threads() / panels);
  const int64_t stretch = std::max<int64_t>(kRows, (p.m + wanted - 1) / wanted + kRows - 1) / kRows * kRows;
  const int64_t stretches = (p.m + stretch - 1) / stretch;
  torch::stable::parallel_for(0, panels * stretches, 1, [&](int64_t begin, int64_t end) {
    Panel panel = make_panel(p, kPanel, p.groups);
    int64_t filled = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / stretches * kPanel, row = task % stretches * stretch;
      if (filled != first) {
        fill_words<true>(p, first, 0, p.groups, panel);
        fill_factors(p, first, panel);
      }
      filled = first;
      tiles(p, panel, first, row, std::min(p.m, row + stretch));
    }
  });
  return out;
}

}  // namespace

void register_svdq(torch::stable::detail::StableLibrary& m) {
  m.impl("svdq_quantize", TORCH_BOX(&svdq_quantize));
  m.impl("svdq_gemm", TORCH_BOX(&svdq_gemm));
}

}  // namespace triskele::TRISKELE_LEVEL
