"""The other harnesses: the real package where it is installed, else base classes with its documented signatures."""

from __future__ import annotations

import abc
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vlmamba.integrations import lmms_eval as plugin
from vlmamba.integrations import vlmevalkit
from vlmamba.testing import tiny_model, write_images


@pytest.fixture()
def checkpoint(tmp_path):
    """A tiny exported model with opinions."""
    model, processor = tiny_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "run/export")
    processor.save_pretrained(tmp_path / "run/export")
    return tmp_path / "run"


@pytest.fixture()
def pictures(tmp_path):
    return [tmp_path / "images" / name for name in write_images(tmp_path / "images", 3)]


@dataclass(frozen=True)
class ModelManifest:
    """As in lmms_eval/models/registry_v2.py (0.7)."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class lmms(abc.ABC):
    """As in lmms_eval/api/model.py (0.7)."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, req, res: None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    def clean(self) -> None:
        self.cleaned = True


@dataclass
class GenerationResult:
    """As in lmms_eval/api/instance.py (0.7)."""

    text: str
    token_counts: Any = None


def install(monkeypatch, modules):
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture()
def lmms_eval(monkeypatch):
    """lmms-eval."""
    for cached in (plugin._classes, plugin._pair_class):
        cached.cache_clear()
    if importlib.util.find_spec("lmms_eval") is None:
        install(
            monkeypatch,
            {
                "lmms_eval": {},
                "lmms_eval.api": {},
                "lmms_eval.models": {},
                "lmms_eval.api.model": {"lmms": lmms},
                "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
                "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
            },
        )
    yield plugin
    for cached in (plugin._classes, plugin._pair_class):
        cached.cache_clear()


class BaseModel:
    """As in vlmeval/vlm/base.py (0.2)."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def __init__(self) -> None:
        self.dump_image_func = None

    def set_dump_image(self, function: Any) -> None:
        self.dump_image_func = function

    def dump_image(self, line: Any, dataset: Any) -> Any:
        return self.dump_image_func(line)

    def generate(self, message: Any, dataset: Any = None) -> str:
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


KINDS = {
    "MMBench_DEV_EN": "MCQ",
    "MMBench_DEV_CN": "MCQ",
    "POPE": "Y/N",
    "TextVQA_VAL": "VQA",
    "MMVet": "VQA",
}


@pytest.fixture()
def vlmeval(monkeypatch):
    """VLMEvalKit's modules."""
    vlmevalkit.model_class.cache_clear()
    config: dict[str, Any] = {"supported_VLM": {}}
    install(
        monkeypatch,
        {
            "vlmeval": {},
            "vlmeval.config": config,
            "vlmeval.vlm": {},
            "vlmeval.vlm.base": {"BaseModel": BaseModel},
            "vlmeval.dataset": {"DATASET_TYPE": KINDS.__getitem__},
        },
    )
    yield sys.modules["vlmeval.config"]
    vlmevalkit.model_class.cache_clear()
