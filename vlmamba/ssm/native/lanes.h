// One vector register of channels ("lanes"), and the few functions of one number the scan needs.
//
// The lane count follows the instruction set the file is compiled for: a wider vector than the registers
// hold is split badly by compilers.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define VLM_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VLM_AVX512 1
#endif

namespace vlm {

#if VLM_AVX512
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t IV __attribute__((vector_size(4 * LANES)));

constexpr float LOG2E = 1.44269504088896341f, LOG2E_REST = 1.92596299e-8f;  // log2(e) in two parts
constexpr float LN2 = 0.693147180559945309f;
constexpr float MOST_RATE = 1.09951163e12f, MOST_EXPONENT = 2.81474977e14f;  // 2^40, 2^48

static inline V splat(float x) { return x - V{}; }
static inline V splat(V x) { return x; }

// a b + c of vectors or numbers, rounded once where the processor can, else twice. Files are compiled with
// -ffp-contract=off: a sum of products rounds as it is written, whatever a compiler makes of the loop around it, so
// that two paths to one number agree bit for bit. Every sum of products that is to be fast goes through here.
template <class X, class Y, class Z>
static inline V fused(X a, Y b, Z c) {
#if VLM_AVX512
  return (V)_mm512_fmadd_ps((__m512)splat(a), (__m512)splat(b), (__m512)splat(c));
#elif defined(__AVX2__) && defined(__FMA__)
  return (V)_mm256_fmadd_ps((__m256)splat(a), (__m256)splat(b), (__m256)splat(c));
#elif defined(__FMA__)
  return (V)_mm_fmadd_ps((__m128)splat(a), (__m128)splat(b), (__m128)splat(c));
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)splat(c), (float32x4_t)splat(a), (float32x4_t)splat(b));
#else
#define VLM_ROUNDS_TWICE 1
  return splat(a) * splat(b) + splat(c);
#endif
}

// a b - k for a k near the product, which is not rounded before.
static inline V product_less(V a, V b, V k) {
#if VLM_ROUNDS_TWICE
  const V high_a = (V)((IV)a & -4096), low_a = a - high_a;  // 12 bits each: products of two halves are exact
  const V high_b = (V)((IV)b & -4096), low_b = b - high_b;
  return (high_a * high_b - k) + (high_a * low_b + low_a * high_b) + low_a * low_b;
#else
  return fused(a, b, -k);
#endif
}

// The first `count` numbers at p; the other lanes are zero.
static inline V load(const float *p, int count) {
#if VLM_AVX512
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), p);
#else
  V v{};
  if (count == LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int i = 0; i < count; ++i) v[i] = p[i];
  }
  return v;
#endif
}

static inline void store(float *p, V v, int count) {
#if VLM_AVX512
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)v);
#else
  if (count == LANES) {
    std::memcpy(p, &v, sizeof v);
  } else {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
#endif
}

// Sums over the lanes of LANES vectors, always in the same order: lane i becomes the sum of v[i], which is
// overwritten. Pairs of vectors are folded into one until one is left.
static inline V lane_sums(V *v) {
#if VLM_AVX512
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int step = LANES / 2; step; step /= 2) {
    const __mmask16 second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
    const __m512i other = _mm512_mask_add_epi32(_mm512_xor_epi32(lane, _mm512_set1_epi32(step)), second,
                                                _mm512_xor_epi32(lane, _mm512_set1_epi32(step)),
                                                _mm512_set1_epi32(LANES));
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      const __m512 a = (__m512)v[i], b = (__m512)v[i + step];
      v[i] = (V)_mm512_mask_blend_ps(second, a, b) + (V)_mm512_permutex2var_ps(a, other, b);
    }
  }
  return v[0];
#else
  V all;
  for (int i = 0; i < LANES; ++i) {
    float x[LANES];
    std::memcpy(x, v + i, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
      for (int k = 0; k < width; ++k) x[k] += x[k + width];
    all[i] = x[0];
  }
  return all;
#endif
}

// Exchanges rows and columns of LANES vectors, by halves, quarters and so on.
static inline void turn(V *v) {
#if VLM_AVX512
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int step = LANES / 2; step; step /= 2) {
    const __mmask16 second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
    const __m512i low = _mm512_mask_add_epi32(lane, second, lane, _mm512_set1_epi32(LANES - step));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(step));
#pragma GCC unroll 8
    for (int k = 0; k < LANES / 2; ++k) {
      const int i = k / step * 2 * step + k % step;
      const __m512 a = (__m512)v[i], b = (__m512)v[i + step];
      v[i] = (V)_mm512_permutex2var_ps(a, low, b), v[i + step] = (V)_mm512_permutex2var_ps(a, high, b);
    }
  }
#else
  float x[LANES][LANES];
  std::memcpy(x, v, sizeof x);
  for (int i = 0; i < LANES; ++i)
    for (int k = 0; k < LANES; ++k) v[i][k] = x[k][i];
#endif
}

// 2^k p for a whole k: zero for k <= -127, NaN stays NaN.
static inline V times_power(V p, V k) {
#if VLM_AVX512
  return (V)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  return p * (V)((__builtin_convertvector(k, IV) + 127) << 23);
#endif
}

// 2^r = 1 + r q(r) for r in [-1/2, 1/2], with q fitted for the smallest relative error: 9e-8. 2^0 is exactly 1.
static inline V power(V r) {
  V p = fused(r, 0.00132651199f, 0.00967149986f);
  p = fused(p, r, 0.055507323f);
  p = fused(p, r, 0.240222424f);
  p = fused(p, r, 0.693146979f);
  return fused(p, r, 1.0f);
}

// The same to 2e-9.
static inline V fine_power(V r) {
  V p = fused(r, 0.00015353362f, 0.0013398875f);
  p = fused(p, r, 0.00961843692f);
  p = fused(p, r, 0.0555033237f);
  p = fused(p, r, 0.240226477f);
  p = fused(p, r, 0.693147182f);
  return fused(p, r, 1.0f);
}

// x, or the nearest number of the size `most` at most; NaN stays NaN.
static inline V clamp(V x, V most) {
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

// 2^(time rate). What is wrong with an exponent is the relative error of the decay, and exponents are large; so the
// product is not rounded before its whole part is taken away. Without ANY it has the size of MOST_EXPONENT at most.
template <bool ANY>
static inline V decay_over(V time, V rate) {
  const V magic = splat(12582912.0f);
  V k = fused(time, rate, magic) - magic;
#if VLM_AVX512
  V r = product_less(time, rate, k);
  if (ANY) r = (V)_mm512_range_ps((__m512)r, _mm512_set1_ps(1.0f), 0x02);  // the one nearer to zero
#else
  const V least = splat(-127.0f), most = splat(128.0f);
  k = k < least ? least : k;
  k = k > most ? most : k;
  const V r = clamp(product_less(time, rate, k), splat(1.0f));
#endif
  return times_power(power(r), k);
}

// exp(-|x|): log2(e) in two parts, so that it is accurate however large |x| is.
static inline V exp_minus_abs(V x) {
  const V low = splat(-88.0f), magic = splat(12582912.0f);
  x = x > 0.0f ? -x : x;
  x = x < low ? low : x;
  const V k = fused(x, LOG2E, magic) - magic;
  return times_power(fine_power(fused(x, LOG2E_REST, product_less(x, splat(LOG2E), k))), k);
}

// 1 / x for x in [1, 3]; a division takes the processor four times as long.
static inline V inverse(V x) {
#if VLM_AVX512
  const V guess = (V)_mm512_rcp14_ps((__m512)x);
  return fused(guess, fused(-x, guess, 1.0f), guess);
#else
  return 1.0f / x;
#endif
}

// log(1 + e) for e in [0, 1], by 2 artanh(e / (2 + e)).
static inline V log1p_unit(V e) {
  const V s = e * inverse(e + 2.0f), q = s * s;
  V p = fused(q, 0.281783348f, 0.279606032f);
  p = fused(p, q, 0.400249102f);
  p = fused(p, q, 0.666663147f);
  p = fused(p, q, 2.0f);
  return p * s;
}

static inline V softplus(V x) { return (x > 0.0f ? x : V{}) + log1p_unit(exp_minus_abs(x)); }

// sigmoid(x) and, without cancellation, 1 - sigmoid(x).
struct Sigmoid {
  V value, rest;
};

static inline Sigmoid sigmoid(V x) {
  const V e = exp_minus_abs(x), large = inverse(e + 1.0f), small = e * large;
  return {x > 0.0f ? large : small, x > 0.0f ? small : large};
}

// The line at p will be read, or written, soon.
static inline void soon(const float *p) { __builtin_prefetch(p, 0, 2); }
static inline void soon_written(float *p) { __builtin_prefetch(p, 1, 3); }

// Numbers too small for the normal range count as zero while this lives: they are slow and mean nothing here.
struct FlushSmall {
#if defined(VLM_X86)
  unsigned before = _mm_getcsr();
  FlushSmall() { _mm_setcsr(before | 0x8040u); }
  ~FlushSmall() { _mm_setcsr(before); }
#endif
  FlushSmall(const FlushSmall &) = delete;
#if !defined(VLM_X86)
  FlushSmall() {}
#endif
};

}  // namespace vlm
