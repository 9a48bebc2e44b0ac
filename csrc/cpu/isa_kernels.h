// The kernels of the instruction set that SIMPLCLIP_ISA names. Each file isa_*.cpp includes this header once,
// after SIMPLCLIP_COMPILE_FOR, so that every function exists once per instruction set and the linker cannot mix them up.
// System headers come first (instruction_set.h), so that their inline functions are baseline code.

#define SIMPLCLIP_STRING_OF(name) #name
#define SIMPLCLIP_STRING(name) SIMPLCLIP_STRING_OF(name)

namespace simplclip::SIMPLCLIP_ISA {
namespace {
#include "vec.h"
#include "elementwise_impl.h"
#include "small_product.h"
#include "attention/forward_impl.h"
#include "attention/backward_impl.h"
#include "similarity/strip_impl.h"
#include "similarity/sigmoid_impl.h"
#include "similarity/forward_impl.h"
#include "similarity/backward_impl.h"

void attention_forward(const AttentionHead& head, Rows out, float* scratch) {
  by_type(head.type, [&]<class T>(T*) { attention_forward_typed<T>(head, out, scratch); });
}

void attention_backward(const AttentionHead& head, const AttentionGrad& grad, double* gains, float* scratch) {
  by_type(head.type, [&]<class T>(T*) { attention_backward_typed<T>(head, grad, gains, scratch); });
}
}  // namespace
extern const InstructionSet kernels = {SIMPLCLIP_STRING(SIMPLCLIP_ISA),
                                       {forward, backward, merge, sigmoids},
                                       {attention_scratch_floats, attention_forward, attention_backward},
                                       {elementwise_activate, elementwise_convert}};
}  // namespace simplclip::SIMPLCLIP_ISA
