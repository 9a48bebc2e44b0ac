// The arguments of similarity_loss, in the order of the fields in simplclip/ops/similarity/call.py, which define the schema. The
// dispatcher's functions take SIMILARITY_PARAMETERS and make a SimilarityCall of them by SIMILARITY_CALL.
#pragma once

#include "../../layout.h"

#include <optional>

namespace simplclip {

enum Negatives : int64_t { kNoNegatives = 0, kAllNegatives = 1, kHardNegatives = 2 };

// Rows of the statistics: RowStat and ColumnStat of call.py.
enum class Row {
  kLseStudent, kLseTeacher, kLseImageToTeacher, kPairMatching, kMeanStudent, kMeanImageToTeacher, kDiagonalStudent,
  kDiagonalHadamard, kDiagonalTeacher, kDiagonalImageToTeacher, kDiagonalTeacherToText, kNegatives, kCount
};
enum class Column {
  kLseStudent, kLseTeacher, kLseTeacherToText, kPairMatching, kMeanStudent, kMeanTeacherToText, kCount
};

struct SimilarityCall {
  Tensor image, text, scale;                                                            // [N, D], [M, D], []
  std::optional<Tensor> teacher_image = {}, teacher_text = {}, teacher_scale = {};      // [N, E], [M, E], []
  std::optional<Tensor> projected_image = {}, projected_text = {}, cross_scale = {};    // [N, E], [M, E], []
  std::optional<Tensor> plane_weight = {}, plane_bias = {}, ids = {}, text_ids = {};    // [] or [D], [], [N], [M]
  int64_t label_offset = 0;
  bool softmax = false, columns = false;
  int64_t negatives = kNoNegatives;
  bool relational = false, interactive = false;
  double entropy = 1;
  int64_t chunk = 0, stored_rows = 0;

  bool has_student() const { return softmax || negatives; }
  bool has_teacher() const { return relational || interactive; }
  bool has_teacher_to_text() const { return interactive && columns; }
  bool has_hadamard() const { return negatives && plane_weight->dim() == 1; }
  int64_t matrices() const { return has_student() + has_teacher() + interactive + has_teacher_to_text(); }

  void expect_layout() const {
    expect_contiguous("image", image);
    expect_contiguous("text", text);
    expect_contiguous("teacher_image", teacher_image);
    expect_contiguous("teacher_text", teacher_text);
    expect_contiguous("projected_image", projected_image);
    expect_contiguous("projected_text", projected_text);
    expect_contiguous("plane_weight", plane_weight);
    expect_dtype_of("text", text, "image", image);
  }
};

#define SIMILARITY_PARAMETERS                                                                                            \
  Tensor image, Tensor text, Tensor scale, std::optional<Tensor> teacher_image, std::optional<Tensor> teacher_text,      \
      std::optional<Tensor> teacher_scale, std::optional<Tensor> projected_image, std::optional<Tensor> projected_text,  \
      std::optional<Tensor> cross_scale, std::optional<Tensor> plane_weight, std::optional<Tensor> plane_bias,           \
      std::optional<Tensor> ids, std::optional<Tensor> text_ids, int64_t label_offset, bool softmax, bool columns,       \
      int64_t negatives, bool relational, bool interactive, double entropy, int64_t chunk, int64_t stored_rows
#define SIMILARITY_CALL                                                                                                  \
  SimilarityCall {                                                                                                       \
    image, text, scale, teacher_image, teacher_text, teacher_scale, projected_image, projected_text, cross_scale,        \
        plane_weight, plane_bias, ids, text_ids, label_offset, softmax, columns, negatives, relational, interactive,     \
        entropy, chunk, stored_rows                                                                                      \
  }

}  // namespace simplclip
