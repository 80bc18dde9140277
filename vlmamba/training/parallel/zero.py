"""ZeRO stages 2 and 3 by DeepSpeed's engine, on a file of its settings that the run completes.

Stage 2 cuts gradients and optimizer states, stage 3 the weights too. Masters and moments are fp32; under bf16 DeepSpeed
computes in bf16 by its `torch_autocast`, so what the scan reads in fp32 stays so. Checkpoints are gathered tensor by
tensor and written by the first process, in the layout that every other strategy reads.
Source of the interface: https://deepspeed.readthedocs.io (initialize, engine, "Modifying Partitioned States").
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.common.processes import Launch
from vlmamba.errors import ConfigError, MissingFileError, require
from vlmamba.training.config import TrainConfig
from vlmamba.training.parallel.base import Parallel
from vlmamba.training.parallel.fsdp2 import blocks

FILES = {2: "train/deepspeed/zero2.json", 3: "train/deepspeed/zero3.json"}
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "torch_autocast",
)
"""Keys that follow from the run's own settings; a file that sets them would say something twice."""


def engine_settings(config: TrainConfig, stage: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the file, completed by the run.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is no JSON object, is for another stage, or sets what the run sets.
    """
    path = Path(config.sharding.deepspeed or FILES[stage])
    if not path.is_file():
        raise MissingFileError(
            f"sharding.deepspeed: there is no file {path}. Start in the repository, or name a file of DeepSpeed's "
            "settings."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}, not an object of DeepSpeed's settings.")
    twice = [key for key in OURS if key in settings]
    if twice:
        raise ConfigError(
            f"{path} sets {', '.join(twice)}, which the run's own settings decide (batch, optim, schedule, grad_clip, "
            "precision). Remove them from the file."
        )
    zero = settings.setdefault("zero_optimization", {})
    if zero.setdefault("stage", stage) != stage:
        raise ConfigError(
            f"{path} is for ZeRO stage {zero['stage']}, but parallel is zero{stage}: choose one of them."
        )
    if config.sharding.cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": True})
    return {
        **settings,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,  # the loader decides; DeepSpeed only multiplies it
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": config.grad_clip or 0.0,
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # none: gradients are reduced in fp32
        },
    }


def zero_sizes(config: TrainConfig, stage: int) -> dict[str, float]:
    """What the memory of a stage depends on: of the run's file if it is for that stage, else of ours, else
    DeepSpeed's own defaults (deepspeed/runtime/zero/config.py).
    """
    sizes = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "overlap_comm": True}
    settings: dict[str, Any] = {}
    if config.parallel == f"zero{stage}":
        settings = engine_settings(config, stage)["zero_optimization"]
    elif Path(FILES[stage]).is_file():
        settings = json.loads(Path(FILES[stage]).read_text(encoding="utf-8"))["zero_optimization"]
    found = {key: settings.get(key, default) for key, default in sizes.items()}
    return {key: sizes[key] if value == "auto" else value for key, value in found.items()}


class ZeRO(Parallel):
    """DeepSpeed's engine; `stage` is 2 or 3."""

    stage: int
    replicated = False

    def __init__(self, device: torch.device, launch: Launch, config: TrainConfig) -> None:
        self.settings = engine_settings(config, self.stage)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._deepspeed: Any = require("deepspeed", extra="deepspeed", feature=f"parallel zero{self.stage}")
        super().__init__(device, launch, config)
        self.engine: Any = None
        self.names: dict[str, nn.Parameter] = {}
        self._last = True

    def wrap(self, model: nn.Module) -> nn.Module:
        """The engine around the model, with its optimizer."""
        from vlmamba.training.optim import build_optimizer
        from vlmamba.training.parts import trainable_parameters

        self.names = trainable_parameters(model)
        self._shapes = {name: p.shape for name, p in self.names.items()}
        optimizer = build_optimizer(model, self.config.optim)
        if self.stage == 3:
            kinds = list({type(block) for block in blocks(model)})
            self._deepspeed.utils.set_z3_leaf_modules(model, kinds)
        self.engine, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=self.settings)
        self._optimizer = optimizer
        engine: nn.Module = self.engine
        return engine

    def build_optimizer(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's; the learning rates of its groups count."""
        return self._optimizer

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Tell the engine whether the update follows."""
        self._last = last
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Stage 3 gathers all weights once and takes its hooks off meanwhile, which would send messages."""
        if self.stage != 3:
            yield
            return
        offload = self.engine.optimizer.parameter_offload
        with self._deepspeed.zero.GatheredParameters(list(model.parameters())):
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward by the engine, which averages over the processes."""
        self.engine.backward(loss * self.loss_scale, scale_wrt_gas=False)
        if not self._last:
            self.engine.step()  # counts the micro-step

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
        """The norm of the last step; the engine clips by itself when it steps."""
        return torch.as_tensor(self.engine.get_global_grad_norm() or 0.0)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        max_norm: float | None,
        *,
        finite: bool,
    ) -> tuple[float, bool]:
        """Clip and update in the engine, which leaves out a step whose gradient is not finite."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        taken = not bool(self.engine.optimizer.overflow)
        return (norm if taken else math.inf), taken

    def trained_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The whole masters, on the CPU of the first process; nothing in the others."""
        return self._gathered(self._deepspeed.utils.safe_get_full_fp32_param)

    def named_state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """The whole optimizer state, on the CPU of the first process; nothing in the others."""
        states = list(self._inner_states())
        if not states:
            return {}
        moments = {key: value for key, value in states[0].items() if value.ndim == 0}
        found: dict[str, dict[str, Any]] = {}
        for key in (key for key, value in states[0].items() if value.ndim):
            whole = self._gathered(
                lambda p, k=key: self._deepspeed.utils.safe_get_full_optimizer_state(p, k)  # type: ignore[misc]
            )
            for name, tensor in whole.items():
                scalars = {k: v.detach().cpu().clone() for k, v in moments.items()}
                found.setdefault(name, scalars)[key] = tensor
        return found

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tensors: dict[str, torch.Tensor],
        state: dict[str, dict[str, Any]],
        *,
        where: Path,
    ) -> None:
        """Put whole tensors into masters, weights and moments."""
        from vlmamba.training.sharded import check_names

        wanted = {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}
        check_names(where, wanted, {n: t.shape for n, t in tensors.items()})
        utils = self._deepspeed.utils
        if state:
            self._make_state(next(iter(state.values())))
        for name, parameter in self.names.items():
            value = tensors[name].to(self.device, torch.float32)
            with self._whole(parameter), torch.no_grad():
                parameter.copy_(value)
            utils.safe_set_full_fp32_param(parameter, value)
            for key, moment in state.get(name, {}).items():
                if moment.ndim:
                    utils.safe_set_full_optimizer_state(parameter, moment.to(self.device), key)

    def _make_state(self, like: dict[str, torch.Tensor]) -> None:
        """The state that the optimizer would make in its first step; DeepSpeed's setters fill it."""
        zero = self.engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for master in flat:
            self._optimizer.state[master] = {
                key: torch.zeros_like(master) if value.ndim else value.clone() for key, value in like.items()
            }
        if self.stage != 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _inner_states(self) -> Iterable[dict[str, torch.Tensor]]:
        return (values for values in self._optimizer.state.values() if values)

    def _gathered(self, get: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        """A value of every parameter, gathered by all processes and kept by the first."""
        found = {}
        for name, parameter in self.names.items():
            whole = get(parameter)
            if self.is_main:
                found[name] = whole.detach().to("cpu", torch.float32, copy=True).view(self._shapes[name])
        return found

    def _whole(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.stage != 3:
            return contextlib.nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return gathered


class ZeRO2(ZeRO):
    """Cuts gradients and optimizer states."""

    stage = 2


class ZeRO3(ZeRO):
    """Cuts the weights too."""

    stage = 3
