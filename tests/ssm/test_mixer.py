"""The Mamba layer: parity with transformers, its laws on every backend, adapters, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.ssm import use_backend
from vlmamba.ssm.mixer import MambaMixer
from vlmamba.ssm.state import MambaLayerState, MambaState

LENGTH = 13


@pytest.fixture
def mixer(backend):
    """A small layer whose convolution bias is far from zero, on each backend in turn."""
    layer = MambaMixer(16, state_size=4)
    with torch.no_grad():
        layer.conv1d.bias.add_(1.0)
    with use_backend(backend):
        yield layer


@pytest.fixture
def x():
    return torch.randn(2, LENGTH, 16)


def _state(batch: int = 2) -> MambaLayerState:
    return MambaState.allocate(1, batch, 32, 4, 4)[0]


def _copy_of_transformers(**options):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    theirs = Theirs(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=8, **options), 0)
    names = ("use_bias", "use_conv_bias", "hidden_act", "conv_kernel", "time_step_rank", "intermediate_size")
    ours = MambaMixer(16, state_size=8, **{name: options[name] for name in names if name in options})
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
        {"hidden_act": "gelu", "time_step_rank": 5},
    ],
    ids=["plain", "bias", "gelu"],
)
def test_parity_with_transformers(assert_near, backend, options):
    theirs, ours = _copy_of_transformers(**options)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    mine, yours = (torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    weight = torch.randn(2, 16, 16)
    want = theirs(yours.requires_grad_())
    (want * weight).sum().backward()
    with use_backend(backend):
        got = ours(mine.requires_grad_())
        (got * weight).sum().backward()
    assert_near(got, want)
    gradients = {name: p.grad for name, p in ours.named_parameters()} | {"x": mine.grad}
    assert_near(gradients, {name: p.grad for name, p in theirs.named_parameters()} | {"x": yours.grad})


@torch.no_grad()
def test_prefill_and_steps_are_whole(mixer, x, assert_near):
    whole = _state()
    want = mixer(x, state=whole)
    assert_near(want, mixer(x), 1e-6)
    state = _state()
    outputs = [mixer(x[:, :6], state=state), mixer(x[:, 6:8], state=state)]
    outputs += [mixer(x[:, t : t + 1], state=state) for t in range(8, LENGTH)]
    assert_near(torch.cat(outputs, dim=1), want)
    assert_near(state.ssm, whole.ssm)
    assert_near(state.conv, whole.conv)


@torch.no_grad()
def test_steps_alone_are_whole(mixer, x, assert_near):
    state = _state()
    got = torch.cat([mixer(x[:, t : t + 1], state=state) for t in range(LENGTH)], dim=1)
    assert_near(got, mixer(x))


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate_with_gradients(mixer, x, segments, assert_near, reverse):
    lengths = [4, 1, 8]
    weight = torch.randn_like(x)
    got = mixer(x, seq_idx=segments(lengths, lengths), reverse=reverse)
    want = torch.cat([mixer(part, reverse=reverse) for part in x.split(lengths, dim=1)], dim=1)
    assert_near(got, want)
    names = [name for name, _ in mixer.named_parameters()]
    packed, separate = (
        torch.autograd.grad((y * weight).sum(), list(mixer.parameters())) for y in (got, want)
    )
    assert_near(dict(zip(names, packed, strict=True)), dict(zip(names, separate, strict=True)))


def test_reverse_is_flip(mixer, x, segments, assert_near):
    ids = segments([4, 9], [13])
    got = mixer(x, seq_idx=ids, reverse=True)
    assert_near(got, mixer(x.flip(1), seq_idx=ids.flip(1)).flip(1))


@torch.no_grad()
def test_reverse_keeps_a_state_too(mixer, x, assert_near):
    state = _state()
    parts = [mixer(x[:, 5:], state=state, reverse=True), mixer(x[:, :5], state=state, reverse=True)]
    assert_near(torch.cat(parts[::-1], dim=1), mixer(x, reverse=True))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_singles(mixer, assert_near, side):
    """Short rows included: one shorter than the convolution's history."""
    lengths = [LENGTH, 5, 2]
    rows = [torch.randn(1, length, 16) for length in lengths]
    following = torch.randn(3, 3, 16)
    batch = torch.randn(3, LENGTH, 16)
    ids = torch.full((3, LENGTH), -1, dtype=torch.int32)
    for number, row in enumerate(rows):
        span = slice(LENGTH - lengths[number], None) if side == "left" else slice(lengths[number])
        batch[number, span], ids[number, span] = row[0], 0
    state = _state(3)
    ends = torch.tensor(lengths) - 1 if side == "right" else None
    outputs = mixer(batch, seq_idx=ids, state=state, state_at=ends)
    steps = torch.cat([mixer(following[:, t : t + 1], state=state) for t in range(3)], dim=1)
    for number, row in enumerate(rows):
        alone = _state(1)
        want = mixer(row, state=alone)
        assert_near(outputs[number][ids[number] == 0], want[0])
        then = torch.cat([mixer(following[number : number + 1, t : t + 1], state=alone) for t in range(3)], 1)
        assert_near(steps[number], then[0])


def test_state_in_training_does_not_break_backward(mixer, x, assert_near):
    state = _state()
    state.ssm.normal_()
    first = mixer(x[:, :6], state=state)
    second = mixer(x[:, 6:], state=state)
    third = mixer(x[:, :1], state=state)
    (first.sum() + second.sum() + third.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())
    assert not state.ssm.requires_grad
    assert not state.conv.requires_grad


def test_activation_checkpointing_gives_the_same_gradients(mixer, x, segments, assert_near):
    ids = segments([4, 9], [13])
    gradients = []
    for run in (mixer, lambda *a, **k: checkpoint(mixer, *a, use_reentrant=False, **k)):
        found = torch.autograd.grad(run(x, seq_idx=ids).square().sum(), list(mixer.parameters()))
        gradients.append({str(number): gradient for number, gradient in enumerate(found)})
    assert_near(gradients[1], gradients[0], 1e-6)


def test_lora_reaches_every_projection(backend, x):
    peft = pytest.importorskip("peft")

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = MambaMixer(16, state_size=4)

        def forward(self, hidden):
            return self.mixer(hidden)

    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    model = peft.get_peft_model(Holder(), config)
    with use_backend(backend):
        model(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(found) == 2 * len(targets)
    for name, gradient in found.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    frozen = [name for name, p in model.named_parameters() if "lora_" not in name and p.grad is not None]
    assert frozen == []


def test_the_time_step_bias_counts_once(mixer, x):
    seen = []
    mixer.dt_proj.register_forward_hook(lambda _, inputs, output: seen.append(output))
    mixer(x)
    state = _state()
    with torch.no_grad():
        mixer(x[:, :1], state=state)
    assert len(seen) == 2
    inner = F.silu(mixer.conv1d(mixer.in_proj(x)[..., :32].transpose(1, 2))[..., :LENGTH]).transpose(1, 2)
    raw = mixer.dt_proj.weight @ mixer.x_proj(inner)[..., :1].transpose(1, 2)
    torch.testing.assert_close(seen[0], raw.transpose(1, 2) + mixer.dt_proj.bias)


def test_bfloat16_autocast_and_weights(mixer, x):
    want = mixer(x)
    scale = want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer(x)
        got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert mixer.A_log.grad.dtype == torch.float32
    assert (got.float() - want).abs().max() < 0.03 * scale
    state = MambaState.allocate(1, 2, 32, 4, 4, torch.bfloat16)[0]
    half = mixer.to(torch.bfloat16)
    with torch.no_grad():
        y = torch.cat(
            [half(x[:, :9].bfloat16(), state=state), half(x[:, 9:10].bfloat16(), state=state)], dim=1
        )
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert (y.float() - want[:, :10]).abs().max() < 0.05 * scale


def test_initialisation_follows_the_paper():
    layer = MambaMixer(64, time_step_min=0.01, time_step_max=0.05)
    assert layer.time_step_rank == 4
    assert layer.intermediate_size == 128
    torch.testing.assert_close(-torch.exp(layer.A_log[7]), -torch.arange(1.0, 17.0))
    assert (layer.D == 1).all()
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.015
    assert 0.033 < steps.max() < 0.0501
    assert layer.dt_proj.weight.abs().max() <= 0.5
    constant = MambaMixer(64, time_step_init_scheme="constant", time_step_scale=2.0)
    assert (constant.dt_proj.weight == 1.0).all()
    assert MambaMixer(20).time_step_rank == 2
    with torch.device("meta"):
        assert MambaMixer(16)(torch.empty(1, 3, 16)).shape == (1, 3, 16)


def test_errors_say_what_is_wrong(x):
    layer = MambaMixer(16, state_size=4)
    with pytest.raises(ConfigError, match=r"hidden_act is 'sillu'\. Did you mean 'silu'"):
        MambaMixer(16, hidden_act="sillu")
    with pytest.raises(
        ConfigError, match="time_step_init_scheme is 'zeros'; it must be 'random' or 'constant'"
    ):
        MambaMixer(16, time_step_init_scheme="zeros")
    with pytest.raises(ConfigError, match="time_step_rank is 'big'; it must be a whole number or 'auto'"):
        MambaMixer(16, time_step_rank="big")
    with pytest.raises(
        ShapeError, match=r"hidden_states has shape \(2, 13, 8\), but \(B, L, D\) = \(any, any, 16\)"
    ):
        layer(x[..., :8])
    with pytest.raises(
        ShapeError, match=r"state.conv has shape \(3, 3, 32\), but \(B, K-1, E\) = \(2, 3, 32\)"
    ):
        layer(x, state=_state(3))
    with pytest.raises(ShapeError, match="state_at is given without state"):
        layer(x, state_at=torch.tensor([3, 4]))
    with pytest.raises(
        ShapeError, match="state_at has values from 3 to 13, but positions from 0 to 12 exist"
    ):
        layer(x, state=_state(), state_at=torch.tensor([3, 13]))
