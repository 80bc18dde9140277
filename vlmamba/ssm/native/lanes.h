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

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

static inline V splat(float x) { return V{} + x; }

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

// Sum over the lanes, always in the same order.
static inline float lane_sum(V v) {
#if VLM_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x[LANES];
  std::memcpy(x, &v, sizeof v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
#endif
}

// 2^x, to 1e-7 of its value; zero below 2^-127, NaN stays NaN. 2^r = 1 + r q(r) on [-1/2, 1/2] with q fitted
// for the smallest relative error (9e-8), so that 2^0 is exactly 1.
static inline V exp2v(V x) {
#if VLM_AVX512
  const V r = (V)_mm512_reduce_ps((__m512)x, 0x08), k = x - r;
#else
  const V low = splat(-127.0f), high = splat(128.0f), magic = splat(12582912.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V k = (x + magic) - magic, r = x - k;
#endif
  V p = r * 0.00132651199f + 0.00967149986f;
  p = p * r + 0.055507323f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693146979f;
  p = p * r + 1.0f;
#if VLM_AVX512
  return (V)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  return p * (V)((__builtin_convertvector(k, IV) + 127) << 23);
#endif
}

// exp(-|x|): the argument is reduced by ln 2 in two parts, so that it is accurate however large |x| is.
static inline V exp_minus_abs(V x) {
  const V low = splat(-88.0f), magic = splat(12582912.0f);
  x = x > 0.0f ? -x : x;
  const V under = x < low ? splat(0.0f) : splat(1.0f);
  x = x < low ? low : x;
  const V k = (x * LOG2E + magic) - magic;
  const V r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  const V p = exp2v(r * LOG2E);
  return p * (V)((__builtin_convertvector(k, IV) + 127) << 23) * under;
}

// log(1 + e) for e in [0, 1], by 2 artanh(e / (2 + e)).
static inline V log1p_unit(V e) {
  const V s = e / (e + 2.0f), q = s * s;
  V p = q * 0.281783348f + 0.279606032f;
  p = p * q + 0.400249102f;
  p = p * q + 0.666663147f;
  p = p * q + 2.0f;
  return p * s;
}

static inline V softplus(V x) { return (x > 0.0f ? x : V{}) + log1p_unit(exp_minus_abs(x)); }

// sigmoid(x) and, without cancellation, 1 - sigmoid(x).
struct Sigmoid {
  V value, rest;
};

static inline Sigmoid sigmoid(V x) {
  const V e = exp_minus_abs(x), large = 1.0f / (e + 1.0f), small = e * large;
  return {x > 0.0f ? large : small, x > 0.0f ? small : large};
}

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
