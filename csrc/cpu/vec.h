// Vectors of one instruction set: float, bfloat16 or half in memory, float in registers; loops over them. See isa_kernels.h.

constexpr int W = SIMPLCLIP_LANES;             // floats in a register
constexpr int kTileRows = W == 16 ? 8 : 4;     // rows whose running sums fit in registers

#define VINLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

VINLINE vf splat(float x) { return x - vf{}; }

VINLINE vi iota() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

template <class V>
VINLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

VINLINE vf load(const float* p) { return read<vf>(p); }
VINLINE vi load(const int32_t* p) { return read<vi>(p); }
VINLINE vf load(const bf16* p) {
#if SIMPLCLIP_LANES == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)read<vh>(p)), 16);  // GCC makes five instructions of the other form
#else
  return (vf)(__builtin_convertvector(read<vh>(p), vu) << 16);
#endif
}

VINLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Rounds to bfloat16, to nearest even. A NaN that a computation produces stays NaN; one whose low payload bits are all set would
// not. The native instruction treats subnormals as zero.
VINLINE vh rounded(vf v) {
#if defined(SIMPLCLIP_NATIVE_BF16)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, vh);
#endif
}

VINLINE void store(bf16* p, vf v) {
  const vh h = rounded(v);
  std::memcpy(p, &h, sizeof h);
}

VINLINE vf max(vf a, vf b) {
#if SIMPLCLIP_LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);  // GCC makes two instructions of the other form
#else
  return a > b ? a : b;
#endif
}
// The logits scale * x, rounded. The barrier keeps the compiler from fusing the product into the subtraction of a log-sum-exp of
// rounded logits: the rounding error would be left over, and of large logits it is not small for an exponential.
VINLINE vf scaled(float scale, vf x) {
  vf product = scale * x;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

VINLINE vf abs(vf a) { return (vf)((vi)a & 0x7fffffff); }

struct f16 {  // IEEE half
  uint16_t bits;
};

// Does no float arithmetic on subnormals, so that flush-to-zero modes have no effect.
VINLINE vf load(const f16* p) {
  const vu bits = __builtin_convertvector(read<vh>(p), vu), magnitude = bits & 0x7fffu;
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

// Loads the first `lanes` elements. The other lanes are zero, and their memory is not read.
template <class T>
VINLINE auto load(const T* p, int lanes) {
  T buffer[W] = {};
  std::memcpy(buffer, p, lanes * sizeof(T));
  return load(buffer);
}

template <class T>
VINLINE void store(T* p, vf v, int lanes) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, lanes * sizeof(T));
}

template <class N>
VINLINE N least(N a, N b) {
  return a < b ? a : b;
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

// load and store for a number of lanes that may exceed a vector.
template <class T>
VINLINE vf load_up_to(const T* p, int64_t lanes) { return lanes >= W ? load(p) : load(p, int(lanes)); }

template <class T>
VINLINE void store_up_to(T* p, vf v, int64_t lanes) { lanes >= W ? store(p, v) : store(p, v, int(lanes)); }

// Returns f(p), where p is a null pointer to the type of the floats.
template <class F>
VINLINE auto by_type(Float type, F&& f) {
  if (type == Float::kBFloat16) return f(static_cast<bf16*>(nullptr));
  if (type == Float::kHalf) return f(static_cast<f16*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

// Returns f(`value` as a std::integral_constant). `value` is one of the template's arguments.
template <auto first, auto... others, class F>
VINLINE auto by_value(decltype(first) value, F&& f) {
  if constexpr (sizeof...(others) > 0)
    if (value != first) return by_value<others...>(value, f);
  return f(std::integral_constant<decltype(first), first>());
}

// Replaces lane J by lane J ^ S.
template <int S, int... J>
VINLINE vf exchanged(vf v, std::integer_sequence<int, J...>) { return __builtin_shufflevector(v, v, (J ^ S)...); }
template <int S>
VINLINE vf exchanged(vf v) { return exchanged<S>(v, std::make_integer_sequence<int, W>()); }

VINLINE float sum(vf v) {
  if constexpr (W > 8) v += exchanged<8>(v);
  if constexpr (W > 4) v += exchanged<4>(v);
  v += exchanged<2>(v);
  v += exchanged<1>(v);
  return v[0];
}

VINLINE float highest(vf v) {
  if constexpr (W > 8) v = max(v, exchanged<8>(v));
  if constexpr (W > 4) v = max(v, exchanged<4>(v));
  v = max(v, exchanged<2>(v));
  v = max(v, exchanged<1>(v));
  return v[0];
}

VINLINE bool any(vi mask) {
  int32_t m = 0;
  for (int i = 0; i < W; ++i) m |= mask[i];
  return m != 0;
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87.3, where a float would be subnormal. Cody-Waite reduction to
// |r| <= ln2/2 and a degree-6 polynomial; the rounded quotient is in the low bits of `shifted` and becomes the exponent.
VINLINE vf exp(vf x) {
  const vf shifted = x * 1.44269504f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vf scale = (vf)(((vi)shifted << 23) + (127 << 23));
  return x < -87.3f ? vf{} : p * scale;
}

// log(1 + y) for y in [0, 1], relative error below 2e-7: 2 artanh(y / (2 + y)), its series in t^2 <= 1/9.
VINLINE vf log1p(vf y) {
  const vf t = y / (y + 2.0f);
  const vf u = t * t;
  vf p = splat(1.0f / 13);
  p = p * u + 1.0f / 11;
  p = p * u + 1.0f / 9;
  p = p * u + 1.0f / 7;
  p = p * u + 1.0f / 5;
  p = p * u + 1.0f / 3;
  return 2.0f * t * (p * u + 1.0f);
}

// log(x) of a normal x > 0, absolute error below 2e-7: the exponent, and log1p of the mantissa.
VINLINE vf log(vf x) {
  const vi bits = (vi)x;
  const vf exponent = __builtin_convertvector((bits >> 23) - 127, vf);
  const vf mantissa = (vf)((bits & 0x7fffff) | 0x3f800000);
  return exponent * 0.69314718f + log1p(mantissa - 1.0f);
}

VINLINE vf sigmoid(vf x) {
  const vf e = exp(-abs(x));
  return (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
}
