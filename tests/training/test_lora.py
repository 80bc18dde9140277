"""LoRA: exact resume, merged exports that equal the adapted model, errors that name the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from vlmamba.common.load import load_model
from vlmamba.errors import CheckpointError, ConfigError
from vlmamba.testing import tiny_model
from vlmamba.training.checkpoint import latest_checkpoint, load_trained, read_trained
from vlmamba.training.config import GroupConfig, LoRAConfig, OptimConfig, TrainConfig
from vlmamba.training.init_from import init_from
from vlmamba.training.lora import add_lora, merged_state
from vlmamba.training.metrics import read_log
from vlmamba.training.optim import parameter_groups
from vlmamba.training.parts import set_trainable, trainable_parameters
from vlmamba.training.plan import Planner, PlanSettings
from vlmamba.training.run import prepare_model, run

MakeConfig = Callable[..., TrainConfig]
LORA: dict[str, Any] = {
    "train": ["multi_modal_projector"],
    "lora": {"match": ["language_model.*.mixer.*"], "rank": 2, "alpha": 4.0, "dropout": 0.1},
    "max_steps": 4,
}
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def inputs(model: Any) -> dict[str, torch.Tensor]:
    tokens = model.multi_modal_projector.num_tokens
    ids = torch.arange(tokens + 12).unsqueeze(0) % 300
    ids[:, :tokens] = model.config.image_token_id
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    return {"input_ids": ids, "pixel_values": pixels}


def adapted(match: list[str], **options: Any) -> Any:
    model, _ = tiny_model("mlp")
    set_trainable(model, ["multi_modal_projector"])
    add_lora(model, LoRAConfig(match=tuple(match), **options))
    return model


def test_every_projection_of_mamba_is_adapted_and_used() -> None:
    model = adapted(["re:language_model\\..*\\.(in|x|dt|out)_proj"], rank=2)
    trained = trainable_parameters(model)
    for kind in PROJECTIONS:
        assert any(f".{kind}.lora_B." in name for name in trained), kind
    assert all(name.startswith("multi_modal_projector.") or ".lora_" in name for name in trained)
    model.train()
    model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
    for name, parameter in trained.items():
        if ".lora_B." in name:  # B starts at zero: only its gradient shows that the layer is called
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_merged_weights_equal_the_adapted_model() -> None:
    model = adapted(["language_model.*.in_proj", "language_model.*.dt_proj"], rank=3, alpha=6.0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    plain, _ = tiny_model("mlp")
    before = plain(**inputs(plain)).logits
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    wanted = model(**inputs(model)).logits
    torch.testing.assert_close(plain(**inputs(plain)).logits, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - before).abs().max() > 1e-2


def test_resume_is_exact(make_config: MakeConfig) -> None:
    whole = make_config(LORA, output="whole")
    run(whole)
    halves = make_config({**LORA, "save_every": 2}, output="halves")
    first = _stopped_after(halves, 2)
    assert first == 2
    run(halves, resume=True)
    ends = [latest_checkpoint(Path(c.output)) for c in (whole, halves)]
    assert ends[0] is not None and ends[1] is not None
    one, other = (read_trained(end) for end in ends)
    assert one.keys() == other.keys() and any(".lora_A." in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in read_log(Path(c.output) / "log.jsonl")] for c in (whole, halves)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def _stopped_after(config: TrainConfig, steps: int) -> int:
    """Train, and stop as on a signal."""
    import threading

    from vlmamba.training import run as module

    stop = threading.Event()
    original = module.stop_signals

    class Stop:
        def __enter__(self) -> threading.Event:
            return stop

        def __exit__(self, *_: object) -> None: ...

    saved: list[int] = []

    class Saver(module.Checkpointer):
        def save(self, state: Any) -> None:
            super().save(state)
            saved.append(state.step)
            if state.step == steps:
                stop.set()

    checkpointer = module.Checkpointer
    module.stop_signals, module.Checkpointer = Stop, Saver  # type: ignore[misc, assignment]
    try:
        stop.clear()
        # the flag is looked at before the checkpoint of a step is written, so it is set by the step before
        config = config.replace(save_every=1)
        steps -= 1
        return run(config).step
    finally:
        module.stop_signals, module.Checkpointer = original, checkpointer  # type: ignore[misc]


def test_export_is_merged_with_the_adapter_beside(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(LORA)
    result = run(config)
    assert result.export is not None
    live, _ = prepare_model(config, torch.device("cpu"))
    newest = latest_checkpoint(Path(config.output))
    assert newest is not None
    load_trained(newest, live)
    live.eval()
    wanted = live(**inputs(live)).logits
    exported, _ = load_model(result.export)
    assert not any(".lora_" in name or "base_layer" in name for name in exported.state_dict())
    torch.testing.assert_close(exported(**inputs(exported)).logits, wanted, atol=1e-5, rtol=1e-4)

    base, _ = prepare_model(config.replace(lora=None), torch.device("cpu"))
    base.multi_modal_projector.load_state_dict(live.multi_modal_projector.state_dict())
    loaded = PeftModel.from_pretrained(base, str(result.export / "adapter")).eval()
    torch.testing.assert_close(loaded(**inputs(live)).logits, wanted, atol=1e-6, rtol=1e-5)

    following, _ = prepare_model(config.replace(lora=None), torch.device("cpu"))
    init_from(following, config.output)  # a later stage starts from the merged weights
    torch.testing.assert_close(following.eval()(**inputs(live)).logits, wanted, atol=1e-5, rtol=1e-4)
    (result.export / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is a run with adapters \(lora\) that has no export"):
        init_from(following, config.output)


def test_learning_rates_by_module() -> None:
    model = adapted(["language_model.*.in_proj"])
    groups = (GroupConfig(match="*.lora_B.*", lr=16.0), GroupConfig(match="multi_modal_projector", lr=0.5))
    found = parameter_groups(model, OptimConfig(lr=1e-3, groups=groups))
    rates = {name: group["lr"] for group in found for name in group["names"]}
    for name, rate in rates.items():
        wanted = 16e-3 if ".lora_B." in name else 5e-4 if name.startswith("multi_modal") else 1e-3
        assert rate == pytest.approx(wanted), name
    with pytest.raises(ConfigError, match=r"optim.groups: the pattern 'language_model.\*.lora_C' matches no"):
        parameter_groups(model, OptimConfig(lr=1.0, groups=(GroupConfig(match="language_model.*.lora_C"),)))


def test_wrong_layers_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"'language_model.\*.q_proj' matches no linear layer.*in_proj, x_proj"
    ):
        adapted(["language_model.*.q_proj"])
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with another layer"):
        adapted(["language_model.lm_head"])
    with pytest.raises(ConfigError, match="linear_1 would be adapted, but its own weights train"):
        adapted(["multi_modal_projector"])
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        LoRAConfig(match=("a",), rank=0)


def test_plan_counts_adapters(make_config: MakeConfig) -> None:
    full = Planner(make_config(), PlanSettings(gpus=1))
    lora = Planner(make_config(LORA), PlanSettings(gpus=1))
    assert lora.sizes.trained < full.sizes.trained / 2
    assert lora.memory(lora.chosen()).optimizer == 8 * lora.sizes.trained
