"""Evaluation during training and the running mean of the weights: neither changes the training, both resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.common.load import load_model
from vlmamba.errors import ConfigError, MissingFileError, TrainingError
from vlmamba.training import loop
from vlmamba.training.checkpoint import complete_checkpoints, read_trained, read_whole
from vlmamba.training.config import TrainConfig
from vlmamba.training.evaluations import find_function
from vlmamba.training.metrics import read_log
from vlmamba.training.run import run

MakeConfig = Callable[..., TrainConfig]
PROGRAM = """
import random
import torch

def probe(model, processor, *, step, scale=1.0):
    assert not model.training and not torch.is_grad_enabled()
    random.random(), torch.rand(7)  # must not reach the training
    return {"score": scale * step, "tokens": processor.num_image_tokens}

def broken(model, processor, *, step):
    raise ValueError("no pictures")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "measure.py"
    path.write_text(PROGRAM)
    return path


def final(config: TrainConfig) -> dict[str, torch.Tensor]:
    return read_trained(complete_checkpoints(Path(config.output))[-1])


def with_probe(program: Path, **more: Any) -> dict[str, Any]:
    return {"evaluations": [{"function": f"{program}:probe", "every": 2, "options": {"scale": 0.5}}], **more}


def test_training_is_the_same_with_evaluations(make_config: MakeConfig, program: Path) -> None:
    plain, watched = make_config(output="plain"), make_config(with_probe(program), output="watched")
    run(plain)
    run(watched)
    first, second = final(plain), final(watched)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = read_log(Path(watched.output) / "eval.jsonl")
    assert [(line["step"], line["score"], line["tokens"]) for line in lines] == [
        (2, 1, 16),
        (4, 2, 16),
        (5, 2.5, 16),
    ]
    assert len(read_log(Path(watched.output) / "log.jsonl")) == 5  # whose lines stay those of training


def test_modes_are_those_of_training_again(
    make_config: MakeConfig, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen language model through which gradients flow recomputes its layers: after an evaluation as before."""
    modes: list[dict[str, bool]] = []
    real = loop.optimizer_step

    def recorded(training: Any, step: Any) -> tuple[float, float]:
        modes.append({name: module.training for name, module in training.model.named_modules()})
        return real(training, step)

    monkeypatch.setattr(loop, "optimizer_step", recorded)
    for trained in (["multi_modal_projector"], ["multi_modal_projector", "language_model", "vision_tower"]):
        modes.clear()
        changes = {"train": trained, "gradient_checkpointing": True}
        run(make_config(with_probe(program, **changes), output=f"run-{len(trained)}"))
        assert len(modes) == 5 and all(each == modes[0] for each in modes)
        assert any(on for name, on in modes[0].items() if name.startswith("language_model."))
        assert modes[0]["vision_tower"] is (len(trained) == 3)


def test_each_evaluation_is_logged_once_after_a_resume(make_config: MakeConfig, program: Path) -> None:
    config = make_config(with_probe(program, save_every=1, keep_last=0))
    run(config)
    folder = Path(config.output)
    for checkpoint in complete_checkpoints(folder)[3:]:  # as if killed during step 4
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    (folder / "checkpoints" / "latest").write_text("step-000003\n")
    run(config, resume=True)
    assert [line["step"] for line in read_log(folder / "eval.jsonl")] == [2, 4, 5]


def test_a_failing_evaluation_ends_the_run_with_its_name(make_config: MakeConfig, program: Path) -> None:
    config = make_config({"evaluations": [{"function": f"{program}:broken", "every": 3}]})
    with pytest.raises(
        TrainingError, match=r"step 3: the evaluation .*measure.py:broken failed: ValueError: no pic"
    ):
        run(config)
    assert run(config.replace(evaluations=()), resume=True).step == 5  # evaluations may be left out on resume


def test_functions_are_found_when_the_run_starts(make_config: MakeConfig, program: Path) -> None:
    assert callable(find_function(f"{program}:probe", {}))
    with pytest.raises(ConfigError, match="cannot be called as basename"):
        find_function("os.path:basename", {})
    with pytest.raises(ConfigError, match=r"measure.py has no function 'prob'\. Did you mean 'probe'"):
        find_function(f"{program}:prob", {})
    with pytest.raises(
        ConfigError, match=r"cannot be called as probe\(model, processor, step=..., size=...\)"
    ):
        find_function(f"{program}:probe", {"size": 3})
    with pytest.raises(MissingFileError, match=r"there is no file none\.py"):
        find_function("none.py:probe", {})
    with pytest.raises(ConfigError, match="No module named 'no_such_package'"):
        find_function("no_such_package:probe", {})
    with pytest.raises(ConfigError, match=r"write file\.py:function or package.module:function"):
        find_function("measure", {})
    config = make_config({"evaluations": [{"function": f"{program}:missing"}]})
    with pytest.raises(ConfigError, match="has no function 'missing'"):
        run(config)
    assert not (Path(config.output) / "log.jsonl").exists()


def test_mean_of_the_weights(make_config: MakeConfig) -> None:
    decay = 0.75
    config = make_config({"ema": decay, "save_every": 1, "keep_last": 0})
    result = run(config)
    plain = make_config(output="plain")
    run(plain)
    steps = [read_whole(path) for path in complete_checkpoints(Path(config.output))]
    first, last = steps[0][0], steps[-1][0]
    assert all(torch.equal(last[name], tensor) for name, tensor in final(plain).items())
    for name in first:
        mean = first[name]
        for weights, _ in steps[1:]:
            mean = mean + (1 - decay) * (weights[name] - mean)
        torch.testing.assert_close(steps[-1][1][name]["ema"], mean, atol=1e-6, rtol=1e-6)
    assert result.export is not None
    exported, _ = load_model(result.export.with_name("export_ema"))
    name = "multi_modal_projector.linear_1.weight"
    torch.testing.assert_close(exported.state_dict()[name], steps[-1][1][name]["ema"])
    assert not torch.allclose(exported.state_dict()[name], last[name], atol=1e-5)


def test_mean_resumes_exactly(make_config: MakeConfig) -> None:
    config = make_config({"ema": 0.9, "save_every": 1, "keep_last": 0})
    run(config)
    whole = read_whole(complete_checkpoints(Path(config.output))[-1])[1]
    for checkpoint in complete_checkpoints(Path(config.output))[2:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    (Path(config.output) / "checkpoints" / "latest").write_text("step-000002\n")
    run(config, resume=True)
    again = read_whole(complete_checkpoints(Path(config.output))[-1])[1]
    assert all(torch.equal(again[name]["ema"], values["ema"]) for name, values in whole.items())


def test_wrong_settings(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"ema is a decay between 0 and 1, or none, got 1\.5"):
        make_config({"ema": 1.5})
    with pytest.raises(ConfigError, match="ema cannot be had with parallel zero2"):
        make_config({"ema": 0.9, "parallel": "zero2"})
    with pytest.raises(ConfigError, match=r"evaluations\.every must be positive, got 0"):
        make_config({"evaluations": [{"function": "a:b", "every": 0}]})
    assert json.loads(json.dumps(make_config().to_dict()))["evaluations"] == []
