// csrc/cuda/common/hopper.cuh for the emulator. What only computes numbers there (descriptors, offsets, the encoding of
// a tensor map) is taken from that very header; what executes an instruction is in hopper_async.h and hopper_wgmma.h.
#pragma once
#include <cuda.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"

namespace triskele_real {
namespace triskele::cuda {
using ::triskele::cuda::shared_address;
}
#include "../../../../csrc/cuda/common/hopper.cuh"
}  // namespace triskele_real

#include "hopper_async.h"
#include "hopper_wgmma.h"

namespace triskele::cuda {

namespace real = ::triskele_real::triskele::cuda;
using real::Major;
using real::TileSource;
using real::TileType;
using real::encode_tensor_map;
using real::shared_descriptor;
using real::swizzled_offset;

// ---- mbarriers ----------------------------------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier, uint32_t count) { emulated::barriers().init(barrier, count); }
inline void fence_barrier_init() { emulated::barriers().make_known(); }
inline void barrier_arrive(uint64_t* barrier) { emulated::barriers().arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulated::barriers().arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulated::barriers().wait(barrier, parity); }
inline bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(barrier, parity);   // it "may suspend the thread for a while"
  return true;
}
inline void barrier_arrive_in_cluster(uint64_t* barrier, int rank) { emulated::arrive_in_cluster(barrier, rank); }
inline void fence_proxy_async() { emulated::async_view().take_all(); }

// ---- clusters -----------------------------------------------------------------------------------------------------

inline int cluster_rank() { return emulate::cluster_rank(); }
inline void cluster_sync() { emulate::cluster_sync(); }

// ---- named barriers and registers ---------------------------------------------------------------------------------

inline void named_barrier_sync(int id, int threads) { emulate::barrier_sync(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulate::barrier_arrive(id, threads); }
template <int Registers>
inline void registers_shrink() { emulated::set_registers(Registers); }
template <int Registers>
inline void registers_grow() { emulated::set_registers(Registers); }

inline float exp2_fast(float x) { return x < -126 ? 0.f : exp2f(x); }

// ---- TMA ----------------------------------------------------------------------------------------------------------

inline void tma_prefetch(const CUtensorMap*) {}
inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  emulated::tma_load(to, map, barrier, {c0, c1});
}
inline void tma_load_2d_cluster(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, uint32_t blocks) {
  if (blocks == 0) emulate::fail("TMA: a load to no block of the cluster");
  emulated::tma_load(to, map, barrier, {c0, c1}, blocks);
}
inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  emulated::tma_load(to, map, barrier, {c0, c1, c2});
}
inline void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  emulated::tma_load(to, map, barrier, {c0, c1, c2, c3});
}
inline void tma_load_5d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
  emulated::tma_load(to, map, barrier, {c0, c1, c2, c3, c4});
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

inline void wgmma_fence() { emulated::wgmma_fence(); }
inline void wgmma_commit() { emulated::wgmma_commit(); }
template <int Pending>
inline void wgmma_wait() { emulated::wgmma_wait(Pending); }
template <int R>
inline void wgmma_pin(float (&)[R]) {}
template <int R>
inline void wgmma_pin(int32_t (&)[R]) {}

template <class E, Major kA, Major kB, int R>
inline void wgmma_shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  emulated::issue<E, kA == Major::kMn, kB == Major::kMn, R>(d, &a, nullptr, b, accumulate);
}
template <class E, Major kB, int R>
inline void wgmma_registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulated::issue<E, false, kB == Major::kMn, R>(d, nullptr, a, b, accumulate);
}
template <int R>
inline void wgmma_s8_shared(int32_t (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  emulated::issue<int8_t, false, false, R>(d, &a, nullptr, b, accumulate);
}
template <int R>
inline void wgmma_s8_registers(int32_t (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulated::issue<int8_t, false, false, R>(d, nullptr, a, b, accumulate);
}

}  // namespace triskele::cuda
