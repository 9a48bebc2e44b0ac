// Included before each file of the CPU kernels where they are built with ThreadSanitizer. parallel_for starts real threads there:
// the sanitizer does not see how torch's OpenMP library orders its threads, and would report every result as a race.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t planted_race = 0;  // written by all threads if SIMPLCLIP_PLANT_RACE is set

// Calls f for up to four blocks of the iterations, each in a thread. Small calls are divided too, whatever their grain.
template <class F>
void parallel_for_in_threads(int64_t begin, int64_t end, int64_t, const F& f) {
  const bool plant = std::getenv("SIMPLCLIP_PLANT_RACE") != nullptr;
  const int64_t size = std::max<int64_t>(1, (end - begin + 3) / 4);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size)
    threads.emplace_back([&f, end, first, size, plant] {
      if (plant) ++planted_race;
      f(first, std::min(end, first + size));
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for parallel_for_in_threads
