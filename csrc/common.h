// Shared by all C++ files of simplclip: names from the LibTorch stable ABI and the matrix products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK, under the only name that torch 2.11 has too

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>

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

// Tensors and views are made by shims too: the dispatcher takes microseconds for each, as long as a small call computes.

// Returns a contiguous tensor on the device of `like`.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), int32_t(dtype), device, index, &out));
  return Tensor(out);
}

inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return allocate(like, sizes, like.scalar_type());
}

// Returns the matrix [rows, columns] that begins `offset` elements behind the first element of t.
inline Tensor view(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int64_t offset) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &out));
  return Tensor(out);
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0), 0);
}

inline int64_t bytes_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// Returns `count` of the rows, or other slices, of a tensor. All of them are the tensor itself: a view costs a microsecond.
inline Tensor slices(const Tensor& t, int64_t dim, int64_t first, int64_t count) {
  if (count == t.size(dim)) return t;
  Tensor view = t;
  return torch::stable::narrow(view, dim, first, count);
}

inline Tensor rows(const Tensor& t, int64_t first, int64_t count) { return slices(t, 0, first, count); }

// Adapts `function` to TORCH_BOX, which needs a parameter for each argument: run(fields...) returns function(Call of the fields).
template <class Call, auto function, class Fields = decltype(std::declval<Call&>().fields())>
struct Unpacked;

template <class Call, auto function, class... T>
struct Unpacked<Call, function, std::tuple<T&...>> {
  static auto run(T... fields) {
    Call call;
    call.fields() = std::tie(fields...);
    return function(call);
  }
};

}  // namespace simplclip
