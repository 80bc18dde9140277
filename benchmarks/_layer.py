"""A whole Mamba layer against its four projections alone and against transformers' layer with the same weights.

Shapes: B batch, L length, W model width, E inner width, R time-step rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _common import Case, alternate, check_same
from torch import Tensor, nn

from vlmamba.ssm import use_backend
from vlmamba.ssm.mixer import MambaMixer
from vlmamba.ssm.registry import BACKENDS, judge
from vlmamba.ssm.spec import ScanSpec

SHAPES = [(4, 256, 256), (1, 1024, 768)]
SHAPES_GPU = [(1, 930, 2560), (1, 8192, 2560), (8, 729, 768)]
QUICK = [(2, 128, 128)]
FLOOR = "four projections alone"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
CHECKED_TOKENS = 64


def layer_cases(options: Any) -> list[Case]:
    """Forward + backward of a layer; times are given over the projections' alone."""
    shapes = QUICK if options.quick else SHAPES_GPU if options.device.startswith("cuda") else SHAPES
    return [layer_case(shape, options) for shape in shapes]


def layer_case(shape: tuple[int, int, int], options: Any) -> Case:
    """One size; checked on all tokens, transformers' quadratic layer on the first ones."""
    batch, length, width = shape
    dtype, device = DTYPES[options.dtype], options.device
    title = f"layer {options.dtype} (B, L, width) = {shape}, forward + backward"
    torch.manual_seed(0)
    layer = MambaMixer(width)
    exact = MambaMixer(width).double()
    exact.load_state_dict(layer.state_dict())
    layer = cast(layer, dtype).to(device)
    exact = exact.to(device)
    x = torch.randn(batch, length, width).to(device, dtype)
    backends = _backends(shape, layer, options)
    errors: dict[str, float] = {}
    runs: dict[str, Callable[[], Any]] = {FLOOR: runner(lambda y: projections(layer, y), layer, x)}
    notes = []
    with use_backend("reference"):
        want = results(exact, exact, x.double())
    for name in backends:
        with use_backend(name):
            found = results(layer, layer, x)
        errors[f"vlmamba {name}"] = check_same(title, f"vlmamba {name}", found, want, TOLERANCE[dtype])
        runs[f"vlmamba {name}"] = with_backend(name, runner(layer, layer, x))
    if not options.no_peers:
        for name, peer in peers(layer, width, device, dtype).items():
            some = x[:, :CHECKED_TOKENS]
            with use_backend("reference"):
                short = results(exact, exact, some.double())
            errors[name] = check_same(title, name, results(peer, peer, some), short, TOLERANCE[dtype])
            runs[name] = runner(peer, peer, x)
        notes.append(f"transformers was checked on the first {CHECKED_TOKENS} tokens.")
    rounds = options.rounds or (3 if options.quick else 9)
    timings = alternate(runs, rounds=rounds, device=device, budget=4.0 if options.quick else 20.0)
    return Case(title, FLOOR, timings, "tokens", float(batch * length), errors, notes=notes)


def peers(layer: MambaMixer, width: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Our weights in the layer of transformers."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    config = MambaConfig(hidden_size=width, num_hidden_layers=1, state_size=layer.state_size)
    theirs = Theirs(config, layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    return {"transformers": cast(theirs, dtype).to(device).train()}


def projections(layer: MambaMixer, x: Tensor) -> tuple[Tensor, ...]:
    """The four matrix products of the layer and nothing between them."""
    inner, gate = layer.in_proj(x).chunk(2, dim=-1)
    projected = layer.x_proj(inner)
    dt = layer.dt_proj(projected[..., : layer.time_step_rank])
    return layer.out_proj(inner), gate, dt, projected[..., layer.time_step_rank :]


def results(run: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of the input and of every parameter, for a fixed weighting of y."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    (y * weight).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        found[f"d{name}"] = parameter.grad.detach().clone()
    module.zero_grad()
    return found


def _backends(shape: tuple[int, int, int], layer: MambaMixer, options: Any) -> list[str]:
    spec = ScanSpec(
        device=options.device, dtype=DTYPES[options.dtype], batch=shape[0], length=shape[1],
        channels=layer.intermediate_size, state_size=layer.state_size, features=frozenset({"D", "z", "dt_bias"}),
        needs_grad=True,
    )  # fmt: skip
    conv = ScanSpec(
        op="conv", device=spec.device, dtype=spec.dtype, batch=spec.batch, length=spec.length,
        channels=spec.channels, state_size=layer.conv_kernel, features=frozenset({"activation"}), needs_grad=True,
    )  # fmt: skip
    fit = [n for n in BACKENDS.names() if all(judge(BACKENDS.get(n), one) is True for one in (spec, conv))]
    return [name for name in fit if name != "reference"]


def cast(module: Any, dtype: torch.dtype) -> Any:
    """In that dtype, but for what the scan reads in fp32."""
    for name, parameter in module.named_parameters():
        if not name.endswith(("A_log", "D", "dt_proj.bias")):
            parameter.data = parameter.data.to(dtype)
    return module


def runner(run: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """What runs forward and backward, for the input and every parameter."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *module.parameters()]

    def once() -> None:
        y = run(x)
        outputs = y if isinstance(y, tuple) else (y,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(one) for one in outputs], allow_unused=True)

    return once


def with_backend(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with every operation on one backend."""

    def once() -> None:
        with use_backend(name):
            run()

    return once
