// similarity_sigmoid on a CPU. The gradient of a sigmoid term needs no statistics, so that forward computes value and gradient in
// one sweep: it computes a chunk of the matrix, replaces it by its gradient, and multiplies that once with each side's features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <tuple>

namespace simplclip {
namespace {

// The workspace: a sweep over the student's matrix of a SimilarityCall, without its softmax, and the sum of d_text.
struct SigmoidWork {
  SimilarityCall call;
  Sweep sweep;
  TransposedSum d_text;

  SigmoidWork(const SigmoidCall& sigmoid, Scratch& scratch)
      : call(sigmoid.student()), sweep(call, nullptr, scratch),
        d_text(call.text, sigmoid.need_text, sweep.is_bf16 && sweep.chunk < sweep.n, scratch) {}
};

// Returns the terms [K], and the gradients of sum_k mix[k] terms[k]: d_image and d_text (empty unless needed), d_weight [K] and
// d_bias [K].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_sigmoid(const SigmoidCall& call) {
  Scratch scratch;
  SigmoidWork work(call, scratch);
  Sweep& sweep = work.sweep;

  const int count_of_terms = int(call.weight.size(0));
  const float* mix = call.mix.const_data_ptr<float>();

  Tensor d_image = new_empty(call.image, {call.need_image ? sweep.n : 0, sweep.d});
  SigmoidOut total{};
  std::vector<SigmoidOut> parts(strips_of(sweep.chunk));
  sweep.for_chunks([&](int64_t first, int64_t count) {
    const Tensor sim = sweep.load(*sweep.student, first, count, false);
    sweep.for_strips(*sweep.student, sim, nullptr, first, count, [&](Strip strip, int64_t i, int64_t k) {
      if (!call.gradient) strip.grad = nullptr;
      SigmoidIn in = sweep.sigmoids(first + i);
      for (int t = 0; t < in.count; ++t) {
        in.terms[t].negative *= mix[t];
        in.terms[t].positive *= mix[t];
      }
      parts[k] = instruction_set().strip.sigmoid(strip, in, sweep.is_bf16);
    });
    for (int64_t k = 0; k < strips_of(count); ++k)
      for (int t = 0; t < count_of_terms; ++t) {
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

  const SigmoidIn in = sweep.sigmoids(0);
  Tensor terms = new_empty(call.weight, {count_of_terms}), d_weight = new_empty(call.weight, {count_of_terms});
  Tensor d_bias = new_empty(call.weight, {count_of_terms});
  for (int t = 0; t < count_of_terms; ++t) {
    const SigmoidTerm& term = in.terms[t];
    terms.mutable_data_ptr<float>()[t] = float(term.negative * total.negative[t] + term.positive * total.positive[t]);
    d_weight.mutable_data_ptr<float>()[t] = float(total.weight[t]);
    d_bias.mutable_data_ptr<float>()[t] = float(total.bias[t]);
  }
  return {terms, d_image, work.d_text.result(), d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("similarity_sigmoid_cpu_workspace", TORCH_BOX((&Unpacked<SigmoidCall, workspace<SigmoidCall, SigmoidWork>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_sigmoid_cpu", TORCH_BOX((&Unpacked<SigmoidCall, similarity_sigmoid>::run)));
}

}  // namespace
}  // namespace simplclip
