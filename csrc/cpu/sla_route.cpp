// Block routing in one read of Q and K. First the means of the key blocks, laid out for a matrix product; then, a few
// rows of blocks at a time, the means of the query blocks, their scores and a selection that sorts nothing. Means and
// scores are float64, so that a near tie falls as it does in the reference.
#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/level.h"
#include "cpu/simd.h"
#include "cpu/sla_route_means.h"
#include "cpu/sla_route_select.h"

namespace triskele::TRISKELE_LEVEL {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "sla_route";
// Scores are made by tiles of kTall rows by 2 registers; what they read of K lies in panels of one register's columns.
#if defined(__AVX512F__)
constexpr int kTall = 8;
#else
constexpr int kTall = 4;
#endif
constexpr int64_t kRowsTask = 8;  // rows of blocks a task takes: K's panels are read once for all

// x [B, H, L, D] and its blocks.
template <class T>
struct Blocks {
  const T* data;
  int64_t heads, length, dim, block, s0, s1, s2, s3;

  Blocks(const Tensor& x, int64_t block)
      : data(static_cast<const T*>(x.const_data_ptr())), heads(x.size(1)), length(x.size(2)), dim(x.size(3)),
        block(block), s0(x.stride(0)), s1(x.stride(1)), s2(x.stride(2)), s3(x.stride(3)) {}
  int64_t count() const { return (length + block - 1) / block; }
  // Mean [dim] of the visible rows of block j of head `head` of all B H.
  void mean(int64_t head, int64_t j, const bool* mask, double* out) const {
    const int64_t b = head / heads, first = j * block;
    mean_of(data + b * s0 + head % heads * s1 + first * s2, s2, s3, std::min(block, length - first), dim,
            mask == nullptr ? nullptr : mask + b * length + first, out);
  }
};

// The means of the key blocks, [B H, panels, D, kWide]: column j of a head is lane j % kWide of panel j / kWide. An
// even number of panels, zero where there is no block.
struct Panels {
  int64_t count, dim;
  double* data;
  double* at(int64_t head, int64_t panel) const { return data + (head * count + panel) * dim * kWide; }
};

template <class T>
void pack_means(const Blocks<T>& k, int64_t all_heads, const bool* mask, const Panels& panels) {
  const int64_t blocks = k.count();
  torch::stable::parallel_for(0, all_heads * panels.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> mean(k.dim);
    for (int64_t task = begin; task < end; ++task) {
      double* panel = panels.at(0, task);
      for (int64_t lane = 0; lane < kWide; ++lane) {
        const int64_t j = task % panels.count * kWide + lane;
        if (j < blocks) k.mean(task / panels.count, j, mask, mean.data());
        for (int64_t d = 0; d < k.dim; ++d) panel[d * kWide + lane] = j < blocks ? mean[d] : 0.0;
      }
    }
  });
}

// scores [kTall, 2 kWide] = rows [kTall, dim] @ two panels, made finite: what is not a number ranks last of what is
// seen.
void score_tile(const double* rows, const double* left, const double* right, int64_t dim, double* scores,
                int64_t stride) {
  Doubles sum[kTall][2] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const Doubles a = load_doubles(left + d * kWide), b = load_doubles(right + d * kWide);
    for (int r = 0; r < kTall; ++r) {
      const Doubles factor = rows[r * dim + d] - Doubles{};
      sum[r][0] += factor * a;
      sum[r][1] += factor * b;
    }
  }
  constexpr double kMost = std::numeric_limits<double>::max();
  const Doubles most = kMost - Doubles{}, least = -kMost - Doubles{};
  for (int r = 0; r < kTall; ++r)
    for (int half = 0; half < 2; ++half) {
      Doubles x = sum[r][half];
      x = x > least ? x : least;
      store_doubles(scores + r * stride + half * kWide, x < most ? x : most);
    }
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

// What a row of the map is made of.
struct Choice {
  int64_t keep, drop;
  std::vector<uint8_t> seen, kept;  // [B, Nk]; empty: all are seen, none is kept
};

// Rows [begin, end) of blocks of one head, kRowsTask of them or fewer.
template <class T>
void route_rows(const Blocks<T>& q, const Panels& panels, const Choice& choice, int64_t head, int64_t begin,
                int64_t end, int64_t nk, double* scratch, int8_t* map) {
  const int64_t dim = q.dim, width = panels.count * kWide;
  double *means = scratch, *scores = means + kRowsTask * dim, *ranked = scores + kRowsTask * width;
  std::fill(means, means + kRowsTask * dim, 0.0);
  for (int64_t i = begin; i < end; ++i) q.mean(head, i, nullptr, means + (i - begin) * dim);
  for (int64_t r = 0; r < end - begin; r += kTall)
    for (int64_t p = 0; p < panels.count; p += 2)
      score_tile(means + r * dim, panels.at(head, p), panels.at(head, p + 1), dim, scores + r * width + p * kWide,
                 width);
  const int64_t b = head / q.heads;
  const uint8_t* seen = choice.seen.empty() ? nullptr : choice.seen.data() + b * nk;
  const uint8_t* kept = choice.kept.empty() ? nullptr : choice.kept.data() + b * nk;
  const int64_t visible = seen == nullptr ? nk : std::count(seen, seen + nk, 1);
  const int64_t keep = std::min(choice.keep, visible);
  for (int64_t i = begin; i < end; ++i, scores += width) {
    int8_t* out = map + i * nk;
    for (int64_t j = 0; seen != nullptr && j < nk; ++j)
      if (!seen[j]) scores[j] = -std::numeric_limits<double>::infinity();
    std::fill(out, out + nk, int8_t{0});
    if (choice.drop > 0) mark_last(scores, nk, choice.drop, {ranked, ranked + nk}, out);
    if (keep > 0) mark_first(scores, nk, keep, {ranked, ranked + nk}, out);
    for (int64_t j = 0; kept != nullptr && j < nk; ++j)
      if (kept[j] && (seen == nullptr || seen[j])) out[j] = 1;
  }
}

template <class T>
void route(const Blocks<T>& q, const Blocks<T>& k, int64_t batch, const bool* mask, const Choice& choice,
           int8_t* map) {
  const int64_t nq = q.count(), nk = k.count(), dim = q.dim, all_heads = batch * q.heads;
  const int64_t count = (nk + 2 * kWide - 1) / (2 * kWide) * 2, tasks = (nq + kRowsTask - 1) / kRowsTask;
  const Scratch means(2 * all_heads * count * dim * kWide);  // of floats
  const Panels panels{count, dim, reinterpret_cast<double*>(static_cast<float*>(means))};
  pack_means(k, all_heads, mask, panels);
  torch::stable::parallel_for(0, all_heads * tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(kRowsTask * (dim + count * kWide) + 2 * nk);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks, first = task % tasks * kRowsTask;
      route_rows(q, panels, choice, head, first, std::min(nq, first + kRowsTask), nk, scratch.data(),
                 map + head * nq * nk);
    }
  });
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
  Choice choice{std::clamp<int64_t>(n_keep, 0, nk), std::clamp<int64_t>(n_drop, 0, nk), {}, {}};
  if (key_mask) choice.seen = blocks_with(*key_mask, batch, keys, block_k);
  if (keep_keys) choice.kept = blocks_with(*keep_keys, batch, keys, block_k);
  Tensor map = torch::stable::new_empty(q, {batch, heads, nq, nk}, ScalarType::Char);
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    route(Blocks<T>(q, block_q), Blocks<T>(k, block_k), batch, key_mask ? key_mask->const_data_ptr<bool>() : nullptr,
          choice, map.mutable_data_ptr<int8_t>());
  };
  if (dtype == ScalarType::Float) run((float*)nullptr);
  else if (dtype == ScalarType::Double) run((double*)nullptr);
  else run((uint16_t*)nullptr);
  return map;
}

}  // namespace

void register_sla_route(torch::stable::detail::StableLibrary& m) { m.impl("sla_route", TORCH_BOX(&sla_route)); }

}  // namespace triskele::TRISKELE_LEVEL
