// What sm_90a has beyond sm_80: mbarriers, tiles loaded by TMA, register reallocation, and the warpgroup-wide matrix
// product wgmma. Thin wrappers, one instruction each; all the PTX of these is here. A warpgroup is 4 warps, the first
// of which is a multiple of 4; its threads are t = 0 … 127: warp w = t / 32, row r = t % 32 / 4, pair q = t % 4.
//
// SWIZZLED TILES. A tile of 128-byte rows, its first row at a multiple of 1024 bytes: the 16-byte piece p of row i lies
// at byte 128 i + 16 (p ^ (i % 8)). A TMA load with `swizzled` writes tiles so, wgmma reads them so, and
// `swizzled_offset` gives the offset to whoever touches them by hand. Wider matrices are several such tiles ("chunks")
// side by side.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"

namespace triskele::cuda {

// Bytes from the start of a swizzled tile to byte `byte` (0 … 127) of row `row`.
__host__ __device__ __forceinline__ uint32_t swizzled_offset(uint32_t row, uint32_t byte) {
  return row * 128 + (byte ^ (row % 8 * 16));
}

// ---- mbarriers ----------------------------------------------------------------------------------------------------
// A barrier completes a phase when `count` arrivals have come and all expected bytes have landed; phases alternate in
// parity, the first has parity 0. barrier_wait(b, p) returns once the phase of parity p has completed, so a fresh
// barrier lets a wait for parity 1 pass at once. What was written before an arrival is seen after the wait.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// After barrier_init and before __syncthreads: makes the barriers known to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival that also adds `bytes` to what the phase waits for. Before the loads that bring them.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity has completed; may suspend the thread for a while first.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
               "selp.u32 %0, 1, 0, done;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

// An arrival at the barrier that lies in block `rank` of the cluster where `barrier` lies in this one.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint64_t* barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
               ::"r"(shared_address(barrier)), "r"(rank)
               : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones by TMA and wgmma (another path to memory):
// after writing what wgmma reads, and before telling the producer that a buffer touched by hand may be overwritten.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- clusters -----------------------------------------------------------------------------------------------------
// Blocks that a launch with cluster dimensions places together may load into each other's shared memory and arrive at
// each other's barriers, from their first cluster_sync (after barrier_init and fence_barrier_init) to their last one.

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Waits for all threads of the cluster that have not exited. Whole warps execute it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- named barriers and registers ---------------------------------------------------------------------------------

// Barrier `id` (1 … 15; 0 is __syncthreads) among `threads` (a multiple of 32) of the block: sync waits, arrive does
// not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers a thread of this warpgroup, a multiple of 8 in 24 … 240; all its warps execute it.
template <int Registers>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// 2^x with a relative error of 2^-22; results below 2^-126 are zero. (exp2f spends three more instructions on those.)
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- TMA ----------------------------------------------------------------------------------------------------------

enum class TileType : int { kBFloat16, kFloat16, kInt8, kFloat32 };

// A tensor in global memory and the box of it that one load takes. Dimension 0 is the contiguous one. The box lies in
// shared memory row-major, its dimension 0 innermost; what lies outside the tensor is filled with zeros (and counts
// among the bytes). swizzled: box[0] is exactly 128 bytes, and every run of them is a row of a swizzled tile.
// base: a multiple of 16 bytes. stride[d] in bytes, a multiple of 16, d = 1 … rank - 1 (stride[0] is not read).
// size[d] in elements, at least 1. box[d] in elements, 1 … 256.
struct TileSource {
  TileType type;
  const void* base;
  int rank;  // 2 … 5
  int64_t size[5];
  int64_t stride[5];
  int box[5];
  bool swizzled;
};

// The map that tma_load takes, on the host. The driver's encoder is looked up at run time: nothing links against it.
inline CUtensorMap encode_tensor_map(const TileSource& source) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = nullptr;
  if (encode == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled: expected CUDA 12.0 or newer");
    encode = reinterpret_cast<Encode>(found);
  }
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], steps[5];
  for (int d = 0; d < source.rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(source.size[d]);
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(source.stride[d]);
    box[d] = static_cast<cuuint32_t>(source.box[d]);
    steps[d] = 1;
  }
  CUtensorMap map;
  const CUresult result = encode(&map, kTypes[static_cast<int>(source.type)], static_cast<cuuint32_t>(source.rank),
                                 const_cast<void*>(source.base), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 source.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refused a tile: CUresult " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

// `map` lies in constant or kernel-parameter memory (a __grid_constant__ argument), at a multiple of 64 bytes.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts the load of the box whose first element has the coordinates c0, c1, … (signed; may lie outside) into `to`
// (a multiple of 128 bytes, of 1024 where swizzled). Its bytes arrive at `barrier`. One thread executes it.
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
               : "memory");
}
// The same into every block of the cluster whose bit is set in `blocks`, at the same offset in its shared memory; the
// bytes arrive at each block's own barrier.
__device__ __forceinline__ void tma_load_2d_cluster(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                                    uint32_t blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4}], [%2], %5;"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
               "h"(static_cast<unsigned short>(blocks))
               : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                            int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                            int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void tma_load_5d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                            int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6, %7}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
               "r"(c4)
               : "memory");
}

// ---- wgmma --------------------------------------------------------------------------------------------------------
// D [64, N] += A [64, K] B [K, N]; K is 16 for 16-bit elements and 32 for int8: 32 bytes. The whole warpgroup executes
// each call together. R = N / 2 registers a thread; N is 64, 96, 128, 192 or 256.
//
//   accumulator   d[4 j + 0] = D[16 w + r,     8 j + 2 q]   d[4 j + 1] = D[16 w + r,     8 j + 2 q + 1]
//   j < N / 8     d[4 j + 2] = D[16 w + r + 8, 8 j + 2 q]   d[4 j + 3] = D[16 w + r + 8, 8 j + 2 q + 1]
//   A in          a[0] = A[16 w + r, e q …]    a[1] = A[16 w + r + 8, e q …]     e = 2 (16-bit) or 4 (int8) neighbours
//   registers     a[2] = A[16 w + r, K/2 + e q …]   a[3] = A[16 w + r + 8, K/2 + e q …]   the first in the lowest bits
//                 (so accumulators 8 i … 8 i + 7, rounded to 16 bits in pairs, are the A of columns 16 i … 16 i + 15)
//   A or B in     by descriptor, 128-byte swizzle:
//   shared        Major::kK   rows of the tile are rows of A (columns of B), 128 bytes along K each. `start` is the
//                             tile plus 32 bytes for each step of K within the chunk (at most 3); 8 rows lie 1024 bytes
//                             after the 8 before them, for all 64 (N) rows.
//                 Major::kMn  (16-bit elements alone) rows of the tile are steps of K, 64 elements along M or N each.
//                             `start` is the tile plus 2048 bytes for each 16 steps of K; the next 64 elements along M
//                             or N lie in another chunk, `chunk_bytes` after this one.
//
// Order: write registers and shared memory (then fence_proxy_async, and a barrier) -> wgmma_fence -> wgmma … ->
// wgmma_commit -> wgmma_wait. Between, nobody touches the accumulators or register A. wgmma_pin keeps the compiler
// from moving uses of registers over the wait: call it on the accumulators before the fence and after the wait. ptxas
// in turn moves a wait up over arithmetic of the same basic block that does not need it: what should run beside a
// product needs a loop or a branch (a barrier_wait, say) between itself and the wait.

enum class Major : int { kK = 0, kMn = 1 };

__device__ __forceinline__ uint64_t shared_descriptor(const void* start, Major major, uint32_t chunk_bytes = 0) {
  const uint64_t leading = major == Major::kMn ? chunk_bytes >> 4 : 1;  // the swizzled K-major layout does not read it
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | leading << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` of the newest groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <int R>
__device__ __forceinline__ void wgmma_pin(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R>
__device__ __forceinline__ void wgmma_pin(int32_t (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// The operand lists below: names of R accumulators in the instruction's text, and the accumulators themselves.
#define TRISKELE_NAMES_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define TRISKELE_NAMES_48 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
#define TRISKELE_NAMES_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define TRISKELE_NAMES_96 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
#define TRISKELE_NAMES_128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define TRISKELE_8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define TRISKELE_32(c) TRISKELE_8(c, 0), TRISKELE_8(c, 8), TRISKELE_8(c, 16), TRISKELE_8(c, 24)
#define TRISKELE_48(c) TRISKELE_32(c), TRISKELE_8(c, 32), TRISKELE_8(c, 40)
#define TRISKELE_64(c) TRISKELE_32(c), TRISKELE_8(c, 32), TRISKELE_8(c, 40), TRISKELE_8(c, 48), TRISKELE_8(c, 56)
#define TRISKELE_96(c) TRISKELE_64(c), TRISKELE_8(c, 64), TRISKELE_8(c, 72), TRISKELE_8(c, 80), TRISKELE_8(c, 88)
#define TRISKELE_128(c) TRISKELE_64(c), TRISKELE_8(c, 64), TRISKELE_8(c, 72), TRISKELE_8(c, 80), TRISKELE_8(c, 88), \
  TRISKELE_8(c, 96), TRISKELE_8(c, 104), TRISKELE_8(c, 112), TRISKELE_8(c, 120)
#define TRISKELE_F(x) "+f"(x)
#define TRISKELE_R(x) "+r"(x)

// One instruction: `rest` are the operands after the accumulators, p the one that says whether to accumulate.
#define TRISKELE_WGMMA_TEXT(shape, types, names, rest, p, tail) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n" \
  "wgmma.mma_async.sync.aligned." shape "." types " " names rest ", p" tail ";\n}\n"

template <class E, Major kA, Major kB, int R>
struct WgmmaHalf;  // R = 32, 48, 64, 96, 128

#define TRISKELE_WGMMA_ONE(E, types, R, N, p0, p1, p2, p3, p4, p5, p6) \
  template <Major kA, Major kB> \
  struct WgmmaHalf<E, kA, kB, R> { \
    static __device__ __forceinline__ void shared(float (&d)[R], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(TRISKELE_WGMMA_TEXT("m64n" #N "k16", types, TRISKELE_NAMES_##R, #p0 ", " #p1, #p2, \
                                       ", 1, 1, " #p3 ", " #p4) \
                   : TRISKELE_##R(TRISKELE_F) \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB))); \
    } \
    static __device__ __forceinline__ void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, \
                                                     int accumulate) { \
      asm volatile(TRISKELE_WGMMA_TEXT("m64n" #N "k16", types, TRISKELE_NAMES_##R, \
                                       "{" #p0 ", " #p1 ", " #p2 ", " #p3 "}, " #p4, #p5, ", 1, 1, " #p6) \
                   : TRISKELE_##R(TRISKELE_F) \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(static_cast<int>(kB))); \
    } \
  };
#define TRISKELE_WGMMA(R, N, ...) \
  TRISKELE_WGMMA_ONE(__nv_bfloat16, "f32.bf16.bf16", R, N, __VA_ARGS__) \
  TRISKELE_WGMMA_ONE(__half, "f32.f16.f16", R, N, __VA_ARGS__)
TRISKELE_WGMMA(32, 64, %32, %33, %34, %35, %36, %37, %38)
TRISKELE_WGMMA(48, 96, %48, %49, %50, %51, %52, %53, %54)
TRISKELE_WGMMA(64, 128, %64, %65, %66, %67, %68, %69, %70)
TRISKELE_WGMMA(96, 192, %96, %97, %98, %99, %100, %101, %102)
TRISKELE_WGMMA(128, 256, %128, %129, %130, %131, %132, %133, %134)

// D += A B (or D = A B where !accumulate), E __nv_bfloat16 or __half, both operands in shared memory.
template <class E, Major kA, Major kB, int R>
__device__ __forceinline__ void wgmma_shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaHalf<E, kA, kB, R>::shared(d, a, b, accumulate);
}

// The same with A in registers.
template <class E, Major kB, int R>
__device__ __forceinline__ void wgmma_registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  WgmmaHalf<E, Major::kK, kB, R>::registers(d, a, b, accumulate);
}

template <int R>
struct WgmmaS8;

#define TRISKELE_WGMMA_S8(R, N, p0, p1, p2, p3, p4, p5) \
  template <> \
  struct WgmmaS8<R> { \
    static __device__ __forceinline__ void shared(int32_t (&d)[R], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(TRISKELE_WGMMA_TEXT("m64n" #N "k32", "s32.s8.s8", TRISKELE_NAMES_##R, #p0 ", " #p1, #p2, "") \
                   : TRISKELE_##R(TRISKELE_R) \
                   : "l"(a), "l"(b), "r"(accumulate)); \
    } \
    static __device__ __forceinline__ void registers(int32_t (&d)[R], const uint32_t (&a)[4], uint64_t b, \
                                                     int accumulate) { \
      asm volatile(TRISKELE_WGMMA_TEXT("m64n" #N "k32", "s32.s8.s8", TRISKELE_NAMES_##R, \
                                       "{" #p0 ", " #p1 ", " #p2 ", " #p3 "}, " #p4, #p5, "") \
                   : TRISKELE_##R(TRISKELE_R) \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
    } \
  };
TRISKELE_WGMMA_S8(32, 64, %32, %33, %34, %35, %36, %37)
TRISKELE_WGMMA_S8(48, 96, %48, %49, %50, %51, %52, %53)
TRISKELE_WGMMA_S8(64, 128, %64, %65, %66, %67, %68, %69)
TRISKELE_WGMMA_S8(96, 192, %96, %97, %98, %99, %100, %101)
TRISKELE_WGMMA_S8(128, 256, %128, %129, %130, %131, %132, %133)

// int8 x int8 -> int32 (wraps around), both operands K-major.
template <int R>
__device__ __forceinline__ void wgmma_s8_shared(int32_t (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaS8<R>::shared(d, a, b, accumulate);
}
template <int R>
__device__ __forceinline__ void wgmma_s8_registers(int32_t (&d)[R], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  WgmmaS8<R>::registers(d, a, b, accumulate);
}

}  // namespace triskele::cuda
