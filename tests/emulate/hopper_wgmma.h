// wgmma by the PTX ISA. Each warp computes its 16 of the 64 rows; the product runs at the wait that covers its group.
// From the issue on the accumulators hold NaN, and operands in shared memory may not change until the wait.
//
// Shared operands, in 16-byte pieces: the piece's address before swizzling is, for 128-, 64- and 32-byte swizzles
// (w = 8, 4, 2 pieces a row),
//   K-major    start + 16 p + 16 w (row % 8) + stride (row / 8)            p: piece along K (0, 1); row: along M or N
//   MN-major   start + 16 (p % w) + leading (p / w) + 16 w (k % 8) + stride (k / 8)      p: piece along M or N
// and without swizzle
//   K-major    start + leading p + 16 (row % 8) + stride (row / 8)
//   MN-major   start + stride p + 16 (k % 8) + leading (k / 8)
// Swizzling then exchanges address bits 4-6 (4-5, 4) by exclusive or with bits 7-9 (7-8, 7).
#pragma once

namespace triskele::cuda::emulated {

struct Descriptor {
  uint32_t start, leading, stride;
  int base, swizzle;   // swizzle: 3 = 128 bytes, 2 = 64, 1 = 32, 0 = none
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7), swizzle((4 - static_cast<int>(bits >> 62)) & 3) {
    if (base != 0) emulate::fail("wgmma: a descriptor with a base offset is not emulated");
    if (bits & 0x3ff1c000c000c000) emulate::fail("wgmma: reserved bits in a descriptor: %#lx", long(bits));
  }
  uint32_t address(bool mn_major, int p, int i) const {   // i: row (K-major) or k (MN-major)
    const uint32_t w = 1u << swizzle;
    uint32_t at = start + 16 * w * (i % 8);
    if (swizzle == 0) at += mn_major ? stride * p + leading * (i / 8) : leading * p + stride * (i / 8);
    else if (mn_major) at += 16 * (p % w) + leading * (p / w) + stride * (i / 8);
    else at += 16 * p + stride * (i / 8);
    return at ^ (at >> 7 & (w - 1)) << 4;
  }
  // [extent, 32 bytes] of rows first … first + extent - 1 along M or N, K within a row; E's size in bytes
  template <class E>
  std::vector<E> gather(bool mn_major, int first, int extent, const char* what) const {
    constexpr int kDepth = 32 / sizeof(E), kEach = 16 / sizeof(E);
    std::vector<E> tile(size_t(extent) * kDepth);
    E piece[kEach];
    const auto read = [&](int p, int i) {
      const unsigned char* from = emulate::shared_pointer(address(mn_major, p, i), 16);
      async_view().check(from, 16, what);
      memcpy(piece, from, 16);
    };
    if (mn_major) {
      for (int k = 0; k < kDepth; ++k)
        for (int p = 0; p < extent / kEach; ++p) {
          read(first / kEach + p, k);
          for (int e = 0; e < kEach; ++e) tile[size_t(p * kEach + e) * kDepth + k] = piece[e];
        }
    } else {
      for (int row = 0; row < extent; ++row)
        for (int p = 0; p < 2; ++p) {
          read(p, first + row);
          memcpy(&tile[size_t(row) * kDepth + p * kEach], piece, 16);
        }
    }
    return tile;
  }
};

// The accumulators of a warp that a product under way owns: their values live here, the registers hold NaN.
struct Accumulators {
  std::vector<uint32_t> values;   // [32 lanes, R]
  uint32_t* registers[32];
  int users = 0;
};

struct Product {
  uint32_t* key;                  // lane 0's accumulators
  std::function<void()> check;    // operands are as they were at the issue
  std::function<void(std::vector<uint32_t>&)> run;
};

struct Wgmma {
  struct Warp {
    std::vector<Product> open;
    std::deque<std::vector<Product>> closed;
    std::map<uint32_t*, Accumulators> busy;
    bool fenced = false;
    std::vector<uint64_t> history;   // what was issued: the same in the four warps of a warpgroup
  };
  std::vector<Warp> warp = std::vector<Warp>(32);
  Wgmma() { emulate::at_block_end([this] { finish(); }); }

  void finish() const {
    for (int w = 0; w < 32; ++w) {
      if (!warp[w].open.empty() || !warp[w].closed.empty())
        emulate::fail("warp %d has exited with wgmma groups not waited for", w);
      if (warp[w].history != warp[w / 4 * 4].history)
        emulate::fail("wgmma: warps %d and %d of a warpgroup have not executed the same products", w / 4 * 4, w);
    }
  }
  void retire(Warp& own) {
    for (Product& product : own.closed.front()) {
      product.check();
      Accumulators& held = own.busy.at(product.key);
      product.run(held.values);
      if (--held.users > 0) continue;
      const size_t each = held.values.size() / 32;
      for (int lane = 0; lane < 32; ++lane) memcpy(held.registers[lane], &held.values[lane * each], 4 * each);
      own.busy.erase(product.key);
    }
    own.closed.pop_front();
    own.fenced = false;   // registers are the program's again: the next product needs a fence
  }
};
inline Wgmma& wgmma_state() { return emulate::of_block<Wgmma>(); }

// A warp's step on its own state.
inline void wgmma_step(const char* what, emulate::Complete step, const void* context = nullptr) {
  emulate::meet(what, 0xffffffffu, nullptr, step, context);
}
inline void wgmma_fence() {
  wgmma_step("wgmma.fence",
             [](void* const*, uint32_t, const void*) { wgmma_state().warp[emulate::warp()].fenced = true; });
}
inline void wgmma_commit() {
  wgmma_step("wgmma.commit_group", [](void* const*, uint32_t, const void*) {
    auto& own = wgmma_state().warp[emulate::warp()];
    own.closed.push_back(std::move(own.open));
    own.open.clear();
  });
}
inline void wgmma_wait(int pending) {
  static int counts[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  wgmma_step("wgmma.wait_group", [](void* const*, uint32_t, const void* context) {
    auto& own = wgmma_state().warp[emulate::warp()];
    while (static_cast<int>(own.closed.size()) > *static_cast<const int*>(context)) wgmma_state().retire(own);
  }, &counts[pending]);
}

template <class E>
struct Element;
template <>
struct Element<__nv_bfloat16> : Bf16 {
  using Bits = uint16_t;
};
template <>
struct Element<__half> : F16 {
  using Bits = uint16_t;
};
template <>
struct Element<int8_t> : Integer<8, true> {
  using Bits = uint8_t;
};

// d[4 j + i]: row lane / 4 + 8 (i / 2) of the warp's 16, column 8 j + 2 (lane % 4) + i % 2
template <class E, int R>
void multiply(std::vector<uint32_t>& d, const std::vector<typename Element<E>::Bits>& a,
              const std::vector<typename Element<E>::Bits>& b, bool accumulate) {
  using Sum = typename Element<E>::Sum;
  constexpr int kDepth = 32 / sizeof(E), kColumns = 2 * R;
  static Sum right[kDepth][kColumns], sum[kColumns];
  for (int n = 0; n < kColumns; ++n)
    for (int k = 0; k < kDepth; ++k) right[k][n] = Element<E>::value(b[size_t(n) * kDepth + k]);
  for (int row = 0; row < 16; ++row) {
    const auto place = [&](int n) -> uint32_t& {
      const int lane = row % 8 * 4 + n % 8 / 2;
      return d[size_t(lane) * R + n / 8 * 4 + row / 8 * 2 + n % 2];
    };
    for (int n = 0; n < kColumns; ++n) sum[n] = accumulate ? std::bit_cast<Sum>(place(n)) : Sum(0);
    for (int k = 0; k < kDepth; ++k) {
      const Sum left = Element<E>::value(a[size_t(row) * kDepth + k]);
      for (int n = 0; n < kColumns; ++n) sum[n] += left * right[k][n];
    }
    for (int n = 0; n < kColumns; ++n) place(n) = std::bit_cast<uint32_t>(sum[n]);
  }
}

// kA, kB: whether the operand in shared memory is MN-major. a: the descriptor, or null and the four registers.
template <class E, bool kA, bool kB, int R, class D>
void issue(D (&d)[R], const uint64_t* a, const uint32_t* a_registers, uint64_t b, bool accumulate) {
  using Bits = typename Element<E>::Bits;
  constexpr int kDepth = 32 / sizeof(E), kEach = 4 / sizeof(E);
  struct Mine {
    uint32_t* d;
    const uint64_t* a;
    const uint32_t* a_registers;
    uint64_t b;
    bool accumulate;
  } mine{reinterpret_cast<uint32_t*>(d), a, a_registers, b, accumulate};
  emulate::meet("wgmma", 0xffffffffu, &mine, [](void* const* lanes, uint32_t there, const void*) {
    if (there != 0xffffffffu) emulate::fail("wgmma: lanes of the warp have exited");
    auto& own = wgmma_state().warp[emulate::warp()];
    const Mine& first = *static_cast<const Mine*>(lanes[0]);
    for (int lane = 1; lane < 32; ++lane) {
      const Mine& other = *static_cast<const Mine*>(lanes[lane]);
      if (other.b != first.b || other.accumulate != first.accumulate || (first.a != nullptr && *other.a != *first.a))
        emulate::fail("wgmma: lanes 0 and %d differ in a descriptor or in accumulate", lane);
    }
    for (const uint64_t word : {first.b, first.a ? *first.a : 0, uint64_t(first.accumulate) | R << 1})
      own.history.push_back(word);
    if (!own.fenced && !own.busy.count(first.d))
      emulate::fail("wgmma: no wgmma_fence since its registers were touched");

    Accumulators& held = own.busy[first.d];
    if (held.users++ == 0) {
      held.values.resize(32 * R);
      for (int lane = 0; lane < 32; ++lane) {
        held.registers[lane] = static_cast<const Mine*>(lanes[lane])->d;
        memcpy(&held.values[lane * R], held.registers[lane], 4 * R);
        memset(held.registers[lane], emulate::kPoison, 4 * R);
      }
    }

    std::vector<Bits> left(16 * kDepth);
    const int rows = emulate::warp() % 4 * 16;
    if (first.a == nullptr) {
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r)
          memcpy(&left[(lane / 4 + r % 2 * 8) * kDepth + r / 2 * kDepth / 2 + lane % 4 * kEach],
                 &static_cast<const Mine*>(lanes[lane])->a_registers[r], 4);
    } else {
      left = Descriptor(*first.a).gather<Bits>(kA, rows, 16, "wgmma's A");
    }
    std::vector<Bits> right = Descriptor(first.b).gather<Bits>(kB, 0, 2 * R, "wgmma's B");
    const bool shared_a = first.a != nullptr, accumulates = first.accumulate;
    const uint64_t a_bits = shared_a ? *first.a : 0, b_bits = first.b;
    own.open.push_back({first.d,
                        [=] {
                          if (shared_a && Descriptor(a_bits).gather<Bits>(kA, rows, 16, "wgmma's A") != left)
                            emulate::fail("wgmma: A in shared memory changed between its issue and its wait");
                          if (Descriptor(b_bits).gather<Bits>(kB, 0, 2 * R, "wgmma's B") != right)
                            emulate::fail("wgmma: B in shared memory changed between its issue and its wait");
                        },
                        [=](std::vector<uint32_t>& values) { multiply<E, R>(values, left, right, accumulates); }});
  });
}

}  // namespace triskele::cuda::emulated
