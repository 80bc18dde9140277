"""From the data settings of a run to what is trained on: packed rows, shards, streams."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_loop import gradients
from vlmamba.config import apply_overrides
from vlmamba.errors import ConfigError, DataError
from vlmamba.training import loop
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import open_sources, plan_settings
from vlmamba.training.metrics import read_log
from vlmamba.training.run import run

MakeConfig = Callable[..., TrainConfig]


def write_shards(task: Path, folder: Path, count: int = 4) -> Path:
    """The rows of the small task as tar shards."""
    rows = json.loads((task / "rows.json").read_text())
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"part-{shard:03}.tar", "w") as tar:
            for number in range(shard, len(rows), count):
                row = rows[number]
                parts = {"json": json.dumps(row).encode()}
                if "image" in row:
                    parts["png"] = (task / "images" / row["image"]).read_bytes()
                for kind, content in parts.items():
                    info = tarfile.TarInfo(f"{number:04}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def shards(task: Path, tmp_path: Path) -> dict[str, Any]:
    """The source settings of such shards."""
    folder = write_shards(task, tmp_path / "shards")
    return {"data": {"sources": [{"annotations": str(folder), "kind": "webdataset"}]}}


def with_sources(config: TrainConfig, values: dict[str, Any], **changes: Any) -> TrainConfig:
    plain = config.to_dict()
    plain["data"].update(values["data"])
    changed: TrainConfig = apply_overrides(TrainConfig.from_dict(plain), changes).config
    return changed


def test_packed_steps_have_the_gradients_of_padded_ones(make_config: MakeConfig, tmp_path: Path) -> None:
    eight = {"batch.global_batch_size": 8}
    loss, reference, _ = gradients(
        make_config({**eight, "data.pack_length": 256, "data.order": "length"}), tmp_path
    )
    padded_loss, padded, _ = gradients(make_config({**eight, "data.order": "length"}), tmp_path)
    assert loss == pytest.approx(padded_loss, abs=1e-6)
    for name, gradient in reference.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_packed_run_learns_what_a_padded_one_learns(make_config: MakeConfig) -> None:
    changes = {"data.order": "length", "epochs": 1}
    padded = run(make_config(changes, output="padded"))
    packed = run(make_config({**changes, "data.pack_length": 512}, output="packed"))
    lines = [{line["step"]: line for line in read_log(r.run_dir / "log.jsonl")} for r in (padded, packed)]
    assert lines[0].keys() == lines[1].keys() == {1, 2, 3, 4, 5}
    losses = [sorted(line["loss"] for line in each.values()) for each in lines]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.05)
    states = [
        json.loads((r.run_dir / "checkpoints/step-000005/state.json").read_text()) for r in (padded, packed)
    ]
    assert [state["samples"] for state in states] == [20, 20]
    assert states[0]["supervised"] == states[1]["supervised"]
    assert lines[1][1]["padding_pct"] < 64 / 4, "a row is rounded up to 64"


def stopped_after(config: TrainConfig, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until asked to stop after so many steps."""
    advance = loop.advance

    def stop(training: Any, *rest: Any) -> None:
        advance(training, *rest)
        training.should_stop = lambda: training.state.step == steps

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", stop)
        assert run(config).outcome == "stopped"


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir / "log.jsonl")]


def test_packing_resumes_exactly(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(make_config({"data.pack_length": 256}, output="whole"))
    half = make_config({"data.pack_length": 256}, output="half")
    stopped_after(half, 2, monkeypatch)
    assert losses_of(run(half, resume=True).run_dir) == losses_of(whole.run_dir)


def test_steps_of_tokens_resume_exactly(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"data.pack_length": 256, "batch.tokens_per_step": 512}
    whole = run(make_config(changes, output="whole"))
    half = make_config(changes, output="half")
    stopped_after(half, 2, monkeypatch)
    assert losses_of(run(half, resume=True).run_dir) == losses_of(whole.run_dir)


def test_what_steps_of_tokens_need(make_config: MakeConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"tokens_per_step 512 must be a multiple of data\.pack_length, .* none"
    ):
        make_config({"batch.tokens_per_step": 512})
    config = make_config({"data.pack_length": 256, "batch.tokens_per_step": 512})
    assert plan_settings(config, 2).step_rows == 2
    with pytest.raises(
        ConfigError, match="makes 2 packed rows, which 4 processes cannot share equally; 1024 can"
    ):
        plan_settings(config, 4)


def test_repairs_reach_the_log(make_config: MakeConfig) -> None:
    config = make_config({"data.max_length": 40, "log_every": 5})
    (line,) = read_log(run(config).run_dir / "log.jsonl")
    assert line["repaired"] == sum(line["repairs"].values()) > 0
    assert set(line["repairs"]) == {"truncated"}


def test_shards_train_by_row(make_config: MakeConfig, shards: dict[str, Any]) -> None:
    config = with_sources(make_config({"data.pack_length": 256}), shards)
    result = run(config)
    assert (result.outcome, result.step) == ("finished", 5)


def test_streams_train_and_resume(
    make_config: MakeConfig, shards: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = {"data.stream": True, "epochs": None, "max_steps": 5}
    whole = run(with_sources(make_config(output="whole"), shards, **stream))
    half = with_sources(make_config(output="half"), shards, **stream)
    stopped_after(half, 3, monkeypatch)
    assert losses_of(run(half, resume=True).run_dir) == losses_of(whole.run_dir)
    assert whole.step == 5


def test_what_streams_cannot_do(make_config: MakeConfig, shards: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rows\.json is of kind llava, which is read by row"):
        make_config({"data.stream": True})
    with pytest.raises(ConfigError, match=r"neither data\.pack_length nor data\.order random can be had"):
        with_sources(make_config({"data.pack_length": 256}), {"data": {**shards["data"], "stream": True}})
    with pytest.raises(ConfigError, match=r"set --epochs none and --max_steps"):
        open_sources(with_sources(make_config(), {"data": {**shards["data"], "stream": True}}))


def test_pack_length_must_hold_a_sample_and_be_whole_tiles(make_config: MakeConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.pack_length 100 must be a multiple of 64 .*max_length 128.; 128 does"
    ):
        make_config({"data.pack_length": 100})
    with pytest.raises(ConfigError, match=r"data\.pack_length 130 .*; 192 does"):
        make_config({"data.pack_length": 130})


def test_a_shard_cut_off_is_named(make_config: MakeConfig, shards: dict[str, Any]) -> None:
    folder = Path(shards["data"]["sources"][0]["annotations"])
    cut = folder / "part-001.tar"
    cut.write_bytes(cut.read_bytes()[:900])
    with pytest.raises(DataError, match=r"part-001\.tar (is cut off|cannot be read)"):
        open_sources(with_sources(make_config(), shards))
