"""The benchmarks are programs, not a package: load them by path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    return _load


@pytest.fixture(scope="session")
def common() -> ModuleType:
    return _load("_common")
