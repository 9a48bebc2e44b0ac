// shaped_attention on CUDA tensors. Heads may have any strides that are multiples of 16 bytes.
#include "../../calls.h"
#include "../../layout.h"
#include "plan.h"

namespace simplclip {
namespace {

using torch::stable::accelerator::DeviceGuard;

bool is_aligned(const Tensor& t) {
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) * bytes_of(t) % 16 == 0);
  return aligned;
}

// Returns the tensor, or memory of its shape if its rows are not aligned.
Tensor aligned_like(const Tensor& t) {
  return is_aligned(t) ? t : allocate(t, t.sizes());
}

// Returns the tensor, or a copy if its rows are not aligned.
Tensor aligned(const Tensor& t) {
  Tensor to = aligned_like(t);
  if (!is_aligned(t)) torch::stable::copy_(to, t);
  return to;
}

// The workspace of forward: the call, with copies of the tensors that are not aligned.
struct ForwardWorkspace : AttentionCall {
  ForwardWorkspace(const AttentionCall& call) : AttentionCall(call) {
    for (Tensor* t : {&q, &k, &v}) *t = aligned(*t);
  }
};

// The workspace of backward: the call with aligned tensors, and memory for the gradients of the gains by sequence.
struct BackwardWorkspace : AttentionInto {
  Tensor parts;  // [B, 3, H]

  BackwardWorkspace(const AttentionInto& call) : AttentionInto(call) {
    for (Tensor* t : {&q, &k, &v, &grad}) *t = aligned(*t);
    for (Tensor* t : {&dq, &dk, &dv}) *t = aligned_like(*t);
    parts = allocate(gains, {q.size(0), 3, q.size(2)});
  }
};

HeadsView view(const Tensor& t) {
  const int64_t bytes = bytes_of(t);
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

ShapedAttention shaped(const AttentionCall& call, const Tensor& lse) {
  const Tensor& q = call.q;
  expect_layout(call, lse);
  const char* reason = why_no_shaped_plan(q.size(1), q.size(3), q.scalar_type() == ScalarType::Float);
  STD_TORCH_CHECK(!reason, "shaped_attention on CUDA ", reason, ", got [B, L, H, K] = [", q.size(0), ", ", q.size(1), ", ",
                  q.size(2), ", ", q.size(3), "]");
  STD_TORCH_CHECK(q.size(0) * q.size(2) < int64_t(1) << 31,
                  "shaped_attention on CUDA serves less than 2^31 heads of sequences");
  return {view(q), view(call.k), view(call.v), call.gains.const_data_ptr<float>(),
          call.lengths ? call.lengths->const_data_ptr<int32_t>() : nullptr, lse.mutable_data_ptr<float>(),
          int(q.size(0)), int(q.size(1)), int(q.size(2)), int(q.size(3)), float(call.scale), call.causal};
}

void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check(const char* error) {
  STD_TORCH_CHECK(!error, "shaped_attention on CUDA: the launch failed: ", error);
}

// Calls f(null pointer to the kernels' type for the dtype of t), and raises the error that f returns, if any.
template <class F>
void check_by_type(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return check(f(static_cast<gpu::bf16*>(nullptr)));
    case ScalarType::Half: return check(f(static_cast<gpu::f16*>(nullptr)));
    default: check(f(static_cast<gpu::tf32*>(nullptr)));
  }
}

// Returns the result [B, L, H, K] and the log-sum-exps [B, H, L].
std::tuple<Tensor, Tensor> shaped_attention_fwd(const AttentionCall& call) {
  const Tensor& q = call.q;
  const DeviceGuard guard(q.get_device_index());
  const Tensor out = allocate(q, q.sizes());
  const Tensor lse = allocate(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const ForwardWorkspace work(call);
  const ShapedAttentionForward p{shaped(work, lse), view(out), 0};
  if (q.size(0) == 0) return {out, lse};
  check_by_type(q, [&]<class T>(T*) { return launch_shaped_forward<T>(p, stream_of(q)); });
  return {out, lse};
}

// Writes dq, dk, dv and returns the gradients of the gains [3, H].
Tensor shaped_attention_bwd(const AttentionInto& call) {
  const DeviceGuard guard(call.q.get_device_index());
  void* const stream = stream_of(call.q);
  const int batch = call.q.size(0), heads = call.q.size(2);
  const Tensor d_gains = allocate(call.gains, {3, heads});
  const BackwardWorkspace work(call);
  const ShapedAttentionBackward p{shaped(work, work.lse), view(work.grad), view(work.dq), view(work.dk), view(work.dv),
                                  work.parts.mutable_data_ptr<float>()};
  if (batch > 0) check_by_type(call.q, [&]<class T>(T*) { return launch_shaped_backward<T>(p, stream); });
  check(launch_shaped_gains(p.d_gains, d_gains.mutable_data_ptr<float>(), batch, 3 * heads, stream));
  for (const auto gradient : {&AttentionInto::dq, &AttentionInto::dk, &AttentionInto::dv}) {
    Tensor to = call.*gradient;
    if (!is_aligned(to)) torch::stable::copy_(to, work.*gradient);
  }
  return d_gains;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CUDA, m) {
  m.impl("shaped_attention_fwd_cuda", TORCH_BOX((&Unpacked<AttentionCall, shaped_attention_fwd>::run)));
  m.impl("shaped_attention_bwd_cuda", TORCH_BOX((&Unpacked<AttentionInto, shaped_attention_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
