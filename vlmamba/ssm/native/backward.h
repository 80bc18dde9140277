// Backward: gradients of one unit of work, and the sums over units.

#pragma once

#include <new>

#include "common.h"

namespace vlm {

// What backward keeps of one block of channels; the first nine are (STEPS), by token of the chunk.
struct BlockWork {
  V *delta, *time, *input, *inner, *slope, *gate, *d_delta, *d_input, *y;
  V *A, *carry, *dA, *dD, *dbias, *longest, *asked;

  BlockWork(V *&p, int64_t size, int64_t asked_numbers) {
    V **by_token[] = {&delta, &time, &input, &inner, &slope, &gate, &d_delta, &d_input, &y};
    V **by_state[] = {&A, &carry, &dA};
    for (V **array : by_token) *array = p, p += STEPS;
    for (V **array : by_state) *array = p, p += size;
    dD = p++, dbias = p++, longest = p++;
    asked = p, p += asked_numbers;
  }
};

// What a tile keeps of each token and state: the state before it and the decay, in pairs: as arrays of their
// own they would lie multiples of 4096 bytes apart, where loads wait for unrelated stores. And the sums of dB
// and dC over blocks: of each token first TILE of dB, then TILE of dC.
struct Step {
  V before, decay;
};
struct TileWork {
  Step *steps;
  V *sums;
};

template <int TILE>
void backward_tile(const Chunk &chunk, int64_t size, int64_t n, const BlockWork &w, const V *saved, Side B,
                   Side C, TileWork tile) {
  V h[TILE], A[TILE], dh[TILE], dA[TILE];
  for (int i = 0; i < TILE; ++i) A[i] = w.A[n + i], h[i] = saved[n + i];
  for (int t = 0; t < chunk.steps; ++t, B.p += B.step) {
    for (int i = 0; i < TILE; ++i) tile.steps[t * TILE + i].before = h[i];
    if (chunk.flags[t] & RESET)
      for (int i = 0; i < TILE; ++i) h[i] = V{};
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
      const V decay = decay_over<false>(w.time[t], A[i]);
      tile.steps[t * TILE + i].decay = decay;
      h[i] = fused(decay, h[i], w.input[t] * B.p[n + i]);
    }
  }
  for (int i = 0; i < TILE; ++i) dh[i] = w.carry[n + i], dA[i] = w.dA[n + i];
  C.p += chunk.steps * C.step;
  for (int t = chunk.steps - 1; t >= 0; --t) {
    B.p -= B.step, C.p -= C.step;
    const bool reset = chunk.flags[t] & RESET;
    if (chunk.flags[t] & ASKED)
      for (int i = 0; i < TILE; ++i) dh[i] += w.asked[t * size + n + i];
    const V inner = w.inner[t], input = w.input[t], delta = w.delta[t];
    V d_input = w.d_input[t], d_delta = w.d_delta[t], y = w.y[t];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
      const Step &step = tile.steps[t * TILE + i];
      const float b = B.p[n + i], c = C.p[n + i];
      V &dC = tile.sums[(2 * t + 1) * TILE + i], &dB = tile.sums[2 * t * TILE + i];
      dh[i] = fused(inner, c, dh[i]);
      dC = fused(inner, h[i], dC);
      dB = fused(dh[i], input, dB);
      d_input = fused(dh[i], b, d_input);
      y = fused(h[i], c, y);
      dh[i] *= step.decay;
      h[i] = step.before;
      const V exponent = dh[i] * (reset ? V{} : h[i]);
      d_delta = fused(exponent, A[i], d_delta);
      dA[i] = fused(exponent, delta, dA[i]);
    }
    if (reset)
      for (int i = 0; i < TILE; ++i) dh[i] = V{};
    w.d_input[t] = d_input, w.d_delta[t] = d_delta, w.y[t] = y;
  }
  for (int i = 0; i < TILE; ++i) w.carry[n + i] = dh[i], w.dA[n + i] = dA[i];
}

// Reads what the tokens of a chunk bring, token by token, and lets the next chunk's come nearer.
static inline void backward_open(const Arguments &a, const Plan &plan, const Unit &unit, const Chunk &chunk,
                                 const BlockWork *blocks) {
  for (int t = chunk.steps - 1; t >= 0; --t) {
    const int64_t token = chunk.token + t * unit.direction, ahead = -STEPS * unit.direction;
    const float *u = a.u + unit.row * a.u_row + token * a.u_step;
    const float *dt = a.dt + unit.row * a.dt_row + token * a.dt_step;
    const float *z = a.z ? a.z + unit.row * a.z_row + token * a.z_step : nullptr;
    const float *dy = a.dy ? a.dy + unit.row * a.dy_row + token * a.dy_step : nullptr;
    const int64_t out = (unit.row * a.length + token) * a.channels;
    for (int64_t k = 0; k < unit.count; ++k) {
      const BlockWork &w = blocks[k];
      const int64_t d = unit.channel(plan, k);
      const int lanes = unit.lanes(plan, k);
      V delta = load(dt + d, lanes), slope = splat(1.0f);
      if (a.bias) delta += load(a.bias + d, lanes);
      if (a.softplus) slope = sigmoid(delta).value, delta = softplus(delta);
      w.delta[t] = delta, w.time[t] = clamp(delta, *w.longest), w.slope[t] = slope;
      w.input[t] = delta * load(u + d, lanes);
      V inner = dy ? load(dy + d, lanes) : V{};
      if (z) {
        const V gate = load(z + d, lanes);
        const Sigmoid s = sigmoid(gate);
        w.gate[t] = inner * s.value * fused(gate, s.rest, 1.0f);
        inner *= gate * s.value;
        soon(z + d + ahead * a.z_step);
      }
      w.inner[t] = inner;
      w.d_delta[t] = w.d_input[t] = w.y[t] = V{};
      soon(u + d + ahead * a.u_step), soon(dt + d + ahead * a.dt_step);
      if (dy) soon(dy + d + ahead * a.dy_step);
      soon_written(a.du + out + d), soon_written(a.ddt + out + d);
      if (z) soon_written(a.dz + out + d);
    }
  }
}

// Carries the gradients of the inner quantities on to the inputs.
static inline void backward_close(const Arguments &a, const Plan &plan, const Unit &unit, const Chunk &chunk,
                                  const BlockWork *blocks) {
  for (int t = chunk.steps - 1; t >= 0; --t) {
    const int64_t token = chunk.token + t * unit.direction;
    const float *all_u = a.u + unit.row * a.u_row + token * a.u_step;
    for (int64_t k = 0; k < unit.count; ++k) {
      const BlockWork &w = blocks[k];
      const int64_t d = unit.channel(plan, k);
      const int lanes = unit.lanes(plan, k);
      const int64_t out = (unit.row * a.length + token) * a.channels + d;
      const V u = load(all_u + d, lanes);
      const V d_raw = fused(w.d_delta[t], LN2, w.d_input[t] * u) * w.slope[t];
      store(a.ddt + out, d_raw, lanes);
      V du = w.d_input[t] * w.delta[t], y = w.y[t];
      if (a.D) {
        const V skip = load(a.D + d, lanes);
        du = fused(w.inner[t], skip, du), y = fused(u, skip, y);
      }
      store(a.du + out, du, lanes);
      if (a.z) store(a.dz + out, w.gate[t] * y, lanes);
      *w.dbias += d_raw;
      *w.dD = fused(w.inner[t], u, *w.dD);
    }
  }
}

// Partial sums of one unit, added up at the end: dB and dC by unit, the others by row and block.
struct Partials {
  float *dB, *dC, *dA, *dD, *dbias;

  Partials(const Arguments &a, const Plan &plan) {
    const int64_t vectors = plan.all_blocks(a) * LANES;
    dB = a.work + plan.threads * plan.backward_scratch(a) * LANES;
    dC = dB + plan.units * plan.matrix;
    dA = dC + plan.units * plan.matrix;
    dD = dA + vectors * a.size;
    dbias = dD + vectors;
  }
  static int64_t numbers(const Arguments &a, const Plan &plan) {
    return 2 * plan.units * plan.matrix + plan.all_blocks(a) * LANES * (a.size + 2);
  }
};

template <int TILE>
void backward_tiles(const Arguments &a, const Plan &plan, const Unit &unit, const Chunk &chunk, int64_t c,
                    int64_t n, const BlockWork *blocks, TileWork tile, const Partials &sums) {
  const Side B = side(a.B, a.B_row, a.B_step, a.B_group, unit, chunk);
  const Side C = side(a.C, a.C_row, a.C_step, a.C_group, unit, chunk);
  constexpr int TOKENS = LANES / (2 * TILE);  // whose sums fill one vector
  for (int i = 0; i < (chunk.steps + TOKENS - 1) / TOKENS * LANES; ++i) tile.sums[i] = V{};
  for (int64_t k = 0; k < unit.count; ++k) {
    const float *saved = a.saved + (unit.block_index(a, plan, k) * plan.chunks + c) * a.size * LANES;
    backward_tile<TILE>(chunk, a.size, n, blocks[k], (const V *)saved, B, C, tile);
  }
  for (int first = 0; first < chunk.steps; first += TOKENS) {
    float all[LANES];
    const V sum = lane_sums(tile.sums + first * 2 * TILE);
    std::memcpy(all, &sum, sizeof all);
    for (int t = first; t < first + TOKENS && t < chunk.steps; ++t) {
      const int64_t token = chunk.token + t * unit.direction;
      const int64_t place = unit.number * plan.matrix + token * a.size + n;
      std::memcpy(sums.dB + place, all + (t - first) * 2 * TILE, TILE * sizeof(float));
      std::memcpy(sums.dC + place, all + (t - first) * 2 * TILE + TILE, TILE * sizeof(float));
    }
  }
}

static inline void backward_unit(const Arguments &a, const Plan &plan, const Unit &unit, V *work,
                                 const Partials &sums) {
  const int64_t N = a.size;
  TileWork tile;
  tile.steps = (Step *)work;
  tile.sums = (V *)(tile.steps + STEPS * BACKWARD_TILE);
  V *next = tile.sums + 2 * STEPS * BACKWARD_TILE + LANES;
  BlockWork *blocks = (BlockWork *)__builtin_alloca(plan.set * sizeof(BlockWork));
  for (int64_t k = 0; k < unit.count; ++k) {
    const BlockWork &w = *new (blocks + k) BlockWork(next, N, plan.asked_numbers(a));
    const int64_t d = unit.channel(plan, k);
    gather_rates(w.A, w.longest, a.A + d * N, N, unit.lanes(plan, k));
    for (int64_t n = 0; n < N; ++n) w.carry[n] = w.dA[n] = V{};
    *w.dD = *w.dbias = V{};
    if (a.last && a.d_states)
      gather(w.carry, a.d_states + (unit.row * a.channels + d) * N, N, unit.lanes(plan, k));
  }
  for (int64_t c = plan.chunks - 1; c >= 0; --c) {
    Chunk chunk(a, unit, c);
    backward_open(a, plan, unit, chunk, blocks);
    for (int64_t k = 0; chunk.asked && k < unit.count; ++k) {
      const int64_t d = unit.channel(plan, k);
      for (int64_t i = 0; i < chunk.steps * N; ++i) blocks[k].asked[i] = V{};
      if (a.d_states)
        each_asked(a, unit, chunk, d, [&](int64_t t, int64_t place) {
          const float *from = a.d_states + place;
          for (int64_t n = 0; n < N; ++n) blocks[k].asked[t * N + n] += column(from + n, N, unit.lanes(plan, k));
        });
    }
    int64_t n = 0;
    for (; n + BACKWARD_TILE <= N; n += BACKWARD_TILE)
      backward_tiles<BACKWARD_TILE>(a, plan, unit, chunk, c, n, blocks, tile, sums);
    for (; n < N; ++n) backward_tiles<1>(a, plan, unit, chunk, c, n, blocks, tile, sums);
    backward_close(a, plan, unit, chunk, blocks);
  }
  for (int64_t k = 0; k < unit.count; ++k) {
    const int64_t index = unit.block_index(a, plan, k);
    std::memcpy(sums.dA + index * N * LANES, blocks[k].dA, N * sizeof(V));
    std::memcpy(sums.dD + index * LANES, blocks[k].dD, sizeof(V));
    std::memcpy(sums.dbias + index * LANES, blocks[k].dbias, sizeof(V));
    if (a.dstart)
      scatter(a.dstart + (unit.row * a.channels + unit.channel(plan, k)) * N, blocks[k].carry, N,
              unit.lanes(plan, k));
  }
}

// dB or dC of one row and group: the partial sums of its units, in their order.
static inline void add_matrix(const Arguments &a, const Plan &plan, int64_t pair, const float *partial,
                              float *to) {
  const int64_t row = pair / a.groups, group = pair % a.groups;
  for (int64_t t = 0; t < a.length; ++t) {
    float *out = to + ((row * a.length + t) * a.groups + group) * a.size;
    for (int64_t n = 0; n < a.size; ++n) {
      float sum = 0.0f;
      for (int64_t s = 0; s < plan.sets; ++s)
        sum += partial[(pair * plan.sets + s) * plan.matrix + t * a.size + n];
      out[n] = sum;
    }
  }
}

// dA, dD and dbias of one block: the sums of all rows, in their order.
static inline void add_rows(const Arguments &a, const Plan &plan, int64_t group, int64_t block,
                            const Partials &sums) {
  const int64_t d = group * plan.per_group + block * LANES, left = plan.per_group - block * LANES;
  const int lanes = left < LANES ? (int)left : LANES;
  V dD{}, dbias{};
  for (int64_t n = 0; n < a.size; ++n) {
    V dA{};
    for (int64_t row = 0; row < a.batch; ++row) {
      const int64_t index = (row * a.groups + group) * plan.blocks + block;
      dA += load(sums.dA + (index * a.size + n) * LANES, LANES);
    }
    for (int i = 0; i < lanes; ++i) a.dA[(d + i) * a.size + n] = dA[i];
  }
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t index = (row * a.groups + group) * plan.blocks + block;
    dD += load(sums.dD + index * LANES, LANES);
    dbias += load(sums.dbias + index * LANES, LANES);
  }
  if (a.dD) store(a.dD + d, dD, lanes);
  if (a.dbias) store(a.dbias + d, dbias, lanes);
}

}  // namespace vlm
