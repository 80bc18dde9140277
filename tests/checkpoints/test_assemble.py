"""A Cobra run becomes a whole model with the encoders and the tokenizer of a recipe."""

from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from vlmamba.checkpoints.convert import convert
from vlmamba.cli import main
from vlmamba.common.load import load_model
from vlmamba.errors import CheckpointError
from vlmamba.testing import tiny_model, tiny_tokenizer
from vlmamba.testing.models import tiny_vision_config

RECIPE = """
from vlmamba.models.builder import ConnectorConfig, LanguageConfig, ModelConfig, VisionConfig
from vlmamba.training.config import BatchConfig, DataConfig, OptimConfig, SourceConfig, TrainConfig


def finetune(hidden: int = 40) -> TrainConfig:
    return TrainConfig(
        output="run",
        model=ModelConfig(
            vision=VisionConfig(family="siglip", path="vision"),
            connector=ConnectorConfig(name="mlp", options={"depth": 3, "hidden_dim": hidden}),
            language=LanguageConfig(path="gone", tokenizer="tokenizer"),
            chat="cobra",
        ),
        train=("multi_modal_projector",),
        data=DataConfig(sources=(SourceConfig(annotations="rows.json"),)),
        batch=BatchConfig(global_batch_size=1, micro_batch_size=1),
        optim=OptimConfig(lr=1e-3),
    )
"""


@pytest.fixture
def cobra(tmp_path, monkeypatch):
    """A folder with a Cobra run, an encoder, a tokenizer and a recipe; gives the model whose weights the run has."""
    monkeypatch.chdir(tmp_path)
    model, _ = tiny_model("mlp", depth=3, hidden_dim=40)
    model.save_pretrained("ours")
    convert("ours", "cobra", to="prismatic")
    SiglipVisionModel(SiglipVisionConfig(**tiny_vision_config()["config"])).save_pretrained("vision")
    tiny_tokenizer().save_pretrained("tokenizer")
    Path("recipe.py").write_text(RECIPE)
    return model


def test_a_whole_model_of_a_cobra_run(cobra):
    assert main(["convert", "cobra", "whole", "--recipe", "recipe.py:finetune"]) == 0
    model, processor = load_model("whole")
    for part in ("multi_modal_projector", "language_model"):
        ours, theirs = getattr(cobra, part).state_dict(), getattr(model, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}],
        add_generation_prompt=True,
    )
    assert text.startswith("<image><|user|>\nWhat?")


def test_another_connector_does_not_fit(cobra):
    from vlmamba.checkpoints.assemble import assemble
    from vlmamba.config import load_recipe

    with pytest.raises(CheckpointError, match=r"linear_1.weight"):
        assemble("cobra", load_recipe("recipe.py:finetune", ["--hidden", "48"]).config.model)
    with pytest.raises(CheckpointError, match="holds no connector alone"):
        assemble("ours", load_recipe("recipe.py:finetune").config.model)
