"""What a run would be, and what it lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmamba.errors import MissingFileError
from vlmamba.training.config import TrainConfig
from vlmamba.training.dry_run import dry_run
from vlmamba.training.files import check_files, missing_files
from vlmamba.training.run import run

MakeConfig = Callable[..., TrainConfig]

NOTHING_HERE = {
    "model.vision.path": "checkpoints/none/siglip-so400m-patch14-384",
    "model.vision.preset": "siglip-so400m-patch14-384",
    "model.language.path": "checkpoints/none/mamba-2.8b",
    "model.language.preset": "2.8b",
    "model.language.hint": "hf download state-spaces/mamba-2.8b-slimpj",
    "model.connector.name": "vss-l2",
    "data.sources": (
        "[{annotations: data/none/rows.json, image_root: data/none/images, expected_rows: 665298, hint: HUB}]"
    ),
    "batch.global_batch_size": 128,
    "batch.micro_batch_size": 16,
    "init_from": "runs/none/stage1",
}


def test_full_size_without_files(make_config: MakeConfig) -> None:
    report = dry_run(make_config(NOTHING_HERE))
    assert "27 x 27 patches" in report and "729 visual tokens an image" in report
    assert "64 layers of width 2560" in report and "2.77B parameters" in report
    assert "rows: 665,298 rows (as published; the file is missing)" in report
    assert "665,298 samples and 5,198 steps an epoch; 5,198 steps in all" in report
    assert "after 156 warm-up steps" in report
    assert "files: 5 missing" in report and "get it: HUB" in report
    assert "bash scripts/quickstart.sh" in report
    table = {line.split()[0]: line.split()[1:] for line in report.splitlines() if len(line.split()) == 3}
    assert table["vision_tower"][0] == "0" and table["language_model"][1] == "0"


def test_with_files(make_config: MakeConfig) -> None:
    report = dry_run(make_config({"data.sources.0.weight": 2}))
    assert "rows: 20 rows, weight 2: 40 an epoch" in report
    assert "40 samples and 10 steps an epoch; 10 steps in all" in report
    assert report.endswith("files\n  all there")


def test_steps_of_tokens(make_config: MakeConfig) -> None:
    tokens = {"data.pack_length": 256, "batch.tokens_per_step": 1024}
    report = dry_run(make_config(tokens))
    assert "steps of 1,024 tokens in packed rows of up to 256 tokens" in report
    assert "20 samples an epoch, 1 epoch(s); their number follows from the lengths of the rows" in report
    assert "after 3% of the steps as warm-up" in report and "4 samples" not in report
    report = dry_run(make_config({**tokens, "epochs": None, "max_steps": 100}))
    assert "20 samples an epoch; 100 steps in all" in report and "after 3 warm-up steps" in report
    report = dry_run(make_config({**tokens, "max_steps": 100, "schedule.warmup_steps": 7}))
    assert "at most 100 steps; their number" in report and "after 7 warm-up steps" in report


def test_missing_files_are_one_error(make_config: MakeConfig) -> None:
    with pytest.raises(MissingFileError) as caught:
        run(make_config(NOTHING_HERE))
    message = str(caught.value)
    for part in (
        "vision encoder",
        "checkpoints/none/siglip-so400m-patch14-384",
        "hf download google/siglip-so400m-patch14-384",
        "language model",
        "hf download state-spaces/mamba-2.8b-slimpj",
        "annotations",
        "data/none/rows.json",
        "data/none/images",
        "runs/none/stage1",
        "bash scripts/quickstart.sh",
    ):
        assert part in message, part


def test_known_files_have_hints_of_their_own(make_config: MakeConfig) -> None:
    changes = {"data.sources": "[{annotations: data/none/llava_v1_5_mix665k.json, image_root: data/none}]"}
    hints = {item.what: item.hint for item in missing_files(make_config(changes))}
    assert "LLaVA-Instruct-150K" in hints["annotations"]


def test_image_folders_that_rows_name(make_config: MakeConfig, task: Path, tmp_path: Path) -> None:
    rows = json.loads((task / "rows.json").read_text())
    rows[0]["image"] = "coco/train2017/a.jpg"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = make_config({"data.sources.0.annotations": str(tmp_path / "rows.json")})
    report = dry_run(config)
    assert "files: 1 missing" in report and "http://images.cocodataset.org/zips/train2017.zip" in report
    with pytest.raises(
        MissingFileError, match=r"(?s)1 folders of images .*images/coco/train2017.*train2017.zip"
    ):
        run(config)
    assert not Path(config.output).exists()


def test_hub_ids_alone_do_not_stop_a_run(make_config: MakeConfig) -> None:
    config = make_config({"model.language.path": "state-spaces/mamba-130m-hf-none"})
    items = missing_files(config)
    assert [(i.what, i.automatic) for i in items] == [("language model", True)]
    check_files(config)


def test_nothing_is_written_when_files_are_missing(make_config: MakeConfig) -> None:
    config = make_config(NOTHING_HERE)
    with pytest.raises(MissingFileError):
        run(config)
    assert not Path(config.output).exists()
