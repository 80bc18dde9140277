// The selective scan, the causal convolution (conv.h) and the decode step (step.h) for the CPU, behind a plain
// C interface.
//
// The scan: a vector register holds one block of channels; time runs in chunks of STEPS tokens. A unit of work is one
// row, one group and a fixed number of blocks, whatever the number of threads, and partial sums over units
// are added in a fixed order: results are the same bits for any number of threads and in any run. Forward
// keeps the state before each chunk; backward computes the states of a chunk again, a few of the N state
// numbers at a time, so that what it reads stays in the first cache level.
//
// Legend: B batch, L length, D channels, N state size, G groups, S asked states. Strides count floats.

#include "backward.h"
#include "conv.h"
#include "forward.h"
#include "step.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace vlm;

namespace {

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <int TAPS>
void convolve(const ConvArguments &a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)a.threads) if (a.threads > 1)
  for (int64_t unit = 0; unit < a.units(); ++unit) {
    const FlushSmall flush;
    conv_forward_unit<TAPS>(a, unit);
  }
}

template <int TAPS>
void convolve_back(const ConvArguments &a) {
  V *scratch = (V *)(a.work + a.units() * a.partial());
#pragma omp parallel num_threads((int)a.threads) if (a.threads > 1)
  {
    const FlushSmall flush;
    V *own = scratch + thread_number() * (a.scratch() / LANES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.units(); ++unit) conv_backward_unit<TAPS>(a, unit, own);
#pragma omp for schedule(static)
    for (int64_t d = 0; d < a.channels; d += LANES) conv_add(a, d / LANES);
  }
}

}  // namespace

extern "C" {

int64_t vlmamba_scan_lanes() { return LANES; }

int64_t vlmamba_scan_arguments_size() { return sizeof(Arguments); }

// Numbers of float32 to provide: for `saved`, for `work` of forward and for `work` of backward.
void vlmamba_scan_sizes(const Arguments *a, int64_t *sizes) {
  const Plan plan(*a);
  sizes[0] = plan.all_blocks(*a) * plan.chunks * a->size * LANES;
  sizes[1] = plan.threads * plan.forward_scratch(*a) * LANES;
  sizes[2] = plan.threads * plan.backward_scratch(*a) * LANES + Partials::numbers(*a, plan);
}

void vlmamba_scan_forward(const Arguments *arguments) {
  const Arguments &a = *arguments;
  const Plan plan(a);
#pragma omp parallel num_threads((int)plan.threads) if (plan.threads > 1)
  {
    const FlushSmall flush;
    V *work = (V *)a.work + thread_number() * plan.forward_scratch(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.units; ++i) forward_unit(a, plan, Unit(a, plan, i), work);
  }
}

void vlmamba_scan_backward(const Arguments *arguments) {
  const Arguments &a = *arguments;
  const Plan plan(a);
  const Partials sums(a, plan);
#pragma omp parallel num_threads((int)plan.threads) if (plan.threads > 1)
  {
    const FlushSmall flush;
    V *work = (V *)a.work + thread_number() * plan.backward_scratch(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.units; ++i) backward_unit(a, plan, Unit(a, plan, i), work, sums);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < a.batch * a.groups; ++pair) {
      add_matrix(a, plan, pair, sums.dB, a.dB);
      add_matrix(a, plan, pair, sums.dC, a.dC);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.groups * plan.blocks; ++i)
      add_rows(a, plan, i / plan.blocks, i % plan.blocks, sums);
  }
}

int64_t vlmamba_conv_arguments_size() { return sizeof(ConvArguments); }

// Numbers of float32 to provide for `work` of backward.
int64_t vlmamba_conv_work(const ConvArguments *a) {
  return a->units() * a->partial() + a->threads * a->scratch();
}

void vlmamba_conv_forward(const ConvArguments *a) {
  if (a->taps == 4) return convolve<4>(*a);
  convolve<0>(*a);
}

void vlmamba_conv_backward(const ConvArguments *a) {
  if (a->taps == 4) return convolve_back<4>(*a);
  convolve_back<0>(*a);
}

int64_t vlmamba_step_arguments_size() { return sizeof(StepArguments); }

void vlmamba_step(const StepArguments *arguments) {
  const StepArguments &a = *arguments;
  const int64_t blocks = a.blocks();
#pragma omp parallel for schedule(static) num_threads((int)a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < a.batch * a.groups * blocks; ++i) {
    const FlushSmall flush;
    step_block(a, i / (a.groups * blocks), i / blocks % a.groups, i % blocks);
  }
}

}  // extern "C"
