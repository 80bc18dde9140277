"""Checks of the arguments of state-space operations; every message carries both values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vlmamba.errors import ShapeError


def check_shape(
    op: str, label: str, tensor: Tensor | None, expected: tuple[int | None, ...], legend: str
) -> None:
    """Raise unless the tensor has that shape (None entries fit any size); a tensor of None passes.

    Raises:
        ShapeError: The shapes differ.
    """
    if tensor is None or tensor.shape == expected:
        return
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ShapeError(f"{op}: {label} has shape {shape}, but {legend} = ({wanted}) is needed.")


def check_dtype(op: str, label: str, tensor: Tensor | None, dtype: torch.dtype, legend: str) -> None:
    """Raise unless the tensor has that dtype; a tensor of None passes.

    Raises:
        ShapeError: The dtypes differ.
    """
    if tensor is not None and tensor.dtype != dtype:
        raise ShapeError(f"{op}: {label} has dtype {tensor.dtype}, but {dtype} ({legend}) is needed.")


def check_floating(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise unless all tensors hold (real) floating-point numbers.

    Raises:
        ShapeError: One does not.
    """
    for label, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ShapeError(
                f"{op}: {label} has dtype {tensor.dtype}, but a floating-point dtype is needed; convert it."
            )


def check_device(op: str, main: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise unless all tensors are on the device of the main one.

    Raises:
        ShapeError: A tensor is elsewhere.
    """
    for label, tensor in others.items():
        if tensor is not None and tensor.device != main.device:
            raise ShapeError(
                f"{op}: {label} is on {tensor.device}, but the input is on {main.device}; move one of them."
            )


def check_integers(op: str, label: str, tensor: Tensor | None, limit: int | None = None) -> None:
    """Raise unless the tensor holds integers, and, for tensors on the CPU, all of them in [0, limit).

    Values are not looked at while a graph is being compiled (the compiled operation does), nor where there are none.

    Raises:
        ShapeError: The dtype is not an integer one, or a value is out of range.
    """
    if tensor is None:
        return
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ShapeError(f"{op}: {label} has dtype {tensor.dtype}, but an integer dtype is needed.")
    if limit is None or tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    if isinstance(tensor, FakeTensor):
        return
    low, high = (int(value) for value in torch.aminmax(tensor))
    if low < 0 or high >= limit:
        raise ShapeError(
            f"{op}: {label} has values from {low} to {high}, but only those from 0 to {limit - 1} exist."
        )


def grouped(op: str, label: str, tensor: Tensor, lead: tuple[int, ...], channels: int, size: int) -> Tensor:
    r"""A view of B or C with its group axis: (\\*lead, G, N) from that or from (\\*lead, N).

    Raises:
        ShapeError: The shape fits neither, or the number of groups does not divide the channels.
    """
    if tensor.dim() == len(lead) + 1:
        tensor = tensor.unsqueeze(-2)
    names = "B, L" if len(lead) == 2 else "B"
    legend = f"({names}, G, N) or ({names}, N)"
    check_shape(op, label, tensor, (*lead, None, size), legend)
    groups = tensor.shape[-2]
    if groups == 0 or channels % groups:
        raise ShapeError(
            f"{op}: {label} has {groups} groups, which do not divide the {channels} channels of u evenly."
        )
    return tensor
