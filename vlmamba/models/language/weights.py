"""Reading weights from files, with errors that name the file, the key and the way out.

Reads safetensors and weights-only pickles, single files and shards with an index. Nothing is ever unpickled
that could run code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError, MissingFileError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
LISTED = 12


def load_state_dict_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, on CPU.

    Args:
        path: A .safetensors file, or a pickle (.bin, .pt, .pth) that holds only weights.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: The file is damaged, is not weights-only, or holds no flat mapping of names to
            tensors.
    """
    path = Path(path)
    content = load_weights_only(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping of names to tensors")
    wrong = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path}: these entries are not tensors: {_listed(wrong)}. "
            "A training checkpoint usually keeps the weights under one of them; save that part alone."
        )
    return dict(content)


def load_weights_only(path: str | Path) -> object:
    """The content of one weights file; nested containers of tensors are allowed in pickles.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: The file is damaged or is not weights-only.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}). It may be cut off or a Git LFS pointer; "
                "download it again."
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: this pickle holds more than weights, or is damaged, and is not loaded, because "
            "unpickling it could run code. If you trust where it comes from, convert it once on a machine "
            "you can spare: safetensors.torch.save_file(torch.load(path, weights_only=False), "
            f"'model.safetensors'), and use that file. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        raise CheckpointError(
            f"{path}: not a readable weights file ({(str(error) or 'it ends early').splitlines()[0]}). "
            "It may be cut off or a Git LFS pointer; download it again."
        ) from error


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file, or to a pickle that holds nothing else.

    Tensors that share memory (tied weights) are stored each by itself. Call it within
    `vlmamba.common.files.replaced` or `replaced_directory`.

    Args:
        tensors: By name.
        path: Its suffix says which.
        metadata: For the header of a .safetensors file.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix != ".safetensors":
        torch.save(plain, path)
        return
    from safetensors.torch import save_file

    stored: set[int] = set()
    for name, tensor in plain.items():
        place = tensor.untyped_storage().data_ptr()
        if place in stored:
            plain[name] = tensor.clone()
        stored.add(place)
    save_file(plain, path, metadata={"format": "pt", **(metadata or {})})


def weight_files(directory: str | Path) -> list[Path]:
    """The weight files of a model directory, shards in the order of their index.

    safetensors are preferred over pickles.

    Raises:
        MissingFileError: No weights, or a shard of the index is missing.
        CheckpointError: The index is not readable.
    """
    directory = Path(directory)
    for index_name, single_name in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (directory / single_name).is_file():
            return [directory / single_name]
        index = directory / index_name
        if index.is_file():
            files = [directory / name for name in _shards(index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise MissingFileError(
                    f"{index}: {len(missing)} of {len(files)} shards are missing: {_listed(missing)}. "
                    "Download them into the same directory."
                )
            return files
    found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    raise MissingFileError(
        f"{directory}: no weights. Looked for {', '.join((*SINGLE_FILES, *INDEX_FILES))}; "
        f"found {_listed(found) if found else 'nothing'}."
    )


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds weights that `weight_files` finds."""
    return any((directory / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))


def load_state_dict_dir(directory: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory (single file or shards), on CPU.

    Raises:
        MissingFileError: No weights, or a shard is missing.
        CheckpointError: A file is damaged, or two shards hold the same name.
    """
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        part = load_state_dict_file(file)
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{file}: holds names that another shard holds too: {_listed(twice)}")
        state.update(part)
    return state


def check_fits(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size | tuple[int, ...]],
    *,
    where: str,
    tied: Iterable[frozenset[str]] = (),
) -> None:
    """Raise unless the names and shapes of `state` are the expected ones.

    Args:
        state: Names to tensors.
        expected: Names to shapes.
        where: What is loaded, for the message.
        tied: Groups of names that share one tensor: one of a group is enough.

    Raises:
        CheckpointError: Lists missing and unexpected names and both shapes of each that differs.
    """
    covered = {name for group in tied if group & state.keys() for name in group}
    shapes = {n: (state[n].shape, shape) for n, shape in expected.items() if n in state}
    _refuse(
        where,
        missing=expected.keys() - state.keys() - covered,
        unexpected=state.keys() - expected.keys(),
        shapes={name: both for name, both in shapes.items() if tuple(both[0]) != tuple(both[1])},
    )


def check_loaded(model: Any, info: Mapping[str, Any], *, where: str, leaves_rest: bool = False) -> None:
    """As `check_fits`, from the report of transformers' `from_pretrained` (with `ignore_mismatched_sizes`).

    Args:
        model: What was loaded.
        info: The report, of `output_loading_info`.
        where: What was loaded, for the message.
        leaves_rest: The model is a part of what the checkpoint holds.
    """
    _refuse(
        where,
        missing=set(info["missing_keys"]) & model.state_dict().keys(),
        unexpected=set() if leaves_rest else set(info["unexpected_keys"]),
        shapes={name: (in_file, in_model) for name, in_file, in_model in info["mismatched_keys"]},
    )


def _refuse(
    where: str, missing: Set[str], unexpected: Set[str], shapes: Mapping[str, tuple[Any, Any]]
) -> None:
    differing = [
        f"{name}: {tuple(in_file)} in the checkpoint, {tuple(in_model)} in the model"
        for name, (in_file, in_model) in sorted(shapes.items())
    ]
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": differing}
    problems = [f"{len(found)} {kind}: {_listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise CheckpointError(
            f"{where}: the weights do not fit the model. {'; '.join(problems)}. "
            "Is this the checkpoint, and the config.json, of this model and size?"
        )


def _shards(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return list(dict.fromkeys(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index with a 'weight_map' ({error!r})") from error


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f", and {rest} more" if rest > 0 else "")
