// feature_loss on a CPU: tasks of a fixed number of rows, whose sums are added in order.
#include "../../calls.h"
#include "../../scratch.h"
#include "../instruction_set.h"
#include "../tensors.h"

#include <algorithm>
#include <vector>

namespace simplclip {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr int64_t kTaskRows = 16;
constexpr int64_t kGrain = 32768;  // elements per thread, at least

void* row(const Tensor& t, int64_t i) { return element(t, i * t.size(1)); }

// Calls f(rows of the task, index of its first row, index of the task) for each task, in parallel.
template <class F>
void for_tasks(const FeatureCall& call, const Tensor& inv_norms, F&& f) {
  const Tensor &student = call.student, &teacher = call.teacher;
  expect_contiguous("student", student);
  expect_contiguous("teacher", teacher);
  expect_contiguous("inv_norms", inv_norms);
  const int64_t n = student.size(0), d = student.size(1);
  float* inv = call.normalize ? inv_norms.mutable_data_ptr<float>() : nullptr;
  const int64_t tasks = (n + kTaskRows - 1) / kTaskRows, grain = std::max<int64_t>(1, kGrain / (kTaskRows * d));
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k * kTaskRows;
      f(FeatureRows{row(student, i), row(teacher, i), type_of(student), type_of(teacher), std::min(kTaskRows, n - i), d,
                    call.smooth, float(call.beta), inv ? inv + i : nullptr, inv ? inv + n + i : nullptr},
        i, k);
    }
  });
}

// Returns the mean distance [] and the inverse norms of student and teacher [2, N] ([2, 0] without normalisation).
std::tuple<Tensor, Tensor> feature_loss_fwd(const FeatureCall& call) {
  const int64_t n = call.student.size(0), d = call.student.size(1);
  Tensor loss = new_empty(call.student, {}, ScalarType::Float);
  Tensor inv_norms = new_empty(call.student, {2, call.normalize ? n : 0}, ScalarType::Float);
  std::vector<double> sums((n + kTaskRows - 1) / kTaskRows);
  for_tasks(call, inv_norms, [&](const FeatureRows& rows, int64_t, int64_t k) {
    sums[k] = instruction_set().feature.forward(rows);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  *loss.mutable_data_ptr<float>() = float(total / (double(n) * double(d)));
  return {loss, inv_norms};
}

// Returns the gradient of the student.
Tensor feature_loss_bwd(const FeatureGradient& call) {
  const int64_t n = call.student.size(0), d = call.student.size(1);
  Tensor d_student = new_empty(call.student, {n, d});
  const float factor = float(*call.grad.const_data_ptr<float>() * (call.smooth ? 1.0 : 2.0) / (double(n) * double(d)));
  for_tasks(call, call.inv_norms, [&](const FeatureRows& rows, int64_t i, int64_t) {
    instruction_set().feature.backward(rows, factor, row(d_student, i));
  });
  return d_student;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("feature_loss_fwd_cpu_workspace", TORCH_BOX((&Unpacked<FeatureCall, workspace<FeatureCall, NoWork>>::run)));
  m.impl("feature_loss_bwd_cpu_workspace", TORCH_BOX((&Unpacked<FeatureGradient, workspace<FeatureGradient, NoWork>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("feature_loss_fwd_cpu", TORCH_BOX((&Unpacked<FeatureCall, feature_loss_fwd>::run)));
  m.impl("feature_loss_bwd_cpu", TORCH_BOX((&Unpacked<FeatureGradient, feature_loss_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
