"""The playground's scripts are programs, not a package: load them by path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

PLAYGROUND = Path(__file__).parents[2] / "playground"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(PLAYGROUND))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(PLAYGROUND))


@pytest.fixture(scope="session")
def mini() -> Path:
    return PLAYGROUND / "mini"


@pytest.fixture(scope="session")
def scenes() -> ModuleType:
    pytest.importorskip("sklearn")
    return load("scenes")


@pytest.fixture(scope="session")
def phrases(scenes: ModuleType) -> ModuleType:
    return load("phrases")


@pytest.fixture(scope="session")
def make_data(scenes: ModuleType) -> ModuleType:
    return load("make_data")


@pytest.fixture(scope="session")
def options(make_data: ModuleType):
    return make_data.Options(captions=20, conversations=80, heldout_scenes=24, heldout_questions=100, seed=3)


@pytest.fixture(scope="session")
def dataset(make_data: ModuleType, options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("playground") / "mini"
    make_data.make_data(options, root, quiet=True)
    return root


@pytest.fixture(scope="session")
def mini_encoder(scenes: ModuleType) -> ModuleType:
    return load("mini_encoder")
