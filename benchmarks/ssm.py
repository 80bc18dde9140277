"""Times of the selective scan, the causal convolution, a whole Mamba layer and decoding, against peers.

    python benchmarks/ssm.py                   # everything: scan conv layer decode weights
    python benchmarks/ssm.py scan layer --quick
    python benchmarks/ssm.py scan --device cuda --dtype bf16

Every available backend of vlmamba, a plain PyTorch loop, and the peers that are installed (transformers, mambapy,
mamba-ssm) run in turns in one process. Before a case is timed, values and all gradients of every contender are held
against a float64 run; a contender that computes something else ends the case with an error.

Shapes: B batch, L length, D channels, N state size, K conv kernel, W model width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import _contenders as contenders
import torch
from _common import (
    Case,
    DisagreementError,
    alternate,
    arguments,
    check_same,
    environment,
    finish,
)
from _contenders import Contender
from _decode import decode_cases, weights_cases
from _layer import layer_cases
from torch import Tensor

from vlmamba.ssm import ScanSpec
from vlmamba.ssm.backends import reference
from vlmamba.ssm.spec import ConvCall, ScanCall

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
CHECKED_TOKENS = 64
"""Tokens on which a contender of quadratic cost is checked."""

SCAN_SHAPES = [(4, 256, 512, 16), (1, 1024, 1536, 16)]
SCAN_SHAPES_GPU = [(1, 930, 5120, 16), (1, 8192, 5120, 16), (8, 729, 1536, 16)]
QUICK = [(2, 128, 256, 16)]


def main(argv: list[str] | None = None) -> int:
    """Run the pieces asked for."""
    parser = arguments(__doc__ or "", "ssm")
    parser.add_argument("pieces", nargs="*", help="scan, conv, layer, decode, weights; all by default")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, help="rounds a case (9, or 3 with --quick)")
    parser.add_argument("--no-peers", action="store_true", help="vlmamba's backends and the plain loop only")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.pieces) - PIECES.keys())
    if unknown:
        parser.error(f"unknown piece {unknown[0]!r}; there are {', '.join(PIECES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    record = environment(options.device, options.threads)
    cases: list[Case] = []
    failed = 0
    for piece in options.pieces or PIECES:
        try:
            cases += PIECES[piece](options)
        except DisagreementError as error:
            print(f"{piece}: {error}", file=sys.stderr)
            failed += 1
    finish("ssm", options.out, cases, record)
    return 1 if failed else 0


def scan_cases(options: Any) -> list[Case]:
    """The scan, forward and forward + backward."""
    cases = []
    for shape in _shapes(options):
        batch, length, channels, size = shape
        inputs = contenders.scan_inputs(*shape, dtype=DTYPES[options.dtype], device=options.device)
        spec = ScanSpec(
            device=options.device, dtype=DTYPES[options.dtype], batch=batch, length=length, channels=channels,
            state_size=size, features=frozenset({"D", "z", "dt_bias"}), needs_grad=True,
        )  # fmt: skip
        title = f"scan {options.dtype} (B, L, D, N) = {shape}"
        racing = _chosen(contenders.scan_contenders(spec), options)
        cases += _race(title, racing, inputs, reference_scan, options)
    return cases


def conv_cases(options: Any) -> list[Case]:
    """The causal convolution with its bias and SiLU."""
    cases = []
    for batch, length, channels, _ in _shapes(options):
        shape = (batch, length, channels, 4)
        inputs = contenders.conv_inputs(*shape, dtype=DTYPES[options.dtype], device=options.device)
        spec = ScanSpec(
            op="conv", device=options.device, dtype=DTYPES[options.dtype], batch=batch, length=length,
            channels=channels, state_size=4, features=frozenset({"activation"}), needs_grad=True,
        )  # fmt: skip
        title = f"conv {options.dtype} (B, L, D, K) = {shape}"
        racing = [c for c in _chosen(contenders.conv_contenders(spec), options) if "reference" not in c.name]
        cases += _race(title, racing, inputs, reference_conv, options)
    return cases


PIECES: dict[str, Callable[[Any], list[Case]]] = {
    "scan": scan_cases,
    "conv": conv_cases,
    "layer": layer_cases,
    "decode": decode_cases,
    "weights": weights_cases,
}


def reference_scan(inputs: Mapping[str, Tensor]) -> Tensor:
    """The oracle: vlmamba's reference loop in float64."""
    u, dt, A, B, C, D, z, bias = (inputs[name] for name in contenders.SCAN_INPUTS)
    call = ScanCall(
        u, dt, A, B.unsqueeze(2), C.unsqueeze(2), D, z, bias, True, None, None, (False,), None, False
    )
    return reference.scan(call)[0]


def reference_conv(inputs: Mapping[str, Tensor]) -> Tensor:
    """The oracle of the convolution, in float64."""
    call = ConvCall(inputs["x"], inputs["weight"], inputs["bias"], "silu", None, False, 0)
    return reference.conv(call)


def _shapes(options: Any) -> list[tuple[int, int, int, int]]:
    if options.quick:
        return QUICK
    return SCAN_SHAPES_GPU if options.device.startswith("cuda") else SCAN_SHAPES


def _chosen(found: list[Contender], options: Any) -> list[Contender]:
    """Without the peers where they are not wanted."""
    own = ("vlmamba", "plain", "torch")
    return [c for c in found if not options.no_peers or c.name.startswith(own)]


def _race(
    title: str,
    racing: list[Contender],
    inputs: Mapping[str, Tensor],
    oracle: Callable[[Mapping[str, Tensor]], Tensor],
    options: Any,
) -> list[Case]:
    """Check all contenders, then time forward and forward + backward."""
    errors = check(title, racing, inputs, oracle)
    baseline = _baseline(racing, options.device)
    rounds = options.rounds or (3 if options.quick else 9)
    batch, length = next(iter(inputs.values())).shape[:2]
    cases = []
    for grad in (False, True):
        runs = {c.name: _run(c, inputs, grad=grad) for c in racing}
        timings = alternate(runs, rounds=rounds, device=options.device, budget=4.0 if options.quick else 20.0)
        passes = "forward + backward" if grad else "forward"
        case = Case(f"{title}, {passes}", baseline, timings, "tokens", float(batch * length), errors)
        if any(c.slow for c in racing) and length > CHECKED_TOKENS:
            case.notes.append(
                f"transformers was checked on the first {CHECKED_TOKENS} tokens; its backward is quadratic in L, "
                "the other loops are linear."
            )
        cases.append(case)
    return cases


def check(
    title: str,
    racing: list[Contender],
    inputs: Mapping[str, Tensor],
    oracle: Callable[[Mapping[str, Tensor]], Tensor],
) -> dict[str, float]:
    """Hold y and all gradients of every contender against the float64 oracle; the errors by name."""
    errors = {}
    for slow in sorted({c.slow for c in racing}):
        some = {k: v[:, :CHECKED_TOKENS] if slow and v.dim() == 3 else v for k, v in inputs.items()}
        first = next(iter(some.values()))
        weight = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(first.device)
        exact = {name: tensor.double() for name, tensor in some.items()}
        want = Contender("oracle", oracle).results(exact, weight.double())
        for one in (c for c in racing if c.slow == slow):
            errors[one.name] = check_same(
                title, one.name, one.results(some, weight), want, TOLERANCE[first.dtype]
            )
    return errors


def _run(one: Contender, inputs: Mapping[str, Tensor], *, grad: bool) -> Callable[[], Any]:
    own = one.prepare(inputs, grad=grad)
    if not grad:
        return lambda: one.run(own)
    with torch.no_grad():
        weight = torch.ones_like(one.run(own))
    leaves = list(own.values())
    return lambda: torch.autograd.grad(one.run(own), leaves, weight)


def _baseline(racing: list[Contender], device: str) -> str:
    """The backend that vlmamba would choose: the available one of highest priority."""
    names = [c.name.removeprefix("vlmamba ") for c in racing if c.name.startswith("vlmamba ")]
    best = max(names, key=lambda name: contenders.BACKENDS.get(name).priority)
    return f"vlmamba {best}"


if __name__ == "__main__":
    raise SystemExit(main())
