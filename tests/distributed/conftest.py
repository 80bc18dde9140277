"""A tiny task on disk for several processes; the one of tests/training, with fewer files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlmamba.testing.processes import Ended, run_ranks

PROGRAMS = Path(__file__).with_name("programs.py")
ENVIRONMENT = {"VLMAMBA_PROGRESS": "0", "VLMAMBA_SSM_BACKEND": "torch"}
ROOT = Path(__file__).parents[2]
ZERO = {
    f"zero{stage}": {
        "parallel": f"zero{stage}",
        "sharding.deepspeed": str(ROOT / "train" / "deepspeed" / f"zero{stage}.json"),
    }
    for stage in (2, 3)
}
Ranks = Callable[..., list[Ended]]


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_shared = _load(Path(__file__).parents[1] / "training" / "conftest.py", "training_conftest")
weights = _shared.weights
task = _shared.task
make_config = _shared.make_config


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No progress bars, a cache of its own, and a scan that need not be compiled first, in every process."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def zero() -> dict[str, dict[str, Any]]:
    """Settings of the DeepSpeed strategies; skips where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return ZERO


@pytest.fixture
def values(make_config: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``values({"optim.lr": 1e-3}, output="a")``: the plain values of the small run."""

    def make(changes: dict[str, Any] | None = None, *, output: str = "run") -> dict[str, Any]:
        changes = {"stall_seconds": 200.0, **(changes or {})}
        return make_config(changes, output=output).to_dict()  # type: ignore[no-any-return]

    return make


@pytest.fixture
def programs() -> ModuleType:
    """The functions of programs.py, to be called in this process."""
    return _load(PROGRAMS, "programs")


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """``ranks("train", values)``: the ends of two processes that call the function of programs.py."""
    count = 0

    def call(function: str, *arguments: Any, world_size: int = 2, **options: Any) -> list[Ended]:
        nonlocal count
        count += 1
        environment = {**ENVIRONMENT, "VLMAMBA_CACHE": str(tmp_path / "cache")}
        environment |= options.pop("environment", {})
        return run_ranks(
            PROGRAMS,
            function,
            *arguments,
            world_size=world_size,
            folder=tmp_path / f"ranks-{count}",
            environment=environment,
            seconds=options.pop("seconds", 240.0),
            **options,
        )

    return call
