"""A training run from its config to its export, told from top to bottom."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba.common.files import replace_text
from vlmamba.config import dump_yaml, load_yaml
from vlmamba.errors import CheckpointError
from vlmamba.models.builder import build_model
from vlmamba.models.language.causality import check_causal, check_packs
from vlmamba.models.language.versions import recompute_activations
from vlmamba.training import checkpoint as checkpoints
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import build_data, open_sources, total_steps
from vlmamba.training.ema import load_means, track_mean
from vlmamba.training.evaluations import Evaluations
from vlmamba.training.export import EXPORT, export_model
from vlmamba.training.faults import Watch, stop_signals
from vlmamba.training.files import check_files
from vlmamba.training.flops import FlopCount, peak_flops
from vlmamba.training.init_from import init_from
from vlmamba.training.loop import Outcome, Training, train_loop, worker_deaths
from vlmamba.training.metrics import Window, open_loggers
from vlmamba.training.optim import build_optimizer
from vlmamba.training.parallel import Parallel, make_parallel
from vlmamba.training.parts import format_parts, parts_table, set_modes, set_trainable
from vlmamba.training.precision import compute_dtype, set_precision
from vlmamba.training.run_dir import claimed, write_environment
from vlmamba.training.saving import Checkpointer, restore
from vlmamba.training.schedule import Schedule

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
EXPORT_MEAN = "export_ema"


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


def run(config: TrainConfig, *, resume: bool = False, force: bool = False) -> RunResult:
    """Train.

    Args:
        config: What to do.
        resume: Continue the run in ``config.output`` where its newest checkpoint stands; a run without one
            starts anew.
        force: Continue although settings differ from those of the run; the differences are logged.

    Raises:
        ConfigError: A setting is wrong, the output folder is in use, or the config is not that of the run
            continued.
        MissingFileError: Weights or data are not there; all of them are listed.
        CheckpointError: Weights do not fit, or a checkpoint cannot be written.
        DataError: Too many rows cannot be used.
        TrainingError: Loss or gradients are not finite.
    """
    parallel = make_parallel(config.parallel, config.device, config)
    with ExitStack() as held:
        result = _run(config, parallel, held, resume=resume, force=force)
    parallel.close()
    return result


def _run(config: TrainConfig, parallel: Parallel, held: ExitStack, *, resume: bool, force: bool) -> RunResult:
    # Config, files, and a folder that is ours.
    check_files(config)
    given, config = config, fit_micro_batch(config, parallel.world_size)
    run_dir = Path(config.output)
    channel = parallel.apart()
    with parallel.main_first():
        logger.info("data: reading %s", ", ".join(s.annotations for s in config.data.sources))
        sources = open_sources(config)
    start = channel.on_main(lambda: _open_run(given, run_dir, parallel, held, resume=resume, force=force))

    # Model: built from its parts, weights of an earlier stage put in, what trains decided.
    model, processor = prepare_model(config, parallel.device)
    template = processor.chat_template if config.model.chat.endswith(".jinja") else ""
    frozen = checkpoints.frozen_fingerprint(model, template=template)
    logger.info("parts:\n%s", format_parts(parts_table(model)))
    evaluations = Evaluations(
        config.evaluations, model, processor, run_dir, parallel, channel, config.precision
    )
    if parallel.rank:
        seed_all(config.seed + parallel.rank)  # dropout differs between processes, first weights do not

    # Data, strategy, optimizer, schedule.
    with parallel.main_first():
        loader = build_data(config, sources, processor, parallel, run_dir=run_dir)
    count = total_steps(config, loader)
    logger.info("data: %s rows, %d steps of %s", loader.num_rows or "streamed", count, config.batch.step)
    peak = peak_flops(parallel.device)
    flops = None if peak is None else FlopCount.of(model)
    compile_parts(model, config.compile)
    wrapped = parallel.wrap(model)
    optimizer = parallel.build_optimizer(model, lambda m: build_optimizer(m, config.optim))
    if config.ema is not None:
        track_mean(optimizer, config.ema)

    # Where an earlier start of this run stopped.
    state = checkpoints.RunState(total_steps=count, frozen=frozen, config=given.to_dict())
    if start is not None:
        saved = checkpoints.read_state(start)
        if not force:
            checkpoints.check_same_rest(saved, frozen=frozen, total_steps=count, where=start)
        loader.load_state_dict(saved.data)
        state = restore(start, parallel, model, optimizer)
        state.total_steps, state.frozen, state.config = count, frozen, given.to_dict()
        logger.info("continuing from %s", start)

    # The loop.
    evaluations.open(resume_step=state.step)
    logger.info("training on %s from step %d to %d", parallel.device, state.step, count)
    training = Training(
        config=config,
        parallel=parallel,
        model=wrapped,
        optimizer=optimizer,
        schedule=Schedule(config.schedule, count),
        loader=loader,
        state=state,
        window=Window(flops=flops, peak=peak),
        channel=channel,
        evaluate=evaluations,
    )
    outcome = _guarded_loop(training, model, run_dir)

    # A plain transformers directory.
    if outcome == "stopped":
        logger.info("stopped at step %d; continue with --resume", state.step)
        return RunResult(outcome, state.step, run_dir, None)
    channel.on_main(lambda: _export(config, parallel, model, processor, run_dir))
    logger.info("exported to %s", run_dir / EXPORT)
    return RunResult(outcome, state.step, run_dir, run_dir / EXPORT)


def _guarded_loop(training: Training, model: nn.Module, run_dir: Path) -> Outcome:
    """The loop with its checkpoints and loggers, under watch, and listening to requests to stop."""
    config, parallel = training.config, training.parallel
    saver = Checkpointer(
        run_dir,
        parallel,
        model,
        training.optimizer,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        in_background=config.save_async,
    )
    with (
        ExitStack() as opened,
        stop_signals() as stop,
        Watch(config.stall_seconds, run_dir, parallel.rank) as watch,
    ):
        training.save = saver.save
        if parallel.is_main:
            how: dict[str, Any] = {"resume_step": training.state.step, "config": config.to_dict()}
            training.loggers = open_loggers(config.loggers, run_dir, **how)
        for each in training.loggers:
            opened.callback(each.close)
        training.should_stop, training.alive = stop.is_set, watch.alive
        try:
            with worker_deaths():  # once more: torch may report one while the loop's own report is under way
                outcome = train_loop(training)
            saver.wait()
        except BaseException:
            saver.abandon()
            raise
    return outcome


def _export(config: TrainConfig, parallel: Parallel, model: Any, processor: Any, run_dir: Path) -> Path:
    """From the model as it stands, or, where each process holds a part of it, from its last checkpoint."""
    if config.ema is not None:
        export_run(run_dir, run_dir / EXPORT_MEAN, mean=True)
    if not parallel.replicated:
        return export_run(run_dir)
    return export_model(model, processor, run_dir / EXPORT, dtype=compute_dtype(config.precision))


def fit_micro_batch(config: TrainConfig, processes: int) -> TrainConfig:
    """Smaller micro-batches where the step, divided by the processes, holds less than one; the step stays as it is."""
    micro, total = config.batch.micro_batch_size, config.batch.global_batch_size
    if micro is None or total % processes or not total % (micro * processes):
        return config
    fitting = max(n for n in range(1, micro + 1) if not total // processes % n)
    logger.info(
        "batch.micro_batch_size: %d instead of %d, as each of %d processes has %d samples of a step",
        fitting,
        micro,
        processes,
        total // processes,
    )
    return config.replace(batch=config.batch.replace(micro_batch_size=fitting))


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
    set_trained_parts(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model.language_model, every_nth=config.checkpoint_every_nth)
        if not model.vision_tower.frozen:
            model.vision_tower.set_gradient_checkpointing(True)
    set_modes(model)
    model.to(device)
    if device.type != "cpu":
        check_causal(model.language_model)  # what is computed here may be computed otherwise there
    return model, processor


def set_trained_parts(model: Any, config: TrainConfig) -> None:
    """Decide what trains, add adapters, and hold every parameter in its number format.

    Raises:
        ConfigError: The language model cannot be trained so: packed rows would not be exact.
    """
    if config.data.pack_length is not None:
        check_packs(model.language_model)
    if config.train:
        set_trainable(model, config.train)
    else:
        model.requires_grad_(False)
    if config.lora is not None:
        from vlmamba.training.lora import add_lora

        logger.info("lora: rank %d on %d layers", config.lora.rank, len(add_lora(model, config.lora)))
    set_precision(model, config.precision)


def enable_checkpointing(language_model: Any, *, every_nth: int = 1) -> None:
    """Let a transformers model recompute the activations of every n-th layer in the backward pass."""
    recompute_activations(language_model)
    layers = [m for m in language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every_nth == 0


def compile_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Let torch.compile translate some parts, in place: names of parameters stay."""
    for part in parts:
        logger.info("compiling %s; the first steps take minutes", part)
        model.get_submodule(part).compile(dynamic=True)


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def export_run(run_dir: str | Path, directory: str | Path | None = None, *, mean: bool = False) -> Path:
    """Export the newest checkpoint of a run, finished or not.

    Args:
        run_dir: The run.
        directory: Where to; by default its ``export/``, or ``export_ema/`` for means.
        mean: The running mean of the weights (`TrainConfig.ema`) instead of the weights.

    Raises:
        CheckpointError: It has no checkpoint, or that has no means.
    """
    run_dir = Path(run_dir)
    newest = checkpoints.latest_checkpoint(run_dir)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no checkpoint to export.")
    target = run_dir / (EXPORT_MEAN if mean else EXPORT) if directory is None else Path(directory)
    return export_checkpoint(newest, target, mean=mean)


def export_checkpoint(path: Path, directory: Path, *, mean: bool = False) -> Path:
    """Export one checkpoint; see `export_run`."""
    model, processor, config = read_checkpoint(path, mean=mean)
    return export_model(model, processor, directory, dtype=compute_dtype(config.precision))


def read_checkpoint(path: Path, *, mean: bool = False) -> tuple[Any, Any, TrainConfig]:
    """The model of a checkpoint on the CPU, as it trained, its processor and the settings of its run.

    What was frozen comes from where the run took it.

    Args:
        path: The checkpoint.
        mean: The running mean of the weights instead of the weights.

    Raises:
        CheckpointError: A file is damaged, what was frozen has changed, or there are no means.
        MissingFileError: What was frozen is not there.
    """
    state = checkpoints.read_state(path)
    checkpoints.verify(path, state)
    config: Any = (
        TrainConfig.from_dict(state.config)
        if state.config
        else load_yaml(path.parent.parent / CONFIG_FILE, TrainConfig)
    )
    model, processor = prepare_model(config, torch.device("cpu"))
    checkpoints.check_frozen(state, checkpoints.frozen_fingerprint(model), path)
    checkpoints.load_trained(path, model)
    if mean:
        load_means(model, checkpoints.read_whole(path)[1])
    return model, processor, config


def _open_run(
    config: TrainConfig, run_dir: Path, parallel: Parallel, held: ExitStack, *, resume: bool, force: bool
) -> Path | None:
    """Claim the folder and write down config and environment; returns the checkpoint to continue from."""
    step = held.enter_context(claimed(run_dir, resume=resume))
    start = checkpoints.latest_checkpoint(run_dir) if step is not None else None
    if start is not None:
        saved = load_yaml(run_dir / CONFIG_FILE, TrainConfig)
        checkpoints.check_same_config(saved, config, run_dir / CONFIG_FILE, force=force)
    replace_text(run_dir / CONFIG_FILE, dump_yaml(config))
    write_environment(run_dir / ENVIRONMENT_FILE, parallel.device, start_step=step or 0)
    return start
