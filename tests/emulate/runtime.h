// A thread block on one CPU thread: every CUDA thread is a fiber that runs until it has to wait. Blocks run one after
// another, those of a cluster together. What waits (barriers, warp-wide operations, asynchronous copies) is written
// here; what a thread can do on its own is in device.h.
//
// Made to find mistakes, not to be fast:
//   - shared memory is filled with NaN bytes before each block, dynamic shared memory ends at an unmapped page;
//   - asynchronous work is done as late as its wait allows, and its destination holds NaN bytes until then;
//   - where no thread can go on, the launch ends in an error that says where each thread stands;
//   - order: "forward" runs blocks and threads by their number, "backward" the other way round, "random" by a seed.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <vector_types.h>

#define EMULATE_API __attribute__((visibility("default")))

namespace emulate {

// Ends the launch with this message (printf's format), from inside a kernel or outside.
[[noreturn]] EMULATE_API void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The same from a place that must not throw: the thread stops where it is.
[[noreturn]] EMULATE_API void abandon(const std::string& message);

// ---- where the running thread is ----------------------------------------------------------------------------------

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int number;   // of the thread in its block
};
extern EMULATE_API Position here;

inline int lane() { return here.number & 31; }
inline int warp() { return here.number >> 5; }

// ---- launch -------------------------------------------------------------------------------------------------------

// Runs the grid; `kernel` tells which library the static shared memory is in. Throws what a thread threw, or a
// deadlock. `cluster` neighbours along x are a cluster.
EMULATE_API void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
                     int cluster = 1);

// Of the device that is made up: few, so that a persistent kernel takes several tiles a block.
EMULATE_API int processors();

// ---- shared memory ------------------------------------------------------------------------------------------------

EMULATE_API void* dynamic_shared();
EMULATE_API size_t dynamic_shared_bytes();
// The 32-bit shared address of a pointer and back; an address outside the block's shared memory is an error.
EMULATE_API uint32_t shared_address(const void* pointer);
EMULATE_API unsigned char* shared_pointer(uint32_t address, size_t bytes);
EMULATE_API void check_shared(const void* pointer, size_t bytes, const char* what);

// ---- clusters -----------------------------------------------------------------------------------------------------

EMULATE_API int cluster_size();
EMULATE_API int cluster_rank();
// Does `work` with another block's shared memory and state in place of the running one's: what reaches across.
EMULATE_API void in_block(int rank, const char* what, const std::function<void()>& work);
// Waits until all threads of the cluster that have not exited are there.
EMULATE_API void cluster_sync();

// ---- waiting ------------------------------------------------------------------------------------------------------

// Suspends the running thread until wake(its number). What a deadlock report says of it: a format of two longs at most.
EMULATE_API void suspend(const char* format, long a = 0, long b = 0);
EMULATE_API void wake(int number);
// Lets the others go first.
EMULATE_API void yield();

// Barrier `id` (0-15) of `count` threads: waits until they are there, those that only arrive included.
EMULATE_API void barrier_sync(int id, int count);
EMULATE_API void barrier_arrive(int id, int count);
// The same for all threads of the block that have not exited, with the sum of `value` over them.
EMULATE_API int block_sum(int value);

// All lanes of `mask` that have not exited meet at an operation of this name; the last one runs `complete` on what each
// has brought (null for lanes that are not there), then all go on.
using Complete = void (*)(void* const* lanes, uint32_t mask, const void* context);
EMULATE_API void meet(const char* what, uint32_t mask, void* mine, Complete complete, const void* context = nullptr);

// ---- asynchronous work --------------------------------------------------------------------------------------------

constexpr unsigned char kPoison = 0xff;   // NaN in every float format here, -1 in integers

// Done when no thread can go on (or earlier, in random order).
EMULATE_API void later(std::function<void()> work);
// What a block must have finished or waited for: called, in this order, once all its threads have exited.
EMULATE_API void at_block_end(std::function<void()> check);
// What a deadlock report says besides where the threads stand.
EMULATE_API void at_deadlock(std::function<std::string()> describe);

// State of the running block, a fresh one for each block, by a key of its type.
EMULATE_API std::shared_ptr<void>& state_of_block(const void* key);
extern EMULATE_API uint64_t block_id;   // of the running block: no two have the same

template <class T>
T& of_block() {
  static uint64_t made_for = 0;
  static T* state = nullptr;
  if (made_for != block_id) {
    std::shared_ptr<void>& kept = state_of_block(&made_for);
    if (!kept) kept = std::make_shared<T>();
    state = static_cast<T*>(kept.get());
    made_for = block_id;
  }
  return *state;
}

}  // namespace emulate
