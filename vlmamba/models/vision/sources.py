"""Where pre-trained encoders come from: local directories, hub ids, and advice when there is nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmamba.common.files import read_json
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.vision import encoders
from vlmamba.models.vision.presets import FAMILY_HUB_IDS, HUB_IDS

logger = logging.getLogger(__name__)

RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_LOCAL_NAMES = ("checkpoints", "weights", "models", "runs", "data", "playground")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def looks_like_hub_id(path: str) -> bool:
    """True for ``owner/name`` that is no path, existing or plainly meant to be one."""
    owner, _, name = path.partition("/")
    if not _HUB_ID.fullmatch(path) or Path(path).exists() or Path(owner).exists() or owner in _LOCAL_NAMES:
        return False
    return HUB_IDS.get(name, path) == path


def resolve(path: str, family: str) -> str:
    """A local directory (with ~ expanded) or a hub id.

    Raises:
        MissingFileError: Neither; names the path and where to get the checkpoint.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.is_file():
        raise MissingFileError(
            f"{path} is a file, but the {family} family loads a directory with config.json and its weights. Give that."
        )
    if looks_like_hub_id(path):
        return path
    raise MissingFileError(missing(path, family, "no such directory"))


def advice(path: str, family: str) -> str:
    """A command that gets the checkpoint meant by a path."""
    name = Path(path).name
    if looks_like_hub_id(path):
        return f"hf download {path} --local-dir checkpoints/{name}"
    hub_id = HUB_IDS.get(name) or FAMILY_HUB_IDS.get(family)
    return f"hf download {hub_id} --local-dir {path}" if hub_id else "give the directory of a checkpoint"


def missing(path: str, family: str, reason: str) -> str:
    """The message for a checkpoint that is not there."""
    hint = " (if that is a hub id; no local directory has that name)" if looks_like_hub_id(path) else ""
    return f"no {family} checkpoint at {path} ({reason}). Get one with: {advice(path, family)}{hint}"


def read_config(path: str, family: str, filename: str = "config.json") -> dict[str, Any]:
    """A JSON file of a local directory or hub repository.

    Raises:
        MissingFileError: It is not there or cannot be fetched.
        CheckpointError: It is not a JSON object.
    """
    found = fetch(path, family, filename)
    content = read_json(found)
    if not isinstance(content, dict):
        raise CheckpointError(f"{found} holds a {type(content).__name__}, not a JSON object.")
    return content


def fetch(path: str, family: str, filename: str) -> str:
    """Path of one file of a local directory or hub repository (downloaded if need be).

    Raises:
        MissingFileError: It is not there or cannot be fetched.
    """
    local = Path(path)
    if local.is_dir():
        if not (local / filename).is_file():
            raise MissingFileError(missing(path, family, f"the directory has no {filename}"))
        return str(local / filename)
    from transformers.utils import cached_file

    try:
        found = cached_file(path, filename)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingFileError(missing(path, family, reason)) from error
    if found is None:
        raise MissingFileError(missing(path, family, f"the repository has no {filename}"))
    return str(found)


def other_family(model_type: Any) -> str:
    """A sentence naming the family that can load a model_type, if any."""
    for name in encoders.names():
        if model_type in getattr(encoders.get(name), "checkpoint_types", ()):
            return f" Use family {name!r}."
    return ""


def image_settings(path: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's preprocessor_config.json says differently from the family's defaults.

    Missing files and keys mean the defaults.
    """
    try:
        found = read_config(path, "", "preprocessor_config.json")
    except MissingFileError:
        return {}
    resample = RESAMPLE_NAMES.get(found.get("resample", -1))
    return differences(defaults, found.get("image_mean"), found.get("image_std"), resample=resample)


def differences(
    defaults: Mapping[str, Any], mean: Any, std: Any, *, resample: str | None, mode: str | None = None
) -> dict[str, Any]:
    """The image settings found in a checkpoint that are not the family's defaults; what is empty was not found."""
    found = {
        "mode": mode,
        "mean": tuple(float(x) for x in mean or ()),
        "std": tuple(float(x) for x in std or ()),
        "resample": resample,
    }
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in found.items()
        if value and value != defaults.get(key)
    }


def log_resize(family: str, old: tuple[int, int], new: tuple[int, int], image_size: int) -> None:
    """Say that position embeddings were interpolated."""
    logger.info(
        "%s encoder: position embeddings interpolated from a %d x %d to a %d x %d grid for %d px images",
        family,
        *old,
        *new,
        image_size,
    )
