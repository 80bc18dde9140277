"""Inputs and comparisons shared by the tests of the state-space core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm import ScanSpec, selective_scan
from vlmamba.ssm.registry import BACKENDS, ENVIRONMENT_VARIABLE, forget_choices, get_backend, judge


def _here() -> list[str]:
    return [name for name in BACKENDS.names() if judge(get_backend(name), ScanSpec()) is True]


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    torch.manual_seed(0)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture(autouse=True)
def _interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts fp32 off to bf16; here it rounds to nearest, as the hardware does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    plain = builder.create_fp_trunc

    def create_fp_trunc(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (language.float32, language.bfloat16):
            return plain(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)


@pytest.fixture(params=_here())
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on this machine's CPU."""
    return str(request.param)


@pytest.fixture
def scan_inputs() -> Callable[..., dict[str, Tensor]]:
    """Makes the floating-point arguments of a scan, in float64."""

    def make(
        batch: int = 2, length: int = 9, channels: int = 8, size: int = 4, groups: int = 1, **drop: bool
    ):
        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        tensors = {
            "u": noise(batch, length, channels),
            "dt": noise(batch, length, channels),
            "A": -torch.exp(noise(channels, size) * 0.5),
            "B": noise(batch, length, groups, size),
            "C": noise(batch, length, groups, size),
            "D": noise(channels),
            "z": noise(batch, length, channels),
            "dt_bias": noise(channels),
            "initial_state": noise(batch, channels, size),
        }
        return {name: tensor for name, tensor in tensors.items() if drop.get(name, True)}

    return make


@pytest.fixture
def run_with_gradients() -> Callable[..., dict[str, Tensor]]:
    """Runs a scan in some dtype and gives its outputs and all gradients, in float64, by name."""

    def run(
        inputs: dict[str, Tensor],
        dtype: torch.dtype,
        function=selective_scan,
        scale: Tensor | None = None,
        positive: bool = False,
        **options,
    ) -> dict[str, Tensor]:
        leaves = {name: tensor.to(dtype).detach().clone().requires_grad_() for name, tensor in inputs.items()}
        outputs = function(**leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for output in outputs:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            weight = weight.bfloat16().double()  # exact in every dtype, so it rounds in none
            weight = weight.abs() if positive else weight
            if scale is not None and output is outputs[0]:
                weight = weight * scale
            loss = loss + (output.double() * weight).sum()
        loss.backward()
        found = {f"output {i}": output.detach().double() for i, output in enumerate(outputs)}
        for name, leaf in leaves.items():
            found[f"d{name}"] = torch.zeros_like(leaf).double() if leaf.grad is None else leaf.grad.double()
        return found

    return run


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Compares dictionaries of tensors (or two tensors) relative to the largest value of each.

    Bounds are at least four times the largest error found at any level of processor, compiler and capability of torch:
    8e-7 in float32, where one rounding is 6e-8, and 4.6e-3 in bfloat16, where one is 2e-3.
    """

    def check(got, want, tolerance: float = 1e-5) -> None:
        if isinstance(got, Tensor):
            got, want = {"value": got}, {"value": want}
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].shape == want[name].shape, name
            if want[name].numel() == 0:
                continue
            assert torch.isfinite(got[name]).all(), name
            error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-12)
            assert error <= tolerance, f"{name}: relative error {float(error):.2e}"

    return check


@pytest.fixture
def assert_as_exact_as_float32(run_with_gradients) -> Callable[..., None]:
    """Holds a backend in float32 against float64: `tolerance` of the largest value of each tensor.

    A sum whose terms cancel c-fold multiplies the rounding of its terms (2^-24 for each of the handful of operations
    in front of it) by c, whatever the order. So where c is above ten the bound is a tenth of `tolerance` of the sum of
    the terms' sizes, which is that of the gradient when all terms are positive.
    """

    def check(inputs: dict[str, Tensor], backend: str, *, tolerance: float = 4e-6, **options) -> None:
        inputs = {name: tensor.float().double() for name, tensor in inputs.items()}
        options["return_last_state"] = True
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, torch.float32, backend=backend, **options)
        sizes = {n: t if n in ("A", "dt", "dt_bias") else t.abs() for n, t in inputs.items()}
        gate = F.silu(sizes.pop("z")).abs() if "z" in sizes else torch.ones(())
        sizes = run_with_gradients(
            sizes, torch.float64, backend="reference", scale=gate, positive=True, **options
        )
        for name in want:
            if want[name].numel() == 0:
                continue
            terms = 0.1 * float(sizes[name].abs().max()) if name in sizes else 0.0
            error = float((got[name] - want[name]).abs().max())
            allowed = tolerance * max(float(want[name].abs().max()), terms)
            assert error <= allowed, f"{name}: error {error:.2e}, {allowed:.2e} is allowed"

    return check


@pytest.fixture
def segments() -> Callable[..., Tensor]:
    """Makes seq_idx from the lengths of the segments of each row."""

    def make(*rows: list[int]) -> Tensor:
        return torch.tensor(
            [[number for number, length in enumerate(row) for _ in range(length)] for row in rows],
            dtype=torch.int32,
        )

    return make
