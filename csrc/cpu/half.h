// IEEE half in memory, float in registers; loops over any float type. Included after vec.h, inside the namespace of an
// instruction set.

struct f16 {
  uint16_t bits;
};

// No float arithmetic on subnormals, so that flush-to-zero modes have no effect.
VINLINE vf load(const f16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu bits = __builtin_convertvector(h, vu), magnitude = bits & 0x7fffu;
  const vu normal = (magnitude << 13) + (112u << 23);
  const vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-24f);
  const vu special = (magnitude << 13) | 0x7f800000u;
  const vu wide = magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
  return (vf)(wide | ((bits & 0x8000u) << 16));
}

// Rounds to nearest even, to infinity from 65520 on; keeps NaN. Adding 0.5 rounds a subnormal at its last bit, 2^-24.
VINLINE void store(f16* p, vf v) {
  const vu bits = (vu)v, magnitude = bits & 0x7fffffffu;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vu subnormal = (vu)(abs(v) + 0.5f) - 0x3f000000u;
  const vu special = magnitude > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  const vu narrow = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  const vh h = __builtin_convertvector(narrow | ((bits >> 16) & 0x8000u), vh);
  std::memcpy(p, &h, sizeof h);
}

// Calls f(j, lanes) for every block of W columns; lanes is the constant W except for the last block.
template <class F>
VINLINE void each_block(int64_t columns, F&& f) {
  int64_t j = 0;
  for (; j + W <= columns; j += W) f(j, std::integral_constant<int, W>{});
  if (j < columns) f(j, int(columns - j));
}

template <class T>
VINLINE vf load(const T* p, std::integral_constant<int, W>) { return load(p); }

template <class T>
VINLINE void store(T* p, vf v, std::integral_constant<int, W>) { store(p, v); }

// The same for a number of lanes that may exceed a vector.
template <class T>
VINLINE vf load_up_to(const T* p, int64_t lanes) { return lanes >= W ? load(p) : load(p, int(lanes)); }

template <class T>
VINLINE void store_up_to(T* p, vf v, int64_t lanes) { lanes >= W ? store(p, v) : store(p, v, int(lanes)); }

// Calls f with a null pointer whose type is that of the floats.
template <class F>
VINLINE void by_type(Float type, F&& f) {
  switch (type) {
    case Float::kFloat: return f(static_cast<float*>(nullptr));
    case Float::kBFloat16: return f(static_cast<bf16*>(nullptr));
    case Float::kHalf: return f(static_cast<f16*>(nullptr));
  }
}
