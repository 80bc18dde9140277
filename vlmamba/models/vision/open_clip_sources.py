"""Where open_clip checkpoints come from: a directory, a file, a hub id, or one of open_clip's own MODEL:TAG
names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError, ConfigError, MissingFileError, require
from vlmamba.models.vision import sources
from vlmamba.registry import close_matches

CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_RESIZE_MODES = {"shortest": "crop", "squash": "resize", "longest": "pad"}


@dataclass(frozen=True)
class Source:
    """A located checkpoint.

    Attributes:
        model_config: open_clip's model config.
        preprocess: open_clip's preprocessing settings, perhaps empty.
        weights: Path of the weights.
    """

    model_config: Mapping[str, Any]
    weights: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def locate(path: str) -> Source:
    """Find config and weights.

    Args:
        path: A directory with `CONFIG_NAME` and weights, a weights file with `CONFIG_NAME` beside it, a hub
            id (with or without "hf-hub:"), or "MODEL:TAG" of `open_clip.list_pretrained()`.

    Raises:
        MissingFileError: Nothing there; says where to get it.
        ConfigError: MODEL or TAG is unknown to open_clip.
    """
    open_clip = require("open_clip", extra="train", feature="the open_clip encoder family")
    local = Path(path).expanduser()
    if local.is_file():
        return _with_config(str(local.parent), str(local))
    if local.is_dir():
        return _with_config(str(local), _weights_in(local, path))
    hub_id = path.removeprefix("hf-hub:")
    if sources.looks_like_hub_id(hub_id):
        return _with_config(hub_id, _hub_weights(hub_id))
    model, colon, tag = path.partition(":")
    if not colon or "/" in model:
        raise MissingFileError(sources.missing(path, "open_clip", "no such file or directory"))
    names = open_clip.list_models()
    if model not in names:
        raise ConfigError(f"open_clip has no model {model!r}.{close_matches(model, names)}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise ConfigError(f"open_clip's {model} has no weights {tag!r}. Known: {', '.join(tags) or 'none'}.")
    settings = open_clip.get_pretrained_cfg(model, tag)
    config = dict(open_clip.get_model_config(model))
    config["quick_gelu"] = bool(settings.get("quick_gelu", config.get("quick_gelu", False)))
    try:
        weights = open_clip.download_pretrained(settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingFileError(f"cannot download open_clip's {model}:{tag}: {error}") from error
    return Source(config, str(weights), settings)


def visual_state(path: str) -> dict[str, torch.Tensor]:
    """The vision tower's tensors of an open_clip checkpoint, "visual." removed.

    Raises:
        CheckpointError: The file is no weights-only checkpoint, or holds no vision tower.
    """
    from open_clip.factory import load_state_dict

    try:
        state = load_state_dict(path, device="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a readable, weights-only checkpoint: {reason}") from error
    prefix = "visual."
    visual = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if not visual:
        raise CheckpointError(
            f"{path} holds no open_clip vision tower: none of its {len(state)} tensors is called 'visual.*'."
        )
    return visual


def image_settings(preprocess: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's preprocessing settings say differently from the defaults."""
    resample = preprocess.get("interpolation")
    return sources.differences(
        defaults,
        preprocess.get("mean"),
        preprocess.get("std"),
        resample=resample if resample in ("bicubic", "bilinear") else None,
        mode=_RESIZE_MODES.get(preprocess.get("resize_mode", "")),
    )


def _with_config(where: str, weights: str) -> Source:
    """Read the config in a directory or repository."""
    found = sources.read_config(where, "open_clip", CONFIG_NAME)
    model_config = found.get("model_cfg", found)
    return Source(model_config, weights, found.get("preprocess_cfg") or {})


def _weights_in(directory: Path, path: str) -> str:
    """The weights file of a directory."""
    for name in WEIGHT_NAMES:
        if (directory / name).is_file():
            return str(directory / name)
    suffixes = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    others = [found for suffix in suffixes for found in sorted(directory.glob(suffix))]
    if len(others) == 1:
        return str(others[0])
    reason = f"{len(others)} weights files, none of them called {WEIGHT_NAMES[0]}"
    raise MissingFileError(sources.missing(path, "open_clip", reason))


def _hub_weights(hub_id: str) -> str:
    """Download the weights of a repository."""
    for name in WEIGHT_NAMES[:-1]:
        try:
            return sources.fetch(hub_id, "open_clip", name)
        except MissingFileError:
            continue
    return sources.fetch(hub_id, "open_clip", WEIGHT_NAMES[-1])
