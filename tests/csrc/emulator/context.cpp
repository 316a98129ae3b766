#include "context.h"

#if !defined(FASTSEQ_HOST_UCONTEXT)

// void fastseq_host_switch(void** from, void* to)
asm(R"(
  .text
  .globl fastseq_host_switch
  .hidden fastseq_host_switch
  .type fastseq_host_switch, @function
fastseq_host_switch:
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
  .size fastseq_host_switch, .-fastseq_host_switch
)");

#endif
