"""DeepSpeed: what its engine is given, and, where it is installed, that it is one strategy among the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.errors import ConfigError, MissingDependencyError, MissingFileError
from vlmamba.training.checkpoint import latest_checkpoint, read_whole
from vlmamba.training.metrics import read_log
from vlmamba.training.parallel import make_parallel
from vlmamba.training.parallel.zero import engine_settings

ROOT = Path(__file__).parents[2]


class TestSettings:
    @pytest.fixture(autouse=True)
    def in_the_clone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)

    @pytest.mark.parametrize("stage", [2, 3])
    def test_the_file_is_completed_by_the_run(self, make_config: Callable[..., Any], stage: int) -> None:
        config = make_config({"parallel": f"zero{stage}", "precision": "bf16", "grad_clip": 0.5})
        settings = engine_settings(config, stage)
        file = json.loads((ROOT / f"train/deepspeed/zero{stage}.json").read_text())
        assert file.items() <= settings.items() and settings["zero_optimization"]["stage"] == stage
        assert settings["gradient_clipping"] == 0.5 and settings["gradient_accumulation_steps"] == 1
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        assert settings["torch_autocast"] == autocast
        assert "offload_optimizer" not in settings["zero_optimization"]
        changed = make_config({"sharding.cpu_offload": True, "grad_clip": "none"})
        settings = engine_settings(changed, stage)
        assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert settings["gradient_clipping"] == 0.0 and not settings["torch_autocast"]["enabled"]

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            (None, MissingFileError, "sharding.deepspeed: there is no file"),
            ("{", ConfigError, "is not JSON"),
            ("[1]", ConfigError, "holds a list, not an object"),
            (
                '{"zero_optimization": {"stage": 3}}',
                ConfigError,
                "is for ZeRO stage 3, but parallel is zero2",
            ),
            (
                '{"optimizer": {}, "bf16": {}}',
                ConfigError,
                r"sets optimizer, bf16, which the run's own settings",
            ),
        ],
    )
    def test_files_that_cannot_work(
        self,
        make_config: Callable[..., Any],
        tmp_path: Path,
        text: str | None,
        error: type[Exception],
        message: str,
    ) -> None:
        if text is not None:
            (tmp_path / "ds.json").write_text(text)
        with pytest.raises(error, match=message):
            engine_settings(make_config({"sharding.deepspeed": str(tmp_path / "ds.json")}), 2)

    def test_not_installed(self, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
        with pytest.raises(MissingDependencyError, match=r"parallel zero2 needs the package 'deepspeed'"):
            make_parallel("zero2", "cpu", make_config({"parallel": "zero2"}))


COMMON = {"epochs": 2, "save_every": 3, "keep_last": 0, "optim.eps": 1e-3, "batch.micro_batch_size": 1}


def test_gradients(zero: Any, values: Any, ranks: Any, programs: Any) -> None:
    changes = {"batch.global_batch_size": 8, "batch.micro_batch_size": 2}
    (alone,) = programs.gradients([{"values": values(changes, output="alone")}])
    jobs = [{"values": values({**changes, **more}, output=name)} for name, more in zero.items()]
    ends = ranks("gradients", jobs)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for end in ends:
        for name, found in zip(zero, end.value, strict=True):
            assert found.keys() == alone.keys()
            for key in alone.keys() - {"images"}:
                torch.testing.assert_close(
                    found[key].float(),
                    alone[key].float(),
                    atol=1e-5,
                    rtol=1e-5,
                    msg=lambda m, n=name, k=key: f"{n}: {k}: {m}",
                )


def test_resume_to_and_from(zero: Any, values: Any, ranks: Any, programs: Any) -> None:
    """Broken off in the second epoch, continued by fsdp2, by the other stage and by one process; and back."""
    whole = values(COMMON, output="whole")
    programs.train([{"values": whole}])
    reference = [line["loss"] for line in read_log(Path(whole["output"]) / "log.jsonl")]
    settings = {**zero, "fsdp2": {"parallel": "fsdp2"}}
    begun = {name: values({**COMMON, **more}, output=f"begun-{name}") for name, more in settings.items()}
    ends = ranks("train", [{"values": each, "stop_after": 7} for each in begun.values()])
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    routes = [
        ("zero2", "fsdp2"),
        ("zero2", "zero3"),
        ("zero3", "zero3"),
        ("fsdp2", "zero2"),
        ("zero3", "single"),
    ]
    jobs, alone = [], []
    for source, target in routes:
        job = {
            "values": values({**COMMON, **settings.get(target, {})}, output=f"{source}-{target}"),
            "resume": True,
        }
        shutil.copytree(begun[source]["output"], job["values"]["output"])
        (alone if target == "single" else jobs).append(job)
    ends = ranks("train", jobs)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    programs.train(alone)
    wanted = _tensors(whole["output"])
    exported = load_file(Path(whole["output"]) / "export" / "model.safetensors")
    for job in [*jobs, *alone]:
        output = job["values"]["output"]
        losses = [line["loss"] for line in read_log(Path(output) / "log.jsonl")]
        assert losses == pytest.approx(reference, abs=1e-5), output
        _assert_close(wanted, _tensors(output), output)
        _assert_close(exported, load_file(Path(output) / "export" / "model.safetensors"), output)


def test_a_step_that_is_not_finite(zero: Any, values: Any, ranks: Any) -> None:
    jobs = [
        {"values": values({**more, "max_nonfinite_steps": 2}, output=name), "fault": ("nan", 1, 3)}
        for name, more in zero.items()
    ]
    ends = ranks("train", jobs)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for name, first in zip(zero, ends[0].value, strict=True):
        assert first["outcome"] == "finished", first
        entries = (Path(jobs[0]["values"]["output"]).parent / name / "nonfinite.jsonl").read_text()
        assert 1 <= entries.count("\n") == sum(loss != loss for loss in first["losses"])


def test_adapters_and_offload(zero: Any, values: Any, ranks: Any, programs: Any) -> None:
    """Adapters under both stages, and masters and moments in the memory of the host: the exports of one process."""
    common = {"epochs": None, "max_steps": 3, "optim.eps": 1e-3, "save_every": 2}
    lora = {"train": "multi_modal_projector", "lora": {"match": ["language_model.*.mixer.*"], "rank": 2}}
    offload = {"sharding.cpu_offload": True}
    wanted = {}
    for kind, more in {"lora": lora, "offload": {}}.items():
        alone = values({**common, **more}, output=f"{kind}-alone")
        programs.train([{"values": alone}])
        wanted[kind] = load_file(Path(alone["output"]) / "export" / "model.safetensors")
    jobs = [
        {"values": values({**common, **more, **settings}, output=f"{kind}-{name}")}
        for kind, more in {"lora": lora, "offload": offload}.items()
        for name, settings in zero.items()
    ]
    halves = [{"values": {**job["values"], "output": job["values"]["output"] + "-2"}} for job in jobs]
    calls = [("train", jobs), ("train", [{**half, "stop_after": 2} for half in halves])]
    calls.append(("train", [{**half, "resume": True} for half in halves]))
    ends = ranks("several", calls)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for job in [*jobs, *halves]:
        folder = Path(job["values"]["output"])
        found = load_file(folder / "export" / "model.safetensors")
        _assert_close(wanted[folder.name.partition("-")[0]], found, folder.name)


def _tensors(run_dir: str) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(Path(run_dir))
    assert newest is not None and newest.name == "step-000010"
    weights, moments = read_whole(newest)
    return weights | {f"{n}/{k}": v for n, values in moments.items() for k, v in values.items()}


def _assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], what: str) -> None:
    assert first.keys() == second.keys(), what
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )
