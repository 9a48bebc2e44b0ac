#include "launch.cuh"

namespace simplclip {

template cudaError_t launch_shaped_forward<gpu::tf32>(ShapedAttentionForward, cudaStream_t);
template cudaError_t launch_shaped_backward<gpu::tf32>(const ShapedAttentionBackward&, cudaStream_t);

}  // namespace simplclip
