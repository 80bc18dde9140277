"""A training run from its config to its export, told from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmamba.config import dump_yaml, load_yaml
from vlmamba.errors import CheckpointError
from vlmamba.models.builder import build_model
from vlmamba.training import checkpoint as checkpoints
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import build_data, open_sources, total_steps
from vlmamba.training.export import EXPORT, export_model
from vlmamba.training.files import check_files
from vlmamba.training.init_from import init_from
from vlmamba.training.loop import Outcome, Training, train_loop
from vlmamba.training.metrics import FlopCount, MetricLogger, Window, open_loggers, peak_flops
from vlmamba.training.optim import build_optimizer
from vlmamba.training.parallel import Parallel, make_parallel
from vlmamba.training.parts import format_parts, parts_table, set_modes, set_trainable
from vlmamba.training.precision import compute_dtype, set_precision
from vlmamba.training.run_dir import claim_run_dir, write_environment, write_text
from vlmamba.training.schedule import Schedule

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        outcome: "finished", or "stopped" after a signal (continue it with ``resume``).
        step: Optimizer steps done.
        run_dir: Folder of the run.
        export: The exported model, of a finished run.
    """

    outcome: Outcome
    step: int
    run_dir: Path
    export: Path | None


def run(config: TrainConfig, *, resume: bool = False) -> RunResult:
    """Train.

    Args:
        config: What to do.
        resume: Continue the run in ``config.output`` where its newest checkpoint stands; a run without one
            starts anew.

    Raises:
        ConfigError: A setting is wrong, the output folder is in use, or the config is not that of the run
            continued.
        MissingFileError: Weights or data are not there; all of them are listed.
        CheckpointError: Weights do not fit, or a checkpoint cannot be written.
        DataError: Too many rows cannot be used.
        TrainingError: Loss or gradients are not finite.
    """
    # Config, files, and a folder that is ours.
    parallel = make_parallel(config.parallel, config.device)
    check_files(config)
    logger.info("data: reading %s", ", ".join(s.annotations for s in config.data.sources))
    sources = open_sources(config)
    run_dir = Path(config.output)
    start = _open_run(config, run_dir, parallel, resume=resume)

    # Model: built from its parts, weights of an earlier stage put in, what trains decided.
    model, processor = prepare_model(config, parallel.device)
    frozen = checkpoints.frozen_fingerprint(model)
    logger.info("parts:\n%s", format_parts(parts_table(model)))

    # Data, optimizer, schedule.
    loader = build_data(config, sources, processor, parallel, run_dir=run_dir)
    count = total_steps(config, loader)
    logger.info(
        "data: %d rows, %d steps of %d samples", len(loader.dataset), count, config.batch.global_batch_size
    )
    optimizer = build_optimizer(model, config.optim)
    schedule = Schedule(config.schedule, count)

    # Where an earlier start of this run stopped.
    state = checkpoints.RunState(total_steps=count, frozen=frozen)
    if start is not None:
        saved = checkpoints.read_state(start)
        checkpoints.check_same_rest(saved, frozen=frozen, total_steps=count, where=start)
        loader.load_state_dict(saved.data)
        state = checkpoints.load_checkpoint(start, model, optimizer)
        logger.info("continuing from %s", start)

    # The loop.
    def save(now: checkpoints.RunState) -> None:
        if parallel.is_main:
            checkpoints.save_checkpoint(run_dir, model, optimizer, now, keep_last=config.keep_last)
        parallel.barrier()

    flops = FlopCount.of(model, patches=model.vision_tower.num_tokens)
    with _loggers(config, run_dir, parallel, state.step) as loggers, stop_signals() as stop:
        training = Training(
            config=config,
            parallel=parallel,
            model=parallel.wrap(model),
            optimizer=optimizer,
            schedule=schedule,
            loader=loader,
            state=state,
            window=Window(flops=flops, peak=peak_flops(parallel.device)),
            save=save,
            loggers=loggers,
            should_stop=stop.is_set,
        )
        logger.info("training on %s from step %d to %d", parallel.device, state.step, count)
        outcome = train_loop(training)

    # A plain transformers directory.
    if outcome == "stopped":
        logger.info("stopped at step %d; continue with --resume", state.step)
        return RunResult(outcome, state.step, run_dir, None)
    target = run_dir / EXPORT
    if parallel.is_main:
        export_model(model, processor, target, dtype=compute_dtype(config.precision))
        logger.info("exported to %s", target)
    parallel.barrier()
    return RunResult(outcome, state.step, run_dir, target)


def prepare_model(config: TrainConfig, device: torch.device) -> tuple[Any, Any]:
    """Model and processor as training starts with them: seeded, initialised, parts frozen, precision set."""
    seed_all(config.seed)
    logger.info(
        "model: %s encoder, connector %s, language model %s",
        config.model.vision.family,
        config.model.connector.name,
        config.model.language.path,
    )
    model, processor = build_model(config.model)
    if config.init_from is not None:
        init_from(model, config.init_from)
    set_trainable(model, config.train)
    set_precision(model, config.precision)
    if config.gradient_checkpointing:
        enable_checkpointing(model.language_model)
        if not model.vision_tower.frozen:
            model.vision_tower.set_gradient_checkpointing(True)
    set_modes(model)
    return model.to(device), processor


def enable_checkpointing(language_model: Any) -> None:
    """Let a transformers model recompute its layers' activations in the backward pass."""
    options = {"use_reentrant": False}
    if hasattr(language_model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def export_run(run_dir: str | Path, directory: str | Path | None = None) -> Path:
    """Export the newest checkpoint of a run, finished or not.

    Args:
        run_dir: The run.
        directory: Where to; by default its ``export/``.

    Raises:
        CheckpointError: It has no checkpoint.
    """
    run_dir = Path(run_dir)
    config = load_yaml(run_dir / CONFIG_FILE, TrainConfig)
    assert isinstance(config, TrainConfig)
    newest = checkpoints.latest_checkpoint(run_dir)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no checkpoint to export.")
    model, processor = prepare_model(config, torch.device("cpu"))
    checkpoints.load_trained(newest, model)
    target = run_dir / EXPORT if directory is None else Path(directory)
    return export_model(model, processor, target, dtype=compute_dtype(config.precision))


def _open_run(config: TrainConfig, run_dir: Path, parallel: Parallel, *, resume: bool) -> Path | None:
    """Claim the folder and write down config and environment; returns the checkpoint to continue from."""
    step = claim_run_dir(run_dir, resume=resume, latest_step=checkpoints.latest_step)
    start = checkpoints.latest_checkpoint(run_dir) if step is not None else None
    if start is not None:
        saved = load_yaml(run_dir / CONFIG_FILE, TrainConfig)
        checkpoints.check_same_config(saved, config, run_dir / CONFIG_FILE)
    if parallel.is_main:
        checkpoints.remove_leftovers(run_dir)
        write_text(run_dir / CONFIG_FILE, dump_yaml(config))
        write_environment(run_dir / ENVIRONMENT_FILE, parallel.device, start_step=step or 0)
    parallel.barrier()
    return start


@contextmanager
def _loggers(
    config: TrainConfig, run_dir: Path, parallel: Parallel, step: int
) -> Iterator[list[MetricLogger]]:
    loggers: list[MetricLogger] = []
    if parallel.is_main:
        loggers = open_loggers(config.loggers, run_dir, resume_step=step, config=config.to_dict())
    try:
        yield loggers
    finally:
        for each in loggers:
            each.close()


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGTERM or Ctrl-C: the loop then saves and ends. A second Ctrl-C interrupts at once."""
    stop = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        logger.warning("received %s: saving after this step, then stopping", signal.Signals(number).name)
        stop.set()
        signal.signal(signal.SIGINT, previous.get(signal.SIGINT, signal.default_int_handler))

    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT):
            previous[each] = signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(each, handler)
