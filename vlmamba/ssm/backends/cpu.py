"""The native backend for the CPU: scan, convolution and decode step of `vlmamba/ssm/native`.

Compiled on first use (`cpu_build`) and called through ctypes. Results are the same bits in every run and for
any number of threads, which follows `torch.set_num_threads`. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

import torch

from vlmamba.ssm.backends.cpu_conv import conv
from vlmamba.ssm.backends.cpu_library import available
from vlmamba.ssm.backends.cpu_scan import scan
from vlmamba.ssm.backends.cpu_step import step
from vlmamba.ssm.spec import Backend, ScanSpec, Verdict

__all__ = ["BACKEND", "available", "supports"]


def supports(spec: ScanSpec) -> Verdict:
    """CPU tensors in anything but float64."""
    if spec.device != "cpu":
        return f"it runs on the CPU, not on {spec.device}"
    return True if spec.dtype != torch.float64 else "it computes in float32; float64 is served by 'reference'"


BACKEND = Backend(
    name="cpu", priority=20, scan=scan, conv=conv, available=available, supports=supports, step=step
)
