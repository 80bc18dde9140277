"""Both checkpoint layouts, every file form, and what is said when something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaForCausalLM

from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.language import load_language_model, read_config
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.language.state_spaces import (
    config_from_original,
    config_to_original,
    is_original_config,
    padded_vocab_size,
)

ORIGINAL = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 45,
    "ssm_cfg": {"d_state": 4},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


@pytest.fixture
def theirs(config) -> MambaForCausalLM:
    torch.manual_seed(5)
    return MambaForCausalLM(config()).eval()


def write_original(directory: Path, model: MambaForCausalLM, form: str, **changes: object) -> Path:
    """What state-spaces/mamba's save_pretrained writes (or shards of it)."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(ORIGINAL | changes))
    state = {
        name.replace("embeddings", "embedding"): tensor.clone() for name, tensor in model.state_dict().items()
    }
    if form == "safetensors":
        save_file(state, directory / "model.safetensors")
    elif form == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    else:
        names = sorted(state)
        halves = [{n: state[n] for n in names[:10]}, {n: state[n] for n in names[10:]}]
        suffix = form.removeprefix("sharded ")
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        weight_map = {}
        for number, half in enumerate(halves, 1):
            file = f"{stem}-{number:05d}-of-00002.{suffix}"
            weight_map.update(dict.fromkeys(half, file))
            (save_file if suffix == "safetensors" else torch.save)(half, directory / file)
        index = directory / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


FORMS = ["safetensors", "bin", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("form", FORMS)
def test_original_layout(tmp_path, theirs, ids, form):
    directory = write_original(tmp_path / "name-says-nothing", theirs, form)
    ours, info = MambaLM.from_pretrained(directory, output_loading_info=True)
    assert not ours.training
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ours.config.vocab_size == 48
    assert ours.lm_head.weight is ours.backbone.embeddings.weight
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    theirs(ids, labels=ids).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_hf_layout(tmp_path, theirs, ids, sharded):
    theirs.generation_config.max_new_tokens = 3
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ours = MambaLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.generation_config.max_new_tokens == 3
    assert torch.equal(ours.generate(ids), theirs.generate(ids))


def test_hf_layout_with_the_original_fields_beside_its_own(tmp_path, theirs, ids):
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"d_model": 16, "n_layer": 2, "ssm_cfg": {}}))
    ours = MambaLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_hf_pickle(tmp_path, theirs, ids):
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(
        MambaLM.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal_and_transformers_reads_it(tmp_path, config, ids, tied):
    torch.manual_seed(1)
    model = MambaLM(config(tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path)
    again = MambaLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(model(ids).logits, again(ids).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is MambaForCausalLM
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_tied_weights_stay_tied_under_training(tmp_path, config, ids):
    MambaLM(config()).save_pretrained(tmp_path)
    model = MambaLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, model.backbone.embeddings.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(MambaLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_dtype_and_config_arguments(tmp_path, theirs):
    write_original(tmp_path, theirs, "bin")
    model = MambaLM.from_pretrained(tmp_path, dtype=torch.bfloat16, residual_in_fp32=False)
    for name, parameter in model.named_parameters():
        exact = name.endswith((".A_log", ".D", ".dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert model.config.residual_in_fp32 is False
    assert load_language_model(tmp_path, torch.float64).dtype == torch.float64


def test_subfolders(tmp_path, theirs):
    write_original(tmp_path / "inner", theirs, "bin")
    for model in (
        MambaLM.from_pretrained(tmp_path, subfolder="inner"),
        load_language_model(tmp_path, subfolder="inner", local_files_only=True),
    ):
        assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)


def test_original_config_fields():
    raw = ORIGINAL | {
        "ssm_cfg": {
            "d_state": 8,
            "d_conv": 3,
            "expand": 3,
            "dt_rank": 5,
            "conv_bias": False,
            "bias": True,
            "dt_max": 0.2,
        },
        "tie_embeddings": False,
        "residual_in_fp32": False,
        "pad_vocab_size_multiple": 16,
        "eos_token_id": 7,
    }
    config = config_from_original(raw)
    assert (config.vocab_size, config.state_size, config.conv_kernel, config.intermediate_size) == (
        48,
        8,
        3,
        48,
    )
    assert (config.time_step_rank, config.use_conv_bias, config.use_bias, config.time_step_max) == (
        5,
        False,
        True,
        0.2,
    )
    assert (config.tie_word_embeddings, config.residual_in_fp32, config.eos_token_id) == (False, False, 7)
    assert (config.initializer_range, config.rescale_prenorm_residual) == (0.02, True)
    again = config_from_original(config_to_original(config))
    assert again.to_dict() == config.to_dict()
    assert is_original_config(config_to_original(config))
    assert not is_original_config(config.to_dict())
    assert [padded_vocab_size(n, 8) for n in (50277, 50280, 1)] == [50280, 50280, 8]
    assert padded_vocab_size(50277, 1) == 50277


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2', not 'Mamba1'"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]: it has attention layers"),
        ({"d_intermediate": 64}, "d_intermediate is 64: its blocks have MLPs"),
        ({"rms_norm": False}, "rms_norm is false: it uses LayerNorm"),
        ({"ssm_cfg": {"d_stat": 3}}, "ssm_cfg has unknown fields d_stat"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_other_original_models_are_refused(tmp_path, theirs, changes, message):
    write_original(tmp_path, theirs, "bin", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        MambaLM.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_keys_and_shapes_must_fit(tmp_path, theirs):
    write_original(tmp_path, theirs, "safetensors")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["backbone.layers.1.mixer.extra"] = state.pop("backbone.layers.1.mixer.D")
    state["backbone.layers.0.norm.weight"] = torch.ones(17)
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        MambaLM.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "1 missing: backbone.layers.1.mixer.D" in text
    assert "1 unexpected: backbone.layers.1.mixer.extra" in text
    assert "backbone.layers.0.norm.weight: (17,) in the checkpoint, (16,) in the model" in text
    assert str(tmp_path) in text


def test_another_size_lists_shapes(tmp_path, theirs):
    write_original(tmp_path, theirs, "safetensors", d_model=32)
    with pytest.raises(
        CheckpointError, match=r"embeddings.weight: \(48, 16\) in the checkpoint, \(48, 32\) in the model"
    ):
        MambaLM.from_pretrained(tmp_path)


def test_untied_weights_under_a_tied_config_are_refused(tmp_path, config):
    torch.manual_seed(0)
    model = MambaForCausalLM(config(tie_word_embeddings=False))
    write_original(tmp_path, model, "bin")
    with pytest.raises(CheckpointError, match=r"tied to backbone.embeddings.weight .* two that differ"):
        MambaLM.from_pretrained(tmp_path)
    write_original(tmp_path, model, "bin", tie_embeddings=False)
    assert torch.equal(MambaLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("layout", ["original", "hf", "llama"])
def test_pickles_that_are_not_weights_only_are_refused(tmp_path, theirs, layout, capsys):
    write_original(tmp_path, theirs, "bin")
    if layout == "hf":
        theirs.config.save_pretrained(tmp_path)
    elif layout == "llama":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    torch.save({"a": torch.ones(1), "code": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than weights") as caught:
        load_language_model(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)
    assert "safetensors.torch.save_file" in str(caught.value)
    assert "never run" not in capsys.readouterr().out


def test_missing_pieces(tmp_path, theirs, config):
    with pytest.raises(MissingFileError, match="nowhere: no such directory"):
        MambaLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"config.json: no such file"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    with pytest.raises(CheckpointError, match=r"no 'model_type'.*no 'd_model' and 'n_layer'.*it has hidden"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mambo"}')
    with pytest.raises(CheckpointError, match=r"transformers cannot read it.*mambo"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama', but MambaLM is for 'mamba'"):
        MambaLM.from_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    with pytest.raises(
        MissingFileError, match=r"no weights. Looked for model.safetensors.*found config.json"
    ):
        MambaLM.from_pretrained(tmp_path)
    write_original(tmp_path, theirs, "sharded bin")
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        MissingFileError, match=r"1 of 2 shards are missing: pytorch_model-00002-of-00002.bin"
    ):
        MambaLM.from_pretrained(tmp_path)


def test_hub_ids_are_downloaded(tmp_path, theirs, ids, monkeypatch):
    import huggingface_hub

    write_original(tmp_path, theirs, "bin")
    calls = []

    def snapshot_download(name, allow_patterns, **options):
        calls.append((name, tuple(allow_patterns), options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = MambaLM.from_pretrained("state-spaces/mamba-130m", revision="main")
    assert [call[0] for call in calls] == ["state-spaces/mamba-130m"] * 2
    assert "*.bin" not in calls[0][1]
    assert calls[1][1:] == (("*.bin",), {"revision": "main"})
    assert model.config._name_or_path == "state-spaces/mamba-130m"

    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MissingFileError, match=r"mamba-130m: no such local directory.*cannot find it\)"):
        MambaLM.from_pretrained("state-spaces/mamba-130m")
