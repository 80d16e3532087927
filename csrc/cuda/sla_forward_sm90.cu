// Sparse-linear attention, forward, on Hopper. Contract: python/triskele/ops/sla/api.py; the same on a CPU:
// csrc/cpu/sla_forward.cpp; how it works and what it should cost: docs/cuda_sla.md.
//
//   O = softmax over critical blocks of (scale Q K^T) V  [+ O_linear W^T + b  |  mixed with O_linear by alpha]
//   O_linear = A Hn,  A_d = phi(q)_d Z_d / (phi(q) Z + eps),  Hn[d, e] = H[d, e] / Z[d]
//
// A is a row of weights that sum to at most one and Hn holds averages of V, so neither leaves the range of a 16-bit
// float, however long the sequence. H and Z come from csrc/cuda/sla_linear.cuh.
//
// Launches: two for the key_mask if there is one, the row lists, two for H and Z, and the kernel of
// csrc/cuda/sla_forward.cuh; the last three for each group of heads whose states fit in memory together.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/sla_forward.cuh"
#include "cuda/sla_linear.cuh"
#include "cuda/sla_lists.cuh"
#include "cuda/sla_tiles.cuh"

namespace triskele::cuda {
namespace {

using namespace sla;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "sla_forward";
constexpr int64_t kStateBytes = int64_t{2} << 30;  // of the states of a group of heads

struct Problem {
  int64_t batch, heads, queries, keys, dim, q_blocks, k_blocks;
  Feature feature;
  Scope scope;
  float scale;
  int all_heads() const { return static_cast<int>(batch * heads); }
};

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& map, int64_t block_q, int64_t block_k,
                int64_t feature, int64_t scope, double scale) {
  const ScalarType dtype = q.scalar_type();
  check_that(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp, "q in bfloat16 or float16");
  for (const Tensor* x : {&q, &k, &v, &map}) check_dim(kOp, "each of q, k, v and map", *x, 4);
  for (const Tensor* x : {&k, &v}) {
    check_that(x->scalar_type() == dtype, kOp, "k and v of the dtype of q");
    check_equal(kOp, "batch", q.size(0), x->size(0));
    check_equal(kOp, "heads", q.size(1), x->size(1));
    check_equal(kOp, "head_dim", q.size(3), x->size(3));
    check_equal(kOp, "keys", k.size(2), x->size(2));
  }
  for (const Tensor* x : {&q, &k, &v}) {
    check_that(x->stride(3) == 1 && aligned(x->const_data_ptr(), 16), kOp,
               "q, k and v with rows at multiples of 16 bytes");
    for (int i = 0; i < 3; ++i)
      check_that(x->size(i) <= 1 || (x->stride(i) > 0 && x->stride(i) % 8 == 0), kOp,
                 "q, k and v with strides in multiples of 8 elements");
  }
  const Problem p{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), (q.size(2) + block_q - 1) / block_q,
                  (k.size(2) + block_k - 1) / block_k, static_cast<Feature>(feature), static_cast<Scope>(scope),
                  static_cast<float>(scale)};
  check_that(p.dim >= 8 && p.dim <= 128 && p.dim % 8 == 0, kOp, "head_dim of at most 128 in multiples of 8");
  check_that(block_q == kRows || (block_q < kRows && p.queries <= block_q), kOp, "block_q 128");
  check_that(block_k == kBlock || (block_k < kBlock && p.keys <= block_k), kOp, "block_k 64");
  check_that(feature >= 0 && feature <= 2 && scope >= 0 && scope <= 2, kOp, "a feature map and a scope in 0..2");
  check_that(p.scale > 0.f, kOp, "a scale above zero");
  check_that(map.scalar_type() == ScalarType::Char, kOp, "an int8 map");
  check_contiguous(kOp, "map", map);
  check_equal(kOp, "map batch", p.batch, map.size(0));
  check_equal(kOp, "map heads", p.heads, map.size(1));
  check_equal(kOp, "map query blocks", p.q_blocks, map.size(2));
  check_equal(kOp, "map key blocks", p.k_blocks, map.size(3));
  constexpr int64_t kMost = int64_t{1} << 30;
  check_that(p.queries < kMost && p.keys < kMost && p.batch * p.heads < kMost, kOp, "lengths and heads below 2^30");
  return p;
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

template <class T>
T* data(Tensor& x) {
  return x.numel() > 0 ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}
const float* floats(const OptionalTensor& x) { return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr; }

int processors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <class E>
constexpr TileType kTileType = std::is_same_v<E, __half> ? TileType::kFloat16 : TileType::kBFloat16;

// x [B, H, L, dim] in boxes of `rows` rows and 64 columns of one head
template <class E>
CUtensorMap heads_map(const Tensor& x, int rows) {
  TileSource source{kTileType<E>, x.const_data_ptr(), 4, {}, {}, {kChunk, rows, 1, 1}, true};
  for (int d = 0; d < 4; ++d) {
    const int from = 3 - d;
    source.size[d] = x.size(from);
    source.stride[d] = x.size(from) > 1 ? x.stride(from) * static_cast<int64_t>(sizeof(E)) : 16 * x.size(3);
  }
  return encode_tensor_map(source);
}

// Stands for keys where there are none: the first row of x, which no box takes (box_row).
template <class E>
CUtensorMap row_map(const Tensor& x) {
  const int64_t dim = x.size(3), row = dim * static_cast<int64_t>(sizeof(E));
  return encode_tensor_map(
      {kTileType<E>, x.const_data_ptr(), 4, {dim, 1, 1, 1}, {0, row, row, row}, {kChunk, kBlock, 1, 1}, true});
}

// x [count, rows, columns], contiguous, in boxes of `box` rows and 64 columns
template <class E>
CUtensorMap matrices_map(const void* x, int64_t count, int64_t rows, int64_t columns, int box) {
  const int64_t row = columns * static_cast<int64_t>(sizeof(E));
  return encode_tensor_map({kTileType<E>, x, 3, {columns, rows, count}, {0, row, rows * row}, {kChunk, box, 1}, true});
}

template <class E>
Rows<E> rows_of(const Tensor& x) {
  return {static_cast<const E*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2),
          static_cast<int>(x.size(1))};
}

// The states of one group of heads, and the tensors behind them.
struct States {
  Tensor h, z;
  int step;  // states a head
};

template <class E, int D>
States linear_states(const Problem& p, StateArgs<E> args, bool fold, const Tensor& like, cudaStream_t stream) {
  constexpr int kTerms = std::is_same_v<E, __half> ? 2 : 1;
  constexpr ScalarType kDtype = std::is_same_v<E, __half> ? ScalarType::Half : ScalarType::BFloat16;
  const bool all = p.scope == Scope::kAll || p.k_blocks == 0;
  const int64_t heads = args.heads, step = all ? 1 : p.q_blocks;
  States out{new_tensor(like, {heads * step, D, D}, kDtype), new_tensor(like, {heads * step, D}, ScalarType::Float),
             static_cast<int>(step)};
  args.segment_blocks = blocks_a_segment(args.blocks, args.heads, D == 128 ? processors() : 2 * processors());
  args.segments = args.blocks > 0 ? (args.blocks + args.segment_blocks - 1) / args.segment_blocks : 1;
  if (all) {
    Tensor sums = new_tensor(like, {heads, args.segments, D, D}, ScalarType::Float);
    Tensor shares = new_tensor(like, {heads, args.segments, D}, ScalarType::Float);
    args.sums = data<float>(sums);
    args.z = data<float>(shares);
    launch_kernel(state_kernel<E, D, 0>, dim3(static_cast<unsigned>(heads * args.segments)), dim3(linear_threads(D)),
                  sizeof(StateShared<E, D>), stream, args);
    launch_kernel(gather_kernel<E, D>, dim3(static_cast<unsigned>(heads * (D / kGatherRows))), dim3(D), 0, stream,
                  args.sums, args.z, args.segments, args.dim, fold ? args.weight : nullptr, data<E>(out.h),
                  data<float>(out.z));
    return out;
  }
  Tensor terms = new_tensor(like, {heads, kTerms, args.blocks, D, D}, ScalarType::BFloat16);
  Tensor shares = new_tensor(like, {heads, args.blocks, D}, ScalarType::Float);
  Tensor bits = new_tensor(like, {heads, p.q_blocks, (args.blocks + 31) / 32}, ScalarType::Int);
  args.terms = data<__nv_bfloat16>(terms);
  args.z = data<float>(shares);
  args.bits = data<uint32_t>(bits);
  launch_kernel(state_kernel<E, D, kTerms>, dim3(static_cast<unsigned>(heads * args.segments)), dim3(linear_threads(D)),
                sizeof(StateShared<E, D>), stream, args);
  const CoverArgs cover{args.bits, args.terms, args.z, args.q_blocks, args.blocks, data<E>(out.h), data<float>(out.z)};
  const int64_t tiles = (p.q_blocks + kRows - 1) / kRows;
  launch_kernel(cover_kernel<E, D, kTerms>, dim3(static_cast<unsigned>(heads * D * tiles)), dim3(linear_threads(D)),
                sizeof(CoverShared<D>), stream, cover);
  return out;
}

// What the key_mask makes of K and V.
struct Seen {
  Tensor k, v;
  OptionalTensor there;  // int64 [B, k_blocks]
};

template <class E>
Seen seen_keys(const Problem& p, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
               cudaStream_t stream) {
  if (!key_mask || p.keys == 0) return {k, v, std::nullopt};
  Seen out{new_tensor(k, {p.batch, p.heads, p.keys, p.dim}, k.scalar_type()),
           new_tensor(k, {p.batch, p.heads, p.keys, p.dim}, k.scalar_type()),
           new_tensor(k, {p.batch, p.k_blocks}, ScalarType::Long)};
  const bool* mask = static_cast<const bool*>(key_mask->const_data_ptr());
  const int64_t words = p.batch * p.k_blocks, rows = p.batch * p.heads * p.keys;
  launch_kernel(there_kernel<8>, dim3(static_cast<unsigned>((words + 7) / 8)), dim3(256), 0, stream, mask, words,
                static_cast<int>(p.keys), static_cast<int>(p.k_blocks), data<uint64_t>(*out.there));
  launch_kernel(hide_kernel<E>, dim3(static_cast<unsigned>((rows * (p.dim / 8) + 255) / 256), 2), dim3(256), 0, stream,
                rows_of<E>(k), rows_of<E>(v), mask, rows, static_cast<int>(p.keys), static_cast<int>(p.dim),
                data<E>(out.k), data<E>(out.v));
  return out;
}

struct Extras {
  const OptionalTensor &weight, &bias, &alpha, &key_mask;
};

struct Outputs {
  Tensor o, o_sparse, o_linear, lse;
};

template <class E, int D>
void run(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& map, const Extras& extras,
         bool parts, Outputs& out, cudaStream_t stream) {
  const bool linear = parts || extras.weight || extras.alpha;
  const bool fold = extras.weight && !parts && p.scope == Scope::kAll;
  const int64_t lines = p.all_heads() * p.q_blocks;
  const int8_t* kinds = static_cast<const int8_t*>(map.const_data_ptr());
  Seen seen = seen_keys<E>(p, k, v, extras.key_mask, stream);
  Tensor entries = new_tensor(q, {lines, p.k_blocks}, ScalarType::Int);
  Tensor counts = new_tensor(q, {lines}, ScalarType::Int);
  Tensor half_weight = new_tensor(q, {extras.weight ? p.dim * p.dim : 0}, q.scalar_type());
  ForwardArgs<E> args{};
  args.critical = {data<int32_t>(entries), data<int32_t>(counts)};
  launch_kernel(lists::row_lists_kernel<lists::kWarps>,
                dim3(static_cast<unsigned>((lines + lists::kWarps - 1) / lists::kWarps)), dim3(lists::kWarps * 32), 0,
                stream, kinds, lines, static_cast<int>(p.k_blocks), args.critical);

  args.q = heads_map<E>(q, kRows);
  args.k = p.keys > 0 ? heads_map<E>(seen.k, kBlock) : row_map<E>(q);
  args.v = p.keys > 0 ? heads_map<E>(seen.v, kBlock) : args.k;
  args.there = seen.there ? data<uint64_t>(*seen.there) : nullptr;
  args.bias = floats(extras.bias);
  args.alpha = floats(extras.alpha);
  args.o = data<E>(out.o);
  args.o_sparse = data<E>(out.o_sparse);
  args.o_linear = data<E>(out.o_linear);
  args.lse = data<float>(out.lse);
  args.heads = static_cast<int>(p.heads), args.dim = static_cast<int>(p.dim);
  args.queries = static_cast<int>(p.queries), args.keys = static_cast<int>(p.keys);
  args.k_blocks = static_cast<int>(p.k_blocks);
  args.scale_log2 = p.scale * kLog2E;
  args.eps = p.scope == Scope::kAll ? 1e-5f : 0.f;
  args.feature = p.feature;
  args.linear = linear;
  args.join = extras.alpha ? Join::kMix : !extras.weight ? Join::kNone : fold ? Join::kAdd : Join::kProject;

  StateArgs<E> states{};
  states.k = rows_of<E>(seen.k), states.v = rows_of<E>(seen.v);
  states.there = args.there;
  states.keys = args.keys, states.dim = args.dim, states.blocks = args.k_blocks;
  states.feature = p.feature, states.scope = p.scope;
  states.q_blocks = static_cast<int>(p.q_blocks);
  states.weight = floats(extras.weight);
  states.half_weight = args.join == Join::kProject ? data<E>(half_weight) : nullptr;

  const int64_t state_bytes = D * D * static_cast<int64_t>(sizeof(E));
  const int64_t a_head = !linear || p.scope == Scope::kAll
      ? 0 : (p.k_blocks * (std::is_same_v<E, __half> ? 2 : 1) + p.q_blocks) * state_bytes;
  const int at_a_time = heads_at_a_time(p.all_heads(), a_head, kStateBytes), most_blocks = processors();
  for (int first = 0; first < p.all_heads(); first += at_a_time) {
    const int heads = std::min(at_a_time, p.all_heads() - first);
    args.tiles = {first, heads, static_cast<int>(p.q_blocks)};
    args.h = args.w = args.q;
    std::optional<States> held;
    if (linear) {
      states.first_head = first, states.heads = heads;
      states.map = kinds + first * p.q_blocks * p.k_blocks;
      held = linear_states<E, D>(p, states, fold, q, stream);
      args.h = matrices_map<E>(held->h.const_data_ptr(), heads * static_cast<int64_t>(held->step), D, D, D);
      if (args.join == Join::kProject) args.w = matrices_map<E>(half_weight.const_data_ptr(), 1, p.dim, p.dim, D);
      args.z = data<float>(held->z);
      args.state_step = held->step;
    }
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(most_blocks, args.tiles.count()));
    launch_kernel(forward_kernel<E, D>, dim3(blocks), dim3(kThreads), Layout<D>::kBytes, stream, args);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sla_forward(
    Tensor q, Tensor k, Tensor v, Tensor map, OptionalTensor weight, OptionalTensor bias, OptionalTensor alpha,
    OptionalTensor key_mask, int64_t block_q, int64_t block_k, int64_t feature, int64_t scope, double scale,
    bool parts) {
  check_that(block_q >= 1 && block_k >= 1, kOp, "blocks of at least 1");
  const Problem p = problem(q, k, v, map, block_q, block_k, feature, scope, scale);
  for (const OptionalTensor* x : {&weight, &bias, &alpha})
    if (*x) {
      check_that((*x)->scalar_type() == ScalarType::Float, kOp, "float32 weight, bias and alpha");
      check_contiguous(kOp, "weight, bias and alpha", **x);
      check_that(aligned((*x)->const_data_ptr(), 8), kOp, "weight, bias and alpha at multiples of 8 bytes");
    }
  if (weight) check_equal(kOp, "weight elements", p.dim * p.dim, weight->numel());
  if (bias) check_equal(kOp, "bias elements", p.dim, bias->numel());
  if (alpha) check_equal(kOp, "alpha elements", p.all_heads() * p.queries, alpha->numel());
  check_that(!(weight && alpha) && !(bias && !weight), kOp, "a projection or alpha, and a bias beside its weight");
  if (key_mask) {
    check_that(key_mask->scalar_type() == ScalarType::Bool, kOp, "key_mask of dtype bool");
    check_contiguous(kOp, "key_mask", *key_mask);
    check_equal(kOp, "key_mask elements", p.batch * p.keys, key_mask->numel());
  }
  const Launch launch(q);
  const auto part = [&] {
    return parts ? new_tensor(q, {p.batch, p.heads, p.queries, p.dim}, q.scalar_type())
                 : new_tensor(q, {0}, q.scalar_type());
  };
  Outputs out{new_tensor(q, {p.batch, p.heads, p.queries, p.dim}, q.scalar_type()), part(), part(),
              new_tensor(q, {p.batch, p.heads, p.queries}, ScalarType::Float)};
  if (out.o.numel() > 0) {
    const Extras extras{weight, bias, alpha, key_mask};
    const bool half = q.scalar_type() == ScalarType::Half, wide = p.dim > 64;
    if (half && wide) run<__half, 128>(p, q, k, v, map, extras, parts, out, launch.stream);
    else if (half) run<__half, 64>(p, q, k, v, map, extras, parts, out, launch.stream);
    else if (wide) run<__nv_bfloat16, 128>(p, q, k, v, map, extras, parts, out, launch.stream);
    else run<__nv_bfloat16, 64>(p, q, k, v, map, extras, parts, out, launch.stream);
  }
  return {out.o, out.o_sparse, out.o_linear, out.lse};
}

}  // namespace
}  // namespace triskele::cuda

TRISKELE_CUDA_OPS(m) { m.impl("sla_forward", TORCH_BOX(&triskele::cuda::sla_forward)); }
