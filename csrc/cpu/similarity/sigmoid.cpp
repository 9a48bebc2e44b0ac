// similarity_sigmoid on a CPU. The gradient of a sigmoid term needs no statistics, so that forward computes value and gradient in
// one sweep: it computes a chunk of the matrix, replaces it by its gradient, and multiplies that once with each side's features.
#include "sweep.h"

#include <tuple>

namespace simplclip {
namespace {

// Returns the terms [K], and the gradients of sum_k mix[k] terms[k]: d_image and d_text (empty unless needed), and d_sigmoids
// [2, K], those of weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_sigmoid(const SigmoidCall& call) {
  const int64_t terms = call.sigmoids.size(1);
  STD_TORCH_CHECK(terms == 1 || terms == 2, "sigmoids: expected one or two terms, got ", terms);
  const SimilarityCall similarities{.image = call.image, .text = call.text, .ids = call.ids, .text_ids = call.text_ids,
                                    .label_offset = call.label_offset, .chunk = call.chunk};
  const Sweep sweep(similarities, nullptr);
  FeatureGradients gradients(sweep, call.need_image, call.need_text);

  auto number = [&](SigmoidRow row, int64_t k) { return call.sigmoids.const_data_ptr<float>()[int(row) * terms + k]; };
  SigmoidTerm mixed[2] = {};
  for (int64_t k = 0; k < terms; ++k) {
    const float mix = number(SigmoidRow::kMix, k);
    mixed[k] = {.weight = number(SigmoidRow::kWeight, k), .bias = number(SigmoidRow::kBias, k),
                .negative = number(SigmoidRow::kNegative, k) * mix, .positive = number(SigmoidRow::kPositive, k) * mix};
  }

  SigmoidSums total{};
  std::vector<SigmoidSums> parts(strips_of(sweep.chunk));
  sweep.for_chunks([&](int64_t first, int64_t count) {
    sweep.for_strips(first, count, false, [&](Strip strip, int64_t, int64_t index) {
      if (!call.gradient) strip.grad = nullptr;
      parts[index] = instruction_set().strip.sigmoid(strip, mixed, int(terms), sweep.is_bf16);
    });
    for (int64_t index = 0; index < strips_of(count); ++index)
      for (int64_t k = 0; k < terms; ++k) {
        total.negative[k] += parts[index].negative[k];
        total.positive[k] += parts[index].positive[k];
        total.weight[k] += parts[index].weight[k];
        total.bias[k] += parts[index].bias[k];
      }
    gradients.add(first, count);
  });

  Tensor values = allocate(call.sigmoids, {terms}), d_sigmoids = allocate(call.sigmoids, {2, terms});
  for (int64_t k = 0; k < terms; ++k) {
    data<float>(values)[k] = float(number(SigmoidRow::kNegative, k) * total.negative[k] +
                                   number(SigmoidRow::kPositive, k) * total.positive[k]);
    data<float>(d_sigmoids)[k] = float(total.weight[k]);
    data<float>(d_sigmoids)[terms + k] = float(total.bias[k]);
  }
  return {values, gradients.image(), gradients.text(), d_sigmoids};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_sigmoid_cpu", TORCH_BOX((&Unpacked<SigmoidCall, similarity_sigmoid>::run)));
}

}  // namespace
}  // namespace simplclip
