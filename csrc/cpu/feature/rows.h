// The inner loops of feature_loss on a CPU: some rows of student and teacher, each row read from memory once.
#pragma once

#include <cstdint>

#include "../elementwise.h"

namespace simplclip {

struct FeatureRows {
  const void* student;  // [rows, D]
  const void* teacher;  // [rows, D]
  Float student_type, teacher_type;
  int64_t rows;
  int64_t columns;     // D
  bool smooth;         // smooth L1 with beta, else squares
  float beta;
  float* student_inv;  // [rows] 1 / max(norm, eps): written by forward, read by backward; null: no normalisation
  float* teacher_inv;  // [rows] likewise
};

// The functions of one instruction set.
struct FeatureKernels {
  double (*forward)(const FeatureRows&);  // the sum of the distances
  // grad [rows, D] in the student's type: factor times the gradient of the sum; for squares the factor includes the 2.
  void (*backward)(const FeatureRows&, float factor, void* grad);
};

}  // namespace simplclip
