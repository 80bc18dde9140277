"""What a run reports: the numbers of a log line, and where they are written."""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmamba.common.files import append_text, replace_text, write_errors
from vlmamba.data import EVENTS
from vlmamba.errors import CheckpointError, MissingDependencyError, require
from vlmamba.registry import Registry
from vlmamba.training.flops import FlopCount
from vlmamba.training.parallel import Parallel

logger = logging.getLogger(__name__)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Window:
    """Sums over the optimizer steps since the last log line."""

    flops: FlopCount | None = None
    peak: float | None = None
    loss_sum: float = 0.0
    supervised: int = 0
    tokens: int = 0
    padding: int = 0
    samples: int = 0
    images: int = 0
    data_wait: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.perf_counter)

    def leave_out(self, seconds: float) -> None:
        """Do not count some seconds, spent on a checkpoint, as training."""
        self.started += seconds

    def restart(self) -> None:
        """Begin the next window."""
        self.loss_sum = self.data_wait = 0.0
        self.supervised = self.tokens = self.padding = self.samples = self.images = 0
        self.events.clear()
        self.started = time.perf_counter()

    def line(self, parallel: Parallel, **values: Any) -> dict[str, Any]:
        """The numbers of a log line; sums are taken over all processes.

        Args:
            parallel: The processes.
            **values: step, epoch, grad_norm, lr, skipped: what the window does not know.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        samples, supervised, tokens, padding, images = parallel.sum_counts(
            self.samples, self.supervised, self.tokens, self.padding, self.images
        )
        (loss_sum,) = parallel.sum_floats(self.loss_sum)
        events = parallel.sum_counts(*(self.events[name] for name in EVENTS))
        mfu = None
        if self.flops is not None and self.peak is not None:
            done = self.flops.total(tokens=tokens, supervised=supervised, images=images)
            mfu = round(done / seconds / parallel.world_size / self.peak, 4)
        return {
            "step": values.pop("step"),
            "epoch": values.pop("epoch"),
            "loss": loss_sum / supervised if supervised else None,  # no step of the window was taken
            **values,
            "samples_per_s": round(samples / seconds, 3),
            "tokens_per_s_per_device": round(tokens / seconds / parallel.world_size, 1),
            "mfu": mfu,
            "data_wait_pct": round(100 * self.data_wait / seconds, 1),
            "padding_pct": round(100 * padding / max(tokens + padding, 1), 2),
            "supervised_pct": round(100 * supervised / max(tokens, 1), 2),
            "repaired": sum(events),
            "repairs": {name: count for name, count in zip(EVENTS, events, strict=True) if count},
            "memory_gib": round(peak_memory_gib(parallel.device), 3),
            "seconds": round(seconds, 3),
        }


class MetricLogger:
    """Receives every log line of a run; `close` is called when it ends."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one line."""

    def close(self) -> None:
        """The run ends."""


class JsonlLogger(MetricLogger):
    """One JSON object a line in ``log.jsonl``.

    Args:
        path: The file; lines after `resume_step`, left by a run that was killed, are dropped.
        resume_step: The last step that counts; 0 for a new run.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in read_log(path) if line["step"] <= resume_step]
            replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append the line.

        Raises:
            WriteError: The disk is full or fails.
        """
        append_text(self.path, json.dumps(dict(line)) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: Another line is damaged.
    """
    texts = Path(path).read_bytes().splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line.get("step"), int):
                raise ValueError("no step")
            lines.append(line)
        except (ValueError, AttributeError, RecursionError) as error:
            if number < len(texts):
                raise CheckpointError(
                    f"{path}:{number} is no line of a log: {text[:80]!r}. The file is damaged; remove that line."
                ) from error
    return lines


class TensorBoardLogger(MetricLogger):
    """TensorBoard event files under ``tensorboard/``."""

    def __init__(self, run_dir: Path, *, resume_step: int, **_: Any) -> None:
        require("tensorboard", extra="train", feature="the logger 'tensorboard'")
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self._folder = run_dir / "tensorboard"
        with write_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write every number.

        Raises:
            WriteError: The disk is full or fails; TensorBoard writes in a thread, and may report it lines later.
        """
        with write_errors(self._folder):
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"train/{key}", value, line["step"])

    def close(self) -> None:
        """Write what is pending."""
        with write_errors(self._folder):
            self._writer.close()


class TrackerLogger(MetricLogger):
    """wandb and trackio, which share one interface. Sends data away: only on request.

    A run has an id of its own for wandb, kept in its folder, so that it goes on in the same place when it is resumed:
    names need not be unique there.
    """

    def __init__(self, module: str, run_dir: Path, *, resume_step: int, config: Mapping[str, Any]) -> None:
        self._tracker: Any = require(module, extra=module, feature=f"the logger {module!r}")
        options = {"name": run_dir.name}
        if module == "wandb":
            file = run_dir / "wandb_id"
            if not file.exists():
                replace_text(file, uuid.uuid4().hex[:16] + "\n")
            options["id"] = file.read_text(encoding="utf-8").strip()
        self._tracker.init(project="vlmamba", config=dict(config), resume="allow", **options)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send every number."""
        numbers = {f"train/{k}": v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        self._tracker.log(numbers, step=line["step"])

    def close(self) -> None:
        """Finish the run there."""
        self._tracker.finish()


LOGGERS: Registry[Callable[..., MetricLogger]] = Registry("logger")
LOGGERS.add("tensorboard", TensorBoardLogger)
for _name in ("wandb", "trackio"):
    LOGGERS.add(_name, partial(TrackerLogger, _name))


def open_loggers(
    names: Sequence[str], run_dir: Path, *, resume_step: int, config: Mapping[str, Any]
) -> list[MetricLogger]:
    """``log.jsonl`` and the loggers asked for.

    A missing TensorBoard, which is on by default, is only warned about.

    Raises:
        ConfigError: A name is unknown.
        MissingDependencyError: The package of wandb or trackio is not installed.
    """
    loggers: list[MetricLogger] = [JsonlLogger(run_dir / "log.jsonl", resume_step=resume_step)]
    for name in dict.fromkeys(n for n in names if n != "jsonl"):
        try:
            loggers.append(LOGGERS.get(name)(run_dir, resume_step=resume_step, config=config))
        except MissingDependencyError as error:
            if name != "tensorboard":
                raise
            logger.warning("%s Going on with log.jsonl alone.", error)
    return loggers
