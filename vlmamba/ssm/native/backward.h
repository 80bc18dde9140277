// Backward: gradients of one unit of work, and the sums over units.

#pragma once

#include <new>

#include "common.h"

namespace vlm {

// What backward keeps of one block of channels; the first eight are (STEPS), by token of the chunk.
struct BlockWork {
  V *delta, *input, *inner, *slope, *gate, *d_delta, *d_input, *y;
  V *A, *carry, *dA, *dD, *dbias, *asked;

  BlockWork(V *&p, int64_t size, int64_t asked_numbers) {
    V **by_token[] = {&delta, &input, &inner, &slope, &gate, &d_delta, &d_input, &y};
    V **by_state[] = {&A, &carry, &dA};
    for (V **array : by_token) *array = p, p += STEPS;
    for (V **array : by_state) *array = p, p += size;
    dD = p++, dbias = p++;
    asked = p, p += asked_numbers;
  }
};

// What a tile keeps of each token and state: the state before it and the decay, and the sums of dB and dC
// over blocks. In pairs: as arrays of their own they would lie multiples of 4096 bytes apart, where loads
// wait for unrelated stores.
struct Step {
  V before, decay;
};
struct Sums {
  V dB, dC;
};
struct TileWork {
  Step *steps;
  Sums *sums;
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
      const V decay = exp2v(w.delta[t] * A[i]);
      tile.steps[t * TILE + i].decay = decay;
      h[i] = decay * h[i] + w.input[t] * B.p[n + i];
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
      Sums &sums = tile.sums[t * TILE + i];
      const float b = B.p[n + i], c = C.p[n + i];
      dh[i] += inner * c;
      sums.dC += inner * h[i];
      sums.dB += dh[i] * input;
      d_input += dh[i] * b;
      y += h[i] * c;
      dh[i] *= step.decay;
      h[i] = step.before;
      const V exponent = dh[i] * (reset ? V{} : h[i]);
      d_delta += exponent * A[i];
      dA[i] += exponent * delta;
    }
    if (reset)
      for (int i = 0; i < TILE; ++i) dh[i] = V{};
    w.d_input[t] = d_input, w.d_delta[t] = d_delta, w.y[t] = y;
  }
  for (int i = 0; i < TILE; ++i) w.carry[n + i] = dh[i], w.dA[n + i] = dA[i];
}

// What the tokens of a chunk bring to one block: read before the tiles.
static inline void open_block(const Arguments &a, const Unit &unit, const Chunk &chunk, int64_t d, int lanes,
                const BlockWork &w) {
  const V bias = a.bias ? load(a.bias + d, lanes) : V{};
  for (int t = 0; t < chunk.steps; ++t) {
    const int64_t token = chunk.token + t * unit.direction;
    const V raw = load(a.dt + unit.row * a.dt_row + token * a.dt_step + d, lanes) + bias;
    w.delta[t] = a.softplus ? softplus(raw) : raw;
    w.slope[t] = a.softplus ? sigmoid(raw).value : splat(1.0f);
    w.input[t] = w.delta[t] * load(a.u + unit.row * a.u_row + token * a.u_step + d, lanes);
    const V dy = a.dy ? load(a.dy + unit.row * a.dy_row + token * a.dy_step + d, lanes) : V{};
    w.inner[t] = dy;
    if (a.z) {
      const V z = load(a.z + unit.row * a.z_row + token * a.z_step + d, lanes);
      const Sigmoid s = sigmoid(z);
      w.inner[t] = dy * (z * s.value);
      w.gate[t] = dy * s.value * (1.0f + z * s.rest);
    }
    w.d_delta[t] = w.d_input[t] = w.y[t] = V{};
  }
}

// Carries the gradients of the inner quantities on to the inputs: after the tiles.
static inline void close_block(const Arguments &a, const Unit &unit, const Chunk &chunk, int64_t d, int lanes,
                 const BlockWork &w) {
  const V skip = a.D ? load(a.D + d, lanes) : V{};
  for (int t = chunk.steps - 1; t >= 0; --t) {
    const int64_t token = chunk.token + t * unit.direction;
    const int64_t out = (unit.row * a.length + token) * a.channels + d;
    const V u = load(a.u + unit.row * a.u_row + token * a.u_step + d, lanes);
    const V d_raw = (w.d_delta[t] * LN2 + w.d_input[t] * u) * w.slope[t];
    store(a.ddt + out, d_raw, lanes);
    V du = w.d_input[t] * w.delta[t], y = w.y[t];
    if (a.D) du += w.inner[t] * skip, y += u * skip;
    store(a.du + out, du, lanes);
    if (a.z) store(a.dz + out, w.gate[t] * y, lanes);
    *w.dbias += d_raw;
    *w.dD += w.inner[t] * u;
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
  for (int i = 0; i < chunk.steps * TILE; ++i) tile.sums[i] = Sums{};
  for (int64_t k = 0; k < unit.count; ++k) {
    const float *saved = a.saved + (unit.block_index(a, plan, k) * plan.chunks + c) * a.size * LANES;
    backward_tile<TILE>(chunk, a.size, n, blocks[k], (const V *)saved, B, C, tile);
  }
  for (int t = 0; t < chunk.steps; ++t)
    for (int i = 0; i < TILE; ++i) {
      const int64_t token = chunk.token + t * unit.direction;
      const int64_t place = unit.number * plan.matrix + token * a.size + n + i;
      sums.dB[place] = lane_sum(tile.sums[t * TILE + i].dB);
      sums.dC[place] = lane_sum(tile.sums[t * TILE + i].dC);
    }
}

static inline void backward_unit(const Arguments &a, const Plan &plan, const Unit &unit, V *work,
                                 const Partials &sums) {
  const int64_t N = a.size;
  TileWork tile;
  tile.steps = (Step *)work;
  tile.sums = (Sums *)(tile.steps + STEPS * BACKWARD_TILE);
  V *next = (V *)(tile.sums + STEPS * BACKWARD_TILE);
  BlockWork *blocks = (BlockWork *)__builtin_alloca(plan.set * sizeof(BlockWork));
  for (int64_t k = 0; k < unit.count; ++k) {
    const BlockWork &w = *new (blocks + k) BlockWork(next, N, plan.asked_numbers(a));
    const int64_t d = unit.channel(plan, k);
    gather(w.A, a.A + d * N, N, unit.lanes(plan, k), LOG2E);
    for (int64_t n = 0; n < N; ++n) w.carry[n] = w.dA[n] = V{};
    *w.dD = *w.dbias = V{};
    if (a.last && a.d_states)
      gather(w.carry, a.d_states + (unit.row * a.channels + d) * N, N, unit.lanes(plan, k), 1.0f);
  }
  for (int64_t c = plan.chunks - 1; c >= 0; --c) {
    Chunk chunk(a, unit, c);
    for (int64_t k = 0; k < unit.count; ++k) {
      const int64_t d = unit.channel(plan, k);
      open_block(a, unit, chunk, d, unit.lanes(plan, k), blocks[k]);
      if (!chunk.asked) continue;
      for (int64_t i = 0; i < chunk.steps * N; ++i) blocks[k].asked[i] = V{};
      if (a.d_states)
        each_asked(a, unit, chunk, d, [&](int64_t t, int64_t place) {
          gather(blocks[k].asked + t * N, a.d_states + place, N, unit.lanes(plan, k), 1.0f, true);
        });
    }
    int64_t n = 0;
    for (; n + BACKWARD_TILE <= N; n += BACKWARD_TILE)
      backward_tiles<BACKWARD_TILE>(a, plan, unit, chunk, c, n, blocks, tile, sums);
    for (; n < N; ++n) backward_tiles<1>(a, plan, unit, chunk, c, n, blocks, tile, sums);
    for (int64_t k = 0; k < unit.count; ++k)
      close_block(a, unit, chunk, unit.channel(plan, k), unit.lanes(plan, k), blocks[k]);
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
