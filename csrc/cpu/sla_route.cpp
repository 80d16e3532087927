// Block routing: one read of Q and K for the block means, then per row of blocks a partial selection that sorts nothing.
// Means and scores are float64, so that a near tie falls as it does in the reference.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/level.h"
#include "cpu/simd.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "sla_route";
constexpr int64_t kAhead = 48;        // rows between what is read and what is fetched

double widen(float x) { return x; }
double widen(double x) { return x; }
double widen(uint16_t x) { return from_bfloat16(x); }

// sum += the visible ones of `count` rows, `Columns` of them: their sums stay in registers meanwhile.
template <class T, int Columns>
void add_rows(const T* rows, int64_t stride, int64_t count, const bool* mask, double* sum) {
  double total[Columns];
  std::copy_n(sum, Columns, total);
  for (int64_t r = 0; r < count; ++r, rows += stride) {
    __builtin_prefetch(rows + kAhead * stride), __builtin_prefetch(rows + kAhead * stride + Columns - 1);
    if (mask != nullptr && !mask[r]) continue;
#pragma GCC unroll 64
    for (int d = 0; d < Columns; ++d) total[d] += widen(rows[d]);
  }
  std::copy_n(total, Columns, sum);
}

// Mean of the visible rows of every block of x [B, H, L, D] -> means [B, H, blocks, D]; zero where there is none.
template <class T>
void block_means(const Tensor& x, const T* data, int64_t block, const bool* mask, double* means) {
  const int64_t heads = x.size(1), length = x.size(2), dim = x.size(3), blocks = (length + block - 1) / block;
  const int64_t s0 = x.stride(0), s1 = x.stride(1), s2 = x.stride(2), s3 = x.stride(3);
  torch::stable::parallel_for(0, x.size(0) * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = task % blocks, h = task / blocks % heads, b = task / blocks / heads;
      const int64_t first = j * block, rows = std::min(block, length - first);
      const T* source = data + b * s0 + h * s1 + first * s2;
      const bool* shown = mask == nullptr ? nullptr : mask + b * length + first;
      double* mean = means + task * dim;
      std::fill(mean, mean + dim, 0.0);
      int64_t count = rows;
      if (shown != nullptr) count = std::count(shown, shown + rows, true);
      int64_t d = 0;
      for (; s3 == 1 && d + 4 * kVec <= dim; d += 4 * kVec)
        add_rows<T, 4 * kVec>(source + d, s2, rows, shown, mean + d);
      for (; s3 == 1 && d + kVec <= dim; d += kVec) add_rows<T, kVec>(source + d, s2, rows, shown, mean + d);
      for (; d < dim; ++d) {
        double sum = 0.0;
        for (int64_t t = 0; t < rows; ++t)
          if (shown == nullptr || shown[t]) sum += widen(source[t * s2 + d * s3]);
        mean[d] = sum;
      }
      for (int64_t i = 0; i < dim && count > 0; ++i) mean[i] /= count;
    }
  });
}

void means_of(const Tensor& x, int64_t block, const bool* mask, double* means) {
  if (x.scalar_type() == ScalarType::Float)
    block_means(x, x.const_data_ptr<float>(), block, mask, means);
  else if (x.scalar_type() == ScalarType::Double)
    block_means(x, x.const_data_ptr<double>(), block, mask, means);
  else
    block_means(x, static_cast<const uint16_t*>(x.const_data_ptr()), block, mask, means);
}

// Which blocks of each batch hold a token that `flags` [B or 1, Lk] marks -> [B, blocks].
std::vector<uint8_t> blocks_with(const Tensor& flags, int64_t batch, int64_t length, int64_t block) {
  const int64_t blocks = (length + block - 1) / block;
  const bool* marked = flags.const_data_ptr<bool>();
  std::vector<uint8_t> found(batch * blocks, 0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t) found[b * blocks + t / block] |= marked[flags.size(0) == 1 ? t : b * length + t];
  return found;
}

// Marks the `count` largest scores that somebody sees; of equal ones the first. `ranked`: scratch.
void mark_first(const std::vector<double>& scores, int64_t count, std::vector<double>& ranked, const uint8_t* seen,
                int8_t* out) {
  const int64_t size = static_cast<int64_t>(scores.size());
  ranked = scores;
  std::nth_element(ranked.begin(), ranked.begin() + (count - 1), ranked.end(), std::greater<>());
  const double least = ranked[count - 1];
  int64_t equal = count;  // places that those above leave to those equal to the least
  for (int64_t j = 0; j < size; ++j) equal -= scores[j] > least;
  for (int64_t j = 0; j < size; ++j) {
    const bool taken = scores[j] > least || (scores[j] == least && equal-- > 0);
    if (taken && seen[j]) out[j] = 1;
  }
}

// Marks the `count` smallest scores; of equal ones the last.
void mark_last(const std::vector<double>& scores, int64_t count, std::vector<double>& ranked, int8_t* out) {
  ranked = scores;
  std::nth_element(ranked.begin(), ranked.begin() + (count - 1), ranked.end());
  const double most = ranked[count - 1];
  int64_t equal = count;
  for (const double score : scores) equal -= score < most;
  for (int64_t j = static_cast<int64_t>(scores.size()) - 1; j >= 0; --j)
    if (scores[j] < most || (scores[j] == most && equal-- > 0)) out[j] = -1;
}

Tensor sla_route(Tensor q, Tensor k, int64_t n_keep, int64_t n_drop, int64_t block_q, int64_t block_k,
                 OptionalTensor keep_keys, OptionalTensor key_mask) {
  check_dim(kOp, "q", q, 4);
  check_dim(kOp, "k", k, 4);
  const ScalarType dtype = q.scalar_type();
  check_that(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16, kOp,
             "float32, float64 or bfloat16");
  check_that(k.scalar_type() == dtype, kOp, "k of the dtype of q");
  check_that(block_q >= 1 && block_k >= 1, kOp, "blocks of at least one token");
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(3), keys = k.size(2);
  check_equal(kOp, "batch of k", batch, k.size(0));
  check_equal(kOp, "heads of k", heads, k.size(1));
  check_equal(kOp, "head_dim of k", dim, k.size(3));
  if (key_mask) {
    check_contiguous(kOp, "key_mask", *key_mask);
    check_equal(kOp, "key_mask elements", batch * keys, key_mask->numel());
  }
  if (keep_keys) {
    check_contiguous(kOp, "keep_keys", *keep_keys);
    check_dim(kOp, "keep_keys", *keep_keys, 2);
    check_equal(kOp, "keep_keys length", keys, keep_keys->size(1));
    check_that(keep_keys->size(0) == 1 || keep_keys->size(0) == batch, kOp, "keep_keys for one or every batch");
  }
  const int64_t nq = (q.size(2) + block_q - 1) / block_q, nk = (keys + block_k - 1) / block_k;
  const std::vector<uint8_t> seen = key_mask ? blocks_with(*key_mask, batch, keys, block_k)
                                             : std::vector<uint8_t>(batch * nk, 1);
  const std::vector<uint8_t> kept = keep_keys ? blocks_with(*keep_keys, batch, keys, block_k)
                                              : std::vector<uint8_t>(batch * nk, 0);
  std::vector<double> q_means(batch * heads * nq * dim), k_means(batch * heads * nk * dim);
  means_of(q, block_q, nullptr, q_means.data());
  means_of(k, block_k, key_mask ? key_mask->const_data_ptr<bool>() : nullptr, k_means.data());

  std::vector<double> columns(k_means.size());  // [B, H, D, Nk]: scores of a row are then sums of vectors
  for (int64_t i = 0; i < batch * heads; ++i)
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t d = 0; d < dim; ++d) columns[(i * dim + d) * nk + j] = k_means[(i * nk + j) * dim + d];

  Tensor map = torch::stable::new_empty(q, {batch, heads, nq, nk}, ScalarType::Char);
  int8_t* kinds = map.mutable_data_ptr<int8_t>();
  const int64_t keep = std::clamp<int64_t>(n_keep, 0, nk), drop = std::clamp<int64_t>(n_drop, 0, nk);
  torch::stable::parallel_for(0, batch * heads * nq, 4, [&](int64_t begin, int64_t end) {
    std::vector<double> scores(nk);
    std::vector<double> ranked(nk);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / nq / heads;
      const double *mean_q = q_means.data() + row * dim, *mean_k = columns.data() + row / nq * nk * dim;
      std::fill(scores.begin(), scores.end(), 0.0);
      for (int64_t d = 0; d < dim; ++d) {
        const double factor = mean_q[d], *column = mean_k + d * nk;
#pragma omp simd
        for (int64_t j = 0; j < nk; ++j) scores[j] += factor * column[j];
      }
      for (int64_t j = 0; j < nk; ++j) {
        const double dot = scores[j];
        scores[j] = !seen[b * nk + j] ? -std::numeric_limits<double>::infinity()
                    : std::isfinite(dot) ? dot  // what is not a number ranks just above what nobody sees
                    : dot > 0.0 ? std::numeric_limits<double>::max() : std::numeric_limits<double>::lowest();
      }
      int8_t* out = kinds + row * nk;
      std::fill(out, out + nk, int8_t{0});
      if (drop > 0) mark_last(scores, drop, ranked, out);
      if (keep > 0) mark_first(scores, keep, ranked, seen.data() + b * nk, out);
      for (int64_t j = 0; j < nk; ++j)
        if (kept[b * nk + j] && seen[b * nk + j]) out[j] = 1;
    }
  });
  return map;
}

}  // namespace

void register_sla_route(torch::stable::detail::StableLibrary& m) { m.impl("sla_route", TORCH_BOX(&sla_route)); }

}  // namespace triskele::TRISKELE_LEVEL
