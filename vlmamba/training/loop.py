"""The training loop: one optimizer step after another, from a plan of the data that is known ahead.

The loss of a step is the sum over its supervised tokens divided by their number, both over all processes and
all micro-steps. The number is counted before the first forward pass, so how a step is cut into micro-steps
changes nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from vlmamba.common.processes import Group
from vlmamba.common.progress import progress_bar
from vlmamba.data import MODEL_KEYS, Step, StepLoader
from vlmamba.errors import TrainingError
from vlmamba.training.checkpoint import RunState
from vlmamba.training.config import TrainConfig
from vlmamba.training.faults import NONFINITE_FILE, record_nonfinite
from vlmamba.training.metrics import MetricLogger, Window
from vlmamba.training.optim import current_lr, set_learning_rate
from vlmamba.training.parallel import Parallel
from vlmamba.training.parts import trainable_parameters
from vlmamba.training.precision import autocast
from vlmamba.training.schedule import Schedule

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped"]


@dataclass
class Training:
    """Everything the loop works with, set up by `vlmamba.training.run`.

    Attributes:
        config: The run.
        model: What is called: the model, wrapped by the parallel strategy.
        save: Writes a checkpoint of the state given.
        should_stop: Whether the run has been asked to stop (SIGTERM).
        alive: Called whenever something moved.
        channel: For what the processes tell each other now and then.
        evaluate: Runs the evaluations that are due after a step (`vlmamba.training.evaluations`).
        nonfinite_in_a_row: Steps not taken since the last one that was.
    """

    config: TrainConfig
    parallel: Parallel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: StepLoader
    state: RunState
    window: Window
    save: Callable[[RunState], None] = field(default=lambda state: None)
    loggers: Sequence[MetricLogger] = ()
    should_stop: Callable[[], bool] = field(default=lambda: False)
    alive: Callable[[], None] = field(default=lambda: None)
    channel: Group = field(default_factory=Group)
    evaluate: Callable[..., float] = field(default=lambda step, **_: 0.0)
    nonfinite_in_a_row: int = 0


def train_loop(run: Training) -> Outcome:
    """Train until the last step, or until asked to stop; either way the present step is saved.

    Raises:
        TrainingError: Loss or gradient are not finite more often than allowed, a step has no supervised token, or a
            data worker died.
        DataError: Too many rows cannot be used.
        CheckpointError: A checkpoint could not be written.
    """
    config, state = run.config, run.state
    saved_at = state.step
    bad_known = run.loader.bad_samples.count
    outcome: Outcome = "finished"
    how: dict[str, Any] = {"initial": state.step, "enabled": run.parallel.is_main, "smoothing": 0.1}
    bar_of = progress_bar(state.total_steps, "train", "step", **how)
    with worker_deaths(), logging_redirect_tqdm(), bar_of as bar:
        for step, waited in timed(steps(run.loader, state.total_steps - state.step)):
            loss, grad_norm = optimizer_step(run, step)
            advance(run, step, loss, waited)
            bad_known = share_bad_rows(run, bad_known)
            run.alive()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{current_lr(run.optimizer):.2e}", refresh=False)
            if state.step % config.log_every == 0 or state.step == state.total_steps:
                log(run, grad_norm)
            evaluate(run)
            stop = run.parallel.any(run.should_stop())
            if stop or (config.save_every and state.step % config.save_every == 0):
                saved_at = save(run)
            if stop and state.step < state.total_steps:
                outcome = "stopped"
                break
    if saved_at != state.step:
        save(run)
    return outcome


def evaluate(run: Training) -> None:
    """Measure the model where that is due, outside the clock of the log."""
    step = run.state.step
    seconds = run.evaluate(step, last=step == run.state.total_steps, loggers=run.loggers)
    run.alive()
    run.window.leave_out(seconds)


def save(run: Training) -> int:
    """Write a checkpoint, outside the clock of the log; returns its step."""
    started = time.perf_counter()
    run.save(run.state)
    run.alive()
    run.window.leave_out(time.perf_counter() - started)
    return run.state.step


def steps(loader: StepLoader, count: int) -> Iterator[Step]:
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


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Say what it means when torch reports, wherever the main thread is, that a data worker died.

    Raises:
        TrainingError: It did.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a data worker process ended: {str(error).splitlines()[0].strip()} The usual cause is too little memory: "
            "lower --data.num_workers. Continue with --resume."
        ) from error


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
    (loss,) = run.parallel.sum_floats(float(losses.sum()))
    grad_norm, taken = run.parallel.step(
        run.optimizer,
        trainable_parameters(run.model).values(),
        run.config.grad_clip,
        finite=math.isfinite(loss),
    )
    if not taken:
        leave_out(run, step, loss, grad_norm, losses)
        return math.nan, grad_norm
    run.nonfinite_in_a_row = 0
    return loss, grad_norm


def leave_out(run: Training, step: Step, loss: float, grad_norm: float, losses: torch.Tensor) -> None:
    """Do not take a step: count it, write its samples down, and give up after too many in a row.

    Raises:
        TrainingError: There were more than `max_nonfinite_steps` in a row.
    """
    number, allowed = run.state.step + 1, run.config.max_nonfinite_steps
    run.state.nonfinite += 1
    run.nonfinite_in_a_row += 1
    shares = zip(step.micro_batches, losses.tolist(), strict=True)
    samples = [
        {"id": sample_id, "where": where, "rank": run.parallel.rank, "finite": math.isfinite(share)}
        for batch, share in shares
        for sample_id, where in zip(batch["ids"], batch["wheres"], strict=True)
    ]
    everywhere = [sample for each in run.channel.gather(samples) for sample in each]
    entry = {"step": number, "loss": str(loss), "grad_norm": str(grad_norm)}
    if run.parallel.is_main:
        record_nonfinite(Path(run.config.output), entry, everywhere)
    message = _not_finite(number, loss, grad_norm, everywhere)
    if run.nonfinite_in_a_row > allowed:
        row = f" {run.nonfinite_in_a_row} such steps in a row are more than max_nonfinite_steps {allowed}."
        raise TrainingError(
            message + (row if allowed else " --max_nonfinite_steps 3 leaves out up to three.")
        )
    logger.warning("%s", message)


def accumulate_gradients(run: Training, step: Step, supervised: int) -> torch.Tensor:
    """Add up the gradients of a step's micro-batches; returns the share of each in the loss."""
    losses = []
    for index, batch in enumerate(step.micro_batches):
        last = index == len(step.micro_batches) - 1
        with run.parallel.accumulate(run.model, last=last):
            with autocast(run.config.precision, run.parallel.device):
                output = run.model(
                    **inputs_of(batch, run.parallel.device), num_items=supervised, logits_to_keep=None
                )
            run.parallel.backward(output.loss)
        losses.append(output.loss.detach().float())
    return torch.stack(losses)


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch that the model takes, on the device."""
    return {key: batch[key].to(device, non_blocking=True) for key in MODEL_KEYS if key in batch}


def advance(run: Training, step: Step, loss: float, waited: float) -> None:
    """Count a finished step."""
    images = sum(sum(batch["num_images"]) for batch in step.micro_batches)
    window, state = run.window, run.state
    if math.isfinite(loss):  # else the step was not taken
        window.supervised += step.num_supervised
        window.loss_sum += loss * step.num_supervised
    window.tokens += step.num_tokens
    window.padding += step.num_padding
    window.samples += step.num_samples
    window.images += images
    window.data_wait += waited
    window.events.update(step.events)
    samples, tokens, supervised = run.parallel.sum_counts(
        step.num_samples, step.num_tokens, step.num_supervised
    )
    state.step += 1
    state.samples += samples
    state.tokens += tokens
    state.supervised += supervised
    state.data = run.loader.state_dict()


def share_bad_rows(run: Training, known: int) -> int:
    """Let every process know the bad rows of all, so that one budget and one list hold for the run.

    Args:
        run: The run.
        known: How many rows all processes knew before this step.

    Returns:
        How many they know now.

    Raises:
        DataError: They are too many, together.
    """
    account = run.loader.bad_samples
    (new,) = run.parallel.sum_counts(account.count - known)
    if new:
        for records in run.channel.gather(list(account.records.values())[known:]):
            account.add(records)
    run.state.skipped = account.count
    return account.count


def log(run: Training, grad_norm: float) -> None:
    """Write a log line and begin the next window."""
    line = run.window.line(
        run.parallel,
        step=run.state.step,
        epoch=round(run.loader.epoch + run.loader.position / max(len(run.loader), 1), 4),
        grad_norm=grad_norm,
        lr=current_lr(run.optimizer),
        skipped=run.state.skipped,
        **({"nonfinite": run.state.nonfinite} if run.state.nonfinite else {}),
    )
    for logger in run.loggers:
        logger.log(line)
    run.window.restart()


def sample_ids(batches: Sequence[Mapping[str, Any]]) -> str:
    """Ids and places of the samples in some batches, for messages."""
    return names(
        {"id": sample_id, "where": where}
        for batch in batches
        for sample_id, where in zip(batch["ids"], batch["wheres"], strict=True)
    )


def names(samples: Iterable[Mapping[str, Any]], limit: int = 16) -> str:
    """The first of some samples, as a user finds them."""
    named = [f"{s['id']!r} ({s['where']})" if s["where"] else repr(s["id"]) for s in samples]
    more = f" and {len(named) - limit} more" if len(named) > limit else ""
    return ", ".join(named[:limit]) + more


def _not_finite(number: int, loss: float, grad_norm: float, samples: Sequence[Mapping[str, Any]]) -> str:
    bad = [sample for sample in samples if not sample["finite"]]
    what = f"the loss is {loss}" if bad or not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    return (
        f"step {number}: {what}. Samples: {names(bad or samples)}. Nothing was updated in this step (all its samples "
        f"are listed in {NONFINITE_FILE}); the last checkpoint is good. Look at these samples, or lower optim.lr or "
        "grad_clip, or use --precision fp32."
    )
