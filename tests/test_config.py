"""Configs: strict reading, typed overrides, documentation, recipes by path."""

from __future__ import annotations

import dataclasses
import enum
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from vlmamba.config import (
    FREE,
    LATER,
    Config,
    Free,
    Later,
    NotNegative,
    Positive,
    Share,
    apply_overrides,
    describe,
    diff_configs,
    dump_yaml,
    field_infos,
    flatten,
    load_recipe,
    load_yaml,
    marked,
    names_in,
    parse_overrides,
)
from vlmamba.errors import ConfigError, MissingFileError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Source(Config):
    path: str
    weight: float = 1.0


class Optim(Config):
    name: Literal["adamw", "radam"] = "adamw"
    """Which optimizer."""
    lr: float = 1e-3
    """Peak learning rate;
    over two lines."""
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr must be positive, got {self.lr}.")


class Run(Config):
    output: str
    optim: Optim = Optim()
    sources: tuple[Source, ...] = ()
    train: tuple[str, ...] = ("a",)
    steps: int | None = None
    clip: float | None = 1.0
    fast: bool = False
    color: Color = Color.RED
    root: Path = Path()
    size: int | tuple[int, int] = 3
    paths: str | tuple[str, ...] = "x"
    options: dict[str, Any] = {}  # noqa: RUF012 - Config copies it


def run(**changes: Any) -> Run:
    return Run(**{"output": "out", "sources": (Source(path="x.json"),), **changes})


class TestConfig:
    def test_frozen_and_keyword_only(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Optim().lr = 2.0  # type: ignore[misc]
        with pytest.raises(TypeError):
            Optim("adamw")  # type: ignore[call-arg, misc]

    def test_dict_defaults_are_not_shared(self) -> None:
        first = run()
        first.options["scan"] = "bsm"
        assert run().options == {}

    def test_round_trip(self) -> None:
        config = run(options={"scan": "bsm", "depth": 2}, color=Color.BLUE, size=(1, 2), root=Path("a/b"))
        assert Run.from_dict(config.to_dict()) == config

    def test_unknown_key_names_path_and_close_match(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown key 'optim.learning_rat'.*Known: name, lr, betas"):
            Run.from_dict({"output": "o", "optim": {"learning_rat": 1.0}})
        with pytest.raises(ConfigError, match=r"unknown key 'sources.0.weigth'.*Did you mean 'weight'\?"):
            Run.from_dict({"output": "o", "sources": [{"path": "x", "weigth": 1}]})

    def test_wrong_type_names_path_type_and_value(self) -> None:
        with pytest.raises(ConfigError, match=r"optim.lr: expected float, got 'fast' \(str\)"):
            Run.from_dict({"output": "o", "optim": {"lr": "fast"}})
        with pytest.raises(ConfigError, match=r"steps: expected int, got True"):
            Run.from_dict({"output": "o", "steps": True})
        with pytest.raises(
            ConfigError, match=r"optim.name: 'adamv' is not one of 'adamw', 'radam'. Did you mean "
        ):
            Run.from_dict({"output": "o", "optim": {"name": "adamv"}})
        with pytest.raises(
            ConfigError, match=r"optim.betas: expected 2 values, tuple\[float, float\]; got \[0.9\]"
        ):
            Run.from_dict({"output": "o", "optim": {"betas": [0.9]}})

    def test_missing_required(self) -> None:
        with pytest.raises(ConfigError, match=r"sources.1: missing path \(of Source\)"):
            Run.from_dict({"output": "o", "sources": [{"path": "x"}, {}]})

    def test_int_becomes_float(self) -> None:
        config = Run.from_dict({"output": "o", "optim": {"lr": 1}})
        assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)

    def test_replace_refuses_typos(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'steps'"):
            run().replace(step=3)

    def test_docs_and_describe(self) -> None:
        lines = {info.path: info for info in field_infos(Run)}
        assert lines["optim.name"].doc == "Which optimizer."
        assert lines["optim.lr"].doc == "Peak learning rate; over two lines."
        assert lines["optim.name"].type == "'adamw' | 'radam'"
        assert lines["output"].default == "(required)"
        assert "sources.0.weight" in lines
        assert "--optim.name  'adamw' | 'radam'  [adamw]\n    Which optimizer.\n" in describe(Run)


class TestYaml:
    def test_round_trip_with_class_on_top(self, tmp_path: Path) -> None:
        config = run(options={"a": [1, None]}, optim=Optim(lr=1e-5))
        file = tmp_path / "config.yaml"
        file.write_text(dump_yaml(config))
        assert file.read_text().splitlines()[0].startswith("class: ")
        assert load_yaml(file, Run) == config

    def test_yaml_numbers(self, tmp_path: Path) -> None:
        file = tmp_path / "c.yaml"
        file.write_text("output: o\noptim: {lr: 1e-5}\n")
        assert load_yaml(file, Run).optim.lr == 1e-5  # type: ignore[attr-defined]

    def test_errors(self, tmp_path: Path) -> None:
        file = tmp_path / "c.yaml"
        with pytest.raises(MissingFileError, match="there is no config file"):
            load_yaml(file)
        file.write_text("a: [")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_yaml(file)
        file.write_text("class: os:system\n")
        with pytest.raises(ConfigError, match="must name a config class of vlmamba"):
            load_yaml(file)
        file.write_text("output: 3\n")
        with pytest.raises(ConfigError, match=r"c.yaml: output: expected str, got 3"):
            load_yaml(file, Run)


class TestOverrides:
    def test_typed(self) -> None:
        words = (
            "--optim.lr 1e-5 --steps 7 --fast true --train a,b --optim.betas 0.8,0.9 --color blue",
            "--clip none --sources.0.weight 2 --options.scan csm --options.depth=3 output=other --size 4",
        )
        config, changes = apply_overrides(run(), " ".join(words).split())
        assert config.optim == Optim(lr=1e-5, betas=(0.8, 0.9))
        assert (config.steps, config.fast, config.train, config.clip) == (7, True, ("a", "b"), None)
        assert config.color is Color.BLUE and config.sources[0].weight == 2.0 and config.output == "other"
        assert config.options == {"scan": "csm", "depth": 3} and config.size == 4
        shown = {str(c) for c in changes}
        assert "optim.lr: 0.001 -> 1e-05" in shown
        assert "output: out -> other" in shown
        assert len(changes) == 13  # an option more, and the dict of options no longer empty

    def test_mapping_and_yaml_values(self) -> None:
        config, _ = apply_overrides(
            run(), {"train": "[x, 'y,z']", "sources": "[{path: a}, {path: b, weight: 0.5}]", "optim.lr": 2}
        )
        assert config.train == ("x", "y,z")
        assert config.sources == (Source(path="a"), Source(path="b", weight=0.5))
        assert config.optim.lr == 2.0

    @pytest.mark.parametrize(("text", "value"), [("a/b", "a/b"), ("a,b", ("a", "b")), ("[a]", ("a",))])
    def test_one_or_several(self, text: str, value: object) -> None:
        assert apply_overrides(run(), {"paths": text}).config.paths == value

    def test_bare_flag_is_true_and_dashes(self) -> None:
        assert parse_overrides(["--fast", "--a-b.c-d", "1", "--x=-3"]) == {
            "fast": "true",
            "a_b.c_d": "1",
            "x": "-3",
        }

    def test_negative_value(self) -> None:
        assert apply_overrides(run(), ["--steps", "-3"]).config.steps == -3

    def test_typo(self) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown key 'optim.lrr': Optim has no field 'lrr'. Did you mea"
        ):
            apply_overrides(run(), ["--optim.lrr", "1"])
        with pytest.raises(ConfigError, match=r"unknown key 'optim.lr.x': optim.lr is 0.001 \(float\)"):
            apply_overrides(run(), ["--optim.lr.x", "1"])
        with pytest.raises(ConfigError, match=r"unknown key 'sources.3.*has 1 entries"):
            apply_overrides(run(), ["--sources.3.weight", "1"])

    def test_wrong_type(self) -> None:
        with pytest.raises(ConfigError, match=r"optim.lr: expected float, got 'fast'"):
            apply_overrides(run(), ["--optim.lr", "fast"])
        with pytest.raises(ConfigError, match=r"steps: expected int, got 1.5"):
            apply_overrides(run(), ["--steps", "1.5"])
        with pytest.raises(ConfigError, match=r"fast: expected true or false, got 'yes'"):
            apply_overrides(run(), ["--fast", "yes"])

    def test_checks_see_all_overrides(self) -> None:
        with pytest.raises(ConfigError, match="must be positive"):
            apply_overrides(run(), {"optim.lr": "-1"})

    def test_stray_word(self) -> None:
        with pytest.raises(ConfigError, match="unexpected word 'oops'"):
            parse_overrides(["oops"])

    def test_conflicting_depths(self) -> None:
        with pytest.raises(ConfigError, match="as a whole"):
            apply_overrides(run(), {"optim": "{lr: 1}", "optim.lr": "2"})

    def test_diff_and_flatten(self) -> None:
        changes = diff_configs(run(), run(options={"k": 1}, sources=()))
        assert [c.path for c in changes] == [
            "sources.0.path",
            "sources.0.weight",
            "options",
            "sources",
            "options.k",
        ]
        assert flatten(run())["optim.betas"] == [0.9, 0.999]


RECIPE = """
from __future__ import annotations
from vlmamba.config import Config

class Inner(Config):
    lr: float = 0.1

class Top(Config):
    connector: str = "mlp"
    optim: Inner = Inner()
    seed: int = 0

def finetune(connector: str = "vss-l2", depth: int = 1) -> Top:
    return Top(connector=f"{connector}-{depth}")

def pretrain() -> Top:
    return Top(seed=1)

def helper(x: int) -> int:
    return x
"""


class TestRecipe:
    @pytest.fixture
    def clone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "vl_tiny.py").write_text(RECIPE)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_by_path_and_by_name(self, clone: Path) -> None:
        before = list(sys.path)
        by_path = load_recipe("train/vl_tiny.py:finetune", ["--connector", "qmamba", "--optim.lr", "1e-5"])
        by_name = load_recipe("vl_tiny:finetune", ["--connector=qmamba", "--optim.lr=1e-5"])
        assert sys.path == before
        assert by_path.config.to_dict() == by_name.config.to_dict()
        assert by_path.config.connector == "qmamba-1" and by_path.config.optim.lr == 1e-5
        assert {str(c) for c in by_path.changes} == {
            "connector: vss-l2-1 -> qmamba-1",
            "optim.lr: 0.1 -> 1e-05",
        }
        assert by_path.function == "finetune" and names_in("train") == ["vl_tiny"]

    def test_default_function(self, clone: Path) -> None:
        assert load_recipe("vl_tiny", default="pretrain").config.seed == 1
        with pytest.raises(ConfigError, match=r"holds several recipes: finetune, pretrain. Name one, for"):
            load_recipe("vl_tiny")

    def test_unknown_names(self, clone: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown recipe 'vl_tny'. Did you mean 'vl_tiny'\?.*Found in"):
            load_recipe("vl_tny:finetune")
        with pytest.raises(
            ConfigError, match=r"has no recipe 'finetun'. Did you mean 'finetune'\? It has: f"
        ):
            load_recipe("vl_tiny:finetun")
        with pytest.raises(MissingFileError, match=r"there is no recipe file .*none.py"):
            load_recipe("train/none.py:finetune")

    def test_unknown_flag(self, clone: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown flag --conector. Did you mean 'connector'\?"):
            load_recipe("vl_tiny:finetune", ["--conector", "mlp"])
        with pytest.raises(ConfigError, match=r"depth: expected int, got 'x'"):
            load_recipe("vl_tiny:finetune", ["--depth", "x"])

    def test_file_without_recipes_and_syntax_error(self, clone: Path) -> None:
        (clone / "a.py").write_text("x = 1\n")
        with pytest.raises(ConfigError, match="defines no function that returns a config"):
            load_recipe("./a.py")
        (clone / "b.py").write_text("def f(:\n")
        with pytest.raises(ConfigError, match=r"b.py:1: "):
            load_recipe("./b.py:f")


class Inner(Config):
    workers: Free[int] = 4
    size: int = 1


class Outer(Config):
    inner: Inner = Inner()
    output: Free[str]
    kind: Later[Literal["a", "b"] | None] = None
    parts: Free[tuple[Inner, ...]] = ()


def test_settings_declare_whether_they_may_change_and_whether_they_came_later() -> None:
    assert marked(Outer, FREE) == {"inner.workers": 4, "output": None, "parts": []}
    assert marked(Outer, LATER) == {"kind": None}
    made = Outer.from_dict({"output": "x", "kind": "b", "parts": [{"workers": 2}]})
    assert made.parts == (Inner(workers=2),)
    assert apply_overrides(made, {"parts.0.workers": "3", "kind": "none"}).config.kind is None
    with pytest.raises(ConfigError, match=r"kind: 'c' is not one of|kind: expected"):
        apply_overrides(made, {"kind": "c"})


class Bounded(Config, at="part"):
    size: Positive[int] = 1
    pause: Free[NotNegative[float | None]] = None
    dropped: Share[float] = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        if self.seen > self.size:
            raise ConfigError("part.seen is more than part.size.")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 0}, "part.size must be positive, got 0."),
        ({"pause": -0.5}, "part.pause must not be negative, got -0.5."),
        ({"dropped": 1.5}, "part.dropped is a share from 0 to 1, got 1.5."),
        ({"dropped": float("nan")}, "part.dropped is a share from 0 to 1, got nan."),
        ({"seen": 2}, "part.seen is more than part.size."),
    ],
)
def test_bounds_that_types_declare(values: dict[str, Any], says: str) -> None:
    Bounded(size=1, pause=0.0, dropped=1.0, seen=1)
    for make in (
        lambda: Bounded(**values),
        lambda: Bounded().replace(**values),
        lambda: Bounded.from_dict(values),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value) == says
    assert "pause" in marked(Bounded, FREE)
