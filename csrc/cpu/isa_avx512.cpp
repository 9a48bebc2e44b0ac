// The kernels for avx512. System headers are included before the pragma, so that their inline functions are baseline code.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "instruction_set.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,f16c,bmi2")
#define SIMPLCLIP_LANES 16

namespace simplclip::avx512 {
namespace {
#include "vec.h"
#include "half.h"
#include "elementwise_impl.h"
#include "small_product.h"
#include "attention/forward_impl.h"
#include "attention/backward_impl.h"
#include "feature/rows_impl.h"
#include "similarity/strip_impl.h"
#include "similarity/forward_impl.h"
#include "similarity/backward_impl.h"
}  // namespace
extern const InstructionSet kernels = {"avx512",
                                       {forward, backward, merge},
                                       {feature_forward, feature_backward},
                                       {attention_scratch_floats, attention_forward, attention_backward},
                                       {elementwise_activate, elementwise_activate_backward, elementwise_add,
                                        elementwise_accumulate, elementwise_round}};
}  // namespace simplclip::avx512
#endif
