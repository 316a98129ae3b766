// What the sanitizers need to know of fibers and of memory that the host execution touches in the place of a kernel. The symbols
// are weak: null where the program is built without that sanitizer. The files of this folder are never instrumented themselves.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* clock);
[[gnu::weak]] void __tsan_release(void* clock);
[[gnu::weak]] void __tsan_read_range(void* p, unsigned long bytes);
[[gnu::weak]] void __tsan_write_range(void* p, unsigned long bytes);
[[gnu::weak]] uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int order);
[[gnu::weak]] void __tsan_atomic32_store(volatile uint32_t* p, uint32_t value, int order);

[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* p, size_t bytes);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* p, size_t bytes);
[[gnu::weak]] void* __asan_region_is_poisoned(void* p, size_t bytes);
}

namespace fastseq::gpu::host {

inline bool tsan() { return __tsan_create_fiber != nullptr; }
inline bool asan() { return __asan_region_is_poisoned != nullptr; }

// A kernel's accesses that the host execution makes for it, by the running thread.
inline void reads(const void* p, size_t bytes) {
  if (tsan()) __tsan_read_range(const_cast<void*>(p), bytes);
}
inline void writes(void* p, size_t bytes) {
  if (tsan()) __tsan_write_range(p, bytes);
}

// What happened before a release of a clock happens before what follows an acquire of it.
inline void release(void* clock) {
  if (tsan()) __tsan_release(clock);
}
inline void acquire(void* clock) {
  if (tsan()) __tsan_acquire(clock);
}

inline bool poisoned(const void* p, size_t bytes) { return asan() && __asan_region_is_poisoned(const_cast<void*>(p), bytes); }

}  // namespace fastseq::gpu::host
