// feature_loss on a CPU: tasks of a fixed number of rows, whose sums are added in order.
#include "../../scratch.h"
#include "../instruction_set.h"
#include "../tensors.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace simplclip {

namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr int64_t kTaskRows = 16;
constexpr int64_t kGrain = 32768;  // elements per thread, at least

const void* row(const Tensor& t, int64_t i) { return element(t, i * t.size(1)); }

// Calls f(rows of a task, its first row, its number) in parallel over the tasks.
template <class F>
void for_tasks(const Tensor& student, const Tensor& teacher, const Tensor& inv_norms, bool smooth, double beta, F&& f) {
  expect_contiguous("student", student);
  expect_contiguous("teacher", teacher);
  expect_contiguous("inv_norms", inv_norms);
  const int64_t n = student.size(0), d = student.size(1);
  float* inv = inv_norms.size(1) ? static_cast<float*>(inv_norms.mutable_data_ptr()) : nullptr;
  parallel_for(0, (n + kTaskRows - 1) / kTaskRows, std::max<int64_t>(1, kGrain / (kTaskRows * d)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k * kTaskRows;
      f(FeatureRows{row(student, i), row(teacher, i), type_of(student), type_of(teacher), std::min(kTaskRows, n - i), d,
                    smooth, float(beta), inv ? inv + i : nullptr, inv ? inv + n + i : nullptr},
        i, k);
    }
  });
}

// Returns the mean distance [] and the inverse norms of student and teacher [2, N] ([2, 0] without normalisation).
std::tuple<Tensor, Tensor> feature_loss_fwd(const Tensor& student, const Tensor& teacher, bool smooth, double beta,
                                            bool normalize) {
  const FeatureKernels& isa = instruction_set().feature;
  const int64_t n = student.size(0), d = student.size(1);
  Tensor loss = new_empty(student, {}, ScalarType::Float);
  Tensor inv_norms = new_empty(student, {2, normalize ? n : 0}, ScalarType::Float);
  std::vector<double> sums((n + kTaskRows - 1) / kTaskRows);
  for_tasks(student, teacher, inv_norms, smooth, beta,
            [&](const FeatureRows& rows, int64_t, int64_t k) { sums[k] = isa.forward(rows); });
  double total = 0;
  for (const double sum : sums) total += sum;
  *loss.mutable_data_ptr<float>() = float(total / (double(n) * double(d)));
  return {loss, inv_norms};
}

// Returns the gradient of the student.
Tensor feature_loss_bwd(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& inv_norms, bool smooth,
                        double beta) {
  const FeatureKernels& isa = instruction_set().feature;
  const int64_t n = student.size(0), d = student.size(1);
  Tensor d_student = new_empty(student, {n, d});
  const float factor = float(*grad.const_data_ptr<float>() * (smooth ? 1.0 : 2.0) / (double(n) * double(d)));
  for_tasks(student, teacher, inv_norms, smooth, beta, [&](const FeatureRows& rows, int64_t i, int64_t) {
    isa.backward(rows, factor, const_cast<void*>(row(d_student, i)));
  });
  return d_student;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("feature_loss_fwd_cpu_workspace", TORCH_BOX(&NoWorkspace<&feature_loss_fwd>::bytes));
  m.impl("feature_loss_bwd_cpu_workspace", TORCH_BOX(&NoWorkspace<&feature_loss_bwd>::bytes));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("feature_loss_fwd_cpu", TORCH_BOX(&feature_loss_fwd));
  m.impl("feature_loss_bwd_cpu", TORCH_BOX(&feature_loss_bwd));
}

}  // namespace
}  // namespace simplclip
