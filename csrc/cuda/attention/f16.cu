#include "launch.cuh"

namespace simplclip {

template cudaError_t launch_shaped_forward<gpu::f16>(ShapedAttentionForward, cudaStream_t);
template cudaError_t launch_shaped_backward<gpu::f16>(const ShapedAttentionBackward&, cudaStream_t);

}  // namespace simplclip
