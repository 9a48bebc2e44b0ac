// shaped_attention on a CPU: a task per sequence and head.
#include "call_structs.h"  // written by setup.py, see csrc/call_headers.py
#include "../instruction_set.h"
#include "../tensors.h"

#include <memory>
#include <new>
#include <vector>

namespace simplclip {
namespace {

using torch::stable::parallel_for;

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

Rows head_rows(const Tensor& t, int64_t b, int64_t h) {
  return {element(t, b * t.stride(0) + h * t.stride(2)), t.stride(1)};
}

// Calls f(head, index of its sequence, index of the head, scratch) for each head, in parallel.
template <class F>
void for_heads(const AttentionCall& call, const Tensor& lse, bool is_backward, F&& f) {
  const Tensor& q = call.q;
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), width = q.size(3);
  const AttentionKernels& isa = instruction_set().attention;
  const float* gain = call.gains.const_data_ptr<float>();
  const int32_t* valid = call.lengths ? call.lengths->const_data_ptr<int32_t>() : nullptr;
  float* const sums = lse.mutable_data_ptr<float>();
  const int64_t floats = isa.scratch_floats(length, width, is_backward);
  parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[], Free> scratch(new (std::align_val_t(64)) float[floats]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      const AttentionHead head{head_rows(q, b, h), head_rows(call.k, b, h), head_rows(call.v, b, h), type_of(q), length,
                               valid ? valid[b] : length, width, call.causal, float(call.scale), gain[h], gain[heads + h],
                               gain[2 * heads + h], sums + task * length};
      f(head, b, h, scratch.get());
    }
  });
}

// Returns the result [B, L, H, K] and the log-sum-exps [B, H, L].
std::tuple<Tensor, Tensor> shaped_attention_fwd(const AttentionCall& call) {
  const Tensor& q = call.q;
  const Tensor out = allocate(q, q.sizes());
  const Tensor lse = allocate(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  for_heads(call, lse, false, [&](const AttentionHead& head, int64_t b, int64_t h, float* scratch) {
    instruction_set().attention.forward(head, head_rows(out, b, h), scratch);
  });
  return {out, lse};
}

// Writes dq, dk, dv and returns the gradients of the gains [3, H].
Tensor shaped_attention_bwd(const AttentionInto& call) {
  const int64_t batch = call.q.size(0), heads = call.q.size(2);
  std::vector<double> parts(batch * heads * 3);
  for_heads(call, call.lse, true, [&](const AttentionHead& head, int64_t b, int64_t h, float* scratch) {
    const AttentionGrad to{head_rows(call.grad, b, h), head_rows(call.dq, b, h), head_rows(call.dk, b, h),
                           head_rows(call.dv, b, h)};
    instruction_set().attention.backward(head, to, parts.data() + (b * heads + h) * 3, scratch);
  });
  const Tensor d_gains = allocate(call.gains, {3, heads});
  float* const sums = d_gains.mutable_data_ptr<float>();
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t gain = 0; gain < 3; ++gain) {
      double total = 0;
      for (int64_t b = 0; b < batch; ++b) total += parts[(b * heads + h) * 3 + gain];
      sums[gain * heads + h] = float(total);
    }
  return d_gains;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("shaped_attention_fwd_cpu", TORCH_BOX((&Unpacked<AttentionCall, shaped_attention_fwd>::run)));
  m.impl("shaped_attention_bwd_cpu", TORCH_BOX((&Unpacked<AttentionInto, shaped_attention_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
