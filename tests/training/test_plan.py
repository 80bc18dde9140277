"""Plans: the memory they name is what torch's allocator hands out, and their advice fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MambaConfig

from vlmamba.cli import main
from vlmamba.errors import ConfigError
from vlmamba.models.language import MambaLM
from vlmamba.ssm.backends import cpu_build
from vlmamba.testing import tiny_model, tiny_tokenizer
from vlmamba.training.config import TrainConfig
from vlmamba.training.optim import build_optimizer
from vlmamba.training.plan import DDP, FSDP_FULL, FSDP_GRADS, Choice, Planner, PlanSettings
from vlmamba.training.plan_data import data_facts
from vlmamba.training.run import enable_checkpointing, prepare_model

MakeConfig = Callable[..., TrainConfig]
LENGTH, ROWS, SUPERVISED = 192, 4, 0.5
LORA = {"train": ["multi_modal_projector"], "lora": {"match": ["language_model.*.in_proj"], "rank": 4}}
FULL_SIZE = {
    "model.vision.path": "checkpoints/none/siglip-so400m-patch14-384",
    "model.vision.preset": "siglip-so400m-patch14-384",
    "model.language.path": "checkpoints/none/mamba-2.8b",
    "model.language.preset": "2.8b",
    "model.connector.name": "vss-l2",
    "batch.global_batch_size": 128,
    "batch.micro_batch_size": 16,
    "precision": "bf16",
    "data.max_length": 2048,
}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough that its tensors outweigh what surrounds them."""
    path = tmp_path_factory.mktemp("language")
    config = MambaConfig(
        vocab_size=1024, hidden_size=96, num_hidden_layers=6, pad_token_id=0, eos_token_id=0, bos_token_id=0
    )
    MambaLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def allocated(events: Any) -> int:
    """Most bytes that the CPU allocator had handed out at once."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def measured(config: TrainConfig) -> int:
    """Bytes of weights, optimizer states and the fullest moment of a training step that is really run."""
    model, _ = prepare_model(config, torch.device("cpu"))
    optimizer = build_optimizer(model, config.optim)
    tokens = model.multi_modal_projector.num_tokens
    ids = torch.full((ROWS, LENGTH), 5)
    ids[:, :tokens] = model.config.image_token_id
    labels = ids.clone()
    labels[:, : LENGTH - round((LENGTH - tokens) * SUPERVISED)] = -100
    batch = {"input_ids": ids, "labels": labels}

    def step() -> None:
        model(**batch, pixel_values=torch.zeros(ROWS, 3, 16, 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kept = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values() if v.ndim)]
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    return sum(t.numel() * t.element_size() for t in kept) + allocated(results.events())


@pytest.mark.parametrize(
    "changes",
    [
        {"model.connector.name": "mlp"},
        {"model.connector.name": "vss-l2", "gradient_checkpointing": True},
        {"model.connector.name": "mlp", "gradient_checkpointing": True, "checkpoint_every_nth": 2},
        {"model.connector.name": "vss-mlp", "train": ["multi_modal_projector"]},
        {"train": ["multi_modal_projector"], "gradient_checkpointing": True},
        LORA,
        {**LORA, "gradient_checkpointing": True},
    ],
    ids=[
        "all",
        "recomputed",
        "every second block recomputed",
        "stage 1",
        "stage 1 recomputed",
        "lora",
        "lora recomputed",
    ],
)
def test_memory_is_that_of_the_allocator(
    changes: dict[str, Any], make_config: MakeConfig, language: Path
) -> None:
    config = make_config(
        {
            **changes,
            "model.language.path": str(language),
            "batch.global_batch_size": ROWS,
            "batch.micro_batch_size": ROWS,
        }
    )
    planner = Planner(config, PlanSettings(gpus=1, length=LENGTH, supervised=SUPERVISED))
    total = planner.memory(planner.chosen()).total
    assert total == pytest.approx(measured(config), rel=0.15)


@pytest.mark.ci
def test_full_size_without_files(make_config: MakeConfig) -> None:
    planner = Planner(make_config({**FULL_SIZE, "gradient_checkpointing": True}), PlanSettings())
    chosen = planner.chosen()
    assert chosen == Choice(FSDP_GRADS, 16, 1) and planner.strategies()[0] == DDP
    parameters = 2_768_345_600 + 84_000_000  # language model and connector, about
    assert planner.sizes.trained == pytest.approx(parameters, rel=0.02)
    ddp = planner.memory(dataclasses.replace(chosen, strategy=DDP))
    assert ddp.optimizer == 8 * planner.sizes.trained and ddp.gradients == 4 * planner.sizes.trained
    cut = planner.memory(chosen)
    assert cut.optimizer < ddp.optimizer / 7 and cut.total < 0.55 * ddp.total
    assert planner.memory(dataclasses.replace(chosen, strategy=FSDP_FULL)).parameters < cut.parameters / 2
    halved = planner.memory(dataclasses.replace(chosen, micro=8))
    assert halved.activations == pytest.approx(cut.activations / 2, rel=0.1)


@pytest.mark.ci
def test_advice_is_computed_and_fits(make_config: MakeConfig) -> None:
    small = {**FULL_SIZE, "model.language.preset": "130m", "data.max_length": 1024}
    planner = Planner(make_config(small), PlanSettings(memory=8))
    now = planner.chosen()
    assert not planner.fits(now)
    found = planner.fitting()
    assert found and all(planner.fits(choice) for choice in found)
    smaller = next(c for c in found if c.micro != now.micro and c.strategy == now.strategy)
    bigger = min((m for m in (1, 2, 4, 8, 16) if m > smaller.micro), default=16)
    assert not planner.fits(dataclasses.replace(now, micro=bigger))


def test_hours(make_config: MakeConfig) -> None:
    planner = Planner(make_config(FULL_SIZE), PlanSettings(gpu="H100", mfu=0.5, text_tokens=271))
    flops = planner.flops
    per_sample = flops.per_token * 1000 + flops.per_supervised * 135.5 + flops.per_image
    assert planner.flops_of(1) == pytest.approx(per_sample)
    assert planner.seconds(10) == pytest.approx(10 * per_sample / (8 * 989e12 * 0.5))
    weights = 2.768e9  # 6 FLOPs a weight and token, and the scan beside them
    assert 6 * weights * 0.95 < flops.per_token < 6 * weights * 1.1


def test_facts_of_the_data(make_config: MakeConfig) -> None:
    facts = data_facts(make_config())
    assert facts.samples == 20 and facts.rows == "20 rows, 1 epoch(s)"
    assert facts.text_tokens is not None and 3 < facts.text_tokens < 100
    assert facts.supervised is not None and 0 < facts.supervised < 1
    published = data_facts(make_config({"data.sources": "[{annotations: none.json, expected_rows: 1000}]"}))
    assert published.samples == 1000 and published.rows == "1,000 rows as published, 1 epoch(s)"
    assert published.text_tokens is None


def test_steps_of_tokens(make_config: MakeConfig) -> None:
    tokens = {"data.pack_length": 256, "batch.tokens_per_step": 1024, "max_steps": 2}
    config = make_config(tokens)
    facts = data_facts(config)
    assert (facts.samples, facts.tokens) == (20, 2048)
    planner = Planner(config, PlanSettings(gpus=2, text_tokens=240.0))
    assert planner.micro_steps(planner.micro) == 2  # 4 packed rows a step
    assert planner.samples(facts.samples, facts.tokens) == 2048 / (planner.visual + 240)
    assert planner.samples(3.0, facts.tokens) == 3.0 and planner.samples(20.0, None) == 20.0
    steps = data_facts(make_config({**tokens, "epochs": None}))
    assert (steps.samples, steps.tokens, steps.rows) == (None, 2048, "2 steps of 1,024 tokens")
    with pytest.raises(ConfigError, match="makes 4 packed rows, which 3 processes cannot share equally"):
        Planner(config, PlanSettings(gpus=3))


@pytest.mark.ci
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["plan", "train/vl_mamba.py:pretrain", "--gpus", "1"]
    assert main([*recipe, "--memory", "80", "--batch.micro_batch_size", "4"]) == 0
    text = capsys.readouterr().out
    assert "* single" in text and "fits, with" in text and "558,128 rows as published" in text


@pytest.mark.slow
def test_command_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train/vl_mamba.py:pretrain", "--gpus", "1", "--memory", "2"]) == 1
    assert "nor does it with one row a micro-batch" in capsys.readouterr().out


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="the peak of the GPU 'K80' is not known"):
        PlanSettings(gpu="K80")
    with pytest.raises(ConfigError, match="gpus must be positive, got 0"):
        PlanSettings(gpus=0)


@pytest.mark.ci
def test_first_native_scan_inside_a_recomputed_layer() -> None:
    model, _ = tiny_model("mlp")
    model.train()
    enable_checkpointing(model.language_model)
    cpu_build.forget()  # the library is loaded and checked again, now from within the first block
    ids = torch.full((1, 20), 5)
    ids[:, :16] = model.config.image_token_id
    loss = model(input_ids=ids, labels=ids, pixel_values=torch.zeros(1, 3, 16, 16)).loss
    loss.backward()
    assert torch.isfinite(loss)
