// The index arithmetic of the Hopper SLA forward, apart from the kernels so that a test on any machine can hold it:
// which tile a block takes when, which boxes of the tensors a stage loads, which keys of a block are there, and how
// work that would need too much memory is cut into groups of heads.
#pragma once
#include <cstdint>

namespace triskele::cuda::sla {

constexpr int kRows = 128;                   // queries a tile: two warpgroups of 64
constexpr int kBlock = 64;                   // keys a block of the map
constexpr int kStageKeys = 2 * kBlock;       // keys a stage: any two selected blocks, side by side
constexpr int kChunk = 64;                   // 16-bit elements in the 128 bytes of a swizzled row
constexpr uint64_t kEveryKey = ~uint64_t{0};

// Tiles in head-major order: blocks that run at the same time share a head, whose keys stay in L2.
struct Tile {
  int head;   // of all heads
  int block;  // of queries
};

struct Tiles {
  int first_head, heads, q_blocks;

  __host__ __device__ int64_t count() const { return static_cast<int64_t>(heads) * q_blocks; }
  __host__ __device__ Tile at(int64_t index) const {
    return {first_head + static_cast<int>(index / q_blocks), static_cast<int>(index % q_blocks)};
  }
};

// Stages of a tile with that many selected blocks; without any, one of two empty halves.
__host__ __device__ inline int stages_of(int selected) { return selected < 2 ? 1 : (selected + 1) / 2; }

// First key of the box for block j; j < 0 (an empty half) lies past the last key: TMA gives zeros.
__host__ __device__ inline int box_row(int j, int k_blocks) {
  return (j >= 0 ? j : k_blocks > 0 ? k_blocks : 1) * kBlock;
}

// Bit t: whether key t of block j is there. Block -1 has none.
__host__ __device__ inline uint64_t keys_there(int j, int keys) {
  if (j < 0) return 0;
  const int left = keys - j * kBlock;
  return left >= kBlock ? kEveryKey : (uint64_t{1} << left) - 1;
}

// Position in a ring of buffers: the slot, and the parity of the phase that the next wait on it is for.
template <int Slots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;

  __host__ __device__ void advance() {
    if (++slot == Slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Blocks of keys that one thread block sums into one state: `heads` heads in about `wanted` thread blocks, each of at
// least four blocks of keys.
inline int blocks_a_segment(int k_blocks, int heads, int wanted) {
  const int segments = wanted / (heads > 0 ? heads : 1) > 0 ? wanted / (heads > 0 ? heads : 1) : 1;
  const int blocks = (k_blocks + segments - 1) / segments;
  return blocks < 4 ? 4 : blocks;
}

// Heads whose states are held at a time: at most `limit` bytes of them, at least one head.
inline int heads_at_a_time(int heads, int64_t bytes_a_head, int64_t limit) {
  const int64_t fit = bytes_a_head > 0 ? limit / bytes_a_head : heads;
  return static_cast<int>(fit < 1 ? 1 : fit < heads ? fit : heads);
}

}  // namespace triskele::cuda::sla
