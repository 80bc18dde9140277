// The arguments of a call, how it is cut into units of work, and its chunks of time.

#pragma once

#include "lanes.h"

namespace vlm {

constexpr int STEPS = 16;
constexpr int FORWARD_TILE = LANES == 16 ? 8 : 4;
constexpr int BACKWARD_TILE = LANES == 16 ? 4 : 2;
constexpr uint8_t RESET = 1, ASKED = 2;

// The fields of vlmamba.ssm.backends.cpu._Arguments, in the same order.
struct Arguments {
  int64_t batch, length, channels, size, groups, asked, threads, softplus, last;
  const float *u, *dt, *z, *A, *B, *C, *D, *bias, *start;
  int64_t u_row, u_step, dt_row, dt_step, z_row, z_step;
  int64_t B_row, B_step, B_group, C_row, C_step, C_group;
  const uint8_t *change, *reverse;  // (B, L): a new segment begins at this token; (G)
  const int64_t *at;                // (B, S)
  float *y, *states, *saved, *work;
  const float *dy, *d_states;
  int64_t dy_row, dy_step;
  float *du, *ddt, *dz, *dA, *dB, *dC, *dD, *dbias, *dstart;
};

// How a call is cut into units.
struct Plan {
  int64_t per_group, blocks, set, sets, chunks, units, matrix, threads;

  explicit Plan(const Arguments &a) {
    per_group = a.channels / a.groups;
    blocks = (per_group + LANES - 1) / LANES;
    set = (a.batch * a.groups * blocks + 15) / 16;
    set = set < 1 ? 1 : set > 16 ? 16 : set;
    sets = (blocks + set - 1) / set;
    chunks = (a.length + STEPS - 1) / STEPS;
    units = a.batch * a.groups * sets;
    matrix = (a.length * a.size + LANES - 1) / LANES * LANES;  // one partial dB or dC
    threads = a.threads < 1 ? 1 : a.threads < units ? a.threads : units > 0 ? units : 1;
  }
  int64_t all_blocks(const Arguments &a) const { return a.batch * a.groups * blocks; }
  int64_t asked_numbers(const Arguments &a) const { return a.asked ? STEPS * a.size : 0; }
  // Vectors of scratch memory of one thread.
  int64_t forward_scratch(const Arguments &a) const {
    return asked_numbers(a) + set * (3 * STEPS + 2 * a.size + 1);
  }
  int64_t backward_scratch(const Arguments &a) const {
    const int64_t tile = 4 * STEPS * BACKWARD_TILE + LANES;
    return tile + set * (9 * STEPS + 3 * a.size + 3 + asked_numbers(a));
  }
};

struct Unit {
  int64_t row, group, first, count, number;
  int direction;

  Unit(const Arguments &a, const Plan &plan, int64_t number) : number(number) {
    const int64_t set = number % plan.sets;
    group = number / plan.sets % a.groups;
    row = number / plan.sets / a.groups;
    first = set * plan.set;
    count = plan.blocks - first < plan.set ? plan.blocks - first : plan.set;
    direction = a.reverse[group] ? -1 : 1;
  }
  int64_t channel(const Plan &plan, int64_t block) const {
    return group * plan.per_group + (first + block) * LANES;
  }
  int lanes(const Plan &plan, int64_t block) const {
    const int64_t left = plan.per_group - (first + block) * LANES;
    return left < LANES ? (int)left : LANES;
  }
  int64_t block_index(const Arguments &a, const Plan &plan, int64_t block) const {
    return (row * a.groups + group) * plan.blocks + first + block;
  }
};

struct Chunk {
  int64_t token;  // the first one in scan direction
  int steps;
  bool asked = false;
  uint8_t flags[STEPS];

  Chunk(const Arguments &a, const Unit &unit, int64_t number) {
    const int64_t done = number * STEPS;
    steps = (int)(a.length - done < STEPS ? a.length - done : STEPS);
    token = unit.direction > 0 ? done : a.length - 1 - done;
    for (int t = 0; t < steps; ++t) {
      const int64_t edge = token + t * unit.direction + (unit.direction < 0);
      flags[t] = a.change && edge < a.length && a.change[unit.row * a.length + edge] ? RESET : 0;
    }
    for (int64_t s = 0; s < a.asked; ++s) {
      const int64_t t = (a.at[unit.row * a.asked + s] - token) * unit.direction;
      if (t >= 0 && t < steps) flags[t] |= ASKED, asked = true;
    }
  }
};

// (channels, N) numbers <-> N vectors.
static inline V column(const float *from, int64_t size, int lanes) {
  V v{};
  for (int i = 0; i < lanes; ++i) v[i] = from[i * size];
  return v;
}

static inline void gather(V *to, const float *from, int64_t size, int lanes) {
  for (int64_t n = 0; n < size; ++n) to[n] = column(from + n, size, lanes);
}

// A log2(e) of a block of channels, and the longest time whose decays are told apart: beyond it they are 0, or infinite.
static inline void gather_rates(V *to, V *longest, const float *A, int64_t size, int lanes) {
  V most{};
  for (int64_t n = 0; n < size; ++n) {
    to[n] = clamp(column(A + n, size, lanes) * LOG2E, splat(MOST_RATE));
    const V rate = to[n] < 0.0f ? -to[n] : to[n];
    most = rate > most ? rate : most;
  }
  *longest = MOST_EXPONENT / most;
}

static inline void scatter(float *to, const V *from, int64_t size, int lanes) {
  for (int64_t n = 0; n < size; ++n)
    for (int i = 0; i < lanes; ++i) to[i * size + n] = from[n][i];
}

// The places of the states asked for in this chunk: calls visit(step, offset into (B, S, D, N)).
template <class Visit>
void each_asked(const Arguments &a, const Unit &unit, const Chunk &chunk, int64_t channel, Visit visit) {
  for (int64_t s = 0; s < a.asked; ++s) {
    const int64_t place = unit.row * a.asked + s, t = (a.at[place] - chunk.token) * unit.direction;
    if (t >= 0 && t < chunk.steps) visit(t, (place * a.channels + channel) * a.size);
  }
}

struct Side {  // B or C from the first token of a chunk on
  const float *p;
  int64_t step;
};

static inline Side side(const float *matrix, int64_t row, int64_t step, int64_t group, const Unit &unit,
                        const Chunk &chunk) {
  return {matrix + unit.row * row + unit.group * group + chunk.token * step, step * unit.direction};
}

}  // namespace vlm
