"""The causal convolution: parity with the reference, and its laws, for every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from vlmamba.errors import ShapeError
from vlmamba.ssm import causal_conv1d
from vlmamba.ssm.conv import conv_state_at


def _inputs(length, *, taps=4, channels=6, history=True):
    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    found = {"x": noise(2, length, channels), "weight": noise(channels, taps), "bias": noise(channels)}
    return found | ({"initial_state": noise(2, taps - 1, channels)} if history else {})


@pytest.fixture
def inputs():
    return {name: tensor.float() for name, tensor in _inputs(15).items()}


def test_equals_torch(assert_near, backend):
    inputs = {name: tensor.float() for name, tensor in _inputs(9, history=False).items()}
    x, weight, bias = inputs.values()
    want = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=6)[..., :9]
    got = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
    assert_near(got, F.silu(want).transpose(1, 2), 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_gradcheck(segments, reverse):
    inputs = _inputs(5, channels=2)

    def run(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        ids = segments([2, 3], [4, 1])
        return causal_conv1d(**named, activation="silu", seq_idx=ids, reverse=reverse, return_state=True)

    assert gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs.values()))


@pytest.mark.parametrize("length", [1, 2, 3, 9, 33])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_parity(run_with_gradients, assert_near, backend, length, taps):
    for packed, reverse, history, activation in itertools.product(
        [False, True], [False, True], [False, True], [None, "silu"]
    ):
        inputs = _inputs(length, taps=taps, history=history)
        options = {"reverse": reverse, "activation": activation, "return_state": True}
        if packed:
            options["seq_idx"] = (torch.rand(2, length) < 0.3).cumsum(1) % 2
        options["function"] = causal_conv1d
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend=backend, **options), want, 4e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(inputs, segments, assert_near, backend, reverse):
    lengths = [2, 1, 7, 5]
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    x, weight, bias, history = inputs.values()
    ids = segments(lengths, lengths)
    y, state = causal_conv1d(
        **inputs, seq_idx=ids, reverse=reverse, activation="silu", return_state=True, backend=backend
    )
    first, last = (3, 0) if reverse else (0, 3)
    for number in range(4):
        span = slice(edges[number], edges[number + 1])
        want, end = causal_conv1d(
            x[:, span],
            weight,
            bias,
            initial_state=history if number == first else None,
            reverse=reverse,
            activation="silu",
            return_state=True,
            backend=backend,
        )
        assert_near(y[:, span], want, 1e-6)
        at = torch.full((2,), edges[number] if reverse else edges[number + 1] - 1)
        found = conv_state_at(x, at, 4, seq_idx=ids, initial_state=history, reverse=reverse)
        assert torch.equal(found, end)
        assert number != last or torch.equal(state, end)


@pytest.mark.parametrize("cut", [1, 2, 7, 14])
@pytest.mark.parametrize("reverse", [False, True])
def test_split_is_whole(inputs, assert_near, backend, cut, reverse):
    want, last = causal_conv1d(**inputs, reverse=reverse, return_state=True, backend=backend)
    x = inputs.pop("x")
    history = inputs.pop("initial_state")
    parts = [x[:, :cut], x[:, cut:]]
    outputs = []
    for part in reversed(parts) if reverse else parts:
        y, history = causal_conv1d(
            part, **inputs, initial_state=history, reverse=reverse, return_state=True, backend=backend
        )
        outputs.append(y)
    assert_near(torch.cat(outputs[::-1] if reverse else outputs, dim=1), want, 1e-6)
    assert torch.equal(history, last)


def test_steps_are_whole(inputs, assert_near, backend):
    want = causal_conv1d(**inputs, backend=backend)
    x, history = inputs.pop("x"), inputs.pop("initial_state")
    outputs = []
    for t in range(15):
        y, history = causal_conv1d(
            x[:, t : t + 1], **inputs, initial_state=history, return_state=True, backend=backend
        )
        outputs.append(y)
    assert_near(torch.cat(outputs, dim=1), want, 1e-6)


def test_reverse_is_flip(inputs, segments, assert_near, backend):
    ids = segments([4, 11], [15])
    y, state = causal_conv1d(**inputs, seq_idx=ids, reverse=True, return_state=True, backend=backend)
    flipped = inputs | {"x": inputs["x"].flip(1)}
    want, want_state = causal_conv1d(**flipped, seq_idx=ids.flip(1), return_state=True, backend=backend)
    assert_near(y, want.flip(1), 1e-6)
    assert torch.equal(state, want_state)


def test_channels_are_separate_calls(inputs, assert_near, backend):
    y = causal_conv1d(**inputs, backend=backend)
    for channels in (slice(0, 2), slice(2, 6)):
        own = {name: t[..., channels] for name, t in inputs.items() if name != "weight"}
        assert_near(
            causal_conv1d(**own, weight=inputs["weight"][channels], backend=backend), y[..., channels]
        )


def test_an_id_that_comes_back_is_a_new_segment(inputs, backend):
    again = torch.tensor([[5] * 4 + [-1] + [5] * 10] * 2)
    fresh = torch.tensor([[0] * 4 + [1] + [2] * 10] * 2)
    assert torch.equal(
        causal_conv1d(**inputs, seq_idx=again, backend=backend),
        causal_conv1d(**inputs, seq_idx=fresh, backend=backend),
    )


def test_state_has_zeros_in_front_of_a_short_segment(inputs, segments, backend):
    _, state = causal_conv1d(**inputs, seq_idx=segments([13, 2], [15]), return_state=True, backend=backend)
    assert (state[0, 0] == 0).all()
    assert torch.equal(state[0, 1:], inputs["x"][0, 13:])
    assert torch.equal(state[1], inputs["x"][1, 12:])


def test_half_precision_is_rounded_once(inputs, backend):
    half = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    y, state = causal_conv1d(**half, return_state=True, backend=backend)
    want = causal_conv1d(**{name: tensor.float() for name, tensor in half.items()}, backend=backend)
    assert state.dtype == torch.bfloat16
    assert torch.equal(y, want.bfloat16())


def test_errors_carry_both_shapes(inputs):
    x, weight, _, history = inputs.values()
    with pytest.raises(ShapeError, match=r"weight has shape \(5, 4\), but \(D, K\) = \(6, any\) is needed"):
        causal_conv1d(x, weight[:5])
    with pytest.raises(
        ShapeError, match=r"initial_state has shape \(2, 2, 6\), but \(B, K-1, D\) = \(2, 3, 6\)"
    ):
        causal_conv1d(x, weight, initial_state=history[:, 1:])
    with pytest.raises(ShapeError, match="activation is 'gelu', but None or 'silu' is needed"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ShapeError, match=r"seq_idx has shape \(2, 14\), but \(B, L\) = \(2, 15\) is needed"):
        causal_conv1d(x, weight, seq_idx=torch.zeros(2, 14).int())
    with pytest.raises(
        ShapeError, match=r"weight has shape \(6, 0\), but \(D, K\) with K of 1 or more is needed"
    ):
        causal_conv1d(x, weight[:, :0])
    with pytest.raises(
        ShapeError, match=r"weight has dtype torch\.int32, but a floating-point dtype is needed"
    ):
        causal_conv1d(x, weight.int())
    with pytest.raises(ShapeError, match="weight is on meta, but the input is on cpu"):
        causal_conv1d(x, weight.to("meta"))
    with pytest.raises(ShapeError, match=r"x has dtype torch.int64, but a floating-point dtype is needed"):
        causal_conv1d(x.long(), weight)
