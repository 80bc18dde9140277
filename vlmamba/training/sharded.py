"""The checkpoint layout "shards": every process writes its own part, any number of processes read them back.

    step-000123/shards/00001-of-00004.safetensors    the part of process 0, ...

Keys are ``model.<parameter>`` and ``optim.<parameter>.<moment>``. A file's header says for each of its tensors where it
begins in the whole one and how large that is. Reading by one process, for an export or for a strategy that holds whole
tensors, needs no process group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError
from vlmamba.models.language.weights import save_tensors
from vlmamba.training.old_shards import is_old, read_old

SHARDS = "shards"
MODEL, OPTIM = "model.", "optim."
PLACES = "places"
"""Entry of a file's header: JSON of ``{key: [first index in each dimension, size of the whole]}``."""
_NAME = re.compile(r"(\d{5})-of-(\d{5})\.safetensors")

Moments = dict[str, dict[str, Any]]
"""Optimizer state by parameter name, then by the optimizer's own name for it."""
Part = dict[str, tuple[torch.Tensor, list[int], list[int]]]
"""What a process holds: its piece of each tensor, where that begins, and the size of the whole."""


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint has this layout."""
    return (path / SHARDS).is_dir()


def own_part(tensors: Mapping[str, torch.Tensor], moments: Moments, *, is_main: bool) -> Part:
    """What this process writes of weights and optimizer state: its pieces, and in the first what all hold whole."""
    flat = {f"{MODEL}{name}": tensor.detach() for name, tensor in tensors.items()}
    for name, values in moments.items():
        flat |= {f"{OPTIM}{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    part: Part = {}
    for key, tensor in flat.items():
        piece = _piece(tensor)
        if piece is None and is_main:
            part[key] = (tensor, [0] * tensor.ndim, list(tensor.shape))
        elif piece is not None and piece[0].numel() and _is_first_copy(tensor):
            part[key] = (*piece, list(tensor.shape))
    return part


def write_part(directory: Path, part: Part, rank: int, world_size: int) -> Path:
    """Write what `own_part` gave; called by all processes."""
    file = directory / SHARDS / f"{rank + 1:05d}-of-{world_size:05d}.safetensors"
    file.parent.mkdir(exist_ok=True)
    places = json.dumps({key: [start, size] for key, (_, start, size) in part.items()})
    save_tensors({key: piece for key, (piece, _, _) in part.items()}, file, {PLACES: places})
    return file


def read_shards(path: Path) -> tuple[dict[str, torch.Tensor], Moments]:
    """Whole tensors on the CPU: weights by name, optimizer state by name and moment.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    with _readable(path):
        if is_old(path / SHARDS):
            return _split(read_old(path / SHARDS))
        with _opened(path) as files:
            whole: dict[str, torch.Tensor] = {}
            for file, places in files:
                for key, (_, size) in places.items():
                    if key not in whole:
                        whole[key] = torch.empty(size, dtype=_dtype(file, key))
            for key, tensor in whole.items():
                _fill(tensor, [0] * tensor.ndim, key, files)
    return _split(whole)


def load_shards(path: Path, tensors: Mapping[str, torch.Tensor]) -> Moments:
    """Read this process's part of the weights in place.

    Args:
        path: The checkpoint.
        tensors: What trains, by name; cut tensors or whole ones.

    Returns:
        Optimizer state, cut as the weights are.

    Raises:
        CheckpointError: A file is missing or damaged, or holds other tensors.
    """
    with _readable(path), _opened(path) as files:
        sizes = {key: size for _, places in files for key, (_, size) in places.items()}
        check_names(
            path, tensors, {k.removeprefix(MODEL): s for k, s in sizes.items() if k.startswith(MODEL)}
        )
        state = {f"{MODEL}{name}": tensor.detach() for name, tensor in tensors.items()}
        for key in sizes.keys() - state.keys():
            parameter = tensors[key.removeprefix(OPTIM).rpartition(".")[0]].detach()
            if parameter.ndim and list(parameter.shape) == sizes[key]:
                state[key] = torch.zeros_like(parameter)
            else:
                first = next(file for file, places in files if key in places)
                state[key] = torch.empty(sizes[key], dtype=_dtype(first, key))
        for key, tensor in state.items():
            local, start = _piece(tensor) or (tensor, [0] * tensor.ndim)
            _fill(local, start, key, files)
    return _split(state)[1]


def check_names(where: Path, wanted: Mapping[str, torch.Tensor], saved: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors that are not those that train.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    other = sorted(n for n in wanted.keys() & saved.keys() if tuple(wanted[n].shape) != tuple(saved[n]))
    if missing or unexpected or other:
        raise CheckpointError(
            f"{where} does not hold what trains now: missing {missing[:3]} ({len(missing)}), unexpected "
            f"{unexpected[:3]} ({len(unexpected)}), of another shape {other[:3]} ({len(other)})."
        )


def cut_like(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, if the target is cut; without any message between processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return whole
    device = target.to_local().device
    mesh = target.device_mesh
    if device.type == mesh.device_type:
        whole = whole.to(device)
    return distribute_tensor(whole, mesh, target.placements, src_data_rank=None)


def _piece(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]] | None:
    """This process's piece of a cut tensor and where that begins; None for a whole one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    chunks = tensor.__create_chunk_list__()
    start = list(chunks[0].offsets) if chunks else [0] * tensor.ndim
    return tensor.to_local(), start


def _is_first_copy(tensor: Any) -> bool:
    """Whether of the processes that hold the same piece this one comes first (`sharding.hybrid` keeps copies)."""
    coordinate = tensor.device_mesh.get_coordinate()
    return all(at == 0 for at, how in zip(coordinate, tensor.placements, strict=True) if how.is_replicate())


@contextmanager
def _opened(path: Path) -> Iterator[list[tuple[Any, dict[str, list[list[int]]]]]]:
    """The files of a checkpoint, each with its places."""
    from contextlib import ExitStack

    from safetensors import safe_open

    names = sorted(file.name for file in (path / SHARDS).iterdir())
    numbers = [match.groups() for name in names if (match := _NAME.fullmatch(name))]
    count = int(numbers[0][1]) if numbers else 0
    if [(f"{at:05d}", f"{count:05d}") for at in range(1, count + 1)] != numbers or not numbers:
        raise ValueError(f"files of {count} processes are wanted, there are {', '.join(names) or 'none'}")
    with ExitStack() as stack:
        files = []
        for name in names:
            file = stack.enter_context(safe_open(path / SHARDS / name, framework="pt"))
            files.append((file, json.loads((file.metadata() or {})[PLACES])))
        yield files


def _dtype(file: Any, key: str) -> torch.dtype:
    piece = file.get_slice(key)
    dtype: torch.dtype = piece[...].dtype if not piece.get_shape() else piece[:0].dtype
    return dtype


def _fill(target: torch.Tensor, start: Sequence[int], key: str, files: Sequence[Any]) -> None:
    """Copy whatever the files hold of a piece into it."""
    filled = 0
    end = [a + n for a, n in zip(start, target.shape, strict=True)]
    for file, places in files:
        if key not in places:
            continue
        held = file.get_slice(key)
        first, size = places[key][0], held.get_shape()
        low = [max(a, b) for a, b in zip(start, first, strict=True)]
        high = [min(a, b + n) for a, b, n in zip(end, first, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, first, strict=True))
        here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
        piece = held[there] if there else file.get_tensor(key)
        target[here].copy_(piece)
        filled += piece.numel()
    if filled != target.numel():
        raise ValueError(f"{key} is not whole: {filled} of {target.numel()} values are there")


def _split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Moments]:
    tensors = {k.removeprefix(MODEL): t for k, t in state.items() if k.startswith(MODEL)}
    moments: Moments = {}
    for key, value in state.items():
        if key.startswith(OPTIM):
            name, _, moment = key.removeprefix(OPTIM).rpartition(".")
            moments.setdefault(name, {})[moment] = value
    return tensors, moments


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever damage makes the readers raise, as one error that names the folder."""
    try:
        with torch.no_grad():
            yield
    except CheckpointError:
        raise
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path / SHARDS} is not a readable checkpoint ({said}). Continue from an older one: remove this "
            "folder and the file `latest` beside it."
        ) from error
