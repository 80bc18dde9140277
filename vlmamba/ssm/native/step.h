// One decode step. A vector register holds state numbers of one channel here: states are stored that way, and
// a step reads each only once.

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
};

// A block of channels of one row.
static inline void step_block(const StepArguments &a, int64_t row, int64_t d) {
  const int lanes = a.channels - d < LANES ? (int)(a.channels - d) : LANES;
  const V u = load(a.u + row * a.u_row + d, lanes);
  V delta = load(a.dt + row * a.dt_row + d, lanes);
  if (a.bias) delta += load(a.bias + d, lanes);
  if (a.softplus) delta = softplus(delta);
  const V input = delta * u;
  V sums[LANES];
  for (int i = 0; i < lanes; ++i) {
    const int64_t group = (d + i) / (a.channels / a.groups);
    const float *A = a.A + (d + i) * a.size;
    const float *B = a.B + row * a.B_row + group * a.B_group, *C = a.C + row * a.C_row + group * a.C_group;
    float *state = a.state + (row * a.channels + d + i) * a.size;
    const float step = delta[i], x = input[i];
    V sum{};
    for (int64_t n = 0; n < a.size; n += LANES) {
      const int count = a.size - n < LANES ? (int)(a.size - n) : LANES;
      const V h = exp2v(step * (load(A + n, count) * LOG2E)) * load(state + n, count) + x * load(B + n, count);
      store(state + n, h, count);
      sum += h * load(C + n, count);
    }
    sums[i] = sum;
  }
  for (int i = lanes; i < LANES; ++i) sums[i] = V{};
  V y = lane_sums(sums);
  if (a.D) y += load(a.D + d, lanes) * u;
  if (a.z) {
    const V z = load(a.z + row * a.z_row + d, lanes);
    y *= z * sigmoid(z).value;
  }
  store(a.y + row * a.channels + d, y, lanes);
}

}  // namespace vlm
