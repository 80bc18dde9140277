"""Every layout to every other, and back; the layout is told by content."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from vlmamba.checkpoints import convert as module
from vlmamba.checkpoints.convert import convert, mamba_config_of, read_parts
from vlmamba.checkpoints.layouts import (
    STATE_SPACES,
    connector_to_llava,
    model_from_prismatic,
    model_to_prismatic,
)
from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.language.state_spaces import is_original_config
from vlmamba.models.language.weights import load_state_dict_file, save_tensors


def config(**changes: object) -> MambaConfig:
    fields: dict = {"vocab_size": 48, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return MambaConfig(**(fields | changes))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def hf(request, tmp_path) -> Path:
    """A transformers directory with a tokenizer file beside it."""
    torch.manual_seed(0)
    directory = tmp_path / "hf"
    model = MambaForCausalLM(
        config(tie_word_embeddings=request.param, eos_token_id=5, residual_in_fp32=False)
    )
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def sequential(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, 8)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers)


def connector_of(depth: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    names = {f"{2 * k}": f"linear_{k + 1}" for k in range(depth)}
    return {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor
        for name, tensor in sequential(depth).state_dict().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_transformers_to_state_spaces_and_back(tmp_path, hf):
    done = convert(hf, tmp_path / "original", to="state-spaces")
    assert (done.layout, done.connector, done.files) == (
        "transformers",
        0,
        ("config.json", "generation_config.json", "pytorch_model.bin", "tokenizer.json"),
    )
    raw = json.loads((tmp_path / "original" / "config.json").read_text())
    assert is_original_config(raw)
    state = load_state_dict_file(tmp_path / "original" / "pytorch_model.bin")
    assert {"backbone.embedding.weight", "lm_head.weight"} <= state.keys()  # as mamba_ssm wants to find them

    done = convert(tmp_path / "original", tmp_path / "back")
    assert done.layout == "state-spaces"
    same(
        load_state_dict_file(tmp_path / "back" / "model.safetensors"),
        load_state_dict_file(hf / "model.safetensors"),
    )
    ids = torch.arange(1, 9)[None]
    wanted = AutoModelForCausalLM.from_pretrained(hf)
    for directory in (tmp_path / "back", tmp_path / "original"):
        model = MambaLM.from_pretrained(directory)
        assert torch.equal(model(ids).logits, MambaLM.from_pretrained(hf)(ids).logits)
        assert model.config.eos_token_id == 5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(theirs) is MambaForCausalLM
    assert torch.equal(theirs(ids).logits, wanted(ids).logits)


def test_state_spaces_map_covers_the_model():
    with torch.device("meta"):
        names = MambaLM(config(use_bias=True)).state_dict()
    theirs = STATE_SPACES.to_theirs(names)
    assert theirs.keys() - names.keys() == {"backbone.embedding.weight"}
    assert STATE_SPACES.to_ours(theirs).keys() == names.keys()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector."])
def test_llava_projector(tmp_path, depth, prefix):
    torch.manual_seed(1)
    layers = sequential(depth)
    state = layers[0].state_dict() if depth == 1 else layers.state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "mm_projector.bin")
    connector = read_parts(tmp_path / "mm_projector.bin").connector
    same(connector, connector_of(depth))
    same(
        connector_to_llava(connector),
        {"model.mm_projector." + name: tensor for name, tensor in state.items()},
    )

    done = convert(tmp_path / "mm_projector.bin", tmp_path / "out")
    assert (done.layout, done.files, done.connector) == (
        "llava",
        ("connector.safetensors", "connector_config.json"),
        2 * depth,
    )
    described = json.loads((tmp_path / "out" / "connector_config.json").read_text())
    assert (described["name"], described["options"].get("depth")) == ("mlp", depth)
    same(load_state_dict_file(tmp_path / "out" / "connector.safetensors"), connector)


def test_a_llava_projector_with_transformers_layers_gives_the_same_features(tmp_path):
    from transformers.models.llava.modeling_llava import LlavaConfig, LlavaMultiModalProjector

    torch.manual_seed(1)
    layers = sequential(2)
    torch.save({"model.mm_projector." + n: t for n, t in layers.state_dict().items()}, tmp_path / "p.bin")
    settings = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 6, "num_attention_heads": 1},
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1},
    )
    projector = LlavaMultiModalProjector(settings)
    projector.load_state_dict(read_parts(tmp_path / "p.bin").connector)
    features = torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(features), layers(features))


def prismatic_content(depth: int, language: bool = True) -> dict:
    torch.manual_seed(1)
    layers = sequential(depth)
    state = layers[0].state_dict() if depth == 1 else layers.state_dict()
    parts = {"projector": {"projector." + name: tensor for name, tensor in state.items()}}
    if language:
        torch.manual_seed(2)
        theirs = STATE_SPACES.to_theirs(MambaLM(config()).state_dict())
        parts["llm_backbone"] = {"llm." + name: tensor.clone() for name, tensor in theirs.items()}
    return {"model": parts}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prismatic_run(tmp_path, depth):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"model": {"model_id": "cobra+3b"}}')
    content = prismatic_content(depth)
    torch.save(content, run / "checkpoints" / "latest-checkpoint.pt")
    parts = read_parts(run)
    state = {f"multi_modal_projector.{n}": t for n, t in parts.connector.items()}
    state |= {f"language_model.{n}": t for n, t in parts.language.items()}
    back = model_to_prismatic(state)
    assert back.keys() == content["model"].keys()
    for part, tensors in content["model"].items():
        same(back[part], tensors)

    done = convert(run, tmp_path / "out")
    assert done.layout == "prismatic"
    assert done.files == (
        "connector.safetensors",
        "connector_config.json",
        "language_model/config.json",
        "language_model/model.safetensors",
    )
    same(load_state_dict_file(tmp_path / "out" / "connector.safetensors"), connector_of(depth))
    torch.manual_seed(2)
    same(
        dict(MambaLM.from_pretrained(tmp_path / "out" / "language_model").state_dict()),
        MambaLM(config()).state_dict(),
    )

    done = convert(run, tmp_path / "original", to="state-spaces")
    same(
        dict(MambaLM.from_pretrained(tmp_path / "original" / "language_model").state_dict()),
        MambaLM.from_pretrained(tmp_path / "out" / "language_model").state_dict(),
    )


def test_prismatic_stage_one_holds_the_projector_only(tmp_path):
    torch.save(prismatic_content(3, language=False), tmp_path / "any-name.pt")
    done = convert(tmp_path / "any-name.pt", tmp_path / "out")
    assert (done.files, done.language) == (("connector.safetensors", "connector_config.json"), 0)


def test_prismatic_bad_content(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'model' with 'projector' in it \(Cobra\).*Found: weights"):
        read_parts(tmp_path / "x.pt")
    content = prismatic_content(2, language=False)["model"]
    with pytest.raises(CheckpointError, match="holds vision_backbone beside projector"):
        model_from_prismatic(content | {"vision_backbone": {}})
    content["projector"]["mlps.0.weight"] = torch.ones(1)
    with pytest.raises(
        CheckpointError, match=r"1 names are not known in Cobra's prismatic layout: projector.mlps"
    ):
        model_from_prismatic(content)


@pytest.fixture
def exported(tmp_path) -> Path:
    """What one of our model directories holds, as far as conversion reads it."""
    directory = tmp_path / "export"
    directory.mkdir()
    torch.manual_seed(2)
    language = MambaLM(config())
    state = {f"language_model.{n}": t for n, t in language.state_dict().items() if n != "lm_head.weight"}
    state |= {f"multi_modal_projector.{n}": t for n, t in connector_of(2).items()}
    state["vision_tower.model.weight"] = torch.ones(3)
    save_tensors(state, directory / "model.safetensors")
    raw = {"model_type": "vlmamba", "text_config": language.config.to_dict()}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_our_model_to_every_layout(tmp_path, exported):
    torch.manual_seed(2)
    wanted = MambaLM(config()).state_dict()
    for to in ("transformers", "state-spaces"):
        done = convert(exported, tmp_path / to, to=to)
        assert done.layout == "vlmamba"
        same(dict(MambaLM.from_pretrained(tmp_path / to).state_dict()), wanted)
    convert(exported, tmp_path / "llava", to="llava")
    same(read_parts(tmp_path / "llava").connector, connector_of(2))
    assert read_parts(tmp_path / "llava").layout == "llava"
    convert(exported, tmp_path / "prismatic", to="prismatic")
    same(read_parts(tmp_path / "prismatic").language, wanted)


def test_targets_are_not_overwritten(tmp_path, hf):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="out: exists already"):
        convert(hf, target)
    assert (target / "precious").exists()


def test_full_disk_harms_nothing(tmp_path, hf, monkeypatch):
    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", fails)
    with pytest.raises(CheckpointError, match=r"writing .*out failed: .*No space left on device"):
        convert(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_sources(tmp_path, hf):
    with pytest.raises(MissingFileError, match="nowhere: no such file or directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"unknown layout 'state_spaces'.*Did you mean 'state-spaces'"):
        convert(hf, tmp_path / "out", to="state_spaces")
    with pytest.raises(
        CheckpointError, match=r"hf: has no connector \(transformers layout\), which 'llava' needs"
    ):
        convert(hf, tmp_path / "out", to="llava")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"Looked for: config.json with 'd_model'.*Found: notes.txt"):
        convert(odd, tmp_path / "out")
    (odd / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        convert(odd, tmp_path / "out")
    torch.save({"w": torch.ones(1)}, odd / "w.bin")
    with pytest.raises(
        CheckpointError, match=r"Looked for: 'model' with 'projector'.*Found: w. A language model"
    ):
        convert(odd / "w.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        CheckpointError, match=r"not a Mamba language model: backbone.embeddings.weight is missing"
    ):
        mamba_config_of({"w": torch.ones(1)})


def test_config_from_shapes():
    wanted = config(use_bias=True, use_conv_bias=False, conv_kernel=3, time_step_rank=5, expand=3)
    with torch.device("meta"):
        state = MambaLM(wanted).state_dict()
    state.pop("lm_head.weight")
    assert mamba_config_of(state).to_dict() == wanted.to_dict()
