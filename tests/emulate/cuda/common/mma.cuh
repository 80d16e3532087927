// csrc/cuda/common/mma.cuh for the emulator: the same names and signatures, by the PTX ISA's definitions of cp.async,
// ldmatrix and mma.sync. A warp's operation runs once all its lanes have come to it.
#pragma once

namespace triskele::cuda {

inline uint32_t shared_address(const void* pointer) { return emulate::shared_address(pointer); }

// ---- asynchronous copies: the destination is NaN from the issue to the wait of the thread that issued ---------------

namespace emulated {

struct Copies {
  struct Copy { unsigned char* to; unsigned char bytes[16]; };
  using Group = std::vector<Copy>;
  struct Own { Group open; std::deque<Group> closed; };
  std::vector<Own> thread = std::vector<Own>(1024);
  Own& own() { return thread[emulate::here.number]; }
};

inline void aligned_to(const void* pointer, uintptr_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    emulate::fail("%s: an address that is no multiple of %zu", what, size_t(bytes));
}

}  // namespace emulated

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulate::check_shared(shared, 16, "cp.async");
  emulated::aligned_to(shared, 16, "cp.async to");
  emulated::aligned_to(global, 16, "cp.async from");
  emulated::Copies::Copy copy{static_cast<unsigned char*>(shared), {}};
  if (valid) memcpy(copy.bytes, global, 16);
  memset(shared, emulate::kPoison, 16);
  emulate::of_block<emulated::Copies>().own().open.push_back(copy);
}

inline void copy_async_commit() {
  auto& own = emulate::of_block<emulated::Copies>().own();
  own.closed.push_back(std::move(own.open));
  own.open.clear();
}

template <int Pending>
inline void copy_async_wait() {
  auto& own = emulate::of_block<emulated::Copies>().own();
  for (; own.closed.size() > Pending; own.closed.pop_front())
    for (const auto& copy : own.closed.front()) memcpy(copy.to, copy.bytes, 16);
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

namespace emulated {

template <int Count, bool Transposed>
inline void ldmatrix(const char* what, uint32_t (&r)[Count], const void* row) {
  struct Mine { uint32_t* r; const unsigned char* row; } mine{r, static_cast<const unsigned char*>(row)};
  if (emulate::lane() < 8 * Count) {
    emulate::check_shared(row, 16, what);
    aligned_to(row, 16, what);
  }
  emulate::meet(what, 0xffffffffu, &mine, [](void* const* lanes, uint32_t, const void*) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < Count; ++j) {
        const auto element = [&](int of_row, int column) {   // 16 bits
          uint16_t bits;
          memcpy(&bits, static_cast<Mine*>(lanes[8 * j + of_row])->row + 2 * column, 2);
          return uint32_t(bits);
        };
        const int first = 2 * (lane % 4), other = lane / 4;
        static_cast<Mine*>(lanes[lane])->r[j] = Transposed ? element(first, other) | element(first + 1, other) << 16
                                                           : element(other, first) | element(other, first + 1) << 16;
      }
  });
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated::ldmatrix<4, false>("ldmatrix.x4", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulated::ldmatrix<4, true>("ldmatrix.x4.trans", r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulated::ldmatrix<2, false>("ldmatrix.x2", r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  emulated::ldmatrix<2, true>("ldmatrix.x2.trans", r, row);
}

// ---- mma.sync, m16n8 ------------------------------------------------------------------------------------------------

namespace emulated {

struct Bf16 {
  using Sum = float;
  static constexpr int kBits = 16;
  static float value(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
};
struct F16 {
  using Sum = float;
  static constexpr int kBits = 16;
  static float value(uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    return static_cast<float>(std::bit_cast<_Float16>(half));
  }
};
template <int Bits, bool Signed>
struct Integer {
  using Sum = uint32_t;   // wraps around
  static constexpr int kBits = Bits;
  static uint32_t value(uint32_t bits) {
    return Signed ? static_cast<uint32_t>(static_cast<int32_t>(bits << (32 - Bits)) >> (32 - Bits)) : bits;
  }
};

// A fragment's element i of 32 / bits in a register: K runs along the register first, then over the four lanes of a
// row; the second half of K has registers of its own.
template <class A, class B, class D>
inline void mma(const char* what, D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kEach = 32 / A::kBits, kHalf = 4 * kEach, kDepth = 2 * kHalf;
  static_assert(A::kBits == B::kBits);
  struct Mine { D* d; const uint32_t *a, *b; } mine{d, a, b};
  emulate::meet(what, 0xffffffffu, &mine, [](void* const* lanes, uint32_t, const void*) {
    using Sum = typename A::Sum;
    Sum left[16][kDepth], right[kDepth][8];
    constexpr uint32_t kMask = A::kBits == 32 ? ~0u : (1u << A::kBits) - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const Mine* own = static_cast<Mine*>(lanes[lane]);
      const int group = lane / 4, place = lane % 4 * kEach;
      for (int i = 0; i < kEach; ++i)
        for (int half = 0; half < 2; ++half) {
          const int k = half * kHalf + place + i;
          left[group][k] = A::value(own->a[2 * half] >> i * A::kBits & kMask);
          left[group + 8][k] = A::value(own->a[2 * half + 1] >> i * A::kBits & kMask);
          right[k][group] = B::value(own->b[half] >> i * A::kBits & kMask);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
      Mine* own = static_cast<Mine*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        Sum sum = std::bit_cast<Sum>(own->d[i]);
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
        own->d[i] = std::bit_cast<D>(sum);
      }
    }
  });
}

}  // namespace emulated

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<emulated::Bf16, emulated::Bf16>("mma.m16n8k16.bf16", d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<emulated::F16, emulated::F16>("mma.m16n8k16.f16", d, a, b);
}
template <class E>
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) mma_bf16(d, a, b);
  else mma_f16(d, a, b);
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<emulated::Integer<8, true>, emulated::Integer<8, true>>("mma.m16n8k32.s8", d, a, b);
}
inline void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<emulated::Integer<4, true>, emulated::Integer<4, true>>("mma.m16n8k64.s4", d, a, b);
}
inline void mma_u4s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<emulated::Integer<4, false>, emulated::Integer<4, true>>("mma.m16n8k64.u4.s4", d, a, b);
}

// ---- two 16-bit floats in a register ------------------------------------------------------------------------------

template <class E>
inline uint32_t pack_halves(float low, float high) {
  uint16_t bits[2];
  const E both[2] = {E(low), E(high)};
  memcpy(bits, both, 4);
  return uint32_t(bits[1]) << 16 | bits[0];
}

}  // namespace triskele::cuda
