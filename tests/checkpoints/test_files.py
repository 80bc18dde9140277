from __future__ import annotations

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vlmamba.common.files import replaced_directory
from vlmamba.errors import CheckpointError, MissingFileError, WriteError
from vlmamba.models.language import weights as files


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    weight = torch.randn(4, 3)
    return {
        "a": weight,
        "tied": weight,
        "b": torch.arange(6).reshape(2, 3).T,
        "half": torch.ones(2).bfloat16(),
    }


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pt"])
def test_round_trip(tmp_path, state, name):
    files.save_tensors(state, tmp_path / name)
    again = files.load_state_dict_file(tmp_path / name)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor)


def no_space(*args: object, **kwargs: object) -> None:
    Path(args[1]).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("m.safetensors", safetensors.torch, "save_file"), ("m.bin", torch, "save")],
)
def test_full_disk_keeps_the_earlier_file(tmp_path, state, monkeypatch, name, module, function):
    path = tmp_path / "folder"
    with replaced_directory(path) as folder:
        files.save_tensors(state, folder / name)
    before = (path / name).read_bytes()
    monkeypatch.setattr(module, function, no_space)
    with (
        pytest.raises(WriteError, match=r"writing .*folder failed: .*No space left on device"),
        replaced_directory(path) as folder,
    ):
        files.save_tensors({"a": torch.zeros(9)}, folder / name)
    assert (path / name).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04broken"])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        files.load_state_dict_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_other_content(tmp_path):
    with pytest.raises(MissingFileError, match=r"m.bin: no such weights file"):
        files.load_state_dict_file(tmp_path / "m.bin")
    torch.save([torch.ones(1)], tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="holds a list, not a mapping"):
        files.load_state_dict_file(tmp_path / "m.bin")
    torch.save({"model": {"w": torch.ones(1)}, "step": 3}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"entries are not tensors: model, step. A training checkpoint"):
        files.load_state_dict_file(tmp_path / "m.bin")


def test_shards_that_overlap(tmp_path):
    for name in ("one.bin", "two.bin"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"w": "one.bin", "x": "two.bin"}}')
    with pytest.raises(CheckpointError, match=r"two.bin: holds names that another shard holds too: w"):
        files.load_state_dict_dir(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index with a 'weight_map'"):
        files.load_state_dict_dir(tmp_path)
