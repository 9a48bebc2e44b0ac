// The inner loops of similarity_loss on a CPU: a strip is up to kStripRows rows of the similarity matrix, all M columns.
#pragma once

#include <cstdint>
#include <cstring>

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

inline void assign(float& to, float x) { to = x; }

// Rounds to nearest even; keeps NaN.
inline void assign(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  to.bits = uint16_t(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

constexpr int64_t kStripRows = 64;

// The softmaxes that have a gradient; r and c are log-sum-exps of a row and a column. kShared: both, by one exponential:
// e^(z - c) = e^(z - r) e^(r - top) e^(top - c). kApart: both, by two exponentials, where r and c are too far apart for one.
enum class Softmax { kShared, kApart, kRows, kColumns };

// The columns that belong to a row of a strip: the column of the row's own pair, and all columns with the row's id.
struct Pairs {
  int64_t label;            // column of the first row's pair; the pair of row i is in column label + i
  const int32_t* ids;       // [rows], or null if a row has its own pair alone
  const int32_t* text_ids;  // [M]
};

// One strip's inputs.
struct Strip {
  const void* sim;          // [rows, M] float or bf16: the student's similarities S, logits z = scale S
  void* grad;               // [rows, M] same dtype, backward: dL/dS; may be sim itself
  const void* teacher;      // [rows, M] same dtype: the teacher's similarities, logits t = teacher_scale times them; or null
  int64_t rows;
  int64_t columns;          // M
  Pairs pairs;              // the columns that the softmaxes leave out
  float scale;
  float grad_scale;         // dz/dS in backward: scale, or 1 for the softmax itself
  float teacher_scale;
  float entropy;            // 1: means are of t - z; 0: of -z
};

// A sigmoid term: negative times the sum of softplus(l) over the negatives plus positive times the weighted sum of softplus(-l)
// over the positives, with l = weight S + bias.
struct SigmoidTerm {
  float weight, bias, negative, positive;
};

// The sigmoid terms of a strip.
struct SigmoidIn {
  SigmoidTerm terms[2];
  int count;
  Pairs pairs;
  // All columns that belong to a row are its positives, of weight row_share + column_share. If null, only the row's own pair is a
  // positive, of weight 1; other columns that belong to the row are neither positives nor negatives.
  const float *row_share, *column_share;  // [rows], [M]
};

struct SigmoidOut {
  double negative[2], positive[2];  // sums
  double weight[2], bias[2];        // gradients with respect to each term's weight and bias
};

// A pointer is null if its statistic is not needed; teacher_lse and mean are needed together.
struct ForwardOut {
  float* lse;               // [rows] log-sum-exp of z over the row's negatives
  float* teacher_lse;       // [rows] log-sum-exp of t
  float* mean;              // [rows] mean of entropy t - z under the teacher's softmax
  float* diagonal;          // [rows] S of the positive
  float* teacher_diagonal;  // [rows]
  float* col_lse;           // [M] over this strip's rows, like lse
  float* col_teacher_lse;   // [M]
  float* col_mean;          // [M]
  float* sigmoid[2];        // [rows] the row's share of each term
  SigmoidIn sigmoids;
};

// Statistics of whole rows and columns, and the loss's gradients with respect to them.
struct BackwardIn {
  const float *lse, *g_lse, *teacher_lse, *g_mean, *g_diagonal;          // [rows]
  const float *col_lse, *g_col_lse, *col_teacher_lse, *g_col_mean;       // [M]
  // For kShared. A ratio is a column's gradient times e^(top - its log-sum-exp); top is the highest log-sum-exp of all rows.
  const float *lse_ratio, *teacher_ratio;  // [M]
  float top, teacher_top;
  SigmoidIn sigmoids;
  const float* g_sigmoid[2];  // [rows]
  float* sigmoid_grad;        // [M] scratch
};

struct BackwardOut {
  double scale;  // this strip's share of the gradient of the scale, without the positives
  SigmoidOut sigmoids;
};

// The functions of one instruction set.
struct StripKernels {
  void (*forward)(const Strip&, const ForwardOut&, bool is_bf16);
  BackwardOut (*backward)(const Strip&, const BackwardIn&, Softmax, bool is_bf16);
  // Merges lse [parts, columns] and mean [parts, columns] (or null) into total_lse and total_mean, both [columns].
  void (*merge)(const float* lse, const float* mean, int64_t parts, int64_t stride, int64_t columns, float* total_lse,
                float* total_mean);
  // Sums of the sigmoid terms; if `grad` of the strip is not null, also their gradient with respect to S.
  SigmoidOut (*sigmoid)(const Strip&, const SigmoidIn&, bool is_bf16);
};

}  // namespace simplclip
