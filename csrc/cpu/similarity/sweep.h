// The row-chunk sweep of similarity_loss on a CPU: the similarity matrices that a call needs, and their scratch. A chunk is some
// of their rows, with all columns, computed by matrix products. Forward keeps the first `stored_rows` rows, so that backward need
// not compute them again. Chunk and stored rows are the only memory that grows with N*M, and both have byte budgets.
#pragma once

#include "call_structs.h"  // written by setup.py, see csrc/call_headers.py
#include "../instruction_set.h"
#include "../transposed_sum.h"

#include <unordered_map>
#include <vector>

namespace simplclip {

using torch::stable::parallel_for;

// One similarity matrix a b^T with its scratch.
struct Matrix {
  Tensor a, b;       // [N, *], [M, *]
  Tensor kept{};     // [stored rows, M]
  Tensor scratch{};  // [chunk, M]; in backward the student's holds the gradients
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// out = a b^T. Multiplies float32 in blocks: MKL is 15% faster with an operand in the second-level cache (seen on Zen 4).
inline void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
  const bool is_bf16 = a.scalar_type() == ScalarType::BFloat16;
  const int64_t count = a.size(0), columns = b.size(0);
  const int64_t row_block = is_bf16 ? count : 512;
  const int64_t column_block = is_bf16 ? columns : std::max<int64_t>(64, (2 << 20) / (4 * a.size(1)));
  for (int64_t i = 0; i < count; i += row_block)
    for (int64_t j = 0; j < columns; j += column_block) {
      Tensor out_rows = rows(out, i, std::min(row_block, count - i)), y = rows(b, j, std::min(column_block, columns - j));
      Tensor block = slices(out_rows, 1, j, y.size(0));
      mm_out(block, rows(a, i, out_rows.size(0)), transposed(y));
    }
}

inline int64_t strips_of(int64_t count) { return (count + kStripRows - 1) / kStripRows; }

struct Sweep {
  const SimilarityCall& call;
  int64_t n, m, d, chunk, stored_rows;
  bool is_bf16;
  float scale = 1, teacher_scale = 1;
  std::vector<int32_t> row_ids, column_ids;  // [N], [M], or empty
  Tensor stored;                             // [matrices, stored rows, M]
  Matrix student;
  std::optional<Matrix> teacher;

  // `kept`: null in forward; in backward the stored rows, which forward returned. A call without a scale has a scale of 1.
  Sweep(const SimilarityCall& call, const Tensor* kept)
      : call(call), n(call.image.size(0)), m(call.text.size(0)), d(call.image.size(1)), chunk(std::min(call.chunk, n)),
        stored_rows(std::min(kept ? kept->size(1) : call.stored_rows, n)),
        is_bf16(call.image.scalar_type() == ScalarType::BFloat16), student{call.image, call.text} {
    if (call.scale.defined()) scale = *data<float>(call.scale);
    const bool has_teacher = call.teacher_image.has_value();
    if (call.plane_weight) plane_ = {*data<float>(*call.plane_weight), *data<float>(*call.plane_bias)};
    if (call.ids) number_ids();
    stored = kept ? *kept : allocate(call.image, {stored_rows ? 1 + has_teacher : 0, stored_rows, m});
    const int64_t missing = stored_rows < n ? chunk : 0;
    student.scratch = allocate(call.image, {kept ? chunk : missing, m});
    if (stored_rows) student.kept = view(stored, stored_rows, m, m, 1, 0);
    if (!has_teacher) return;
    teacher_scale = *data<float>(*call.teacher_scale);
    teacher = Matrix{*call.teacher_image, *call.teacher_text};
    teacher->scratch = allocate(call.image, {missing, m});
    if (stored_rows) teacher->kept = view(stored, stored_rows, m, m, 1, stored_rows * m);
  }

  // Returns p and q of pair matching, or null.
  const float* plane() const { return call.plane_weight ? plane_.data() : nullptr; }

  // Calls f(first, count) for each chunk; no chunk crosses the end of the stored rows.
  template <class F>
  void for_chunks(F&& f) const {
    for (int64_t first = 0, count = 0; first < n; first += count) {
      count = std::min(chunk, (first < stored_rows ? stored_rows : n) - first);
      f(first, count);
    }
  }

  // Calls f(strip, its first row within the chunk, its index) in parallel over the strips of the chunk [first, first + count).
  // Computes the chunk of each matrix, unless it is stored and `reuse` holds.
  template <class F>
  void for_strips(int64_t first, int64_t count, bool reuse, F&& f) const {
    const Tensor sim = load(student, first, count, reuse);
    const Tensor teacher_sim = teacher ? load(*teacher, first, count, reuse) : Tensor();
    const int64_t row_bytes = m * (is_bf16 ? 2 : 4);
    parallel_for(0, strips_of(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k * kStripRows;
        Strip strip{};
        strip.sim = data<char>(sim) + i * row_bytes;
        strip.grad = data<char>(student.scratch) + i * row_bytes;
        strip.teacher = teacher ? data<char>(teacher_sim) + i * row_bytes : nullptr;
        strip.rows = std::min(kStripRows, count - i);
        strip.columns = m;
        strip.label = call.label_offset + first + i;
        strip.ids = row_ids.empty() ? nullptr : row_ids.data() + first + i;
        strip.text_ids = column_ids.data();
        strip.scale = scale;
        strip.teacher_scale = teacher_scale;
        strip.entropy = float(call.entropy);
        f(strip, i, k);
      }
    });
  }

 private:
  std::array<float, 2> plane_{};

  // Replaces 64-bit ids by 32-bit numbers, of which a vector holds more: equal ids have equal numbers.
  void number_ids() {
    std::unordered_map<int64_t, int32_t> numbers;
    auto fill = [&](std::vector<int32_t>& out, const Tensor& ids) {
      const int64_t* id = ids.const_data_ptr<int64_t>();
      out.resize(ids.size(0));
      for (size_t i = 0; i < out.size(); ++i) out[i] = numbers.emplace(id[i], int32_t(numbers.size())).first->second;
    };
    fill(row_ids, *call.ids);
    fill(column_ids, *call.text_ids);
  }

  Tensor load(const Matrix& matrix, int64_t first, int64_t count, bool reuse) const {
    const bool is_kept = first < stored_rows;
    Tensor out = is_kept ? rows(matrix.kept, first, count) : rows(matrix.scratch, 0, count);
    if (!(is_kept && reuse)) multiply(out, rows(matrix.a, first, count), matrix.b);
    return out;
  }
};

// The gradients of image and text, whose sums over the chunks of a sweep begin with zeros; empty if not needed.
class FeatureGradients {
 public:
  FeatureGradients(const Sweep& sweep, bool need_image, bool need_text)
      : sweep_(sweep), image_(allocate(sweep.call.image, {need_image ? sweep.n : 0, sweep.d})),
        text_(sweep.call.text, need_text, sweep.is_bf16 && (sweep.chunk < sweep.n || sweep.stored_rows % sweep.n != 0)) {}

  // Adds the products of the chunk's gradients, in the student's scratch, and the other side's features.
  void add(int64_t first, int64_t count) {
    const Tensor g = rows(sweep_.student.scratch, 0, count);
    if (image_.size(0)) {
      Tensor d_rows = rows(image_, first, count);
      mm_out(d_rows, g, sweep_.call.text);
    }
    text_.add(g, rows(sweep_.call.image, first, count));
  }

  const Tensor& image() const { return image_; }
  Tensor text() { return text_.result(); }

 private:
  const Sweep& sweep_;
  Tensor image_;
  TransposedSum text_;
};

}  // namespace simplclip
