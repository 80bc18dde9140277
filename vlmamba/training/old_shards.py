"""Reading the shards of checkpoints written before vlmamba had a format of its own: torch.distributed.checkpoint's.

Their ``.metadata`` is a pickle, which torch reads without restriction; here only the classes that describe tensors are
known, and anything else is refused before it is built. The tensors themselves are read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
KNOWN = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What a description of tensors is built of; dtypes besides."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(f"it names {module}.{name}, which does not describe tensors")


def is_old(folder: Path) -> bool:
    """Whether shards are in that format."""
    return (folder / METADATA).exists()


def read_old(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors by key, on the CPU.

    Raises:
        CheckpointError: The metadata holds something else than descriptions of tensors, or a tensor is not whole.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            described = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / METADATA} is not loaded, because reading it could run code: {error}. Do not use this file."
        ) from error
    whole = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in described.state_dict_metadata.items()
    }
    filled = dict.fromkeys(whole, 0)
    for index, place in described.storage_data.items():
        with (folder / Path(place.relative_path).name).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        piece = torch.load(content, map_location="cpu", weights_only=True)
        where = tuple(slice(o, o + n) for o, n in zip(index.offset, piece.shape, strict=True))
        whole[index.fqn][where] = piece
        filled[index.fqn] += piece.numel()
    cut = [key for key, tensor in whole.items() if filled[key] != tensor.numel()]
    if cut:
        raise CheckpointError(f"{folder} does not hold all of {cut[0]} ({len(cut)} tensors are not whole).")
    return whole
