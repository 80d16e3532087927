// Switching between stacks on one thread: by hand on x86-64, where swapcontext would call the kernel each time.
#pragma once
#include <cstddef>

#include <ucontext.h>

namespace emulate {

#if defined(__x86_64__)
using Context = void*;
extern "C" void triskele_emulate_switch(Context* from, Context to);
__asm__(R"(
.text
.type triskele_emulate_switch,@function
triskele_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size triskele_emulate_switch,.-triskele_emulate_switch
)");
inline void switch_context(Context* from, Context* to) { triskele_emulate_switch(from, *to); }
inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 4;   // a multiple of 16: `ret` leaves 8 more, as a call does
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;               // the registers that a switch restores
  *context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

}  // namespace emulate
