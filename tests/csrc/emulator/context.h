// Switching between stacks on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(FASTSEQ_HOST_UCONTEXT)
#include <ucontext.h>
#if !defined(FASTSEQ_HOST_UCONTEXT)
#define FASTSEQ_HOST_UCONTEXT
#endif
#endif

namespace fastseq::gpu::host {

#if defined(FASTSEQ_HOST_UCONTEXT)

struct Context {
  ucontext_t saved;
};

inline void context_make(Context& context, void* bottom, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = bottom;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

inline void context_switch(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

// What a call must preserve lies on the stack itself, in the order in which context_switch pops it.
struct Context {
  void* stack_pointer;
};

inline void context_make(Context& context, void* bottom, size_t bytes, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(bottom) + bytes) & ~uintptr_t{15};
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;                         // entry never returns
  *--slot = reinterpret_cast<void*>(entry);  // what context_switch returns to; the stack is then aligned as after a call
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}

extern "C" __attribute__((visibility("hidden"))) void fastseq_host_switch(void** from, void* to);

inline void context_switch(Context& from, Context& to) { fastseq_host_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace fastseq::gpu::host
