// Checks of a tensor's memory layout, for kernels that use pointers. The errors name the argument.
#pragma once

#include "common.h"

#include <string>

namespace simplclip {

inline std::string strides_of(const Tensor& t) {
  std::string out;
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.stride(i));
  return "[" + out + "]";
}

inline void expect_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides ", strides_of(t));
}

inline void expect_contiguous(const char* name, const std::optional<Tensor>& t) {
  if (t) expect_contiguous(name, *t);
}

// Checks that the last dimension is contiguous. Kernels accept any strides of the other dimensions.
inline void expect_dense_rows(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, name, ": expected stride 1 in the last dimension, got strides ",
                  strides_of(t));
}

inline void expect_dtype_of(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": expected the dtype of ", other_name, ", got another");
}

}  // namespace simplclip
