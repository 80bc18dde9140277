"""From stage to stage: loading trained parts, refusing other ones, exporting."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.common.load import load_model
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.testing import tiny_model
from vlmamba.training.config import TrainConfig
from vlmamba.training.export import export_model
from vlmamba.training.init_from import init_from
from vlmamba.training.run import export_run, prepare_model, run

MakeConfig = Callable[..., TrainConfig]
CONNECTOR = "multi_modal_projector"


@pytest.fixture
def stage1(make_config: MakeConfig) -> Path:
    """A finished run that trained the connector."""
    changes = {"train": CONNECTOR, "max_steps": 2, "model.connector.name": "vss-mlp", "save_every": 0}
    return run(make_config({**changes, "model.connector.options.state_size": 4}, output="stage1")).run_dir


@pytest.mark.parametrize("where", ["", "checkpoints/step-000002", "export", "export/connector.safetensors"])
def test_stage_two_takes_the_connector(
    make_config: MakeConfig, stage1: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"model.connector.name": "vss-mlp", "model.connector.options.state_size": 4}
    with caplog.at_level(logging.INFO):
        model, _ = prepare_model(
            make_config({**changes, "init_from": str(stage1 / where)}), torch.device("cpu")
        )
    trained = load_file(stage1 / "export" / "connector.safetensors")
    assert all(torch.equal(t, trained[n]) for n, t in model.multi_modal_projector.state_dict().items())
    fresh, _ = prepare_model(make_config(changes), torch.device("cpu"))
    assert not all(torch.equal(t, trained[n]) for n, t in fresh.multi_modal_projector.state_dict().items())
    table = [line.split() for line in caplog.text.splitlines() if line.startswith(CONNECTOR)]
    assert int(table[0][1]) >= 8 and table[0][2:5] == ["0", "0", "0"]
    if where != "export":
        assert "language_model" in caplog.text and "(kept as built)" in caplog.text


def test_another_connector_is_refused(make_config: MakeConfig, stage1: Path) -> None:
    for source in (stage1, stage1 / "export", stage1 / "export" / "connector.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            prepare_model(make_config({"init_from": str(source)}), torch.device("cpu"))
        message = str(caught.value)
        assert "is another one than the model's" in message
        assert "there: name=vss-mlp" in message and "here:  name=mlp" in message


def test_another_size_is_refused(make_config: MakeConfig, stage1: Path) -> None:
    changes = {"model.connector.name": "vss-mlp", "model.connector.options.state_size": 8}
    with pytest.raises(CheckpointError, match=r"\(state_size differ\)(.|\n)*state_size=4(.|\n)*state_size=8"):
        prepare_model(make_config({**changes, "init_from": str(stage1)}), torch.device("cpu"))


def test_same_connector_of_another_encoder_is_refused() -> None:
    """Equal names and options, other widths."""
    model, _ = tiny_model("mlp")
    from vlmamba.training.init_from import SavedWeights, _compare

    tensors = {n: t for n, t in model.state_dict().items() if n.startswith(CONNECTOR)}
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    wrong = {**tensors, name: torch.zeros(3, 3)}
    del wrong[next(n for n in wrong if n != name)]
    wrong[f"{CONNECTOR}.extra"] = torch.zeros(1)
    wanted = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    rows, problems = _compare(model, wanted, SavedWeights(Path("x"), wrong, None))
    row = next(r for r in rows if r.part == CONNECTOR)
    assert (row.missing, row.unexpected, row.mismatched) == (1, 1, 1)
    text = "\n".join(problems)
    assert f"other shape: {name} is (3, 3) there and" in text and f"unexpected: {CONNECTOR}.extra" in text


def test_refusal_changes_nothing(make_config: MakeConfig, stage1: Path) -> None:
    changes = {"model.connector.name": "vss-mlp", "model.connector.options.state_size": 4}
    model, _ = prepare_model(make_config(changes), torch.device("cpu"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    path = stage1 / "export" / "connector.safetensors"
    tensors = load_file(path)
    from safetensors.torch import save_file

    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"connector.safetensors is not what was written \(SHA-256"):
        init_from(model, path)
    path.with_name("digests.json").unlink()  # changed on purpose
    with pytest.raises(CheckpointError, match=rf"do not fit the model:(.|\n)*missing: {CONNECTOR}"):
        init_from(model, path)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_nothing_there(tmp_path: Path) -> None:
    model, _ = tiny_model()
    with pytest.raises(
        MissingFileError, match=r"init_from: .*nowhere does not exist. Give the folder of a finished"
    ):
        init_from(model, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="empty holds no checkpoint and no exported model"):
        init_from(model, tmp_path / "empty")


def test_two_stages_end_to_end(make_config: MakeConfig, stage1: Path) -> None:
    """Stage 2 from stage 1, exported; the export is what was trained, and one can start from it again."""
    changes = {
        "model.connector.name": "vss-mlp",
        "model.connector.options.state_size": 4,
        "init_from": str(stage1),
        "max_steps": 2,
        "save_every": 0,
    }
    config = make_config(changes, output="stage2")
    result = run(config)
    assert result.export == result.run_dir / "export"
    model, processor = load_model(result.run_dir)
    trained = load_file(result.run_dir / "checkpoints/step-000002/model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in trained.items())
    assert model.language_model.lm_head.weight is model.language_model.backbone.embeddings.weight
    assert processor.num_image_tokens == 16
    third = make_config({**changes, "init_from": str(result.export)})
    again, _ = prepare_model(third, torch.device("cpu"))
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())


def test_export_again_and_bf16(make_config: MakeConfig) -> None:
    result = run(make_config({"max_steps": 1, "precision": "bf16"}))
    assert result.export is not None
    config = json.loads((result.export / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    first = {p.name: p.read_bytes() for p in result.export.iterdir() if p.suffix == ".safetensors"}
    shutil.rmtree(result.export)
    target = export_run(result.run_dir)
    assert {p.name: p.read_bytes() for p in target.iterdir() if p.suffix == ".safetensors"} == first
    assert {t.dtype for t in load_file(target / "connector.safetensors").values()} == {torch.float32}
    kept = (".A_log", ".D", ".dt_proj.bias")  # in fp32, as the state's decay is
    weights = load_file(target / "model.safetensors")
    assert {t.dtype for name, t in weights.items() if not name.endswith(kept)} == {torch.bfloat16}
    assert {t.dtype for name, t in weights.items() if name.endswith(kept)} == {torch.float32}


def test_export_has_plain_transformers_files(tmp_path: Path) -> None:
    model, processor = tiny_model("qmamba")
    export_model(model, processor, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "connector.safetensors", "connector_config.json"} <= names
    description = json.loads((tmp_path / "out" / "connector_config.json").read_text())
    assert description["name"] == "qmamba" and description["grid"] == [4, 4]


def test_export_without_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    from vlmamba.config import dump_yaml

    (tmp_path / "config.yaml").write_text(dump_yaml(make_config()))
    with pytest.raises(CheckpointError, match="has no checkpoint to export"):
        export_run(tmp_path)
