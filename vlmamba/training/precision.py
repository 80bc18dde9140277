"""Number formats of a run: what parameters are held in and what the forward pass computes in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

# Frozen, but read in fp32 by the scan whatever the precision: a rounded A or step size changes how long the
# state remembers, and together they are a tiny part of the model.
KEEP_FP32 = ("A_log", "D", "dt_proj.bias")


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a precision's name."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def keeps_fp32(name: str) -> bool:
    """Whether a parameter is held in fp32 though it is frozen, or cut; also inside an adapted layer."""
    return name.replace(".base_layer.", ".").endswith(KEEP_FP32)


def set_precision(model: nn.Module, precision: str) -> None:
    """Hold what trains in fp32 (the master weights) and, under bf16, what is frozen in bf16.

    Parameters keep their identity, so tied ones stay tied.
    """
    frozen_dtype = compute_dtype(precision)
    for name, parameter in model.named_parameters():
        fp32 = parameter.requires_grad or keeps_fp32(name)
        parameter.data = parameter.data.to(torch.float32 if fp32 else frozen_dtype)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of the forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
