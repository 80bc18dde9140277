"""Reading and writing weights.

Reading is `vlmamba.models.language.weights`'s (safetensors, weights-only pickles, shards). Writing goes to a
temporary name beside the target and is renamed when it is complete, so a full disk or a crash never harms an
earlier file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError
from vlmamba.models.language.weights import (
    check_fits,
    load_state_dict_dir,
    load_state_dict_file,
    load_weights_only,
    weight_files,
)

__all__ = [
    "check_fits",
    "load_state_dict_dir",
    "load_state_dict_file",
    "load_weights_only",
    "save_json",
    "save_pickle",
    "save_state_dict",
    "weight_files",
    "write_atomically",
]

PICKLES = (".bin", ".pt", ".pth")


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it when it is complete.

    Args:
        path: The file; its directory is made when needed. What is there already stays until the new one is
            complete.
        write: Called with the temporary path.

    Raises:
        CheckpointError: Writing failed (a full disk, mostly); nothing at `path` has changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if not _is_write_failure(error):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({error}). "
            + (
                "The file that was there before is unchanged. "
                if path.exists()
                else "Nothing was left there. "
            )
            + "Free some space or write elsewhere, and try again."
        ) from error


def save_state_dict(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Save tensors as safetensors, or as a pickle when the name ends in .bin, .pt or .pth.

    Tensors that share memory (tied weights) are stored each by itself.

    Args:
        state: Names to tensors.
        path: The file.

    Raises:
        CheckpointError: Writing failed; an earlier file is unchanged.
    """
    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        stored: set[int] = set()
        for name, tensor in plain.items():
            place = tensor.untyped_storage().data_ptr()
            if place in stored:
                plain[name] = tensor.clone()
            stored.add(place)
        write_atomically(path, lambda file: save_file(plain, file, metadata={"format": "pt"}))
    elif path.suffix in PICKLES:
        save_pickle(plain, path)
    else:
        raise CheckpointError(
            f"{path}: weights are saved as .safetensors, .bin, .pt or .pth, not {path.suffix!r}"
        )


def save_pickle(content: object, path: str | Path) -> None:
    """Save nested containers of tensors with `torch.save`.

    Raises:
        CheckpointError: Writing failed; an earlier file is unchanged.
    """
    write_atomically(path, lambda file: torch.save(content, file))


def save_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Save a JSON object, indented and with sorted keys.

    Raises:
        CheckpointError: Writing failed; an earlier file is unchanged.
    """
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _is_write_failure(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    text = str(error)  # safetensors and torch wrap what the system said
    return any(
        part in text for part in ("No space left", "I/O error", "PytorchStreamWriter", "unexpected pos")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
