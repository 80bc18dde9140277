"""Every backend against the reference in float64: values and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from vlmamba.ssm import selective_scan
from vlmamba.ssm.backends import torch_blocks, torch_chunked
from vlmamba.ssm.spec import ScanCall

DIRECTIONS = [(1, False), (1, True), (2, (False, True)), (4, (True, False, False, True))]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", ["last", "at"])
def test_reference_gradcheck(scan_inputs, segments, reverse, state):
    inputs = scan_inputs(batch=1, length=4, channels=2, size=2)
    names = list(inputs)
    options = {"seq_idx": segments([3, 1]), "reverse": reverse}
    options |= {"return_last_state": True} if state == "last" else {"state_at": torch.tensor([[0, 2]])}

    def run(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), **options)

    assert gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs.values()))


@pytest.mark.parametrize("length", [1, 3, 33, 64])
@pytest.mark.parametrize(("groups", "reverse"), DIRECTIONS)
@pytest.mark.parametrize("resets", [False, True])
def test_parity_on_the_grid(
    scan_inputs, run_with_gradients, assert_near, backend, length, groups, reverse, resets
):
    inputs = scan_inputs(length=length, groups=groups)
    options = {"reverse": reverse}
    if resets:
        options["seq_idx"] = (torch.rand(2, length) < 0.2).cumsum(1).int()
    for state in (
        {},
        {"return_last_state": True},
        {"state_at": torch.randint(0, length, (2, 3))},
    ):
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options, **state)
        got = run_with_gradients(inputs, torch.float32, backend=backend, **options, **state)
        assert_near(got, want, 4e-6)


@pytest.mark.parametrize("dropped", ["D", "z", "dt_bias", "initial_state"])
def test_parity_without_an_argument(scan_inputs, run_with_gradients, assert_near, backend, dropped):
    inputs = scan_inputs(length=11, **{dropped: False})
    want = run_with_gradients(inputs, torch.float64, backend="reference")
    assert_near(run_with_gradients(inputs, torch.float32, backend=backend), want, 4e-6)


def test_parity_without_softplus(scan_inputs, run_with_gradients, assert_near, backend):
    inputs = scan_inputs(length=11, dt_bias=False)
    inputs["dt"] = inputs["dt"].abs()
    want = run_with_gradients(inputs, torch.float64, backend="reference", dt_softplus=False)
    assert_near(run_with_gradients(inputs, torch.float32, backend=backend, dt_softplus=False), want, 4e-6)


@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 40, 16), (3, 64, 8), (5, 6, 1)])
def test_parity_when_blocks_are_cut(
    scan_inputs, run_with_gradients, assert_near, backend, monkeypatch, batch, channels, size
):
    monkeypatch.setattr(torch_blocks, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(torch_blocks, "CHUNK_STEPS", 5)
    inputs = scan_inputs(batch=batch, length=19, channels=channels, size=size, groups=2)
    options = {"reverse": (True, False), "seq_idx": (torch.rand(batch, 19) < 0.2).cumsum(1)}
    options["state_at"] = torch.randint(0, 19, (batch, 2))
    want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
    assert_near(run_with_gradients(inputs, torch.float32, backend=backend, **options), want, 4e-6)


@pytest.mark.parametrize("last_state", [False, True])
def test_chunked_maths_is_exact_in_float64(scan_inputs, run_with_gradients, assert_near, last_state):
    inputs = scan_inputs(length=21, groups=2)
    want = run_with_gradients(inputs, torch.float64, reverse=(False, True), return_last_state=last_state)

    def chunked(u, dt, A, B, C, D, z, dt_bias, initial_state):
        call = ScanCall(
            u, dt, A, B, C, D, z, dt_bias, True, None, initial_state, (False, True), None, last_state
        )
        y, states = torch_chunked.scan(call)
        return y if states is None else (y, states)

    assert_near(run_with_gradients(inputs, torch.float64, function=chunked), want, 1e-12)


@pytest.mark.parametrize("raw", [60.0, 0.0, -14.0])
def test_extreme_time_steps(
    scan_inputs, run_with_gradients, assert_near, assert_as_exact_as_float32, backend, raw
):
    inputs = scan_inputs(length=33, dt_bias=False)
    inputs["dt"] = raw + 0.1 * inputs["dt"]
    if backend != "triton":
        return assert_as_exact_as_float32(inputs, backend, tolerance=2e-6 if raw > 0 else 4e-6)
    inputs = {name: tensor.float().double() for name, tensor in inputs.items()}
    want = run_with_gradients(inputs, torch.float64, backend="reference", return_last_state=True)
    got = run_with_gradients(inputs, torch.float32, backend=backend, return_last_state=True)
    assert_near(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("raw", [60.0, -14.0])
def test_whole_grid_of_extreme_time_steps(scan_inputs, assert_as_exact_as_float32, backend, raw):
    if backend == "triton":
        pytest.skip("its bound is that of test_extreme_time_steps")
    grid = itertools.product((1, 3, 33, 64, 130), (8, 40, 64), (8, 16), (1, 2, 4))
    for length, channels, size, groups in grid:
        inputs = scan_inputs(length=length, channels=channels, size=size, groups=groups, dt_bias=False)
        inputs["dt"] = raw + 0.1 * inputs["dt"]
        assert_as_exact_as_float32(inputs, backend)


def test_long_rows_with_large_time_steps_do_not_overflow(
    scan_inputs, run_with_gradients, assert_near, backend
):
    inputs = scan_inputs(batch=1, length=512, channels=4, dt_bias=False)
    inputs["dt"] = torch.rand_like(inputs["dt"]) * 60
    want = run_with_gradients(inputs, torch.float64, backend="reference", return_last_state=True)
    got = run_with_gradients(inputs, torch.float32, backend=backend, return_last_state=True)
    assert_near(got, want)


def test_views_are_read_in_place(scan_inputs, backend, assert_near):
    inputs = scan_inputs(length=10, groups=2, initial_state=False)
    plain = {name: tensor.float() for name, tensor in inputs.items()}
    both = torch.cat([plain["u"], plain["z"]], dim=-1)
    projected = torch.cat([torch.zeros(2, 10, 3), plain["B"].flatten(2), plain["C"].flatten(2)], dim=-1)
    views = plain | {
        "u": both[..., :8],
        "z": both[..., 8:],
        "dt": plain["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        "B": projected[..., 3:11].unflatten(-1, (2, 4)),
        "C": projected[..., 11:].unflatten(-1, (2, 4)),
        "A": plain["A"].t().contiguous().t(),
    }
    assert not any(views[name].is_contiguous() for name in ("u", "z", "dt", "B", "C", "A"))
    assert_near(selective_scan(**views, backend=backend), selective_scan(**plain, backend=backend), 1e-6)
    step = {name: t[:, ::2] if name in ("u", "z", "dt", "B", "C") else t for name, t in plain.items()}
    dense = {name: tensor.contiguous() for name, tensor in step.items()}
    assert_near(selective_scan(**step, backend=backend), selective_scan(**dense, backend=backend), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_states(scan_inputs, run_with_gradients, assert_near, backend, dtype):
    inputs = scan_inputs(length=20)
    half = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    for name in ("A", "D", "dt_bias", "initial_state"):
        half[name] = inputs[name].float()
    y, state = selective_scan(**half, return_last_state=True, backend=backend)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    rounded = {name: tensor.double() for name, tensor in half.items()}
    want_y, want_state = selective_scan(**rounded, return_last_state=True, backend="reference")
    assert_near(state.double(), want_state, 1e-5)
    assert_near(y.double(), want_y, 8e-3)


def test_autocast_leaves_the_scan_alone(scan_inputs, backend):
    inputs = {name: tensor.float().requires_grad_() for name, tensor in scan_inputs().items()}
    want = selective_scan(**inputs, backend=backend)
    (want_gradient,) = torch.autograd.grad(want.sum(), inputs["B"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = selective_scan(**inputs, backend=backend)
        (gradient,) = torch.autograd.grad(got.sum(), inputs["B"])
    assert torch.equal(got, want)
    assert torch.equal(gradient, want_gradient)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_empty_inputs(scan_inputs, backend, batch, length):
    inputs = {name: t.float().requires_grad_() for name, t in scan_inputs(batch=batch, length=length).items()}
    y, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert y.shape == (batch, length, 8)
    assert torch.equal(state, inputs["initial_state"])
    (y.sum() + state.sum()).backward()
    assert inputs["u"].grad is not None


def test_only_the_state_is_differentiated(scan_inputs, backend):
    inputs = {name: tensor.float().requires_grad_() for name, tensor in scan_inputs().items()}
    _, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    state.sum().backward()
    assert inputs["initial_state"].grad.abs().sum() > 0
    assert inputs["C"].grad is None or inputs["C"].grad.abs().sum() == 0
