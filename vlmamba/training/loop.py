"""The training loop: one optimizer step after another, from a plan of the data that is known ahead.

The loss of a step is the sum over its supervised tokens divided by their number, both over all processes and
all micro-steps. The number is counted before the first forward pass, so how a step is cut into micro-steps
changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from vlmamba.data import MODEL_KEYS, Loader, Step
from vlmamba.errors import TrainingError
from vlmamba.training.checkpoint import RunState
from vlmamba.training.config import TrainConfig
from vlmamba.training.metrics import MetricLogger, Window, progress_bar
from vlmamba.training.optim import current_lr, set_learning_rate
from vlmamba.training.parallel import Parallel
from vlmamba.training.parts import trainable_parameters
from vlmamba.training.precision import autocast
from vlmamba.training.schedule import Schedule

Outcome = Literal["finished", "stopped"]


@dataclass
class Training:
    """Everything the loop works with, set up by `vlmamba.training.run`.

    Attributes:
        config: The run.
        model: What is called: the model, wrapped by the parallel strategy.
        save: Writes a checkpoint of the state given.
        should_stop: Whether the run has been asked to stop (SIGTERM).
    """

    config: TrainConfig
    parallel: Parallel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Loader
    state: RunState
    window: Window
    save: Callable[[RunState], None]
    loggers: Sequence[MetricLogger] = ()
    should_stop: Callable[[], bool] = field(default=lambda: False)


def train_loop(run: Training) -> Outcome:
    """Train until the last step, or until asked to stop; either way the present step is saved.

    Raises:
        TrainingError: A loss or gradient is not finite, or a step has no supervised token.
        DataError: Too many rows cannot be used.
        CheckpointError: A checkpoint could not be written.
    """
    config, state = run.config, run.state
    saved_at = state.step
    outcome: Outcome = "finished"
    bar_of = progress_bar(state.total_steps, state.step, enabled=run.parallel.is_main)
    with logging_redirect_tqdm(), bar_of as bar:
        for step, waited in timed(steps(run.loader, state.total_steps - state.step)):
            loss, grad_norm = optimizer_step(run, step)
            advance(run, step, loss, waited)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{current_lr(run.optimizer):.2e}", refresh=False)
            if state.step % config.log_every == 0 or state.step == state.total_steps:
                log(run, grad_norm)
            stop = run.parallel.any(run.should_stop())
            if stop or (config.save_every and state.step % config.save_every == 0):
                saved_at = save(run)
            if stop and state.step < state.total_steps:
                outcome = "stopped"
                break
    if saved_at != state.step:
        save(run)
    return outcome


def save(run: Training) -> int:
    """Write a checkpoint, outside the clock of the log; returns its step."""
    started = time.perf_counter()
    run.save(run.state)
    run.window.leave_out(time.perf_counter() - started)
    return run.state.step


def steps(loader: Loader, count: int) -> Iterator[Step]:
    """The next `count` optimizer steps, over as many epochs as that takes."""
    while count > 0:
        for step in loader:
            yield step
            count -= 1
            if count == 0:
                return


def timed(items: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Each item with the seconds that were spent waiting for it."""
    while True:
        started = time.perf_counter()
        item = next(items, None)
        if item is None:
            return
        yield item, time.perf_counter() - started


def optimizer_step(run: Training, step: Step) -> tuple[float, float]:
    """Forward, backward and update for one step.

    Returns:
        Loss and gradient norm before clipping; the loss of all processes.

    Raises:
        TrainingError: See `train_loop`.
    """
    number = run.state.step + 1
    (supervised,) = run.parallel.sum_counts(step.num_supervised)
    if supervised == 0:
        raise TrainingError(
            f"step {number}: none of its samples has a supervised token: {sample_ids(step.micro_batches)}. "
            "Look at them and at the chat template (model.chat)."
        )
    set_learning_rate(run.optimizer, run.schedule.factor(run.state.step))
    losses = accumulate_gradients(run, step, supervised)
    parameters = trainable_parameters(run.model).values()
    grad_norm = run.parallel.clip_grad_norm(parameters, run.config.grad_clip).item()
    (loss,) = run.parallel.sum_floats(float(losses.sum()))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainingError(_not_finite(number, loss, grad_norm, losses, step))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def accumulate_gradients(run: Training, step: Step, supervised: int) -> torch.Tensor:
    """Add up the gradients of a step's micro-batches; returns the share of each in the loss."""
    losses = []
    for index, batch in enumerate(step.micro_batches):
        last = index == len(step.micro_batches) - 1
        with run.parallel.accumulate(run.model, last=last):
            with autocast(run.config.precision, run.parallel.device):
                output = run.model(**inputs_of(batch, run.parallel.device), num_items=supervised)
            (output.loss * run.parallel.loss_scale).backward()
        losses.append(output.loss.detach().float())
    return torch.stack(losses)


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch that the model takes, on the device."""
    return {key: batch[key].to(device, non_blocking=True) for key in MODEL_KEYS if key in batch}


def advance(run: Training, step: Step, loss: float, waited: float) -> None:
    """Count a finished step."""
    images = sum(sum(batch["num_images"]) for batch in step.micro_batches)
    window, state = run.window, run.state
    window.supervised += step.num_supervised
    window.tokens += step.num_tokens
    window.padding += step.num_padding
    window.samples += step.num_samples
    window.images += images
    window.data_wait += waited
    window.events.update(step.events)
    samples, tokens, supervised = run.parallel.sum_counts(
        step.num_samples, step.num_tokens, step.num_supervised
    )
    window.loss_sum += loss * step.num_supervised
    state.step += 1
    state.samples += samples
    state.tokens += tokens
    state.supervised += supervised
    state.skipped = run.loader.bad_samples.count
    state.data = run.loader.state_dict()


def log(run: Training, grad_norm: float) -> None:
    """Write a log line and begin the next window."""
    line = run.window.line(
        run.parallel,
        step=run.state.step,
        epoch=round(run.loader.epoch + run.loader.position / max(len(run.loader), 1), 4),
        grad_norm=grad_norm,
        lr=current_lr(run.optimizer),
        skipped=run.state.skipped,
    )
    for logger in run.loggers:
        logger.log(line)
    run.window.restart()


def sample_ids(batches: Sequence[Mapping[str, Any]], limit: int = 16) -> str:
    """Ids and places of the samples in some batches, for messages."""
    named = [
        f"{sample_id!r} ({where})" if where else repr(sample_id)
        for batch in batches
        for sample_id, where in zip(batch["ids"], batch["wheres"], strict=True)
    ]
    more = f" and {len(named) - limit} more" if len(named) > limit else ""
    return ", ".join(named[:limit]) + more


def _not_finite(number: int, loss: float, grad_norm: float, losses: torch.Tensor, step: Step) -> str:
    bad = [
        b for b, value in zip(step.micro_batches, losses.tolist(), strict=True) if not math.isfinite(value)
    ]
    what = f"the loss is {loss}" if bad or not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    return (
        f"step {number}: {what}. Samples: {sample_ids(bad or step.micro_batches)}. Nothing was updated in "
        "this step; the "
        "last checkpoint is good. Look at these samples, or lower optim.lr or grad_clip, or use "
        "--precision fp32."
    )
