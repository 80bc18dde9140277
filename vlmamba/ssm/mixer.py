"""The Mamba layer.

Structure and parameter names follow the Mamba paper (Gu and Dao 2023, arXiv:2312.00752, figure 3) and
transformers' MambaMixer, so that checkpoints load by name. Every projection is called as a module: adapters
(LoRA), hooks and quantised layers in their place take effect.

Shape legend: B batch, L length, D model width, E inner width, N state size, K conv kernel, R time-step rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.registry import close_matches
from vlmamba.ssm.checks import check_integers, check_shape
from vlmamba.ssm.conv import causal_conv1d, conv_state_at
from vlmamba.ssm.ops import selective_scan, selective_state_update
from vlmamba.ssm.state import MambaLayerState

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}

FP32_PARAMETERS = (r"\.A_log$", r"\.D$", r"\.dt_proj\.bias$")
"""Names (regular expressions) of what a layer keeps in float32 in a half-precision model: a rounded A or time step
changes how long the state remembers, and they are a tiny part of the model. mamba_simple.py of state-spaces/mamba keeps
A and D so, too; the bias of the time steps lies between -7 and -2, where bfloat16 moves a time step by up to 1.6 %."""


def keeps_fp32(name: str) -> bool:
    """Whether a parameter is one of `FP32_PARAMETERS`, also inside a layer that an adapter wraps."""
    plain = name.replace(".base_layer.", ".")
    return any(re.search(pattern, plain) for pattern in FP32_PARAMETERS)


class TimeStepProjection(nn.Linear):
    """A linear layer without its bias, which `selective_scan` adds in fp32 (`MambaMixer.time_step_bias`).

    In the product's bfloat16 the sum, most of which is the bias, would keep 8 bits of it.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Linear's name)
        """(..., R) to (..., E)."""
        return F.linear(input, self.weight)


class MambaMixer(nn.Module):
    """One Mamba layer: projection, causal convolution, selective scan, gate, projection.

    Args:
        hidden_size: D.
        intermediate_size: E; 2 D by default.
        state_size: N.
        conv_kernel: K.
        time_step_rank: R; "auto" is D / 16, rounded up.
        use_bias: Whether `in_proj` and `out_proj` have a bias.
        use_conv_bias: Whether the convolution has a bias.
        hidden_act: Activation after the convolution (the gate's is always silu).
        time_step_min: Smallest initial time step.
        time_step_max: Largest initial time step.
        time_step_scale: Scale of `dt_proj`'s initial weight.
        time_step_floor: Initial time steps below it are raised to it.
        time_step_init_scheme: "random" or "constant".

    Raises:
        ConfigError: The activation or the scheme is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int | None = None,
        state_size: int = 16,
        conv_kernel: int = 4,
        time_step_rank: int | str = "auto",
        use_bias: bool = False,
        use_conv_bias: bool = True,
        hidden_act: str = "silu",
        time_step_min: float = 1e-3,
        time_step_max: float = 1e-1,
        time_step_scale: float = 1.0,
        time_step_floor: float = 1e-4,
        time_step_init_scheme: str = "random",
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            known = sorted(ACTIVATIONS)
            raise ConfigError(
                f"hidden_act is {hidden_act!r}.{close_matches(hidden_act, known)} Known: {', '.join(known)}."
            )
        if time_step_init_scheme not in ("random", "constant"):
            raise ConfigError(
                f"time_step_init_scheme is {time_step_init_scheme!r}; it must be 'random' or 'constant'."
            )
        if isinstance(time_step_rank, str) and time_step_rank != "auto":
            raise ConfigError(f"time_step_rank is {time_step_rank!r}; it must be a whole number or 'auto'.")
        self.hidden_size = hidden_size
        self.intermediate_size = 2 * hidden_size if intermediate_size is None else intermediate_size
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        self.time_step_rank = (
            math.ceil(hidden_size / 16) if isinstance(time_step_rank, str) else int(time_step_rank)
        )
        self.hidden_act = hidden_act
        self.time_step_min, self.time_step_max = time_step_min, time_step_max
        self.time_step_scale, self.time_step_floor = time_step_scale, time_step_floor
        self.time_step_init_scheme = time_step_init_scheme

        inner = self.intermediate_size
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=use_bias)
        self.conv1d = nn.Conv1d(
            inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1, bias=use_conv_bias
        )
        self.x_proj = nn.Linear(inner, self.time_step_rank + 2 * state_size, bias=False)
        self.dt_proj = TimeStepProjection(self.time_step_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters as the Mamba paper does.

        A is the real S4D initialisation, -(n + 1) (section 3.6); the time steps' bias makes them log-uniform
        between `time_step_min` and `time_step_max` (section 3.6), through the inverse of softplus;
        `dt_proj`'s weight keeps the variance (`mamba_simple.py` of state-spaces/mamba). The other projections
        start as torch's Linear and Conv1d.
        """
        if self.A_log.is_meta:
            return
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        bound = self.time_step_rank**-0.5 * self.time_step_scale
        if self.time_step_init_scheme == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(self.time_step_min), math.log(self.time_step_max)
        device = self.dt_proj.bias.device
        steps = torch.exp(torch.rand(self.intermediate_size, device=device) * (high - low) + low)
        steps = steps.clamp(min=self.time_step_floor)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        decays = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(torch.log(decays).expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        seq_idx: Tensor | None = None,
        state: MambaLayerState | None = None,
        state_at: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """Mix tokens along time.

        With a state and L = 1 this is a decode step, for which `seq_idx` and `reverse` make no difference.

        Args:
            hidden_states: (B, L, D).
            seq_idx: (B, L) integers; the layer restarts wherever neighbouring values differ. Padding is a
                segment of its own.
            state: What came before; overwritten in place with the state after the last token in scan
                direction. No gradient flows through it into earlier calls.
            state_at: (B) integer time positions: the state kept is the one after that token instead of the
                last.
            reverse: Scan from the last token to the first.

        Returns:
            (B, L, D).

        Raises:
            ShapeError: Shapes do not fit.
        """
        check_shape("MambaMixer", "hidden_states", hidden_states, (None, None, self.hidden_size), "(B, L, D)")
        batch, length, _ = hidden_states.shape
        if state is not None:
            self._check_state(state, batch)
        if state_at is not None:
            check_shape("MambaMixer", "state_at", state_at, (batch,), "(B)")
            check_integers("MambaMixer", "state_at", state_at, limit=length)
            if state is None:
                raise ShapeError(
                    "MambaMixer: state_at is given without state; there is nothing to keep it in."
                )
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if state is not None and length == 1:
            return self.out_proj(self._step(x[:, 0], gate[:, 0], state).unsqueeze(1))
        initial = None if state is None else state.conv
        inner = self._convolve(x, seq_idx=seq_idx, initial_state=initial, reverse=reverse)
        dt, B, C = self._time_step_and_matrices(inner)
        initial_ssm = last = None
        if state is not None:
            initial_ssm = state.ssm.clone() if torch.is_grad_enabled() else state.ssm
            last = state_at if state_at is not None else self._last_positions(x, reverse)
        scanned = selective_scan(
            inner,
            dt,
            self.decay(),
            B,
            C,
            self.D,
            gate,
            self.time_step_bias(),
            seq_idx=seq_idx,
            initial_state=initial_ssm,
            reverse=reverse,
            state_at=None if last is None else last.unsqueeze(1),
        )
        if state is None or last is None:
            assert isinstance(scanned, Tensor)
            return self.out_proj(scanned)
        y, states = scanned
        with torch.no_grad():
            state.conv.copy_(
                conv_state_at(
                    x, last, self.conv_kernel, seq_idx=seq_idx, initial_state=state.conv, reverse=reverse
                )
            )
            state.ssm.copy_(states[:, 0])
        return self.out_proj(y)

    def _step(self, x: Tensor, gate: Tensor, state: MambaLayerState) -> Tensor:
        """One token: (B, E) in and out; the direction does not matter."""
        window = torch.cat([state.conv.to(x.dtype), x.unsqueeze(1)], dim=1)
        with brought(self.conv1d):
            weight = self.conv1d.weight.squeeze(1).float()
            inner = torch.einsum("bke,ek->be", window.float(), weight)
            if self.conv1d.bias is not None:
                inner = inner + self.conv1d.bias.float()
        inner = ACTIVATIONS[self.hidden_act](inner).to(x.dtype)
        with torch.no_grad():
            state.conv.copy_(window[:, 1:])
        dt, B, C = self._time_step_and_matrices(inner)
        bias = self.time_step_bias()
        return selective_state_update(state.ssm, inner, dt, self.decay(), B, C, self.D, gate, bias)

    def _convolve(
        self, x: Tensor, *, seq_idx: Tensor | None, initial_state: Tensor | None, reverse: bool
    ) -> Tensor:
        fused = self.hidden_act in ("silu", "swish")
        with brought(self.conv1d):
            inner = causal_conv1d(
                x,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu" if fused else None,
                seq_idx=seq_idx,
                initial_state=initial_state,
                reverse=reverse,
            )
        assert isinstance(inner, Tensor)
        return inner if fused else ACTIVATIONS[self.hidden_act](inner)

    def _time_step_and_matrices(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw time steps without `time_step_bias`, (..., E), and B and C (..., N)."""
        projected = self.x_proj(inner)
        rank, B, C = projected.split([self.time_step_rank, self.state_size, self.state_size], dim=-1)
        return self.dt_proj(rank).to(inner.dtype), B.to(inner.dtype), C.to(inner.dtype)

    def time_step_bias(self) -> Tensor | None:
        """What the scan adds to the raw time steps, (E); None when the layer in `dt_proj`'s place adds its own.

        Raises:
            ConfigError: `dt_proj` is wrapped by an adapter that counts on its layer's bias.
        """
        layer = self.dt_proj
        if isinstance(layer, TimeStepProjection):
            with brought(layer):
                return layer.bias
        if not any(isinstance(part, TimeStepProjection) for part in layer.modules()):
            return None
        added = hasattr(layer, "lora_A") and not any(layer.use_dora.values())
        if added or hasattr(
            layer, "modules_to_save"
        ):  # peft: LoRA adds to the product, a trained copy is the same
            with brought(getattr(layer, "base_layer", layer)):
                bias: Tensor = layer.bias
                return bias
        raise ConfigError(
            f"dt_proj is wrapped by {type(layer).__module__}.{type(layer).__qualname__}, but only LoRA without DoRA "
            "fits there: the layer's bias is added later, in the scan. Leave dt_proj out of the adapter's "
            "target_modules."
        )

    def decay(self) -> Tensor:
        """A, (E, N), fp32 (fp64 in an fp64 layer)."""
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())

    def _last_positions(self, x: Tensor, reverse: bool) -> Tensor:
        return torch.full((x.shape[0],), 0 if reverse else x.shape[1] - 1, device=x.device)

    def _check_state(self, state: MambaLayerState, batch: int) -> None:
        inner = self.intermediate_size
        check_shape(
            "MambaMixer", "state.conv", state.conv, (batch, self.conv_kernel - 1, inner), "(B, K-1, E)"
        )
        check_shape("MambaMixer", "state.ssm", state.ssm, (batch, inner, self.state_size), "(B, E, N)")


def brought(layer: nn.Module) -> AbstractContextManager[None]:
    """A context in which a layer's parameters are where it runs, for a layer whose parameters are read without a call.

    accelerate's offloading (`device_map` with "cpu" or "disk") keeps them elsewhere and brings them for a call only.
    """
    if "_hf_hook" not in layer.__dict__:
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(layer)
    return context
