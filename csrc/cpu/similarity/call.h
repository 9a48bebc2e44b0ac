// The calls of similarity_loss, with the fields of simplclip/ops/similarity/call.py in their order.
#pragma once

#include "../../calls.h"

namespace simplclip {

// Indices of the statistics in the results of forward: RowStat and ColumnStat of call.py.
enum class RowStat {
  kLseStudent, kLseTeacher, kLseImageToTeacher, kMeanStudent, kMeanImageToTeacher, kDiagonalStudent, kDiagonalTeacher,
  kDiagonalImageToTeacher, kDiagonalTeacherToText, kSigmoid, kSecondSigmoid, kCount
};
enum class ColumnStat { kLseStudent, kLseTeacher, kLseTeacherToText, kMeanStudent, kMeanTeacherToText, kCount };

struct SimilarityCall {
  Tensor image, text, scale;                                                            // [N, D], [M, D], []
  std::optional<Tensor> teacher_image = {}, teacher_text = {}, teacher_scale = {};      // [N, E], [M, E], []
  std::optional<Tensor> projected_image = {}, projected_text = {}, cross_scale = {};    // [N, E], [M, E], []
  std::optional<Tensor> sigmoid_weight = {}, sigmoid_bias = {};                         // [K]
  std::optional<Tensor> sigmoid_negative = {}, sigmoid_positive = {};                   // [K]
  std::optional<Tensor> image_share = {}, text_share = {}, ids = {}, text_ids = {};     // [N], [M], [N], [M]
  int64_t label_offset = 0;
  bool softmax = false, columns = false, drop_ids = true;
  bool relational = false, interactive = false;
  double entropy = 1;
  int64_t chunk = 0, stored_rows = 0;

  auto fields() {
    return std::tie(image, text, scale, teacher_image, teacher_text, teacher_scale, projected_image, projected_text, cross_scale,
                    sigmoid_weight, sigmoid_bias, sigmoid_negative, sigmoid_positive, image_share, text_share, ids, text_ids,
                    label_offset, softmax, columns, drop_ids, relational, interactive, entropy, chunk, stored_rows);
  }

  bool has_teacher() const { return relational || interactive; }
  bool has_teacher_to_text() const { return interactive && columns; }
  int64_t sigmoids() const { return sigmoid_weight ? sigmoid_weight->size(0) : 0; }
  int64_t matrices() const { return softmax + has_teacher() + interactive + has_teacher_to_text(); }

  void expect_layout() const {
    expect_contiguous("image", image);
    expect_contiguous("text", text);
    expect_contiguous("teacher_image", teacher_image);
    expect_contiguous("teacher_text", teacher_text);
    expect_contiguous("projected_image", projected_image);
    expect_contiguous("projected_text", projected_text);
    expect_contiguous("image_share", image_share);
    expect_contiguous("text_share", text_share);
    expect_dtype_of("text", text, "image", image);
  }
};

struct SimilarityGradient : SimilarityCall {
  Tensor grad_rows, grad_columns;           // [11, N], [5, M]
  Tensor row_stats, column_stats, stored;   // [11, N], [5, M], [matrices, stored rows, M]
  bool need_image, need_text;

  auto fields() {
    return std::tuple_cat(SimilarityCall::fields(),
                          std::tie(grad_rows, grad_columns, row_stats, column_stats, stored, need_image, need_text));
  }
};

struct RowsCall {
  Tensor query, keys, scale;            // [N, D], [M, D], []
  std::optional<Tensor> ids, text_ids;  // [N], [M]
  int64_t label_offset;
  bool attend;
  int64_t chunk;

  auto fields() { return std::tie(query, keys, scale, ids, text_ids, label_offset, attend, chunk); }

  // Returns a SimilarityCall whose student matrix is query keys^T, so that its row softmaxes are those of this call.
  SimilarityCall student() const {
    return {.image = query, .text = keys, .scale = scale, .ids = ids, .text_ids = text_ids, .label_offset = label_offset,
            .softmax = true, .chunk = chunk};
  }
};

struct SigmoidCall {
  Tensor image, text;                                  // [N, D], [M, D]
  Tensor weight, bias, negative, positive, mix;        // [K]
  std::optional<Tensor> ids, text_ids;                 // [N], [M]
  std::optional<Tensor> image_share, text_share;       // [N], [M]
  int64_t label_offset, chunk;
  bool gradient, need_image, need_text;

  auto fields() {
    return std::tie(image, text, weight, bias, negative, positive, mix, ids, text_ids, image_share, text_share, label_offset,
                    chunk, gradient, need_image, need_text);
  }

  // Returns a SimilarityCall whose student matrix is image text^T, with the sigmoid terms of this call.
  SimilarityCall student() const {
    return {.image = image, .text = text, .scale = weight, .sigmoid_weight = weight, .sigmoid_bias = bias,
            .sigmoid_negative = negative, .sigmoid_positive = positive, .image_share = image_share, .text_share = text_share,
            .ids = ids, .text_ids = text_ids, .label_offset = label_offset, .softmax = true, .chunk = chunk};
  }
};

}  // namespace simplclip
