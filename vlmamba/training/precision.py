"""Number formats of a run: what parameters are held in and what the forward pass computes in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from vlmamba.ssm.mixer import keeps_fp32


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a precision's name."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def set_precision(model: nn.Module, precision: str) -> None:
    """Hold what trains in fp32 (the master weights) and, under bf16, what is frozen in bf16.

    What the scan reads in fp32 (`vlmamba.ssm.mixer.FP32_PARAMETERS`) stays so. Parameters keep their identity, so
    tied ones stay tied.
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
