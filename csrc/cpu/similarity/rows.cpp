// similarity_rows on a CPU: cross-entropies of rows with constant keys. The softmax of a row needs only that row, so that each
// chunk is computed once and backward has no matrix product.
#include "sweep.h"

#include <tuple>

namespace simplclip {
namespace {

// The workspace: a sweep over the student's matrix of a SimilarityCall, with the query as images and the keys as texts.
struct RowsWork {
  SimilarityCall call;
  Sweep sweep;

  RowsWork(const RowsCall& rows, Scratch& scratch) : call(rows.student()), sweep(call, nullptr, scratch) {}
};

// Returns stats [2, N] (log-sum-exp over the negatives, similarity of the positive) and, where `attend`, the mean key of each row
// under its softmax over the negatives [N, D] (else [0, D]).
std::tuple<Tensor, Tensor> similarity_rows(const RowsCall& call) {
  Scratch scratch;
  RowsWork work(call, scratch);
  Sweep& sweep = work.sweep;
  const StripKernels& kernels = instruction_set().strip;
  Tensor stats = new_empty(call.query, {2, sweep.n}, ScalarType::Float);
  Tensor mean_keys = new_empty(call.query, {call.attend ? sweep.n : 0, sweep.d});
  float *lse = data<float>(stats), *diagonal = lse + sweep.n;
  const std::vector<float> ones(kStripRows, 1.0f), zeros(kStripRows, 0.0f);

  sweep.for_chunks([&](int64_t first, int64_t count) {
    const Tensor sim = sweep.load(*sweep.student, first, count, false);
    sweep.for_strips(*sweep.student, sim, nullptr, first, count, [&](Strip strip, int64_t i, int64_t) {
      strip.grad_scale = 1;
      ForwardOut out{};
      out.lse = lse + first + i;
      out.diagonal = diagonal + first + i;
      kernels.forward(strip, out, sweep.is_bf16);
      if (!call.attend) return;
      BackwardIn in{};
      in.lse = out.lse;
      in.g_lse = ones.data();
      in.g_diagonal = zeros.data();
      kernels.backward(strip, in, Softmax::kRows, sweep.is_bf16);
    });
    if (!call.attend) return;
    Tensor to = rows(mean_keys, first, count);
    mm_out(to, sim, call.keys);
  });
  return {stats, mean_keys};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("similarity_rows_cpu_workspace", TORCH_BOX((&Unpacked<RowsCall, workspace<RowsCall, RowsWork>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_rows_cpu", TORCH_BOX((&Unpacked<RowsCall, similarity_rows>::run)));
}

}  // namespace
}  // namespace simplclip
