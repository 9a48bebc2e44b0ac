// Arguments of ops: a struct for each dataclass in simplclip/calls/, whose fields are the schema's, in order.
#pragma once

#include "layout.h"
#include "call_structs.h"  // written by setup.py, see call_headers.py

#include <tuple>
#include <utility>

namespace simplclip {

inline void expect_layout(const AttentionCall& call, const Tensor& lse) {
  expect_contiguous("gains", call.gains);
  expect_contiguous("lse", lse);
  expect_contiguous("lengths", call.lengths);
}

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
