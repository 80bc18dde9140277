"""Evaluation during training, through functions of the user's that are found by name when the run starts.

Training imports no evaluation: a run's config names functions (`TrainConfig.evaluations`), each called as
``function(model, processor, step=step, **options)`` and returning numbers by name. Every process calls it, at the same
step, with the model in evaluation mode and without gradients; the numbers of the first process count. Weights that are
cut over processes are gathered before, so each process may run the model as often as it likes, or leave the work to
the first. An error in one of them ends the run in all.

An evaluation changes nothing of the training: random generators and modes are put back, and a step is evaluated before
its checkpoint is written, so that a run killed in between evaluates it again.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmamba.common.processes import Group
from vlmamba.config.files import load_python_file
from vlmamba.errors import ConfigError, MissingFileError, TrainingError
from vlmamba.registry import close_matches
from vlmamba.training.checkpoint import rng_state, set_rng_state
from vlmamba.training.config import EvaluationConfig
from vlmamba.training.metrics import JsonlLogger, MetricLogger
from vlmamba.training.parallel import Parallel
from vlmamba.training.parts import set_modes
from vlmamba.training.precision import autocast

logger = logging.getLogger(__name__)

EVALUATION_LOG = "eval.jsonl"
"""File of the run: one line for each evaluation."""

Function = Callable[..., Mapping[str, float] | None]


def find_function(spec: str, options: Mapping[str, Any]) -> Function:
    """The function that a name means.

    Args:
        spec: ``path/to/file.py:function`` or ``package.module:function``.
        options: Keyword arguments that it will be given.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: There is no such module or function, or it does not take the options.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(
            f"evaluations: {spec!r} is no function; write file.py:function or package.module:function."
        )
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise MissingFileError(f"evaluations: there is no file {place} (looked in {Path.cwd()}).")
        module = load_python_file(place, "evaluation")
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"evaluations: {spec!r}: {error}. For a file, write its path with .py."
            ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(
            f"evaluations: {place} has no function {name!r}.{close_matches(name, known)} It has: {', '.join(known)}."
        )
    try:
        inspect.signature(function).bind(None, None, step=0, **options)
    except TypeError as error:
        raise ConfigError(
            f"evaluations: {spec} cannot be called as {name}(model, processor, step=..., "
            f"{', '.join(f'{key}=...' for key in options)}): {error}."
        ) from error
    return function


@dataclass
class Evaluations:
    """The evaluations of a run.

    Args:
        configs: Which, and how often.
        model: As it trains, not wrapped.
        processor: Its processor.
        run_dir: Where `EVALUATION_LOG` is.
        parallel: Gathers the weights.
        channel: Tells the processes how it went.
        precision: That of the training.
    """

    configs: Sequence[EvaluationConfig]
    model: Any
    processor: Any
    run_dir: Path
    parallel: Parallel
    channel: Group
    precision: str

    def __post_init__(self) -> None:
        self.functions = [find_function(each.function, each.options) for each in self.configs]
        self._log: JsonlLogger | None = None

    def open(self, *, resume_step: int) -> None:
        """Go on with the log after a step."""
        if self.parallel.is_main and self.configs:
            self._log = JsonlLogger(self.run_dir / EVALUATION_LOG, resume_step=resume_step)

    def __call__(self, step: int, *, last: bool, loggers: Sequence[MetricLogger] = ()) -> float:
        """Run those that are due after a step; returns the seconds they took.

        Raises:
            TrainingError: One failed.
        """
        started = time.perf_counter()
        pairs = zip(self.configs, self.functions, strict=True)
        due = [(config, function) for config, function in pairs if step % config.every == 0 or last]
        if not due:
            return 0.0
        with self.parallel.gathered(self.model):
            for config, function in due:
                began = time.perf_counter()
                numbers = self._evaluate(config, function, step)
                self._write(config, step, numbers, time.perf_counter() - began, loggers)
        return time.perf_counter() - started

    def _evaluate(self, config: EvaluationConfig, function: Function, step: int) -> dict[str, float]:
        generators = rng_state()
        self.model.eval()
        numbers: dict[str, float] = {}
        failure: Exception | None = None
        try:
            with torch.no_grad(), autocast(self.precision, self.parallel.device):
                found = function(self.model, self.processor, step=step, **config.options)
            numbers = {str(name): float(value) for name, value in (found or {}).items()}
        except Exception as error:  # noqa: BLE001 - whatever it was, all processes are told
            failure = error
        finally:
            set_rng_state(generators)
            set_modes(self.model)
        self._agree(config, step, failure)
        return numbers

    def _agree(self, config: EvaluationConfig, step: int, failure: Exception | None) -> None:
        """Wait for all processes, and end in all of them if it failed in one."""
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        failures = self.channel.gather(mine)
        rank = next((rank for rank, text in enumerate(failures) if text is not None), None)
        if rank is None:
            return
        where = f" on rank {rank}" if len(failures) > 1 else ""
        raise TrainingError(
            f"step {step}: the evaluation {config.function} failed{where}: {failures[rank]}. Training was sound; "
            "repair it, or leave it out of `evaluations`, and continue with --resume."
        ) from failure

    def _write(
        self,
        config: EvaluationConfig,
        step: int,
        numbers: Mapping[str, float],
        seconds: float,
        loggers: Sequence[MetricLogger],
    ) -> None:
        if self._log is None:
            return
        shown = json.dumps({name: round(value, 4) for name, value in numbers.items()})
        logger.info("step %d: %s: %s", step, config.function, shown)
        self._log.log({"step": step, "evaluation": config.function, **numbers, "seconds": round(seconds, 3)})
        name = config.function.rpartition(":")[2]
        line = {"step": step, **{f"eval/{name}/{key}": value for key, value in numbers.items()}}
        for each in loggers:
            if not isinstance(each, JsonlLogger):
                each.log(line)
