"""Faults of one process: what is said, what is kept, and with which exit code it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.cli import main
from vlmamba.config import dump_yaml
from vlmamba.errors import CheckpointError, ConfigError, DataError, TrainingError
from vlmamba.training import loop
from vlmamba.training.checkpoint import complete_checkpoints, latest_step
from vlmamba.training.config import TrainConfig
from vlmamba.training.metrics import read_log
from vlmamba.training.run import enable_checkpointing, fit_micro_batch, prepare_model, run

MakeConfig = Callable[..., TrainConfig]


def after(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something right after an optimizer step."""
    real = loop.advance

    def advance(training: Any, *rest: Any) -> None:
        real(training, *rest)
        if training.state.step == step:
            action()

    monkeypatch.setattr(loop, "advance", advance)


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the pixels of some forward passes, counted from 1, not a number."""
    real, count = loop.inputs_of, 0

    def poisoned(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
        nonlocal count
        inputs = real(batch, device)
        if "pixel_values" in inputs:
            count += 1
            if count in calls:
                inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return inputs

    monkeypatch.setattr(loop, "inputs_of", poisoned)


ONE_AT_MOST = {"batch.micro_batch_size": 4, "max_nonfinite_steps": 1}


class TestNotFinite:
    def test_step_is_left_out_and_written_down(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        poison(monkeypatch, {2, 4})
        result = run(make_config(ONE_AT_MOST))
        assert (result.outcome, result.step) == ("finished", 5)
        lines = [json.loads(x) for x in (result.run_dir / "nonfinite.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(len(line["samples"]) == 4 for line in lines)
        assert all("rows.json:row" in s["where"] for line in lines for s in line["samples"] if s["where"])
        log = read_log(result.run_dir / "log.jsonl")
        assert log[-1]["nonfinite"] == 2 and "nonfinite" not in log[0]
        left_out = {line["step"] for line in lines}
        assert {line["step"] for line in log if line["loss"] is None} == left_out
        state = json.loads((result.run_dir / "checkpoints/step-000005/state.json").read_text())
        assert state["nonfinite"] == 2

    def test_too_many_in_a_row(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        poison(monkeypatch, {2, 3})
        with pytest.raises(
            TrainingError, match=r"step \d: the loss is nan.* 2 such steps in a row are more than"
        ):
            run(make_config(ONE_AT_MOST))


def test_a_killed_data_worker(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    after(monkeypatch, 1, kill)
    changes = {"data.num_workers": 1, "save_every": 1, "epochs": 10, "data.order": "random"}
    # Torch reports it wherever the main thread is: waiting for the worker (DataError), or elsewhere (TrainingError).
    with pytest.raises(
        (DataError, TrainingError),
        match=r"(data worker process|that loads data) ended.*lower (--)?data.num_workers.*ontinue with --resume",
    ):
        run(make_config(changes))


def test_a_dead_worker_is_reported_once() -> None:
    with pytest.raises(TrainingError) as caught, loop.worker_deaths(), loop.worker_deaths():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert str(caught.value).count("a data worker process ended") == 1


@pytest.mark.ci
@pytest.mark.parametrize("switch", ["0", "1"])
def test_one_switch_for_all_bars(make_config: MakeConfig, tmp_path: Path, switch: str) -> None:
    changes = {"batch.micro_batch_size": None, "batch.tokens_per_micro_batch": 256}
    (tmp_path / "config.yaml").write_text(dump_yaml(make_config(changes)))
    command = [sys.executable, "-m", "vlmamba", "train", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "VLMAMBA_PROGRESS": switch}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bars = [name for name in ("measuring rows:", "train:", "Loading weights:") if name in done.stderr]
    assert bars == ([] if switch == "0" else ["measuring rows:", "train:", "Loading weights:"])
    assert ("%|" in done.stderr) is (switch == "1")


def test_usr1_ends_with_a_code_for_the_requeue_script(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    config = make_config()
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert main(["train", str(tmp_path / "config.yaml")]) == 75
    assert "stopped at step 3; continue with the same command and --resume" in capsys.readouterr().out
    assert latest_step(Path(config.output)) == 3
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    assert "done: 5 steps" in capsys.readouterr().out


def test_forced_to_go_on_with_other_settings(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(make_config())
    changed = make_config({"optim.lr": 0.5, "max_steps": 4})
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 -> 0.5(?s:.*)--force goes on with the new ones"):
        run(changed, resume=True)
    result = run(changed, resume=True, force=True)
    assert result.step == 4
    assert "going on with settings that differ" in caplog.text and "optim.lr: 0.01 -> 0.5" in caplog.text


def test_background_saving_is_the_same(make_config: MakeConfig) -> None:
    plain = run(make_config({"keep_last": 1, "keep_every": 2, "save_every": 1}, output="plain"))
    threaded = run(
        make_config({"keep_last": 1, "keep_every": 2, "save_every": 1, "save_async": True}, output="async")
    )
    for result in (plain, threaded):
        names = [p.name for p in complete_checkpoints(result.run_dir)]
        assert names == ["step-000002", "step-000004", "step-000005"]
    for name in ("model.safetensors", "optimizer.pt", "rng.pt"):
        first, second = (r.run_dir / "checkpoints/step-000004" / name for r in (plain, threaded))
        assert first.read_bytes() == second.read_bytes(), name


def test_full_disk_in_the_background(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmamba.training import checkpoint

    real = checkpoint.write_state

    def refuse(directory: Path, state: Any, generators: Any) -> None:
        if state.step > 2:
            raise OSError(28, "No space left on device")
        real(directory, state, generators)

    monkeypatch.setattr(checkpoint, "write_state", refuse)
    config = make_config({"save_async": True, "save_every": 1})
    with pytest.raises(CheckpointError, match=r"writing .*step-000003 failed: .*No space left on device"):
        run(config)
    assert [p.name for p in (Path(config.output) / "checkpoints").iterdir() if p.name[0] != "l"] == [
        "step-000001",
        "step-000002",
    ] or latest_step(Path(config.output)) == 2


def test_every_nth_block_is_recomputed(make_config: MakeConfig) -> None:
    model, _ = prepare_model(make_config(), torch.device("cpu"))
    layers = model.language_model.backbone.layers
    for every_nth, wanted in ((1, [True, True]), (2, [True, False])):
        enable_checkpointing(model.language_model, every_nth=every_nth)
        assert [layer.gradient_checkpointing for layer in layers] == wanted


def test_micro_batches_shrink_when_a_step_has_many_processes(make_config: MakeConfig) -> None:
    config = make_config({"batch.global_batch_size": 24, "batch.micro_batch_size": 8})
    assert fit_micro_batch(config, 3) is config
    assert fit_micro_batch(config, 2).batch.micro_batch_size == 6
    assert fit_micro_batch(config, 4).batch.micro_batch_size == 6
    assert fit_micro_batch(config, 24).batch.micro_batch_size == 1
    assert fit_micro_batch(config, 5) is config  # refused later, with the numbers
