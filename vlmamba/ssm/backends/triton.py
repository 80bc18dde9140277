"""The Triton backend: selective scan, causal convolution and decode step as GPU kernels.

Written for NVIDIA A100 and H100/H200. With TRITON_INTERPRET=1 the kernels run in Triton's interpreter on the
CPU instead, to check them; then the backend is never chosen by itself.

The kernels are in modules of their own, which import triton and are imported only where they run.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from vlmamba.ssm.backends.triton_tuning import interpreted
from vlmamba.ssm.spec import Backend, ConvCall, ScanCall, ScanSpec, StepCall, Verdict

LARGEST_STATE = 128
LARGEST_KERNEL = 8
MOST_GROUPS_WITH_REVERSE = 62
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    from vlmamba.ssm.backends import triton_scan

    return triton_scan.scan(call)


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`."""
    from vlmamba.ssm.backends import triton_conv

    return triton_conv.conv(call)


def step(call: StepCall) -> Tensor:
    """Run `selective_state_update`."""
    from vlmamba.ssm.backends import triton_step

    return triton_step.step(call)


def available() -> Verdict:
    """True once a small kernel has run here; otherwise why it has not."""
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if interpreted():
        return True
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, to check it)"
    return _probe()


@functools.cache
def _probe() -> Verdict:
    """Compile and run a small kernel."""
    try:
        from vlmamba.ssm.backends.triton_probe import add_one

        return add_one()
    except Exception as error:  # noqa: BLE001  (compilers and drivers raise whatever they like)
        return f"a small Triton kernel fails: {type(error).__name__}: {str(error).strip()[-300:]}"


def supports(spec: ScanSpec) -> Verdict:
    """Half and single precision on CUDA devices."""
    device = "cpu" if interpreted() else "cuda"
    if spec.device not in (device, "cuda"):
        return f"it runs on {device}, not on {spec.device}"
    if spec.dtype not in _DTYPES:
        name = str(spec.dtype).removeprefix("torch.")
        return f"it computes in float32; {name} is served by 'reference'"
    if spec.op == "conv":
        widest = spec.state_size <= LARGEST_KERNEL
        return (
            True if widest else f"a kernel of {spec.state_size} taps is too wide (at most {LARGEST_KERNEL})"
        )
    if spec.state_size > LARGEST_STATE:
        return f"N = {spec.state_size} does not fit into registers (at most {LARGEST_STATE})"
    if spec.op == "step" and spec.needs_grad:
        return "its decode step has no gradient"
    if "reverse" in spec.features and spec.groups > MOST_GROUPS_WITH_REVERSE:
        return f"it reverses at most {MOST_GROUPS_WITH_REVERSE} groups, not {spec.groups}"
    return True


BACKEND = Backend(
    name="triton",
    priority=-1 if interpreted() else 40,
    scan=scan,
    conv=conv,
    step=step,
    available=available,
    supports=supports,
)
