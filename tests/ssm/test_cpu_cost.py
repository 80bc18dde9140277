"""What the native CPU backend may cost: processor time against plain PyTorch on one thread, and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm import selective_scan
from vlmamba.ssm.backends import cpu
from vlmamba.ssm.mixer import MambaMixer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpu.available() is not True, reason="there is no native kernel"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_loop(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The fastest plain loop over time found: unbound small slices, nothing of size (B, L, D, N) but the tape."""
    delta = F.softplus(dt + dt_bias)
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for step, x, b, c in zip(delta.unbind(1), (delta * u).unbind(1), B.unbind(1), C.unbind(1), strict=True):
        increment = x.unsqueeze(-1) * b.unsqueeze(1)
        state = torch.addcmul(increment, torch.exp(step.unsqueeze(-1) * A), state)
        outputs.append(torch.matmul(state, c.unsqueeze(-1)).squeeze(-1))
    return (torch.stack(outputs, dim=1) + D * u) * F.silu(z)


def _least_seconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor time of this thread, alternating, the least of all rounds but the first."""
    best = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            spent = time.thread_time() - start
            best[name] = min(best[name], spent) if number else best[name]
    return best


@pytest.mark.parametrize("sizes", [(4, 256, 512, 16), (1, 1024, 1536, 16)])
def test_scan_against_plain_torch(sizes, assert_near):
    batch, length, channels, size = sizes
    u, dt, z, weight = (torch.randn(batch, length, channels) for _ in range(4))
    B, C = (torch.randn(batch, length, size) for _ in range(2))
    A = -torch.arange(1.0, size + 1).repeat(channels, 1)
    leaves = [u, dt, A, B, C, torch.ones(channels), z, torch.rand(channels) - 4]
    leaves = [tensor.requires_grad_() for tensor in leaves]

    def both_ways(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, weight)

    contenders = {
        "cpu": both_ways(lambda *tensors: selective_scan(*tensors, backend="cpu")),
        "torch": both_ways(lambda *tensors: selective_scan(*tensors, backend="torch")),
        "loop": both_ways(plain_loop),
    }
    for got, want in zip(contenders["cpu"](), contenders["loop"](), strict=True):
        assert_near(got, want, 1e-5)
    seconds = _least_seconds(contenders, 3)
    assert seconds["torch"] >= 4 * seconds["cpu"]
    assert seconds["loop"] >= 10 * seconds["cpu"]


@pytest.mark.parametrize(("batch", "length", "width", "most"), [(4, 256, 256, 1.8), (1, 1024, 768, 1.35)])
def test_layer_against_its_projections(batch, length, width, most):
    mixer = MambaMixer(width)
    inner = mixer.intermediate_size
    x = torch.randn(batch, length, width, requires_grad=True)
    modules = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    widths = (width, inner, mixer.time_step_rank, inner)
    inputs = [torch.randn(batch, length, size, requires_grad=True) for size in widths]
    leaves = [*inputs, *(p for module in modules for p in module.parameters())]

    def projections():
        outputs = [module(value) for module, value in zip(modules, inputs, strict=True)]
        weights = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(
            outputs, leaves, weights, allow_unused=True
        )  # dt_proj leaves its bias to the scan

    def layer():
        output = mixer(x)
        torch.autograd.grad(output, [x, *mixer.parameters()], torch.ones_like(output))

    seconds = _least_seconds({"projections": projections, "layer": layer}, 6)
    assert seconds["layer"] <= most * seconds["projections"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_memory():
    code = """
import torch
from vlmamba.ssm import selective_scan

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def run(batch, length, channels, size):
    u, dt, z, weight = (torch.randn(batch, length, channels) for _ in range(4))
    B, C = torch.randn(batch, length, size), torch.randn(batch, length, size)
    leaves = [t.requires_grad_() for t in (u, dt, -torch.rand(channels, size), B, C, torch.ones(channels), z)]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    torch.autograd.grad(selective_scan(*leaves, backend="cpu"), leaves, weight)
    return (status("VmHWM") - before) / (4 * batch * length * channels * size)

run(1, 64, 64, 16)
print(run(4, 256, 512, 16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1
