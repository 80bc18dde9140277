// The causal depthwise convolution and its gradients.
//
// A unit of work is a span of tokens of one row, whatever the number of threads. Inside, tokens go by chunks
// and channels by tiles, so that what is read again stays in the first cache level. "Before" and "after" are
// in scan direction; `reach` is the number of taps that a token uses: fewer than K at the start of a segment.
//
// Legend: B batch, L length, D channels, K taps. Strides count floats.

#pragma once

#include "lanes.h"

namespace vlm {

constexpr int64_t CONV_TOKENS = 64, CONV_BLOCKS = 8, CONV_UNITS = 64, MOST_TAPS = 16;

// The fields of vlmamba.ssm.backends.cpu_conv._Arguments, in the same order.
struct ConvArguments {
  int64_t batch, length, channels, taps, silu, reverse, lead, threads;
  int64_t x_row, x_step, dy_row, dy_step;
  const float *x, *weight, *bias;  // (B, L, D), (K, D), (D)
  const uint8_t *change;           // (B, L): a new segment begins at this token
  const float *dy;                 // (B, L - lead, D)
  float *y, *dx, *dweight, *dbias, *work;

  int direction() const { return reverse ? -1 : 1; }
  int64_t spans() const {  // of one row
    const int64_t chunks = (length + CONV_TOKENS - 1) / CONV_TOKENS;
    const int64_t most = batch < CONV_UNITS ? CONV_UNITS / (batch > 0 ? batch : 1) : 1;
    return chunks < most ? chunks : most;
  }
  int64_t units() const { return batch * spans(); }
  int64_t partial() const { return (taps + 1) * ((channels + LANES - 1) / LANES * LANES); }
  int64_t scratch() const { return (CONV_TOKENS + MOST_TAPS) * CONV_BLOCKS * LANES; }
  bool answered(int64_t token) const {
    return token >= 0 && token < length && (reverse ? token < length - lead : token >= lead);
  }
  int64_t answer(int64_t token) const { return reverse ? token : token - lead; }

  int reach(int64_t row, int64_t token) const {
    int count = 1;
    for (; count < taps; ++count) {
      const int64_t source = token - count * direction(), edge = reverse ? source : source + 1;
      if (source < 0 || source >= length || (change && change[row * length + edge])) break;
    }
    return count;
  }
};

// A chunk of tokens and a tile of channels of one row.
struct ConvTile {
  int64_t row, first, tokens, begin, end;
};

// The next tile of a unit, tile by tile and then chunk by chunk; false after the last one.
static inline bool conv_next(const ConvArguments &a, int64_t unit, ConvTile &tile) {
  const int64_t span = unit % a.spans(), stop = a.length * (span + 1) / a.spans();
  if (tile.tokens == 0) {
    tile.row = unit / a.spans(), tile.first = a.length * span / a.spans(), tile.begin = 0;
  } else {
    tile.begin = tile.end;
    if (tile.begin >= a.channels) tile.first += tile.tokens, tile.begin = 0;
  }
  const int64_t left = stop - tile.first, wide = a.channels - tile.begin;
  tile.tokens = left < CONV_TOKENS ? left : CONV_TOKENS;
  tile.end = tile.begin + (wide < CONV_BLOCKS * LANES ? wide : CONV_BLOCKS * LANES);
  return tile.tokens > 0 && wide > 0;
}

// The convolution before its activation, for one token and block.
template <int TAPS>
static inline V preactivation(const ConvArguments &a, const float *x, int64_t d, int reach, int lanes) {
  V sum = a.bias ? load(a.bias + d, lanes) : V{};
  if (TAPS && reach == TAPS) {
#pragma GCC unroll 4
    for (int s = 0; s < TAPS; ++s)
      sum = fused(load(a.weight + s * a.channels + d, lanes), load(x - s * a.direction() * a.x_step, lanes), sum);
  } else {
    for (int s = 0; s < reach; ++s)
      sum = fused(load(a.weight + s * a.channels + d, lanes), load(x - s * a.direction() * a.x_step, lanes), sum);
  }
  return sum;
}

template <int TAPS>
void conv_forward_unit(const ConvArguments &a, int64_t unit) {
  for (ConvTile tile{}; conv_next(a, unit, tile);) {
    for (int64_t token = tile.first; token < tile.first + tile.tokens; ++token) {
      if (!a.answered(token)) continue;
      const int reach = a.reach(tile.row, token);
      const float *x = a.x + tile.row * a.x_row + token * a.x_step;
      float *y = a.y + (tile.row * (a.length - a.lead) + a.answer(token)) * a.channels;
      for (int64_t d = tile.begin; d < tile.end; d += LANES) {
        const int lanes = a.channels - d < LANES ? (int)(a.channels - d) : LANES;
        soon(x + d + 4 * a.x_step), soon_written(y + d + 4 * a.channels);
        V out = preactivation<TAPS>(a, x + d, d, reach, lanes);
        if (a.silu) {
          const Sigmoid s = sigmoid(out);
          out *= s.value;
        }
        store(y + d, out, lanes);
      }
    }
  }
}

// First the gradient before the activation of every token of a chunk and of the K - 1 after it, with the sums
// of the weights; then the gradient of the input.
template <int TAPS>
void conv_backward_unit(const ConvArguments &a, int64_t unit, V *g) {
  const int taps = TAPS ? TAPS : (int)a.taps;
  const int64_t padded = a.partial() / (taps + 1);
  float *sums = a.work + unit * a.partial();
  std::memset(sums, 0, a.partial() * sizeof(float));
  for (ConvTile tile{}; conv_next(a, unit, tile);) {
    const int64_t row = tile.row, all = tile.tokens + taps - 1;
    const int64_t start = a.reverse ? tile.first + tile.tokens - 1 : tile.first;
    int reaches[CONV_TOKENS + MOST_TAPS];
    for (int64_t i = 0; i < all; ++i) {
      const int64_t token = start + i * a.direction();
      reaches[i] = a.answered(token) ? a.reach(row, token) : 0;
      if (!reaches[i]) continue;
      const float *x = a.x + row * a.x_row + token * a.x_step;
      const float *dy = a.dy + row * a.dy_row + a.answer(token) * a.dy_step;
      for (int64_t d = tile.begin, k = 0; d < tile.end; d += LANES, ++k) {
        const int lanes = a.channels - d < LANES ? (int)(a.channels - d) : LANES;
        soon(x + d + 4 * a.direction() * a.x_step), soon(dy + d + 4 * a.direction() * a.dy_step);
        V grad = load(dy + d, lanes);
        if (a.silu) {
          const V before = preactivation<TAPS>(a, x + d, d, reaches[i], lanes);
          const Sigmoid s = sigmoid(before);
          grad *= s.value * fused(before, s.rest, 1.0f);
        }
        g[i * CONV_BLOCKS + k] = grad;
        if (i >= tile.tokens) continue;
        const int reach = reaches[i];
        for (int s = 0; s < reach; ++s) {
          V *sum = (V *)(sums + s * padded + d);
          *sum = fused(grad, load(x + d - s * a.direction() * a.x_step, lanes), *sum);
        }
        *(V *)(sums + taps * padded + d) += grad;
      }
    }
    for (int64_t i = 0; a.dx && i < tile.tokens; ++i) {
      float *dx = a.dx + (row * a.length + start + i * a.direction()) * a.channels;
      for (int64_t d = tile.begin, k = 0; d < tile.end; d += LANES, ++k) {
        const int lanes = a.channels - d < LANES ? (int)(a.channels - d) : LANES;
        soon_written(dx + d + 4 * a.direction() * a.channels);
        V out{};
#pragma GCC unroll 4
        for (int s = 0; s < taps; ++s)
          if (reaches[i + s] > s)
            out = fused(load(a.weight + s * a.channels + d, lanes), g[(i + s) * CONV_BLOCKS + k], out);
        store(dx + d, out, lanes);
      }
    }
  }
}

// dweight and dbias of one block: the sums of all units, in their order.
static inline void conv_add(const ConvArguments &a, int64_t block) {
  const int64_t d = block * LANES, padded = a.partial() / (a.taps + 1);
  const int lanes = a.channels - d < LANES ? (int)(a.channels - d) : LANES;
  for (int64_t s = 0; s <= a.taps; ++s) {
    V sum{};
    for (int64_t unit = 0; unit < a.units(); ++unit)
      sum += load(a.work + unit * a.partial() + s * padded + d, LANES);
    store(s < a.taps ? a.dweight + s * a.channels + d : a.dbias + d, sum, lanes);
  }
}

}  // namespace vlm
