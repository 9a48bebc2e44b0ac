// The second half of parallel_mlp on a CPU, for a chunk of rows of the hidden layer at a time. Only scratch holds activations.
#include "call_structs.h"  // written by setup.py, see csrc/call_headers.py
#include "../tensors.h"
#include "../transposed_sum.h"

#include <algorithm>
#include <cstring>

namespace simplclip {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kScratchBytes = 8 << 20;
constexpr int64_t kGrain = 8192;  // floats per thread, at least

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quickgelu") return Activation::kQuickGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(false, "act: expected gelu, gelu_tanh, quickgelu, relu or silu, got ", name);
}

int64_t chunk_rows(const Tensor& h) {
  return std::clamp<int64_t>(kScratchBytes / (h.size(1) * bytes_of(h)), 64, std::max<int64_t>(64, h.size(0)));
}

// Computes to [rows, F] = act(h), or grad act'(h) if `grad` is given.
void activate(Activation act, const Tensor& h, const Tensor* grad, Tensor& to) {
  parallel_for(0, h.size(0) * h.size(1), kGrain, [&](int64_t begin, int64_t end) {
    const void* d_out = grad ? element(*grad, begin) : nullptr;
    instruction_set().elementwise.activate(act, type_of(h), element(h, begin), d_out, element(to, begin), end - begin);
  });
}

// out [rows, C] = bias, or += bias.
void put_bias(const Tensor& bias, Tensor& out, bool accumulate) {
  const int64_t c = out.size(1), grain = std::max<int64_t>(1, kGrain / c);
  parallel_for(0, out.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* to = element(out, i * out.stride(0));
      if (accumulate) instruction_set().elementwise.convert(type_of(bias), bias.const_data_ptr(), type_of(out), to, c, true);
      else std::memcpy(to, bias.const_data_ptr(), c * bytes_of(out));
    }
  });
}

void parallel_mlp_fwd(const HiddenCall& call) {
  const auto& [h, weight, bias, act, out, accumulate] = call;
  const Activation kind = activation_of(act);
  const int64_t rows_of_chunk = chunk_rows(h);
  const Tensor w2 = transposed(weight);  // [F, C]
  const Tensor scratch = allocate(h, {std::min(rows_of_chunk, h.size(0)), h.size(1)});
  for (int64_t i = 0; i < h.size(0); i += rows_of_chunk) {
    const int64_t count = std::min(rows_of_chunk, h.size(0) - i);
    Tensor activated = rows(scratch, 0, count), to = rows(out, i, count);
    activate(kind, rows(h, i, count), nullptr, activated);
    if (bias) put_bias(*bias, to, accumulate);
    if (bias || accumulate) mm_add(to, activated, w2);
    else mm_out(to, activated, w2);
  }
}

// Overwrites h by its gradient. Returns the gradient of the weight, [0, F] if it is not needed.
Tensor parallel_mlp_bwd(const HiddenGradient& call) {
  const Tensor& h = call.h;
  const Activation kind = activation_of(call.act);
  const int64_t rows_of_chunk = chunk_rows(h);
  const Tensor scratch = allocate(h, {std::min(rows_of_chunk, h.size(0)), h.size(1)});
  TransposedSum d_weight(call.weight, call.need_weight, h.scalar_type() != ScalarType::Float && rows_of_chunk < h.size(0));
  for (int64_t i = 0; i < h.size(0); i += rows_of_chunk) {
    const int64_t count = std::min(rows_of_chunk, h.size(0) - i);
    Tensor to = rows(scratch, 0, count), hidden = rows(h, i, count);
    const Tensor d_out = rows(call.grad, i, count);
    if (call.need_weight) {
      activate(kind, hidden, nullptr, to);
      d_weight.add(d_out, to);
    }
    mm_out(to, d_out, call.weight);
    activate(kind, hidden, &to, hidden);
  }
  return d_weight.result();
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("parallel_mlp_fwd_cpu", TORCH_BOX((&Unpacked<HiddenCall, parallel_mlp_fwd>::run)));
  m.impl("parallel_mlp_bwd_cpu", TORCH_BOX((&Unpacked<HiddenGradient, parallel_mlp_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
