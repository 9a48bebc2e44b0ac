// The kernels for baseline. System headers stand before the pragma: their inline functions must stay baseline code.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "feature_rows.h"
#include "similarity_strip.h"

#define SIMPLCLIP_LANES 4

namespace simplclip::baseline {
namespace {
#include "vec.h"
#include "half.h"
#include "feature_rows_impl.h"
#include "similarity_strip_impl.h"
#include "similarity_forward_impl.h"
#include "similarity_backward_impl.h"
}  // namespace
extern const StripKernels kernels = {"baseline", forward, backward, merge, add, round};
extern const FeatureKernels feature_kernels = {feature_forward, feature_backward};
}  // namespace simplclip::baseline
