"""Which backend serves a call, and why.

The choice among automatic backends is by priority; it is logged once for each kind of call. A backend named
by the caller (`backend=`), by `use_backend` or by the environment variable VLMAMBA_SSM_BACKEND serves the
call or raises.

A new backend is one file that defines a `Backend`, and one line in `BACKENDS` below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlmamba.errors import BackendError
from vlmamba.registry import Registry, close_matches
from vlmamba.ssm.spec import Backend, ScanSpec, Verdict

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "VLMAMBA_SSM_BACKEND"

BACKENDS: Registry[Backend] = Registry("state-space backend")
BACKENDS.add("reference", "vlmamba.ssm.backends.reference:BACKEND")
BACKENDS.add("torch", "vlmamba.ssm.backends.torch_chunked:BACKEND")
BACKENDS.add("cpu", "vlmamba.ssm.backends.cpu:BACKEND")
BACKENDS.add("mamba_ssm", "vlmamba.ssm.backends.mamba_ssm:BACKEND")
BACKENDS.add("triton", "vlmamba.ssm.backends.triton:BACKEND")
BACKENDS.add("shapes", "vlmamba.ssm.backends.shapes:BACKEND")

_forced: list[str | None] = []
_logged: set[tuple[object, ...]] = set()
_chosen: dict[tuple[ScanSpec, str | None], Backend] = {}
_CHOICES_KEPT = 4096
_MISSING = {"conv": "it has no causal convolution", "step": "it has no one-step update"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One row of `explain`: a backend and what it says about a call."""

    name: str
    priority: int
    verdict: Verdict
    chosen: bool


def get_backend(name: str) -> Backend:
    """The backend of that exact name.

    Raises:
        BackendError: There is none; the message lists the known names.
    """
    names = BACKENDS.names()
    if name not in names:
        raise BackendError(
            f"unknown state-space backend {name!r}.{close_matches(name, names)} Known: {', '.join(names)}."
        )
    return BACKENDS.get(name)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Let every call inside the `with` block that names no backend use this one (None: choose automatically).

    It comes before VLMAMBA_SSM_BACKEND and after the `backend=` argument of a call, and holds in all threads,
    so that a layer computed again in backward (activation checkpointing) meets the same backend.

    Raises:
        BackendError: The name is unknown (at once), or the backend cannot serve a call (at that call).
    """
    if name is not None:
        get_backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def requested_backend(name: str | None = None) -> tuple[str | None, str]:
    """The backend asked for, if any, and who asks for it, in words."""
    if name is not None:
        return name, "backend="
    if _forced:
        return _forced[-1], "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE


def judge(backend: Backend, spec: ScanSpec) -> Verdict:
    """True when the backend runs here and serves the call, otherwise its reason."""
    available = backend.available()
    if available is not True:
        return available
    if getattr(backend, spec.op) is None:
        return _MISSING[spec.op]
    return backend.supports(spec)


def choose_backend(spec: ScanSpec, name: str | None = None) -> Backend:
    """The backend that serves a call; worked out once for each spec and kept.

    Args:
        spec: The call.
        name: The backend the caller asks for, or None.

    Raises:
        BackendError: The backend asked for is unknown or cannot serve; or no backend can.
    """
    wanted, asker = requested_backend(name)
    kept = _chosen.get((spec, wanted))
    if kept is not None:
        return kept
    if len(_chosen) >= _CHOICES_KEPT:  # lengths vary from batch to batch
        _chosen.clear()
    backend = _chosen[spec, wanted] = _choose(spec, wanted, asker)
    return backend


def forget_choices() -> None:
    """Let the next calls ask the backends again, after something about the machine or the registry changed."""
    _chosen.clear()


def _choose(spec: ScanSpec, wanted: str | None, asker: str) -> Backend:
    if wanted is not None:
        backend = get_backend(wanted)
        verdict = judge(backend, spec)
        if verdict is not True:
            raise BackendError(
                f"backend {wanted!r} (asked for by {asker}) cannot serve this call ({spec.describe()}): "
                f"{verdict}. Leave the choice free or name another one:\n{explain(spec)}"
            )
        return backend
    for backend in _by_priority():
        if judge(backend, spec) is True:
            _log_choice(backend, spec)
            return backend
    raise BackendError(
        f"no state-space backend can serve this call ({spec.describe()}):\n{explanations_text(spec)}"
    )


def explanations(spec: ScanSpec) -> list[Explanation]:
    """What each backend says about a call, best first."""
    rows = []
    wanted, _ = requested_backend()
    found = False
    for backend in _by_priority():
        verdict = judge(backend, spec)
        chosen = verdict is True and (backend.name == wanted if wanted else not found)
        found = found or chosen
        rows.append(Explanation(backend.name, backend.priority, verdict, chosen))
    return rows


def explanations_text(spec: ScanSpec) -> str:
    """`explanations` as lines of text."""
    rows = explanations(spec)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        says = "can serve" if row.verdict is True else row.verdict
        lines.append(f"  {'*' if row.chosen else ' '} {row.name:<{width}}  {says}")
    return "\n".join(lines)


def explain(spec: ScanSpec | None = None) -> str:
    """A table of all backends for a call: the chosen one is starred, the others say why they cannot serve.

    Args:
        spec: The call; by default a plain float32 scan on the CPU.
    """
    spec = spec or ScanSpec(batch=1, length=1024, channels=1536, state_size=16, needs_grad=True)
    return f"{spec.describe()}\n{explanations_text(spec)}"


def _by_priority() -> list[Backend]:
    return sorted((BACKENDS.get(name) for name in BACKENDS.names()), key=lambda backend: -backend.priority)


def _log_choice(backend: Backend, spec: ScanSpec) -> None:
    key = (backend.name, spec.op, spec.device, spec.dtype, spec.features, spec.needs_grad)
    if key in _logged:
        return
    _logged.add(key)
    logger.info("state-space backend %r serves: %s", backend.name, spec.describe())
