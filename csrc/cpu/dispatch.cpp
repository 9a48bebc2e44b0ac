// Chooses the instruction set once, at first use. SIMPLCLIP_CPU_ISA=amx|avx512_bf16|avx512|avx2|baseline forces one
// that the CPU has.
#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Only the tests define this function, where they execute AMX instructions in software (tests/support/amx.c).
extern "C" __attribute__((weak, visibility("default"))) int simplclip_amx_in_software();

namespace simplclip {

namespace amx { extern const AttentionKernels attention; }
namespace avx512_bf16 { extern const InstructionSet kernels; }
namespace avx512 { extern const InstructionSet kernels; }
namespace avx2 { extern const InstructionSet kernels; }
namespace baseline { extern const InstructionSet kernels; }

namespace {

// Also requests the tile registers from the operating system, since a process may use them only after a request.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (simplclip_amx_in_software) return true;
  unsigned a, b, c, d;  // not __builtin_cpu_supports, which knows AMX from gcc 11 on
  const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has_tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (has_native_bf16()) {
      static InstructionSet with_tiles = avx512_bf16::kernels;
      with_tiles.name = "amx";
      with_tiles.attention = amx::attention;
      if (has_amx()) found.push_back(&with_tiles);
      found.push_back(&avx512_bf16::kernels);
    }
    found.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

const InstructionSet& choose() {
  const auto found = available();
  const char* wanted = std::getenv("SIMPLCLIP_CPU_ISA");
  if (!wanted || !*wanted) return *found.front();
  std::string names;
  for (const InstructionSet* kernels : found) {
    if (kernels->name == std::string(wanted)) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::runtime_error("SIMPLCLIP_CPU_ISA: expected one of " + names + " on this CPU, got '" + wanted + "'");
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& kernels = choose();
  return kernels;
}

bool has_native_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace simplclip
