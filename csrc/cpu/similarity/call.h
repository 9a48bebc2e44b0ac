// Helpers for the calls of similarity_loss.
#pragma once

#include "../../calls.h"

namespace simplclip {

inline bool has_teacher(const SimilarityCall& call) { return call.teacher_image.has_value(); }

inline int64_t matrices_of(const SimilarityCall& call) { return has_teacher(call) ? 2 : 1; }

// Returns p and q of pair matching, or null.
inline const float* plane_values(const SimilarityCall& call) {
  return call.plane ? call.plane->const_data_ptr<float>() : nullptr;
}

inline void expect_layout(const SimilarityCall& call) {
  expect_contiguous("image", call.image);
  expect_contiguous("text", call.text);
  expect_contiguous("teacher_image", call.teacher_image);
  expect_contiguous("teacher_text", call.teacher_text);
  expect_contiguous("plane", call.plane);
  expect_contiguous("ids", call.ids);
  expect_contiguous("text_ids", call.text_ids);
  expect_dtype_of("text", call.text, "image", call.image);
}

inline void expect_layout(const SimilarityGradient& call) {
  expect_layout(static_cast<const SimilarityCall&>(call));
  expect_contiguous("grad_rows", call.grad_rows);
  expect_contiguous("grad_columns", call.grad_columns);
  expect_contiguous("row_stats", call.row_stats);
  expect_contiguous("column_stats", call.column_stats);
  expect_contiguous("stored", call.stored);
}

// Returns a call without a scale, whose matrix is image text^T.
inline SimilarityCall similarities_of(const SigmoidCall& call) {
  return {.image = call.image, .text = call.text, .ids = call.ids, .text_ids = call.text_ids,
          .label_offset = call.label_offset, .chunk = call.chunk};
}

}  // namespace simplclip
