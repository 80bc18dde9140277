"""Pieces of the GPU check about operations: parity and determinism of all backends, times of scan and layer.

Shapes: B batch, L length, D channels, N state size, G groups, W model width, S asked states.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import alternate, relative_error
from _contenders import Contender, scan_contenders, scan_inputs
from _layer import FLOOR, cast, projections, runner, with_backend
from torch import Tensor

from vlmamba.ssm import ScanSpec, causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.mixer import MambaMixer
from vlmamba.ssm.registry import BACKENDS, judge

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@dataclass
class Row:
    """One line of a result table.

    Attributes:
        case: What was done.
        name: By whom.
        values: Figures by column.
        ok: False where a check failed.
        text: Why, or another remark.
    """

    case: str
    name: str
    values: dict[str, float] = field(default_factory=dict)
    ok: bool = True
    text: str = ""


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        tiny: Tiny sizes.
        deadline: When the piece should have come to its end, by `time.monotonic`.
    """

    device: str
    tiny: bool
    deadline: float

    def late(self, reserve: float = 0.0) -> bool:
        """Whether less than `reserve` seconds are left."""
        return time.monotonic() > self.deadline - reserve


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no D, z or bias": {"bare": True},
    "packed": {"seq_idx": True},
    "reverse": {"reverse": True},
    "groups, one reversed": {"groups": 2, "reverse": (False, True)},
    "initial and last state": {"initial_state": True, "return_last_state": True},
    "states at": {"state_at": True},
    "packed, reverse, initial, states at": {
        "seq_idx": True, "reverse": True, "initial_state": True, "state_at": True,
    },
    "strided views": {"views": True},
    "extreme time steps": {"extreme": True},
}  # fmt: skip


def parity(setting: Setting) -> Iterator[Row]:
    """Every backend against the float64 reference: values, states, all gradients; then the same bits twice."""
    sizes = (
        [(2, 33, 40, 8), (1, 130, 64, 16)]
        if setting.tiny
        else [(2, 33, 40, 8), (2, 130, 264, 16), (1, 300, 512, 16)]
    )
    for size, dtype, feature in itertools.product(sizes, TOLERANCE, FEATURES):
        if setting.late():
            yield Row("parity", "all", ok=False, text="out of time: the rest of the grid was not run")
            return
        yield from _parity_case(setting, size, dtype, feature)
    for dtype in TOLERANCE:
        yield from _conv_parity(setting, dtype)
        yield from _step_parity(setting, dtype)
    yield from _determinism(setting)


def _arguments(
    setting: Setting, size: tuple[int, int, int, int], dtype: torch.dtype, feature: str
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    batch, length, channels, states = size
    wanted = FEATURES[feature]
    made: dict[str, Any] = scan_inputs(*size, dtype=dtype, device=setting.device, seed=3)
    generator = torch.Generator().manual_seed(4)
    groups = wanted.get("groups", 1)
    if groups > 1:
        for name in "BC":
            made[name] = torch.randn(batch, length, groups, states, generator=generator).to(
                setting.device, dtype
            )
    if wanted.get("bare"):
        made |= {"D": None, "z": None, "dt_bias": None}
    if wanted.get("extreme"):
        made["dt"] = made["dt"].clone()
        made["dt"][:, ::3], made["dt"][:, 1::3] = 60.0, -14.0
        made["dt_bias"] = torch.zeros_like(made["dt_bias"])
    if wanted.get("views"):
        wide = torch.randn(batch, length, 3 * channels, generator=generator).to(setting.device, dtype)
        made["u"], made["z"] = wide[..., :channels], wide[..., channels : 2 * channels]
    options: dict[str, Any] = {"reverse": wanted.get("reverse", False)}
    if wanted.get("seq_idx"):
        cuts = torch.tensor([length // 5, length // 5 + 1, length // 2, length - 1])
        ids = (torch.arange(length)[:, None] >= cuts).sum(1).int()
        options["seq_idx"] = ids.expand(batch, -1).contiguous().to(setting.device)
    if wanted.get("initial_state"):
        made["initial_state"] = torch.randn(batch, channels, states, generator=generator).to(setting.device)
    if wanted.get("state_at"):
        options["state_at"] = torch.randint(0, length, (batch, 3), generator=generator).to(setting.device)
    if wanted.get("return_last_state"):
        options["return_last_state"] = True
    return made, options


def _results(
    made: dict[str, Any], options: dict[str, Any], backend: str, *, exact: bool = False
) -> dict[str, Tensor]:
    """Values, states and the gradients of a fixed weighting of them."""
    leaves: dict[str, Any] = {}
    for name, tensor in made.items():
        if tensor is None:
            leaves[name] = None
            continue
        value = tensor.detach().double() if exact else tensor.detach()
        # a view stays a view: the leaf is what it looks into
        base = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        leaves[name] = base.copy_(value).requires_grad_()
    answer = selective_scan(**leaves, **options, backend=backend)
    parts = answer if isinstance(answer, tuple) else (answer,)
    total = torch.zeros((), device=parts[0].device, dtype=torch.float64)
    for part in parts:
        weight = torch.randn(part.shape, generator=torch.Generator().manual_seed(5)).to(part.device)
        total = total + (part.double() * weight.double()).sum()
    total.backward()
    found = dict(zip(("y", "states"), (part.detach() for part in parts), strict=False))
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def _parity_case(
    setting: Setting, size: tuple[int, int, int, int], dtype: torch.dtype, feature: str
) -> Iterator[Row]:
    made, options = _arguments(setting, size, dtype, feature)
    case = f"scan {_short(dtype)} {size} {feature}"
    want = _results(made, options, "reference", exact=True)
    for name in backends(setting.device):
        try:
            found = _results(made, options, name)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a finding
            refused = "cannot serve this call" in str(error)
            yield Row(
                case, name, ok=refused, text=_first_line(error) if not refused else "does not serve this"
            )
            continue
        yield _compared(case, name, found, want, TOLERANCE[dtype])


def _compared(
    case: str, name: str, found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float
) -> Row:
    errors = {key: relative_error(found[key], right) for key, right in want.items()}
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    ok = all(error <= tolerance for error in errors.values())
    return Row(
        case, name, {"error": errors[worst]}, ok, "" if ok else f"{worst} is off, {tolerance:.0e} is allowed"
    )


def _conv_parity(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(6)
    x, weight, bias, past = (
        torch.randn(*shape, generator=generator).to(setting.device, dtype)
        for shape in ((2, 130, 264), (264, 4), (264,), (2, 3, 264))
    )
    ids = (torch.arange(130) // 37).int().expand(2, -1).contiguous().to(setting.device)
    variants: dict[str, dict[str, Any]] = {
        "plain": {}, "packed": {"seq_idx": ids}, "reverse": {"reverse": True}, "initial state": {"initial_state": past}
    }  # fmt: skip
    for label, options in variants.items():

        def run(backend: str, kind: torch.dtype, options: dict[str, Any] = options) -> dict[str, Tensor]:
            moved = {k: v.to(kind) if k == "initial_state" else v for k, v in options.items()}
            leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight, bias)]
            y = causal_conv1d(*leaves, activation="silu", backend=backend, **moved)
            assert isinstance(y, Tensor)
            y.double().square().sum().backward()
            return {"y": y.detach()} | {
                f"d{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None
            }

        want = run("reference", torch.float64)
        for name in backends(setting.device, op="conv"):
            try:
                yield _compared(
                    f"conv {_short(dtype)} {label}", name, run(name, dtype), want, 3 * TOLERANCE[dtype]
                )
            except Exception as error:  # noqa: BLE001 - as above
                refused = "cannot serve this call" in str(error)
                yield Row(f"conv {_short(dtype)} {label}", name, ok=refused, text=_first_line(error))


def _step_parity(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    made = scan_inputs(3, 1, 264, 16, dtype=dtype, device=setting.device, seed=7)
    state = torch.randn(3, 264, 16, generator=torch.Generator().manual_seed(8)).to(setting.device)

    def run(backend: str, kind: torch.dtype | None = None) -> dict[str, Tensor]:
        own = state.to(kind or torch.float32).clone()
        u, dt, B, C, z = (made[n][:, 0].to(kind or dtype) for n in ("u", "dt", "B", "C", "z"))
        A, D, bias = (made[n].to(kind or torch.float32) for n in ("A", "D", "dt_bias"))
        with torch.no_grad():
            y = selective_state_update(own, u, dt, A, B, C, D, z, bias, backend=backend)
        return {"y": y, "state": own}

    want = run("reference", torch.float64)
    for name in backends(setting.device, op="step"):
        try:
            yield _compared(f"step {_short(dtype)}", name, run(name), want, TOLERANCE[dtype])
        except Exception as error:  # noqa: BLE001 - as above
            refused = "cannot serve this call" in str(error)
            yield Row(f"step {_short(dtype)}", name, ok=refused, text=_first_line(error))


def _determinism(setting: Setting) -> Iterator[Row]:
    size = (2, 130, 64, 16) if setting.tiny else (2, 930, 1536, 16)
    made, options = _arguments(setting, size, torch.float32, "packed")
    for name in backends(setting.device):
        first, second = (_results(made, options, name) for _ in range(2))
        same = all(torch.equal(first[key], second[key]) for key in first)
        # mamba-ssm adds dB and dC up with atomics: its own property, not a fault of the adapter.
        expected = same or name == "mamba_ssm"
        yield Row(
            f"same bits twice {size}",
            name,
            {"same": float(same)},
            expected,
            "" if same else "differs run to run",
        )


def scan(setting: Setting) -> Iterator[Row]:
    """Times of the scan at the language model's and at Q-Mamba's sizes, in bf16."""
    sizes = (
        [(1, 64, 64, 16)]
        if setting.tiny
        else [(1, 930, 5120, 16), (1, 8192, 5120, 16), (16, 256, 1536, 16), (16, 729, 1536, 16)]
    )
    for size in sizes:
        for packed in (False, True):
            if setting.late(5.0):
                yield Row("scan", "all", ok=False, text=f"out of time before {size}")
                return
            yield from _scan_case(setting, size, packed)


def _scan_case(setting: Setting, size: tuple[int, int, int, int], packed: bool) -> Iterator[Row]:
    batch, length, channels, states = size
    dtype = torch.bfloat16
    inputs = scan_inputs(*size, dtype=dtype, device=setting.device)
    features = {"D", "z", "dt_bias"} | ({"seq_idx"} if packed else set())
    spec = ScanSpec(
        device=setting.device, dtype=dtype, batch=batch, length=length, channels=channels, state_size=states,
        features=frozenset(features), needs_grad=True,
    )  # fmt: skip
    names = [n for n in backends(setting.device) if judge(BACKENDS.get(n), spec) is True]
    seq_idx = (
        (torch.arange(length) // 930).int().expand(batch, -1).contiguous().to(setting.device)
        if packed
        else None
    )
    racing = [Contender(f"vlmamba {name}", _scanner(name, seq_idx)) for name in names]
    if not packed:
        racing += [c for c in scan_contenders(spec) if c.name == "mamba-ssm"]
    case = f"scan bf16 {size}{' packed' if packed else ''}"
    columns: dict[str, dict[str, float]] = {c.name: {} for c in racing}
    for grad in (False, True):
        runs = {c.name: _pass(c, inputs, grad) for c in racing}
        share = (setting.deadline - time.monotonic()) / 16
        timings = alternate(runs, rounds=7, device=setting.device, budget=max(0.2, min(1.5, share)))
        for name, timing in timings.items():
            label = "forward + backward ms" if grad else "forward ms"
            columns[name][label] = 1e3 * timing.quartiles()[1]
            if grad:
                columns[name]["M tokens/s"] = batch * length / timing.quartiles()[1] / 1e6
    for name, values in columns.items():
        yield Row(case, name, values)


def _scanner(backend: str, seq_idx: Tensor | None) -> Callable[[Any], Tensor]:
    def run(i: Any) -> Tensor:
        y = selective_scan(
            i["u"],
            i["dt"],
            i["A"],
            i["B"],
            i["C"],
            i["D"],
            i["z"],
            i["dt_bias"],
            seq_idx=seq_idx,
            backend=backend,
        )
        assert isinstance(y, Tensor)
        return y

    return run


def _pass(one: Contender, inputs: dict[str, Tensor], grad: bool) -> Callable[[], Any]:
    own = one.prepare(inputs, grad=grad)
    if not grad:
        return lambda: one.run(own)
    with torch.no_grad():
        weight = torch.ones_like(one.run(own))
    return lambda: torch.autograd.grad(one.run(own), list(own.values()), weight)


def layer(setting: Setting) -> Iterator[Row]:
    """A whole Mamba layer, forward + backward in bf16, over its four projections alone."""
    sizes = (
        [(1, 64, 32)] if setting.tiny else [(1, 930, 2560), (1, 8192, 2560), (16, 256, 768), (16, 729, 768)]
    )
    for batch, length, width in sizes:
        if setting.late(5.0):
            yield Row("layer", "all", ok=False, text=f"out of time before {(batch, length, width)}")
            return
        torch.manual_seed(0)
        module = cast(MambaMixer(width), torch.bfloat16).to(setting.device)
        x = torch.randn(batch, length, width).to(setting.device, torch.bfloat16)
        runs: dict[str, Callable[[], Any]] = {FLOOR: runner(lambda y, m=module: projections(m, y), module, x)}  # type: ignore[misc]
        for name in backends(setting.device):
            runs[f"vlmamba {name}"] = with_backend(name, runner(module, module, x))
        runs["vlmamba, chosen"] = runner(module, module, x)
        refused = {}
        for name in list(runs):
            try:
                runs[name]()
            except Exception as error:  # noqa: BLE001 - a backend that cannot is a row, not the end
                refused[name] = _first_line(error)
                del runs[name]
        timings = alternate(runs, rounds=7, device=setting.device, budget=1.5)
        floor = timings[FLOOR].quartiles()[1]
        for name, timing in timings.items():
            median = timing.quartiles()[1]
            values = {"forward + backward ms": 1e3 * median, "over projections": median / floor}
            yield Row(f"layer bf16 {(batch, length, width)}", name, values)
        for name, text in refused.items():
            yield Row(f"layer bf16 {(batch, length, width)}", name, text=text)


def backends(device: str, op: str = "scan") -> list[str]:
    """The backends for a device, without the reference loop."""
    found = []
    for name in BACKENDS.names():
        backend = BACKENDS.get(name)
        if (
            name != "reference"
            and backend.available() is True
            and (op == "scan" or getattr(backend, op) is not None)
        ):
            spec = ScanSpec(device=device, batch=1, length=8, channels=16)
            if judge(backend, spec) is True:
                found.append(name)
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
