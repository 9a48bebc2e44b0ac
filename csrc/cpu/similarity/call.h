// The calls of similarity_loss, with the fields of simplclip/ops/similarity/call.py in their order.
#pragma once

#include "../../calls.h"

namespace simplclip {

struct SimilarityCall {
  Tensor image, text, scale;                                                            // [N, D], [M, D], []
  std::optional<Tensor> teacher_image = {}, teacher_text = {}, teacher_scale = {};      // [N, E], [M, E], []
  std::optional<Tensor> plane = {};                                                     // [2]
  std::optional<Tensor> ids = {}, text_ids = {};                                        // [N], [M]
  int64_t label_offset = 0;
  bool columns = false;
  double entropy = 1;
  int64_t chunk = 0, stored_rows = 0;

  auto fields() {
    return std::tie(image, text, scale, teacher_image, teacher_text, teacher_scale, plane, ids, text_ids, label_offset, columns,
                    entropy, chunk, stored_rows);
  }

  bool has_teacher() const { return teacher_image.has_value(); }
  int64_t matrices() const { return has_teacher() ? 2 : 1; }
  const float* plane_values() const { return plane ? plane->const_data_ptr<float>() : nullptr; }

  void expect_layout() const {
    expect_contiguous("image", image);
    expect_contiguous("text", text);
    expect_contiguous("teacher_image", teacher_image);
    expect_contiguous("teacher_text", teacher_text);
    expect_contiguous("plane", plane);
    expect_contiguous("ids", ids);
    expect_contiguous("text_ids", text_ids);
    expect_dtype_of("text", text, "image", image);
  }
};

struct SimilarityGradient : SimilarityCall {
  Tensor grad_rows, grad_columns;           // [6, N], [3, M]
  Tensor row_stats, column_stats, stored;   // [6, N], [3, M], [matrices, stored rows, M]
  bool need_image, need_text;

  auto fields() {
    return std::tuple_cat(SimilarityCall::fields(),
                          std::tie(grad_rows, grad_columns, row_stats, column_stats, stored, need_image, need_text));
  }

  void expect_layout() const {
    SimilarityCall::expect_layout();
    expect_contiguous("grad_rows", grad_rows);
    expect_contiguous("grad_columns", grad_columns);
    expect_contiguous("row_stats", row_stats);
    expect_contiguous("column_stats", column_stats);
    expect_contiguous("stored", stored);
  }
};

struct SigmoidCall {
  Tensor image, text;                   // [N, D], [M, D]
  Tensor sigmoids;                      // [5, K]: weight, bias, negative, positive, mix
  std::optional<Tensor> ids, text_ids;  // [N], [M]
  int64_t label_offset, chunk;
  bool gradient, need_image, need_text;

  auto fields() {
    return std::tie(image, text, sigmoids, ids, text_ids, label_offset, chunk, gradient, need_image, need_text);
  }

  // Returns a SimilarityCall without a scale, whose matrix is image text^T.
  SimilarityCall similarities() const {
    return {.image = image, .text = text, .scale = {}, .ids = ids, .text_ids = text_ids, .label_offset = label_offset,
            .chunk = chunk};
  }
};

}  // namespace simplclip
