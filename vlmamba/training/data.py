"""From the data settings of a run to its loader of optimizer steps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.data import (
    PACK_MULTIPLE,
    Loader,
    Mixture,
    PlanSettings,
    Source,
    VLDataset,
    build_loader,
    build_source,
    cache_folder,
    compute_lengths,
    missing_folders,
)
from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.training.config import TrainConfig
from vlmamba.training.parallel import Parallel

logger = logging.getLogger(__name__)

MOST_LISTED = 12
TOLERATED_BAD_FRACTION = 0.01
"""Above it, the user has said that rows without pictures are to be left out."""


def open_sources(config: TrainConfig) -> list[Source]:
    """Index the annotation files, and look whether the folders of their images are there.

    Raises:
        MissingFileError: An annotation file or a folder that its rows name is not there.
        DataError: An annotation file is no list of rows.
    """
    sources = [
        build_source("llava", annotations=s.annotations, image_root=s.root, name=s.name, hint=s.hint)
        for s in config.data.sources
    ]
    missing = {folder: hint for source in sources for folder, hint in missing_folders(source).items()}
    if missing:
        message = missing_folders_message(missing)
        if config.data.max_bad_fraction <= TOLERATED_BAD_FRACTION:
            raise MissingFileError(message)
        logger.warning("%s", message)
    return sources


def missing_folders_message(missing: Mapping[Path, str | None]) -> str:
    """Image folders that are not there, with where to get them."""
    lines = []
    for folder, hint in list(missing.items())[:MOST_LISTED]:
        lines.append(f"  {folder}" + (f"\n    get it: {hint}" if hint else ""))
    if len(missing) > MOST_LISTED:
        lines.append(f"  and {len(missing) - MOST_LISTED} more")
    return (
        f"{len(missing)} folders of images that the annotations name are not there:\n"
        + "\n".join(lines)
        + "\n"
        "Get them, or train without those rows: --data.max_bad_fraction with their share of all rows."
    )


def build_data(
    config: TrainConfig, sources: Sequence[Source], processor: Any, parallel: Parallel, *, run_dir: Path
) -> Loader:
    """Mixture, data set, plan, loader.

    Raises:
        ConfigError: The batch sizes do not fit the number of processes, or a sample is longer than the token
            budget.
        DataError: Too many rows cannot be used.
    """
    data = config.data
    mixture = Mixture(sources, [s.weight for s in data.sources], seed=config.seed)
    dataset = VLDataset(
        mixture, processor, max_length=data.max_length, image_position=data.image_position, seed=config.seed
    )
    settings = plan_settings(config, parallel.world_size)
    lengths = None
    if settings.needs_lengths:
        lengths = compute_lengths(
            dataset,
            cache_dir=cache_folder(),
            processor_fingerprint=processor_fingerprint(processor),
            num_workers=data.num_workers,
            progress=parallel.is_main,
        )
    return build_loader(
        dataset,
        settings,
        lengths=lengths,
        max_bad_fraction=data.max_bad_fraction,
        bad_samples_path=run_dir / "bad_samples.jsonl" if parallel.is_main else None,
        rank=parallel.rank,
        world_size=parallel.world_size,
        num_workers=data.num_workers,
        pin_memory=parallel.device.type == "cuda",
    )


def plan_settings(config: TrainConfig, world_size: int) -> PlanSettings:
    """How epochs are cut into steps and micro-batches.

    Raises:
        ConfigError: The global batch is not a multiple of processes x micro-batch.
    """
    batch = config.batch
    if config.data.pack_length is not None:
        return PlanSettings(
            step_samples=batch.global_batch_size,
            pack_tokens=config.data.pack_length,
            pad_to_multiple_of=PACK_MULTIPLE,
            grouping=config.data.order,
            seed=config.seed,
        )
    if batch.micro_batch_size is not None and batch.global_batch_size % (batch.micro_batch_size * world_size):
        raise ConfigError(
            f"batch.global_batch_size {batch.global_batch_size} is not a multiple of "
            "batch.micro_batch_size "
            f"{batch.micro_batch_size} x {world_size} processes."
        )
    return PlanSettings(
        step_samples=batch.global_batch_size,
        micro_samples=batch.micro_batch_size,
        micro_tokens=batch.tokens_per_micro_batch,
        grouping=config.data.order,
        seed=config.seed,
    )


def total_steps(config: TrainConfig, loader: Loader) -> int:
    """Optimizer steps of the whole run."""
    if config.epochs is None:
        assert config.max_steps is not None
        return config.max_steps
    steps = 0
    for epoch in range(config.epochs):
        steps += len(loader.plan_of(epoch))
        if config.max_steps is not None and steps >= config.max_steps:
            return config.max_steps
    return steps


def processor_fingerprint(processor: Any) -> str:
    """Changes when tokenizer or chat template do."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    text = "\n".join([type(tokenizer).__name__, described, str(processor.chat_template)])
    return hashlib.sha256(text.encode()).hexdigest()
