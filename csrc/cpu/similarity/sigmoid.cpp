// similarity_sigmoid on a CPU: sigmoid terms, whose gradient needs no statistics, so that forward computes value and gradient in
// one sweep: a chunk of rows is multiplied, replaced by its gradient, and multiplied once with each side's features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <tuple>

namespace simplclip {
namespace {

// The memory that it takes.
struct SigmoidScratch {
  int64_t chunk;
  Tensor similarities;  // [chunk, M]
  TransposedSum d_text;

  SigmoidScratch(const SigmoidCall& call, Scratch& scratch)
      : chunk(std::min(call.chunk, call.image.size(0))), similarities(scratch.take(call.image, {chunk, call.text.size(0)})),
        d_text(call.text, call.need_text, call.image.scalar_type() == ScalarType::BFloat16 && chunk < call.image.size(0), scratch) {}
};

// Returns the terms [K], d_image and d_text (empty unless needed), d_weight [K] and d_bias [K]: gradients of the terms' sum, each
// times its entry of mix.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_sigmoid(const SigmoidCall& call) {
  const Tensor &image = call.image, &text = call.text;
  expect_contiguous("image", image);
  expect_contiguous("text", text);
  expect_contiguous("image_share", call.image_share);
  expect_contiguous("text_share", call.text_share);
  expect_dtype_of("text", text, "image", image);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = image.size(0), m = text.size(0), d = image.size(1);
  const bool is_bf16 = image.scalar_type() == ScalarType::BFloat16;
  const Ids small(call.ids, call.text_ids);
  Scratch scratch;
  SigmoidScratch work(call, scratch);

  SigmoidIn in{};
  in.count = int(call.weight.size(0));
  auto number = [](const Tensor& of, int k) { return of.const_data_ptr<float>()[k]; };
  for (int k = 0; k < in.count; ++k)
    in.terms[k] = {number(call.weight, k), number(call.bias, k), number(call.mix, k) * number(call.negative, k),
                   number(call.mix, k) * number(call.positive, k)};

  Tensor d_image = new_empty(image, {call.need_image ? n : 0, d});
  SigmoidOut total{};
  std::vector<SigmoidOut> parts(strips_of(work.chunk));
  for (int64_t first = 0; first < n; first += work.chunk) {
    const int64_t count = std::min(work.chunk, n - first);
    Tensor sim = rows(work.similarities, 0, count);
    const Tensor x = rows(image, first, count);
    multiply(sim, x, text);
    parallel_for(0, strips_of(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k * kStripRows, row = first + i;
        Strip strip{};
        strip.sim = data<char>(sim) + i * m * (is_bf16 ? 2 : 4);
        strip.grad = call.gradient ? const_cast<void*>(strip.sim) : nullptr;
        strip.rows = std::min(kStripRows, count - i);
        strip.columns = m;
        strip.label = call.label_offset + row;
        strip.ids = small.row.empty() ? nullptr : small.row.data() + row;
        strip.text_ids = small.column.empty() ? nullptr : small.column.data();
        SigmoidIn mine = in;
        mine.row_share = call.image_share ? call.image_share->const_data_ptr<float>() + row : nullptr;
        mine.column_share = call.text_share ? call.text_share->const_data_ptr<float>() : nullptr;
        parts[k] = kernels.sigmoid(strip, mine, is_bf16);
      }
    });
    for (int64_t k = 0; k < strips_of(count); ++k)
      for (int t = 0; t < in.count; ++t) {
        total.negative[t] += parts[k].negative[t];
        total.positive[t] += parts[k].positive[t];
        total.weight[t] += parts[k].weight[t];
        total.bias[t] += parts[k].bias[t];
      }
    if (call.need_image) {
      Tensor to = rows(d_image, first, count);
      mm_out(to, sim, text);
    }
    work.d_text.add(sim, x);
  }

  Tensor terms = new_empty(call.weight, {in.count}), d_weight = new_empty(call.weight, {in.count});
  Tensor d_bias = new_empty(call.weight, {in.count});
  for (int t = 0; t < in.count; ++t) {
    terms.mutable_data_ptr<float>()[t] = float(number(call.negative, t) * total.negative[t] + number(call.positive, t) * total.positive[t]);
    d_weight.mutable_data_ptr<float>()[t] = float(total.weight[t]);
    d_bias.mutable_data_ptr<float>()[t] = float(total.bias[t]);
  }
  return {terms, d_image, work.d_text.result(), d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("similarity_sigmoid_cpu_workspace", TORCH_BOX((&Unpacked<SigmoidCall, workspace<SigmoidCall, SigmoidScratch>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) { m.impl("similarity_sigmoid_cpu", TORCH_BOX((&Unpacked<SigmoidCall, similarity_sigmoid>::run))); }

}  // namespace
}  // namespace simplclip
