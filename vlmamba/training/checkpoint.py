"""Checkpoints of a run: everything that is needed to go on exactly where it stopped.

    checkpoints/step-000123/model.safetensors   tensors that train (by requires_grad, never by name)
                            optimizer.pt        its state by parameter name
                            rng.pt              states of the random generators of every process
                            state.json          step, position in the data, counters, settings, fingerprint of the
                                                frozen parts, a SHA-256 of every other file and one of itself
    checkpoints/latest                          name of the newest complete one

In the layout "shards" (`vlmamba.training.sharded`) a folder ``shards/``, to which every process writes its own
part, stands in place of the first two. Any strategy on any number of processes goes on from either.

A checkpoint is written under a hidden name and renamed when all of it is on the disk, so whatever has the name of a
checkpoint is complete. Nothing in one can run code when it is read, and every file is compared with its digest before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmamba.common.digests import digests_of, fault, seal
from vlmamba.common.files import read_json, replace_json, replace_text
from vlmamba.common.processes import Group
from vlmamba.config import FREE, Config, diff_configs, marked
from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.language.weights import load_state_dict_file, load_weights_only, save_tensors
from vlmamba.training.sharded import Moments, check_names, cut_like, is_sharded, read_shards

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE, WEIGHTS, OPTIMIZER, RNG = "state.json", "model.safetensors", "optimizer.pt", "rng.pt"
OLD_RNG = "rng_ranks.pt"
"""Where the generators of several processes were before they were all in `RNG`."""
SEAL = "sha256"
_STEP_NAME = re.compile(r"step-(\d{6,})")


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
        config: The settings of the run, as plain values.
        files: A digest of every other file of the checkpoint, by name.
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
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)


# --- writing ------------------------------------------------------------------------------------------------


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def write_whole(directory: Path, tensors: Mapping[str, torch.Tensor], moments: Moments) -> list[Path]:
    """Write whole tensors and the optimizer's state; returns the files."""
    save_tensors(tensors, directory / WEIGHTS)
    torch.save(moments, directory / OPTIMIZER)
    return [directory / WEIGHTS, directory / OPTIMIZER]


def write_state(directory: Path, state: RunState, generators: Sequence[dict[str, Any]]) -> None:
    """Write the random generators of every process and, last, where the run stands."""
    torch.save(list(generators), directory / RNG)
    files = {**state.files, **digests_of(directory, [directory / RNG])}
    content = dataclasses.asdict(dataclasses.replace(state, files=files))
    replace_json(directory / STATE, {**content, SEAL: seal(content)})


def publish(run_dir: Path, step: int, *, keep_last: int, keep_every: int = 0) -> Path:
    """Point ``latest`` at a complete checkpoint and remove the old ones that need not be kept."""
    final = checkpoint_path(run_dir, step)
    replace_text(run_dir / CHECKPOINTS / LATEST, final.name + "\n")
    for old in complete_checkpoints(run_dir)[:-keep_last] if keep_last else []:
        kept = keep_every and step_of(old) % keep_every == 0
        if old != final and not kept:
            hidden = old.with_name(f".{old.name}.old")
            old.rename(hidden)  # at no moment does a part of it keep its name
            shutil.rmtree(hidden, ignore_errors=True)
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
        named = run_dir / CHECKPOINTS / pointer.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
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
        MissingFileError: There is none.
        CheckpointError: It is damaged, or another version of vlmamba wrote other fields.
    """
    file = path / STATE
    if not file.is_file():
        raise MissingFileError(f"{path} is not a checkpoint: it has no {STATE}.")
    content = read_json(file)
    wanted = content.pop(SEAL, None) if isinstance(content, dict) else None
    try:
        state = RunState(**content)
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged or of another version of vlmamba: {error}.") from error
    if (state.files or wanted) and seal(content) != wanted:
        raise CheckpointError(f"{file} is damaged: it does not hold what was written (SHA-256).")
    fresh = dataclasses.asdict(RunState())
    strange = [name for name, value in content.items() if not isinstance(value, type(fresh[name]))]
    if strange:
        raise CheckpointError(f"{file} is damaged: {', '.join(strange)} of another type.")
    return state


def verify(path: Path, state: RunState, group: Group | None = None) -> None:
    """Compare every file of a checkpoint with its digest; the processes of a group share the files.

    Raises:
        CheckpointError: A file is missing or damaged; in all processes.
    """
    group = group or Group()
    if not state.files and group.is_main:
        logger.warning("%s has no digests (an older version wrote it): its files are not verified", path)
    mine = [fault(path, name, state.files[name]) for name in group.share(sorted(state.files))]
    for problem in (p for problems in group.gather(mine) for p in problems if p is not None):
        raise CheckpointError(
            f"{problem}. Continue from an older checkpoint: remove {path} and the file `{LATEST}` beside it."
        )


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], Moments]:
    """Weights and optimizer state by name, as whole tensors on the CPU, from either layout.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if is_sharded(path):
        return read_shards(path)
    moments = load_weights_only(path / OPTIMIZER)
    if not isinstance(moments, dict) or not all(isinstance(values, dict) for values in moments.values()):
        raise CheckpointError(
            f"{path / OPTIMIZER} does not hold the state of an optimizer by parameter name."
        )
    return load_state_dict_file(path / WEIGHTS), moments


def read_trained(path: Path) -> dict[str, torch.Tensor]:
    """Weights alone; see `read_whole`."""
    return read_shards(path)[0] if is_sharded(path) else load_state_dict_file(path / WEIGHTS)


def load_trained(path: Path, model: nn.Module) -> None:
    """Put the trained tensors of a checkpoint into the model, all of them and no others.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    copy_into(path, trained_tensors(model), read_trained(path))


@torch.no_grad()
def copy_into(path: Path, wanted: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into those of the model, cut or not.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    check_names(path, wanted, {n: t.shape for n, t in saved.items()})
    for name, tensor in wanted.items():
        tensor.copy_(cut_like(tensor, saved[name]))


def load_rng(path: Path, group: Group, device: torch.device | None = None) -> None:
    """Put back the random generators of a process; on another number of processes, all but the first begin anew.

    Args:
        path: The checkpoint.
        group: The processes.
        device: See `rng_state`.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = path / OLD_RNG if (path / OLD_RNG).is_file() else path / RNG
    loaded: Any = load_weights_only(file)
    saved = loaded if isinstance(loaded, list) else [loaded]
    if group.rank < len(saved) and (group.is_main or len(saved) == group.world_size):
        try:
            set_rng_state(saved[group.rank], device)
        except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} does not hold the states of random generators: {error}."
            ) from error


# --- is it the same run? ------------------------------------------------------------------------------------


def check_same_config(saved: Config, given: Config, where: Path, *, force: bool = False) -> None:
    """Refuse to go on with settings that would change the result, or, if forced, name them only.

    Raises:
        ConfigError: Lists every dotted key that differs.
    """
    free = marked(type(given), FREE)
    changes = [
        c for c in diff_configs(saved, given) if not f"{c.path}.".startswith(tuple(f"{k}." for k in free))
    ]
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
    check_frozen(saved, frozen, where)


def check_frozen(saved: RunState, frozen: str, where: Path) -> None:
    """Refuse other frozen weights than the checkpoint was trained with.

    Raises:
        CheckpointError: Their fingerprints differ.
    """
    if saved.frozen != frozen:
        raise CheckpointError(
            f"the frozen weights are not those that {where} was trained with (fingerprint "
            f"{saved.frozen[:12]}, now "
            f"{frozen[:12]}): the files of encoder, language model, init_from or chat template have changed. Restore "
            "them."
        )


def frozen_fingerprint(model: nn.Module, *, samples: int = 1024, template: str = "") -> str:
    """A hash of the frozen parameters: names, shapes, dtypes, and up to `samples` values of each; and of a chat
    template that stands in a file.
    """
    digest = hashlib.sha256(template.encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().flatten()
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        taken = flat[:: max(1, flat.numel() // samples)][:samples]
        digest.update(taken.float().cpu().numpy().tobytes())
    return digest.hexdigest()
