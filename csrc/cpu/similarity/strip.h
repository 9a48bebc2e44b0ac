// The inner loops of similarity_loss on a CPU: a strip is up to kStripRows rows of the similarity matrix, all M columns.
#pragma once

#include <cstdint>
#include <cstring>

#include "call_enums.h"  // written by setup.py, see csrc/call_headers.py

namespace simplclip {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

constexpr int64_t kStripRows = 64;

// A RowStat names the same statistic of columns too.
static_assert(int(ColumnStat::kLseStudent) == int(RowStat::kLseStudent));
static_assert(int(ColumnStat::kLseTeacher) == int(RowStat::kLseTeacher));
static_assert(int(ColumnStat::kMean) == int(RowStat::kMean));

// Statistics in memory, one after another in the order of RowStat, of `stride` numbers each; null if they are not needed.
struct Stats {
  float* first;
  int64_t stride;

  float* operator[](RowStat stat) const { return first ? first + int64_t(stat) * stride : nullptr; }
  Stats from(int64_t i) const { return {first ? first + i : nullptr, stride}; }
};

// The softmaxes that have a gradient; r and c are log-sum-exps of a row and a column. kShared: both, by one exponential:
// e^(z - c) = e^(z - r) e^(r - top) e^(top - c). kApart: both, by two exponentials, where r and c are too far apart for one.
enum class Softmax { kShared, kApart, kRows };

// One strip's inputs. The negatives of a row are the columns that do not belong to it: not its own pair, nor its id's columns.
struct Strip {
  const void* sim;          // [rows, M] float or bf16: the student's similarities S, logits z = scale S
  void* grad;               // [rows, M] same dtype, dL/dS; may be sim itself
  const void* teacher;      // [rows, M] same dtype: the teacher's similarities, logits t = teacher_scale times them; or null
  int64_t rows;
  int64_t columns;          // M
  int64_t label;            // column of the first row's pair; the pair of row i is in column label + i
  const int32_t* ids;       // [rows], or null if only its own pair belongs to a row
  const int32_t* text_ids;  // [M]
  float scale;
  float teacher_scale;
  float entropy;            // 1: means are of t - z; 0: of -z
};

// A sigmoid term: negative times the sum of softplus(l) over the negatives, plus positive times the sum of softplus(-l) over the
// positives, with l = weight S + bias.
struct SigmoidTerm {
  float weight, bias, negative, positive;
};

struct SigmoidSums {
  double negative[2], positive[2];  // of each term's softplus
  double weight[2], bias[2];        // gradients with respect to each term's weight and bias
};

struct ForwardOut {
  Stats rows;          // [6, rows]
  Stats columns;       // [3, M] over this strip's rows; without a teacher [1, M]
  const float* plane;  // p and q of pair matching, or null
};

// Statistics of whole rows and columns, and the loss's gradients with respect to them.
struct BackwardIn {
  Stats rows, g_rows;        // [6, rows]
  Stats columns, g_columns;  // [3, M]
  // For kShared. A ratio is a column's gradient times e^(top - its log-sum-exp); top is the highest log-sum-exp of all rows.
  const float *ratio, *teacher_ratio;  // [M]
  float top, teacher_top;
  const float* plane;  // p and q of pair matching, or null
};

// This strip's share of the gradients. That of the scale is without the positives, whose similarities have gradients.
struct BackwardOut {
  double scale, plane[2];
};

// The functions of one instruction set.
struct StripKernels {
  void (*forward)(const Strip&, const ForwardOut&, bool is_bf16);
  BackwardOut (*backward)(const Strip&, const BackwardIn&, Softmax, bool is_bf16);
  // Merges lse [parts, columns] and mean [parts, columns] (or null) into total_lse and total_mean, both [columns].
  void (*merge)(const float* lse, const float* mean, int64_t parts, int64_t stride, int64_t columns, float* total_lse,
                float* total_mean);
  // Sums of `count` sigmoid terms, one or two; if `grad` of the strip is not null, also their gradient with respect to S.
  SigmoidSums (*sigmoid)(const Strip&, const SigmoidTerm*, int count, bool is_bf16);
};

}  // namespace simplclip
