// The critical blocks of a block map as lists: of every row of blocks (for whoever walks the keys of a query block) and
// of every column (for whoever walks the queries of a key block). Ascending, so sums along a list are deterministic.
#pragma once
#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/common/launch.cuh"

namespace triskele::cuda::lists {

using torch::stable::Tensor;

constexpr int kWarps = 8;  // of a thread block of both kernels
constexpr int8_t kCritical = 1;

// Of one direction. Line n of the map holds counts[n] entries, at entries + n * most.
struct Lists {
  int32_t* entries;  // [heads, lines, most]
  int32_t* counts;   // [heads, lines]
};

namespace {  // a copy a source, which the checks of compiled kernels then know by its name

// A warp a row of map [lines, blocks]: the columns that are critical.
template <int kWarpsABlock>
__global__ void __launch_bounds__(kWarpsABlock * 32) row_lists_kernel(const int8_t* map, int64_t lines, int blocks,
                                                                      Lists out) {
  const int lane = threadIdx.x % 32;
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kWarpsABlock + threadIdx.x / 32;
  if (line >= lines) return;
  const int8_t* kinds = map + line * blocks;
  int32_t* entries = out.entries + line * blocks;
  int count = 0;
  for (int first = 0; first < blocks; first += 32) {
    const int j = first + lane;
    const bool critical = j < blocks && kinds[j] == kCritical;
    const unsigned found = __ballot_sync(0xffffffffu, critical);
    if (critical) entries[count + __popc(found & ((1u << lane) - 1))] = j;
    count += __popc(found);
  }
  if (lane == 0) out.counts[line] = count;
}

// A thread block takes 32 columns of one head's map [rows, columns]; each warp a run of its rows: it counts, waits for
// the runs above to have counted, and writes.
template <int kWarpsABlock>
__global__ void __launch_bounds__(kWarpsABlock * 32) column_lists_kernel(const int8_t* map, int rows, int columns,
                                                                         Lists out) {
  __shared__ int counted[kWarpsABlock][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = (columns + 31) / 32;
  const int64_t head = blockIdx.x / parts;
  const int j = static_cast<int>(blockIdx.x % parts) * 32 + lane;
  const int run = (rows + kWarpsABlock - 1) / kWarpsABlock, first = warp * run, last = min(rows, first + run);
  const int8_t* kinds = map + head * rows * columns + j;
  int count = 0;
  if (j < columns)
    for (int i = first; i < last; ++i) count += kinds[static_cast<int64_t>(i) * columns] == kCritical;
  counted[warp][lane] = count;
  __syncthreads();
  if (j >= columns) return;
  int at = 0;
  for (int w = 0; w < warp; ++w) at += counted[w][lane];
  int32_t* entries = out.entries + (head * columns + j) * rows;
  for (int i = first; i < last; ++i)
    if (kinds[static_cast<int64_t>(i) * columns] == kCritical) entries[at++] = i;
  if (warp == kWarpsABlock - 1) out.counts[head * columns + j] = at;
}

}  // namespace

// Both directions of a map [B, H, rows, columns]; entries past a line's count are not written.
struct Both {
  Tensor rows, row_counts;        // [B, H, rows, columns], [B, H, rows]
  Tensor columns, column_counts;  // [B, H, columns, rows], [B, H, columns]
  static Lists view(Tensor& entries, Tensor& counts) {
    return {static_cast<int32_t*>(entries.mutable_data_ptr()), static_cast<int32_t*>(counts.mutable_data_ptr())};
  }
};

inline Both build(const Tensor& map, cudaStream_t stream) {
  constexpr auto kInt = torch::headeronly::ScalarType::Int;
  const int64_t batch = map.size(0), heads = map.size(1), rows = map.size(2), columns = map.size(3);
  Both out{torch::stable::new_empty(map, {batch, heads, rows, columns}, kInt),
           torch::stable::new_empty(map, {batch, heads, rows}, kInt),
           torch::stable::new_empty(map, {batch, heads, columns, rows}, kInt),
           torch::stable::new_empty(map, {batch, heads, columns}, kInt)};
  const int8_t* kinds = static_cast<const int8_t*>(map.const_data_ptr());
  const int64_t lines = batch * heads * rows, strips = batch * heads * ((columns + 31) / 32);
  if (lines > 0)
    launch_kernel(row_lists_kernel<kWarps>, dim3(static_cast<unsigned>((lines + kWarps - 1) / kWarps)),
                  dim3(kWarps * 32), 0, stream, kinds, lines, static_cast<int>(columns),
                  Both::view(out.rows, out.row_counts));
  if (strips > 0)
    launch_kernel(column_lists_kernel<kWarps>, dim3(static_cast<unsigned>(strips)), dim3(kWarps * 32), 0, stream, kinds,
                  static_cast<int>(rows), static_cast<int>(columns), Both::view(out.columns, out.column_counts));
  return out;
}

}  // namespace triskele::cuda::lists
