"""Parts of the user's own, in a module beside the data: trained, exported, reloaded, resumed and compared."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmamba import registry
from vlmamba.ablations import Row, Table
from vlmamba.ablations.execute import Execution, Store
from vlmamba.ablations.graph import expand
from vlmamba.cli import main
from vlmamba.config import load_recipe, load_yaml
from vlmamba.errors import CheckpointError, ConfigError
from vlmamba.models.language import load_language_model
from vlmamba.models.language.families import family_of
from vlmamba.models.vision import load_vision_encoder
from vlmamba.registry import PLUGINS, is_admitted, outside, users_words
from vlmamba.training.checkpoint import latest_checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_connector.md"
NAME = "my_pool:PoolConnector"
RELOAD = """
import os, sys
from vlmamba.errors import ConfigError
from vlmamba.common.load import load_model

try:
    load_model(sys.argv[1])
except ConfigError as error:
    print(error)
assert "my_pool" not in sys.modules
os.environ["VLMAMBA_PLUGINS"] = "my_other, my_pool"
model, processor = load_model(sys.argv[1])
print(type(model.multi_modal_projector).__module__, processor.num_image_tokens, processor.chat_template)
"""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{% if loop.first %}<image>{% endif %}Q{% endif %}{% endfor %}"
)


@pytest.fixture
def outsider(project, monkeypatch):
    """The project with the page's connector in a module, and a template."""
    (code,) = re.findall(r"<!-- run: file -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (project / "my_pool.py").write_text(code)
    (project / "own.jinja").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(project)
    monkeypatch.setattr(registry, "_admitted", set())
    monkeypatch.setenv("PYTHONPATH", f"{project}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield project
    for name in ("my_pool", "my_parts"):
        sys.modules.pop(name, None)


@pytest.mark.ci
def test_a_connector_of_ones_own_is_trained_evaluated_reloaded_and_resumed(outsider, table):
    settings = {
        "connector": NAME, "model.connector.options": {"window": 2}, "model.chat": "own.jinja", "save_every": 1,
    }  # fmt: skip
    rows = [Row(name="pool", settings=settings)]
    graph = expand(
        Table(title="Own", recipe="tiny:pretrain", seeds=(1,), columns=("tiny",), rows=rows), "store"
    ).without_speed()
    store, told = Store("store"), []
    assert Execution(graph, store, report=told.append).run(), "\n".join(told)  # each in a process of its own
    cell = graph.cells["pool", 1]
    node = graph.nodes[cell.train[0]]
    run = store.result(node.id)

    found = subprocess.run(
        [sys.executable, "-c", RELOAD, str(run)], capture_output=True, text=True, check=True
    ).stdout
    assert f"connector '{NAME}' is code from outside of vlmamba" in found
    assert f"my_pool 4 {TEMPLATE}" in found

    whole = (run / "export" / "connector.safetensors").read_bytes()
    last = latest_checkpoint(run)
    shutil.rmtree(last)
    shutil.rmtree(run / "export")
    assert main(list(node.words)) == 0
    assert latest_checkpoint(run) == last
    assert (run / "export" / "connector.safetensors").read_bytes() == whole

    (outsider / "own.jinja").write_text(TEMPLATE.replace("Q", "R"))
    shutil.rmtree(last)
    with pytest.raises(CheckpointError, match="or chat template have changed"):
        from vlmamba.training.run import run as train

        train(load_yaml(f"store/nodes/{node.id}.yaml"), resume=True)
    changed = expand(
        Table(title="Own", recipe="tiny:pretrain", seeds=(1,), columns=("tiny",), rows=rows), "store"
    ).cells["pool", 1]
    assert set(changed.train).isdisjoint(cell.train)  # another template is another run


def test_what_is_read_from_a_file_imports_nothing(outsider, monkeypatch):
    assert not is_admitted(NAME)
    recipe = load_recipe("train/tiny.py:pretrain")
    text = outsider / "run.yaml"
    from vlmamba.config import dump_yaml

    text.write_text(dump_yaml(recipe.config).replace("name: mlp", f"name: {NAME}"))
    assert load_yaml(text).model.connector.name == NAME  # it can be read and shown
    assert "my_pool" not in sys.modules
    with pytest.raises(
        ConfigError, match=r"a name that was read from a file imports nothing. If you trust it"
    ):
        outside(NAME, "connector", torch.nn.Module)
    monkeypatch.setenv(PLUGINS, "my_pool.inner,my_pool2")
    assert not is_admitted(NAME)
    monkeypatch.setenv(PLUGINS, "other, my_pool")
    assert is_admitted(NAME) and is_admitted("my_pool.inner:Part") and not is_admitted("my_pool2:Part")


def test_what_is_not_there_or_is_something_else_is_named(outsider):
    with pytest.raises(ConfigError, match=r"there is no module 'my_gone' here .* Install the package"):
        load_recipe("train/tiny.py:pretrain", ["--connector", "my_gone:Pool"])
    with pytest.raises(
        ConfigError, match=r"has no 'PoolConector' that is a Connector .*Did you mean 'PoolConnector'"
    ):
        load_recipe("train/tiny.py:pretrain", ["--connector", "my_pool:PoolConector"])
    with pytest.raises(ConfigError, match=r"has no 'system' that is a Connector"):
        load_recipe("train/tiny.py:pretrain", ["--connector", "os:system"])
    with pytest.raises(ConfigError, match=r"has no option 'windw'"):
        load_recipe(
            "train/tiny.py:pretrain", ["--connector", NAME, "--model.connector.options", "{windw: 2}"]
        )


PARTS = """
from pathlib import Path
from typing import Any

from vlmamba.evaluation import Sample, Task
from vlmamba.models.language.families import LanguageFamily
from vlmamba.models.language.mamba import family as mamba
from vlmamba.models.vision.siglip import SiglipEncoder


class Encoder(SiglipEncoder):
    family = "my_parts:Encoder"


class Nameless(SiglipEncoder):
    pass


def language(config: Any) -> LanguageFamily:
    return mamba(config)


def task() -> Task:
    return Task("own", [Sample("0", (Path("data/images/x.png"),), "What?", "That.", "kind")], max_new_tokens=4)
"""


def test_encoders_languages_and_tasks_of_ones_own(outsider, tmp_path):
    from vlmamba.common.load import load_model
    from vlmamba.evaluation.cli import load_tasks
    from vlmamba.models.builder import build_model

    (outsider / "my_parts.py").write_text(PARTS)
    words = ["--model.vision.family", "my_parts:Encoder", "--model.language.family", "my_parts:language"]
    config = load_recipe("train/tiny.py:pretrain", words).config
    model, processor = build_model(config.model)
    assert type(model.vision_tower).__name__ == "Encoder"
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    again, _ = load_model(tmp_path / "export")
    assert again.config.text_config.vlmamba_family == "my_parts:language"
    assert type(again.vision_tower).__name__ == "Encoder" and family_of(again.language_model).packs is True
    with users_words():
        with pytest.raises(ConfigError, match="write family = 'my_parts:Nameless' in the class"):
            load_vision_encoder("my_parts:Nameless", "weights/vision")
        with pytest.raises(ConfigError, match="has no 'speech' that is a LanguageFamily or a function"):
            load_language_model("weights/language", family="my_parts:speech")
    assert list(load_tasks("my_parts:task")) == ["my_parts:task"]
