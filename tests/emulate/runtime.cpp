// The scheduler behind runtime.h.
#include "runtime.h"

#include "context.h"
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include <dlfcn.h>

namespace emulate {

Position here;
uint64_t block_id = 0;

namespace {

struct Thread {
  Context context;
  uint3 index{};
  bool done = false, ready = false;
  const char* waits = "its turn";   // a format of `numbers`
  long numbers[2] = {};
};

struct Barrier {
  int count = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Meeting {
  const char* what;
  uint32_t mask, there;
  void* lanes[32];
  Complete complete;
  const void* context;
  std::vector<int> waiting;
};

struct Block {
  uint64_t id = 0;
  int rank = 0;                               // in its cluster
  uint3 index{};
  int threads = 0, alive = 0;
  std::vector<Thread> thread;
  std::deque<int> ready;
  Barrier barrier[16];
  int sum = 0, sum_arrived = 0, sum_result = 0;
  std::vector<int> sum_waiting;
  std::vector<std::list<Meeting>> meetings;   // by warp
  std::vector<uint32_t> exited;               // lanes by warp
  std::deque<std::function<void()>> work;
  std::vector<std::function<void()>> checks;
  std::vector<std::function<std::string()>> notes;
  std::map<const void*, std::shared_ptr<void>> states;
  std::vector<unsigned char> statics;         // static shared variables while another block of the cluster runs
  std::string error;
};

struct Cluster {
  std::vector<Block> blocks;
  int arrived = 0;                            // at the cluster's barrier
  int favoured = 0;                           // rank, in random order
  std::vector<std::pair<Block*, int>> waiting;
};

enum class Order { forward, backward, random };
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;
  int processors = 3;
};
Settings settings;

Cluster* cluster = nullptr;
Block* running = nullptr;   // the block of the thread that runs
Block* block = nullptr;     // the block whose memory and state are in place: that one, but for in_block
Context scheduler;
uint64_t blocks_begun = 0;
const std::function<void()>* kernel_body = nullptr;
std::mt19937_64 dice;

std::string position() {
  if (block == nullptr) return "outside of a kernel";
  char text[160];
  snprintf(text, sizeof text, "block (%u, %u, %u), thread %d", here.block.x, here.block.y, here.block.z, here.number);
  return text;
}

// Lowers the fence of tests/fence.c where ops are guarded: a launcher's allocations are fenced, the emulator's not.
struct OutsideFence {
  using Fence = void (*)(int);
  const Fence fence =
      std::getenv("TRISKELE_EMULATE_GUARD") ? reinterpret_cast<Fence>(dlsym(RTLD_DEFAULT, "fence")) : nullptr;
  OutsideFence() { if (fence) fence(0); }
  ~OutsideFence() { if (fence) fence(1); }
};

void require_kernel() {
  if (block == nullptr) fail("a device operation outside of a kernel");
}

// ---- scheduling ---------------------------------------------------------------------------------------------------

void make_ready(Block& of, int number) {
  Thread& thread = of.thread[number];
  if (thread.ready || thread.done) return;
  thread.ready = true;
  of.ready.push_back(number);
}
void make_ready(int number) { make_ready(*block, number); }

// Puts a block's memory and state in place.
void take(Block& next) {
  if (block == &next) return;
  if (block != nullptr) block->statics.assign(statics.at, statics.at + statics.bytes);
  std::copy(next.statics.begin(), next.statics.end(), statics.at);
  block = &next;
  block_id = next.id;
  take_shared(next.rank);
}

void run_next(Block& next) {
  take(next);
  running = &next;
  here.block = next.index;
}

int next_ready() {
  auto& ready = block->ready;
  size_t at = 0;
  if (settings.order == Order::backward) at = ready.size() - 1;
  if (settings.order == Order::random) at = dice() % ready.size();
  const int number = ready[at];
  ready.erase(ready.begin() + at);
  block->thread[number].ready = false;
  return number;
}

void settle(std::list<Meeting>& meetings, int warp);
void settle_barriers();
void settle_cluster();

void thread_entry() {
  const int number = here.number;
  try {
    (*kernel_body)();
  } catch (const std::exception& error) {
    if (block->error.empty()) block->error = error.what();
  }
  Thread& thread = block->thread[number];
  thread.done = true;
  --block->alive;
  block->exited[number / 32] |= 1u << (number % 32);
  if (block->error.empty()) {
    try {
      settle(block->meetings[number / 32], number / 32);
      settle_barriers();
      settle_cluster();
    } catch (const std::exception& error) {
      block->error = error.what();
    }
  }
  switch_context(&thread.context, &scheduler);
  std::abort();   // never resumed
}

void resume(int number) {
  Thread& thread = block->thread[number];
  here.thread = thread.index;
  here.number = number;
  switch_context(&scheduler, &thread.context);
}

std::string who_waits_where() {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < block->threads; ++i) {
    const Thread& thread = block->thread[i];
    char what[160];
    snprintf(what, sizeof what, thread.done ? "exited" : thread.waits, thread.numbers[0], thread.numbers[1]);
    groups[what].push_back(i);
  }
  std::string text;
  for (const auto& [what, numbers] : groups) {
    text += "\n  ";
    for (size_t i = 0; i < numbers.size(); ++i) {
      size_t j = i;
      while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
      text += (i == 0 ? "threads " : ", ") + std::to_string(numbers[i]);
      if (j > i) text += "-" + std::to_string(numbers[j]);
      i = j;
    }
    text += ": " + what;
  }
  for (const auto& note : block->notes) text += note();
  return text;
}

// One of the blocks for which `can` holds, by the order; null where there is none.
template <class Can>
Block* pick(const Can& can) {
  std::vector<Block*> found;
  for (Block& each : cluster->blocks)
    if (can(each)) found.push_back(&each);
  if (found.empty()) return nullptr;
  if (settings.order == Order::backward) return found.back();
  if (settings.order == Order::random && found.size() > 1) {   // one block runs ahead for a while, then another
    if (dice() % 64 == 0) cluster->favoured = static_cast<int>(dice() % cluster->blocks.size());
    for (Block* each : found)
      if (each->rank == cluster->favoured) return each;
  }
  return found.front();
}

void work_once(Block& of) {
  run_next(of);
  auto work = std::move(of.work.front());
  of.work.pop_front();
  work();
}

const std::string& first_error() {
  static const std::string none;
  for (const Block& each : cluster->blocks)
    if (!each.error.empty()) return each.error;
  return none;
}

std::string deadlock() {
  std::string text;
  for (Block& each : cluster->blocks) {
    run_next(each);
    text += (text.empty() ? "deadlock in " : "\n  ") + position().substr(0, position().find(", thread")) + ":" +
            who_waits_where();
  }
  return text;
}

void run_cluster() {
  const auto can_work = [](const Block& each) { return !each.work.empty(); };
  const auto can_run = [](const Block& each) { return !each.ready.empty(); };
  const auto lives = [](const Block& each) { return each.alive > 0; };
  auto& blocks = cluster->blocks;
  while (first_error().empty() && std::any_of(blocks.begin(), blocks.end(), lives)) {
    Block* const works = pick(can_work);
    const bool early = settings.order == Order::random && works != nullptr && dice() % 16 == 0;
    Block* const runs = early ? nullptr : pick(can_run);
    if (runs != nullptr) {
      run_next(*runs);
      resume(next_ready());
    } else if (works != nullptr) {
      work_once(*works);
    } else {
      block->error = deadlock();
    }
  }
  while (first_error().empty()) {
    Block* const works = pick(can_work);
    if (works == nullptr) break;
    work_once(*works);
  }
  if (!first_error().empty()) return;
  for (Block& each : blocks) {
    run_next(each);
    for (const auto& check : each.checks) check();
    for (int id = 0; id < 16; ++id)
      if (each.barrier[id].arrived > 0)
        fail("barrier %d: all threads have exited, but %d of %d have arrived", id, each.barrier[id].arrived,
             each.barrier[id].count);
  }
}

// ---- barriers -----------------------------------------------------------------------------------------------------

void arrive(int id, int count, bool wait) {
  require_kernel();
  if (id < 0 || id > 15) fail("barrier %d: there are barriers 0-15", id);
  if (id == 0 && count != block->threads)
    fail("barrier 0 is __syncthreads's: expected %d threads, got %d", block->threads, count);
  if (count <= 0 || count % 32 != 0 || count > (block->threads + 31) / 32 * 32)
    fail("barrier %d of %d threads: expected a multiple of 32 up to the block's %d", id, count, block->threads);
  Barrier& barrier = block->barrier[id];
  if (barrier.arrived > 0 && barrier.count != count)
    fail("barrier %d: one thread says %d, another %d threads", id, barrier.count, count);
  barrier.count = count;
  if (++barrier.arrived < count) {
    if (!wait) return;
    barrier.waiting.push_back(here.number);
    suspend("barrier %ld of %ld", id, count);
    return;
  }
  barrier.arrived = 0;
  for (int number : barrier.waiting) make_ready(number);
  barrier.waiting.clear();
}

void settle_barriers() {
  if (block->sum_arrived > 0 && block->sum_arrived == block->alive) {
    block->sum_result = block->sum;
    block->sum = block->sum_arrived = 0;
    for (int number : block->sum_waiting) make_ready(number);
    block->sum_waiting.clear();
  }
}

void settle_cluster() {
  int alive = 0;
  for (const Block& each : cluster->blocks) alive += each.alive;
  if (cluster->arrived == 0 || cluster->arrived < alive) return;
  cluster->arrived = 0;
  for (const auto& [of, number] : cluster->waiting) make_ready(*of, number);
  cluster->waiting.clear();
}

// Ends every meeting of the warp at which all have arrived.
void settle(std::list<Meeting>& meetings, int warp) {
  for (auto at = meetings.begin(); at != meetings.end();) {
    if ((at->mask & ~at->there & ~block->exited[warp]) == 0) {
      at->complete(at->lanes, at->there, at->context);
      for (int number : at->waiting) make_ready(number);
      at = meetings.erase(at);
    } else {
      ++at;
    }
  }
}

// Bytes of the running block's region around its dynamic shared memory, which has to stay as it was.
unsigned char* region_start() { return shared_base - 1024; }   // within the region: the largest size leaves that much
unsigned char* region_end() { return reinterpret_cast<unsigned char*>(shared_region) + kPage + kSharedRegion; }

void begin_block(Block& fresh, int rank, uint64_t place, dim3 grid, dim3 size) {
  const int threads = static_cast<int>(size.x * size.y * size.z);
  fresh.id = ++blocks_begun;
  fresh.rank = rank;
  fresh.index = {static_cast<unsigned>(place % grid.x), static_cast<unsigned>(place / grid.x % grid.y),
                 static_cast<unsigned>(place / grid.x / grid.y)};
  fresh.statics.assign(statics.bytes, kPoison);
  run_next(fresh);
  memset(region_start(), kPoison, region_end() - region_start());
  fresh.threads = fresh.alive = threads;
  fresh.thread.resize(threads);
  fresh.meetings.resize((threads + 31) / 32);
  fresh.exited.assign((threads + 31) / 32, 0);
  if (threads % 32 != 0) fresh.exited.back() = ~0u << (threads % 32);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = fresh.thread[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    make_context(&thread.context, stacks + (rank * threads + i) * kStack + kPage, kStack - kPage, thread_entry);
    make_ready(i);
  }
}

void run_grid(const std::function<void()>& body, dim3 grid, dim3 size, int together) {
  kernel_body = &body;
  here.block_size = size;
  here.grid_size = grid;
  dice.seed(settings.seed);
  std::vector<uint64_t> places(uint64_t(grid.x) * grid.y * grid.z / together);
  std::iota(places.begin(), places.end(), 0);
  if (settings.order == Order::backward) std::reverse(places.begin(), places.end());
  if (settings.order == Order::random) std::shuffle(places.begin(), places.end(), dice);
  for (const uint64_t place : places) {
    Cluster fresh;
    fresh.blocks.resize(together);
    cluster = &fresh;
    block = nullptr;
    for (int rank = 0; rank < together; ++rank)
      begin_block(fresh.blocks[rank], rank, place * together + rank, grid, size);
    run_cluster();
    if (const std::string error = first_error(); !error.empty()) throw std::runtime_error("emulate: " + error);
    for (Block& each : fresh.blocks) {
      run_next(each);
      const unsigned char* const end = region_end();
      for (const unsigned char* at = region_start(); at < end; at += at == shared_base - 1 ? shared_bytes + 1 : 1)
        if (*at != kPoison)
          fail("write at byte %td of %zu bytes of dynamic shared memory", at - shared_base, shared_bytes);
    }
    block = nullptr;
  }
}

// A line for tests/cuda_offline.py: library, kernel's place in it, threads, dynamic shared bytes.
void write_down(const void* kernel, int threads, size_t bytes) {
  static const char* path = std::getenv("TRISKELE_EMULATE_LAUNCHES");
  Dl_info info;
  if (path == nullptr || dladdr(kernel, &info) == 0) return;
  if (FILE* file = std::fopen(path, "a")) {
    std::fprintf(file, "%s\t%td\t%d\t%zu\n", info.dli_fname,
                 static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase), threads, bytes);
    std::fclose(file);
  }
}

// *_sm80.cu also runs on sm_86 and sm_89, whose blocks have 99 KiB.
size_t shared_limit(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) != 0 && std::strstr(info.dli_fname, "_sm80") != nullptr ? 99 * 1024 : kSharedLimit;
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(position() + ": " + text);
}

void run(const void* kernel, dim3 grid, dim3 size, size_t bytes, const std::function<void()>& body, int together) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  OutsideFence outside;
  const int64_t threads = int64_t(size.x) * size.y * size.z, blocks = int64_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads) fail("a block of %ld threads", long(threads));
  if (blocks < 1 || grid.y > 65535 || grid.z > 65535) fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (together < 1 || together > kMaxCluster || grid.x % together != 0 || together * threads > kMaxThreads)
    fail("clusters of %d blocks of %ld threads in a grid of %u", together, long(threads), grid.x);
  const size_t limit = shared_limit(kernel);
  if (bytes > limit) fail("%zu bytes of dynamic shared memory; a block has at most %zu", bytes, limit);
  prepare_memory();
  shared_bytes = bytes;
  take_shared(0);
  statics = {};
  dl_iterate_phdr(find_statics, const_cast<void*>(kernel));
  write_down(kernel, static_cast<int>(threads), bytes);
  FaultHandler handler;
  const int signal = sigsetjmp(fault_exit, 1);
  if (signal != 0) {
    fault_armed = 0;
    const std::string where = position();
    block = nullptr;
    throw std::runtime_error("emulate: " + where + ": " + describe_fault());
  }
  fault_armed = 1;
  try {
    run_grid(body, grid, size, together);
  } catch (...) {
    block = nullptr;
    throw;
  }
}

void* dynamic_shared() { return shared_base; }
size_t dynamic_shared_bytes() { return shared_bytes; }

uint32_t shared_address(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  if (at >= shared_base && at <= shared_base + shared_bytes) return kDynamicBase + uint32_t(at - shared_base);
  if (at >= statics.at && at <= statics.at + statics.bytes) return kStaticBase + uint32_t(at - statics.at);
  fail("a pointer that is not to shared memory");
}

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  const size_t dynamic = address - kDynamicBase, fixed = address - kStaticBase;
  if (address >= kDynamicBase && dynamic + bytes <= shared_bytes) return shared_base + dynamic;
  if (address >= kStaticBase && fixed + bytes <= statics.bytes) return statics.at + fixed;
  fail("shared address %#x + %zu: outside of the block's shared memory", address, bytes);
}

void check_shared(const void* pointer, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  if (at >= shared_base && at + bytes <= shared_base + shared_bytes) return;
  if (at >= statics.at && at + bytes <= statics.at + statics.bytes) return;
  fail("%s: %zu bytes at byte %td of dynamic shared memory, which has %zu", what, bytes, at - shared_base,
       shared_bytes);
}

void abandon(const std::string& message) {
  if (block == nullptr) throw std::runtime_error("emulate: " + message);
  if (running->error.empty()) running->error = position() + ": " + message;
  switch_context(&running->thread[here.number].context, &scheduler);
  std::abort();
}

int processors() { return settings.processors; }

void suspend(const char* format, long a, long b) {
  require_kernel();
  Thread& thread = block->thread[here.number];
  thread.waits = format;
  thread.numbers[0] = a;
  thread.numbers[1] = b;
  switch_context(&thread.context, &scheduler);
}

void wake(int number) { make_ready(number); }

void yield() {
  make_ready(here.number);
  suspend("its turn");
}

void barrier_sync(int id, int count) {
  if (id == 0 && block != nullptr && count == block->threads) block_sum(0);
  else arrive(id, count, true);
}
void barrier_arrive(int id, int count) { arrive(id, count, false); }

int block_sum(int value) {
  require_kernel();
  block->sum += value;
  if (++block->sum_arrived == block->alive) {
    settle_barriers();
  } else {
    block->sum_waiting.push_back(here.number);
    suspend("__syncthreads");
  }
  return block->sum_result;
}

void meet(const char* what, uint32_t mask, void* mine, Complete complete, const void* context) {
  require_kernel();
  const uint32_t own = 1u << lane();
  if (!(mask & own)) fail("%s: lane %d is not in its own mask %#x", what, lane(), mask);
  auto& meetings = block->meetings[warp()];
  Meeting* at = nullptr;
  for (Meeting& meeting : meetings)
    if (strcmp(meeting.what, what) == 0 && meeting.mask == mask && !(meeting.there & own)) {
      at = &meeting;
      break;
    }
  if (at == nullptr) {
    meetings.push_back({what, mask, 0, {}, complete, context, {}});
    at = &meetings.back();
  }
  at->there |= own;
  at->lanes[lane()] = mine;
  if ((mask & ~at->there & ~block->exited[warp()]) == 0) {
    settle(meetings, warp());
    return;
  }
  at->waiting.push_back(here.number);
  suspend("%2$s with lanes %1$#lx", mask, reinterpret_cast<long>(what));
}

void later(std::function<void()> work) { block->work.push_back(std::move(work)); }
void at_block_end(std::function<void()> check) { block->checks.push_back(std::move(check)); }
void at_deadlock(std::function<std::string()> describe) { block->notes.push_back(std::move(describe)); }
std::shared_ptr<void>& state_of_block(const void* key) { return block->states[key]; }

int cluster_size() { return static_cast<int>(cluster->blocks.size()); }
int cluster_rank() { return running->rank; }

void in_block(int rank, const char* what, const std::function<void()>& work) {
  require_kernel();
  if (rank < 0 || rank >= cluster_size()) fail("%s: block %d of a cluster of %d", what, rank, cluster_size());
  Block& other = cluster->blocks[rank];
  if (other.alive == 0) fail("%s: block %d of the cluster has exited", what, rank);
  struct Back {
    Block& to;
    ~Back() { take(to); }
  } back{*block};
  take(other);
  work();
}

void cluster_sync() {
  require_kernel();
  ++cluster->arrived;
  settle_cluster();
  if (cluster->arrived == 0) return;   // it was the last one
  cluster->waiting.push_back({block, here.number});
  suspend("the cluster's barrier");
}

}  // namespace emulate

// ---- what Python sets ---------------------------------------------------------------------------------------------

extern "C" {

EMULATE_API int triskele_emulate_order(const char* order, unsigned long long seed) {
  using emulate::Order;
  const std::string name = order;
  if (name != "forward" && name != "backward" && name != "random") return 1;
  emulate::settings.order = name == "forward" ? Order::forward : name == "backward" ? Order::backward : Order::random;
  emulate::settings.seed = seed;
  return 0;
}
EMULATE_API void triskele_emulate_processors(int count) { emulate::settings.processors = count; }

}
