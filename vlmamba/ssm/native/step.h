// One decode step: the same operations in the same order as in the scan (forward.h), so that steps answer the
// same bits as one call. States are stored with N innermost and a step reads each only once; so a vector holds
// state numbers of one channel until y is summed up, for which a block of channels is turned around.

#pragma once

#include "lanes.h"

namespace vlm {

// The fields of vlmamba.ssm.backends.cpu_step._Arguments, in the same order.
struct StepArguments {
  int64_t batch, channels, size, groups, softplus, threads;
  int64_t u_row, dt_row, z_row, B_row, C_row, B_group, C_group;
  float *state;
  const float *u, *dt, *z, *A, *B, *C, *D, *bias;
  float *y;

  int64_t per_group() const { return channels / groups; }
  int64_t blocks() const { return (per_group() + LANES - 1) / LANES; }  // of one group
};

// A block of channels of one row and group, from channel d on.
static inline void step_block(const StepArguments &a, int64_t row, int64_t group, int64_t block) {
  const int64_t d = group * a.per_group() + block * LANES, left = a.per_group() - block * LANES;
  const int lanes = left < LANES ? (int)left : LANES;
  const V u = load(a.u + row * a.u_row + d, lanes);
  V delta = load(a.dt + row * a.dt_row + d, lanes);
  if (a.bias) delta += load(a.bias + d, lanes);
  if (a.softplus) delta = softplus(delta);
  const V input = delta * u;
  const float *B = a.B + row * a.B_row + group * a.B_group, *C = a.C + row * a.C_row + group * a.C_group;
  V y{};
  for (int64_t n = 0; n < a.size; n += LANES) {
    const int count = a.size - n < LANES ? (int)(a.size - n) : LANES;
    const V b = load(B + n, count);
    V h[LANES];
    for (int i = 0; i < lanes; ++i) {
      const V rate = clamp(load(a.A + (d + i) * a.size + n, count) * LOG2E, splat(MOST_RATE));
      float *state = a.state + (row * a.channels + d + i) * a.size + n;
      h[i] = fused(decay_over<true>(splat(delta[i]), rate), load(state, count), input[i] * b);
      store(state, h[i], count);
    }
    for (int i = lanes; i < LANES; ++i) h[i] = V{};
    turn(h);
    for (int i = 0; i < count; ++i) y = fused(h[i], C[n + i], y);
  }
  if (a.D) y = fused(load(a.D + d, lanes), u, y);
  if (a.z) {
    const V z = load(a.z + row * a.z_row + d, lanes);
    y *= z * sigmoid(z).value;
  }
  store(a.y + row * a.channels + d, y, lanes);
}

}  // namespace vlm
