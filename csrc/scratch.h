// Workspace: the memory that an op's function allocates besides its results. The function takes all of it from a Scratch at its
// start, so that the same code on meta tensors computes the size of the workspace for simplclip/plan/count.py.
#pragma once

#include "layout.h"

namespace simplclip {

class Scratch {
 public:
  // `grain`: the allocator rounds each allocation up to a multiple of `grain` bytes.
  explicit Scratch(int64_t grain = 1) : grain_(grain) {}

  Tensor take(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    Tensor out = allocate(like, sizes, dtype);
    const int64_t size = out.numel() * bytes_of(out);
    bytes_ += (size + grain_ - 1) / grain_ * grain_;
    return out;
  }
  Tensor take(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return take(like, sizes, like.scalar_type());
  }

  int64_t bytes() const { return bytes_; }

 private:
  int64_t grain_, bytes_ = 0;
};

// Returns the bytes of workspace of a function. Workspace is a struct whose constructor takes all of it from a Scratch.
template <class Call, class Workspace, int64_t grain = 1>
int64_t workspace_bytes(const Call& call) {
  Scratch scratch(grain);
  Workspace(call, scratch);
  return scratch.bytes();
}

// The workspace of a function that allocates nothing but its results.
struct NoWorkspace {
  template <class Call>
  NoWorkspace(const Call&, Scratch&) {}
};

}  // namespace simplclip
