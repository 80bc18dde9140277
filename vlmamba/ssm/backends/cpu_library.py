"""The loaded native library: its functions declared, its results held against the reference.

Shape legend: B batch, L length, D channels, N state size, G groups, K conv kernel.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlmamba.ssm.backends import cpu_build, reference, torch_step
from vlmamba.ssm.spec import ConvCall, ScanCall, StepCall, Verdict

_trial: list[ctypes.CDLL] = []
"""The library while it is being checked."""


def library() -> ctypes.CDLL:
    """The native library; only after `available` said that there is one."""
    if _trial:
        return _trial[0]
    loaded = cpu_build.load(_prepare)
    assert isinstance(loaded, ctypes.CDLL), loaded
    return loaded


def available() -> Verdict:
    """True once the library is compiled, loaded and checked; otherwise why it is not."""
    loaded = cpu_build.load(_prepare)
    return loaded if isinstance(loaded, str) else True


def describe() -> str:
    """The kernel in words: its vectors and what it is compiled for."""
    verdict = available()
    if verdict is not True:
        return f"none: {verdict}"
    return f"{library().vlmamba_scan_lanes()} numbers a vector, compiled for {cpu_build.level()}"


def _prepare(loaded: ctypes.CDLL) -> str | None:
    """Declare the functions of a library just loaded, and try them: None, or what is wrong."""
    from vlmamba.ssm.backends import cpu_conv, cpu_scan, cpu_step

    structures: list[tuple[str, type[ctypes.Structure], tuple[str, ...]]] = [
        ("vlmamba_scan", cpu_scan.ScanArguments, ("_forward", "_backward")),
        ("vlmamba_conv", cpu_conv.ConvArguments, ("_forward", "_backward")),
        ("vlmamba_step", cpu_step.StepArguments, ("",)),
    ]
    for prefix, structure, suffixes in structures:
        for suffix in suffixes:
            function = getattr(loaded, prefix + suffix)
            function.argtypes, function.restype = [ctypes.POINTER(structure)], None
        size = getattr(loaded, prefix + "_arguments_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            return "it takes other arguments than this version gives"
    loaded.vlmamba_scan_sizes.argtypes = [
        ctypes.POINTER(cpu_scan.ScanArguments),
        ctypes.POINTER(ctypes.c_int64),
    ]
    loaded.vlmamba_scan_sizes.restype = None
    loaded.vlmamba_conv_work.argtypes = [ctypes.POINTER(cpu_conv.ConvArguments)]
    loaded.vlmamba_conv_work.restype = ctypes.c_int64
    _trial.append(loaded)
    # The first call may come from within a layer whose activations are recomputed: hooks that give tensors back as they
    # are keep its own from running that layer again, which would wait here for itself.
    plainly = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), plainly:
            return _self_check()
    finally:
        _trial.pop()


def _self_check() -> str | None:
    """Hold a tiny scan, convolution and step, with gradients, against the reference."""
    from vlmamba.ssm.backends import cpu_conv, cpu_scan, cpu_step

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    u, dt, z = (noise(1, 35, 5) for _ in range(3))
    B, C = noise(1, 35, 1, 5), noise(1, 35, 1, 5)
    A, D, bias, start, weight = -noise(5, 5).exp(), noise(5), noise(5), noise(1, 5, 5), noise(5, 4)
    leaves = [t.requires_grad_() for t in (u, dt, A, B, C, D, z, bias, start, weight)]
    seq_idx = (torch.arange(35) > 7).int().unsqueeze(0)
    scan = ScanCall(u, dt, A, B, C, D, z, bias, True, seq_idx, start, (True,), None, True)
    conv = ConvCall(u, weight, bias, "silu", seq_idx, True, 3)
    results: list[list[Tensor]] = []
    for run_scan, run_conv in ((cpu_scan.scan, cpu_conv.conv), (reference.scan, reference.conv)):
        y, states = run_scan(scan)
        assert states is not None
        mixed = run_conv(conv)
        loss = y.square().sum() + states.sum() + mixed.square().sum()
        results.append([y.detach(), states.detach(), mixed.detach(), *torch.autograd.grad(loss, leaves)])
    for found, step in zip(results, (cpu_step.step, torch_step.step), strict=True):
        state = start.detach().clone()
        with torch.no_grad():
            now = (u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias, True)
            found += [step(StepCall(state, *now)), state]
    for got, want in zip(*results, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error < 1e-4:
            return f"relative error {error:.1e} against the reference"
    return None
