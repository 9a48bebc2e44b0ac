// similarity_sigmoid on a CPU: sigmoid terms, whose gradient needs no statistics, so that forward computes value and gradient in
// one sweep: a chunk of rows is multiplied, replaced by its gradient, and multiplied once with each side's features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <tuple>

namespace simplclip {
namespace {

// The student's matrix of a SimilarityCall, whose logits are left to the terms.
struct Sigmoid {
  SimilarityCall call;
  Sweep sweep;
  TransposedSum d_text;

  Sigmoid(const SigmoidCall& sigmoid, Scratch& scratch)
      : call{.image = sigmoid.image, .text = sigmoid.text, .scale = sigmoid.weight, .ids = sigmoid.ids,
             .text_ids = sigmoid.text_ids, .label_offset = sigmoid.label_offset, .softmax = true, .chunk = sigmoid.chunk},
        sweep(call, nullptr, scratch), d_text(call.text, sigmoid.need_text, sweep.is_bf16 && sweep.chunk < sweep.n, scratch) {}
};

// Returns the terms [K], d_image and d_text (empty unless needed), d_weight [K] and d_bias [K]: gradients of the terms' sum, each
// times its entry of mix.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_sigmoid(const SigmoidCall& call) {
  expect_contiguous("image_share", call.image_share);
  expect_contiguous("text_share", call.text_share);
  Scratch scratch;
  Sigmoid work(call, scratch);
  Sweep& sweep = work.sweep;

  SigmoidIn in{};
  in.count = int(call.weight.size(0));
  auto number = [](const Tensor& of, int k) { return of.const_data_ptr<float>()[k]; };
  for (int k = 0; k < in.count; ++k)
    in.terms[k] = {number(call.weight, k), number(call.bias, k), number(call.mix, k) * number(call.negative, k),
                   number(call.mix, k) * number(call.positive, k)};

  Tensor d_image = new_empty(call.image, {call.need_image ? sweep.n : 0, sweep.d});
  SigmoidOut total{};
  std::vector<SigmoidOut> parts(strips_of(sweep.chunk));
  sweep.for_chunks([&](int64_t first, int64_t count) {
    const Tensor sim = sweep.load(*sweep.student, first, count, false);
    sweep.for_strips(*sweep.student, sim, nullptr, first, count, [&](Strip strip, int64_t i, int64_t k) {
      if (!call.gradient) strip.grad = nullptr;
      SigmoidIn mine = in;
      mine.row_share = call.image_share ? call.image_share->const_data_ptr<float>() + first + i : nullptr;
      mine.column_share = call.text_share ? call.text_share->const_data_ptr<float>() : nullptr;
      parts[k] = instruction_set().strip.sigmoid(strip, mine, sweep.is_bf16);
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
      mm_out(to, sim, call.text);
    }
    work.d_text.add(sim, rows(call.image, first, count));
  });

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
  m.impl("similarity_sigmoid_cpu_workspace", TORCH_BOX((&Unpacked<SigmoidCall, workspace<SigmoidCall, Sigmoid>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) { m.impl("similarity_sigmoid_cpu", TORCH_BOX((&Unpacked<SigmoidCall, similarity_sigmoid>::run))); }

}  // namespace
}  // namespace simplclip
