// shaped_attention on CUDA tensors. Heads may have any strides that are multiples of 16 bytes.
#include <cuda_runtime.h>

#include <tuple>

#include "../../layout.h"
#include "../../scratch.h"
#include "launch.h"
#include "plan.h"

namespace simplclip {
namespace {

using torch::stable::new_empty;

int64_t bytes_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

bool is_aligned(const Tensor& t) {
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) * bytes_of(t) % 16 == 0);
  return aligned;
}

Tensor dense_like(const Tensor& t) { return new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}); }

constexpr int64_t kGrain = 512;  // of the CUDA allocator

// The tensor, or memory of its shape if its rows are not aligned.
Tensor aligned_like(const Tensor& t, Scratch& scratch) {
  return is_aligned(t) ? t : scratch.take(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
}

// The tensor, or a copy if its rows are not aligned.
Tensor aligned(const Tensor& t, Scratch& scratch) {
  Tensor to = aligned_like(t, scratch);
  if (!is_aligned(t)) torch::stable::copy_(to, t);
  return to;
}

// Aligned tensors that forward and backward read and write.
struct Heads {
  Tensor q, k, v;

  Heads(const Tensor& q, const Tensor& k, const Tensor& v, Scratch& scratch)
      : q(aligned(q, scratch)), k(aligned(k, scratch)), v(aligned(v, scratch)) {}
};

struct Backward {
  Heads heads;
  Tensor grad, d[3], parts;  // parts: the gains' gradients of each sequence [B, 3, H]

  Backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gains, const Tensor& dq,
           const Tensor& dk, const Tensor& dv, Scratch& scratch)
      : heads(q, k, v, scratch), grad(aligned(grad, scratch)),
        d{aligned_like(dq, scratch), aligned_like(dk, scratch), aligned_like(dv, scratch)},
        parts(scratch.take(gains, {q.size(0), 3, q.size(2)})) {}
};

HeadsView view(const Tensor& t) {
  const int64_t bytes = bytes_of(t);
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

ShapedAttention shaped(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gains, const Tensor& lse,
                       const std::optional<Tensor>& lengths, double scale, bool causal) {
  expect_contiguous("gains", gains);
  expect_contiguous("lse", lse);
  expect_contiguous("lengths", lengths);
  const char* reason = why_no_shaped_plan(q.size(1), q.size(3));
  STD_TORCH_CHECK(!reason, "shaped_attention on CUDA ", reason, ", got [B, L, H, K] = [", q.size(0), ", ", q.size(1), ", ",
                  q.size(2), ", ", q.size(3), "]");
  STD_TORCH_CHECK(q.size(0) * q.size(2) < int64_t(1) << 31,
                  "shaped_attention on CUDA serves less than 2^31 heads of sequences");
  return {view(q), view(k), view(v), gains.const_data_ptr<float>(), lengths ? lengths->const_data_ptr<int32_t>() : nullptr,
          lse.mutable_data_ptr<float>(), int(q.size(0)), int(q.size(1)), int(q.size(2)), int(q.size(3)), float(scale),
          causal};
}

// The device's current stream; makes the device current during its lifetime.
class Launching {
 public:
  explicit Launching(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "shaped_attention on CUDA: the launch failed: ", cudaGetErrorString(error));
}

// Returns the result [B, L, H, K] and the log-sum-exps [B, H, L].
std::tuple<Tensor, Tensor> shaped_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gains,
                                                const std::optional<Tensor>& lengths, double scale, bool causal) {
  const Launching launching(q);
  const Tensor out = dense_like(q);
  const Tensor lse = new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  Scratch scratch(kGrain);
  const Heads heads(q, k, v, scratch);
  const ShapedAttentionForward p{shaped(heads.q, heads.k, heads.v, gains, lse, lengths, scale, causal), view(out), 0};
  if (q.size(0) == 0) return {out, lse};
  switch (q.scalar_type()) {
    case ScalarType::BFloat16: check(launch_shaped_forward<gpu::bf16>(p, launching.stream())); break;
    case ScalarType::Half: check(launch_shaped_forward<gpu::f16>(p, launching.stream())); break;
    default: check(launch_shaped_forward<gpu::tf32>(p, launching.stream()));
  }
  return {out, lse};
}

// Writes dq, dk, dv and returns the gradients of the gains [3, H].
Tensor shaped_attention_bwd(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gains,
                            const Tensor& lse, const std::optional<Tensor>& lengths, double scale, bool causal, Tensor dq,
                            Tensor dk, Tensor dv) {
  const Launching launching(q);
  const int64_t batch = q.size(0), heads = q.size(2);
  const Tensor d_gains = new_empty(gains, {3, heads});
  Scratch scratch(kGrain);
  const Backward work(grad, q, k, v, gains, dq, dk, dv, scratch);
  const ShapedAttentionBackward p{shaped(work.heads.q, work.heads.k, work.heads.v, gains, lse, lengths, scale, causal),
                                  view(work.grad), view(work.d[0]), view(work.d[1]), view(work.d[2]),
                                  work.parts.mutable_data_ptr<float>()};
  if (batch > 0) {
    switch (q.scalar_type()) {
      case ScalarType::BFloat16: check(launch_shaped_backward<gpu::bf16>(p, launching.stream())); break;
      case ScalarType::Half: check(launch_shaped_backward<gpu::f16>(p, launching.stream())); break;
      default: check(launch_shaped_backward<gpu::tf32>(p, launching.stream()));
    }
  }
  check(launch_shaped_gains(p.d_gains, d_gains.mutable_data_ptr<float>(), int(batch), int(3 * heads), launching.stream()));
  Tensor* const given[] = {&dq, &dk, &dv};
  for (int i = 0; i < 3; ++i) {
    if (!is_aligned(*given[i])) torch::stable::copy_(*given[i], work.d[i]);
  }
  return d_gains;
}

int64_t shaped_attention_fwd_cuda_workspace(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor&,
                                            const std::optional<Tensor>&, double, bool) {
  Scratch scratch(kGrain);
  Heads(q, k, v, scratch);
  return scratch.bytes();
}

int64_t shaped_attention_bwd_cuda_workspace(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& gains, const Tensor&, const std::optional<Tensor>&, double, bool,
                                            const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  Scratch scratch(kGrain);
  Backward(grad, q, k, v, gains, dq, dk, dv, scratch);
  return scratch.bytes();
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("shaped_attention_fwd_cuda_workspace", TORCH_BOX(&shaped_attention_fwd_cuda_workspace));
  m.impl("shaped_attention_bwd_cuda_workspace", TORCH_BOX(&shaped_attention_bwd_cuda_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CUDA, m) {
  m.impl("shaped_attention_fwd_cuda", TORCH_BOX(&shaped_attention_fwd));
  m.impl("shaped_attention_bwd_cuda", TORCH_BOX(&shaped_attention_bwd));
}

}  // namespace
}  // namespace simplclip
