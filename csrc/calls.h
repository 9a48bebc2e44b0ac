// Arguments of ops: structs with the fields, in order, of the dataclasses in simplclip/ops/*/call.py, which give the schemas.
#pragma once

#include "layout.h"

#include <string>
#include <tuple>
#include <utility>

namespace simplclip {

struct AttentionCall {
  Tensor q, k, v;                 // [B, L, H, K]
  Tensor gains;                   // [3, H]: alpha, beta, gamma
  std::optional<Tensor> lengths;  // [B]
  double scale;
  bool causal;

  auto fields() { return std::tie(q, k, v, gains, lengths, scale, causal); }

  void expect_layout(const Tensor& lse) const {
    expect_contiguous("gains", gains);
    expect_contiguous("lse", lse);
    expect_contiguous("lengths", lengths);
  }
};

struct AttentionInto : AttentionCall {
  Tensor grad, lse, av;  // [B, L, H, K], [B, H, L]; only other backends use av
  Tensor dq, dk, dv;     // [B, L, H, K], written

  auto fields() { return std::tuple_cat(AttentionCall::fields(), std::tie(grad, lse, av, dq, dk, dv)); }
};

struct HiddenCall {
  Tensor h, weight;            // [T, F], [C, F]
  std::optional<Tensor> bias;  // [C]
  std::string act;
  Tensor out;                  // [T, C], written
  bool accumulate;

  auto fields() { return std::tie(h, weight, bias, act, out, accumulate); }
};

struct HiddenGradient {
  Tensor grad, h, weight;  // [T, C], [T, F] written, [C, F]
  std::string act;
  bool need_weight;

  auto fields() { return std::tie(grad, h, weight, act, need_weight); }
};

// Adapts `function` to TORCH_BOX, which needs a parameter for each argument: run(fields...) returns function(Call of the fields).
template <class Call, auto function, class Fields = decltype(std::declval<Call&>().fields())>
struct Unpacked;

template <class Call, auto function, class... T>
struct Unpacked<Call, function, std::tuple<T&...>> {
  static auto run(T... fields) {
    Call call;
    call.fields() = std::tie(fields...);
    return function(call);
  }
};

}  // namespace simplclip
