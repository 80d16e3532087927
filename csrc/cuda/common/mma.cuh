// What every chip from sm_80 on has: asynchronous 16-byte copies into shared memory, ldmatrix, and the warp-wide matrix
// product mma.sync. Thin wrappers, one instruction each; all the PTX of these is here.
//
// A warp's lane l: row r = l / 4, pair q = l % 4. Fragments of D[16, 8] += A[16, K] B[K, 8], each register 32 bits
// wide and holding e = 32 / bits neighbouring elements along K, the first in the lowest bits (K = 8 e):
//
//   a[0] = A[r,     e q …]        a[1] = A[r + 8,     e q …]        (e elements from column e q on)
//   a[2] = A[r, K/2 + e q …]      a[3] = A[r + 8, K/2 + e q …]
//   b[0] = B[e q …, r]            b[1] = B[K/2 + e q …, r]          (e elements from row e q on, of column r)
//   d[0] = D[r, 2 q]   d[1] = D[r, 2 q + 1]   d[2] = D[r + 8, 2 q]   d[3] = D[r + 8, 2 q + 1]
//
// So the four 8 x 16-byte matrices of one ldmatrix_x4 on rows of A (row i of matrix j: lane 8 j + i names its
// address), taken in the order (rows 0-7, first 16 bytes), (rows 8-15, first), (rows 0-7, second), (rows 8-15,
// second), are a[0…3] for every element width; likewise B stored by columns ([8, K] row-major) gives b[0], b[1] by
// its first and second 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace triskele::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- asynchronous copies ------------------------------------------------------------------------------------------

// shared[0…15] = valid ? global[0…15] : 0, through L2 only; both addresses in multiples of 16. `global` is not read
// where !valid, but must be an address of some array all the same.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's newest groups are under way (0: none). Other threads' copies need a
// barrier.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

// r[j] of lane l = bytes 4 (l % 4) … + 3 of row l / 4 of matrix j, whose row i is the 16 bytes at lane (8 j + i)'s
// `row`.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Each matrix, of 8 x 8 16-bit elements, transposed: r[j] of lane l = elements [2 (l % 4)][l / 4] (low half) and
// [2 (l % 4) + 1][l / 4] (high half) of matrix j.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices: lanes 0-15 name the rows; the other lanes' addresses are not used, but must be valid.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- D += A B -----------------------------------------------------------------------------------------------------

// [16, 16] @ [16, 8] of bfloat16, accumulated in float32
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// [16, 16] @ [16, 8] of float16, accumulated in float32
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// One of the two by its element type.
template <class E>
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_half<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_bf16(d, a, b);
}
template <>
__device__ __forceinline__ void mma_half<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_f16(d, a, b);
}

// [16, 32] @ [32, 8] of int8, accumulated in int32 (wraps around)
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// [16, 64] @ [64, 8] of 4-bit two's complement, accumulated in int32. An instruction of sm_80 … sm_89; newer chips take
// it apart into int8 products.
__device__ __forceinline__ void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with A of 0 … 15.
__device__ __forceinline__ void mma_u4s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- two 16-bit floats in a register ------------------------------------------------------------------------------

// `low` in bits 0-15, `high` in bits 16-31, each rounded to nearest even
template <class E>
__device__ __forceinline__ uint32_t pack_halves(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_halves<__nv_bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack_halves<__half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

}  // namespace triskele::cuda
