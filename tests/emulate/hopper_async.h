// mbarriers and TMA loads by the PTX ISA: phases, pending arrivals and transaction bytes; boxes with zeros outside the
// tensor and the 128-byte swizzle. A load runs when no thread can go on (in random order also before); until then its
// destination holds NaN.
#pragma once
#include "tensor_map.h"

namespace triskele::cuda::emulated {

// What wgmma and TMA (the "async proxy") see of shared memory: ordinary writes reach it by fence.proxy.async. One
// thread's fence publishes what every thread has written: a missing fence is found, one by the wrong thread is not.
class AsyncView {
 public:
  void take_all() { memcpy(seen_.data(), base_, seen_.size()); }
  void take(const void* from, size_t bytes) {
    const size_t at = static_cast<const unsigned char*>(from) - base_;
    if (at < seen_.size()) memcpy(seen_.data() + at, from, std::min(bytes, seen_.size() - at));
  }
  void check(const void* pointer, size_t bytes, const char* what) const {
    const size_t at = static_cast<const unsigned char*>(pointer) - base_;
    if (at < seen_.size() && memcmp(seen_.data() + at, pointer, bytes) != 0)
      emulate::fail("%s reads byte %zu of shared memory, which was written without fence_proxy_async after it", what,
                    at);
  }

 private:
  const unsigned char* base_ = static_cast<const unsigned char*>(emulate::dynamic_shared());
  std::vector<unsigned char> seen_ = std::vector<unsigned char>(emulate::dynamic_shared_bytes(), emulate::kPoison);
};
inline AsyncView& async_view() { return emulate::of_block<AsyncView>(); }

class Barriers {
 public:
  Barriers() {
    emulate::at_deadlock([this] { return describe(); });
    emulate::at_block_end([this] { finish(); });
  }

  void init(uint64_t* at, uint32_t count) {
    emulate::check_shared(at, 8, "mbarrier.init");
    if (count < 1 || count >= 1u << 20) emulate::fail("mbarrier.init with a count of %u", count);
    if (barriers_.count(at)) emulate::fail("mbarrier.init of one that is in use");
    barriers_[at] = {count, count, 0, 0, false, {}};
    *at = mark(at);
  }
  void make_known() {
    for (auto& [at, barrier] : barriers_) barrier.known = true;
  }
  void arrive(uint64_t* at, uint32_t bytes) {
    Barrier& barrier = find(at);
    barrier.bytes += bytes;
    if (barrier.pending == 0)
      emulate::fail("mbarrier %s: an arrival more than its count of %u", name(at).c_str(), barrier.count);
    --barrier.pending;
    complete_if_done(barrier);
  }
  void bytes_arrive(uint64_t* at, int64_t bytes) {
    Barrier& barrier = find(at);
    barrier.bytes -= bytes;
    complete_if_done(barrier);
  }
  void wait(uint64_t* at, uint32_t parity) {
    if (parity > 1) emulate::fail("mbarrier wait for a parity of %u", parity);
    while (find(at).parity == parity) {
      find(at).waiting.push_back(emulate::here.number);
      emulate::suspend("mbarrier at shared byte %ld, parity %ld", place(at), parity);
    }
  }
  void check_known(uint64_t* at) {
    if (!find(at).known)
      emulate::fail("a TMA load to mbarrier %s, which no fence_barrier_init has made known", name(at).c_str());
  }

 private:
  struct Barrier {
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;       // expected less arrived
    uint32_t parity = 0;     // of the phase under way
    bool known = false;
    std::vector<int> waiting;
  };

  static uint64_t mark(const uint64_t* at) { return reinterpret_cast<uintptr_t>(at) * 0x9e3779b97f4a7c15u; }
  static long place(const uint64_t* at) {   // from the start of dynamic shared memory
    return long(emulate::shared_address(at)) - long(emulate::shared_address(emulate::dynamic_shared()));
  }
  static std::string name(const uint64_t* at) { return "at shared byte " + std::to_string(place(at)); }
  Barrier& find(uint64_t* at) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end()) emulate::fail("mbarrier %s was not initialised", name(at).c_str());
    if (*at != mark(at)) emulate::fail("mbarrier %s was overwritten", name(at).c_str());
    return found->second;
  }
  void complete_if_done(Barrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.count;
    barrier.parity ^= 1;
    for (int number : barrier.waiting) emulate::wake(number);
    barrier.waiting.clear();
  }
  std::string describe() const {
    std::string text;
    for (const auto& [at, barrier] : barriers_)
      text += "\n  mbarrier " + name(at) + ": phase of parity " + std::to_string(barrier.parity) + ", " +
              std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) + " arrivals and " +
              std::to_string(barrier.bytes) + " bytes to come";
    return text;
  }
  void finish() const {
    for (const auto& [at, barrier] : barriers_)
      if (barrier.bytes != 0)
        emulate::fail("mbarrier %s: at the end, %ld bytes expected that did not come (negative: came unexpected)",
                      name(at).c_str(), static_cast<long>(barrier.bytes));
  }

  std::map<uint64_t*, Barrier> barriers_;
};
inline Barriers& barriers() { return emulate::of_block<Barriers>(); }

// Starts a load into the block whose state is in place, at these shared addresses.
inline void start_load(uint32_t address, uint32_t signal, const emulate::TensorMap& map,
                       const std::array<int64_t, 5>& corner, size_t total) {
  unsigned char* const target = emulate::shared_pointer(address, total);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(emulate::shared_pointer(signal, 8));
  barriers().check_known(barrier);
  memset(target, emulate::kPoison, total);
  async_view().take(target, total);
  emulate::later([=] {
    const size_t run = size_t(map.box[0]) * map.element_bytes;
    std::vector<unsigned char> row(run);
    for (size_t offset = 0, index = 0; offset < total; offset += run, ++index) {
      const auto* from = reinterpret_cast<const unsigned char*>(map.base);
      bool inside = true;
      size_t rest = index;
      for (int d = 1; d < map.rank; ++d) {
        const int64_t place = corner[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside = inside && place >= 0 && place < static_cast<int64_t>(map.size[d]);
        from += place * static_cast<int64_t>(map.stride[d - 1]);
      }
      std::fill(row.begin(), row.end(), 0);
      for (int i = 0; inside && i < map.box[0]; ++i) {
        const int64_t place = corner[0] + i;
        if (place >= 0 && place < static_cast<int64_t>(map.size[0]))
          memcpy(row.data() + i * map.element_bytes, from + place * map.element_bytes, map.element_bytes);
      }
      for (size_t piece = 0; piece < run; piece += 16) {
        uint32_t where = address + static_cast<uint32_t>(offset + piece);
        if (map.swizzle > 0) where ^= (where >> 7 & ((1u << map.swizzle) - 1)) << 4;   // 128 bytes: bits 4-6 by 7-9
        memcpy(emulate::shared_pointer(where, 16), row.data() + piece, std::min<size_t>(16, run - piece));
      }
    }
    async_view().take(target, total);
    barriers().bytes_arrive(barrier, static_cast<int64_t>(total));
  });
}

// blocks: those of the cluster that get the tile and the signal, at the same shared addresses; 0 for this block alone.
inline void tma_load(void* to, const CUtensorMap* encoded, uint64_t* barrier, std::initializer_list<int> at,
                     uint32_t blocks = 0) {
  const auto map = *reinterpret_cast<const emulate::TensorMap*>(encoded);
  if (map.mark != emulate::TensorMap::kMark) emulate::fail("TMA: not a tensor map");
  if (map.rank != at.size()) emulate::fail("TMA: %zu coordinates for a tensor of rank %d", at.size(), map.rank);
  aligned_to(to, 128, "TMA to");
  size_t total = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) total *= map.box[d];
  emulate::check_shared(to, total, "TMA");
  emulate::check_shared(barrier, 8, "TMA's mbarrier");
  std::array<int64_t, 5> corner{};
  std::copy(at.begin(), at.end(), corner.begin());
  const uint32_t address = emulate::shared_address(to), signal = emulate::shared_address(barrier);
  if (blocks == 0) return start_load(address, signal, map, corner, total);
  for (int rank = 0; rank < 32; ++rank)
    if (blocks >> rank & 1)
      emulate::in_block(rank, "TMA", [&] { start_load(address, signal, map, corner, total); });
}

// An arrival at the barrier of another block of the cluster that lies where `barrier` lies in this one.
inline void arrive_in_cluster(uint64_t* barrier, int rank) {
  const uint32_t address = emulate::shared_address(barrier);
  emulate::in_block(rank, "mbarrier.arrive", [&] {
    barriers().arrive(reinterpret_cast<uint64_t*>(emulate::shared_pointer(address, 8)), 0);
  });
}

// setmaxnreg: what the warpgroups ask for in the end must fit what the launch can have given the block.
struct Registers {
  std::map<int, int> of_group;
  Registers() {
    emulate::at_block_end([this] {
      const dim3 size = emulate::here.block_size;
      const int threads = static_cast<int>(size.x * size.y * size.z);
      const int groups = threads / 128, given = std::min(65536 / threads / 8 * 8, 255) * groups;
      int sum = 0;
      for (const auto& [group, registers] : of_group) sum += registers;
      if (static_cast<int>(of_group.size()) == groups && sum > given)
        emulate::fail("setmaxnreg: warpgroups ask for %d registers a thread together, the block has %d", sum, given);
    });
  }
};
inline void set_registers(int registers) {
  if (registers < 24 || registers > 256 || registers % 8) emulate::fail("setmaxnreg of %d", registers);
  emulate::of_block<Registers>().of_group[emulate::warp() / 4] = registers;
}

}  // namespace triskele::cuda::emulated
