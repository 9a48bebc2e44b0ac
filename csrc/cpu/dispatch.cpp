// Chooses the instruction set once, at first use. SIMPLCLIP_CPU_ISA=avx512_bf16|avx512|avx2|baseline forces one
// that the CPU has.
#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#define SIMPLCLIP_HAS(name) && __builtin_cpu_supports(name)

namespace simplclip {

namespace avx512_bf16 { extern const InstructionSet kernels; }
namespace avx512 { extern const InstructionSet kernels; }
namespace avx2 { extern const InstructionSet kernels; }
namespace baseline { extern const InstructionSet kernels; }

namespace {

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> found;
#if defined(__x86_64__)
  if (true SIMPLCLIP_NEEDS_AVX512_BF16(SIMPLCLIP_HAS)) found.push_back(&avx512_bf16::kernels);
  if (true SIMPLCLIP_NEEDS_AVX512(SIMPLCLIP_HAS)) found.push_back(&avx512::kernels);
  if (true SIMPLCLIP_NEEDS_AVX2(SIMPLCLIP_HAS)) found.push_back(&avx2::kernels);
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

// Another instruction set that is forced counts as a CPU without bfloat16. An unknown name is reported by instruction_set().
bool has_native_bf16() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("SIMPLCLIP_CPU_ISA");
  return (!wanted || !*wanted || wanted == std::string("avx512_bf16")) SIMPLCLIP_NEEDS_AVX512_BF16(SIMPLCLIP_HAS);
#else
  return false;
#endif
}

}  // namespace simplclip
