"""The Mamba layer: parity with transformers, its laws on every backend, adapters, precision."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language import MambaLM, decode
from vlmamba.ssm import mixer as mixer_module
from vlmamba.ssm import use_backend
from vlmamba.ssm.mixer import FP32_PARAMETERS, MambaMixer
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


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = MambaMixer(16, state_size=4)

    def forward(self, hidden):
        return self.mixer(hidden)


def test_lora_reaches_every_projection(backend, x):
    peft = pytest.importorskip("peft")
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


class TestTimeStepBias:
    """`dt_proj` leaves its bias out, and the scan and the step add it in fp32, once, whoever wraps the layer."""

    @staticmethod
    @contextlib.contextmanager
    def recorded(monkeypatch):
        """The time steps, in fp64, of every scan and step within."""
        seen = []

        def keep(dt, bias):
            seen.append(F.softplus(dt.double() if bias is None else dt.double() + bias.double()))

        def recording(function, first):
            def run(*args, **kwargs):
                keep(args[first], args[first + 6])
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(mixer_module, "selective_scan", recording(mixer_module.selective_scan, 1))
            patch.setattr(
                mixer_module, "selective_state_update", recording(mixer_module.selective_state_update, 2)
            )
            patch.setattr(decode, "StepCall", recording(decode.StepCall, 2))
            yield seen

    def test_it_counts_once(self, mixer, x, monkeypatch):
        with self.recorded(monkeypatch) as steps, torch.no_grad():
            mixer(x)
            mixer(x[:, :1], state=_state())
        inner = mixer.conv1d(mixer.in_proj(x)[..., :32].transpose(1, 2))[..., :LENGTH]
        rank = mixer.x_proj(F.silu(inner).transpose(1, 2))[..., :1]
        want = F.softplus(F.linear(rank, mixer.dt_proj.weight, mixer.dt_proj.bias)).double()
        assert len(steps) == 2
        torch.testing.assert_close(steps[0], want, rtol=1e-5, atol=0)
        torch.testing.assert_close(steps[1], want[:, 0], rtol=1e-5, atol=0)

    @pytest.mark.parametrize("how", ["weights", "autocast"])
    @torch.no_grad()
    def test_time_steps_in_bfloat16_are_four_times_as_exact_as_their_sum_rounded(self, monkeypatch, how):
        """Mean relative noise against fp64; that of the rounded sum is the least that a bf16 product could have."""
        config = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
        lm = MambaLM(config).eval()
        if how == "weights":
            for name, parameter in lm.named_parameters():
                if not any(re.search(pattern, name) for pattern in FP32_PARAMETERS):
                    parameter.data = parameter.data.bfloat16()
        exact = copy.deepcopy(lm).double()
        ids = torch.randint(0, 40, (2, 24))

        def run(model, context):
            with self.recorded(monkeypatch) as steps, context:
                cache = model(ids[:, :20], use_cache=True).past_key_values
                for t in range(20, 24):
                    cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
            assert len(steps) == 2 * 5
            return steps

        want = run(exact, contextlib.nullcontext())
        half = torch.autocast("cpu", dtype=torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
        for got, true in zip(run(lm, half), want, strict=True):
            raw = torch.log(torch.expm1(true)).bfloat16().double()
            noise, rounded = (((t - true).abs() / true).mean() for t in (got, F.softplus(raw)))
            assert noise > 0
            assert 4 * noise < rounded

    def test_a_layer_in_its_place_adds_its_own(self, mixer, x, assert_near):
        want = mixer(x)
        plain = torch.nn.Linear(1, 32)
        plain.load_state_dict(mixer.dt_proj.state_dict())
        mixer.dt_proj = plain
        assert_near(mixer(x), want, 4e-6)

    @pytest.mark.parametrize("bias", ["none", "lora_only"])
    def test_lora_is_a_changed_weight(self, x, assert_near, bias):
        peft = pytest.importorskip("peft")
        model = Holder()
        plain = copy.deepcopy(model.mixer)
        config = peft.LoraConfig(target_modules=["dt_proj"], r=1, init_lora_weights=False, bias=bias)
        model = peft.get_peft_model(model, config)
        layer = model.base_model.model.mixer.dt_proj
        if bias == "lora_only":
            with torch.no_grad():
                layer.bias.add_(1.0)
                plain.dt_proj.bias.add_(1.0)
        with torch.no_grad():
            plain.dt_proj.weight += layer.get_delta_weight("default")
        got, want = model(x), plain(x)
        assert_near(got, want, 4e-6)
        got.square().sum().backward()
        want.square().sum().backward()
        if bias == "lora_only":
            assert_near(layer.bias.grad, plain.dt_proj.bias.grad, 2e-5)
        else:
            assert layer.bias.grad is None
        merged = model.merge_and_unload().mixer
        assert merged.dt_proj.state_dict().keys() == {"weight", "bias"}
        assert_near(merged(x), want, 4e-6)

    def test_a_trained_copy_counts(self, x, assert_near):
        peft = pytest.importorskip("peft")
        model = Holder()
        want = model(x)
        config = peft.LoraConfig(
            target_modules=["in_proj"], init_lora_weights=True, modules_to_save=["dt_proj"]
        )
        model = peft.get_peft_model(model, config)
        got = model(x)
        assert_near(got, want, 4e-6)
        got.square().sum().backward()
        copied = model.base_model.model.mixer.dt_proj.modules_to_save["default"]
        assert copied.bias.grad.abs().sum() > 0

    def test_adapters_that_count_on_the_bias_are_refused(self, x):
        peft = pytest.importorskip("peft")
        dora = peft.LoraConfig(target_modules=["dt_proj"], use_dora=True)
        scaled = peft.IA3Config(target_modules=["dt_proj"], feedforward_modules=[])
        for config in (dora, scaled):
            with pytest.raises(ConfigError, match=r"dt_proj is wrapped by peft.* only LoRA without DoRA"):
                peft.get_peft_model(Holder(), config)(x)


class Quantised(torch.nn.Module):
    """A linear layer with integer weights in another's place, as quantisers put them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.scale, self.bias = float(scale), linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@torch.no_grad()
def test_quantised_projections(mixer, x, assert_near):
    """Layers with integer weights serve in every place, in whole calls and in steps."""
    plain = copy.deepcopy(mixer)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        layer = Quantised(getattr(mixer, name))
        setattr(mixer, name, layer)
        getattr(plain, name).weight.copy_(layer.weight * layer.scale)
    assert_near(mixer(x), plain(x), 4e-6)
    states = _state(), _state()
    for t in range(3):
        got, want = (m(x[:, t : t + 1], state=s) for m, s in zip((mixer, plain), states, strict=True))
        assert_near(got, want, 4e-6)


@torch.no_grad()
def test_offloaded_to_disk_is_the_same(tmp_path):
    """accelerate's hooks bring weights for the calls of modules; the mixer reads some without a call."""
    pytest.importorskip("accelerate")
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    lm = MambaLM(config).eval()
    lm.save_pretrained(tmp_path / "model")
    places = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu"}
    places |= {"backbone.layers.0": "cpu", "backbone.layers.1": "disk"}
    away = MambaLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert away.backbone.layers[1].mixer.dt_proj.bias.is_meta
    ids = torch.randint(0, 40, (2, 9))
    assert torch.equal(away(ids).logits, lm(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(away.generate(ids, **options), lm.generate(ids, **options))
    assert away.backbone.layers[1].mixer.conv1d.weight.is_meta


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
        ShapeError, match="state_at has values from 3 to 13, but only those from 0 to 12 exist"
    ):
        layer(x, state=_state(), state_at=torch.tensor([3, 13]))
