"""Writing and restoring a run's checkpoints under any strategy, while training waits or goes on."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.errors import CheckpointError
from vlmamba.training import checkpoint as checkpoints
from vlmamba.training.checkpoint import RunState
from vlmamba.training.optim import load_named_state
from vlmamba.training.parallel import Parallel
from vlmamba.training.run_dir import whole_directory, write_errors, write_failure
from vlmamba.training.sharded import flat_state, is_sharded, load_shards, start_writing_shards, write_shards


class Checkpointer:
    """Writes the checkpoints of a run; every process calls every method at the same place.

    Args:
        run_dir: The run.
        parallel: The strategy, which says whether the first process writes or all do.
        model: The model as it trains, not wrapped.
        optimizer: Its optimizer.
        keep_last, keep_every: See `TrainConfig`.
        in_background: Write a copy while training goes on; at most one checkpoint is on its way.
    """

    def __init__(
        self,
        run_dir: Path,
        parallel: Parallel,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        keep_last: int,
        keep_every: int = 0,
        in_background: bool = False,
    ) -> None:
        self.run_dir, self.parallel, self.model, self.optimizer = run_dir, parallel, model, optimizer
        self.keep_last, self.keep_every, self.in_background = keep_last, keep_every, in_background
        self.channel = parallel.apart()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(self, state: RunState) -> None:
        """Write a checkpoint; a former one that is still being written is waited for.

        Raises:
            CheckpointError: This or the former one could not be written; in all processes.
        """
        self.wait()
        state = copy.deepcopy(state)
        if self.parallel.world_size > 1:
            state = dataclasses.replace(state, data=merge_data(self.channel.gather(state.data)))
        alone = self.parallel.world_size == 1
        generators = self.channel.gather(checkpoints.rng_state(None if alone else self.parallel.device))
        if self.parallel.layout == "shards":
            self._run(self._shards(state, generators))
        else:
            self._run(self._whole(state, generators))

    def wait(self) -> None:
        """Until the checkpoint on its way is complete.

        Raises:
            CheckpointError: It could not be written; in all processes.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._agree()

    def abandon(self, seconds: float = 60.0) -> None:
        """After a failure elsewhere: let the checkpoint on its way be completed, if that does not take long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, write: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                write()
            except CheckpointError as error:
                self._error = error

        if self.in_background:
            self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            guarded()
            self._agree()

    def _agree(self) -> None:
        """Raise the first error of any process in all of them."""
        error, self._error = self._error, None
        messages = [m for m in self.channel.gather(str(error) if error else None) if m]
        if error is not None:
            raise error
        if messages:
            raise CheckpointError(messages[0])

    def _whole(self, state: RunState, generators: list[dict[str, Any]]) -> Callable[[], None]:
        """The first process writes everything."""
        tensors = self.parallel.trained_tensors(self.model)
        moments = self.parallel.named_state(self.optimizer)
        if self.in_background and self.parallel.is_main:
            tensors = {name: _host_copy(t) for name, t in tensors.items()}
            moments = {n: {k: _host_copy(v) for k, v in values.items()} for n, values in moments.items()}

        def write() -> None:
            if self.parallel.is_main:
                final = checkpoints.checkpoint_path(self.run_dir, state.step)
                with whole_directory(final) as directory, write_errors():
                    checkpoints.write_whole(directory, tensors, moments)
                    checkpoints.write_state(directory, state, generators)
                self._publish(state.step)

        return write

    def _shards(self, state: RunState, generators: list[dict[str, Any]]) -> Callable[[], None]:
        """Every process writes its part; the first one makes the folder and gives it its name."""
        flat = flat_state(
            self.parallel.trained_tensors(self.model), self.parallel.named_state(self.optimizer)
        )
        final = checkpoints.checkpoint_path(self.run_dir, state.step)
        opened = ExitStack()
        directory = Path(self.channel.on_main(lambda: str(opened.enter_context(whole_directory(final)))))
        group = self.channel.handle
        pending = start_writing_shards(directory, flat, group) if self.in_background else None

        def write() -> None:
            try:
                with opened:
                    if pending is None:
                        write_shards(directory, flat, group)
                    else:
                        _result(pending)
                    if self.parallel.is_main:
                        with write_errors():
                            checkpoints.write_state(directory, state, generators)
            except OSError as error:
                raise CheckpointError(write_failure(final, error)) from error
            if self.parallel.is_main:
                self._publish(state.step)

        return write

    def _publish(self, step: int) -> None:
        checkpoints.publish(self.run_dir, step, keep_last=self.keep_last, keep_every=self.keep_every)


def restore(path: Path, parallel: Parallel, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Put model, optimizer and random generators where a checkpoint of any layout left them.

    Raises:
        CheckpointError: The checkpoint's tensors are not those that train, or a file is damaged.
    """
    state = checkpoints.read_state(path)
    if parallel.layout == "shards" and is_sharded(path):
        load_named_state(optimizer, load_shards(path, parallel.trained_tensors(model)))
    else:
        tensors, moments = checkpoints.read_whole(path)
        parallel.load(model, optimizer, tensors, moments, where=path)
    device = parallel.device if parallel.world_size > 1 else None
    checkpoints.load_rng(path, rank=parallel.rank, world_size=parallel.world_size, device=device)
    return state


def merge_data(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the data stands, with the bad rows that any process came across."""
    merged = copy.deepcopy(states[0])
    records: dict[int, Any] = {}
    for state in states:
        for record in state.get("bad_samples", {}).get("records", []):
            records.setdefault(int(record["index"]), record)
    if "bad_samples" in merged:
        merged["bad_samples"]["records"] = list(records.values())
    return merged


def _host_copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _result(pending: Any) -> None:
    from vlmamba.training.sharded import checkpoint_errors

    with checkpoint_errors():
        pending.result()
