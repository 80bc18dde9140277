"""The loop: one loss whatever the micro-steps, errors that name samples, the log."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.errors import DataError, TrainingError
from vlmamba.training.checkpoint import RunState
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import build_data, open_sources
from vlmamba.training.loop import Training, accumulate_gradients
from vlmamba.training.metrics import Window, read_log
from vlmamba.training.optim import build_optimizer
from vlmamba.training.parallel import Parallel
from vlmamba.training.parts import trainable_parameters
from vlmamba.training.run import prepare_model, run
from vlmamba.training.schedule import Schedule

MakeConfig = Callable[..., TrainConfig]
GOLDEN = Path(__file__).with_name("golden_loss.json")


def prepare(config: TrainConfig, tmp_path: Path) -> Training:
    """A run just before its loop."""
    parallel = Parallel(torch.device("cpu"))
    model, processor = prepare_model(config, parallel.device)
    return Training(
        config=config,
        parallel=parallel,
        model=model,
        optimizer=build_optimizer(model, config.optim),
        schedule=Schedule(config.schedule, 5),
        loader=build_data(config, open_sources(config), processor, parallel, run_dir=tmp_path),
        state=RunState(total_steps=5),
        window=Window(),
        save=lambda state: None,
    )


def gradients(config: TrainConfig, tmp_path: Path) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and micro-steps of the first optimizer step."""
    training = prepare(config, tmp_path)
    step = next(iter(training.loader))
    losses = accumulate_gradients(training, step, step.num_supervised)
    found = {n: p.grad for n, p in trainable_parameters(training.model).items() if p.grad is not None}
    return float(losses.sum()), found, len(step.micro_batches)


def test_accumulation_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    cuts: list[tuple[dict[str, Any], int | None]] = [
        ({"batch.micro_batch_size": 8}, 1),
        ({"batch.micro_batch_size": 1}, 8),
        ({"batch.micro_batch_size": 4}, 2),
        ({"batch.micro_batch_size": "none", "batch.tokens_per_micro_batch": 150}, None),
    ]
    results = []
    for changes, micro_steps in cuts:
        config = make_config({"batch.global_batch_size": 8, **changes})
        loss, found, count = gradients(config, tmp_path)
        assert micro_steps is None or count == micro_steps
        results.append((loss, found))
    loss, reference = results[0]
    assert len(reference) > 10
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert other.keys() == reference.keys()
        for name, gradient in reference.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-5)


def test_loss_is_the_mean_over_supervised_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"batch.global_batch_size": 6, "batch.micro_batch_size": 1})
    training = prepare(config, tmp_path)
    step = next(iter(training.loader))
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64)
        for batch in step.micro_batches:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
            logits = training.model(**inputs).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits[labels != -100].double(), labels[labels != -100], reduction="sum"
            )
    loss = accumulate_gradients(training, step, step.num_supervised).sum()
    assert float(loss) == pytest.approx(float(total) / step.num_supervised, abs=1e-5)


def test_checkpointed_activations_give_the_same_gradients(make_config: MakeConfig, tmp_path: Path) -> None:
    for train in ("multi_modal_projector,language_model", "multi_modal_projector"):
        loss, plain, _ = gradients(make_config({"train": train}), tmp_path)
        again, recomputed, _ = gradients(
            make_config({"train": train, "gradient_checkpointing": "true"}), tmp_path
        )
        assert again == pytest.approx(loss, abs=1e-6)
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


def test_checkpointed_activations_are_recomputed_in_a_frozen_part(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    changes = {
        "train": "multi_modal_projector",
        "gradient_checkpointing": "true",
        "batch.micro_batch_size": 4,
    }
    training = prepare(make_config(changes), tmp_path)
    calls = []
    mixer = training.model.language_model.backbone.layers[0].mixer
    mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    step = next(iter(training.loader))
    accumulate_gradients(training, step, step.num_supervised)
    assert len(calls) == 2


def test_run_trains_exactly_the_parts(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"train": "multi_modal_projector"})
    before, _ = prepare_model(config, torch.device("cpu"))
    result = run(config)
    assert (result.outcome, result.step) == ("finished", 5)
    from vlmamba.common.load import load_model

    after, _ = load_model(result.run_dir)
    new = after.state_dict()
    changed = {n.partition(".")[0] for n, t in before.state_dict().items() if not torch.equal(t, new[n])}
    assert changed == {"multi_modal_projector"}


def test_log_lines(make_config: MakeConfig) -> None:
    result = run(make_config({"log_every": 2, "loggers": "tensorboard"}))
    lines = read_log(result.run_dir / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert set(lines[0]) == {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "skipped",
        "samples_per_s",
        "tokens_per_s_per_device",
        "mfu",
        "data_wait_pct",
        "padding_pct",
        "supervised_pct",
        "repaired",
        "repairs",
        "memory_gib",
        "seconds",
    }
    assert lines[0]["mfu"] is None and lines[-1]["epoch"] == 1.0
    assert 0 < lines[0]["supervised_pct"] < 100 and lines[0]["memory_gib"] > 0.05
    assert list((result.run_dir / "tensorboard").glob("events.*"))
    environment = json.loads((result.run_dir / "environment.json").read_text())["starts"]
    assert environment[0]["packages"]["torch"] == torch.__version__.split("+")[0]


def test_loss_falls_and_equals_the_golden_curve(make_config: MakeConfig) -> None:
    """The curve of a seeded run. A refactor must reproduce it; a change of behaviour rewrites it on purpose
    (VLMAMBA_UPDATE_GOLDEN=1).
    """
    changes = {"epochs": 2, "data.order": "modality_length", "optim.weight_decay": 0.1, "save_every": 0}
    result = run(make_config(changes))
    losses = [line["loss"] for line in read_log(result.run_dir / "log.jsonl")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    if os.environ.get("VLMAMBA_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps([round(x, 6) for x in losses]) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-4)


def test_bf16_keeps_masters_and_casts_frozen_parts(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"precision": "bf16", "train": "multi_modal_projector"})
    training = prepare(config, tmp_path)
    dtypes = {name: p.dtype for name, p in training.model.named_parameters()}
    assert (
        dtypes["multi_modal_projector.linear_1.weight"] == torch.float32
        if ("multi_modal_projector.linear_1.weight" in dtypes)
        else True
    )
    assert all(d == torch.float32 for n, d in dtypes.items() if n.startswith("multi_modal_projector"))
    assert all(d == torch.bfloat16 for n, d in dtypes.items() if n.startswith("vision_tower"))
    assert dtypes["language_model.backbone.layers.0.mixer.in_proj.weight"] == torch.bfloat16
    assert dtypes["language_model.backbone.layers.0.mixer.A_log"] == torch.float32
    head = training.model.language_model.lm_head.weight
    assert head is training.model.language_model.backbone.embeddings.weight
    loss32, _, _ = gradients(make_config({"train": "multi_modal_projector"}), tmp_path)
    step = next(iter(training.loader))
    loss16 = float(accumulate_gradients(training, step, step.num_supervised).sum())
    assert loss16 == pytest.approx(loss32, abs=0.05)


def test_worker_processes_change_nothing(make_config: MakeConfig) -> None:
    """Nor do the logger and how often is saved."""
    alone = run(make_config({"max_steps": 3}, output="alone"))
    changes = {"data.num_workers": 2, "save_every": 1, "loggers": "tensorboard", "max_steps": 3}
    helped = run(make_config(changes, output="helped"))
    first, second = (read_log(r.run_dir / "log.jsonl") for r in (alone, helped))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_bf16_runs(make_config: MakeConfig, optimizer: str) -> None:
    changes = {"precision": "bf16", "optim.name": optimizer, "optim.weight_decay": 0.1, "max_steps": 3}
    result = run(make_config(changes))
    losses = [line["loss"] for line in read_log(result.run_dir / "log.jsonl")]
    assert losses[-1] < losses[0]


def test_not_finite_names_step_and_samples(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmamba.training import loop

    real, seen = loop.inputs_of, []

    def poisoned(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
        inputs = real(batch, device)
        if "pixel_values" in inputs:
            seen.append(list(batch["ids"]))
            if len(seen) == 5:
                inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return inputs

    monkeypatch.setattr(loop, "inputs_of", poisoned)
    config = make_config({"batch.micro_batch_size": 1, "batch.global_batch_size": 2})
    with pytest.raises(
        TrainingError, match=r"step \d+: the loss is nan. Samples: 'row-\d+' \(.*rows.json:row"
    ) as caught:
        run(config)
    assert repr(seen[4][0]) in str(caught.value)
    assert str(caught.value).count("'row-") == 1


def test_step_without_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    from vlmamba.training.loop import optimizer_step

    training = prepare(make_config(), tmp_path)
    step = next(iter(training.loader))
    object.__setattr__(step, "num_supervised", 0)
    with pytest.raises(TrainingError, match="step 1: none of its samples has a supervised token: "):
        optimizer_step(training, step)


def test_bad_rows_are_skipped_within_the_budget(make_config: MakeConfig, task: Path, tmp_path: Path) -> None:
    rows = json.loads((task / "rows.json").read_text())
    rows[3]["image"] = "not-there.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    changes = {"data.sources.0.annotations": str(tmp_path / "bad.json"), "data.max_bad_fraction": 0.2}
    result = run(make_config(changes))
    assert read_log(result.run_dir / "log.jsonl")[-1]["skipped"] == 1
    listed = (result.run_dir / "bad_samples.jsonl").read_text()
    assert "not-there.png" in listed and "row-3" in listed
    with pytest.raises(DataError, match=r"(?s)1 of 20 rows cannot be used .*not-there.png"):
        run(make_config({**changes, "data.max_bad_fraction": 0.0}, output="strict"))
