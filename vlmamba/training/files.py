"""What a run needs on disk, and one message about everything that is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vlmamba.data.downloads import download_hint
from vlmamba.errors import MissingFileError
from vlmamba.models.builder import VisionConfig
from vlmamba.models.vision.sources import advice, looks_like_hub_id
from vlmamba.training.config import TrainConfig

PLAYGROUND = "bash scripts/quickstart.sh"


class MissingItem(NamedTuple):
    """One thing that is not there."""

    what: str
    path: str
    hint: str
    automatic: bool = False
    """A hub id, fetched when the run starts."""


def check_files(config: TrainConfig) -> None:
    """Look for every file of a run before anything is loaded.

    Raises:
        MissingFileError: Lists all that is missing, where to get it, and how to run without it.
    """
    items = missing_files(config)
    if any(not item.automatic for item in items):
        raise MissingFileError(
            f"this run needs files that are not here:\n{format_missing(items)}\n"
            "Other places are set by --model.vision.path, --model.language.path, "
            "--data.sources.0.annotations and "
            "--data.sources.0.image_root.\n"
            f"To train without any download, on the playground's small task: {PLAYGROUND}"
        )


def missing_files(config: TrainConfig) -> list[MissingItem]:
    """Everything a run needs that is not on this machine."""
    items = _missing_encoders(config.model.vision)
    language = config.model.language
    for what, path in (("language model", language.path), ("tokenizer", language.tokenizer)):
        if path is not None and not _is_here(path):
            hint = language.hint if what == "language model" else ""
            items.append(MissingItem(what, path, hint or _hub_hint(path), looks_like_hub_id(path)))
    for source in config.data.sources:
        if source.kind != "llava":
            continue  # names, patterns and addresses: the source itself says what it misses
        annotations, root = Path(source.annotations).expanduser(), source.root.expanduser()
        if not annotations.is_file():
            hint = source.hint or download_hint(annotations) or ""
            items.append(MissingItem("annotations", source.annotations, hint))
        if not root.is_dir():
            items.append(MissingItem("images", str(source.root), source.hint or download_hint(root) or ""))
    if config.model.chat.endswith(".jinja") and not Path(config.model.chat).is_file():
        items.append(MissingItem("chat template", config.model.chat, ""))
    for part, path in config.model.connector.init.items():
        if not _is_here(path):
            items.append(MissingItem(f"connector {part}", path, "", looks_like_hub_id(path)))
    if config.init_from is not None and not Path(config.init_from).expanduser().exists():
        items.append(
            MissingItem(
                "init_from",
                config.init_from,
                "the run of the earlier stage; train it first or give its folder",
            )
        )
    return items


def format_missing(items: list[MissingItem]) -> str:
    """One entry an item: what, where it was looked for, where to get it."""
    width = max((len(item.what) for item in items), default=0)
    lines = []
    last_hint = ""
    for item in items:
        note = "  (fetched from the hub when the run starts)" if item.automatic else ""
        lines.append(f"  {item.what:<{width}}  {item.path}{note}")
        if item.hint:
            hint = "as the one above" if item.hint == last_hint else item.hint
            lines.append(f"  {'':<{width}}    get it: {hint}")
        last_hint = item.hint
    return "\n".join(lines)


def _missing_encoders(config: VisionConfig) -> list[MissingItem]:
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    items = []
    for entry in (p for path in paths for p in path.split(",")):
        family, equals, path = entry.partition("=")
        if not equals:
            family, path = config.family, entry
        if _is_here(path) or (family == "open_clip" and ":" in path):
            continue
        hub = looks_like_hub_id(path)
        items.append(MissingItem("vision encoder", path, config.hint or advice(path, family), hub))
    return items


def _is_here(path: str) -> bool:
    if Path(path).expanduser().exists():
        return True
    if not looks_like_hub_id(path):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "config.json"), str | os.PathLike)


def _hub_hint(path: str) -> str:
    return f"hf download {path}" if looks_like_hub_id(path) else ""
