// Shared by all C++ files of simplclip: names from the LibTorch stable ABI and the matrix products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK, under the only name that torch 2.11 has too

#include <optional>

namespace simplclip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The shims call the CPU kernels directly, without the dispatcher, so that autocast cannot cast an operand.

// out = a @ b.
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a @ b.
inline void mm_add(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

inline int64_t bytes_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// Returns `count` of the rows, or other slices, of a tensor. All of them are the tensor itself: a view costs a microsecond.
inline Tensor slices(const Tensor& t, int64_t dim, int64_t first, int64_t count) {
  if (count == t.size(dim)) return t;
  Tensor view = t;
  return torch::stable::narrow(view, dim, first, count);
}

inline Tensor rows(const Tensor& t, int64_t first, int64_t count) { return slices(t, 0, first, count); }

}  // namespace simplclip
