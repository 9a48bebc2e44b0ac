// The sum of a^T b over chunks of the rows of a and b.
#pragma once

#include "instruction_set.h"
#include "tensors.h"

namespace simplclip {

class TransposedSum {
 public:
  // The sum has the shape and dtype of `like`, or no rows if it is not `needed`. `in_float`: sums several products of half
  // types in float32.
  TransposedSum(const Tensor& like, bool needed, bool in_float)
      : needed_(needed), in_float_(needed && in_float),
        out_(allocate(like, {needed ? like.size(0) : 0, like.size(1)})) {
    if (in_float_) sum_ = allocate(out_, {out_.size(0), out_.size(1)}, ScalarType::Float);
  }

  // With a sum in float32, the latest product stays in out_ until the next one, or result(), which adds and rounds in one pass.
  void add(const Tensor& a, const Tensor& b) {
    if (!needed_) return;
    const Tensor a_transposed = transposed(a);
    if (in_float_ && count_ > 0) {
      float* sum = sum_.mutable_data_ptr<float>();
      for_all([&](int64_t begin, int64_t count) {
        instruction_set().elementwise.convert(type_of(out_), element(out_, begin), Float::kFloat, sum + begin, count, count_ > 1);
      });
    }
    count_ == 0 || in_float_ ? mm_out(out_, a_transposed, b) : mm_add(out_, a_transposed, b);
    ++count_;
  }

  Tensor result() {
    if (count_ == 0) torch::stable::zero_(out_);
    if (in_float_ && count_ > 1) {
      const float* sum = sum_.const_data_ptr<float>();
      for_all([&](int64_t begin, int64_t count) {
        instruction_set().elementwise.convert(Float::kFloat, sum + begin, type_of(out_), element(out_, begin), count, true);
      });
    }
    return out_;
  }

 private:
  template <class F>
  void for_all(F&& f) {
    torch::stable::parallel_for(0, out_.numel(), 1 << 16, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
  }

  bool needed_, in_float_;
  int64_t count_ = 0;  // products
  Tensor out_, sum_;
};

}  // namespace simplclip
