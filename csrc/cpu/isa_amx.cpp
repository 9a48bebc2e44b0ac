#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,fma,f16c,bmi2")
#define SIMPLCLIP_LANES 16
#define SIMPLCLIP_NATIVE_BF16
#define SIMPLCLIP_AMX

// Attention in bfloat16, whose products run in AMX tiles. All other kernels are those of avx512_bf16.
namespace simplclip {
namespace avx512_bf16 {
extern const InstructionSet kernels;
}

namespace amx {
namespace {
#include "vec.h"
#include "small_product.h"
#include "attention/forward_impl.h"
#include "attention/backward_impl.h"

int64_t scratch_floats(int64_t length, int64_t width, bool is_backward) {
  return std::max(attention_scratch_floats(length, width, is_backward),
                  avx512_bf16::kernels.attention.scratch_floats(length, width, is_backward));
}

void attention_forward(const AttentionHead& head, Rows out, float* scratch) {
  if (head.type != Float::kBFloat16) return avx512_bf16::kernels.attention.forward(head, out, scratch);
  const Tiles tiles;
  attention_forward_typed<bf16>(head, out, scratch);
}

void attention_backward(const AttentionHead& head, const AttentionGrad& grad, double* gains, float* scratch) {
  if (head.type != Float::kBFloat16) return avx512_bf16::kernels.attention.backward(head, grad, gains, scratch);
  const Tiles tiles;
  attention_backward_typed<bf16>(head, grad, gains, scratch);
}
}  // namespace
extern const AttentionKernels attention = {scratch_floats, attention_forward, attention_backward};
}  // namespace amx
}  // namespace simplclip
#endif
