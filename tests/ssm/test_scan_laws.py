"""Laws of the scan and of the decode step, for every backend."""

from __future__ import annotations

import pytest
import torch

from vlmamba.ssm import selective_scan, selective_state_update

TIMED = ("u", "dt", "B", "C", "z")


@pytest.fixture
def inputs(scan_inputs):
    """Float32 inputs with two groups and a length that no chunk divides."""
    return {name: tensor.float() for name, tensor in scan_inputs(length=21, groups=2).items()}


def _cut(inputs, span, **changes):
    return {name: t[:, span] if name in TIMED else t for name, t in inputs.items()} | changes


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(inputs, segments, assert_near, backend, reverse):
    lengths = [7, 1, 10, 3]
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    y, ends = selective_scan(
        **inputs,
        seq_idx=segments(lengths, lengths),
        reverse=reverse,
        state_at=torch.tensor([edges[:-1] if reverse else [e - 1 for e in edges[1:]]] * 2),
        backend=backend,
    )
    first = 3 if reverse else 0
    for number in range(4):
        span = slice(edges[number], edges[number + 1])
        start = inputs["initial_state"] if number == first else None
        alone = _cut(inputs, span, initial_state=start)
        want, last = selective_scan(**alone, reverse=reverse, return_last_state=True, backend=backend)
        assert_near(y[:, span], want, 1e-6)
        assert_near(ends[:, number], last, 1e-6)


def test_nothing_leaks_between_segments(inputs, segments, backend):
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = selective_scan(**inputs, seq_idx=segments([8, 13], [8, 13]), backend=backend)
    gradient, state = torch.autograd.grad(y[:, 8:].sum(), [inputs["u"], inputs["initial_state"]])
    assert (gradient[:, :8] == 0).all()
    assert (state == 0).all()


@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "z", "initial_state"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_reach_the_end_of_their_segment_only(inputs, segments, backend, name, bad):
    place = (0, 2, 1) if name == "initial_state" else (0, 3, *[0] * (inputs[name].dim() - 2))
    inputs[name][place] = bad
    leaves = {key: tensor.requires_grad_() for key, tensor in inputs.items()}
    ids = segments([8, 13], [8, 13])
    y, last = selective_scan(**leaves, seq_idx=ids, return_last_state=True, backend=backend)
    assert not y[0, :8].isfinite().all()
    assert y[0, 8:].isfinite().all()
    assert y[1].isfinite().all()
    assert last.isfinite().all()
    for gradient in torch.autograd.grad(y.sum(), [leaves[key] for key in TIMED]):
        assert gradient[0, 8:].isfinite().all()
        assert gradient[1].isfinite().all()


def test_a_bad_number_does_not_reach_the_segment_before(inputs, segments, backend):
    inputs["u"][0, 15, 1] = float("nan")
    leaves = {key: tensor.requires_grad_() for key, tensor in inputs.items()}
    y = selective_scan(**leaves, seq_idx=segments([8, 13], [8, 13]), backend=backend)
    assert y[0, :8].isfinite().all()
    for gradient in torch.autograd.grad(y.sum(), [leaves[key] for key in ("u", "dt", "B", "initial_state")]):
        assert gradient[0, :8].isfinite().all()


def test_an_id_that_comes_back_is_a_new_segment(inputs, assert_near, backend):
    again = torch.tensor([[5] * 8 + [-1] * 2 + [5] * 11] * 2)
    fresh = torch.tensor([[0] * 8 + [1] * 2 + [2] * 11] * 2)
    assert torch.equal(
        selective_scan(**inputs, seq_idx=again, backend=backend),
        selective_scan(**inputs, seq_idx=fresh, backend=backend),
    )


def test_exchanging_segments_exchanges_outputs(inputs, segments, assert_near, backend):
    order = torch.cat([torch.arange(12, 21), torch.arange(12)])
    inputs["initial_state"] = None
    y = selective_scan(**inputs, seq_idx=segments([12, 9], [12, 9]), backend=backend)
    moved = _cut(inputs, order)
    assert_near(
        selective_scan(**moved, seq_idx=segments([9, 12], [9, 12]), backend=backend), y[:, order], 1e-6
    )


@pytest.mark.parametrize("cut", [1, 8, 16, 20])
def test_split_is_whole_with_gradients(inputs, assert_near, backend, cut):
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    weight = torch.randn(2, 21, 8)
    whole, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    want = torch.autograd.grad((whole * weight).sum() + last.sum(), list(inputs.values()))
    first, middle = selective_scan(**_cut(inputs, slice(cut)), return_last_state=True, backend=backend)
    rest = _cut(inputs, slice(cut, None), initial_state=middle)
    second, end = selective_scan(**rest, return_last_state=True, backend=backend)
    split = torch.cat([first, second], dim=1)
    got = torch.autograd.grad((split * weight).sum() + end.sum(), list(inputs.values()))
    assert_near(split, whole, 1e-6)
    assert_near(end, last, 1e-6)
    assert_near(dict(zip(inputs, got, strict=True)), dict(zip(inputs, want, strict=True)))


def test_steps_are_whole(inputs, assert_near, backend):
    want, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    state = inputs.pop("initial_state").clone()
    outputs = []
    for t in range(21):
        arguments = {name: tensor[:, t] if name in TIMED else tensor for name, tensor in inputs.items()}
        outputs.append(selective_state_update(state, **arguments))
    assert_near(torch.stack(outputs, dim=1), want, 2e-6)
    assert_near(state, last, 2e-6)


@pytest.mark.parametrize("reverse", [True, (True, False)])
def test_reverse_is_flip(inputs, segments, assert_near, backend, reverse):
    at = torch.tensor([[0, 20, 8], [3, 3, 19]])
    ids = segments([9, 12], [21])
    flags = (True, True) if reverse is True else reverse
    y, states = selective_scan(**inputs, reverse=reverse, seq_idx=ids, state_at=at, backend=backend)
    forward = selective_scan(**inputs, seq_idx=ids, state_at=at, backend=backend)
    flipped = {name: tensor.flip(1) if name in TIMED else tensor for name, tensor in inputs.items()}
    back, back_states = selective_scan(**flipped, seq_idx=ids.flip(1), state_at=20 - at, backend=backend)
    for group, flag in enumerate(flags):
        channels = slice(4 * group, 4 * group + 4)
        assert_near(y[..., channels], (back.flip(1) if flag else forward[0])[..., channels], 1e-6)
        want = back_states if flag else forward[1]
        assert_near(states[..., channels, :], want[..., channels, :], 1e-6)


def test_groups_are_separate_calls(inputs, assert_near, backend):
    y, last = selective_scan(**inputs, reverse=(False, True), return_last_state=True, backend=backend)
    for group, reverse in enumerate((False, True)):
        channels = slice(4 * group, 4 * group + 4)
        own = {name: inputs[name][..., channels] for name in ("u", "dt", "z", "D", "dt_bias")}
        own |= {name: inputs[name][:, :, group] for name in ("B", "C")}
        own |= {"A": inputs["A"][channels], "initial_state": inputs["initial_state"][:, channels]}
        want, state = selective_scan(**own, reverse=reverse, return_last_state=True, backend=backend)
        assert_near(y[..., channels], want, 1e-6)
        assert_near(last[:, channels], state, 1e-6)


def test_asked_states_are_those_of_shorter_runs(inputs, assert_near, backend):
    at = torch.tensor([[0, 7, 20], [15, 8, 15]])
    y, states = selective_scan(**inputs, state_at=at, return_last_state=True, backend=backend)
    assert states.shape == (2, 3, 8, 4)
    for slot in range(3):
        for row in range(2):
            shorter = _cut(inputs, slice(int(at[row, slot]) + 1))
            _, last = selective_scan(**shorter, return_last_state=True, backend=backend)
            assert_near(states[row, slot], last[row], 1e-6)
    assert_near(y, selective_scan(**inputs, backend=backend), 1e-7)


def test_step_gives_gradients_of_its_own_arguments(scan_inputs, assert_near):
    inputs = scan_inputs(length=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    want = selective_scan(**leaves)
    names = [name for name in leaves if name != "initial_state"]
    expected = torch.autograd.grad(want.sum(), [leaves[name] for name in names])
    state = leaves["initial_state"].detach().clone()
    arguments = {name: leaves[name][:, 0] if name in TIMED else leaves[name] for name in names}
    got = selective_state_update(state, **arguments)
    gradients = torch.autograd.grad(got.sum(), [leaves[name] for name in names])
    assert_near(dict(zip(names, gradients, strict=True)), dict(zip(names, expected, strict=True)), 1e-12)
    assert not state.requires_grad


def test_step_takes_half_precision(scan_inputs):
    inputs = {name: tensor.float() for name, tensor in scan_inputs(length=1).items()}
    state = inputs.pop("initial_state")
    arguments = {name: t[:, 0].bfloat16() if name in TIMED else t for name, t in inputs.items()}
    y = selective_state_update(state, **arguments)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
