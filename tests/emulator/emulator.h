// Runs CUDA C++ kernels on the CPU, so that they are tested where there is no GPU.
//
// A kernel's .cuh is compiled by the host compiler, with host/instructions.cuh in place of csrc/cuda/instructions.cuh, whose
// instructions come from here. Every thread of a block is a fiber; one runs at a time, until it has to wait for others:
//
//   sync_block        until all threads of the block are in it
//   warp operations   (mma, ldmatrix, shuffle_xor) until all 32 lanes are; the last one computes everybody's result
//
// The launch's seed decides each time which fiber runs next; mostly one warp runs as far ahead as it can. So a missing
// barrier shows as a wrong result under some seed: shared memory starts as NaN in every block, and the target of a cp.async
// reads as NaN until a thread waits for the copy. Seed 0 runs threads and blocks in order.
//
// Errors are exceptions that name the block, the thread and the line: lanes of a warp in different operations, threads in
// different barriers, threads that wait for one that has returned, addresses of ldmatrix and cp.async that are misaligned or
// outside of shared memory. Built with sanitizers (see __init__.py), any other access out of bounds is reported too: shared
// memory is a heap block of just the size that the launch asked for.
//
// To bring a kernel here, add tests/emulator/<name>.cpp (or several, <name>*.cpp: they are compiled in parallel) with
// functions of pointers and numbers that call
//
//   emulator::launch({blocks}, threads, shared_bytes, seed, [=] { my_kernel<bf16>(parameters); });
//
// and EMULATED(my_function); for each (binding.h). emulator.build("<name>") is then a Python module of these functions.
// wrappers.cpp is an example.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

namespace simplclip::emulator {

using Site = std::source_location;

inline bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
}

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The work of ldmatrix in a launch. The eight rows of a matrix are read at once if they lie in different groups of four
// banks; each further row in a group costs a replay.
struct Report {
  int64_t replays = 0;
};

// A copy by cp.async that is under way.
struct Copy {
  void* to;
  int bytes, group;
  char data[16];
};

struct Thread {
  Fiber fiber;
  int index;
  bool returned;
  const char* waits_in;  // nullptr: runs or may run
  Site site;
  void* operands;  // of the warp operation in which the thread waits
  std::vector<Copy> copies;
  int groups;  // groups of copies that are committed
};

struct Engine {
  Dim3 grid, block;
  int threads = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  Thread* running = nullptr;

  std::function<void()> kernel;
  std::vector<Thread> pool;
  Fiber main;
  std::string error;
  Report report;
  uint64_t random = 0;  // state; 0: everything in order
  uint32_t ready_warps = 0, ready_lanes[32];
  int arrived_in_block = 0, arrived_in_warp[32];
  Thread* first_in_block = nullptr;

  uint32_t draw() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull >> 32;
  }

  int one_of(uint32_t set) {
    if (!random) return std::countr_zero(set);
    const int turn = draw() & 31;
    return (std::countr_zero(std::rotr(set, turn)) + turn) & 31;
  }

  void make_ready(Thread& thread) {
    thread.waits_in = nullptr;
    ready_warps |= 1u << thread.index / 32;
    ready_lanes[thread.index / 32] |= 1u << thread.index % 32;
  }

  // The thread that runs next, nullptr if none can.
  Thread* next() {
    if (!ready_warps) return nullptr;
    int warp = running->index / 32;
    if (!random || !(ready_warps >> warp & 1) || draw() % 64 == 0) warp = one_of(ready_warps);
    const int lane = one_of(ready_lanes[warp]);
    ready_lanes[warp] &= ~(1u << lane);
    if (!ready_lanes[warp]) ready_warps &= ~(1u << warp);
    return &pool[warp * 32 + lane];
  }
};

// One launch at a time: Python's lock is held by the caller.
inline Engine engine;

inline std::string place(const char* operation, const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(operation) + " (" + (slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line()) + ")";
}

inline std::string block_name() {
  const auto& [x, y, z] = engine.block;
  return "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

inline std::string name(const Thread& thread) { return "thread " + std::to_string(thread.index); }

[[noreturn]] inline void fail(const char* operation, const Site& site, const std::string& what) {
  throw std::runtime_error(block_name() + ", " + name(*engine.running) + " in " + place(operation, site) + ": " + what);
}

// Says where every thread waits, when no thread can go on.
inline std::string standstill() {
  auto state = [](int i) {
    const Thread& thread = engine.pool[i];
    return thread.returned ? std::string("returned") : "in " + place(thread.waits_in, thread.site);
  };
  std::string text = block_name() + ": no thread can go on. Threads";
  for (int i = 0, last; i < engine.threads; i = last + 1) {
    for (last = i; last + 1 < engine.threads && state(last + 1) == state(i);) ++last;
    text += (i ? "; " : " ") + std::to_string(i) + (i < last ? "-" + std::to_string(last) : "") + " " + state(i);
  }
  return text;
}

inline void run(Thread& thread) {
  Thread& from = *engine.running;
  if (&thread == &from) return;
  engine.running = &thread;
  switch_fiber(from.fiber, thread.fiber);
}

// Suspends the running thread until it is made ready and drawn.
inline void pause() {
  Thread* next = engine.next();
  if (!next) throw std::runtime_error(standstill());
  run(*next);
}

// Runs a thread from its start to its end.
inline void live() {
  Thread& self = *engine.running;
  try {
    engine.kernel();
  } catch (const std::exception& error) {
    engine.error = error.what();
  }
  self.returned = true;
  if (engine.error.empty()) {
    if (Thread* next = engine.next()) run(*next);
    for (int i = 0; i < engine.threads; ++i) {
      if (!engine.pool[i].returned) {
        engine.error = standstill();
        break;
      }
    }
  }
  switch_fiber(self.fiber, engine.main);
}

inline void sync_block(Site site) {
  Thread& self = *engine.running;
  if (!engine.arrived_in_block) engine.first_in_block = &self;
  const Thread& first = *engine.first_in_block;
  self.waits_in = "sync_block";
  self.site = site;
  if (!same(first.site, site)) {
    fail("sync_block", site, name(first) + " waits in another, " + place("sync_block", first.site));
  }
  if (++engine.arrived_in_block == engine.threads) {
    engine.arrived_in_block = 0;
    for (int i = 0; i < engine.threads; ++i) engine.make_ready(engine.pool[i]);
  }
  pause();
}

// `compute` is called by the last lane that arrives, with all lanes' operands.
template <class Operands>
using Compute = void(Operands* const (&lanes)[32]);

template <class Operands>
void warp_collective(const char* operation, Site site, Operands& mine, std::type_identity_t<Compute<Operands>>* compute) {
  Thread& self = *engine.running;
  Thread* lanes = &engine.pool[self.index & ~31];
  int& arrived = engine.arrived_in_warp[self.index / 32];
  self.site = site;
  self.operands = &mine;
  self.waits_in = operation;
  if (++arrived < 32) {
    pause();
    return;
  }
  arrived = 0;
  Operands* all[32];
  for (int i = 0; i < 32; ++i) {
    const Thread& other = lanes[i];
    if (!same(other.waits_in, operation) || !same(other.site, site)) {
      fail(operation, site, name(other) + " of the same warp is in " + place(other.waits_in, other.site));
    }
    all[i] = static_cast<Operands*>(other.operands);
  }
  compute(all);
  for (int i = 0; i < 32; ++i) {
    if (&lanes[i] != &self) engine.make_ready(lanes[i]);
  }
  self.waits_in = nullptr;
}

template <class V>
V shuffle_xor(Site site, V value, int mask) {
  struct Operands {
    V value, result;
    int mask;
  } mine{value, value, mask};
  warp_collective("shuffle_xor", site, mine, [](Operands* const (&lanes)[32]) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[i ^ (lanes[i]->mask & 31)]->value;
  });
  return mine.result;
}

inline void check_shared(const char* operation, Site site, const void* address, int bytes) {
  const intptr_t offset = static_cast<const char*>(address) - engine.shared;
  if (offset % bytes == 0 && offset >= 0 && offset + bytes <= static_cast<intptr_t>(engine.shared_bytes)) return;
  const std::string where = "offset " + std::to_string(offset);
  if (offset % bytes == 0) {
    fail(operation, site, where + " is outside of the " + std::to_string(engine.shared_bytes) + " bytes of shared memory");
  }
  fail(operation, site, where + " in shared memory is not a multiple of " + std::to_string(bytes));
}

// Counts the replays of one matrix of ldmatrix.
inline void count_replays(const void* const (&rows)[8]) {
  int in_group[8] = {}, most = 0;
  for (const void* row : rows) most = std::max(most, ++in_group[(static_cast<const char*>(row) - engine.shared) / 16 % 8]);
  engine.report.replays += most - 1;
}

inline void cp_async(const char* operation, Site site, void* shared, const void* global, int bytes, bool valid) {
  check_shared(operation, site, shared, bytes);
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes) {
    fail(operation, site, "the global address is not a multiple of " + std::to_string(bytes));
  }
  Thread& self = *engine.running;
  Copy copy{shared, bytes, self.groups, {}};
  if (valid) std::memcpy(copy.data, global, bytes);
  self.copies.push_back(copy);
  std::memset(shared, 0xff, bytes);
}

inline void cp_async_commit() { ++engine.running->groups; }

inline void cp_async_wait(int under_way) {
  Thread& self = *engine.running;
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - under_way; ++copy) {
    std::memcpy(copy->to, copy->data, copy->bytes);
  }
  self.copies.erase(self.copies.begin(), copy);
}

// Runs `kernel` in every thread of every block, one block after another in an order drawn from the seed. `threads` is a
// multiple of 32 up to 1024.
inline Report launch(Dim3 grid, int threads, size_t shared_bytes, uint64_t seed, std::function<void()> kernel) {
  if (threads <= 0 || threads % 32 || threads > 1024) throw std::invalid_argument("threads: expected 32, 64, ... or 1024");
  const auto alignment = std::align_val_t(128);
  char* shared = static_cast<char*>(::operator new(shared_bytes, alignment));
  engine.grid = grid;
  engine.threads = threads;
  engine.shared = shared;
  engine.shared_bytes = shared_bytes;
  engine.kernel = std::move(kernel);
  engine.error.clear();
  engine.report = {};
  engine.random = seed * 0x9e3779b97f4a7c15ull;
  if (engine.pool.size() < static_cast<size_t>(threads)) engine.pool.resize(threads);

  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  for (size_t i = blocks.size(); seed && i > 1; --i) std::swap(blocks[i - 1], blocks[engine.draw() % i]);
  for (size_t i = 0; i < blocks.size() && engine.error.empty(); ++i) {
    engine.block = {blocks[i] % grid.x, blocks[i] / grid.x % grid.y, blocks[i] / grid.x / grid.y};
    std::memset(shared, 0xff, shared_bytes);
    engine.arrived_in_block = 0;
    std::fill_n(engine.arrived_in_warp, 32, 0);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = engine.pool[t];
      thread.index = t;
      thread.returned = false;
      thread.groups = 0;
      thread.copies.clear();
      thread.fiber.start(t, live);
      engine.make_ready(thread);
    }
    engine.running = engine.pool.data();
    engine.running = engine.next();
    switch_fiber(engine.main, engine.running->fiber);
    engine.ready_warps = 0;
    std::fill_n(engine.ready_lanes, 32, 0u);
  }
  engine.kernel = nullptr;
  ::operator delete(shared, alignment);
  if (!engine.error.empty()) throw std::runtime_error(engine.error);
  return engine.report;
}

}  // namespace simplclip::emulator
