// The 4-bit linear with int8 activations (W4A8), in two kernels:
//
//   svdq_quantize   z = (x + shift) / smooth, one scale a token, int8 codes; and x lora_down^T from the same rows
//   svdq_gemm       y = scale_m * sum_g wscale[n, g] * (sum over group g of code * a)  +  down lora_up^T  +  bias,
//                   or GELU of that, taken in float32 before y is rounded to its dtype
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
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/level.h"
#include "cpu/svdq.h"
#include "cpu/svdq_amx.h"
#include "cpu/svdq_down.h"
#include "cpu/svdq_quantize.h"
#include "cpu/svdq_stored.h"

#define TRISKELE_SVDQ_VECTORS vectors
#include "cpu/svdq_vectors.h"
#undef TRISKELE_SVDQ_VECTORS
#include "cpu/svdq_planes.h"  // takes the dot product of the vectors
#if defined(__AVX2__) && !defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#define TRISKELE_SVDQ_AVX_VNNI 1  // the AVX2 level again, for CPUs that also have AVX-VNNI
#pragma GCC push_options
#pragma GCC target("avxvnni")
#define TRISKELE_SVDQ_VECTORS vectors_avx_vnni
#include "cpu/svdq_vectors.h"
#undef TRISKELE_SVDQ_VECTORS
#pragma GCC pop_options
#endif

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace svdq;
using vectors::kPanel, vectors::kRows, vectors::Scaled;

constexpr int64_t kDownRows = 8;    // tokens projected down together
constexpr int64_t kDownColumns = 512;             // columns projected at a time: their factors stay in cache ...
constexpr int64_t kDownBytes = 2 * 1024 * 1024;   // ... while a block of so many bytes of x passes, read again after
constexpr int64_t kDownMost = 64;                 // tokens of a block at most
#if defined(__AVX512F__)
constexpr int kDownVectors = 2;                   // of ranks at a time: 16 accumulators
#else
constexpr int kDownVectors = 1;
#endif
constexpr int64_t kDownLanes = sizeof(Scaled) / 4;

// ---- kernel 1: quantize and project down -----------------------------------------------------------------------

// down [Rows, r] (+)= x [Rows, columns] @ lora_down_t [columns, r] for the ranks of `Vectors` vectors. The sum over all of K
// is one chain, however it is cut.
template <int Rows, int Vectors>
void project_ranks(const float* x, int64_t stride, int64_t columns, const float* lora_down_t, int64_t rank, bool start,
                   float* down) {
  Scaled acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) acc[m][v] = start ? Scaled{} : load<Scaled>(down + m * rank + v * kDownLanes);
  for (int64_t i = 0; i < columns; ++i) {
    Scaled factors[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) factors[v] = load<Scaled>(lora_down_t + i * rank + v * kDownLanes);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Scaled value = x[m * stride + i] - Scaled{};
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[m][v] += value * factors[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) std::memcpy(down + m * rank + v * kDownLanes, &acc[m][v], sizeof(Scaled));
}

template <int Rows>
void project_down(const float* x, int64_t stride, int64_t columns, const float* lora_down_t, int64_t rank, bool start,
                  float* down) {
  int64_t j = 0;
  for (; j + kDownVectors * kDownLanes <= rank; j += kDownVectors * kDownLanes)
    project_ranks<Rows, kDownVectors>(x, stride, columns, lora_down_t + j, rank, start, down + j);
  for (; j < rank; j += kDownLanes)
    project_ranks<Rows, 1>(x, stride, columns, lora_down_t + j, rank, start, down + j);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svdq_quantize(Tensor x, Tensor smooth, Tensor lora_down, double shift,
                                                         int64_t group) {
  constexpr const char* op = "svdq_quantize";
  check_dim(op, "x", x, 2);
  check_dim(op, "smooth", smooth, 1);
  check_dim(op, "lora_down", lora_down, 2);
  const int64_t m = x.size(0), k = x.size(1), rank = (lora_down.size(0) + kLanes - 1) / kLanes * kLanes;
  check_equal(op, "smooth size", k, smooth.size(0));
  check_equal(op, "lora_down columns", k, lora_down.size(1));
  check_that(group >= 16 && group % 16 == 0, op, "group to be a multiple of 16");
  check_contiguous(op, "x", x);
  const bool wide = x.scalar_type() == ScalarType::Float;
  check_that(wide || x.scalar_type() == ScalarType::BFloat16, op, "x in float32 or bfloat16");
  const Stored stored_smooth(op, "smooth", smooth), stored_down(op, "lora_down", lora_down);
  const int64_t groups = (k + group - 1) / group, padded = groups * group;
  Tensor codes = torch::stable::new_empty(x, {m, padded}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {m}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {m, groups}, ScalarType::Int);
  Tensor down = torch::stable::new_empty(x, {m, rank}, ScalarType::Float);

  const void* in = x.const_data_ptr();
  const Buffer<float> inverses = reciprocal(stored_smooth);
  const float* inverse = inverses.get();
  int8_t* codes_out = codes.mutable_data_ptr<int8_t>();
  float* scales_out = scales.mutable_data_ptr<float>();
  int32_t* sums_out = sums.mutable_data_ptr<int32_t>();
  float* down_out = down.mutable_data_ptr<float>();
  const int64_t threads = torch::stable::get_num_threads(), size = wide ? 4 : 2;
  const int64_t fit = std::min(kDownBytes / std::max<int64_t>(1, k * size), (m + threads - 1) / threads);
  const int64_t block_rows = std::clamp(fit / kDownRows * kDownRows, kDownRows, kDownMost);
  const int64_t blocks = (m + block_rows - 1) / block_rows;
#if defined(__AMX_BF16__)
  const Projection projection{m, k, rank, in, wide, &stored_down, down_out};
  const Factors packed = rank > 0 && m > 0 ? pack_factors(projection) : Factors{};
  const float* const factors = nullptr;
  constexpr bool by_tiles = true;
#else
  const Buffer<float> down_t = rank > 0 && m > 0 ? turned(stored_down, rank) : Buffer<float>{};
  const float* const factors = down_t.get();
  constexpr bool by_tiles = false;
#endif
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> z = buffer<float>(padded);
    const Buffer<float> converted = buffer<float>(wide || by_tiles ? 0 : kDownRows * kDownColumns);
    const Buffer<int8_t> ordered = buffer<int8_t>(padded);
    // x [count, columns] from (row, column) on, in float32; `stride` is the rows' distance
    const auto floats = [&](int64_t row, int64_t count, int64_t column, int64_t columns, int64_t& stride) {
      if (wide) {
        stride = k;
        return static_cast<const float*>(in) + row * k + column;
      }
      stride = columns;
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t* from = static_cast<const uint16_t*>(in) + (row + i) * k + column;
        for (int64_t c = 0; c < columns; ++c) converted[i * columns + c] = bfloat16_to_float(from[c]);
      }
      return static_cast<const float*>(converted.get());
    };
#if defined(__AMX_BF16__)
    const tile::Registers registers;
    ProjectionScratch scratch(packed, rank);
#endif
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_rows, last = std::min(m, first + block_rows);
      int64_t stride;
#if defined(__AMX_BF16__)
      if (rank > 0) project_by_tiles(projection, packed, scratch, first, last);
#endif
      for (int64_t column = 0; column < k && rank > 0 && !by_tiles; column += kDownColumns) {
        const int64_t columns = std::min(kDownColumns, k - column);
        for (int64_t row = first; row < last; row += kDownRows) {
          const int64_t count = std::min(kDownRows, last - row);
          const float* from = floats(row, count, column, columns, stride);
          const float* right = factors + column * rank;
          float* to = down_out + row * rank;
          if (count == kDownRows) {
            project_down<kDownRows>(from, stride, columns, right, rank, column == 0, to);
          } else {
            for (int64_t i = 0; i < count; ++i)
              project_down<1>(from + i * stride, stride, columns, right, rank, column == 0, to + i * rank);
          }
        }
      }
      for (int64_t row = first; row < last; ++row)
        quantize_token(in, wide, row * k, inverse, static_cast<float>(shift), k, padded, group, z.get(), ordered.get(),
                       codes_out + row * padded, scales_out + row, sums_out + row * groups);
    }
  });
  return {codes, scales, sums, down};
}

// ---- kernel 2: multiply, scale, project up, add the bias -------------------------------------------------------

#if defined(TRISKELE_SVDQ_AVX_VNNI)
bool has_avx_vnni() {  // GCC 12's __builtin_cpu_supports does not know it
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

Tensor svdq_gemm(Tensor codes, Tensor token_scales, Tensor sums, Tensor down, Tensor qweight, Tensor wscales,
                 Tensor lora_up, std::optional<Tensor> bias, bool e2m1, bool narrow, int64_t epilogue) {
  constexpr const char* op = "svdq_gemm";
  check_dim(op, "codes", codes, 2);
  check_dim(op, "token_scales", token_scales, 1);
  check_dim(op, "sums", sums, 2);
  check_dim(op, "down", down, 2);
  check_dim(op, "qweight", qweight, 2);
  check_dim(op, "wscales", wscales, 2);
  check_dim(op, "lora_up", lora_up, 2);
  Gemm p{};
  p.m = codes.size(0), p.padded = codes.size(1), p.n = qweight.size(0);
  p.groups = wscales.size(1), p.rank = down.size(1), p.e2m1 = e2m1, p.narrow = narrow, p.epilogue = epilogue;
  check_that(kNone <= epilogue && epilogue <= kGeluTanh, op, "epilogue to be 0 (none), 1 (gelu) or 2 (gelu_tanh)");
  check_that(p.groups > 0 && p.padded % p.groups == 0 && p.padded / p.groups % 16 == 0, op,
             "codes' columns to be groups of a multiple of 16");
  p.group = p.padded / p.groups;
  check_equal(op, "token_scales size", p.m, token_scales.size(0));
  check_equal(op, "sums rows", p.m, sums.size(0));
  check_equal(op, "sums columns", p.groups, sums.size(1));
  check_equal(op, "down rows", p.m, down.size(0));
  check_equal(op, "qweight columns", p.padded / 2, qweight.size(1));
  check_equal(op, "wscales rows", p.n, wscales.size(0));
  check_equal(op, "lora_up rows", p.n, lora_up.size(0));
  check_equal(op, "lora_up columns, rounded up to 16", p.rank, (lora_up.size(1) + kLanes - 1) / kLanes * kLanes);
  for (const Tensor& t : {codes, token_scales, sums, down, qweight}) check_contiguous(op, "inputs", t);
  check_that(codes.scalar_type() == ScalarType::Char && sums.scalar_type() == ScalarType::Int &&
                 qweight.scalar_type() == ScalarType::Byte, op, "codes int8, sums int32, qweight uint8");
  for (const Tensor& t : {token_scales, down})
    check_that(t.scalar_type() == ScalarType::Float, op, "token_scales and down in float32");
  std::optional<AsFloat> bias_values;
  if (bias.has_value()) {
    check_dim(op, "bias", *bias, 1);
    check_equal(op, "bias size", p.n, bias->size(0));
    p.bias = bias_values.emplace(Stored(op, "bias", *bias));
  }
  const AsFloat scale_values(Stored(op, "wscales", wscales)), up_values(Stored(op, "lora_up", lora_up), p.rank);
  p.codes = codes.const_data_ptr<int8_t>();
  p.token_scales = token_scales.const_data_ptr<float>();
  p.sums = sums.const_data_ptr<int32_t>();
  p.down = down.const_data_ptr<float>();
  p.qweight = qweight.const_data_ptr<uint8_t>();
  p.wscales = scale_values;
  p.lora_up = up_values;
  Tensor out = torch::stable::new_empty(codes, {p.m, p.n}, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  p.out = out.mutable_data_ptr();
  if (p.m == 0 || p.n == 0) return out;
#if defined(__AMX_INT8__)
  std::vector<uint8_t> done;
  if (planes_pay(p)) {
    p.stream = streams(p);
    FixedScales scales = fix_all_scales(p);
    if (p.m < kFewTokens) multiply_few(p, scales);
    else multiply_by_planes(p, scales);
    done = std::move(scales.ways);
    if (std::find(done.begin(), done.end(), 0) == done.end()) return out;
    p.done = done.data();
  }
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
  auto* tiles = &vectors::tiles;
#if defined(TRISKELE_SVDQ_AVX_VNNI)
  if (has_avx_vnni()) tiles = &vectors_avx_vnni::tiles;
#endif
  torch::stable::parallel_for(0, panels * stretches, 1, [&](int64_t begin, int64_t end) {
    Panel panel = make_panel(p, kPanel, p.groups);
    int64_t filled = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / stretches * kPanel, row = task % stretches * stretch;
      if (p.is_done(first)) continue;
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
