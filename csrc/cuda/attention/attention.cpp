// shaped_attention on CUDA tensors: the launches of its kernels. simplclip/ops/attention/cuda.py says which calls they serve, and
// aligns the heads.
#include "call_structs.h"  // written by setup.py, see csrc/call_headers.py
#include "attention.h"

namespace simplclip {
namespace {

using torch::stable::accelerator::DeviceGuard;

HeadsView view(const Tensor& t) {
  const int64_t bytes = bytes_of(t);
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

ShapedAttention shaped(const AttentionCall& call, const Tensor& lse) {
  const Tensor& q = call.q;
  return {view(q), view(call.k), view(call.v), call.gains.const_data_ptr<float>(),
          call.lengths ? call.lengths->const_data_ptr<int32_t>() : nullptr, lse.mutable_data_ptr<float>(),
          int(q.size(0)), int(q.size(1)), int(q.size(2)), int(q.size(3)), float(call.scale), call.causal};
}

void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Calls f(null pointer to the kernels' type for the dtype of t), and raises the error that f returns, if any.
template <class F>
void check_by_type(const Tensor& t, F&& f) {
  const char* error = nullptr;
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: error = f(static_cast<gpu::bf16*>(nullptr)); break;
    case ScalarType::Half: error = f(static_cast<gpu::f16*>(nullptr)); break;
    default: error = f(static_cast<gpu::tf32*>(nullptr));
  }
  STD_TORCH_CHECK(!error, "shaped_attention on CUDA: the launch failed: ", error);
}

// Returns the result [B, L, H, K] and the log-sum-exps [B, H, L].
std::tuple<Tensor, Tensor> shaped_attention_fwd(const AttentionCall& call) {
  const Tensor& q = call.q;
  const DeviceGuard guard(q.get_device_index());
  const Tensor out = allocate(q, q.sizes());
  const Tensor lse = allocate(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (q.size(0) == 0) return {out, lse};
  const ShapedAttentionForward p{shaped(call, lse), view(out), 0};
  check_by_type(q, [&]<class T>(T*) { return launch_shaped_forward<T>(p, stream_of(q)); });
  return {out, lse};
}

// Writes dq, dk, dv and returns each sequence's share of the gains' gradients [B, 3, H].
Tensor shaped_attention_bwd(const AttentionInto& call) {
  const Tensor& q = call.q;
  const DeviceGuard guard(q.get_device_index());
  const Tensor parts = allocate(call.gains, {q.size(0), 3, q.size(2)});
  if (q.size(0) == 0) return parts;
  const ShapedAttentionBackward p{shaped(call, call.lse), view(call.grad), view(call.dq), view(call.dk), view(call.dv),
                                  parts.mutable_data_ptr<float>()};
  check_by_type(q, [&]<class T>(T*) { return launch_shaped_backward<T>(p, stream_of(q)); });
  return parts;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CUDA, m) {
  m.impl("shaped_attention_fwd_cuda", TORCH_BOX((&Unpacked<AttentionCall, shaped_attention_fwd>::run)));
  m.impl("shaped_attention_bwd_cuda", TORCH_BOX((&Unpacked<AttentionInto, shaped_attention_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
