"""One token a row through a Mamba language model, on states that stay where they are.

This is the path of every decoding step, in `generate` and in loops of one's own: what depends on the weights
alone is worked out once, the states are overwritten in place, and nothing is checked twice. Projections are
still called as modules, so adapters and quantised layers take effect. On a GPU the same step can be recorded
once as a CUDA graph and replayed (`generate(..., cuda_graphs=True)`): a token is then one launch instead of
about twenty a layer.

Shapes: B batch, D model width, E inner width, N state size, K conv kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmamba.errors import ConfigError
from vlmamba.ssm.mixer import ACTIVATIONS
from vlmamba.ssm.registry import choose_backend, requested_backend
from vlmamba.ssm.spec import ScanSpec, StepCall, no_autocast

if TYPE_CHECKING:
    from vlmamba.models.language.blocks import MambaBackbone, MambaBlock
    from vlmamba.ssm.state import MambaLayerState, MambaState


class _LayerStep:
    """One block: its modules, its states, and what depends on its weights alone."""

    def __init__(self, block: MambaBlock, state: MambaLayerState) -> None:
        mixer = block.mixer
        self.mixer = mixer
        self.norm = block.norm
        self.conv, self.ssm = state.conv, state.ssm
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = (
            mixer.in_proj,
            mixer.x_proj,
            mixer.dt_proj,
            mixer.out_proj,
        )
        self.activation = ACTIVATIONS[mixer.hidden_act]
        self.sizes = [mixer.time_step_rank, mixer.state_size, mixer.state_size]
        self.residual_in_fp32 = block.residual_in_fp32
        self.decay = mixer.decay().detach().clone()
        self.taps = self._taps().clone()
        self.step: Callable[[StepCall], Tensor] | None = None

    def _taps(self) -> Tensor:
        """The convolution's weight as (K, E), fp32."""
        return self.mixer.conv1d.weight.detach().squeeze(1).t().float().contiguous()

    def refresh(self) -> None:
        """Take over changed weights, in the same memory (a recorded graph reads it)."""
        self.decay.copy_(self.mixer.decay().detach())
        self.taps.copy_(self._taps())

    def __call__(self, hidden: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        inner, gate = self.in_proj(self.norm(hidden)).chunk(2, dim=-1)
        inner = self._convolve(inner)
        dt, B, C = self.x_proj(inner).split(self.sizes, dim=-1)
        call = StepCall(
            self.ssm,
            inner,
            self.dt_proj(dt).to(inner.dtype),
            self.decay,
            B.unsqueeze(1),
            C.unsqueeze(1),
            self.mixer.D,
            gate,
            self.mixer.time_step_bias(),
            True,
        )
        if self.step is None:
            self.step = self._backend(call)
        if torch.is_autocast_enabled(inner.device.type):
            with no_autocast(inner.device):
                y = self.step(call)
        else:
            y = self.step(call)
        return (hidden.float() if self.residual_in_fp32 else hidden) + self.out_proj(y)

    def _convolve(self, x: Tensor) -> Tensor:
        window = torch.cat([self.conv.to(x.dtype), x.unsqueeze(1)], dim=1)
        self.conv.copy_(window[:, 1:])
        total = (window * self.taps).sum(dim=1)  # fp32: the taps are
        bias = self.mixer.conv1d.bias
        if bias is not None:
            total += bias
        return self.activation(total).to(x.dtype)

    def _backend(self, call: StepCall) -> Callable[[StepCall], Tensor]:
        """The backend's step for such calls, chosen once."""
        spec = ScanSpec(
            op="step",
            device=call.u.device.type,
            dtype=call.u.dtype,
            batch=call.u.shape[0],
            channels=call.u.shape[1],
            state_size=call.A.shape[1],
            features=frozenset({"D", "z"} if call.dt_bias is None else {"D", "z", "dt_bias"}),
        )
        chosen = choose_backend(spec).step
        assert chosen is not None
        return chosen


class DecodeStep:
    """All blocks and the final norm for one token a row.

    Args:
        backbone: The model's blocks.
        state: Read and overwritten in place by every call.
    """

    def __init__(self, backbone: MambaBackbone, state: MambaState) -> None:
        self.state = state
        self.norm_f = backbone.norm_f
        self.layers = [
            _LayerStep(block, layer) for block, layer in zip(backbone.blocks(), state.layers, strict=True)
        ]
        weights = [w for layer in self.layers for w in (layer.mixer.A_log, layer.mixer.conv1d.weight)]
        self._watched = [weight for weight in weights if not weight.is_inference()]
        self._versions = self._count()
        self._wanted = requested_backend()[0]

    def serves(self, state: MambaState) -> bool:
        """Whether these are still the tensors it works on (a change of rows makes new ones)."""
        return bool(self.layers) and state.layers[0].ssm is self.layers[0].ssm

    def refresh(self) -> None:
        """Work out again what depends on the weights, if they have changed since."""
        wanted = requested_backend()[0]
        if wanted != self._wanted:
            self._wanted = wanted
            for layer in self.layers:
                layer.step = None
        versions = self._count()
        if versions != self._versions:
            self._versions = versions
            for layer in self.layers:
                layer.refresh()

    def run(self, hidden: Tensor) -> Tensor:
        """(B, D) embedded tokens to (B, D) normed hidden states."""
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm_f(hidden)

    def __call__(self, hidden: Tensor) -> Tensor:
        """As `run`, after a look at whether the weights have changed."""
        self.refresh()
        return self.run(hidden)

    def _count(self) -> int:
        return sum(weight._version for weight in self._watched)


class GraphedStep:
    """A `DecodeStep` that is recorded at its first call and replayed from then on.

    The graph reads and writes fixed memory: one input, one output, the states. The states given to `load` are
    copied in.

    Args:
        step: What is recorded.
        capture: Records a function without arguments and returns what replays it.
    """

    def __init__(self, step: DecodeStep, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        self.step = step
        self._capture = capture
        self._replay: Callable[[], None] | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    @property
    def state(self) -> MambaState:
        """The states that the graph works on."""
        return self.step.state

    def serves(self, state: MambaState) -> bool:
        """As `DecodeStep.serves`."""
        return self.step.serves(state)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(B, D) embedded tokens to (B, D) normed hidden states."""
        self.step.refresh()
        if self._replay is None or self._input is None:
            self._record(hidden)
        assert self._replay is not None and self._input is not None and self._output is not None
        self._input.copy_(hidden)
        self._replay()
        return self._output.clone()

    def _record(self, hidden: Tensor) -> None:
        before = self.state.clone()
        with torch.inference_mode(False), torch.no_grad():
            self._input = hidden.clone()
            self._output = self.step.run(self._input).clone()

            def run() -> None:
                assert self._input is not None and self._output is not None
                self._output.copy_(self.step.run(self._input))

            self._replay = self._capture(run)
        self.state.copy_(before)


def cuda_capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record a function's kernels as a CUDA graph, after warming it up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


class GraphPool:
    """The recorded steps of one model that no cache uses at present, by number of rows.

    Recording takes about a second for a large model, so a step goes back here when its cache is gone. Copies
    of a model start with an empty pool.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[GraphedStep]] = {}
        self._lock = threading.Lock()

    def take(self, backbone: MambaBackbone, state: MambaState) -> tuple[GraphedStep, Callable[[], None]]:
        """A recorded (or still to be recorded) step with these states in it, and what gives it back.

        Raises:
            ConfigError: The model is not on a CUDA device, or a graph cannot stand for its blocks.
        """
        device = state.layers[0].ssm.device
        check_graphs(backbone, device)
        weights = tuple((weight.data_ptr(), weight.dtype) for weight in backbone.parameters())
        key = (state.layers[0].ssm.shape, state.layers[0].conv.dtype, weights)
        with self._lock:
            for other in [kept for kept in self._free if kept[2] != weights]:
                del self._free[other]  # the weights have moved
            free = self._free.setdefault(key, [])
            step = free.pop() if free else None
        if step is None:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # its memory outlives an inference mode around it
                step = GraphedStep(DecodeStep(backbone, state.clone()), cuda_capture)
        step.state.copy_(state)

        def give_back(step: GraphedStep = step) -> None:
            with self._lock:
                if key in self._free and step.serves(step.state):
                    self._free[key].append(step)

        return step, give_back

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPool:
        return GraphPool()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphPool, ()


def check_graphs(backbone: MambaBackbone, device: torch.device) -> None:
    """Raise where decoding cannot be recorded as a CUDA graph.

    Raises:
        ConfigError: The device is not a GPU, autocast is on, or blocks have hooks.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs=True needs the model on a CUDA device, but it is on {device}; leave cuda_graphs off, "
            "decoding works on fixed states without it too"
        )
    if torch.is_autocast_enabled(device.type):
        raise ConfigError(
            "cuda_graphs=True does not go with autocast, which casts the weights at every step; load the model "
            "with dtype=torch.bfloat16 instead"
        )
    if not steppable(backbone):
        raise ConfigError(
            "cuda_graphs=True skips the calls of blocks and mixers, but some of them have hooks or a forward of "
            "their own (as device_map and offloading give them); remove those or leave cuda_graphs off"
        )


def steppable(backbone: MambaBackbone) -> bool:
    """Whether going around the calls of blocks, mixers and convolutions changes nothing: nobody hooked into them."""
    around = [part for block in backbone.blocks() for part in (block, block.mixer, block.mixer.conv1d)]
    return not any(_hooked(module) for module in [backbone, *around])


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
