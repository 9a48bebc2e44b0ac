// The kernels for avx2. System headers stand before the pragma: their inline functions must stay baseline code.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "feature_rows.h"
#include "similarity_strip.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#define SIMPLCLIP_LANES 8

namespace simplclip::avx2 {
namespace {
#include "vec.h"
#include "half.h"
#include "feature_rows_impl.h"
#include "similarity_strip_impl.h"
#include "similarity_forward_impl.h"
#include "similarity_backward_impl.h"
}  // namespace
extern const StripKernels kernels = {"avx2", forward, backward, merge, add, round};
extern const FeatureKernels feature_kernels = {feature_forward, feature_backward};
}  // namespace simplclip::avx2
#endif
