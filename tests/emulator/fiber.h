// A stack and a place to go on at. switch_fiber leaves one fiber and goes on in another, in assembly of x86-64.
// AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simplclip::emulator {

constexpr size_t PAGE = 4096, STACK = 1 << 18;

struct Fiber {
  char* stack = nullptr;  // its lowest address; nullptr before the first start, and in the fiber that is the caller's own
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* stack_pointer = nullptr;

  // Makes the next switch to this fiber run `body`, which must not return.
  void start(int number, void (*body)());
};

// Pushes what a call preserves, changes stacks, pops it. A new fiber's stack is laid out so that this returns into its body.
[[gnu::naked, gnu::noinline]] inline void exchange(void** /* rdi */, void* /* rsi */) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

#ifdef __SANITIZE_ADDRESS__
inline Fiber* left;  // the fiber that the current switch leaves

inline void arrived() {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  left->bottom = bottom;
  left->bytes = bytes;
}
#endif

inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  left = &from;
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.bytes);
#endif
  exchange(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  arrived();
#endif
}

inline void (*first_call)();

inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  arrived();
#endif
  first_call();
  std::abort();
}

inline void Fiber::start(int number, void (*body)()) {
  if (!stack) {
    void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack = static_cast<char*>(memory);
    mprotect(stack, PAGE, PROT_NONE);  // an overflow stops instead of running into the neighbour's stack
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, STACK);  // frames that were never left
#endif
  first_call = body;
  // Tops at different places of a page: at the same, the fibers' frames would push each other out of the cache.
  bytes = STACK - static_cast<size_t>(number) % 32 * 128;
  bottom = stack;
  // From the top: a zero where enter's caller would be (at 8 modulo 16, as after a call), enter as exchange's return address,
  // six registers.
  auto top = reinterpret_cast<uintptr_t*>(stack + bytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uintptr_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  stack_pointer = top;
}

}  // namespace simplclip::emulator
