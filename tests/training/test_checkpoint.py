"""Checkpoints: exact resume, whole or not at all, refusal of another run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlmamba.config import dump_yaml
from vlmamba.errors import CheckpointError, ConfigError, DataError
from vlmamba.training import loop
from vlmamba.training.checkpoint import (
    RunState,
    complete_checkpoints,
    frozen_fingerprint,
    latest_checkpoint,
    latest_step,
    rng_state,
    set_rng_state,
    trained_tensors,
)
from vlmamba.training.config import OptimConfig, TrainConfig
from vlmamba.training.metrics import read_log
from vlmamba.training.optim import build_optimizer
from vlmamba.training.parallel import Parallel
from vlmamba.training.run import run
from vlmamba.training.saving import Checkpointer, restore

MakeConfig = Callable[..., TrainConfig]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    return load_file(newest / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir / "log.jsonl")]


@pytest.fixture(scope="module")
def dropout_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with attention dropout: its training depends on the random state."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmamba.testing import tiny_tokenizer

    root = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=368,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_dropout=0.3,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(root)
    tiny_tokenizer().save_pretrained(root)
    return root


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@contextmanager
def interruption(monkeypatch: pytest.MonkeyPatch, at_step: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something right after an optimizer step, before its checkpoint."""
    real = loop.advance

    def advance(training: Any, *rest: Any) -> None:
        real(training, *rest)
        if training.state.step == at_step:
            action()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", advance)
        yield


def fail() -> None:
    raise Interrupted


class TestResume:
    def test_in_the_middle_of_the_second_epoch(
        self, make_config: MakeConfig, dropout_language: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Optimizer, schedule, order of the data and dropout go on as if nothing had happened."""
        changes = {"epochs": 2, "model.language.path": str(dropout_language), "optim.name": "radam"}
        whole = run(make_config(changes, output="whole"))
        config = make_config(changes, output="parts")
        with interruption(monkeypatch, 7, fail), pytest.raises(Interrupted):
            run(config)
        assert latest_step(Path(config.output)) == 6
        assert len(losses(Path(config.output))) == 6
        torch.manual_seed(999)
        resumed = run(config, resume=True)
        assert resumed.step == whole.step == 10
        assert_equal(final_tensors(whole.run_dir), final_tensors(resumed.run_dir))
        assert losses(whole.run_dir) == losses(resumed.run_dir)
        first, second = (r.run_dir / "checkpoints/step-000010/state.json" for r in (whole, resumed))
        one, other = json.loads(first.read_text()), json.loads(second.read_text())
        assert one.pop("config") | {"output": 0} == other.pop("config") | {"output": 0}
        assert one.pop("sha256") != other.pop("sha256")  # of all, hence of the name of the folder
        assert one == other  # the digest of every file
        starts = json.loads((resumed.run_dir / "environment.json").read_text())["starts"]
        assert [s["start_step"] for s in starts] == [0, 6]

    @pytest.mark.ci
    def test_killed_process(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """SIGKILL after step 3, with the last checkpoint at step 2; then the same command again."""
        whole = run(make_config(output="whole"))
        config = make_config(output="killed")
        (tmp_path / "config.yaml").write_text(dump_yaml(config))
        program = (
            "import os, signal, sys\n"
            "from vlmamba.config import load_yaml\n"
            "from vlmamba.training import loop\n"
            "from vlmamba.training.run import run\n"
            "real = loop.advance\n"
            "def advance(training, *rest):\n"
            "    real(training, *rest)\n"
            "    if training.state.step == 3:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "loop.advance = advance\n"
            "run(load_yaml(sys.argv[1]), resume=True)\n"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", program, str(tmp_path / "config.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert latest_step(Path(config.output)) == 2
        resumed = run(config, resume=True)
        assert_equal(final_tensors(whole.run_dir), final_tensors(resumed.run_dir))
        assert losses(whole.run_dir) == losses(resumed.run_dir)

    def test_sigterm_saves_and_ends(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = run(make_config(output="whole"))
        config = make_config(output="stopped")
        before = signal.getsignal(signal.SIGTERM)
        with interruption(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            stopped = run(config)
        assert signal.getsignal(signal.SIGTERM) == before
        assert (stopped.outcome, stopped.step, stopped.export) == ("stopped", 3, None)
        assert latest_step(stopped.run_dir) == 3
        resumed = run(config, resume=True)
        assert resumed.outcome == "finished"
        assert_equal(final_tensors(whole.run_dir), final_tensors(resumed.run_dir))

    def test_finished_run_and_free_keys(self, make_config: MakeConfig) -> None:
        first = run(make_config())
        again = run(make_config({"log_every": 3, "save_every": 1, "keep_last": 5}), resume=True)
        assert again.step == first.step and again.export is not None

    def test_other_settings_are_refused(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make_config()
        with interruption(monkeypatch, 3, fail), pytest.raises(Interrupted):
            run(config)
        with pytest.raises(ConfigError) as caught:
            run(make_config({"optim.lr": 0.5, "epochs": 2, "data.order": "length"}), resume=True)
        message = str(caught.value)
        assert "config differs" in message
        for line in ("optim.lr: 0.01 -> 0.5", "epochs: 1 -> 2", "data.order: random -> length"):
            assert f"  {line}\n" in message

    def test_other_frozen_weights_are_refused(
        self, make_config: MakeConfig, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(weights / "vision", tmp_path / "vision")
        config = make_config({"model.vision.path": str(tmp_path / "vision")})
        with interruption(monkeypatch, 3, fail), pytest.raises(Interrupted):
            run(config)
        tensors = load_file(tmp_path / "vision" / "model.safetensors")
        name = next(n for n in tensors if n.endswith("layers.0.mlp.fc1.weight"))
        tensors[name] += 0.1
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "vision" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="the frozen weights are not those that"):
            run(config, resume=True)

    def test_other_data_is_refused(
        self, make_config: MakeConfig, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = json.loads((task / "rows.json").read_text())
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = make_config({"data.sources.0.annotations": str(tmp_path / "rows.json")})
        with interruption(monkeypatch, 3, fail), pytest.raises(Interrupted):
            run(config)
        (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
        with pytest.raises(DataError, match="the data is not what the checkpoint was made with"):
            run(config, resume=True)
        (tmp_path / "rows.json").write_text(json.dumps(rows[:-6]))
        with pytest.raises(CheckpointError, match="belongs to a run of 5 steps, now there are 4"):
            run(config, resume=True)


class TestRunFolder:
    def test_occupied(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        config = make_config()
        with interruption(monkeypatch, 1, fail), pytest.raises(Interrupted):
            run(config)
        with pytest.raises(
            ConfigError, match=r"stopped before its first checkpoint. Start it anew with --resume"
        ):
            run(config)
        assert run(config, resume=True).step == 5
        with pytest.raises(
            ConfigError, match=r"holds a run with a checkpoint at step 5. Continue it with --resume"
        ):
            run(config)

    def test_something_else(self, make_config: MakeConfig) -> None:
        config = make_config()
        Path(config.output).mkdir()
        (Path(config.output) / "thesis.tex").write_text("x")
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"is not empty and holds no run \(thesis.tex\)"):
                run(config, resume=resume)

    def test_not_writable(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"cannot be written: .* Choose another --output"):
            run(make_config({"output": str(tmp_path / "file" / "run")}))


def save_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, *, keep_last: int
) -> Path:
    parallel = Parallel(torch.device("cpu"))
    Checkpointer(run_dir, parallel, model, optimizer, keep_last=keep_last).save(state)
    return run_dir / f"checkpoints/step-{state.step:06d}"


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    return restore(path, Parallel(torch.device("cpu")), model, optimizer)


@pytest.fixture
def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    return model, optimizer


class TestWriting:
    def test_what_trains_is_saved(
        self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
    ) -> None:
        model, optimizer = small
        assert set(trained_tensors(model)) == {
            "0.weight",
            "0.bias",
            "1.weight",
            "1.bias",
            "1.running_mean",
            "1.running_var",
            "1.num_batches_tracked",
        }
        path = save_checkpoint(tmp_path, model, optimizer, RunState(step=3), keep_last=2)
        saved = {n: t.clone() for n, t in model.state_dict().items()}
        with torch.no_grad():
            for tensor in trained_tensors(model).values():
                tensor.zero_()
        assert load_checkpoint(path, model, optimizer).step == 3
        assert_equal(saved, model.state_dict())

    def test_pointer_and_keep_last(
        self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
    ) -> None:
        for step in (1, 2, 3, 4):
            save_checkpoint(tmp_path, *small, RunState(step=step), keep_last=2)
        assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
        assert (tmp_path / "checkpoints/latest").read_text() == "step-000004\n"
        save_checkpoint(tmp_path, *small, RunState(step=4), keep_last=0)
        assert len(complete_checkpoints(tmp_path)) == 2 and latest_step(tmp_path) == 4
        (tmp_path / "checkpoints/latest").write_text("step-000003\n")
        assert latest_step(tmp_path) == 3
        (tmp_path / "checkpoints/latest").unlink()
        assert latest_step(tmp_path) == 4

    def test_full_disk(self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
        """The system refuses the write, below torch and safetensors; every file of a checkpoint is tried."""
        model, optimizer = small
        save_checkpoint(tmp_path, model, optimizer, RunState(step=1), keep_last=1)
        kept = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/step-000001").iterdir()}
        sizes = sorted(len(content) for content in kept.values())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limit in (sizes[0] // 2, sizes[1] - 1, sizes[2] - 1, sizes[3] - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(
                    CheckpointError, match=r"writing .*step-000002 failed: .*GiB free on that disk"
                ):
                    save_checkpoint(tmp_path, model, optimizer, RunState(step=2), keep_last=1)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]
        assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/step-000001").iterdir()} == kept
        assert latest_step(tmp_path) == 1

    def test_kill_at_every_moment_of_writing(
        self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the last rename or removal was, `latest` names a complete checkpoint."""
        model, optimizer = small
        operations = [(Path, "rename"), (Path, "replace"), (shutil, "rmtree")]

        def write(root: Path, stop_at: int) -> bool:
            save_checkpoint(root, model, optimizer, RunState(step=1), keep_last=1)
            count = 0
            with monkeypatch.context() as patch:
                for owner, name in operations:
                    real = getattr(owner, name)

                    def counted(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
                        nonlocal count
                        count += 1
                        if count >= stop_at:  # nothing touches the disk from here on, as after a kill
                            raise Interrupted
                        return _real(*args, **kwargs)

                    patch.setattr(owner, name, counted)
                try:
                    save_checkpoint(root, model, optimizer, RunState(step=2), keep_last=1)
                except Interrupted:
                    return False
            return True

        for stop_at in range(1, 40):
            root = tmp_path / str(stop_at)
            finished = write(root, stop_at)
            newest = latest_checkpoint(root)
            assert newest is not None and {p.name for p in newest.iterdir()} == {
                "model.safetensors",
                "optimizer.pt",
                "rng.pt",
                "state.json",
            }
            assert load_checkpoint(newest, model, optimizer).step in (1, 2)
            if finished:
                return
        raise AssertionError("never finished")

    def test_damaged(self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, *small, RunState(step=1), keep_last=1)
        (path / "state.json").write_text('{"step": 1, "colour": "red"}')
        with pytest.raises(CheckpointError, match=r"state.json is damaged or of another version .*colour"):
            load_checkpoint(path, *small)

    def test_pickles_are_not_run(
        self, small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
    ) -> None:
        path = save_checkpoint(tmp_path, *small, RunState(step=1), keep_last=1)
        torch.save(Interrupted(), path / "optimizer.pt")
        with pytest.raises(CheckpointError, match=r"optimizer.pt is not what was written \(SHA-256"):
            load_checkpoint(path, *small)
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(
            json.dumps({k: v for k, v in state.items() if k not in ("files", "sha256")})
        )
        with pytest.raises(CheckpointError, match="holds more than weights"):  # as of an older version
            load_checkpoint(path, *small)


def test_random_generators_round_trip(tmp_path: Path) -> None:
    import random

    torch.save(rng_state(), tmp_path / "rng.pt")
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn


def test_fingerprint() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    before = frozen_fingerprint(model)
    with torch.no_grad():
        model[1].weight += 1
        assert frozen_fingerprint(model) == before
        model[0].weight[1, 2] += 1
    assert frozen_fingerprint(model) != before
