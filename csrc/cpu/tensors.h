// Float types and addresses of tensors, for the CPU kernels.
#pragma once

#include "../common.h"
#include "elementwise.h"

namespace simplclip {

inline Float type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Float::kBFloat16;
    case ScalarType::Half: return Float::kHalf;
    default: return Float::kFloat;
  }
}

// Returns the address `offset` elements behind the first element.
inline void* element(const Tensor& t, int64_t offset) { return static_cast<char*>(t.mutable_data_ptr()) + offset * bytes_of(t); }

}  // namespace simplclip
