// similarity_rows on a CPU: cross-entropies of rows with constant keys. The softmax of a row needs only that row, so that each
// chunk is computed once and backward has no matrix product.
#include "sweep.h"

#include <tuple>

namespace simplclip {
namespace {

struct RowsScratch {
  Tensor similarities, negatives;  // [chunk, M], [N]

  RowsScratch(const Tensor& query, const Tensor& keys, int64_t chunk, Scratch& scratch)
      : similarities(scratch.take(query, {std::min(chunk, query.size(0)), keys.size(0)})),
        negatives(scratch.take(query, {query.size(0)}, ScalarType::Float)) {}
};

int64_t similarity_rows_cpu_workspace(Tensor query, Tensor keys, Tensor, std::optional<Tensor>, std::optional<Tensor>, int64_t, bool,
                                  int64_t chunk) {
  Scratch scratch;
  RowsScratch(query, keys, chunk, scratch);
  return scratch.bytes();
}

// Returns stats [2, N] (log-sum-exp over the negatives, similarity of the positive) and, where `attend`, the mean key of each row
// under its softmax over the negatives [N, D] (else [0, D]).
std::tuple<Tensor, Tensor> similarity_rows(Tensor query, Tensor keys, Tensor scale, std::optional<Tensor> ids,
                                           std::optional<Tensor> key_ids, int64_t label_offset, bool attend, int64_t chunk) {
  expect_contiguous("query", query);
  expect_contiguous("keys", keys);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = query.size(0), m = keys.size(0), d = query.size(1);
  const bool is_bf16 = query.scalar_type() == ScalarType::BFloat16;
  const Ids small(ids, key_ids);
  chunk = std::min(chunk, n);
  Tensor stats = new_empty(query, {2, n}, ScalarType::Float), mean_keys = new_empty(query, {attend ? n : 0, d});
  Scratch scratch;
  const RowsScratch work(query, keys, chunk, scratch);
  float *lse = data<float>(stats), *diagonal = lse + n;
  const std::vector<float> ones(kStripRows, 1.0f), zeros(kStripRows, 0.0f);

  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t count = std::min(chunk, n - first);
    Tensor sim = rows(work.similarities, 0, count);
    multiply(sim, rows(query, first, count), keys);
    parallel_for(0, strips_of(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k * kStripRows, row = first + i;
        Strip strip{};
        strip.sim = strip.grad = data<char>(sim) + i * m * (is_bf16 ? 2 : 4);
        strip.rows = std::min(kStripRows, count - i);
        strip.columns = m;
        strip.label = label_offset + row;
        strip.ids = small.row.empty() ? nullptr : small.row.data() + row;
        strip.text_ids = small.column.empty() ? nullptr : small.column.data();
        strip.scale = *scale.const_data_ptr<float>();
        strip.grad_scale = 1;
        ForwardOut out{};
        out.lse = lse + row;
        out.diagonal = diagonal + row;
        out.negatives = data<float>(work.negatives) + row;
        kernels.forward(strip, out, Terms::kSoftmax, is_bf16);
        if (!attend) continue;
        BackwardIn in{};
        in.lse = lse + row;
        in.g_lse = ones.data();
        in.g_diagonal = zeros.data();
        kernels.backward(strip, in, Terms::kSoftmax, Softmax::kRows, is_bf16);
      }
    });
    if (!attend) continue;
    Tensor to = rows(mean_keys, first, count);
    mm_out(to, sim, keys);
  }
  return {stats, mean_keys};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("similarity_rows_cpu_workspace", TORCH_BOX(&similarity_rows_cpu_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) { m.impl("similarity_rows_cpu", TORCH_BOX(&similarity_rows)); }

}  // namespace
}  // namespace simplclip
