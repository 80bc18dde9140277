"""FSDP2: parameters, gradients and optimizer states are cut along their first dimension and spread over processes.

Every repeated block is a group that is gathered in one message and, after its backward, reduced and cut in one. Under
bf16 the blocks are gathered in bf16 from fp32 masters, and gradients are reduced in fp32. Replicated, not cut:
- what is frozen, such as the encoder or the weights under adapters (unless `sharding.shard_frozen`);
- under bf16, the parameters that the scan reads in fp32 (`FP32_PARAMETERS`, a few MB), whose gradients are summed here.

Gradients are reduced in every micro-step: kept whole, they would take the memory that cutting saves.
With `sharding.shard` = "grads" a block stays gathered from its forward to its backward, "full" gathers it twice.
Source of the interface: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from vlmamba.common.processes import Launch
from vlmamba.errors import ConfigError
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.training.config import TrainConfig
from vlmamba.training.parallel.base import Parallel


class FSDP2(Parallel):
    """`torch.distributed.fsdp.fully_shard`, by the settings `precision` and `sharding`."""

    layout: Literal["whole", "shards"] = "shards"
    replicated = False

    def __init__(self, device: torch.device, launch: Launch, config: TrainConfig) -> None:
        super().__init__(device, launch, config)
        self.sharding, self.precision = config.sharding, config.precision
        self.mesh = self._mesh()
        self.whole: list[nn.Parameter] = []

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        kind = self.device.type
        if not self.sharding.hybrid:
            return init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))
        if self.world_size % self.launch.local_world_size:
            raise ConfigError(
                f"sharding.hybrid: {self.world_size} processes are not a multiple of the "
                f"{self.launch.local_world_size} of this host; start equally many on every host."
            )
        shape = (self.launch.num_hosts, self.launch.local_world_size)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Cut the model in place."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        policy = MixedPrecisionPolicy()
        if self.precision == "bf16":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        ignored = self._replicated(model)
        # In the model's order, which is the same in all processes, as that of a set is not.
        self.whole = [p for p in model.parameters() if p.requires_grad and p in ignored]
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": policy,
            "ignored_params": ignored,
            "offload_policy": CPUOffloadPolicy() if self.sharding.cpu_offload else OffloadPolicy(),
        }
        for block in blocks(model):
            if any(p not in ignored for p in block.parameters()):
                fully_shard(block, reshard_after_forward=self._gathers_twice(block, model), **options)
        fully_shard(model, reshard_after_forward=self._gathers_twice(model, model), **options)
        return model

    def _replicated(self, model: nn.Module) -> set[nn.Parameter]:
        """Parameters that every process keeps whole."""
        ignored: set[nn.Parameter] = set()
        if not self.sharding.shard_frozen:
            ignored.update(p for p in model.parameters() if not p.requires_grad)
        if self.precision == "bf16":
            ignored.update(p for name, p in model.named_parameters() if keeps_fp32(name))
        return ignored

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Gather every block once and keep it, so that processes may run the model unequally often."""
        from torch.distributed.fsdp import FSDPModule

        groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for group in groups:
            group.unshard()
        model.set_reshard_after_forward(False)  # type: ignore[operator]
        if hasattr(model, "generate"):  # which would let all processes generate until the last one is done
            model.generate = functools.partial(model.generate, synced_gpus=False)  # type: ignore
        try:
            yield
        finally:
            model.__dict__.pop("generate", None)
            # Else the next backward would gather ahead by the order of these forwards, which processes may not share.
            model._get_fsdp_state()._comm_ctx.post_forward_order.clear()  # type: ignore[operator]
            for group in groups:
                group.set_reshard_after_forward(self._gathers_twice(group, model), recurse=False)
                group.reshard()

    def _gathers_twice(self, group: nn.Module, model: nn.Module) -> bool:
        return self.sharding.shard == "full" and group is not model

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
        """The norm over all shards, the same in all processes; gradients are scaled to `max_norm` at most."""
        self._sum_replicated()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = global_norm(grads, self.mesh, self.device)
        if max_norm is not None:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
            for grad in grads:
                local_of(grad).mul_(factor.to(local_of(grad).device))
        return norm

    def _sum_replicated(self) -> None:
        """Average the gradients of the replicated parameters, in one message."""
        grads = [p.grad for p in self.whole if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model: elements of the outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be cut."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(grads: list[torch.Tensor], mesh: Any, device: torch.device) -> torch.Tensor:
    """The 2-norm over cut and whole gradients together."""
    from torch.distributed.tensor import DTensor

    cut = [g.to_local() for g in grads if isinstance(g, DTensor)]
    whole = [g for g in grads if not isinstance(g, DTensor)]
    squares = _squares(cut).to(device)
    dist.all_reduce(squares, group=mesh.get_group("shard"))
    return (squares + _squares(whole).to(device)).sqrt()


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors:
        return torch.zeros(())
    return nn.utils.get_total_norm([t.float() for t in tensors]).square()
