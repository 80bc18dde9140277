"""The operations inside torch.compile(fullgraph=True): same values, same gradients, one graph."""

from __future__ import annotations

import shutil

import pytest
import torch

from vlmamba.errors import ShapeError
from vlmamba.ssm import causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.mixer import MambaMixer
from vlmamba.ssm.state import MambaState

STEP_NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def inputs(scan_inputs):
    return {name: tensor.float() for name, tensor in scan_inputs(length=7, groups=2).items()}


def _compare(function, leaves, assert_near, compiler="aot_eager", tolerance=1e-6):
    """Run eagerly and compiled; compare outputs and gradients of all leaves."""
    results = []
    for run in (function, torch.compile(function, backend=compiler, fullgraph=True)):
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, output.numel()).view_as(output) for output in outputs]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        results.append(found | dict(zip(leaves, gradients, strict=True)))
    assert_near(results[1], results[0], tolerance)


@pytest.mark.parametrize("states", [{}, {"return_last_state": True}, {"state_at": torch.tensor([[1], [6]])}])
def test_scan(inputs, segments, assert_near, backend, states):
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    options = {"seq_idx": segments([3, 4], [7]), "reverse": (False, True), "backend": backend} | states
    _compare(lambda: selective_scan(**leaves, **options), leaves, assert_near)


def test_conv(segments, assert_near, backend):
    leaves = {"x": torch.randn(2, 7, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    leaves |= {"initial_state": torch.randn(2, 3, 6)}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    options = {"seq_idx": segments([3, 4], [7]), "activation": "silu", "backend": backend}
    _compare(lambda: causal_conv1d(**leaves, return_state=True, **options), leaves, assert_near)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_step(scan_inputs, assert_near, compiler):
    inputs = {name: tensor.float() for name, tensor in scan_inputs(length=1, groups=2).items()}
    start = inputs["initial_state"]
    leaves = {
        n: (inputs[n][:, 0] if n in ("u", "dt", "B", "C", "z") else inputs[n]).clone() for n in STEP_NAMES
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    states = []

    def step():
        states.append(start.clone())
        return selective_state_update(states[-1], **leaves)

    want = step()
    gradients = torch.autograd.grad(want.sum(), list(leaves.values()))
    state = start.clone()
    compiled = torch.compile(
        lambda state, named: selective_state_update(state, **named),
        backend=compiler,
        fullgraph=True,
    )
    got = compiled(state, leaves)
    assert_near(got, want, 1e-6)
    assert_near(state, states[0], 1e-6)
    assert not torch.equal(state, start)
    found = torch.autograd.grad(got.sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, found, strict=True)), dict(zip(leaves, gradients, strict=True)), 1e-6)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_layer_is_one_graph(assert_near, compiler):
    mixer = MambaMixer(16, state_size=4)
    x = torch.randn(2, 9, 16)
    leaves = dict(mixer.named_parameters())
    _compare(lambda: mixer(x), leaves, assert_near, compiler, 4e-6)


@torch.no_grad()
def test_decode_step_of_a_layer_is_one_graph(assert_near):
    mixer = MambaMixer(16, state_size=4)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    states = [MambaState.allocate(1, 2, 32, 4, 4)[0] for _ in range(2)]
    for token in torch.randn(3, 2, 1, 16):
        assert_near(compiled(token, state=states[1]), mixer(token, state=states[0]), 1e-6)
    assert_near(states[1].ssm, states[0].ssm, 1e-6)
    assert_near(states[1].conv, states[0].conv, 1e-6)


def test_positions_out_of_range_are_found_when_the_graph_runs(inputs):
    run = torch.compile(
        lambda at: selective_scan(**inputs, state_at=at)[1], backend="aot_eager", fullgraph=True
    )
    assert run(torch.tensor([[1], [6]])).shape == (2, 1, 8, 4)
    with pytest.raises(ValueError, match="state_at has values from 1 to 7, but only those from 0 to 6 exist"):
        run(torch.tensor([[1], [7]]))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_misfits_carry_both_values(inputs, fullgraph):
    """With fullgraph=True torch raises an error of its own class, which quotes ours."""
    run = torch.compile(
        lambda dt: selective_scan(**(inputs | {"dt": dt})), backend="aot_eager", fullgraph=fullgraph
    )
    text = r"dt has shape \(2, 4, 8\), but \(B, L, D\) like u = \(2, 7, 8\) is needed"
    with pytest.raises((ShapeError, RuntimeError), match=text) as error:
        run(inputs["dt"][:, :4])
    assert isinstance(error.value, ShapeError) != fullgraph


def test_a_refusal_is_a_value_error_in_a_graph_too(inputs):
    run = torch.compile(
        lambda: selective_scan(**inputs, backend="torhc"), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(ValueError, match="unknown state-space backend 'torhc'"):
        run()


def test_ops_keep_their_promises(scan_inputs, segments):
    inputs = {n: t.float().requires_grad_() for n, t in scan_inputs(length=5, groups=2).items()}
    ops = torch.ops.vlmamba
    named = [inputs[name] for name in (*STEP_NAMES, "initial_state")]
    tail = (True, segments([2, 3], [5]), [False, True], None, True, "torch")
    torch.library.opcheck(ops.selective_scan.default, (*named, *tail))
    x, weight = torch.randn(2, 6, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    torch.library.opcheck(ops.causal_conv1d.default, (x, weight, None, "silu", None, True, 2, "torch"))
    now = [
        t[:, 0] if name in ("u", "dt", "B", "C", "z") else t
        for name, t in zip(STEP_NAMES, named, strict=False)
    ]
    leaves = [tensor.detach().requires_grad_() for tensor in now]
    state = torch.randn(2, 8, 4)
    torch.library.opcheck(ops.selective_state_update.default, (*leaves, state, True, "torch"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_inductor(assert_near):
    mixer = MambaMixer(16, state_size=4)
    x = torch.randn(2, 9, 16)
    _compare(lambda: mixer(x), dict(mixer.named_parameters()), assert_near, "inductor", 1e-5)
