"""Checkpoints of a run: everything that is needed to go on exactly where it stopped.

    checkpoints/step-000123/model.safetensors   tensors that train (by requires_grad, never by name)
                            optimizer.pt        its state by parameter name
                            state.json          step, position in the data, counters, fingerprint of the
                                                frozen parts
                            rng.pt              states of the random generators
                            rng_ranks.pt        those of every process, where there were several
    checkpoints/latest                          name of the newest complete one

In the layout "shards" (`vlmamba.training.sharded`) a folder ``shards/``, to which every process writes its own
part, stands in place of the first two. Any strategy on any number of processes goes on from either.

A checkpoint is written under a hidden name and renamed when all of it is on the disk, so whatever has the
name of a checkpoint is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmamba.config import Config, diff_configs
from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.language.weights import load_state_dict_file, load_weights_only
from vlmamba.training.optim import load_named_state, named_state
from vlmamba.training.run_dir import whole_directory, write_errors, write_text
from vlmamba.training.sharded import check_names, is_sharded, place, read_shards

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_STEP_NAME = re.compile(r"step-(\d{6,})")

# What may differ between a run and its continuation: nothing that changes the result beyond rounding.
FREE_KEYS = (
    "output",
    "log_every",
    "save_every",
    "save_async",
    "keep_last",
    "keep_every",
    "loggers",
    "data.num_workers",
    "device",
    "parallel",
    "sharding",
    "batch.micro_batch_size",
    "batch.tokens_per_micro_batch",
    "gradient_checkpointing",
    "checkpoint_every_nth",
    "compile",
    "max_nonfinite_steps",
    "stall_seconds",
    "evaluations",
)


@dataclasses.dataclass
class RunState:
    """Where a run is. All counts are over the whole run and all processes.

    Attributes:
        step: Optimizer steps done.
        total_steps: Steps of the whole run, on which the schedule depends.
        samples: Samples trained on, repeats counted.
        tokens: Their tokens, image tokens included.
        supervised: Their supervised tokens.
        skipped: Rows that could not be used.
        nonfinite: Steps whose loss or gradient was not finite, and which were not taken.
        frozen: Fingerprint of the frozen parameters.
        data: Where the data loader stands (`vlmamba.data.Loader.state_dict`).
    """

    step: int = 0
    total_steps: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    skipped: int = 0
    nonfinite: int = 0
    frozen: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


# --- writing ------------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    *,
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Write a checkpoint of the present step, point ``latest`` at it, and remove old ones.

    Raises:
        CheckpointError: The disk is full or fails; earlier checkpoints are as they were.
    """
    tensors, moments = trained_tensors(model), named_state(optimizer)
    with whole_directory(checkpoint_path(run_dir, state.step)) as directory, write_errors():
        write_whole(directory, tensors, moments)
        write_state(directory, state, [rng_state()])
    return publish(run_dir, state.step, keep_last=keep_last, keep_every=keep_every)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def write_whole(
    directory: Path, tensors: Mapping[str, torch.Tensor], moments: dict[str, dict[str, Any]]
) -> None:
    """Write whole tensors and the optimizer's state."""
    from safetensors.torch import save_file

    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(on_cpu, directory / "model.safetensors", metadata={"format": "pt"})
    torch.save(moments, directory / "optimizer.pt")


def write_state(directory: Path, state: RunState, generators: list[dict[str, Any]]) -> None:
    """Write where the run stands, and the random generators of each process."""
    torch.save(generators[0], directory / "rng.pt")
    if len(generators) > 1:
        torch.save(generators, directory / "rng_ranks.pt")
    (directory / "state.json").write_text(
        json.dumps(dataclasses.asdict(state), indent=2) + "\n", encoding="utf-8"
    )


def publish(run_dir: Path, step: int, *, keep_last: int, keep_every: int = 0) -> Path:
    """Point ``latest`` at a complete checkpoint and remove the old ones that need not be kept."""
    final = checkpoint_path(run_dir, step)
    write_text(run_dir / CHECKPOINTS / LATEST, final.name + "\n")
    if keep_last:
        for old in complete_checkpoints(run_dir)[:-keep_last]:
            kept = keep_every and step_of(old) % keep_every == 0
            if old != final and not kept:
                remove_directory(old)
    return final


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that require gradients, and the saved buffers of the modules that own one (running
    statistics).
    """
    tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def remove_directory(path: Path) -> None:
    """Remove a checkpoint; at no moment does a part of it keep its name."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for pattern in (".*.tmp", ".*.old"):
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """States of all random generators, in types that load without running code.

    Args:
        device: The only GPU whose generator counts, where several processes share a host; None: all of them.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(device),
    }


def _cuda_states(device: torch.device | None) -> list[torch.Tensor]:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return []
    return torch.cuda.get_rng_state_all() if device is None else [torch.cuda.get_rng_state(device)]


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put all random generators back."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        if device is None:
            torch.cuda.set_rng_state_all(state["cuda"])
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"][0], device)


# --- finding and reading ------------------------------------------------------------------------------------


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [
        (int(m.group(1)), p)
        for p in (run_dir / CHECKPOINTS).glob("step-*")
        if (m := _STEP_NAME.fullmatch(p.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names; the newest one where a kill came before it was written."""
    pointer = run_dir / CHECKPOINTS / LATEST
    if pointer.is_file():
        named = run_dir / CHECKPOINTS / pointer.read_text(encoding="utf-8").strip()
        if _STEP_NAME.fullmatch(named.name) and named.is_dir():
            return named
    found = complete_checkpoints(run_dir)
    return found[-1] if found else None


def latest_step(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    path = latest_checkpoint(run_dir)
    return None if path is None else step_of(path)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> RunState:
    """The state file of a checkpoint.

    Raises:
        CheckpointError: It is missing or damaged, or another version of vlmamba wrote other fields.
    """
    file = path / "state.json"
    try:
        return RunState(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is not a checkpoint: it has no state.json.") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or of another version of vlmamba: {error}.") from error


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Put model, optimizer and random generators of one process where a checkpoint left them.

    Raises:
        CheckpointError: The checkpoint's tensors are not those that train, or a file is damaged.
    """
    state = read_state(path)
    tensors, moments = read_whole(path)
    wanted = trained_tensors(model)
    check_names(path, wanted, {n: t.shape for n, t in tensors.items()})
    copy_into(wanted, tensors)
    load_named_state(optimizer, moments)
    load_rng(path)
    return state


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Weights and optimizer state by name, as whole tensors on the CPU, from either layout.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if is_sharded(path):
        return read_shards(path)
    moments = load_weights_only(path / "optimizer.pt")
    assert isinstance(moments, dict)
    return load_state_dict_file(path / "model.safetensors"), moments


def read_trained(path: Path) -> dict[str, torch.Tensor]:
    """Weights alone; see `read_whole`."""
    return read_shards(path)[0] if is_sharded(path) else load_state_dict_file(path / "model.safetensors")


def load_trained(path: Path, model: nn.Module) -> None:
    """Put the trained tensors of a checkpoint into the model, all of them and no others.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    saved, wanted = read_trained(path), trained_tensors(model)
    check_names(path, wanted, {n: t.shape for n, t in saved.items()})
    copy_into(wanted, saved)


def copy_into(wanted: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into those of the model, cut or not."""
    for name, tensor in wanted.items():
        place(tensor, saved[name])


def load_rng(path: Path, *, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
    """Put back the random generators of a process; on another number of processes, all but the first begin anew.

    Raises:
        CheckpointError: The file is damaged.
    """
    ranks = path / "rng_ranks.pt"
    saved = load_weights_only(ranks) if ranks.is_file() else [load_weights_only(path / "rng.pt")]
    assert isinstance(saved, list)
    if rank < len(saved) and (rank == 0 or len(saved) == world_size):
        set_rng_state(saved[rank], device)


# --- is it the same run? ------------------------------------------------------------------------------------


def check_same_config(saved: Config, given: Config, where: Path, *, force: bool = False) -> None:
    """Refuse to go on with settings that would change the result, or, if forced, name them only.

    Raises:
        ConfigError: Lists every dotted key that differs.
    """
    changes = [c for c in diff_configs(saved, given) if not _is_free(c.path)]
    if changes:
        listing = "\n".join(f"  {change}" for change in changes)
        if force:
            logger.warning("going on with settings that differ from those of %s:\n%s", where, listing)
            return
        raise ConfigError(
            f"the config differs from that of the run in {where.parent}, so continuing would be another "
            "experiment:\n"
            f"{listing}\nUse the settings of {where} (vlmamba train {where} --resume), or another --output. "
            "--force goes on with the new ones all the same."
        )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def check_same_rest(saved: RunState, *, frozen: str, total_steps: int, where: Path) -> None:
    """Refuse to go on over other frozen weights or another number of steps than the checkpoint was trained
    with.

    Raises:
        CheckpointError: Says which of them differs.
    """
    if saved.total_steps != total_steps:
        raise CheckpointError(
            f"{where} belongs to a run of {saved.total_steps} steps, now there are {total_steps}: the "
            "batches are cut "
            "otherwise. Restore the data and settings, or start another run with --init_from."
        )
    if saved.frozen != frozen:
        raise CheckpointError(
            f"the frozen weights are not those that {where} was trained with (fingerprint "
            f"{saved.frozen[:12]}, now "
            f"{frozen[:12]}): the files of encoder, language model or init_from have changed. Restore them."
        )


def frozen_fingerprint(model: nn.Module, *, samples: int = 1024) -> str:
    """A hash of the frozen parameters: names, shapes, dtypes, and up to `samples` values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().flatten()
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        taken = flat[:: max(1, flat.numel() // samples)][:samples]
        digest.update(taken.float().cpu().numpy().tobytes())
    return digest.hexdigest()
