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

from vlmamba.common.digests import digests_of
from vlmamba.common.files import replaced_directory, write_errors
from vlmamba.common.processes import Group
from vlmamba.errors import CheckpointError, WriteError
from vlmamba.training import checkpoint as checkpoints
from vlmamba.training.checkpoint import RunState
from vlmamba.training.optim import load_named_state
from vlmamba.training.parallel import Parallel
from vlmamba.training.sharded import SHARDS, is_old, is_sharded, load_shards, own_part, write_part


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
        self._run(self._writer(state, generators))

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
            raise WriteError(messages[0])

    def _writer(self, state: RunState, generators: list[dict[str, Any]]) -> Callable[[], None]:
        """What writes a checkpoint of the present moment: the first process all of it, or each process its part."""
        parallel, final = self.parallel, checkpoints.checkpoint_path(self.run_dir, state.step)
        tensors, moments = parallel.trained_tensors(self.model), parallel.named_state(self.optimizer)
        shards = parallel.layout == "shards"
        if not shards and not parallel.is_main:
            return lambda: None
        group = self.channel if shards else Group()
        part = own_part(tensors, moments, is_main=parallel.is_main) if shards else {}
        if self.in_background:
            tensors = {name: _host_copy(t) for name, t in tensors.items()} if not shards else {}
            moments = {n: {k: _host_copy(v) for k, v in m.items()} for n, m in moments.items() if not shards}
            part = {key: (_host_copy(piece), *where) for key, (piece, *where) in part.items()}

        def write() -> None:
            with ExitStack() as opened:
                directory = Path(group.on_main(lambda: str(opened.enter_context(replaced_directory(final)))))
                digests: dict[str, str] = {}
                failure: WriteError | None = None
                try:
                    with write_errors(final):
                        if shards:
                            files = [write_part(directory, part, parallel.rank, parallel.world_size)]
                        else:
                            files = checkpoints.write_whole(directory, tensors, moments)
                        digests = digests_of(directory, files)
                except WriteError as error:
                    failure = error
                outcomes = group.gather((digests, None if failure is None else str(failure)))
                for _, message in outcomes:
                    if message is not None:
                        raise failure or WriteError(message)
                if parallel.is_main:
                    state.files = {name: each for found, _ in outcomes for name, each in found.items()}
                    with write_errors(final):
                        checkpoints.write_state(directory, state, generators)
            if parallel.is_main:
                checkpoints.publish(
                    self.run_dir, state.step, keep_last=self.keep_last, keep_every=self.keep_every
                )

        return write


def restore(path: Path, parallel: Parallel, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Put model, optimizer and random generators where a checkpoint of any layout left them.

    Raises:
        CheckpointError: The checkpoint's tensors are not those that train, or a file is damaged.
    """
    state = checkpoints.read_state(path)
    checkpoints.verify(path, state, parallel)
    if parallel.layout == "shards" and is_sharded(path) and not is_old(path / SHARDS):
        load_named_state(optimizer, load_shards(path, parallel.trained_tensors(model)))
    else:
        parallel.load(model, optimizer, *checkpoints.read_whole(path), where=path)
    checkpoints.load_rng(path, parallel, parallel.device if parallel.world_size > 1 else None)
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
