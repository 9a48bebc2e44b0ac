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

// Rounds to nearest even; a NaN stays a NaN.
inline void assign(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  to.bits = uint16_t(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

constexpr int64_t kStripRows = 64;

// Which statistics a strip keeps: softmax statistics, pair matching over all negatives, or over hard negatives.
enum class Terms { kSoftmax, kSoftmaxAll, kSoftmaxHard, kAll };

// One strip's inputs. A pair is dropped from the negatives when it is the positive or when its ids are equal.
struct Strip {
  const void* sim;        // [rows, M] float or bf16: S = x y^T
  void* grad;             // [rows, M] same dtype, backward: dL/dS; may be sim itself
  void* plane;            // [rows, M] same dtype: (x*w) y^T, backward overwrites it with its gradient; null: scalar plane
  int64_t rows;
  int64_t columns;        // M
  int64_t label;          // column of the first row's positive; the next row's is the next column
  const int32_t* ids;     // [rows] or null
  const int32_t* text_ids;  // [M] or null
  float scale;            // s
  float p, q;             // l = p S + q, or l = plane + q
};

struct ForwardOut {
  float* row_lse;    // [rows] log-sum-exp of s S over the row's negatives
  float* row_pm;     // [rows] sum of softplus(l) over the negatives; hard: its mean under the row's softmax
  int64_t* dropped;  // [rows] columns that are no negatives
  float* diagonal;   // [rows] S of the positive
  float* plane_diagonal;  // [rows] l of the positive
  float* col_lse;    // [M] log-sum-exp over this strip's rows
  float* col_pm;     // [M] hard: mean of softplus(l) under this strip's column softmax; else unused
};

struct BackwardIn {
  const float* row_lse;           // [rows] over the whole row, the positive included
  const float* row_lse_negative;  // [rows] without it
  const float* col_lse;           // [M] +inf: the column takes no part
  const float* col_lse_negative;  // [M] likewise
  // [M] e^(top - col_lse), or null where the statistics lie too far apart: with it e^(z - c) = e^(z - r) e^(r - top) e^(top - c)
  // costs no second exponential.
  const float* col_ratio;
  float top;
  float k_row, k_col;             // weight of the row and the column softmax
  float k_negative;               // weight of a negative of pair matching ("all")
  float k_hard_row, k_hard_col;   // the same for "hard"
  float k_positive;
};

struct BackwardOut {
  double scale, p, q;  // this strip's share of the gradients of s, p, q
};

// The functions of one instruction set.
struct StripKernels {
  const char* name;
  void (*forward)(const Strip&, const ForwardOut&, Terms, bool is_bf16);
  BackwardOut (*backward)(const Strip&, const BackwardIn&, Terms, bool is_bf16);
  // lse [parts, columns] and mean [parts, columns] or null: merges them into total_lse and total_mean (both [columns]).
  void (*merge)(const float* lse, const float* mean, int64_t parts, int64_t stride, int64_t columns, float* total_lse,
                float* total_mean);
  void (*add)(float* sum, const bf16* part, int64_t count);
  void (*round)(bf16* to, const float* from, int64_t count);
};

const StripKernels& strip_kernels();  // the best that this CPU runs
bool has_native_bf16();               // matrix products of bfloat16 in hardware

}  // namespace simplclip
