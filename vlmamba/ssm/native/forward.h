// Forward: states and outputs of one unit of work.

#pragma once

#include "common.h"

namespace vlm {

template <int TILE>
void forward_tile(const Chunk &chunk, int64_t size, int64_t n, V *state, const V *A, const V *time,
                  const V *input, Side B, Side C, V *y, V *asked) {
  V h[TILE], rate[TILE];
  for (int i = 0; i < TILE; ++i) h[i] = state[n + i], rate[i] = A[n + i];
  for (int t = 0; t < chunk.steps; ++t, B.p += B.step, C.p += C.step) {
    if (chunk.flags[t] & RESET)
      for (int i = 0; i < TILE; ++i) h[i] = V{};
    const V now = time[t], x = input[t];
    V out = y[t];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
      h[i] = fused(decay_over<false>(now, rate[i]), h[i], x * B.p[n + i]);
      out = fused(h[i], C.p[n + i], out);
    }
    y[t] = out;
    if (chunk.flags[t] & ASKED)
      for (int i = 0; i < TILE; ++i) asked[t * size + n + i] = h[i];
  }
  for (int i = 0; i < TILE; ++i) state[n + i] = h[i];
}

// What forward keeps of one block of channels: numbers by token of the chunk, and by state.
struct ForwardWork {
  V *time, *input, *y, *A, *state, *longest;

  ForwardWork(V *p, int64_t size)
      : time(p), input(p + STEPS), y(p + 2 * STEPS), A(p + 3 * STEPS), state(A + size), longest(state + size) {}
  static int64_t numbers(int64_t size) { return 3 * STEPS + 2 * size + 1; }
};

// Reads what the tokens of a chunk bring, token by token, and lets the next chunk's come nearer.
static inline void forward_open(const Arguments &a, const Plan &plan, const Unit &unit, const Chunk &chunk,
                                V *work) {
  for (int t = 0; t < chunk.steps; ++t) {
    const int64_t token = chunk.token + t * unit.direction, ahead = STEPS * unit.direction;
    const float *u = a.u + unit.row * a.u_row + token * a.u_step;
    const float *dt = a.dt + unit.row * a.dt_row + token * a.dt_step;
    const float *z = a.z ? a.z + unit.row * a.z_row + token * a.z_step : nullptr;
    float *y = a.y + (unit.row * a.length + token) * a.channels;
    for (int64_t k = 0; k < unit.count; ++k) {
      const ForwardWork w(work + k * ForwardWork::numbers(a.size), a.size);
      const int64_t d = unit.channel(plan, k);
      const int lanes = unit.lanes(plan, k);
      V delta = load(dt + d, lanes);
      if (a.bias) delta += load(a.bias + d, lanes);
      if (a.softplus) delta = softplus(delta);
      w.time[t] = clamp(delta, *w.longest);
      w.input[t] = delta * load(u + d, lanes);
      w.y[t] = V{};
      soon(u + d + ahead * a.u_step), soon(dt + d + ahead * a.dt_step);
      if (z) soon(z + d);
      soon_written(y + d);
    }
  }
}

// Adds the skip, gates and writes the answers of a chunk.
static inline void forward_close(const Arguments &a, const Plan &plan, const Unit &unit, const Chunk &chunk,
                                 V *work) {
  for (int t = 0; t < chunk.steps; ++t) {
    const int64_t token = chunk.token + t * unit.direction;
    const float *u = a.u + unit.row * a.u_row + token * a.u_step;
    const float *z = a.z ? a.z + unit.row * a.z_row + token * a.z_step : nullptr;
    float *y = a.y + (unit.row * a.length + token) * a.channels;
    for (int64_t k = 0; k < unit.count; ++k) {
      const ForwardWork w(work + k * ForwardWork::numbers(a.size), a.size);
      const int64_t d = unit.channel(plan, k);
      const int lanes = unit.lanes(plan, k);
      V out = w.y[t];
      if (a.D) out = fused(load(a.D + d, lanes), load(u + d, lanes), out);
      if (z) {
        const V gate = load(z + d, lanes);
        out *= gate * sigmoid(gate).value;
      }
      store(y + d, out, lanes);
    }
  }
}

static inline void forward_unit(const Arguments &a, const Plan &plan, const Unit &unit, V *work) {
  const int64_t N = a.size;
  V *asked = work;
  work += plan.asked_numbers(a);
  for (int64_t k = 0; k < unit.count; ++k) {
    const ForwardWork w(work + k * ForwardWork::numbers(N), N);
    const int64_t d = unit.channel(plan, k);
    const int lanes = unit.lanes(plan, k);
    gather_rates(w.A, w.longest, a.A + d * N, N, lanes);
    for (int64_t n = 0; n < N; ++n) w.state[n] = V{};
    if (a.start) gather(w.state, a.start + (unit.row * a.channels + d) * N, N, lanes);
  }
  for (int64_t c = 0; c < plan.chunks; ++c) {
    const Chunk chunk(a, unit, c);
    const Side B = side(a.B, a.B_row, a.B_step, a.B_group, unit, chunk);
    const Side C = side(a.C, a.C_row, a.C_step, a.C_group, unit, chunk);
    forward_open(a, plan, unit, chunk, work);
    for (int64_t k = 0; k < unit.count; ++k) {
      const ForwardWork w(work + k * ForwardWork::numbers(N), N);
      if (a.saved)
        std::memcpy(a.saved + (unit.block_index(a, plan, k) * plan.chunks + c) * N * LANES, w.state,
                    N * sizeof(V));
      int64_t n = 0;
      for (; n + FORWARD_TILE <= N; n += FORWARD_TILE)
        forward_tile<FORWARD_TILE>(chunk, N, n, w.state, w.A, w.time, w.input, B, C, w.y, asked);
      for (; n < N; ++n) forward_tile<1>(chunk, N, n, w.state, w.A, w.time, w.input, B, C, w.y, asked);
      if (chunk.asked)
        each_asked(a, unit, chunk, unit.channel(plan, k), [&](int64_t t, int64_t place) {
          scatter(a.states + place, asked + t * N, N, unit.lanes(plan, k));
        });
    }
    forward_close(a, plan, unit, chunk, work);
  }
  if (a.last)
    for (int64_t k = 0; k < unit.count; ++k) {
      const ForwardWork w(work + k * ForwardWork::numbers(N), N);
      scatter(a.states + (unit.row * a.channels + unit.channel(plan, k)) * N, w.state, N,
              unit.lanes(plan, k));
    }
}

}  // namespace vlm
