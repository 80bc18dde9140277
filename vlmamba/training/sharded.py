"""The checkpoint layout "shards": every process writes its own part, any number of processes read it back.

    step-000123/shards/.metadata        which tensor lies where (torch.distributed.checkpoint)
                       __0_0.distcp     the part of process 0, ...

Keys are ``model.<parameter>`` and ``optim.<parameter>.<moment>``. Reading by one process, for an export or for a
strategy that holds whole tensors, needs no process group.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError

SHARDS = "shards"
MODEL, OPTIM = "model.", "optim."

Moments = dict[str, dict[str, Any]]
"""Optimizer state by parameter name, then by the optimizer's own name for it."""


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint has this layout."""
    return (path / SHARDS).is_dir()


def flat_state(tensors: Mapping[str, torch.Tensor], moments: Moments) -> dict[str, torch.Tensor]:
    """Weights and optimizer state under one level of keys."""
    flat = {f"{MODEL}{name}": tensor.detach() for name, tensor in tensors.items()}
    for name, values in moments.items():
        flat |= {f"{OPTIM}{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    return flat


def write_shards(directory: Path, state: dict[str, torch.Tensor], group: Any) -> None:
    """Write this process's part; called by all of them.

    Raises:
        OSError: A process could not write; in all of them.
    """
    import torch.distributed.checkpoint as dcp

    with checkpoint_errors():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / SHARDS), process_group=group)


def start_writing_shards(directory: Path, state: dict[str, torch.Tensor], group: Any) -> Any:
    """Copy this process's part to the memory of the host and write it in a thread.

    Returns:
        A future; that of the first process is done when all have written.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(directory / SHARDS)
    with checkpoint_errors():
        return dcp.async_save(state, storage_writer=writer, process_group=group)


def read_shards(path: Path) -> tuple[dict[str, torch.Tensor], Moments]:
    """Whole tensors on the CPU: weights by name, optimizer state by name and moment.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    sizes = _metadata(path)
    state = {key: torch.empty(item.size, dtype=item.properties.dtype) for key, item in sizes.items()}
    _read(path, state, no_dist=True)
    return _split(state)


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
    sizes = _metadata(path)
    check_names(
        path, tensors, {k.removeprefix(MODEL): v.size for k, v in sizes.items() if k.startswith(MODEL)}
    )
    state = {f"{MODEL}{name}": tensor.detach() for name, tensor in tensors.items()}
    for key, item in sizes.items():
        name, _, moment = key.removeprefix(OPTIM).rpartition(".")
        if key.startswith(OPTIM) and moment:
            parameter = tensors[name]
            if item.size == parameter.shape and parameter.ndim:
                state[key] = torch.zeros_like(parameter.detach())
            else:
                state[key] = torch.zeros(item.size, dtype=item.properties.dtype)
    _read(path, state, no_dist=False)
    return _split(state)[1]


def check_names(
    where: Path, wanted: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Size | tuple[int, ...]]
) -> None:
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


@torch.no_grad()
def place(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be cut."""
    target.copy_(cut_like(target, whole))


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


def _split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Moments]:
    tensors = {k.removeprefix(MODEL): t for k, t in state.items() if k.startswith(MODEL)}
    moments: Moments = {}
    for key, value in state.items():
        if key.startswith(OPTIM):
            name, _, moment = key.removeprefix(OPTIM).rpartition(".")
            moments.setdefault(name, {})[moment] = value
    return tensors, moments


def _metadata(path: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    with checkpoint_errors(damaged=path):
        return dict(dcp.FileSystemReader(path / SHARDS).read_metadata().state_dict_metadata)


def _read(path: Path, state: dict[str, torch.Tensor], *, no_dist: bool) -> None:
    import torch.distributed.checkpoint as dcp

    with checkpoint_errors(damaged=path):
        dcp.load(state, storage_reader=dcp.FileSystemReader(path / SHARDS), no_dist=no_dist)


@contextmanager
def checkpoint_errors(damaged: Path | None = None) -> Iterator[None]:
    """What torch raises, as an `OSError` while writing and as ours while reading; its notes are not for users."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is (un|dis|not).*")
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.*")
            yield
    except (CheckpointException, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = first_reason(error)
        if damaged is None:
            raise OSError(reason) from error
        raise CheckpointError(
            f"{damaged / SHARDS} is not a readable checkpoint ({reason}). Continue from an older one: remove this "
            "folder and the file `latest` beside it."
        ) from error


def first_reason(error: BaseException) -> str:
    """The cause of an error that torch gathered over processes, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {first_reason(cause)}"
    return (str(error) or type(error).__name__).splitlines()[0]
