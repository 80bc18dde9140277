"""From the data settings of a run to its loader of optimizer steps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.common.files import cache_folder
from vlmamba.data import (
    PACK_MULTIPLE,
    BadSamples,
    LengthTable,
    Loader,
    Mixture,
    PlanSettings,
    SampleEncoder,
    StreamLoader,
    StreamSettings,
    VLDataset,
    build_loader,
    build_source,
    build_stream,
    compute_lengths,
    missing_folders,
)
from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.training.config import SourceConfig, TrainConfig
from vlmamba.training.files import MissingItem, format_missing
from vlmamba.training.parallel import Parallel

logger = logging.getLogger(__name__)

MOST_LISTED = 12
TOLERATED_BAD_FRACTION = 0.01
"""Above it, the user has said that rows without pictures are to be left out."""


def open_sources(config: TrainConfig) -> list[Any]:
    """Open the sources, and look whether the folders of their images are there.

    Returns:
        A `Source` each, or with ``data.stream`` a `Stream`.

    Raises:
        MissingFileError: An annotation file or a folder that its rows name is not there.
        DataError: A source has no rows that can be read.
        ConfigError: A stream without ``max_steps``.
    """
    if config.data.stream:
        if config.epochs is not None:
            raise ConfigError("data.stream has no epochs: set --epochs none and --max_steps.")
        return [build_stream(s.kind, **_options(s)) for s in config.data.sources]
    sources = [build_source(s.kind, **_options(s)) for s in config.data.sources]
    missing = {folder: hint for source in sources for folder, hint in missing_folders(source).items()}
    if missing:
        items = [MissingItem("images", str(folder), hint or "") for folder, hint in missing.items()]
        more = f"\n  and {len(items) - MOST_LISTED} more" if len(items) > MOST_LISTED else ""
        message = (
            f"{len(items)} folders of images that the annotations name are not there:\n"
            f"{format_missing(items[:MOST_LISTED])}{more}\n"
            "Get them, or train without those rows: --data.max_bad_fraction with their share of all rows."
        )
        if config.data.max_bad_fraction <= TOLERATED_BAD_FRACTION:
            raise MissingFileError(message)
        logger.warning("%s", message)
    return sources


def _options(source: SourceConfig) -> dict[str, Any]:
    """What the constructor of its kind takes."""
    options: dict[str, Any] = {"annotations": source.annotations, "name": source.name, "hint": source.hint}
    if source.kind == "llava":
        options["image_root"] = source.root
    if source.kind == "hf":
        options.update(split=source.split, subset=source.subset, image_root=source.image_root or None)
    return options


def build_data(
    config: TrainConfig, sources: Sequence[Any], processor: Any, parallel: Parallel, *, run_dir: Path
) -> Loader | StreamLoader:
    """Mixture, data set, plan, loader.

    Raises:
        ConfigError: The batch sizes do not fit the number of processes, or a sample is longer than the token
            budget.
        DataError: Too many rows cannot be used.
    """
    data = config.data
    listed = run_dir / "bad_samples.jsonl" if parallel.is_main else None
    shared: dict[str, Any] = {
        "rank": parallel.rank,
        "world_size": parallel.world_size,
        "num_workers": data.num_workers,
        "pin_memory": parallel.device.type == "cuda",
    }
    if data.stream:
        stream = stream_settings(config, parallel.world_size)
        account = BadSamples(stream.steps * stream.step_samples, data.max_bad_fraction, listed)
        encoder = SampleEncoder(processor, max_length=data.max_length, image_position=data.image_position)
        weights = [s.weight for s in data.sources]
        return StreamLoader(sources, encoder, stream, weights=weights, bad_samples=account, **shared)
    mixture = Mixture(sources, [s.weight for s in data.sources], seed=config.seed)
    dataset = VLDataset(
        mixture, processor, max_length=data.max_length, image_position=data.image_position, seed=config.seed
    )
    settings = plan_settings(config, parallel.world_size)
    lengths = _lengths(dataset, processor, parallel, data.num_workers) if settings.needs_lengths else None
    return build_loader(
        dataset,
        settings,
        lengths=lengths,
        max_bad_fraction=data.max_bad_fraction,
        bad_samples_path=listed,
        **shared,
    )


def _lengths(dataset: VLDataset, processor: Any, parallel: Parallel, num_workers: int) -> LengthTable:
    """The lengths of all rows, measured by the first process of each host; the others read what it kept."""
    with parallel.main_first(of_each_host=True):
        return compute_lengths(
            dataset,
            cache_dir=cache_folder(),
            processor_fingerprint=processor_fingerprint(processor),
            num_workers=num_workers,
            progress=parallel.is_main,
        )


def stream_settings(config: TrainConfig, world_size: int) -> StreamSettings:
    """How streams are divided.

    Raises:
        ConfigError: The micro-batch is given in tokens, or does not fit the global batch and the processes.
    """
    micro = config.batch.micro_batch_size
    if micro is None:
        raise ConfigError("data.stream does not know lengths ahead: set batch.micro_batch_size, in samples.")
    settings = plan_settings(config, world_size)
    assert settings.step_samples is not None and config.max_steps is not None
    return StreamSettings(
        step_samples=settings.step_samples, micro_samples=micro, steps=config.max_steps, seed=config.seed
    )


def plan_settings(config: TrainConfig, world_size: int) -> PlanSettings:
    """How epochs are cut into steps and micro-batches.

    Raises:
        ConfigError: The global batch is not a multiple of processes x micro-batch, or the packed rows of a step
            cannot be shared equally.
    """
    batch = config.batch
    if config.data.pack_length is not None:
        tokens, budget = batch.tokens_per_step, config.data.pack_length
        if tokens is not None and tokens // budget % world_size:
            fitting = -(-tokens // (budget * world_size)) * budget * world_size
            raise ConfigError(
                f"batch.tokens_per_step {tokens} makes {tokens // budget} packed rows, which {world_size} processes "
                f"cannot share equally; {fitting} can be."
            )
        return PlanSettings(
            step_samples=batch.global_batch_size if tokens is None else None,
            step_tokens=tokens,
            pack_tokens=budget,
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


def total_steps(config: TrainConfig, loader: Loader | StreamLoader) -> int:
    """Optimizer steps of the whole run."""
    if config.epochs is None:
        assert config.max_steps is not None
        return config.max_steps
    assert isinstance(loader, Loader)
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
