// Forward: states and outputs of one unit of work.

#pragma once

#include "common.h"

namespace vlm {

template <int TILE>
void forward_tile(const Chunk &chunk, int64_t size, int64_t n, V *state, const V *A, const V *delta,
                  const V *input, Side B, Side C, V *y, V *asked) {
  V h[TILE], decay[TILE];
  for (int i = 0; i < TILE; ++i) h[i] = state[n + i], decay[i] = A[n + i];
  for (int t = 0; t < chunk.steps; ++t, B.p += B.step, C.p += C.step) {
    if (chunk.flags[t] & RESET)
      for (int i = 0; i < TILE; ++i) h[i] = V{};
    const V step = delta[t], x = input[t];
    V out = y[t];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
      h[i] = exp2v(step * decay[i]) * h[i] + x * B.p[n + i];
      out += h[i] * C.p[n + i];
    }
    y[t] = out;
    if (chunk.flags[t] & ASKED)
      for (int i = 0; i < TILE; ++i) asked[t * size + n + i] = h[i];
  }
  for (int i = 0; i < TILE; ++i) state[n + i] = h[i];
}

static inline void forward_unit(const Arguments &a, const Plan &plan, const Unit &unit, V *work) {
  const int64_t N = a.size;
  V *delta = work, *input = delta + STEPS, *y = input + STEPS, *A = y + STEPS;
  V *state = A + plan.set * N, *asked = state + plan.set * N;
  for (int64_t k = 0; k < unit.count; ++k) {
    const int64_t d = unit.channel(plan, k);
    const int lanes = unit.lanes(plan, k);
    gather(A + k * N, a.A + d * N, N, lanes, LOG2E);
    if (a.start)
      gather(state + k * N, a.start + (unit.row * a.channels + d) * N, N, lanes, 1.0f);
    else
      for (int64_t n = 0; n < N; ++n) state[k * N + n] = V{};
  }
  for (int64_t c = 0; c < plan.chunks; ++c) {
    const Chunk chunk(a, unit, c);
    const Side B = side(a.B, a.B_row, a.B_step, a.B_group, unit, chunk);
    const Side C = side(a.C, a.C_row, a.C_step, a.C_group, unit, chunk);
    for (int64_t k = 0; k < unit.count; ++k) {
      const int64_t d = unit.channel(plan, k);
      const int lanes = unit.lanes(plan, k);
      V *h = state + k * N;
      if (a.saved)
        std::memcpy(a.saved + (unit.block_index(a, plan, k) * plan.chunks + c) * N * LANES, h, N * sizeof(V));
      const V bias = a.bias ? load(a.bias + d, lanes) : V{};
      for (int t = 0; t < chunk.steps; ++t) {
        const int64_t token = chunk.token + t * unit.direction;
        const V raw = load(a.dt + unit.row * a.dt_row + token * a.dt_step + d, lanes) + bias;
        delta[t] = a.softplus ? softplus(raw) : raw;
        input[t] = delta[t] * load(a.u + unit.row * a.u_row + token * a.u_step + d, lanes);
        y[t] = V{};
      }
      int64_t n = 0;
      for (; n + FORWARD_TILE <= N; n += FORWARD_TILE)
        forward_tile<FORWARD_TILE>(chunk, N, n, h, A + k * N, delta, input, B, C, y, asked);
      for (; n < N; ++n) forward_tile<1>(chunk, N, n, h, A + k * N, delta, input, B, C, y, asked);
      if (chunk.asked)
        each_asked(a, unit, chunk, d, [&](int64_t t, int64_t place) {
          scatter(a.states + place, asked + t * N, N, lanes);
        });
      const V skip = a.D ? load(a.D + d, lanes) : V{};
      for (int t = 0; t < chunk.steps; ++t) {
        const int64_t token = chunk.token + t * unit.direction;
        V out = y[t];
        if (a.D) out += skip * load(a.u + unit.row * a.u_row + token * a.u_step + d, lanes);
        if (a.z) {
          const V z = load(a.z + unit.row * a.z_row + token * a.z_step + d, lanes);
          out *= z * sigmoid(z).value;
        }
        store(a.y + (unit.row * a.length + token) * a.channels + d, out, lanes);
      }
    }
  }
  if (a.last)
    for (int64_t k = 0; k < unit.count; ++k)
      scatter(a.states + (unit.row * a.channels + unit.channel(plan, k)) * N, state + k * N, N,
              unit.lanes(plan, k));
}

}  // namespace vlm
