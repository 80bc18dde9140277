"""FLOPs: traced on shapes, they equal those of a real forward pass and of arithmetic by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmamba.errors import BackendError
from vlmamba.ssm.registry import get_backend, use_backend
from vlmamba.ssm.spec import ScanCall, ScanSpec
from vlmamba.testing import tiny_model
from vlmamba.training import flops
from vlmamba.training.flops import (
    PEAK_FLOPS,
    FlopCount,
    conv_flops,
    peak_of,
    scan_backward_flops,
    scan_flops,
)
from vlmamba.training.metrics import Window
from vlmamba.training.parallel import Parallel
from vlmamba.training.parts import set_trainable
from vlmamba.training.run import enable_checkpointing
from vlmamba.training.tracing import StepShape, trace_step


class Counted:
    """A number that counts the operations made with it."""

    operations = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _with(self, value: float) -> Counted:
        Counted.operations += 1
        return Counted(value)

    def __mul__(self, other: Counted) -> Counted:
        return self._with(self.value * other.value)

    def __add__(self, other: Counted) -> Counted:
        return self._with(self.value + other.value)

    def exp(self) -> Counted:
        return self._with(math.exp(self.value))


def test_scan_counts_every_operation_of_the_recurrence() -> None:
    size, length = 5, 3
    u, dt, skip = Counted(0.3), Counted(0.2), Counted(1.0)
    A, B, C, state = ([Counted(-0.5 * n) for n in range(size)] for _ in range(4))
    Counted.operations = 0
    for _ in range(length):
        dtu = dt * u
        y = skip * u
        for n in range(size):
            state[n] = (dt * A[n]).exp() * state[n] + dtu * B[n]
            y = y + C[n] * state[n]
        y = y + skip  # one addition for D u, as the sum over states began with it
    assert Counted.operations == scan_flops(1, length, 1, size)
    assert scan_flops(2, 3, 4, 5, skip=False) == 2 * 3 * 4 * 36


def mixer_matmuls(config: Any) -> int:
    """Forward FLOPs of a layer's projections for a token."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.state_size
    rank = int(config.time_step_rank)
    return 2 * (2 * width * inner + inner * (rank + 2 * size) + rank * inner + inner * width)


@pytest.mark.parametrize("trained", [False, True])
def test_language_model_by_hand(trained: bool) -> None:
    model, _ = tiny_model("mlp")
    set_trainable(model, ["multi_modal_projector", *(["language_model"] if trained else [])])
    text = model.config.text_config
    inner, size = text.intermediate_size, text.state_size
    times = 3 if trained else 2  # forward, gradient of the input, gradient of the weight
    layer = times * mixer_matmuls(text) + 3 * conv_flops(1, 1, inner, text.conv_kernel)
    layer += scan_flops(1, 1, inner, size) + scan_backward_flops(1, 1, inner, size)
    flops = FlopCount.of(model)
    assert flops.per_token == layer * text.num_hidden_layers
    assert flops.per_supervised == times * 2 * text.hidden_size * text.vocab_size
    total = flops.total(tokens=10, supervised=3, images=0)
    assert total == 10 * flops.per_token + 3 * flops.per_supervised


def test_frozen_encoder_counts_forward_only() -> None:
    model, _ = tiny_model("mlp")
    set_trainable(model, ["multi_modal_projector"])
    patches, vision, text = 16, 24, 32
    connector = 2 * patches * (vision * text + text * text)
    assert model.vision_tower.num_tokens == patches
    first = 2 * patches * vision * text  # has no gradient of its input
    # On the meta device attention is matrix products; torch 2.11 has no rule for what it is on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model.vision_tower).to("meta")(torch.zeros(1, 3, 16, 16, device="meta"))
    assert FlopCount.of(model).per_image == counter.get_total_flops() + 3 * connector - first


@pytest.mark.parametrize("connector", ["mlp", "vss-mlp", "vss-l2", "qmamba"])
def test_traced_forward_equals_a_counted_one(connector: str) -> None:
    model, _ = tiny_model(connector)
    model.train()
    tokens = model.multi_modal_projector.num_tokens
    length, supervised = tokens + 9, 4
    ids = torch.full((2, length), 5)
    ids[:, :tokens] = model.config.image_token_id
    labels = torch.full((2, length), -100)
    labels[:, -supervised:] = 7
    with use_backend("reference"), FlopCounterMode(display=False) as counter:  # it has no matrix product
        model(input_ids=ids, pixel_values=torch.zeros(2, 3, 16, 16), labels=labels, logits_to_keep=None)
    shape = StepShape(rows=2, length=length, images=2, supervised=2 * supervised)
    flops = trace_step(model, shape, precision="fp32").flops
    scans = 0  # which the counted forward does not see
    for name, mixer in model.named_modules():
        if type(mixer).__name__ == "MambaMixer":
            text = name.startswith("language_model")
            rows = 2 * length if text else 2 * model.multi_modal_projector.grid[0] ** 2 * 2  # two directions
            if "multi_modal_projector.layers" in name:
                rows = 2 * tokens
            scans += scan_flops(1, rows, mixer.intermediate_size, mixer.state_size)
            scans += conv_flops(1, rows, mixer.intermediate_size, mixer.conv_kernel)
    traced = flops["images"] + flops["language"] + flops["loss"]
    assert traced == counter.get_total_flops() + scans
    # Part by part on the meta device is what the whole step gives on shapes, here where everything trains.
    with sdpa_kernel(SDPBackend.MATH):  # what flash attention computes again in backward is no model FLOP
        whole = trace_step(
            model, StepShape(rows=1, length=256, images=1, supervised=2), precision="fp32"
        ).flops
    assert FlopCount.of(model, length=256) == FlopCount(
        (whole["language"] + whole["language backward"]) / 256,
        (whole["loss"] + whole["loss backward"]) / 2,
        whole["images"] + whole["images backward"],
    )


def test_recomputation_is_not_counted_in_model_flops() -> None:
    model, _ = tiny_model("mlp")
    model.train()
    plain = FlopCount.of(model)
    enable_checkpointing(model.language_model)
    assert FlopCount.of(model) == plain
    shape = StepShape(rows=1, length=40, images=1, supervised=4)
    flops = trace_step(model, shape, precision="fp32").flops
    assert flops["language backward"] > 40 * plain.per_token - flops["language"]


def test_mfu_of_a_window() -> None:
    window = Window(flops=FlopCount(1e6, 2e6, 3e6), peak=1e12, tokens=100, supervised=10, images=5)
    window.started -= 1.0
    line = window.line(Parallel(torch.device("cpu")), step=1, epoch=0.0)
    assert line["mfu"] == pytest.approx((100e6 + 20e6 + 15e6) / 1e12, rel=0.2, abs=5e-5)


def test_peaks_of_gpus() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB") == peak_of("A100") == 312e12
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("H200") == 989e12 and peak_of("NVIDIA H200 NVL") == 835e12
    assert peak_of("NVIDIA GeForce RTX 4090") is None
    assert all(name.startswith("NVIDIA ") for name in PEAK_FLOPS)


def test_shapes_are_never_computed_with() -> None:
    x, A, B = torch.zeros(1, 4, 2), -torch.ones(2, 3), torch.zeros(1, 4, 1, 3)
    call = ScanCall(x, x, A, B, B, None, None, None, True, None, None, (False,), None, False)
    backend = get_backend("shapes")
    assert backend.supports(ScanSpec()) == "it computes nothing; it is for planning"
    with pytest.raises(BackendError, match="'shapes' computes nothing and was given real tensors"):
        backend.scan(call)


@pytest.mark.parametrize("connector", ["mlp", "qmamba"])
def test_blocks_that_are_not_run_count_as_those_that_are(
    connector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"depth": 6} if connector == "qmamba" else {}
    model, _ = tiny_model(connector, **options)
    model.language_model.backbone.layers.extend(
        copy.deepcopy(model.language_model.backbone.layers[0]) for _ in range(5)
    )
    set_trainable(model, ["multi_modal_projector", "language_model"])
    few = FlopCount.of(model)
    monkeypatch.setattr(flops, "_counted", {})
    monkeypatch.setattr(flops, "block_counts", lambda blocks, **_: (len(blocks), len(blocks)))
    assert FlopCount.of(model) == few
    monkeypatch.setattr(flops, "_counted", {})
    set_trainable(model, ["multi_modal_projector", "language_model.backbone.layers.3"])
    assert FlopCount.of(model).per_token < few.per_token
