// Where threads and their shared memory live, and what becomes of an access outside. Part of runtime.cpp.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include <link.h>
#include <sys/mman.h>

namespace emulate {
namespace {

constexpr size_t kPage = 4096, kStack = 256 * 1024, kSharedRegion = 256 * 1024;
constexpr size_t kSharedLimit = 227 * 1024;
constexpr int kMaxThreads = 1024;                     // of a block, and of all blocks of a cluster
constexpr int kMaxCluster = 4;
constexpr uint32_t kDynamicBase = 0x00400, kStaticBase = 0x3a000;   // 32-bit shared addresses

char* stacks = nullptr;
char* shared_regions = nullptr;         // [guard][region] for each block of a cluster, [guard]
char* shared_region = nullptr;          // [guard][region][guard] of the running block
unsigned char* shared_base = nullptr;
size_t shared_bytes = 0;
struct Range { unsigned char* at = nullptr; size_t bytes = 0; } statics;
sigjmp_buf fault_exit;
volatile sig_atomic_t fault_armed = 0;
void* fault_address = nullptr;

char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("emulate: no memory for stacks");
  return static_cast<char*>(pages);
}

void prepare_memory() {
  if (stacks == nullptr) {
    stacks = map_pages(kStack * kMaxThreads);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStack, kPage, PROT_NONE);
    shared_regions = map_pages(kMaxCluster * (kSharedRegion + kPage) + kPage);
    for (int i = 0; i <= kMaxCluster; ++i) mprotect(shared_regions + i * (kSharedRegion + kPage), kPage, PROT_NONE);
  }
}

// Makes the shared memory of this block of a cluster the running one's.
void take_shared(int rank) {
  shared_region = shared_regions + rank * (kSharedRegion + kPage);
  shared_base = reinterpret_cast<unsigned char*>(shared_region) + kPage + (kSharedRegion - shared_bytes) / 1024 * 1024;
}

// Static shared variables are thread_local ones of the kernel's library: one range, whose address the loader knows.
int find_statics(dl_phdr_info* info, size_t, void* wanted) {
  bool inside = false;
  const ElfW(Phdr)* tls = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const auto from = info->dlpi_addr + part.p_vaddr, at = reinterpret_cast<ElfW(Addr)>(wanted);
    if (part.p_type == PT_LOAD && at >= from && at < from + part.p_memsz) inside = true;
    if (part.p_type == PT_TLS) tls = &part;
  }
  if (!inside) return 0;
  if (tls != nullptr && info->dlpi_tls_data != nullptr)
    statics = {static_cast<unsigned char*>(info->dlpi_tls_data), static_cast<size_t>(tls->p_memsz)};
  return 1;
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (fault_armed) {
    fault_address = info->si_addr;
    siglongjmp(fault_exit, signal);
  }
  std::signal(signal, SIG_DFL);
}

struct FaultHandler {
  struct sigaction old_segv, old_bus;
  stack_t old_stack;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  FaultHandler() {
    stack_t alternate{};
    alternate.ss_sp = stack.data();
    alternate.ss_size = stack.size();
    sigaltstack(&alternate, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
  }
  ~FaultHandler() {
    fault_armed = 0;
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

std::string describe_fault() {
  const char* at = static_cast<const char*>(fault_address);
  char text[200];
  if (at >= stacks && at < stacks + kStack * kMaxThreads) {
    snprintf(text, sizeof text, "stack overflow");
  } else if (at >= shared_region && at < shared_region + kSharedRegion + 2 * kPage) {
    snprintf(text, sizeof text, "access at byte %td of %zu bytes of dynamic shared memory",
             at - reinterpret_cast<char*>(shared_base), shared_bytes);
  } else {
    snprintf(text, sizeof text, "access to unmapped address %p", fault_address);
  }
  return text;
}

}  // namespace
}  // namespace emulate
