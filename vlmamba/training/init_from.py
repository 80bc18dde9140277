"""Starting from trained weights: what was loaded, and a refusal where parts do not belong together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmamba.common.digests import check_folder
from vlmamba.common.files import read_json
from vlmamba.config import load_yaml
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.builder import CONNECTOR_CONFIG_FILE, CONNECTOR_FILE
from vlmamba.models.language.loading import read_config_dict
from vlmamba.models.language.weights import has_weights, load_state_dict_dir, load_state_dict_file
from vlmamba.training.checkpoint import CHECKPOINTS, latest_checkpoint, read_state, read_trained, verify

logger = logging.getLogger(__name__)

CONNECTOR = "multi_modal_projector"
RUN_CONFIG = "config.yaml"


class SavedWeights(NamedTuple):
    """Tensors by their names in the model, and what is known of the connector they belong to."""

    path: Path
    tensors: dict[str, torch.Tensor]
    connector: dict[str, Any] | None
    trained_only: bool = False
    """A checkpoint, which holds of each part what trained in that run."""


class LoadRow(NamedTuple):
    """What happened to one part of the model."""

    part: str
    loaded: int
    missing: int
    unexpected: int
    mismatched: int


def init_from(model: nn.Module, source: str | Path) -> list[LoadRow]:
    """Load the weights of an earlier run into the model.

    A part (vision_tower, multi_modal_projector, language_model) of which the source holds nothing keeps its
    weights, as a stage-1 run holds only a connector. A part of which it holds something must be there to the
    last parameter; only a checkpoint may lack, outside the connector, what was frozen in its run.

    Args:
        model: Left as it is when something does not fit.
        source: A run's folder (its newest checkpoint), a checkpoint, an exported model, or a
            connector.safetensors.

    Returns:
        The table, also logged.

    Raises:
        MissingFileError: There are no weights there.
        CheckpointError: The connector is of another type or its options differ, or tensors are missing,
            unexpected or of another shape.
    """
    saved = read_weights(Path(source))
    check_connector(model, saved)
    # A tied tensor has several names; a file holds one of them, not always the model's first.
    wanted = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    rows, problems = _compare(model, wanted, saved)
    if problems:
        raise CheckpointError(
            f"the weights in {saved.path} do not fit the model:\n{format_rows(rows)}\n"
            + "\n".join(problems[:8])
        )
    with torch.no_grad():
        for name, tensor in saved.tensors.items():
            wanted[name].copy_(tensor)
    logger.info("initialised from %s\n%s", saved.path, format_rows(rows))
    return rows


def read_weights(source: Path) -> SavedWeights:
    """Find and read the weights that a path means; see `init_from`.

    Raises:
        MissingFileError: There are none.
    """
    if source.is_file() and source.suffix == ".safetensors":
        return _connector_file(source)
    if (source / CHECKPOINTS).is_dir():
        checkpoint = latest_checkpoint(source)
        if checkpoint is not None:
            saved = _checkpoint(checkpoint)
            if not any(".lora_" in name for name in saved.tensors):
                return saved
            if not (source / "export" / "config.json").is_file():
                raise CheckpointError(
                    f"init_from: {source} is a run with adapters (lora) that has no export, and only an export holds "
                    f"them merged. Finish it, or export it: vlmamba convert {source} {source / 'export'}"
                )
    if (source / "state.json").is_file():
        return _checkpoint(source)
    for folder in (source, source / "export"):
        if (folder / "config.json").is_file() and has_weights(folder):
            check_folder(folder)
            config = read_config_dict(folder)
            return SavedWeights(folder, load_state_dict_dir(folder), config.get("connector_config"))
        if (folder / CONNECTOR_FILE).is_file():
            return _connector_file(folder / CONNECTOR_FILE)
    state = "holds no checkpoint and no exported model" if source.exists() else "does not exist"
    raise MissingFileError(
        f"init_from: {source} {state}. Give the folder of a finished run, one of its checkpoints, an "
        "exported model, "
        f"or a {CONNECTOR_FILE}."
    )


def _checkpoint(path: Path) -> SavedWeights:
    state = read_state(path)
    verify(path, state)
    settings, older = state.config, path.parent.parent / RUN_CONFIG
    if not settings and older.is_file():
        settings = load_yaml(older).to_dict()
    connector = settings["model"]["connector"] if settings else None
    return SavedWeights(path, read_trained(path), connector, trained_only=True)


def _connector_file(path: Path) -> SavedWeights:
    config = path.with_name(CONNECTOR_CONFIG_FILE)
    if not config.is_file():
        raise MissingFileError(
            f"init_from: {path} lies there without {config.name}, which says what connector it is."
        )
    check_folder(path.parent, [path.name, config.name])
    tensors = {f"{CONNECTOR}.{name}": t for name, t in load_state_dict_file(path).items()}
    return SavedWeights(path, tensors, read_json(config))


def check_connector(model: nn.Module, saved: SavedWeights) -> None:
    """Refuse weights of another connector.

    Raises:
        CheckpointError: Names both connectors.
    """
    connector: Any = getattr(model, CONNECTOR, None)
    held = any(n.startswith(f"{CONNECTOR}.") for n in saved.tensors)
    if connector is None or saved.connector is None or not held:
        return
    if not isinstance(saved.connector, dict) or "name" not in saved.connector:
        raise CheckpointError(f"{saved.path}: what is written beside it does not describe a connector.")
    ours = resolve_options(connector.name, connector.options)
    theirs = resolve_options(saved.connector["name"], saved.connector.get("options", {}))
    if ours != theirs:
        differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        there, here = (", ".join(f"{k}={v}" for k, v in each.items()) for each in (theirs, ours))
        raise CheckpointError(
            f"the connector in {saved.path} is another one than the model's ({', '.join(differing)} differ):\n"
            f"  there: {there}\n  here:  {here}\n"
            "Set model.connector to what was trained there, or train this connector from its own stage 1."
        )


def resolve_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Name and options of a connector with the defaults filled in, as plain values."""
    import inspect

    from vlmamba.models.connectors import CONNECTORS
    from vlmamba.models.connectors.base import option_names

    if name not in CONNECTORS.names():
        return {"name": name, **options}
    cls = CONNECTORS.get(name)
    parameters = inspect.signature(cls.__init__).parameters
    defaults = {
        n: parameters[n].default
        for n in option_names(cls)
        if parameters[n].default is not inspect.Parameter.empty
    }
    plain: dict[str, Any] = json.loads(json.dumps({**defaults, **options}, default=str))
    return {"name": name, **plain}


def _compare(
    model: nn.Module, wanted: Mapping[str, torch.Tensor], source: SavedWeights
) -> tuple[list[LoadRow], list[str]]:
    """The table, and a line for each thing that does not fit."""
    saved = source.tensors
    # What a part must bring: every parameter once, under any of its tied names.
    ours = [n for n, _ in model.named_parameters()]
    given = {id(wanted[name]) for name in saved if name in wanted}
    parts = list(dict.fromkeys(name.partition(".")[0] for name in [*ours, *saved]))
    order = [n for n, _ in model.named_children()]
    parts.sort(key=lambda part: order.index(part) if part in order else len(order))
    rows, problems = [], []
    for part in parts:
        held = [n for n in saved if n.partition(".")[0] == part]
        unexpected = [n for n in held if n not in wanted]
        mismatched = [n for n in held if n in wanted and wanted[n].shape != saved[n].shape]
        missing = [n for n in ours if n.partition(".")[0] == part and id(wanted[n]) not in given]
        loaded = len(held) - len(unexpected) - len(mismatched)
        rows.append(LoadRow(part, loaded, len(missing), len(unexpected), len(mismatched)))
        problems += [f"  unexpected: {n} (no such tensor in the model)" for n in unexpected]
        problems += [
            f"  other shape: {n} is {tuple(saved[n].shape)} there and {tuple(wanted[n].shape)} here"
            for n in mismatched
        ]
        if held and not (source.trained_only and part != CONNECTOR):
            problems += [f"  missing: {n}" for n in sorted(missing)]
    return rows, problems


def format_rows(rows: list[LoadRow]) -> str:
    """The table as text."""
    width = max(len(r.part) for r in rows)
    lines = [f"{'part':<{width}}  {'loaded':>7} {'missing':>8} {'unexpected':>11} {'other shape':>12}"]
    for row in rows:
        lines.append(
            f"{row.part:<{width}}  {row.loaded:>7} {row.missing:>8} {row.unexpected:>11} "
            f"{row.mismatched:>12}"
            + ("  (kept as built)" if not row.loaded and not row.unexpected and not row.mismatched else "")
        )
    return "\n".join(lines)
