#include "launch.cuh"

namespace simplclip {

template cudaError_t launch_shaped_forward<gpu::bf16>(ShapedAttentionForward, cudaStream_t);
template cudaError_t launch_shaped_backward<gpu::bf16>(const ShapedAttentionBackward&, cudaStream_t);

}  // namespace simplclip
