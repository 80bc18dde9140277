"""A small project in a folder: weights, data, a recipe of two stages, a task and a table of three rows."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from vlmamba.ablations import Table, load_table
from vlmamba.testing import tiny_tokenizer, write_images, write_llava_json

RECIPE = """
from vlmamba.models.builder import ConnectorConfig, ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from vlmamba.training.config import BatchConfig, DataConfig, OptimConfig, SourceConfig, TrainConfig


def pretrain(connector: str = "mlp") -> TrainConfig:
    return TrainConfig(
        output="runs/pretrain",
        model=ModelConfig(
            vision=VisionConfig(family="siglip", path="weights/vision", feature_layer=-2),
            connector=ConnectorConfig(name=connector),
            language=LanguageConfig(path="weights/language"),
            chat="mamba",
            image=ImageConfig(mode="resize"),
        ),
        train=("multi_modal_projector",),
        data=DataConfig(sources=(SourceConfig(annotations="data/rows.json", image_root="data/images"),), max_length=128,
                        num_workers=0),
        batch=BatchConfig(global_batch_size=4, micro_batch_size=2),
        optim=OptimConfig(lr=1e-2),
        precision="fp32", device="cpu", loggers=(), save_every=0, epochs=1,
    )


def finetune(connector: str = "mlp") -> TrainConfig:
    first = pretrain(connector)
    return first.replace(output="runs/finetune", init_from="runs/pretrain",
                         train=("multi_modal_projector", "language_model"))
"""
TASK = """
import json
from pathlib import Path
from vlmamba.evaluation import Sample, Task


def task(annotations: str = "data/questions.json") -> Task:
    rows = json.loads(Path(annotations).read_text())
    samples = [Sample(i, (Path("data/images") / r["image"],), r["text"], r["answer"], r["kind"])
               for i, r in enumerate(rows)]
    return Task("tiny", samples, max_new_tokens=4)
"""
TABLE = """
from vlmamba.ablations import Row, Table


def table(recipe: str = "tiny") -> Table:
    return Table(
        title="Tiny", recipe=recipe, seeds=(1, 2), columns=("tiny", "tiny/*"), question="Which?",
        rows=[
            Row(name="MLP", settings={"connector": "mlp"}, paper={"VQAv2": 70.0}),
            Row(name="VSS", settings={"connector": "vss-l2"}, paper={"VQAv2": 72.0}),
            Row(name="VSS, forward", settings={"connector": "vss-l2"}, switches={"scan": "forward"}),
        ],
    )
"""


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``vision`` and ``language``."""
    from transformers import MambaConfig, SiglipVisionConfig, SiglipVisionModel

    from vlmamba.models.language import MambaLM

    root = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vision = SiglipVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=4,
        )  # fmt: skip
        SiglipVisionModel(vision).save_pretrained(root / "vision")
        language = MambaConfig(
            vocab_size=368, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, eos_token_id=0,
            bos_token_id=0,
        )  # fmt: skip
        MambaLM(language).save_pretrained(root / "language")
    tiny_tokenizer().save_pretrained(root / "language")
    return root


@pytest.fixture
def project(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, entered."""
    names = write_images(tmp_path / "data" / "images", 8)
    write_llava_json(tmp_path / "data" / "rows.json", names)
    kinds = ("colour", "count")
    questions = [
        {"image": names[i % 4], "text": f"What is in the image? {i}", "answer": "Two.", "kind": kinds[i % 2]}
        for i in range(12)
    ]
    (tmp_path / "data" / "questions.json").write_text(json.dumps(questions))
    for name, text in {"train": RECIPE, "eval": TASK, "eval/ablations": TABLE}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "tiny.py").write_text(textwrap.dedent(text))
    (tmp_path / "weights").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(project: Path) -> Table:
    """The project's table."""
    return load_table("tiny")
